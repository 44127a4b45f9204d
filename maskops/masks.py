"""Masks: what each of them means, how they combine, and how they become spans of keys.

A mask is a combination of

* layouts, which say where the sequences lie: ``padding``, ``key_padding``, ``documents``;
* patterns, which speak of positions inside a sequence: ``full``, ``causal``, ``sliding_window``, ``prefix``,
  ``chunked``;
* ``dense``, an explicit boolean tensor for what is neither.

``a & b`` allows what both allow, ``a | b`` what one of them allows. The layouts of a mask give every query row the
sequence it lies in: query rows ``[q_start, q_end)``, keys ``[k_start, k_end)`` and an ordinal; several layouts
intersect; without a layout the whole row of the batch is one sequence whose ordinal is the batch index. Query rows
outside every sequence see nothing. Patterns are evaluated inside the sequence, bottom-right aligned: query row ``i``
stands at key ``diag = k_end - q_end + i``, so that the last query sees the last key.

The meaning of every mask is stated here, by the function that makes it, and the lowering of a ``Mask`` puts the two
halves together: its layouts become sequences (``layouts.py``, where padding and documents are read), its patterns are
a union of spans with symbolic ends (``bounds.py``, where no mask has a name), and both become a ``RowSpans``
(``spans.py``), so that no kernel ever knows a name.
"""

from __future__ import annotations

import functools
import numbers
import operator
import sys
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor

from maskops.backend import planner
from maskops.bounds import (
    FIRST,
    LAST,
    Bound,
    Conjunct,
    Conjuncts,
    Extremum,
    Term,
    counts_from_first,
    intersection,
    renumbered,
    span_program,
    union,
)
from maskops.checks import INTEGERS as _INTEGERS
from maskops.layouts import (
    DOCUMENTS,
    CuSeqlensNames,
    Layout,
    Sequences,
    check_shapes,
    check_values,
    first_true,
    resolve,
    values_can_be_read,
)
from maskops.ops.plan import registration
from maskops.spans import RowSpans, is_for_devices

__all__ = [
    "Mask",
    "causal",
    "chunked",
    "dense",
    "documents",
    "full",
    "key_padding",
    "padding",
    "prefix",
    "sliding_window",
]

_LONGEST = 2**31 - 1


