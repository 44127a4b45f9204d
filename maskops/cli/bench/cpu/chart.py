"""One picture of the table: how many times the speed of each peer, what was wanted, and the share of the limits."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from maskops.cli.bench.chart import FAINT, INK, OURS, PADDING, THEIRS, bare, heading
from maskops.cli.bench.cpu.contest import MODES
from maskops.cli.bench.cpu.report import CpuReport
from maskops.cli.bench.report import busy

_MISSED = "#c05a3e"
_MOST = 40.0
"""Ratios beyond are drawn as long as this."""


def draw(report: CpuReport, path: Path) -> None:
    """Draws the report as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Calls of tiny shapes, whose goals lie below 1, are a table, not a picture of kernels.
    lines = [(outcome, row) for outcome, row in report.outcomes() if row.timing is not None and outcome.line.limit]
    bars = [(outcome, reached) for outcome, _ in lines for reached in outcome.reached if reached.ratio is not None]
    heights, labels, height = [], [], 0.0
    for (_, _), found in groupby(bars, key=lambda bar: (bar[0].group, bar[0].mode)):
        for _ in found:
            heights.append(height)
            height += 1.0
        height += 1.4  # room for the heading of the next group
    figure = Figure(figsize=(12.0, 1.6 + 0.21 * max(height, 6.0)), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    inches = figure.get_figheight()
    grid = figure.add_gridspec(
        1, 2, left=0.3, right=0.97, top=1 - 1.15 / inches, bottom=0.45 / inches, wspace=0.06, width_ratios=(0.66, 0.34)
    )
    speeds, shares = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    shown, headed = None, None
    for place, (outcome, reached) in zip(heights, bars, strict=True):
        if (outcome.group, outcome.mode) != headed:
            headed = outcome.group, outcome.mode
            speeds.text(0, place - 0.75, f"{outcome.group}, {MODES[outcome.mode]}", fontsize=8.5, weight="bold",
                        color=INK, ha="right", va="center", transform=speeds.get_yaxis_transform())  # fmt: skip
        assert reached.ratio is not None
        length, goal = min(reached.ratio, _MOST), reached.goal
        speeds.barh(place, length - 1.0, left=1.0, height=0.62, color=OURS[0] if reached.met else _MISSED)
        for value, style in ((goal.at_least, "-"), (goal.aim, ":")):
            if value is not None:
                speeds.plot([value] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.2, linestyle=style)
        speeds.text(max(length, goal.aim or goal.at_least, 1.0) * 1.04, place, f"{reached.ratio:.2f}×", va="center",
                    fontsize=7.5, color=INK)  # fmt: skip
        is_first = outcome is not shown
        labels.append(f"{outcome.line.name}  against {reached.peer}" if is_first else f"against {reached.peer}")
        if is_first and outcome.share is not None:
            shares.barh(place, min(outcome.share, 1.1), height=0.62, color=PADDING)
            shares.text(0.02, place, f"{outcome.share:.0%} {outcome.line.limit}", va="center", fontsize=7.5, color=INK)
            if outcome.line.share is not None:
                aim = [outcome.line.share] * 2
                shares.plot(aim, [place - 0.42, place + 0.42], color=INK, linewidth=1.2, linestyle=":")
        shown = outcome
    speeds.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32]
    speeds.set_xticks(ticks, [f"{tick}×" for tick in ticks])
    speeds.set_xticks([], minor=True)
    speeds.set_xlim(0.7, _MOST * 1.6)
    speeds.axvline(1.0, color=FAINT, linewidth=1)
    speeds.set_yticks(heights, labels)
    shares.set_yticks([])
    shares.set_xlim(0, 1.15)
    shares.axvline(1.0, color=FAINT, linewidth=1)
    shares.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    for axes in (speeds, shares):
        axes.set_ylim(max(height, 6.0) - 1.4, -1.4)
        bare(axes)
        axes.tick_params(axis="y", labelsize=7.5)
    machine = report.machine
    heading(speeds, "Times the speed of the peer", "line: at least; dotted: aim; red: missed")
    heading(shares, "Share of the machine's limit", "dotted: aim")
    figure.text(0.012, 1 - 0.42 / inches, "maskops on a processor, kernel by kernel", fontsize=14, weight="bold",
                color=INK)  # fmt: skip
    warning = "".join(f" · {label}: {text}" for label, text in busy(machine))
    figure.text(
        0.012,
        0.12 / inches,
        f"{machine.device}, {machine.threads} threads, {machine.instruction_set} · torch {machine.torch}, maskops "
        f"{machine.maskops} ({machine.commit}) · medians of interleaved rounds{warning}",
        fontsize=7.5,
        color=THEIRS,
    )
    figure.savefig(path)
