"""What a run of the table found, as text and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from maskops.cli.bench.cpu.contest import MODES, Mode
from maskops.cli.bench.cpu.limits import STEADY, Limits
from maskops.cli.bench.cpu.measure import PEER_WRONG_ABOVE, Outcome, Reached, Result, Row
from maskops.cli.bench.machine import Machine
from maskops.cli.bench.measure import WRONG_ABOVE
from maskops.cli.bench.report import SCHEMA, aligned, busy, to_plain


@dataclass(frozen=True)
class CpuReport:
    """Everything that `maskops bench cpu` found.

    Attributes:
        mode: "full" or "quick".
        machine: Where; its peaks are those of plain torch.
        settings: Of the run.
        limits: All that the machine can do, as measured at the beginning.
        results: One an entry.
        seconds: That the run took.
    """

    mode: str
    machine: Machine
    settings: dict[str, Any]
    limits: Limits
    results: tuple[Result, ...]
    seconds: float

    def groups(self) -> dict[tuple[str, Mode], list[Result]]:
        """The results by heading and mode, each in the order of the table."""
        found: dict[tuple[str, Mode], list[Result]] = {}
        for result in self.results:
            found.setdefault((result.group, result.mode), []).append(result)
        return found

    def outcomes(self) -> list[tuple[Outcome, Row]]:
        """Every line with our own row, group by group."""
        return [pair for results in self.groups().values() for result in results for pair in _with_own_row(result)]

    def problems(self) -> list[str]:
        """What makes a run a failure: a wrong result of anybody, a refusal of maskops; not a machine that moves."""
        return [
            f"{result.group}, {MODES[result.mode]}: {result.outcomes[0].line.name}: {row.name}: {row.problem}"
            for result in self.results
            for row in result.rows
            if row.problem is not None and row.problem.startswith(("WRONG", "refused") if row.ours else "WRONG")
        ]

    def unsteady(self) -> list[str]:
        """Lines without a speed because the machine's limits did not hold still."""
        return [
            f"{outcome.group}: {outcome.line.name}, {MODES[outcome.mode]}: {row.problem}"
            for outcome, row in self.outcomes()
            if row.problem is not None and row.problem.startswith("unsteady")
        ]

    def missed(self) -> list[str]:
        """What stayed below its "at least"."""
        found = []
        for outcome, row in self.outcomes():
            place = f"{outcome.group}: {outcome.line.name}, {MODES[outcome.mode]}"
            for reached in outcome.reached:
                if reached.met is False:
                    found.append(f"{place}: {reached.ratio:.2f}x {reached.peer}, wanted {reached.goal.at_least:.3g}x")
            allowed = outcome.line.memory
            if allowed is not None and row.memory is not None and row.floor and row.memory > allowed * row.floor:
                found.append(f"{place}: {row.memory / row.floor:.2f}x the floor of memory, wanted {allowed:.3g}x")
        return found

    def to_json(self) -> str:
        """Every number, raw rounds included."""
        return json.dumps({"schema": SCHEMA, "kind": "cpu", **to_plain(self)}, indent=1) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json()` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")


def _with_own_row(result: Result) -> list[tuple[Outcome, Row]]:
    rows = {row.name: row for row in result.rows}
    return [(outcome, rows[outcome.line.ours]) for outcome in result.outcomes if outcome.line.ours in rows]


def render(report: CpuReport) -> str:
    """The whole table."""
    blocks = [_heading(report)]
    blocks += [_group(group, mode, results) for (group, mode), results in report.groups().items()]
    missed = report.missed()
    count = sum(reached.met is not None for outcome, _ in report.outcomes() for reached in outcome.reached)
    lines = [f"AT LEAST: {count} goals measured, {len(missed)} missed", *(f"  {each}" for each in missed)]
    blocks.append("\n".join(lines))
    if unsteady := report.unsteady():
        again = "the limits moved under these, so that they have no speed; run them again with --only"
        blocks.append("\n".join([f"UNSTEADY: {again}", *(f"  {each}" for each in unsteady)]))
    if problems := report.problems():
        blocks.append("\n".join(["PROBLEMS", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(blocks) + "\n"


_COLUMNS = (
    "ratio: times the speed of the peer, the quickest of its kind; median of n interleaved rounds, ± half the distance "
    "of their quartiles; !: below what is wanted at least. limit: share of what the machine does at most, measured "
    "right before and after the rounds (and the share aimed at). error: largest of the result or a gradient against "
    f"float64, 1 = plain torch's own and a few roundings; above {WRONG_ABOVE:.0f} (peers: {PEER_WRONG_ABOVE:.0f}) a "
    "row prints WRONG and no speed. MB: memory at the peak of a run / its results with what no way can spare. huge "
    "pages: the peer in a process whose allocator asks for them (THP_MEM_ALLOC_ENABLE=1). first touch: maskops without "
    "the memory of the run before, which it keeps otherwise."
)


def _heading(report: CpuReport) -> str:
    machine, peaks = report.machine, report.machine.peaks
    lines = [
        *busy(machine),
        ("device", f"{machine.device}, {machine.threads} threads, {machine.platform}; {machine.instruction_set}"),
        ("versions", f"maskops {machine.maskops} ({machine.commit}), torch {machine.torch}, Python {machine.python}"),
        *_limits(report),
        (
            "torch",
            f"{peaks.multiply_add:,.0f} GFLOP/s of a matrix product, read {peaks.read:.1f} GB/s, copy "
            f"{peaks.copy:.1f} GB/s",
        ),
        *zip(chain(["columns"], repeat("")), textwrap.wrap(_COLUMNS, 106), strict=False),
        ("command", f"{machine.command} ({report.mode} run, {report.seconds:.0f} s)"),
    ]
    return "\n".join(["maskops bench cpu", *aligned(lines, left=2)])


_UNITS = {
    "multiply_add": ("multiply-add in registers", "GFLOP/s"),
    "multiply_pairs": ("of bfloat16", "GFLOP/s"),
    "read": ("read", "GB/s"),
    "copy": ("copy", "GB/s"),
    "touch": ("first touch", "GB/s"),
    "huge_read": ("in huge pages: read", "GB/s"),
    "huge_copy": ("copy", "GB/s"),
}


def _limits(report: CpuReport) -> Iterator[tuple[str, str]]:
    """From the lowest to the highest of the run."""
    stretches = [stretch for result in report.results for stretch in result.stretches]
    measured = [report.limits, *(limits for stretch in stretches for limits in (stretch.before, stretch.after))]
    ranges = []
    for name, (label, unit) in _UNITS.items():
        values = [limits[name] for limits in measured if name in limits]
        low, high = min(values), max(values)
        ranges.append(f"{label} {low:,.1f}{f' to {high:,.1f}' if high > low else ''} {unit}")
    yield "limits", ", ".join(ranges[:2])
    yield "", ", ".join(ranges[2:5])
    yield "", ", ".join(ranges[5:])
    lost = [stretch for stretch in stretches if not stretch.kept]
    if lost:
        yield (
            "MOVED",
            f"{len(lost)} of {len(stretches)} stretches of rounds were thrown away: a limit that counts there differed "
            f"by more than {STEADY:.0%} before and after",
        )


def _group(group: str, mode: str, results: Sequence[Result]) -> str:
    lines = [[f"{group}, {MODES[mode]}", "ms", "ratio", "±", "n", "least", "aim", "limit (aim)", "error", "MB", "peer"]]
    for result in results:
        for outcome, row in _with_own_row(result):
            lines += _lines(outcome, row)
    return "\n".join(_with_peers(lines))


def _with_peers(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The last column, of words, stands to the left."""
    width = max(len(line[-1]) for line in lines)
    yield from aligned([[*line[:-1], line[-1].ljust(width)] if len(line) > 2 else line for line in lines], indent="")


def _lines(outcome: Outcome, row: Row) -> Iterator[list[str]]:
    """A line for each goal; one for the quickest peer where no goal names it."""
    name = f"  {outcome.line.name}"
    if row.timing is None:
        yield [name, str(row.problem)]
        return
    scale, unit = (1e3, "") if row.timing.median >= 1e-4 else (1e6, " us")
    taken = f"{row.timing.median * scale:,.2f}{unit}"
    rest = [_share(outcome), "-" if row.error is None else f"{row.error:.2f}", _memory(row)]
    reached = list(outcome.reached)
    if outcome.best.peer is not None and outcome.best.peer not in {each.peer for each in reached}:
        reached.append(outcome.best)
    for each in reached:
        yield [name, taken, *_goal(each), *rest, each.peer or f"{each.goal.peers[0]}: not measured"]
        name, taken, rest = "", "", ["", "", ""]


def _goal(reached: Reached) -> list[str]:
    goal = reached.goal
    found = ["-", "-", "-"]
    if reached.ratio is not None:
        spread = "-" if reached.rounds < 2 or reached.spread is None else f"{reached.spread:.0%}"
        found = [f"{reached.ratio:.2f}x" + ("" if reached.met else " !"), spread, str(reached.rounds)]
    return [
        *found,
        f"{goal.at_least:.3g}x" if goal.at_least else "-",
        "-" if goal.aim is None else f"{goal.aim:.3g}x",
    ]


def _share(outcome: Outcome) -> str:
    if outcome.share is None:
        return "-"
    aim = "" if outcome.line.share is None else f" ({outcome.line.share:.0%})"
    return f"{outcome.share:.0%} {outcome.line.limit}{aim}"


def _memory(row: Row) -> str:
    if row.memory is None or row.floor is None:
        return "-"
    return f"{row.memory / 1e6:,.0f} / {row.floor / 1e6:,.0f}"
