"""The plans whose kernels are compiled ahead of time, to see registers and spills without a device."""

import functools
from collections.abc import Iterator

import torch

from maskops.ops.compilation import Compilation, Example, compilations_of, nowhere
from maskops.ops.plan.triton_kernels import build_plan


def compilations(architecture: str) -> Iterator[Compilation]:
    """Programs that between them take every way through the kernels."""
    return compilations_of("plan", _examples(), architecture)


def _examples() -> Iterator[Example]:
    batch, length = 4, 4096
    both = ("plan_rows", "plan_lists")
    packed, documents = nowhere(65), nowhere(batch, length)
    holes, prefixes = nowhere(batch, length, dtype=torch.bool), nowhere(batch)
    for name, everyday, program, operands, size, positions in (
        ("causal", both, "span first diag 1", (), batch, False),
        ("packed", both[:1], "cu_seqlens 0 0 0 span diag -256 diag 1", (packed,), 1, True),
        ("holes", (), "padding_mask 0 span first prefix_of 1 span diag -10 diag 1", (holes, prefixes), batch, True),
        ("documents", (), "ids 0 span chunk_start 128 chunk_end 128", (documents,), batch, False),
    ):
        operands_of_all = [*operands, *[nowhere(0)] * (6 - len(operands))]
        call = functools.partial(build_plan, program, *operands_of_all, size, length, length, True, True, positions)
        yield Example(name, call, everyday)
    for length in (100, 800):
        call = functools.partial(
            build_plan, "span first diag 1", *[nowhere(0)] * 6, batch, length, length, False, False, False
        )
        yield Example(f"causal {length} rows", call)
