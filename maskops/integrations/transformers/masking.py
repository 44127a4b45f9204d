"""The mask function of transformers' attention-mask interface: spans instead of a mask, once per mask type and forward.

transformers describes a mask as a nest of index functions (causal and a window and ...). The known ones are translated
into ``masks``; whatever is not known is evaluated pair by pair, exactly, and becomes a dense mask. Where the documents
lie is not taken from there but from the arguments of the running call (``arrival.py``), because transformers itself
loses most ways to say it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from maskops import backend as backends
from maskops import masks
from maskops.integrations.transformers import arrival
from maskops.integrations.transformers.calls import Call, innermost
from maskops.layouts import Sequences, hull_of_mask, values_can_be_read
from maskops.masks import Mask
from maskops.spans import RowSpans

MaskFunction = Callable[..., Any]


class _Request(NamedTuple):
    """Arguments of the mask interface."""

    batch: int
    q_len: int
    k_len: int
    q_offset: int | Tensor
    kv_offset: int | Tensor
    function: MaskFunction
    mask: Tensor | None
    """bool (batch, keys so far) or None."""
    local_size: int | None
    is_bidirectional: bool
    use_vmap: bool
    device: torch.device
    config: Any


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: object = None,
    **keywords: Any,
) -> RowSpans | Tensor:
    """What ``AttentionMaskInterface`` calls to make a mask, with the arguments of ``transformers``' ``sdpa_mask``.

    Inside a forward of an attached model: the plan of the mask. Outside of one: the mask that ``sdpa`` would get, bool
    (batch, 1, q_length, kv_length), never None.
    """
    call = innermost()
    if call is None:
        return _dense(
            mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, use_vmap, device
        )
    request = _Request(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        "allow_is_bidirectional_skip" in keywords,
        use_vmap,
        torch.device(device),
        config,
    )
    made = _cross_attention(call, request) if _is_cross_attention(call, request) else _self_attention(call, request)
    if call.steps.dense_masks and isinstance(made, RowSpans):
        return made.to_dense().expand(batch_size, -1, -1, -1)
    return made


def _is_cross_attention(call: Call, request: _Request) -> bool:
    """Whether a decoder asks for the mask of its cross-attention: that one looks both ways, its own only backwards."""
    states = call.tensor("encoder_hidden_states")
    if not request.is_bidirectional or states is None or states.shape[1] != request.k_len:
        return False
    if getattr(request.config, "is_causal", True) or request.local_size is not None:
        return request.local_size is None
    # A decoder that was told to look both ways asks for its own mask first.
    is_second = "mask of both ways" in call.notes
    call.notes["mask of both ways"] = True
    return is_second


def _dense(
    function: MaskFunction,
    batch: int,
    q_len: int,
    k_len: int,
    q_offset: int | Tensor,
    kv_offset: int | Tensor,
    mask: Tensor | None,
    use_vmap: bool,
    device: torch.device | str,
) -> Tensor:
    """bool (batch, 1, q_len, k_len): every pair as transformers evaluates it."""
    made = masking_utils.sdpa_mask(
        batch,
        q_len,
        k_len,
        # Annotated as int; static caches hand over tensors.
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,  # type: ignore[arg-type]
        mask_function=function,
        attention_mask=mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert made is not None
    return made


# ---- patterns --------------------------------------------------------------------------------------------------------


def _pattern(request: _Request) -> Mask:
    """The pattern of a request, without documents and padding, which the arrival of the call tells."""
    if torch.compiler.is_compiling():
        return _pattern_by_keywords(request)
    return _translated(request.function, request)


def _translated(function: MaskFunction, request: _Request) -> Mask:
    """A mask function of transformers as a pattern, by its name and what it closes over."""
    if function is masking_utils.causal_mask_function:
        return masks.causal()
    if function is masking_utils.bidirectional_mask_function:
        return masks.full()
    if getattr(function, "__module__", None) == masking_utils.__name__:
        maker = function.__qualname__.split(".", 1)[0]
        names, cells = function.__code__.co_freevars, function.__closure__ or ()
        values = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
        if maker in ("and_masks", "or_masks"):
            parts = [_translated(part, request) for part in values["mask_functions"]]
            return functools.reduce(operator.and_ if maker == "and_masks" else operator.or_, parts)
        if maker == "sliding_window_overlay" and values["sliding_window"] >= 1:
            return masks.sliding_window(values["sliding_window"] - 1, None)
        if maker == "sliding_window_bidirectional_overlay":
            return masks.sliding_window(values["sliding_window"], values["sliding_window"])
        if maker == "chunked_overlay":
            return masks.chunked(values["chunk_size"])
        if maker == "packed_sequence_mask_function":
            return masks.full()
        if maker == "remap_positions_for_packed_sequence":
            return _translated(values["mask_function"], request)
    return _evaluated(function, request)


def _evaluated(function: MaskFunction, request: _Request) -> Mask:
    return masks.dense(
        _dense(
            function,
            request.batch,
            request.q_len,
            request.k_len,
            request.q_offset,
            request.kv_offset,
            None,
            request.use_vmap,
            request.device,
        )
    )


def _pattern_by_keywords(request: _Request) -> Mask:
    """The pattern while Dynamo traces, which cannot look into a closure that it makes itself.

    Each of transformers' functions that make masks calls with keywords of its own; a function of the user shows by
    ``use_vmap`` or by being a union.
    """
    function, size = request.function, request.local_size
    if function is masking_utils.causal_mask_function:
        return masks.causal()
    if function is masking_utils.bidirectional_mask_function:
        return masks.full()
    if request.use_vmap or function.__name__ != "and_mask":
        return _evaluated(function, request)
    if size is None:
        return masks.causal()  # and the documents that transformers reads from position ids
    window = getattr(request.config, "sliding_window", None)
    chunk = getattr(request.config, "attention_chunk_size", None)
    if size == window and request.is_bidirectional:
        return masks.sliding_window(size, size)
    if size == window and size != chunk:
        return masks.sliding_window(size - 1, 0)
    if size == chunk and size != window:
        return masks.causal() & masks.chunked(size)
    return _evaluated(function, request)


# ---- self-attention --------------------------------------------------------------------------------------------------


def _self_attention(call: Call, request: _Request) -> RowSpans:
    pattern = _pattern(request)
    delta = request.q_offset - request.kv_offset
    is_whole = isinstance(request.q_offset, int) and isinstance(request.kv_offset, int)
    is_fresh = is_whole and request.q_offset == 0 and request.kv_offset == 0 and request.q_len == request.k_len
    kept = None
    columns: slice | Tensor = slice(0, request.q_len)
    if request.mask is not None:
        columns = _columns(request.q_offset, request.q_len, request.device)
        kept = _kept(request.mask, request.q_offset, request.q_len)
    documents = None
    if request.q_len != 1 or is_fresh:
        documents = arrival.documents_of_call(
            call,
            request.batch,
            request.q_len,
            kept,
            columns=columns,
            is_continued=arrival.is_continued(request.q_offset),
        )
    if is_fresh and (request.mask is None or request.mask.shape[1] == request.k_len):
        if documents is not None:
            pattern = masks.documents(documents.ids) & pattern
        if request.mask is not None:
            pattern = masks.padding(request.mask) & pattern
        return _spans(call, pattern, request)
    has_origin = request.kv_offset == 0 if is_whole else False
    if (
        request.mask is None
        and documents is None
        and is_whole
        and delta == request.k_len - request.q_len
        and has_origin
    ):
        return _spans(call, pattern, request)
    return _spans_of_step(call, pattern, request) or _spans_in_cache(call, pattern, request, documents, kept)


def _columns(offset: int | Tensor, length: int, device: torch.device) -> slice | Tensor:
    if isinstance(offset, Tensor):
        return torch.arange(length, device=device) + offset
    return slice(offset, offset + length)


def _kept(mask: Tensor, offset: int | Tensor, length: int) -> Tensor:
    """bool (batch, length): columns of a mask from ``offset`` on; those that it lacks are padding."""
    if isinstance(offset, Tensor):
        at = torch.arange(length, device=mask.device) + offset
        return mask[:, at.clamp(max=mask.shape[1] - 1)] & (at < mask.shape[1])
    if mask.shape[1] == length and offset == 0:
        return mask
    part = mask[:, offset : offset + length]
    return torch.nn.functional.pad(part, (0, length - part.shape[1]), value=False)


def _spans_of_step(call: Call, pattern: Mask, request: _Request) -> RowSpans | None:
    """The plan where each row of the batch has one query, which stands in the slot of the last key that it may see.

    That layouts of keys can say, on every device and without a sync, and their plan costs a fraction of one from
    sequences: generation makes one a token. None where they cannot.
    """
    if request.q_len != 1 or request.is_bidirectional:
        return None
    at, first = request.q_offset - request.kv_offset, request.kv_offset
    if pattern.counts_from_first and (isinstance(first, Tensor) or first > 0):
        return None
    if not isinstance(at, Tensor) and not torch.compiler.is_compiling() and not 0 <= at < request.k_len:
        return None
    end = (at + 1).to(request.device).reshape(1) if isinstance(at, Tensor) else at + 1
    keys = masks.key_padding(end)
    if request.mask is not None:
        kept = _kept(request.mask, first, request.k_len)
        own = torch.arange(request.k_len, device=request.device) == at
        # A row whose query is padding sees nothing; the keys of all others end with their own.
        keys = keys & masks.key_padding(kept & (kept & own).any(1, keepdim=True))
    return _spans(call, keys & pattern, request)


def _spans_in_cache(
    call: Call, pattern: Mask, request: _Request, documents: arrival.Documents | None, kept: Tensor | None
) -> RowSpans:
    """The plan where keys are more than the queries: keys stand in slots, query i in the slot ``q_offset + i``."""
    device, q_len, k_len = request.device, request.q_len, request.k_len

    def whole(value: int | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=torch.int64).reshape(1, 1)
        return torch.full((1, 1), value, dtype=torch.int64, device=device)

    cache = call.arguments.get("past_key_values")
    if request.is_bidirectional and not getattr(cache, "is_compileable", False):
        # An encoder whose keys begin with a prefix: transformers gives no offset for it.
        delta, end = whole(k_len - q_len), whole(k_len)
    else:
        delta = whole(request.q_offset) - whole(request.kv_offset)
        end = delta + q_len
    start = -whole(request.kv_offset)
    key_holes = row_holes = None
    if request.mask is not None:
        start = start + request.mask.to(torch.uint8).argmax(1, keepdim=True)
        key_holes = ~_kept(request.mask, request.kv_offset, k_len)
        # Rows of a single query are those of generation, which are real.
        row_holes = None if kept is None or q_len == 1 or request.is_bidirectional else ~kept
    q_start = whole(0)
    if documents is not None:
        is_first = (documents.ids == 0) | (documents.start == 0)
        outside = documents.ids < 0
        row_holes = outside if row_holes is None else row_holes | outside
        q_start = documents.start
        start = torch.where(is_first, start, documents.start + delta)
        end = torch.minimum(end, documents.end + delta)
    positions = _counts_positions(call)
    is_shared = request.mask is None and documents is None and not positions and not pattern.is_dense
    batch = 1 if is_shared else request.batch
    element = torch.arange(batch, device=device)[:, None]
    ordinal = element if documents is None else _ordinals(documents)
    sequences = Sequences(q_start, end - delta, start, end, ordinal, row_holes, key_holes)
    return _spans_in(call, pattern, request, sequences, batch)


def _ordinals(documents: arrival.Documents) -> Tensor:
    """A number for each document of the batch."""
    if documents.cu_seqlens is not None:
        return documents.ids
    rows, length = documents.ids.shape
    return documents.ids + torch.arange(rows, device=documents.ids.device)[:, None] * length


# ---- cross-attention -------------------------------------------------------------------------------------------------


def _cross_attention(call: Call, request: _Request) -> RowSpans:
    pattern = _pattern(request)
    own = call.tensor("attention_mask")
    kept = None
    if (
        own is not None
        and own.dim() == 2
        and arrival.same_sizes((own.shape[0], own.shape[1]), (request.batch, request.q_len))
    ):
        kept = own != 0
    documents = arrival.documents_of_call(
        call, request.batch, request.q_len, kept, columns=slice(0, request.q_len), is_continued=False
    )
    keys = arrival.documents_of_encoder(call, request.batch, request.k_len, request.mask)
    if documents is None and keys is None:
        if kept is None or (values_can_be_read([kept], request.device) and bool(kept.all())):
            if request.mask is not None:
                pattern = masks.key_padding(request.mask) & pattern
            return _spans(call, pattern, request)
        return _spans_of_padded(call, pattern, request, kept)
    if documents is None or keys is None or (documents.cu_seqlens is None) != (keys.cu_seqlens is None):
        raise ValueError(
            "cross-attention: only one of decoder and encoder is packed, or each in another way: say where the "
            "documents of both lie, with cu_seq_lens_q for the decoder and cu_seq_lens_k for the encoder, or with "
            "segments (1, 1, 2, 2, 0) in decoder_attention_mask and attention_mask"
        )
    start, end = _keys_of_documents(documents, keys, request)
    outside = documents.ids < 0
    sequences = Sequences(
        documents.start,
        documents.end,
        start,
        end,
        _ordinals(documents),
        outside,
        None if request.mask is None else ~request.mask,
    )
    return _spans_in(call, pattern, request, sequences, request.batch)


def _spans_of_padded(call: Call, pattern: Mask, request: _Request, kept: Tensor) -> RowSpans:
    """The plan of padded rows against padded keys: rows of padding see nothing, and nothing is computed for them."""
    zero = torch.zeros(1, 1, dtype=torch.int64, device=request.device)
    start, end, holes = zero, zero + request.k_len, None
    if request.mask is not None:
        start, end, holes = hull_of_mask(request.mask)
    element = torch.arange(request.batch, device=request.device)[:, None]
    sequences = Sequences(zero, zero + request.q_len, start, end, element, ~kept, holes)
    return _spans_in(call, pattern, request, sequences, request.batch)


def _keys_of_documents(
    documents: arrival.Documents, keys: arrival.Documents, request: _Request
) -> tuple[Tensor, Tensor]:
    """First and one past the last key of each query's document, int64 (batch, q_len); equal where it has no key."""
    if documents.cu_seqlens is not None and keys.cu_seqlens is not None:
        if documents.cu_seqlens.shape != keys.cu_seqlens.shape:
            raise ValueError(
                f"cu_seq_lens_q describes {documents.cu_seqlens.shape[0] - 1} documents, cu_seq_lens_k "
                f"{keys.cu_seqlens.shape[0] - 1}: every document of the decoder needs one of the encoder"
            )
        at = documents.ids.clamp(min=0)
        row_start = torch.arange(request.batch, device=request.device)[:, None] * request.k_len
        start, end = keys.cu_seqlens[at] - row_start, keys.cu_seqlens[at + 1] - row_start
        # A document without keys may stand anywhere, also in another row.
        return start.clamp(0, request.k_len), end.clamp(0, request.k_len)
    if values_can_be_read([keys.ids], request.device):
        counts = [x.ids.amax(1) for x in (documents, keys)]
        if not torch.equal(*counts):
            raise ValueError(
                f"cross-attention: the rows of the decoder hold {(counts[0] + 1).tolist()} documents, those of the "
                f"encoder {(counts[1] + 1).tolist()}: every document of the decoder needs one of the encoder"
            )
    # One slot more than there can be documents, for the tokens of none.
    slot = torch.where(keys.ids < 0, request.k_len, keys.ids)
    table = torch.zeros(request.batch, request.k_len + 1, dtype=torch.int64, device=request.device)
    at = documents.ids.clamp(0, request.k_len)
    start, end = (table.scatter(1, slot, bound).gather(1, at) for bound in (keys.start, keys.end))
    return torch.where(at < request.k_len, start, 0), torch.where(at < request.k_len, end, 0)


# ---- plans -----------------------------------------------------------------------------------------------------------


def _spans(call: Call, mask: Mask, request: _Request) -> RowSpans:
    return mask.spans(
        request.q_len,
        request.k_len,
        batch=request.batch,
        device=request.device,
        grad=_needs_key_tiles(request.device),
        positions=_counts_positions(call),
    )


def _spans_in(call: Call, pattern: Mask, request: _Request, sequences: Sequences, batch: int) -> RowSpans:
    return pattern.spans_in(
        sequences,
        request.q_len,
        request.k_len,
        batch=batch,
        device=request.device,
        grad=_needs_key_tiles(request.device),
        positions=_counts_positions(call),
    )


def _needs_key_tiles(device: torch.device) -> bool:
    return torch.is_grad_enabled() and backends.needs_key_tiles("attention", device.type)


def _counts_positions(call: Call) -> bool:
    """Whether the layers may drop weights, which is counted by the places of rows in their sequences."""
    if not call.module.training:
        return False
    config = getattr(call.module, "config", None)
    return any("drop" in name and bool(value) for name, value in vars(config).items()) if config is not None else True
