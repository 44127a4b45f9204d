"""One picture of a run: the speeds of a training step, one batch with its spans, the speed-up over the fill factor."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskops.cli.bench.measure import Row
from maskops.cli.bench.report import HABIT, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f2933"
FAINT = "#9aa5b1"
PADDING = "#e4e7eb"
THEIRS = "#7b8794"
HABIT_COLOUR = "#cf8a7a"
OURS = ("#2f6fb0", "#0b3d6e")
_BEST = "#3e4c59"
_COLUMNS = (("attention", "attention alone"), ("loss", "cross-entropy alone"), ("step", "training step"))


def available() -> str | None:
    """None if a chart can be drawn, else the reason why not with the command that helps."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed: pip install matplotlib (or the extra: torch-maskops[bench])"
    return None


def draw(report: Report, path: Path) -> None:
    """Draws the report as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.4, 5.4), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    left, middle, right = 0.11, 0.545, 0.765
    columns = figure.add_gridspec(1, 3, left=left, right=middle - 0.02, top=0.76, bottom=0.13, wspace=0.06)
    _speeds([figure.add_subplot(columns[0, column]) for column in range(3)], report)
    batch = figure.add_gridspec(
        2, 1, left=middle, right=right - 0.045, top=0.84, bottom=0.15, hspace=0.5, height_ratios=(0.34, 0.66)
    )
    _padded_batch(figure.add_subplot(batch[0]), report.picture)
    _spans(figure.add_subplot(batch[1]), report.picture)
    _fill_factor(
        figure.add_subplot(figure.add_gridspec(1, 1, left=right, right=0.985, top=0.76, bottom=0.15)[0]), report
    )
    machine, settings = report.machine, report.settings
    figure.text(
        0.012, 0.945, "Training on real text without computing the padding", fontsize=15, weight="bold", color=INK
    )
    figure.text(
        0.012,
        0.03,
        f"{machine.device}, {machine.threads} threads · {settings['dtype']}, {settings['layers']} layers, width "
        f"{settings['width']}, {settings['heads']} heads, vocabulary {settings['vocabulary']:,} · "
        f"{report.documents['source']}, tokenizer {report.documents['tokenizer']} · "
        f"torch {machine.torch}, maskops {machine.maskops} ({machine.commit}) · medians of interleaved rounds",
        fontsize=7.5,
        color=THEIRS,
    )
    figure.savefig(path)


def bare(axes: "Axes", *, keep: Sequence[str] = ()) -> None:
    """Takes frame and ticks away, but for these sides of the frame."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)
    axes.tick_params(length=0, colors=INK, labelsize=8.5)


def heading(axes: "Axes", text: str, note: str = "", above: float = 0.0) -> None:
    """A heading with a note of any number of lines below it, `above` points over the axes."""
    lines = note.count("\n") + 1 if note else 0
    for words, height, size, colour, weight in (
        (text, above + 8 + 12 * lines, 10.5, INK, "bold"),
        (note, above + 6, 8, THEIRS, "normal"),
    ):
        axes.annotate(
            words,
            (0, 1),
            (0, height),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=size,
            color=colour,
            weight=weight,
        )


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    ours = iter(OURS * len(rows))
    return {row.name: next(ours) if row.ours else HABIT_COLOUR if row.habit else THEIRS for row in rows}


def _speeds(panels: "Sequence[Axes]", report: Report) -> None:
    """One column of bars a job; the rows are the variants of the training step."""
    names = [row.name for row in report.table("step", True).rows]
    colours = _colours(report.table("step", True).rows)
    for axes, (job, title) in zip(panels, _COLUMNS, strict=True):
        table = report.table(job, True)
        found = {row.name: row for row in table.rows}
        longest = max((row.tokens_per_second or 0.0 for row in table.rows), default=0.0) or 1.0
        for height, name in enumerate(reversed(names)):
            row = found.get(name)
            if row is None:
                continue
            speed = row.tokens_per_second
            text = number(speed) if speed is not None else (row.problem or "").split(":")[0]
            if speed is not None:
                axes.barh(height, speed, color=colours[name], height=0.62)
                text += "" if row.speedup is None else f"  {row.speedup:.2f}×"
            axes.text(
                (speed or 0.0) + 0.03 * longest,
                height,
                text,
                va="center",
                fontsize=8.5,
                color=INK if speed is not None else HABIT_COLOUR,
                weight="bold" if row.ours else "normal",
            )
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(0, 1.75 * longest)
        axes.set_xticks([])
        axes.set_yticks([])
        bare(axes, keep=("left",))
        axes.set_title(title, loc="left", fontsize=8.5, color=INK, pad=5)
    rows = list(reversed(report.table("step", True).rows))
    panels[0].set_yticks(range(len(rows)), [_folded(row) for row in rows])
    waste = next((waste for waste in report.waste if waste.layout.startswith("random")), None)
    filled = "" if waste is None else f"; random batches of {waste.batch_size} are {1 - waste.fill:.0%} padding"
    heading(
        panels[0], "Real tokens per second, forward and backward", f"× of the best without maskops{filled}", above=14
    )


