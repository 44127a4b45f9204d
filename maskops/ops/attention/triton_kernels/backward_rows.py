"""Terms of rows, which the kernels of the gradients read: one pass over dO and O.

With P the softmax of a row, dP the gradients of its weights and D = sum(dO * O)::

    dS = P * (dP - delta),    delta = D - grad_lse

A sink scales O by the share g = sigmoid(lse - sink). Without a gradient of the lse, g goes into P: with
exp(s - logaddexp(lse, sink)) in the place of P everything stays as it is. With one, dS = P * (g dP - (g D - grad_lse)),
and the kernels are given the share as well: grad_lse / g would not be finite where a sink takes all.

The terms lie in a tensor (terms, batch * heads, padded rows), so that blocks of rows are loaded without a mask; behind
the last row, and in rows without a key, the log-sum-exp is +inf and delta is 0, and every P is 0. A row whose delta is
not finite has a log-sum-exp of NaN: then P is NaN wherever the row sees a key, and what the row holds need not be read,
which would bring it to keys that the row does not see.
"""

import triton
import triton.language as tl

from maskops.ops.attention.triton_kernels.arguments import OPEN
from maskops.ops.attention.triton_kernels.backward_scores import (
    DELTA,
    LOG2_SUM,
    LSE,
    NEVER,
    SHARE,
    scores_of_pairs,
)
from maskops.ops.attention.triton_kernels.features import (
    bounds_of,
    dense_bits,
    extras_of,
    inside_spans,
    partial_tile,
    partial_tiles,
    power,
    readable,
    rows_of,
    unit_of,
    walk_of,
)
from maskops.ops.attention.triton_kernels.forward import load_rows
from maskops.ops.triton_language import LN2, LOG2E, dot

LARGE = tl.constexpr(64.0)
"""A log-sum-exp of this size is off by more than 4e-6 as a float32, and from 2^24 on it has lost the logarithm in it:
exp(s - lse) would be 1 where it is 1 / n. Under a bias or slopes such rows take the maximum and the sum anew."""


@triton.jit
def _softplus2(x):
    """log2(1 + 2^x)."""
    return tl.maximum(x, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(x)))


