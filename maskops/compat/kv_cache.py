"""flash-attn 2's flash_attn_with_kvcache: append to a cache, rotate, attend to it."""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.checks import check_tensor
from maskops.compat.arguments import check_dimensions, pattern_of, softcap_of
from maskops.layouts import values_can_be_read
from maskops.ops.decode.api import append_kv, decode_attention


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries to a cache of keys and values, to which new keys and values are appended in place.

    Inference only, as in flash-attn; where gradients are recorded, a tensor that requires one is an error. Masks and
    distances are aligned to the bottom right: the last query stands at the last key of its sequence, after appending.

    Args:
        q: (batch, q_len, heads, head_dim).
        k_cache: (cache_batch, capacity, kv_heads, head_dim), or with ``block_table`` (blocks, block_size, kv_heads,
            head_dim), of any block size. Written in place where ``k`` is given.
        v_cache: the same with value_dim.
        k: (batch, new, kv_heads, head_dim): becomes the keys ``cache_seqlens`` and following.
        v: (batch, new, kv_heads, value_dim); together with ``k``.
        rotary_cos: (positions, rotary_dim / 2): rotates the first rotary_dim dimensions of k and q, of k at the
            positions ``cache_seqlens``, ``cache_seqlens + 1`` and so on; of q at the same with ``causal`` or a window,
            else all at ``cache_seqlens``. Together with ``rotary_sin`` and ``k``. The rotated keys are stored.
        rotary_sin: the same.
        cache_seqlens: an int, or int32 or int64 (batch,): keys that the cache holds before the call; needed to append.
            None: as many as fit.
        cache_batch_idx: int32 or int64 (batch,): row of the cache of each sequence. Not together with ``block_table``.
        cache_leftpad: int32 or int64 (batch,): first key of each sequence in its row of the cache.
        block_table: int32 or int64 (batch, blocks of a sequence).
        softmax_scale: None for ``1 / sqrt(head_dim)``.
        causal: aligned to the bottom right.
        window_size: as in ``flash_attn_func``.
        softcap: as in ``flash_attn_func``.
        rotary_interleaved: dimensions 0 and 1, 2 and 3, ... are rotated together; else the two halves (GPT-NeoX).
        alibi_slopes: (heads,) or (batch, heads).
        num_splits: taken; how keys are split changes no result here.
        return_softmax_lse: also return the lse.

    Returns:
        out (batch, q_len, heads, value_dim); with ``return_softmax_lse`` the pair (out, lse), lse float32 (batch,
        heads, q_len).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value, or goes only with one that is missing. Of the cache, no
            key before ``cache_seqlens`` has changed then.
    """
    layout = "(blocks, block_size, kv_heads, dim)" if block_table is not None else "(batch, capacity, kv_heads, dim)"
    check_dimensions("q", q, 4, "(batch, q_len, heads, head_dim)")
    check_dimensions("k_cache", k_cache, 4, layout)
    check_dimensions("v_cache", v_cache, 4, layout)
    _check_together(("k", k), ("v", v))
    _check_together(("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin))
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos is given without k: only what is appended is rotated, and the query with it")
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx goes with a contiguous cache, block_table with pages: give one of them")
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits is {num_splits!r}: expected 0 (as many as are good) or more")
    mask, cap = pattern_of(causal, window_size), softcap_of(softcap)
    capacity = k_cache.shape[1]
    if block_table is not None:
        check_dimensions("block_table", block_table, 2, "(batch, blocks of a sequence)")
        capacity *= block_table.shape[1]
    new = 0
    if k is not None:
        check_dimensions("k", k, 4, "(batch, new, kv_heads, head_dim)")
        check_dimensions("v", v, 4, "(batch, new, kv_heads, value_dim)")
        new = k.shape[1]
        if cache_seqlens is None:
            raise ValueError("k is given without cache_seqlens: where to append it is not known")
    lengths = _lengths(cache_seqlens, q, capacity, new)
    _check_per_sequence("cache_leftpad", cache_leftpad, q, 0, capacity)
    _check_per_sequence("cache_batch_idx", cache_batch_idx, q, 0, k_cache.shape[0] - 1)

    k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            is_local = window_size[0] >= 0 or window_size[1] >= 0
            q, k = _rotate(q, k, rotary_cos, rotary_sin, lengths, rotary_interleaved, causal or is_local)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        append_kv(k_cache, v_cache, k, v, lengths, block_table=block_table, batch_index=cache_batch_idx)
        lengths = lengths + new
    out, lse = decode_attention(
        q.transpose(1, 2),
        k_cache,
        v_cache,
        lengths,
        mask,
        block_table=block_table,
        batch_index=cache_batch_idx,
        leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
        softcap=cap,
        softmax_scale=softmax_scale,
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _check_together(*named: tuple[str, Tensor | None]) -> None:
    given = [name for name, x in named if x is not None]
    missing = [name for name, x in named if x is None]
    if given and missing:
        raise ValueError(f"{given[0]} is given without {missing[0]}: give both or none")


def _lengths(cache_seqlens: int | Tensor | None, q: Tensor, capacity: int, new: int) -> Tensor:
    """Keys that each sequence holds before the call, (batch,)."""
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, Tensor)):
        raise TypeError(f"cache_seqlens is a {type(cache_seqlens).__name__}: expected an int or a tensor (batch,)")
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    room = f", since {new} are appended to a cache of {capacity}" if new else f", the capacity is {capacity}"
    _check_per_sequence("cache_seqlens", cache_seqlens, q, 0, capacity - new, room)
    return cache_seqlens


def _check_per_sequence(name: str, x: Tensor | None, q: Tensor, low: int, high: int, why: str = "") -> None:
    if x is None:
        return
    check_tensor(name, x, "(batch,)")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {x.dtype}: expected int32 or int64")
    if tuple(x.shape) != (q.shape[0],):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (batch,) = ({q.shape[0]},)")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must be on one device")
    if values_can_be_read([x], x.device):
        wrong = ((x < low) | (x > high)).nonzero()
        if wrong.shape[0]:
            at = int(wrong[0, 0])
            raise ValueError(f"{name}[{at}]={int(x[at])}: expected {low} to {high}{why}")


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, interleaved: bool, q_moves: bool
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the new keys and of the queries (Su et al., arXiv 2104.09864, equation 34)."""
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_dimensions(name, x, 2, "(positions, rotary_dim / 2)")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: expected a floating tensor")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}: they must be on one device")
    if cos.shape != sin.shape:
        raise ValueError(f"rotary_cos has shape {tuple(cos.shape)}, rotary_sin {tuple(sin.shape)}: they must be equal")
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)}, which rotates {2 * cos.shape[1]} dimensions: q has head_dim "
            f"{q.shape[3]}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]}, q has {q.shape[3]}: they must be equal")
    k_positions, q_positions = (
        lengths.long()[:, None] + torch.arange(count, device=q.device) for count in (k.shape[1], q.shape[1])
    )
    if not q_moves:
        q_positions = lengths.long()[:, None]
    if values_can_be_read([lengths], lengths.device):
        needed = max((int(x.max()) + 1 for x in (k_positions, q_positions) if x.numel()), default=0)
        if needed > cos.shape[0]:
            raise ValueError(f"rotary_cos has {cos.shape[0]} positions: the new keys and queries reach {needed}")
    last = max(cos.shape[0] - 1, 0)
    q = _rotated(q, cos, sin, q_positions.clamp(max=last), interleaved)
    return q, _rotated(k, cos, sin, k_positions.clamp(max=last), interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of the first dimensions of x (batch, length, heads, head_dim), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[1]
    c, s = (table.to(dtype)[positions].unsqueeze(2) for table in (cos, sin))
    turned, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((first * c - second * s, first * s + second * c), -1).flatten(-2)
    else:
        first, second = turned[..., :half], turned[..., half:]
        turned = torch.cat((first * c - second * s, first * s + second * c), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
