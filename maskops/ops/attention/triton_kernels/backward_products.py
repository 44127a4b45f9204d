"""Gradients of q over the work items, and those of k and v over the key tiles.

Both recompute P, so that each sums in registers and in a fixed order what it owns: no atomics, the same bits however
the programs are scheduled. What is not seen is not read either, but in full tiles of the gradient of q, because 0 * NaN
is NaN: keys that no row of the mask sees and keys beyond the item's for the gradient of q, rows without a key
and rows that are not finite for those of k and v.
"""

import triton
import triton.language as tl

from maskops.ops.attention.triton_kernels.arguments import OPEN
from maskops.ops.attention.triton_kernels.backward_scores import (
    NEVER,
    gradients_of_pairs,
    spans_over,
    terms_of,
)
from maskops.ops.attention.triton_kernels.features import (
    Rows,
    Unit,
    bounds_of,
    dense_bits,
    extras_of,
    full_tile,
    full_tiles,
    inside_spans,
    partial_tile,
    partial_tiles,
    readable,
    rows_of,
    unit_of,
    walk_of,
)
from maskops.ops.attention.triton_kernels.forward import load_rows
from maskops.ops.triton_language import dot


@triton.jit
def _add_keys(
    grad_q, row_slope, q, grad_out, first_key, rows, terms, extras, bounds, unit, K, V, KEY_VALID,
    k_row_stride, v_row_stride, dense_row_stride, bias_row_stride, bias_key_stride, k_len,
    factor, cap, last_dropped, keep_scale,
    PARTIAL: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SHARES: tl.constexpr, NATURAL: tl.constexpr, WANTS_SLOPES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to the gradients of a unit."""
    key = first_key + tl.arange(0, BLOCK_N)
    is_read = key >= 0
    if PARTIAL:
        is_read = readable(key, bounds, KEY_VALID, N_SPANS)
    k = load_rows(
        K + first_key.to(tl.int64) * k_row_stride, k_row_stride, is_read, PARTIAL, WIDTH, BLOCK_D, BLOCK_N, WIDE
    )
    v = load_rows(
        V + first_key.to(tl.int64) * v_row_stride, v_row_stride, is_read, PARTIAL, VALUE_WIDTH, BLOCK_DV, BLOCK_N, WIDE
    )
    is_visible = rows.exists[:, None] & (key >= 0)[None, :]
    if PARTIAL:
        is_visible = inside_spans(rows, tl.where(is_read, key, -1), N_SPANS)
        if HAS_DENSE:
            is_visible &= dense_bits(
                extras.dense, rows.index, rows.exists, first_key, k_len, dense_row_stride, BLOCK_M, BLOCK_N
            )
    pairs = gradients_of_pairs(
        dot(q, tl.trans(k), None, PRECISION), dot(grad_out, tl.trans(v), None, PRECISION), is_visible, rows.index, key,
        unit.head, terms, extras, factor, cap, last_dropped, keep_scale, bias_row_stride, bias_key_stride,
        False, PARTIAL, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_SOFTCAP, HAS_SHARES, NATURAL,
    )  # fmt: skip
    if WANTS_SLOPES:
        row_slope -= tl.sum(pairs.grad_score * pairs.distance, 1)
    return dot(pairs.grad_product.to(k.dtype), k, grad_q, PRECISION), row_slope


@triton.jit(do_not_specialize=OPEN)
def grad_queries_kernel(
    Q, K, V, GRAD_OUT, GRAD_Q, TERMS, ROW_SLOPES, START, END, KEY_VALID, TILES, TILE_COUNT, ORDER,
    POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, grad_out_batch_stride, grad_out_head_stride, grad_out_row_stride,
    grad_q_batch_stride, grad_q_head_stride, grad_q_row_stride, term_stride, padded_rows,
    span_stride, plan_stride, key_valid_stride, positions_stride, positions_batch_stride,
    dense_batch_stride, dense_head_stride, dense_row_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    slopes_outer, slopes_outer_stride, slopes_head_stride,
    capacity, plan_batches, repeats, heads, group, heads_at_a_time, q_len, k_len,
    softmax_scale, factor, cap, last_dropped, keep_scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SHARES: tl.constexpr, NATURAL: tl.constexpr,
    WANTS_SLOPES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q: a program for each unit of the work list (Dao, arXiv 2307.08691, section 3.1).

    Args:
        GRAD_Q: as Q; every row is written.
        TERMS: what ``row_terms_kernel`` fills.
        ROW_SLOPES: to be filled: (batch * heads, padded_rows), what each row adds to the gradient of its slope.
        The others: as in the forward kernel.
    """
    n_items = tl.minimum(tl.load(TILE_COUNT), capacity)
    work = tl.program_id(0)
    if work >= n_items * (128 // BLOCK_M) * repeats * heads:
        return
    unit = unit_of(
        work, TILES, ORDER, n_items, plan_batches, repeats, heads, heads_at_a_time, q_len, BLOCK_M, N_SPANS, HAS_ORDER
    )
    if unit.rows <= 0:
        return
    rows = rows_of(unit, START, END, span_stride, plan_stride, k_len, BLOCK_M, N_SPANS)
    bounds = bounds_of(unit, rows, TILES, k_len, BLOCK_M, N_SPANS)
    walk = walk_of(bounds, BLOCK_N, BLOCK_N, N_SPANS, HAS_DENSE, HAS_DENSE)
    extras = extras_of(
        unit, rows, POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
        plan_batches, positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride,
        bias_batch_stride, bias_head_stride, slopes_outer, slopes_outer_stride, slopes_head_stride,
        HAS_ALIBI, HAS_DROPOUT, BY_SEQUENCE, NATURAL,
    )  # fmt: skip
    batch, head = unit.batch.to(tl.int64), unit.head.to(tl.int64)
    first_row = unit.first_row.to(tl.int64)
    q = load_rows(
        Q + batch * q_batch_stride + head * q_head_stride + first_row * q_row_stride, q_row_stride, rows.exists,
        True, WIDTH, BLOCK_D, BLOCK_M, WIDE,
    )  # fmt: skip
    grad_out = load_rows(
        GRAD_OUT + batch * grad_out_batch_stride + head * grad_out_head_stride + first_row * grad_out_row_stride,
        grad_out_row_stride, rows.exists, True, VALUE_WIDTH, BLOCK_DV, BLOCK_M, WIDE,
    )  # fmt: skip
    row_place = (batch * heads + head) * padded_rows
    terms = terms_of(TERMS + row_place, rows.index, term_stride, HAS_BIAS or HAS_ALIBI, HAS_SHARES)
    keys = K + batch * k_batch_stride + head // group * k_head_stride
    values = V + batch * v_batch_stride + head // group * v_head_stride
    valid = KEY_VALID + unit.plan_batch.to(tl.int64) * key_valid_stride
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_slope = tl.zeros([BLOCK_M], tl.float32)
    for number in tl.range(0, full_tiles(walk, N_SPANS)):
        grad_q, row_slope = _add_keys(
            grad_q, row_slope, q, grad_out, full_tile(walk, number, BLOCK_N, BLOCK_N, N_SPANS), rows, terms, extras,
            bounds, unit, keys, values, valid, k_row_stride, v_row_stride, dense_row_stride, bias_row_stride,
            bias_key_stride, k_len, factor, cap, last_dropped, keep_scale,
            False, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, N_SPANS, HAS_DENSE, HAS_BIAS, HAS_ALIBI,
            HAS_DROPOUT, HAS_SOFTCAP, HAS_SHARES, NATURAL, WANTS_SLOPES, WIDE, PRECISION,
        )  # fmt: skip
    for number in tl.range(0, partial_tiles(walk, N_SPANS)):
        grad_q, row_slope = _add_keys(
            grad_q, row_slope, q, grad_out, partial_tile(walk, number, BLOCK_N, BLOCK_N, N_SPANS), rows, terms, extras,
            bounds, unit, keys, values, valid, k_row_stride, v_row_stride, dense_row_stride, bias_row_stride,
            bias_key_stride, k_len, factor, cap, last_dropped, keep_scale,
            True, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, N_SPANS, HAS_DENSE, HAS_BIAS, HAS_ALIBI,
            HAS_DROPOUT, HAS_SOFTCAP, HAS_SHARES, NATURAL, WANTS_SLOPES, WIDE, PRECISION,
        )  # fmt: skip
    # Whatever an empty row holds has run through the full tiles: selected, not multiplied.
    is_live = terms.lse != NEVER
    grad_q = tl.where(is_live[:, None], grad_q * softmax_scale, 0.0)
    column = tl.arange(0, BLOCK_D)
    place = GRAD_Q + batch * grad_q_batch_stride + head * grad_q_head_stride
    place = place + rows.index.to(tl.int64)[:, None] * grad_q_row_stride + column[None, :]
    tl.store(place, grad_q.to(GRAD_Q.dtype.element_ty), mask=rows.exists[:, None] & (column[None, :] < WIDTH))
    if WANTS_SLOPES:
        tl.store(ROW_SLOPES + row_place + rows.index, tl.where(is_live, row_slope, 0.0), mask=rows.exists)


@triton.jit
def bounds_of_keys(KEY_TILES, span_stride, first_key, q_len, k_len, N_SPANS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tuples of lo, hi, hi and hi of every span: the rows that see the tile of keys from ``first_key`` on.

    It may consist of several tiles of the plan, or be part of one. From a multiple of 16 on, the terms of rows are
    aligned. There is no full range: a loop of its own takes the registers that the sums of both gradients need.
    """
    KEY_TILE: tl.constexpr = 64
    lows = ()
    highs = ()
    for span in tl.static_range(N_SPANS):
        low, high = q_len, 0
        for part in tl.static_range((BLOCK_N + KEY_TILE - 1) // KEY_TILE):
            number = first_key // KEY_TILE + part
            tile = KEY_TILES + span * span_stride + number * 4
            is_there = number * KEY_TILE < k_len
            low_of_part = tl.load(tile, mask=is_there, other=0)
            high_of_part = tl.load(tile + 3, mask=is_there, other=0)
            low = tl.where(high_of_part > low_of_part, tl.minimum(low, low_of_part), low)
            high = tl.maximum(high, high_of_part)
        lows = lows + (tl.maximum(low, 0) // 16 * 16,)
        highs = highs + (tl.minimum(high, q_len),)
    return lows, highs, highs, highs


@triton.jit
def _add_rows(
    grad_k, grad_v, k, v, first_row, first_key, key, batch, head, plan_batch, Q, GRAD_OUT, TERMS, ROW_START, ROW_END,
    POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
    q_row_stride, grad_out_row_stride, term_stride, row_span_stride,
    positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride, dense_row_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    slopes_outer, slopes_outer_stride, slopes_head_stride, plan_batches, q_len, k_len,
    factor, cap, last_dropped, keep_scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SHARES: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of rows gives to the gradients of a tile of keys and values."""
    row = tl.multiple_of(first_row, 16) + tl.arange(0, BLOCK_M)
    terms = terms_of(TERMS, row, term_stride, HAS_BIAS or HAS_ALIBI, HAS_SHARES)
    is_finite = tl.abs(terms.lse) < NEVER
    first_row64 = first_row.to(tl.int64)
    q = load_rows(Q + first_row64 * q_row_stride, q_row_stride, is_finite, True, WIDTH, BLOCK_D, BLOCK_M, WIDE)
    grad_out = load_rows(
        GRAD_OUT + first_row64 * grad_out_row_stride, grad_out_row_stride, is_finite, True, VALUE_WIDTH, BLOCK_DV,
        BLOCK_M, WIDE,
    )  # fmt: skip
    starts = ()
    ends = ()
    for span in tl.static_range(N_SPANS):
        of_span = span * tl.cast(row_span_stride, tl.int64) + row
        starts = starts + (tl.load(ROW_START + of_span),)
        ends = ends + (tl.load(ROW_END + of_span),)
    rows = Rows(index=row, exists=row < q_len, starts=starts, ends=ends, is_live=is_finite)
    unit = Unit(item=0, batch=batch, plan_batch=plan_batch, head=head, first_row=first_row, rows=BLOCK_M)
    extras = extras_of(
        unit, rows, POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
        plan_batches, positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride,
        bias_batch_stride, bias_head_stride, slopes_outer, slopes_outer_stride, slopes_head_stride,
        HAS_ALIBI, HAS_DROPOUT, BY_SEQUENCE, NATURAL,
    )  # fmt: skip
    is_visible = spans_over(rows, key, N_SPANS, True)
    if HAS_BIAS:  # which may have emptied a row
        is_visible &= (terms.lse != NEVER)[None, :]
    if HAS_DENSE:
        bits = dense_bits(extras.dense, row, rows.exists, first_key, k_len, dense_row_stride, BLOCK_M, BLOCK_N)
        is_visible &= tl.trans(bits)
    pairs = gradients_of_pairs(
        dot(k, tl.trans(q), None, PRECISION), dot(v, tl.trans(grad_out), None, PRECISION), is_visible, row, key,
        head, terms, extras, factor, cap, last_dropped, keep_scale, bias_row_stride, bias_key_stride,
        True, True, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_SOFTCAP, HAS_SHARES, NATURAL,
    )  # fmt: skip
    grad_v = dot(pairs.weight.to(grad_out.dtype), grad_out, grad_v, PRECISION)
    grad_k = dot(pairs.grad_product.to(q.dtype), q, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=OPEN)
def grad_keys_kernel(
    Q, K, V, GRAD_OUT, GRAD_K, GRAD_V, TERMS, ROW_START, ROW_END, KEY_VALID, KEY_TILES,
    POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, grad_out_batch_stride, grad_out_head_stride, grad_out_row_stride,
    grad_k_part_stride, grad_k_batch_stride, grad_k_head_stride, grad_k_row_stride,
    grad_v_part_stride, grad_v_batch_stride, grad_v_head_stride, grad_v_row_stride, term_stride, padded_rows,
    row_span_stride, key_valid_stride, key_tiles_span_stride, key_tiles_batch_stride,
    positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride, dense_row_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    slopes_outer, slopes_outer_stride, slopes_head_stride,
    plan_batches, heads, group, parts, row_parts, q_len, k_len, softmax_scale, factor, cap, last_dropped, keep_scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SHARES: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v: a program for each tile of keys, key head, and part of the heads of its group and the rows.

    Args:
        GRAD_K, GRAD_V: (parts, batch, kv_heads, k_len, width) by their strides; every element is written. With more
            than one part they are float32, and their sum over the parts is the gradient.
        TERMS, ROW_START, ROW_END: what ``row_terms_kernel`` fills.
        KEY_TILES: (N_SPANS, plan_batches, tiles, 4).
        parts: a divisor of ``group``, times ``row_parts``.
        row_parts: parts into which the rows that see a tile are split.
        The others: as in the forward kernel.
    """
    n_tiles = tl.cdiv(k_len, BLOCK_N)
    kv_heads = heads // group
    first_key = tl.program_id(0) % n_tiles * BLOCK_N
    outer = tl.program_id(0) // n_tiles
    part = outer % parts
    kv_head = outer // parts % kv_heads
    batch = outer // parts // kv_heads
    plan_batch = batch % plan_batches
    batch64, kv_head64, part64, plan64 = (
        batch.to(tl.int64), kv_head.to(tl.int64), part.to(tl.int64), plan_batch.to(tl.int64),
    )  # fmt: skip
    key = first_key + tl.arange(0, BLOCK_N)
    is_key = key < k_len
    first_key64 = first_key.to(tl.int64)
    k = load_rows(
        K + batch64 * k_batch_stride + kv_head64 * k_head_stride + first_key64 * k_row_stride, k_row_stride, is_key,
        True, WIDTH, BLOCK_D, BLOCK_N, WIDE,
    )  # fmt: skip
    v = load_rows(
        V + batch64 * v_batch_stride + kv_head64 * v_head_stride + first_key64 * v_row_stride, v_row_stride, is_key,
        True, VALUE_WIDTH, BLOCK_DV, BLOCK_N, WIDE,
    )  # fmt: skip
    is_seen = tl.load(KEY_VALID + plan64 * key_valid_stride + key, mask=is_key, other=0) != 0
    # A key that nobody sees lies in no span.
    place = tl.where(is_seen, key, -1)
    bounds = bounds_of_keys(
        KEY_TILES + plan64 * key_tiles_batch_stride, key_tiles_span_stride, first_key, q_len, k_len, N_SPANS, BLOCK_N
    )
    walk = walk_of(bounds, BLOCK_M, BLOCK_M, N_SPANS, HAS_DENSE, False)
    starts, ends = ROW_START + plan64 * padded_rows, ROW_END + plan64 * padded_rows
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    n_row_tiles = partial_tiles(walk, N_SPANS)
    row_tiles_of_part = tl.cdiv(n_row_tiles, row_parts)
    first_row_tile = part % row_parts * row_tiles_of_part
    stop_row_tile = tl.minimum(first_row_tile + row_tiles_of_part, n_row_tiles)
    heads_of_part = group // (parts // row_parts)
    for of_group in tl.range(0, heads_of_part):
        head = kv_head * group + part // row_parts * heads_of_part + of_group
        head64 = head.to(tl.int64)
        queries = Q + batch64 * q_batch_stride + head64 * q_head_stride
        grad_outs = GRAD_OUT + batch64 * grad_out_batch_stride + head64 * grad_out_head_stride
        terms = TERMS + (batch64 * heads + head64) * padded_rows
        for number in tl.range(first_row_tile, stop_row_tile):
            grad_k, grad_v = _add_rows(
                grad_k, grad_v, k, v, partial_tile(walk, number, BLOCK_M, BLOCK_M, N_SPANS), first_key, place, batch,
                head, plan_batch, queries, grad_outs, terms, starts, ends, POSITIONS, DENSE, BIAS, SLOPES, SEED,
                LAST_ORDINAL, q_row_stride, grad_out_row_stride, term_stride, row_span_stride, positions_stride,
                positions_batch_stride, dense_batch_stride, dense_head_stride, dense_row_stride,
                bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride, slopes_outer,
                slopes_outer_stride, slopes_head_stride, plan_batches, q_len, k_len, factor, cap, last_dropped,
                keep_scale, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, N_SPANS, HAS_DENSE,
                HAS_BIAS, HAS_ALIBI, BY_SEQUENCE, HAS_DROPOUT, HAS_SOFTCAP, HAS_SHARES, NATURAL, WIDE, PRECISION,
            )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    grads = GRAD_K + part64 * grad_k_part_stride + batch64 * grad_k_batch_stride + kv_head64 * grad_k_head_stride
    grads = grads + key.to(tl.int64)[:, None] * grad_k_row_stride + column[None, :]
    is_written = is_key[:, None] & (column[None, :] < WIDTH)
    tl.store(grads, (grad_k * softmax_scale).to(GRAD_K.dtype.element_ty), mask=is_written)
    column = tl.arange(0, BLOCK_DV)
    grads = GRAD_V + part64 * grad_v_part_stride + batch64 * grad_v_batch_stride + kv_head64 * grad_v_head_stride
    grads = grads + key.to(tl.int64)[:, None] * grad_v_row_stride + column[None, :]
    is_written = is_key[:, None] & (column[None, :] < VALUE_WIDTH)
    tl.store(grads, grad_v.to(GRAD_V.dtype.element_ty), mask=is_written)
