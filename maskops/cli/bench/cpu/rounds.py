"""Interleaved rounds in short stretches, each between two measurements of the limits: what moved does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from random import Random

from maskops.cli.bench.cpu.limits import STEADY, Limits, moved
from maskops.cli.bench.timing import Timing, without_collector

_BEATEN = 1.5
"""A peer this many times slower than another in the first round is not the best."""

FEWEST = 3
"""Rounds whose median is worth showing."""

SLOW = 0.5
"""Seconds of a run that is long enough for its first to be like any other."""

GaugeLike = Callable[[Collection[str]], Limits]
"""Measures the limits with these names."""


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        budget: Seconds of rounds for all contenders of an entry; each gets the same share.
        min_rounds, max_rounds: Bounds on the rounds of each that count; fewer than `FEWEST` give no speed.
        stretch: Seconds of rounds after which limits are measured again, at the end of a round; half as many after
            each stretch that was thrown away.
        discards, patience: How many stretches of an entry are made up for because limits moved, and how many seconds
            may be lost to them.
        compiled: Whether torch.compile takes part.
        late: Seconds of a whole run after which each further entry takes the fewest rounds and makes up for none.
    """

    budget: float
    min_rounds: int
    max_rounds: int
    stretch: float
    discards: int
    patience: float
    compiled: bool
    late: float

    def hurried(self) -> Pace:
        """The fewest rounds, and no others for those that are lost."""
        return replace(self, budget=0.0, patience=0.0, min_rounds=min(self.min_rounds, FEWEST))


@dataclass(frozen=True)
class Stretch:
    """Some rounds one after another.

    Attributes:
        before, after: The limits that count, around them.
        moved: By what share these differ, at most.
        rounds: How many there were.
        kept: Whether they count: not if limits moved by more than `STEADY`.
    """

    before: Limits
    after: Limits
    moved: float
    rounds: int
    kept: bool


@dataclass(frozen=True)
class Rounds:
    """What was measured of an entry.

    Attributes:
        timings: Of each contender, from the rounds that count; the i-th entries of all are of the same round. Empty
            where there were too few.
        stretches: In order, those that do not count among them.
        problem: Why there are no timings, or None.
    """

    timings: Mapping[str, Timing]
    stretches: tuple[Stretch, ...]
    problem: str | None

    def around(self) -> list[Stretch]:
        """For each round that counts the stretch that it was part of."""
        return [stretch for stretch in self.stretches if stretch.kept for _ in range(stretch.rounds)]


@dataclass(frozen=True)
class Contenders:
    """Who is run.

    Attributes:
        runs: From names to what runs them once and says how many seconds it took.
        ours: Names of those that the others are compared with.
        wanted: Names of peers that somebody wants to be compared with by name (None: all). The others may leave before
            the fewest rounds are over, once another peer has clearly beaten them.
    """

    runs: Mapping[str, Callable[[], float]]
    ours: frozenset[str]
    wanted: frozenset[str] | None = None

    def beaten(self, name: str, first: float, quickest: float) -> bool:
        """Whether a first round shows that a peer matters to nobody."""
        spared = self.wanted is None or name in self.ours or name in self.wanted
        return not spared and first > max(_BEATEN * quickest, SLOW)


def rounds(
    who: Contenders, pace: Pace, gauge: GaugeLike, judged: Collection[str], also: Collection[str] = ()
) -> Rounds:
    """Every contender once a round, until each has used its share of the time.

    Who has used its share takes part in no later round. Limits are measured around stretches of rounds; a stretch whose
    limits moved is thrown away with all its rounds, and made up for as often as the pace allows.

    Args:
        who: The contenders.
        pace: How long.
        gauge: Measures limits.
        judged: Names of the limits that must not move.
        also: Names of limits that are measured with them, but may.
    """
    kept: dict[str, list[float]] = {name: [] for name in who.runs}
    stretches: list[Stretch] = []
    names = {*judged, *also}
    begun, lost, discarded = time.perf_counter(), 0.0, 0
    with without_collector():
        before = gauge(names)
        while True:
            started = time.perf_counter()
            # On a machine that moves shorter ones hold more often.
            length = pace.stretch / 2**discarded
            taken = _stretch(who, pace, kept, started - begun - lost, length, len(stretches))
            if not taken:
                break
            after = gauge(names)
            share = moved(before, after, judged)
            stretches.append(Stretch(before, after, share, max(map(len, taken.values())), share <= STEADY))
            before = after
            if share <= STEADY:
                for name, seconds in taken.items():
                    kept[name] += seconds
                continue
            discarded += 1
            lost += time.perf_counter() - started
            if discarded > pace.discards or lost > pace.patience:
                break
    count = max(map(len, kept.values()), default=0)
    if stretches and count < min(pace.min_rounds, FEWEST):
        middle = statistics.median(stretch.moved for stretch in stretches if not stretch.kept)
        problem = (
            f"unsteady: {_words(judged)} moved by more than {STEADY:.0%} around {discarded} of {len(stretches)} "
            f"stretches of rounds ({middle:.0%} in the middle of them)"
        )
        return Rounds({}, tuple(stretches), problem)
    return Rounds({name: Timing(tuple(taken)) for name, taken in kept.items() if taken}, tuple(stretches), None)


def _words(names: Collection[str]) -> str:
    return " and ".join(name.replace("_", "-") for name in sorted(names))


def _stretch(
    who: Contenders, pace: Pace, kept: Mapping[str, list[float]], spent: float, length: float, number: int
) -> dict[str, list[float]]:
    """Rounds until the stretch is over; empty where everything has been measured.

    Args:
        who: The contenders.
        pace: How long.
        kept: The rounds so far that count.
        spent: Seconds that these took, with everything between them.
        length: Seconds after which the stretch is over.
        number: Of the stretch: another one, another order.
    """
    taken: dict[str, list[float]] = {}
    begun = time.perf_counter()
    shuffled = Random(number)
    while True:
        elapsed = time.perf_counter() - begun
        so_far = {name: [*seconds, *taken.get(name, ())] for name, seconds in kept.items()}
        going = _going(who, pace, so_far, spent + elapsed)
        if not going or (taken and elapsed >= length):
            return taken
        # In another order each round: nobody always inherits the cache and the heap of the same neighbour.
        for name in shuffled.sample(going, len(going)):
            taken.setdefault(name, []).append(who.runs[name]())


def _going(who: Contenders, pace: Pace, seconds: Mapping[str, list[float]], spent: float) -> list[str]:
    """Who takes part in the next round; nobody where none is needed."""
    number = max(map(len, seconds.values()), default=0)
    late = number >= pace.min_rounds
    if number >= pace.max_rounds or (late and spent > 2.0 * pace.budget):
        return []  # at the latest when the time that others waste beside the runs is over
    share = pace.budget / max(len(seconds), 1)
    firsts = {name: taken[0] for name, taken in seconds.items() if taken}
    quickest = min((first for name, first in firsts.items() if name not in who.ours), default=0.0)
    going = [
        name
        for name, taken in seconds.items()
        if len(taken) == number
        and (sum(taken) < share or not (late or (number and who.beaten(name, firsts[name], quickest))))
    ]
    # Nobody is left to be compared with.
    if late and (not who.ours.intersection(going) or not set(going) - who.ours):
        return []
    return going
