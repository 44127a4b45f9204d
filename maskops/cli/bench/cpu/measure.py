"""Checks the contenders of an entry, has them timed between measurements of the limits, and judges the goals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from maskops import extension
from maskops.cli.bench.contests.contest import Contender, Contest, Leaves
from maskops.cli.bench.cpu.contest import HUGE_PAGES, Entry, Goal, Line, Mode
from maskops.cli.bench.cpu.limits import Limits, best
from maskops.cli.bench.cpu.rounds import SLOW, Contenders, GaugeLike, Pace, Rounds, Stretch, rounds
from maskops.cli.bench.jobs import Outcome as Compared
from maskops.cli.bench.measure import WRONG_ABOVE, error_multiple
from maskops.cli.bench.memory import Peak, tidy
from maskops.cli.bench.timing import Timing

CPU = torch.device("cpu")

PEER_WRONG_ABOVE = 2.0 * WRONG_ABOVE
"""A peer may round worse, since it adds up in another order, and is still the one to beat; beyond, it is wrong."""

_LARGE = 128 << 20
"""Bytes from which on a run may have to wait for memory that the host of a virtual machine has taken back."""


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
        problem: Why there is no speed: "WRONG: ...", "refused: ...", or "unsteady: ..." where the machine's limits
            moved around too many of its rounds.
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
    """What became of a goal.

    Attributes:
        goal: What was wanted.
        peer: The quickest of its peers.
        ratio: Times the speed of that peer, median of the rounds; None where one of both has no speed.
        spread: Half the distance between the quartiles of the ratios of the rounds, relative to the median.
        rounds: That both took part in.
    """

    goal: Goal
    peer: str | None = None
    ratio: float | None = None
    spread: float | None = None
    rounds: int = 0

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
        share: Of the limit, median of the rounds, each against the limit as it was measured around it.
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
        stretches: Of the rounds, with the limits around each.
        seconds: That it took in all: "rounds" with the limits, and "rest", which is values, checks and compilations.
    """

    group: str
    mode: Mode
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    stretches: tuple[Stretch, ...]
    seconds: dict[str, float]

    @property
    def unsteady(self) -> bool:
        """Whether there is no speed because limits moved."""
        return any(row.problem is not None and row.problem.startswith("unsteady") for row in self.rows)


Against = tuple[Compared, Compared]
"""The sample in float64, and by plain torch."""


class Helper(Protocol):
    """A process of its own with the same entries, whose allocator asks for huge pages."""

    def prepare(self, entry: Entry, contender: str) -> Row:
        """Runs a contender there for its memory, and keeps it; it was compared here, where it is a contender too."""

    def run(self, contender: str, warms: bool) -> float:
        """Seconds of a run there, after an untimed one if it warms."""


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
        self.first = self.later = 0.0
        """Seconds of the first run, and of the last one before the rounds."""
        self.warms = False
        """Whether an untimed run goes before each that is timed: in a loop the memory of the step before is at hand,
        while others run for seconds the host of a virtual machine may take it back."""
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
        """Gives inputs that were overwritten their values back, and memory that is kept to the system."""
        if self._contender.releases:
            extension.release_memory()
        if self._consumes:
            for leaf, kept in zip(self._leaves, self._kept, strict=True):
                leaf.detach().copy_(kept.detach())

    def seconds(self) -> float:
        """Of one run; the mean of several where an entry says so."""
        if self.warms:
            self.renew()
            self.run()
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
        results = results[:1] if self._contender.reuses else results
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
        if error is not None and not error <= (WRONG_ABOVE if contender.ours else PEER_WRONG_ABOVE):
            return replace(row, error=error, problem=f"WRONG: {error:.3g} times torch's error"), None
        if calls > 1:
            return replace(row, error=error), runner
        runner.renew()
        runner.later = runner.first
        if runner.first < SLOW or contender.compiles:
            # Once more without what a first call loads, compiles and keeps.
            del results
            tidy()
            begun = time.perf_counter()
            results, memory = Peak(CPU).over(runner.run)
            runner.later = time.perf_counter() - begun
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
    runners: list[Runner] = []
    warms = False

    def there(contender: str) -> Callable[[], float]:
        assert helper is not None
        return lambda: helper.run(contender, warms)

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
                runners.append(runner)
                if runner.first < SLOW:
                    cold.add(name)
        elif helper is None:
            continue
        else:
            row = replace(helper.prepare(entry, base), name=name, error=rows[base].error)
            row = replace(row, problem=row.problem or rows[base].problem)
            if row.problem is None:
                runs[name] = there(base)
        rows[name] = row
    # All of an entry or nobody. Where a run takes seconds, memory is the least of it.
    most = max((row.memory or 0 for row in rows.values()), default=0)
    warms = most >= _LARGE and min((runner.later for runner in runners), default=0.0) < 4.0 * SLOW
    for each in runners:
        each.warms = warms
    tidy()
    for name in cold:
        runs[name]()
    checked_at = time.perf_counter()
    wanted = {goal.peers[0] for line in entry.lines for goal in line.goals if len(goal.peers) == 1}
    who = Contenders(runs, frozenset(name for name in runs if rows[name].ours), frozenset(wanted))
    judged, also = needed(entry)
    found = rounds(who, pace, gauge, judged, also)
    rows = {
        name: replace(row, timing=found.timings.get(name), problem=row.problem or found.problem)
        for name, row in rows.items()
    }
    outcomes = tuple(_outcome(entry, line, contest, rows, found) for line in entry.lines)
    ended = time.perf_counter()
    seconds = {"rounds": ended - checked_at, "rest": checked_at - begun}
    return Result(entry.group, entry.mode, tuple(rows.values()), outcomes, found.stretches, seconds)


