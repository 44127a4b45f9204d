"""Batch samplers: over a packing, by length buckets, by a budget of tokens."""

from __future__ import annotations

from typing import Any, Literal

from maskops.data.bins import Bin, Packing, Piece
from maskops.data.lengths import Lengths, check_count, read_lengths
from maskops.data.sharding import Last, RankedBatches, chance_of, check_word, checksum

Between = Literal["reorder", "repack", "same"]
Counted = Literal["padded", "packed"]


class PackingSampler(RankedBatches):
    """The documents of one bin after the other: each batch fits a `PackedBatch` of the packing's capacity.

    Batches hold numbers of documents, or, for strategy "chunks", `Piece`s, which a `PieceDataset` understands.

    Args:
        packing: what `data.pack` gave, packed for ``ranks`` that are a multiple of ``world_size``, or for one.
        rank: of this process; torch.distributed's by default, 0 without it. With a DataLoader that accelerate or
            Trainer deals out, give ``rank=0, world_size=1``; see `RankedBatches`.
        world_size: number of processes; likewise.
        seed: of the order of steps in later epochs.
        between_epochs: "reorder": the same bins, steps in another order (the number of batches stays); "repack":
            documents are packed anew, for epoch e with the packing's seed + e; "same": nothing changes.
        last: ranks that have no bin in the last step: "repeat" bins of the front, or "drop" the step; counted in
            ``repeated`` and ``dropped``.

    Raises:
        ValueError: a packing for other ranks, whose steps would be mixed.
    """

    def __init__(
        self,
        packing: Packing,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        between_epochs: Between = "reorder",
        last: Last = "repeat",
    ) -> None:
        check_word("between_epochs", between_epochs, Between)
        super().__init__(packing.ranks if packing.ranks > 1 else None, rank, world_size, seed, last)
        self.packing = packing
        self.between_epochs = between_epochs
        self._bins_checksum: int | None = None

    def plan(self, epoch: int) -> list[Bin]:
        """The bins of the packing, in the order of the epoch; the first epoch's is the packing's own."""
        packing = self.packing
        if epoch == 0 or self.between_epochs == "same":
            return packing.bins
        if self.between_epochs == "repack":
            return packing.repack((packing.seed or 0) + epoch).bins
        steps = [packing.bins[start : start + self.ranks] for start in range(0, len(packing.bins), self.ranks)]
        last = [] if not steps or (len(steps[-1]) == self.ranks and all(steps[-1])) else [steps.pop()]
        chance_of(self.seed, epoch).shuffle(steps)
        return [items for step in steps + last for items in step]

    def _decisive(self) -> dict[str, Any]:
        if self._bins_checksum is None:
            self._bins_checksum = checksum(
                tuple(item) if isinstance(item, Piece) else item for items in self.packing.bins for item in (*items, -1)
            )
        return {"between_epochs": self.between_epochs, "checksum of the bins": self._bins_checksum}


class LengthBucketSampler(RankedBatches):
    """Batches of a fixed number of documents of similar length.

    Documents are shuffled, cut into mega-batches, sorted inside each, and cut into batches; the batches of a step are
    neighbours, so that ranks are alike; steps come in a random order.

    Args:
        lengths: tokens of each document: a list, a tensor or an array of integers.
        documents: of a batch; the last one may have fewer.
        mega_batch: steps of a mega-batch: the more, the less padding and the less random.
        ranks: batches computed side by side; ``world_size`` by default.
        rank: of this process; torch.distributed's by default, 0 without it. With a DataLoader that accelerate or
            Trainer deals out, give ``rank=0, world_size=1`` and their number as ``ranks``; see `RankedBatches`.
        world_size: number of processes; likewise.
        seed: with the epoch, decides the order.
        last: where the last step has too few batches: "repeat" batches of the front, or "drop" the step.
    """

    def __init__(
        self,
        lengths: Lengths,
        documents: int,
        *,
        mega_batch: int = 50,
        ranks: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        last: Last = "repeat",
    ) -> None:
        super().__init__(ranks, rank, world_size, seed, last)
        self.lengths = read_lengths(lengths)
        self._lengths_checksum = checksum(self.lengths)
        self.documents = check_count("documents", documents)
        self.mega_batch = check_count("mega_batch", mega_batch)

    def plan(self, epoch: int) -> list[Bin]:
        """Batches of neighbours in sorted mega-batches."""
        count = self.documents
        megas = _mega_batches(self.lengths, count * self.ranks * self.mega_batch, self.seed, epoch)
        batches = [[mega[start : start + count] for start in range(0, len(mega), count)] for mega in megas]
        return _steps_in_random_order(batches, self.ranks, self.seed, epoch)

    def _decisive(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "mega_batch": self.mega_batch,
            "checksum of the lengths": self._lengths_checksum,
        }


