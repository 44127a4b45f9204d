"""How the batch of a call arrives: which of its tokens are real, and which document each of them belongs to.

A packed batch says where its documents lie in one of three ways, in this order of precedence: cumulative lengths
(``cu_seq_lens_q`` and ``cu_seq_lens_k``), segments in an integer 2-D mask (1, 1, 2, 2, 0: equal values are one
document), position ids that restart. The zeros of a 2-D mask are padding beside any of them. Everything is plain torch
without a sync; what values must fulfil is checked where they can be read for free.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from maskops.checks import INTEGERS
from maskops.integrations.transformers.calls import Call
from maskops.layouts import first_true, values_can_be_read


class Documents(NamedTuple):
    """The documents of one side (queries or keys) of a batch (batch, length)."""

    ids: Tensor
    """int64 (batch, length): number of the token's document, -1 for tokens of none; equal numbers are contiguous."""
    start: Tensor
    """int64 (batch, length): place in the row at which the token's document begins."""
    end: Tensor
    """int64 (batch, length): one past the place at which it ends."""
    cu_seqlens: Tensor | None
    """int64 (n_documents + 1,): the offsets that ``ids`` counts by, where the caller gave them."""


def kept_tokens(mask: Tensor | None) -> Tensor | None:
    """bool (batch, length) of a 2-D mask: True = a real token."""
    return None if mask is None else mask != 0


