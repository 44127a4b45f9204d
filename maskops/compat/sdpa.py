"""torch's scaled_dot_product_attention on maskops: same signature, same answer, work only where the mask allows it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from maskops import backend
from maskops import masks as maskops_masks
from maskops.checks import has_autocast
from maskops.compat import recognise
from maskops.masks import Mask
from maskops.ops.attention.api import attention
from maskops.spans import RowSpans


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, argument for argument.

    What differs from torch: a row that sees no key is 0 with gradient 0 on every path; ``attn_mask`` together with
    ``is_causal`` is their intersection, where torch raises or not depending on its backend; what hidden keys hold,
    NaN included, reaches no result where no row of the batch element sees them.

    A dense ``attn_mask`` whose rows are one or two runs of keys (padding on either side or with holes, causal, windows,
    documents, prefixes) is recognised and costs only the pairs that it allows. It is read once: a tensor that has not
    been changed since (by its version counter) is not read again, nor is a plan built again for an equal mask. Writes
    that autograd cannot see (``mask.data``, numpy) are not seen here either. Compiled code, fake tensors and functional
    transforms cannot read values: there a bool mask is ``masks.dense``, exact and slower.

    Args:
        query: (..., heads, q_len, head_dim), or (q_len, head_dim).
        key: (..., kv_heads, k_len, head_dim).
        value: (..., kv_heads, k_len, value_dim). Leading dimensions broadcast.
        attn_mask: broadcastable to (..., heads, q_len, k_len). bool: True = attend. Floating: added to the scores,
            differentiable.
        dropout_p: probability with which a weight is dropped, in [0, 1]. As in torch, it is always applied.
        is_causal: query i sees the keys up to i: aligned to the top left, also where q_len != k_len.
        scale: None for ``1 / sqrt(head_dim)``.
        enable_gqa: ``heads`` may be a multiple of ``kv_heads``.

    Returns:
        (..., heads, q_len, value_dim), in query's dtype (under autocast in autocast's).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value.

    Source: the formula in the documentation of ``torch.nn.functional.scaled_dot_product_attention``.
    """
    return served(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, fast_only=False)


class NotServedError(Exception):
    """No fast backend serves a call of which another way is known; the message is the reason."""


