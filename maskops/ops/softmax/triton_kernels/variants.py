"""The calls whose kernels are compiled ahead of time, to see registers and spills without a device."""

import functools
from collections.abc import Iterator

import torch

from maskops import tuning
from maskops.ops.compilation import DTYPES, Compilation, Example, compilations_of, nowhere
from maskops.ops.softmax.triton_kernels import masked_softmax_backward, masked_softmax_forward

SHAPES = {"long": ((4096, 65536), 1), "short": ((8, 16, 1024, 1024), 3), "lanes": ((64, 8192, 256), 1)}
"""Sizes of the tensor and the dimension of the softmax: rows in pieces, rows in one tile, softmaxes side by side."""

FEATURES = ("mask", "spans", "lse", "ragged")


def compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning table, plain, and of halves each feature on its own."""
    return compilations_of("masked_softmax", _examples(), architecture)


def _examples() -> Iterator[Example]:
    kernels = ("forward_rows", "backward_rows", "forward_tiles", "backward_tiles")
    for element in tuning.ELEMENTS:
        for shape in SHAPES:
            for feature in ("", *FEATURES) if element == "half" else ("",):
                if shape == "lanes" and feature == "spans":
                    continue  # spans lie along the last dimension
                everyday = kernels if not feature and shape != "lanes" else ()
                name = f"{element} {shape} {feature}".rstrip()
                yield Example(name, functools.partial(_call, element, shape, feature), everyday)


def _call(element: str, shape: str, feature: str) -> None:
    """Both passes of a softmax; the ragged one has sizes that are no multiples of 16."""
    sizes, dim = SHAPES[shape]
    if feature == "ragged":
        sizes = tuple(size - 1 for size in sizes)
    x = nowhere(*sizes, dtype=DTYPES[element])
    absent = nowhere(0)
    spans = (absent, absent, absent)
    if feature == "spans":
        batch = 1 if len(sizes) == 2 else sizes[0]
        rows = (nowhere(1, batch, sizes[-2]) for _ in range(2))
        spans = (*rows, nowhere(batch, sizes[-1], dtype=torch.uint8))
    mask = nowhere(*sizes, dtype=torch.bool) if feature == "mask" else absent
    weights, lse = masked_softmax_forward(x, mask, *spans, dim, feature == "lse")
    masked_softmax_backward(x, lse if feature == "lse" else absent, weights, *spans, dim)
