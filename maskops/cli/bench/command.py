"""`python -m maskops bench`: the options, the order of events and the exit status."""

import argparse
import functools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import maskops
from maskops.backend import ENVIRONMENT_VARIABLE
from maskops.cli.bench import batches, chart, corpus, machine, output, training, variants
from maskops.cli.bench.compilation import command as compilation
from maskops.cli.bench.cpu import command as cpu
from maskops.cli.bench.gpu import command as gpu
from maskops.cli.bench.jobs import JOBS, Settings
from maskops.cli.bench.measure import Row, Table, check, measure, split
from maskops.cli.bench.models import command as models
from maskops.cli.bench.others import Others
from maskops.cli.bench.progress import Progress
from maskops.cli.bench.report import Report, SweepPoint, Waste, render
from maskops.cli.bench.sweep import cut_documents, lengths_with_fill

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_GOES_WITH = {
    ("chart", "threads"): ("text", "train", "cpu"),
    ("device", "huge_pages"): ("text", "train"),
    ("dtype",): ("text", "train", "gpu"),
    ("dry_run", "resume", "precompile", "limit"): ("gpu",),
    ("instruction_set",): ("cpu",),
    ("model", "documents", "repeats"): ("text",),
    ("only",): ("cpu", "gpu", "compile"),
    ("seed",): ("text", "train", "cpu", "gpu"),
    ("triton", "processes", "cache", "everyday", "without_triton", "without_cuda"): ("compile",),
}
"""Which work reads which options; all read the others."""

_INSTEAD = {
    ("cpu", "device"): "it measures the processor",
    ("cpu", "dtype"): "each line of its table has a dtype of its own",
    ("cpu", "huge_pages"): "its table runs the peers that huge pages help both ways",
}

_STEP = next(job for job in JOBS if job.name == "step")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        characters, read_seconds: How much text is read, and for how long at most.
        min_length, max_length: Documents shorter are dropped, longer are cut, in tokens.
        micro_batches, batch_size: Documents that are timed.
        vocabulary, width, heads, layers: Of the model.
        checked_documents, checked_length: Documents on which errors are measured in float64, cut to this length.
        budgets: Seconds for timing each job, forward and forward + backward.
        min_rounds: At least this many rounds, whatever they cost.
        fills, sweep_count, sweep_longest, sweep_budget: The sweep over fill factors, one budget a point.
        compiled: Whether torch.compile takes part.
        limit: After this many seconds the rest of the run takes one round of each measurement: on a slow machine a
            coarse answer soon is worth more than a fine one late.
    """

    characters: int
    read_seconds: float
    min_length: int
    max_length: int
    micro_batches: int
    batch_size: int
    vocabulary: int
    width: int
    heads: int
    layers: int
    checked_documents: int
    checked_length: int
    budgets: dict[str, tuple[float, float]]
    min_rounds: int
    fills: tuple[float, ...]
    sweep_count: int
    sweep_longest: int
    sweep_budget: float
    compiled: bool
    limit: float

    @property
    def seconds(self) -> float:
        """What the timed parts should take."""
        return sum(map(sum, self.budgets.values())) + len(self.fills) * self.sweep_budget


QUICK = Plan(
    characters=600_000,
    read_seconds=15.0,
    min_length=16,
    max_length=512,
    micro_batches=4,
    batch_size=8,
    vocabulary=4096,
    width=256,
    heads=4,
    layers=2,
    checked_documents=10,
    checked_length=96,
    budgets={"attention": (1.5, 3.0), "loss": (1.5, 3.0), "step": (8.0, 28.0)},
    min_rounds=3,
    fills=(0.1, 0.25, 0.5, 0.75, 1.0),
    sweep_count=16,
    sweep_longest=160,
    sweep_budget=2.5,
    compiled=False,
    limit=60.0,
)

FULL = Plan(
    characters=4_000_000,
    read_seconds=60.0,
    min_length=16,
    max_length=1024,
    micro_batches=6,
    batch_size=12,
    vocabulary=8192,
    width=256,
    heads=4,
    layers=4,
    checked_documents=24,
    checked_length=256,
    budgets={"attention": (30.0, 60.0), "loss": (30.0, 60.0), "step": (120.0, 400.0)},
    min_rounds=5,
    fills=tuple(tenth / 10 for tenth in range(1, 11)),
    sweep_count=16,
    sweep_longest=512,
    sweep_budget=40.0,
    compiled=True,
    limit=1800.0,
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the options."""
    parser = commands.add_parser(
        "bench",
        help="measure what padding costs on real text, and what maskops makes of it",
        description="Attention, loss and a whole training step on real documents: what people do, the best that torch "
        "can do, and maskops. Every row has its error beside its speed; a wrong row has no speed.",
    )
    parser.add_argument(
        "work",
        nargs="?",
        choices=["text", "train", "cpu", "gpu", "compile"],
        default="text",
        help="text: real documents (default), on a real model with --model. train: a small model of transformers to a "
        "fixed loss, padded stock against packed maskops. cpu: every kernel of the processor against its peers and "
        "against what the machine can do. gpu: every kernel of a device against the best peer that is "
        "installed. "
        "compile: the device kernels, compiled for machines that are not here",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--quick", action="store_true", help="under two minutes on two cores (the default of all but cpu)"
    )
    length.add_argument("--full", action="store_true", help="longer documents, more of them, torch.compile, ten fills")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, raw rounds included")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the picture (needs matplotlib)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--seed", type=int, default=0, help="of documents, weights and values (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and maskops (default: torch's)")
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="let torch's allocator ask for huge pages (THP_MEM_ALLOC_ENABLE=1), for all variants alike",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="lines (cpu), contests (gpu) or kernels (compile) whose name contains TEXT",
    )
    models.add_options(parser)
    cpu.add_options(parser)
    gpu.add_options(parser)
    compilation.add_options(parser)
    parser.set_defaults(run=functools.partial(run, defaults=parser.parse_args([])))


