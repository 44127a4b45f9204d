"""Checks and times the variants of one job; splits a training step into its parts."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from maskops.cli.bench.jobs import Job, Outcome, Settings, Work
from maskops.cli.bench.timing import Timing, interleave, once
from maskops.cli.bench.variants import ORACLE, PLAIN, Variant
from maskops.testing import error_budget

WRONG_ABOVE = 2.0
"""An error of more than this many times torch's own is not an answer, whatever its speed."""

_SAME_LOSS = {torch.float64: 1e-9, torch.float32: 1e-4}
_SAME_LOSS_LOW_PRECISION = 2e-2


@dataclass(frozen=True)
class Row:
    """One variant's result in one table.

    Attributes:
        name, ours, habit: From the variant.
        error: Largest error of any output or gradient, as a multiple of plain torch's error; None if it did not run.
        timing: None where there is no speed to show.
        tokens_per_second: Real tokens, padding not counted.
        speedup: Over the best variant without maskops of the same table, in the same rounds.
        problem: Why there is no speed: "WRONG: ..." or "refused: ...".
    """

    name: str
    ours: bool
    habit: bool
    error: float | None = None
    timing: Timing | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a job in one mode.

    Attributes:
        baseline: Name of the best variant without maskops.
        loss: The loss that all rows agree on; None where the job has none.
    """

    job: str
    title: str
    backward: bool
    rows: tuple[Row, ...]
    baseline: str | None
    loss: float | None


@dataclass(frozen=True)
class Shares:
    """Where the time of a step goes, as shares of 1. `rest`: norms, copies, gathers, the optimizer, Python."""

    name: str
    gemm: float
    attention: float
    loss: float
    rest: float

    @property
    def ceiling(self) -> float:
        """Speed-up of this variant if attention and loss took no time at all."""
        return 1.0 / max(1.0 - self.attention - self.loss, 1e-9)


def error_multiple(outcome: Outcome, plain: Outcome, exact: Outcome, dtype: torch.dtype) -> float:
    """Largest error over the named tensors, in units of plain torch's: above 2 it breaks `testing.error_budget`.

    The unit is half of the budget's limit: torch's error and a few roundings, so that where torch happens to be exact
    nobody else has to be. A tensor that is missing or of another shape counts as infinitely wrong.
    """
    worst = 0.0
    for name, truth in exact.items():
        value = outcome.get(name)
        if value is None or value.shape != truth.shape:
            return float("inf")
        budget = error_budget(value, plain[name], truth, dtype)
        if budget.error > 0.0:
            worst = max(worst, 2.0 * budget.error / budget.limit)
    return worst


def check(
    job: Job, variants: Sequence[Variant], documents: Sequence[Tensor], settings: Settings, backward: bool
) -> list[Row]:
    """Runs every variant on a few documents and compares it with the float64 oracle."""
    exact = _outcome(job.work(ORACLE, documents, replace(settings, exact=True), backward))
    plain = _outcome(job.work(PLAIN, documents, settings, backward))
    rows = []
    for variant in variants:
        row = Row(variant.name, variant.ours, variant.habit)
        try:
            outcome = _outcome(job.work(variant, documents, settings, backward))
        except Exception as error:  # a row that says why it is empty; the others are still worth their time
            rows.append(replace(row, problem=f"refused: {type(error).__name__}: {_first_line(error)}"))
            continue
        multiple = error_multiple(outcome, plain, exact, settings.dtype)
        problem = f"WRONG: {multiple:.3g} times torch's error" if not multiple <= WRONG_ABOVE else None
        rows.append(replace(row, error=multiple, problem=problem))
    return rows


def measure(
    job: Job,
    variants: Sequence[Variant],
    documents: Sequence[Tensor],
    settings: Settings,
    *,
    backward: bool,
    budget: float,
    min_rounds: int,
    checked: Sequence[Row],
    on_round: Callable[[float], None] | None = None,
) -> Table:
    """Times the variants that passed their check, and compares their losses on the timed documents."""
    rows = list(checked)
    works = {
        index: job.work(variant, documents, settings, backward)
        for index, variant in enumerate(variants)
        if rows[index].problem is None
    }
    timings = interleave(
        [work.run for work in works.values()], settings.device, budget=budget, min_rounds=min_rounds, on_round=on_round
    )
    loss = _reject_other_losses(rows, variants, works, settings)
    tokens = sum(len(document) for document in documents)
    timed = {index: timing for index, timing in zip(works, timings, strict=True) if rows[index].problem is None}
    rivals = {index: timing for index, timing in timed.items() if not variants[index].ours}
    best = min(rivals, key=lambda index: rivals[index].median) if rivals else None
    for index, timing in timed.items():
        speedup = None if best is None else timing.speedup_over(rivals[best])
        rows[index] = replace(rows[index], timing=timing, tokens_per_second=tokens / timing.median, speedup=speedup)
    return Table(job.name, job.title, backward, tuple(rows), None if best is None else rows[best].name, loss)


def split(job: Job, variant: Variant, documents: Sequence[Tensor], settings: Settings) -> Shares:
    """Runs one training step under torch's profiler and sorts its operators."""
    work = job.work(variant, documents, settings, True)
    work.run()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr
    on_device = settings.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        total = once(work.run, settings.device)
    sums = {"gemm": 0.0, "attention": 0.0, "loss": 0.0}
    for event in profiler.events() or ():
        if event.device_type.name != "CPU":
            continue  # kernels: their time is already attributed to the operators that launched them
        kind = _kind(event)
        if kind is not None:
            sums[kind] += (event.self_device_time_total if on_device else event.self_cpu_time_total) * 1e-6
    gemm, attention, loss = (value / total for value in sums.values())
    return Shares(variant.name, gemm, attention, loss, rest=1.0 - gemm - attention - loss)


_PARTS = (
    (
        "attention",
        (
            "scaled_dot_product",
            "flash_attention",
            "efficient_attention",
            "cudnn_attention",
            "maskops::attention",
            "maskops::build_plan",
        ),
    ),
    (
        "loss",
        ("cross_entropy", "log_softmax", "nll_loss", "LogSoftmax", "NllLoss", "Torch-Compiled", "CompiledFunction"),
    ),
    ("gemm", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn_linear")),
)


def _kind(event: FunctionEvent) -> str | None:
    """The part that an operator belongs to: its own, or the one of the operator that called it."""
    caller: FunctionEvent | None = event
    while caller is not None:
        for kind, names in _PARTS:
            if any(name in caller.name for name in names):
                return kind
        caller = caller.cpu_parent
    return None


def _outcome(work: Work) -> Outcome:
    work.run()
    return work.outcome()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _reject_other_losses(
    rows: list[Row], variants: Sequence[Variant], works: dict[int, Work], settings: Settings
) -> float | None:
    """Marks the rows whose loss differs from plain torch's on the same documents; returns that loss."""
    losses = {index: work.loss() for index, work in works.items()}
    known = {index: loss for index, loss in losses.items() if loss is not None}
    expected = next((loss for index, loss in known.items() if variants[index] is PLAIN), None)
    if expected is None:
        expected = next(iter(known.values()), None)
    if expected is None:
        return None
    tolerance = _SAME_LOSS.get(settings.dtype, _SAME_LOSS_LOW_PRECISION)
    for index, loss in known.items():
        if not abs(loss - expected) <= tolerance * abs(expected):
            rows[index] = replace(rows[index], problem=f"WRONG: loss {loss:.6g} instead of {expected:.6g}")
    return expected
