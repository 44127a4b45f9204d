"""What the ahead-of-time compiler is told about a Triton kernel: one Compilation for each variant worth guarding.

Every ``triton_kernels`` of an op has a function ``compilations(architecture)`` that yields them: every row of the
tuning table, plain, and each feature on its own at the common widths. Variants that no call builds do not belong there.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from maskops.tuning import Config

_ELEMENTS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compilation:
    """One variant of one kernel for one architecture.

    Attributes:
        name: Says which variant it is, in words that a table shows and that no other variant has:
            ``"attention_forward half 128 softcap"``.
        function: The kernel, as ``triton.jit`` made it.
        signature: Types of the arguments that are no constants, in Triton's words: ``"*bf16"``, ``"*i32"``, ``"i32"``,
            ``"i64"``, ``"fp32"``, ``"tensordesc<bf16[64, 128]>"``; of a tuple, theirs.
        constants: Values of the ``tl.constexpr`` arguments, less those of ``config.blocks``, and of arguments that are
            None.
        config: Blocks, warps and stages.
        architecture: ``"sm_80"`` or ``"sm_90"``.
        divisible: Integer arguments that are multiples of 16 in the calls that matter (strides), which Triton
            specialises on. Pointers always are, but for those in ``unaligned``.
        unaligned: Pointers that need not be multiples of 16 bytes.
        guarded: Whether spills in a hot loop fail the run.
        scores: Scores (rows times keys, or columns) that one pass through the hot loop computes, by which instructions
            are compared between tiles; by default the product of ``config.blocks``.
        options: Further options of the compilation, as a launch would pass them.
    """

    name: str
    function: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, object]
    config: Config
    architecture: str
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    guarded: bool = True
    scores: int = 0
    options: Mapping[str, object] = field(default_factory=dict)

    def constexprs(self) -> dict[str, object]:
        """All compile-time arguments, blocks included."""
        return {**self.config.blocks, **self.constants}


def compilation_of_call(
    name: str,
    function: Any,
    arguments: Mapping[str, Any],
    config: Config,
    architecture: str,
    do_not_specialize: Collection[str] = (),
    **more: Any,
) -> Compilation:
    """The variant that a launch with these arguments would compile.

    Args:
        name: as in ``Compilation``, like ``function``, ``config`` and ``architecture``.
        function: the kernel.
        arguments: by name, without the blocks of the config; tensors may be on the device ``meta``.
        config: blocks, warps and stages.
        architecture: of the device.
        do_not_specialize: as the kernel was decorated with: integers of which Triton must not look at the values.
        more: further fields of the ``Compilation``.
    """
    annotations = inspect.get_annotations(function.fn)
    constants = {x for x in arguments if getattr(annotations.get(x), "__name__", annotations.get(x)) == "constexpr"}
    signature: dict[str, str] = {}
    divisible: list[str] = []
    for argument, value in arguments.items():
        if argument in constants:
            continue
        if isinstance(value, Tensor):
            signature[argument] = f"*{_ELEMENTS[value.dtype]}"
        elif hasattr(value, "block_shape"):  # a descriptor of tiles
            signature[argument] = f"tensordesc<{_ELEMENTS[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[argument] = "fp32"
        elif value is None or (value == 1 and argument not in do_not_specialize):
            constants.add(argument)
        else:
            signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and argument not in do_not_specialize:
                divisible.append(argument)
    return Compilation(
        name=name,
        function=function,
        signature=signature,
        constants={argument: arguments[argument] for argument in arguments if argument in constants},
        config=config,
        architecture=architecture,
        divisible=tuple(divisible),
        **more,
    )
