"""Times the ways against one another, batch by batch in turn, and puts their errors and memory beside the speeds."""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskops.cli.bench.batches import Batch, taken
from maskops.cli.bench.measure import WRONG_ABOVE, Row, Shares
from maskops.cli.bench.memory import Peak, tidy
from maskops.cli.bench.models.parts import split
from maskops.cli.bench.models.sources import Subject
from maskops.cli.bench.models.ways import Runner, Way
from maskops.cli.bench.models.work import (
    Cut,
    Outcome,
    batches_of,
    errors,
    exact,
    forget_gradients,
    groups_of,
    outcome,
    step,
    targets_of,
)
from maskops.cli.bench.timing import Timing, once

_ROUNDINGS = 16
"""Errors below this many roundings are nobody's fault: transformers' own may happen to be zero."""


@dataclass(frozen=True)
class ModelRow(Row):
    """One way's result.

    Attributes:
        errors: By what is compared, see `work.errors`; the row's `error` is the largest of them as a multiple of the
            one that the model itself makes on one document at a time.
        fill: Share of the positions that hold a token of a document.
        passes: Forward passes that all documents took.
        memory: Bytes that one pass took at its peak over those before it; None where that cannot be measured.
        loss: Mean loss of a token on the timed documents, in nats; None for embeddings.
    """

    errors: dict[str, float] | None = None
    fill: float = 1.0
    passes: int = 0
    memory: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Found:
    """Everything that was measured of a model.

    Attributes:
        rows: One a way.
        baseline: The best way without maskops; None if none ran.
        own_error: What the model itself makes on one document at a time: the unit of the rows' `error`.
        loss: Mean loss of a token on the checked documents in float64; None for embeddings.
        shares: Where the time of one batch goes, for each way that ran.
        notes: What could not be done, and why.
    """

    rows: tuple[ModelRow, ...]
    baseline: str | None
    own_error: dict[str, float]
    loss: float | None
    shares: tuple[Shares, ...]
    notes: tuple[str, ...]


def measure(
    subject: Subject,
    ways: Sequence[Way],
    documents: Sequence[Tensor],
    *,
    checked: int,
    size: Cut,
    repeats: int,
    on_stage: Callable[[str], None],
    on_step: Callable[[float], None],
) -> Found:
    """Checks every way on some of the documents, then times all that are right on all of them.

    Args:
        subject: The model.
        ways: The rows, see `ways.WAYS`.
        documents: Tokens of each, in the order in which they arrive.
        checked: On how many of them errors are measured.
        size: How they become batches.
        repeats: How many times all documents go through each way.
        on_stage: Called with what begins now.
        on_step: Called after each timed pass with the seconds that it took.
    """
    device = subject.model.device
    peak = Peak(device)
    few = documents[:checked]
    on_stage("one document at a time, in float64")
    truth = exact(few, subject, torch.float64)
    own = errors(exact(few, subject, subject.model.dtype), truth)
    with ExitStack() as stack:
        rows: list[ModelRow] = []
        runners: dict[int, Runner] = {}
        for index, way in enumerate(ways):
            on_stage(f"{way.name}: errors")
            row = ModelRow(way.name, way.ours, way.habit, fill=_fill(documents, way, size))
            try:
                runners[index] = stack.enter_context(way.prepare(subject.model, subject.pooling))
                found = outcome(runners[index], way, few, size, subject, gradients=truth.gradients is not None)
            except Exception as error:  # a row that says why it is empty; the others are still worth their time
                first = (str(error).strip().splitlines() or [""])[0]
                rows.append(replace(row, problem=f"refused: {type(error).__name__}: {first}"))
                continue
            rows.append(_checked(row, found, truth, own, subject))
            forget_gradients(subject)
            tidy()
        loss = truth.loss
        del truth
        right = [index for index in runners if rows[index].problem is None]
        laid = {index: batches_of(ways[index], documents, size, subject) for index in right}
        on_stage("warming up, and peaks of memory")
        targets = targets_of(documents)
        peaks = {index: _peak(runners[index], laid[index], subject, targets, peak) for index in right}
        on_stage("timing")
        timings, losses = _timed(
            [(runners[index], laid[index]) for index in right], subject, targets, repeats=repeats, on_step=on_step
        )
        for place, index in enumerate(right):
            rows[index] = replace(
                rows[index],
                timing=timings[place],
                passes=len(laid[index]),
                memory=peaks[index],
                loss=losses[place],
                tokens_per_second=sum(map(len, documents)) / timings[place].median,
            )
        rows, baseline = _compared(rows)
        shares = []
        for index in right:
            on_stage(f"{ways[index].name}: parts")
            shares.append(_split(rows[index].name, runners[index], ways[index], documents, size, subject))
        problems = [] if peak.reason is None else [f"no peaks of memory: {peak.reason}"]
    return Found(tuple(rows), baseline, own, loss, tuple(shares), tuple(problems))


