"""Documents to batches: the three layouts that a training loop can choose from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IGNORED = -100

Layout = Literal["padded", "bucketed", "packed"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of documents.

    Attributes:
        numbers: Which documents of the stream it holds, in order.
        lengths: Their lengths, on the host: whoever built the batch knows them.
        tokens: int64, padded `(batch, longest)` or packed `(total,)`.
        targets: The next token of each token, `IGNORED` after the last one and in padding; the shape of `tokens`.
        positions: Position inside the document; the shape of `tokens`.
        lengths_on_device: int32 `(batch,)`.
        cu_seqlens: int32 `(batch + 1,)`, the cumulated lengths.
        document_rows: int64 `(total,)`: where the documents' tokens lie in `tokens.flatten()`.
        target_rows: int64 `(total - batch,)`: where `targets.flatten()` is a token.
    """

    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    tokens: Tensor
    targets: Tensor
    positions: Tensor
    lengths_on_device: Tensor
    cu_seqlens: Tensor
    document_rows: Tensor
    target_rows: Tensor

    @property
    def packed(self) -> bool:
        """Whether the documents lie one after another, without padding."""
        return self.tokens.ndim == 1

    @property
    def real(self) -> int:
        """Tokens that belong to a document."""
        return sum(self.lengths)


def cut(lengths: Sequence[int], layout: Layout, batch_size: int, positions: int | None = None) -> list[list[int]]:
    """Which documents share a micro-batch.

    Padded and packed take `batch_size` documents as they come. Bucketed sorts by length and fills each micro-batch,
    padding included, up to the mean number of tokens of a packed one: with a fixed number of documents instead, its
    batches of short documents would be needlessly small.

    Args:
        lengths: Tokens of each document.
        layout: See above.
        batch_size: Documents of a padded or packed batch.
        positions: The most positions of a micro-batch, padding included, for models whose memory allows no more; a
            document that is longer has one to itself.
    """
    order = list(range(len(lengths)))
    if layout != "bucketed":
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        if positions is None:
            return batches
        return [part for batch in batches for part in _fitting(batch, lengths, layout, positions)]
    order.sort(key=lambda number: (-lengths[number], number))
    micro_batches = -(-len(order) // batch_size)
    budget = min(-(-sum(lengths) // micro_batches), positions or sum(lengths))
    groups: list[list[int]] = []
    for number in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _fitting(batch: Sequence[int], lengths: Sequence[int], layout: Layout, positions: int) -> list[list[int]]:
    """A batch in as few parts as hold at most so many positions, documents in their order."""
    parts: list[list[int]] = []
    for number in batch:
        grown = [*parts[-1], number] if parts else []
        if grown and taken([grown], lengths, layout) <= positions:
            parts[-1] = grown
        else:
            parts.append([number])
    return parts


def taken(groups: Sequence[Sequence[int]], lengths: Sequence[int], layout: Layout) -> int:
    """Positions of these micro-batches, padding included."""
    if layout == "packed":
        return sum(lengths[number] for group in groups for number in group)
    return sum(len(group) * max(lengths[number] for number in group) for group in groups)


def fill(lengths: Sequence[int], layout: Layout, batch_size: int) -> float:
    """Share of the positions that hold a token of a document."""
    return sum(lengths) / taken(cut(lengths, layout, batch_size), lengths, layout)


def collate(
    documents: Sequence[Tensor], numbers: Sequence[int], layout: Layout, device: torch.device, pad: int = 0
) -> Batch:
    """Lays the documents with these numbers out as one micro-batch; padding holds the token `pad`."""
    chosen = [documents[number] for number in numbers]
    lengths = [len(document) for document in chosen]
    shifted = [torch.cat([document[1:], document.new_tensor([IGNORED])]) for document in chosen]
    positions = [torch.arange(length) for length in lengths]
    if layout == "packed":
        tokens, targets, position_ids = torch.cat(chosen), torch.cat(shifted), torch.cat(positions)
        document_rows = torch.arange(len(tokens))
    else:
        shape = (len(chosen), max(lengths))
        tokens, targets, position_ids = (
            torch.full(shape, pad),
            torch.full(shape, IGNORED),
            torch.zeros(shape, dtype=torch.int64),
        )
        for row, length in enumerate(lengths):
            tokens[row, :length] = chosen[row]
            targets[row, :length] = shifted[row]
            position_ids[row, :length] = positions[row]
        document_rows = torch.cat([row * shape[1] + position for row, position in enumerate(positions)])
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Batch(
        numbers=tuple(numbers),
        lengths=tuple(lengths),
        tokens=tokens.to(device),
        targets=targets.to(device),
        positions=position_ids.to(device),
        lengths_on_device=torch.tensor(lengths, dtype=torch.int32, device=device),
        cu_seqlens=ends.to(device),
        document_rows=document_rows.to(device),
        target_rows=(targets.flatten() != IGNORED).nonzero().flatten().to(device),
    )


def stream(documents: Sequence[Tensor], layout: Layout, batch_size: int, device: torch.device) -> list[Batch]:
    """All documents as micro-batches in one layout."""
    groups = cut([len(document) for document in documents], layout, batch_size)
    return [collate(documents, group, layout, device) for group in groups]
