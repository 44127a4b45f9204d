"""The forward kernel of span attention: one program a multiprocessor walks the work list, tile by tile of keys.

Keys that every row of a unit sees run without any code of the mask; the others compare with the spans of the rows. What
no row sees is never loaded. A unit whose keys are many while units are few is split along the keys, and the parts are
merged in a fixed order: how many there are follows from shapes alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from maskops.ops.attention.registration import empty_in_order
from maskops.ops.attention.triton_kernels.arguments import OPEN, Problem, chosen, problem_of, strides_of
from maskops.ops.attention.triton_kernels.features import (
    bias_of,
    bounds_of,
    dense_bits,
    distances,
    extras_of,
    full_tile,
    full_tiles,
    inside_spans,
    kept,
    natural,
    partial_tile,
    partial_tiles,
    power,
    readable,
    rows_of,
    scores_of,
    unit_of,
    walk_of,
)
from maskops.ops.triton_language import LN2, LOG2E, architecture, dot, launch, multiprocessors, padded
from maskops.tuning import Config, config

ENOUGH_PROGRAMS = 128
"""Units below which the keys of each are split, if they are many. No property of a device: shapes decide."""

KEYS_OF_A_SPLIT = 1024


@triton.jit
def load_rows(
    BASE, row_stride, is_read,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows of a matrix, from the row at BASE on; its BLOCK columns beyond WIDTH are 0.

    Args:
        is_read: with MASKED which rows are loaded; the others are 0.
        WIDE: offsets within a tile need 64 bits.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if WIDE:
        row = row.to(tl.int64)
    place = BASE + (row * row_stride + column)
    if MASKED:
        if WIDTH == BLOCK:
            return tl.load(place, mask=is_read[:, None], other=0.0)
        return tl.load(place, mask=is_read[:, None] & (column < WIDTH), other=0.0)
    if WIDTH == BLOCK:
        return tl.load(place)
    return tl.load(place, mask=column < WIDTH, other=0.0)


@triton.jit
def _visit(
    acc, row_sum, row_max, q, first_key, rows, extras, bounds, unit, K, V, KEY_VALID, K_TILES, V_TILES,
    kv_head, k_row_stride, v_row_stride, dense_row_stride, bias_row_stride, bias_key_stride, k_len,
    factor, cap, last_dropped, keep_scale,
    PARTIAL: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FUSED: tl.constexpr, NATURAL: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the running softmax."""
    key = first_key + tl.arange(0, BLOCK_N)
    is_read = key >= 0
    if PARTIAL:
        is_read = readable(key, bounds, KEY_VALID, N_SPANS)
    if K_TILES is None or PARTIAL:
        # Keys that nothing sees may be read, since their scores are selected; their values may not.
        k = load_rows(
            K + first_key.to(tl.int64) * k_row_stride, k_row_stride, key < k_len, PARTIAL, WIDTH, BLOCK_D, BLOCK_N, WIDE
        )
    else:
        k = K_TILES.load([unit.batch, kv_head, first_key, 0]).reshape([BLOCK_N, BLOCK_D])
    scores = dot(q, tl.trans(k), None, PRECISION)
    if not FUSED:
        scores = scores_of(scores, factor, cap, HAS_SOFTCAP)
    if HAS_BIAS:
        bias = extras.bias + unit.first_row.to(tl.int64) * bias_row_stride + first_key.to(tl.int64) * bias_key_stride
        pairs = rows.exists[:, None] & is_read[None, :]
        row = tl.arange(0, BLOCK_M)[:, None]
        column = tl.arange(0, BLOCK_N)[None, :]
        scores += bias_of(bias, row, column, pairs, bias_row_stride, bias_key_stride, WIDE)
    if HAS_ALIBI:
        scores -= extras.slope[:, None] * distances(extras.diagonal[:, None], key[None, :])
    if PARTIAL:
        # No span holds -1: one comparison less for every pair, and registers enough for it on every compiler.
        is_visible = inside_spans(rows, tl.where(is_read, key, -1), N_SPANS)
        if HAS_DENSE:
            is_visible &= dense_bits(
                extras.dense, rows.index, rows.exists, first_key, k_len, dense_row_stride, BLOCK_M, BLOCK_N
            )
        scores = tl.where(is_visible, scores, float("-inf"))
    peak = tl.max(scores, 1)
    if FUSED:
        peak *= factor
    new_max = tl.maximum(row_max, peak)
    # A row without a visible key so far has no maximum: its weights are 0, not NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    if FUSED:
        weights = tl.exp2(scores * factor - shift[:, None])
    else:
        weights = power(scores - shift[:, None], NATURAL)
    decay = power(row_max - shift, NATURAL)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if HAS_DROPOUT:
        is_kept = kept(
            extras.seed, last_dropped, key[None, :], extras.first[:, None],
            (extras.diagonal - extras.first)[:, None], unit.head, extras.ordinal[:, None],
        )  # fmt: skip
        weights = tl.where(is_kept, weights * keep_scale, 0.0)
    # A weight of 0 does not make a NaN harmless: values that nobody sees are not loaded.
    if V_TILES is None or PARTIAL:
        v = load_rows(
            V + first_key.to(tl.int64) * v_row_stride, v_row_stride, is_read, PARTIAL, VALUE_WIDTH, BLOCK_DV, BLOCK_N,
            WIDE,
        )  # fmt: skip
    else:
        v = V_TILES.load([unit.batch, kv_head, first_key, 0]).reshape([BLOCK_N, BLOCK_DV])
    acc = dot(weights.to(v.dtype), v, acc, PRECISION)
    return acc, row_sum, new_max


