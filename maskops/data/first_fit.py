"""The classical ways to fill bins: first fit in the order of arrival, best fit from the longest down, a stream cut.

Each takes documents one by one and gives bins when they are closed, like `BalancedPlacer`. With a bounded buffer a bin
is closed when more documents are held than that; without one, when all documents have come.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush
from typing import Any

from maskops.data.bins import Item, Piece, from_plain, plain
from maskops.data.limits import Limits


class _RoomTree:
    """The largest room of every range of bins, so that the first bin with enough is found in a logarithm of them."""

    def __init__(self) -> None:
        self.leaves = 1
        self.largest = [-1, -1]

    def grow(self, count: int) -> None:
        while self.leaves < count:
            rooms = self.largest[self.leaves :]
            self.leaves *= 2
            self.largest = [-1] * (2 * self.leaves)
            for place, room in enumerate(rooms):
                self[place] = room

    def __setitem__(self, place: int, room: int) -> None:
        self.grow(place + 1)
        node = place + self.leaves
        self.largest[node] = room
        while node > 1:
            node //= 2
            largest = max(self.largest[2 * node], self.largest[2 * node + 1])
            if self.largest[node] == largest:
                break
            self.largest[node] = largest

    def first(self, room: int) -> int | None:
        """The first bin with at least this room."""
        node = 1
        if self.largest[node] < room:
            return None
        while node < self.leaves:
            node *= 2
            if self.largest[node] < room:
                node += 1
        return node - self.leaves


class FirstFitPlacer:
    """First fit in the order of arrival: each document to the first open bin with room for it.

    Args:
        limits: budgets of a bin.
        buffer: documents that open bins hold at most; None for no bound. Beyond it the fullest bin is closed.
    """

    def __init__(self, limits: Limits, buffer: int | None) -> None:
        self.limits = limits
        self.buffer = buffer
        self._bins: dict[int, list[Item]] = {}  # the open ones, in the order in which they were opened
        self._work: dict[int, int] = {}
        self._room: dict[int, int] = {}
        self._tree = _RoomTree()
        self._opened = 0
        self._held = 0

    def add(self, number: int, length: int) -> list[list[Item]]:
        """Takes a document; returns the bins that were closed for it."""
        place = self._tree.first(length)
        if place is None:
            place = self._opened
            self._opened += 1
            self._bins[place], self._work[place], self._room[place] = [], 0, self.limits.capacity
        self._bins[place].append(number)
        self._work[place] += length * length
        self._room[place] -= length
        self._held += 1
        self._tree[place] = self._longest(place)
        closed = []
        while self.buffer is not None and self._held > self.buffer:
            closed.append(self._close(min(self._bins, key=self._room.__getitem__)))
        if self._opened > 2 * len(self._bins) + 64:
            self._number_anew()
        return closed

    def finish(self) -> list[list[Item]]:
        """The bins that are open."""
        return [self._close(place) for place in list(self._bins)]

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: plain numbers."""
        self._number_anew()
        return {
            "bins": [list(items) for items in self._bins.values()],
            "work": list(self._work.values()),
            "room": list(self._room.values()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was called."""
        self._bins = {place: list(items) for place, items in enumerate(state["bins"])}
        self._work, self._room = dict(enumerate(state["work"])), dict(enumerate(state["room"]))
        self._held = sum(map(len, self._bins.values()))
        self._number_anew()

    def _longest(self, place: int) -> int:
        """The longest document that a bin takes; -1 if it takes none."""
        if len(self._bins[place]) >= self.limits.segments:
            return -1
        return min(self._room[place], self.limits.longest(self._work[place]))

    def _close(self, place: int) -> list[Item]:
        items = self._bins.pop(place)
        del self._work[place], self._room[place]
        self._tree[place] = -1
        self._held -= len(items)
        return items

    def _number_anew(self) -> None:
        """Closed bins leave holes in the numbering, which would grow with the stream."""
        old = list(self._bins)
        self._bins = {new: self._bins[place] for new, place in enumerate(old)}
        self._work = {new: self._work[place] for new, place in enumerate(old)}
        self._room = {new: self._room[place] for new, place in enumerate(old)}
        self._opened = len(old)
        self._tree = _RoomTree()
        for place in self._bins:
            self._tree[place] = self._longest(place)


class BestFitPlacer:
    """Best fit from the longest document down: each to the open bin that it leaves the least room in.

    Args:
        limits: budgets of a bin.
        buffer: documents that are sorted at a time, at most; None for all. The fuller half of the bins of a buffer
            is closed, the documents of the others are packed again with the next ones.
    """

    def __init__(self, limits: Limits, buffer: int | None) -> None:
        self.limits = limits
        self.buffer = buffer
        self._waiting: list[tuple[int, int]] = []

    def add(self, number: int, length: int) -> list[list[Item]]:
        """Takes a document; returns the bins that were closed."""
        self._waiting.append((length, number))
        if self.buffer is None or len(self._waiting) < self.buffer:
            return []
        bins = self._pack()
        bins.sort(key=lambda items: sum(length for length, _ in items), reverse=True)
        closed, again = bins[: -(-len(bins) // 2)], bins[-(-len(bins) // 2) :]
        self._waiting = [document for items in again for document in items]
        return [[number for _, number in items] for items in closed]

    def finish(self) -> list[list[Item]]:
        """The bins of all documents that are left."""
        bins = self._pack()
        self._waiting = []
        return [[number for _, number in items] for items in bins]

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: plain numbers."""
        return {"waiting": list(map(list, self._waiting))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was called."""
        self._waiting = [(length, number) for length, number in state["waiting"]]

    def _pack(self) -> list[list[tuple[int, int]]]:
        limits = self.limits
        bins: list[list[tuple[int, int]]] = []
        work: list[int] = []
        rooms: list[tuple[int, int]] = []  # of the bins that may take more, ascending
        later: list[tuple[int, int, int]] = []  # bins with more room than work: minus the longest they take, room, bin
        for length, number in sorted(self._waiting, key=lambda document: document[0], reverse=True):
            while later and length <= -later[0][0]:
                insort(rooms, heappop(later)[1:])
            at = bisect_left(rooms, (length, -1))
            if at < len(rooms):
                room, place = rooms.pop(at)
            else:
                room, place = limits.capacity, len(bins)
                bins.append([])
                work.append(0)
            bins[place].append((length, number))
            work[place] += length * length
            if len(bins[place]) < limits.segments:
                longest = limits.longest(work[place])
                if longest < min(length, room - length):
                    heappush(later, (-longest, room - length, place))
                else:
                    insort(rooms, (room - length, place))
        return bins


class ChunkPlacer:
    """Documents one after the other, cut every ``capacity`` tokens: every bin is full, documents are not whole.

    Args:
        limits: budgets of a bin; one that is reached closes a bin early. Attention work has none here, because pieces
            are cut where tokens end.
        isolate: what pieces say about themselves.
    """

    def __init__(self, limits: Limits, isolate: bool = True) -> None:
        self.limits = limits
        self.isolate = isolate
        self._items: list[Item] = []
        self._used = 0

    def add(self, number: int, length: int) -> list[list[Item]]:
        """Takes a document of any length; returns the bins that it filled."""
        closed = []
        start = 0
        while True:
            stop = min(length, start + self.limits.capacity - self._used)
            self._items.append(Piece(number, start, stop, self.isolate))
            self._used += stop - start
            if self._used == self.limits.capacity or len(self._items) >= self.limits.segments:
                closed += self.finish()
            if stop == length:
                return closed
            start = stop

    def finish(self) -> list[list[Item]]:
        """The bin that is open, if it holds anything."""
        bins = [self._items] if self._items else []
        self._items, self._used = [], 0
        return bins

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: plain numbers."""
        return {"items": [plain(item) for item in self._items], "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was called."""
        self._items = [from_plain(item) for item in state["items"]]
        self._used = state["used"]
