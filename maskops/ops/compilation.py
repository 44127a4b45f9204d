"""What the ahead-of-time compiler is told about the Triton kernels: one Compilation for each variant worth guarding.

Every ``triton_kernels`` of an op has a function ``compilations(architecture)`` that yields them. It makes them from
calls: an ``Example`` runs the op's own launchers on tensors without memory, and what these would launch is compiled. So
a variant that no call builds cannot be declared, and a kernel that an example reaches cannot be forgotten.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}

DTYPES = {"half": torch.bfloat16, "single": torch.float32}
"""The dtypes that stand for the columns of the tuning tables."""


@dataclass(frozen=True)
class Compilation:
    """One variant of one kernel for one architecture.

    Attributes:
        name: Says which variant it is, in words that a table shows and that no other variant has:
            ``"attention forward half 128 softcap"``.
        function: The kernel, as ``triton.jit`` made it.
        signature: Types of the arguments that are no constants, in Triton's words: ``"*bf16"``, ``"*i32"``, ``"i32"``,
            ``"i64"``, ``"fp32"``, ``"tensordesc<bf16[64, 128]>"``; of a tuple, theirs.
        constants: Values of the ``tl.constexpr`` arguments, and of arguments that are None or the integer 1, which
            Triton makes constants.
        architecture: ``"sm_80"`` or ``"sm_90"``.
        num_warps: Warps of a block.
        num_stages: Stages of software prefetch.
        divisible: Integer arguments that are multiples of 16, which Triton specialises on. Pointers always are.
        everyday: Whether it is compiled for every change, not only when everything is.
    """

    name: str
    function: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, object]
    architecture: str
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    everyday: bool = True

    @property
    def blocks(self) -> dict[str, int]:
        """Sizes of tiles, by the kernel's names for them."""
        return {name: int(str(value)) for name, value in self.constants.items() if name.startswith("BLOCK_")}


@dataclass(frozen=True)
class Example:
    """A call that stands for many.

    Attributes:
        name: What is special about it: ``"half 64 alibi"``.
        call: Runs launchers on tensors of the device ``meta``.
        everyday: Kernels, by the names of their functions, whose variants are compiled for every change.
        only: Kernels whose variants count; all without any.
    """

    name: str
    call: Callable[[], object]
    everyday: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


def compilations_of(op: str, examples: Iterable[Example], architecture: str) -> Iterator[Compilation]:
    """What the calls launch on a device of this architecture, each variant once, under the name of the first call."""
    from maskops.ops.triton_language import recorded  # here, since Triton need not be there

    found: dict[object, Compilation] = {}
    for example in examples:
        with recorded(architecture) as launches:
            example.call()
        for launch in launches:
            kernel = launch.kernel.fn.__name__
            if example.only and kernel not in example.only:
                continue
            stem = kernel.removesuffix("_kernel").removeprefix(f"{op}_")
            variant = compilation_of_launch(
                f"{op} {stem} {example.name}".rstrip(), launch, architecture, kernel in example.everyday
            )
            identity = (
                kernel,
                tuple(variant.signature.items()),
                tuple(variant.constants.items()),
                variant.num_warps,
                variant.num_stages,
                variant.divisible,
            )
            known = found.setdefault(identity, variant)
            found[identity] = replace(known, everyday=known.everyday or variant.everyday)
    yield from found.values()


def compilation_of_launch(name: str, launch: Any, architecture: str, everyday: bool) -> Compilation:
    """The variant that a ``triton_language.Launch`` would compile."""
    annotations = inspect.get_annotations(launch.kernel.fn)
    # Integers of which Triton does not look at the values.
    opened = getattr(launch.kernel, "do_not_specialize", ())

    def is_constant(argument: str, value: object) -> bool:
        kind = annotations.get(argument)
        is_one = type(value) is int and value == 1 and argument not in opened
        return getattr(kind, "__name__", kind) == "constexpr" or value is None or is_one

    constants: dict[str, object] = {}
    signature: dict[str, str | tuple[str, ...]] = {}
    divisible = []
    for argument in launch.kernel.arg_names:
        value = launch.arguments[argument]
        if is_constant(argument, value):
            constants[argument] = value
        elif isinstance(value, tuple):
            signature[argument] = tuple(_type_of(element) for element in value)
        else:
            signature[argument] = _type_of(value)
            if type(value) is int and value % 16 == 0 and argument not in opened:
                divisible.append(argument)
    return Compilation(
        name=name,
        function=launch.kernel,
        signature=signature,
        constants=constants,
        architecture=architecture,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        divisible=tuple(divisible),
        everyday=everyday,
    )


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_ELEMENTS[value.dtype]}"
    if hasattr(value, "block_shape"):  # a descriptor of tiles
        return f"tensordesc<{_ELEMENTS[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def nowhere(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor without memory, for examples."""
    return torch.empty(size, dtype=dtype, device="meta")
