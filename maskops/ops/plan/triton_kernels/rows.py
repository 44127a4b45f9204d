"""The first launch of a plan: spans of all rows, and what the second launch has to know of every block of them.

A program owns OWN rows of one batch element and evaluates a window of OWN + 128, because the item of work that begins
at a row depends on the 128 rows behind it. It writes

- the spans, and positions where they are wanted;
- ``chain``: for each row the row at which the next item begins if one begins here, and, following that to the end of
  the block, the row of the next block at which it arrives and how many items it takes. The second launch knows with one
  look a block where the items of every block begin;
- ``runs``: rows that cover the same keys but for the same borders, as one: all that key_valid and the bounds of key
  tiles are made of; ``summary``: what all runs of a block have in common, so that most blocks are answered at a glance;

Further programs have a block of keys each, where masks leave some out, and write ``holes``: how many of those lie
before each key of the block.

No scan but a sum is used: "the latest before" is a count, a list and a look into it.
"""

import triton
import triton.language as tl

from maskops.ops.plan.triton_kernels.sequences import FAR, hull_of_mask, number, sequences, spans
from maskops.spans import KEY_TILE, TILE_ROWS

ROWS = tl.constexpr(TILE_ROWS)
KEYS = tl.constexpr(KEY_TILE)
LEVELS = tl.constexpr(TILE_ROWS.bit_length())
"""Ranges of 1, 2, 4, ..., 128 rows."""

SUMMARY = tl.constexpr(8)
"""int32 of the summary of a block: runs, least and greatest start, least and greatest end, live rows, rows."""

ROW_SCRATCH = tl.constexpr(4 + 2 * TILE_ROWS.bit_length())
"""int32 of scratch that a program takes for each row of its window."""


@triton.jit
def _hull(starts, ends):
    """First key and one past the last key of all spans of a row; FAR and 0 where it sees nothing."""
    first = tl.where(ends[0] > starts[0], starts[0], FAR)
    last = tl.where(ends[0] > starts[0], ends[0], 0)
    for span in tl.static_range(1, len(starts)):
        first = tl.minimum(first, tl.where(ends[span] > starts[span], starts[span], FAR))
        last = tl.maximum(last, tl.where(ends[span] > starts[span], ends[span], 0))
    return first, last


