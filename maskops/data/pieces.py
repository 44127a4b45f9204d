"""Datasets of pieces: documents that a packing has cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from maskops.data.arguments import token_ids
from maskops.data.bins import Item, Piece
from maskops.data.sharding import check_word


def tokens_of(document: Any) -> int:
    """Tokens of a document: of a mapping those of its ``input_ids``.

    Raises:
        TypeError: what has no length.
        ValueError: a mapping without ``input_ids``.
    """
    if isinstance(document, Mapping):
        if "input_ids" not in document:
            raise ValueError(f"a document has the fields {sorted(document)}: expected 'input_ids' among them")
        document = document["input_ids"]
    if not hasattr(document, "__len__"):
        raise TypeError(f"a document is {type(document).__name__}: expected token ids, or a mapping with 'input_ids'")
    return len(document)


def cut(document: Any, piece: Piece) -> dict[str, Any]:
    """A piece of a document, with the positions of one that begins there.

    Args:
        document: a mapping with ``input_ids``, or token ids.
        piece: which tokens. Other fields with an element for each of them, of whatever type, are cut likewise.

    Raises:
        IndexError: a piece that is not inside the document.
    """
    item = dict(document) if isinstance(document, Mapping) else {"input_ids": document}
    length = tokens_of(document)
    if not 0 <= piece.start <= piece.stop <= length:
        raise IndexError(f"documents[{piece.document}] has {length} tokens, the piece is {piece.start} to {piece.stop}")
    for name, value in item.items():
        if _is_aligned(value, length):
            if name in ("input_ids", "labels"):
                value = token_ids(f"documents[{piece.document}][{name!r}]", value)
            part = value[piece.start : piece.stop]
            # A copy: what a worker sends takes its whole buffer along.
            item[name] = part.clone() if isinstance(part, Tensor) else part
    if piece.start:
        item["first_position"] = 0
    return item


class PieceDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset of documents, indexed by `Piece` as well as by number: what a `PackingSampler` over chunks asks for.

    Fields with an element for each token (labels, masks) are cut with the tokens. The token after a piece is not in its
    bin, so that a piece's last token has no target.

    Args:
        documents: a map-style dataset of mappings with ``input_ids``, or of token lists; such as ``data.prepare``'s.
        positions: "restart": a piece's positions begin at 0; "continue": at its place in the document
            (``first_position``).
        isolate: whether pieces stay sequences of their own. If not, a batch of them is one item: the classical packing,
            in which documents see what stands before them. Fields that are not one for each token are left out. None:
            as they were packed, ``data.pack(..., isolate=...)``.
    """

    def __init__(
        self, documents: Any, *, positions: Literal["restart", "continue"] = "restart", isolate: bool | None = None
    ) -> None:
        check_word("positions", positions, Literal["restart", "continue"])
        if positions == "continue" and isolate is False:
            raise ValueError("positions='continue': with isolate=False a bin is one sequence, whose positions run on")
        self.documents = documents
        self.positions = positions
        self.isolate = isolate

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: Item) -> dict[str, Any]:
        number = index.document if isinstance(index, Piece) else index
        document = self.documents[number]
        piece = index if isinstance(index, Piece) else Piece(number, 0, tokens_of(document))
        item = cut(document, piece)
        if not self._isolates(index):
            return aligned_fields(item)
        if self.positions == "continue":
            first = document.get("first_position", 0) if isinstance(document, Mapping) else 0
            item["first_position"] = int(first) + piece.start
        return item

    def __getitems__(self, indices: list[Item]) -> list[dict[str, Any]]:
        """The items of a batch, as DataLoader asks for them: joined to one without ``isolate``."""
        items = [self[index] for index in indices]
        return items if all(map(self._isolates, indices)) else [join(indices, items)]

    def _isolates(self, index: Item) -> bool:
        if self.isolate is not None:
            return self.isolate
        isolate = index.isolate if isinstance(index, Piece) else True
        if not isolate and self.positions == "continue":
            raise ValueError("positions='continue': packed with isolate=False, a bin is one sequence; leave it out")
        return isolate


def aligned_fields(item: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a piece that have an element for each token: the ones that can be joined."""
    length = tokens_of(item)
    return {name: value for name, value in item.items() if _is_aligned(value, length)}


def join(indices: Sequence[object], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pieces, of `aligned_fields`, as one sequence; errors call them by their indices.

    Raises:
        ValueError: pieces with other fields than the first.
    """
    fields = set(items[0])
    for index, item in zip(indices, items, strict=True):
        if set(item) != fields:
            raise ValueError(
                f"item {index} has the fields {sorted(item)}, item {indices[0]} {sorted(fields)}: documents that "
                "are joined need the same ones"
            )
    return {name: torch.cat(_tensors([item[name] for item in items])) for name in items[0]}


def _tensors(values: list[Any]) -> list[Tensor]:
    """Lists and arrays become tensors; empty ones, whose type nobody knows, stay out unless all are."""
    return [torch.as_tensor(value) for value in values if len(value)] or [torch.as_tensor(values[0])]


def _is_aligned(value: object, length: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and value.shape[0] == length
    sliced = (
        hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))
    )
    return sliced and len(value) == length  # type: ignore[arg-type]  # it has a length
