"""Datasets of pieces: documents that a packing has cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from maskops.data.arguments import token_ids
from maskops.data.bins import Item, Piece
from maskops.data.sharding import check_word


def tokens_of(document: Any) -> int:
    """Tokens of a document: of a mapping those of its ``input_ids``."""
    return len(document["input_ids"] if isinstance(document, Mapping) else document)


def cut(document: Any, piece: Piece) -> dict[str, Any]:
    """A piece of a document, with the positions of one that begins there.

    Args:
        document: a mapping with ``input_ids``, or token ids.
        piece: which tokens.

    Raises:
        IndexError: a piece that is not inside the document.
    """
    item = dict(document) if isinstance(document, Mapping) else {"input_ids": document}
    length = tokens_of(document)
    if not 0 <= piece.start <= piece.stop <= length:
        raise IndexError(f"documents[{piece.document}] has {length} tokens, the piece is {piece.start} to {piece.stop}")
    for name, value in item.items():
        if _is_aligned(value, length):
            # A copy: what a worker sends takes its whole buffer along.
            tokens = token_ids(f"documents[{piece.document}][{name!r}]", value)
            item[name] = tokens[piece.start : piece.stop].clone()
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
            in which documents see what stands before them. Fields that are not one for each token are left out.
    """

    def __init__(
        self, documents: Any, *, positions: Literal["restart", "continue"] = "restart", isolate: bool = True
    ) -> None:
        check_word("positions", positions, Literal["restart", "continue"])
        if positions == "continue" and not isolate:
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
        if not self.isolate:
            length = piece.stop - piece.start
            return {name: value for name, value in item.items() if _is_aligned(value, length)}
        if self.positions == "continue":
            first = document.get("first_position", 0) if isinstance(document, Mapping) else 0
            item["first_position"] = int(first) + piece.start
        return item

    def __getitems__(self, indices: list[Item]) -> list[dict[str, Any]]:
        """The items of a batch, as DataLoader asks for them: joined to one without ``isolate``."""
        items = [self[index] for index in indices]
        if self.isolate or not items:
            return items
        fields = set(items[0])
        for index, item in zip(indices, items, strict=True):
            if set(item) != fields:
                raise ValueError(
                    f"item {index} has the fields {sorted(item)}, item {indices[0]} {sorted(fields)}: documents that "
                    "are joined need the same ones"
                )
        return [{name: torch.cat([item[name] for item in items]) for name in items[0]}]


def _is_aligned(value: object, length: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and value.shape[0] == length
    return not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__len__") and len(value) == length