@triton.jit(do_not_specialize=OPEN)
def row_terms_kernel(
    OUT, GRAD_OUT, FORWARD_LSE, GRAD_LSE, SINKS, START, END, TERMS, ROW_START, ROW_END, ROW_SINKS,
    out_batch_stride, out_head_stride, out_row_stride, grad_out_batch_stride, grad_out_head_stride,
    grad_out_row_stride, sinks_head_stride, span_stride, plan_stride, term_stride, padded_rows,
    heads, plan_batches, q_len, k_len,
    VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr, N_SPANS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, NATURAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Fills the terms of a block of rows of one head, and the padded spans.

    Args:
        OUT, GRAD_OUT: (batch, heads, q_len, VALUE_WIDTH).
        FORWARD_LSE, GRAD_LSE: float32 (batch, heads, q_len), contiguous.
        SINKS: float32 (heads,).
        START, END: (N_SPANS, plan_batches, q_len).
        TERMS: to be filled, as the module says; ``padded_rows`` is a multiple of BLOCK_M.
        ROW_START, ROW_END: to be filled: int32 (N_SPANS, plan_batches, padded_rows), within [0, k_len].
        ROW_SINKS: to be filled: (batch * heads, padded_rows), what each row adds to the gradient of its head's sink.
        HAS_GRAD_LSE: whether a gradient arrives at the log-sum-exp.
    """
    blocks = padded_rows // BLOCK_M
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < q_len
    lse = tl.load(FORWARD_LSE + batch_head * q_len + row, mask=exists, other=-NEVER)
    is_live = lse != -NEVER
    # Nothing of a row without a key is read.
    first_row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M
    out = load_rows(
        OUT + batch * out_batch_stride + head * out_head_stride + first_row * out_row_stride, out_row_stride, is_live,
        True, VALUE_WIDTH, BLOCK_DV, BLOCK_M, True,
    )  # fmt: skip
    grad_out = load_rows(
        GRAD_OUT + batch * grad_out_batch_stride + head * grad_out_head_stride + first_row * grad_out_row_stride,
        grad_out_row_stride, is_live, True, VALUE_WIDTH, BLOCK_DV, BLOCK_M, True,
    )  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    terms = TERMS + batch_head * padded_rows + row
    term_stride = tl.cast(term_stride, tl.int64)
    term = lse
    if HAS_SINKS:
        sink = tl.load(SINKS + head * sinks_head_stride)
        share = 1.0 / (1.0 + tl.exp2((sink - lse) * LOG2E))
        taken = 1.0 / (1.0 + tl.exp2((lse - sink) * LOG2E))
        tl.store(ROW_SINKS + batch_head * padded_rows + row, tl.where(is_live, -delta * taken, 0.0))
        if HAS_GRAD_LSE:
            delta *= share
            tl.store(terms + SHARE * term_stride, tl.where(is_live, share, 0.0))
        else:
            term = lse + _softplus2((sink - lse) * LOG2E) * LN2
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + batch_head * q_len + row, mask=is_live, other=0.0)
    if not NATURAL:
        term *= LOG2E
    is_finite = tl.abs(delta) < NEVER
    tl.store(terms + LSE * term_stride, tl.where(is_live, tl.where(is_finite, term, float("nan")), NEVER))
    tl.store(terms + DELTA * term_stride, tl.where(is_live, delta, 0.0))
    if HAS_BIAS or HAS_ALIBI:
        tl.store(terms + LOG2_SUM * term_stride, tl.zeros([BLOCK_M], tl.float32))
    if (head == 0) & (batch < plan_batches):
        for span in tl.static_range(N_SPANS):
            place = span * tl.cast(span_stride, tl.int64) + batch * plan_stride + row
            start = tl.load(START + place, mask=exists, other=0)
            end = tl.load(END + place, mask=exists, other=0)
            place = (span * plan_batches + batch) * padded_rows + row
            tl.store(ROW_START + place, tl.maximum(start, 0))
            tl.store(ROW_END + place, tl.minimum(end, k_len))


@triton.jit(do_not_specialize=OPEN)
def renewed_sums_kernel(
    Q, K, FORWARD_LSE, SINKS, TERMS, START, END, KEY_VALID, TILES, TILE_COUNT, ORDER,
    POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    span_stride, plan_stride, key_valid_stride, positions_stride, positions_batch_stride,
    dense_batch_stride, dense_head_stride, dense_row_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    slopes_outer, slopes_outer_stride, slopes_head_stride, sinks_head_stride, term_stride, padded_rows,
    capacity, plan_batches, repeats, heads, group, heads_at_a_time, q_len, k_len, factor, cap,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, N_SPANS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows with a large log-sum-exp: their maximum in its place, and the logarithm of the sum beside it.

    Units without such a row, and they are the rule, end at once.
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
    batch, head = unit.batch.to(tl.int64), unit.head.to(tl.int64)
    lse = tl.load(FORWARD_LSE + (batch * heads + head) * q_len + rows.index, mask=rows.exists, other=0.0)
    is_large = (tl.abs(lse) >= LARGE) & (tl.abs(lse) < NEVER)
    if tl.max(is_large.to(tl.int32), 0) == 0:
        return
    bounds = bounds_of(unit, rows, TILES, k_len, BLOCK_M, N_SPANS)
    lows, _, _, highs = bounds
    walk = walk_of((lows, highs, highs, highs), BLOCK_N, BLOCK_N, N_SPANS, HAS_DENSE, HAS_DENSE)
    extras = extras_of(
        unit, rows, POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
        plan_batches, positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride,
        bias_batch_stride, bias_head_stride, slopes_outer, slopes_outer_stride, slopes_head_stride,
        HAS_ALIBI, False, BY_SEQUENCE, NATURAL,
    )  # fmt: skip
    q = load_rows(
        Q + batch * q_batch_stride + head * q_head_stride + unit.first_row.to(tl.int64) * q_row_stride, q_row_stride,
        rows.exists, True, WIDTH, BLOCK_D, BLOCK_M, WIDE,
    )  # fmt: skip
    keys = K + batch * k_batch_stride + head // group * k_head_stride
    valid = KEY_VALID + unit.plan_batch.to(tl.int64) * key_valid_stride
    row_max = tl.full([BLOCK_M], -NEVER, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for number in tl.range(0, partial_tiles(walk, N_SPANS)):
        first_key = partial_tile(walk, number, BLOCK_N, BLOCK_N, N_SPANS)
        key = first_key + tl.arange(0, BLOCK_N)
        is_read = readable(key, bounds, valid, N_SPANS)
        k = load_rows(
            keys + first_key.to(tl.int64) * k_row_stride, k_row_stride, is_read, True, WIDTH, BLOCK_D, BLOCK_N, WIDE
        )
        is_visible = inside_spans(rows, key, N_SPANS) & is_read[None, :]
        if HAS_DENSE:
            is_visible &= dense_bits(
                extras.dense, rows.index, rows.exists, first_key, k_len, dense_row_stride, BLOCK_M, BLOCK_N
            )
        # Not "_", which holds bounds already: compiled code keeps the type of a name in a loop.
        scores, is_visible, _distance = scores_of_pairs(
            dot(q, tl.trans(k), None, PRECISION), is_visible, rows.index, key, extras, factor, cap, bias_row_stride,
            bias_key_stride, False, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP,
        )  # fmt: skip
        scores = tl.where(is_visible, scores, -NEVER)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == -NEVER, 0.0, new_max)
        row_sum = row_sum * power(row_max - shift, NATURAL) + tl.sum(power(scores - shift[:, None], NATURAL), 1)
        row_max = new_max
    log2_sum = tl.log2(row_sum)
    if HAS_SINKS and not HAS_GRAD_LSE:
        sink = tl.load(SINKS + head * sinks_head_stride)
        if NATURAL:
            over_max = (sink - row_max) * LOG2E
        else:
            over_max = sink * LOG2E - row_max
        log2_sum += _softplus2(over_max - log2_sum)
    terms = TERMS + (batch * heads + head) * padded_rows + rows.index
    # A row that is not finite keeps its NaN.
    term = tl.load(terms + LSE * term_stride)
    is_large &= term == term
    tl.store(terms + LSE * term_stride, row_max, mask=is_large)
    tl.store(terms + LOG2_SUM * term_stride, log2_sum, mask=is_large)
