"""What every kernel of span attention does with a plan and with what a call adds to it.

Functions of kernels, shared by forward and backward. A tile is rows of queries by keys; ``row`` and ``key`` are
vectors along one of its sides, and what is said of pairs broadcasts: backward kernels that hold the transposed tile
pass ``[None, :]`` where others pass ``[:, None]``.

Scores are exponents of 2, so that a weight is one instruction: every term is multiplied by log2(e), which the launcher
folds into its factor. Calls with a bias keep natural units (NATURAL): a bias may be so low that the factor overflows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from maskops.ops.triton_language import LN2, LOG2E

TILE_ROWS = tl.constexpr(128)
"""Rows of a work item, as in ``maskops.spans``."""


class Unit(NamedTuple):
    """What one program computes at a time: rows of a work item for one head."""

    item: Any  # number of the work item
    batch: Any  # batch element of q, k and v
    plan_batch: Any  # that of the plan: 0 where one plan serves every batch element
    head: Any
    first_row: Any
    rows: Any  # how many; 0 or less where the item has none for this part of it


class Rows(NamedTuple):
    """Vectors along the rows of a tile."""

    index: Any
    exists: Any  # a row of this tile
    starts: Any  # one vector a span
    ends: Any
    is_live: Any  # sees a key in some span


class Walk(NamedTuple):
    """The key tiles of a unit: disjoint ranges, each of partial tiles, then full tiles, then partial tiles.

    Partial tiles may be narrower than full ones. Tuples with an element for each span, in the order of the keys.
    """

    first: Any  # key
    before: Any  # partial tiles before the full ones
    fulls: Any  # full tiles
    after: Any  # partial tiles behind them


# ---- the work list ---------------------------------------------------------------------------------------------------


@triton.jit
def unit_of(
    work, TILES, ORDER, n_items, plan_batches, repeats, heads, heads_at_a_time, q_len,
    BLOCK_M: tl.constexpr, N_SPANS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """The unit of number ``work``: heads that fit the cache together come first, the costliest items first of them.

    What is read is clamped: a list that does not belong to these tensors gives wrong numbers, never a wrong address.
    """
    PARTS: tl.constexpr = TILE_ROWS // BLOCK_M
    a_section = n_items * PARTS * repeats * heads_at_a_time
    head = work // a_section * heads_at_a_time + work % heads_at_a_time
    rest = work % a_section // heads_at_a_time
    repeat = rest % repeats
    rest = rest // repeats
    part = rest % PARTS
    item = rest // PARTS
    if HAS_ORDER:
        item = tl.minimum(tl.maximum(tl.load(ORDER + item), 0), n_items - 1)
    tile = TILES + item.to(tl.int64) * (4 + 4 * N_SPANS)
    plan_batch = tl.minimum(tl.maximum(tl.load(tile), 0), plan_batches - 1)
    first_row = tl.minimum(tl.maximum(tl.load(tile + 1), 0), q_len)
    rows = tl.minimum(tl.minimum(tl.maximum(tl.load(tile + 2), 0), TILE_ROWS), q_len - first_row)
    skipped = part * BLOCK_M
    return Unit(
        item=item,
        batch=plan_batch + repeat,
        plan_batch=plan_batch,
        head=tl.minimum(head, heads - 1),
        first_row=first_row + skipped,
        rows=rows - skipped,
    )


@triton.jit
def rows_of(
    unit, START, END, span_stride, plan_stride, k_len, BLOCK_M: tl.constexpr, N_SPANS: tl.constexpr
):  # fmt: skip
    """The rows of a unit with their spans; rows beyond it are as empty ones."""
    offset = tl.arange(0, BLOCK_M)
    exists = offset < unit.rows
    index = unit.first_row + offset
    place = unit.plan_batch.to(tl.int64) * plan_stride + index
    starts = ()
    ends = ()
    is_live = exists & (offset < 0)
    for span in tl.static_range(N_SPANS):
        of_span = span * tl.cast(span_stride, tl.int64)
        start = tl.maximum(tl.load(START + of_span + place, mask=exists, other=0), 0)
        end = tl.minimum(tl.load(END + of_span + place, mask=exists, other=0), k_len)
        starts = starts + (start,)
        ends = ends + (end,)
        is_live = is_live | (end > start)
    return Rows(index=index, exists=exists, starts=starts, ends=ends, is_live=is_live)


@triton.jit
def bounds_of(unit, rows, TILES, k_len, BLOCK_M: tl.constexpr, N_SPANS: tl.constexpr):
    """Tuples of lo, full_lo, full_hi and hi of every span. A part of an item has a hull of its own."""
    tile = TILES + unit.item.to(tl.int64) * (4 + 4 * N_SPANS) + 4
    lows = ()
    full_lows = ()
    full_highs = ()
    highs = ()
    for span in tl.static_range(N_SPANS):
        low = tl.maximum(tl.load(tile + 4 * span), 0)
        full_low = tl.load(tile + 4 * span + 1)
        full_high = tl.load(tile + 4 * span + 2)
        high = tl.minimum(tl.load(tile + 4 * span + 3), k_len)
        if BLOCK_M < TILE_ROWS:
            start, end = rows.starts[span], rows.ends[span]
            low = tl.maximum(low, tl.min(tl.where(end > start, start, k_len), 0))
            high = tl.minimum(high, tl.max(tl.where(end > start, end, 0), 0))
        lows = lows + (low,)
        full_lows = full_lows + (tl.maximum(full_low, low),)
        full_highs = full_highs + (tl.minimum(full_high, high),)
        highs = highs + (high,)
    return lows, full_lows, full_highs, highs


@triton.jit
def walk_of(
    bounds, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, N_SPANS: tl.constexpr, HAS_DENSE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Which key tiles are visited: those of the union of the spans, none of them twice.

    Args:
        bounds: as ``bounds_of`` gives them.
        BLOCK_N: keys of a full tile.
        BLOCK_P: keys of a partial tile.
        IS_ALIGNED: begin at multiples of 32, or of BLOCK_P where that is less: at a word of the bits of a dense mask,
            and where loads of several elements of a bias may begin.
    """
    FAR: tl.constexpr = 2147483647
    ALIGNED: tl.constexpr = min(BLOCK_P, 32)
    lows, full_lows, full_highs, highs = bounds
    firsts = ()
    befores = ()
    fulls = ()
    afters = ()
    visited = 0  # every key before it
    for _ in tl.static_range(N_SPANS):
        first = FAR
        high = 0
        full_low = 0
        full_high = 0
        for span in tl.static_range(N_SPANS):
            candidate = tl.maximum(lows[span], visited)
            is_next = (highs[span] > candidate) & (candidate < first)
            first = tl.where(is_next, candidate, first)
            high = tl.where(is_next, highs[span], high)
            full_low = tl.where(is_next, full_lows[span], full_low)
            full_high = tl.where(is_next, full_highs[span], full_high)
        first = tl.where(high > 0, first, visited)
        if IS_ALIGNED:
            first = first // ALIGNED * ALIGNED
        n_partials = tl.cdiv(tl.maximum(high - first, 0), BLOCK_P)  # if there were no full tile
        before = tl.minimum(tl.cdiv(tl.maximum(full_low - first, 0), BLOCK_P), n_partials)
        full = tl.maximum(full_high - (first + before * BLOCK_P), 0) // BLOCK_N
        if HAS_DENSE:
            full = full * 0
        behind = first + before * BLOCK_P + full * BLOCK_N
        after = tl.cdiv(tl.maximum(high - behind, 0), BLOCK_P)
        firsts = firsts + (first,)
        befores = befores + (before,)
        fulls = fulls + (full,)
        afters = afters + (after,)
        visited = tl.maximum(visited, behind + after * BLOCK_P)
    return Walk(first=firsts, before=befores, fulls=fulls, after=afters)


