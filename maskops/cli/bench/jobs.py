"""The three jobs. Each turns a variant and some documents into a runner, and its outcome into tensors to compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from maskops.cli.bench import model as transformer
from maskops.cli.bench.batches import Batch, stream
from maskops.cli.bench.variants import Variant

Outcome = dict[str, Tensor]
"""Named results in an order that does not depend on the layout: document after document, padding left out."""


@dataclass(frozen=True)
class Settings:
    """The sizes of the work.

    Attributes:
        batch_size: Documents in a micro-batch of the padded and packed layouts.
        vocabulary, width, heads, layers, max_length: The model; see `model.Transformer`.
        dtype: Of the activations, the weights and the logits.
        exact: Compute in float64 instead, on the same values, rounded to `dtype` first: for the oracle.
        device: Where the work is done.
        seed: Of the weights and of the random queries, keys, values and logits.
    """

    batch_size: int
    vocabulary: int
    width: int
    heads: int
    layers: int
    max_length: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    exact: bool = False

    @property
    def computed(self) -> torch.dtype:
        """The dtype that the work is done in."""
        return torch.float64 if self.exact else self.dtype


class Work(Protocol):
    """One variant's share of a job, ready to be run any number of times."""

    def run(self) -> None:
        """Does the work once; this is what is timed."""

    def outcome(self) -> Outcome:
        """Results of the last run, in document order, float64."""

    def loss(self) -> float | None:
        """The loss of the last run; None where the job has none."""


