"""`python -m maskops bench text --model`: how much is measured, and the order of events."""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskops.cli.bench import batches, corpus, machine, output
from maskops.cli.bench.models import chart as picture
from maskops.cli.bench.models.measure import measure
from maskops.cli.bench.models.report import ModelReport, render
from maskops.cli.bench.models.sources import PACKAGES, ModelError, Subject, load
from maskops.cli.bench.models.ways import WAYS, Way, chosen
from maskops.cli.bench.models.work import Cut, groups_of
from maskops.cli.bench.others import Others
from maskops.cli.bench.progress import Progress

FIXED_DOCUMENTS = 256
_CHARACTERS_A_DOCUMENT = 2500
"""How much text is read for each document that is used: several times a docstring's mean, so that the ones that are
used come from all over the sources."""

_REACHED = 0.6
"""Share of the processor's best speed that whole models reach, for estimates of how long a run takes."""


@dataclass(frozen=True)
class Amount:
    """How much is measured.

    Attributes:
        documents: Of the corpus, in arrival order; None: 256, or as many batches as take about `seconds`.
        checked: On how many of them errors are measured, for embeddings and for language models.
        repeats: How often all of them are gone through.
        batch_size: Documents of a batch.
        max_length: Longer documents are cut, in tokens of the model's tokenizer.
        positions: The most positions of one forward pass of a language model, whose activations all stay in memory.
        seconds: See `documents`.
    """

    documents: int | None
    checked: tuple[int, int]
    repeats: int
    batch_size: int = 32
    max_length: int = 512
    positions: int = 4096
    seconds: float = 600.0


