"""One vector for each document from the hidden states of its tokens: the embedding heads of encoders and decoders.

A packed row and a padded batch of the same documents give the same vectors. It needs no attached model, and no library
but torch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from maskops.checks import INTEGERS, check_mask_values, check_tensor
from maskops.data.packed_batch import PackedBatch
from maskops.data.padded_batch import PaddedBatch
from maskops.data.places import padded_places, sequence_ids
from maskops.layouts import DOCUMENTS, Layout, check_values, first_true, values_can_be_read

Pooling = Literal["mean", "mean_sqrt_length", "weighted_mean", "max", "cls", "last"]

_OFFSETS = DOCUMENTS._replace(owner="", q_total="the {} rows of hidden")

_HALF = (torch.float16, torch.bfloat16)


class Documents(NamedTuple):
    """Where the documents of a batch lie among its rows, which are its cells counted row by row.

    Attributes:
        ids: int64 (rows,), the document of each row; ``number`` where there is none.
        place: int64 (rows,), place of a row in its document, meaningless where there is none.
        first: int64 (number,), row of each document's first token, meaningless where it has none.
        last: int64 (number,), row of its last token, likewise.
        lengths: int64 (number,), its tokens.
    """

    ids: Tensor
    place: Tensor
    first: Tensor
    last: Tensor
    lengths: Tensor

    @property
    def number(self) -> int:
        """Documents, with the empty ones."""
        return self.lengths.shape[0]


def documents_of_cu_seqlens(cu_seqlens: Tensor, rows: int) -> Documents:
    """The documents that offsets int32 or int64 (n_documents + 1,) cut ``rows`` rows into; the rest belongs to none."""
    offsets = cu_seqlens.to(torch.int64)
    count = offsets.shape[0] - 1
    row = torch.arange(rows, device=offsets.device)
    ids = sequence_ids(cu_seqlens.to(torch.int32).contiguous(), rows)
    place = row - offsets[ids.clamp(min=0)]
    lengths = offsets[1:] - offsets[:-1]
    return Documents(torch.where(ids >= 0, ids, count), place, offsets[:-1], offsets[1:] - 1, lengths)


def documents_of_mask(mask: Tensor) -> Documents:
    """A document a row of a mask (batch, length) of real tokens, wherever its padding stands."""
    batch, length = mask.shape
    real = mask != 0
    begin = torch.arange(batch, device=mask.device) * length
    column = torch.arange(length, device=mask.device)
    place = real.cumsum(1) - 1
    lengths = real.sum(1)
    if length == 0:
        return Documents(column, column, begin, begin, lengths)
    first = torch.where(real, column, length - 1).amin(1)
    last = torch.where(real, column, 0).amax(1)
    number = torch.arange(batch, device=mask.device).unsqueeze(1)
    ids = torch.where(real, number, batch)
    return Documents(ids.flatten(), place.flatten(), begin + first, begin + last, lengths)


def pool(
    hidden: Tensor,
    batch: PackedBatch | PaddedBatch | Tensor | None = None,
    how: Pooling = "mean",
    *,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """One vector for each document. Differentiable, of static shape, and nothing waits for the device.

    What lies outside every document, such as padding, reaches neither a result nor a gradient, whatever it holds.
    Sums are made in float32 for half precision.

    Args:
        hidden: hidden states, (1, total, H) or (total, H) of a packed row, (B, L, H) of several packed rows or of a
            padded batch; floating point.
        batch: where the documents lie; instead of it one of the keywords, or a tensor, which is ``cu_seqlens`` if it
            has one dimension and ``attention_mask`` if it has two.
        how: ``"mean"``; ``"mean_sqrt_length"``, the sum over the square root of the length; ``"weighted_mean"``, the
            mean with weights 1, 2, 3, ... along the document (SGPT, Muennighoff 2022, equation 2); ``"max"``, along
            each of H, the gradient goes to the first token that holds it; ``"cls"``, the first token; ``"last"``, the
            last one.
        cu_seqlens: int32 or int64 (n_documents + 1,), offsets into the rows of ``hidden``, counted over B * L where
            there are several. Zero-length documents are legal, as is a tail that no document covers.
        attention_mask: bool or 0/1 integers (B, L): a document a row, padded anywhere.
        lengths: integers (B,): a document a row, padded on the right.

    Returns:
        (n_documents, H) in the dtype of ``hidden``; 0 for documents without a token.

    Raises:
        TypeError: a type or dtype is wrong.
        ValueError: a shape or ``how`` is wrong, or not exactly one of ``batch``, ``cu_seqlens``, ``attention_mask`` and
            ``lengths`` is given; on the CPU and under ``maskops.validate()`` also offsets that decrease, do not begin
            at 0, lie outside or let a document cross from one row to the next, and masks of other values than 0 and 1.
    """
    check_tensor("hidden", hidden, "(1, total, H), (total, H) or (B, L, H)")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (1, total, H), (total, H) or (B, L, H)")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden has dtype {hidden.dtype}, expected floating point hidden states")
    if how not in get_args(Pooling):
        raise ValueError(f"how={how!r}: expected one of {', '.join(map(repr, get_args(Pooling)))}")
    documents = _documents(hidden, batch, cu_seqlens, attention_mask, lengths)
    return pool_documents(hidden.flatten(0, -2), documents, how)


def pool_documents(rows: Tensor, documents: Documents, how: Pooling) -> Tensor:
    """``pool`` of rows (rows, H), whose documents have been found: (n_documents, H)."""
    if how in ("cls", "last"):
        return _selected(rows, documents.first if how == "cls" else documents.last, documents.lengths)
    if how == "max":
        return _maximum(rows, documents)
    values = rows.to(torch.float32) if rows.dtype in _HALF else rows
    lengths = documents.lengths.to(values.dtype).clamp(min=1).unsqueeze(1)
    if how == "weighted_mean":
        values = values * (documents.place + 1).to(values.dtype).unsqueeze(1)
        divisor = lengths * (lengths + 1) / 2
    else:
        divisor = lengths if how == "mean" else lengths.sqrt()
    # One more document takes what belongs to none.
    sums = values.new_zeros(documents.number + 1, values.shape[1])
    sums = sums.scatter_add(0, documents.ids.unsqueeze(1).expand_as(values), values)
    return (sums[: documents.number] / divisor).to(rows.dtype)


def _selected(rows: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
    """``rows[index]``, 0 for documents without a token."""
    if rows.shape[0] == 0:
        return rows.sum(0, keepdim=True).expand(index.shape[0], -1)
    chosen = rows.index_select(0, index.clamp(0, rows.shape[0] - 1))
    return torch.where((lengths > 0).unsqueeze(1), chosen, 0)


def _maximum(rows: Tensor, documents: Documents) -> Tensor:
    """The largest value of each feature in each document; its gradient goes to the first row that holds it."""
    spread = documents.ids.unsqueeze(1).expand_as(rows)
    with torch.no_grad():
        # The derivative that torch has for this is an order of magnitude slower than the choice of a row.
        largest = rows.new_zeros(documents.number + 1, rows.shape[1])
        largest = largest.scatter_reduce(0, spread, rows, "amax", include_self=False)
        if not rows.requires_grad:
            return largest[: documents.number]
        number = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        candidate = torch.where(rows == largest.gather(0, spread), number, rows.shape[0])
        row = torch.full(largest.shape, rows.shape[0], device=rows.device)
        row = row.scatter_reduce(0, spread, candidate, "amin")[: documents.number]
        found = row < rows.shape[0]
    if rows.shape[0] == 0:
        return rows.sum(0, keepdim=True).expand(documents.number, -1)
    # NaN equals nothing: where it is the maximum it stays.
    return torch.where(found, rows.gather(0, row.clamp(max=rows.shape[0] - 1)), largest[: documents.number])


# ---- arguments -------------------------------------------------------------------------------------------------------


def _documents(
    hidden: Tensor,
    batch: PackedBatch | PaddedBatch | Tensor | None,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    lengths: Tensor | None,
) -> Documents:
    given = {"batch": batch, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask, "lengths": lengths}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            "expected exactly one of batch, cu_seqlens, attention_mask and lengths, got "
            f"{' and '.join(named) or 'none'}"
        )
    if isinstance(batch, PackedBatch):
        if (hidden.dim() == 3 and hidden.shape[0] != 1) or hidden.shape[-2] != batch.total:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}, expected (1, {batch.total}, H) or ({batch.total}, H), the "
                "places of batch"
            )
        return documents_of_cu_seqlens(batch.cu_seqlens, batch.total)
    if isinstance(batch, PaddedBatch):
        _check_padded(hidden, "batch", (batch.n_sequences, batch.max_seqlen))
        return documents_of_mask(batch.attention_mask)
    if batch is not None:
        check_tensor("batch", batch, "of cu_seqlens or an attention mask, a PackedBatch or a PaddedBatch")
        if batch.dim() not in (1, 2):
            raise ValueError(
                f"batch has shape {tuple(batch.shape)}, expected cu_seqlens (n_documents + 1,) or an attention mask "
                "(B, L)"
            )
        cu_seqlens, attention_mask = (batch, None) if batch.dim() == 1 else (None, batch)
    for name, tensor in (("cu_seqlens", cu_seqlens), ("attention_mask", attention_mask), ("lengths", lengths)):
        if tensor is None:
            continue
        check_tensor(name, tensor, "of integers")
        if tensor.dtype not in INTEGERS and not (name == "attention_mask" and tensor.dtype == torch.bool):
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected integers")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, hidden)
        return documents_of_cu_seqlens(cu_seqlens, hidden.flatten(0, -2).shape[0])
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected (B, L)")
        _check_padded(hidden, "attention_mask", tuple(attention_mask.shape))
        if values_can_be_read([attention_mask], attention_mask.device):
            check_mask_values("attention_mask", attention_mask)
        return documents_of_mask(attention_mask)
    assert lengths is not None
    if lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected (B,)")
    _check_padded(hidden, "lengths", (lengths.shape[0], hidden.shape[-2]))
    if values_can_be_read([lengths], lengths.device):
        at = first_true((lengths < 0) | (lengths > hidden.shape[1]))
        if at is not None:
            raise ValueError(
                f"lengths[{at[0]}]={int(lengths[at])}: expected 0 to {hidden.shape[1]}, the length of rows"
            )
    return documents_of_mask(padded_places(lengths, hidden.shape[1], "right")[1])


def _check_padded(hidden: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if hidden.dim() != 3 or tuple(hidden.shape[:2]) != shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, expected ({shape[0]}, {shape[1]}, H) for {name}: a document a "
            "row; for packed rows give cu_seqlens"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (n_documents + 1,)")
    if not values_can_be_read([cu_seqlens], cu_seqlens.device):
        return
    rows, length = hidden.flatten(0, -2).shape[0], hidden.shape[-2]
    check_values((Layout("cu_seqlens", cu_seqlens, names=_OFFSETS),), rows, rows, batch=1)
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    if rows > length:
        at = first_true((end > begin) & (begin // length != (end - 1) // length))
        if at is not None:
            raise ValueError(
                f"cu_seqlens: the document from {int(begin[at])} to {int(end[at])} crosses from one row of {length} "
                "tokens to the next"
            )
