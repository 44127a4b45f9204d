"""One picture of the table: how many times the speed of each peer, what was wanted, and the share of the limits."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from maskops.cli.bench.chart import FAINT, INK, OURS, PADDING, THEIRS, bare, heading
from maskops.cli.bench.cpu.contest import MODES
from maskops.cli.bench.cpu.measure import Outcome, Reached, Row
from maskops.cli.bench.cpu.report import CpuReport
from maskops.cli.bench.report import busy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MISSED = "#c05a3e"
_LEAST, _MOST = 0.11, 40.0
"""Ratios beyond are drawn as far as this."""

_WIDTH, _ROW, _ABOVE, _BELOW = 10.4, 0.185, 1.2, 0.75
"""Inches: of the picture, of a bar, over the bars and under them."""

_SPEEDS, _SHARES = (0.435, 0.77), (0.785, 0.985)
"""Where the columns begin and end, as shares of the width."""


def draw(report: CpuReport, path: Path) -> None:
    """Draws the report as a PNG: a bar for each goal, so that the whole table is in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [
        (f"{group}, {MODES[mode]}", list(found))
        for (group, mode), found in groupby(report.outcomes(), key=lambda pair: (pair[0].group, pair[0].mode))
    ]
    rows = sum(1.5 + sum(len(outcome.reached) for outcome, _ in found) for _, found in groups)
    inches = _ABOVE + _BELOW + _ROW * max(rows, 6.0)
    figure = Figure(figsize=(_WIDTH, inches), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    bottom, height = _BELOW / inches, 1 - (_ABOVE + _BELOW) / inches
    speeds, shares = (figure.add_axes((left, bottom, right - left, height)) for left, right in (_SPEEDS, _SHARES))
    place = 0.0
    for title, found in groups:
        _write(speeds, -_SPEEDS[0] + 0.012, place + 0.25, title, weight="bold")
        place += 1.1
        for outcome, row in found:
            _write(speeds, -_SPEEDS[0] + 0.012, place, outcome.line.name)
            _share(shares, place, outcome, row)
            for reached in outcome.reached:
                _ratio(speeds, place, reached, row)
                place += 1.0
        place += 0.4
    speeds.set_xscale("log", base=2)
    ticks = {0.125: "⅛×", 0.25: "¼×", 0.5: "½×", **{2**power: f"{2**power}×" for power in range(6)}}
    speeds.set_xticks(list(ticks), list(ticks.values()))
    speeds.set_xticks([], minor=True)
    speeds.set_xlim(_LEAST, _MOST * 2.0)
    shares.set_xlim(0, 1.15)
    shares.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    for axes in (speeds, shares):
        axes.axvline(1.0, color=FAINT, linewidth=1, zorder=0)
        axes.set_yticks([])
        axes.set_ylim(max(rows, 6.0) - 0.4, -0.9)
        bare(axes)
    heading(speeds, "Times the speed of the peer", "line: at least; dotted: aim; red: below the least")
    heading(shares, "Share of the limit", "dotted: aim")
    machine = report.machine
    for words, above, size, colour, weight in (
        (f"maskops {machine.maskops} on a processor, kernel by kernel", 1 - 0.4 / inches, 14, INK, "bold"),
        (f"{machine.device}, {machine.threads} threads, {machine.instruction_set}", 0.3 / inches, 8, THEIRS, "normal"),
        (
            f"torch {machine.torch}, maskops {machine.commit}, {report.mode} run · medians of interleaved rounds "
            f"while the limits held still{''.join(f' · {label}: {text}' for label, text in busy(machine))}",
            0.12 / inches,
            8,
            THEIRS,
            "normal",
        ),
    ):
        figure.text(0.012, above, words, fontsize=size, color=colour, weight=weight)
    figure.savefig(path)


def _write(axes: Axes, left: float, place: float, text: str, **keywords: str) -> None:
    """Words beside the columns; `left` is a share of the picture's width, from the left end of the first column."""
    across = left / (_SPEEDS[1] - _SPEEDS[0])
    keywords = {"color": INK, "ha": "left", **keywords}
    axes.text(across, place, text, fontsize=8.5, va="center", transform=axes.get_yaxis_transform(), **keywords)  # type: ignore[arg-type]


def _ratio(axes: Axes, place: float, reached: Reached, row: Row) -> None:
    """A bar from 1 on, with marks at what was wanted; or why there is none."""
    _write(axes, -0.01, place, reached.peer or reached.goal.peers[0], ha="right", color=THEIRS)
    if reached.ratio is None:
        words = "not measured" if row.problem is None else row.problem.partition(":")[0]
        axes.text(1.1, place, words, va="center", fontsize=8.5, color=THEIRS)
        return
    end, goal = min(max(reached.ratio, _LEAST), _MOST), reached.goal
    axes.barh(place, end - 1.0, left=1.0, height=0.66, color=OURS[0] if reached.met else _MISSED)
    for value, style in ((goal.at_least, "-"), (goal.aim, ":")):
        if value is not None:
            axes.plot([value] * 2, [place - 0.44, place + 0.44], color=INK, linewidth=1.3, linestyle=style)
    behind = max(end, goal.aim or goal.at_least, 1.0) * 1.08
    axes.text(behind, place, f"{reached.ratio:.2f}×", va="center", fontsize=8.5, color=INK)


def _share(axes: Axes, place: float, outcome: Outcome, row: Row) -> None:
    """A bar with the name of the limit in it, on the first line of the outcome."""
    if outcome.share is None or row.timing is None:
        return
    axes.barh(place, min(outcome.share, 1.1), height=0.66, color=PADDING)
    words = f"{outcome.share:.0%} {outcome.line.limit}"
    axes.text(0.02, place, words, va="center", fontsize=8.5, color=INK)
    if outcome.line.share is not None:
        aim = [outcome.line.share] * 2
        axes.plot(aim, [place - 0.44, place + 0.44], color=INK, linewidth=1.3, linestyle=":")