# ---- the mask --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mask:
    """A description of who attends to whom; combine with ``&`` and ``|``, then ask for ``spans``.

    Made by the functions of this module. Two masks with the same meaning need not be equal objects, so masks compare
    by identity.
    """

    text: str
    layouts: tuple[Layout, ...] = ()
    conjuncts: tuple[Conjunct, ...] = (Conjunct(FIRST, LAST, ()),)
    operands: tuple[Tensor, ...] = ()
    """Tensors that terms and conjuncts refer to by number: lengths of prefixes and dense masks."""

    def __repr__(self) -> str:
        return f"masks.{self.text}" if self.text.isidentifier() else self.text

    def _joined(self, other: Mask) -> tuple[tuple[Tensor, ...], Conjuncts]:
        """Operands of both masks and the conjuncts of ``other`` renumbered to them."""
        if not other.operands:
            return self.operands, other.conjuncts
        operands = list(self.operands)
        numbers = []
        for tensor in other.operands:
            known = [number for number, mine in enumerate(operands) if mine is tensor]
            if not known:
                known = [len(operands)]
                operands.append(tensor)
            numbers.append(known[0])
        return tuple(operands), renumbered(other.conjuncts, tuple(numbers))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        operands, conjuncts = self._joined(other)
        return Mask(
            f"{_bracketed(self.text, '|')} & {_bracketed(other.text, '|')}",
            self.layouts + other.layouts,
            intersection(self.conjuncts, conjuncts),
            operands,
        )

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        for part in (self, other):
            if part.layouts:
                raise ValueError(
                    f"a layout cannot stand under |: {part.text} says where the sequences lie; put it outside, as in "
                    "(a | b) & padding(lengths)"
                )
        operands, conjuncts = self._joined(other)
        return Mask(f"{self.text} | {other.text}", (), union(self.conjuncts, conjuncts), operands)

    @property
    def n_spans(self) -> int:
        """Spans per query row of the plan."""
        return 1 if self.is_dense else len(self.conjuncts)

    @property
    def counts_from_first(self) -> bool:
        """Whether what a row sees depends on where its sequence begins, even if that is before all that it may see."""
        return any(counts_from_first(bound) for part in self.conjuncts for bound in (part.start, part.end))

    @property
    def is_dense(self) -> bool:
        """Whether the mask holds an explicit boolean tensor, which spans can only bound."""
        return any(conjunct.dense for conjunct in self.conjuncts)

    def spans(
        self,
        q_len: int,
        k_len: int,
        *,
        batch: int | None = None,
        device: torch.device | str | None = None,
        grad: bool = True,
        order: bool | None = None,
        positions: bool = False,
        bits: bool | None = None,
    ) -> RowSpans:
        """Plan the mask for ``q_len`` query rows and ``k_len`` keys.

        Args:
            q_len: query rows of one batch element (the total for packed tensors).
            k_len: keys of one batch element.
            batch: batch of q, checked against the mask. The plan itself has batch 1 when nothing in it depends on the
                batch element.
            device: where to build the plan; that of the mask's tensors by default, else the CPU.
            grad: also build the transposed bounds that backward passes read.
            order: also sort the work items by cost; None: where the device is no processor.
            positions: also build diag, first key and ordinal of each row; the plan then has the whole ``batch``.
            bits: also pack a dense mask into bits; None: where the device is no processor.

        Raises:
            ValueError: shapes that do not fit ``q_len``, ``k_len`` or ``batch``; tensors on several devices; and on the
                CPU (elsewhere under ``maskops.validate()``) values that describe no layout, such as a decreasing
                ``cu_seqlens``.
        """
        plan_batch, on_device = self._check_structure(q_len, k_len, batch, device, positions)
        order, bits = is_for_devices(on_device, order), is_for_devices(on_device, bits)
        backend = planner(on_device.type)
        whole = None if positions else self._whole_mask()
        if whole is not None:
            return registration.dense_plan(whole, plan_batch, grad=grad, order=order, positions=None, bits=bits)
        if backend is not None and not self.is_dense:
            program, operands = self._program(on_device)
            # Of lengths that are traced the operator decides itself, when it runs.
            is_short = all(not _is_known(x) or x < registration.MAX_LENGTH for x in (q_len, k_len))
            is_short = is_short and registration.fits_a_kernel(program)
            if is_short and len(operands) <= registration.MAX_OPERANDS:
                if backend != "cpu":  # whose operators do not look at values
                    self._check_values(q_len, k_len, plan_batch, on_device)
                wanted = {"grad": grad, "order": order, "positions": positions}
                return registration.build_plan(
                    backend, program, operands, plan_batch, q_len, k_len, on_device, **wanted
                )
        return self._spans_by_torch(q_len, k_len, plan_batch, on_device, grad, order, positions, bits)

    def to_dense(
        self, q_len: int, k_len: int, *, batch: int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The mask as bool (batch, heads|1, q_len, k_len), True = attend; arguments as ``spans``."""
        allowed = self.spans(q_len, k_len, batch=batch, device=device, grad=False).to_dense()
        return allowed if batch is None else allowed.expand(batch, -1, -1, -1)

    def show(self, q_len: int, k_len: int, file: TextIO | None = None) -> None:
        """Print a small picture: a line per query row, ``#`` where it attends (``+``: to some keys of the cell).

        Args:
            q_len: query rows.
            k_len: keys; above 64 rows or keys a character stands for a block.
            file: where to print, standard output by default.
        """
        out = sys.stdout if file is None else file
        allowed = self.to_dense(q_len, k_len, device=None).cpu()
        batch, heads = allowed.shape[:2]
        row_step, key_step = max(1, -(-q_len // 64)), max(1, -(-k_len // 64))
        block = "" if row_step == key_step == 1 else f", a character is {row_step} rows x {key_step} keys"
        print(f"{self.text}: {q_len} query rows (down) x {k_len} keys (across){block}", file=out)
        shown = min(batch * heads, 4)
        for index in range(shown):
            if batch * heads > 1:
                print(f"batch element {index // heads}, head {index % heads}:", file=out)
            picture = allowed[index // heads, index % heads].float()
            for row in range(0, q_len, row_step):
                cells = [picture[row : row + row_step, key : key + key_step] for key in range(0, k_len, key_step)]
                line = "".join("." if not cell.any() else "#" if bool(cell.all()) else "+" for cell in cells)
                print(line, file=out)
        if shown < batch * heads:
            print(f"... and {batch * heads - shown} more", file=out)

    # ---- lowering ----------------------------------------------------------------------------------------------------

    def _program(self, device: torch.device) -> tuple[str, list[Tensor]]:
        """The mask as a program of ``build_plan`` (see ``ops/plan/registration.py``) with its operands."""
        operands = list(self.operands)
        layouts = []
        for layout in self.layouts:
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
        return " ".join([*layouts, span_program(self.conjuncts)]), operands

    def _check_structure(
        self, q_len: int, k_len: int, batch: int | None, device: torch.device | str | None, positions: bool
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
        named = [pair for layout in self.layouts for pair in layout.tensors()]
        prefixes, dense_masks = self._operands_by_use()
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
        for layout in self.layouts:
            check_shapes(layout, q_len, k_len)
            if layout.kind == "cu_seqlens":
                packed = layout
            elif layout.tensor is not None:
                sizes.append((layout.tensors()[0][0], layout.batch()))
        documents_layout = next((layout for layout in self.layouts if layout.is_documents), None)
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

    def _operands_by_use(self) -> tuple[list[Tensor], list[Tensor]]:
        dense_numbers = {number for conjunct in self.conjuncts for number in conjunct.dense}
        prefixes = [tensor for number, tensor in enumerate(self.operands) if number not in dense_numbers]
        return prefixes, [self.operands[number] for number in sorted(dense_numbers)]

    def _check_values(self, q_len: int, k_len: int, batch: int, device: torch.device) -> None:
        """The checks that read values, where they may be read; the C++ op makes the same ones with the same words."""
        prefixes, _ = self._operands_by_use()
        tensors = [tensor for layout in self.layouts for _, tensor in layout.tensors()] + prefixes
        if not tensors or not values_can_be_read(tensors, device):
            return
        n_sequences = check_values(self.layouts, q_len, k_len, batch)
        has_cu_seqlens_first = next((x.kind == "cu_seqlens" for x in self.layouts if x.is_documents), False)
        for tensor in prefixes:
            flat = tensor.reshape(-1)
            at = first_true(flat < 0)
            if at is not None:
                raise ValueError(f"prefix: lengths[{at[0]}]={int(flat[at])} is negative")
            if n_sequences is not None and not has_cu_seqlens_first and 1 != flat.shape[0] < n_sequences:
                raise ValueError(
                    f"prefix: lengths has {flat.shape[0]} elements, documents(ids) holds {n_sequences} sequences"
                )

    def _spans_by_torch(
        self,
        q_len: int,
        k_len: int,
        batch: int,
        device: torch.device,
        grad: bool,
        order: bool,
        positions: bool,
        bits: bool,
    ) -> RowSpans:
        """The meaning of a mask, in plain torch operations without a sync."""
        self._check_values(q_len, k_len, batch, device)
        sequences = resolve(self.layouts, batch, q_len, k_len, device)
        whole = self._whole_mask()
        return self._spans_of(sequences, whole, q_len, k_len, batch, device, grad, order, positions, bits)

    def spans_in(
        self,
        sequences: Sequences,
        q_len: int,
        k_len: int,
        *,
        batch: int,
        device: torch.device,
        grad: bool = True,
        order: bool | None = None,
        positions: bool = False,
        bits: bool | None = None,
    ) -> RowSpans:
        """Plan the patterns of the mask inside sequences that no layout describes; layouts of the mask are not read.

        Plain torch operations on any device, without a sync.

        Args:
            sequences: the sequence of each query row, broadcastable to (batch, q_len). A sequence may begin before the
                first key (``k_start < 0``, a cache that has dropped keys): patterns count from there.
            q_len: query rows of one batch element.
            k_len: keys of one batch element.
            batch: batch elements of the plan: 1 or the batch of q.
            device: where the tensors of ``sequences`` are.
            grad: as in ``spans``.
            order: as in ``spans``.
            positions: as in ``spans``.
            bits: as in ``spans``.
        """
        order, bits = is_for_devices(device, order), is_for_devices(device, bits)
        return self._spans_of(sequences, None, q_len, k_len, batch, device, grad, order, positions, bits)

    def _spans_of(
        self,
        sequences: Sequences,
        whole: Tensor | None,
        q_len: int,
        k_len: int,
        batch: int,
        device: torch.device,
        grad: bool,
        order: bool,
        positions: bool,
        bits: bool,
    ) -> RowSpans:
        """The plan of the patterns in ``sequences``; ``whole`` is the tensor of a mask that is nothing but dense."""
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
                lengths = self.operands[bound.value].reshape(-1).to(torch.int64)
                if lengths.shape[0] == 0:
                    return k_start
                return k_start + lengths[ordinal.clamp(0, lengths.shape[0] - 1)]
            chunk = torch.div(diag - k_start, bound.value, rounding_mode="floor")
            return k_start + (chunk if bound.kind == "chunk_start" else chunk + 1) * bound.value

        starts, ends = [], []
        for conjunct in self.conjuncts:
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
        if self.is_dense:
            exact = self._exact(start, end, k_len, key_holes) if whole is None else whole
            return registration.dense_plan(exact, batch, grad=grad, order=order, positions=where, bits=bits)
        if len(self.conjuncts) > 1:
            start, end = _disjoint(start, end, k_len)
        return registration.derive_plan(
            start, end, k_len, key_holes=key_holes, dense=None, grad=grad, order=order, positions=where, bits=bits
        )

    def _exact(self, start: Tensor, end: Tensor, k_len: int, key_holes: Tensor | None) -> Tensor:
        """Every pair of a dense mask: bool (batch, heads|1, q_len, k_len), from the spans of its conjuncts."""
        key = torch.arange(k_len, device=start.device)
        exact = None
        for number, conjunct in enumerate(self.conjuncts):
            inside = (key >= start[number].unsqueeze(-1)) & (key < end[number].unsqueeze(-1))
            allowed = functools.reduce(torch.logical_and, [self.operands[i] for i in conjunct.dense], inside[:, None])
            exact = allowed if exact is None else exact | allowed
        assert exact is not None
        return exact if key_holes is None else exact & ~key_holes[:, None, None]

    def _whole_mask(self) -> Tensor | None:
        """The tensor of a mask that is ``dense`` and nothing else."""
        if self.layouts or len(self.conjuncts) != 1 or len(self.conjuncts[0].dense) != 1:
            return None
        conjunct = self.conjuncts[0]
        return self.operands[conjunct.dense[0]] if (conjunct.start, conjunct.end) == (FIRST, LAST) else None


def _check_length(name: str, length: object, expected: str) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} is {type(length).__name__}, expected {expected}")


def _is_known(length: int | torch.SymInt) -> bool:
    """Whether a length may be compared: comparing one that is traced would bound it for all calls to come."""
    return not isinstance(length, torch.SymInt) and not torch.compiler.is_compiling()


def _bracketed(text: str, sign: str) -> str:
    return f"({text})" if f" {sign} " in text else text


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


# ---- the masks -------------------------------------------------------------------------------------------------------


def _check_integers(name: str, value: object, dims: tuple[int, ...], meaning: str, *, mask: bool = False) -> Tensor:
    """``value`` as a tensor of integers (bool as well for a mask) with one of ``dims`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {meaning}, got {type(value).__name__}")
    if value.dim() not in dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {meaning}")
    if value.dtype == torch.bool and mask:
        return value
    if value.dtype not in _INTEGERS:
        kinds = "bool or integers" if mask else "integers"
        raise TypeError(f"{name} has dtype {value.dtype}, expected {kinds} {meaning}")
    return value


def full() -> Mask:
    """Every query of a sequence attends to every key of it; the neutral element of ``&``."""
    return Mask("full()")


def causal() -> Mask:
    """Key ``j`` is allowed iff ``j <= diag``: bottom-right aligned, the last query sees the last key."""
    return Mask("causal()", conjuncts=(Conjunct(FIRST, Term("diag", 1), ()),))


def sliding_window(left: int | None, right: int | None) -> Mask:
    """Key ``j`` is allowed iff ``diag - left <= j <= diag + right``.

    Args:
        left: keys to the left of the aligned one, at least 0; None or -1 = unbounded.
        right: keys to the right of it, likewise.
    """
    ends: list[Bound] = []
    for name, width in (("left", left), ("right", right)):
        if width is None or width == -1:
            ends.append(FIRST if name == "left" else LAST)
            continue
        if isinstance(width, bool) or not isinstance(width, (int, torch.SymInt)):
            raise TypeError(f"sliding_window: {name} is {type(width).__name__}, expected an int or None")
        width = operator.index(width)
        if width < 0:
            raise ValueError(f"sliding_window: {name}={width}: expected 0 or more, or -1 or None for unbounded")
        ends.append(Term("diag", -width if name == "left" else width + 1))
    return Mask(f"sliding_window({left}, {right})", conjuncts=(Conjunct(ends[0], ends[1], ()),))


def prefix(lengths: int | Tensor) -> Mask:
    """The first keys of each sequence: key ``j`` is allowed iff ``j < k_start + lengths[ordinal]``.

    ``causal() | prefix(n)`` is a prefix-LM, ``causal() & (sliding_window(w, 0) | prefix(4))`` first tokens and window.

    Args:
        lengths: keys of the prefix: an int, a tensor of one element, or integers (n_sequences,) in the order of the
            sequences (the batch without documents). Longer than a sequence is legal.
    """
    if isinstance(lengths, bool):
        raise TypeError("prefix: lengths is bool, expected an int or a tensor of integers (n_sequences,)")
    if isinstance(lengths, (int, torch.SymInt)):
        lengths = operator.index(lengths)
        if lengths < 0:
            raise ValueError(f"prefix: lengths={lengths} is negative")
        return Mask(f"prefix({lengths})", conjuncts=(Conjunct(FIRST, Term("prefix", lengths), ()),))
    tensor = _check_integers("prefix: lengths", lengths, (0, 1), "(n_sequences,) or an int")
    return Mask(
        "prefix(lengths)",
        conjuncts=(Conjunct(FIRST, Term("prefix_of", 0), ()),),
        operands=(tensor,),
    )


def chunked(size: int) -> Mask:
    """Sequences are cut into chunks of ``size`` keys from their first one; a query sees the chunk it stands in."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"chunked: size is {type(size).__name__}, expected an int")
    size = operator.index(size)
    if size < 1:
        raise ValueError(f"chunked: size={size}: expected 1 or more")
    return Mask(f"chunked({size})", conjuncts=(Conjunct(Term("chunk_start", size), Term("chunk_end", size), ()),))


def padding(lengths_or_mask: Tensor, side: str = "right") -> Mask:
    """Padded sequences whose queries and keys share their lengths (``q_len == k_len``); padded query rows see nothing.

    Args:
        lengths_or_mask: integers (B,) = lengths, or bool or 0/1 integers (B, S) = mask, True = a real token; left
            padding and holes are read from the mask.
        side: "right" or "left": where the padding of ``lengths`` lies.
    """
    if side not in ("right", "left"):
        raise ValueError(f"padding: side={side!r}: expected 'right' or 'left'")
    is_mask = isinstance(lengths_or_mask, Tensor) and lengths_or_mask.dim() == 2
    name = "padding: mask" if is_mask else "padding: lengths"
    tensor = _check_integers(name, lengths_or_mask, (1, 2), "(batch,) lengths or (batch, length) mask", mask=is_mask)
    if is_mask:
        return Mask("padding(mask)", layouts=(Layout("padding_mask", tensor),))
    if side == "left":
        return Mask("padding(lengths, side='left')", layouts=(Layout("padding_left", tensor),))
    return Mask("padding(lengths)", layouts=(Layout("padding_right", tensor),))


def key_padding(lengths_or_mask: int | Tensor) -> Mask:
    """Keys beyond a length, or where a mask is 0, are not there; queries are all real (cross-attention, KV cache).

    Args:
        lengths_or_mask: an int or integers (B,) = keys in use, or bool or 0/1 integers (B, Sk) = mask, True = a real
            key.
    """
    if isinstance(lengths_or_mask, bool):
        raise TypeError("key_padding: lengths is bool, expected an int or a tensor")
    if isinstance(lengths_or_mask, (int, torch.SymInt)):
        if lengths_or_mask < 0:
            raise ValueError(f"key_padding: lengths={lengths_or_mask} is negative")
        # Not in the text: the fill of a cache changes from call to call and must stay symbolic under torch.compile.
        return Mask("key_padding(length)", layouts=(Layout("key_length", length=lengths_or_mask),))
    is_mask = isinstance(lengths_or_mask, Tensor) and lengths_or_mask.dim() == 2
    name = "key_padding: mask" if is_mask else "key_padding: lengths"
    meaning = "(batch,) lengths or (batch, k_len) mask"
    tensor = _check_integers(name, lengths_or_mask, (0, 1, 2), meaning, mask=is_mask)
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    if is_mask:
        return Mask("key_padding(mask)", layouts=(Layout("key_mask", tensor),))
    return Mask("key_padding(lengths)", layouts=(Layout("key_lengths", tensor),))


def documents(
    ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> Mask:
    """Several sequences in one row, none of which sees another. Give exactly one of ``ids`` and ``cu_seqlens``.

    Args:
        ids: integers (S,) or (B, S): the document of each token, -1 = padding; the tokens of a document are contiguous.
        cu_seqlens: integers (n_sequences + 1,): cumulative lengths of one packed row (batch 1), starting at 0. Its end
            may lie before the end of the row, and it may be padded with its last value.
        cu_seqlens_k: the same for the keys, where they differ from the queries.
    """
    if (ids is None) == (cu_seqlens is None):
        raise ValueError("documents: give exactly one of ids and cu_seqlens")
    if ids is not None:
        if cu_seqlens_k is not None:
            raise ValueError("documents: cu_seqlens_k goes with cu_seqlens, not with ids")
        tensor = _check_integers("documents: ids", ids, (1, 2), "(length,) or (batch, length)")
        return Mask("documents(ids)", layouts=(Layout("ids", tensor),))
    return packed_rows(cu_seqlens, cu_seqlens_k, DOCUMENTS)


def packed_rows(cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, names: CuSeqlensNames) -> Mask:
    """``documents`` of cumulative lengths for a function whose errors name its own arguments.

    Args:
        cu_seqlens: as in ``documents``.
        cu_seqlens_k: as in ``documents``.
        names: what the caller calls them.
    """
    queries = _check_integers(f"{names.owner}{names.queries}", cu_seqlens, (1,), "(n_sequences + 1,)")
    named = [(names.queries, queries)]
    if cu_seqlens_k is not None:
        keys = _check_integers(f"{names.owner}{names.keys}", cu_seqlens_k, (1,), "(n_sequences + 1,)")
        named.append((names.keys, keys))
        if keys.shape != queries.shape:
            raise ValueError(
                f"{names.owner}{names.queries} has {queries.shape[0]} elements, {names.keys} has {keys.shape[0]}: "
                "queries and keys need the same number of sequences"
            )
    for name, tensor in named:
        if tensor.shape[0] == 0:
            raise ValueError(f"{names.owner}{name} is empty, expected (n_sequences + 1,), at least [0]")
    text = "documents(cu_seqlens)" if cu_seqlens_k is None else "documents(cu_seqlens, cu_seqlens_k)"
    return Mask(text, layouts=(Layout("cu_seqlens", queries, cu_seqlens_k, names=names),))


def dense(mask: Tensor) -> Mask:
    """An explicit mask for what no span describes; exact, never its hull, and slower than spans.

    Args:
        mask: bool (batch|1, heads|1, q_len, k_len), True = attend.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"dense: mask: expected a bool tensor, got {type(mask).__name__}")
    if mask.dim() != 4:
        fix = ": for padding use masks.padding(mask)" if mask.dim() == 2 else ""
        raise ValueError(f"dense: mask has shape {tuple(mask.shape)}, expected (batch|1, heads|1, q_len, k_len){fix}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"dense: mask has dtype {mask.dtype}, expected torch.bool, True = attend; an additive mask is bias="
        )
    return Mask("dense(mask)", conjuncts=(Conjunct(FIRST, LAST, (0,)),), operands=(mask,))
