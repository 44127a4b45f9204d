"""The calls whose kernels are compiled ahead of time, to see registers and spills without a device."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maskops import tuning
from maskops.ops.attention.triton_kernels.backward import attention_backward
from maskops.ops.attention.triton_kernels.forward import attention_forward
from maskops.ops.compilation import DTYPES, Compilation, Example, compilations_of, nowhere
from maskops.spans import KEY_TILE, tiles_per_batch_element

FEATURES = (
    "two spans", "dense", "bias", "alibi", "softcap", "dropout", "sinks", "shared plan", "packed", "packed alibi",
    "few rows", "ragged",
)  # fmt: skip
"""Each of them alone makes variants; calls with several of them are served, not guarded."""

FEATURE_WIDTH = {"sm_80": 64, "sm_90": 128}
"""Width of a head at which the features are compiled: one for each architecture keeps the run short."""

_OF_TABLES = ("attention_forward_kernel", "grad_queries_kernel", "grad_keys_kernel")

_EVERYDAY = {
    "bias": ("attention_forward_kernel", "renewed_sums_kernel", "grad_bias_kernel"),
    "packed alibi": ("grad_slopes_kernel",),
    "few rows": ("merge_splits_kernel",),
}
"""Kernels that plain calls do not launch."""


def compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning tables, the gradient of a bias at every width, and each feature at one width."""
    return compilations_of("attention", _examples(architecture), architecture)


def _examples(architecture: str) -> Iterator[Example]:
    for element in tuning.ELEMENTS:
        for width in tuning.WIDTHS:
            is_common = element == "half" and width == FEATURE_WIDTH[architecture]
            yield _example(element, width, "", _OF_TABLES + ("row_terms_kernel",) * is_common)
            yield _example(
                element, width, "bias", ("attention_forward_kernel",), ("attention_forward_kernel", "grad_bias_kernel")
            )
    for feature in FEATURES:
        yield _example("half", FEATURE_WIDTH[architecture], feature, _EVERYDAY.get(feature, ()))


def _example(element: str, width: int, feature: str, everyday: tuple[str, ...], only: tuple[str, ...] = ()) -> Example:
    name = f"{element} {width} {feature}".rstrip()
    return Example(name, functools.partial(_call, element, width, feature), everyday, only)


def _call(element: str, width: int, feature: str) -> None:
    """Both passes of a call: a batch of 4, 4 queries to a key head, 4096 tokens."""
    heads, kv_heads, length, dtype = 16, 4, 4096, DTYPES[element]
    is_packed, has_alibi, has_dropout = "packed" in feature, "alibi" in feature, feature == "dropout"
    batch = 1 if is_packed or feature == "few rows" else 4
    plan_batch = 1 if feature == "shared plan" else batch
    q_len, k_len = (128, 2048) if feature == "few rows" else (length, length)
    n_spans = 2 if feature == "two spans" else 1
    # Tiles are wider than these rows.
    qk_width, value_width = (width - 8, width - 16) if feature == "ragged" else (width, width)

    def tokens(rows: int, of_heads: int, size: int) -> Tensor:
        if is_packed:  # the heads of a token lie together
            return nowhere(batch, rows, of_heads, size, dtype=dtype).transpose(1, 2)
        return nowhere(batch, of_heads, rows, size, dtype=dtype)

    q, k = tokens(q_len, heads, qk_width), tokens(k_len, kv_heads, qk_width)
    v, out = tokens(k_len, kv_heads, value_width), tokens(q_len, heads, value_width)
    absent = nowhere(0, dtype=torch.float32)
    lse = nowhere(batch, heads, q_len, dtype=torch.float32)
    capacity = plan_batch * tiles_per_batch_element(q_len, k_len)
    work = (nowhere(capacity, 4 + 4 * n_spans), nowhere(1))
    spans = (
        *(nowhere(n_spans, plan_batch, q_len) for _ in range(2)),
        nowhere(plan_batch, k_len, dtype=torch.uint8),
    )
    key_tiles = nowhere(n_spans, plan_batch, -(-k_len // KEY_TILE), 4)
    extras = (
        nowhere(3, plan_batch, q_len) if has_alibi or has_dropout else absent,
        nowhere(batch, 1, q_len, k_len // 32) if feature == "dense" else absent,
        nowhere(1, heads, q_len, k_len, dtype=dtype) if feature == "bias" else absent,
        nowhere(32 if is_packed else 1, heads, dtype=torch.float32) if has_alibi else absent,
        nowhere(1, heads, dtype=torch.float32) if feature == "sinks" else absent,
        nowhere(1, dtype=torch.int64) if has_dropout else absent,
        is_packed and has_alibi,
        1.0 / math.sqrt(qk_width),
        30.0 if feature == "softcap" else 0.0,
        0.1 if has_dropout else 0.0,
    )
    plan = (*spans, *work, key_tiles, nowhere(capacity))
    passed: tuple[Any, ...] = (q, k, v, *plan, *extras)
    attention_forward(*passed)
    grad_lse = lse if feature == "sinks" else absent
    wanted = (feature == "bias", has_alibi, feature == "sinks")
    passed = (out, grad_lse, q, k, v, out, lse, *plan, *extras, *wanted)
    attention_backward(*passed)
