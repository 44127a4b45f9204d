"""Span attention on Triton: the operators ``attention_forward_triton`` and ``attention_backward_triton``."""

from maskops.ops.attention.triton_kernels.backward import attention_backward
from maskops.ops.attention.triton_kernels.forward import attention_forward

__all__ = ["attention_backward", "attention_forward"]