_JUDGED: dict[str | None, str] = {
    None: "multiply_add",  # which follows the clock, as the interpreter does
    "multiply-add": "multiply_add",
    "multiply-add bf16": "multiply_pairs",
    "read": "read",
    "copy": "copy",
    "copy + touch": "copy",
}


def needed(entry: Entry) -> tuple[set[str], set[str]]:
    """Limits that must hold still while the entry is timed, and those that are only measured.

    How fast the system grants pages depends on what it has at hand: it may change without anybody's doing.
    """
    limits = {line.limit for line in entry.lines}
    return {_JUDGED[limit] for limit in limits}, {"touch"} if "copy + touch" in limits else set()


def ratios(ours: Timing, theirs: Timing) -> Timing:
    """How many times as fast as the other, in each round that both took part in."""
    common = min(len(ours.seconds), len(theirs.seconds))
    return Timing(tuple(other / own for own, other in zip(ours.seconds[:common], theirs.seconds[:common], strict=True)))


def _outcome(entry: Entry, line: Line, contest: Contest, rows: dict[str, Row], found: Rounds) -> Outcome:
    timings = found.timings
    own = timings.get(line.ours)

    def against(goal: Goal) -> Reached:
        there = [name for name in goal.peers if name in timings]
        if not there:
            return Reached(goal)
        peer = min(there, key=lambda name: timings[name].median)
        if own is None:
            return Reached(goal, peer)
        each = ratios(own, timings[peer])
        return Reached(goal, peer, each.median, each.spread, len(each.seconds))

    peers = tuple(name for name in entry.names() if name in rows and not rows[name].ours)
    shares: list[float] = []
    if own is not None and line.limit is not None:
        for seconds, stretch in zip(own.seconds, found.around(), strict=False):
            limits = best(stretch.before, stretch.after)
            floor = limit_seconds(line.limit, contest, entry.mode == "training", limits)
            assert floor is not None
            shares.append(floor / seconds)
    reached = tuple(against(goal) for goal in line.goals)
    share = statistics.median(shares) if shares else None
    return Outcome(entry.group, entry.mode, line, reached, against(Goal(peers, 0.0)), share)


def limit_seconds(limit: str | None, contest: Contest, backward: bool, limits: Limits) -> float | None:
    """How long the machine itself takes for the work of a contest."""
    operations, moved = contest.flops(backward) or 0.0, contest.bytes(backward) or 0.0
    if limit in ("multiply-add", "multiply-add bf16"):
        return operations / limits[_JUDGED[limit]] * 1e-9
    if limit == "read":
        return moved / limits["read"] * 1e-9
    if limit is None:
        return None
    seconds = moved / limits["copy"]
    return (seconds + contest.written(backward) / limits["touch"] if limit == "copy + touch" else seconds) * 1e-9
