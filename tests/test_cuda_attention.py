"""Span attention on the backend `cuda`, emulated where there is no device: the tests of every backend, and its own."""

from __future__ import annotations

import pytest
import torch

from maskops import backend as backends
from maskops import masks, testing
from maskops.ops.attention.registration import Features, filled, operator_arguments
from tests.served import DEVICE

# Collected here as well, with the fixtures of this file.
from tests.test_attention_features import (  # noqa: F401
    assert_close,
    draw,
    results,
    test_a_bias_may_hold_anything_where_the_mask_hides_it,
    test_a_bias_of_any_strides_and_dtype,
    test_a_row_that_a_bias_empties_may_hold_anything,
    test_dropout,
    test_dropout_does_not_depend_on_layout,
    test_every_broadcast_of_a_bias,
    test_gradients_of_packed_rows_under_a_large_bias,
    test_gradients_of_rows_under_a_large_bias,
    test_gradients_of_rows_under_a_large_slope,
    test_nothing_at_all,
    test_packed_features_are_those_of_each_sequence,
    test_sinks_of_any_size,
    test_slopes_of_packed_sequences,
    test_the_lowest_finite_bias_hides_nothing,
)

NAME = "cuda"
CASES = testing.cases("attention", features=True)
pytestmark = pytest.mark.devices


@pytest.fixture
def backend() -> str:
    if reasons := backends.BACKENDS[NAME].refusals_of(DEVICE):
        pytest.skip(f"{NAME}: {'; '.join(reasons)}")
    return NAME


@pytest.fixture
def engine(backend: str) -> str:
    return backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["single", "bfloat16", "half"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(backend: str, case: testing.Case, dtype: torch.dtype) -> None:
    parts = testing.PARTS if dtype == torch.float32 else ("numbers",)
    report = testing.check(testing.attention_on(backend, case), case.with_dtype(dtype), parts=parts, device=DEVICE)
    assert report.is_differentiable
    report.raise_if_failed()


@pytest.mark.parametrize(
    "width, value_width, dtype",
    [(65, 129, torch.float32), (129, 65, torch.float32), (72, 80, torch.float16), (260, 300, torch.float32)],
    ids=str,
)
def test_several_tiles(backend: str, width: int, value_width: int, dtype: torch.dtype) -> None:
    """Work items of more rows than a block has, more keys than a tile, widths that no chunk divides."""
    tensors = {"q": draw(1, 2, 300, width), "k": draw(1, 1, 300, width), "v": draw(1, 1, 300, value_width)}
    tensors |= {"bias": draw(1, 1, 300, 300), "alibi_slopes": draw(2), "sinks": draw(2)}
    tensors = {name: x.detach().to(dtype if name in "qkv" else torch.float32) for name, x in tensors.items()}
    mask = masks.documents(cu_seqlens=torch.tensor([0, 1, 90, 298])) & masks.causal()
    expected = results(mask, tensors, "reference", torch.float64, softcap=3.0, dropout_p=0.2)
    actual = results(mask, tensors, backend, dtype, softcap=3.0, dropout_p=0.2)
    assert_close(actual, expected, 2e-5 if dtype == torch.float32 else 4e-3)


def test_the_same_bits_whatever_the_plan_leaves_to_the_schedule(backend: str) -> None:
    """The order of the items, and the bounds of the key tiles, which a plan may lack."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 2, 200, 16, generator=generator) for _ in range(4))
    plan = (masks.causal() & masks.padding(torch.tensor([200, 77]))).spans(200, 200, batch=2, order=True)
    assert plan.order is not None and plan.key_tiles is not None
    reverse = plan.order[: int(plan.tile_count)].flip(0)
    others = (
        plan._replace(order=torch.cat((reverse, plan.order[int(plan.tile_count) :]))),
        plan._replace(order=None),
        plan._replace(key_tiles=None),
    )

    def outputs(spans: object) -> list[torch.Tensor]:
        arguments = filled(operator_arguments(spans, Features(softmax_scale=0.25), backend), q)  # type: ignore[arg-type]
        out, lse = torch.ops.maskops.attention_forward_cuda(q, k, v, *arguments)
        nothing = torch.empty(0)
        grads = torch.ops.maskops.attention_backward_cuda(
            grad, nothing, q, k, v, out, lse, *arguments, False, False, False
        )
        return [out, lse, *grads[:3]]

    expected = outputs(plan)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(outputs(other), expected, strict=True))


def test_hostile_plans_touch_nothing_outside(backend: str) -> None:
    """A device checks no values: whatever a plan holds, the kernels stay within the tensors."""
    q = torch.randn(1, 2, 40, 8)
    plan = masks.causal().spans(40, 40, order=True)
    for name in ("start", "end", "key_valid", "tiles", "tile_count", "key_tiles", "order"):
        for value in (-(2**31), 2**31 - 1, -1, 41):
            tensor = getattr(plan, name)
            filled_with = torch.full_like(tensor, value % 256 if tensor.dtype == torch.uint8 else value)
            spans = plan._replace(**{name: filled_with})
            arguments = filled(operator_arguments(spans, Features(), backend), q)
            out, lse = torch.ops.maskops.attention_forward_cuda(q, q, q, *arguments)
            out, lse = torch.zeros_like(out), torch.zeros_like(lse)
            torch.ops.maskops.attention_backward_cuda(
                q, torch.empty(0), q, q, q, out, lse, *arguments, False, False, False
            )
