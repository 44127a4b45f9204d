"""Merging attention over parts of the keys: exact, differentiable, and never NaN."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.spans import build_row_spans
from maskops.testing import error_budget
from tests.served import AT_HOME

pytestmark = pytest.mark.devices

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of the docstring; NaN where a row is empty in both parts."""
    lse = torch.log(torch.exp(lse_a) + torch.exp(lse_b))
    weight_a, weight_b = (torch.exp(x - lse)[..., None] for x in (lse_a, lse_b))
    return weight_a * out_a + weight_b * out_b, lse


def parts(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs and lse of two parts, (2, 3, 5, 4) and (2, 3, 5), lse far apart in some rows."""
    lse_dtype = dtype if dtype == torch.float64 else torch.float32
    return [
        draw(2, 3, 5, 4, dtype=dtype, seed=1),
        draw(2, 3, 5, dtype=lse_dtype, seed=2) * 4,
        draw(2, 3, 5, 4, dtype=dtype, seed=3),
        draw(2, 3, 5, dtype=lse_dtype, seed=4) * 4,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_formula(dtype: torch.dtype) -> None:
    inputs = parts(dtype)
    out, lse = maskops.merge_attention(*inputs)
    assert out.dtype == dtype
    assert lse.dtype == inputs[1].dtype
    oracle = plain_merge(*(x.double() for x in inputs))
    plain = plain_merge(*inputs)
    for actual, expected, ordinary in zip((out, lse), oracle, plain, strict=True):
        budget = error_budget(actual, ordinary, expected, dtype)
        assert budget.passed, budget


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", AT_HOME)
def test_split_and_merge_is_whole(backend: str, packed: bool) -> None:
    """Attention over two halves of the keys, merged, with gradients; rows that are empty in one half or in both."""
    if (reason := maskops.backends()[backend]) != "available":
        pytest.skip(f"{backend}: {reason}")
    q, k, v = (draw(2, 4, 6, 8, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(3))

    def attend(spans: maskops.RowSpans) -> tuple[Tensor, Tensor]:
        return maskops.attention(q, k, v, spans, return_lse=True, backend=backend)

    # A layout of the keys would move what causal() is aligned with, so the halves are cut out of the plan of the whole.
    whole = (masks.padding(torch.tensor([6, 4])) & masks.causal()).spans(6, 6, batch=2)
    first = build_row_spans(whole.start.clamp(max=3), whole.end.clamp(max=3), 6)
    second = build_row_spans(whole.start.clamp(min=3), whole.end.clamp(min=3), 6)
    expected = attend(whole)
    halves = [x for spans in (first, second) for x in attend(spans)]
    if packed:
        flat = [
            x.transpose(1, 2).reshape(12, 4, 8) if x.dim() == 4 else x.transpose(0, 1).reshape(4, 12) for x in halves
        ]
        out, lse = maskops.merge_attention(*flat)
        merged = (out.reshape(2, 6, 4, 8).transpose(1, 2), lse.reshape(4, 2, 6).transpose(0, 1))
    else:
        merged = maskops.merge_attention(*halves)
    upstream = (draw(2, 4, 6, 8, dtype=torch.float32, seed=8), draw(2, 4, 6, dtype=torch.float32, seed=9))
    grads = [torch.autograd.grad(outputs, [q, k, v], upstream, retain_graph=True) for outputs in (expected, merged)]
    for one, other in zip([*expected, *grads[0]], [*merged, *grads[1]], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert (merged[0][1, :, 4:] == 0).all() and (merged[1][1, :, 4:] == -math.inf).all()


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in parts()]
    assert torch.autograd.gradcheck(maskops.merge_attention, inputs)
    assert torch.autograd.gradgradcheck(maskops.merge_attention, inputs)


def test_an_empty_part_is_neutral() -> None:
    out_a, lse_a, out_b, lse_b = parts(torch.float32)
    out_b[:] = math.nan
    lse_b[:] = -math.inf
    for inputs in ((out_a, lse_a, out_b, lse_b), (out_b, lse_b, out_a, lse_a)):
        inputs = tuple(x.clone().requires_grad_() for x in inputs)
        out, lse = maskops.merge_attention(*inputs)
        assert torch.equal(out, out_a) and torch.equal(lse, lse_a)
        upstream = torch.full_like(out, 2.0), torch.full_like(lse, 3.0)
        grads = torch.autograd.grad((out, lse), inputs, upstream)
        for x, grad in zip(inputs, grads, strict=True):
            is_empty = x.isnan() | (x == -math.inf)
            assert (grad == torch.where(is_empty, 0.0, 2.0 if x.dim() == 4 else 3.0)).all()


def test_both_parts_empty() -> None:
    """Nothing merged with nothing is nothing, whatever stands in the rows and arrives as a gradient."""
    out = torch.full((1, 2, 3, 4), math.nan)
    lse = torch.full((1, 2, 3), -math.inf)
    inputs = [x.clone().requires_grad_() for x in (out, lse, out, lse)]
    merged = maskops.merge_attention(*inputs)
    assert (merged[0] == 0).all() and (merged[1] == -math.inf).all()
    for grad in torch.autograd.grad(merged, inputs, [torch.full_like(x, math.nan) for x in merged]):
        assert (grad == 0).all()


def test_infinite_score() -> None:
    out_a, lse_a, out_b, lse_b = parts(torch.float32)
    lse_a[:] = math.inf
    out, lse = maskops.merge_attention(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out, out_a) and (lse == math.inf).all()
    out, _ = maskops.merge_attention(out_a, lse_a, out_b, lse_a)
    assert out.isnan().all()


def test_scores_beyond_the_exponential() -> None:
    out_a, lse_a, out_b, lse_b = parts(torch.float32)
    out, lse = maskops.merge_attention(out_a, lse_a + 1000, out_b, lse_b + 1000)
    expected = plain_merge(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    assert torch.allclose(out.double(), expected[0], atol=1e-4)
    assert torch.allclose(lse.double() - 1000, expected[1], atol=1e-3)


@pytest.mark.processor
def test_under_compile_and_vmap() -> None:
    inputs = parts(torch.float32)
    expected = maskops.merge_attention(*inputs)
    compiled = torch.compile(maskops.merge_attention, fullgraph=True, backend="aot_eager")(*inputs)
    mapped = torch.func.vmap(maskops.merge_attention)(*(x[None] for x in inputs))
    for one, two, three in zip(expected, compiled, mapped, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out_a": 1}, TypeError, "out_a: expected a tensor of floating dtype, got int"),
        ({"lse_b": torch.zeros(2, 3, 5).long()}, TypeError, "lse_b is torch.int64: expected a floating dtype"),
        ({"out_b": torch.zeros(2, 3, 5, 4).half()}, TypeError, "out_a is torch.float32, out_b is torch.float16"),
        ({"out_b": torch.zeros(2, 3, 5, 3)}, ValueError, "out_b (2, 3, 5, 3): they must be equal"),
        (
            {"lse_a": torch.zeros(2, 5, 3)},
            ValueError,
            "lse_a has shape (2, 5, 3): expected (batch, heads, q_len) = (2, 3, 5)",
        ),
        ({"out_a": torch.zeros(5, 4)}, ValueError, "out_a has shape (5, 4): expected (batch, heads, q_len, value_dim)"),
        ({"lse_b": torch.zeros(2, 3, 5, device="meta")}, ValueError, "lse_b is on meta, out_a on cpu"),
    ],
    ids=lambda value: "" if isinstance(value, str | type) else next(iter(value)),
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    named = dict(zip(("out_a", "lse_a", "out_b", "lse_b"), parts(torch.float32), strict=True)) | change
    with pytest.raises(error) as raised:
        maskops.merge_attention(**named)
    assert message in str(raised.value)


def test_error_of_packed_shapes() -> None:
    out, lse = torch.zeros(7, 3, 4), torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"lse_a has shape \(7, 3\): expected \(heads, total\) = \(3, 7\)"):
        maskops.merge_attention(out, lse, out, lse)
