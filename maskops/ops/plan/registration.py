"""The operators that make plans: ``maskops::build_plan``, and ``maskops::derive_plan`` for compiled code.

``build_plan``: a mask as a program in, a RowSpans out, in one call.

The program is text, words separated by single spaces: first layouts, each with its operand numbers, then for every
span ``span`` and two bounds, start and end, in postfix order over the values of a row::

    padding_right N | padding_left N | padding_mask N | key_lengths N | key_length LENGTH | key_mask N | ids N
    cu_seqlens N_QUERIES N_KEYS KEYS_GIVEN | varlen N_QUERIES N_KEYS KEYS_GIVEN
    first | last | diag OFFSET | prefix LENGTH | prefix_of N | chunk_start SIZE | chunk_end SIZE | max | min

``varlen`` is ``cu_seqlens`` whose errors name the arguments of ``varlen_attention``.

``causal() & sliding_window(256, 0) & documents(cu_seqlens=cu)`` is ``cu_seqlens 0 0 0 span diag -256 diag 1``. What the
words mean is written in ``layouts.py`` and ``bounds.py``; ``lowering.py`` makes the programs, and its torch path is the
meaning the operator is tested against.

``compile_mask``: a bool mask in, its RowSpans out, with its bits; the mask is read once. ``dense_plan`` calls it, or
does the same with torch operations.

``derive_plan``: spans in, what ``spans.build_row_spans`` derives from them out. Its steps depend on the lengths (a
level for each power of two), so that compiled code, if it saw them, would be made anew for other lengths: there they
are one opaque call. Eager code calls ``build_row_spans`` itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskops.backend import mask_compiler
from maskops.ops.calls import run
from maskops.ops.direct import nothing_intervenes
from maskops.ops.operators import define, name_of
from maskops.spans import KEY_TILE, RowSpans, build_row_spans, hull_of_mask, tiles_per_batch_element

MAX_OPERANDS = 6
MAX_SPANS = 16
MAX_LAYOUTS = 12
MAX_STEPS = 160
"""Longer programs do not fit the arguments of a kernel."""

MAX_LENGTH = 2**28
"""Above it, sums of lengths would not fit the int32 arithmetic of the operator."""

_LAYOUT_WORDS = frozenset(
    [
        "padding_right",
        "padding_left",
        "padding_mask",
        "key_lengths",
        "key_length",
        "key_mask",
        "ids",
        "cu_seqlens",
        "varlen",
    ]
)

_NOTHING = torch.empty(0, dtype=torch.int32, device="cpu")
_NATIVE_DTYPES = (torch.int32, torch.int64, torch.bool, torch.uint8)

_library = torch.library.Library("maskops", "FRAGMENT")


def _build_plan_fake(
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
    order: bool,
    positions: bool,
) -> tuple[Tensor, ...]:
    n_spans = program.split(" ").count("span")
    spans = operand0.new_empty((n_spans, batch, q_len), dtype=torch.int32)
    where = operand0.new_empty((3, batch, q_len) if positions else (0,), dtype=torch.int32)
    return spans, torch.empty_like(spans), *_empty_work_lists(spans, k_len, grad, order), where


define(
    _library, "plan", "build_plan",
    "(str program, " + ", ".join(f"Tensor operand{number}" for number in range(MAX_OPERANDS))
    + ", SymInt batch, SymInt q_len, SymInt k_len, bool grad, bool order, bool positions)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _build_plan_fake,
)  # fmt: skip


def _empty_work_lists(start: Tensor, k_len: int, grad: bool, order: bool) -> tuple[Tensor, ...]:
    """What is derived from spans, unwritten: key_valid, tiles, tile_count, and where wanted key_tiles and order."""
    n_spans, batch, q_len = start.shape
    capacity = batch * tiles_per_batch_element(q_len, k_len)

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return start.new_empty(sizes, dtype=dtype)

    return (
        empty(batch, k_len, dtype=torch.uint8),
        empty(capacity, 4 + 4 * n_spans),
        empty(1),
        empty(n_spans, batch, (k_len + KEY_TILE - 1) // KEY_TILE, 4) if grad else empty(0),
        empty(capacity if order else 0),
    )


_library.define(
    "compile_mask_cuda(Tensor mask, SymInt batch, bool grad, bool order, bool bits)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("maskops::compile_mask_cuda", lib=_library)  # type: ignore[untyped-decorator]
def _(mask: Tensor, batch: int, grad: bool, order: bool, bits: bool) -> tuple[Tensor, ...]:
    _, _, q_len, k_len = mask.shape
    spans = mask.new_empty((1, batch, q_len), dtype=torch.int32)
    words = (*mask.shape[:3], (k_len + 31) // 32) if bits else (0,)
    lists = _empty_work_lists(spans, k_len, grad, order)
    return spans, torch.empty_like(spans), *lists, mask.new_empty(words, dtype=torch.int32)


# An absent tensor is an empty one. The same on every device: it is made of torch operations.
_library.define(
    "derive_plan(Tensor start, Tensor end, Tensor key_holes, Tensor dense, SymInt k_len, bool grad, bool order, "
    "bool bits)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl("maskops::derive_plan", "CompositeExplicitAutograd", lib=_library)
def _(
    start: Tensor, end: Tensor, key_holes: Tensor, dense: Tensor, k_len: int, grad: bool, order: bool, bits: bool
) -> tuple[Tensor, ...]:
    plan = build_row_spans(
        start,
        end,
        k_len,
        key_holes=key_holes if key_holes.dim() == 2 else None,
        dense=dense if dense.dim() == 4 else None,
        grad=grad,
        order=order,
        bits=bits,
    )
    lists = (plan.key_tiles, plan.order, plan.dense_bits)
    wanted = (start.new_empty(0, dtype=torch.int32) if x is None else x for x in lists)
    return plan.key_valid, plan.tiles, plan.tile_count, *wanted


@torch.library.register_fake("maskops::derive_plan", lib=_library)  # type: ignore[untyped-decorator]
def _(
    start: Tensor, end: Tensor, key_holes: Tensor, dense: Tensor, k_len: int, grad: bool, order: bool, bits: bool
) -> tuple[Tensor, ...]:
    words = (*dense.shape[:3], (k_len + 31) // 32) if bits and dense.dim() == 4 else (0,)
    return *_empty_work_lists(start, k_len, grad, order), start.new_empty(words, dtype=torch.int32)


def derive_plan(
    start: Tensor,
    end: Tensor,
    k_len: int,
    *,
    key_holes: Tensor | None,
    dense: Tensor | None,
    grad: bool,
    order: bool,
    positions: Tensor | None,
    bits: bool,
) -> RowSpans:
    """``spans.build_row_spans``, which compiled code calls without looking inside."""
    if not torch.compiler.is_compiling():
        return build_row_spans(
            start, end, k_len, key_holes=key_holes, dense=dense, grad=grad, order=order, positions=positions, bits=bits
        )
    nothing = start.new_empty(0, dtype=torch.bool)
    holes, exact = (nothing if x is None else x for x in (key_holes, dense))
    key_valid, tiles, tile_count, key_tiles, by_cost, words = torch.ops.maskops.derive_plan.default(
        start, end, holes, exact, k_len, grad, order, bits
    )
    lists = (key_valid, tiles, tile_count, key_tiles if grad else None, by_cost if order else None)
    dense_bits = words if bits and dense is not None else None
    return RowSpans(start.to(torch.int32), end.to(torch.int32), *lists, positions, dense, dense_bits)


def fits_a_kernel(program: str) -> bool:
    """Whether a program is short enough for every backend; torch plans longer ones."""
    words = program.split(" ")
    spans, layouts = words.count("span"), sum(word in _LAYOUT_WORDS for word in words)
    # Every step is a word; the stack of a bound is never deeper than its extrema and one.
    return spans <= MAX_SPANS and layouts <= MAX_LAYOUTS and len(words) <= MAX_STEPS


def build_plan(
    backend: str,
    program: str,
    operands: list[Tensor],
    batch: int,
    q_len: int,
    k_len: int,
    device: torch.device,
    *,
    grad: bool,
    order: bool,
    positions: bool,
) -> RowSpans:
    """Run ``program`` (see the module) as a backend implements it.

    Args:
        backend: name of a backend that plans.
        program: at most MAX_OPERANDS operands, lengths below MAX_LENGTH.
        operands: integers or bool on ``device``.
        batch: batch elements of the plan.
        q_len: query rows.
        k_len: keys.
        device: where the plan is made.
        grad: whether ``key_tiles`` is wanted, as ``order`` and ``positions``.
    """
    passed = [
        (operand if operand.dtype in _NATIVE_DTYPES else operand.to(torch.int64)).contiguous() for operand in operands
    ]
    if len(passed) < MAX_OPERANDS:
        is_here = device.type == "cpu" and nothing_intervenes()
        nothing = _NOTHING if is_here else torch.empty(0, dtype=torch.int32, device=device)
        passed += [nothing] * (MAX_OPERANDS - len(passed))
    operator = getattr(torch.ops.maskops, name_of("build_plan", backend)).default
    start, end, key_valid, tiles, tile_count, key_tiles, by_cost, where = run(
        operator, program, *passed, batch, q_len, k_len, grad, order, positions
    )
    lists = (key_valid, tiles, tile_count, key_tiles if grad else None, by_cost if order else None)
    return RowSpans(start, end, *lists, where if positions else None, None, None)


def dense_plan(mask: Tensor, batch: int, *, grad: bool, order: bool, positions: Tensor | None, bits: bool) -> RowSpans:
    """The plan of a dense mask.

    Args:
        mask: bool (batch|1, heads|1, q_len, k_len) of any strides; it becomes ``RowSpans.dense``.
        batch: batch elements of the plan.
        grad: whether ``key_tiles`` is wanted, as ``order`` and ``bits``.
        positions: int32 (3, batch, q_len) or None, stored as it is.
    """
    backend = mask_compiler(mask.device.type)
    # Of lengths that are traced the operator decides itself, when it runs.
    is_long = not torch.compiler.is_compiling() and max(mask.shape[1:]) >= MAX_LENGTH
    if backend is None or is_long:
        start, end = hull_of_mask(mask, batch)
        wanted = {"grad": grad, "order": order, "bits": bits}
        return derive_plan(start, end, mask.shape[3], key_holes=None, dense=mask, positions=positions, **wanted)
    operator = getattr(torch.ops.maskops, name_of("compile_mask", backend)).default
    start, end, key_valid, tiles, tile_count, key_tiles, by_cost, words = run(operator, mask, batch, grad, order, bits)
    lists = (key_valid, tiles, tile_count, key_tiles if grad else None, by_cost if order else None)
    return RowSpans(start, end, *lists, positions, mask, words if bits else None)
