"""`python -m maskops bench train`: a small model trained to a fixed loss, padded stock against packed maskops.

The same weights at the start, the same documents in the same order, the same optimizer: the curves over steps have to
agree, and what differs is how long they take.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskops.cli.bench import chart, corpus, machine, output
from maskops.cli.bench.batches import Batch, collate
from maskops.cli.bench.machine import Machine
from maskops.cli.bench.models.ways import PLAIN, WAYS, Runner, Way
from maskops.cli.bench.others import Others
from maskops.cli.bench.progress import Progress
from maskops.cli.bench.report import HABIT, SCHEMA, aligned, busy, to_plain
from maskops.cli.bench.timing import once

SAME_CURVE = 0.02
"""How far two curves may be apart, in nats: rounding differs, and training multiplies differences."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and until when.

    Attributes:
        vocabulary, width, layers, heads, key_heads: The model, a Llama of transformers with random weights.
        batch_size, min_length, max_length: Documents of a step, and their lengths in tokens.
        characters: How much text is read; it is gone through again when it ends.
        learning_rate: Of AdamW, reached after `warm_up` steps and kept.
        until: Loss in nats; training ends when the mean of the last `window` steps is below it.
        steps: The most steps.
    """

    vocabulary: int = 4096
    width: int = 128
    layers: int = 2
    heads: int = 4
    key_heads: int = 2
    batch_size: int = 32
    min_length: int = 8
    max_length: int = 256
    characters: int = 1_000_000
    learning_rate: float = 3e-3
    warm_up: int = 10
    until: float = 6.2
    window: int = 8
    steps: int = 150


RECIPES = {"default": Recipe(), "quick": Recipe(until=6.65, steps=60), "full": Recipe(until=5.5, steps=600)}


@dataclass(frozen=True)
class Curve:
    """One way of training.

    Attributes:
        name, ours, habit: Of the way.
        losses: Mean loss of a token at each step, in nats, before the step changed anything.
        seconds: Of each step: forward, backward and optimizer.
    """

    name: str
    ours: bool
    habit: bool
    losses: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class TrainingReport:
    """Everything that a run found.

    Attributes:
        mode: How much was asked for.
        machine: Where it ran.
        settings: The recipe, dtype and versions.
        documents: Counts and lengths.
        curves: The ways, padded stock first.
        reached: The step after which the loss was below the fixed one; None if it was not.
        deviation: The largest difference of a step's loss to that of the first curve, in nats.
        seconds: That the run took.
    """

    mode: str
    machine: Machine
    settings: dict[str, Any]
    documents: dict[str, Any]
    curves: tuple[Curve, ...]
    reached: int | None
    deviation: float
    seconds: float

    def problems(self) -> list[str]:
        """Curves that are not the same."""
        if self.deviation <= SAME_CURVE:
            return []
        return [f"the curves are {self.deviation:.3g} nats apart, more than {SAME_CURVE}"]

    def to_json(self) -> str:
        """Every step of every curve."""
        return json.dumps({"schema": SCHEMA, **to_plain(self)}, indent=1) + "\n"

    def write_json(self, path: Path) -> None:
        """Writes `to_json()` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")


def trained_ways(ways: Sequence[Way] = WAYS) -> tuple[Way, ...]:
    """What is compared: what people do, plain torch without padding, and maskops."""
    return tuple(way for way in ways if "language" in way.tasks and (way.habit or way.ours or way is PLAIN))