@triton.jit
def full_tiles(walk, N_SPANS: tl.constexpr):
    """How many."""
    number = walk.fulls[0]
    for span in tl.static_range(1, N_SPANS):
        number += walk.fulls[span]
    return number


@triton.jit
def partial_tiles(walk, N_SPANS: tl.constexpr):
    """How many."""
    number = walk.before[0] + walk.after[0]
    for span in tl.static_range(1, N_SPANS):
        number += walk.before[span] + walk.after[span]
    return number


@triton.jit
def full_tile(walk, number, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, N_SPANS: tl.constexpr):
    """First key of the full tile of a number."""
    key = walk.first[0] + walk.before[0] * BLOCK_P + number * BLOCK_N
    passed = walk.fulls[0]
    for span in tl.static_range(1, N_SPANS):
        here = walk.first[span] + walk.before[span] * BLOCK_P + (number - passed) * BLOCK_N
        key = tl.where(number >= passed, here, key)
        passed += walk.fulls[span]
    return key


@triton.jit
def partial_tile(walk, number, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, N_SPANS: tl.constexpr):
    """First key of the partial tile of a number."""
    skipped = tl.where(number >= walk.before[0], walk.fulls[0], 0)
    key = walk.first[0] + number * BLOCK_P + skipped * BLOCK_N
    passed = walk.before[0] + walk.after[0]
    for span in tl.static_range(1, N_SPANS):
        place = number - passed
        skipped = tl.where(place >= walk.before[span], walk.fulls[span], 0)
        key = tl.where(number >= passed, walk.first[span] + place * BLOCK_P + skipped * BLOCK_N, key)
        passed += walk.before[span] + walk.after[span]
    return key


