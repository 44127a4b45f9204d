"""Gradients of what several pairs share: a bias, and the slopes of sequences.

A program owns a tile of the bias (of what is left of it where it is broadcast) and computes dS anew for the pairs that
share it, in a fixed order; where such tiles are few, several programs share the pairs of one, and their sums are added
up afterwards. Memory beyond the gradient: float32 tiles for a few hundred programs, whatever the lengths.
"""

import triton
import triton.language as tl

from maskops.ops.attention.triton_kernels.arguments import OPEN
from maskops.ops.attention.triton_kernels.backward_scores import NEVER, gradients_of_pairs, terms_of
from maskops.ops.attention.triton_kernels.features import Rows, Unit, dense_bits, extras_of, inside_spans
from maskops.ops.attention.triton_kernels.forward import load_rows
from maskops.ops.triton_language import dot


@triton.jit
def _is_visited(
    KEY_TILES, span_stride, first_key, k_len, first_row, BLOCK_M, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr
):
    """Whether some row of a tile sees some key of it."""
    KEY_TILE: tl.constexpr = 64
    visits = first_row < 0
    for span in tl.static_range(N_SPANS):
        for part in tl.static_range((BLOCK_N + KEY_TILE - 1) // KEY_TILE):
            number = first_key // KEY_TILE + part
            is_there = number * KEY_TILE < k_len
            tile = KEY_TILES + span * span_stride + number * 4
            low = tl.load(tile, mask=is_there, other=0)
            high = tl.load(tile + 3, mask=is_there, other=0)
            visits = visits | ((low < first_row + BLOCK_M) & (high > first_row))
    return visits


@triton.jit(do_not_specialize=OPEN)
def grad_bias_kernel(
    Q, K, V, GRAD_OUT, GRAD_BIAS, TERMS, ROW_START, ROW_END, KEY_VALID, KEY_TILES,
    POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, grad_out_batch_stride, grad_out_head_stride, grad_out_row_stride,
    grad_bias_part_stride, term_stride, padded_rows,
    row_span_stride, key_valid_stride, key_tiles_span_stride, key_tiles_batch_stride,
    positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride, dense_row_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    slopes_outer, slopes_outer_stride, slopes_head_stride,
    plan_batches, batches, heads, group, bias_batches, bias_heads, parts, q_len, k_len,
    factor, cap, last_dropped, keep_scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr, SUMS_ROWS: tl.constexpr,
    SUMS_KEYS: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_ALIBI: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SHARES: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a bias: a program for each tile of it and part of the pairs that share the tile.

    Args:
        GRAD_BIAS: (parts, bias_batches, bias_heads, q_len or 1, k_len or 1), contiguous but for its first dimension;
            every element is written. With more than one part it is float32, and the sum over the parts the gradient.
        bias_batches, bias_heads: sizes of the bias.
        SUMS_ROWS, SUMS_KEYS: whether all rows, all keys share an element.
        The others: as in ``grad_keys_kernel``.
    """
    row_tiles, key_tiles = tl.cdiv(q_len, BLOCK_M), tl.cdiv(k_len, BLOCK_N)
    one = row_tiles // row_tiles
    shared_row_tiles, own_row_tiles = one, row_tiles
    shared_key_tiles, own_key_tiles = one, key_tiles
    if SUMS_ROWS:
        shared_row_tiles, own_row_tiles = row_tiles, one
    if SUMS_KEYS:
        shared_key_tiles, own_key_tiles = key_tiles, one
    shared_heads = heads // bias_heads
    shared_batches = batches // bias_batches

    place = tl.program_id(0)
    part = place % parts
    place = place // parts
    own_key_tile = place % own_key_tiles
    place = place // own_key_tiles
    own_row_tile = place % own_row_tiles
    place = place // own_row_tiles
    own_head = place % bias_heads
    own_batch = place // bias_heads
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shares = shared_row_tiles.to(tl.int64) * shared_key_tiles * shared_heads * shared_batches
    first_share = shares * part // parts
    for number in tl.range(0, (shares * (part + 1) // parts - first_share).to(tl.int32)):
        rest = first_share + number
        first_key = (own_key_tile + rest % shared_key_tiles).to(tl.int32) * BLOCK_N
        rest = rest // shared_key_tiles
        first_row = (own_row_tile + rest % shared_row_tiles).to(tl.int32) * BLOCK_M
        rest = rest // shared_row_tiles
        head = own_head + rest % shared_heads
        batch = own_batch + rest // shared_heads
        plan_batch = batch % plan_batches
        visible_rows = KEY_TILES + plan_batch * key_tiles_batch_stride
        if _is_visited(visible_rows, key_tiles_span_stride, first_key, k_len, first_row, BLOCK_M, BLOCK_N, N_SPANS):
            row = first_row + tl.arange(0, BLOCK_M)
            key = first_key + tl.arange(0, BLOCK_N)
            terms = terms_of(TERMS + (batch * heads + head) * padded_rows, row, term_stride, True, HAS_SHARES)
            is_live = terms.lse != NEVER
            is_key = key < k_len
            is_seen = tl.load(KEY_VALID + plan_batch * key_valid_stride + key, mask=is_key, other=0) != 0
            q = load_rows(
                Q + batch * q_batch_stride + head * q_head_stride + first_row.to(tl.int64) * q_row_stride,
                q_row_stride, is_live, True, WIDTH, BLOCK_D, BLOCK_M, WIDE,
            )  # fmt: skip
            k = load_rows(
                K + batch * k_batch_stride + head // group * k_head_stride + first_key.to(tl.int64) * k_row_stride,
                k_row_stride, is_seen, True, WIDTH, BLOCK_D, BLOCK_N, WIDE,
            )  # fmt: skip
            grad_out = load_rows(
                GRAD_OUT + batch * grad_out_batch_stride + head * grad_out_head_stride
                + first_row.to(tl.int64) * grad_out_row_stride,
                grad_out_row_stride, is_live, True, VALUE_WIDTH, BLOCK_DV, BLOCK_M, WIDE,
            )  # fmt: skip
            v = load_rows(
                V + batch * v_batch_stride + head // group * v_head_stride + first_key.to(tl.int64) * v_row_stride,
                v_row_stride, is_seen, True, VALUE_WIDTH, BLOCK_DV, BLOCK_N, WIDE,
            )  # fmt: skip
            starts = ()
            ends = ()
            for span in tl.static_range(N_SPANS):
                spans_at = plan_batch * padded_rows + span * tl.cast(row_span_stride, tl.int64) + row
                starts = starts + (tl.load(ROW_START + spans_at),)
                ends = ends + (tl.load(ROW_END + spans_at),)
            rows = Rows(index=row, exists=row < q_len, starts=starts, ends=ends, is_live=is_live)
            unit = Unit(
                item=0, batch=batch.to(tl.int32), plan_batch=plan_batch.to(tl.int32), head=head.to(tl.int32),
                first_row=first_row, rows=BLOCK_M,
            )  # fmt: skip
            extras = extras_of(
                unit, rows, POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
                plan_batches, positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride,
                bias_batch_stride, bias_head_stride, slopes_outer, slopes_outer_stride, slopes_head_stride,
                HAS_ALIBI, HAS_DROPOUT, BY_SEQUENCE, NATURAL,
            )  # fmt: skip
            is_visible = inside_spans(rows, tl.where(is_seen, key, -1), N_SPANS) & is_live[:, None]
            if HAS_DENSE:
                is_visible &= dense_bits(
                    extras.dense, row, rows.exists, first_key, k_len, dense_row_stride, BLOCK_M, BLOCK_N
                )
            pairs = gradients_of_pairs(
                dot(q, tl.trans(k), None, PRECISION), dot(grad_out, tl.trans(v), None, PRECISION), is_visible, row,
                key, unit.head, terms, extras, factor, cap, last_dropped, keep_scale, bias_row_stride,
                bias_key_stride, False, True, True, HAS_ALIBI, HAS_DROPOUT, HAS_SOFTCAP, HAS_SHARES, NATURAL,
            )  # fmt: skip
            total += pairs.grad_score

    row = own_row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    key = own_key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    element = own_batch.to(tl.int64) * bias_heads + own_head
    grads = GRAD_BIAS + part.to(tl.int64) * grad_bias_part_stride
    if SUMS_ROWS and SUMS_KEYS:
        tl.store(grads + element, tl.sum(tl.sum(total, 1), 0).to(GRAD_BIAS.dtype.element_ty))
    elif SUMS_ROWS:
        sums = tl.sum(total, 0).to(GRAD_BIAS.dtype.element_ty)
        tl.store(grads + element * k_len + key, sums, mask=key < k_len)
    elif SUMS_KEYS:
        sums = tl.sum(total, 1).to(GRAD_BIAS.dtype.element_ty)
        tl.store(grads + element * q_len + row, sums, mask=row < q_len)
    else:
        grads = grads + (element * q_len + row[:, None]) * k_len + key[None, :]
        is_pair = (row < q_len)[:, None] & (key < k_len)[None, :]
        tl.store(grads, total.to(GRAD_BIAS.dtype.element_ty), mask=is_pair)


@triton.jit(do_not_specialize=OPEN)
def grad_slopes_kernel(
    ROW_SLOPES, ORDINALS, FIRST_ROW, LAST_ROW, GRAD_SLOPES, padded_rows, ordinals_stride, sequences_stride, batches,
    heads, plan_batches, q_len, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of each sequence: a program for each (sequence, head).

    Args:
        ROW_SLOPES: (batches * heads, padded_rows).
        ORDINALS: (plan_batches, q_len), the sequence of each row.
        FIRST_ROW, LAST_ROW: int32 (plan_batches, at least sequences): no row before or after is the sequence's.
        GRAD_SLOPES: to be filled: float32 (sequences, heads).
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    sums = tl.zeros([BLOCK_M], tl.float64)
    for number in tl.range(0, batches):
        batch = head.to(tl.int64) * 0 + number
        plan_batch = batch % plan_batches
        first_row = tl.load(FIRST_ROW + plan_batch * sequences_stride + sequence)
        last_row = tl.load(LAST_ROW + plan_batch * sequences_stride + sequence)
        for tile in tl.range(0, tl.cdiv(tl.maximum(last_row - first_row, 0), BLOCK_M)):
            row = first_row + tile * BLOCK_M + tl.arange(0, BLOCK_M)
            ordinal = tl.load(ORDINALS + plan_batch * ordinals_stride + row, mask=row < q_len, other=-1)
            terms = tl.load(
                ROW_SLOPES + (batch * heads + head) * padded_rows + row, mask=ordinal == sequence, other=0.0
            )
            sums += terms.to(tl.float64)
    tl.store(GRAD_SLOPES + sequence * heads + head, tl.sum(sums, 0).to(tl.float32))
