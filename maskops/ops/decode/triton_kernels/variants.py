"""The variants of the kernels that are compiled ahead of time, to see registers and spills without a device."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from maskops import tuning
from maskops.ops.compilation import Compilation, compilation_of_call
from maskops.ops.decode.triton_kernels.forward import (
    OPEN,
    decode_arguments,
    decode_forward_kernel,
    output_arguments,
    tuned_for,
)

FEATURES = ("paged", "paged spans", "alibi", "softcap")
"""Each of them makes a variant at the common widths."""

FEATURE_WIDTHS = (64, 128)

_DTYPES = {"half": torch.bfloat16, "single": torch.float32}


def compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning table, and at the common widths each feature."""
    for element in tuning.ELEMENTS:
        for width in tuning.WIDTHS:
            yield _decode(architecture, element, width, "")
            if element == "half" and width in FEATURE_WIDTHS:
                for feature in FEATURES:
                    yield _decode(architecture, element, width, feature)


def _decode(architecture: str, element: str, width: int, feature: str) -> Compilation:
    """A batch of 8 with 4 queries to a key head, 16384 keys; on tensors without memory."""

    def tensor(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    batch, heads, capacity, pages = 8, 16, 16384, 64
    is_paged = "paged" in feature
    dtype = _DTYPES[element]
    q = tensor(batch, heads, 1, width, dtype=dtype)
    cache = tensor(batch * pages, heads // 4, capacity // pages, width, dtype=dtype)
    cache = cache if is_paged else tensor(batch, heads // 4, capacity, width, dtype=dtype)
    absent = tensor(0)
    spans = (tensor(1, batch, 1), tensor(1, batch, 1), tensor(batch, capacity, dtype=torch.uint8))
    arguments = decode_arguments(
        q, cache, cache, tensor(batch), absent,
        tensor(batch, pages) if is_paged else absent,
        absent,
        *(spans if feature in ("paged spans", "alibi") else (absent, absent, absent)),
        dense=absent,
        diagonal=tensor(batch, 1) if feature == "alibi" else absent,
        alibi_slopes=tensor(1, heads, dtype=torch.float32) if feature == "alibi" else absent,
        sinks=absent,
        softmax_scale=1.0 / math.sqrt(width),
        softcap=30.0 if feature == "softcap" else 0.0,
    )  # fmt: skip
    parts = tensor(4, batch, heads, 1, width, dtype=torch.float32)
    arguments |= output_arguments(parts, tensor(4, batch, heads, 1, dtype=torch.float32), 4, absent)
    return compilation_of_call(
        f"decode {element} {width} {feature}".rstrip(),
        decode_forward_kernel,
        arguments,
        tuned_for(arguments, architecture),
        architecture,
        OPEN,
        guarded=element == "half",
    )