# ---- which pairs are visible -----------------------------------------------------------------------------------------


@triton.jit
def readable(key, bounds, KEY_VALID, N_SPANS: tl.constexpr):
    """Keys that some row of the unit may see; others may hold anything, and are never loaded."""
    lows, _, _, highs = bounds
    inside = (key >= lows[0]) & (key < highs[0])
    for span in tl.static_range(1, N_SPANS):
        inside = inside | ((key >= lows[span]) & (key < highs[span]))
    return tl.load(KEY_VALID + key, mask=inside, other=0) != 0


@triton.jit
def inside_spans(rows, key, N_SPANS: tl.constexpr):
    """(rows, keys): whether the key lies in a span of the row."""
    inside = (key[None, :] >= rows.starts[0][:, None]) & (key[None, :] < rows.ends[0][:, None])
    for span in tl.static_range(1, N_SPANS):
        inside = inside | ((key[None, :] >= rows.starts[span][:, None]) & (key[None, :] < rows.ends[span][:, None]))
    return inside


@triton.jit
def dense_bits(DENSE, row, exists, first_key, k_len, row_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows, keys): the bits of a dense mask; ``first_key`` a multiple of 32, or of BLOCK_N where that is less.

    Args:
        DENSE: words of the batch element and head.
    """
    WORDS: tl.constexpr = max(BLOCK_N // 32, 1)
    PER_WORD: tl.constexpr = min(BLOCK_N, 32)
    word = first_key // 32 + tl.arange(0, WORDS)
    is_there = exists[:, None] & (word[None, :] < (k_len + 31) // 32)
    bits = tl.load(DENSE + row[:, None].to(tl.int64) * row_stride + word[None, :], mask=is_there, other=0)
    shifts = first_key % 32 + tl.arange(0, PER_WORD)
    bits = (bits[:, :, None] >> shifts[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_M, BLOCK_N]) != 0


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """tanh in float32, to a few roundings also near 0, where the scores of a large softcap lie."""
    size = tl.abs(x)
    square = x * x
    # The polynomial of Cephes (tanhf, Moshier) for |x| < 0.625.
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2E)))
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def scores_of(products, factor, cap, HAS_SOFTCAP: tl.constexpr):
    """Scores from products of queries and keys, before bias and slopes.

    Args:
        factor: the scale (over the softcap, where there is one), in the units of the scores where there is none.
        cap: the softcap in the units of the scores.
    """
    scores = products * factor
    if HAS_SOFTCAP:
        scores = tanh(scores) * cap
    return scores


@triton.jit
def bias_of(BIAS, row, key, is_read, row_stride, key_stride, WIDE: tl.constexpr = True):
    """The bias of pairs, float32, 0 where ``is_read`` says no.

    Args:
        BIAS: of the batch element and head, or of the first pair of a tile, from which row and key then count.
        WIDE: offsets need 64 bits; they do from the beginning of the tensor.
    """
    if WIDE:
        row = row.to(tl.int64)
        key = key.to(tl.int64)
    return tl.load(BIAS + (row * row_stride + key * key_stride), mask=is_read, other=0.0).to(tl.float32)


@triton.jit
def distances(diagonal, key):
    """Of keys from the key aligned with each row."""
    return tl.abs(diagonal - key).to(tl.float32)


@triton.jit
def slopes_of(
    SLOPES, ordinal, exists, batch, head, outer, outer_stride, head_stride, BY_SEQUENCE: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """The slope of each row, in the units of the scores. One of a sequence is found by the ordinal of the row."""
    if BY_SEQUENCE:
        place = tl.minimum(tl.maximum(ordinal, 0), outer - 1)
    else:
        place = tl.minimum(batch, outer - 1) + ordinal * 0
    slope = tl.load(SLOPES + place.to(tl.int64) * outer_stride + head * head_stride, mask=exists, other=0.0)
    if not NATURAL:
        slope = slope * LOG2E
    return slope


@triton.jit
def power(scores, NATURAL: tl.constexpr):
    """The exponential of differences of scores."""
    if NATURAL:
        scores = scores * LOG2E
    return tl.exp2(scores)


@triton.jit
def natural(row_max, row_sum, NATURAL: tl.constexpr):
    """The lse of rows, from the largest score and the sum of the weights over it."""
    if NATURAL:
        return row_max + tl.log2(row_sum) * LN2
    return (row_max + tl.log2(row_sum)) * LN2


# ---- what a call adds to a unit --------------------------------------------------------------------------------------


class Extras(NamedTuple):
    """Pointers of a unit's batch element and head, and vectors along its rows; what a call lacks is never read."""

    bias: Any
    dense: Any
    slope: Any  # in the units of the scores
    diagonal: Any  # key aligned with the row
    first: Any  # key of the row's sequence
    ordinal: Any  # of the row's sequence, counted over the whole batch
    seed: Any


