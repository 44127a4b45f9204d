"""Packing by cost: bins of a step that hold the same tokens and the same attention work, from a bounded buffer.

Filling bins is easy; sums of squares are what ranks wait for. Real lengths have a heavy tail: one percent of the
documents may hold half of all attention work, and nothing repairs a step of one giant beside seven bins of short
documents. So documents travel in convoys: the buffer is sorted, and ``ranks`` neighbours, which have almost the same
length, go to the same step, one to each rank. Then every rank of a step has the same mixture of lengths, tokens and
squares are balanced at once, and steps may differ as much as documents do. Where the tail is thin, neighbours differ:
such documents wait in the buffer until similar ones have come. A step is a bin of convoys; single short documents close
the gaps that convoys leave.

Nothing is sorted beyond the buffer, and what waits longest leaves first, so that the order of the epoch stays random.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from math import isqrt
from operator import itemgetter
from typing import Any

from maskops.data.bins import Item
from maskops.data.limits import MIN_FILL, Limits

TOLERANCE = 0.06
"""How much more than their mean the longest of a convoy may cost, as a share of the work of a bin that holds them."""

LARGE = 8
"""Convoys of at least this part of a capacity are placed first, longest first: small ones fit anywhere."""

TOPPED = 0.15
"""How far single documents that close gaps may raise a bin's work above the step's largest."""

PATIENCE = 2
"""Rounds after which a document leaves even if its step is not among the fullest."""

KEPT = 0.5
"""Share of the planned steps that is planned anew with the documents of the next round: a plan's last steps are bad."""

HELD = 0.5
"""Share of the buffer that may wait for similar documents."""

MOST_EMPTY = 0.25
"""Share of the ranks that may stay without documents in the last step."""


Waiting = tuple[int, int, int]
"""A document in the buffer: its length, its number, the round in which it arrived. Plain, because there are so many."""

_length = itemgetter(0)


class _Step:
    """Bins of a step while they are filled."""

    __slots__ = ("arrived", "bins", "limits", "longest", "room", "total", "work")

    def __init__(self, ranks: int, limits: Limits) -> None:
        self.limits = limits
        self.bins: list[list[Waiting]] = [[] for _ in range(ranks)]
        self.work = [0] * ranks
        self.room = [limits.capacity] * ranks
        self.total = limits.capacity * ranks
        self.arrived = 1 << 62  # of its oldest document
        self.longest = limits.largest  # document that any bin takes; kept by ``board``

    def seats(self, convoy: list[Waiting]) -> list[int] | None:
        """Which bin takes which of a convoy, longest first: the longest where least work is, if there is room for all,
        else where most room is. None where they do not fit.
        """
        limits, room, work = self.limits, self.room, self.work
        for criterion, descending in ((work, False), (room, True)):
            order = sorted(range(len(room)), key=criterion.__getitem__, reverse=descending)
            for place, (length, _, _) in zip(order, convoy, strict=True):
                if length > room[place] or work[place] + length * length > limits.work:
                    break
            else:
                return order
        return None

    def board(self, convoy: list[Waiting], seats: list[int]) -> None:
        for place, document in zip(seats, convoy, strict=True):
            self.add(place, document)
        limits = self.limits
        if len(self.bins[0]) >= limits.segments:
            self.longest = -1
        elif limits.max_attention_work is None:
            self.longest = max(self.room)
        else:
            self.longest = max(map(min, self.room, map(limits.longest, self.work)))

    def add(self, place: int, document: Waiting) -> None:
        length, _, arrived = document
        self.bins[place].append(document)
        self.work[place] += length * length
        self.room[place] -= length
        self.total -= length
        if arrived < self.arrived:
            self.arrived = arrived

    def top_up(self, documents: list[Waiting], lengths: list[int]) -> None:
        """Closes gaps with the longest that fit, of documents in ascending order and their lengths, which lose them.

        A bin that may take no more sequences gives its shortest away for a longer one.
        """
        most = self.limits.segments
        ceiling = min(self.limits.work, int(max(self.work) * (1 + TOPPED)))
        for place in sorted(range(len(self.bins)), key=self.work.__getitem__):
            here = self.bins[place]
            while self.room[place]:
                crowded = len(here) >= most
                least = min(here)[0] if crowded else 0
                spare = ceiling - self.work[place] + least * least
                at = bisect_right(lengths, min(self.room[place] + least, isqrt(spare))) - 1
                if at < 0 or lengths[at] <= least:
                    break
                document = documents.pop(at)
                del lengths[at]
                if crowded:
                    given = self.remove_shortest(place)
                    at = bisect_right(lengths, given[0])
                    documents.insert(at, given)
                    lengths.insert(at, given[0])
                self.add(place, document)

    def remove_shortest(self, place: int) -> Waiting:
        document = min(self.bins[place])
        self.bins[place].remove(document)
        self.work[place] -= document[0] ** 2
        self.room[place] += document[0]
        self.total += document[0]
        return document

    def numbers(self) -> list[list[Item]]:
        return [[number for _, number, _ in bin_] for bin_ in self.bins]


