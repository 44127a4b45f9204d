"""Whether a tensor goes with the tokens of a batch, and if not, at which sequence it begins not to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def check_row(name: str, shape: Sequence[int], total: int, max_seqlen: int, lengths: list[int] | None) -> None:
    """Raise ValueError unless ``shape`` is (total, ...) or (1, total, ...).

    Args:
        name: what the error calls the tensor.
        shape: its shape.
        total: places of the packed row.
        max_seqlen: width of the batch when it is padded.
        lengths: tokens of each sequence; None: only the device knows them, and no sequence is named.
    """
    rows = shape[1] if len(shape) > 1 and shape[0] == 1 and total != 1 else next(iter(shape), None)
    if rows == total:
        return
    where = ""
    if lengths is not None and tuple(shape[:2]) == (len(lengths), max_seqlen):
        where = f"; it is padded: give batch.to_packed({name})"
    elif lengths is not None and rows is not None:
        ends = list(accumulate(lengths))
        cut = next((number for number, end in enumerate(ends) if end > rows), None)
        if cut is not None:
            where = (
                f"; sequence {cut}, places {ends[cut] - lengths[cut]} to {ends[cut] - 1}, is the first that it lacks"
            )
        elif ends:
            where = f"; the last sequence, {len(ends) - 1}, ends with place {ends[-1] - 1}"
    raise ValueError(
        f"{name} has shape {tuple(shape)}, expected ({total}, ...), one row for each place of batch{where}"
    )


def check_rows(name: str, shape: Sequence[int], batch: int, width: int, lengths: list[int] | None) -> None:
    """Raise ValueError unless ``shape`` is (batch, width, ...).

    Args:
        name: what the error calls the tensor.
        shape: its shape.
        batch: sequences.
        width: columns.
        lengths: tokens of each sequence; None: only the device knows them, and no sequence is named.
    """
    if tuple(shape[:2]) == (batch, width):
        return
    where = ""
    if lengths is not None and shape and shape[0] == sum(lengths) and sum(lengths) != batch:
        where = f"; it is packed: give batch.to_padded({name})"
    elif shape and shape[0] < batch:
        where = f"; sequence {shape[0]} is the first that it lacks"
    elif lengths is not None and len(shape) > 1:
        cut = next((number for number, length in enumerate(lengths) if length > shape[1]), None)
        where = "" if cut is None else f"; sequence {cut}, of {lengths[cut]} tokens, is the first that is cut off"
    raise ValueError(
        f"{name} has shape {tuple(shape)}, expected ({batch}, {width}, ...), a row for each sequence of batch{where}"
    )
