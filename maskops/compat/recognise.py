"""Dense masks that are really spans: a bool or 0/-inf tensor whose rows are one or two runs of keys becomes a plan.

Callers of torch's functions hand over a dense mask, whatever it says. Most of them say padding, causal, a window or
documents, and reading the mask once is much cheaper than attending under it. What was read is remembered twice: by the
tensor itself (its identity, memory and version counter, held weakly), for a model that hands the same mask to every
layer; and by the spans, for a model that makes the same mask anew in every layer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskops import backend
from maskops.layouts import values_can_be_read
from maskops.spans import RowSpans, build_row_spans

_REMEMBERED_MASKS = 64
_REMEMBERED_PLANS = 16
_MOST_RUNS = 2
_AFTER_EVERY_KEY = 2**40
_HIDES_BY_ITS_MINIMUM = (torch.float32, torch.bfloat16, torch.float64)
"""Dtypes whose smallest number leaves a weight of exactly 0 beside any score; that of float16 need not."""


class Runs(NamedTuple):
    """Keys that rows see, as in ``RowSpans``: start and end int64 (n, batch|1, q_len), holes bool (batch|1, k_len)."""

    start: Tensor
    end: Tensor
    key_holes: Tensor | None


class Reading(NamedTuple):
    """What the masks of a call are: one plan for those that are spans (None if none is), and which of them are not."""

    plan: RowSpans | None
    rest: tuple[int, ...]


def can_be_read(mask: Tensor) -> bool:
    """Whether the values of a mask may be looked at, and whether a plan may stand for it."""
    # On other devices to look at a mask is to wait for it; there it stays dense.
    if mask.device.type != "cpu" or not values_can_be_read([mask], mask.device):
        return False
    return not (mask.requires_grad and torch.is_grad_enabled())


def read(masks: Sequence[Tensor], q_len: int, k_len: int, *, batch: int, is_causal: bool, positions: bool) -> Reading:
    """Sorts masks into those that are spans, as one plan together with ``is_causal``, and the rest.

    Args:
        masks: bool (True = attend) or additive masks, four dimensions each, broadcastable to (batch, heads, q_len,
            k_len), all of them ``can_be_read``.
        q_len: query rows.
        k_len: keys.
        batch: batch of q.
        is_causal: row i sees no key after i (top-left aligned).
        positions: the plan gets the positions of rows, which dropout counts by, and then the whole batch.
    """
    call = (q_len, k_len, batch if positions else 0, is_causal)
    owners = [_owner(mask) for mask in masks]
    key = (call, tuple(_state(mask, owner) for mask, owner in zip(masks, owners, strict=True)))
    can_be_remembered = not any(mask.is_inference() for mask in masks)  # they do not count their changes
    if can_be_remembered and (reading := _readings.find(key, owners)) is not None:
        return reading
    runs, rest = None, []
    for number, mask in enumerate(masks):
        allowed = _allowed(_compact(mask), is_alone=len(masks) == 1 and not is_causal)
        found = None if allowed is None else _runs(allowed, k_len)
        both = found if found is None or runs is None else _intersection(runs, found)
        if both is None:
            rest.append(number)
        else:
            runs = both
    if runs is not None and is_causal:
        runs = _intersection(runs, _top_left(q_len, k_len, runs.start.device))
    plan = None if runs is None else _plan(runs, q_len, k_len, batch if positions else None)
    reading = Reading(plan, tuple(rest))
    if can_be_remembered:
        _readings.keep(key, owners, reading)
    return reading


# ---- from values to runs ---------------------------------------------------------------------------------------------


def _compact(mask: Tensor) -> Tensor:
    """The mask without the repetitions of an expanded dimension."""
    for dimension in range(3):
        if mask.shape[dimension] > 1 and mask.stride(dimension) == 0:
            mask = mask.narrow(dimension, 0, 1)
    return mask


def _allowed(mask: Tensor, is_alone: bool) -> Tensor | None:
    """A mask as bool; None for an additive one that does more than hide keys.

    The smallest finite number, which many models write for -inf, hides a key only beside one that is not hidden: a row
    of nothing else is an average over all of them, so such a mask stays additive. With several masks, causality
    among them, the row may end up so although none of them shows it, so there only -inf counts.
    """
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if bool((allowed | (mask == -math.inf)).all()):
        return allowed
    if not is_alone or mask.dtype not in _HIDES_BY_ITS_MINIMUM:
        return None
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    row_sees = allowed.any(-1, keepdim=True)
    return allowed if bool((row_sees | (mask == -math.inf)).all()) else None


def _runs(allowed: Tensor, k_len: int) -> Runs | None:
    """The runs of True of each row of a bool mask (batch|1, heads|1, q_len|1, k_len|1); None if there are too many."""
    allowed = allowed.expand(*allowed.shape[:3], k_len)
    found = _exact_runs(allowed)
    if found is not None:
        return Runs(*found, None)
    # Keys that no row sees may count as either: padding with holes is a run of keys, some of which are not there.
    seen = allowed.any(2).any(1)
    if bool(seen.all()):
        return None
    place = torch.where(seen, torch.arange(k_len), -1).cummax(-1).values[:, None, None]
    filled = allowed.gather(-1, place.clamp(min=0).expand(allowed.shape)) & (place >= 0)
    found = _exact_runs(filled)
    return None if found is None else Runs(*found, ~seen)


def _exact_runs(allowed: Tensor) -> tuple[Tensor, Tensor] | None:
    """Start and end of the runs, (n, batch, q_len) each, where there are few and heads do not differ."""
    batch, heads, q_len, k_len = allowed.shape
    rows = batch * heads * q_len
    padded = torch.nn.functional.pad(allowed, (1, 1)).reshape(rows, k_len + 2)
    edges = padded[:, 1:] ^ padded[:, :-1]
    if int(torch.count_nonzero(edges)) > 2 * _MOST_RUNS * rows:
        return None
    where = edges.nonzero()
    row, begin, stop = where[0::2, 0], where[0::2, 1], where[1::2, 1]
    count = torch.bincount(row, minlength=rows)
    n_runs = max(int(count.max()), 1) if rows else 1
    if n_runs > _MOST_RUNS:
        return None
    place = torch.arange(row.shape[0]) - (count.cumsum(0) - count)[row]
    start, end = torch.zeros(2, n_runs, rows, dtype=torch.int64).unbind()
    start[place, row], end[place, row] = begin, stop
    # A run that a row lacks is empty and stands where the one before it ends.
    start[1:] = torch.where(count >= 2, start[1:], end[:1])
    end[1:] = torch.maximum(start[1:], end[1:])
    start, end = (x.view(n_runs, batch, heads, q_len) for x in (start, end))
    if heads == 0 or bool((start != start[:, :, :1]).any()) or bool((end != end[:, :, :1]).any()):
        return None
    return start[:, :, 0], end[:, :, 0]


def _top_left(q_len: int, k_len: int, device: torch.device) -> Runs:
    end = torch.arange(1, q_len + 1, device=device).clamp(max=k_len)[None, None]
    return Runs(torch.zeros_like(end), end, None)


def _intersection(a: Runs, b: Runs) -> Runs | None:
    """The keys that both see; None where that is more runs than a plan holds."""
    start = torch.maximum(a.start[:, None], b.start[None]).flatten(0, 1)
    end = torch.minimum(a.end[:, None], b.end[None]).flatten(0, 1)
    live = end > start
    if start.shape[0] > 1:
        n_runs = max(int(live.sum(0).max()), 1) if live.numel() else 1
        if n_runs > _MOST_RUNS:
            return None
        order = torch.where(live, start, _AFTER_EVERY_KEY).argsort(0)[:n_runs]
        start, end, live = start.gather(0, order), end.gather(0, order), live.gather(0, order)
    starts, ends = [torch.where(live[0], start[0], 0)], [torch.where(live[0], end[0], 0)]
    for run in range(1, start.shape[0]):
        starts.append(torch.where(live[run], start[run], ends[-1]))
        ends.append(torch.where(live[run], end[run], ends[-1]))
    holes = [x.key_holes for x in (a, b) if x.key_holes is not None]
    key_holes = None if not holes else holes[0] if len(holes) == 1 else holes[0] | holes[1]
    return Runs(torch.stack(starts), torch.stack(ends), key_holes)


# ---- from runs to plans ----------------------------------------------------------------------------------------------

_plans: list[tuple[tuple[object, ...], Runs, RowSpans]] = []
"""The newest plans. Replaced, never changed: threads (and forked children) may read it at any time without a lock."""


def _plan(runs: Runs, q_len: int, k_len: int, whole_batch: int | None) -> RowSpans:
    """The plan of runs; one that was made of equal runs before is used again."""
    global _plans
    start, end, key_holes = runs
    batch = max(start.shape[1], 1 if key_holes is None else key_holes.shape[0]) if whole_batch is None else whole_batch
    start, end = (x.expand(x.shape[0], batch, q_len) for x in (start, end))
    key_holes = None if key_holes is None else key_holes.expand(batch, k_len)
    runs = Runs(start, end, key_holes)
    sizes = (k_len, whole_batch, tuple(start.shape), key_holes is None)
    for of, known, plan in _plans:
        pairs = zip(runs, known, strict=True)
        if of == sizes and all(torch.equal(x, y) for x, y in pairs if x is not None and y is not None):
            return plan
    positions = None
    if whole_batch is not None:
        # As those of masks.dense: the whole row of a batch element is one sequence, aligned to the bottom right.
        row = torch.arange(q_len, device=start.device) + (k_len - q_len)
        element = torch.arange(batch, device=start.device)[:, None]
        positions = torch.stack(
            torch.broadcast_tensors(row.expand(batch, q_len), torch.zeros_like(element), element)
        ).to(torch.int32)
    grad = backend.needs_key_tiles("attention", start.device.type)
    plan = build_row_spans(start, end, k_len, key_holes=key_holes, grad=grad, positions=positions)
    _plans = [(sizes, runs, plan), *_plans[: _REMEMBERED_PLANS - 1]]
    return plan


# ---- readings by tensor ----------------------------------------------------------------------------------------------


def _owner(mask: Tensor) -> Tensor:
    """The tensor that owns the memory: a view of it is made anew at each call, and shares its version counter."""
    return mask if mask._base is None else mask._base


def _state(mask: Tensor, owner: Tensor) -> tuple[Any, ...]:
    version = 0 if mask.is_inference() else mask._version
    return id(owner), version, mask.data_ptr(), mask.dtype, tuple(mask.shape), mask.stride()


class _Readings:
    """Readings by the state of the tensors they were read from; gone with the first of these tensors.

    A version counter counts every change that autograd knows of. It does not count writes through ``.data``, numpy or
    another library that shares the memory; autograd would not see these either.
    """

    def __init__(self) -> None:
        # Replaced, never changed, so that no lock is needed; of two threads that write at once one is forgotten.
        self._known: dict[object, tuple[list[weakref.ref[Tensor]], Reading]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: object, owners: Sequence[Tensor]) -> Reading | None:
        known = self._known.get(key)
        # The id of a tensor that is gone may belong to another one by now.
        if known is None or any(ref() is not owner for ref, owner in zip(known[0], owners, strict=True)):
            return None
        return known[1]

    def keep(self, key: object, owners: Sequence[Tensor], reading: Reading) -> None:
        alive = [(old, entry) for old, entry in self._known.items() if all(ref() is not None for ref in entry[0])]
        entry = ([weakref.ref(owner) for owner in owners], reading)
        self._known = dict(alive[1 - _REMEMBERED_MASKS :]) | {key: entry}


_readings = _Readings()
