"""The results of a run as a table for people and as JSON for programs."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskops.cli.bench.machine import Machine
from maskops.cli.bench.measure import Row, Shares, Table
from maskops.cli.bench.timing import Timing

SCHEMA = 1
"""Version of the JSON's layout."""

HABIT = "what people do"

BUSY_ABOVE = 0.2
"""Processors taken by others above which speeds say more about them than about this program."""


@dataclass(frozen=True)
class Waste:
    """What one layout does with the documents: the share of positions that hold a token."""

    layout: str
    batch_size: int
    fill: float


@dataclass(frozen=True)
class SweepPoint:
    """One fill factor: a training step on documents cut to lengths with that mean."""

    fill: float
    lengths: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Report:
    """Everything that a run of `maskops bench` found.

    Attributes:
        documents: Counts and lengths of the corpus; see `command`.
        settings: Sizes of the work, as in `jobs.Settings`.
        picture: Lengths of the documents of one padded micro-batch, for the chart.
    """

    mode: str
    machine: Machine
    documents: dict[str, Any]
    settings: dict[str, Any]
    waste: tuple[Waste, ...]
    tables: tuple[Table, ...]
    shares: tuple[Shares, ...]
    sweep: tuple[SweepPoint, ...]
    picture: tuple[int, ...]
    seconds: float

    def table(self, job: str, backward: bool) -> Table:
        """The table of a job in one mode; KeyError if it was not measured."""
        for table in self.tables:
            if (table.job, table.backward) == (job, backward):
                return table
        raise KeyError(f"no table for job {job!r} with backward={backward}")

    def problems(self) -> list[str]:
        """What makes a run a failure: a wrong result of anybody, a refusal of maskops."""
        tables = [*self.tables, *(point.table for point in self.sweep)]
        return [
            f"{table.job}{' backward' if table.backward else ''}: {row.name}: {row.problem}"
            for table in tables
            for row in table.rows
            if row.problem is not None and (row.ours or row.problem.startswith("WRONG"))
        ]

    def to_json(self) -> str:
        """The report with medians and spreads beside the raw rounds."""
        return json.dumps({"schema": SCHEMA, **to_plain(self)}, indent=1) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json()` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")


def to_plain(value: Any) -> Any:
    """Dataclasses to dictionaries, with the properties that readers of the JSON want to have computed."""
    if isinstance(value, Timing):
        seconds = [float(f"{seconds:.7g}") for seconds in value.seconds]
        return {"median": value.median, "spread": value.spread, "rounds": len(seconds), "seconds": seconds}
    if isinstance(value, Shares):
        return {**dataclasses.asdict(value), "ceiling": value.ceiling}
    if dataclasses.is_dataclass(value):
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    return value


def render(report: Report) -> str:
    """The whole report as text, at most 120 columns wide."""
    blocks = [_heading(report), _documents(report)]
    jobs = dict.fromkeys(table.job for table in report.tables)
    blocks += [_job([table for table in report.tables if table.job == job]) for job in jobs]
    if report.shares:
        blocks.append(shares_table(report.shares, "one profiled step each"))
    if report.sweep:
        blocks.append(_sweep(report.sweep))
    problems = report.problems()
    if problems:
        blocks.append("\n".join(["PROBLEMS", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(blocks) + "\n"


def busy(machine: Machine) -> list[tuple[str, str]]:
    """A line of a heading, label and words, where others took processors; none where they did not."""
    if machine.load <= BUSY_ABOVE:
        return []
    return [("BUSY", f"other programs kept {machine.load:.1f} processors busy: do not trust these speeds")]


def aligned(rows: Sequence[Sequence[str]], indent: str = "  ", left: int = 1) -> Iterator[str]:
    """Lines of a table, columns two blanks apart.

    Args:
        rows: Cells. The last cell of a row that is shorter than the longest one runs on over the missing columns.
        indent: Put before each line.
        left: How many columns stand to the left; the others are numbers and stand to the right.
    """
    columns = max(map(len, rows))
    full = [row for row in rows if len(row) == columns]
    heads = [row for row in rows if len(row) < columns]
    widths = [max(len(row[column]) for row in full) for column in range(columns)]
    widths[0] = max(widths[0], *(len(row[0]) for row in heads), 0)
    for row in rows:
        last = len(row) - 1 if len(row) < columns else columns
        cells = [
            cell if column == last else cell.ljust(widths[column]) if column < left else cell.rjust(widths[column])
            for column, cell in enumerate(row)
        ]
        yield (indent + "  ".join(cells)).rstrip()


def _heading(report: Report) -> str:
    machine, settings = report.machine, report.settings
    backends = ", ".join(
        f"{name} {'yes' if state == 'available' else 'no'}" for name, state in machine.backends.items()
    )
    peaks = (
        f"multiply-add {machine.peaks.multiply_add:,.0f} GFLOP/s, read {machine.peaks.read:.1f} GB/s, copy "
        f"{machine.peaks.copy:.1f} GB/s (plain torch, same process), huge pages {'on' if machine.huge_pages else 'off'}"
    )
    model = (
        f"{settings['layers']} layers, width {settings['width']}, {settings['heads']} heads, vocabulary "
        f"{settings['vocabulary']:,}, {settings['dtype']}, AdamW"
    )
    lines = [
        ("device", f"{machine.device}, {machine.threads} threads, {machine.platform}"),
        *busy(machine),
        ("kernels", f"{machine.instruction_set}; backends: {backends}"),
        (
            "versions",
            f"maskops {machine.maskops} ({machine.commit}), torch {machine.torch}, Python {machine.python}",
        ),
        ("peaks", peaks),
        ("model", model),
        ("tokenizer", str(report.documents["tokenizer"])),
        (
            "columns",
            "tokens/s: real tokens, padding not counted, median of interleaved rounds; ±: half the distance of the",
        ),
        ("", "quartiles; speed-up: over the best variant without maskops; error: largest of any output or gradient"),
        ("", "against float64, 1 = plain torch's own and a few roundings; above 2 a row prints WRONG and no speed"),
        ("command", f"{machine.command} ({report.mode} run, {report.seconds:.0f} s)"),
    ]
    return "\n".join(["maskops bench text", *aligned(lines, left=2)])


def _documents(report: Report) -> str:
    documents = report.documents
    lines = f"""\
  {documents["count"]:,} {documents["source"]},
  {documents["tokens"]:,} tokens; length: median {documents["median"]}, 95 % up to {documents["p95"]}, cut at \
{documents["longest"]}
  {documents["coverage"]:.1%} of the text is one of the {report.settings["vocabulary"] - 1:,} most frequent tokens, \
the rest shares one id
  timed: {documents["timed_count"]} of them, {documents["timed_tokens"]:,} real tokens, in micro-batches of \
{report.settings["batch_size"]} documents"""
    rows = [["What padding wastes", "fill", "padding"]]
    rows += [
        [f"{waste.layout}, {waste.batch_size} documents a batch", f"{waste.fill:.1%}", f"{1 - waste.fill:.1%}"]
        for waste in report.waste
    ]
    return "\n".join(["Documents", lines, "", *aligned(rows, indent="")])


def _label(row: Row) -> str:
    return f"{row.name}  ({HABIT})" if row.habit else row.name


def _speed(row: Row) -> list[str]:
    if row.timing is None or row.tokens_per_second is None:
        return ["-", "-", "-"]
    speedup = "-" if row.speedup is None else f"{row.speedup:.2f}x"
    spread = f"{row.timing.spread:.0%}" if len(row.timing.seconds) > 1 else "n=1"
    return [f"{row.tokens_per_second:,.0f}", spread, speedup]


def _job(tables: Sequence[Table]) -> str:
    modes = ["forward + backward" if table.backward else "forward" for table in tables]
    lines = [[tables[0].title, *(["tokens/s", "±", "speed-up"] * len(tables)), "error"]]
    for entries in zip(*(table.rows for table in tables), strict=True):
        problem = next((row.problem for row in entries if row.problem is not None), None)
        if problem is not None:
            lines.append([_label(entries[0]), problem])
            continue
        error = max(row.error or 0.0 for row in entries)
        lines.append([_label(entries[0]), *(cell for row in entries for cell in _speed(row)), f"{error:.2f}"])
    text = list(aligned(lines, indent=""))
    # The group heads stand over their three columns, which end where the speed-ups of the second line do.
    ends = [match.end() for match in re.finditer("speed-up", text[0])]
    head = ""
    for mode, end in zip(modes, ends, strict=True):
        head += mode.rjust(end - len(head))
    notes = [
        f"  {mode}: best without maskops: {table.baseline}{_summary(table)}"
        for mode, table in zip(modes, tables, strict=True)
    ]
    if tables[0].loss is not None:
        notes.append(f"  the loss of every row: {tables[0].loss:.6g}")
    return "\n".join([head, *text, *notes])


def _summary(table: Table) -> str:
    """How the fastest row of maskops compares with the best and with the habit."""
    ours = [row for row in table.rows if row.ours and row.timing is not None]
    habit = next((row for row in table.rows if row.habit and row.timing is not None), None)
    if not ours:
        return ""
    best = min(ours, key=lambda row: row.timing.median if row.timing is not None else float("inf"))
    text = "" if best.speedup is None else f"\n    {best.name}: {best.speedup:.2f}x that"
    if habit is not None and habit.timing is not None and best.timing is not None:
        text += f", {best.timing.speedup_over(habit.timing):.2f}x {HABIT}"
    return text


def shares_table(shares: Sequence[Shares], measured: str, title: str = "Where a training step goes") -> str:
    """Where the time goes, a line a row; `measured` says of what."""
    rows = [[title, "GEMM", "attention", "loss", "rest", "free kernels"]]
    rows += [
        [
            entry.name,
            f"{entry.gemm:.0%}",
            f"{entry.attention:.0%}",
            f"{entry.loss:.0%}",
            f"{entry.rest:.0%}",
            f"{entry.ceiling:.2f}x",
        ]
        for entry in shares
    ]
    note = (
        "  rest: data movement (norms, activations, copies, gathers, optimizer) and Python; free kernels: the most\n"
        f"  that the row could gain if attention and loss took no time; {measured}"
    )
    return "\n".join([*aligned(rows, indent=""), note])


def _sweep(points: Sequence[SweepPoint]) -> str:
    names = [row.name for row in points[0].table.rows]
    rows = [["Training step by fill factor, speed-up", *(f"{point.fill:.2f}" for point in points)]]
    for index, name in enumerate(names):
        cells = []
        for point in points:
            row = point.table.rows[index]
            cells.append("-" if row.speedup is None else f"{row.speedup:.2f}x")
        rows.append([name, *cells])
    count, longest = len(points[0].lengths), max(points[0].lengths)
    note = (
        f"  real text cut to {count} chosen lengths, longest {longest}; 1.00x is the best without maskops at that fill"
    )
    return "\n".join([*aligned(rows, indent=""), note])
