"""Every row of the README's table of features, on every backend: what is declared works, what is lacked is refused.

A probe returns what an op computes with a feature in use. It runs in float32 on the backend and in float64 on the
reference; outputs and gradients must agree, and the feature must have changed something where it can.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.backend import BACKENDS, FEATURES, REFERENCE
from tests.served import DEVICE

pytestmark = pytest.mark.devices

Outputs = Tensor | tuple[Tensor, ...]
Probe = Callable[[str, dict[str, Tensor]], Outputs]

LENGTHS = torch.tensor([9, 0, 17])
OFFSETS = torch.tensor([0, 9, 9, 26, 40], dtype=torch.int32)


def _leaves(sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }


QKV = {"q": (3, 4, 17, 8), "k": (3, 2, 17, 8), "v": (3, 2, 17, 12)}
FEW_HEADS = {"q": (3, 2, 17, 8), "k": (3, 1, 17, 8), "v": (3, 1, 17, 12)}
SQUARE = {"q": (2, 4, 17, 8), "k": (2, 2, 17, 8), "v": (2, 2, 17, 8)}


def _attend(mask: Any, **keywords: Any) -> Probe:
    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        tensors = {name: value for name, value in x.items() if name not in "qkv"}
        return maskops.attention(x["q"], x["k"], x["v"], mask, backend=backend, **keywords, **tensors)

    return probe


def _packed(backend: str, x: dict[str, Tensor]) -> Outputs:
    padded = maskops.attention(
        x["q"].transpose(1, 2)[:, ::2].transpose(1, 2), x["k"], x["v"], masks.key_padding(LENGTHS), backend=backend
    )
    q, k, v = (x[name][0].transpose(0, 1) for name in "qkv")
    q_offsets = torch.tensor([0, 5, 17], dtype=torch.int32)
    k_offsets = torch.tensor([0, 11, 13], dtype=torch.int32)
    return padded, maskops.varlen_attention(q, k, v, q_offsets, k_offsets, masks.causal(), backend=backend)


def _every_mask(backend: str, x: dict[str, Tensor]) -> Outputs:
    used = [
        masks.full(),
        masks.causal() & masks.padding(LENGTHS),
        masks.padding(LENGTHS, side="left") & (masks.causal() | masks.prefix(torch.tensor([3, 0, 5]))),
        masks.sliding_window(3, 1) & masks.key_padding(LENGTHS),
        masks.chunked(5),
        masks.documents(torch.tensor([[0] * 5 + [1] * 9 + [-1] * 3] * 3)),
        masks.causal() & (masks.sliding_window(3, 0) | masks.prefix(2)),
    ]
    return tuple(maskops.attention(x["q"], x["k"], x["v"], mask, backend=backend) for mask in used)


def _dropout(backend: str, x: dict[str, Tensor]) -> Outputs:
    outs = []
    for mask in (masks.causal(), masks.causal() & masks.key_padding(torch.tensor([17, 17, 17]))):
        torch.manual_seed(3)
        outs.append(maskops.attention(x["q"], x["k"], x["v"], mask, dropout_p=0.4, backend=backend))
    torch.testing.assert_close(*outs)
    assert not torch.equal(outs[0], maskops.attention(x["q"], x["k"], x["v"], masks.causal(), backend=backend))
    return outs[0]


def _autocast(backend: str, x: dict[str, Tensor]) -> Outputs:
    # float64 is left alone by autocast: the oracle computes what the rounded inputs give.
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = maskops.attention(x["q"], x["k"], x["v"], masks.causal(), backend=backend)
    assert out.dtype == (torch.float64 if x["q"].dtype == torch.float64 else torch.bfloat16)
    return out


def _compiled(function: Callable[..., Tensor]) -> Probe:
    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        torch._dynamo.reset()
        with maskops.use_backend(backend, fallback="error"):
            out: Tensor = torch.compile(function, backend="aot_eager", fullgraph=True)(*x.values())
        return out

    return probe


def _double_backward(function: Callable[[str, dict[str, Tensor]], Tensor], name: str) -> Probe:
    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        with maskops.use_backend(backend, fallback="error"):
            loss = function(backend, x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x[name], create_graph=True)
        # Differentiated once more by the caller; here already, so that a backend that cannot do it says so.
        torch.autograd.grad(gradient.square().sum(), x[name], retain_graph=True)
        return gradient

    return probe


TARGET = torch.tensor([[3, -100, 0, 10, 5], [2, 2, -100, 1, 7]])
LOGITS = {"logits": (2, 5, 11)}
KEPT = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]])


def _loss(**keywords: Any) -> Probe:
    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        with maskops.use_backend(backend, fallback="error"):
            result = maskops.cross_entropy(x["logits"], TARGET, **keywords)
        if isinstance(result, Tensor):
            return result
        return tuple(part for part in result if part is not None)

    return probe


def _confident(backend: str, x: dict[str, Tensor]) -> Outputs:
    with maskops.use_backend(backend, fallback="error"):
        losses = maskops.cross_entropy(
            x["logits"] + 18.0 * torch.eye(5, 11).to(x["logits"]), torch.arange(5), reduction="none"
        )
    return 1e6 * losses  # about 1: nothing is left of it where lse - z_y cancels


def _soft_labels(backend: str, x: dict[str, Tensor]) -> Outputs:
    with maskops.use_backend(backend, fallback="error"):
        return maskops.cross_entropy(x["logits"], x["target"], mask=KEPT.bool())


def _ignored(backend: str, x: dict[str, Tensor]) -> Outputs:
    poison = torch.where(((TARGET == -100) | (KEPT == 0))[..., None], torch.nan, 0.0)
    return _loss(mask=KEPT, token_weights=torch.linspace(0.5, 2.0, 10).reshape(2, 5))(
        backend, {"logits": x["logits"] + poison}
    )


def _reductions(backend: str, x: dict[str, Tensor]) -> Outputs:
    results = [
        _loss(reduction="mean", shift=True),
        _loss(reduction="mean", num_items=7),
        _loss(reduction="sum"),
        _loss(reduction="none"),
        _loss(reduction="sequence_mean", cu_seqlens=torch.tensor([0, 2, 2, 9], dtype=torch.int32)),
    ]
    return tuple(result for probe in results for result in [probe(backend, x)] if isinstance(result, Tensor))


LAYER = {"hidden": (2, 5, 6), "weight": (11, 6)}


def _layer_loss(**keywords: Any) -> Probe:
    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        with maskops.use_backend(backend, fallback="error"):
            result = maskops.linear_cross_entropy(x["hidden"], x["weight"], TARGET, bias=x.get("bias"), **keywords)
        return result if isinstance(result, Tensor) else tuple(part for part in result if part is not None)

    return probe


def _layer_ignored(backend: str, x: dict[str, Tensor]) -> Outputs:
    poison = torch.where(((TARGET == -100) | (KEPT == 0))[..., None], torch.nan, 0.0)
    score = _layer_loss(mask=KEPT, token_weights=torch.linspace(0.5, 2.0, 10).reshape(2, 5))
    return score(backend, x | {"hidden": x["hidden"] + poison})


def _layer_of_two_dtypes(backend: str, x: dict[str, Tensor]) -> Outputs:
    wide = x["hidden"].dtype == torch.float64
    halved = x["hidden"].to(torch.bfloat16)
    return _layer_loss()(backend, x | {"hidden": halved.double() if wide else halved})


def _layer_reductions(backend: str, x: dict[str, Tensor]) -> Outputs:
    results = [
        _layer_loss(reduction="mean", shift=True),
        _layer_loss(reduction="mean", num_items=7),
        _layer_loss(reduction="sum"),
        _layer_loss(reduction="none"),
        _layer_loss(reduction="sequence_mean", cu_seqlens=torch.tensor([0, 2, 2, 9], dtype=torch.int32)),
    ]
    return tuple(result for probe in results for result in [probe(backend, x)] if isinstance(result, Tensor))


CACHED = {"q": (3, 4, 2, 8), "k": (3, 2, 24, 8), "v": (3, 2, 24, 12)}
FILLED = torch.tensor([9, 0, 24])
PAGES = torch.tensor([[4, 0, 5], [7, 7, 7], [2, 8, 1]], dtype=torch.int32)


def _pages_of(x: Tensor) -> Tensor:
    """The same cache in pages of 8 keys, where ``PAGES`` says."""
    pages = x.new_full((9, 2, 8, x.shape[3]), torch.nan)
    for table, keys in zip(PAGES.tolist(), x.unflatten(2, (3, 8)).transpose(1, 2), strict=True):
        if table != [7, 7, 7]:
            pages[table] = keys
    return pages


def _decode(mask: Any = None, *, paged: bool = False, **keywords: Any) -> Probe:
    """A cache is inference: inputs without gradients."""

    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        inputs = {name: value.detach() for name, value in x.items()}
        q, k, v = (inputs.pop(name) for name in "qkv")
        more = keywords | inputs
        if paged:
            k, v, more["block_table"] = _pages_of(k), _pages_of(v), PAGES
        return maskops.decode_attention(q, k, v, FILLED, mask, backend=backend, **more)

    return probe


def _append(*, paged: bool = False, **keywords: Any) -> Probe:
    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        caches = [torch.zeros(9, 2, 8, 8).to(x["k"].dtype) if paged else torch.zeros(3, 2, 24, 8).to(x["k"].dtype)] * 2
        k_cache, v_cache = (cache.clone() for cache in caches)
        more = keywords | ({"block_table": torch.tensor([[4, 0], [7, 3], [2, 8]])} if paged else {})
        k = x["k"].detach()
        maskops.append_kv(k_cache, v_cache, k, -k, torch.tensor([6, 0, 13]), backend=backend, **more)
        assert not torch.equal(k_cache, torch.zeros_like(k_cache))
        return k_cache, v_cache

    return probe


SCORES = {"x": (2, 4, 17, 17)}
VISIBLE = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(3)) > 0.4


def _soften(*given: tuple[Any, int], **keywords: Any) -> Probe:
    """A masked softmax of each (mask, dim), with NaN at the places that a bool mask hides."""

    def probe(backend: str, x: dict[str, Tensor]) -> Outputs:
        results: list[Tensor] = []
        for mask, dim in given:
            scores = torch.where(mask, x["x"], torch.nan) if isinstance(mask, Tensor) else x["x"]
            result = maskops.masked_softmax(scores, mask, dim, backend=backend, **keywords)
            results += [result] if isinstance(result, Tensor) else list(result)
        return tuple(results)

    return probe


def _soften_under_autocast(backend: str, x: dict[str, Tensor]) -> Outputs:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = maskops.masked_softmax(x["x"], VISIBLE, backend=backend)
        assert out.dtype == torch.softmax(x["x"], -1).dtype
    return out


PROBES: dict[tuple[str, str], tuple[dict[str, tuple[int, ...]], Probe]] = {
    ("attention", "masks"): (FEW_HEADS, _every_mask),
    ("attention", "dense mask"): (
        SQUARE,
        _attend(masks.dense(torch.rand(2, 4, 17, 17, generator=torch.Generator().manual_seed(1)) > 0.4)),
    ),
    ("attention", "shapes"): (QKV, _packed),
    ("attention", "wide heads"): (
        {"q": (1, 2, 5, 264), "k": (1, 1, 5, 264), "v": (1, 1, 5, 8)},
        _attend(masks.causal()),
    ),
    ("attention", "softcap"): (QKV, _attend(masks.causal(), softcap=2.0, softmax_scale=0.7)),
    ("attention", "lse"): (QKV, _attend(masks.causal() & masks.key_padding(LENGTHS), return_lse=True)),
    ("attention", "bias"): (QKV | {"bias": (4, 17, 17)}, _attend(masks.causal())),
    ("attention", "alibi_slopes"): (QKV | {"alibi_slopes": (3, 4)}, _attend(masks.causal())),
    ("attention", "sinks"): (QKV | {"sinks": (4,)}, _attend(masks.sliding_window(3, 0))),
    ("attention", "dropout"): (QKV, _dropout),
    ("attention", "autocast"): (QKV, _autocast),
    ("attention", "compile"): (QKV, _compiled(lambda q, k, v: maskops.attention(q, k, v, masks.causal()))),
    ("attention", "double backward"): (SQUARE, _double_backward(_attend(masks.causal()), "q")),  # type: ignore[arg-type]
    ("append_kv", "contiguous"): ({"k": (3, 2, 3, 8)}, _append()),
    ("append_kv", "paged"): ({"k": (3, 2, 3, 8)}, _append(paged=True)),
    ("append_kv", "batch_index"): ({"k": (3, 2, 3, 8)}, _append(batch_index=torch.tensor([2, 0, 1]))),
    ("decode_attention", "masks"): (CACHED, _decode(masks.causal() & masks.sliding_window(5, 0))),
    ("decode_attention", "paged"): (CACHED, _decode(masks.causal(), paged=True)),
    ("decode_attention", "batch_index"): (CACHED, _decode(batch_index=torch.tensor([2, 0, 2]))),
    ("decode_attention", "wide heads"): (
        {"q": (3, 4, 2, 8), "k": (3, 2, 24, 8), "v": (3, 2, 24, 260)},
        _decode(masks.causal()),
    ),
    ("decode_attention", "leftpad"): (CACHED, _decode(leftpad=torch.tensor([2, 0, 20]))),
    ("decode_attention", "dense mask"): (
        CACHED,
        _decode(masks.dense(torch.rand(3, 4, 2, 24, generator=torch.Generator().manual_seed(1)) > 0.4)),
    ),
    ("decode_attention", "alibi_slopes"): (CACHED | {"alibi_slopes": (3, 4)}, _decode(masks.causal())),
    ("decode_attention", "sinks"): (CACHED | {"sinks": (4,)}, _decode(masks.causal())),
    ("decode_attention", "softcap"): (CACHED, _decode(masks.causal(), softcap=2.0, softmax_scale=0.7)),
    ("decode_attention", "lse"): (CACHED, _decode(return_lse=True)),
    ("decode_attention", "compile"): (
        CACHED,
        _compiled(lambda q, k, v: maskops.decode_attention(q.detach(), k.detach(), v.detach(), FILLED, masks.causal())),
    ),
    ("cross_entropy", "ignored"): (LOGITS, _ignored),
    ("cross_entropy", "scores"): (LOGITS, _loss(label_smoothing=0.1, z_loss=0.01, softcap=3.0, logit_scale=0.5)),
    ("cross_entropy", "confident"): ({"logits": (5, 11)}, _confident),
    ("cross_entropy", "soft labels"): (LOGITS | {"target": (2, 5, 11)}, _soft_labels),
    ("cross_entropy", "class_weights"): (LOGITS, _loss(class_weights=torch.linspace(0.0, 2.0, 11))),
    ("cross_entropy", "reductions"): (LOGITS, _reductions),
    ("cross_entropy", "outputs"): (
        LOGITS,
        _loss(return_lse=True, return_logprobs=True, return_entropy=True, return_argmax=True),
    ),
    ("cross_entropy", "compile"): (LOGITS, _compiled(lambda logits: maskops.cross_entropy(logits, TARGET))),
    ("cross_entropy", "double backward"): (LOGITS, _double_backward(_loss(), "logits")),  # type: ignore[arg-type]
    ("masked_softmax", "masks"): (
        SCORES,
        _soften(
            (masks.padding(torch.tensor([17, 0])) & masks.causal(), -1),
            (masks.causal() & (masks.sliding_window(3, 0) | masks.prefix(2)), -1),
            (masks.documents(cu_seqlens=OFFSETS[:3] // 2).spans(17, 17), -1),
            (masks.dense(VISIBLE), -1),
            (masks.causal(), -2),
        ),
    ),
    ("masked_softmax", "broadcast mask"): (
        SCORES,
        _soften((VISIBLE, -1), (VISIBLE[:, :, :1].expand(2, 4, 17, 17), -1)),
    ),
    ("masked_softmax", "dim"): (SCORES, _soften((VISIBLE, 0), (VISIBLE, 1), (VISIBLE.transpose(2, 3), 2), (None, 3))),
    ("masked_softmax", "lse"): (SCORES, _soften((VISIBLE, -1), (masks.causal(), -1), return_lse=True)),
    ("masked_softmax", "autocast"): (SCORES, _soften_under_autocast),
    ("masked_softmax", "compile"): (
        SCORES,
        _compiled(lambda x: maskops.masked_softmax(x, masks.causal()) + maskops.masked_softmax(x, VISIBLE, 1)),
    ),
    ("masked_softmax", "double backward"): (
        SCORES,
        _double_backward(lambda backend, x: maskops.masked_softmax(x["x"], VISIBLE, backend=backend), "x"),
    ),
    ("linear_cross_entropy", "ignored"): (LAYER, _layer_ignored),
    ("linear_cross_entropy", "layer"): (LAYER | {"bias": (11,)}, _layer_of_two_dtypes),
    ("linear_cross_entropy", "scores"): (
        LAYER,
        _layer_loss(label_smoothing=0.1, z_loss=0.01, softcap=3.0, logit_scale=0.5),
    ),
    ("linear_cross_entropy", "class_weights"): (LAYER, _layer_loss(class_weights=torch.linspace(0.0, 2.0, 11))),
    ("linear_cross_entropy", "reductions"): (LAYER, _layer_reductions),
    ("linear_cross_entropy", "outputs"): (
        LAYER,
        _layer_loss(return_lse=True, return_logprobs=True, return_entropy=True, return_argmax=True),
    ),
    ("linear_cross_entropy", "compile"): (
        LAYER,
        _compiled(lambda hidden, weight: maskops.linear_cross_entropy(hidden, weight, TARGET)),
    ),
    ("linear_cross_entropy", "double backward"): (LAYER, _double_backward(_layer_loss(), "hidden")),  # type: ignore[arg-type]
}
TOLERANCES = {("attention", "autocast"): 3e-2, ("linear_cross_entropy", "layer"): 1e-2}


def _run(probe: Probe, backend: str, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and the gradients of a weighted sum of them."""
    results = probe(backend, leaves)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(2)
    total: Tensor | float = 0.0
    for out in outputs:
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=generator).to(out.dtype)
            total = total + (torch.where(out.isfinite(), out, 0.0) * weights).sum().double()
    if not isinstance(total, Tensor):
        return outputs
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return outputs + [gradient for gradient in gradients if gradient is not None]


