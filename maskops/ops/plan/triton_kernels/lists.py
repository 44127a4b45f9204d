"""The second launch of a plan: the work list, its order, the seen keys and the bounds of key tiles.

The first programs have a block of rows each: every one of them follows the items of all batch elements from block to
block (one look a block, from what the first launch found), so that it knows the number and the first row of its own
items without waiting for another, and writes them. The last to finish sorts them by cost. The others have a block of
keys each.
"""

import triton
import triton.language as tl

from maskops.ops.plan.triton_kernels.rows import KEYS, ROWS, SUMMARY
from maskops.ops.plan.triton_kernels.sequences import FAR, number

ELEMENTS = tl.constexpr(128)
"""Batch elements whose items are followed at once."""

ITEMS = tl.constexpr(16)
"""Items whose bounds are taken at once."""

RUNS = tl.constexpr(32)
"""Runs of rows that are held against a block of keys at once."""

BITS = tl.constexpr(4)
"""Bits of the cost by which one pass sorts."""

DIGITS = tl.constexpr(16)
"""Values of so many bits."""

SORTED = tl.constexpr(512)
"""Items that a pass places at once."""

LIST_SCRATCH = tl.constexpr(4)
"""int32 of scratch that a program takes for each row of its block."""


@triton.jit
def _follow_blocks(chain, chain_plane, b, block, batch, q_len, row_blocks, per_batch, OWN: tl.constexpr):
    """Where the items of a block begin and how they are numbered.

    Returns:
        the row of the block at which an item begins first, items of the whole batch before that one, whether this batch
        element falls back to a plain grid, items of the whole batch.
    """
    entry = q_len * 0
    of_elements = q_len * 0
    of_blocks = q_len * 0
    total = q_len * 0
    is_grid = q_len * 0
    in_grid = (q_len + ROWS - 1) // ROWS
    for from_element in range(0, batch, ELEMENTS):
        element = from_element + tl.arange(0, ELEMENTS)
        at = element.to(tl.int64) * q_len
        mine = element == b
        row = element * 0
        items = element * 0
        for number_of_block in range(row_blocks):
            is_here = mine & (number_of_block == block)
            entry += tl.sum(tl.where(is_here, row, 0))
            of_blocks += tl.sum(tl.where(is_here, items, 0))
            goes_on = (element < batch) & (row < q_len)
            items += tl.load(chain + 2 * chain_plane + at + row, mask=goes_on, other=0)
            row = tl.load(chain + chain_plane + at + row, mask=goes_on, other=FAR)
        too_many = items > per_batch
        is_grid += tl.sum(tl.where(mine & too_many, 1, 0))
        items = tl.where(too_many, in_grid, items)
        of_elements += tl.sum(tl.where(element < b, items, 0))
        total += tl.sum(items)
    of_blocks = tl.where(is_grid > 0, (block * OWN + ROWS - 1) // ROWS, of_blocks)
    return entry, of_elements + of_blocks, is_grid > 0, total


@triton.jit
def _list_items(chain, at, entry, is_grid, block, q_len, scratch, OWN: tl.constexpr, W: tl.constexpr):
    """Lists first rows and ends of the items that begin in a block; returns how many there are."""
    lane = tl.arange(0, W)
    first_row = block * OWN
    row = first_row + lane
    own = (lane < OWN) & (row < q_len)
    jump = tl.load(chain + at + row, mask=own, other=0)
    begins = own & (row == entry)
    if is_grid:
        jump = tl.minimum(row + ROWS, q_len)
        begins = own & (row % ROWS == 0)
    else:
        # Rows that are reached after 1, 2, 4, ... items.
        reached = scratch
        jumps = scratch + W
        far = jump
        stop_row = tl.minimum(first_row + OWN, q_len)
        tl.store(reached + lane, begins.to(tl.int32))
        tl.store(jumps + lane, far)
        tl.debug_barrier()
        goes_on = own & (far < stop_row)
        while tl.max(goes_on.to(tl.int32)) > 0:
            is_reached = tl.load(reached + lane) != 0
            further = tl.load(jumps + far - first_row, mask=goes_on, other=FAR)
            tl.debug_barrier()
            tl.store(reached + far - first_row, is_reached.to(tl.int32), mask=goes_on & is_reached)
            far = further
            tl.store(jumps + lane, far)
            tl.debug_barrier()
            goes_on = own & (far < stop_row)
        begins = own & (tl.load(reached + lane) != 0)
    slot = tl.cumsum(begins.to(tl.int32)) - 1
    tl.store(scratch + 2 * W + slot, row, mask=begins)
    tl.store(scratch + 3 * W + slot, jump, mask=begins)
    tl.debug_barrier()
    return tl.sum(begins.to(tl.int32))


@triton.jit
def _holes_before(holes, b, key, key_blocks, KEY_BLOCK: tl.constexpr):
    """How many keys before each of some the masks leave out."""
    block = key // KEY_BLOCK
    of_blocks = key * 0
    base = holes + b.to(tl.int64) * key_blocks * (KEY_BLOCK + 1)
    for other in range(key_blocks):
        in_block = tl.load(base + other * (KEY_BLOCK + 1) + KEY_BLOCK)
        of_blocks += tl.where(block > other, in_block, 0)
    at = block.to(tl.int64) * (KEY_BLOCK + 1) + key % KEY_BLOCK
    return of_blocks + tl.load(base + at, mask=block < key_blocks, other=0)


@triton.jit
def _write_items(
    start, end, tiles, holes, scratch, b, at, base, count, batch, q_len, key_blocks,
    N_SPANS: tl.constexpr, HAS_HOLES: tl.constexpr, KEY_BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Bounds and costs of the items of a block."""
    plane = batch.to(tl.int64) * q_len
    for from_item in range(0, count, ITEMS):
        item = from_item + tl.arange(0, ITEMS)
        used = item < count
        first_row = tl.load(scratch + 2 * W + item, mask=used, other=0)
        stop_row = tl.load(scratch + 3 * W + item, mask=used, other=0)
        row = first_row[:, None] + tl.arange(0, ROWS)[None, :]
        known = row < stop_row[:, None]
        out = tiles + (base + item).to(tl.int64) * (4 + 4 * N_SPANS)
        cost = tl.zeros((ITEMS,), tl.int64)
        sees = tl.zeros((ITEMS, ROWS), tl.int32)
        for span in tl.static_range(N_SPANS):
            begin = tl.load(start + span * plane + at + row, mask=known, other=0)
            stop = tl.load(end + span * plane + at + row, mask=known, other=0)
            cost += tl.sum((stop - begin).to(tl.int64), axis=1)
            sees = tl.maximum(sees, (stop > begin).to(tl.int32))
        tl.store(out, item * 0 + b, mask=used)
        tl.store(out + 1, first_row, mask=used)
        tl.store(out + 2, stop_row - first_row, mask=used)
        tl.store(out + 3, tl.minimum(cost, FAR).to(tl.int32), mask=used)
        for span in tl.static_range(N_SPANS):
            begin = tl.load(start + span * plane + at + row, mask=known, other=0)
            stop = tl.load(end + span * plane + at + row, mask=known, other=0)
            live = stop > begin
            low = tl.min(tl.where(live, begin, FAR), axis=1)
            full_low = tl.max(tl.where(live, begin, 0), axis=1)
            full_high = tl.min(tl.where(live, stop, FAR), axis=1)
            high = tl.max(tl.where(live, stop, 0), axis=1)
            mixed = tl.max(((sees != 0) & ~live).to(tl.int32), axis=1)
            partial = (mixed != 0) | (full_high <= full_low) | (high == 0)
            if HAS_HOLES:
                full_low = tl.where(partial, 0, full_low)
                full_high = tl.where(partial, 0, full_high)
                partial = partial | (
                    _holes_before(holes, b, full_low, key_blocks, KEY_BLOCK)
                    != _holes_before(holes, b, full_high, key_blocks, KEY_BLOCK)
                )
            tl.store(out + 4 + 4 * span, tl.where(high > 0, low, 0), mask=used)
            tl.store(out + 5 + 4 * span, tl.where(partial, high, full_low), mask=used)
            tl.store(out + 6 + 4 * span, tl.where(partial, high, full_high), mask=used)
            tl.store(out + 7 + 4 * span, high, mask=used)


@triton.jit
def _sort_items(tiles, order, scratch, count, capacity, N_SPANS: tl.constexpr):
    """Numbers of the items, costliest first, equal ones as they lie; what is not used comes last, as it lies.

    Digit by digit from the lowest. The numbers go to and fro between two halves of scratch.
    """
    lane = tl.arange(0, SORTED)
    digits = tl.arange(0, DIGITS)
    greatest = (count * 0).to(tl.int64)
    for at in range(0, count, SORTED):
        cost = tl.load(tiles + (at + lane).to(tl.int64) * (4 + 4 * N_SPANS) + 3, mask=at + lane < count, other=0)
        tl.store(scratch + at + lane, at + lane, mask=at + lane < count)
        greatest = tl.maximum(greatest, tl.max(cost).to(tl.int64))
    tl.debug_barrier()
    source = capacity * 0
    shift = count * 0
    while (shift < 31) & ((greatest >> shift) > 0):
        held = tl.zeros((DIGITS,), tl.int32)
        for at in range(0, count, SORTED):
            used = at + lane < count
            item = tl.load(scratch + source + at + lane, mask=used, other=0)
            cost = tl.load(tiles + item.to(tl.int64) * (4 + 4 * N_SPANS) + 3, mask=used, other=0)
            digit = DIGITS - 1 - ((cost >> shift) & (DIGITS - 1))
            held += tl.sum(((digit[:, None] == digits[None, :]) & used[:, None]).to(tl.int32), axis=0)
        place = tl.cumsum(held) - held
        for at in range(0, count, SORTED):
            used = at + lane < count
            item = tl.load(scratch + source + at + lane, mask=used, other=0)
            cost = tl.load(tiles + item.to(tl.int64) * (4 + 4 * N_SPANS) + 3, mask=used, other=0)
            digit = DIGITS - 1 - ((cost >> shift) & (DIGITS - 1))
            is_digit = ((digit[:, None] == digits[None, :]) & used[:, None]).to(tl.int32)
            rank = tl.cumsum(is_digit, axis=0) - 1 + place[None, :]
            to = tl.sum(rank * is_digit, axis=1)
            tl.store(scratch + (capacity - source) + to, item, mask=used)
            place += tl.sum(is_digit, axis=0)
        tl.debug_barrier()
        source = capacity - source
        shift += BITS
    for at in range(0, capacity, SORTED):
        item = tl.load(scratch + source + at + lane, mask=at + lane < count, other=0)
        tl.store(order + at + lane, tl.where(at + lane < count, item, at + lane), mask=at + lane < capacity)


@triton.jit
def _write_keys(
    operands, sizes, runs, summary, key_valid, key_tiles, b, block, batch, q_len, k_len, row_blocks,
    MASKS: tl.constexpr, N_SPANS: tl.constexpr, GRAD: tl.constexpr, OWN: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Which keys of a block are seen, and the rows that see each of its tiles."""
    TILES: tl.constexpr = KEY_BLOCK // KEYS
    first_key = block * KEY_BLOCK
    stop_key = tl.minimum(first_key + KEY_BLOCK, k_len)
    key = first_key + tl.arange(0, KEY_BLOCK)
    is_there = key < k_len
    for i in tl.static_range(len(MASKS)):
        size = number(sizes[MASKS[i]])
        base = tl.minimum(b, size - 1).to(tl.int64) * k_len
        bits = tl.load(operands[MASKS[i]] + base + key, mask=key < k_len, other=0)
        is_there = is_there & (bits != 0)
    tile = tl.arange(0, TILES)
    tile_begin = first_key + tile * KEYS
    tile_stop = tl.minimum(tile_begin + KEYS, k_len)
    # A tile that is shorter, because the keys end in it, counts as whole.
    complete = tl.min(tl.reshape((is_there | (key >= k_len)).to(tl.int32), (TILES, KEYS)), axis=1)
    seen = tl.zeros((KEY_BLOCK,), tl.int32)
    run_plane = (N_SPANS * batch).to(tl.int64) * row_blocks * OWN
    lane = tl.arange(0, RUNS)
    for span in tl.static_range(N_SPANS):
        low = tl.zeros((TILES,), tl.int32) + FAR
        high = tl.zeros((TILES,), tl.int32)
        full_low = tl.zeros((TILES,), tl.int32) + FAR
        full_high = tl.zeros((TILES,), tl.int32)
        covering = tl.zeros((TILES,), tl.int32)
        of_span = (span * batch + b).to(tl.int64) * row_blocks
        for rows in range(row_blocks):
            about = summary + (of_span + rows) * SUMMARY
            count = tl.load(about)
            least_end = tl.load(about + 3)
            live = tl.load(about + 5)
            from_row = rows * OWN
            if (count > 0) & (tl.load(about + 1) < stop_key) & (tl.load(about + 4) > first_key):
                if (live == tl.load(about + 6)) & (tl.load(about + 2) <= first_key) & (least_end >= stop_key):
                    seen = seen | 1
                    low = tl.minimum(low, from_row)
                    high = tl.maximum(high, from_row + live)
                    full_low = tl.minimum(full_low, from_row)
                    full_high = tl.maximum(full_high, from_row + live)
                    covering += live
                else:
                    for at in range(0, count, RUNS):
                        used = at + lane < count
                        place = runs + of_span * OWN + from_row + at + lane
                        row = tl.load(place, mask=used, other=0)
                        stop_row = tl.load(place + run_plane, mask=used, other=0)
                        begin = tl.load(place + 2 * run_plane, mask=used, other=FAR)
                        stop = tl.load(place + 3 * run_plane, mask=used, other=0)
                        holds = (key[:, None] >= begin[None, :]) & (key[:, None] < stop[None, :])
                        seen = seen | tl.max(holds.to(tl.int32), axis=1)
                        if GRAD:
                            sees = (begin[None, :] < tile_stop[:, None]) & (stop[None, :] > tile_begin[:, None])
                            sees = sees & (tile_begin < k_len)[:, None]
                            covers = sees & (begin[None, :] <= tile_begin[:, None])
                            covers = covers & (stop[None, :] >= tile_stop[:, None])
                            low = tl.minimum(low, tl.min(tl.where(sees, row[None, :], FAR), axis=1))
                            high = tl.maximum(high, tl.max(tl.where(sees, stop_row[None, :], 0), axis=1))
                            full_low = tl.minimum(full_low, tl.min(tl.where(covers, row[None, :], FAR), axis=1))
                            full_high = tl.maximum(full_high, tl.max(tl.where(covers, stop_row[None, :], 0), axis=1))
                            covering += tl.sum(tl.where(covers, stop_row[None, :] - row[None, :], 0), axis=1)
        if GRAD:
            n_tiles = (k_len + KEYS - 1) // KEYS
            number_of_tile = block * TILES + tile
            accepted = (covering > 0) & (covering == full_high - full_low) & (complete != 0)
            out = key_tiles + ((span * batch + b).to(tl.int64) * n_tiles + number_of_tile) * 4
            exists = number_of_tile < n_tiles
            tl.store(out, tl.where(high > 0, low, 0), mask=exists)
            tl.store(out + 1, tl.where(accepted, full_low, high), mask=exists)
            tl.store(out + 2, tl.where(accepted, full_high, high), mask=exists)
            tl.store(out + 3, high, mask=exists)
    at = b.to(tl.int64) * k_len
    tl.store(key_valid + at + key, (is_there & (seen != 0)).to(tl.uint8), mask=key < k_len)


@triton.jit(do_not_specialize=["batch", "q_len", "k_len", "row_blocks", "key_blocks", "per_batch", "capacity"])
def plan_lists(
    operand0, operand1, operand2, operand3, operand4, operand5, sizes,
    start, end, chain, runs, summary, holes, window, counter,
    key_valid, tiles, tile_count, key_tiles, order,
    batch, q_len, k_len, row_blocks, key_blocks, per_batch, capacity,
    MASKS: tl.constexpr, N_SPANS: tl.constexpr, GRAD: tl.constexpr, ORDER: tl.constexpr, OWN: tl.constexpr,
    W: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Work list, order, key_valid and key_tiles; see the module."""
    program = tl.program_id(0)
    programs = batch * row_blocks
    if program >= programs:
        of_keys = program - programs
        operands = (operand0, operand1, operand2, operand3, operand4, operand5)
        _write_keys(
            operands, sizes, runs, summary, key_valid, key_tiles, of_keys // key_blocks, of_keys % key_blocks,
            batch, q_len, k_len, row_blocks, MASKS, N_SPANS, GRAD, OWN, KEY_BLOCK,
        )  # fmt: skip
    else:
        b = program // row_blocks
        block = program % row_blocks
        plane = batch.to(tl.int64) * q_len
        at = b.to(tl.int64) * q_len
        scratch = window + program.to(tl.int64) * (LIST_SCRATCH * W)
        entry, before, is_grid, total = _follow_blocks(chain, plane, b, block, batch, q_len, row_blocks, per_batch, OWN)
        count = _list_items(chain, at, entry, is_grid, block, q_len, scratch, OWN, W)
        _write_items(
            start, end, tiles, holes, scratch, b, at, before, count, batch, q_len, key_blocks,
            N_SPANS, len(MASKS) > 0, KEY_BLOCK, W,
        )  # fmt: skip
        if program == 0:
            tl.store(tile_count, total)
        stride = programs.to(tl.int64) * W
        unused = (capacity - total).to(tl.int64) * (4 + 4 * N_SPANS)
        lane = tl.arange(0, W)
        for from_place in range(program.to(tl.int64) * W, unused, stride):
            place = from_place + lane
            tl.store(tiles + total.to(tl.int64) * (4 + 4 * N_SPANS) + place, 0, mask=place < unused)
        if ORDER:
            # Everything this program wrote, before the ticket says that it is done.
            tl.debug_barrier()
            ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if ticket == programs - 1:
                _sort_items(tiles, order, counter + 1, total, capacity, N_SPANS)
