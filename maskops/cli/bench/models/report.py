"""What a run on a model found, as a table for people and as JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskops.cli.bench.machine import Machine
from maskops.cli.bench.measure import Shares
from maskops.cli.bench.models.measure import ModelRow
from maskops.cli.bench.report import HABIT, SCHEMA, aligned, busy, shares_table, to_plain

TITLES = {"embedding": "Sentence embeddings, forward", "language": "Language-model training step, forward + backward"}
_COMPARED = {"cosine": "1 - cosine", "loss": "loss, nats", "gradient": "gradient"}


@dataclass(frozen=True)
class ModelReport:
    """Everything that `maskops bench text --model` found.

    Attributes:
        mode: How much was asked for.
        machine: Where it ran.
        model: Name, origin, sizes and task.
        documents: Counts and lengths.
        settings: Batches, repeats, dtype, seed.
        rows: One a way.
        baseline: Name of the best row without maskops.
        own_error: The model's own, on one document at a time.
        loss: Of the checked documents, in float64; None for embeddings.
        shares: Where the time of one batch goes.
        notes: What could not be measured, and why.
        seconds: That the whole run took.
    """

    mode: str
    machine: Machine
    model: dict[str, Any]
    documents: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[ModelRow, ...]
    baseline: str | None
    own_error: dict[str, float]
    loss: float | None
    shares: tuple[Shares, ...]
    notes: tuple[str, ...]
    seconds: float

    def problems(self) -> list[str]:
        """What makes a run a failure: a wrong result of anybody, a refusal of maskops."""
        return [
            f"{row.name}: {row.problem}"
            for row in self.rows
            if row.problem is not None and (row.ours or row.problem.startswith("WRONG"))
        ]

    def to_json(self) -> str:
        """The report with medians and spreads beside the raw rounds."""
        return json.dumps({"schema": SCHEMA, **to_plain(self)}, indent=1) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json()` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")


def render(report: ModelReport) -> str:
    """The whole report as text."""
    blocks = [_heading(report), _rows(report.rows, report)]
    if report.shares:
        blocks.append(shares_table(report.shares, "one profiled batch each", "Where the time of a batch goes"))
    blocks += [f"note: {note}" for note in report.notes]
    problems = report.problems()
    if problems:
        blocks.append("\n".join(["PROBLEMS", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(blocks) + "\n"


def _heading(report: ModelReport) -> str:
    machine, model, documents, settings = report.machine, report.model, report.documents, report.settings
    origin = model["origin"]
    passes = "" if settings["positions"] is None else f", at most {settings['positions']:,} positions a pass"
    lines = [
        *busy(machine),
        ("device", f"{machine.device}, {machine.threads} threads, {machine.platform}, {machine.instruction_set}"),
        (
            "versions",
            f"maskops {machine.maskops} ({machine.commit}), torch {machine.torch}, transformers "
            f"{settings['transformers']}, Python {machine.python}",
        ),
        ("peaks", f"multiply-add {machine.peaks.multiply_add:,.0f} GFLOP/s, copy {machine.peaks.copy:.1f} GB/s"),
        (
            "model",
            f"{model['name']}: {model['architecture']}, {model['layers']} layers, width {model['width']}, "
            f"{model['parameters'] / 1e6:,.1f} M parameters, {settings['dtype']}",
        ),
        ("from", "; ".join(str(origin[key]) for key in ("package", "folder", "name", "licence") if key in origin)),
        ("SHA-256", ", ".join(f"{name} {digest[:16]}" for name, digest in origin.get("sha256", {}).items()) or "-"),
        (
            "documents",
            f"{documents['count']} {documents['source']}, in arrival order, {documents['tokens']:,} tokens of its own "
            f"tokenizer;",
        ),
        (
            "",
            f"length: median {documents['median']}, 95 % up to {documents['p95']}, longest {documents['longest']} "
            f"(cut at {settings['max_length']})",
        ),
        ("work", f"batches of {settings['batch_size']} documents{passes}; {settings['repeats']} repeats"),
        (
            "columns",
            "tokens/s: real tokens, median of repeats, the rows in turn batch by batch; ±: half the distance of",
        ),
        ("", "the quartiles; speed-up: over the best row without maskops; memory: peak of a pass over the weights;"),
        ("", f"errors: against one document at a time in float64, {settings['checked']} documents; {_own(report)}"),
        ("command", f"{machine.command} ({report.mode} run, {report.seconds:.0f} s)"),
    ]
    return "\n".join(["maskops bench text --model", *aligned(lines, left=2)])


def _own(report: ModelReport) -> str:
    own = ", ".join(f"{_COMPARED[name]} {error:.1e}" for name, error in report.own_error.items())
    return f"the model's own: {own}"


def _rows(rows: Sequence[ModelRow], report: ModelReport) -> str:
    compared = list(report.own_error)
    head = [TITLES[report.model["task"]], "tokens/s", "±", "speed-up", "fill", "passes", "memory"]
    lines = [[*head, *(_COMPARED[name] for name in compared)]]
    for row in rows:
        label = f"{row.name}  ({HABIT})" if row.habit else row.name
        if row.problem is not None or row.timing is None or row.errors is None:
            lines.append([label, row.problem or "-"])
            continue
        spread = f"{row.timing.spread:.0%}" if len(row.timing.seconds) > 1 else "n=1"
        lines.append(
            [
                label,
                f"{row.tokens_per_second:,.0f}",
                spread,
                "-" if row.speedup is None else f"{row.speedup:.2f}x",
                f"{row.fill:.0%}",
                f"{row.passes}",
                "-" if row.memory is None else f"{row.memory / 2**30:.2f} GiB",
                *(f"{row.errors[name]:.1e}" for name in compared),
            ]
        )
    notes = [f"  best without maskops: {report.baseline or 'none'}"]
    shares = next((shares for shares in report.shares if shares.name == report.baseline), None)
    if shares is not None:
        notes.append(f"  with attention and loss for nothing it would be {shares.ceiling:.2f}x as fast")
    if report.loss is not None:
        notes.append(f"  loss of the checked documents: {report.loss:.6f} nats a token")
    return "\n".join([*aligned(lines, indent=""), *notes])
