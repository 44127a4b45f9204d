"""Attention on problems that nobody chose: lengths, masks and their combinations, features, strides and layouts."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

import maskops
from maskops import masks, testing
from maskops.backend import BACKENDS
from maskops.masks import Mask
from maskops.testing import Case
from tests.fuzz import LENGTHS, STRIDES, Property, dtypes, lengths, strided

BUDGET = importlib.import_module("maskops.testing.check")  # the package has a function of this name
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case of the kit, how its inputs lie in memory, and, where it is packed, what varlen_attention takes."""

    case: Case
    description: str
    strides: tuple[str, str, str]
    instruction_set: int
    cu_seqlens: tuple[list[int], list[int]] | None = None
    pattern: Mask | None = None


@st.composite
def patterns(draw: Draw, depth: int = 0) -> tuple[Mask, str]:
    """A pattern and how it is written."""
    kind = draw(st.sampled_from(["causal", "window", "prefix", "chunked", "full"] + ["and", "or"] * (depth < 2)))
    if kind == "causal":
        return masks.causal(), "causal()"
    if kind == "full":
        return masks.full(), "full()"
    if kind == "window":
        left, right = draw(st.integers(0, 70)), draw(st.integers(0, 70))
        return masks.sliding_window(left, right), f"sliding_window({left}, {right})"
    if kind in ("prefix", "chunked"):
        size = draw(st.sampled_from(LENGTHS[1:]))
        return (masks.prefix(size) if kind == "prefix" else masks.chunked(size)), f"{kind}({size})"
    (one, first), (other, second) = draw(patterns(depth + 1)), draw(patterns(depth + 1))
    return (one & other, f"({first} & {second})") if kind == "and" else (one | other, f"({first} | {second})")


def bits(size: tuple[int, ...], seed: int, share: float) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share


@st.composite
def problems(draw: Draw) -> Problem:
    kv_heads, group = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2, 3, 8)))
    head_dim, value_dim = draw(st.sampled_from((8, 1, 5, 16, 17, 33, 64))), draw(st.sampled_from((8, 3, 16, 40)))
    pattern, words = draw(st.one_of(st.just((None, "")), patterns()))
    layout = draw(st.sampled_from(("none", "lengths", "left", "holes", "keys", "key holes", "documents", "dense")))
    batch, q_len = draw(st.integers(1, 3)), draw(lengths)
    k_len = draw(lengths) if layout in ("none", "keys", "key holes", "dense") else q_len
    cu_seqlens, sequences = None, ()
    seed, share = draw(st.integers(0, 1000)), draw(st.sampled_from((0.1, 0.5, 0.95)))
    sizes = draw(st.lists(st.integers(0, k_len), min_size=batch, max_size=batch))
    laid: Mask | None = None
    if layout == "documents":
        batch = 1
        pieces = draw(st.lists(st.integers(0, 70), min_size=1, max_size=6))
        own = draw(st.booleans())
        key_pieces = draw(st.lists(st.integers(0, 70), min_size=len(pieces), max_size=len(pieces))) if own else pieces
        tail = draw(st.sampled_from((0, 0, 30)))
        offsets = [[0, *torch.tensor(p).cumsum(0).tolist()] for p in (pieces, key_pieces)]
        q_len, k_len = offsets[0][-1] + tail, offsets[1][-1] + tail
        cu_seqlens = (offsets[0], offsets[1])
        laid = masks.documents(
            cu_seqlens=torch.tensor(offsets[0]), cu_seqlens_k=torch.tensor(offsets[1]) if own else None
        )
        words += f" documents {pieces} {key_pieces} + {tail}"
    elif layout == "lengths":
        laid = masks.padding(torch.tensor(sizes))
    elif layout == "left":
        laid = masks.padding(torch.tensor(sizes), side="left")
    elif layout == "keys":
        laid = masks.key_padding(torch.tensor(sizes))
    elif layout == "holes":
        laid = masks.padding(bits((batch, k_len), seed, share))
    elif layout == "key holes":
        laid = masks.key_padding(bits((batch, k_len), seed, share))
    elif layout == "dense":
        heads = draw(st.sampled_from((1, kv_heads * group)))
        laid = masks.dense(bits((draw(st.sampled_from((1, batch))), heads, q_len, k_len), seed, share))
    mask = laid if pattern is None else pattern if laid is None else laid & pattern
    lacks = BACKENDS["cpu"].ops["attention"].lacks
    served = [name for name in ("bias", "alibi_slopes", "sinks") if name not in lacks]
    features = draw(st.sets(st.sampled_from(served), max_size=3)) if served else set()
    heads = kv_heads * group
    case = Case(
        "drawn",
        "",
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        value_dim=value_dim,
        mask=lambda device: mask if mask is not None or "alibi_slopes" not in features else masks.full(),
        dtype=draw(dtypes),
        packed=layout == "documents",
        sequences=sequences,
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0))),
        bias_shape=None
        if "bias" not in features
        else tuple(draw(st.sampled_from((1, size))) for size in (batch, heads, q_len, k_len)),
        alibi="alibi_slopes" in features,
        sinks="sinks" in features,
    )
    return Problem(
        case,
        f"{layout} {sizes} {words}",
        draw(st.tuples(*[st.sampled_from(STRIDES)] * 3)),
        draw(st.integers(0, 2)),
        cu_seqlens,
        pattern,
    )


