"""What a run of the table found, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from maskops.cli.bench.cpu.contest import MODES
from maskops.cli.bench.cpu.limits import STEADY
from maskops.cli.bench.cpu.measure import Outcome, Reached, Result, Row
from maskops.cli.bench.machine import Machine
from maskops.cli.bench.report import SCHEMA, aligned, busy, to_plain


@dataclass(frozen=True)
class CpuReport:
    """Everything that `maskops bench cpu` found.

    Attributes:
        mode: "full" or "quick".
        machine: Where; its peaks are those of plain torch.
        settings: Of the run.
        results: One an entry.
        seconds: That the run took.
    """

    mode: str
    machine: Machine
    settings: dict[str, Any]
    results: tuple[Result, ...]
    seconds: float

    def outcomes(self) -> list[tuple[Outcome, Row]]:
        """Every line with our own row."""
        found = []
        for result in self.results:
            rows = {row.name: row for row in result.rows}
            found += [(outcome, rows[outcome.line.ours]) for outcome in result.outcomes if outcome.line.ours in rows]
        return found

    def problems(self) -> list[str]:
        """What makes a run a failure: a wrong result of anybody, a refusal of maskops."""
        return [
            f"{result.group}, {MODES[result.mode]}: {result.outcomes[0].line.name}: {row.name}: {row.problem}"
            for result in self.results
            for row in result.rows
            if row.problem is not None and (row.ours or row.problem.startswith("WRONG"))
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


def render(report: CpuReport) -> str:
    """The whole table."""
    blocks = [_heading(report)]
    for (group, mode), results in groupby(report.results, key=lambda result: (result.group, result.mode)):
        blocks.append(_group(group, mode, list(results)))
    missed = report.missed()
    count = sum(reached.met is not None for outcome, _ in report.outcomes() for reached in outcome.reached)
    lines = [f"AT LEAST: {count} goals measured, {len(missed)} missed", *(f"  {each}" for each in missed)]
    blocks.append("\n".join(lines))
    if problems := report.problems():
        blocks.append("\n".join(["PROBLEMS", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(blocks) + "\n"


def _heading(report: CpuReport) -> str:
    machine, peaks = report.machine, report.machine.peaks
    lines = [
        *busy(machine),
        ("device", f"{machine.device}, {machine.threads} threads, {machine.platform}; {machine.instruction_set}"),
        ("versions", f"maskops {machine.maskops} ({machine.commit}), torch {machine.torch}, Python {machine.python}"),
        *_limits(report.results),
        (
            "torch",
            f"{peaks.multiply_add:,.0f} GFLOP/s of a matrix product, read {peaks.read:.1f} GB/s, copy "
            f"{peaks.copy:.1f} GB/s",
        ),
        ("columns", "ratio: times the speed of the peer, median of interleaved rounds, the quickest of its kind; at"),
        ("", "least, aim: what is wanted; limit: share of what the machine does at most, before or after the rounds,"),
        ("", "and the share aimed at; error: largest of the result or a gradient against float64, 1 = plain torch's"),
        ("", "own and a few roundings, above 2 a row prints WRONG and no speed; MB: memory at the peak of a run, and"),
        ("", "that of its results"),
        ("command", f"{machine.command} ({report.mode} run, {report.seconds:.0f} s)"),
    ]
    return "\n".join(["maskops bench cpu", *aligned(lines, left=2)])


def _limits(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    if not results:
        return
    measured = [limits for result in results for limits in (result.before, result.after)]
    ranges = []
    for name, label, unit in (
        ("multiply_add", "multiply-add in registers", "GFLOP/s"),
        ("read", "read", "GB/s"),
        ("copy", "copy", "GB/s"),
        ("touch", "first touch", "GB/s"),
        ("huge_read", "in huge pages: read", "GB/s"),
        ("huge_copy", "copy", "GB/s"),
    ):
        values = [getattr(limits, name) for limits in measured]
        ranges.append(f"{label} {min(values):,.1f} to {max(values):,.1f} {unit}")
    yield "limits", ", ".join(ranges[:3])
    yield "", ", ".join(ranges[3:])
    moved = sum(result.moved > STEADY for result in results)
    if moved:
        text = f"those of {moved} of {len(results)} measurements differ by more than {STEADY:.0%} before and after: ~"
        yield "MOVED", text


def _group(group: str, mode: str, results: Sequence[Result]) -> str:
    lines = [[f"{group}, {MODES[mode]}", "ms", "±", "ratio", "least", "aim", "limit", "error", "MB", "peer"]]
    for result in results:
        rows = {row.name: row for row in result.rows}
        for outcome in result.outcomes:
            row = rows.get(outcome.line.ours)
            if row is not None:
                lines += _lines(outcome, row, result.moved > STEADY)
    return "\n".join(_with_peers(lines))


def _with_peers(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """The last column, of words, stands to the left."""
    width = max(len(line[-1]) for line in lines)
    yield from aligned([[*line[:-1], line[-1].ljust(width)] if len(line) > 2 else line for line in lines], indent="")


def _lines(outcome: Outcome, row: Row, moved: bool) -> Iterator[list[str]]:
    """A line for each goal; one for the quickest peer where no goal names it."""
    name = f"  {outcome.line.name}"
    if row.timing is None:
        yield [name, str(row.problem)]
        return
    scale, unit = (1e3, "") if row.timing.median >= 1e-4 else (1e6, " us")
    cells = [
        f"{row.timing.median * scale:,.2f}{unit}",
        f"{row.timing.spread:.0%}" if len(row.timing.seconds) > 1 else "n=1",
    ]
    rest = [_share(outcome, moved), "-" if row.error is None else f"{row.error:.2f}", _memory(row)]
    reached = list(outcome.reached)
    if outcome.best.peer is not None and outcome.best.peer not in {each.peer for each in reached}:
        reached.append(outcome.best)
    for each in reached:
        yield [name, *cells, *_goal(each), *rest, each.peer or f"{each.goal.peers[0]}: not measured"]
        name, cells, rest = "", ["", ""], ["", "", ""]


def _goal(reached: Reached) -> list[str]:
    goal = reached.goal
    ratio = "-" if reached.ratio is None else f"{reached.ratio:.2f}x" + ("" if reached.met else " !")
    return [
        ratio,
        f"{goal.at_least:.3g}x" if goal.at_least else "-",
        "-" if goal.aim is None else f"{goal.aim:.3g}x",
    ]


def _share(outcome: Outcome, moved: bool) -> str:
    if outcome.share is None:
        return "-"
    aim = "" if outcome.line.share is None else f" of {outcome.line.share:.0%}"
    return f"{'~' if moved else ''}{outcome.share:.0%} {outcome.line.limit}{aim}"


def _memory(row: Row) -> str:
    if row.memory is None or row.floor is None:
        return "-"
    return f"{row.memory / 1e6:,.0f} / {row.floor / 1e6:,.0f}"
