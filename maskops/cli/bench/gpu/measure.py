"""Checks and times the contenders of a contest on a device."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskops.cli.bench.contests.contest import Contender, Contest, Leaves, step
from maskops.cli.bench.measure import WRONG_ABOVE, error_multiple
from maskops.cli.bench.timing import Timing, once, without_collector

Step = tuple[Callable[[], object], Callable[[], Leaves]]

_FLUSHED_BYTES = 256 << 20
"""More than any level-2 cache holds: written before each step, so that none finds its inputs there."""

_SLOW = 20.0
"""A contender this many times slower than the quickest is timed in few rounds: its place is clear."""


@dataclass(frozen=True)
class Row:
    """One contender's result.

    Attributes:
        name, ours, habit, partial: From the contender.
        error: Largest error of the result or of a gradient, as a multiple of plain torch's; None if it did not run.
        timing: Seconds of a step, device time between two events; None where there is no speed to show.
        host: Median seconds until the host has asked for a step; None on the processor.
        tflops: Useful operations.
        gigabytes: Useful bytes, in GB/s.
        ratio: How many times the speed of the best rival of the same table.
        problem: Why there is no speed: "WRONG: ...", "refused: ..." or "crashed: ...".
    """

    name: str
    ours: bool
    habit: bool
    partial: bool
    error: float | None = None
    timing: Timing | None = None
    host: float | None = None
    tflops: float | None = None
    gigabytes: float | None = None
    ratio: float | None = None
    problem: str | None = None

    @property
    def rival(self) -> bool:
        """Whether it may be the best peer."""
        return not self.ours and not self.partial

    @property
    def seconds(self) -> float:
        """Median of a step; infinite where there is none."""
        return float("inf") if self.timing is None else self.timing.median


@dataclass(frozen=True)
class Table:
    """All contenders of a contest in one mode. `best`: the quickest rival, None if none ran."""

    group: str
    name: str
    backward: bool
    rows: tuple[Row, ...]
    best: str | None


class Device:
    """Times steps between two events of the device, or by the clock on the processor."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_device = device.type != "cpu"
        self._flushed: Tensor | None = None
        if self._on_device:
            self._flushed = torch.empty(_FLUSHED_BYTES // 4, dtype=torch.int32, device=device)

    def round(self, steps: Sequence[tuple[int, Step]]) -> list[tuple[int, float, float | None]]:
        """Every step once, in order: number, seconds, seconds of the host.

        Nothing waits between the steps: flushing the cache gives the host a head start, as a model does that has
        asked for earlier layers.
        """
        if self._flushed is None:
            return [(number, self._by_clock(entry), None) for number, entry in steps]
        events = []
        for number, (renew, run) in steps:
            renew()
            self._flushed.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            asked = time.perf_counter()
            run()
            host = time.perf_counter() - asked
            end.record()
            events.append((number, begin, end, host))
        torch.cuda.synchronize(self.device)
        return [(number, begin.elapsed_time(end) * 1e-3, host) for number, begin, end, host in events]

    def _by_clock(self, entry: Step) -> float:
        renew, run = entry
        renew()
        return once(run, self.device)

    def settle(self) -> None:
        """Raises what a kernel left behind, and gives unused memory back."""
        if self._on_device:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


def measure(
    contest: Contest,
    *,
    backward: bool,
    device: Device,
    budget: float,
    min_rounds: int,
    max_rounds: int,
    crashed: Sequence[str] = (),
    on_contender: Callable[[str], None] = lambda name: None,
) -> Table:
    """Checks every contender against the formulas in float64, then times those that are right, in interleaved rounds.

    Args:
        contest: What is computed.
        backward: Forward and backward, or forward alone.
        device: Where.
        budget: Seconds for the rounds.
        min_rounds, max_rounds: Bounds on their number.
        crashed: Contenders that ended an earlier process: they are left out and say so.
        on_contender: Called with the name of each before it first runs.

    Raises:
        RuntimeError: a kernel left the device in a state in which nothing runs any more.
    """
    exact, plain = contest.exact(backward), contest.plain(backward)
    contenders = list(contest.contenders())
    rows, steps, single = [], {}, {}
    for index, contender in enumerate(contenders):
        row = Row(contender.name, contender.ours, contender.habit, contender.partial)
        if contender.name in crashed:
            rows.append(replace(row, problem="crashed: it ended the process, or never came back"))
            continue
        on_contender(contender.name)
        try:
            found = step(contest, contender, backward)
            outcome = _checked_run(contest, contender, found)
            multiple = error_multiple(outcome, plain, exact, contest.setting.dtype)
        except Exception as error:  # a row that says why it is empty; the others are still worth their time
            message = " ".join(str(error).split())[:100]
            row = replace(row, problem=f"refused: {type(error).__name__}: {message}")
        else:
            row = replace(row, error=multiple)
            if multiple <= WRONG_ABOVE:
                steps[index] = found
            else:
                row = replace(row, problem=f"WRONG: {multiple:.3g} times torch's error")
        device.settle()
        rows.append(row)
    for index, found in steps.items():
        single[index] = device.round([(0, found)])[0][1]
    timings, hosts = _rounds(device, steps, single, budget, min_rounds, max_rounds)
    for index, timing in timings.items():
        rows[index] = _speeds(rows[index], contest, backward, timing, hosts[index])
    rivals = [row for row in rows if row.rival and row.timing is not None]
    best = min(rivals, key=lambda row: row.seconds, default=None)
    if best is not None:
        rows = [row if row.timing is None else replace(row, ratio=best.seconds / row.seconds) for row in rows]
    return Table(contest.group, contest.name, backward, tuple(rows), None if best is None else best.name)


def _checked_run(contest: Contest, contender: Contender, found: Step) -> dict[str, Tensor]:
    renew, run = found
    renew()
    return contest.sample(contender.layout, run())


def _rounds(
    device: Device, steps: dict[int, Step], single: dict[int, float], budget: float, min_rounds: int, max_rounds: int
) -> tuple[dict[int, Timing], dict[int, float | None]]:
    seconds: dict[int, list[float]] = {index: [] for index in steps}
    asked: dict[int, list[float]] = {index: [] for index in steps}
    if not steps:
        return {}, {}
    slow = _SLOW * min(single.values())
    started = time.perf_counter()
    # A dry run's seconds mean nothing, and to collect takes longer than its contests.
    with without_collector() if budget > 0.0 else nullcontext():
        for number in range(max_rounds):
            if number >= min_rounds and time.perf_counter() - started > budget:
                break
            chosen = [index for index in steps if number < min_rounds or single[index] <= slow]
            # Another first one each round: nobody always follows the same neighbour.
            turn = number % len(chosen)
            order = [*chosen[turn:], *chosen[:turn]]
            for index, taken, host in device.round([(index, steps[index]) for index in order]):
                seconds[index].append(taken)
                if host is not None:
                    asked[index].append(host)
    return (
        {index: Timing(tuple(entry)) for index, entry in seconds.items()},
        {index: statistics.median(entry) if entry else None for index, entry in asked.items()},
    )


def _speeds(row: Row, contest: Contest, backward: bool, timing: Timing, host: float | None) -> Row:
    flops, moved = contest.flops(backward), contest.bytes(backward)
    return replace(
        row,
        timing=timing,
        host=host,
        tflops=None if flops is None else flops / timing.median * 1e-12,
        gigabytes=None if moved is None else moved / timing.median * 1e-9,
    )
