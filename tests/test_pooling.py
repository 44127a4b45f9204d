"""Embeddings of documents: pool() against plain sums over each document, in every way that documents lie in a batch."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops.integrations import pool
from maskops.integrations.pooling import Pooling

LENGTHS = (4, 1, 0, 3, 2)
WIDTH = 4
EVERY = get_args(Pooling)


def expected(tokens: Tensor, how: str) -> Tensor:
    """The vector of one document (length, WIDTH), written down as plainly as it goes."""
    length = tokens.shape[0]
    if length == 0:
        return tokens.new_zeros(WIDTH)
    if how == "weighted_mean":
        weights = torch.arange(1, length + 1, dtype=tokens.dtype) / (length * (length + 1) / 2)
        return (weights.unsqueeze(1) * tokens).sum(0)
    return {
        "mean": tokens.mean(0),
        "mean_sqrt_length": tokens.sum(0) / length**0.5,
        "max": tokens.max(0).values,
        "cls": tokens[0],
        "last": tokens[-1],
    }[how]


def documents(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, WIDTH, generator=generator, dtype=dtype) for length in LENGTHS]


def offsets(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def batches(dtype: torch.dtype = torch.float64) -> dict[str, tuple[Tensor, dict[str, object]]]:
    """The same documents in every layout; what belongs to none of them holds NaN."""
    parts, sizes = documents(dtype), torch.tensor(LENGTHS)
    packed = torch.cat(parts)
    with_tail = torch.nn.functional.pad(packed, (0, 0, 0, 3), value=torch.nan)
    right = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=torch.nan)
    real = torch.arange(4) < sizes.unsqueeze(1)
    left = torch.full_like(right, torch.nan).masked_scatter(real.flip(1).unsqueeze(2), packed)
    holes, spread = right.new_full((5, 8, WIDTH), torch.nan), torch.zeros(5, 8, dtype=torch.int64)
    holes[:, 1::2], spread[:, 1::2] = right, real.to(torch.int64)
    ids = [torch.arange(length) for length in LENGTHS]
    return {
        "one row": (packed.unsqueeze(0), {"batch": offsets()}),
        "tokens": (packed, {"cu_seqlens": offsets().to(torch.int64)}),
        "two rows": (packed.view(2, 5, WIDTH), {"cu_seqlens": offsets()}),
        "tail": (with_tail, {"cu_seqlens": offsets()}),
        "PackedBatch": (packed, {"batch": maskops.PackedBatch.from_sequences(ids)}),
        "with room": (with_tail.unsqueeze(0), {"batch": maskops.PackedBatch.from_sequences(ids, capacity=13)}),
        "PaddedBatch": (right, {"batch": maskops.data.pad(ids, pad_token_id=0)}),
        "PaddedBatch left": (left, {"batch": maskops.data.pad(ids, pad_token_id=0, side="left")}),
        "mask": (right, {"attention_mask": real}),
        "integer mask": (left, {"batch": real.flip(1).to(torch.int64)}),
        "holes": (holes, {"attention_mask": spread}),
        "lengths": (right, {"lengths": sizes}),
    }


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("name", batches())
def test_documents_give_the_same_vector_in_every_layout(name: str, how: Pooling) -> None:
    hidden, layout = batches()[name]
    hidden.requires_grad_()
    parts = [part.requires_grad_() for part in documents()]
    result = pool(hidden, how=how, **layout)  # type: ignore[arg-type]
    wanted = torch.stack([expected(part, how) for part in parts])
    torch.testing.assert_close(result, wanted, rtol=0, atol=1e-12)

    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(result, hidden, direction)
    wanted_gradients = torch.autograd.grad(wanted, parts, direction, allow_unused=True)
    real = ~hidden.detach().isnan().any(-1)
    rows = torch.cat([part[:0] if x is None else x for x, part in zip(wanted_gradients, parts, strict=True)])
    torch.testing.assert_close(gradient[real], rows, rtol=0, atol=1e-12)
    assert bool((gradient[~real] == 0).all())


@pytest.mark.parametrize("how", EVERY)
def test_half_precision_is_summed_in_single(how: Pooling) -> None:
    """4096 times 0.1 in bfloat16 stops growing at 32 if it is summed as it is."""
    hidden = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    result = pool(hidden, torch.tensor([0, 4096]), how)
    assert result.dtype == torch.bfloat16
    value = float(hidden[0, 0]) * (64 if how == "mean_sqrt_length" else 1)
    torch.testing.assert_close(result, torch.full((1, 2), value, dtype=torch.bfloat16), rtol=0.008, atol=0)


@pytest.mark.parametrize("how", EVERY)
def test_second_derivatives(how: Pooling) -> None:
    hidden = torch.cat(documents()).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: pool(x.sin(), offsets(), how), hidden)


def test_gradient_of_equal_maxima_goes_to_the_first() -> None:
    hidden = torch.tensor([[1.0, 2.0], [1.0, 3.0], [0.0, 3.0]]).requires_grad_()
    pool(hidden, torch.tensor([0, 3]), "max").sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[1, 0], [0, 1], [0, 0]]


def test_nan_inside_a_document_stays_in_it() -> None:
    hidden = torch.cat(documents())
    hidden[1, 2] = torch.nan
    for how in EVERY:
        for x in (hidden, hidden.clone().requires_grad_()):
            result = pool(x, offsets(), how)
            assert bool(result[0, 2].isnan()) == (how not in ("cls", "last"))
            assert not bool(result[1:].isnan().any())


@pytest.mark.parametrize("how", EVERY)
@pytest.mark.parametrize("count", [0, 2])
def test_no_tokens_at_all(how: Pooling, count: int) -> None:
    hidden = torch.zeros(1, 0, 3, requires_grad=True)
    result = pool(hidden, torch.zeros(count + 1, dtype=torch.int32), how)
    assert result.shape == (count, 3) and bool((result == 0).all())
    result.sum().backward()
    padded = pool(torch.zeros(count, 0, 3), attention_mask=torch.zeros(count, 0, dtype=torch.bool), how=how)
    assert padded.shape == (count, 3) and bool((padded == 0).all())


@pytest.mark.parametrize("how", EVERY)
def test_nothing_waits_for_the_device(how: Pooling) -> None:
    """Fake tensors raise where a value would be read."""
    with FakeTensorMode():
        hidden = torch.empty(2, 6, 3, requires_grad=True)
        results = [
            pool(hidden, torch.empty(6, dtype=torch.int32), how),
            pool(hidden, torch.empty(2, 6, dtype=torch.bool), how),
            pool(hidden, lengths=torch.empty(2, dtype=torch.int64), how=how),
        ]
        assert [tuple(result.shape) for result in results] == [(5, 3), (2, 3), (2, 3)]
        sum(result.sum() for result in results).backward()  # type: ignore[union-attr]


def test_compiles_to_one_graph() -> None:
    hidden = torch.cat(documents(torch.float32))
    compiled = torch.compile(lambda x, cu: pool(x, cu, "mean") + pool(x, cu, "max"), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, offsets()), pool(hidden, offsets()) + pool(hidden, offsets(), "max"))


HIDDEN = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor"),
        ({"hidden": torch.zeros(3)}, ValueError, r"hidden has shape \(3,\), expected \(1, total, H\)"),
        ({"hidden": HIDDEN.long(), "lengths": torch.ones(2)}, TypeError, "hidden has dtype torch.int64"),
        ({"how": "first", "lengths": torch.ones(2)}, ValueError, "how='first': expected one of 'mean', "),
        ({}, ValueError, "exactly one of batch, cu_seqlens, attention_mask and lengths, got none"),
        ({"batch": torch.ones(2, 4), "lengths": torch.ones(2)}, ValueError, "got batch and lengths"),
        ({"batch": [0, 8]}, TypeError, "batch: expected a tensor of cu_seqlens or an attention mask"),
        ({"batch": torch.ones(1, 2, 4, dtype=torch.int64)}, ValueError, r"batch has shape \(1, 2, 4\)"),
        ({"cu_seqlens": torch.zeros(2)}, TypeError, "cu_seqlens has dtype torch.float32, expected integers"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"cu_seqlens has shape \(0,\)"),
        ({"cu_seqlens": torch.tensor([1, 8])}, ValueError, r"cu_seqlens\[0\]=1: must be 0"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, r"cu_seqlens\[2\]=2 < cu_seqlens\[1\]=3"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, r"cu_seqlens\[-1\]=9 is more than the 8 rows of hidden"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, ValueError, "the document from 3 to 5 crosses from one row of 4"),
        ({"attention_mask": torch.ones(2, 4, 1, dtype=torch.int64)}, ValueError, "attention_mask has shape"),
        (
            {"attention_mask": torch.ones(2, 3, dtype=torch.int64)},
            ValueError,
            r"expected \(2, 3, H\) for attention_m",
        ),
        ({"attention_mask": torch.full((2, 4), 2)}, ValueError, r"attention_mask\[0, 0\]=2: a mask holds 0 and 1"),
        ({"lengths": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"lengths has shape \(2, 1\)"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, ValueError, r"expected \(3, 4, H\) for lengths"),
        ({"lengths": torch.tensor([1, 5])}, ValueError, r"lengths\[1\]=5: expected 0 to 4"),
        ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "lengths is on meta, hidden on cpu"),
        ({"batch": maskops.PackedBatch.from_sequences([[1, 2]])}, ValueError, r"expected \(1, 2, H\) or \(2, H\)"),
        ({"batch": maskops.data.pad([[1]], pad_token_id=0)}, ValueError, r"expected \(1, 1, H\) for batch"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pool(**{"hidden": HIDDEN, **arguments})  # type: ignore[arg-type]