def number(speed: float) -> str:
    """A speed in thousands."""
    return f"{speed / 1000:.1f} k" if speed < 99_950 else f"{speed / 1000:.0f} k"


def _folded(row: Row) -> str:
    """The label in two lines, broken at the blank nearest to its middle."""
    if row.habit:
        return f"{row.name}\n({HABIT})"
    if len(row.name) <= 18:
        return row.name
    blanks = [place for place, letter in enumerate(row.name) if letter == " "]
    middle = min(blanks, key=lambda place: abs(place - len(row.name) / 2))
    return f"{row.name[:middle]}\n{row.name[middle + 1 :]}"


def _padded_batch(axes: "Axes", lengths: Sequence[int]) -> None:
    longest = max(lengths)
    for row, length in enumerate(lengths):
        axes.barh(row, longest, color=PADDING, height=0.8)
        axes.barh(row, length, color=_shade(row, len(lengths)), height=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest)
    axes.set_yticks([])
    axes.set_xticks([0, longest])
    bare(axes)
    filled = sum(lengths) / (longest * len(lengths))
    heading(axes, f"A padded batch: {1 - filled:.0%} padding")


def _spans(axes: "Axes", lengths: Sequence[int]) -> None:
    """The packed batch: for each query row the keys from its start to its end."""
    first = 0
    for row, length in enumerate(lengths):
        rows = range(first, first + length + 1)
        axes.fill_betweenx(list(rows), first, list(rows), color=_shade(row, len(lengths)), linewidth=0)
        axes.plot([first, first], [first, first + length], color=INK, linewidth=0.5)
        first += length
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    padded = len(lengths) * max(lengths) ** 2
    axes.set_xlim(0, first)
    axes.set_ylim(first, 0)
    axes.set_aspect("equal", anchor="W")
    axes.set_xticks([0, first])
    axes.set_yticks([0, first])
    axes.set_xlabel("keys", fontsize=8.5, color=INK, labelpad=-6)
    axes.set_ylabel("query rows", fontsize=8.5, color=INK, labelpad=-14)
    bare(axes, keep=("left", "bottom"))
    heading(axes, "The same, packed: its spans")
    axes.annotate(
        f"{pairs / 1e3:,.0f} k pairs\ninstead of\n{padded / 1e3:,.0f} k",
        (1.0, 0.97),
        xycoords="axes fraction",
        fontsize=8.5,
        color=INK,
        va="top",
        ha="right",
    )


def _shade(row: int, rows: int) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("documents", ["#0b3d6e", "#2f6fb0", "#7db2dd"])(row / max(rows - 1, 1))


def _fill_factor(axes: "Axes", report: Report) -> None:
    if not report.sweep:
        axes.set_axis_off()
        return
    fills = [point.fill for point in report.sweep]
    rows = report.sweep[0].table.rows
    colours = _colours(rows)
    drawn = [index for index, row in enumerate(rows) if row.ours or row.habit]
    for index in drawn:
        points = [(fill, point.table.rows[index].speedup) for fill, point in zip(fills, report.sweep, strict=True)]
        line = [(fill, speedup) for fill, speedup in points if speedup is not None]
        if not line:
            continue
        row = rows[index]
        axes.plot(*zip(*line, strict=True), color=colours[row.name], marker="o", markersize=4.5, linewidth=2)
    axes.axhline(1.0, color=_BEST, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(1.0, 1.0, "break-even", fontsize=8, color=_BEST, ha="right", va="bottom")
    axes.set_ylim(bottom=0)
    axes.set_xlim(min(fills) - 0.03, max(fills) + 0.03)
    axes.set_xticks(fills, [f"{fill:g}" for fill in fills])
    axes.yaxis.grid(True, color=PADDING, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("fill factor: share of the padded batch that is text", fontsize=8.5, color=INK)
    names = [f"{rows[index].name} ({HABIT})" if rows[index].habit else rows[index].name for index in drawn]
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    axes.legend(lines, names, fontsize=8.5, frameon=False, labelcolor=INK)
    bare(axes, keep=("bottom",))
    count, longest = len(report.sweep[0].lengths), max(report.sweep[0].lengths)
    heading(
        axes,
        "Speed-up over the fill factor",
        f"training step, × of the best variant without maskops;\n"
        f"real text cut to {count} chosen lengths of up to {longest} tokens",
    )