class TokenBudgetSampler(RankedBatches):
    """Batches of similar lengths with as many documents as a budget of tokens allows.

    Args:
        lengths: tokens of each document: a list, a tensor or an array of integers.
        max_tokens: of a batch.
        counted: "padded": documents times the longest; "packed": the sum of the lengths.
        max_documents: of a batch, at most.
        mega_batch: steps of a mega-batch, about; see `LengthBucketSampler`.
        ranks: batches computed side by side; ``world_size`` by default.
        rank: of this process; torch.distributed's by default, 0 without it. With a DataLoader that accelerate or
            Trainer deals out, give ``rank=0, world_size=1`` and their number as ``ranks``; see `RankedBatches`.
        world_size: number of processes; likewise.
        seed: with the epoch, decides the order. The number of batches varies a little from epoch to epoch.
        last: where the last step has too few batches: "repeat" batches of the front, or "drop" the step.

    Raises:
        ValueError: a document longer than the budget.
    """

    def __init__(
        self,
        lengths: Lengths,
        max_tokens: int,
        *,
        counted: Counted = "padded",
        max_documents: int | None = None,
        mega_batch: int = 50,
        ranks: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        last: Last = "repeat",
    ) -> None:
        super().__init__(ranks, rank, world_size, seed, last)
        self.lengths = read_lengths(lengths)
        self._lengths_checksum = checksum(self.lengths)
        self.max_tokens = check_count("max_tokens", max_tokens)
        check_word("counted", counted, Counted)
        self.counted = counted
        self.max_documents = len(self.lengths) if max_documents is None else check_count("max_documents", max_documents)
        self.mega_batch = check_count("mega_batch", mega_batch)
        for number, length in enumerate(self.lengths):
            if length > max_tokens:
                raise ValueError(
                    f"lengths[{number}]={length} is more than max_tokens={max_tokens}: raise it, or shorten the "
                    "document with data.prepare(..., max_length=..., overlong=...)"
                )

    def plan(self, epoch: int) -> list[Bin]:
        """Sorted mega-batches cut where the budget ends."""
        a_batch = len(self.lengths) * self.max_tokens // max(1, sum(self.lengths))
        documents = max(1, a_batch) * self.ranks * self.mega_batch
        megas = _mega_batches(self.lengths, documents, self.seed, epoch)
        return _steps_in_random_order([self._cut(mega) for mega in megas], self.ranks, self.seed, epoch)

    def _decisive(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "counted": self.counted,
            "max_documents": self.max_documents,
            "mega_batch": self.mega_batch,
            "checksum of the lengths": self._lengths_checksum,
        }

    def _cut(self, documents: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        used = longest = 0
        for document in documents:  # longest first
            length = self.lengths[document]
            count = len(batches[-1]) + 1 if batches else 0
            tokens = longest * count if self.counted == "padded" else used + length
            if not batches or tokens > self.max_tokens or count > self.max_documents:
                batches.append([])
                used, longest = 0, length
            batches[-1].append(document)
            used += length
        return batches


def _mega_batches(lengths: list[int], documents: int, seed: int, epoch: int) -> list[list[int]]:
    """All documents in a random order, cut, and sorted inside each cut, longest first."""
    order = list(range(len(lengths)))
    chance_of(seed, epoch).shuffle(order)
    cuts = [order[start : start + documents] for start in range(0, len(order), documents)]
    return [sorted(cut, key=lengths.__getitem__, reverse=True) for cut in cuts]


def _steps_in_random_order(megas: list[list[list[int]]], ranks: int, seed: int, epoch: int) -> list[Bin]:
    """Neighbours make a step, and so do batches that mega-batches have left over. What is no whole step stays last."""
    steps, left = [], []
    for batches in megas:
        whole = len(batches) - len(batches) % ranks
        steps += [batches[start : start + ranks] for start in range(0, whole, ranks)]
        left += batches[whole:]
    steps += [left[start : start + ranks] for start in range(0, len(left), ranks)]
    last = [steps.pop()] if steps and len(steps[-1]) < ranks else []
    chance_of(seed, epoch + 1).shuffle(steps)
    return [list(batch) for step in steps + last for batch in step]
