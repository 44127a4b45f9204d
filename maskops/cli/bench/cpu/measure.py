"""Checks and times the contenders of an entry, between two measurements of the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from maskops.cli.bench.contests.contest import Contender, Contest, Leaves
from maskops.cli.bench.cpu.contest import HUGE_PAGES, Entry, Goal, Line, Mode
from maskops.cli.bench.cpu.limits import STEADY, Limits
from maskops.cli.bench.jobs import Outcome as Compared
from maskops.cli.bench.measure import WRONG_ABOVE, error_multiple
from maskops.cli.bench.memory import Peak, tidy
from maskops.cli.bench.timing import Timing, without_collector

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One contender's result.

    Attributes:
        name, ours: From the contender.
        error: Largest error of the result or of a gradient, as a multiple of plain torch's; None where it was not
            compared.
        timing: Seconds of a run; None where there is no speed to show.
        memory: Bytes at the peak of a run beyond those before it, results included.
        floor: Bytes of the results, and of what the op cannot do without.
        problem: Why there is no speed: "WRONG: ..." or "refused: ...".
    """

    name: str
    ours: bool
    error: float | None = None
    timing: Timing | None = None
    memory: int | None = None
    floor: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Reached:
    """What became of a goal. `ratio`: times the speed of `peer`, median of the rounds; None where one has no speed."""

    goal: Goal
    peer: str | None = None
    ratio: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether at_least was reached; None where that is not known."""
        return None if self.ratio is None else self.ratio >= self.goal.at_least


@dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Attributes:
        group, mode: Of the entry.
        line: What was wanted.
        reached: One for each goal.
        best: The quickest peer of all that took part, with our speed in its units.
        share: Of the limit.
    """

    group: str
    mode: Mode
    line: Line
    reached: tuple[Reached, ...]
    best: Reached
    share: float | None