def of_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int, name: str) -> Documents:
    """Documents of offsets over the ``batch * length`` tokens of a batch, row after row.

    Tokens past the last offset are padding; empty documents count.

    Raises:
        ValueError: offsets that do not start at 0, decrease, exceed the batch, or a document that crosses a row.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype not in INTEGERS:
        raise ValueError(
            f"{name} has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}: expected integers "
            "(n_documents + 1,), cumulative lengths from 0"
        )
    cu_seqlens = cu_seqlens.to(torch.int64)
    if values_can_be_read([cu_seqlens], cu_seqlens.device):
        _check_cu_seqlens(cu_seqlens, batch, length, name)
    device = cu_seqlens.device
    token = torch.arange(batch * length, device=device)
    number = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
    last = cu_seqlens.shape[0] - 2
    if last < 0:
        outside = torch.full((batch, length), -1, device=device)
        nothing = torch.zeros_like(outside)
        return Documents(outside, nothing, nothing, cu_seqlens)
    inside = number <= last
    at = number.clamp(max=last)
    row_start = torch.arange(batch, device=device)[:, None] * length
    start = cu_seqlens[at].view(batch, length) - row_start
    end = cu_seqlens[at + 1].view(batch, length) - row_start
    return Documents(torch.where(inside, number, -1).view(batch, length), start, end, cu_seqlens)


def _check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int, name: str) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name}[0]={offsets[0]}: must be 0")
    for i, (before, after) in enumerate(itertools.pairwise(offsets)):
        if after < before:
            raise ValueError(f"{name}[{i + 1}]={after} < {name}[{i}]={before}: cumulative lengths never decrease")
        if after > before and batch > 1 and before // length != (after - 1) // length:
            raise ValueError(
                f"{name}: document {i} holds the tokens {before} to {after} of a batch of {batch} rows of {length} "
                "tokens, so it crosses the end of a row: a document lies in one row"
            )
    if offsets[-1] > batch * length:
        raise ValueError(f"{name}[-1]={offsets[-1]} is more than the {batch} x {length} tokens of the batch")


def of_tokens(
    positions: Tensor | None, segments: Tensor | None, kept: Tensor | None, *, is_continued: bool = False
) -> Documents | None:
    """Documents by position ids that restart and by segments, among the tokens that are kept.

    A token begins a document where its segment is not that of the kept token before it, or where its position is
    neither one more than that token's nor further on by their distance in the row (over a hole). Nothing else is read
    from positions: a row may begin with any, and those of padding say nothing.

    Of the places along the three axes of MRoPE any may go back inside a document, but never all of them to where it
    began: there another one begins. Those of tokens that are not kept say nothing: models fill them with zeros.

    Args:
        positions: integers (batch, length), or (3, batch, length) along three axes, or None.
        segments: integers (batch, length), 0 = padding, or None.
        kept: bool (batch, length) or None, True = a real token.
        is_continued: the tokens go on behind those of a filled cache, so that a restart is an error.

    Returns:
        None where no boundary can be, or where the values can be read and there is none.
    """
    given = positions if positions is not None else segments
    if given is None:
        return None
    if values_can_be_read([given], given.device):
        # Most batches: nothing is packed by their mask, and many hold no padding.
        if segments is not None and int(segments.amax() if segments.numel() else 0) <= 1:
            segments = None
        if positions is None and segments is None:
            return None
        if kept is not None and bool(kept.all()):
            kept = None
    batch, length = given.shape[-2:]
    device = given.device
    place = torch.arange(length, device=device)
    if kept is None:
        previous = (place - 1).expand(batch, length)
        has_previous = previous >= 0
        kept_before = previous
    else:
        kept_before = torch.where(kept, place, -1).cummax(1).values
        # Padded first, then cut: compiled code would have a size of length - 1 = 1 apart.
        previous = torch.nn.functional.pad(kept_before, (1, 0), value=-1)[:, :-1]
        has_previous = kept & (previous >= 0)
    at = previous.clamp(min=0)
    begins = torch.zeros_like(has_previous)
    if positions is not None and positions.dim() == 3:
        read = positions if kept is None else torch.where(kept, positions, torch.iinfo(positions.dtype).max)
        lowest = read.cummin(2).values.gather(2, at.expand(3, batch, length))
        begins = begins | (positions <= lowest).all(0)
    elif positions is not None:
        step = positions - positions.gather(1, at)
        begins = begins | ((step != 1) & (step != place - previous))
    if segments is not None:
        begins = begins | (segments != segments.gather(1, at))
    begins = begins & has_previous
    first = (place == 0) if kept is None else kept & (previous < 0)
    if values_can_be_read([given], device):
        restart = first_true(begins)
        if restart is None:
            return None
        if is_continued:
            raise ValueError(
                f"token [{restart[0]}, {restart[1]}] begins another document, by its position or segment, although the "
                "cache already holds tokens: a packed batch cannot continue a cache; use maskops.packed_prefill to "
                "fill one from packed prompts"
            )
    begins = begins | first
    number = begins.to(torch.int64).cumsum(1) - 1
    start = torch.where(begins, place, 0).cummax(1).values
    # Places of the next boundary, then of the last token kept before it: padding behind a document is not in it.
    following = torch.where(begins, place, length)
    # Padded with 0, not with the length: compiled code has the value of a padding as a constant, a graph a length.
    following = torch.nn.functional.pad(following - length, (0, 1))[:, 1:] + length
    following = following.flip(1).cummin(1).values.flip(1)
    if kept is None:
        return Documents(number, start, following, None)
    end = torch.where(following > 0, kept_before.gather(1, (following - 1).clamp(min=0)), -1) + 1
    inside = (place < end) & (kept_before >= 0)
    return Documents(torch.where(inside, number, -1), start, end, None)


# ---- what a call was given -------------------------------------------------------------------------------------------


def same_sizes(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two pairs of batch and length are equal.

    One by one: compiled code compares tuples of open sizes by their symbols, of which two may have one value, and in a
    text or as keys of a dictionary it makes constants of them.
    """
    return one[0] == other[0] and one[1] == other[1]


def is_encoder_decoder(call: Call) -> bool:
    """Whether the call belongs to an encoder-decoder, whose parts speak of two sequences."""
    around: Call | None = call
    while around is not None:
        if getattr(getattr(around.module, "config", None), "is_encoder_decoder", False):
            return True
        around = around.parent
    return False


def is_decoder(call: Call) -> bool:
    """Whether the call is that of a decoder with cross-attention."""
    return call.tensor("encoder_hidden_states") is not None


def _given(call: Call, name: str, sizes: tuple[int, int] | None) -> Tensor | None:
    """An argument of the call or of one around it, if it speaks of tokens of these sizes.

    A model that hands all its keywords to a part of another batch or length, as to a tower for images, means its own
    tokens by them.

    Args:
        call: the call to begin with.
        name: of the argument.
        sizes: batch and length of the tokens; None where the argument says itself which part it is for.
    """
    found: Tensor | None = None
    around: Call | None = call
    while around is not None:
        value = around.tensor(name)
        if value is not None and (found is None or value is found):
            fits = sizes is None or around.sizes is None or same_sizes(around.sizes, sizes)
            if not fits and value is found:
                return None
            if fits:
                found = value
        around = around.parent
    return found


