"""Where tokens stand: columns of a padded batch and position ids, from lengths; and the checks that batches share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from maskops.checks import INTEGERS, check_tensor
from maskops.layouts import first_true, values_can_be_read


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
        lengths: integers (n_sequences,).
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


def padding_position(position_start: int) -> int:
    """Position id of padding: one before the first token's, as in RoBERTa, but at least 0."""
    return max(0, position_start - 1)


def position_ids(place: Tensor, sequence_ids: Tensor, first_positions: Tensor | None, position_start: int) -> Tensor:
    """int64 position ids from places inside sequences; padding, where ``sequence_ids`` < 0, has a fixed one.

    Args:
        place: integers, place of each token in its sequence.
        sequence_ids: int64, same shape: number of that sequence, negative = padding.
        first_positions: int64 (n_sequences,), or None: all 0.
        position_start: position id of a document's first token.
    """
    position = place + position_start
    if first_positions is not None:
        # One more, so that there is something to read where there is no sequence at all.
        position = position + torch.nn.functional.pad(first_positions, (0, 1))[sequence_ids.clamp(min=0)]
    return torch.where(sequence_ids >= 0, position, padding_position(position_start)).to(torch.int64)


def check_batch(batch: _Fields) -> None:
    """Check dtypes, shapes and devices of a batch's tensors, and its lengths where values can be read."""
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
        if tensor.shape != model.shape:
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