@dataclass(frozen=True)
class Result:
    """Everything about an entry.

    Attributes:
        group, mode: Of the entry.
        rows: One a contender.
        outcomes: One a line.
        before, after: Limits around the rounds.
        moved: The largest relative difference between them of those that lines name; the rounds were repeated once
            where it was more than `STEADY`.
        seconds: That it took in all.
    """

    group: str
    mode: Mode
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    before: Limits
    after: Limits
    moved: float
    seconds: float


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        budget: Seconds of rounds for all contenders of an entry; each gets the same share.
        min_rounds, max_rounds: Bounds on the rounds of each.
        compiled: Whether torch.compile takes part.
        repeats: Whether rounds between limits that moved are repeated.
    """

    budget: float
    min_rounds: int
    max_rounds: int
    compiled: bool
    repeats: bool


_BEATEN = 1.5
"""A peer this many times slower than another in the first round is not the best."""

SLOW = 0.5
"""Seconds of a run that is long enough for its first to be like any other."""

Against = tuple[Compared, Compared]
"""The sample in float64, and by plain torch."""


GaugeLike = Callable[[Collection[str]], Limits]
"""Measures the limits with these names."""


class Helper(Protocol):
    """A process of its own with the same entries, whose allocator asks for huge pages."""

    def prepare(self, entry: Entry, contender: str) -> Row:
        """Runs a contender there for its memory, and keeps it; it was compared here, where it is a contender too."""

    def run(self, contender: str) -> float:
        """Seconds of a run there."""


class Runner:
    """A contender of a contest, ready to run."""

    def __init__(self, contest: Contest, contender: Contender, mode: Mode, calls: int = 1) -> None:
        leaves = contest.leaves(contender.layout)
        if mode == "forward":
            leaves = tuple(x.detach() for x in leaves)
        self._contest, self._contender, self._mode, self._calls = contest, contender, mode, calls
        self._function = contender.make(leaves)
        self._kept = leaves
        self._leaves = leaves
        self.first = 0.0
        """Seconds of the first run."""
        self._consumes = contender.consumes and mode == "training"
        if self._consumes:
            self._leaves = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in leaves)

    def run(self) -> Leaves:
        """Result and gradients, once."""
        function, leaves = self._function, self._leaves
        if self._mode == "forward":
            with torch.no_grad():
                return (function(*leaves),)
        out = function(*leaves)
        if self._mode == "graph":
            return (out,)
        wanted = [x for x in leaves if x.requires_grad]
        upstream = self._contest.upstream(self._contender.layout, out)
        return (out.detach(), *torch.autograd.grad(out, wanted, upstream))

    def renew(self) -> None:
        """Gives inputs that were overwritten their values back."""
        if self._consumes:
            for leaf, kept in zip(self._leaves, self._kept, strict=True):
                leaf.detach().copy_(kept.detach())

    def seconds(self) -> float:
        """Of one run; the mean of several where an entry says so."""
        self.renew()
        function, leaves, calls = self._function, self._leaves, range(self._calls)
        if self._calls == 1:
            begun = time.perf_counter()
            self.run()
            return time.perf_counter() - begun
        with torch.set_grad_enabled(self._mode != "forward"):
            begun = time.perf_counter()
            for _ in calls:
                function(*leaves)
            return (time.perf_counter() - begun) / self._calls

    def floor(self, results: Sequence[Tensor]) -> int:
        """Bytes of the results that are no input."""
        inputs = {x.untyped_storage().data_ptr() for x in self._leaves}
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
        return sum(size for place, size in sizes.items() if place not in inputs) + int(self._contest.scratch())


def checked(
    contest: Contest, contender: Contender, mode: Mode, against: Against | None, calls: int = 1
) -> tuple[Row, Runner | None]:
    """Runs a contender once against the formulas, and once more for its memory.

    Args:
        contest: What it takes part in.
        contender: Who.
        mode: What is run.
        against: The sample in float64 and by plain torch; None: it is not compared.
        calls: As in `Entry`.
    """
    row = Row(contender.name, contender.ours)
    try:
        runner = Runner(contest, contender, mode, calls)
        tidy()
        begun = time.perf_counter()
        results, memory = Peak(CPU).over(runner.run)
        runner.first = time.perf_counter() - begun
        results = tuple(x.detach() for x in results)
        error = None
        if against is not None:
            exact, plain = against
            error = error_multiple(contest.sample(contender.layout, results), plain, exact, contest.setting.dtype)
        if error is not None and not error <= WRONG_ABOVE:
            return replace(row, error=error, problem=f"WRONG: {error:.3g} times torch's error"), None
        if calls > 1:
            return replace(row, error=error), runner
        runner.renew()
        if runner.first < SLOW:
            # Once more without what a first call loads and keeps.
            del results
            tidy()
            results, memory = Peak(CPU).over(runner.run)
        return replace(row, error=error, memory=memory, floor=runner.floor(results)), runner
    except Exception as problem:  # a row that says why it is empty; the others are still worth their time
        message = " ".join(str(problem).split())[:100]
        return replace(row, problem=f"refused: {type(problem).__name__}: {message}"), None


def measure(entry: Entry, pace: Pace, gauge: GaugeLike, helper: Helper | None) -> Result:
    """Checks everybody, times those that are right in interleaved rounds, and holds them against the goals.

    Args:
        entry: What.
        pace: How long.
        gauge: Measures the limits that it is given the names of.
        helper: Runs the contenders that want huge pages; None: they are left out.
    """
    begun = time.perf_counter()
    # Graphs and guards of other shapes only slow the next ones down, and count towards a limit.
    torch.compiler.reset()
    contest = entry.make()
    backward = entry.mode == "training"
    against = contest.exact(backward), contest.plain(backward)
    known = {contender.name: contender for contender in contest.contenders()}
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], float]] = {}
    cold: set[str] = set()
    for name in entry.names():
        base = name.removesuffix(HUGE_PAGES)
        if known[base].compiles and not pace.compiled:
            continue
        if base == name:
            # A partial contender computes something else.
            compared = None if known[name].partial else against
            row, runner = checked(contest, known[name], entry.mode, compared, entry.calls)
            if runner is not None:
                runs[name] = runner.seconds
                if runner.first < SLOW:
                    cold.add(name)
        elif helper is None:
            continue
        else:
            row = replace(helper.prepare(entry, base), name=name, error=rows[base].error)
            row = replace(row, problem=row.problem or rows[base].problem)
            if row.problem is None:
                runs[name] = _run_of(helper, base)
        rows[name] = row
    tidy()
    for name in cold:
        runs[name]()
    timings, before, after, moved = _timed(entry, runs, {name for name in runs if rows[name].ours}, pace, gauge)
    rows = {name: replace(row, timing=timings.get(name)) for name, row in rows.items()}
    limits = before.best(after)
    outcomes = tuple(_outcome(entry, line, contest, rows, timings, limits) for line in entry.lines)
    found = tuple(rows.values())
    return Result(entry.group, entry.mode, found, outcomes, before, after, moved, seconds=time.perf_counter() - begun)


def _run_of(helper: Helper, contender: str) -> Callable[[], float]:
    return lambda: helper.run(contender)


def _timed(
    entry: Entry,
    runs: dict[str, Callable[[], float]],
    ours: set[str],
    pace: Pace,
    gauge: GaugeLike,
) -> tuple[dict[str, Timing], Limits, Limits, float]:
    """Rounds between two measurements of the limits; once more where these have moved."""
    needed = {name for line in entry.lines for name in _NEEDED[line.limit]}
    wanted = {goal.peers[0] for line in entry.lines for goal in line.goals if len(goal.peers) == 1}
    for attempt in range(2):
        before = gauge(needed)
        timings = rounds(runs, ours, pace, wanted)
        after = gauge(needed)
        moved = max((share for name, share in after.moved(before).items() if name in needed - _FICKLE), default=0.0)
        if moved <= STEADY or attempt or not pace.repeats:
            break
    return timings, before, after, moved


_FICKLE = {"touch"}
"""How fast the system grants pages depends on what it has at hand: it may change without anybody's doing."""

