"""What the compilation of one kernel came to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from maskops.cli.bench.compilation.sass import Loop

TRITON = "triton"

_REGISTERS = 65_536
_SHARED = {"sm_80": 167_936, "sm_90": 233_472}
"""Shared memory of a multiprocessor, bytes, of which every block takes 1 KiB for the system."""

_WARPS = 64
_BLOCKS = 32


@dataclass(frozen=True)
class Result:
    """One kernel, compiled for one architecture by one compiler.

    Attributes:
        name, architecture: Which kernel, for which machine.
        source: ``"triton"``, or the path of the .cu file.
        error: Why there is nothing else, or "".
        warps: Warps of a block; 0 where a launch decides.
        registers: Of a thread.
        shared: Bytes of shared memory of a block.
        spill_stores, spill_loads: Bytes, as ptxas counts them, wherever in the kernel.
        notes: What ptxas said about performance, serialised wgmma above all.
        loops: The hot loops.
        instructions: Of the whole kernel.
        scores: Scores that one pass through a hot loop computes; 0 where unknown.
        dots: Whether it multiplies matrices of 16-bit elements.
        config: Blocks and stages.
        seconds: What the compilation took; 0 from a cache.
    """

    name: str
    architecture: str
    source: str = TRITON
    error: str = ""
    warps: int = 0
    registers: int = 0
    shared: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    notes: tuple[str, ...] = ()
    loops: tuple[Loop, ...] = ()
    instructions: int = 0
    scores: int = 0
    dots: bool = False
    config: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def hot_spills(self) -> int:
        """Loads and stores of local memory in hot loops."""
        return sum(loop.spills for loop in self.loops)

    @property
    def issue(self) -> float | None:
        """Warp instructions for every 128 x 64 scores in the cheapest hot loop with products, the one without a mask.

        None without tensor cores: compilers unroll such loops, so that what one pass computes is not known.
        """
        passes = [loop.instructions for loop in self.loops if loop.tensor_cores]
        return min(passes) * self.warps * 128 * 64 / self.scores if passes and self.scores else None

    @property
    def blocks(self) -> int | None:
        """Blocks that fit on a multiprocessor at a time."""
        if not self.warps or not self.registers:
            return None
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        shared = _SHARED[self.architecture] // (self.shared + 1024)
        return min(_REGISTERS // registers, shared, _WARPS // self.warps, _BLOCKS)

    def as_json(self) -> dict[str, Any]:
        """Everything that is not as it is by default, and what follows from it."""
        derived = {"hot_spills": self.hot_spills, "issue": self.issue, "blocks": self.blocks}
        kept = _without_defaults(self) | {name: value for name, value in derived.items() if value}
        return kept | {"loops": [_without_defaults(loop) for loop in self.loops]}


def from_json(values: Mapping[str, Any]) -> Result:
    """What `as_json` wrote."""
    known = {name: values[name] for name in Result.__dataclass_fields__ if name in values}
    loops = tuple(Loop(**loop) for loop in values["loops"])
    return Result(**{**known, "loops": loops, "notes": tuple(values.get("notes", ()))})


def _without_defaults(x: Result | Loop) -> dict[str, Any]:
    defaults = {known.name: known.default for known in fields(x)}
    return {name: value for name, value in asdict(x).items() if value and value != defaults[name]}
