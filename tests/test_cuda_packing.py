"""Packing by the CUDA kernels, emulated where there is no device, against the torch operations that are its meaning."""

from __future__ import annotations

import pytest
import torch

import maskops
from maskops import backend as backends
from maskops.packing import pad_input, unpad_input
from tests.served import DEVICE

pytestmark = pytest.mark.devices


@pytest.fixture(autouse=True)
def served() -> None:
    if reasons := backends.BACKENDS["cuda"].refusals_of(DEVICE):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    assert not backends.moves_rows("cpu"), "processors take torch's operations unless they are told otherwise"


def both(hidden: torch.Tensor, *masks: torch.Tensor, **keywords: int):
    """What the kernels return, and what torch does on a processor."""
    with maskops.use_backend("cuda"):
        assert backends.moves_rows(DEVICE)
        found = unpad_input(hidden, *masks, **keywords)
    return found, unpad_input(hidden.cpu(), *(mask.cpu() for mask in masks), **keywords)


def same(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x.cpu(), y) and x.dtype == y.dtype if isinstance(y, torch.Tensor) else x == y


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize(("batch", "length"), [(3, 5), (5, 300), (1, 1), (2, 0), (0, 4)])
def test_indices(batch: int, length: int, dtype: torch.dtype) -> None:
    mask = (torch.rand(batch, length) < 0.6).to(dtype)
    unused = (torch.rand(batch, length) < 0.3).to(dtype)
    hidden = torch.randn(batch, length, 3)
    same(*both(hidden, mask))
    same(*both(hidden, mask, unused))
    for capacity in (batch * length, batch * length + 300):
        same(*both(hidden, mask, unused, capacity=capacity))


def test_tokens_beyond_the_capacity_are_dropped() -> None:
    """Where values are looked at that is an error; a device does not look."""
    mask, absent = torch.ones(3, 4, dtype=torch.bool), torch.empty(0, dtype=torch.bool)
    indices, cu_seqlens, seqused = torch.ops.maskops.unpad_index(mask, absent, 6)
    assert indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert cu_seqlens.tolist() == [0, 4, 6, 6] and seqused.tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="capacity must be below"):
        torch.ops.maskops.unpad_index(mask, absent, 2**31)
    with maskops.use_backend("cuda"), maskops.validate(), pytest.raises(ValueError, match="keeps 12 tokens, more than"):
        unpad_input(torch.zeros(3, 4, 1), mask, capacity=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("rest", [(), (1,), (3,), (2, 8), (0,)])
def test_rows_of_any_dtype_and_width(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = (torch.randn(3, 40, *rest) * 10).to(dtype)
    mask = torch.rand(3, 40) < 0.5
    found, expected = both(hidden, mask, capacity=130)
    same(found, expected)
    with maskops.use_backend("cuda"):
        padded = pad_input(found[0], found[1], 3, 40)
        same([padded], [pad_input(expected[0], expected[1], 3, 40)])
        same([pad_input(found[0], found[1].int(), 3, 40)], [padded.cpu()])


def test_a_view_that_is_not_aligned() -> None:
    hidden = torch.randn(2, 8, 9)[..., 1:]
    same(*both(hidden, torch.rand(2, 8) < 0.5))
    rows = torch.arange(33, dtype=torch.uint8)[1:].reshape(2, 16)
    moved = torch.ops.maskops.gather_rows(rows, torch.tensor([1, 5, 0, -1]))
    assert torch.equal(moved.cpu(), torch.stack((rows[1], rows[0] * 0, rows[0], rows[0] * 0)).cpu())


def test_the_last_of_rows_that_meet_stays() -> None:
    rows = torch.arange(6, dtype=torch.uint8).reshape(3, 2)
    moved = torch.ops.maskops.scatter_rows(rows, torch.tensor([1, 9, 1]), 3)
    assert moved.tolist() == [[0, 0], [4, 5], [0, 0]]


def test_gradients_of_padding_are_zero_whatever_it_holds() -> None:
    hidden = torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    hidden[mask == 0] = torch.nan
    hidden.requires_grad_()
    with maskops.use_backend("cuda"):
        packed, indices, *_ = unpad_input(hidden, mask, capacity=9)
        out = pad_input(packed * 2, indices, 2, 6)
        weights = torch.randn(2, 6, 4)
        (grad,) = torch.autograd.grad((out * weights).sum(), hidden, create_graph=True)
    assert torch.equal(grad, torch.where(mask.bool().unsqueeze(2), 2 * weights, 0.0))
    assert torch.equal(out, torch.where(mask.bool().unsqueeze(2), 2 * hidden, 0.0))


def test_compiled() -> None:
    hidden, mask = torch.randn(2, 6, 4), torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()

    def step(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        packed, indices, *_ = unpad_input(hidden, mask, capacity=9)
        return pad_input(packed, indices, 2, 6)

    with maskops.use_backend("cuda"):
        out = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, mask)
    assert torch.equal(out, torch.where(mask.unsqueeze(2), hidden, 0.0))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ops: ops.unpad_index(torch.ones(4), torch.ones(0), 4), "the mask must be"),
        (lambda ops: ops.unpad_index(torch.ones(2, 4), torch.ones(0), 4), "masks must be bool, uint8"),
        (lambda ops: ops.unpad_index(torch.ones(2, 4).int(), torch.ones(2, 3).int(), 4), "one shape"),
        (lambda ops: ops.gather_rows(torch.ones(2, 4), torch.tensor([0])), "rows must be contiguous bytes"),
        (lambda ops: ops.gather_rows(torch.ones(2, 4).byte(), torch.tensor([0]).int()), "indices must be contiguous"),
        (lambda ops: ops.scatter_rows(torch.ones(2, 4).byte(), torch.tensor([0]), 4), "an index for each row"),
    ],
)
def test_what_no_caller_passes_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(torch.ops.maskops)