class BalancedPlacer:
    """Takes documents one by one, gives steps of ``ranks`` bins of equal cost.

    Args:
        limits: budgets of a bin.
        ranks: bins of a step.
        buffer: documents that are held at most; that of three steps or more gives full bins.
        seed: of the order of steps within a round.
    """

    def __init__(self, limits: Limits, ranks: int, buffer: int, seed: int) -> None:
        self.limits = limits
        self.ranks = ranks
        self.buffer = buffer
        self._chance = random.Random(seed)
        self._waiting: list[Waiting] = []
        self._round = 0
        self._tokens = 0
        self._steps = 0

    def add(self, number: int, length: int) -> list[list[Item]]:
        """Takes a document; returns bins, a multiple of ``ranks``, mostly none."""
        self._tokens += length
        self._waiting.append((length, number, self._round))
        return self._emit(last=False) if len(self._waiting) >= self.buffer else []

    def finish(self) -> list[list[Item]]:
        """The bins of all documents that are left. Those of the last step may be empty."""
        bins: list[list[Item]] = []
        while self._waiting:
            step = self._last_step()
            if step is None:
                bins += self._emit(last=True)
            else:
                self._waiting = []
                self._steps += 1
                bins += step.numbers()
        return bins

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: plain numbers."""
        version, internal, gauss = self._chance.getstate()
        return {
            "waiting": list(map(list, self._waiting)),
            "round": self._round,
            "tokens": self._tokens,
            "steps": self._steps,
            "chance": [version, list(internal), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was called."""
        self._waiting = [(length, number, arrived) for length, number, arrived in state["waiting"]]
        self._round, self._tokens, self._steps = state["round"], state["tokens"], state["steps"]
        version, internal, gauss = state["chance"]
        self._chance.setstate((version, tuple(internal), gauss))

    def _emit(self, last: bool) -> list[list[Item]]:
        self._waiting.sort(key=_length, reverse=True)
        convoys, rest = self._convoys(last)
        steps = self._plan(convoys)
        if not steps:  # fewer documents than ranks, or all of them wait for others: those that came first leave
            steps = self._plan([rest[: self.ranks]])
            rest = rest[self.ranks :]
        self._chance.shuffle(steps)
        patient = self._round - PATIENCE
        steps.sort(key=lambda step: (step.arrived > patient, step.total))
        leaving = 1 if last else max(1, int(len(steps) * (1 - KEPT)))
        for step in steps[leaving:]:
            for documents in step.bins:
                rest += documents
        rest.sort(key=_length)
        chosen = steps[:leaving]
        lengths = list(map(_length, rest))
        for step in chosen:
            step.top_up(rest, lengths)
        self._chance.shuffle(chosen)
        self._waiting = rest
        self._round += 1
        self._steps += len(chosen)
        return [bin_ for step in chosen for bin_ in step.numbers()]

    def _convoys(self, last: bool) -> tuple[list[list[Waiting]], list[Waiting]]:
        """Neighbours of similar length, ``ranks`` of them each; and documents that have no such neighbours."""
        waiting, ranks = self._waiting, self.ranks
        count = len(waiting)
        tokens, work = [0] * (count + 1), [0] * (count + 1)  # of all documents from here on
        for place in range(count - 1, -1, -1):
            length = waiting[place][0]
            tokens[place] = tokens[place + 1] + length
            work[place] = work[place + 1] + length * length
        most = 0 if last else int(HELD * self.buffer)
        convoys: list[list[Waiting]] = []
        alone: list[Waiting] = []
        place = 0
        while place + ranks <= count:
            after = place + ranks
            mean = (work[place] - work[after]) / ranks
            excess = waiting[place][0] ** 2 - mean
            if excess > TOLERANCE * mean and len(alone) < most:
                # The rest of such a bin is filled with shorter documents, whose work per token is known.
                room = self.limits.capacity - (tokens[place] - tokens[after]) / ranks
                filled = mean + room * work[after] / max(tokens[after], 1)
                if excess > TOLERANCE * filled:
                    alone.append(waiting[place])
                    place += 1
                    continue
            convoys.append(waiting[place:after])
            place = after
        return convoys, alone + waiting[place:]

    def _plan(self, convoys: list[list[Waiting]]) -> list[_Step]:
        """Convoys packed into steps: the large ones longest first, the small ones in a random order, so that every step
        has short and long documents.
        """
        large = 0
        while large < len(convoys) and convoys[large][0][0] * LARGE >= self.limits.capacity:
            large += 1
        small = convoys[large:]
        self._chance.shuffle(small)
        steps: list[_Step] = []
        for number, convoy in enumerate(convoys[:large] + small):
            best: _Step | None = None
            seats: list[int] | None = None
            size, longest = sum(map(_length, convoy)), convoy[0][0]
            for step in steps:
                if step.longest < longest or step.total < size or (best is not None and step.total >= best.total):
                    continue
                found = step.seats(convoy)
                if found is not None:
                    best, seats = step, found
                    if number >= large:
                        break
            if best is None or seats is None:
                best, seats = _Step(self.ranks, self.limits), list(range(len(convoy)))
                steps.append(best)
            best.board(convoy, seats)
        return steps

    def _last_step(self) -> _Step | None:
        """One step of all documents that are left, longest first to the bin of least work; None if they do not fit."""
        if sum(map(_length, self._waiting)) > self.ranks * self.limits.capacity:
            return None
        full = int(self._tokens / (MIN_FILL * self.limits.capacity)) - self._steps * self.ranks
        few = self.ranks - int(MOST_EMPTY * self.ranks) <= full < self.ranks
        self._waiting.sort(key=_length, reverse=True)
        for used in (full, self.ranks) if few else (self.ranks,):
            for by_work in (True, False):
                step = self._shared(used, by_work)
                if step is not None:
                    return step
        return None

    def _shared(self, used: int, by_work: bool) -> _Step | None:
        limits = self.limits
        step = _Step(self.ranks, limits)
        for document in self._waiting:
            length = document[0]
            places = [
                place
                for place in range(used)
                if step.room[place] >= length
                and step.work[place] + length * length <= limits.work
                and len(step.bins[place]) < limits.segments
            ]
            if not places:
                return None
            load = step.work if by_work else [-room for room in step.room]
            # Empty documents cost nothing: what counts is how many a bin has.
            step.add(min(places, key=lambda place: (load[place], len(step.bins[place]))), document)
        return step
