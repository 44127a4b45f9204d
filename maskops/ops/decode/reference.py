"""The meaning of the key/value cache, in plain PyTorch: where its keys lie, and how new ones come in.

A contiguous cache is (cache_batch, kv_heads, capacity, width), and row b of the batch has the row batch_index[b] of it
(or b). A paged one is (pages, kv_heads, page_size, width), and key j of row b is key j % page_size of the page
block_table[b, j // page_size].
"""

from __future__ import annotations

import torch
from torch import Tensor


def places(
    cache: Tensor, positions: Tensor, block_table: Tensor | None, batch_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row or page of the cache and index of the key in it, for positions (B, n) of the sequences."""
    if block_table is None:
        batch = positions.shape[0]
        rows = torch.arange(batch, device=positions.device) if batch_index is None else batch_index.long()
        return rows[:, None], positions
    page_size = cache.shape[2]
    return block_table.long().gather(1, positions // page_size), positions % page_size


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    batch_index: Tensor | None,
) -> None:
    """Writes k and v (B, kv_heads, new, width) behind the first ``lengths`` keys of each sequence, in place."""
    new = k.shape[2]
    if new == 0 or k.shape[0] == 0:
        return
    positions = lengths.long()[:, None] + torch.arange(new, device=k.device)
    where = places(k_cache, positions, block_table, batch_index)
    for cache, source in ((k_cache, k), (v_cache, v)):
        cache.transpose(1, 2).index_put_(where, source.transpose(1, 2))


def gathered(cache: Tensor, block_table: Tensor | None, batch_index: Tensor | None) -> Tensor:
    """The cache of each row of the batch, (B, kv_heads, capacity, width). A page that is none is read as page 0."""
    if block_table is None:
        return cache if batch_index is None else cache.index_select(0, batch_index.long())
    batch, pages = block_table.shape
    _, heads, page_size, width = cache.shape
    if cache.shape[0] == 0 or pages == 0:
        return cache.new_zeros(batch, heads, pages * page_size, width)
    table = block_table.long()
    table = torch.where((table >= 0) & (table < cache.shape[0]), table, 0)
    parts = cache.index_select(0, table.flatten()).view(batch, pages, heads, page_size, width)
    return parts.transpose(1, 2).reshape(batch, heads, pages * page_size, width)


def check_filled(
    lengths: Tensor, leftpad: Tensor | None, block_table: Tensor | None, batch_index: Tensor | None, cache: Tensor
) -> None:
    """Raises ValueError for the first value that describes no cache. The C++ op makes the same checks."""
    capacity = cache.shape[2] if block_table is None else cache.shape[2] * block_table.shape[1]
    _check_index(batch_index, cache)
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"lengths[{b}]={length}: expected 0 to {capacity}, the keys that a sequence can hold")
        if leftpad is not None and int(leftpad[b]) < 0:
            raise ValueError(f"leftpad[{b}]={int(leftpad[b])}: expected 0 or more keys")
        _check_pages(block_table, b, 0, length, cache)


def check_append(
    lengths: Tensor, new: int, block_table: Tensor | None, batch_index: Tensor | None, cache: Tensor
) -> None:
    """Raises ValueError where appending would leave the cache or write a place twice. The C++ op does the same."""
    capacity = cache.shape[2] if block_table is None else cache.shape[2] * block_table.shape[1]
    _check_index(batch_index, cache)
    owners: dict[tuple[int, int], int] = {}
    for b, length in enumerate(lengths.tolist()):
        if length < 0:
            raise ValueError(f"lengths[{b}]={length}: expected 0 or more keys")
        if length + new > capacity:
            raise ValueError(
                f"lengths[{b}]={length}: appending {new} keys exceeds the {capacity} that a sequence can hold; "
                f"nothing was written"
            )
        if new == 0:
            continue
        _check_pages(block_table, b, length, length + new, cache)
        page_size = max(cache.shape[2], 1)
        for position in range(length, length + new):
            if block_table is None:
                place = (b if batch_index is None else int(batch_index[b]), position)
            else:
                place = (int(block_table[b, position // page_size]), position % page_size)
            if place in owners:
                part = "page" if block_table is not None else "row"
                raise ValueError(
                    f"rows {owners[place]} and {b} of the batch both append to key {place[1]} of {part} {place[0]} of "
                    f"the cache; nothing was written"
                )
            owners[place] = b


def _check_index(batch_index: Tensor | None, cache: Tensor) -> None:
    for b, row in enumerate([] if batch_index is None else batch_index.tolist()):
        if not 0 <= row < cache.shape[0]:
            raise ValueError(f"batch_index[{b}]={row}: expected 0 to {cache.shape[0] - 1}, a row of the cache")


def _check_pages(block_table: Tensor | None, b: int, begin: int, end: int, cache: Tensor) -> None:
    """The pages that hold keys [begin, end) of sequence b; others are never looked at."""
    if block_table is None or begin >= end:
        return
    page_size = cache.shape[2]
    for index in range(begin // page_size, (end - 1) // page_size + 1):
        page = int(block_table[b, index])
        if not 0 <= page < cache.shape[0]:
            raise ValueError(
                f"block_table[{b}, {index}]={page}: expected 0 to {cache.shape[0] - 1}, a page of the cache, for key "
                f"{max(begin, index * page_size)} of the sequence"
            )
