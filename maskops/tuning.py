"""Frozen tile configurations of the Triton kernels: data with provenance, looked up, never searched for in a call.

A row says for one kernel, architecture, size of element and width of a head which tiles to take, with how many warps
and how many stages of prefetch, and where that is known from:

- ``compiled``: compiled ahead of time without spills by the Triton versions that it names; never timed,
- ``model``: chosen from the size of the tiles alone,
- ``measured on <device>``: timed there.

`python -m maskops bench compile` compiles every row and holds it against the budgets of `cli/bench/compile`.
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


def _compiled(registers: int, instructions: int = 0) -> str:
    """Provenance of a row whose kernel was compiled by both versions of Triton; instructions are those of all warps."""
    per_tile = f", {instructions} warp instructions per 128x64 tile" if instructions else ""
    return f"compiled with 3.6.0 and 3.9.0: {registers} registers, no spills in hot loops{per_tile}; never timed"


_MODEL = "model: size of the tiles; never timed"

# kernel, architecture, element, width: BLOCK_M, BLOCK_N, warps, stages, provenance
_ATTENTION: tuple[tuple[str, str, str, int, int, int, int, int, str], ...] = (
    ("attention_forward", "sm_80", "half", 16, 128, 64, 4, 3, _compiled(255, 1764)),
    ("attention_forward", "sm_80", "half", 32, 128, 64, 4, 3, _compiled(255, 2076)),
    ("attention_forward", "sm_80", "half", 64, 128, 64, 4, 3, _compiled(255, 2776)),
    ("attention_forward", "sm_80", "half", 128, 128, 64, 8, 2, _compiled(255, 4168)),
    ("attention_forward", "sm_80", "half", 256, 64, 32, 8, 2, _compiled(255, 19264)),
    ("attention_forward", "sm_80", "single", 16, 64, 32, 4, 2, _MODEL),
    ("attention_forward", "sm_80", "single", 32, 64, 32, 4, 2, _MODEL),
    ("attention_forward", "sm_80", "single", 64, 64, 32, 8, 2, _MODEL),
    ("attention_forward", "sm_80", "single", 128, 32, 32, 4, 2, _MODEL),
    ("attention_forward", "sm_80", "single", 256, 16, 16, 4, 2, _MODEL),
    ("attention_forward", "sm_90", "half", 16, 128, 64, 4, 3, _compiled(222, 1740)),
    ("attention_forward", "sm_90", "half", 32, 128, 64, 4, 3, _compiled(239, 1896)),
    ("attention_forward", "sm_90", "half", 64, 128, 128, 8, 2, _compiled(255, 1920)),
    ("attention_forward", "sm_90", "half", 128, 128, 128, 8, 2, _compiled(255, 2068)),
    ("attention_forward", "sm_90", "half", 256, 128, 64, 8, 2, _compiled(255, 4568)),
    ("attention_forward", "sm_90", "single", 16, 64, 32, 4, 2, _compiled(168)),
    ("attention_forward", "sm_90", "single", 32, 64, 32, 4, 2, _compiled(254)),
    ("attention_forward", "sm_90", "single", 64, 64, 32, 8, 2, _compiled(126)),
    ("attention_forward", "sm_90", "single", 128, 32, 32, 4, 2, _compiled(146)),
    ("attention_forward", "sm_90", "single", 256, 16, 16, 4, 2, _compiled(144)),
    ("attention_forward_per_pair", "sm_80", "half", 16, 128, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "half", 32, 128, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "half", 64, 128, 32, 8, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_80", "half", 128, 128, 32, 8, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_80", "half", 256, 64, 32, 8, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "single", 16, 64, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "single", 32, 64, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "single", 64, 64, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "single", 128, 32, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_80", "single", 256, 16, 16, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "half", 16, 128, 64, 8, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "half", 32, 128, 64, 8, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "half", 64, 128, 64, 8, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "half", 128, 128, 64, 8, 2, _compiled(255)),
    ("attention_forward_per_pair", "sm_90", "half", 256, 128, 32, 8, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "single", 16, 64, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "single", 32, 64, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "single", 64, 64, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "single", 128, 32, 32, 4, 2, _MODEL),
    ("attention_forward_per_pair", "sm_90", "single", 256, 16, 16, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "half", 16, 128, 64, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "half", 32, 128, 64, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "half", 64, 128, 64, 8, 2, _compiled(254, 2736)),
    ("attention_backward_dq", "sm_80", "half", 128, 64, 32, 4, 2, _compiled(255, 5216)),
    ("attention_backward_dq", "sm_80", "half", 256, 32, 32, 4, 1, _MODEL),
    ("attention_backward_dq", "sm_80", "single", 16, 64, 32, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "single", 32, 64, 32, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "single", 64, 32, 32, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "single", 128, 32, 16, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_80", "single", 256, 16, 16, 4, 1, _MODEL),
    ("attention_backward_dq", "sm_90", "half", 16, 128, 64, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "half", 32, 128, 64, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "half", 64, 128, 64, 8, 2, _compiled(210, 2272)),
    ("attention_backward_dq", "sm_90", "half", 128, 128, 64, 8, 2, _compiled(255, 2712)),
    ("attention_backward_dq", "sm_90", "half", 256, 64, 32, 8, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "single", 16, 64, 32, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "single", 32, 64, 32, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "single", 64, 32, 32, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "single", 128, 32, 16, 4, 2, _MODEL),
    ("attention_backward_dq", "sm_90", "single", 256, 16, 16, 4, 1, _MODEL),
    ("attention_backward_dkdv", "sm_80", "half", 16, 64, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_80", "half", 32, 64, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_80", "half", 64, 64, 64, 4, 2, _compiled(255, 4480)),
    ("attention_backward_dkdv", "sm_80", "half", 128, 32, 64, 4, 2, _compiled(255, 6960)),
    ("attention_backward_dkdv", "sm_80", "half", 256, 16, 32, 8, 1, _MODEL),
    ("attention_backward_dkdv", "sm_80", "single", 16, 32, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_80", "single", 32, 32, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_80", "single", 64, 32, 32, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_80", "single", 128, 16, 32, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_80", "single", 256, 16, 16, 4, 1, _MODEL),
    ("attention_backward_dkdv", "sm_90", "half", 16, 64, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_90", "half", 32, 64, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_90", "half", 64, 64, 128, 8, 2, _compiled(255, 3328)),
    ("attention_backward_dkdv", "sm_90", "half", 128, 32, 128, 8, 2, _compiled(255, 4720)),
    ("attention_backward_dkdv", "sm_90", "half", 256, 32, 64, 8, 1, _MODEL),
    ("attention_backward_dkdv", "sm_90", "single", 16, 32, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_90", "single", 32, 32, 64, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_90", "single", 64, 32, 32, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_90", "single", 128, 16, 32, 4, 2, _MODEL),
    ("attention_backward_dkdv", "sm_90", "single", 256, 16, 16, 4, 1, _MODEL),
    ("decode", "sm_80", "half", 16, 16, 128, 4, 3, _MODEL),
    ("decode", "sm_80", "half", 32, 16, 128, 4, 3, _MODEL),
    ("decode", "sm_80", "half", 64, 16, 64, 4, 3, _MODEL),
    ("decode", "sm_80", "half", 128, 16, 64, 4, 2, _MODEL),
    ("decode", "sm_80", "half", 256, 16, 32, 4, 2, _MODEL),
    ("decode", "sm_80", "single", 16, 16, 64, 4, 2, _MODEL),
    ("decode", "sm_80", "single", 32, 16, 64, 4, 2, _MODEL),
    ("decode", "sm_80", "single", 64, 16, 32, 4, 2, _MODEL),
    ("decode", "sm_80", "single", 128, 16, 32, 4, 2, _MODEL),
    ("decode", "sm_80", "single", 256, 16, 16, 4, 2, _MODEL),
    ("decode", "sm_90", "half", 16, 16, 128, 4, 3, _MODEL),
    ("decode", "sm_90", "half", 32, 16, 128, 4, 3, _MODEL),
    ("decode", "sm_90", "half", 64, 16, 128, 4, 3, _MODEL),
    ("decode", "sm_90", "half", 128, 16, 64, 4, 3, _MODEL),
    ("decode", "sm_90", "half", 256, 16, 32, 4, 3, _MODEL),
    ("decode", "sm_90", "single", 16, 16, 64, 4, 2, _MODEL),
    ("decode", "sm_90", "single", 32, 16, 64, 4, 2, _MODEL),
    ("decode", "sm_90", "single", 64, 16, 32, 4, 2, _MODEL),
    ("decode", "sm_90", "single", 128, 16, 16, 4, 2, _MODEL),
    ("decode", "sm_90", "single", 256, 16, 16, 4, 2, _MODEL),
)

_STREAM = "compiled (Triton 3.6.0, 3.9.0): {} registers at most, 0 spills, 16-byte loads; never timed"

# kernel, architecture, element: BLOCK_V, warps, stages, provenance
_ROWS: tuple[tuple[str, str, str, int, int, int, str], ...] = (
    ("cross_entropy", "sm_80", "half", 8192, 16, 3, _STREAM.format(54)),
    ("cross_entropy", "sm_80", "single", 4096, 16, 3, _STREAM.format(55)),
    ("cross_entropy", "sm_90", "half", 8192, 16, 3, _STREAM.format(58)),
    ("cross_entropy", "sm_90", "single", 4096, 16, 3, _STREAM.format(38)),
    ("masked_softmax", "sm_80", "half", 4096, 8, 3, _MODEL),
    ("masked_softmax", "sm_80", "single", 2048, 8, 3, _MODEL),
    ("masked_softmax", "sm_90", "half", 4096, 8, 3, _MODEL),
    ("masked_softmax", "sm_90", "single", 2048, 8, 3, _MODEL),
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