_NEEDED: dict[str | None, tuple[str, ...]] = {
    None: (),
    "multiply-add": ("multiply_add",),
    "read": ("read",),
    "copy": ("copy",),
    "copy + touch": ("copy", "touch"),
}


def rounds(
    runs: dict[str, Callable[[], float]], ours: set[str], pace: Pace, wanted: set[str] | None = None
) -> dict[str, Timing]:
    """Every contender once a round, until each has used its share of the time.

    The i-th entries of all timings are of the same round: who has used its share takes part in no later one.

    Args:
        runs: From names to what runs them once and says how long it took.
        ours: Names of those that the others are compared with.
        pace: How long.
        wanted: Names of peers that somebody wants to be compared with by name (default: all). The others may leave
            before the fewest rounds are over, once another peer has clearly beaten them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    share = pace.budget / max(len(runs), 1)
    begun = time.perf_counter()

    def beaten(name: str, quickest: float) -> bool:
        first = seconds[name][0]
        return wanted is not None and name not in ours | wanted and first > max(_BEATEN * quickest, SLOW)

    with without_collector():
        for number in range(pace.max_rounds):
            late = number >= pace.min_rounds
            quickest = min((taken[0] for name, taken in seconds.items() if taken and name not in ours), default=0.0)
            going = [
                name
                for name, taken in seconds.items()
                if sum(taken) < share or not (late or (number and beaten(name, quickest)))
            ]
            # Nobody is left to be compared with, or the time that others waste beside the runs is over.
            if late and (not ours.intersection(going) or not set(going) - ours):
                break
            if late and time.perf_counter() - begun > 2.0 * pace.budget:
                break
            # In another order each round: nobody always inherits the cache and the heap of the same neighbour.
            for name in Random(number).sample(going, len(going)):
                seconds[name].append(runs[name]())
    return {name: Timing(tuple(taken)) for name, taken in seconds.items() if taken}


def ratio(ours: Timing, theirs: Timing) -> float:
    """How many times as fast as the other: the median over the rounds that both took part in."""
    common = min(len(ours.seconds), len(theirs.seconds))
    return Timing(ours.seconds[:common]).speedup_over(Timing(theirs.seconds[:common]))


def _outcome(
    entry: Entry, line: Line, contest: Contest, rows: dict[str, Row], timings: dict[str, Timing], limits: Limits
) -> Outcome:
    own = timings.get(line.ours)

    def against(goal: Goal) -> Reached:
        there = [name for name in goal.peers if name in timings]
        if not there:
            return Reached(goal)
        peer = min(there, key=lambda name: timings[name].median)
        return Reached(goal, peer, None if own is None else ratio(own, timings[peer]))

    peers = tuple(name for name in entry.names() if name in rows and not rows[name].ours)
    floor = limit_seconds(line.limit, contest, entry.mode == "training", limits)
    share = None if floor is None or own is None else floor / own.median
    reached = tuple(against(goal) for goal in line.goals)
    return Outcome(entry.group, entry.mode, line, reached, against(Goal(peers, 0.0)), share)


def limit_seconds(limit: str | None, contest: Contest, backward: bool, limits: Limits) -> float | None:
    """How long the machine itself takes for the work of a contest."""
    operations, moved = contest.flops(backward) or 0.0, contest.bytes(backward) or 0.0
    if limit == "multiply-add":
        return operations / limits.multiply_add * 1e-9
    if limit == "read":
        return moved / limits.read * 1e-9
    if limit is None:
        return None
    fresh = contest.written(backward) if limit == "copy + touch" else 0.0
    return (moved / limits.copy + fresh / limits.touch) * 1e-9