def ignored(options: argparse.Namespace, defaults: argparse.Namespace) -> str | None:
    """Why an option that was given means nothing to the work, or None: nobody shall believe that it was heeded."""
    for names, works in _GOES_WITH.items():
        for name in names:
            if options.work in works or getattr(options, name) == getattr(defaults, name):
                continue
            reason = _INSTEAD.get((options.work, name))
            flag, places = name.replace("_", "-"), " and ".join(f"bench {work}" for work in works)
            return f"--{flag} goes with {places}, not with bench {options.work}{f': {reason}' if reason else ''}"
    return None


def run(options: argparse.Namespace, defaults: argparse.Namespace) -> int:
    """Runs the benchmark; 0 if every row is right and maskops refused nothing, 2 where options make no sense."""
    if (problem := ignored(options, defaults)) is not None:
        print(problem, file=sys.stderr)
        return 2
    if options.work == "cpu":
        return cpu.run(options)
    if options.work == "gpu":
        return gpu.run(options)
    if options.work == "compile":
        return compilation.run(options)
    problem = models.refuse(options)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    if options.huge_pages and not machine.huge_pages():
        # The allocator reads the variable once, at its first allocation: too late for this process.
        sys.stdout.flush()
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "maskops", *sys.argv[1:]])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return 2
    plan = FULL if options.full else QUICK
    mode = "full" if options.full else "quick"
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    # A row that would silently run on the reference is refused instead, with the reasons; who asks for a backend by
    # the environment variable gets that one.
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    with nullcontext() if asked else maskops.use_backend(fallback="error"):
        if options.model is not None or options.work == "train":
            amount = "full" if options.full else "quick" if options.quick else "default"
            if options.work == "train":
                return training.run(options, dtype, amount)
            return models.run(options, dtype, amount)
        report = execute(plan, mode=mode, device=device, dtype=dtype, seed=options.seed)
    return output.deliver(report, render(report), options, functools.partial(chart.draw, report))


