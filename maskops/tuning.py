"""Frozen tile configurations of the Triton kernels: data with provenance, looked up, never searched for in a call.

A row says for one kernel, architecture, size of element and width of a head which tiles to take, with how many warps
and how many stages of prefetch, and where that is known from:

- ``compiled``: compiled ahead of time by the Triton versions that it names, and what came of it; never timed,
- ``measured on <device>``: timed there.

`python -m maskops bench compile` compiles every row and holds it against the budgets of `cli/bench/compilation`; a test
compares what rows say of their compilation with `benchmarks/results/compile.json`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90")
ELEMENTS = ("half", "single")
WIDTHS = (16, 32, 64, 128, 256)
"""Widths of a head that have rows of their own; a width between two takes the rows of the next larger one."""

SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448}
"""Bytes that one block may take. The rows of sm_80 also serve 8.6, 8.9 and 12.x, which have 99 KiB instead of 163."""


@dataclass(frozen=True)
class Config:
    """How one kernel is tiled and launched.

    Attributes:
        blocks: Sizes of tiles by the names of the kernel's arguments: BLOCK_M rows of queries, BLOCK_N keys, BLOCK_V
            columns of logits or scores.
        num_warps: Warps of a block.
        num_stages: Stages of software prefetch.
        provenance: How it is known to be good.
    """

    blocks: Mapping[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    provenance: str

    def launch(self) -> dict[str, int]:
        """The blocks and the options of a launch, as keywords of the kernel."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Key(NamedTuple):
    """What a row is for; width 0 in kernels whose tiles do not depend on one."""

    kernel: str
    architecture: str
    element: str
    width: int


def architecture(major: int, minor: int = 0) -> str:
    """Whose rows a device of this compute capability takes.

    12.x (consumer Blackwell) has the shared memory of 8.9 and no wgmma, so that it takes the rows of sm_80.
    """
    if major < 8:
        raise ValueError(f"compute capability {major}.{minor}: the Triton kernels need 8.0 or newer")
    return "sm_90" if 9 <= major < 12 else "sm_80"


def config(kernel: str, architecture: str, element: str, width: int = 0) -> Config:
    """The configuration of a kernel.

    Args:
        kernel: Name of the kernel, one of `kernels()`.
        architecture: ``"sm_80"`` or ``"sm_90"``, as `architecture` says.
        element: ``"half"`` (16 bit) or ``"single"``.
        width: Width of a head, 1 to 256; where keys and values differ, the wider. Not read by kernels without one.

    Raises:
        ValueError: there is no such row.
    """
    bucket = 0 if (kernel, 0) in _WIDTHLESS else next((known for known in WIDTHS if width <= known), -1)
    try:
        return TABLE[Key(kernel, architecture, element, bucket)]
    except KeyError:
        raise ValueError(
            f"no configuration for kernel {kernel!r}, {architecture!r}, {element!r}, width {width}: expected one of "
            f"{', '.join(kernels())}; one of {ARCHITECTURES}; one of {ELEMENTS}; a width of 1 to {WIDTHS[-1]}"
        ) from None


def kernels() -> tuple[str, ...]:
    """The kernels that have rows."""
    return tuple(dict.fromkeys(key.kernel for key in TABLE))


def _compiled(registers: int, spills: int = 0, instructions: int = 0) -> str:
    """Provenance of a row whose kernel was compiled plain by both versions of Triton, the larger figure of the two."""
    spilled = f"{spills} spills" if spills else "no spills"
    per_tile = f", {instructions} warp instructions per 128x64 scores" if instructions else ""
    return f"compiled with 3.6.0 and 3.9.0: {registers} registers, {spilled} in hot loops{per_tile}; never timed"