@triton.jit(do_not_specialize=OPEN)
def attention_forward_kernel(
    Q, K, V, K_TILES, V_TILES, OUT, LSE, START, END, KEY_VALID, TILES, TILE_COUNT, ORDER,
    POSITIONS, DENSE, BIAS, SLOPES, SINKS, SEED, LAST_ORDINAL,
    q_batch_stride, q_head_stride, q_row_stride, k_batch_stride, k_head_stride, k_row_stride,
    v_batch_stride, v_head_stride, v_row_stride, out_batch_stride, out_head_stride, out_row_stride, out_split_stride,
    lse_split_stride, span_stride, plan_stride, key_valid_stride, positions_stride, positions_batch_stride,
    dense_batch_stride, dense_head_stride, dense_row_stride,
    bias_batch_stride, bias_head_stride, bias_row_stride, bias_key_stride,
    slopes_outer, slopes_outer_stride, slopes_head_stride, sinks_head_stride,
    capacity, plan_batches, repeats, heads, group, heads_at_a_time, q_len, k_len, splits,
    factor, cap, last_dropped, keep_scale,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_SPANS: tl.constexpr, HAS_ORDER: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ALIBI: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FUSED: tl.constexpr,
    NATURAL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes out and lse of every row of the work list.

    K_TILES and V_TILES are descriptors of the same keys and values for the hardware that copies tiles, or None.
    With several splits OUT and LSE are float32 buffers of parts, (splits, batch, heads, rows[, width]), each normalised
    by itself.
    """
    # Code of the mask takes registers: partial tiles are half as wide as full ones, and compute less in vain.
    BLOCK_P: tl.constexpr = max(BLOCK_N // 2, min(BLOCK_N, 32))
    n_items = tl.minimum(tl.load(TILE_COUNT), capacity)
    n_units = n_items * (128 // BLOCK_M) * repeats * heads * splits
    programs = tl.num_programs(0)
    this = tl.program_id(0)
    for turn in tl.range(0, tl.cdiv(n_units, programs)):
        # Units are sorted by cost; there and back again, so that no program gets the costlier one at every turn.
        work = turn * programs + tl.where(turn % 2 == 0, this, programs - 1 - this)
        split = work % splits
        unit = unit_of(
            tl.minimum(work, n_units - 1) // splits, TILES, ORDER, n_items, plan_batches, repeats, heads,
            heads_at_a_time, q_len, BLOCK_M, N_SPANS, HAS_ORDER,
        )  # fmt: skip
        if (work < n_units) & (unit.rows > 0):
            rows = rows_of(unit, START, END, span_stride, plan_stride, k_len, BLOCK_M, N_SPANS)
            bounds = bounds_of(unit, rows, TILES, k_len, BLOCK_M, N_SPANS)
            walk = walk_of(bounds, BLOCK_N, BLOCK_P, N_SPANS, HAS_DENSE, HAS_DENSE or HAS_BIAS)
            extras = extras_of(
                unit, rows, POSITIONS, DENSE, BIAS, SLOPES, SEED, LAST_ORDINAL,
                plan_batches, positions_stride, positions_batch_stride, dense_batch_stride, dense_head_stride,
                bias_batch_stride, bias_head_stride, slopes_outer, slopes_outer_stride, slopes_head_stride,
                HAS_ALIBI, HAS_DROPOUT, BY_SEQUENCE, NATURAL,
            )  # fmt: skip
            batch = unit.batch.to(tl.int64)
            head = unit.head.to(tl.int64)
            kv_head = unit.head // group
            row = unit.first_row.to(tl.int64)
            q = load_rows(
                Q + batch * q_batch_stride + head * q_head_stride + row * q_row_stride, q_row_stride, rows.exists,
                True, WIDTH, BLOCK_D, BLOCK_M, WIDE,
            )  # fmt: skip
            keys = K + batch * k_batch_stride + kv_head.to(tl.int64) * k_head_stride
            values = V + batch * v_batch_stride + kv_head.to(tl.int64) * v_head_stride
            valid = KEY_VALID + unit.plan_batch.to(tl.int64) * key_valid_stride

            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            n_fulls = full_tiles(walk, N_SPANS)
            for number in tl.range(n_fulls * split // splits, n_fulls * (split + 1) // splits):
                first_key = full_tile(walk, number, BLOCK_N, BLOCK_P, N_SPANS)
                if HAS_BIAS:
                    first_key = tl.multiple_of(first_key, 16)
                acc, row_sum, row_max = _visit(
                    acc, row_sum, row_max, q, first_key, rows, extras, bounds, unit,
                    keys, values, valid, K_TILES, V_TILES, kv_head, k_row_stride, v_row_stride, dense_row_stride,
                    bias_row_stride, bias_key_stride, k_len, factor, cap, last_dropped, keep_scale,
                    False, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, N_SPANS,
                    HAS_DENSE, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_SOFTCAP, FUSED, NATURAL, WIDE, PRECISION,
                )  # fmt: skip
            n_partials = partial_tiles(walk, N_SPANS)
            for number in tl.range(n_partials * split // splits, n_partials * (split + 1) // splits):
                first_key = partial_tile(walk, number, BLOCK_N, BLOCK_P, N_SPANS)
                if HAS_BIAS:
                    first_key = tl.multiple_of(first_key, 16)
                acc, row_sum, row_max = _visit(
                    acc, row_sum, row_max, q, first_key, rows, extras, bounds, unit,
                    keys, values, valid, K_TILES, V_TILES, kv_head, k_row_stride, v_row_stride, dense_row_stride,
                    bias_row_stride, bias_key_stride, k_len, factor, cap, last_dropped, keep_scale,
                    True, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_P, N_SPANS,
                    HAS_DENSE, HAS_BIAS, HAS_ALIBI, HAS_DROPOUT, HAS_SOFTCAP, FUSED, NATURAL, WIDE, PRECISION,
                )  # fmt: skip

            # Empty rows took part in the full tiles: they are selected, since 0 * NaN is not 0. A NaN stays.
            is_empty = (row_sum == 0.0) | (rows.is_live == 0)
            share = 1.0 / tl.where(is_empty, 1.0, row_sum)
            lse = natural(row_max, tl.where(is_empty, 1.0, row_sum), NATURAL)
            if HAS_SINKS:
                sink = tl.load(SINKS + unit.head * sinks_head_stride)
                share = share / (1.0 + tl.exp2((sink - lse) * LOG2E))
            out = tl.where(is_empty[:, None], 0.0, acc * share[:, None])
            lse = tl.where(is_empty, float("-inf"), lse)
            offset = tl.arange(0, BLOCK_M)
            column = tl.arange(0, BLOCK_DV)[None, :]
            place = OUT + split.to(tl.int64) * out_split_stride + batch * out_batch_stride + head * out_head_stride
            place = place + row * out_row_stride + (offset.to(tl.int64)[:, None] * out_row_stride + column)
            is_written = rows.exists[:, None] & (column < VALUE_WIDTH)
            tl.store(place, out.to(OUT.dtype.element_ty), mask=is_written)
            place = LSE + split.to(tl.int64) * lse_split_stride + (batch * heads + head) * q_len + row
            tl.store(place + offset, lse, mask=rows.exists)


@triton.jit(do_not_specialize=OPEN)
def merge_splits_kernel(
    PARTS, PART_LSE, OUT, LSE, SINKS, out_batch_stride, out_head_stride, out_row_stride, sinks_head_stride,
    n_rows, heads, q_len, splits,
    VALUE_WIDTH: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merges the parts of splits, first to last: out and lse of BLOCK_M of the ``n_rows`` (batch, head, row)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < n_rows
    column = tl.arange(0, BLOCK_DV)
    is_there = exists[:, None] & (column[None, :] < VALUE_WIDTH)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total_weight = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        part = split * n_rows.to(tl.int64) + row
        lse = tl.load(PART_LSE + part, mask=exists, other=float("-inf"))
        new_highest = tl.maximum(highest, lse)
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = tl.exp2((lse - shift) * LOG2E)
        decay = tl.exp2((highest - shift) * LOG2E)
        values = tl.load(PARTS + part[:, None] * VALUE_WIDTH + column[None, :], mask=is_there, other=0.0)
        # A part without a visible key adds nothing, whatever it is multiplied by.
        acc = acc * decay[:, None] + values * weight[:, None]
        total_weight = total_weight * decay + weight
        highest = new_highest
    is_empty = total_weight == 0.0
    share = 1.0 / tl.where(is_empty, 1.0, total_weight)
    lse = highest + tl.log2(tl.where(is_empty, 1.0, total_weight)) * LN2
    head = row // q_len % heads
    if HAS_SINKS:
        sink = tl.load(SINKS + head * sinks_head_stride, mask=exists, other=0.0)
        share = share / (1.0 + tl.exp2((sink - lse) * LOG2E))
    out = tl.where(is_empty[:, None], 0.0, acc * share[:, None])
    place = row // q_len // heads * out_batch_stride + head * out_head_stride + row % q_len * out_row_stride
    tl.store(OUT + place[:, None] + column[None, :], out.to(OUT.dtype.element_ty), mask=is_there)
    tl.store(LSE + row, tl.where(is_empty, float("-inf"), lse), mask=exists)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    tiles: Tensor,
    tile_count: Tensor,
    key_tiles: Tensor,
    order: Tensor,
    positions: Tensor,
    dense: Tensor,
    bias: Tensor,
    alibi_slopes: Tensor,
    sinks: Tensor,
    seed: Tensor,
    slopes_by_sequence: bool,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``attention_forward_triton``; arguments as in ``registration``."""
    problem = problem_of(
        q, k, v, start, end, key_valid, tiles, tile_count, order, positions, dense, bias, alibi_slopes, sinks, seed,
        slopes_by_sequence, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    out = empty_in_order(q, problem.value_width)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tuned = tuned_for(problem, architecture(q.device))
    splits = splits_of(problem, tuned)
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty((splits, *q.shape[:3], problem.value_width), dtype=torch.float32)
        part_lse = q.new_empty((splits, *q.shape[:3]), dtype=torch.float32)
    arguments = forward_arguments(problem, parts, part_lse, splits)
    if can_describe(problem, architecture(q.device)):
        arguments.update(descriptors(problem, tuned))
    resident = multiprocessors(q.device) * max(8 // tuned.num_warps, 1)
    programs = min(problem.units(tuned.blocks["BLOCK_M"]) * splits, resident)
    launch(attention_forward_kernel, (programs,), q, (), **arguments, **tuned.launch())
    if splits > 1:
        merge_splits(parts, part_lse, sinks, out, lse)
    return out, lse


def tuned_for(problem: Problem, architecture: str) -> Config:
    """Tiles, warps and stages. What is read or drawn for every pair takes registers: then the tiles are smaller."""
    is_per_pair = problem.values["HAS_BIAS"] or problem.values["HAS_DROPOUT"]
    kernel = "attention_forward_per_pair" if is_per_pair else "attention_forward"
    return config(kernel, architecture, problem.element, max(problem.width, problem.value_width))


def can_describe(problem: Problem, architecture: str) -> bool:
    """Whether the hardware's copies of tiles serve these keys and values: 16-byte strides, halves, sm_90."""
    k, v = problem.values["K"], problem.values["V"]
    return architecture == "sm_90" and problem.element == "half" and k.numel() > 0 and all(map(is_describable, (k, v)))


def is_describable(x: Tensor) -> bool:
    """Whether a (batch, heads, rows, width) tensor has the address and the strides that a descriptor needs."""
    steps = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in steps)
    return aligned and x.numel() > 0 and x.data_ptr() % 16 == 0 and x.shape[3] * x.element_size() >= 16


def descriptors(problem: Problem, tuned: Config) -> dict[str, TensorDescriptor]:
    """Descriptors of the tiles of keys and values; beyond the tensor they read zeros."""
    block_keys = tuned.blocks["BLOCK_N"]
    described = {}
    for name, block in (("K", problem.values["BLOCK_D"]), ("V", problem.values["BLOCK_DV"])):
        x = problem.values[name]
        # A dimension of one has no step of its own: any will do that is allowed.
        strides = [stride if size > 1 else 16 * x.shape[3] for stride, size in zip(x.stride(), x.shape, strict=True)]
        described[f"{name}_TILES"] = TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, block_keys, block])
    return described


