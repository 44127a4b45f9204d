"""What maskops.masked_softmax refuses, and in which words."""

from typing import Any

import pytest
import torch

import maskops
from maskops import masks
from tests.softmax_oracle import UNREADABLE, coins, needs_extension, noise, unreadable

pytestmark = pytest.mark.devices


@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [
        (
            (2, 5, 5),
            (2, 1, 1, 5),
            r"mask has shape \(2, 1, 1, 5\), x has shape \(2, 5, 5\): a mask must broadcast to x without enlarging it, "
            r"and these two give \(2, 2, 5, 5\)\. Use mask\.squeeze\(1\), shape \(2, 1, 5\)$",
        ),
        ((2, 5, 5), (1, 1, 1, 5), r"these two give \(1, 2, 5, 5\)\. Use mask\.squeeze\(0\), shape \(1, 1, 5\)$"),
        ((2, 5, 5), (2, 5), r"enlarging it\. Use mask\.unsqueeze\(1\), shape \(2, 1, 5\)$"),
        ((2, 3, 5, 5), (2, 5, 5), r"Use mask\.unsqueeze\(1\), shape \(2, 1, 5, 5\)$"),
        ((2, 3, 5, 5), (2, 5), r"Use mask\.reshape\(2, 1, 1, 5\), or masks\.key_padding\(mask\)$"),
        ((5,), (2, 5), r"and these two give \(2, 5\)$"),
        ((2, 5), (2, 4), r"x has shape \(2, 5\): a mask must broadcast to x without enlarging it$"),
    ],
)
def test_masks_that_do_not_broadcast(shape: tuple[int, ...], mask_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maskops.masked_softmax(noise(*shape), coins(*mask_shape))


PLAN = masks.causal().spans(4, 4)
TWO = masks.padding(torch.tensor([4, 2]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], None), TypeError, r"^x: expected a tensor of scores, got list$"),
        ((torch.ones(3, dtype=torch.int64), None), TypeError, r"^x has dtype torch\.int64: expected float32"),
        ((torch.ones(3), [True]), TypeError, r"^mask: expected a tensor of bool or 0/1 integers, a mask of maskops"),
        (
            (torch.ones(3), torch.ones(3)),
            TypeError,
            r"^mask has dtype torch\.float32: .*masked_softmax\(x \+ mask, None",
        ),
        (
            (torch.ones(3), torch.ones(3, dtype=torch.uint16)),
            TypeError,
            r"^mask has dtype torch\.uint16: expected bool",
        ),
        ((torch.ones(3), torch.tensor([0, 2, 1])), ValueError, r"^mask\[1\]=2: a mask holds 0 and 1"),
        ((torch.ones(3), torch.ones(3, dtype=torch.bool, device="meta")), ValueError, r"^mask is on meta, x on cpu"),
        ((torch.ones(2, 3), None, 2), IndexError, r"^dim is 2: x has shape \(2, 3\), expected -2 to 1$"),
        ((torch.ones(2, 3), None, 1.0), TypeError, r"^dim is a float: expected an int$"),
        ((torch.ones(2, 3), None, True), TypeError, r"^dim is a bool: expected an int$"),
        ((torch.ones(4), masks.causal()), ValueError, r"^x has shape \(4,\): a mask of queries and keys needs scores"),
        ((torch.ones(5, 5), PLAN), ValueError, r"^mask is a plan for 4 queries and 4 keys, .*mask\.spans\(5, 5\)$"),
        (
            (torch.ones(3, 4, 4), TWO.spans(4, 4)),
            ValueError,
            r"^mask is a plan for a batch of 2, x has shape \(3, 4, 4\)",
        ),
        (
            (torch.ones(4, 4, device="meta"), PLAN),
            ValueError,
            r"^mask is a plan on cpu, x is on meta: plan it with dev",
        ),
        ((torch.ones(6, 4, 4), TWO), ValueError, r"is for a batch of 2, x has .* pass x\.unflatten\(0, \(2, 3\)\)$"),
        (
            (torch.ones(2, 4, 4), masks.dense(coins(2, 3, 4, 4))),
            ValueError,
            r"^mask holds a dense mask with shape \(2, 3",
        ),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        maskops.masked_softmax(*arguments)


@pytest.mark.processor
def test_named_backend_refuses() -> None:
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run maskops\.masked_softmax: .*not float64"):
        maskops.masked_softmax(torch.ones(3, dtype=torch.float64), None, backend="cpu")


@pytest.mark.processor
@pytest.mark.parametrize("place", range(UNREADABLE))
def test_operator_refuses_what_it_cannot_read(place: int) -> None:
    needs_extension()
    with pytest.raises(ValueError, match=r"^masked_softmax: "):
        torch.ops.maskops.masked_softmax_forward(*unreadable(place))