@triton.jit
def extras_of(
    unit, rows, POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
    plan_batches, positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride,
    bias_batch_stride, bias_head_stride, slopes_outer, slopes_outer_stride, slopes_head_stride,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, BY_SEQUENCE: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Loads what does not depend on the keys."""
    batch = unit.batch.to(tl.int64)
    diagonal = rows.index
    first = rows.index
    ordinal = rows.index
    slope = rows.index
    seed = unit.head
    if HAS_ALIBI or HAS_DROPOUT:
        place = POSITIONS + unit.plan_batch.to(tl.int64) * positions_batch_stride + rows.index
        diagonal = tl.load(place, mask=rows.exists, other=0)
        first = tl.load(place + positions_stride, mask=rows.exists, other=0)
        ordinal = tl.load(place + positions_stride + positions_stride, mask=rows.exists, other=-1)
    if HAS_ALIBI:
        slope = slopes_of(
            SLOPES, ordinal, rows.exists, unit.batch, unit.head, slopes_outer, slopes_outer_stride, slopes_head_stride,
            BY_SEQUENCE, NATURAL,
        )  # fmt: skip
    if HAS_DROPOUT:
        ordinal = ordinals_in_batch(ordinal, unit.batch, LAST_ORDINAL, plan_batches)
        seed = tl.load(SEED)
    return Extras(
        bias=BIAS + batch * bias_batch_stride + unit.head.to(tl.int64) * bias_head_stride,
        dense=DENSE + batch * dense_batch_stride + unit.head.to(tl.int64) * dense_head_stride,
        slope=slope,
        diagonal=diagonal,
        first=first,
        ordinal=ordinal,
        seed=seed,
    )


# ---- dropout ---------------------------------------------------------------------------------------------------------


@triton.jit
def ordinals_in_batch(ordinal, batch, LAST_ORDINAL, plan_batches):
    """Sequences counted over the whole batch: a plan that serves several batch elements counts those of one."""
    return tl.where(plan_batches == 1, ordinal + batch * (tl.load(LAST_ORDINAL) + 1), ordinal)


@triton.jit
def kept(seed, last_dropped, key, first, place, head, ordinal):
    """Which pairs dropout keeps: a matter of places in a sequence alone.

    Philox4x32-7 (Salmon et al., SC 2011, section 3.3) of (key in its sequence // 4, place of the row, head, sequence)
    under the seed; four consecutive keys share a draw, a word each. The rule of ``reference.py``.

    Args:
        seed: int64.
        last_dropped: int32, the bits of the largest word that is dropped.
        key, first, place, ordinal: they broadcast to the tile; first key of the row's sequence, place of the row's
            diagonal in it, and number of the sequence.
        head: number of the head.
    """
    in_sequence = (key - first).to(tl.uint32, bitcast=True)
    zero = in_sequence * 0
    word_1 = zero + place.to(tl.uint32, bitcast=True)
    word_2 = zero + head.to(tl.uint32, bitcast=True)
    word_3 = zero + ordinal.to(tl.uint32, bitcast=True)
    words = tl.philox(seed, in_sequence >> 2, word_1, word_2, word_3, n_rounds=7)
    low = tl.where(in_sequence & 1 != 0, words[1], words[0])
    high = tl.where(in_sequence & 1 != 0, words[3], words[2])
    return tl.where(in_sequence & 2 != 0, high, low) > last_dropped.to(tl.uint32, bitcast=True)