def check_attention(problem: Problem) -> None:
    """Outputs and gradients within the error budget, zero where nothing is seen, deaf to NaN where nothing may look."""
    case = problem.case
    if testing.refusals("cpu", case):  # a dense mask, as long as no kernel takes it
        return
    ours = testing.attention_on("cpu", case)

    def moved(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        q, k, v = (strided(x, how) for x, how in zip((q, k, v), problem.strides, strict=True))
        out, lse = ours(q, k, v, allowed, **keywords)
        return out, lse

    # Roundings that the suite's chosen cases stay below are exceeded by the worst of some ten thousand. Scores that a
    # slope makes large round in proportion, and so does the normaliser that the backward pass recomputes them with.
    slack = 4.0
    if case.alibi:
        slopes = case.extras()["alibi_slopes"]
        assert isinstance(slopes, Tensor)
        slack += float(slopes.max()) * max(case.q_len, case.k_len) / 16.0
    with mock.patch.object(BUDGET, "SLACK", slack * BUDGET.SLACK):
        testing.check(moved, case, parts=("numbers", "poison")).raise_if_failed()


def check_varlen(problem: Problem) -> None:
    """The packed function is the padded one with a batch of 1."""
    case = problem.case
    if problem.cu_seqlens is None or testing.refusals("cpu", case):
        return
    q, k, v = (x.to(case.dtype) for x in case.inputs())
    keywords: dict[str, Any] = {
        name: x.float() if isinstance(x, Tensor) else x for name, x in case.extras().items() if name != "bias"
    }
    bias = case.extras().get("bias")
    if isinstance(bias, Tensor):
        keywords["bias"] = bias.float()
    keywords |= {"softmax_scale": case.softmax_scale, "return_lse": True, "backend": "cpu"}
    out, lse = maskops.attention(q, k, v, case.mask("cpu"), **keywords)
    cu_q, cu_k = (torch.tensor(offsets, dtype=torch.int32) for offsets in problem.cu_seqlens)
    packed = [strided(x[0].transpose(0, 1), how) for x, how in zip((q, k, v), problem.strides, strict=True)]
    varlen_out, varlen_lse = maskops.varlen_attention(*packed, cu_q, cu_k, mask=problem.pattern, **keywords)
    torch.testing.assert_close(varlen_out, out[0].transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(varlen_lse, lse[0], rtol=0, atol=0)


PROPERTIES = {
    "attention": Property(problems(), check_attention),
    "varlen_attention": Property(problems().filter(lambda problem: problem.cu_seqlens is not None), check_varlen),
}

test_attention = PROPERTIES["attention"].test(60)
test_varlen_attention = PROPERTIES["varlen_attention"].test(15)
