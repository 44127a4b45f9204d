"""Layouts: where the sequences of a batch lie, read from lengths, masks, document ids or cumulative lengths.

A layout gives every query row the sequence it lies in: query rows ``[q_start, q_end)``, keys ``[k_start, k_end)`` and
an ordinal, and says which rows and keys inside a sequence are holes. Sequences are read with plain torch operations,
without a sync; what the shapes and the values of a layout must fulfil is checked here too. Which keys of its sequence a
row sees is no matter of layouts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskops.backend import validating
from maskops.checks import check_mask_values


class CuSeqlensNames(NamedTuple):
    """What errors call the arguments of the function that made a layout of cumulative lengths."""

    program_word: str
    """The word of a ``build_plan`` program by which the C++ op knows these names."""
    owner: str
    queries: str
    keys: str
    q_total: str
    """Format of the number of rows that the cumulative lengths must not exceed."""
    k_total: str
    fix_of_batch: str


DOCUMENTS = CuSeqlensNames(
    "cu_seqlens",
    "documents: ",
    "cu_seqlens",
    "cu_seqlens_k",
    "q_len={}",
    "k_len={}",
    "pack with shape (1, ..., total, ...) or give documents(ids)",
)
VARLEN = CuSeqlensNames(
    "varlen",
    "",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "the {} rows of q",
    "the {} rows of k",
    "give a mask that holds inside each sequence, such as masks.causal()",
)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the sequences lie. ``kind`` says how ``tensor`` (and ``keys`` or ``length``) is read."""

    kind: str
    """padding_right | padding_left | padding_mask | key_lengths | key_length | key_mask | cu_seqlens | ids"""
    tensor: Tensor | None = None
    keys: Tensor | None = None
    length: int = 0
    names: CuSeqlensNames = DOCUMENTS
    """Of cu_seqlens."""

    @property
    def is_documents(self) -> bool:
        """Whether the layout counts sequences by itself (its ordinals win over the batch index)."""
        return self.kind in ("cu_seqlens", "ids")

    def batch(self) -> int:
        """Batch elements that the tensor describes; 1 broadcasts."""
        if self.tensor is None or self.kind == "cu_seqlens" or (self.kind == "ids" and self.tensor.dim() == 1):
            return 1
        return self.tensor.shape[0]

    def tensors(self) -> tuple[tuple[str, Tensor], ...]:
        """The tensors with the names of their arguments."""
        if self.tensor is None:
            return ()
        if self.kind == "cu_seqlens":
            owner = self.names.owner
            named = ((f"{owner}{self.names.queries}", self.tensor),)
            return named if self.keys is None else (*named, (f"{owner}{self.names.keys}", self.keys))
        names = {
            "padding_right": "padding: lengths",
            "padding_left": "padding: lengths",
            "padding_mask": "padding: mask",
            "key_lengths": "key_padding: lengths",
            "key_mask": "key_padding: mask",
            "ids": "documents: ids",
        }
        return ((names[self.kind], self.tensor),)


class Sequences(NamedTuple):
    """Per query row (all int64, broadcastable to (batch, q_len)): the sequence it lies in; holes bool or None."""

    q_start: Tensor
    q_end: Tensor
    k_start: Tensor
    k_end: Tensor
    ordinal: Tensor
    row_holes: Tensor | None = None
    key_holes: Tensor | None = None


