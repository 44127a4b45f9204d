"""Where the keys of a sequence lie: rows of a contiguous cache, or pages."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)
_INT32_MAX = 2**31 - 1


@triton.jit
def place_of(
    key, is_used, PLACES, batch, places_batch_stride, places_stride, places_of_sequence, n_places, page_size,
    HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Row or page (int64) and slot of keys, and whether there is such a place; one that is none is given as 0.

    Args:
        key: keys of the sequence, 0 or more.
        is_used: which of them count.
        PLACES: rows of the cache, or pages, of each sequence; without HAS_PLACES sequence b has row b.
    """
    index = key // page_size
    slot = key - index * page_size
    if HAS_PLACES:
        is_listed = is_used & (index < places_of_sequence)
        where = PLACES + batch * places_batch_stride + index.to(tl.int64) * places_stride
        place = tl.load(where, mask=is_listed, other=-1).to(tl.int64)
    else:
        is_listed = is_used & (index == 0)
        place = batch + index.to(tl.int64) * 0
    is_there = is_listed & (place >= 0) & (place < n_places)
    return tl.where(is_there, place, 0), slot, is_there


def cache_arguments(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    batch_index: Tensor,
    batch: int,
) -> dict[str, Any]:
    """Checks a cache, and gives what the kernels take of it, by the names of their parameters.

    Raises:
        ValueError: the arguments do not belong together.
    """

    def require(is_so: bool, what: str) -> None:
        if not is_so:
            raise ValueError(f"{op}: {what}")

    require(k_cache.dim() == 4 and v_cache.dim() == 4, "the caches must have 4 dimensions")
    require(k_cache.dtype == v_cache.dtype, "the caches must have one dtype")
    require(k_cache.shape[:3] == v_cache.shape[:3], "the caches must agree in all but the last dimension")
    for cache in (k_cache, v_cache):
        require(cache.shape[3] <= 1 or cache.stride(3) == 1, "the last dimension of the caches must be contiguous")
    rows, _, page_size, _ = k_cache.shape
    is_paged = block_table.dim() == 2
    places, places_of_sequence = batch_index, 1
    if is_paged:
        require(batch_index.numel() == 0, "batch_index goes with a contiguous cache")
        require(block_table.shape[0] == batch, "block_table must have a row for each sequence")
        places, places_of_sequence = block_table, block_table.shape[1]
    elif batch_index.numel() == 0:
        require(batch == 0 or rows == batch, "without batch_index the cache must have a row for each sequence")
    else:
        require(batch_index.shape == (batch,), "batch_index must have batch elements")
    capacity = places_of_sequence * page_size
    require(capacity < _INT32_MAX - 1024, "fewer than 2^31 - 1025 keys a sequence")
    require(lengths.shape == (batch,), "lengths must have batch elements")
    require(lengths.dtype in _INTEGERS, "lengths must be int32 or int64")
    has_places = is_paged or places.numel() > 0
    require(not has_places or places.dtype in _INTEGERS, "block_table and batch_index must be int32 or int64")
    return {
        "K_CACHE": k_cache,
        "V_CACHE": v_cache,
        "k_cache_place_stride": k_cache.stride(0),
        "k_cache_head_stride": k_cache.stride(1),
        "k_cache_row_stride": k_cache.stride(2),
        "v_cache_place_stride": v_cache.stride(0),
        "v_cache_head_stride": v_cache.stride(1),
        "v_cache_row_stride": v_cache.stride(2),
        "LENGTHS": lengths,
        "PLACES": places if has_places else lengths,
        "lengths_stride": lengths.stride(0),
        "places_batch_stride": places.stride(0) if has_places else 0,
        "places_stride": places.stride(1) if is_paged else 0,
        "places_of_sequence": places_of_sequence,
        "n_places": rows,
        "page_size": max(page_size, 1),
        "capacity": capacity,
        "HAS_PLACES": has_places,
    }