def served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    fast_only: bool,
) -> Tensor:
    """``scaled_dot_product_attention``; with ``fast_only``, NotServedError instead of a fall-back on the reference."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        _check_tensor(name, x, query)
    _check_numbers(dropout_p, scale)
    lead, heads, kv_heads = _leading_shape(query, key, value, enable_gqa)
    q_len, k_len = query.shape[-2], key.shape[-2]
    mask = None
    if attn_mask is not None:
        mask = _mask_as_4d(attn_mask, (*lead, *heads), q_len, k_len, has_heads=len(heads) > 0)
    out = attend(
        _as_4d(query, lead, heads),
        _as_4d(key, lead, kv_heads),
        _as_4d(value, lead, kv_heads),
        () if mask is None else (mask,),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        fast_only=fast_only,
    )
    return out.reshape(*lead, *heads, q_len, value.shape[-1])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_masks: Sequence[Tensor],
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    fast_only: bool = False,
) -> Tensor:
    """Attention under any number of masks in torch's sense, all of which hold.

    Args:
        q: (batch, heads, q_len, head_dim).
        k: (batch, kv_heads, k_len, head_dim).
        v: (batch, kv_heads, k_len, value_dim).
        attn_masks: bool or floating, four dimensions each, broadcastable to (batch, heads, q_len, k_len).
        dropout_p: in [0, 1].
        is_causal: aligned to the top left.
        scale: None for ``1 / sqrt(head_dim)``.
        fast_only: raise NotServedError where the call would end on the reference without anybody having asked for it.
    """
    mask, bias = mask_and_bias(
        attn_masks, q.shape[0], q.shape[2], k.shape[2], is_causal=is_causal, positions=dropout_p > 0
    )
    if fast_only and (reason := _refusal(q, mask, bias, dropout_p)) is not None:
        raise NotServedError(reason)
    if dropout_p == 1:
        # Every weight is dropped: the same zeros, and the same zero gradients, as those of a mask without keys.
        return attention(q, k, v, maskops_masks.prefix(0), bias=bias, softmax_scale=scale)
    return attention(q, k, v, mask, bias=bias, dropout_p=dropout_p, softmax_scale=scale)


def _refusal(q: Tensor, mask: Mask | RowSpans | None, bias: Tensor | None, dropout_p: float) -> str | None:
    is_dense = mask.is_dense if isinstance(mask, Mask) else mask is not None and mask.dense is not None
    used = {"dense mask": is_dense, "bias": bias is not None, "dropout": 0 < dropout_p < 1}
    device = q.device.type
    is_cast = q.dtype != torch.float64 and is_autocast(device)
    dtype = torch.get_autocast_dtype(device) if is_cast else q.dtype
    return backend.refusal("attention", device, dtype, tuple(name for name, is_used in used.items() if is_used))


def mask_and_bias(
    attn_masks: Sequence[Tensor], batch: int, q_len: int, k_len: int, *, is_causal: bool, positions: bool
) -> tuple[Mask | RowSpans | None, Tensor | None]:
    """What ``maskops.attention`` takes for masks in torch's sense: spans if they are, else dense masks and a bias."""
    readable = [mask for mask in attn_masks if recognise.can_be_read(mask)]
    rest = [mask for mask in attn_masks if not recognise.can_be_read(mask)]
    plan = None
    if readable and not any(mask.dtype == torch.bool for mask in rest):
        reading = recognise.read(readable, q_len, k_len, batch=batch, is_causal=is_causal, positions=positions)
        unread = [readable[number] for number in reading.rest]
        if reading.plan is not None and not any(mask.dtype == torch.bool for mask in unread):
            plan, readable = reading.plan, unread
    rest = readable + rest
    additive = [mask for mask in rest if mask.dtype != torch.bool]
    bias = sum(additive[1:], additive[0]) if additive else None
    if plan is not None:
        return plan, bias
    mask: Mask | None = causal_from_top_left(q_len, k_len) if is_causal else None
    for dense in rest:
        if dense.dtype == torch.bool:
            if dense.shape[1] == dense.shape[2] == 1 and not is_causal:
                # Nothing but keys: spans that need no look at the values. A pattern would be aligned to these keys.
                term = maskops_masks.key_padding(dense[:, 0, 0].expand(-1, k_len))
            else:
                # Exact in both lengths, as masks.dense wants it; a view.
                term = maskops_masks.dense(dense.expand(-1, -1, q_len, k_len))
            mask = term if mask is None else mask & term
    return mask, bias


