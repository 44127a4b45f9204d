"""A step over a plain cache: from the arguments straight to operators of the processor (see ``ops/direct.py``)."""

import math
from typing import Any

import torch

from maskops.masks import causal
from maskops.ops.calls import as_torch_says_it
from maskops.ops.decode.registration import NOTHING
from maskops.ops.direct import REFUSED, are_plain, is_eager

_append = torch.ops.maskops.append_kv.default
_decode = torch.ops.maskops.decode_direct.default

_CAUSAL = causal()
_is_grad_enabled = torch.is_grad_enabled
_LARGEST = torch.finfo(torch.float32).max


def _are_for_inference(*tensors: Any) -> bool:
    """Whether they are plain, have four dimensions and take no part in a graph."""
    if not is_eager() or not are_plain(*tensors):
        return False
    wants_graph = torch.is_grad_enabled()
    return all(x.dim() == 4 and not (wants_graph and x.requires_grad) for x in tensors)


def _are_nested(*tensors: Any) -> bool:
    """Whether one of them is nested, so that reading its shape has failed. Asked only then: asking costs."""
    return any(x.is_nested for x in tensors)


def append_kv(k_cache: Any, v_cache: Any, k: Any, v: Any, lengths: Any, *rest: object) -> bool:
    """``maskops.append_kv`` to a cache without pages or indices; False: nothing was done, as where it raises.

    Args:
        k_cache: (batch, kv_heads, capacity, head_dim).
        v_cache: (batch, kv_heads, capacity, value_dim).
        k: (batch, kv_heads, new, head_dim).
        v: (batch, kv_heads, new, value_dim).
        lengths: (batch,).
        *rest: block_table, batch_index and backend, all None in a direct call.
    """
    if any(x is not None for x in rest) or not _are_for_inference(k_cache, v_cache, k, v) or not are_plain(lengths):
        return False
    try:
        if k.shape[0] == 0 or k.shape[0] != k_cache.shape[0]:
            return False
        _append(k_cache, v_cache, k, v, lengths, NOTHING, NOTHING)
    except REFUSED:
        return False
    except RuntimeError as error:
        if _are_nested(k_cache, v_cache, k, v, lengths):
            return False
        raise as_torch_says_it(error) from None
    return True


def decode_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    lengths: Any,
    mask: object,
    block_table: object,
    batch_index: object,
    leftpad: object,
    alibi_slopes: object,
    sinks: object,
    softcap: object,
    softmax_scale: Any,
    backend: object,
    return_lse: object,
) -> Any:
    """``maskops.decode_attention`` of queries that see their whole sequence, else None; also None where it raises.

    Args:
        q: (batch, heads, q_len, head_dim).
        k_cache: (batch, kv_heads, capacity, head_dim).
        v_cache: (batch, kv_heads, capacity, value_dim).
        lengths: (batch,).
        mask: None, or ``masks.causal()`` for a single query, to which it says nothing.
        block_table: None in a direct call.
        batch_index: None.
        leftpad: None.
        alibi_slopes: None.
        sinks: None.
        softcap: 0.0.
        softmax_scale: a float or None.
        backend: None.
        return_lse: False.
    """
    if not (
        block_table is None
        and batch_index is None
        and leftpad is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and not return_lse
        and type(softcap) is float
        and softcap == 0.0
        and (softmax_scale is None or (type(softmax_scale) is float and -_LARGEST <= softmax_scale <= _LARGEST))
        and is_eager()
        and are_plain(q, k_cache, v_cache, lengths)
        and not (_is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad))
    ):
        return None
    try:
        if mask is not None and (mask is not _CAUSAL or q.shape[2] != 1):
            return None
        return _decode(q, k_cache, v_cache, lengths, math.nan if softmax_scale is None else softmax_scale)
    except REFUSED:
        return None
    except RuntimeError as error:
        if _are_nested(q, k_cache, v_cache, lengths):
            return None
        raise as_torch_says_it(error) from None
