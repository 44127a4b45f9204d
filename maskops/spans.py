"""RowSpans: which keys every query row attends to, and the work lists that kernels run over.

A mask becomes half-open intervals of keys, ``[start, end)``, one or a few per query row. Everything a kernel
needs beyond them (bounds of query tiles, bounds of key tiles, which keys are seen at all) follows from these
intervals and is computed here with plain torch operations: on any device, without a host sync, on meta and fake
tensors and under ``torch.compile(fullgraph=True)``. This is the meaning; a backend's ``build_plan`` is tested to give
the same integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 128
"""Query rows of a work item (at most)."""

KEY_TILE = 64
"""Keys of a key tile."""

_FAR = 2**40
"""Beyond every row and key, and small enough that sums of a few do not overflow int64."""

_INT32_MAX = 2**31 - 1


def tiles_per_batch_element(q_len: int, k_len: int) -> int:
    """Upper bound on the work items of one batch element, from shapes alone.

    For layouts whose rows move monotonically along the keys (all of ``masks`` but ``dense``) it is never exceeded:
    segments of at least a tile make at most ``2 * rows / 128`` items, and of two neighbouring items of short
    segments the rows exceed 128 or the keys exceed 256, which bounds the rest by ``2 * rows / 128 + 2 * keys / 256``
    plus one for each run of short segments. Where it would be exceeded the rows are tiled by a plain grid instead.
    """
    row_tiles = (q_len + TILE_ROWS - 1) // TILE_ROWS
    key_pairs = (2 * k_len + 2 * TILE_ROWS - 1) // (2 * TILE_ROWS)
    bound = 3 * row_tiles + key_pairs + 2
    # sym_min keeps a symbolic length symbolic; a plain min would recompile for each length.
    return torch.sym_min(q_len, bound)  # type: ignore[no-any-return]


class RowSpans(NamedTuple):
    """Spans of keys per query row with the work lists of a kernel; tensors only, all on one device.

    ``allowed(b, h, i, j) == any_s(start[s, b, i] <= j < end[s, b, i]) and key_valid[b, j]`` (and ``dense[b, h, i, j]``
    where ``dense`` is given). ``batch`` is 1 or the batch of q; 1 means the same plan for every batch element.

    A tuple, so that it passes ``torch.compile``, export, checkpointing, DDP and CUDA graphs unchanged.
    """

    start: Tensor
    """int32 (n_spans, batch, q_len). Spans of a row are disjoint and sorted; an empty one has ``end == start``."""
    end: Tensor
    """int32 (n_spans, batch, q_len)."""
    key_valid: Tensor
    """uint8 (batch, k_len): 1 where at least one row of the whole mask sees the key (so never at a hole)."""
    tiles: Tensor
    """int32 (capacity, 4 + 4 * n_spans): batch element, first row, rows, cost, then per span lo, full_lo, full_hi, hi.

    Items cover every row of every batch element exactly once, in row order; unused items (all 0) come last. Over the
    rows of the item that are not empty in the span, lo = min start, full_lo = max start, full_hi = min end,
    hi = max end; all four are 0 if there is no such row. Keys of [full_lo, full_hi) are allowed for every row of the
    item that sees any key at all. That range is empty, and then always full_lo == full_hi == hi, if the bounds cross,
    if it holds a key that ``key_valid`` excludes, if a row is empty in this span but not in another, or with ``dense``.
    ``lo`` of the spans of one item is not sorted by span. cost = sum over rows and spans of end - start (saturated).
    """
    tile_count: Tensor
    """int32 (1,): work items in use."""
    key_tiles: Tensor | None
    """int32 (n_spans, batch, ceil(k_len / KEY_TILE), 4): rows lo, full_lo, full_hi, hi that see the key tile.

    Rows of [full_lo, full_hi) see every key of the tile in this span; it is empty (full_lo == full_hi == hi) where the
    rows that do are not contiguous, and with ``dense``. No row sees the tile: 0, 0, 0, 0. None without ``grad``.
    """
    order: Tensor | None
    """int32 (capacity,): numbers of the items, costliest first, equal ones as they lie, unused ones last.

    In which order a device takes them changes no result. None: processors sort by themselves.
    """
    positions: Tensor | None
    """int32 (3, batch, q_len): key index aligned with the row, first key and ordinal of the row's sequence.

    Rows outside every sequence hold 0, 0, -1. None unless asked for.
    """
    dense: Tensor | None
    """bool (batch|1, heads|1, q_len, k_len): the exact mask where it has holes per row; the spans are then its hull.

    The tensor that ``masks.dense`` was given, where nothing was combined with it: it must not change under a plan.
    """
    dense_bits: Tensor | None
    """int32 (batch|1, heads|1, q_len, ceil(k_len / 32)): ``dense`` as bits, key j in bit j % 32 of word j // 32.

    Bits beyond the keys are 0. What kernels of devices read instead of ``dense``; None where no device needs them.
    """

    @property
    def n_spans(self) -> int:
        """Spans per row."""
        return self.start.shape[0]

    @property
    def batch(self) -> int:
        """Batch elements of the plan: 1, or the batch of q."""
        return self.start.shape[1]

    @property
    def q_len(self) -> int:
        """Query rows."""
        return self.start.shape[2]

    @property
    def k_len(self) -> int:
        """Keys."""
        return self.key_valid.shape[1]

    @property
    def diag(self) -> Tensor:
        """int32 (batch, q_len): key index aligned with each row; distance of key j is ``j - diag``."""
        if self.positions is None:
            raise ValueError("this RowSpans has no positions: build it with mask.spans(..., positions=True)")
        return self.positions[0]

    def cost(self) -> Tensor:
        """Sum of ``end - start`` over rows and spans as an int64 0-dim tensor on the device (no sync)."""
        return (self.end.to(torch.int64) - self.start.to(torch.int64)).sum()

    def as_4d(self) -> Tensor:
        """int32 (batch, n_spans, q_len, 2): start and end in the shape of a 4-D attention mask."""
        return torch.stack((self.start, self.end), dim=-1).transpose(0, 1)

    def to_dense(self) -> Tensor:
        """bool (batch, heads|1, q_len, k_len): True = attend."""
        key = torch.arange(self.k_len, device=self.start.device)
        inside = (key >= self.start.unsqueeze(-1)) & (key < self.end.unsqueeze(-1))
        allowed = (inside.any(0) & (self.key_valid != 0).unsqueeze(1)).unsqueeze(1)
        return allowed if self.dense is None else allowed & self.dense

    def key_tile_visits(self) -> Tensor:
        """int64 (capacity,): key tiles that each work item visits.

        Tiles of KEY_TILE keys are counted from ``lo``; spans of an item that touch or overlap are visited as one.
        An item of ``rows`` rows computes ``visits * KEY_TILE * rows`` scores.
        """
        bounds = self.tiles[:, 4:].reshape(-1, self.n_spans, 4).to(torch.int64)
        low, high = bounds[..., 0], bounds[..., 3]
        low, order = torch.where(high > low, low, _FAR).sort(dim=-1)
        high = torch.where(low == _FAR, low, high.gather(-1, order))
        from_key, to_key = low[:, 0], high[:, 0]
        visits = torch.zeros_like(from_key)
        for span in range(1, self.n_spans):
            apart = low[:, span] > to_key
            visits = visits + torch.where(apart, (to_key - from_key + KEY_TILE - 1) // KEY_TILE, 0)
            from_key = torch.where(apart, low[:, span], from_key)
            to_key = torch.where(apart, high[:, span], torch.maximum(to_key, high[:, span]))
        return visits + (to_key - from_key + KEY_TILE - 1) // KEY_TILE

    def visited_keys(self) -> Tensor:
        """Key-tile visits of the whole work list as an int64 0-dim tensor (see ``key_tile_visits``)."""
        return self.key_tile_visits().sum()


def build_row_spans(
    start: Tensor,
    end: Tensor,
    k_len: int,
    *,
    key_holes: Tensor | None = None,
    dense: Tensor | None = None,
    grad: bool = True,
    order: bool | None = None,
    positions: Tensor | None = None,
    bits: bool | None = None,
) -> RowSpans:
    """Derive a whole RowSpans from the spans themselves.

    Args:
        start: integer (n_spans, batch, q_len); the spans of a row disjoint and sorted, within ``[0, k_len]``.
        end: integer, same shape, ``end >= start``.
        k_len: number of keys.
        key_holes: bool (batch, k_len) or None; True = the key is not there although spans may cover it.
        dense: bool (batch|1, heads|1, q_len, k_len) or None; then the spans must be its hull.
        grad: also build ``key_tiles``, which only backward passes read.
        order: also build ``order``; None: where the device is no processor.
        positions: int32 (3, batch, q_len) or None, stored as it is.
        bits: also build ``dense_bits`` where there is a ``dense``; None: where the device is no processor.
    """
    start, end = start.to(torch.int64), end.to(torch.int64)
    seen = _covered(start, end, k_len) if dense is None else dense.flatten(1, 2).any(1).expand(start.shape[1], k_len)
    if key_holes is not None:
        seen = seen & ~key_holes
    tiles, tile_count = _work_list(start, end, seen, dense is not None)
    return RowSpans(
        start=start.to(torch.int32),
        end=end.to(torch.int32),
        key_valid=seen.to(torch.uint8),
        tiles=tiles,
        tile_count=tile_count,
        key_tiles=transposed_bounds(start, end, seen, dense is not None) if grad else None,
        order=costliest_first(tiles, tile_count) if is_for_devices(start.device, order) else None,
        positions=positions,
        dense=dense,
        dense_bits=None if dense is None or not is_for_devices(start.device, bits) else packed_bits(dense),
    )


def is_for_devices(device: torch.device, wanted: bool | None = None) -> bool:
    """Whether a plan has what only devices read, where that was asked for (None: left to where the plan is)."""
    return device.type not in ("cpu", "meta") if wanted is None else wanted


def packed_bits(dense: Tensor) -> Tensor:
    """``RowSpans.dense_bits`` of a bool tensor (batch|1, heads|1, q_len, k_len)."""
    words = (dense.shape[3] + 31) // 32
    padded = torch.nn.functional.pad(dense, (0, words * 32 - dense.shape[3]))
    place = torch.arange(8, dtype=torch.uint8, device=dense.device)
    eights = padded.unflatten(3, (words * 4, 8)).to(torch.uint8) << place
    # Bytes, so that nothing eight times as large as the mask is ever made; the lowest byte of a word comes first.
    packed: Tensor = eights.sum(4, dtype=torch.uint8).unflatten(3, (words, 4)).view(torch.int32).flatten(3)
    return packed


def hull_of_mask(dense: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """First key and one past the last key of each row that any head of a bool mask allows, one span; 0, 0 if none.

    Args:
        dense: bool (batch|1, heads|1, q_len, k_len).
        batch: batch elements of the plan.

    Returns:
        start and end, int64 (1, batch, q_len).
    """
    _, _, q_len, k_len = dense.shape
    seen = dense.any(1)
    if k_len == 0:
        nothing = torch.zeros(1, batch, q_len, dtype=torch.int64, device=dense.device)
        return nothing, nothing
    key = torch.arange(k_len, device=dense.device)
    end = torch.where(seen, key + 1, 0).amax(-1)
    start = torch.minimum(torch.where(seen, key, k_len).amin(-1), end)
    return start.expand(batch, q_len).unsqueeze(0), end.expand(batch, q_len).unsqueeze(0)


def costliest_first(tiles: Tensor, tile_count: Tensor) -> Tensor:
    """``RowSpans.order`` of a work list."""
    used = torch.arange(tiles.shape[0], device=tiles.device) < tile_count
    return torch.where(used, tiles[:, 3], -1).argsort(descending=True, stable=True).to(torch.int32)


def _covered(start: Tensor, end: Tensor, k_len: int) -> Tensor:
    """bool (batch, k_len): keys inside at least one span, by a difference array."""
    n_spans, batch, q_len = start.shape
    live = (end > start).to(torch.int64)
    steps = torch.zeros(batch, k_len + 1, dtype=torch.int64, device=start.device)
    by_batch = (1, 0, 2)
    flat = (batch, n_spans * q_len)
    live = live.permute(by_batch).reshape(flat)
    steps = steps.scatter_add(1, start.permute(by_batch).reshape(flat), live)
    steps = steps.scatter_add(1, end.permute(by_batch).reshape(flat), -live)
    return steps.cumsum(1)[:, :k_len] > 0


def _levels(count: int) -> int:
    """Smallest n with 2**n > count (a loop, because a symbolic int has no bit_length)."""
    level = 0
    while (1 << level) <= count:
        level += 1
    return level


def _shift_left(values: Tensor, by: int, fill: int) -> Tensor:
    """``values`` moved ``by`` places towards index 0 along the last dimension."""
    return torch.nn.functional.pad(values[..., by:], (0, min(by, values.shape[-1])), value=fill)


def _item_starts(first: Tensor, last: Tensor, seeing: Tensor, capacity: int) -> Tensor:
    """bool (batch, q_len): rows at which a work item begins.

    Args:
        first: int64 (batch, q_len), first key of the row's hull, where it is not empty.
        last: int64 (batch, q_len), one past its last key.
        seeing: bool (batch, q_len), rows with a non-empty hull.
        capacity: items allowed for one batch element.
    """
    batch, q_len = first.shape
    if q_len == 1:  # a step of generation, which should not pay for the search below
        return torch.ones_like(seeing)
    row = torch.arange(q_len, device=first.device).expand(batch, q_len)

    # Segments: runs of rows whose hulls overlap from one non-empty row to the next.
    latest = torch.where(seeing, row, -1).cummax(1).values
    previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    at = previous.clamp(min=0)
    overlaps = (first < last.gather(1, at)) & (first.gather(1, at) < last)
    segment = (seeing & (previous >= 0) & ~overlaps).to(torch.int64).cumsum(1)

    # One slot per possible segment plus sentinels of no rows, which nothing may join.
    slots = (batch, q_len + 1)
    first_row = row.new_full(slots, q_len).scatter_reduce(1, segment, row, "amin")
    low = row.new_full(slots, _FAR).scatter_reduce(1, segment, torch.where(seeing, first, _FAR), "amin")
    high = row.new_full(slots, 0).scatter_reduce(1, segment, torch.where(seeing, last, 0), "amax")
    next_row = _shift_left(first_row, 1, q_len)
    long = next_row - first_row >= TILE_ROWS
    closed = long | (next_row == first_row)

    # Greedy: how many whole segments share the item that begins with segment s. Extending it only ever adds rows and
    # keys, so the longest extension is found by binary descent over ranges of 2**k segments.
    range_low, range_high = [torch.where(closed, -_FAR, low)], [high]
    levels = _levels(TILE_ROWS - 1)
    for level in range(1, levels):
        half = 1 << (level - 1)
        range_low.append(torch.minimum(range_low[-1], _shift_left(range_low[-1], half, -_FAR)))
        range_high.append(torch.maximum(range_high[-1], _shift_left(range_high[-1], half, 0)))
    stop = torch.arange(1, q_len + 2, device=first.device).expand(slots).clamp(max=q_len)
    for level in reversed(range(levels)):
        after = (stop + (1 << level)).clamp(max=q_len)
        new_low = torch.minimum(low, range_low[level].gather(1, stop))
        new_high = torch.maximum(high, range_high[level].gather(1, stop))
        fits = (first_row.gather(1, after) - first_row <= TILE_ROWS) & (new_high - new_low <= 2 * TILE_ROWS)
        stop = torch.where(fits, after, stop)
        low, high = torch.where(fits, new_low, low), torch.where(fits, new_high, high)

    # From the first row of an item to the first row of the next; then every row reachable from row 0.
    stop_row = torch.where(long, next_row, first_row.gather(1, stop)).gather(1, segment)
    jump = torch.where(long.gather(1, segment), torch.minimum(row + TILE_ROWS, stop_row), stop_row)
    jump = torch.nn.functional.pad(jump, (0, 1), value=q_len)
    reached = (torch.arange(q_len + 1, device=first.device) == 0).to(torch.int64).expand(slots)
    for _ in range(_levels(capacity)):
        reached = reached.scatter_reduce(1, jump, reached, "amax")
        jump = jump.gather(1, jump)
    begins = reached[:, :q_len] > 0

    grid = (row % TILE_ROWS) == 0
    return torch.where(begins.sum(1, keepdim=True) > capacity, grid, begins)


def _work_list(start: Tensor, end: Tensor, seen: Tensor, is_dense: bool) -> tuple[Tensor, Tensor]:
    """The query tiles and their count (see ``RowSpans.tiles``); ``start`` and ``end`` int64."""
    n_spans, batch, q_len = start.shape
    k_len = seen.shape[1]
    per_batch = tiles_per_batch_element(q_len, k_len)
    capacity = batch * per_batch
    if batch == 0 or q_len == 0:
        return (
            torch.zeros(capacity, 4 + 4 * n_spans, dtype=torch.int32, device=start.device),
            torch.zeros(1, dtype=torch.int32, device=start.device),
        )
    live = end > start
    seeing = live.any(0)
    first = torch.where(live, start, _FAR).amin(0)
    last = torch.where(live, end, 0).amax(0)
    begins = _item_starts(first, last, seeing, per_batch)

    # Every row knows its item; items are numbered over the whole batch.
    item = begins.flatten().to(torch.int64).cumsum(0) - 1
    count = begins.sum()
    row = torch.arange(q_len, device=start.device).expand(batch, q_len).flatten()
    element = torch.arange(batch, device=start.device).unsqueeze(1).expand(batch, q_len).flatten()

    def over_rows(values: Tensor, start_value: int, how: str) -> Tensor:
        if q_len == 1:
            return values.flatten()  # each row is an item
        return row.new_full((capacity,), start_value).scatter_reduce(0, item, values.flatten(), how)

    columns = [
        over_rows(element, 0, "amax"),
        over_rows(row, _FAR, "amin"),
        over_rows(torch.ones_like(row), 0, "sum"),
        over_rows((end - start).sum(0), 0, "sum").clamp(max=_INT32_MAX),
    ]
    seen_before = torch.nn.functional.pad(seen.to(torch.int64).cumsum(1), (1, 0)).flatten()
    seen_base = columns[0] * (k_len + 1)
    for span in range(n_spans):
        begin, stop, is_live = start[span], end[span], live[span]
        low = over_rows(torch.where(is_live, begin, _FAR), _FAR, "amin")
        full_low = over_rows(torch.where(is_live, begin, 0), 0, "amax")
        full_high = over_rows(torch.where(is_live, stop, _FAR), _FAR, "amin")
        high = over_rows(torch.where(is_live, stop, 0), 0, "amax")
        mixed = over_rows((seeing & ~is_live).to(torch.int64), 0, "amax") > 0
        at_low, at_high = (seen_base + x.clamp(max=k_len) for x in (full_low, full_high))
        holed = seen_before[at_high] - seen_before[at_low] != full_high - full_low
        partial = mixed | holed | (full_high <= full_low)
        if is_dense:
            partial = torch.ones_like(partial)
        full_low, full_high = torch.where(partial, high, full_low), torch.where(partial, high, full_high)
        columns += [torch.where(high > 0, column, 0) for column in (low, full_low, full_high, high)]
    used = torch.arange(capacity, device=start.device) < count
    tiles = torch.where(used.unsqueeze(1), torch.stack(columns, 1), 0)
    return tiles.to(torch.int32), count.to(torch.int32).reshape(1)


def _hull_of_rows(from_tile: Tensor, to_tile: Tensor, live: Tensor, n_tiles: int) -> tuple[Tensor, Tensor]:
    """First row and one past the last row that cover each key tile, for rows that each cover a range of tiles.

    A range of tiles is two overlapping ranges of a power of two: rows are scattered into a sparse table with min and
    max, and the table is pushed down level by level. O((rows + tiles) log tiles), no sync.

    Args:
        from_tile: int64 (n_spans, batch, q_len), first tile of the row.
        to_tile: int64, last tile (inclusive).
        live: bool, rows that count.
        n_tiles: number of key tiles, at least 1.
    """
    n_spans, batch, q_len = from_tile.shape
    row = torch.arange(q_len, device=from_tile.device).expand_as(from_tile)
    length = to_tile - from_tile + 1
    levels = _levels(n_tiles)
    level = torch.zeros_like(length)
    for exponent in range(1, levels):
        level = level + (length >= (1 << exponent))
    width = n_tiles + 1
    table = (n_spans, batch, levels * width)
    lowest = row.new_full(table, q_len)
    highest = row.new_full(table, -1)
    for place in (from_tile, to_tile + 1 - (1 << level)):
        index = torch.where(live, level * width + place, n_tiles)
        lowest = lowest.scatter_reduce(2, index, row, "amin")
        highest = highest.scatter_reduce(2, index, row, "amax")
    lowest = lowest.view(n_spans, batch, levels, width)[..., :n_tiles]
    highest = highest.view(n_spans, batch, levels, width)[..., :n_tiles]
    low, high = lowest[:, :, levels - 1], highest[:, :, levels - 1]
    for exponent in range(levels - 1, 0, -1):
        half = 1 << (exponent - 1)
        shifted_low = torch.nn.functional.pad(low, (half, 0), value=q_len)[..., :n_tiles]
        shifted_high = torch.nn.functional.pad(high, (half, 0), value=-1)[..., :n_tiles]
        low = torch.minimum(lowest[:, :, exponent - 1], torch.minimum(low, shifted_low))
        high = torch.maximum(highest[:, :, exponent - 1], torch.maximum(high, shifted_high))
    return low, high + 1


def transposed_bounds(start: Tensor, end: Tensor, seen: Tensor, is_dense: bool) -> Tensor:
    """Rows that see each key tile (see ``RowSpans.key_tiles``); ``start`` and ``end`` int64."""
    n_spans, batch, q_len = start.shape
    k_len = seen.shape[1]
    n_tiles = (k_len + KEY_TILE - 1) // KEY_TILE
    if batch == 0 or q_len == 0 or k_len == 0:
        return torch.zeros(n_spans, batch, n_tiles, 4, dtype=torch.int32, device=start.device)
    live = end > start
    low, high = _hull_of_rows(start // KEY_TILE, (end - 1) // KEY_TILE, live, n_tiles)

    # A span that reaches the last key covers the ragged last tile.
    full_from = (start + KEY_TILE - 1) // KEY_TILE
    full_stop = torch.where(end >= k_len, n_tiles, end // KEY_TILE)
    covers = live & (full_stop > full_from)
    full_low, full_high = _hull_of_rows(full_from, full_stop - 1, covers, n_tiles)
    one = covers.to(torch.int64)
    steps = torch.zeros(n_spans, batch, n_tiles + 1, dtype=torch.int64, device=start.device)
    steps = steps.scatter_add(2, torch.where(covers, full_from, 0), one)
    steps = steps.scatter_add(2, torch.where(covers, full_stop, 0), -one)
    rows_that_cover = steps.cumsum(2)[..., :n_tiles]

    padded = torch.nn.functional.pad(seen, (0, n_tiles * KEY_TILE - k_len), value=True)
    whole = padded.view(batch, n_tiles, KEY_TILE).all(2)
    accepted = (rows_that_cover > 0) & (rows_that_cover == full_high - full_low) & whole
    if is_dense:
        accepted = torch.zeros_like(accepted)
    high = torch.where(high > low, high, 0)
    low = torch.where(high > 0, low, 0)
    full_low = torch.where(accepted, full_low, high)
    full_high = torch.where(accepted, full_high, high)
    return torch.stack((low, full_low, full_high, high), dim=-1).to(torch.int32)
