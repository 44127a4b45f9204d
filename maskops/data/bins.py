"""A packing: which documents share a bin, which bins share a step, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from maskops.data.cost import ModelShape, attention_work, flops
from maskops.data.lengths import check_count


class Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document: what a chunk of fixed size holds of it.

    ``isolate`` says whether it is a sequence of its own, or one with the other pieces of its bin.
    """

    document: int
    start: int
    stop: int
    isolate: bool = True


Item = int | Piece
"""What a bin holds: the number of a whole document, or a piece of one."""

Bin = list[Item]


def plain(item: Item) -> int | list[int | bool]:
    """An item as JSON and ``torch.load(weights_only=True)`` keep it."""
    return list(item) if isinstance(item, Piece) else item


def from_plain(item: int | Sequence[Any]) -> Item:
    """The way back."""
    return item if isinstance(item, int) else Piece(*item)


@dataclass(frozen=True)
class PackingReport:
    """What a packing wastes.

    Attributes:
        strategy: How it was packed.
        documents: Documents, with the empty ones.
        tokens: Tokens of all documents.
        bins: Bins that hold a document.
        ranks: Bins of a step.
        steps: Steps of every rank.
        fill: Tokens over the room of the bins that hold a document.
        padding_waste: Share of padding if every rank computes a full row in every step, with those ranks that have no
            bin in the last step.
        attention_straggler: Mean over the steps of the largest over the mean `attention_work` of the ranks: 1 when
            they finish together.
        attention_straggler_worst: The same of the worst step.
        flops_straggler: The same mean, of the operations of a whole model.
        length_correlation: Spearman's rank correlation of a document's length with its step: 0 when short and long
            ones are spread over the epoch, 1 or -1 for a curriculum.
        max_segments: Sequences in the fullest bin.
        buffer: Documents that were held at a time.
        buffer_share: The same, as a share of all documents; 0 for none.
        seconds: Time it took.
    """

    strategy: str
    documents: int
    tokens: int
    bins: int
    ranks: int
    steps: int
    fill: float
    padding_waste: float
    attention_straggler: float
    attention_straggler_worst: float
    flops_straggler: float
    length_correlation: float
    max_segments: int
    buffer: int
    buffer_share: float
    seconds: float

    def to_dict(self) -> dict[str, str | int | float]:
        """The attributes as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.strategy}: {self.documents} documents, {self.tokens} tokens in {self.bins} bins, {self.steps} steps"
            f" of {self.ranks}; fill {self.fill:.4f}, padding {self.padding_waste:.2%}; straggler ratio of attention "
            f"{self.attention_straggler:.3f} (worst step {self.attention_straggler_worst:.2f}), of all operations "
            f"{self.flops_straggler:.3f}; correlation of length with step {self.length_correlation:+.3f}; at most "
            f"{self.max_segments} sequences in a bin; buffer of {self.buffer} documents ({self.buffer_share:.1%}); "
            f"{self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class Packing:
    """Bins of documents. The bins of step s are ``bins[s * ranks : (s + 1) * ranks]``, one for each rank.

    Attributes:
        bins: For each bin the numbers of its documents, or the `Piece`s of them (strategy "chunks"). There are
            ``steps * ranks``: the last ones may be empty where documents did not reach all ranks.
        lengths: Tokens of each document.
        capacity: Tokens that a bin has room for.
        ranks: Bins of a step.
        strategy: How it was packed.
        isolate: Whether documents that share a bin are sequences of their own. If not, a bin is one sequence.
        seed: Seed of the order in which documents came; None for the order given.
        buffer: Documents that were held at a time.
        seconds: Time it took.
    """

    bins: list[Bin]
    lengths: list[int]
    capacity: int
    ranks: int = 1
    strategy: str = ""
    isolate: bool = True
    seed: int | None = None
    buffer: int = 0
    seconds: float = 0.0
    _again: Callable[..., Packing] | None = field(default=None, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Steps, the same number on every rank."""
        return -(-len(self.bins) // self.ranks)

    @property
    def fill(self) -> float:
        """Tokens over the room of the bins that hold a document; 1 for no bins."""
        used = sum(1 for items in self.bins if items)
        return sum(self.lengths) / (used * self.capacity) if used else 1.0

    def segments(self, number: int) -> list[int]:
        """Lengths of the sequences of a bin."""
        sizes = [
            item.stop - item.start if isinstance(item, Piece) else self.lengths[item] for item in self.bins[number]
        ]
        return sizes if self.isolate else [sum(sizes)] * bool(sizes)

    def of_rank(self, rank: int) -> list[Bin]:
        """The bins of one rank, one for each step."""
        if not 0 <= check_count("rank", rank, least=0) < self.ranks:
            raise ValueError(f"rank={rank}: this packing has {self.ranks} ranks, expected 0 to {self.ranks - 1}")
        return self.bins[rank :: self.ranks]

    def repack(self, seed: int | None) -> Packing:
        """The same documents packed with the same arguments, in another order.

        Raises:
            ValueError: the packing was not made by ``data.pack``.
        """
        if self._again is None:
            raise ValueError("repack: this Packing was not made by data.pack; its arguments are not known")
        return self._again(seed=seed)

    def report(self, ranks: int | None = None, shape: ModelShape | None = None) -> PackingReport:
        """What the packing wastes, over the bins that hold a document.

        Args:
            ranks: bins that are computed side by side; as packed by default.
            shape: the model whose operations are counted; see `ModelShape`.
        """
        ranks = self.ranks if ranks is None else check_count("ranks", ranks)
        bins = self.bins
        segments = [self.segments(number) for number in range(len(bins))]
        attention = [float(attention_work(lengths)) for lengths in segments]
        operations = [float(flops(lengths, shape)) for lengths in segments]
        ratios = straggler_ratios(attention, ranks)
        tokens, used, steps = sum(self.lengths), sum(map(bool, bins)), -(-len(bins) // ranks)
        placed = [
            (self.lengths[item.document if isinstance(item, Piece) else item], number // ranks)
            for number, items in enumerate(bins)
            for item in items
        ]
        return PackingReport(
            strategy=self.strategy,
            documents=len(self.lengths),
            tokens=tokens,
            bins=used,
            ranks=ranks,
            steps=steps,
            fill=self.fill,
            padding_waste=1 - tokens / (steps * ranks * self.capacity) if steps else 0.0,
            attention_straggler=_mean(ratios),
            attention_straggler_worst=max(ratios, default=1.0),
            flops_straggler=_mean(straggler_ratios(operations, ranks)),
            length_correlation=rank_correlation([length for length, _ in placed], [step for _, step in placed]),
            max_segments=max(map(len, segments), default=0),
            buffer=self.buffer,
            buffer_share=self.buffer / len(self.lengths) if self.lengths else 0.0,
            seconds=self.seconds,
        )


def straggler_ratios(work: Sequence[float], ranks: int) -> list[float]:
    """For each step the largest over the mean work of its ranks; 1 for a step without work.

    Args:
        work: of each bin; step s has those from ``s * ranks`` on. Ranks without a bin in the last step have none.
        ranks: bins of a step.
    """
    ratios = []
    for start in range(0, len(work), ranks):
        step = work[start : start + ranks]
        mean = sum(step) / ranks
        ratios.append(max(step) / mean if mean else 1.0)
    return ratios


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values at the mean of their ranks; 0 where one of the two is constant."""
    x, y = _centred_ranks(first), _centred_ranks(second)
    scale = math.sqrt(sum(value * value for value in x) * sum(value * value for value in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / scale if scale else 0.0


def _centred_ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + stop - len(order)) / 2
        start = stop
    return ranks


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