def cu_seqlens_of_call(call: Call, side: str, sizes: tuple[int, int] | None = None) -> tuple[str, Tensor] | None:
    """Name and value of the cumulative lengths of the queries (``"q"``) or keys (``"k"``) of a call's attention.

    In an encoder-decoder ``cu_seq_lens_q`` speaks of the decoder and ``cu_seq_lens_k`` of the encoder; elsewhere both
    say the same.

    Args:
        call: the running call.
        side: "q" or "k".
        sizes: batch and length of the tokens that they would speak of; None for those of the call.
    """
    two_sides = is_encoder_decoder(call) or is_decoder(call)
    names = (f"cu_seq_lens_{side}",) if two_sides else (f"cu_seq_lens_{side}", "cu_seq_lens_q", "cu_seq_lens_k")
    for name in names:
        value = _given(call, name, None if two_sides else sizes or call.sizes)
        if value is not None:
            tokens = call.tensor("input_ids")
            tokens = call.tensor("inputs_embeds") if tokens is None else tokens
            return name, value if tokens is None else value.to(tokens.device)
    return None


def text_positions(position_ids: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Position ids as (batch, length), None where they say nothing about the order of the tokens.

    ``(1, length)`` and ``(length,)`` hold for every row. Of the rows of a 3-D tensor (MRoPE) the first of four is
    the text's. Three of them are places in images and stay (3, batch, length): only the beginnings of documents are
    read from them.
    """
    if position_ids is None or position_ids.dtype not in INTEGERS:
        return None
    if position_ids.dim() == 3:
        if position_ids.shape[0] == 3 and position_ids.shape[1] in (1, batch) and position_ids.shape[2] == length:
            return position_ids.expand(3, batch, length)
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
        return None
    return position_ids.expand(batch, length)


def given_positions(call: Call, batch: int, length: int) -> Tensor | None:
    """Position ids (batch, length) that the caller gave for the tokens of a call, or (3, batch, length); None without.

    The decoder of an encoder-decoder is told by ``decoder_position_ids``: ``position_ids`` are the encoder's, unless
    the forward of the decoder takes them.
    """
    if is_decoder(call):
        positions = text_positions(_given(call, "decoder_position_ids", None), batch, length)
        if positions is not None or "position_ids" not in call.accepts:
            return positions
    return text_positions(_given(call, "position_ids", (batch, length)), batch, length)


def is_continued(q_offset: int | Tensor) -> bool:
    """Whether a cache surely holds tokens already."""
    if isinstance(q_offset, Tensor):
        return values_can_be_read([q_offset], q_offset.device) and int(q_offset) > 0
    return not torch.compiler.is_compiling() and q_offset > 0


def documents_of_call(
    call: Call, batch: int, length: int, kept: Tensor | None, *, columns: slice | Tensor, is_continued: bool
) -> Documents | None:
    """Documents among the ``length`` tokens that the call's self-attention computes; None for one a row.

    Read once per call, whoever asks first: what steps then tell the model about its tokens changes nothing.

    Args:
        call: the call of the model that makes the mask.
        batch: rows of the batch.
        length: tokens of a row in this call, without those of the cache.
        kept: bool (batch, length), True = a real token, None for all.
        columns: the columns of the call's 2-D mask that stand for these tokens.
        is_continued: a cache already holds tokens before these.
    """
    outer = call.parent
    places = [call] if outer is None or not _says_the_same(call, outer) else [call, outer]
    for place in places:
        reads: list[_Read] = place.notes.get(_READ, [])
        for read in reads:
            if same_sizes(read.sizes, (batch, length)):
                known: Documents | None = read.documents
                return known
    found = _read_documents(call, batch, length, kept, columns, is_continued)
    call.notes.setdefault(_READ, []).append(_Read((batch, length), found))
    return found


_READ = "documents"


class _Read(NamedTuple):
    """Documents of a call that have been read, and of which batch and length."""

    sizes: tuple[int, int]
    documents: Documents | None


def _says_the_same(call: Call, outer: Call) -> bool:
    """Whether a model was handed what the model around it was given, so that nothing need be read again."""
    if is_encoder_decoder(call) or is_decoder(call):
        return False
    # What was given to the outer one alone holds for both.
    names = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
    tensors = ((call.tensor(name), outer.tensor(name)) for name in names)
    return all(own is around or (own is None and index > 0) for index, (own, around) in enumerate(tensors))


def _read_documents(
    call: Call, batch: int, length: int, kept: Tensor | None, columns: slice | Tensor, is_continued: bool
) -> Documents | None:
    side = "k" if is_encoder_decoder(call) and not is_decoder(call) else "q"
    cu_seqlens = cu_seqlens_of_call(call, side, (batch, length))
    if cu_seqlens is not None:
        if is_continued:
            raise ValueError(
                f"{cu_seqlens[0]} with a cache that already holds tokens: a packed batch cannot continue a cache; use "
                "maskops.packed_prefill to fill one from packed prompts"
            )
        return of_cu_seqlens(cu_seqlens[1], batch, length, cu_seqlens[0])
    positions = given_positions(call, batch, length)
    segments = None if kept is None else segments_of_call(call, "attention_mask", columns)
    if segments is not None and kept is not None and segments.shape[1] != kept.shape[1]:
        segments = None
    return of_tokens(positions, segments, kept, is_continued=is_continued)


def documents_of_encoder(call: Call, batch: int, length: int, kept: Tensor | None) -> Documents | None:
    """Documents among the keys of a decoder's cross-attention; None for one a row.

    Args:
        call: the call of the decoder.
        batch: rows of the batch.
        length: tokens of a row of the encoder.
        kept: bool (batch, length), True = a real token, None for all.
    """
    cu_seqlens = cu_seqlens_of_call(call, "k", (batch, length))
    if cu_seqlens is not None:
        return of_cu_seqlens(cu_seqlens[1], batch, length, cu_seqlens[0])
    positions, around = None, call.parent
    while around is not None and positions is None:
        if around.sizes is not None and same_sizes(around.sizes, (batch, length)):
            positions = text_positions(around.tensor("position_ids"), batch, length)
        around = around.parent
    segments = None if kept is None else segments_of_call(call, "encoder_attention_mask", slice(0, length))
    return of_tokens(positions, segments, kept)


# ---- arguments that would pass unread --------------------------------------------------------------------------------

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
_NEARLY = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens")


def check_arguments(call: Call) -> None:
    """Step before each call: what nobody would read raises, as models take any keyword without a word.

    Raises:
        TypeError: offsets that are no tensor, position ids that are no integers.
        ValueError: a 2-D mask that is not of these tokens, offsets by a name that neither transformers nor the model
            knows, ``seq_idx`` by itself, different offsets for the two sides of self-attention, and
            ``output_attentions``, which some models would answer with nothing.
    """
    for name in _LENGTHS:
        value = call.arguments.get(name)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} is a {type(value).__name__}: expected a tensor of integers (n_documents + 1,), cumulative "
                "lengths from 0"
            )
    for name in _NEARLY:
        if call.arguments.get(name) is not None and name not in call.accepts:
            raise ValueError(
                f"{type(call.module).__name__} was given {name}, which nothing reads: the cumulative lengths of packed "
                "documents are called cu_seq_lens_q and cu_seq_lens_k"
            )
    if call.arguments.get("output_attentions"):
        raise ValueError(
            f"{type(call.module).__name__} was asked for attention weights (output_attentions), which maskops never "
            "makes: leave it out, or detach the model for this call"
        )
    if call.parent is not None:
        return
    mask = call.tensor("attention_mask")
    if mask is not None and mask.dim() < 3 and call.sizes is not None:
        batch, length = call.sizes
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: expected {(batch, length)}, one number for each token, "
                "or more columns where a cache holds tokens before these"
            )
    positions = call.tensor("position_ids")
    if positions is not None and positions.is_floating_point():
        raise TypeError(f"position_ids has dtype {positions.dtype}: expected integers, which say where documents begin")
    offsets = [call.tensor(name) for name in _LENGTHS]
    if not is_encoder_decoder(call) and not is_decoder(call) and offsets[0] is not None and offsets[1] is not None:
        q, k = offsets[0], offsets[1]
        if q is not k and q.device == k.device and values_can_be_read([q, k], q.device) and not torch.equal(q, k):
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k differ: both say where the documents of one row begin, give the same"
            )
    told = (positions, *offsets)
    if call.tensor("seq_idx") is not None and all(tensor is None for tensor in told):
        raise ValueError(
            "seq_idx alone does not tell attention where documents begin: give position_ids that restart, or "
            "cu_seq_lens_q and cu_seq_lens_k, beside it"
        )


def ask_for_cross_mask(call: Call) -> None:
    """Step before each call: decoders that make a mask for cross-attention only from another one are given ones."""
    name = "encoder_attention_mask"
    states = call.tensor("encoder_hidden_states")
    if states is None or name not in call.accepts or call.arguments.get(name) is not None:
        return
    if any(cu_seqlens_of_call(call, side) is not None for side in "qk"):
        call.set(name, torch.ones(states.shape[:2], dtype=torch.int64, device=states.device))


# ---- segments --------------------------------------------------------------------------------------------------------

_MASKS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
_PLAIN = "masks of ones and zeros"


def separate_segments(call: Call) -> None:
    """Step before each call: models get masks of ones and zeros, which some multiply with, count or sum up."""
    ids = call.tensor("decoder_input_ids")
    length = ids.shape[-1] if ids is not None else call.sizes[1] if call.sizes is not None else None
    if length == 1:  # a step of generation: no second document can be there
        return
    for name in _MASKS:
        mask = call.tensor(name)
        if mask is None or mask.dim() != 2 or not (mask.dtype in INTEGERS or mask.is_floating_point()):
            continue
        if _holds_no_segments(call, mask) or _separated(call, name, mask) is not None:
            continue
        if values_can_be_read([mask], mask.device):
            if not mask.numel():
                continue
            low, high = mask.aminmax()
            # Of integers that says all, at a third of what the check of each number takes.
            if mask.is_floating_point() or not 0 <= int(low) <= int(high) <= 1:
                _check_numbers(mask, name)
            if high <= 1:
                call.notes.setdefault(_PLAIN, []).append(mask)
                continue
        call.set(name, (mask != 0).to(mask.dtype))
        call.segments[name] = mask.to(torch.int64) if mask.is_floating_point() else mask


def _holds_no_segments(call: Call, mask: Tensor) -> bool:
    """Whether a step before this call, or before one around it, has read this very mask and found ones and zeros."""
    around: Call | None = call
    while around is not None:
        if any(mask is read for read in around.notes.get(_PLAIN, ())):
            return True
        around = around.parent
    return False


def _check_numbers(mask: Tensor, name: str) -> None:
    """Raises for a 2-D mask of other values than 0, 1, 2, ...: additive masks of 0 and -inf, shares, -1 for padding."""
    # Beyond 2**24 float32 does not count any more.
    wrong = mask < 0 if not mask.is_floating_point() else ~((mask >= 0) & (mask <= 2**24) & (mask == mask.round()))
    at = first_true(wrong)
    if at is None:
        return
    raise ValueError(
        f"{name}[{at[0]}, {at[1]}] is {mask[at[0], at[1]].item()}: expected 1 for tokens and 0 for padding, or the "
        "numbers 1, 2, ... of the documents of a row; an additive mask has four dimensions (batch, 1, q_len, k_len)"
    )


def _separated(call: Call, name: str, mask: Tensor) -> Tensor | None:
    """The segments that a mask of a call, or of one around it, was made from."""
    around: Call | None = call
    while around is not None:
        key = name
        if around is not call and name == "attention_mask" and is_decoder(call):
            key = "decoder_attention_mask" if "decoder_attention_mask" in around.accepts else name
        elif around is not call and name == "encoder_attention_mask":
            key = name if name in around.accepts else "attention_mask"
        numbers = around.segments.get(key)
        if numbers is not None and numbers.shape == mask.shape:
            return numbers
        around = around.parent
    return None


def as_given(call: Call, name: str) -> object:
    """A mask of a call as the caller gave it."""
    return call.segments.get(name, call.arguments.get(name))


def segments_of_call(call: Call, name: str, columns: slice | Tensor) -> Tensor | None:
    """Columns of the integers in a 2-D mask of a call, which may number segments; None where they cannot.

    Args:
        call: the call whose mask it is.
        name: ``"attention_mask"`` of the tokens of the call, or ``"encoder_attention_mask"``.
        columns: which of them.
    """
    mask = call.tensor(name)
    if mask is None or mask.dim() != 2 or _holds_no_segments(call, mask):
        return None
    numbers = _separated(call, name, mask)
    if numbers is None:
        numbers = mask if mask.dtype in INTEGERS else None
    return None if numbers is None else numbers[:, columns]