def _fill(documents: Sequence[Tensor], way: Way, size: Cut) -> float:
    lengths = [len(document) for document in documents]
    return sum(lengths) / taken(groups_of(way, lengths, size), lengths, way.layout)


def _checked(row: ModelRow, found: Outcome, truth: Outcome, own: dict[str, float], subject: Subject) -> ModelRow:
    """The row with its errors; marked as wrong if one of them is more than the model's own explains."""
    own_errors = errors(found, truth)
    rounding = _ROUNDINGS * torch.finfo(subject.model.dtype).eps
    multiples = {
        name: error / max(own[name], rounding * (abs(truth.loss or 0.0) if name == "loss" else 1.0))
        for name, error in own_errors.items()
    }
    worst = max(multiples, key=lambda name: multiples[name])
    problem = None
    if not multiples[worst] <= WRONG_ABOVE:
        problem = (
            f"WRONG: {worst} is off by {own_errors[worst]:.3g}, {multiples[worst]:.3g} times the model's own error"
        )
    return replace(row, errors=own_errors, error=multiples[worst], problem=problem)


def _peak(runner: Runner, laid: Sequence[Batch], subject: Subject, targets: int, peak: Peak) -> int | None:
    """Memory of the pass that takes most of it, which also warms everything up."""
    largest = max(laid, key=lambda batch: batch.tokens.numel())
    tidy()
    _, height = peak.over(lambda: step(runner, largest, subject, targets))
    forget_gradients(subject)
    return height


def _timed(
    rivals: Sequence[tuple[Runner, Sequence[Batch]]],
    subject: Subject,
    targets: int,
    *,
    repeats: int,
    on_step: Callable[[float], None],
) -> tuple[list[Timing], list[float | None]]:
    """All passes of all rivals in turn; seconds of each repeat, and the losses. Every pass makes new gradients."""
    seconds = [[0.0] * repeats for _ in rivals]
    losses: list[float | None] = [None] * len(rivals)
    tidy()
    with _without_collector():
        for repeat in range(repeats):
            for rival, number in turns([len(laid) for _, laid in rivals], seed=repeat):
                runner, laid = rivals[rival]
                found: list[Tensor] = []

                def work(runner: Runner = runner, batch: Batch = laid[number], found: list[Tensor] = found) -> None:
                    found.append(step(runner, batch, subject, targets))

                spent = once(work, subject.model.device)
                forget_gradients(subject)
                gc.collect()
                seconds[rival][repeat] += spent
                if subject.task == "language" and repeat == 0:
                    losses[rival] = (losses[rival] or 0.0) + found[0].item()
                on_step(spent)
    return [Timing(tuple(entry)) for entry in seconds], losses


def turns(counts: Sequence[int], seed: int) -> Iterator[tuple[int, int]]:
    """Who runs which of its batches next, so that all are through the same share of their work at any time.

    Args:
        counts: Batches of each rival.
        seed: Of the order among those that are equally far.
    """
    chance = random.Random(seed)
    entries = [
        ((number + 0.5) / count, chance.random(), rival, number)
        for rival, count in enumerate(counts)
        for number in range(count)
    ]
    for _, _, rival, number in sorted(entries):
        yield rival, number


@contextmanager
def _without_collector() -> Iterator[None]:
    """No collection in the middle of a pass, only between passes, and then not of what is there already."""
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def _compared(rows: Sequence[ModelRow]) -> tuple[list[ModelRow], str | None]:
    """Speed-ups over the best row without maskops; another loss than its on the timed documents is wrong."""
    timed = [row for row in rows if row.timing is not None]
    rivals = [row for row in timed if not row.ours]
    if not rivals:
        return list(rows), None
    best = min(rivals, key=lambda row: row.timing.median if row.timing is not None else float("inf"))
    compared = []
    for row in rows:
        if row.timing is not None and best.timing is not None:
            row = replace(row, speedup=row.timing.speedup_over(best.timing))
            if row.loss is not None and best.loss is not None and not abs(row.loss - best.loss) <= _apart(best.loss):
                problem = f"WRONG: loss {row.loss:.6g} instead of {best.loss:.6g}"
                row = replace(row, problem=problem, timing=None, tokens_per_second=None, speedup=None)
        compared.append(row)
    return compared, best.name


def _apart(loss: float) -> float:
    return 1e-3 * abs(loss)


def _split(name: str, runner: Runner, way: Way, documents: Sequence[Tensor], size: Cut, subject: Subject) -> Shares:
    """Of the batch in the middle: for bucketed rows neither the longest nor the shortest documents."""
    laid = batches_of(way, documents, size, subject)
    batch, targets = laid[len(laid) // 2], targets_of(documents)

    def run() -> None:
        step(runner, batch, subject, targets)
        forget_gradients(subject)

    tidy()
    return split(name, runner.model, run, subject.model.device, with_loss=subject.task == "language")
