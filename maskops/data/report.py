"""What padding costs: the same documents under every strategy, in tokens, floating-point operations and memory."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskops.data.bins import Packing
from maskops.data.cost import FORWARD_AND_BACKWARD, ModelShape, flops
from maskops.data.lengths import Lengths, check_count, read_lengths
from maskops.data.packers import Strategy, pack
from maskops.data.samplers import LengthBucketSampler, TokenBudgetSampler
from maskops.data.sharding import RankedBatches

__all__ = ["PaddingReport", "StrategyCost", "padding_report"]

SCHEMA = 1
_LEAST_CAPACITY = 2048
_MEGA_BATCH = 50
_MAPPED = 1000
_BYTES = 2


@dataclass(frozen=True)
class StrategyCost:
    """What one way of making batches costs over all documents.

    Attributes:
        name: for programs, such as ``"random"``.
        label: in words.
        batches: how many there are.
        places: tokens that are computed, padding included.
        fill: share of ``places`` that are tokens of documents.
        attention_flops: floating-point operations of attention, forward and backward, every place of a padded sequence
            counted: what an implementation does that skips nothing but, under a causal mask, the future.
        flops: those of the whole model.
        largest_batch: places of the largest batch, for which memory has to suffice.
        activation_bytes: of one activation tensor, ``(largest_batch, hidden)`` in 16 bits; a training step holds dozens
            of them for each layer.
    """

    name: str
    label: str
    batches: int
    places: int
    fill: float
    attention_flops: int
    flops: int
    largest_batch: int
    activation_bytes: int


@dataclass(frozen=True)
class PaddingReport:
    """What `padding_report` found. Print it, or take `to_json`, or draw it with `chart`.

    Attributes:
        documents: how many.
        tokens: of all documents, after cutting.
        longest: the longest document, after cutting.
        cut: documents that were longer than ``max_length``.
        max_length, batch_size, capacity, seed, model: as given, or their defaults.
        strategies: one row each.
    """

    documents: int
    tokens: int
    longest: int
    cut: int
    max_length: int | None
    batch_size: int
    capacity: int
    seed: int
    model: ModelShape
    strategies: tuple[StrategyCost, ...]

    def strategy(self, name: str) -> StrategyCost:
        """The row with this name."""
        found = {row.name: row for row in self.strategies}
        if name not in found:
            raise KeyError(f"no strategy {name!r}: there are {', '.join(found)}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, texts, lists and dictionaries."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "strategies": [*map(dataclasses.asdict, self.strategies)]}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def __str__(self) -> str:
        cut = f", {self.cut:,} of them cut to that" if self.cut else ""
        heads = [
            f"{self.documents:,} documents, {self.tokens:,} tokens, the longest {self.longest:,}{cut}",
            f"padded: batches of {self.batch_size} documents; packed: rows of {self.capacity:,} places; model: "
            f"{self.model.layers} layers, width {self.model.hidden:,}, {self.model.heads} heads",
        ]
        table = [("", "filled", "places", "attention", "all FLOPs", "largest batch", "activation")]
        table += [
            (
                row.label,
                f"{row.fill:.1%}",
                f"{row.places:,}",
                quantity(row.attention_flops),
                quantity(row.flops),
                f"{row.largest_batch:,}",
                f"{quantity(row.activation_bytes)}B",
            )
            for row in self.strategies
        ]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
        notes = [
            "filled: share of the places that hold a document's token; FLOPs: forward and backward over all documents,",
            "padding computed; activation: one tensor (largest batch, width) in 16 bits",
        ]
        return "\n".join([*heads, "", *lines, "", *notes])

    def chart(self, path: str | Path) -> None:
        """Draws the places of each strategy, real and padding, and what its attention costs.

        Args:
            path: the picture; its suffix says which format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from maskops.data import report_chart
        except ModuleNotFoundError as error:
            raise ImportError(
                f"chart: {error.name} is not installed: pip install matplotlib (or the extra: torch-maskops[bench])"
            ) from error
        report_chart.draw(self, Path(path))