# kernel, architecture, element, width: BLOCK_M, BLOCK_N, warps, stages, provenance
_ATTENTION: tuple[tuple[str, str, str, int, int, int, int, int, str], ...] = (
    ("attention_forward", "sm_80", "half", 16, 128, 64, 4, 3, _compiled(255, 0, 1772)),
    ("attention_forward", "sm_80", "half", 32, 128, 64, 4, 3, _compiled(255, 0, 2140)),
    ("attention_forward", "sm_80", "half", 64, 128, 64, 4, 3, _compiled(255, 0, 2756)),
    ("attention_forward", "sm_80", "half", 128, 128, 64, 8, 2, _compiled(255, 0, 4024)),
    ("attention_forward", "sm_80", "half", 256, 64, 32, 8, 2, _compiled(255, 0, 18432)),
    ("attention_forward", "sm_80", "single", 16, 64, 32, 4, 2, _compiled(242)),
    ("attention_forward", "sm_80", "single", 32, 64, 32, 4, 2, _compiled(255)),
    ("attention_forward", "sm_80", "single", 64, 64, 32, 8, 2, _compiled(246)),
    ("attention_forward", "sm_80", "single", 128, 32, 32, 4, 2, _compiled(255)),
    ("attention_forward", "sm_80", "single", 256, 16, 16, 4, 2, _compiled(255)),
    ("attention_forward", "sm_90", "half", 16, 128, 64, 4, 3, _compiled(250, 0, 1780)),
    ("attention_forward", "sm_90", "half", 32, 128, 64, 4, 3, _compiled(255, 0, 1876)),
    ("attention_forward", "sm_90", "half", 64, 128, 128, 8, 2, _compiled(255, 0, 1920)),
    ("attention_forward", "sm_90", "half", 128, 128, 128, 8, 2, _compiled(255, 0, 2068)),
    ("attention_forward", "sm_90", "half", 256, 128, 64, 8, 2, _compiled(255, 0, 3776)),
    ("attention_forward", "sm_90", "single", 16, 64, 32, 4, 2, _compiled(236)),
    ("attention_forward", "sm_90", "single", 32, 64, 32, 4, 2, _compiled(255)),
    ("attention_forward", "sm_90", "single", 64, 64, 32, 8, 2, _compiled(180)),
    ("attention_forward", "sm_90", "single", 128, 32, 32, 4, 2, _compiled(168)),
    ("attention_forward", "sm_90", "single", 256, 16, 16, 4, 2, _compiled(182)),
    ("attention_forward_per_pair", "sm_80", "half", 16, 128, 32, 4, 2, _compiled(255, 0, 3464)),
    ("attention_forward_per_pair", "sm_80", "half", 32, 128, 32, 4, 2, _compiled(255, 0, 3848)),
    ("attention_forward_per_pair", "sm_80", "half", 64, 128, 32, 8, 2, _compiled(255, 0, 5072)),
    ("attention_forward_per_pair", "sm_80", "half", 128, 128, 32, 8, 2, _compiled(255, 4, 7040)),
    ("attention_forward_per_pair", "sm_80", "half", 256, 64, 32, 8, 2, _compiled(255, 0, 20640)),
    ("attention_forward_per_pair", "sm_80", "single", 16, 64, 32, 4, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_80", "single", 32, 64, 32, 8, 2, _compiled(254)),
    ("attention_forward_per_pair", "sm_80", "single", 64, 64, 32, 8, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_80", "single", 128, 32, 32, 4, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_80", "single", 256, 16, 16, 4, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "half", 16, 128, 64, 8, 2, _compiled(230, 0, 3440)),
    ("attention_forward_per_pair", "sm_90", "half", 32, 128, 64, 8, 2, _compiled(244, 0, 3584)),
    ("attention_forward_per_pair", "sm_90", "half", 64, 128, 64, 8, 2, _compiled(255, 0, 3784)),
    ("attention_forward_per_pair", "sm_90", "half", 128, 128, 64, 8, 2, _compiled(255, 0, 4208)),
    ("attention_forward_per_pair", "sm_90", "half", 256, 128, 32, 8, 2, _compiled(255, 41, 8048)),
    ("attention_forward_per_pair", "sm_90", "single", 16, 64, 32, 4, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "single", 32, 64, 32, 4, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "single", 64, 64, 32, 8, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "single", 128, 32, 32, 4, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "single", 256, 16, 16, 4, 2, _compiled(255)),
    ("attention_backward_dq", "sm_80", "half", 16, 128, 64, 4, 2, _compiled(233, 0, 1576)),
    ("attention_backward_dq", "sm_80", "half", 32, 128, 64, 4, 2, _compiled(255, 0, 1852)),
    ("attention_backward_dq", "sm_80", "half", 64, 128, 64, 8, 2, _compiled(254, 0, 2736)),
    ("attention_backward_dq", "sm_80", "half", 128, 64, 32, 4, 2, _compiled(255, 0, 5216)),
    ("attention_backward_dq", "sm_80", "half", 256, 32, 32, 4, 1, _compiled(254, 0, 10528)),
    ("attention_backward_dq", "sm_80", "single", 16, 64, 32, 4, 2, _compiled(168)),
    ("attention_backward_dq", "sm_80", "single", 32, 64, 32, 4, 2, _compiled(254)),
    ("attention_backward_dq", "sm_80", "single", 64, 32, 32, 4, 2, _compiled(144)),
    ("attention_backward_dq", "sm_80", "single", 128, 32, 16, 4, 2, _compiled(146)),
    ("attention_backward_dq", "sm_80", "single", 256, 16, 16, 4, 1, _compiled(188)),
    ("attention_backward_dq", "sm_90", "half", 16, 128, 64, 4, 2, _compiled(252, 0, 1512)),
    ("attention_backward_dq", "sm_90", "half", 32, 128, 64, 4, 2, _compiled(254, 0, 1624)),
    ("attention_backward_dq", "sm_90", "half", 64, 128, 64, 8, 2, _compiled(210, 0, 2272)),
    ("attention_backward_dq", "sm_90", "half", 128, 128, 64, 8, 2, _compiled(255, 0, 2712)),
    ("attention_backward_dq", "sm_90", "half", 256, 64, 32, 8, 2, _compiled(255, 0, 20032)),
    ("attention_backward_dq", "sm_90", "single", 16, 64, 32, 4, 2, _compiled(168)),
    ("attention_backward_dq", "sm_90", "single", 32, 64, 32, 4, 2, _compiled(254)),
    ("attention_backward_dq", "sm_90", "single", 64, 32, 32, 4, 2, _compiled(128)),
    ("attention_backward_dq", "sm_90", "single", 128, 32, 16, 4, 2, _compiled(150)),
    ("attention_backward_dq", "sm_90", "single", 256, 16, 16, 4, 1, _compiled(182)),
    ("attention_backward_dkdv", "sm_80", "half", 16, 64, 64, 4, 2, _compiled(232, 0, 6728)),
    ("attention_backward_dkdv", "sm_80", "half", 32, 64, 64, 4, 2, _compiled(255, 0, 7688)),
    ("attention_backward_dkdv", "sm_80", "half", 64, 64, 64, 4, 2, _compiled(255, 0, 9272)),
    ("attention_backward_dkdv", "sm_80", "half", 128, 32, 64, 4, 2, _compiled(255, 0, 13616)),
    ("attention_backward_dkdv", "sm_80", "half", 256, 16, 32, 8, 1, _compiled(170, 0, 51584)),
    ("attention_backward_dkdv", "sm_80", "single", 16, 32, 64, 4, 2, _compiled(168)),
    ("attention_backward_dkdv", "sm_80", "single", 32, 32, 64, 4, 2, _compiled(255)),
    ("attention_backward_dkdv", "sm_80", "single", 64, 32, 32, 4, 2, _compiled(255)),
    ("attention_backward_dkdv", "sm_80", "single", 128, 16, 32, 4, 2, _compiled(255)),
    ("attention_backward_dkdv", "sm_80", "single", 256, 16, 16, 4, 1, _compiled(255)),
    ("attention_backward_dkdv", "sm_90", "half", 16, 64, 64, 4, 2, _compiled(255, 0, 5184)),
    ("attention_backward_dkdv", "sm_90", "half", 32, 64, 64, 4, 2, _compiled(255, 0, 5424)),
    ("attention_backward_dkdv", "sm_90", "half", 64, 64, 128, 8, 2, _compiled(255, 0, 6040)),
    ("attention_backward_dkdv", "sm_90", "half", 128, 32, 128, 8, 2, _compiled(255, 0, 7904)),
    ("attention_backward_dkdv", "sm_90", "half", 256, 32, 32, 8, 1, _compiled(170, 0, 38272)),
    ("attention_backward_dkdv", "sm_90", "single", 16, 32, 64, 4, 2, _compiled(168)),
    ("attention_backward_dkdv", "sm_90", "single", 32, 32, 64, 4, 2, _compiled(255)),
    ("attention_backward_dkdv", "sm_90", "single", 64, 32, 32, 4, 2, _compiled(128)),
    ("attention_backward_dkdv", "sm_90", "single", 128, 16, 32, 4, 2, _compiled(202)),
    ("attention_backward_dkdv", "sm_90", "single", 256, 16, 16, 4, 1, _compiled(168)),
    ("decode", "sm_80", "half", 16, 16, 128, 4, 3, _compiled(168, 0, 26480)),
    ("decode", "sm_80", "half", 32, 16, 128, 4, 3, _compiled(118, 0, 11184)),
    ("decode", "sm_80", "half", 64, 16, 64, 4, 3, _compiled(118, 0, 17152)),
    ("decode", "sm_80", "half", 128, 16, 64, 4, 2, _compiled(168, 0, 26560)),
    ("decode", "sm_80", "half", 256, 16, 32, 4, 2, _compiled(168, 0, 49344)),
    ("decode", "sm_80", "single", 16, 16, 32, 4, 2, _compiled(64)),
    ("decode", "sm_80", "single", 32, 16, 64, 4, 2, _compiled(96)),
    ("decode", "sm_80", "single", 64, 16, 32, 4, 2, _compiled(80)),
    ("decode", "sm_80", "single", 128, 16, 32, 4, 2, _compiled(80)),
    ("decode", "sm_80", "single", 256, 16, 16, 4, 2, _compiled(109)),
    ("decode", "sm_90", "half", 16, 16, 128, 4, 3, _compiled(171, 0, 26656)),
    ("decode", "sm_90", "half", 32, 16, 128, 4, 3, _compiled(120, 0, 11520)),
    ("decode", "sm_90", "half", 64, 16, 128, 4, 3, _compiled(168, 0, 15600)),
    ("decode", "sm_90", "half", 128, 16, 64, 4, 3, _compiled(168, 0, 26112)),
    ("decode", "sm_90", "half", 256, 16, 32, 4, 3, _compiled(168, 0, 50752)),
    ("decode", "sm_90", "single", 16, 16, 64, 4, 2, _compiled(90)),
    ("decode", "sm_90", "single", 32, 16, 64, 4, 2, _compiled(146)),
    ("decode", "sm_90", "single", 64, 16, 32, 4, 2, _compiled(185)),
    ("decode", "sm_90", "single", 128, 16, 16, 4, 2, _compiled(64)),
    ("decode", "sm_90", "single", 256, 16, 16, 4, 2, _compiled(118)),
)

# kernel, architecture, element: BLOCK_V, warps, stages, provenance
_ROWS: tuple[tuple[str, str, str, int, int, int, str], ...] = (
    ("cross_entropy", "sm_80", "half", 8192, 16, 3, _compiled(54)),
    ("cross_entropy", "sm_80", "single", 4096, 16, 3, _compiled(55)),
    ("cross_entropy", "sm_90", "half", 8192, 16, 3, _compiled(58)),
    ("cross_entropy", "sm_90", "single", 4096, 16, 3, _compiled(38)),
    ("masked_softmax", "sm_80", "half", 4096, 8, 3, _compiled(48)),
    ("masked_softmax", "sm_80", "single", 2048, 8, 3, _compiled(38)),
    ("masked_softmax", "sm_90", "half", 4096, 8, 3, _compiled(40)),
    ("masked_softmax", "sm_90", "single", 2048, 8, 3, _compiled(32)),
)


def _entries() -> Iterator[tuple[Key, Config]]:
    for kernel, architecture, element, width, rows, keys, warps, stages, provenance in _ATTENTION:
        blocks = MappingProxyType({"BLOCK_M": rows, "BLOCK_N": keys})
        yield Key(kernel, architecture, element, width), Config(blocks, warps, stages, provenance)
    for kernel, architecture, element, columns, warps, stages, provenance in _ROWS:
        blocks = MappingProxyType({"BLOCK_V": columns})
        yield Key(kernel, architecture, element, 0), Config(blocks, warps, stages, provenance)


TABLE: Mapping[Key, Config] = MappingProxyType(dict(_entries()))
_WIDTHLESS = frozenset((key.kernel, 0) for key in TABLE if key.width == 0)
