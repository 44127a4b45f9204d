"""Recurrent networks: batches to torch's PackedSequence and back.

A PackedSequence holds the first tokens of all sequences, then their second tokens, and so on, the longest sequence
first. It cannot hold a sequence without tokens: such sequences are left out of it, and are there again on the way back.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from maskops.checks import INTEGERS
from maskops.data.packed_batch import PackedBatch
from maskops.data.padded_batch import PaddedBatch


def _by_time(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the sequences that have tokens, longest first, and how many of them reach each time step.

    Args:
        lengths: int64 (n_sequences,) on the CPU.

    Returns:
        Order, int64 (sequences with tokens,); batch sizes, int64 (longest,), both on the CPU.
    """
    order = lengths.argsort(descending=True, stable=True)
    order = order[: int((lengths > 0).sum())]
    longest = int(lengths.max()) if lengths.shape[0] else 0
    ends = torch.bincount(lengths[order], minlength=longest + 1)  # how many are over after t tokens
    return order, order.shape[0] - ends.cumsum(0)[:longest]


def _places(lengths: Tensor, order: Tensor, batch_sizes: Tensor) -> Tensor:
    """Place in the packed row of each element of a PackedSequence, int64 (tokens,)."""
    begins = (lengths.cumsum(0) - lengths)[order]
    step = torch.repeat_interleave(torch.arange(batch_sizes.shape[0]), batch_sizes)
    rank = torch.arange(step.shape[0]) - (batch_sizes.cumsum(0) - batch_sizes)[step]
    return begins[rank] + step


def _inverse(order: Tensor) -> Tensor:
    """Rank of each sequence among those that have tokens, in the order of the batch."""
    return order.argsort()


def to_packed_sequence(batch: PackedBatch | PaddedBatch, tensor: Tensor | None = None) -> PackedSequence:
    """A batch, or values that go with its tokens, as torch's PackedSequence. Differentiable.

    As with ``enforce_sorted=False``, sequences may have any order; recurrent layers give their final states in the
    order of the batch, without the sequences that have no token (see ``sequence_states``). The lengths are read on the
    host, as everywhere in torch: a device is waited for.

    Args:
        batch: the sequences.
        tensor: what goes with their tokens, such as embeddings: (total, ...) for a PackedBatch, (batch, length, ...)
            for a PaddedBatch; the token ids by default.
    """
    values = batch.input_ids if tensor is None else tensor
    if isinstance(batch, PaddedBatch):
        values = batch.to_packed(values)
    elif values.dim() < 1 or values.shape[0] != batch.total:
        raise ValueError(f"tensor has shape {tuple(values.shape)}, expected ({batch.total}, ...), the places of batch")
    lengths = batch.lengths.to("cpu", torch.int64)
    order, batch_sizes = _by_time(lengths)
    if not order.shape[0]:
        raise ValueError("batch has no tokens: a PackedSequence cannot be empty")
    places = _places(lengths, order, batch_sizes).to(values.device)
    # Numbers among the sequences that are there: recurrent layers permute their states by them.
    present = (lengths > 0).cumsum(0)[order] - 1
    return PackedSequence(
        values.index_select(0, places), batch_sizes, present.to(values.device), _inverse(present).to(values.device)
    )


@overload
def from_packed_sequence(packed_sequence: PackedSequence, batch: None = None) -> PackedBatch: ...


@overload
def from_packed_sequence(packed_sequence: PackedSequence, batch: PackedBatch | PaddedBatch) -> Tensor: ...


def from_packed_sequence(
    packed_sequence: PackedSequence, batch: PackedBatch | PaddedBatch | None = None
) -> Tensor | PackedBatch:
    """The way back of ``to_packed_sequence``, for what a recurrent layer returns. Differentiable.

    Args:
        packed_sequence: of ``to_packed_sequence``, a recurrent layer, or torch's own functions, sorted or not.
        batch: the batch that it came from; None: the sequences are token ids, and become a PackedBatch.

    Returns:
        With ``batch``: a tensor that goes with its tokens, (total, ...) or (batch, length, ...), 0 where there is none.
        Without: a PackedBatch in the order before sorting.

    Raises:
        TypeError: values that are no token ids, without ``batch``.
        ValueError: lengths that are not those of ``batch``.
    """
    data, batch_sizes, _, unsorted = packed_sequence
    # How many steps each rank has: batch sizes never grow.
    sizes = (batch_sizes.unsqueeze(0) > torch.arange(int(batch_sizes[0])).unsqueeze(1)).sum(1)
    ranks = torch.arange(sizes.shape[0]) if unsorted is None else unsorted.cpu()
    lengths = sizes[ranks]
    if batch is None:
        if data.dim() != 1 or data.dtype not in INTEGERS:
            raise TypeError(
                f"packed_sequence holds {data.dtype} of shape {tuple(data.shape)}, expected token ids (tokens,): to "
                "bring other values back give the batch that they belong to"
            )
        total = data.shape[0]
    else:
        expected = batch.lengths.to("cpu", torch.int64)
        if not torch.equal(lengths, expected[expected > 0]):
            raise ValueError(
                f"packed_sequence has sequences of {lengths.tolist()} tokens, batch of {expected.tolist()}: give the "
                "batch that it came from"
            )
        total = batch.total if isinstance(batch, PackedBatch) else int(lengths.sum())
    places = _places(lengths, ranks.argsort(), batch_sizes).to(data.device)
    rows = data.new_zeros(total, *data.shape[1:]).index_copy(0, places, data)
    if batch is None:
        sizes = lengths.to(data.device, torch.int32)
        return PackedBatch(rows.to(torch.int64), sizes, batch_sizes.shape[0], has_room=False)
    return rows if isinstance(batch, PackedBatch) else batch.to_padded(rows)


def sequence_states(batch: PackedBatch | PaddedBatch, states: Tensor) -> Tensor:
    """Final states of a recurrent layer with the sequences that have no token put back, as 0. Differentiable.

    Args:
        batch: what ``to_packed_sequence`` got.
        states: (layers, sequences with tokens, features), such as ``h_n`` and ``c_n``.

    Returns:
        (layers, n_sequences, features), in the order of the batch.
    """
    present = (batch.lengths > 0).nonzero().flatten()
    if states.dim() != 3 or states.shape[1] != present.shape[0]:
        raise ValueError(
            f"states has shape {tuple(states.shape)}, expected (layers, {present.shape[0]}, features): one for each "
            "sequence of batch that has tokens"
        )
    return states.new_zeros(states.shape[0], batch.n_sequences, states.shape[2]).index_copy(1, present, states)
