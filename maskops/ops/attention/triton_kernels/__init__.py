"""Span attention on Triton: the operators ``attention_forward_triton`` and ``attention_backward_triton``."""

from collections.abc import Iterator

from maskops.ops.attention.triton_kernels.backward import attention_backward
from maskops.ops.attention.triton_kernels.backward_variants import backward_compilations
from maskops.ops.attention.triton_kernels.forward import attention_forward
from maskops.ops.attention.triton_kernels.variants import forward_compilations
from maskops.ops.compilation import Compilation

__all__ = ["attention_backward", "attention_forward", "compilations"]


def compilations(architecture: str) -> Iterator[Compilation]:
    """What is compiled ahead of time."""
    yield from forward_compilations(architecture)
    yield from backward_compilations(architecture)
