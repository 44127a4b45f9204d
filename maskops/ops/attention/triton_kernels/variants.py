"""The variants of the kernels that are compiled ahead of time, to see registers and spills without a device."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from maskops import tuning
from maskops.ops.attention.triton_kernels.arguments import OPEN, Problem, problem_of
from maskops.ops.attention.triton_kernels.forward import (
    attention_forward_kernel,
    can_describe,
    descriptors,
    forward_arguments,
    tuned_for,
)
from maskops.ops.compilation import Compilation, compilation_of_call

FEATURES = ("two spans", "dense", "bias", "alibi", "softcap", "dropout")
"""Each of them alone makes a variant; calls with several of them are served, not guarded."""

FEATURE_WIDTH = {"sm_80": 64, "sm_90": 128}
"""Width of a head at which the features are compiled: one for each architecture keeps the run short."""

_DTYPES = {"half": torch.bfloat16, "single": torch.float32}


def example(element: str, width: int, feature: str = "") -> Problem:
    """A call as they are common, on tensors without memory: a batch of 4, 4 queries to a key head, 4096 tokens."""

    def tensor(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    batch, heads, length = 4, 16, 4096
    dtype = _DTYPES[element]
    q = tensor(batch, heads, length, width, dtype=dtype)
    k, v = (tensor(batch, heads // 4, length, width, dtype=dtype) for _ in range(2))
    n_spans = 2 if feature == "two spans" else 1
    start, end = (tensor(n_spans, batch, length) for _ in range(2))
    capacity = batch * 130
    work = (tensor(capacity, 4 + 4 * n_spans), tensor(1), tensor(capacity))
    absent = tensor(0, dtype=torch.float32)
    return problem_of(
        q, k, v, start, end, tensor(batch, length, dtype=torch.uint8), *work,
        positions=tensor(3, batch, length) if feature in ("alibi", "dropout") else absent,
        dense=tensor(batch, 1, length, length // 32) if feature == "dense" else absent,
        bias=tensor(1, heads, length, length, dtype=dtype) if feature == "bias" else absent,
        alibi_slopes=tensor(1, heads, dtype=torch.float32) if feature == "alibi" else absent,
        sinks=absent,
        seed=tensor(1, dtype=torch.int64) if feature == "dropout" else absent,
        slopes_by_sequence=False,
        softmax_scale=1.0 / math.sqrt(width),
        softcap=30.0 if feature == "softcap" else 0.0,
        dropout_p=0.1 if feature == "dropout" else 0.0,
    )  # fmt: skip


def forward_compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning table, and each feature at one width."""
    for element in tuning.ELEMENTS:
        for width in tuning.WIDTHS:
            yield _forward(architecture, element, width, "")
            if element == "half" and width == FEATURE_WIDTH[architecture]:
                for feature in FEATURES:
                    yield _forward(architecture, element, width, feature)


def _forward(architecture: str, element: str, width: int, feature: str) -> Compilation:
    problem = example(element, width, feature)
    q = problem.values["Q"]
    arguments: dict[str, Any] = forward_arguments(problem, q, q.new_empty(q.shape[:3], dtype=torch.float32), 1)
    tuned = tuned_for(problem, architecture)
    if can_describe(problem, architecture):
        arguments.update(descriptors(problem, tuned))
    return compilation_of_call(
        f"attention_forward {element} {width} {feature}".rstrip(),
        attention_forward_kernel,
        arguments,
        tuned,
        architecture,
        OPEN,
        # Scores under a dropout or in float32 wait for arithmetic, not for what is spilled around it.
        guarded=element == "half" and feature != "dropout",
    )
