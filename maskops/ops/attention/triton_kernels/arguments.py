"""From the arguments of an operator to those of its kernels, which are passed by name.

Checked is what the kernels rely on for their memory accesses; integers in device memory are clamped by the kernels
themselves. Nothing here reads a value of a tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskops.ops.triton_language import float32_precision, padded
from maskops.spans import TILE_ROWS

_CACHE_BYTES = 16 * 2**20
"""Keys and values that are meant to stay in the second-level cache, a share of the 40 MB of the smallest."""

_INT32_MAX = 2**31 - 1

_LEAST_NORMAL = 2.0**-126
"""Of float32."""

OPEN = (
    "q_len", "k_len", "n_rows", "capacity", "batches", "plan_batches", "repeats", "heads_at_a_time", "splits", "parts",
    "row_parts", "span_stride", "plan_stride", "key_valid_stride", "positions_stride", "positions_batch_stride",
    "dense_batch_stride", "dense_head_stride", "dense_row_stride", "slopes_outer", "ordinals_stride",
    "sequences_stride", "key_tiles_span_stride", "key_tiles_batch_stride", "out_split_stride", "lse_split_stride",
    "grad_bias_part_stride", "last_dropped",
)  # fmt: skip
"""Integers that change with the lengths of a batch, for ``do_not_specialize``: Triton would compile a kernel anew where
one of them is 1 or becomes a multiple of 16. Strides of queries, keys, values and of a bias are not among them, since
wide loads need to know that they are such multiples; heads, widths and padded rows do not change or always are."""


@dataclass(frozen=True)
class Problem:
    """Sizes of a call, and everything that any kernel of it takes, by the names of the kernels' parameters."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    width: int
    value_width: int
    n_spans: int
    plan_batch: int
    capacity: int
    values: Mapping[str, Any]

    @property
    def element(self) -> str:
        """The column of the tuning tables."""
        return "single" if self.values["Q"].element_size() == 4 else "half"

    def units(self, block_rows: int) -> int:
        """No more units than this are in the work list, for tiles of so many rows."""
        repeats: int = self.values["repeats"]
        units = self.capacity * (TILE_ROWS // block_rows) * repeats * self.heads
        _require(units <= _INT32_MAX, "too many rows and heads")
        return units


def chosen(kernel: Any, values: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments of a kernel, out of those that are known by name."""
    known = {**values, **more}
    return {name: known[name] for name in kernel.arg_names if name in known}


def strides_of(name: str, x: Tensor) -> dict[str, int]:
    """Strides of a (batch, heads, rows, width) tensor, as kernels name them."""
    return {
        f"{name}_batch_stride": x.stride(0),
        f"{name}_head_stride": x.stride(1),
        f"{name}_row_stride": x.stride(2),
    }


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    tiles: Tensor,
    tile_count: Tensor,
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
) -> Problem:
    """Checks the arguments of an operator and names them.

    Raises:
        ValueError: the arguments do not belong together.
    """
    _check_values(q, k, v)
    batch, heads, q_len, width = q.shape
    kv_heads, k_len, value_width = k.shape[1], k.shape[2], v.shape[3]
    _check_plan(q, k, start, end, key_valid, tiles, tile_count, order)
    n_spans, plan_batch, _ = start.shape
    full = (batch, heads, q_len, k_len)
    dense_shape = (*full[:3], (k_len + 31) // 32)
    has_dense, has_bias = dense.numel() > 0, bias.numel() > 0
    if has_dense:
        _require(
            dense.dim() == 4
            and dense.dtype == torch.int32
            and all(size in (1, whole) for size, whole in zip(dense.shape[:2], full[:2], strict=True))
            and dense.shape[2:] == dense_shape[2:]
            and dense.stride(3) == 1,
            "dense must be the bits of a mask, int32 (batch|1, heads|1, q_len, ceil(k_len / 32))",
        )
    if has_bias:
        _require(
            bias.dim() == 4 and all(size in (1, whole) for size, whole in zip(bias.shape, full, strict=True)),
            "bias must broadcast to (batch, heads, q_len, k_len)",
        )
    _check_per_head("alibi_slopes", alibi_slopes, heads)
    _check_per_head("sinks", sinks, heads)
    _require(sinks.numel() == 0 or sinks.shape[0] == 1, "sinks must be float32 (1, heads)")
    has_alibi = alibi_slopes.numel() > 0
    _require(
        not has_alibi or slopes_by_sequence or alibi_slopes.shape[0] in (1, batch),
        "alibi_slopes must be (1 or batch, heads)",
    )
    _require(0.0 <= dropout_p < 1.0, "dropout_p must be in [0, 1)")
    has_dropout = dropout_p > 0.0
    if has_alibi or has_dropout:
        _require(
            positions.dtype == torch.int32
            and positions.shape == (3, plan_batch, q_len)
            and (q_len == 1 or positions.stride(2) == 1),
            "alibi_slopes and dropout need positions, int32 (3, batch of the spans, q_len)",
        )
    last_ordinal = positions
    if has_dropout:
        _require(seed.numel() == 1 and seed.dtype == torch.int64, "seed must be one int64")
        if plan_batch == 1 and batch > 1 and q_len > 0:
            last_ordinal = positions[2].amax()

    # Exponents of 2, but natural units under a bias: see features.py. A factor that is not positive, or that rounds to
    # nothing as a float32, does not keep the order of the products, which the maximum of raw products relies on.
    unit = 1.0 if has_bias else math.log2(math.e)
    factor = softmax_scale / softcap if softcap else softmax_scale * unit
    is_fused = factor >= _LEAST_NORMAL and not (softcap or has_bias or has_alibi)
    last_dropped = math.ceil(dropout_p * 2**32) - 1 if has_dropout else 0
    values: dict[str, Any] = {
        "Q": q, "K": k, "V": v, "START": start, "END": end, "KEY_VALID": key_valid, "TILES": tiles,
        "TILE_COUNT": tile_count, "ORDER": order, "POSITIONS": positions, "DENSE": dense, "BIAS": bias,
        "SLOPES": alibi_slopes, "SINKS": sinks, "SEED": seed, "LAST_ORDINAL": last_ordinal,
        **strides_of("q", q), **strides_of("k", k), **strides_of("v", v),
        "span_stride": start.stride(0),
        "plan_stride": start.stride(1),
        "key_valid_stride": key_valid.stride(0),
        "positions_stride": positions.stride(0) if positions.numel() else 0,
        "positions_batch_stride": positions.stride(1) if positions.numel() else 0,
        **(_broadcast_strides("dense", dense, ("batch", "head", "row"))),
        **(_broadcast_strides("bias", bias, ("batch", "head", "row", "key"))),
        "slopes_outer": alibi_slopes.shape[0] if has_alibi else 1,
        "slopes_outer_stride": alibi_slopes.stride(0) if has_alibi else 0,
        "slopes_head_stride": alibi_slopes.stride(1) if has_alibi else 0,
        "sinks_head_stride": sinks.stride(1) if sinks.numel() else 0,
        "capacity": tiles.shape[0],
        "plan_batches": plan_batch,
        "repeats": batch if plan_batch == 1 else 1,
        "heads": heads,
        "group": heads // kv_heads if kv_heads else 1,
        "heads_at_a_time": _heads_at_a_time(k, v, heads),
        "q_len": q_len,
        "k_len": k_len,
        "softmax_scale": softmax_scale,
        "factor": factor,
        "cap": softcap * unit,
        "last_dropped": last_dropped - 2**32 if last_dropped > _INT32_MAX else last_dropped,
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_D": padded(width),
        "BLOCK_DV": padded(value_width),
        "N_SPANS": n_spans,
        "HAS_ORDER": order.numel() > 0,
        "HAS_DENSE": has_dense,
        "HAS_BIAS": has_bias,
        "HAS_ALIBI": has_alibi,
        "BY_SEQUENCE": has_alibi and slopes_by_sequence,
        "HAS_SINKS": sinks.numel() > 0,
        "HAS_DROPOUT": has_dropout,
        "HAS_SOFTCAP": softcap != 0.0,
        "FUSED": is_fused,
        "NATURAL": has_bias,
        "WIDE": max(0, *(x.stride(2) for x in (q, k, v)), *bias.stride()[2:]) * TILE_ROWS > _INT32_MAX,
        "PRECISION": float32_precision() if q.dtype == torch.float32 else "ieee",
    }  # fmt: skip
    return Problem(
        batch, heads, kv_heads, q_len, k_len, width, value_width, n_spans, plan_batch, tiles.shape[0], values
    )


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"attention: {what}")


def _check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    _require(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, "q, k and v must have 4 dimensions")
    _require(q.dtype == k.dtype == v.dtype, "q, k and v must have one dtype")
    _require(k.shape[0] == q.shape[0] == v.shape[0], "q, k and v must have one batch size")
    _require(k.shape[3] == q.shape[3], "q and k must have one head dimension")
    _require(v.shape[1:3] == k.shape[1:3], "k and v must have the same rows")
    heads, kv_heads = q.shape[1], k.shape[1]
    _require(heads == 0 or (kv_heads > 0 and heads % kv_heads == 0), "the heads of k and v must divide those of q")
    _require(max(q.shape[2], k.shape[2]) < _INT32_MAX - 1024, "fewer than 2^31 - 1025 queries and keys")
    for x in (q, k, v):
        _require(x.shape[3] <= 1 or x.stride(3) == 1 or x.numel() == 0, "the last dimension must be contiguous")


def _check_plan(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    end: Tensor,
    key_valid: Tensor,
    tiles: Tensor,
    tile_count: Tensor,
    order: Tensor,
) -> None:
    _require(
        start.dim() == 3 and end.dim() == 3 and key_valid.dim() == 2 and tiles.dim() == 2 and tile_count.numel() == 1,
        "the spans have the wrong number of dimensions",
    )
    _require(
        all(x.dtype == torch.int32 for x in (start, end, tiles, tile_count)) and key_valid.dtype == torch.uint8,
        "the spans must be int32 and key_valid uint8",
    )
    n_spans, plan_batch, q_len = start.shape
    _require(
        n_spans >= 1 and end.shape == start.shape and key_valid.shape[0] == plan_batch,
        "start, end and key_valid must agree in shape",
    )
    _require(plan_batch in (1, q.shape[0]), "the spans are for another batch size")
    _require(
        q_len == q.shape[2] and key_valid.shape[1] == k.shape[2],
        "the spans are for other lengths than those of q and k",
    )
    _require(start.numel() <= _INT32_MAX, "the spans have too many rows")
    _require(tiles.shape[1] == 4 + 4 * n_spans, "tiles has the wrong width")
    _require(order.numel() in (0, tiles.shape[0]), "order must number the items of tiles")
    _require(order.numel() == 0 or order.dtype == torch.int32, "order must be int32")
    _require(
        all(x.numel() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1 for x in (start, end, key_valid, order))
        and tiles.is_contiguous()
        and start.stride() == end.stride(),
        "the spans must be contiguous",
    )


def _check_per_head(name: str, x: Tensor, heads: int) -> None:
    _require(
        x.numel() == 0 or (x.dim() == 2 and x.dtype == torch.float32 and x.shape[1] == heads),
        f"{name} must be float32 (n, heads)",
    )


def _broadcast_strides(name: str, x: Tensor, dimensions: tuple[str, ...]) -> dict[str, int]:
    """Strides by name, 0 along a dimension that is broadcast, and of an absent tensor."""
    is_there = x.numel() > 0
    return {
        f"{name}_{dimension}_stride": x.stride(place) if is_there and x.shape[place] > 1 else 0
        for place, dimension in enumerate(dimensions)
    }


def _heads_at_a_time(k: Tensor, v: Tensor, heads: int) -> int:
    """Query heads whose keys and values fit the cache together: whole groups, and a divisor of all."""
    kv_heads = k.shape[1]
    if kv_heads == 0:
        return 1
    of_one = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    fitting = min(max(_CACHE_BYTES // max(of_one, 1), 1), kv_heads)
    while kv_heads % fitting:
        fitting -= 1
    return fitting * (heads // kv_heads)
