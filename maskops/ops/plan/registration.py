"""The operator ``maskops::build_plan``: a mask as a program in, a RowSpans out, in one call.

The program is text, words separated by single spaces: first layouts, each with its operand numbers, then for every
span ``span`` and two bounds, start and end, in postfix order over the values of a row::

    padding_right N | padding_left N | padding_mask N | key_lengths N | key_length LENGTH | key_mask N | ids N
    cu_seqlens N_QUERIES N_KEYS KEYS_GIVEN | varlen N_QUERIES N_KEYS KEYS_GIVEN
    first | last | diag OFFSET | prefix LENGTH | prefix_of N | chunk_start SIZE | chunk_end SIZE | max | min

``varlen`` is ``cu_seqlens`` whose errors name the arguments of ``varlen_attention``.

``causal() & sliding_window(256, 0) & documents(cu_seqlens=cu)`` is ``cu_seqlens 0 0 0 span diag -256 diag 1``. What the
words mean is written in ``layouts.py`` and ``bounds.py``; ``masks.py`` makes the programs, and its torch path is the
meaning the operator is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskops import extension
from maskops.spans import KEY_TILE, RowSpans, tiles_per_batch_element

MAX_OPERANDS = 6
MAX_LENGTH = 2**28
"""Above it, sums of lengths would not fit the int32 arithmetic of the operator."""

_NATIVE_DTYPES = (torch.int32, torch.int64, torch.bool, torch.uint8)

_library = torch.library.Library("maskops", "FRAGMENT")
_library.define(
    "build_plan(str program, "
    + ", ".join(f"Tensor operand{number}" for number in range(MAX_OPERANDS))
    + ", SymInt batch, SymInt q_len, SymInt k_len, bool grad, bool positions)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("maskops::build_plan", lib=_library)  # type: ignore[untyped-decorator]
def _(
    program: str,
    operand0: Tensor,
    operand1: Tensor,
    operand2: Tensor,
    operand3: Tensor,
    operand4: Tensor,
    operand5: Tensor,
    batch: int,
    q_len: int,
    k_len: int,
    grad: bool,
    positions: bool,
) -> tuple[Tensor, ...]:
    n_spans = program.split(" ").count("span")

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=operand0.device)

    n_tiles = (k_len + KEY_TILE - 1) // KEY_TILE
    return (
        empty(n_spans, batch, q_len),
        empty(n_spans, batch, q_len),
        empty(batch, k_len, dtype=torch.uint8),
        empty(batch * tiles_per_batch_element(q_len, k_len), 4 + 4 * n_spans),
        empty(1),
        empty(n_spans, batch, n_tiles, 4) if grad else empty(0),
        empty(3, batch, q_len) if positions else empty(0),
    )


def available() -> bool:
    """Whether the operator has an implementation in this process."""
    return extension.reason() is None


def build_plan(
    program: str, operands: list[Tensor], batch: int, q_len: int, k_len: int, grad: bool, positions: bool
) -> RowSpans:
    """Run ``program`` (see the module) on CPU operands; at most MAX_OPERANDS of them, lengths below MAX_LENGTH."""
    passed = [
        (operand if operand.dtype in _NATIVE_DTYPES else operand.to(torch.int64)).contiguous() for operand in operands
    ]
    if len(passed) < MAX_OPERANDS:
        passed += [torch.empty(0, dtype=torch.int32)] * (MAX_OPERANDS - len(passed))
    start, end, key_valid, tiles, tile_count, key_tiles, where = torch.ops.maskops.build_plan.default(
        program, *passed, batch, q_len, k_len, grad, positions
    )
    return RowSpans(
        start, end, key_valid, tiles, tile_count, key_tiles if grad else None, where if positions else None, None
    )
