"""Linear cross-entropy in Triton: chunks whose rows the kernels of cross-entropy score. No kernel of its own."""

from typing import Any

from torch import Tensor

from maskops.ops.linear_cross_entropy import device_chunks


def linear_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    """The registered operator; registration.py says what its arguments and results are."""
    return device_chunks.linear_cross_entropy("triton", *args)
