"""The calls whose kernels are compiled ahead of time, to see registers and spills without a device."""

import functools
import math
from collections.abc import Iterator

import torch

from maskops import tuning
from maskops.ops.compilation import DTYPES, Compilation, Example, compilations_of, nowhere
from maskops.ops.decode.triton_kernels.append import append_kv
from maskops.ops.decode.triton_kernels.forward import decode_forward

FEATURES = ("paged", "paged spans", "dense", "alibi", "softcap", "leftpad", "many sequences", "ragged")
"""Each of them makes variants at one width."""

FEATURE_WIDTH = {"sm_80": 64, "sm_90": 128}

_FORWARD = ("decode_forward_kernel",)
_APPEND = ("append_kv_kernel",)


def compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning table, and each feature at one width."""
    return compilations_of("decode", _examples(architecture), architecture)


def _examples(architecture: str) -> Iterator[Example]:
    common = FEATURE_WIDTH[architecture]
    for element in tuning.ELEMENTS:
        for width in tuning.WIDTHS:
            call = functools.partial(_call, element, width, "")
            if element == "half" and width == common:
                yield Example(f"{element} {width}", call, _FORWARD + _APPEND)
            else:
                yield Example(f"{element} {width}", call, _FORWARD, only=_FORWARD)
    for feature in FEATURES:
        yield Example(f"half {common} {feature}", functools.partial(_call, "half", common, feature))


def _call(element: str, width: int, feature: str) -> None:
    """A token for each of 8 sequences of up to 16384 keys, with 4 queries to a key head."""
    batch = 256 if feature == "many sequences" else 8
    heads, kv_heads, capacity, pages, dtype = 16, 4, 16384, 64, DTYPES[element]
    width = width - 8 if feature == "ragged" else width
    is_paged, has_alibi = "paged" in feature, feature == "alibi"
    q = nowhere(batch, heads, 1, width, dtype=dtype)
    new = nowhere(batch, kv_heads, 1, width, dtype=dtype)
    rows, keys = (batch * pages, capacity // pages) if is_paged else (batch, capacity)
    cache = nowhere(rows, kv_heads, keys, width, dtype=dtype)
    absent, lengths = nowhere(0), nowhere(batch)
    places = (nowhere(batch, pages) if is_paged else absent, absent)
    has_spans = feature in ("paged spans", "alibi")
    spans = (nowhere(1, batch, 1), nowhere(1, batch, 1), nowhere(batch, capacity, dtype=torch.uint8))
    append_kv(cache, cache, new, new, lengths, *places)
    decode_forward(
        q, cache, cache, lengths,
        nowhere(batch) if feature == "leftpad" else absent,
        *places,
        *(spans if has_spans else (absent, absent, absent)),
        nowhere(batch, 1, 1, capacity, dtype=torch.bool) if feature == "dense" else absent,
        nowhere(batch, 1) if has_alibi else absent,
        nowhere(1, heads, dtype=torch.float32) if has_alibi else absent,
        # Where the keys are not split, the kernel itself applies the sinks.
        nowhere(heads, dtype=torch.float32) if feature == "many sequences" else absent,
        1.0 / math.sqrt(width),
        30.0 if feature == "softcap" else 0.0,
    )  # fmt: skip
