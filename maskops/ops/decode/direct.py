"""A step over a plain cache: from the arguments straight to operators of the processor (see ``ops/direct.py``)."""

import math
from typing import Any

import torch

from maskops.masks import causal
from maskops.ops.calls import as_torch_says_it
from maskops.ops.decode.registration import NOTHING
from maskops.ops.direct import REFUSED, are_plain, is_eager

_append = torch.ops.maskops.append_kv.default
_decode = torch.ops.maskops.decode_forward.default

_CAUSAL = causal()
_NOTHINGS = (NOTHING,) * 10
_LARGEST = torch.finfo(torch.float32).max


def _are_for_inference(*tensors: Any) -> bool:
    """Whether they are plain, have four dimensions and take no part in a graph."""
    if not is_eager() or not are_plain(*tensors):
        return False
    wants_graph = torch.is_grad_enabled()
    return all(x.dim() == 4 and not (wants_graph and x.requires_grad) for x in tensors)


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
    if k.shape[0] == 0 or k.shape[0] != k_cache.shape[0]:
        return False
    try:
        _append(k_cache, v_cache, k, v, lengths, NOTHING, NOTHING)
    except REFUSED:
        return False
    except RuntimeError as error:
        raise as_torch_says_it(error) from None
    return True


def decode_attention(q: Any, k_cache: Any, v_cache: Any, lengths: Any, mask: object, *rest: Any) -> Any:
    """``maskops.decode_attention`` of queries that see their whole sequence, else None; also None where it raises.

    Args:
        q: (batch, heads, q_len, head_dim).
        k_cache: (batch, kv_heads, capacity, head_dim).
        v_cache: (batch, kv_heads, capacity, value_dim).
        lengths: (batch,).
        mask: None, or ``masks.causal()`` for a single query, to which it says nothing.
        *rest: block_table, batch_index, leftpad, alibi_slopes, sinks, softcap, softmax_scale, backend, return_lse.
    """
    block_table, batch_index, leftpad, alibi_slopes, sinks, softcap, softmax_scale, backend, return_lse = rest
    if not (
        block_table is None
        and batch_index is None
        and leftpad is None
        and alibi_slopes is None
        and sinks is None
        and backend is None
        and type(softcap) is float
        and softcap == 0.0
        and _are_for_inference(q, k_cache, v_cache)
        and are_plain(lengths)
    ):
        return None
    shape = q.shape
    if shape[0] != k_cache.shape[0] or shape[3] == 0 or not (mask is None or (mask is _CAUSAL and shape[2] == 1)):
        return None
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(shape[3])
    elif type(softmax_scale) is not float or not -_LARGEST <= softmax_scale <= _LARGEST:
        return None
    try:
        outputs = _decode(q, k_cache, v_cache, lengths, *_NOTHINGS, softmax_scale, 0.0)
    except REFUSED:
        return None
    except RuntimeError as error:
        raise as_torch_says_it(error) from None
    return outputs if return_lse else outputs[0]
