"""The calls whose kernels are compiled ahead of time, to see registers and spills without a device."""

import functools
from collections.abc import Iterator

import torch

from maskops import tuning
from maskops.ops.compilation import DTYPES, Compilation, Example, compilations_of, nowhere
from maskops.ops.cross_entropy.triton_kernels import cross_entropy_backward, cross_entropy_forward

FEATURES = (
    "softcap", "smoothing", "weights", "weights smoothing", "probabilities", "gradient of probabilities",
    "shifted probabilities", "entropy", "argmax", "every gradient",
)  # fmt: skip


def compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning table, plain, and of halves each feature on its own."""
    return compilations_of("cross_entropy", _examples(), architecture)


def _examples() -> Iterator[Example]:
    everyday = ("sum_rows", "score_rows", "find_coefficients", "write_gradients")
    for element in tuning.ELEMENTS:
        yield Example(element, functools.partial(_call, element, ""), everyday)
        yield Example(f"{element} ragged", functools.partial(_call, element, "ragged"), everyday)
    for feature in FEATURES:
        yield Example(f"half {feature}", functools.partial(_call, "half", feature))


def _call(element: str, feature: str) -> None:
    """Both passes of 8192 rows of a vocabulary whose size is a multiple of 16, which the ragged one is not."""
    rows, vocabulary = 8192, 50257 if feature == "ragged" else 131072
    is_soft = "probabilities" in feature
    is_shifted = feature == "shifted probabilities"
    wants_all, wants_entropy = feature == "every gradient", feature in ("entropy", "every gradient")
    numbers = (0.1 if "smoothing" in feature else 0.0, 0.0, 30.0 if feature == "softcap" else 0.0, 1.0)

    def per_row(is_there: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return nowhere(rows if is_there else 0, dtype=dtype)

    logits = nowhere(rows, vocabulary, dtype=DTYPES[element])
    given = (
        logits,
        per_row(dtype=torch.int64),
        nowhere(vocabulary if "weights" in feature else 0, dtype=torch.float32),
        logits.new_empty(logits.shape) if is_soft else logits.new_empty(0),
    )
    _, lse, logprobs, entropy, _, statistics = cross_entropy_forward(
        *given, is_shifted, -100, *numbers, wants_entropy, feature == "argmax"
    )
    incoming = (per_row(), per_row(wants_all), per_row(wants_all), per_row(wants_entropy))
    saved = (lse, logprobs, entropy, statistics)
    cross_entropy_backward(
        *incoming, *given, *saved, is_shifted, feature == "gradient of probabilities", -100, *numbers
    )
