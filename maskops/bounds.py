"""Bounds: the ends of spans as symbols, and the algebra that keeps unions of spans small.

What a mask allows to a query row is kept as a union of spans of keys. Each end of a span, a bound, is written down
before any length is known: a term, such as ``diag + 1`` or the first key of the row's sequence, or the maximum or
minimum of bounds. Nothing here reads a tensor, and nothing knows which mask a bound came from.

Unions are kept in a normal form, because every span costs each kernel another pass over its row. Two spans intersect
in one, from the greater start to the lesser end; two spans that share a start, or an end, are one together. So
``causal() & sliding_window(w, 0)`` is the span from ``diag - w`` to ``diag + 1``, ``causal() | prefix(n)`` the span
from the first key to ``max(diag + 1, k_start + n)``, and neither needs a second one. Maxima and minima are flat, sorted
and without terms that cannot win, so that bounds of the same meaning compare equal and a shared end is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch


class Term(NamedTuple):
    """One symbolic end of a span, a key index per query row.

    ``first`` and ``last``: the ends of the row's sequence. ``diag``: diag + value. ``prefix``: k_start + value.
    ``prefix_of``: k_start + (operand number ``value``)[ordinal]. ``chunk_start``, ``chunk_end``: ends of the row's
    chunk of ``value`` keys.
    """

    kind: str
    value: int


class Extremum(NamedTuple):
    """Maximum or minimum (``pick``) of two or more bounds."""

    pick: str
    parts: tuple[Bound, ...]


Bound = Term | Extremum

FIRST = Term("first", 0)
LAST = Term("last", 0)


class Conjunct(NamedTuple):
    """Keys ``max(start, k_start) <= j < min(end, k_end)`` that every dense operand (by number) allows as well."""

    start: Bound
    end: Bound
    dense: tuple[int, ...]


Conjuncts = tuple[Conjunct, ...]
"""A union of spans."""

_Function = TypeVar("_Function", bound=Callable[..., object])


def _cached(function: _Function) -> _Function:
    """Remember results of a function of hashable constants, except while torch.compile traces it.

    Tracing through a cache is refused or warned about by torch; the plain function traces as constants.
    """
    remembered = functools.lru_cache(maxsize=512)(function)

    @functools.wraps(function)
    def call(*args: object) -> object:
        return function(*args) if torch.compiler.is_compiling() else remembered(*args)

    return call  # type: ignore[return-value]


def _sort_key(bound: Bound) -> tuple[object, ...]:
    return tuple(bound)


def _extremum(pick: str, bounds: tuple[Bound, ...]) -> Bound:
    """Simplified maximum or minimum; every bound is later clipped to its sequence, so FIRST is the least of all."""
    neutral, absorbing = (FIRST, LAST) if pick == "max" else (LAST, FIRST)
    better = max if pick == "max" else min
    flat: list[Bound] = []
    for bound in bounds:
        for part in bound.parts if isinstance(bound, Extremum) and bound.pick == pick else (bound,):
            if part == absorbing:
                return absorbing
            if part != neutral and part not in flat:
                flat.append(part)
    kept = [part for part in flat if not (isinstance(part, Term) and part.kind in ("diag", "prefix"))]
    for kind in ("diag", "prefix"):
        values = [part.value for part in flat if isinstance(part, Term) and part.kind == kind]
        if values:
            kept.append(Term(kind, better(values)))
    if not kept:
        return neutral
    if len(kept) == 1:
        return kept[0]
    return Extremum(pick, tuple(sorted(kept, key=_sort_key)))


def counts_from_first(bound: Bound) -> bool:
    """Whether a bound moves with the first key of the sequence, other than by being clipped to it."""
    if isinstance(bound, Extremum):
        return any(counts_from_first(part) for part in bound.parts)
    return bound.kind not in ("first", "last", "diag")


@_cached
def intersection(left: Conjuncts, right: Conjuncts) -> Conjuncts:
    """Keys that both unions of spans allow."""
    products = [
        Conjunct(
            _extremum("max", (a.start, b.start)),
            _extremum("min", (a.end, b.end)),
            a.dense + tuple(index for index in b.dense if index not in a.dense),
        )
        for a in left
        for b in right
    ]
    return _merged(tuple(products))


@_cached
def union(left: Conjuncts, right: Conjuncts) -> Conjuncts:
    """Keys that one of the two unions of spans allows."""
    return _merged(left + right)


def _merged(conjuncts: Conjuncts) -> Conjuncts:
    """Merge spans that share a symbolic end: their union is then one span, also where one of them is empty."""
    merged: list[Conjunct] = []
    for conjunct in conjuncts:
        at = 0
        while at < len(merged):
            other = merged[at]
            if other.dense == conjunct.dense and other.start == conjunct.start:
                conjunct = Conjunct(other.start, _extremum("max", (other.end, conjunct.end)), other.dense)
            elif other.dense == conjunct.dense and other.end == conjunct.end:
                conjunct = Conjunct(_extremum("min", (other.start, conjunct.start)), other.end, other.dense)
            else:
                at += 1
                continue
            # The merged span may now share an end with one that was passed before.
            del merged[at]
            at = 0
        merged.append(conjunct)
    return tuple(merged)


def _renumber_bound(bound: Bound, numbers: tuple[int, ...]) -> Bound:
    if isinstance(bound, Extremum):
        return Extremum(bound.pick, tuple(sorted((_renumber_bound(p, numbers) for p in bound.parts), key=_sort_key)))
    return Term(bound.kind, numbers[bound.value]) if bound.kind == "prefix_of" else bound


@_cached
def renumbered(conjuncts: Conjuncts, numbers: tuple[int, ...]) -> Conjuncts:
    """The same spans with operand ``i`` called ``numbers[i]``."""
    return tuple(
        Conjunct(_renumber_bound(c.start, numbers), _renumber_bound(c.end, numbers), tuple(numbers[i] for i in c.dense))
        for c in conjuncts
    )


@_cached
def _postfix(bound: Bound) -> str:
    if isinstance(bound, Term):
        return bound.kind if bound.kind in ("first", "last") else f"{bound.kind} {bound.value}"
    text = _postfix(bound.parts[0])
    for part in bound.parts[1:]:
        text += f" {_postfix(part)} {bound.pick}"
    return text


@_cached
def span_program(conjuncts: Conjuncts) -> str:
    """The spans as text, each bound in postfix order: what ``ops/plan/registration.py`` calls a program."""
    return " ".join([f"span {_postfix(c.start)} {_postfix(c.end)}" for c in conjuncts])