def quantity(number: float) -> str:
    """A number with a prefix: 12.3 T."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5:
            return f"{number:.3g} {prefix}".rstrip()
        number /= 1000
    return f"{number:.3g} Z"


def padding_report(
    lengths: Lengths,
    *,
    batch_size: int = 32,
    capacity: int | None = None,
    max_length: int | None = None,
    model: ModelShape | None = None,
    seed: int = 0,
) -> PaddingReport:
    """What padding costs for documents of these lengths under each strategy.

    The strategies, by name:
        - ``fixed``: every document padded to ``max_length``.
        - ``random``: batches of ``batch_size`` random documents, padded to the longest of each.
        - ``grouped``: the same, sorted by length within every 50 batches, by `data.LengthBucketSampler`.
        - ``sorted``: the same, all documents sorted by length: the least that padding can cost, in a fixed order.
        - ``token_budget``: batches of similar lengths with as many documents as ``capacity`` has room for, padding
          included, by `data.TokenBudgetSampler`.
        - ``chunks``: packed, the stream of documents cut every ``capacity`` tokens; ``chunks_joined``: the same, where
          documents see each other.
        - ``in_order``: packed, a new row whenever a document does not fit any more.
        - ``first_fit``, ``best_fit_decreasing``, ``balanced``: packed by `data.pack`; ``best_fit_by_1000``: every 1000
          documents by themselves, as libraries do that pack while they map a data set.

    Args:
        lengths: tokens of each document.
        batch_size: documents of a padded batch.
        capacity: places of a packed row; by default 2048, or the longest document if that is longer.
        max_length: longer documents are cut to this; None cuts nothing and pads ``fixed`` to the longest.
        model: the model whose operations are counted; by default `ModelShape()`.
        seed: order of the documents.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: no document, a negative length, or one longer than ``capacity``.
    """
    given = read_lengths(lengths)
    check_count("batch_size", batch_size)
    if max_length is not None:
        check_count("max_length", max_length)
    kept = given if max_length is None else [min(length, max_length) for length in given]
    if not sum(kept):
        raise ValueError(f"lengths: expected a token to report on, got {len(given)} documents without any")
    longest = max(kept)
    capacity = max(_LEAST_CAPACITY, longest) if capacity is None else capacity
    check_count("capacity", capacity)
    if longest > capacity:
        raise ValueError(
            f"capacity={capacity}: the longest document has {longest} tokens; give a larger capacity, or max_length="
            f"{capacity} to cut documents"
        )
    shape = ModelShape() if model is None else model
    shuffled = random.Random(seed).sample(kept, len(kept))
    width = longest if max_length is None else max_length
    # One process computes all batches here, whatever torch.distributed says.
    grouping = LengthBucketSampler(kept, batch_size, mega_batch=_MEGA_BATCH, ranks=1, rank=0, world_size=1, seed=seed)
    budget = TokenBudgetSampler(kept, capacity, mega_batch=_MEGA_BATCH, ranks=1, rank=0, world_size=1, seed=seed)
    groups, budgets = _sampled(grouping, kept), _sampled(budget, kept)
    rows = [
        _padded("fixed", f"padded to {width:,}", _batches(shuffled, batch_size), shape, sum(kept), width=width),
        _padded("random", "padded, random batches", _batches(shuffled, batch_size), shape, sum(kept)),
        _padded("grouped", "padded, grouped by length", groups, shape, sum(kept)),
        _padded("sorted", "padded, sorted by length", _batches(sorted(kept), batch_size), shape, sum(kept)),
        _padded("token_budget", "padded, token budget", budgets, shape, sum(kept)),
    ]
    for name, label, bins in _packings(shuffled, capacity, seed):
        rows.append(_cost(name, label, bins, [capacity] * len(bins), shape, sum(kept)))
    return PaddingReport(
        documents=len(given),
        tokens=sum(kept),
        longest=longest,
        cut=sum(length > longest for length in given),
        max_length=max_length,
        batch_size=batch_size,
        capacity=capacity,
        seed=seed,
        model=shape,
        strategies=tuple(rows),
    )


def _batches(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    return [lengths[first : first + size] for first in range(0, len(lengths), size)]


def _sampled(sampler: RankedBatches, lengths: Sequence[int]) -> list[list[int]]:
    """Lengths in the batches of a sampler's first epoch."""
    return [[lengths[number] for number in batch if isinstance(number, int)] for batch in sampler.plan(0)]


def _packings(lengths: list[int], capacity: int, seed: int) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Each packed strategy with the lengths of the sequences in each row."""

    def packed(strategy: Strategy, isolate: bool = True) -> list[list[int]]:
        return _segments(pack(lengths, capacity, strategy, seed=seed, isolate=isolate))

    yield "chunks", "packed, chunks", packed("chunks")
    yield "chunks_joined", "packed, chunks, not isolated", packed("chunks", isolate=False)
    yield "in_order", "packed, in order", _in_order(lengths, capacity)
    yield "first_fit", "packed, first fit", packed("first_fit")
    groups = [
        _segments(pack(group, capacity, "best_fit_decreasing", seed=seed)) for group in _batches(lengths, _MAPPED)
    ]
    yield "best_fit_by_1000", "packed, best fit, 1000 at a time", [row for group in groups for row in group]
    yield "best_fit_decreasing", "packed, best fit", packed("best_fit_decreasing")
    yield "balanced", "packed, balanced", packed("balanced")


def _segments(packing: Packing) -> list[list[int]]:
    return [packing.segments(number) for number, items in enumerate(packing.bins) if items]


def _in_order(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    room = capacity
    for length in lengths:
        if length > room:
            rows.append([])
            room = capacity
        rows[-1].append(length)
        room -= length
    return rows


def _padded(
    name: str,
    label: str,
    batches: Iterable[Sequence[int]],
    shape: ModelShape,
    tokens: int,
    *,
    width: int | None = None,
) -> StrategyCost:
    """Batches of documents, each padded to its longest or to ``width``."""
    padded = [[max(batch) if width is None else width] * len(batch) for batch in batches]
    return _cost(name, label, padded, [sum(batch) for batch in padded], shape, tokens)


def _cost(
    name: str, label: str, batches: Sequence[Sequence[int]], places: Sequence[int], shape: ModelShape, tokens: int
) -> StrategyCost:
    """The row of a strategy.

    Args:
        name, label: as in the row.
        batches: the sequences of each batch, as long as they are computed.
        places: the places of each batch; those that belong to no sequence cost all but attention.
        shape: the model.
        tokens: the real ones of all documents.
    """
    sequences = [length for batch in batches for length in batch]
    linear = FORWARD_AND_BACKWARD * shape.flops_per_token
    attention = flops(sequences, shape) - linear * sum(sequences)
    total, largest = sum(places), max(places)
    return StrategyCost(
        name=name,
        label=label,
        batches=len(places),
        places=total,
        fill=tokens / total,
        attention_flops=attention,
        flops=attention + linear * total,
        largest_batch=largest,
        activation_bytes=_BYTES * shape.hidden * largest,
    )
