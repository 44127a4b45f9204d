"""The picture of a padding report; importing this needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maskops.data.report import PaddingReport, quantity

_INK = "#1f2933"
_FAINT = "#7b8794"
_PADDING = "#e4e7eb"
_REAL = "#2f6fb0"


def formats() -> list[str]:
    """Suffixes of pictures that can be drawn."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())


def draw(report: PaddingReport, path: Path) -> None:
    """Draws a bar for each strategy: real places and padding, with the cost of its attention beside them."""
    rows = list(reversed(report.strategies))
    below, bars, above = 0.4, 0.36 * len(rows), 0.8  # inches
    height_of_all = below + bars + above
    figure = Figure(figsize=(11.0, height_of_all), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.27, below / height_of_all, 0.70, bars / height_of_all))
    widest = max(row.places for row in rows)
    least = min(row.attention_flops for row in rows) or 1
    for height, row in enumerate(rows):
        axes.barh(height, row.places, color=_PADDING, height=0.62)
        axes.barh(height, report.tokens, color=_REAL, height=0.62)
        note = f"{row.fill:.1%} filled, attention {row.attention_flops / least:.3g}×"
        inside = row.places > 0.6 * widest
        place = row.places - 0.01 * widest if inside else row.places + 0.01 * widest
        axes.text(place, height, note, va="center", ha="right" if inside else "left", fontsize=8.5, color=_INK)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 1.02 * widest)
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value))
    axes.tick_params(length=0, colors=_INK, labelsize=8.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.text(0.012, 1 - 0.3 / height_of_all, "What padding costs", fontsize=13, weight="bold", color=_INK)
    figure.text(
        0.012,
        1 - 0.55 / height_of_all,
        f"{report.documents:,} documents, {report.tokens:,} tokens; blue: places that hold one, grey: padding; "
        f"batches of {report.batch_size} documents, rows of {report.capacity:,}",
        fontsize=8.5,
        color=_FAINT,
    )
    figure.savefig(path)
