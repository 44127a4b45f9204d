"""``build_plan`` on a device, in two launches whatever the mask and however large the batch.

``rows.py`` is the first launch, from rows to spans and summaries of blocks, ``lists.py`` the second, from summaries to
the work list, its order, and the seen keys; ``sequences.py`` holds how layouts and bounds are evaluated. Nothing waits
for the host, and the tensors of a plan come unwritten: the launches write all of every one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops.ops.plan.program import parse
from maskops.ops.plan.triton_kernels.lists import LIST_SCRATCH, plan_lists
from maskops.ops.plan.triton_kernels.rows import ROW_SCRATCH, SUMMARY, plan_rows
from maskops.ops.plan.triton_kernels.sequences import encoded
from maskops.ops.triton_language import launch
from maskops.spans import KEY_TILE, TILE_ROWS, tiles_per_batch_element

WINDOWS = (256, 1024, 2048)
"""Rows that a program evaluates; 128 fewer are its own. Small problems take small windows."""

KEY_BLOCKS = (128, 512, 1024)
"""Keys that a program answers for; few keys take small blocks."""


class Blocks(NamedTuple):
    """How rows and keys are shared among programs; the one does not follow from the other.

    Attributes:
        window: rows that a program evaluates of which others own the last 128.
        keys: keys that a program answers for.
    """

    window: int
    keys: int

    @property
    def rows(self) -> int:
        """Rows that belong to a program."""
        return self.window - TILE_ROWS


def blocks_of(q_len: int, k_len: int) -> Blocks:
    """The blocks that a plan of ``q_len`` rows over ``k_len`` keys takes."""
    window = next((window for window in WINDOWS if q_len <= window - TILE_ROWS), WINDOWS[-1])
    keys = next((keys for keys in KEY_BLOCKS if k_len <= keys), KEY_BLOCKS[-1])
    return Blocks(window, keys)


def build_plan(program: str, *arguments: Any, blocks: Blocks | None = None) -> tuple[Tensor, ...]:
    """The operator ``build_plan`` (its schema is in ``ops/plan/registration.py``).

    Args:
        program: the mask as text.
        arguments: the operands, then batch, q_len, k_len, grad, order and positions.
        blocks: other blocks than those of ``blocks_of``, for tests.
    """
    *operands, batch, q_len, k_len, grad, order, positions = arguments
    parsed = parse(program)
    parsed.check(operands, batch, q_len, k_len)
    blocks = blocks_of(q_len, k_len) if blocks is None else blocks
    like: Tensor = operands[0]

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return like.new_empty(sizes, dtype=dtype)

    n_spans = len(parsed.spans)
    per_batch = tiles_per_batch_element(q_len, k_len)
    capacity = batch * per_batch
    n_tiles = (k_len + KEY_TILE - 1) // KEY_TILE
    start, end = empty(n_spans, batch, q_len), empty(n_spans, batch, q_len)
    key_valid = empty(batch, k_len, dtype=torch.uint8)
    tiles, tile_count = empty(capacity, 4 + 4 * n_spans), empty(1)
    key_tiles = empty(n_spans, batch, n_tiles, 4) if grad else empty(0)
    by_cost = empty(capacity if order else 0)
    where = empty(3, batch, q_len) if positions else empty(0)

    if batch == 0:  # nothing to write but the count of the work list
        batch, q_len, k_len = 1, 0, 0
    row_blocks, key_blocks = max(1, -(-q_len // blocks.rows)), -(-k_len // blocks.keys)
    of_rows, of_keys = batch * row_blocks, batch * key_blocks  # programs
    masks = parsed.mask_operands()
    chain = empty(3, batch, q_len)
    runs = empty(4, n_spans, batch, row_blocks * blocks.rows)
    summary = empty(n_spans, batch, row_blocks, int(SUMMARY))
    holes = empty(batch, key_blocks, blocks.keys + 1) if masks else empty(0)
    window = empty(of_rows, max(int(ROW_SCRATCH), int(LIST_SCRATCH)) * blocks.window)
    counter = empty(1 + 2 * (capacity if order else 0))

    # Booleans as bytes; of an operand that shares one row among all batch elements the first size is 1.
    passed = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in operands]
    farthest = q_len + k_len + 1
    # At least one: steps without a number name the first.
    numbers = tuple(encoded(max(-farthest, min(value, farthest))) for value in parsed.values or (0,))
    sizes = tuple(encoded(parsed.first_size(index, x)) for index, x in enumerate(operands))
    shape = (batch, q_len, k_len, row_blocks, key_blocks)
    shared = {"MASKS": masks, "N_SPANS": n_spans, "OWN": blocks.rows, "W": blocks.window, "KEY_BLOCK": blocks.keys}
    launch(
        plan_rows, (of_rows + of_keys if masks else of_rows,), like,
        (*passed, sizes, numbers, start, end, where, chain, runs, summary, holes, window, counter, *shape),
        num_warps=_warps(blocks), num_stages=1,
        ORDINALS=positions or parsed.reads_ordinals, POSITIONS=positions, **parsed.structure(), **shared,
    )  # fmt: skip
    launch(
        plan_lists, (of_rows + of_keys,), like,
        (
            *passed, sizes, start, end, chain, runs, summary, holes, window, counter,
            key_valid, tiles, tile_count, key_tiles, by_cost, *shape, per_batch, capacity,
        ),
        num_warps=_warps(blocks), num_stages=1,
        GRAD=grad, ORDER=order, **shared,
    )  # fmt: skip
    return start, end, key_valid, tiles, tile_count, key_tiles, by_cost, where


def _warps(blocks: Blocks) -> int:
    return 4 if blocks.window <= 256 and blocks.keys <= 128 else 8