@triton.jit
def _class(key):
    """Keys of one class lie in the same tile and are all at its border, or none is."""
    return 2 * (key // KEYS) + (key % KEYS != 0).to(tl.int32)


@triton.jit
def _continues(start, end, next_start, next_end, k_len):
    """Whether a row covers the same tiles as the row before it, and the two together no key that neither does."""
    same = (_class(start) == _class(next_start)) & (_class(end) == _class(next_end))
    rises = (next_start >= start) & (next_end >= end) & (next_start <= end)
    return same & rises & ((end >= k_len) == (next_end >= k_len)) & (end > start) & (next_end > next_start)


@triton.jit
def _write_runs(start, end, plane, b, block, first_row, runs, run_plane, summary, batch, q_len, k_len, row_blocks,
                span, OWN: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Runs of rows of one span, and their summary."""
    lane = tl.arange(0, W)
    row = first_row + lane
    own = (lane < OWN) & (row < q_len)
    here = start + plane + row
    there = end + plane + row
    begin = tl.load(here, mask=own, other=0)
    stop = tl.load(there, mask=own, other=0)
    is_after = own & (lane > 0)
    is_before = own & (lane < OWN - 1) & (row < q_len - 1)
    begin_before = tl.load(here - 1, mask=is_after, other=0)
    stop_before = tl.load(there - 1, mask=is_after, other=0)
    begin_behind = tl.load(here + 1, mask=is_before, other=0)
    stop_behind = tl.load(there + 1, mask=is_before, other=0)
    live = own & (stop > begin)
    is_first = live & ~(is_after & _continues(begin_before, stop_before, begin, stop, k_len))
    is_last = live & ~(is_before & _continues(begin, stop, begin_behind, stop_behind, k_len))
    slot = tl.cumsum(is_first.to(tl.int32)) - 1
    place = runs + (span * batch + b).to(tl.int64) * (row_blocks * OWN) + first_row + slot
    tl.store(place, row, mask=is_first)
    tl.store(place + run_plane, row + 1, mask=is_last)
    tl.store(place + 2 * run_plane, begin, mask=is_first)
    tl.store(place + 3 * run_plane, stop, mask=is_last)
    out = summary + ((span * batch + b).to(tl.int64) * row_blocks + block) * SUMMARY
    tl.store(out, tl.sum(is_first.to(tl.int32)))
    tl.store(out + 1, tl.min(tl.where(live, begin, FAR)))
    tl.store(out + 2, tl.max(tl.where(live, begin, 0)))
    tl.store(out + 3, tl.min(tl.where(live, stop, FAR)))
    tl.store(out + 4, tl.max(tl.where(live, stop, 0)))
    tl.store(out + 5, tl.sum(live.to(tl.int32)))
    tl.store(out + 6, tl.sum(own.to(tl.int32)))


@triton.jit
def _next_items(first, last, boundary, row, first_row, scratch, W: tl.constexpr):
    """Where the item after the one that begins at each row begins (see ``spans._item_starts``).

    Args:
        first: first key of the hull of each row, FAR where it is empty.
        last: one past its last key, 0 where it is empty.
        boundary: rows at which a segment begins, and the end of the rows.
        row: rows of the window.
        first_row: the first of them.
        scratch: room for ROW_SCRATCH * W int32, free from 2 * W on.
        W: rows of the window; the results hold for rows with 128 behind them.
    """
    lane = tl.arange(0, W)
    # For every row the number of boundaries up to it, and their list: the nearest before and behind are looked up.
    bounds = scratch + 2 * W
    numbers = scratch + 3 * W
    count = tl.cumsum(boundary.to(tl.int32))
    in_window = tl.sum(boundary.to(tl.int32))
    tl.store(bounds + count - 1, row, mask=boundary)
    tl.store(numbers + lane, count)

    # Hulls of 2**level rows, by which the longest range of rows with few keys is found in binary steps.
    lows = scratch + 4 * W
    highs = lows + LEVELS * W
    low = first
    high = last
    tl.store(lows + lane, low)
    tl.store(highs + lane, high)
    for level in tl.static_range(1, LEVELS):
        tl.debug_barrier()
        behind = lane + (1 << (level - 1))
        low = tl.minimum(low, tl.load(lows + (level - 1) * W + behind, mask=behind < W, other=FAR))
        high = tl.maximum(high, tl.load(highs + (level - 1) * W + behind, mask=behind < W, other=0))
        tl.store(lows + level * W + lane, low)
        tl.store(highs + level * W + lane, high)
    tl.debug_barrier()
    stop = lane
    low = row * 0 + FAR
    high = row * 0
    for down in tl.static_range(LEVELS):
        known = stop < W
        at = (LEVELS - 1 - down) * W + stop
        new_low = tl.minimum(low, tl.load(lows + at, mask=known, other=FAR))
        new_high = tl.maximum(high, tl.load(highs + at, mask=known, other=0))
        further = stop + (ROWS >> down)
        fits = known & (further - lane <= ROWS) & (new_high - new_low <= 2 * ROWS)
        stop = tl.where(fits, further, stop)
        low = tl.where(fits, new_low, low)
        high = tl.where(fits, new_high, high)

    next_boundary = tl.load(bounds + count, mask=count < in_window, other=FAR)
    before = tl.load(numbers + tl.minimum(stop, W - 1))
    latest = tl.load(bounds + before - 1, mask=before > 0, other=0)
    is_long = next_boundary - row >= ROWS
    shared = tl.maximum(latest, next_boundary)
    return tl.where(is_long, row + ROWS, tl.where(boundary, shared, next_boundary))


@triton.jit
def _follow(jump, chain, chain_plane, at, row, first_row, stop_row, own):
    """From each row of a block to the end of the block along the items, two, four, eight at a time."""
    arrives = jump
    items = tl.where(own, 1, 0)
    tl.store(chain + at + row, jump, mask=own)
    tl.store(chain + chain_plane + at + row, arrives, mask=own)
    tl.store(chain + 2 * chain_plane + at + row, items, mask=own)
    tl.debug_barrier()
    goes_on = own & (arrives < stop_row)
    while tl.max(goes_on.to(tl.int32)) > 0:
        further = tl.load(chain + chain_plane + at + arrives, mask=goes_on, other=0)
        more = tl.load(chain + 2 * chain_plane + at + arrives, mask=goes_on, other=0)
        tl.debug_barrier()
        arrives = tl.where(goes_on, further, arrives)
        items += more
        tl.store(chain + chain_plane + at + row, arrives, mask=own)
        tl.store(chain + 2 * chain_plane + at + row, items, mask=own)
        tl.debug_barrier()
        goes_on = own & (arrives < stop_row)


@triton.jit
def _write_holes(operands, sizes, holes, b, block, k_len, key_blocks, MASKS: tl.constexpr, KEY_BLOCK: tl.constexpr):
    """Of the keys that masks leave out, how many lie before each key of a block, and how many in the block."""
    key = block * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    hole = tl.zeros((KEY_BLOCK,), tl.int32)
    for i in tl.static_range(len(MASKS)):
        size = number(sizes[MASKS[i]])
        base = tl.minimum(b, size - 1).to(tl.int64) * k_len
        bits = tl.load(operands[MASKS[i]] + base + key, mask=key < k_len, other=1)
        hole = tl.maximum(hole, (bits == 0).to(tl.int32))
    up_to = tl.cumsum(hole)
    out = holes + (b.to(tl.int64) * key_blocks + block) * (KEY_BLOCK + 1)
    tl.store(out + tl.arange(0, KEY_BLOCK), up_to - hole)
    tl.store(out + KEY_BLOCK, tl.sum(hole))


@triton.jit(do_not_specialize=["batch", "q_len", "k_len", "row_blocks", "key_blocks"])
def plan_rows(
    operand0, operand1, operand2, operand3, operand4, operand5, sizes, values,
    start, end, positions, chain, runs, summary, holes, window, counter,
    batch, q_len, k_len, row_blocks, key_blocks,
    LAYOUTS: tl.constexpr, MASKS: tl.constexpr, STEPS: tl.constexpr, N_SPANS: tl.constexpr, ORDINALS: tl.constexpr,
    POSITIONS: tl.constexpr, OWN: tl.constexpr, W: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Spans and block summaries; see the module."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(counter, 0)
    operands = (operand0, operand1, operand2, operand3, operand4, operand5)
    if len(MASKS) > 0:
        of_keys = program - batch * row_blocks
        if of_keys >= 0:
            _write_holes(
                operands, sizes, holes, of_keys // key_blocks, of_keys % key_blocks, k_len, key_blocks, MASKS, KEY_BLOCK
            )
            return
    b = program // row_blocks
    block = program % row_blocks
    scratch = window + program.to(tl.int64) * (ROW_SCRATCH * W)
    first_row = block * OWN
    lane = tl.arange(0, W)
    row = first_row + lane
    own = (lane < OWN) & (row < q_len)
    plane = batch.to(tl.int64) * q_len
    at = b.to(tl.int64) * q_len

    hulls = ()
    for i in tl.static_range(len(MASKS)):
        size = number(sizes[MASKS[i]])
        hulls = hulls + (hull_of_mask(operands[MASKS[i]], size, b, k_len, max(W, KEY_BLOCK)),)
    inside, sees, k_start, k_end, diag, ordinal = sequences(
        LAYOUTS, operands, sizes, values, hulls, b, row, first_row, q_len, k_len, scratch, ORDINALS, W
    )
    starts, ends = spans(STEPS, N_SPANS, operands, sizes, values, sees, k_start, k_end, diag, ordinal, q_len, k_len)
    for span in tl.static_range(N_SPANS):
        tl.store(start + span * plane + at + row, starts[span], mask=own)
        tl.store(end + span * plane + at + row, ends[span], mask=own)
    if POSITIONS:
        tl.store(positions + at + row, diag, mask=own)
        tl.store(positions + plane + at + row, k_start, mask=own)
        tl.store(positions + 2 * plane + at + row, tl.where(inside, ordinal, -1), mask=own)

    # The nearest row before the window that sees anything, by looking at windows further and further up.
    first, last = _hull(starts, ends)
    above_first = q_len * 0 + FAR
    above_last = q_len * 0
    above = first_row
    while (above_last == 0) & (above > 0):
        above -= W
        rows_above = above + lane
        _, sees_above, k_start_above, k_end_above, diag_above, ordinal_above = sequences(
            LAYOUTS, operands, sizes, values, hulls, b, rows_above, above, q_len, k_len, scratch, ORDINALS, W
        )
        starts_above, ends_above = spans(
            STEPS, N_SPANS, operands, sizes, values, sees_above, k_start_above, k_end_above, diag_above, ordinal_above,
            q_len, k_len,
        )  # fmt: skip
        firsts, lasts = _hull(starts_above, ends_above)
        nearest = tl.max(tl.where(lasts > 0, rows_above, -1))
        above_first = tl.min(tl.where((rows_above == nearest) & (lasts > 0), firsts, FAR))
        above_last = tl.max(tl.where(rows_above == nearest, lasts, 0))

    # Segments: runs of rows whose hulls overlap from one that sees anything to the next.
    seeing = last > 0
    count = tl.cumsum(seeing.to(tl.int32))
    tl.store(scratch + count - 1, first, mask=seeing)
    tl.store(scratch + W + count - 1, last, mask=seeing)
    tl.debug_barrier()
    earlier = count - seeing.to(tl.int32)
    first_before = tl.load(scratch + earlier - 1, mask=earlier > 0, other=0)
    last_before = tl.load(scratch + W + earlier - 1, mask=earlier > 0, other=0)
    first_before = tl.where(earlier > 0, first_before, above_first)
    last_before = tl.where(earlier > 0, last_before, above_last)
    overlaps = (first < last_before) & (first_before < last)
    boundary = (row == 0) | (row == q_len) | (seeing & (last_before > 0) & ~overlaps)
    jump = _next_items(first, last, boundary, row, first_row, scratch, W)
    jump = tl.minimum(jump, q_len)
    stop_row = tl.minimum(first_row + OWN, q_len)
    _follow(jump, chain, plane, at, row, first_row, stop_row, own)

    run_plane = (N_SPANS * batch).to(tl.int64) * row_blocks * OWN
    for span in tl.static_range(N_SPANS):
        _write_runs(
            start, end, span * plane + at, b, block, first_row, runs, run_plane, summary, batch, q_len, k_len,
            row_blocks, span, OWN, W,
        )  # fmt: skip
