"""The variants of the backward kernels that are compiled ahead of time; see ``variants.py``."""

from collections.abc import Iterator
from typing import Any

from maskops import tuning
from maskops.ops.attention.triton_kernels.arguments import OPEN
from maskops.ops.attention.triton_kernels.backward import Backward
from maskops.ops.attention.triton_kernels.backward_bias import grad_bias_kernel
from maskops.ops.attention.triton_kernels.backward_products import (
    grad_keys_kernel,
    grad_queries_kernel,
)
from maskops.ops.attention.triton_kernels.variants import FEATURE_WIDTH, FEATURES, example
from maskops.ops.compilation import Compilation, compilation_of_call


def backward_compilations(architecture: str) -> Iterator[Compilation]:
    """Every row of the tuning table, and each feature at one width."""
    for element in tuning.ELEMENTS:
        for width in tuning.WIDTHS:
            features = FEATURES if element == "half" and width == FEATURE_WIDTH[architecture] else ()
            for feature in ("", *features):
                yield from _compilations(architecture, element, width, feature)


def _compilations(architecture: str, element: str, width: int, feature: str) -> Iterator[Compilation]:
    problem = example(element, width, feature)
    q, k, v = (problem.values[name] for name in "QKV")
    key_tiles = q.new_empty(
        problem.n_spans, problem.plan_batch, problem.k_len // 64, 4, dtype=problem.values["START"].dtype
    )
    call = Backward(problem, q.new_empty(q.shape), q.new_empty(0), key_tiles)

    def compilation(table: str, kernel: Any, arguments: dict[str, Any], name: str = "") -> Compilation:
        return compilation_of_call(
            f"{name or table} {element} {width} {feature}".rstrip(),
            kernel,
            arguments,
            tuning.config(table, architecture, element, width),
            architecture,
            OPEN,
            # Gradients under a dropout or in float32 wait for arithmetic, not for what is spilled around it.
            guarded=element == "half" and feature != "dropout",
        )

    yield compilation("attention_backward_dq", grad_queries_kernel, call.queries_arguments(q, feature == "alibi"))
    yield compilation("attention_backward_dkdv", grad_keys_kernel, call.keys_arguments(k[None], v[None]))
    if feature == "bias":
        arguments = call.bias_arguments(problem.values["BIAS"][None])
        yield compilation("attention_backward_dkdv", grad_bias_kernel, arguments, "attention_backward_bias")