def splits_of(problem: Problem, tuned: Config) -> int:
    """Parts into which the keys of each unit are split: from shapes alone, so that results are."""
    units = problem.batch * problem.heads * -(-problem.q_len // tuned.blocks["BLOCK_M"])
    return min(-(-ENOUGH_PROGRAMS // units), max(problem.k_len // KEYS_OF_A_SPLIT, 1))


def forward_arguments(problem: Problem, out: Tensor, lse: Tensor, splits: int) -> dict[str, Any]:
    """Arguments of the forward kernel but for blocks; ``out`` and ``lse`` with a dimension of splits if there are."""
    of_split, lse_of_split = (out[0], lse[0]) if splits > 1 else (out, lse)
    more: dict[str, Any] = {"OUT": out, "LSE": lse, "splits": splits, "K_TILES": None, "V_TILES": None}
    more.update(strides_of("out", of_split))
    more["out_split_stride"] = of_split.numel()
    more["lse_split_stride"] = lse_of_split.numel()
    if splits > 1:  # the sink is applied to the whole
        more["HAS_SINKS"] = False
    return chosen(attention_forward_kernel, problem.values, **more)


def merge_splits(parts: Tensor, part_lse: Tensor, sinks: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merges the parts of splits, which attend to different keys, in their order.

    Args:
        parts: float32 (splits, batch, heads, rows, width), contiguous.
        part_lse: float32 (splits, batch, heads, rows), contiguous.
        sinks: float32 (1, heads), or empty.
        out: (batch, heads, rows, width), written.
        lse: float32 (batch, heads, rows), written.
    """
    splits, _, heads, q_len, width = parts.shape
    n_rows = lse.numel()
    block_rows = max(4096 // padded(width), 1)
    arguments = chosen(
        merge_splits_kernel,
        {
            "PARTS": parts, "PART_LSE": part_lse, "OUT": out, "LSE": lse, "SINKS": sinks, **strides_of("out", out),
            "sinks_head_stride": sinks.stride(1) if sinks.numel() else 0, "n_rows": n_rows, "heads": heads,
            "q_len": q_len, "splits": splits, "VALUE_WIDTH": width, "BLOCK_DV": padded(width), "BLOCK_M": block_rows,
            "HAS_SINKS": sinks.numel() > 0,
        },
    )  # fmt: skip
    launch(merge_splits_kernel, (-(-n_rows // block_rows),), out, (), **arguments, num_warps=4, num_stages=2)
