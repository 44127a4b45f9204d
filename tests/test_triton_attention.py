"""Span attention on Triton, interpreted: the forward kernel over the shared cases, and what they do not say."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks, testing
from maskops.masks import Mask
from maskops.ops.attention.registration import Features, filled, operator_arguments, span_attention
from maskops.ops.attention.triton_kernels import forward
from maskops.spans import RowSpans
from maskops.tuning import Config

CASES = testing.cases("attention", features=True)
# Of several that differ in what the kernel never sees, one.
_ALIKE = {
    "causal window", "prefix", "chunked", "window", "padding right", "padding with long holes", "cache, two queries",
    "documents", "documents of one token", "one head", "one head each", "head_dim 5", "head_dim 192", "wide values",
    "bias", "bias for all heads", "bias per head and key", "ALiBi",
}  # fmt: skip
SMALL_TILES = {"full", "causal", "first tokens and window", "dense", "everything", "bias, packed"}
"""Cases that run with the small tiles of the table, in which an item has several parts; others with whole items."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | RowSpans | None, softmax_scale: float | None = None, **features: Any
) -> tuple[Tensor, Tensor]:
    """The kernel, on a plan as devices have it."""
    spans = mask
    if not isinstance(spans, RowSpans):
        # Slopes and dropout alone need positions, with which a plan never serves several batch elements.
        positions = "alibi_slopes" in features or "seed" in features
        spans = (masks.full() if mask is None else mask).spans(
            q.shape[2], k.shape[2], batch=q.shape[0], device=q.device, order=True, bits=True, positions=positions
        )
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    with torch.no_grad():
        return span_attention(q, k, v, spans, Features(softmax_scale=scale, **features), "triton")


def use_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int) -> None:
    tiles = Config({"BLOCK_M": rows, "BLOCK_N": keys}, 4, 2, "of a test")
    monkeypatch.setattr(forward, "config", lambda *key: tiles)


def on_triton(case: testing.Case) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function under test of a case."""

    def run(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        for name, dimensions in (("bias", 4), ("alibi_slopes", 2), ("sinks", 2)):
            if name in keywords:
                keywords[name] = keywords[name][(None,) * (dimensions - keywords[name].dim())]
        return attend(q, k, v, case.mask("cpu"), **keywords)

    return run


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in _ALIKE], ids=lambda case: case.name)
def test_case(case: testing.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name not in SMALL_TILES:
        use_tiles(monkeypatch, 128, 64)
    testing.check(on_triton(case), case, parts=("numbers", "poison")).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["documents, causal", "head_dim 80", "everything"])
def test_halves(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name).with_dtype(dtype)
    testing.check(on_triton(case), case, parts=("numbers",)).raise_if_failed()


@pytest.mark.parametrize("name", ["causal, fewer queries", "documents, two spans"])
def test_realised_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 128, 64)
    case = next(case for case in CASES if case.name == name)
    testing.check(on_triton(case), case, parts=("readout",)).raise_if_failed()


MASKS = {
    "full": masks.full(),
    "window": masks.sliding_window(60, 3),
    "two spans": masks.causal() & (masks.sliding_window(40, 0) | masks.prefix(9)),
    "documents": masks.documents(cu_seqlens=torch.tensor([0, 5, 140, 141, 160])) & masks.causal(),
    "dense": masks.dense(torch.rand(1, 1, 170, 170, generator=torch.Generator().manual_seed(0)) < 0.1),
}


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted, rtol=2e-5, atol=5e-6)


@pytest.mark.devices
@pytest.mark.parametrize("name", MASKS)
def test_splits_of_the_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the keys, each in its own program, are merged to the same result, sinks included."""
    use_tiles(monkeypatch, 128, 32)
    monkeypatch.setattr(forward, "KEYS_OF_A_SPLIT", 50)
    q, k, v = torch.randn(1, 2, 170, 16), torch.randn(1, 1, 170, 16), torch.randn(1, 1, 170, 8)
    sinks = torch.tensor([0.5, -1.0])
    results = attend(q, k, v, MASKS[name], sinks=sinks[None])
    assert_close(results, maskops.attention(q, k, v, MASKS[name], sinks=sinks, return_lse=True, backend="reference"))