@functools.cache
def _oracle(op: str, feature: str, dtype: torch.dtype) -> list[Tensor]:
    """What the reference computes in float64 from the same inputs, rounded to ``dtype``; once for all backends."""
    sizes, probe = PROBES[op, feature]
    rounded = {name: x.detach().double().requires_grad_() for name, x in _leaves(sizes, dtype).items()}
    return [result.detach() for result in _run(probe, REFERENCE, rounded)]


def test_every_declared_feature_has_a_probe_and_every_lack_is_a_feature() -> None:
    assert set(PROBES) == {(op, feature) for op, features in FEATURES.items() for feature in features}
    for backend in BACKENDS.values():
        assert set(backend.ops) <= set(FEATURES)
        for op, declaration in backend.ops.items():
            assert set(declaration.lacks) <= set(FEATURES[op])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "feature"), PROBES, ids=lambda value: str(value).replace(" ", "-"))
def test_what_is_declared_is_true(op: str, feature: str, backend: str) -> None:
    declared = BACKENDS[backend]
    if reasons := declared.refusals_of(DEVICE):
        pytest.skip(f"{backend}: {reasons[0]}")
    if op not in declared.ops:
        pytest.skip(f"{backend} has no {op}")
    sizes, probe = PROBES[op, feature]
    if feature in declared.ops[op].lacks:
        with pytest.raises((ValueError, RuntimeError), match=r"backend"):
            _run(probe, backend, _leaves(sizes, torch.float32))
        return
    dtypes = declared.ops[op].dtypes if feature in ("masks", "ignored") and declared.is_at_home("cpu") else ()
    for dtype in dtypes or (torch.float32,):
        ours = _run(probe, backend, _leaves(sizes, dtype))
        oracle = _oracle(op, feature, dtype)
        assert len(ours) == len(oracle)
        tolerance = TOLERANCES.get((op, feature), max(1e-5, 4 * torch.finfo(dtype).eps))
        for value, expected in zip(ours, oracle, strict=True):
            torch.testing.assert_close(value.double(), expected.double(), rtol=tolerance, atol=tolerance * 4)
