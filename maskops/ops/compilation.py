"""What the ahead-of-time compiler is told about a Triton kernel: one Compilation for each variant worth guarding.

Every ``triton_kernels`` of an op has a function ``compilations(architecture)`` that yields them: every row of the
tuning table, plain, and each feature on its own at the common widths. Variants that no call builds do not belong there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maskops.tuning import Config


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