def hull_of_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and one past the last 1 of each row of a (batch, length) mask, (batch, 1) each, and the holes."""
    batch, length = mask.shape
    valid = mask != 0
    if length == 0:
        nothing = torch.zeros(batch, 1, dtype=torch.int64, device=mask.device)
        return nothing, nothing, ~valid
    position = torch.arange(length, device=mask.device)
    last = torch.where(valid, position + 1, 0).amax(1, keepdim=True)
    first = torch.minimum(torch.where(valid, position, length).amin(1, keepdim=True), last)
    return first, last, ~valid


def _sequences_of_cu_seqlens(cu_q: Tensor, cu_k: Tensor, q_len: int, k_len: int) -> Sequences:
    n_sequences = cu_q.shape[0] - 1
    row = torch.arange(q_len, device=cu_q.device).unsqueeze(0)
    if n_sequences == 0:
        nothing = torch.zeros_like(row)
        return Sequences(nothing, nothing, nothing, nothing, nothing)
    cu_q, cu_k = cu_q.to(torch.int64).contiguous(), cu_k.to(torch.int64)
    # right=True skips sequences of no rows, also those of a cu_seqlens padded with its last value.
    index = torch.searchsorted(cu_q, row, right=True) - 1
    inside = (index >= 0) & (index < n_sequences)
    index = index.clamp(0, n_sequences - 1)
    # Clamps only matter for values that validation would refuse; they keep every span inside its tensors.
    q_end = cu_q[index + 1].clamp(0, q_len)
    k_start = cu_k[index].clamp(0, k_len)
    k_end = torch.maximum(cu_k[index + 1].clamp(0, k_len), k_start)
    q_start, q_end, k_start, k_end = (
        torch.where(inside, x, 0) for x in (cu_q[index].clamp(0, q_len), q_end, k_start, k_end)
    )
    return Sequences(q_start, q_end, k_start, k_end, index)


def _sequences_of_ids(ids: Tensor, batch: int) -> Sequences:
    ids = (ids.unsqueeze(0) if ids.dim() == 1 else ids).to(torch.int64)
    rows, length = (batch if ids.shape[0] == 1 else ids.shape[0]), ids.shape[1]
    ids = ids.expand(rows, length)
    if length == 0 or rows == 0:
        nothing = torch.zeros_like(ids)
        return Sequences(nothing, nothing, nothing, nothing, nothing)
    position = torch.arange(length, device=ids.device).expand(rows, length)
    # Padded first, then cut: compiled code would have a size of length - 1 = 1 apart.
    before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
    begins = (ids != before) | (position == 0)
    start = torch.where(begins, position, 0).cummax(1).values
    ends = torch.nn.functional.pad(begins, (0, 1), value=True)[:, 1:]
    end = torch.where(ends, position + 1, length).flip(1).cummin(1).values.flip(1)
    inside = ids >= 0
    ordinal = (begins & inside).flatten().to(torch.int64).cumsum(0).view(rows, length) - 1
    start, end = torch.where(inside, start, 0), torch.where(inside, end, 0)
    return Sequences(start, end, start, end, ordinal)


def _sequences_of(layout: Layout, batch: int, q_len: int, k_len: int, device: torch.device) -> Sequences:
    """The sequences that one layout describes; the ordinal is only meaningful for documents."""

    def whole(value: int) -> Tensor:
        return torch.full((1, 1), value, dtype=torch.int64, device=device)

    zero = whole(0)
    tensor = layout.tensor
    if tensor is None:
        return Sequences(zero, whole(q_len), zero, whole(layout.length), zero)
    if layout.kind == "cu_seqlens":
        return _sequences_of_cu_seqlens(tensor, tensor if layout.keys is None else layout.keys, q_len, k_len)
    if layout.kind == "ids":
        return _sequences_of_ids(tensor, batch)
    if layout.kind == "padding_mask":
        first, last, holes = hull_of_mask(tensor)
        return Sequences(first, last, first, last, zero, holes, holes)
    if layout.kind == "key_mask":
        first, last, holes = hull_of_mask(tensor)
        return Sequences(zero, whole(q_len), first, last, zero, None, holes)
    lengths = tensor.to(torch.int64).clamp(0, k_len).unsqueeze(1)
    if layout.kind == "key_lengths":
        return Sequences(zero, whole(q_len), zero, lengths, zero)
    if layout.kind == "padding_left":
        return Sequences(k_len - lengths, whole(q_len), k_len - lengths, whole(k_len), zero)
    return Sequences(zero, lengths, zero, lengths, zero)


def resolve(layouts: tuple[Layout, ...], batch: int, q_len: int, k_len: int, device: torch.device) -> Sequences:
    """The sequence of each row: layouts intersected, ordinals from the first documents layout."""
    every = Layout("key_length", length=k_len)
    parts = [_sequences_of(layout, batch, q_len, k_len, device) for layout in layouts or (every,)]
    counting = [part for part, layout in zip(parts, layouts, strict=False) if layout.is_documents]
    ordinal = counting[0].ordinal if counting else torch.arange(batch, device=device).unsqueeze(1)
    row_holes = [part.row_holes for part in parts if part.row_holes is not None]
    key_holes = [part.key_holes for part in parts if part.key_holes is not None]
    return Sequences(
        functools.reduce(torch.maximum, [part.q_start for part in parts]),
        functools.reduce(torch.minimum, [part.q_end for part in parts]),
        functools.reduce(torch.maximum, [part.k_start for part in parts]),
        functools.reduce(torch.minimum, [part.k_end for part in parts]),
        ordinal,
        functools.reduce(torch.logical_or, row_holes) if row_holes else None,
        functools.reduce(torch.logical_or, key_holes) if key_holes else None,
    )


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_shapes(layout: Layout, q_len: int, k_len: int) -> None:
    """Check what shapes alone tell about a layout and these lengths."""
    tensor = layout.tensor
    if layout.kind.startswith("padding") and q_len != k_len:
        raise ValueError(
            f"padding: queries and keys share their lengths, but q_len={q_len} and k_len={k_len}: to mask keys only "
            "use masks.key_padding(...)"
        )
    if tensor is None:
        if layout.length > k_len:
            raise ValueError(f"key_padding: lengths={layout.length} is more than k_len={k_len}")
    elif layout.kind in ("padding_mask", "key_mask"):
        if tensor.shape[1] != k_len:
            name = layout.tensors()[0][0]
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (batch, {k_len}) for k_len={k_len}")
    elif layout.kind == "ids":
        if q_len != k_len or tensor.shape[-1] != q_len:
            raise ValueError(
                f"documents: ids has shape {tuple(tensor.shape)}, so q_len and k_len must both be {tensor.shape[-1]}, "
                f"got q_len={q_len} and k_len={k_len}: for other lengths use documents(cu_seqlens=..., "
                "cu_seqlens_k=...)"
            )
    elif layout.keys is None and layout.kind == "cu_seqlens" and q_len != k_len:
        names = layout.names
        raise ValueError(
            f"{names.owner}{names.queries} describes queries and keys alike, which cannot hold for "
            f"{names.q_total.format(q_len)} and {names.k_total.format(k_len)}: give {names.keys} for the keys"
        )


def values_can_be_read(tensors: list[Tensor], device: torch.device) -> bool:
    """Whether values may be checked: never while tracing, never where it would sync unless asked to."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    # Fake tensors are a subclass; tensors of function transforms are not, and one under vmap has many values.
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return False
    return device.type == "cpu" or validating()


