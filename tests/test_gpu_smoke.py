"""One small case of each op, backend and pass, against the reference in float64: a minute on a device.

What a device shows first: a kernel that does not launch, a wrong stream, a wrong address, a missing barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks, testing
from maskops.backend import BACKENDS
from maskops.ops.attention.api import attention
from tests.served import AT_HOME, for_devices

pytestmark = [pytest.mark.devices, pytest.mark.gpu_smoke]

Outputs = tuple[Tensor, ...]
Problem = tuple[dict[str, tuple[int, ...]], Callable[[str, dict[str, Tensor]], Outputs]]

OFFSETS = torch.tensor([0, 70, 70, 75, 201], dtype=torch.int32)
LENGTHS = torch.tensor([40, 75])
LONG = torch.tensor([300, 2048])
BEFORE, PAGES = torch.tensor([12, 3]), torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
TARGET = (torch.arange(48) * 7 % 320).masked_fill(torch.arange(48) % 4 == 1, -100)


def _packed(backend: str, x: dict[str, Tensor]) -> Outputs:
    mask = masks.documents(cu_seqlens=OFFSETS) & masks.causal()
    plan = mask.spans(210, 210, device=x["q"].device)
    out, lse = maskops.varlen_attention(x["q"], x["k"], x["v"], mask=plan, return_lse=True, backend=backend)
    return out, lse.nan_to_num(neginf=0.0)


def _padded(backend: str, x: dict[str, Tensor]) -> Outputs:
    mask = masks.padding(LENGTHS) & masks.causal() & (masks.sliding_window(20, 0) | masks.prefix(3))
    features: dict[str, Any] = {name: x[name] for name in ("bias", "sinks", "alibi_slopes")}
    return (attention(x["q"], x["k"], x["v"], mask, softcap=3.0, backend=backend, **features),)


def _decoded(backend: str, x: dict[str, Tensor]) -> Outputs:
    pages = [x[name].detach().unflatten(2, (-1, 16)).transpose(1, 2).flatten(0, 1).contiguous() for name in "kv"]
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    queries = x["q"].detach()
    whole = maskops.decode_attention(queries, x["k"].detach(), x["v"].detach(), LENGTHS, backend=backend)
    return whole, maskops.decode_attention(queries, *pages, LENGTHS, block_table=table, backend=backend)


def _dense(backend: str, x: dict[str, Tensor]) -> Outputs:
    """Heads between two widths of tiles, a mask that is read as bits."""
    rows, keys = torch.arange(75)[:, None], torch.arange(75)
    mask = masks.dense(((rows * 7 + keys * 5) % 3 == 0)[None, None]) & masks.padding(LENGTHS)
    return (attention(x["q"], x["k"], x["v"], mask, backend=backend),)


def _dropped(backend: str, x: dict[str, Tensor]) -> Outputs:
    """The generator says which weights are dropped, on every backend."""
    torch.manual_seed(77)
    return (attention(x["q"], x["k"], x["v"], masks.causal(), dropout_p=0.3, backend=backend),)


def _unpadded(backend: str, x: dict[str, Tensor]) -> Outputs:
    """There and back, around attention of the documents."""
    valid = torch.arange(75) < LENGTHS[:, None]
    with maskops.use_backend(backend):
        rows = [maskops.unpad_input(x[name], valid, capacity=130) for name in "qkv"]
        (q, indices, offsets, *_), (k, *_), (v, *_) = rows
        mask = masks.documents(cu_seqlens=offsets).spans(130, 130, device=q.device)
        out = maskops.varlen_attention(q, k, v, mask=mask, backend=backend)
        return (maskops.pad_input(out, indices, 2, 75),)


def _decoded_in_parts(backend: str, x: dict[str, Tensor]) -> Outputs:
    """Groups of seven heads, a few queries, keys shared among programs and merged."""
    inputs = [x[name].detach() for name in "qkv"]
    return maskops.decode_attention(*inputs, LONG, masks.causal(), return_lse=True, backend=backend)


def _appended(backend: str, x: dict[str, Tensor]) -> Outputs:
    """Over the end of a page, into pages that lie in another order."""
    caches = [x[name].detach().clone() for name in ("k_pages", "v_pages")]
    new = [x[name].detach() for name in ("k", "v")]
    maskops.append_kv(*caches, *new, BEFORE, block_table=PAGES, backend=backend)
    return tuple(caches)


def _loss(backend: str, x: dict[str, Tensor]) -> Outputs:
    with maskops.use_backend(backend, fallback="error"):
        found = maskops.cross_entropy(x["logits"], TARGET, label_smoothing=0.1, z_loss=1e-3, return_lse=True)
    return found.loss, found.lse


def _linear_loss(backend: str, x: dict[str, Tensor]) -> Outputs:
    with maskops.use_backend(backend, fallback="error"):
        return (maskops.linear_cross_entropy(x["hidden"], x["weight"], TARGET),)


def _softmax(backend: str, x: dict[str, Tensor]) -> Outputs:
    mask = masks.padding(LENGTHS) & masks.causal()
    with maskops.use_backend(backend, fallback="error"):
        return (maskops.masked_softmax(x["scores"], mask),)


def _softmax_of_columns(backend: str, x: dict[str, Tensor]) -> Outputs:
    allowed = (torch.arange(70)[:, None] + torch.arange(33)) % 5 != 0
    with maskops.use_backend(backend, fallback="error"):
        return (maskops.masked_softmax(x["scores"], allowed, dim=1),)


QKV = {"q": (2, 4, 75, 64), "k": (2, 2, 75, 64), "v": (2, 2, 75, 64)}
PROBLEMS: dict[str, Problem] = {
    "attention, packed": ({"q": (210, 4, 64), "k": (210, 2, 64), "v": (210, 2, 64)}, _packed),
    "attention, padded, all features": (
        {**QKV, "bias": (1, 4, 75, 75), "sinks": (4,), "alibi_slopes": (4,)},
        _padded,
    ),
    "attention, dense mask, odd width": ({"q": (2, 2, 75, 96), "k": (2, 1, 75, 96), "v": (2, 1, 75, 96)}, _dense),
    "attention, dropout": ({"q": (1, 2, 75, 32), "k": (1, 2, 75, 32), "v": (1, 2, 75, 32)}, _dropped),
    "attention, unpadded": ({"q": (2, 75, 2, 32), "k": (2, 75, 2, 32), "v": (2, 75, 2, 32)}, _unpadded),
    "decode_attention, in parts": (
        {"q": (2, 7, 3, 32), "k": (2, 1, 2048, 32), "v": (2, 1, 2048, 32)},
        _decoded_in_parts,
    ),
    "append_kv": (
        {"k_pages": (4, 2, 16, 24), "v_pages": (4, 2, 16, 8), "k": (2, 2, 9, 24), "v": (2, 2, 9, 8)},
        _appended,
    ),
    "decode_attention": ({"q": (2, 4, 1, 64), "k": (2, 2, 128, 64), "v": (2, 2, 128, 64)}, _decoded),
    "cross_entropy": ({"logits": (48, 333)}, _loss),
    "linear_cross_entropy": ({"hidden": (48, 32), "weight": (333, 32)}, _linear_loss),
    "masked_softmax": ({"scores": (2, 3, 75, 75)}, _softmax),
    "masked_softmax, over columns": ({"scores": (3, 70, 33)}, _softmax_of_columns),
}


def served(name: str) -> list[str]:
    op = name.split(",")[0]
    found = dict.fromkeys((*AT_HOME, *for_devices(op)))
    return [backend for backend in found if backend != "reference" and op in BACKENDS[backend].ops]


DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}
WORK = [(name, backend) for name in PROBLEMS for backend in served(name)]
# Interpreted, Triton takes bfloat16 many times slower than float16: its own tests have some of it.
CASES = [
    pytest.param(name, backend, dtype, id=f"{name}-{backend}-{element}")
    for name, backend in WORK
    for element, dtype in DTYPES.items()
    if element == "half" or backend != "triton" or backend in AT_HOME
]


def outcome(name: str, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and, where there are some, gradients, of inputs that any dtype under test can hold."""
    sizes, compute = PROBLEMS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = {key: torch.randn(size, generator=generator).bfloat16() for key, size in sizes.items()}
    keep = ("bias", "sinks", "alibi_slopes")
    wide = torch.float32 if dtype != torch.float64 else dtype
    leaves = {key: x.to(wide if key in keep else dtype).requires_grad_() for key, x in leaves.items()}
    outputs = compute(backend, leaves)
    found = {f"output {index}": x.detach() for index, x in enumerate(outputs)}
    if outputs[0].requires_grad:
        upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        found.update({f"d{key}": x for key, x in zip(leaves, gradients, strict=True)})
    return found


@pytest.mark.parametrize(("name", "backend", "dtype"), CASES)
def test_op(name: str, backend: str, dtype: torch.dtype) -> None:
    if (reason := BACKENDS[backend].unavailable()) is not None:
        pytest.skip(f"{backend}: {reason}")
    exact = outcome(name, "reference", torch.float64)
    plain = outcome(name, "reference", dtype)
    found = outcome(name, backend, dtype)
    assert found.keys() == exact.keys()
    largest = max(float(exact[key].abs().max()) for key in exact if key.startswith(("d", "output")))
    for key, expected in exact.items():
        magnitude = largest if key.startswith("d") else None
        budget = testing.error_budget(found[key], plain[key], expected, dtype, magnitude)
        assert budget.passed, f"{key}: error {budget.error:.3g}, limit {budget.limit:.3g}"


def test_no_op_is_left_out() -> None:
    covered = {name.split(",")[0] for name in PROBLEMS}
    assert covered == set(BACKENDS["reference"].ops)
