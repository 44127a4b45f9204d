"""Lowering: from the description of a mask to a ``RowSpans``.

A description is layouts (``layouts.py``), a union of spans with symbolic ends (``bounds.py``) and the tensors that both
refer to. What its shapes, devices and values must fulfil together is checked here. Then either ``build_plan`` makes the
plan from a program in text (``ops/plan/registration.py``), or plain torch operations do, without a sync: they state
what each term of a bound is worth, and what the operator has to compute. No mask has a name here but in the errors
about its tensors.
"""

from __future__ import annotations

import functools
import numbers
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from maskops.backend import planner
from maskops.bounds import FIRST, LAST, Bound, Conjuncts, Extremum, span_program
from maskops.layouts import Layout, Sequences, check_shapes, check_values, first_true, resolve, values_can_be_read
from maskops.ops.plan import registration
from maskops.spans import RowSpans, is_for_devices

_LONGEST = 2**31 - 1


class Description(Protocol):
    """What a mask is, as far as its lowering is concerned; ``masks.Mask`` is one."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Where the sequences lie; several intersect."""

    @property
    def conjuncts(self) -> Conjuncts:
        """The keys of its sequence that a row sees."""

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Tensors that terms and conjuncts refer to by number: lengths of prefixes and dense masks."""

    @property
    def is_dense(self) -> bool:
        """Whether a conjunct refers to a dense mask."""


class Request(NamedTuple):
    """Which plan is wanted: its sizes, where it shall be, and which of the parts it holds that not all read.

    The arguments of ``Mask.spans`` once nothing about them is open.
    """

    q_len: int
    k_len: int
    batch: int
    device: torch.device
    grad: bool
    order: bool
    positions: bool
    bits: bool


def lower(
    mask: Description,
    q_len: int,
    k_len: int,
    *,
    batch: int | None,
    device: torch.device | str | None,
    grad: bool,
    order: bool | None,
    positions: bool,
    bits: bool | None,
) -> RowSpans:
    """The plan of a mask by the operator that is there for it; arguments and errors as ``Mask.spans``."""
    plan_batch, on_device = check_structure(mask, q_len, k_len, batch, device, positions)
    order, bits = is_for_devices(on_device, order), is_for_devices(on_device, bits)
    backend = planner(on_device.type)
    whole = None if positions else _whole_mask(mask)
    if whole is not None:
        return registration.dense_plan(whole, plan_batch, grad=grad, order=order, positions=None, bits=bits)
    if backend is not None and not mask.is_dense:
        words, operands = program(mask, on_device)
        # Of lengths that are traced the operator decides itself, when it runs.
        is_short = all(not _is_known(x) or x < registration.MAX_LENGTH for x in (q_len, k_len))
        is_short = is_short and registration.fits_a_kernel(words)
        if is_short and len(operands) <= registration.MAX_OPERANDS:
            if backend != "cpu":  # whose operators do not look at values
                check_operands(mask, q_len, k_len, plan_batch, on_device)
            wanted = {"grad": grad, "order": order, "positions": positions}
            return registration.build_plan(backend, words, operands, plan_batch, q_len, k_len, on_device, **wanted)
    return spans_by_torch(mask, Request(q_len, k_len, plan_batch, on_device, grad, order, positions, bits))


def check_structure(
    mask: Description, q_len: int, k_len: int, batch: int | None, device: torch.device | str | None, positions: bool
) -> tuple[int, torch.device]:
    """Check shapes and devices; the batch of the plan and the device it is built on."""
    for name, length in (("q_len", q_len), ("k_len", k_len)):
        _check_length(name, length, "an int")
        if _is_known(length) and not 0 <= length <= _LONGEST:
            raise ValueError(f"{name}={length}: expected 0 to {_LONGEST}")
    if batch is not None:
        _check_length("batch", batch, "an int or None")
        if _is_known(batch) and batch < 0:
            raise ValueError(f"batch={batch} is negative")
    named = [pair for layout in mask.layouts for pair in layout.tensors()]
    prefixes, dense_masks = _operands_by_use(mask)
    named += [("prefix: lengths", tensor) for tensor in prefixes]
    named += [("dense: mask", tensor) for tensor in dense_masks]
    where = named[0][1].device if device is None and named else torch.device("cpu" if device is None else device)
    if named and where == torch.device(where.type) and named[0][1].device.type == where.type:
        where = named[0][1].device  # a device without an index is whichever one the tensors are on
    for name, tensor in named:
        if tensor.device != where:
            raise ValueError(f"{name} is on {tensor.device}, the plan on {where}: move it with .to({str(where)!r})")

    sizes: list[tuple[str, int]] = []
    packed = None
    for layout in mask.layouts:
        check_shapes(layout, q_len, k_len)
        if layout.kind == "cu_seqlens":
            packed = layout
        elif layout.tensor is not None:
            sizes.append((layout.tensors()[0][0], layout.batch()))
    documents_layout = next((layout for layout in mask.layouts if layout.is_documents), None)
    for tensor in prefixes:
        if tensor.numel() == 1:
            continue
        if documents_layout is None:
            sizes.append(("prefix: lengths", tensor.shape[0]))
        elif documents_layout.kind == "cu_seqlens" and documents_layout.tensor is not None:
            n_sequences = documents_layout.tensor.shape[0] - 1
            if tensor.shape[0] != n_sequences:
                raise ValueError(
                    f"prefix: lengths has {tensor.shape[0]} elements, {documents_layout.names.queries} describes "
                    f"{n_sequences} sequences"
                )
    for tensor in dense_masks:
        if tensor.shape[2] != q_len or tensor.shape[3] != k_len:
            raise ValueError(
                f"dense: mask has shape {tuple(tensor.shape)}, expected (batch|1, heads|1, {q_len}, {k_len}) for "
                f"q_len={q_len} and k_len={k_len}"
            )
        sizes.append(("dense: mask", tensor.shape[0]))

    natural, source = 1, ""
    for name, size in sizes:
        if size == 1:
            continue
        if source and size != natural:
            raise ValueError(f"{name} has batch {size}, {source} has batch {natural}")
        natural, source = size, name
    if packed is not None:
        wrong = f"that of {source} is {natural}" if natural != 1 else f"got {batch}"
        if natural != 1 or batch not in (None, 1):
            names = packed.names
            raise ValueError(
                f"{names.owner}{names.queries} describes one packed row, so the batch must be 1; {wrong}: "
                f"{names.fix_of_batch}"
            )
    if batch is not None and source and natural != batch:
        raise ValueError(f"{source} has batch {natural}, q has batch {batch}")
    # Ordinals count over the whole batch, so whoever reads them needs every batch element.
    shared_ids = documents_layout is not None and documents_layout.kind == "ids" and documents_layout.batch() == 1
    by_ordinal = positions or (shared_ids and any(tensor.numel() > 1 for tensor in prefixes))
    return (batch if by_ordinal and batch is not None else natural), where


def _operands_by_use(mask: Description) -> tuple[list[Tensor], list[Tensor]]:
    dense_numbers = {number for conjunct in mask.conjuncts for number in conjunct.dense}
    prefixes = [tensor for number, tensor in enumerate(mask.operands) if number not in dense_numbers]
    return prefixes, [mask.operands[number] for number in sorted(dense_numbers)]


def check_operands(mask: Description, q_len: int, k_len: int, batch: int, device: torch.device) -> None:
    """The checks that read values, where they may be read; the C++ op makes the same ones with the same words."""
    prefixes, _ = _operands_by_use(mask)
    tensors = [tensor for layout in mask.layouts for _, tensor in layout.tensors()] + prefixes
    if not tensors or not values_can_be_read(tensors, device):
        return
    n_sequences = check_values(mask.layouts, q_len, k_len, batch)
    has_cu_seqlens_first = next((x.kind == "cu_seqlens" for x in mask.layouts if x.is_documents), False)
    for tensor in prefixes:
        flat = tensor.reshape(-1)
        at = first_true(flat < 0)
        if at is not None:
            raise ValueError(f"prefix: lengths[{at[0]}]={int(flat[at])} is negative")
        if n_sequences is not None and not has_cu_seqlens_first and 1 != flat.shape[0] < n_sequences:
            raise ValueError(
                f"prefix: lengths has {flat.shape[0]} elements, documents(ids) holds {n_sequences} sequences"
            )


def program(mask: Description, device: torch.device) -> tuple[str, list[Tensor]]:
    """The mask as a program of ``build_plan`` (see ``ops/plan/registration.py``) with its operands."""
    operands = list(mask.operands)
    layouts = []
    for layout in mask.layouts:
        number = len(operands)
        if layout.tensor is None and torch.compiler.is_compiling():
            # Text would pin a symbolic length to one value.
            operands.append(torch.full((1,), layout.length, dtype=torch.int64, device=device))
            layouts.append(f"key_lengths {number}")
            continue
        if layout.tensor is None:
            layouts.append(f"key_length {layout.length}")
            continue
        operands.append(layout.tensor)
        if layout.kind != "cu_seqlens":
            layouts.append(f"{layout.kind} {number}")
            continue
        keys = number
        if layout.keys is not None and layout.keys is not layout.tensor:
            keys = len(operands)
            operands.append(layout.keys)
        layouts.append(f"{layout.names.program_word} {number} {keys} {int(layout.keys is not None)}")
    return " ".join([*layouts, span_program(mask.conjuncts)]), operands


def spans_by_torch(mask: Description, request: Request) -> RowSpans:
    """The meaning of a mask, in plain torch operations without a sync."""
    q_len, k_len, batch, device = request[:4]
    check_operands(mask, q_len, k_len, batch, device)
    sequences = resolve(mask.layouts, batch, q_len, k_len, device)
    return spans_of(mask, sequences, _whole_mask(mask), request)


def spans_of(mask: Description, sequences: Sequences, whole: Tensor | None, request: Request) -> RowSpans:
    """The plan of the patterns in ``sequences``; ``whole`` is the tensor of a mask that is nothing but dense."""
    q_len, k_len, batch, device, grad, order, positions, bits = request
    shape = (batch, q_len)
    row = torch.arange(q_len, device=device)
    inside = ((row >= sequences.q_start) & (row < sequences.q_end)).expand(shape)
    k_start = torch.where(inside, sequences.k_start, 0)
    k_end = torch.where(inside, torch.maximum(sequences.k_end, sequences.k_start), 0)
    diag = torch.where(inside, k_end - sequences.q_end + row, 0)
    ordinal = sequences.ordinal.expand(shape)
    seeing = inside if sequences.row_holes is None else inside & ~sequences.row_holes

    def value(bound: Bound) -> Tensor:
        if isinstance(bound, Extremum):
            better = torch.maximum if bound.pick == "max" else torch.minimum
            return functools.reduce(better, [value(part) for part in bound.parts])
        if bound.kind == "first":
            return k_start
        if bound.kind == "last":
            return k_end
        if bound.kind == "diag":
            return diag + bound.value
        if bound.kind == "prefix":
            return k_start + bound.value
        if bound.kind == "prefix_of":
            lengths = mask.operands[bound.value].reshape(-1).to(torch.int64)
            if lengths.shape[0] == 0:
                return k_start
            return k_start + lengths[ordinal.clamp(0, lengths.shape[0] - 1)]
        chunk = torch.div(diag - k_start, bound.value, rounding_mode="floor")
        return k_start + (chunk if bound.kind == "chunk_start" else chunk + 1) * bound.value

    starts, ends = [], []
    for conjunct in mask.conjuncts:
        start = torch.minimum(torch.maximum(value(conjunct.start), k_start).clamp(min=0), k_end)
        end = torch.minimum(torch.maximum(value(conjunct.end), start), k_end)
        starts.append(torch.where(seeing, start, 0))
        ends.append(torch.where(seeing, end, 0))
    start, end = torch.stack(starts), torch.stack(ends)
    key_holes = None if sequences.key_holes is None else sequences.key_holes.expand(batch, k_len)
    where = None
    if positions:
        ordinal = torch.where(inside, ordinal, -1)
        where = torch.stack((diag, k_start, ordinal)).to(torch.int32)
    if mask.is_dense:
        exact = _exact(mask, start, end, k_len, key_holes) if whole is None else whole
        return registration.dense_plan(exact, batch, grad=grad, order=order, positions=where, bits=bits)
    if len(mask.conjuncts) > 1:
        start, end = _disjoint(start, end, k_len)
    return registration.derive_plan(
        start, end, k_len, key_holes=key_holes, dense=None, grad=grad, order=order, positions=where, bits=bits
    )


def _exact(mask: Description, start: Tensor, end: Tensor, k_len: int, key_holes: Tensor | None) -> Tensor:
    """Every pair of a dense mask: bool (batch, heads|1, q_len, k_len), from the spans of its conjuncts."""
    key = torch.arange(k_len, device=start.device)
    exact = None
    for number, conjunct in enumerate(mask.conjuncts):
        inside = (key >= start[number].unsqueeze(-1)) & (key < end[number].unsqueeze(-1))
        allowed = functools.reduce(torch.logical_and, [mask.operands[i] for i in conjunct.dense], inside[:, None])
        exact = allowed if exact is None else exact | allowed
    assert exact is not None
    return exact if key_holes is None else exact & ~key_holes[:, None, None]


def _whole_mask(mask: Description) -> Tensor | None:
    """The tensor of a mask that is ``dense`` and nothing else."""
    if mask.layouts or len(mask.conjuncts) != 1 or len(mask.conjuncts[0].dense) != 1:
        return None
    conjunct = mask.conjuncts[0]
    return mask.operands[conjunct.dense[0]] if (conjunct.start, conjunct.end) == (FIRST, LAST) else None


def _check_length(name: str, length: object, expected: str) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} is {type(length).__name__}, expected {expected}")


def _is_known(length: int | torch.SymInt) -> bool:
    """Whether a length may be compared: comparing one that is traced would bound it for all calls to come."""
    return not isinstance(length, torch.SymInt) and not torch.compiler.is_compiling()


def _disjoint(start: Tensor, end: Tensor, k_len: int) -> tuple[Tensor, Tensor]:
    """Sort the spans of each row by (start, end) and clip each to begin at the end of those before it.

    Equal starts go by end, so that a span that another contains keeps its place from row to row: the bounds of a tile
    are then tight.
    """
    order = (start * (k_len + 1) + end).sort(dim=0).indices
    start, end = start.gather(0, order), end.gather(0, order)
    starts, ends = [start[0]], [end[0]]
    for span in range(1, start.shape[0]):
        begin = torch.maximum(start[span], ends[-1])
        starts.append(begin)
        ends.append(torch.maximum(end[span], begin))
    return torch.stack(starts), torch.stack(ends)