def first_true(bad: Tensor) -> tuple[int, ...] | None:
    """Index of the first True, row by row."""
    found = bad.nonzero()
    return tuple(int(x) for x in found[0]) if found.shape[0] else None


def check_values(layouts: tuple[Layout, ...], q_len: int, k_len: int, batch: int) -> int | None:
    """Check what the values of layouts tell; how many sequences the first document ids hold, None without ids.

    The C++ op makes the same checks with the same words.
    """
    n_sequences = None
    for layout in layouts:
        if layout.kind == "cu_seqlens" and layout.tensor is not None:
            names = layout.names
            _check_cu_seqlens(names.owner, names.queries, layout.tensor, names.q_total, q_len)
            if layout.keys is not None:
                _check_cu_seqlens(names.owner, names.keys, layout.keys, names.k_total, k_len)
        elif layout.kind == "ids" and layout.tensor is not None:
            count = _check_ids(layout.tensor, batch)
            n_sequences = count if n_sequences is None else n_sequences
        elif layout.kind in ("padding_mask", "key_mask"):
            for name, tensor in layout.tensors():
                check_mask_values(name, tensor)
        else:
            for name, tensor in layout.tensors():
                at = first_true((tensor < 0) | (tensor > k_len))
                if at is not None:
                    found = int(tensor[at])
                    fault = "is negative" if found < 0 else f"is more than k_len={k_len}"
                    raise ValueError(f"{name}[{at[0]}]={found} {fault}")
    return n_sequences


def _check_cu_seqlens(owner: str, name: str, cu_seqlens: Tensor, total_format: str, total: int) -> None:
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"{owner}{name}[0]={int(cu_seqlens[0])}: must be 0")
    at = first_true(cu_seqlens[1:] < cu_seqlens[:-1])
    if at is not None:
        i = at[0]
        raise ValueError(
            f"{owner}{name}[{i + 1}]={int(cu_seqlens[i + 1])} < {name}[{i}]={int(cu_seqlens[i])}: cumulative "
            "lengths never decrease"
        )
    if int(cu_seqlens[-1]) > total:
        raise ValueError(f"{owner}{name}[-1]={int(cu_seqlens[-1])} is more than {total_format.format(total)}")


def _check_ids(ids: Tensor, batch: int) -> int:
    """Check document ids; how many sequences they hold over the whole batch."""
    rows = ids.unsqueeze(0) if ids.dim() == 1 else ids

    def name(row: int, column: int) -> str:
        return f"ids[{column}]" if ids.dim() == 1 else f"ids[{row}, {column}]"

    count = 0
    for row, values in enumerate(rows.tolist()):
        finished: set[int] = set()
        for column, value in enumerate(values):
            if value < -1:
                raise ValueError(f"documents: {name(row, column)}={value} is negative (only -1 marks padding)")
            if column and value == values[column - 1]:
                continue
            if value >= 0:
                if value in finished:
                    raise ValueError(
                        f"documents: {name(row, column)}={value} returns after {name(row, column - 1)}="
                        f"{values[column - 1]}: the rows of a document must be contiguous"
                    )
                finished.add(value)
        count += len(finished)
    return count * (batch if rows.shape[0] == 1 else 1)
