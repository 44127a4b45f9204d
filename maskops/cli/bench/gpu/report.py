"""The results of a run on a device: kept after each contest, shown as tables."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskops.cli.bench.gpu.measure import Row, Table
from maskops.cli.bench.machine import Machine
from maskops.cli.bench.report import HABIT, aligned
from maskops.cli.bench.timing import Timing

SCHEMA = 1
"""Version of the JSON's layout."""


@dataclass
class Report:
    """What a run has found so far.

    Attributes:
        machine: Where.
        details: What the driver and torch say about the device.
        settings: Of the run.
        tables: One a contest and mode, in order.
        begun: Group, name, "forward" or "training" and contender of what is running: what a process that ends in the
            middle leaves behind.
        crashed: Those that ended a process.
        finished: Whether every contest of the run is in.
    """

    machine: Machine
    details: dict[str, str]
    settings: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    begun: list[str] | None = None
    crashed: list[list[str]] = field(default_factory=list)
    finished: bool = False

    def has(self, group: str, name: str, backward: bool) -> bool:
        """Whether this was measured."""
        return any((table.group, table.name, table.backward) == (group, name, backward) for table in self.tables)

    def problems(self) -> list[str]:
        """What makes a run a failure: a wrong result of anybody, a refusal or a crash of maskops."""
        return [
            f"{table.group}: {table.name}{', backward' if table.backward else ''}: {row.name}: {row.problem}"
            for table in self.tables
            for row in table.rows
            if row.problem is not None and (row.ours or row.problem.startswith("WRONG"))
        ]

    def write(self, path: Path) -> None:
        """Writes everything, beside the file first: a process that is killed leaves the old one whole."""
        draft = path.with_name(path.name + ".draft")
        plain = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        plain["machine"] = dataclasses.asdict(self.machine)
        plain["tables"] = [
            {**dataclasses.asdict(table), "rows": [_plain(row) for row in table.rows]} for table in self.tables
        ]
        draft.write_text(json.dumps({"schema": SCHEMA, "kind": "gpu", **plain}, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def resume(self, path: Path) -> bool:
        """Takes the results of an earlier process of the same run; whether there were any.

        Another device, commit, torch or other settings make another run, which begins anew.
        """
        if not path.exists():
            return False
        stored = json.loads(path.read_text(encoding="utf-8"))
        same = ("device", "commit", "torch")
        here = dataclasses.asdict(self.machine)
        if stored.get("schema") != SCHEMA or stored["settings"] != self.settings:
            return False
        if any(stored["machine"][name] != here[name] for name in same):
            return False
        self.tables = tables_of(stored)
        self.crashed = stored["crashed"]
        if stored["begun"] is not None and stored["begun"] not in self.crashed:
            self.crashed.append(stored["begun"])
        return True


def _plain(row: Row) -> dict[str, Any]:
    timing = row.timing
    plain = dataclasses.asdict(row)
    if timing is not None:
        plain["timing"] = {"median": timing.median, "spread": timing.spread, "seconds": list(timing.seconds)}
    return plain


def tables_of(stored: dict[str, Any]) -> list[Table]:
    """The tables of a report that was read from its file."""
    return [_table(table) for table in stored["tables"]]


def _table(stored: dict[str, Any]) -> Table:
    rows = []
    for row in stored["rows"]:
        timing = row["timing"] and Timing(tuple(row["timing"]["seconds"]))
        rows.append(Row(**{**row, "timing": timing}))
    return Table(**{**stored, "rows": tuple(rows)})


def file_name(device: str) -> str:
    """Where the results of a device are kept: gpu-nvidia-h100-80gb-hbm3.json."""
    return f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


# ---- tables ----------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The whole report for a terminal."""
    blocks = [_heading(report)]
    group = ""
    for tables in _contests(report.tables):
        if tables[0].group != group:
            group = tables[0].group
            blocks.append(f"{group.upper()}")
        blocks.append(_contest(tables))
    blocks.append(_summary(report))
    if problems := report.problems():
        blocks.append("\n".join(["PROBLEMS", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(blocks) + "\n"


def _heading(report: Report) -> str:
    machine, peaks = report.machine, report.machine.peaks
    lines = [
        ("device", ", ".join([machine.device, *(f"{name} {value}" for name, value in report.details.items())])),
        ("versions", f"maskops {machine.maskops} ({machine.commit}), torch {machine.torch}, Python {machine.python}"),
        (
            "peaks",
            f"{peaks.multiply_add / 1e3:,.0f} TFLOP/s, read {peaks.read:,.0f} GB/s, copy {peaks.copy:,.0f} GB/s "
            "(plain torch, same process)",
        ),
        ("inputs", f"{report.settings['dtype']}; TFLOP/s and GB/s of useful work: visible pairs, rows that count"),
        ("time", "between two events of the device, cache flushed, medians of interleaved rounds; masks and plans are"),
        ("", "made in every step unless a row says before; host: until the step was asked for"),
        ("ratio", "speed over the best peer of the same table; in brackets where a part of the step is left out"),
        ("error", "largest of the result or a gradient against float64, 1 = plain torch's own and a few roundings;"),
        ("", "above 2 a row prints WRONG and no speed"),
        ("command", machine.command + ("" if report.finished else " (not finished)")),
    ]
    return "\n".join([f"maskops bench gpu ({report.settings['mode']})", *aligned(lines, left=2)])


def _contests(tables: Sequence[Table]) -> Iterator[list[Table]]:
    """The tables of a contest together, forward first."""
    found: dict[tuple[str, str], list[Table]] = {}
    for table in tables:
        found.setdefault((table.group, table.name), []).append(table)
    yield from found.values()


def _unit(row: Row) -> str:
    return "TFLOP/s" if row.tflops is not None else "GB/s"


def _work(row: Row) -> str:
    if row.tflops is not None:
        return f"{row.tflops:.0f}" if row.tflops >= 100 else f"{row.tflops:.3g}"
    return "-" if row.gigabytes is None else f"{row.gigabytes:,.0f}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "-"
    return f"({row.ratio:.2f}x)" if row.partial else f"{row.ratio:.2f}x"


def _cells(row: Row) -> list[str]:
    if row.timing is None:
        return ["-"] * 4
    host = "-" if row.host is None else f"{row.host * 1e6:.0f}"
    spread = f"{row.timing.spread:.0%}" if len(row.timing.seconds) > 1 else "n=1"
    return [f"{row.timing.median * 1e3:.3f} ±{spread}", host, _work(row), _ratio(row)]


def _contest(tables: Sequence[Table]) -> str:
    heads = []
    for table in tables:
        unit = next((_unit(row) for row in table.rows if row.timing is not None), "")
        heads += ["both, ms" if table.backward else "forward, ms", "host us", unit, "ratio"]
    lines = [[tables[0].name, *heads, "error"]]
    for rows in zip(*(table.rows for table in tables), strict=True):
        name = f"{rows[0].name}  ({HABIT})" if rows[0].habit else rows[0].name
        problem = next((row.problem for row in rows if row.problem is not None), None)
        if all(row.problem is not None for row in rows):
            lines.append([name, str(problem)])
            continue
        error = max(row.error or 0.0 for row in rows)
        cells = [cell for row in rows for cell in _cells(row)]
        lines.append([name, *cells, f"{error:.2f}" if problem is None else problem.split(":")[0]])
    return "\n".join(aligned(lines, indent="  "))


def summary(tables: Sequence[Table]) -> list[list[str]]:
    """A line a contest: the best of maskops in each mode with its ratio to the best peer; the backward pass alone.

    The backward pass is the difference of the two medians. The header comes first.
    """
    lines = [["", "", "forward", "ratio", "backward", "both", "ratio", "best peer"]]
    for found in _contests(tables):
        ours = {table.backward: _best(table) for table in found}
        cells = []
        for backward in (False, True):
            row = ours.get(backward)
            cells += ["-", "-"] if row is None else [_work(row), _ratio(row)]
        forward, both = ours.get(False), ours.get(True)
        cells.insert(2, "-" if forward is None or both is None else _alone(forward, both))
        unit = next((_unit(row) for row in ours.values() if row is not None), "")
        lines.append([f"{found[0].group}: {found[0].name}", unit, *cells, found[-1].best or "-"])
    return lines


def _best(table: Table) -> Row | None:
    """The quickest row of maskops that does the whole step."""
    ours = [row for row in table.rows if row.ours and row.timing is not None and not row.partial]
    return min(ours, key=lambda row: row.seconds, default=None)


def _alone(forward: Row, both: Row) -> str:
    works = [(row.tflops or row.gigabytes or 0.0) * row.seconds for row in (forward, both)]
    seconds = both.seconds - forward.seconds
    # Two medians that noise has turned round say nothing.
    return f"{(works[1] - works[0]) / seconds:,.3g}" if seconds > 0.0 else "-"


def _summary(report: Report) -> str:
    return "\n".join(["BEST OF MASKOPS AGAINST THE BEST PEER", *aligned(summary(report.tables), left=2)])
