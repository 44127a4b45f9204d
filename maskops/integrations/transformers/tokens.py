"""Tokens of a running call, document by document: counted, and moved between the row and one row for each document."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskops.data.places import gathered
from maskops.integrations.transformers.arrival import documents_of_call, kept_tokens
from maskops.integrations.transformers.calls import Call
from maskops.layouts import values_can_be_read


class Tokens(NamedTuple):
    """The tokens of a call (batch, length), counted row by row, and the documents that they belong to.

    Attributes:
        ids: int64 (batch * length,), the document of each token; ``number`` for padding.
        place: int64 (batch * length,), its place among the tokens of its document, meaningless for padding.
        lengths: int64 (number,), tokens of each document; documents without a token count where offsets name them.
        number: documents.
        batch: rows of the call.
        length: tokens of a row, with padding.
    """

    ids: Tensor
    place: Tensor
    lengths: Tensor
    number: int
    batch: int
    length: int

    def width(self, bound: object = None) -> int:
        """Length of the longest document, or an upper bound, at least 1.

        On a device it is read, unless ``bound`` is an integer; compiled code without one takes the length of a row.
        """
        if values_can_be_read([self.lengths], self.lengths.device):
            return max(int(self.lengths.max()) if self.number else 0, 1)
        if isinstance(bound, int):
            return max(min(bound, self.length), 1)
        if torch.compiler.is_compiling() or self.lengths.device.type == "meta":
            return self.length
        return max(int(self.lengths.max()) if self.number else 0, 1)

    def rows(self, width: int) -> Tensor:
        """int64 (number, width): which token stands at each place of each document; batch * length where none does."""
        return self._indices(self.place, width)

    def rows_with_ends(self, width: int) -> Tensor:
        """As ``rows``, but the last token of a document is in the last column, and in the first if it is the only one.

        Whatever a head reads, the first column, the last one, or that of the last token which is not padding, it reads
        the token that it means.
        """
        if self.number == 0:
            return self.rows(width)
        size = self.lengths[self.ids.clamp(max=self.number - 1)]
        is_last = (self.place == size - 1) & (size > 1)
        return self._indices(torch.where(is_last, width - 1, self.place), width)

    def _indices(self, column: Tensor, width: int) -> Tensor:
        total = self.batch * self.length
        cells = self.number * width
        # One more cell takes what belongs to no document, or, with a bound that is too low, has no place.
        inside = (self.ids < self.number) & (column < width)
        cell = torch.where(inside, self.ids * width + column, cells)
        token = torch.arange(total, device=cell.device)
        index = torch.full((cells + 1,), total, device=cell.device).scatter(0, cell, token)
        return index[:cells].view(self.number, width)

    def first(self) -> Tensor:
        """int64 (number,): the first token of each document; batch * length for documents without one."""
        return self.rows(1)[:, 0]


def taken(values: Tensor, index: Tensor, filler: float = 0) -> Tensor:
    """What ``values`` (batch, length, ...) hold at tokens ``index``, ``filler`` one past the last. Differentiable."""
    return gathered(values.flatten(0, 1), index, filler)


def kept_of_call(call: Call) -> Tensor | None:
    """bool (batch, length): the tokens of a call that its 2-D mask keeps; None without such a mask."""
    mask, sizes = call.tensor("attention_mask"), call.sizes
    return kept_tokens(mask) if mask is not None and tuple(mask.shape) == sizes else None


def tokens_of_call(call: Call) -> Tokens | None:
    """The documents of a packed call; None where each row is one document, padded or not.

    From cumulative lengths, how many documents there are is known from shapes. From position ids and segments it is
    read, which waits for a device.
    """
    if call.sizes is None:
        return None
    if "tokens" not in call.notes:
        call.notes["tokens"] = _find(call, *call.sizes)
    found: Tokens | None = call.notes["tokens"]
    return found


def tokens_of_rows(call: Call) -> Tokens | None:
    """A document a row, of a call whose 2-D mask has, or on a device may have, padding; else None. Reads nothing."""
    kept = kept_of_call(call)
    if kept is None or (values_can_be_read([kept], kept.device) and bool(kept.all())):
        return None
    batch, length = kept.shape
    row = torch.arange(batch, device=kept.device).unsqueeze(1)
    ids = torch.where(kept, row, batch).flatten()
    return Tokens(ids, (kept.cumsum(1) - 1).flatten(), kept.sum(1), batch, batch, length)


def _find(call: Call, batch: int, length: int) -> Tokens | None:
    kept = kept_of_call(call)
    documents = documents_of_call(call, batch, length, kept, columns=slice(0, length), is_continued=False)
    if documents is None:
        return None
    ids = documents.ids
    if documents.cu_seqlens is None and torch.compiler.is_compiling():
        # A graph cannot have as many outputs as the values of a mask say; those of most are 0 and 1.
        torch._assert_async(
            (ids <= 0).all(),
            "compiled heads and poolers read the documents of packed rows from cu_seq_lens_q only, not from "
            "position_ids or numbers in attention_mask",
        )
        return None
    if documents.cu_seqlens is not None:
        number = documents.cu_seqlens.shape[0] - 1
    else:
        before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]
        begins = (ids >= 0) & (ids != before)
        number, highest = (int(value) for value in torch.stack((begins.sum(), ids.amax())).tolist())
        if highest <= 0:  # only known here: values of a device are not looked at before
            return None
        ids = torch.where(ids >= 0, begins.flatten().cumsum(0).view(batch, length) - 1, -1)
    real = ids >= 0 if kept is None else (ids >= 0) & kept
    begin = documents.start + torch.arange(batch, device=ids.device).unsqueeze(1) * length
    ids = torch.where(real, ids, number).flatten()
    one = real.flatten().to(torch.int64)
    before = one.cumsum(0) - one
    place = before - before[begin.flatten().clamp(0, batch * length - 1)]
    lengths = one.new_zeros(number + 1).scatter_add(0, ids, one)[:number]
    return Tokens(ids, place, lengths, number, batch, length)
