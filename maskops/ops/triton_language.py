"""What all Triton kernels share: matrix products, launches, and what a launch has to know of its device.

Kernels run where Triton compiles them, or in its interpreter (``TRITON_INTERPRET=1``) on CPU tensors, where the suite
checks their numbers. The two must be one program: ``dot`` alone may ask which of them it is.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskops import tuning

LOG2E = tl.constexpr(1.4426950408889634)
"""Exponentials are powers of 2 inside the kernels."""

LN2 = tl.constexpr(0.6931471805599453)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether the kernels are interpreted, as Triton decided when they were first imported. For ``dot`` alone."""

INTERPRETED_PROGRAMS = 3
"""Programs of a persistent kernel in the interpreter: more than one, so that each starts amid the work."""


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = "ieee"):
    """``a @ b + acc`` with float32 accumulation.

    The interpreter multiplies the bit patterns of bfloat16 operands, silently: there they are float32.

    Args:
        a: (m, k), float32, bfloat16 or float16, sides of at least 16.
        b: (k, n), the same dtype.
        acc: (m, n) float32, or None.
        PRECISION: how float32 operands are multiplied, see ``float32_precision``.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def float32_precision() -> str:
    """How products of float32 matrices are taken: ``"tf32"`` where the user asked torch for it, else ``"ieee"``."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def padded(width: int, at_least: int = 16) -> int:
    """The power of two that a tile of ``width`` columns takes; products want sides of 16."""
    return max(at_least, 1 << max(width - 1, 0).bit_length())


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device, by which persistent kernels are launched; no wait for the device."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> str:
    """The column of the tuning tables for a device, see ``tuning.architecture``; the interpreter takes ``"sm_80"``."""
    recording = _RECORDING.get()
    if recording is not None:
        return recording.architecture
    return tuning.architecture(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_80"


@dataclass(frozen=True)
class Launch:
    """A launch that was noted instead of made.

    Attributes:
        kernel: what ``triton.jit`` made.
        arguments: all of the kernel's, by name.
        num_warps, num_stages: as ``launch`` was given them.
    """

    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _Recording:
    architecture: str
    launches: list[Launch] = field(default_factory=list)


_RECORDING: ContextVar[_Recording | None] = ContextVar("maskops_recorded_launches", default=None)


@contextlib.contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """Within it launches are noted, not made, as they would be on a device of that architecture.

    The ahead-of-time compiler learns from it what calls launch, on tensors of the device ``meta``.
    """
    recording = _Recording(architecture)
    token = _RECORDING.set(recording)
    try:
        yield recording.launches
    finally:
        _RECORDING.reset(token)


def launch(
    kernel: Any,
    grid: Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]],
    like: Tensor,
    arguments: Sequence[Any],
    *,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """Launches a kernel on the device of a tensor and the current stream there.

    Args:
        kernel: what ``triton.jit`` made.
        grid: programs along up to three axes, none of them 0, from shapes alone.
        like: a tensor on the device; the current device of the thread may be another.
        arguments: the positional arguments.
        num_warps: warps of a program.
        num_stages: loads in flight in pipelined loops.
        constants: the ``tl.constexpr`` arguments.
    """
    recording = _RECORDING.get()
    if recording is not None:
        named = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        recording.launches.append(Launch(kernel, named, num_warps, num_stages))
        return
    with torch.cuda.device_of(like):
        # Fused multiply-adds are asked for by name: Triton 3.10 will leave them out by default.
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
