"""Attention of few queries over a cache, which waits for memory: keys are read once for all queries of a group.

A tile's rows are (query, head of the group), and spans are read at row // group. The keys of a sequence are split among
programs in equal shares of what the sequence holds; how many shares there are follows from shapes alone, and they are
merged in their order. Pages are read in place.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops.ops.attention.registration import empty_in_order
from maskops.ops.attention.triton_kernels.features import (
    Rows,
    distances,
    inside_spans,
    natural,
    scores_of,
)
from maskops.ops.attention.triton_kernels.forward import merge_splits
from maskops.ops.decode.triton_kernels.places import cache_arguments, place_of
from maskops.ops.triton_language import LOG2E, architecture, dot, float32_precision, launch, padded
from maskops.tuning import Config, config

ENOUGH_PROGRAMS = 256
"""Programs below which keys are split further. No property of a device: results follow from shapes."""

KEYS_OF_A_SPLIT = 256

OPEN = (
    "q_len", "places_of_sequence", "n_places", "capacity", "splits", "out_split_stride", "lse_split_stride",
    "span_stride", "plan_stride", "key_valid_stride", "diagonal_stride", "q_batch_stride",
)  # fmt: skip
"""Integers that change from call to call: a kernel compiled for one of them serves all."""


@triton.jit(do_not_specialize=OPEN)
def decode_forward_kernel(
    Q, K_CACHE, V_CACHE, OUT, LSE, LENGTHS, LEFTPAD, PLACES, START, END, KEY_VALID, DENSE, DIAGONAL, SLOPES, SINKS,
    q_batch_stride, q_head_stride, q_row_stride, out_batch_stride, out_head_stride, out_row_stride, out_split_stride,
    lse_split_stride, k_cache_place_stride, k_cache_head_stride, k_cache_row_stride,
    v_cache_place_stride, v_cache_head_stride, v_cache_row_stride,
    lengths_stride, leftpad_stride, places_batch_stride, places_stride, places_of_sequence, n_places, page_size,
    capacity, span_stride, plan_stride, key_valid_stride, dense_batch_stride, dense_head_stride, dense_row_stride,
    diagonal_stride, slopes_outer_stride, slopes_head_stride, sinks_head_stride,
    heads, kv_heads, q_len, splits, factor, cap,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, N_SPANS: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr, HAS_PLACES: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes out and lse of BLOCK_M rows over one share of the keys; N_SPANS 0 is every key in use."""
    row_blocks = tl.cdiv(q_len * GROUP, BLOCK_M)
    program = tl.program_id(0)
    split = tl.program_id(1)
    block = program % row_blocks
    kv_head = program // row_blocks % kv_heads
    batch = (program // row_blocks // kv_heads).to(tl.int64)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < q_len * GROUP
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, BLOCK_D)[None, :]
    value_column = tl.arange(0, BLOCK_DV)[None, :]
    of_row = head.to(tl.int64) * q_head_stride + query.to(tl.int64) * q_row_stride
    q = tl.load(
        Q + batch * q_batch_stride + of_row[:, None] + column, mask=exists[:, None] & (column < WIDTH), other=0.0
    )

    high = tl.minimum(tl.maximum(tl.load(LENGTHS + batch * lengths_stride).to(tl.int64), 0), capacity).to(tl.int32)
    low = high * 0
    if HAS_LEFTPAD:
        skipped = tl.load(LEFTPAD + batch * leftpad_stride).to(tl.int64)
        low = tl.minimum(tl.maximum(skipped, 0), high).to(tl.int32)
    starts = (low + row * 0,)
    ends = (tl.where(exists, high, low),)
    if N_SPANS > 0:
        starts = ()
        ends = ()
        hull_low = high
        hull_high = low
        for span in tl.static_range(N_SPANS):
            in_plan = batch * plan_stride + span * tl.cast(span_stride, tl.int64) + query
            start = tl.maximum(tl.load(START + in_plan, mask=exists, other=0), low)
            end = tl.minimum(tl.load(END + in_plan, mask=exists, other=0), high)
            hull_low = tl.minimum(hull_low, tl.min(tl.where(end > start, start, high), 0))
            hull_high = tl.maximum(hull_high, tl.max(tl.where(end > start, end, low), 0))
            starts = starts + (start,)
            ends = ends + (end,)
        low = hull_low
        high = hull_high
    rows = Rows(index=query, exists=exists, starts=starts, ends=ends, is_live=exists)
    if HAS_ALIBI:
        slope = (
            tl.load(SLOPES + batch * slopes_outer_stride + head * slopes_head_stride, mask=exists, other=0.0) * LOG2E
        )
        diagonal = tl.load(DIAGONAL + batch * diagonal_stride + query, mask=exists, other=0)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    n_tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    keys = K_CACHE + kv_head.to(tl.int64) * k_cache_head_stride
    values = V_CACHE + kv_head.to(tl.int64) * v_cache_head_stride
    for number in tl.range(n_tiles * split // splits, n_tiles * (split + 1) // splits):
        key = low + number * BLOCK_N + tl.arange(0, BLOCK_N)
        is_read = key < high
        if N_SPANS > 0:
            is_read = tl.load(KEY_VALID + batch * key_valid_stride + key, mask=is_read, other=0) != 0
        place, slot, is_there = place_of(
            tl.where(is_read, key, 0), is_read, PLACES, batch, places_batch_stride, places_stride,
            places_of_sequence, n_places, page_size, HAS_PLACES,
        )  # fmt: skip
        is_read = is_read & is_there
        slot = slot.to(tl.int64)
        of_key = place * k_cache_place_stride + slot * k_cache_row_stride
        k = tl.load(keys + of_key[:, None] + column, mask=is_read[:, None] & (column < WIDTH), other=0.0)
        scores = scores_of(dot(q, tl.trans(k), None, PRECISION), factor, cap, HAS_SOFTCAP)
        if HAS_ALIBI:
            scores -= slope[:, None] * distances(diagonal[:, None], key[None, :])
        is_visible = inside_spans(rows, tl.where(is_read, key, -1), max(N_SPANS, 1))
        if HAS_DENSE:
            pair = DENSE + batch * dense_batch_stride + head.to(tl.int64)[:, None] * dense_head_stride
            pair = pair + query.to(tl.int64)[:, None] * dense_row_stride + key[None, :]
            is_visible = is_visible & (tl.load(pair, mask=is_visible, other=0) != 0)
        scores = tl.where(is_visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row without a visible key so far has no maximum: its weights are 0, not NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        of_value = place * v_cache_place_stride + slot * v_cache_row_stride
        v = tl.load(
            values + of_value[:, None] + value_column, mask=is_read[:, None] & (value_column < VALUE_WIDTH), other=0.0
        )
        acc = dot(weights.to(v.dtype), v, acc * decay[:, None], PRECISION)
        row_max = new_max

    is_empty = row_sum == 0.0
    share = 1.0 / tl.where(is_empty, 1.0, row_sum)
    lse = natural(row_max, tl.where(is_empty, 1.0, row_sum), False)
    if HAS_SINKS:
        sink = tl.load(SINKS + head * sinks_head_stride, mask=exists, other=0.0)
        share = share / (1.0 + tl.exp2((sink - lse) * LOG2E))
    out = tl.where(is_empty[:, None], 0.0, acc * share[:, None])
    place = OUT + split.to(tl.int64) * out_split_stride + batch * out_batch_stride
    place = place + (head.to(tl.int64) * out_head_stride + query.to(tl.int64) * out_row_stride)[:, None] + value_column
    tl.store(place, out.to(OUT.dtype.element_ty), mask=exists[:, None] & (value_column < VALUE_WIDTH))
    place = LSE + split.to(tl.int64) * lse_split_stride + (batch * heads + head) * q_len + query
    tl.store(place, tl.where(is_empty, float("-inf"), lse), mask=exists)


def decode_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    leftpad: Tensor,
    block_table: Tensor,
    batch_index: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    dense: Tensor,
    diagonal: Tensor,
    alibi_slopes: Tensor,
    sinks: Tensor,
    softmax_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``decode_forward_triton``; arguments as in ``registration``."""
    arguments = decode_arguments(
        q, k_cache, v_cache, lengths, leftpad, block_table, batch_index, start, end, key_valid, dense, diagonal,
        alibi_slopes, sinks, softmax_scale, softcap,
    )  # fmt: skip
    batch, _, q_len, _ = q.shape
    out = empty_in_order(q, v_cache.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tuned = tuned_for(arguments, architecture(q.device))
    row_blocks = -(-q_len * arguments["GROUP"] // tuned.blocks["BLOCK_M"])
    programs = batch * arguments["kv_heads"] * row_blocks
    splits = max(min(-(-ENOUGH_PROGRAMS // programs), arguments["capacity"] // KEYS_OF_A_SPLIT), 1)
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty((splits, *q.shape[:3], v_cache.shape[3]), dtype=torch.float32)
        part_lse = q.new_empty((splits, *q.shape[:3]), dtype=torch.float32)
    arguments |= output_arguments(parts, part_lse, splits, sinks)
    launch(decode_forward_kernel, (programs, splits), q, (), **arguments, **tuned.launch())
    if splits > 1:
        merge_splits(parts, part_lse, sinks[None] if sinks.numel() else sinks, out, lse)
    return out, lse


def tuned_for(arguments: dict[str, Any], architecture: str) -> Config:
    """Tiles, warps and stages of a call."""
    element = "single" if arguments["Q"].element_size() == 4 else "half"
    return config("decode", architecture, element, max(arguments["WIDTH"], arguments["VALUE_WIDTH"]))


def output_arguments(out: Tensor, lse: Tensor, splits: int, sinks: Tensor) -> dict[str, Any]:
    """Arguments of the kernel for its outputs, which have a dimension of splits if there are several."""
    of_split, lse_of_split = (out[0], lse[0]) if splits > 1 else (out, lse)
    return {
        "OUT": out,
        "LSE": lse,
        "splits": splits,
        "out_batch_stride": of_split.stride(0),
        "out_head_stride": of_split.stride(1),
        "out_row_stride": of_split.stride(2),
        "out_split_stride": of_split.numel(),
        "lse_split_stride": lse_of_split.numel(),
        # the sink is applied to the whole
        "HAS_SINKS": sinks.numel() > 0 and splits == 1,
    }


def decode_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    leftpad: Tensor,
    block_table: Tensor,
    batch_index: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    dense: Tensor,
    diagonal: Tensor,
    alibi_slopes: Tensor,
    sinks: Tensor,
    softmax_scale: float,
    softcap: float,
) -> dict[str, Any]:
    """Checks the arguments of the operator, and gives those of its kernel but for outputs and blocks.

    Raises:
        ValueError: the arguments do not belong together.
    """
    _require(q.dim() == 4 and (q.shape[3] <= 1 or q.stride(3) == 1), "q must have 4 dimensions, the last contiguous")
    batch, heads, q_len, width = q.shape
    known = cache_arguments("decode", k_cache, v_cache, lengths, block_table, batch_index, batch)
    kv_heads, capacity = k_cache.shape[1], known["capacity"]
    _require(q.dtype == k_cache.dtype, "q must have the dtype of the cache")
    _require(width == k_cache.shape[3], "q and the cache must have one head dimension")
    _require(heads == 0 or (kv_heads > 0 and heads % kv_heads == 0), "the heads of the cache must divide those of q")
    _require(max(batch, 1) * max(heads, 1) * max(q_len, 1) < 2**31 - 1024, "too many rows of q")
    has_leftpad, has_spans, has_dense = leftpad.numel() > 0, start.dim() == 3, dense.dim() == 4
    has_alibi = alibi_slopes.dim() == 2
    if has_leftpad:
        _require(
            leftpad.shape == (batch,) and leftpad.dtype in (torch.int32, torch.int64),
            "leftpad must be integers (batch,)",
        )
    if has_spans:
        plan_batch = start.shape[1]
        _require(
            start.dtype == end.dtype == torch.int32
            and key_valid.dtype == torch.uint8
            and start.shape[0] >= 1
            and plan_batch in (1, batch)
            and start.shape[2] == q_len
            and start.shape == end.shape
            and key_valid.shape == (plan_batch, capacity),
            "the spans are for another shape",
        )
        _require(
            all(x.shape[-1] <= 1 or x.stride(-1) == 1 for x in (start, end, key_valid))
            and start.stride() == end.stride(),
            "the spans must be contiguous",
        )
    if has_dense:
        _require(
            dense.dtype == torch.bool
            and dense.shape[0] in (1, batch)
            and dense.shape[1] in (1, heads)
            and dense.shape[2:] == (q_len, capacity)
            and (capacity <= 1 or dense.stride(3) == 1),
            "dense must be bool (batch or 1, heads or 1, q_len, keys)",
        )
    if has_alibi:
        _require(
            alibi_slopes.dtype == torch.float32
            and alibi_slopes.shape[0] in (1, batch)
            and alibi_slopes.shape[1] == heads
            and diagonal.dtype == torch.int32
            and diagonal.dim() == 2
            and diagonal.shape[0] in (1, batch)
            and diagonal.shape[1] == q_len
            and (q_len <= 1 or diagonal.stride(1) == 1),
            "alibi_slopes must be float32 (batch or 1, heads), the diagonal int32 (batch or 1, q_len)",
        )
    _require(
        sinks.numel() == 0 or (sinks.dtype == torch.float32 and sinks.shape == (heads,)),
        "sinks must be float32 (heads,)",
    )
    unit = math.log2(math.e)
    names = set(decode_forward_kernel.arg_names)
    return {
        **{name: value for name, value in known.items() if name in names},
        "Q": q, "LEFTPAD": leftpad, "START": start, "END": end, "KEY_VALID": key_valid,
        "DENSE": dense.view(torch.uint8) if has_dense else dense,
        "DIAGONAL": diagonal, "SLOPES": alibi_slopes, "SINKS": sinks,
        "q_batch_stride": q.stride(0), "q_head_stride": q.stride(1), "q_row_stride": q.stride(2),
        "leftpad_stride": leftpad.stride(0) if has_leftpad else 0,
        "span_stride": start.stride(0) if has_spans else 0,
        "plan_stride": start.stride(1) if has_spans and start.shape[1] > 1 else 0,
        "key_valid_stride": key_valid.stride(0) if has_spans and start.shape[1] > 1 else 0,
        "dense_batch_stride": dense.stride(0) if has_dense and dense.shape[0] > 1 else 0,
        "dense_head_stride": dense.stride(1) if has_dense and dense.shape[1] > 1 else 0,
        "dense_row_stride": dense.stride(2) if has_dense else 0,
        "diagonal_stride": diagonal.stride(0) if has_alibi and diagonal.shape[0] > 1 else 0,
        "slopes_outer_stride": alibi_slopes.stride(0) if has_alibi and alibi_slopes.shape[0] > 1 else 0,
        "slopes_head_stride": alibi_slopes.stride(1) if has_alibi else 0,
        "sinks_head_stride": sinks.stride(0) if sinks.numel() else 0,
        "heads": heads, "kv_heads": kv_heads, "q_len": q_len,
        "factor": softmax_scale / softcap if softcap else softmax_scale * unit,
        "cap": softcap * unit,
        "WIDTH": width, "VALUE_WIDTH": v_cache.shape[3],
        "BLOCK_D": padded(width), "BLOCK_DV": padded(v_cache.shape[3]),
        "GROUP": heads // kv_heads if kv_heads else 1,
        "N_SPANS": start.shape[0] if has_spans else 0,
        "HAS_LEFTPAD": has_leftpad, "HAS_DENSE": has_dense, "HAS_ALIBI": has_alibi, "HAS_SOFTCAP": softcap != 0.0,
        "PRECISION": float32_precision() if q.dtype == torch.float32 else "ieee",
    }  # fmt: skip


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"decode: {what}")
