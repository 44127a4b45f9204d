"""Where tokens stand: columns of a padded batch and position ids, from lengths; and the checks that batches share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from maskops.checks import INTEGERS, check_tensor
from maskops.layouts import first_true, values_can_be_read

_NARROW = (torch.uint8, torch.int8, torch.int16)


class _Fields(Protocol):
    """What the packed and the padded batch have in common."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def max_seqlen(self) -> int: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def first_positions(self) -> Tensor | None: ...
    @property
    def position_start(self) -> int: ...
    @property
    def sequence_labels(self) -> Tensor | None: ...


def check_side(side: str) -> None:
    """Raise ValueError for what is no side of padding."""
    if side not in ("right", "left"):
        raise ValueError(f"side={side!r}: expected 'right' or 'left'")


def padded_places(lengths: Tensor, width: int, side: str) -> tuple[Tensor, Tensor]:
    """For each cell of a padded batch (n_sequences, width): place of its token in the sequence, and whether it is real.

    Args:
        lengths: int32 or int64 (n_sequences,).
        width: columns.
        side: where the padding stands, ``"right"`` or ``"left"``.

    Returns:
        Place, integers (n_sequences, width), meaningless where there is padding; real, bool (n_sequences, width).
    """
    check_side(side)
    column = torch.arange(width, device=lengths.device)
    sizes = lengths.unsqueeze(1)
    if side == "right":
        return column.expand(lengths.shape[0], width), column < sizes
    place = column - (width - sizes)
    return place, place >= 0


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 (total,): number of the sequence of each place of a packed row, -1 after the last.

    Args:
        cu_seqlens: int32 (n_sequences + 1,).
        total: places of the row.
    """
    place = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens, place, right=True) - 1
    return torch.where(ids < cu_seqlens.shape[0] - 1, ids, -1)


def packed_places(lengths: Tensor, cu_seqlens: Tensor, total: int, width: int, side: str) -> Tensor:
    """For each place of a packed row, its cell in a padded batch counted row by row; one past the last: no token.

    Args:
        lengths: integers (n_sequences,).
        cu_seqlens: int32 (n_sequences + 1,), of ``lengths``.
        total: places of the row.
        width: columns of the padded batch.
        side: where its padding stands.

    Returns:
        int64 (total,).
    """
    check_side(side)
    ids = sequence_ids(cu_seqlens, total)
    number = ids.clamp(min=0)
    column = torch.arange(total, device=ids.device) - cu_seqlens[number]
    if side == "left":
        # One more, so that there is something to read where there is no sequence at all.
        column = column + width - torch.nn.functional.pad(lengths, (0, 1)).to(torch.int64)[number]
    return torch.where(ids >= 0, number * width + column, lengths.shape[0] * width)


def gathered(rows: Tensor, index: Tensor, filler: float) -> Tensor:
    """``rows[index]`` where an index one past the last row reads ``filler``, which no gradient leaves.

    Args:
        rows: (n, ...).
        index: integers in ``[0, n]``, any shape.
        filler: what is read at ``n``.

    Returns:
        (*index.shape, ...).
    """
    padded = torch.cat((rows, rows.new_full((1, *rows.shape[1:]), filler)))
    return padded.index_select(0, index.flatten()).reshape(*index.shape, *rows.shape[1:])


def padding_position(position_start: int) -> int:
    """Position id of padding: one before the first token's, as in RoBERTa, but at least 0."""
    return max(0, position_start - 1)


def position_ids(place: Tensor, ids: Tensor, first_positions: Tensor | None, position_start: int) -> Tensor:
    """int64 position ids from places inside sequences; padding, where ``ids`` < 0, has a fixed one.

    Args:
        place: integers, place of each token in its sequence.
        ids: int64, same shape: number of that sequence, negative = padding.
        first_positions: int64 (n_sequences,), or None: all 0.
        position_start: position id of a document's first token.
    """
    position = place + position_start
    if first_positions is not None:
        # One more, so that there is something to read where there is no sequence at all.
        position = position + torch.nn.functional.pad(first_positions, (0, 1))[ids.clamp(min=0)]
    return torch.where(ids >= 0, position, padding_position(position_start)).to(torch.int64)


def check_batch(batch: _Fields) -> None:
    """Check dtypes, shapes and devices of a batch's tensors, and its lengths where values can be read.

    Narrow integers are replaced by int32 for lengths and int64 for all else: they hold no IGNORE_INDEX, and comparing
    them with ``max_seqlen`` wraps.
    """
    for name in ("input_ids", "lengths", "labels", "first_positions", "sequence_labels"):
        tensor = getattr(batch, name)
        if isinstance(tensor, Tensor) and tensor.dtype in _NARROW:
            wide = torch.int32 if name == "lengths" else torch.int64
            object.__setattr__(batch, name, tensor.to(wide))  # batches are frozen
    check_tensor("lengths", batch.lengths, "(n_sequences,)")
    for name, tensor in (("input_ids", batch.input_ids), ("lengths", batch.lengths)):
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    if batch.lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(batch.lengths.shape)}, expected (n_sequences,)")
    if batch.position_start < 0:
        raise ValueError(f"position_start={batch.position_start} is negative")
    like = {"labels": batch.input_ids, "first_positions": batch.lengths, "sequence_labels": batch.lengths}
    for name, model in like.items():
        tensor = getattr(batch, name)
        if tensor is None:
            continue
        check_tensor(name, tensor, f"{tuple(model.shape)} or None")
        # Whole sequences may have a label for each class.
        shape = tensor.shape[:1] if name == "sequence_labels" and tensor.dim() == 2 else tensor.shape
        if shape != model.shape:
            other = "input_ids" if name == "labels" else "lengths"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(model.shape)}, that of {other}")
        if name != "sequence_labels" and tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
    for name in ("lengths", *like):
        tensor = getattr(batch, name)
        if tensor is not None and tensor.device != batch.input_ids.device:
            raise ValueError(f"{name} is on {tensor.device}, input_ids on {batch.input_ids.device}")
    if not values_can_be_read([batch.lengths], batch.lengths.device):
        return
    for bad, what in ((batch.lengths < 0, "is negative"), (batch.lengths > batch.max_seqlen, "")):
        at = first_true(bad)
        if at is not None:
            what = what or f"is more than max_seqlen={batch.max_seqlen}"
            raise ValueError(f"lengths[{at[0]}]={int(batch.lengths[at])} {what}")