def run(options: argparse.Namespace, dtype: torch.dtype, mode: str) -> int:
    """Trains; 0 if the curves agree, 2 without transformers."""
    if importlib.util.find_spec("transformers") is None:
        print("bench train: transformers is not installed: pip install 'transformers>=5.23,<6'", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    report = execute(RECIPES[mode], mode=mode, device=device, dtype=dtype, seed=options.seed)
    return output.deliver(report, render(report), options, functools.partial(draw, report))


def build(recipe: Recipe, seed: int) -> Any:
    """The model with random weights that depend on the seed alone; no dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_heads,
        max_position_embeddings=recipe.max_length,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class _Trainer:
    """A model, its optimizer and the way that its batches take through it."""

    def __init__(self, way: Way, model: Any, recipe: Recipe, stack: contextlib.ExitStack) -> None:
        self.way = way
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._recipe = recipe
        self._runner: Runner = stack.enter_context(way.prepare(model, "mean"))
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)

    def step(self, batch: Batch, targets: int) -> float:
        """One step; its seconds."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * min(1.0, (len(self.losses) + 1) / self._recipe.warm_up)
        found: list[Tensor] = []

        def work() -> None:
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._runner.loss(batch, targets)
            loss.backward()
            self._optimizer.step()
            found.append(loss.detach())

        taken = once(work, batch.tokens.device)
        self.seconds.append(taken)
        self.losses.append(found[0].item())
        return taken

    def curve(self) -> Curve:
        return Curve(self.way.name, self.way.ours, self.way.habit, tuple(self.losses), tuple(self.seconds))


def execute(
    recipe: Recipe,
    *,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    text: corpus.Corpus | None = None,
    ways: Sequence[Way] | None = None,
) -> TrainingReport:
    """Trains every way side by side, step by step.

    Args:
        recipe: What and until when.
        mode: Its name in the header.
        device: Where.
        dtype: Of the weights.
        seed: Of documents and weights.
        text: The documents; read by default.
        ways: The rows, the one that others are compared with first.
    """
    import transformers

    started, others = time.perf_counter(), Others()
    chosen = trained_ways() if ways is None else ways
    with Progress(recipe.steps) as progress, contextlib.ExitStack() as stack:
        progress.stage("reading docstrings")
        if text is None:
            text = corpus.read(
                vocabulary=recipe.vocabulary,
                min_length=recipe.min_length,
                max_length=recipe.max_length,
                characters=recipe.characters,
                seed=seed,
                seconds=120.0,
            )
        host = machine.describe(device, dtype)
        first = build(recipe, seed).to(device=device, dtype=dtype).eval()
        trainers = [_Trainer(way, copy.deepcopy(first), recipe, stack) for way in chosen]
        reached = _train(trainers, text.documents, recipe, device, progress)
        curves = tuple(trainer.curve() for trainer in trainers)
    deviations = [
        abs(loss - other) for curve in curves[1:] for loss, other in zip(curve.losses, curves[0].losses, strict=True)
    ]
    lengths = text.lengths
    return TrainingReport(
        mode=mode,
        machine=dataclasses.replace(host, load=others.taken()),
        settings={
            **{name: getattr(recipe, name) for name in recipe.__dataclass_fields__},
            "dtype": str(dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
            "parameters": sum(weight.numel() for weight in first.parameters()),
            "seed": seed,
        },
        documents={
            "source": text.source,
            "tokenizer": text.tokenizer,
            "count": len(lengths),
            "tokens": sum(lengths),
            "used": len(curves[0].losses) * recipe.batch_size,
        },
        curves=curves,
        reached=reached,
        deviation=max(deviations, default=0.0),
        seconds=time.perf_counter() - started,
    )


def _train(
    trainers: Sequence[_Trainer],
    documents: Sequence[Tensor],
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
) -> int | None:
    """Steps in turn until all are below the fixed loss; how many that took."""
    size = recipe.batch_size
    for step in range(recipe.steps):
        progress.stage(f"step {step + 1}, loss {trainers[0].losses[-1]:.2f}" if step else "first step")
        numbers = [(step * size + place) % len(documents) for place in range(size)]
        targets = sum(len(documents[number]) - 1 for number in numbers)
        # In another order each step: nobody always inherits the heap of the same neighbour.
        for place in range(len(trainers)):
            trainer = trainers[(place + step) % len(trainers)]
            trainer.step(collate(documents, numbers, trainer.way.layout, device), targets)
        progress.advance(1.0)
        if all(_mean(trainer.losses, recipe.window) <= recipe.until for trainer in trainers):
            return step + 1
    return None


def _mean(losses: Sequence[float], window: int) -> float:
    return math.inf if len(losses) < window else statistics.fmean(losses[-window:])


def render(report: TrainingReport) -> str:
    """The report as text."""
    machine, settings, documents = report.machine, report.settings, report.documents
    lines = [
        *busy(machine),
        ("device", f"{machine.device}, {machine.threads} threads, {machine.platform}, {machine.instruction_set}"),
        (
            "versions",
            f"maskops {machine.maskops} ({machine.commit}), torch {machine.torch}, transformers "
            f"{settings['transformers']}, Python {machine.python}",
        ),
        (
            "model",
            f"Llama of {settings['layers']} layers, width {settings['width']}, vocabulary {settings['vocabulary']:,}, "
            f"{settings['parameters'] / 1e6:.1f} M parameters, {settings['dtype']}; AdamW",
        ),
        (
            "documents",
            f"{documents['used']:,} of {documents['count']:,} {documents['source']}, "
            f"{settings['batch_size']} a step in the same order; {documents['tokenizer']}",
        ),
        ("columns", "time to the loss: seconds of all steps until it is reached, the rows step by step in turn"),
        ("command", f"{machine.command} ({report.mode} run, {report.seconds:.0f} s)"),
    ]
    goal = f"To a loss of {settings['until']:g} nats"
    rows = [[goal, "seconds", "a step, ms", "±", "less time", "last loss"]]
    slow = report.curves[0]
    for curve in report.curves:
        low, middle, high = statistics.quantiles(curve.seconds, n=4, method="inclusive")
        rows.append(
            [
                f"{curve.name}  ({HABIT})" if curve.habit else curve.name,
                f"{sum(curve.seconds):.1f}",
                f"{middle * 1e3:.0f}",
                f"{(high - low) / 2 / middle:.0%}",
                f"{sum(slow.seconds) / sum(curve.seconds):.2f}x",
                f"{curve.losses[-1]:.4f}",
            ]
        )
    steps = len(slow.losses)
    end = f"reached after {report.reached} steps" if report.reached else f"not reached in {steps} steps"
    notes = [
        f"  {end} (mean of the last {settings['window']}); largest difference of a step's loss between the curves: "
        f"{report.deviation:.1e} nats"
    ]
    problems = [f"PROBLEM: {problem}" for problem in report.problems()]
    head = "\n".join(["maskops bench train", *aligned(lines, left=2)])
    return "\n\n".join([head, "\n".join([*aligned(rows, indent=""), *notes, *problems])]) + "\n"


def draw(report: TrainingReport, path: Path) -> None:
    """The loss over steps, and over time, as a PNG."""
    from itertools import accumulate

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.2), dpi=125, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, left=0.06, right=0.98, top=0.76, bottom=0.2, wspace=0.12)
    steps, seconds = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    ours = iter(chart.OURS * len(report.curves))
    for number, curve in enumerate(report.curves):
        colour = next(ours) if curve.ours else chart.HABIT_COLOUR if curve.habit else chart.THEIRS
        # Curves that agree lie on one another: the first ones are drawn wider.
        width = 1.5 + 2.0 * (len(report.curves) - 1 - number)
        steps.plot(range(1, len(curve.losses) + 1), curve.losses, color=colour, linewidth=width, label=curve.name)
        seconds.plot(list(accumulate(curve.seconds)), curve.losses, color=colour, linewidth=1.5, label=curve.name)
    for axes, label in ((steps, "steps"), (seconds, "seconds")):
        axes.axhline(report.settings["until"], color=chart.FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel(label, fontsize=8.5, color=chart.INK)
        chart.bare(axes, keep=("left", "bottom"))
    seconds.legend(fontsize=8.5, frameon=False, labelcolor=chart.INK)
    apart = f"never more than {report.deviation:.1e} nats apart"
    chart.heading(steps, "The same curve ...", f"loss of a token in nats; {apart}")
    chart.heading(seconds, "... in less time", "the rows step by step in turn on one machine")
    machine = report.machine
    warning = "".join(f" · {label}: {text}" for label, text in busy(machine))
    figure.text(
        0.012,
        0.03,
        f"{machine.device}, {machine.threads} threads, {report.settings['dtype']} · torch {machine.torch}, "
        f"transformers {report.settings['transformers']}, maskops {machine.maskops} ({machine.commit}){warning}",
        fontsize=7.5,
        color=chart.THEIRS,
    )
    figure.savefig(path)
