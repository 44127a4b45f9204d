"""Public functions of the key/value cache: arguments, checks, choice of the backend."""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from maskops import backend as backends
from maskops import masks
from maskops.checks import check_scale_and_softcap, check_tensor, has_autocast
from maskops.layouts import values_can_be_read
from maskops.masks import Mask
from maskops.ops.attention import reference as attention_reference
from maskops.ops.attention.registration import in_order_of
from maskops.ops.decode import direct, reference, registration
from maskops.ops.scalars import scalar
from maskops.ops.transforms import requires_grad
from maskops.spans import RowSpans

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Keywords(TypedDict, total=False):
        block_table: Tensor | None
        batch_index: Tensor | None
        leftpad: Tensor | None
        alibi_slopes: Tensor | None
        sinks: Tensor | None
        softcap: float
        softmax_scale: float | None
        backend: str | None


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)
_CAUSAL = masks.causal().conjuncts


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    batch_index: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Appends new keys and values to a cache, in place, behind the keys that each sequence has already.

    Key i of the new ones of row b becomes key ``lengths[b] + i`` of its sequence. The caller counts: afterwards the
    sequence holds ``lengths[b] + new`` keys, of which as many as wanted may be declared valid; what lies beyond the
    length that is given to ``decode_attention`` is never read, and the next append overwrites it.

    Everything is checked before anything is written (the values on the CPU, and on a GPU under
    ``maskops.validate()``). Two rows of one call that would write to the same place (the same page twice in
    ``block_table``, the same row twice in ``batch_index``) are an error, since one of them would be lost; pages that
    sequences share and only read (a common prefix) are no matter.

    Under ``torch.compile`` the call is a mutation of both caches like any in-place operation; lengths are tensors, so
    that growing ones compile nothing anew.

    Args:
        k_cache: (cache_batch, kv_heads, capacity, head_dim), or with ``block_table`` pages (pages, kv_heads, page_size,
            head_dim); float32, bfloat16, float16 or float64. Any strides with a contiguous last dimension: a cache that
            lies as (cache_batch, capacity, kv_heads, head_dim) is passed as its view ``cache.transpose(1, 2)``.
        v_cache: the same with value_dim for head_dim.
        k: (batch, kv_heads, new, head_dim), dtype and device of the cache.
        v: (batch, kv_heads, new, value_dim).
        lengths: int32 or int64 (batch,): keys that each sequence holds before the call.
        block_table: int32 or int64 (batch, max_pages): the pages of each sequence in order. Entries behind the last
            page in use may hold anything.
        batch_index: int32 or int64 (batch,): the row of the cache of each row of the batch; None for the row itself.
            Not together with ``block_table``.
        backend: as in ``maskops.attention``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, a sequence would outgrow the cache, two rows would
            write to one place, or a tensor requires a gradient where gradients are recorded: a cache holds no graph.

    Source: pages and block tables: PagedAttention, Kwon et al., arXiv 2309.06180, section 4.1.
    """
    if direct.append_kv(k_cache, v_cache, k, v, lengths, block_table, batch_index, backend):
        _count_change(k_cache, v_cache)
        return
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        _check_values_tensor(name, x)
        if x.dtype != k_cache.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, k_cache is {k_cache.dtype}: they must be equal; {name}.to(k_cache.dtype)"
            )
        _check_device(name, x, k_cache.device)
        _check_no_gradient(name, x)
    batch, new = k.shape[0], k.shape[2]
    _check_caches(k_cache, v_cache, batch, block_table, batch_index)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (batch, cache.shape[1], new, cache.shape[3])
        if x.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (batch, kv_heads, new, width) = {wanted}")
        if any(cache.stride(d) == 0 and cache.shape[d] > 1 for d in range(3)):
            raise ValueError(
                f"{name}_cache has stride 0: an expanded tensor cannot be written to; use {name}_cache.clone()"
            )
    _check_integers("lengths", lengths, (batch,), "(batch,)", k_cache.device)
    used = {"paged": block_table is not None, "batch_index": batch_index is not None}
    name = backends.choose(
        "append_kv",
        k_cache.device.type,
        k_cache.dtype,
        tuple(feature for feature, is_used in used.items() if is_used),
        requested=backend,
        reference_bytes=None if torch.compiler.is_compiling() or k.is_meta else k.numel() * k.element_size(),
    )
    if name != "cpu":  # which checks by itself, and copies what it checked
        integers = [x for x in (lengths, block_table, batch_index) if x is not None]
        if values_can_be_read(integers, k_cache.device):
            reference.check_append(lengths, new, block_table, batch_index, k_cache)
    if name == backends.REFERENCE:
        reference.append(k_cache, v_cache, k, v, lengths, block_table, batch_index)
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    registration.append(k_cache, v_cache, k, v, lengths, block_table, batch_index, name)
    if not torch.compiler.is_compiling():
        _count_change(k_cache, v_cache)


def _count_change(*caches: Tensor) -> None:
    """As torch's own in-place operations do: what autograd may have saved of a cache is not that any more."""
    torch.autograd.graph.increment_version([x for x in caches if not x.is_inference()])


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: Literal[True],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, Tensor]: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    return_lse: bool,
    **keywords: Unpack[_Keywords],
) -> Tensor | tuple[Tensor, Tensor]: ...


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    mask: Mask | RowSpans | None = None,
    *,
    block_table: Tensor | None = None,
    batch_index: Tensor | None = None,
    leftpad: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries of each sequence over the keys and values that a cache holds of it.

    The formula is that of ``maskops.attention`` under the mask ``masks.key_padding(lengths) & mask``, over the cache of
    each sequence: the last of the ``q_len`` queries is aligned with the last key, ``lengths[b] - 1``, so that
    ``masks.causal()`` lets the new tokens see the past and one another in order, and a window or ALiBi counts from
    there. Keys at ``lengths[b]`` and beyond, and before ``leftpad[b]``, are never read into a result, even where they
    hold NaN. Append first, then attend.

    Inference only: a cache holds no graph. Any ``q_len`` is served, one token as well as the whole prompt.

    Args:
        q: (batch, heads, q_len, head_dim), dtype and device of the cache; ``heads`` is a multiple of ``kv_heads``.
        k_cache: as in ``append_kv``.
        v_cache: as in ``append_kv``.
        lengths: int32 or int64 (batch,): keys that each sequence holds, those of ``q`` included. 0 is legal: out 0,
            lse -inf.
        mask: a ``masks.Mask`` over (q_len, capacity), where capacity is ``k_cache.shape[2]``, or ``max_pages *
            page_size``; most often a pattern. Or a ``RowSpans``, planned once for all layers with
            ``(masks.key_padding(lengths) & pattern).spans(q_len, capacity, positions=...)``; what it sees outside
            ``[leftpad, lengths)`` is cut off. None: every query sees every key of its sequence.
        block_table: as in ``append_kv``. The kernel of few queries reads pages in place; a prompt gathers them.
        batch_index: as in ``append_kv``.
        leftpad: int32 or int64 (batch,): the sequence begins at this key of its cache; None for 0. Positions for
            ``masks.prefix`` and ``masks.chunked`` count from there.
        alibi_slopes: as in ``attention``.
        sinks: as in ``attention``.
        softcap: as in ``attention``.
        softmax_scale: as in ``attention``.
        return_lse: also return the lse.
        backend: as in ``attention``.

    Returns:
        out (batch, heads, q_len, value_dim) in q's dtype and dimension order, dense; with ``return_lse`` the pair
        (out, lse), lse (batch, heads, q_len), natural logarithm, float32, float64 for float64 inputs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value (values are checked on the CPU, and on a GPU under
            ``maskops.validate()``), a tensor requires a gradient where gradients are recorded, or the named backend
            refuses the call.

    Source: as ``attention``; splitting the keys among threads and merging by the lse: Flash-Decoding, Dao, Haziza,
    Massa and Sizov, 2023.
    """
    outputs: Tensor | tuple[Tensor, Tensor] | None = direct.decode_attention(
        q,
        k_cache,
        v_cache,
        lengths,
        mask,
        block_table,
        batch_index,
        leftpad,
        alibi_slopes,
        sinks,
        softcap,
        softmax_scale,
        backend,
        return_lse,
    )
    if outputs is not None:
        return outputs
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_values_tensor(name, x)
        if x.dtype != k_cache.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, k_cache is {k_cache.dtype}: they must be equal; {name}.to(k_cache.dtype)"
            )
        _check_device(name, x, k_cache.device)
    for name, maybe in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("alibi_slopes", alibi_slopes)):
        _check_no_gradient(name, maybe)
    _check_no_gradient("sinks", sinks)
    batch, heads, _, head_dim = q.shape
    kv_heads, device = k_cache.shape[1], k_cache.device
    capacity = _check_caches(k_cache, v_cache, batch, block_table, batch_index)
    if head_dim != k_cache.shape[3] or head_dim == 0:
        raise ValueError(
            f"q and k_cache have head_dim {head_dim} and {k_cache.shape[3]}: they must be equal, at least 1"
        )
    if (heads % kv_heads if kv_heads else heads) != 0:
        raise ValueError(
            f"q has {heads} heads, the cache has {kv_heads}: expected a multiple of the heads of the cache"
        )
    for name, integers in (("lengths", lengths), ("leftpad", leftpad)):
        if integers is not None or name == "lengths":
            _check_integers(name, integers, (batch,), "(batch,)", device)
    for name, per_head, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
    ):
        if per_head is not None:
            check_tensor(name, per_head, "of floating dtype")
            if not per_head.is_floating_point():
                raise TypeError(f"{name} is {per_head.dtype}: expected a floating tensor")
            if tuple(per_head.shape) not in shapes:
                raise ValueError(f"{name} has shape {tuple(per_head.shape)}: expected {' or '.join(map(str, shapes))}")
            _check_device(name, per_head, device)
    _check_numbers(softcap, softmax_scale)
    _check_mask_type(mask)
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale

    used = {
        "paged": block_table is not None,
        "batch_index": batch_index is not None,
        "dense mask": mask.is_dense
        if isinstance(mask, Mask)
        else isinstance(mask, RowSpans) and mask.dense is not None,
        "leftpad": leftpad is not None,
        "alibi_slopes": alibi_slopes is not None,
        "sinks": sinks is not None,
        "wide heads": max(q.shape[3], v_cache.shape[3]) > backends.WIDEST_HEADS,
    }
    is_traced = torch.compiler.is_compiling() or q.is_meta
    name = backends.choose(
        "decode_attention",
        device.type,
        q.dtype,
        tuple(feature for feature, is_used in used.items() if is_used),
        requested=backend,
        reference_bytes=None if is_traced else lambda: _reference_bytes(q, k_cache, v_cache, capacity),
    )
    integer_tensors = [x for x in (lengths, leftpad, block_table, batch_index) if x is not None]
    if name != "cpu" and values_can_be_read(integer_tensors, device):
        reference.check_filled(lengths, leftpad, block_table, batch_index, k_cache)
    if name != backends.REFERENCE:
        # The op knows lengths by itself: a plan is for what else the mask says. To the newest query alone causal() says
        # nothing, and planning it would cost more than attention over a short sequence.
        is_one_causal = isinstance(mask, Mask) and not mask.layouts and mask.conjuncts == _CAUSAL and q.shape[2] == 1
        needs_plan = (mask is not None and not is_one_causal) or alibi_slopes is not None
        spans = _plan(mask, q, capacity, lengths, leftpad, alibi_slopes is not None) if needs_plan else None
        q = q if q.stride(3) == 1 else q.contiguous()
        out, lse = registration.attend(
            q,
            k_cache,
            v_cache,
            lengths,
            leftpad,
            block_table,
            batch_index,
            spans,
            alibi_slopes,
            sinks,
            scale if softmax_scale is None else scalar(softmax_scale),
            scalar(softcap, neutral=0.0),
            name,
        )
        return (out, lse) if return_lse else out
    spans = _within(_plan(mask, q, capacity, lengths, leftpad, alibi_slopes is not None), lengths, leftpad)
    autocast = has_autocast(device.type)
    with torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext():
        out, lse = attention_reference.attention(
            q,
            reference.gathered(k_cache, block_table, batch_index),
            reference.gathered(v_cache, block_table, batch_index),
            spans,
            softmax_scale=float(scale),
            softcap=float(softcap),
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
    out = in_order_of(out, q)
    return (out, lse) if return_lse else out


# ---- the mask --------------------------------------------------------------------------------------------------------


def _plan(
    mask: Mask | RowSpans | None, q: Tensor, capacity: int, lengths: Tensor, leftpad: Tensor | None, positions: bool
) -> RowSpans:
    """The spans of the queries over the whole capacity; those of a Mask lie within ``[leftpad, lengths)``."""
    batch, q_len = q.shape[0], q.shape[2]
    if mask is None or isinstance(mask, Mask):
        # Out of range lengths are refused where the cache is read, in the words of this function.
        filled = lengths.clamp(0, capacity)
        layout = masks.key_padding(filled)
        if leftpad is not None:
            keys = torch.arange(capacity, device=q.device)
            layout = masks.key_padding((keys >= leftpad[:, None]) & (keys < filled[:, None]))
        whole = layout if mask is None else layout & mask
        return whole.spans(q_len, capacity, batch=batch, device=q.device, grad=False, positions=positions)
    if mask.q_len != q_len or mask.k_len != capacity:
        raise ValueError(
            f"mask is a plan for {mask.q_len} queries and {mask.k_len} keys, there are {q_len} queries and the cache "
            f"holds {capacity} keys a sequence: plan it with mask.spans({q_len}, {capacity})"
        )
    if mask.batch not in (1, batch):
        raise ValueError(f"mask is a plan for a batch of {mask.batch}, q has a batch of {batch}")
    if mask.start.device != q.device:
        raise ValueError(f"mask is a plan on {mask.start.device}, q is on {q.device}: plan it with device=q.device")
    if mask.dense is not None and (mask.dense.shape[0] not in (1, batch) or mask.dense.shape[1] not in (1, q.shape[1])):
        raise ValueError(
            f"mask holds a dense mask with shape {tuple(mask.dense.shape)}: expected ({batch} or 1, {q.shape[1]} or 1, "
            f"{q_len}, {capacity})"
        )
    if positions and mask.positions is None:
        raise ValueError(
            "alibi_slopes needs the positions of rows, which this RowSpans lacks: plan it with "
            "mask.spans(..., positions=True)"
        )
    return mask


def _within(spans: RowSpans, lengths: Tensor, leftpad: Tensor | None) -> RowSpans:
    """The spans cut to ``[leftpad, lengths)``; the work lists, which the reference does not read, stay as they are."""
    high = lengths.clamp(0, spans.k_len).to(torch.int32)[:, None]
    low = torch.zeros_like(high) if leftpad is None else leftpad.clamp(0, spans.k_len).to(torch.int32)[:, None]
    start = torch.maximum(spans.start, low)
    end = torch.maximum(torch.minimum(spans.end, high), start)
    keys = torch.arange(spans.k_len, device=start.device)
    key_valid = spans.key_valid * ((keys >= low) & (keys < high))
    positions = spans.positions
    if positions is not None:
        positions = positions.expand(-1, start.shape[1], -1)
    return spans._replace(start=start, end=end, key_valid=key_valid, positions=positions)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_values_tensor(name: str, x: object) -> None:
    expected = "(pages, kv_heads, page_size, width)" if "cache" in name else "(batch, heads, length, width)"
    if name.endswith("cache"):
        expected = f"(cache_batch, kv_heads, capacity, width) or {expected}"
    check_tensor(name, x, expected)
    assert isinstance(x, Tensor)
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected 4 dimensions, {expected}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}: expected float32, bfloat16, float16 or float64")


def _check_mask_type(mask: object) -> None:
    if mask is not None and not isinstance(mask, Mask | RowSpans):
        kind = f"a tensor with shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"mask is {kind}: expected a mask of maskops.masks, a RowSpans or None")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, k_cache on {device}: they must be on one device")


def _check_no_gradient(name: str, x: Tensor | None) -> None:
    if isinstance(x, Tensor) and torch.is_grad_enabled() and requires_grad(x):
        raise ValueError(
            f"{name} requires a gradient: a cache of keys and values is for inference and holds no graph. Call under "
            f"torch.no_grad(), or pass {name}.detach(); maskops.attention is differentiable"
        )


def _check_caches(
    k_cache: Tensor, v_cache: Tensor, batch: int, block_table: Tensor | None, batch_index: Tensor | None
) -> int:
    """Checks that the caches agree with each other and with the batch; the keys that a sequence can hold."""
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache has shape {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}: they may differ in the last "
            f"dimension only"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            raise ValueError(
                f"{name} has stride {cache.stride(3)} in its last dimension: it must be contiguous there, since a "
                f"cache is used in place"
            )
    device = k_cache.device
    if block_table is not None:
        if batch_index is not None:
            raise ValueError("batch_index goes with a contiguous cache: with block_table use block_table[batch_index]")
        check_tensor("block_table", block_table, "(batch, max_pages)")
        if block_table.dtype not in _INTEGERS:
            raise TypeError(f"block_table is {block_table.dtype}: expected int32 or int64")
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"block_table has shape {tuple(block_table.shape)}: expected (batch, max_pages) = ({batch}, ...)"
            )
        _check_device("block_table", block_table, device)
        return k_cache.shape[2] * block_table.shape[1]
    if batch_index is not None:
        _check_integers("batch_index", batch_index, (batch,), "(batch,)", device)
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} rows for a batch of {batch}: give batch_index, or block_table if "
            f"these are pages"
        )
    return k_cache.shape[2]


def _check_integers(name: str, x: Tensor | None, shape: tuple[int, ...], meaning: str, device: torch.device) -> None:
    check_tensor(name, x, meaning)
    assert x is not None
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} is {x.dtype}: expected int32 or int64")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {meaning} = {shape}")
    _check_device(name, x, device)


def _check_numbers(softcap: float, softmax_scale: float | None) -> None:
    for name, number in (("softcap", softcap), ("softmax_scale", softmax_scale)):
        if not isinstance(number, numbers.Real) and not (name == "softmax_scale" and number is None):
            raise TypeError(f"{name} is a {type(number).__name__}: expected a float")
    check_scale_and_softcap(softmax_scale, softcap)


def _reference_bytes(q: Tensor, k_cache: Tensor, v_cache: Tensor, capacity: int) -> int:
    """The gathered cache in float32, and the scores with their weights."""
    batch, heads, q_len, _ = q.shape
    gathered = batch * k_cache.shape[1] * capacity * (k_cache.shape[3] + v_cache.shape[3])
    return (gathered + 2 * batch * heads * q_len * capacity) * max(q.element_size(), 4)
