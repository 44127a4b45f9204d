"""The backward kernels of span attention on Triton, interpreted: what the cases of every backend do not say."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops import masks, testing
from maskops.masks import Mask
from maskops.ops.attention.registration import Features, filled, operator_arguments, span_attention
from maskops.ops.attention.triton_kernels import backward
from tests.served import DEVICE

pytestmark = pytest.mark.devices


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def gradients(
    tensors: dict[str, Tensor], mask: Mask | None, backend: str, dtype: torch.dtype = torch.float32, **keywords: Any
) -> dict[str, Tensor]:
    """Gradients of all tensors, through the output and the log-sum-exp; always the same dropout."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    grad_lse = keywords.pop("grad_lse", True)
    grad_out = keywords.pop("grad_out", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        out, lse = maskops.attention(**leaves, mask=mask, return_lse=True, backend=backend, **keywords)
    grad_out = draw(*out.shape, seed=1) if grad_out is None else grad_out
    received = [grad_out.to(out.dtype), draw(*lse.shape, seed=2).to(lse.dtype)][: 2 if grad_lse else 1]
    grads = torch.autograd.grad([out, lse][: len(received)], list(leaves.values()), received)
    return dict(zip(leaves, grads, strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    for name, theirs in expected.items():
        ours = actual[name]
        assert ours.shape == theirs.shape and bool(ours.isfinite().all()), name
        difference = (ours.double() - theirs.double()).abs().max() if ours.numel() else 0.0
        assert difference <= tolerance * (1.0 + float(theirs.abs().max())), (name, float(difference))


def compare(tensors: dict[str, Tensor], mask: Mask | None, **keywords: Any) -> dict[str, Tensor]:
    """The gradients of the kernels, which must be those of the reference in float64."""
    actual = gradients(tensors, mask, "triton", **keywords)
    assert_close(actual, gradients(tensors, mask, "reference", torch.float64, **keywords))
    return actual


def problem(heads: int = 2, kv_heads: int = 1, q_len: int = 70, k_len: int = 70, batch: int = 1) -> dict[str, Tensor]:
    return {
        "q": draw(batch, heads, q_len, 8),
        "k": draw(batch, kv_heads, k_len, 8, seed=1),
        "v": draw(batch, kv_heads, k_len, 5, seed=2),
    }


MASKS = {
    "full": None,
    "window": masks.sliding_window(20, 3),
    "two spans": masks.causal() & (masks.sliding_window(20, 0) | masks.prefix(3)),
    "documents": masks.documents(cu_seqlens=torch.tensor([0, 5, 70, 71, 140])) & masks.causal(),
    "holes": masks.padding((torch.arange(150) % 7 != 3)[None]) & masks.causal(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    compare(problem(q_len=150, k_len=150), MASKS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    case = testing.Case("halves", "roundings of half precision", batch=1, q_len=40, k_len=70, head_dim=20, value_dim=9)
    case = case.with_dtype(dtype)
    testing.check(testing.attention_on("triton", case), case, parts=("numbers",)).raise_if_failed()


def test_a_group_is_split_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of a group run one after the other in a program, or in several whose sums are added."""
    tensors, found = problem(heads=6, k_len=20, q_len=20), []
    for enough in (1, 3):
        monkeypatch.setattr(backward, "ENOUGH_PROGRAMS", enough)
        found.append(compare(tensors, masks.causal()))
    for name in tensors:
        assert all(torch.allclose(found[0][name], other[name], atol=1e-5) for other in found[1:])


def test_rows_are_split_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys and heads under many rows: parts of them are programs of their own, at the side of parts of a group."""
    tensors, found = problem(heads=2, k_len=20, q_len=150), []
    launched: list[tuple[int, int]] = []
    original = backward.Backward.keys_arguments

    def arguments(self: backward.Backward, grad_k: Tensor, grad_v: Tensor, row_parts: int = 1) -> dict[str, Any]:
        launched.append((grad_k.shape[0], row_parts))
        return original(self, grad_k, grad_v, row_parts)

    monkeypatch.setattr(backward.Backward, "keys_arguments", arguments)
    monkeypatch.setattr(backward, "ROWS_OF_A_SPLIT", 40)
    for enough in (1, 6):
        monkeypatch.setattr(backward, "ENOUGH_PROGRAMS", enough)
        found.append(compare(tensors, masks.sliding_window(90, 3)))
    assert launched == [(1, 1), (6, 3)]
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in tensors)


def test_divisors() -> None:
    assert [backward.largest_divisor(12, limit) for limit in (0, 1, 2, 5, 7, 11, 12, 99)] == [1, 1, 2, 4, 6, 6, 12, 12]


def test_the_order_of_programs_changes_no_bit() -> None:
    tensors = problem(q_len=150, k_len=150)
    leaves = [x.requires_grad_() for x in tensors.values()]
    spans = masks.causal().spans(150, 150, batch=1, order=True, device=DEVICE)
    assert spans.order is not None and int(spans.tile_count) > 1
    found = []
    for order in (spans.order, spans.order[: int(spans.tile_count)].flip(0), None):
        if order is not None:
            order = torch.cat([order, spans.order[len(order) :]])
        out, lse = span_attention(*leaves, spans._replace(order=order), Features(), "triton")
        found.append(torch.autograd.grad((out.sum(), lse.sum()), leaves))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_plan_without_bounds_of_key_tiles() -> None:
    tensors = problem(q_len=20, k_len=90)
    leaves = [x.requires_grad_() for x in tensors.values()]
    with_bounds = masks.causal().spans(20, 90, batch=1, grad=True, device=DEVICE)
    without = masks.causal().spans(20, 90, batch=1, grad=False, device=DEVICE)
    assert without.key_tiles is None
    grads = [
        torch.autograd.grad(span_attention(*leaves, spans, Features(), "triton")[0].sum(), leaves)
        for spans in (with_bounds, without)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("k_len", [5, 0])
def test_strides_are_those_of_the_fake(k_len: int) -> None:
    """Of problems without a pair, too: a bias that is a transposed view, heads in the middle."""
    q, k, v = (
        draw(1, 4, 2, 8).transpose(1, 2),
        draw(1, k_len, 1, 8).transpose(1, 2),
        draw(1, k_len, 1, 6).transpose(1, 2),
    )
    features = Features(
        bias=draw(1, 2, k_len, 4).transpose(2, 3), alibi_slopes=draw(2, 1).T.contiguous(), sinks=draw(1, 2)
    )
    spans = masks.causal().spans(4, k_len, batch=1, positions=True, order=True, device=DEVICE)
    plan = filled(operator_arguments(spans, features, "triton"), q)
    out, lse = torch.ops.maskops.attention_forward_triton(q, k, v, *plan)
    arguments = (draw(*out.shape).to(out), torch.ones_like(lse), q, k, v, out, lse, *plan, True, True, True)
    operator = torch.ops.maskops.attention_backward_triton.default
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        expected = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    for name, x, fake in zip(("q", "k", "v", "bias", "slopes", "sinks"), operator(*arguments), expected, strict=True):
        assert x.shape == fake.shape and x.stride() == fake.stride() and x.dtype == fake.dtype, name


# ---- what a call adds to the spans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "enough"),
    [
        ((2, 2, 20, 70), 264),
        ((1, 2, 20, 70), 0),
        ((2, 1, 1, 70), 264),
        ((1, 1, 20, 1), 0),
        ((1, 1, 20, 1), 264),
        ((1, 2, 1, 1), 264),
    ],
    ids=str,
)
def test_bias(sizes: tuple[int, ...], enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of shape, with as many programs as it has tiles, and with many."""
    monkeypatch.setattr(backward, "ENOUGH_PROGRAMS", enough)
    mask = masks.causal() & masks.key_padding(torch.tensor([70, 41]))
    compare({**problem(q_len=20, batch=2), "bias": draw(*sizes)}, mask)


def test_bias_and_dense_mask() -> None:
    dense = masks.dense(torch.rand(1, 2, 20, 70, generator=torch.Generator().manual_seed(0)) < 0.4)
    compare({**problem(q_len=20), "bias": draw(20, 70)}, dense)


@pytest.mark.parametrize("grad_lse", [True, False])
def test_sinks(grad_lse: bool) -> None:
    """They take next to nothing, a part, and all but 1e-43 of the weights."""
    tensors = problem(heads=3, q_len=10, k_len=20)
    for extra in ({}, {"bias": draw(10, 20)}):
        tensors |= {"sinks": torch.tensor([-50.0, 1.0, 100.0]), **extra}
        compare(tensors, masks.causal(), grad_lse=grad_lse)


@pytest.mark.parametrize("large", [-1e9, 1e9])
@pytest.mark.parametrize("grad_lse", [True, False])
def test_rows_of_a_large_log_sum_exp(large: float, grad_lse: bool) -> None:
    """A log-sum-exp that has lost its logarithm: the rows are means over their keys all the same."""
    tensors = {**problem(q_len=30, k_len=70), "sinks": torch.tensor([0.5, -1.0])}
    bias = draw(30, 70)
    bias[::3] = large
    bias[1::3, 40:] = large
    exact = torch.where(bias == large, math.copysign(1e30, large), bias.double())
    expected = gradients({**tensors, "bias": exact}, masks.causal(), "reference", torch.float64, grad_lse=grad_lse)
    actual = gradients({**tensors, "bias": bias}, masks.causal(), "triton", grad_lse=grad_lse)
    assert_close(actual, expected)


def test_moderate_scores_under_slopes() -> None:
    """Beyond 64 a log-sum-exp in float32 is too coarse for a gradient to 1e-6."""
    tensors = {**problem(q_len=10, k_len=70), "alibi_slopes": torch.tensor([-40.0, 40.0])}
    actual = gradients(tensors, masks.causal(), "triton")
    expected = gradients(tensors, masks.causal(), "reference", torch.float64)
    assert_close({"v": actual["v"]}, {"v": expected["v"]}, 1e-6)
    assert_close(actual, expected, 2e-4)


def test_slopes_of_sequences() -> None:
    """One row of slopes a sequence, one of which is empty, and rows behind the last sequence."""
    offsets = torch.tensor([0, 11, 11, 80, 85])
    slopes = draw(4, 2).abs()
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        q, k, v, used = (
            x.to(dtype).requires_grad_() for x in (draw(90, 2, 8), draw(90, 1, 8), draw(90, 1, 8, seed=1), slopes)
        )
        out = maskops.varlen_attention(q, k, v, offsets, mask=masks.causal(), alibi_slopes=used, backend=backend)
        grads = torch.autograd.grad((out * draw(*out.shape).to(dtype)).sum(), (q, k, v, used))
        found.append(dict(zip("qkvs", grads, strict=True)))
    assert_close(*found)
    assert not found[0]["s"][1].any() and found[0]["s"][0].any()


def test_dropout_softcap_and_slopes_of_elements() -> None:
    tensors = {**problem(q_len=20, k_len=30, batch=2), "alibi_slopes": draw(2, 2).abs()}
    compare(tensors, masks.causal(), dropout_p=0.4, softcap=1.5)


# ---- what must not be read -------------------------------------------------------------------------------------------


def test_empty_rows_may_hold_anything() -> None:
    """In full tiles, too: every other row of them sees every key."""
    tensors = problem(q_len=40, k_len=70)
    mask = masks.documents(cu_seqlens=torch.tensor([0, 30]), cu_seqlens_k=torch.tensor([0, 70]))
    expected = gradients(tensors, mask, "triton", grad_lse=False)
    grad_out = draw(1, 2, 40, 5, seed=1)
    assert not expected["q"][:, :, 30:].any()
    tensors["q"][:, :, 30:] = math.nan
    grad_out[:, :, 30:] = math.nan
    actual = gradients(tensors, mask, "triton", grad_out=grad_out, grad_lse=False)
    assert all(torch.equal(actual[name], expected[name]) for name in tensors)


def test_a_row_that_a_bias_empties_may_hold_anything() -> None:
    bias = torch.zeros(20, 30)
    bias[7] = -math.inf
    tensors = {**problem(q_len=20, k_len=30), "bias": bias}
    expected = gradients(tensors, None, "triton", grad_lse=False)
    grad_out = draw(1, 2, 20, 5, seed=1)
    grad_out[:, :, 7] = math.nan
    tensors["q"] = tensors["q"].index_fill(2, torch.tensor(7), math.nan)
    actual = gradients(tensors, None, "triton", grad_out=grad_out, grad_lse=False)
    assert all(torch.equal(actual[name], expected[name]) for name in tensors)


def test_any_strides() -> None:
    """Views of packed projections, and a gradient that is one number for all."""
    packed = draw(2, 40, 4, 8)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = packed.to(dtype).requires_grad_()
        q, k, v = leaf.transpose(1, 2).split([2, 1, 1], 1)
        out = maskops.attention(q, k, v, masks.causal(), backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        found.append({"packed": grad})
    assert_close(*found)


def test_plans_are_clamped() -> None:
    """Integers that belong to no plan give wrong numbers, never a wrong address."""
    tensors = problem(q_len=40, k_len=90)
    leaves = [x.requires_grad_() for x in tensors.values()]
    spans = masks.causal().spans(40, 90, batch=1, order=True, device=DEVICE)
    assert spans.key_tiles is not None
    for value in (-(2**31), -3, 77, 2**31 - 1):
        hostile = spans._replace(
            start=spans.start.roll(5),
            end=torch.full_like(spans.end, value),
            tiles=torch.full_like(spans.tiles, value),
            key_tiles=torch.full_like(spans.key_tiles, value),
            order=torch.full_like(spans.tiles[:, 0], value),
        )
        for plan in (hostile, hostile._replace(tiles=spans.tiles), hostile._replace(key_tiles=spans.key_tiles)):
            out, _ = span_attention(*leaves, plan, Features(), "triton")
            assert all(x.shape == y.shape for x, y in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True))