AMOUNTS = {
    "default": Amount(documents=None, checked=(FIXED_DOCUMENTS, 16), repeats=2),
    "quick": Amount(documents=32, checked=(32, 4), repeats=1),
    "full": Amount(documents=FIXED_DOCUMENTS, checked=(FIXED_DOCUMENTS, 16), repeats=3),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of real models alone."""
    group = parser.add_argument_group("text --model")
    group.add_argument(
        "--model",
        metavar="PATH_OR_NAME",
        help=f"a model of transformers on real documents: {', '.join(PACKAGES)} (from packages that carry weights), or "
        f"a folder with configuration, weights and tokenizer",
    )
    group.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help=f"how many documents (default: {FIXED_DOCUMENTS}, fewer where that would take over ten minutes)",
    )
    group.add_argument("--repeats", type=int, metavar="N", help="how often they go through each row (default: 2)")


def refuse(options: argparse.Namespace) -> str | None:
    """What is wrong with the options of models, or None."""
    for name in ("documents", "repeats"):
        value = getattr(options, name)
        if value is not None and options.model is None:
            return f"--{name} is an option of --model"
        if value is not None and value < 1:
            return f"--{name}: expected at least 1, got {value}"
    return None


def run(options: argparse.Namespace, dtype: torch.dtype, mode: str) -> int:
    """Measures one model; 0 if every row is right and maskops refused nothing, 2 if there is nothing to measure."""
    device = torch.device(options.device)
    amount = AMOUNTS[mode]
    try:
        subject = load(options.model, dtype, device)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    report = execute(
        subject,
        amount,
        mode=mode,
        documents=options.documents,
        repeats=options.repeats,
        seed=options.seed,
    )
    return output.deliver(report, render(report), options, functools.partial(picture.draw, report))


def execute(
    subject: Subject,
    amount: Amount,
    *,
    mode: str,
    seed: int,
    documents: int | None = None,
    repeats: int | None = None,
    texts: tuple[Sequence[str], int] | None = None,
    ways: Sequence[Way] = WAYS,
) -> ModelReport:
    """Does everything that is asked for.

    Args:
        subject: The model.
        amount: How much.
        mode: Its name in the header.
        seed: Of the order of the documents.
        documents: Instead of the amount's.
        repeats: Instead of the amount's.
        texts: The documents and how many files they come from; read by default.
        ways: The rows.
    """
    import transformers

    started, others = time.perf_counter(), Others()
    embedding = subject.task == "embedding"
    repeats = amount.repeats if repeats is None else repeats
    wanted = amount.documents if documents is None else documents
    size = Cut(amount.batch_size, None if embedding else amount.positions)
    limit = min(amount.max_length, subject.longest)
    rows = chosen(subject.task, ways)
    device, dtype = subject.model.device, subject.model.dtype
    with Progress(0.0) as progress:
        progress.stage("reading docstrings")
        most = wanted or FIXED_DOCUMENTS
        if texts is None:
            texts = corpus.read_texts(characters=_CHARACTERS_A_DOCUMENT * most, seed=seed, seconds=120.0)
        tokens = tokenise(subject, texts[0], most, limit)
        progress.stage("measuring the machine's peaks")
        host = machine.describe(device, dtype)
        seconds = [
            estimate(subject, rows, tokens[:count], size, host.peaks.multiply_add) * repeats
            for count in range(1, len(tokens) + 1)
        ]
        if wanted is None:
            tokens = tokens[: _fitting(seconds, amount)]
        progress.expect(seconds[len(tokens) - 1])
        checked = min(amount.checked[0 if embedding else 1], len(tokens))
        found = measure(
            subject,
            rows,
            tokens,
            checked=checked,
            size=size,
            repeats=repeats,
            on_stage=progress.stage,
            on_step=progress.advance,
        )
    lengths = sorted(map(len, tokens))
    config = subject.model.config
    return ModelReport(
        mode=mode,
        machine=dataclasses.replace(host, load=others.taken()),
        model={
            "name": subject.name,
            "task": subject.task,
            "pooling": subject.pooling if embedding else None,
            "architecture": type(subject.model).__name__,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "parameters": sum(weight.numel() for weight in subject.model.parameters()),
            "origin": subject.origin,
        },
        documents={
            "source": corpus.SOURCE,
            "files": texts[1],
            "count": len(lengths),
            "tokens": sum(lengths),
            "median": lengths[len(lengths) // 2],
            "p95": lengths[int(0.95 * len(lengths))],
            "longest": lengths[-1],
        },
        settings={
            "batch_size": size.batch_size,
            "positions": size.positions,
            "max_length": limit,
            "repeats": repeats,
            "checked": checked,
            "dtype": str(dtype).removeprefix("torch."),
            "transformers": transformers.__version__,
            "seed": seed,
        },
        rows=found.rows,
        baseline=found.baseline,
        own_error=found.own_error,
        loss=found.loss,
        shares=found.shares,
        notes=found.notes,
        seconds=time.perf_counter() - started,
    )


def tokenise(subject: Subject, texts: Sequence[str], count: int, max_length: int) -> tuple[Tensor, ...]:
    """The first `count` texts that have a token to predict, as int64 tensors of the model's own tokens.

    Raises:
        ModelError: there are fewer.
    """
    documents = []
    for text in texts:
        ids = subject.tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if len(ids) >= 2:
            documents.append(torch.tensor(ids))
        if len(documents) == count:
            return tuple(documents)
    raise ModelError(f"--documents {count}: there are {len(documents)} docstrings of two tokens or more")


def estimate(subject: Subject, ways: Sequence[Way], documents: Sequence[Tensor], size: Cut, gigaflops: float) -> float:
    """Seconds of one repeat on a processor with this peak: the products of the linear layers, padding included."""
    head = subject.model.get_output_embeddings()
    layers = {layer for layer in subject.model.modules() if isinstance(layer, nn.Linear)}
    weights = sum(layer.weight.numel() for layer in layers | ({head} if head is not None else set()))
    lengths = [len(document) for document in documents]
    positions = sum(batches.taken(groups_of(way, lengths, size), lengths, way.layout) for way in ways)
    times = 3 if subject.task == "language" else 1  # the products of backward are two of the same size
    return 2 * times * weights * positions / (_REACHED * gigaflops * 1e9)


def _fitting(seconds: Sequence[float], amount: Amount) -> int:
    """How many documents, in whole batches, take no longer than the amount says; at least one batch."""
    fitting = [count for count, taken in enumerate(seconds, start=1) if taken <= amount.seconds]
    most = max(fitting, default=0)
    return min(max(most // amount.batch_size, 1) * amount.batch_size, len(seconds))