@pytest.mark.parametrize("name", MASKS)
def test_descriptors_of_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_90 the hardware copies full tiles by descriptors, halves only, of any strides that are multiples of 16."""
    monkeypatch.setattr(forward, "architecture", lambda device: "sm_90")
    used = []
    monkeypatch.setattr(forward, "descriptors", lambda *arguments: used.append(described(*arguments)) or used[-1])
    q = torch.randn(1, 170, 2, 40).half().transpose(1, 2)
    k, v = (torch.randn(1, 170, 1, width).half().transpose(1, 2) for width in (40, 24))
    results = attend(q, k, v, MASKS[name])
    assert len(used) == 1
    expected = maskops.attention(q.float(), k.float(), v.float(), MASKS[name], return_lse=True, backend="reference")
    torch.testing.assert_close(results[0].float(), expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(results[1], expected[1], rtol=1e-4, atol=1e-4)


described = forward.descriptors


def test_which_tensors_have_descriptors() -> None:
    x = torch.zeros(2, 3, 8, 16).half()
    assert forward.is_describable(x) and forward.is_describable(x.transpose(1, 2))
    assert forward.is_describable(x[:, :, ::2]) and forward.is_describable(x[:, :1].expand(2, 1, 8, 16))
    assert not forward.is_describable(x[..., 1:9])  # address
    assert not forward.is_describable(x.flatten()[: 2 * 3 * 8 * 12].view(2, 3, 8, 12))  # rows of 24 bytes
    assert not forward.is_describable(x[:, :1].expand(2, 3, 8, 16))  # a stride of 0
    assert not forward.is_describable(x[..., :4])


@pytest.mark.parametrize("name", ["shared plan", "plan of each element", "documents"])
def test_dropout_is_that_of_every_backend(name: str) -> None:
    mask: Mask = masks.causal()
    if name == "documents":
        mask = masks.documents(cu_seqlens=torch.tensor([0, 13, 14, 50])) & masks.causal()
    elif name == "plan of each element":
        mask = masks.padding(torch.tensor([50, 31])) & masks.causal()
    batch = 1 if name == "documents" else 2
    q, k, v = (torch.randn(batch, heads, 50, width) for heads, width in ((4, 16), (2, 16), (2, 8)))
    spans = mask.spans(50, 50, batch=2 if name == "plan of each element" else 1, order=True, positions=True)
    seed = torch.tensor([(7 << 40) + 5])
    results = attend(q, k, v, spans, seed=seed, dropout_p=0.6)
    plan = mask.spans(50, 50, batch=spans.batch, positions=True)
    features = Features(softmax_scale=0.25, seed=seed, dropout_p=0.6)
    assert_close(results, span_attention(q, k, v, plan, features, "cpu"))
    assert (results[0] == 0).any()


@pytest.mark.devices
def test_slopes_of_sequences() -> None:
    offsets = torch.tensor([0, 13, 14, 50], dtype=torch.int32)
    q, k, v = (torch.randn(55, heads, 16) for heads in (4, 2, 2))
    slopes = torch.rand(3, 4)
    expected = maskops.varlen_attention(
        q, k, v, offsets, mask=masks.causal(), alibi_slopes=slopes, return_lse=True, backend="reference"
    )
    mask = masks.documents(cu_seqlens=offsets) & masks.causal()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = attend(q, k, v, mask, alibi_slopes=slopes, slopes_by_sequence=True)
    assert_close((out[0].transpose(0, 1), lse[0]), expected)


@pytest.mark.devices
@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0, 1e-37, 1e-39, 1e-60])
def test_scales_of_any_sign_and_size(scale: float) -> None:
    """Down to denormal ones, over products that are as large, and to those that are 0 as a float32."""
    q, k, v = (torch.randn(1, 1, 40, 8) for _ in range(3))
    if 0.0 < scale < 1e-30:
        q, k = 3e18 * q, 3e18 * k
    q64, k64, v64 = (x.double() for x in (q, k, v))
    expected = maskops.attention(
        q64, k64, v64, masks.causal(), softmax_scale=scale, return_lse=True, backend="reference"
    )
    assert_close(attend(q, k, v, masks.causal(), softmax_scale=scale), (expected[0].float(), expected[1].float()))


@pytest.mark.devices
def test_the_order_of_the_items_changes_nothing() -> None:
    q = torch.randn(1, 2, 300, 16)
    plan = masks.causal().spans(300, 300, order=True)
    assert plan.order is not None
    out, lse = attend(q, q, q, plan)
    used = int(plan.tile_count)
    for order in (None, torch.cat([plan.order[:used].flip(0), plan.order[used:]])):
        again = attend(q, q, q, plan._replace(order=order))
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_empty_rows_take_no_part() -> None:
    """Padded rows share an item and its full tiles with rows that see something; NaN in them is not an output."""
    q, k, v = (torch.randn(1, 1, 100, 16) for _ in range(3))
    q[:, :, 70:] = k[:, :, 70:] = v[:, :, 70:] = math.nan
    mask = masks.padding(torch.tensor([70]))
    out, lse = attend(q, k, v, mask)
    assert (out[:, :, 70:] == 0).all() and (lse[:, :, 70:] == -math.inf).all()
    expected = maskops.attention(*(x[:, :, :70] for x in (q, k, v)), return_lse=True, backend="reference")
    assert_close((out[:, :, :70], lse[:, :, :70]), expected)


def test_any_integers_in_a_plan() -> None:
    """A plan of other tensors, or of none: numbers are wrong, but nothing is read or written outside."""
    whole = torch.full((4, 40, 8), math.nan)
    x = whole[1:3][None]
    x.fill_(1.0)
    plan = masks.causal().spans(40, 40, order=True)
    generator = torch.Generator().manual_seed(0)

    def integers(like: Tensor) -> Tensor:
        low, high = (-(2**31), 2**31 - 1) if like.numel() % 2 else (-50, 90)
        return torch.randint(low, high, like.shape, generator=generator, dtype=torch.int64).to(torch.int32)

    for _ in range(3):
        fields = ("start", "end", "tiles", "order", "tile_count")
        broken = plan._replace(**{name: integers(getattr(plan, name)) for name in fields})
        out, _ = attend(x, x, x, broken)
        assert out.shape == x.shape


def test_operators_refuse_what_does_not_fit() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8)
    plan = filled(operator_arguments(masks.causal().spans(9, 11, order=True), Features(), "triton"), q)
    names = [
        "start",
        "end",
        "key_valid",
        "tiles",
        "tile_count",
        "key_tiles",
        "order",
        "positions",
        "dense",
        "bias",
        "alibi_slopes",
        "sinks",
        "seed",
    ]
    run = torch.ops.maskops.attention_forward_triton
    for text, changed in {
        "one head dimension": {"q": q[..., :5].contiguous()},
        "one dtype": {"q": q.half()},
        "heads of k and v": {"q": q[:, :3]},
        "last dimension": {"q": torch.randn(2, 4, 8, 9).transpose(2, 3)},
        "same rows": {"v": k[:, :1]},
        "one batch size": {"k": k[:1], "v": k[:1]},
        "other lengths": {"start": plan[0][:, :, :5], "end": plan[1][:, :, :5]},
        "must agree": {"end": plan[1][:, :, :5]},
        "must be int32": {"start": plan[0].long()},
        "wrong width": {"tiles": plan[3][:, :6]},
        "order must": {"order": plan[6][:1]},
        "dense must": {"dense": torch.ones(1, 1, 9, 11, dtype=torch.bool)},
        "bias must": {"bias": torch.zeros(1, 1, 9, 10)},
        "alibi_slopes must": {"alibi_slopes": torch.zeros(1, 3)},
        "alibi_slopes and dropout": {"alibi_slopes": torch.zeros(1, 4)},
        "sinks must": {"sinks": torch.zeros(2, 4)},
    }.items():
        arguments = dict(zip(names, plan[:13], strict=True)) | {"q": q, "k": k, "v": k} | changed
        given = [arguments[name] for name in ("q", "k", "v", *names)]
        with pytest.raises(ValueError, match=text):
            run(*given, False, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="seed must"):
        run(q, k, k, *plan[:7], torch.zeros(3, 1, 9, dtype=torch.int32), *plan[8:13], False, 1.0, 0.0, 0.5)