def _noise(
    numbers: Sequence[int], lengths: Sequence[int], shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> Tensor:
    """Normal values that depend on the document and the seed alone: `(sum of lengths, *shape)`, rounded to `dtype`."""
    pieces = []
    for number, length in zip(numbers, lengths, strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        pieces.append(torch.randn(length, *shape, generator=generator))
    return torch.cat(pieces).to(dtype)


def _spread(values: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Values of the documents' tokens in the layout of the batch; what padding holds is zero."""
    laid = torch.zeros(batch.tokens.numel(), *values.shape[1:], dtype=dtype, device=batch.tokens.device)
    laid[batch.document_rows] = values.to(laid)
    return laid.view(*batch.tokens.shape, *values.shape[1:])


def _in_order(parts: Sequence[tuple[Batch, Tensor]]) -> Tensor:
    """The documents' rows of `(*tokens.shape, ...)` tensors, document after document, in float64 on the CPU."""
    pieces: dict[int, Tensor] = {}
    for batch, values in parts:
        rows = values.detach().flatten(0, batch.tokens.ndim - 1)[batch.document_rows].double().cpu()
        pieces.update(zip(batch.numbers, rows.split(batch.lengths), strict=True))
    return torch.cat([pieces[number] for number in sorted(pieces)])


class _Attention:
    """Queries, keys and values of random normals; the documents give the lengths."""

    def __init__(self, variant: Variant, documents: Sequence[Tensor], settings: Settings, backward: bool) -> None:
        self._way = variant.attention
        self._backward = backward
        self._batches = stream(documents, variant.layout, settings.batch_size, settings.device)
        shape = (settings.heads, settings.width // settings.heads)
        self._inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._upstream: list[Tensor] = []
        for batch in self._batches:
            laid = []
            for offset in range(4):
                values = _noise(batch.numbers, batch.lengths, shape, 4 * settings.seed + offset, settings.dtype)
                tensor = _spread(values, batch, settings.computed)
                # (batch, heads, sequence, head_dim) as a view, as a model's projections leave it.
                laid.append(tensor if batch.packed else tensor.transpose(1, 2))
            q, k, v, upstream = laid
            for leaf in (q, k, v):
                leaf.requires_grad_(backward)
            self._inputs.append((q, k, v))
            self._upstream.append(upstream)
        self._last: list[tuple[Tensor, ...]] = []

    def run(self) -> None:
        self._last = []
        for batch, (q, k, v), upstream in zip(self._batches, self._inputs, self._upstream, strict=True):
            with torch.set_grad_enabled(self._backward):
                out = self._way.attend(q, k, v, self._way.prepare(batch))
            gradients = torch.autograd.grad(out, (q, k, v), upstream) if self._backward else ()
            self._last.append((out.detach(), *gradients))

    def outcome(self) -> Outcome:
        named: Outcome = {}
        for index, name in enumerate(("out", "dq", "dk", "dv")[: len(self._last[0])]):
            parts = [
                (batch, values[index] if batch.packed else values[index].transpose(1, 2))
                for batch, values in zip(self._batches, self._last, strict=True)
            ]
            named[name] = _in_order(parts)
        return named

    def loss(self) -> None:
        return None


class _Loss:
    """Cross-entropy over the vocabulary from given logits; the documents give the targets."""

    def __init__(self, variant: Variant, documents: Sequence[Tensor], settings: Settings, backward: bool) -> None:
        self._loss = variant.loss
        self._backward = backward
        self._batches = stream(documents, variant.layout, settings.batch_size, settings.device)
        self._logits: list[Tensor] = []
        for batch in self._batches:
            shape = (settings.vocabulary,)
            values = _noise(batch.numbers, batch.lengths, shape, settings.seed, settings.dtype)
            laid = _spread(values, batch, settings.computed)
            self._logits.append(laid.flatten(0, -2).requires_grad_(backward))
        self._last: list[tuple[Tensor, ...]] = []

    def run(self) -> None:
        self._last = []
        for batch, logits in zip(self._batches, self._logits, strict=True):
            with torch.set_grad_enabled(self._backward):
                loss = self._loss(logits, batch.targets.flatten())
            gradients = torch.autograd.grad(loss, (logits,)) if self._backward else ()
            self._last.append((loss.detach(), *gradients))

    def outcome(self) -> Outcome:
        named = {"loss": self._total()}
        if self._backward:
            parts = [
                (batch, values[1].unflatten(0, batch.tokens.shape))
                for batch, values in zip(self._batches, self._last, strict=True)
            ]
            named["dlogits"] = _in_order(parts)
        return named

    def loss(self) -> float:
        return self._total().item()

    def _total(self) -> Tensor:
        return torch.stack([values[0].double().cpu() for values in self._last]).sum()


class _Step:
    """The mean next-token loss of all documents in micro-batches and, with `backward`, one AdamW step.

    The learning rate is 0: the optimizer does all of its work, and every run of every variant sees the same weights.
    """

    def __init__(self, variant: Variant, documents: Sequence[Tensor], settings: Settings, backward: bool) -> None:
        self._variant = variant
        self._backward = backward
        self._batches = stream(documents, variant.layout, settings.batch_size, settings.device)
        self._targets = sum(len(document) - 1 for document in documents)
        self._model = transformer.build(
            vocabulary=settings.vocabulary,
            width=settings.width,
            heads=settings.heads,
            layers=settings.layers,
            max_length=settings.max_length,
            seed=settings.seed,
            dtype=settings.dtype,
            device=settings.device,
        ).to(settings.computed)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        self._total = torch.zeros(())

    def run(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        losses = [self._micro_batch(batch) for batch in self._batches]
        if self._backward:
            self._optimizer.step()
        self._total = torch.stack(losses).sum()

    def _micro_batch(self, batch: Batch) -> Tensor:
        variant = self._variant
        with torch.set_grad_enabled(self._backward):
            prepared = variant.attention.prepare(batch)
            hidden = self._model(
                batch.tokens, batch.positions, lambda q, k, v: variant.attention.attend(q, k, v, prepared)
            )
            hidden, targets = hidden.flatten(0, -2), batch.targets.flatten()
            if variant.gather:
                hidden, targets = hidden[batch.target_rows], targets[batch.target_rows]
            loss = variant.loss(self._model.logits(hidden), targets) / self._targets
        if self._backward:
            loss.backward()
        return loss.detach().double()

    def outcome(self) -> Outcome:
        named = {"loss": self._total.cpu()}
        if self._backward:
            gradients = {name: weight.grad for name, weight in self._model.named_parameters()}
            named.update({f"d{name}": value.double().cpu() for name, value in gradients.items() if value is not None})
        return named

    def loss(self) -> float:
        return self._total.item()


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        name: Key in `variants.Variant.jobs` and in the JSON.
        title: Heading of its table.
        work: `(variant, documents, settings, backward) -> Work`.
    """

    name: str
    title: str
    work: Callable[[Variant, Sequence[Tensor], Settings, bool], Work]


JOBS = (
    Job("attention", "Attention alone", _Attention),
    Job("loss", "Cross-entropy alone", _Loss),
    Job("step", "Training step of a small Transformer", _Step),
)
