"""Appending to a cache in place: a copy of rows to where each sequence goes on."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from maskops.ops.decode.triton_kernels.places import cache_arguments, place_of
from maskops.ops.triton_language import launch, padded

_BLOCK_N = 16


@triton.jit
def _copy(
    CACHE, SOURCE, row, slot, is_written, batch, head, new_key, column_block,
    cache_place_stride, cache_head_stride, cache_row_stride, batch_stride, head_stride, row_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies the rows of new keys, or of new values, to their rows of the cache."""
    column = column_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = is_written[:, None] & (column < WIDTH)
    source = SOURCE + batch * batch_stride + head * head_stride + (new_key.to(tl.int64)[:, None] * row_stride + column)
    target = CACHE + head * cache_head_stride
    target = target + (row * cache_place_stride + slot.to(tl.int64) * cache_row_stride)[:, None] + column
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit(do_not_specialize=("new", "capacity", "n_places", "places_of_sequence", "batch"))
def append_kv_kernel(
    K_CACHE, V_CACHE, K, V, LENGTHS, PLACES,
    k_cache_place_stride, k_cache_head_stride, k_cache_row_stride,
    v_cache_place_stride, v_cache_head_stride, v_cache_row_stride,
    k_batch_stride, k_head_stride, k_row_stride, v_batch_stride, v_head_stride, v_row_stride,
    lengths_stride, places_batch_stride, places_stride, places_of_sequence, n_places, page_size, capacity,
    kv_heads, new,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_N new keys and their values of one batch element and head. A place that is none is left out."""
    blocks = tl.cdiv(new, BLOCK_N)
    batch_head = tl.program_id(0) // blocks
    batch = (batch_head // kv_heads).to(tl.int64)
    head = (batch_head % kv_heads).to(tl.int64)
    new_key = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    key = tl.load(LENGTHS + batch * lengths_stride).to(tl.int64) + new_key
    is_written = (new_key < new) & (key >= 0) & (key < capacity)
    row, slot, is_there = place_of(
        tl.where(is_written, key, 0).to(tl.int32), is_written, PLACES, batch, places_batch_stride, places_stride,
        places_of_sequence, n_places, page_size, HAS_PLACES,
    )  # fmt: skip
    is_written = is_written & is_there
    for block in tl.range(0, tl.cdiv(WIDTH, BLOCK)):
        _copy(
            K_CACHE, K, row, slot, is_written, batch, head, new_key, block,
            k_cache_place_stride, k_cache_head_stride, k_cache_row_stride, k_batch_stride, k_head_stride, k_row_stride,
            WIDTH, BLOCK,
        )  # fmt: skip
    for block in tl.range(0, tl.cdiv(VALUE_WIDTH, BLOCK)):
        _copy(
            V_CACHE, V, row, slot, is_written, batch, head, new_key, block,
            v_cache_place_stride, v_cache_head_stride, v_cache_row_stride, v_batch_stride, v_head_stride, v_row_stride,
            VALUE_WIDTH, BLOCK,
        )  # fmt: skip


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    batch_index: Tensor,
) -> None:
    """The operator ``append_kv_triton``; arguments as in ``registration``."""
    batch, kv_heads, new, width = k.shape
    if not (
        k.dtype == v.dtype == k_cache.dtype
        and k.shape == (batch, k_cache.shape[1], new, k_cache.shape[3])
        and v.shape == (batch, v_cache.shape[1], new, v_cache.shape[3])
    ):
        raise ValueError("append_kv: k and v must be (batch, kv_heads, new, width) of the cache, in its dtype")
    for x in (k, v):
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError("append_kv: the last dimension of k and v must be contiguous")
    for cache in (k_cache, v_cache):
        if any(size > 1 and stride == 0 for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError("append_kv: a cache must not be expanded")
    known = cache_arguments("append_kv", k_cache, v_cache, lengths, block_table, batch_index, batch)
    if k.numel() + v.numel() == 0 or known["capacity"] == 0:
        return
    arguments: dict[str, Any] = {name: known[name] for name in append_kv_kernel.arg_names if name in known}
    for name, x in (("k", k), ("v", v)):
        arguments |= {
            f"{name}_batch_stride": x.stride(0),
            f"{name}_head_stride": x.stride(1),
            f"{name}_row_stride": x.stride(2),
        }
    arguments |= {
        "K": k, "V": v, "kv_heads": kv_heads, "new": new, "WIDTH": width, "VALUE_WIDTH": v.shape[3],
        "BLOCK": min(padded(max(width, v.shape[3])), 256), "BLOCK_N": _BLOCK_N,
    }  # fmt: skip
    programs = -(-new // _BLOCK_N) * batch * kv_heads  # along the one dimension of a grid that is not short
    launch(append_kv_kernel, (programs,), k_cache, (), **arguments, num_warps=4, num_stages=1)
