"""Masks: what each of them means, and how they combine.

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

The meaning of every mask is stated here, by the function that makes it: layouts (``layouts.py``, where padding and
documents are read) and a union of spans with symbolic ends (``bounds.py``, where no mask has a name). ``lowering.py``
puts the two halves together to a ``RowSpans`` (``spans.py``), so that no kernel ever knows a name.
"""

from __future__ import annotations

import functools
import operator
import sys
from dataclasses import dataclass, field
from typing import TextIO

import torch
from torch import Tensor

from maskops import lowering
from maskops.bounds import (
    FIRST,
    LAST,
    Bound,
    Conjunct,
    Conjuncts,
    Term,
    counts_from_first,
    intersection,
    renumbered,
    span_program,
    union,
)
from maskops.checks import INTEGERS as _INTEGERS
from maskops.layouts import DOCUMENTS, CuSeqlensNames, Layout, Sequences
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

_LONGEST_KEPT = 2**13
"""Queries and keys of a plan that a mask keeps: with more of them the work takes much longer than to plan it."""

_MOST_KEPT = 32
"""Plans that a mask keeps, which together take a few MiB at most."""

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
    _kept: dict[tuple[int, int], RowSpans] = field(default_factory=dict, init=False, repr=False)
    """What ``kept_spans`` has made."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({"_kept": {}, **state})  # a mask that was pickled when none were kept has no such field

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

    @functools.cached_property
    def span_program(self) -> str:
        """The spans of a row in the words of ``build_plan``."""
        return span_program(self.conjuncts)

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
        return lowering.lower(
            self, q_len, k_len, batch=batch, device=device, grad=grad, order=order, positions=positions, bits=bits
        )

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
        request = lowering.Request(q_len, k_len, batch, device, grad, order, positions, bits)
        return lowering.spans_of(self, sequences, None, request)

    def kept_spans(self, q_len: int, k_len: int) -> RowSpans | None:
        """The plan for the backend ``cpu``, made once where nothing but lengths tells what it holds.

        For calls that show their plan to nobody, in eager code outside of every mode and transform.

        Args:
            q_len: query rows.
            k_len: keys.

        Returns:
            What ``spans(q_len, k_len, device="cpu", grad=False)`` gives; None where a tensor decides.
        """
        plan = self._kept.get((q_len, k_len))
        if plan is None:
            if self.layouts or self.operands:
                return None
            # Made under inference mode it could not be saved for a backward pass later.
            with torch.inference_mode(False):
                plan = self.spans(q_len, k_len, device="cpu", grad=False)
            if q_len + k_len <= _LONGEST_KEPT:
                if len(self._kept) >= _MOST_KEPT:
                    self._kept.clear()
                self._kept[q_len, k_len] = plan
        return plan

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


def _bracketed(text: str, sign: str) -> str:
    return f"({text})" if f" {sign} " in text else text


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


# One object each, so that the plans that it keeps serve every call.
_FULL = Mask("full()")
_CAUSAL = Mask("causal()", conjuncts=(Conjunct(FIRST, Term("diag", 1), ()),))
_WINDOWS: dict[tuple[int | None, int | None], Mask] = {}
_WIDTHS = (int, type(None))


def full() -> Mask:
    """Every query of a sequence attends to every key of it; the neutral element of ``&``."""
    return _FULL


def causal() -> Mask:
    """Key ``j`` is allowed iff ``j <= diag``: bottom-right aligned, the last query sees the last key."""
    return _CAUSAL


def sliding_window(left: int | None, right: int | None) -> Mask:
    """Key ``j`` is allowed iff ``diag - left <= j <= diag + right``.

    Args:
        left: keys to the left of the aligned one, at least 0; None or -1 = unbounded.
        right: keys to the right of it, likewise.
    """
    is_constant = type(left) in _WIDTHS and type(right) in _WIDTHS and not torch.compiler.is_compiling()
    if is_constant and (known := _WINDOWS.get((left, right))) is not None:
        return known
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
    window = Mask(f"sliding_window({left}, {right})", conjuncts=(Conjunct(ends[0], ends[1], ()),))
    if is_constant:
        if len(_WINDOWS) >= _MOST_KEPT:
            _WINDOWS.clear()
        _WINDOWS[left, right] = window
    return window


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