def causal_from_top_left(q_len: int, k_len: int) -> Mask:
    """Row i sees the keys up to i, whatever the lengths; ``masks.causal()`` is aligned to the bottom right."""
    if q_len == k_len:
        return maskops_masks.causal()
    if q_len > k_len:
        return maskops_masks.sliding_window(None, q_len - k_len)
    # No row sees a key beyond q_len: without them the corners coincide.
    return maskops_masks.causal() & maskops_masks.key_padding(q_len)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _leading_shape(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Leading dimensions of the problem, broadcast: those of the batch, and the heads of query and of key and value."""
    named = (("query", query), ("key", key), ("value", value))
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    for name, x in named:
        if x.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected at least (length, head_dim)")
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            f"query and key have head_dim {query.shape[-1]} and {key.shape[-1]}: they must be equal, and at least 1"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key has {key.shape[-2]} keys, value has {value.shape[-2]}: they must be equal")
    if enable_gqa:
        if min(x.dim() for _, x in named) < 3:
            raise ValueError(f"enable_gqa needs a dimension of heads, (..., heads, length, head_dim): got {shapes}")
        heads, k_heads, v_heads = (x.shape[-3] for _, x in named)
        if k_heads != v_heads:
            raise ValueError(f"key has {k_heads} heads, value has {v_heads}: with enable_gqa they must be equal")
        if (heads % k_heads if k_heads else heads) != 0:
            raise ValueError(f"query has {heads} heads, key has {k_heads}: expected a multiple of the heads of key")
        return _broadcast([x.shape[:-3] for _, x in named], shapes), (heads,), (k_heads,)
    lead = _broadcast([x.shape[:-2] for _, x in named], shapes, has_heads=True)
    if len(lead) < 2:
        return lead, (), ()
    return lead[:-1], lead[-1:], lead[-1:]


def _broadcast(leads: Sequence[tuple[int, ...]], shapes: str, has_heads: bool = False) -> tuple[int, ...]:
    dimensions = max(map(len, leads))
    result = []
    for place in range(-dimensions, 0):
        sizes = [lead[place] for lead in leads if len(lead) >= -place and lead[place] != 1]
        if any(size != sizes[0] for size in sizes[1:]):
            fix = ": for grouped heads set enable_gqa=True" if has_heads and place == -1 and dimensions > 1 else ""
            raise ValueError(f"the leading dimensions of {shapes} do not broadcast{fix}")
        result.append(sizes[0] if sizes else 1)
    return tuple(result)


def _as_4d(x: Tensor, lead: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    """(batch, heads, length, dim): the leading dimensions become one, none becomes 1."""
    x = x.expand(*lead, *heads, *x.shape[-2:])
    if not heads:
        x = x.unsqueeze(-3)
    if len(lead) == 1:
        return x
    return x.unsqueeze(0) if not lead else x.flatten(0, len(lead) - 1)


def _mask_as_4d(mask: Tensor, lead: tuple[int, ...], q_len: int, k_len: int, has_heads: bool) -> Tensor:
    """A mask that broadcasts to (*lead, q_len, k_len) as (batch|1, heads|1, q_len|1, k_len|1); a view if possible."""
    full = (*lead, q_len, k_len)
    wrong = mask.dim() > len(full)
    if wrong or any(size not in (1, there) for size, there in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}: expected one that broadcasts to {full}, (..., heads, q_len, "
            f"k_len)"
        )
    mask = mask[(None,) * (len(full) - mask.dim())]
    if not has_heads:
        mask = mask.unsqueeze(-3)
    batch_dimensions = mask.dim() - 3
    if batch_dimensions == 1:
        return mask
    if batch_dimensions == 0:
        return mask.unsqueeze(0)
    if all(size == 1 for size in mask.shape[:batch_dimensions]):
        return mask[(0,) * (batch_dimensions - 1)]
    return mask.expand(*lead[:batch_dimensions], -1, -1, -1).flatten(0, batch_dimensions - 1)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_tensor(name: str, x: object, query: Tensor) -> None:
    if x is None and name == "attn_mask":
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: expected a tensor")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor: give the packed rows to maskops.varlen_attention")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device}, query on {query.device}: they must be on one device")
    if name == "attn_mask":
        if x.dtype != torch.bool and not x.is_floating_point():
            raise TypeError(
                f"attn_mask is {x.dtype}: expected torch.bool, True = attend, or a floating mask that is added to the "
                f"scores; of 0 and 1 make a bool with attn_mask.bool()"
            )
    elif not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}: expected float32, bfloat16, float16 or float64")
    elif x.dtype != query.dtype and not is_autocast(x.device.type):
        raise TypeError(f"{name} is {x.dtype}, query is {query.dtype}: they must have one dtype")


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


def _check_numbers(dropout_p: float, scale: float | None) -> None:
    for name, number, expected in (("dropout_p", dropout_p, "a float"), ("scale", scale, "a float or None")):
        if not isinstance(number, (numbers.Real, torch.SymFloat)) and not (name == "scale" and number is None):
            raise TypeError(f"{name} is a {type(number).__name__}: expected {expected}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}: expected a probability in [0, 1]")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}: expected a finite number")
