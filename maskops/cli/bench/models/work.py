"""One way over one batch, what it computes, and how far that is from one document at a time in float64."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.cli.bench.batches import Batch, collate, cut
from maskops.cli.bench.models.sources import Subject
from maskops.cli.bench.models.ways import Runner, Way, pool_padded


@dataclass(frozen=True)
class Cut:
    """How documents become batches.

    Attributes:
        batch_size: Documents of a batch.
        positions: The most positions of one forward pass, padding included: what a batch holds beyond them goes
            through in further passes, whose gradients add up. None: no bound.
    """

    batch_size: int
    positions: int | None


@dataclass(frozen=True)
class Outcome:
    """What a pass over documents gave.

    Attributes:
        embeddings: float64 `(documents, width)` in document order; None for language models.
        loss: Mean loss of a token, in nats; None for embeddings.
        gradients: Of every weight in float64, one after the other; None where none were asked for.
    """

    embeddings: Tensor | None = None
    loss: float | None = None
    gradients: tuple[Tensor, ...] | None = None


def groups_of(way: Way, lengths: Sequence[int], size: Cut) -> list[list[int]]:
    """Which documents share a pass of a way."""
    return cut(lengths, way.layout, way.batch_size or size.batch_size, size.positions)


def batches_of(way: Way, documents: Sequence[Tensor], size: Cut, subject: Subject) -> list[Batch]:
    """All documents as micro-batches of a way."""
    groups = groups_of(way, [len(document) for document in documents], size)
    pad = subject.tokenizer.pad_token_id or 0
    return [collate(documents, group, way.layout, subject.model.device, pad) for group in groups]


def step(runner: Runner, batch: Batch, subject: Subject, targets: int) -> Tensor:
    """The work that is timed: embeddings of a batch, or its share of the loss and of the gradients."""
    if subject.task == "embedding":
        with torch.no_grad():
            return runner.embeddings(batch)
    loss = runner.loss(batch, targets)
    loss.backward()
    return loss.detach()


def forget_gradients(subject: Subject) -> None:
    """Gives the memory of all gradients back; the models of all ways share them."""
    subject.model.zero_grad(set_to_none=True)


def targets_of(documents: Sequence[Tensor]) -> int:
    """How many tokens are predicted: all but the first of each document."""
    return sum(len(document) - 1 for document in documents)


def outcome(
    runner: Runner, way: Way, documents: Sequence[Tensor], size: Cut, subject: Subject, *, gradients: bool
) -> Outcome:
    """Runs a way over all of these documents."""
    batches, targets = batches_of(way, documents, size, subject), targets_of(documents)
    results = []
    for batch in batches:
        results.append((batch, step(runner, batch, subject, targets)))
        if not gradients:
            forget_gradients(subject)
    return _outcome(results, subject, subject.model, gradients)


def exact(documents: Sequence[Tensor], subject: Subject, dtype: torch.dtype) -> Outcome:
    """The model on one document at a time, so that no document can disturb another.

    Args:
        documents: What to run.
        subject: The model; on transformers' sdpa attention, or eager for models that it does not serve.
        dtype: float64 for the truth (but for what transformers computes in float32 whatever it is given: norms and
            angles), the model's own, with transformers' own loss, for the error that it makes by itself.
    """
    model = copy.deepcopy(subject.model).to(dtype)
    model.set_attn_implementation("eager")
    with suppress(ValueError, ImportError):
        model.set_attn_implementation("sdpa")
    targets = targets_of(documents)
    results = []
    for number, document in enumerate(documents):
        batch = collate(documents, [number], "padded", model.device)
        tokens = document[None].to(model.device)
        if subject.task == "embedding":
            with torch.no_grad():
                hidden = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            results.append((batch, pool_padded(hidden, batch, subject.pooling)))
            continue
        if dtype == torch.float64:
            # transformers' own loss rounds the logits to float32 first, and of many columns torch's gradient in
            # float32 is off by several parts in a million, all in one direction: layers below make more of it.
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum") / targets
        else:
            loss = model(input_ids=tokens, labels=tokens, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        results.append((batch, loss.detach()))
    return _outcome(results, subject, model, subject.task == "language")


def _outcome(results: Sequence[tuple[Batch, Tensor]], subject: Subject, model: Any, gradients: bool) -> Outcome:
    if subject.task == "embedding":
        rows: dict[int, Tensor] = {}
        for batch, found in results:
            rows.update(zip(batch.numbers, found.double().cpu(), strict=True))
        return Outcome(embeddings=torch.stack([rows[number] for number in sorted(rows)]))
    loss = torch.stack([found.double().cpu() for _, found in results]).sum().item()
    kept = None
    if gradients:
        # A weight that no way reaches has none in any of them.
        kept = tuple(weight.grad.double().cpu() for weight in model.parameters() if weight.grad is not None)
        model.zero_grad(set_to_none=True)
    return Outcome(loss=loss, gradients=kept)


def errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """How far one outcome is from another, in units that mean something.

    Returns:
        For embeddings `cosine`, the largest 1 - cosine between a document's two embeddings; for language models
        `loss`, the difference in nats, and `gradient`, the norm of the difference over the norm of all gradients.
        What is missing or has another shape is infinitely wrong.
    """
    if truth.embeddings is not None:
        if found.embeddings is None or found.embeddings.shape != truth.embeddings.shape:
            return {"cosine": float("inf")}
        cosines = torch.nn.functional.cosine_similarity(found.embeddings, truth.embeddings)
        return {"cosine": (1 - cosines).max().item()}
    loss = float("inf") if found.loss is None or truth.loss is None else abs(found.loss - truth.loss)
    return {"loss": loss, "gradient": _distance(found.gradients or (), truth.gradients or ())}


def _distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in truth]:
        return float("inf")
    apart = sum((one - other).square().sum().item() for one, other in zip(found, truth, strict=True))
    return float((apart / max(sum(tensor.square().sum().item() for tensor in truth), 1e-300)) ** 0.5)