def execute(
    plan: Plan,
    *,
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    rows: Sequence[variants.Variant] = variants.VARIANTS,
    text: corpus.Corpus | None = None,
) -> Report:
    """Does everything that a plan asks for.

    Args:
        plan: How much.
        mode: Its name in the header.
        device: Where.
        dtype: Of activations, weights and logits.
        seed: Of documents, weights and values.
        rows: The variants.
        text: The documents; read as the plan says by default.
    """
    started, others = time.perf_counter(), Others()
    settings = Settings(
        batch_size=plan.batch_size,
        vocabulary=plan.vocabulary,
        width=plan.width,
        heads=plan.heads,
        layers=plan.layers,
        max_length=plan.max_length,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    pace = _Pace(started, plan)
    with Progress(plan.seconds) as progress:
        progress.stage("reading docstrings")
        if text is None:
            text = corpus.read(
                vocabulary=plan.vocabulary,
                min_length=plan.min_length,
                max_length=plan.max_length,
                characters=plan.characters,
                seed=seed,
                seconds=plan.read_seconds,
            )
        progress.stage("measuring the machine's peaks")
        host = machine.describe(device, dtype)
        documents = text.documents[: plan.micro_batches * plan.batch_size]
        tables = _tables(plan, rows, text.documents, documents, settings, progress, pace)
        step = next(table for table in tables if table.job == _STEP.name and table.backward)
        sweep = _sweep(plan, step, rows, text.documents, settings, progress, pace)
        progress.stage("splitting a training step into its parts")
        shares = tuple(split(_STEP, variant, documents, settings) for variant in _sound(step, rows)[0])
    lengths = sorted(text.lengths)
    return Report(
        mode=mode,
        machine=replace(host, load=others.taken()),
        documents={
            "source": text.source,
            "tokenizer": text.tokenizer,
            "files": text.files,
            "coverage": text.coverage,
            "count": len(lengths),
            "tokens": sum(lengths),
            "median": lengths[len(lengths) // 2],
            "p95": lengths[int(0.95 * len(lengths))],
            "longest": lengths[-1],
            "timed_count": len(documents),
            "timed_tokens": sum(len(document) for document in documents),
        },
        settings={
            "batch_size": settings.batch_size,
            "vocabulary": settings.vocabulary,
            "width": settings.width,
            "heads": settings.heads,
            "layers": settings.layers,
            "max_length": settings.max_length,
            "dtype": str(dtype).removeprefix("torch."),
            "seed": seed,
        },
        waste=_waste(text.lengths, plan.batch_size),
        tables=tuple(tables),
        shares=shares,
        sweep=sweep,
        picture=tuple(len(document) for document in documents[: plan.batch_size]),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Pace:
    started: float
    plan: Plan

    def min_rounds(self) -> int:
        late = time.perf_counter() - self.started > self.plan.limit
        return 1 if late else self.plan.min_rounds


def _tables(
    plan: Plan,
    rows: Sequence[variants.Variant],
    corpus_documents: Sequence[Tensor],
    documents: Sequence[Tensor],
    settings: Settings,
    progress: Progress,
    pace: "_Pace",
) -> list[Table]:
    """Every job in both modes: checked on a few short documents first, then timed."""
    # From the end of the corpus, so that the checked documents are not the timed ones.
    short = [document[: plan.checked_length] for document in corpus_documents[-plan.checked_documents :]]
    check_settings = replace(settings, batch_size=-(-len(short) // 2))
    tables = []
    for job in JOBS:
        chosen = variants.chosen(job.name, settings.device, settings.dtype, compiled=plan.compiled, variants=rows)
        for backward, budget in zip((False, True), plan.budgets[job.name], strict=True):
            mode = "forward + backward" if backward else "forward"
            progress.stage(f"{job.title.lower()}, {mode}: errors")
            checked = check(job, chosen, short, check_settings, backward)
            progress.stage(f"{job.title.lower()}, {mode}")
            table = measure(
                job,
                chosen,
                documents,
                settings,
                backward=backward,
                budget=budget,
                min_rounds=pace.min_rounds(),
                checked=checked,
                on_round=progress.advance,
            )
            tables.append(table)
    return tables


def _sound(table: Table, rows: Sequence[variants.Variant]) -> tuple[list[variants.Variant], list[Row]]:
    """The variants of a table whose results were right, and their rows without the timing."""
    by_name = {variant.name: variant for variant in rows}
    kept = [row for row in table.rows if row.problem is None]
    return [by_name[row.name] for row in kept], [replace(row, timing=None) for row in kept]


def _sweep(
    plan: Plan,
    step: Table,
    rows: Sequence[variants.Variant],
    corpus_documents: Sequence[Tensor],
    settings: Settings,
    progress: Progress,
    pace: "_Pace",
) -> tuple[SweepPoint, ...]:
    chosen, checked = _sound(step, rows)
    settings = replace(settings, batch_size=plan.sweep_count)
    points = []
    for fill in plan.fills:
        progress.stage(f"training step at fill factor {fill:g}")
        lengths = lengths_with_fill(fill, plan.sweep_count, plan.sweep_longest)
        table = measure(
            _STEP,
            chosen,
            cut_documents(corpus_documents, lengths),
            settings,
            backward=True,
            budget=plan.sweep_budget,
            min_rounds=pace.min_rounds(),
            checked=checked,
            on_round=progress.advance,
        )
        points.append(SweepPoint(fill, lengths, table))
    return tuple(points)


def _waste(lengths: Sequence[int], batch_size: int) -> tuple[Waste, ...]:
    sizes = (batch_size, 4 * batch_size)
    names: tuple[tuple[str, batches.Layout], ...] = (
        ("random batches, padded", "padded"),
        ("bucketed by length, padded", "bucketed"),
        ("packed", "packed"),
    )
    return tuple(Waste(name, size, batches.fill(lengths, layout, size)) for name, layout in names for size in sizes)
