"""Documents: token lists made ready for batches. BOS and EOS by policy, and what is too long dealt with by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maskops.data.arguments import Tokens, integer, token_lists
from maskops.data.labels import IGNORE_INDEX
from maskops.data.lengths import check_count


@dataclass(frozen=True)
class TokenReport:
    """What ``prepare`` did. ``tokens_in + bos_added + eos_added - tokens_dropped == tokens_out``."""

    documents_in: int
    documents_out: int
    """Documents of which at least a piece is left."""
    pieces: int
    """Sequences that came out: documents, and the pieces of those that were split."""
    empty: int
    """Documents that came without a token."""
    filtered: int
    truncated: int
    split: int
    """Documents that were cut into pieces."""
    tokens_in: int
    tokens_out: int
    tokens_dropped: int
    """Tokens of filtered documents and of the ends that truncation cut off."""
    bos_added: int
    eos_added: int

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        documents = f"{self.documents_in:,} documents in, {self.documents_out:,} out as {self.pieces:,} sequences"
        fates = f"{self.filtered:,} filtered, {self.truncated:,} truncated, {self.split:,} split, {self.empty:,} empty"
        tokens = f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out, {self.tokens_dropped:,} dropped"
        return f"{documents}; {fates}\n{tokens}; {self.bos_added:,} BOS and {self.eos_added:,} EOS added"


@dataclass(frozen=True, eq=False, repr=False)
class Documents:
    """Token sequences that are ready for a batch: a map-style dataset, whose items the collators take.

    ``documents[i]`` is ``{"input_ids", "first_position"}``, with ``"labels"`` where there are any. All tokens are one
    tensor, so that a copy for a worker costs one buffer and not one for each document.

    Attributes:
        tokens: int64 (sum of lengths,), the sequences one after the other.
        lengths: tokens of each sequence.
        first_positions: the position of each sequence's first token in its document; 0 unless it continues a document
            whose positions continue.
        origins: the number of the input that each sequence came from.
        report: what was added and dropped on the way.
        joined_labels: int64, as ``tokens``; or None.
    """

    tokens: Tensor
    lengths: list[int]
    first_positions: list[int]
    origins: list[int]
    report: TokenReport
    joined_labels: Tensor | None = None

    def __post_init__(self) -> None:
        """Derives where each sequence begins."""
        ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0).tolist()
        object.__setattr__(self, "_ends", ends)

    @property
    def sequences(self) -> list[Tensor]:
        """int64 (length,) of each sequence; views, not copies."""
        return list(self.tokens.split(self.lengths))

    @property
    def labels(self) -> list[Tensor] | None:
        """int64 (length,) of each sequence, aligned with its tokens; views. Or None."""
        return None if self.joined_labels is None else list(self.joined_labels.split(self.lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not hasattr(number, "__index__"):
            fixes = {"Piece": "; the dataset of a packing into chunks is data.PieceDataset(documents)"}
            fix = fixes.get(type(number).__name__, "; of several sequences take documents[number] for each number")
            raise TypeError(f"documents[{number!r}]: expected an integer{fix}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"documents[{number}]: there are {len(self)} sequences")
        number %= len(self)
        ends: list[int] = self._ends  # type: ignore[attr-defined]
        place = slice(ends[number] - self.lengths[number], ends[number])
        # Copies: what a worker sends takes its whole buffer along.
        item: dict[str, Any] = {"input_ids": self.tokens[place].clone()}
        if self.joined_labels is not None:
            item["labels"] = self.joined_labels[place].clone()
        item["first_position"] = self.first_positions[number]
        return item

    def __repr__(self) -> str:
        labels = "" if self.joined_labels is None else ", labels"
        return f"Documents({len(self)} sequences, {self.tokens.shape[0]} tokens{labels})"


class _Parts(NamedTuple):
    """A document as tensors to be joined: BOS, the body, EOS, and the same of its labels."""

    bos: Tensor
    body: Tensor
    eos: Tensor
    bos_label: Tensor
    body_labels: Tensor
    eos_label: Tensor

    @property
    def length(self) -> int:
        return self.bos.shape[0] + self.body.shape[0] + self.eos.shape[0]

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bos, self.body, self.eos

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bos_label, self.body_labels, self.eos_label


class _Marks:
    """BOS and EOS, and the policy by which they are added; tensors of one element, empty ones for none."""

    def __init__(self, bos: int | None, eos: int | None, always: bool) -> None:
        self.bos, self.eos = (torch.tensor([] if x is None else [x], dtype=torch.int64) for x in (bos, eos))
        self.bos_label = torch.full_like(self.bos, IGNORE_INDEX)
        self.bos_id, self.eos_id, self.always = bos, eos, always

    def parts(self, tokens: Tensor, labels: Tensor) -> tuple[_Parts, bool, bool]:
        """A document taken apart, and whether its BOS and its EOS are added: they are there in any case."""
        bos, eos = self.bos_id is not None, self.eos_id is not None
        if self.always or not tokens.shape[0]:
            return _Parts(self.bos, tokens, self.eos, self.bos_label, labels, self.eos), bos, eos
        begins = int(bos and int(tokens[0]) == self.bos_id)
        # One token is not both, where BOS and EOS are the same.
        ends = int(eos and tokens.shape[0] > begins and int(tokens[-1]) == self.eos_id)
        stop = tokens.shape[0] - ends
        document = _Parts(
            self.bos,
            tokens[begins:stop],
            self.eos,
            labels[:begins] if begins else self.bos_label,
            labels[begins:stop],
            labels[stop:] if ends else self.eos,
        )
        return document, bos and not begins, eos and not ends


def _truncated(document: _Parts, max_length: int, side: str) -> _Parts:
    """The document with its body shortened; BOS and EOS stay."""
    room = max_length - document.bos.shape[0] - document.eos.shape[0]
    if side == "left":
        cut = slice(document.body.shape[0] - room, None)
        return document._replace(body=document.body[cut], body_labels=document.body_labels[cut])
    # The document does not end where it was cut.
    unlearnt = torch.full_like(document.eos, IGNORE_INDEX)
    return document._replace(body=document.body[:room], body_labels=document.body_labels[:room], eos_label=unlearnt)


def prepare(
    sequences: Iterable[Tokens],
    labels: Iterable[Tokens] | None = None,
    *,
    bos: int | None = None,
    eos: int | None = None,
    add: Literal["always", "missing"] = "always",
    max_length: int | None = None,
    overlong: Literal["error", "filter", "truncate", "split"] = "error",
    truncate_side: Literal["right", "left"] = "right",
    positions: Literal["restart", "continue"] = "restart",
) -> Documents:
    """Make token sequences ready for batches. What is added, dropped and cut is counted in ``Documents.report``.

    Args:
        sequences: one list, tensor or array of token ids each; empty ones are legal, and get BOS and EOS as well.
        labels: for each sequence a label per token, IGNORE_INDEX where there is none; or None: every token is a
            target. The label of a BOS that is added is IGNORE_INDEX, that of an EOS the EOS.
        bos: id of the token that begins a document; None: none is added.
        eos: id of the token that ends one; None: none is added.
        add: ``"always"``, or ``"missing"``: only where the first (last) token is not that token already.
        max_length: most tokens of a sequence, BOS and EOS included; None: any number.
        overlong: what becomes of longer documents.

            * ``"error"``: a ValueError names the first;
            * ``"filter"``: they are left out;
            * ``"truncate"``: their bodies are shortened, BOS and EOS stay. An EOS where the end was cut off is not a
              target, because the document does not end there: with ``eos``, ``max_length`` and a right side that is
              cut there are always labels, whether or not a document was too long;
            * ``"split"``: they are cut into pieces of ``max_length``, the last of them shorter. Only the first piece
              has the BOS, only the last the EOS; joined, the pieces are the document. The first token of a piece has
              nothing before it in its sequence and so is no target there.
        truncate_side: the end that is cut off.
        positions: whether positions of a piece ``"restart"``, or ``"continue"`` those of the piece before it.

    Raises:
        TypeError: token ids, labels, ``bos``, ``eos`` or a ``max_length`` that are not integers.
        ValueError: labels that do not match, a negative ``bos`` or ``eos``, an unknown word, a ``max_length`` without
            room for a token beside BOS and EOS, or a document that is too long with ``overlong="error"``.
    """
    for name, value, words in (
        ("add", add, ("always", "missing")),
        ("overlong", overlong, ("error", "filter", "truncate", "split")),
        ("truncate_side", truncate_side, ("right", "left")),
        ("positions", positions, ("restart", "continue")),
    ):
        if value not in words:
            raise ValueError(f"{name}={value!r}: expected {', '.join(repr(word) for word in words)}")
    for name, mark in (("bos", bos), ("eos", eos)):
        if mark is not None:
            check_count(name, mark, least=0)
    if max_length is not None:
        integer("max_length", max_length)
    special = (bos is not None) + (eos is not None)
    if max_length is not None and max_length < special + 1:
        raise ValueError(f"max_length={max_length}: expected {special + 1} or more, a token beside BOS and EOS")
    tokens, targets = token_lists(sequences, labels)
    counts = dict.fromkeys(TokenReport.__dataclass_fields__, 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    marks = _Marks(bos, eos, add == "always")
    joined, joined_labels = [nothing], [nothing]
    lengths: list[int] = []
    first_positions: list[int] = []
    origins: list[int] = []
    # By the arguments, not by what the documents happen to hold: shards of one corpus are alike.
    cuts_ends = overlong == "truncate" and truncate_side == "right" and max_length is not None and eos is not None
    has_labels = labels is not None or cuts_ends
    for number, sequence in enumerate(tokens):
        came = sequence.shape[0]
        document, bos_added, eos_added = marks.parts(sequence, targets[number] if targets else sequence)
        counts["tokens_in"] += came
        counts["empty"] += came == 0
        length = document.length
        if max_length is not None and length > max_length:
            if overlong == "error":
                marked = f", {length} with BOS and EOS" if length > came else ""
                raise ValueError(
                    f"sequences[{number}] has {came} tokens{marked}, more than max_length={max_length}: choose "
                    "overlong='filter', 'truncate' or 'split'"
                )
            if overlong == "filter":
                counts["filtered"] += 1
                counts["tokens_dropped"] += came
                continue
            if overlong == "truncate":
                counts["truncated"] += 1
                counts["tokens_dropped"] += length - max_length
                document = _truncated(document, max_length, truncate_side)
            else:
                counts["split"] += 1
        counts["bos_added"] += bos_added
        counts["eos_added"] += eos_added
        counts["documents_out"] += 1
        joined += document.tokens()
        joined_labels += document.labels()
        begins = range(0, max(1, document.length), max_length or max(1, document.length))
        lengths += [min(document.length - at, begins.step) for at in begins]
        first_positions += list(begins) if positions == "continue" else [0] * len(begins)
        origins += [number] * len(begins)
    result = torch.cat(joined)
    counts.update(documents_in=len(tokens), pieces=len(lengths), tokens_out=result.shape[0])
    return Documents(
        tokens=result,
        lengths=lengths,
        first_positions=first_positions,
        origins=origins,
        report=TokenReport(**counts),
        joined_labels=torch.cat(joined_labels) if has_labels else None,
    )
