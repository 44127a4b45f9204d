"""One picture of a run on a model: speeds beside errors, and where the time of a batch goes."""

from pathlib import Path

from maskops.cli.bench.chart import FAINT, HABIT_COLOUR, INK, OURS, PADDING, THEIRS, bare, heading, number
from maskops.cli.bench.models.report import TITLES, ModelReport
from maskops.cli.bench.report import HABIT, busy

_PARTS = (("gemm", "matrix products"), ("attention", "attention"), ("loss", "loss"), ("rest", "other"))
_PART_COLOURS = {"gemm": OURS[1], "attention": OURS[0], "loss": HABIT_COLOUR, "rest": PADDING}


def draw(report: ModelReport, path: Path) -> None:
    """Draws the report as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 4.2), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, left=0.2, right=0.97, top=0.74, bottom=0.14, wspace=0.08)
    speeds, parts = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    rows = list(reversed(report.rows))
    longest = max((row.tokens_per_second or 0.0 for row in rows), default=0.0) or 1.0
    ours = iter(OURS * len(rows))
    colours = {row.name: next(ours) if row.ours else HABIT_COLOUR if row.habit else THEIRS for row in report.rows}
    for height, row in enumerate(rows):
        speed = row.tokens_per_second
        text = (row.problem or "").split(":")[0]
        if speed is not None:
            speeds.barh(height, speed, color=colours[row.name], height=0.62)
            text = f"{number(speed)}  {row.speedup:.2f}×" if row.speedup is not None else number(speed)
        weight = "bold" if row.ours else "normal"
        place = (speed or 0.0) + 0.03 * longest
        speeds.text(place, height, text, va="center", fontsize=8.5, color=INK, weight=weight)
    speeds.set_xlim(0, 1.4 * longest)
    names = [f"{row.name}\n({HABIT})" if row.habit else row.name for row in rows]
    speeds.set_yticks(range(len(rows)), names)
    shares = {entry.name: entry for entry in report.shares}
    for height, row in enumerate(rows):
        left = 0.0
        for part, _ in _PARTS if row.name in shares else ():
            share = max(getattr(shares[row.name], part), 0.0)
            parts.barh(height, share, left=left, color=_PART_COLOURS[part], height=0.62)
            if share > 0.05:
                colour = INK if part == "rest" else "white"
                parts.text(left + share / 2, height, f"{share:.0%}", va="center", ha="center", fontsize=8, color=colour)
            left += share
    parts.set_yticks([])
    parts.set_xlim(0, 1)
    handles = [parts.barh([0], [0], color=_PART_COLOURS[part]) for part, _ in _PARTS]
    parts.legend(
        handles, [text for _, text in _PARTS], loc="lower left", bbox_to_anchor=(0, -0.16), ncols=4, frameon=False,
        fontsize=8, labelcolor=INK,
    )  # fmt: skip
    for axes in (speeds, parts):
        axes.set_xticks([])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        bare(axes, keep=("left",))
        axes.spines["left"].set_color(FAINT)
    heading(speeds, TITLES[report.model["task"]], "real tokens per second, × of the best row without maskops")
    heading(parts, "Where the time of a batch goes", "attention and loss are what kernels can take away")
    machine = report.machine
    warning = "".join(f" · {label}: {text}" for label, text in busy(machine))
    figure.text(0.012, 0.93, f"{report.model['name']} on {report.documents['count']} docstrings", fontsize=14,
                weight="bold", color=INK)  # fmt: skip
    figure.text(
        0.012,
        0.02,
        f"{machine.device}, {machine.threads} threads, {report.settings['dtype']} · torch {machine.torch}, "
        f"transformers {report.settings['transformers']}, maskops {machine.maskops} ({machine.commit}){warning}",
        fontsize=7.5,
        color=THEIRS,
    )
    figure.savefig(path)
