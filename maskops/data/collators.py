"""Collators: lists of items, as datasets and trainers hand them over, become batches.

They work as ``collate_fn`` of torch's DataLoader, and as ``data_collator`` of transformers' Trainer and TRL's
SFTTrainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maskops.checks import check_mask_values
from maskops.data.arguments import Tokens, integer, token_ids
from maskops.data.labels import IGNORE_INDEX
from maskops.data.lengths import check_count
from maskops.data.packed_batch import PackedBatch
from maskops.data.padded_batch import PaddedBatch, pad
from maskops.data.places import check_side

_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
_LABELS = ("labels", "label", "label_ids")
_KNOWN = ("input_ids", *_MASKS, *_LABELS, "first_position", "seq_lengths", "token_type_ids")


class _Sequences(NamedTuple):
    """What items say: sequences, a label per token or None, first positions, and a label per sequence or None."""

    tokens: list[Tensor]
    labels: list[Tensor] | None
    first_positions: list[int] | None
    sequence_labels: Tensor | None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (getattr(value, "ndim", None) == 0 and hasattr(value, "item"))


def _classes(where: str, values: Any) -> Tensor | None:
    """Floating point targets of a whole sequence, one for each class, (n_classes,); None for what is none."""
    if hasattr(values, "dtype"):
        tensor = torch.as_tensor(values)
    elif isinstance(values, Sequence) and any(isinstance(value, float) for value in values):
        tensor = torch.tensor(values)
    else:
        return None
    if not tensor.is_floating_point() or tensor.dim() != 1 or not tensor.shape[0]:
        return None
    if bool((tensor == IGNORE_INDEX).any()):
        raise TypeError(f"{where} has dtype {tensor.dtype} and holds {IGNORE_INDEX}: labels of tokens are integers")
    return tensor.to(torch.get_default_dtype())


def _check_no_segments(number: int, values: Any, length: int) -> None:
    """Token types of which there is one are what models assume without them; others would be lost."""
    types = _aligned(number, "token_type_ids", values, length)
    if bool(types.any()):
        raise ValueError(
            f"items[{number}]['token_type_ids'] has {int(types[types != 0][0])}: no batch has a place for types other "
            "than 0; to leave them out give the collator ignore=('token_type_ids',)"
        )


def _aligned(number: int, name: str, values: Any, length: int) -> Tensor:
    """Values that go with the tokens of item ``number``, as int64 (length,)."""
    where = f"items[{number}][{name!r}]"
    if name in _MASKS:
        mask = values if isinstance(values, Tensor) else torch.as_tensor(values)
        tensor = token_ids(where, mask.to(torch.int64) if mask.dtype == torch.bool else mask)
        check_mask_values(where, tensor)
    else:
        tensor = token_ids(where, values)
    if tensor.shape[0] != length:
        raise ValueError(
            f"{where} has {tensor.shape[0]} elements, items[{number}]['input_ids'] has {length} tokens: give one for "
            "each token"
        )
    return tensor


class _Item(NamedTuple):
    tokens: list[Tensor]
    labels: list[Tensor] | None
    first_position: int
    sequence_label: int | float | Tensor | None


def _read_mapping(number: int, item: Mapping[str, Any], ignore: Sequence[str]) -> _Item:
    fields = {name: value for name, value in item.items() if name not in ignore and value is not None}
    if "input_ids" not in fields:
        raise ValueError(f"items[{number}] has the fields {sorted(item)}: expected 'input_ids' among them")
    unknown = sorted(fields.keys() - set(_KNOWN))
    if unknown:
        raise ValueError(
            f"items[{number}] has the field {unknown[0]!r}, which no batch has a place for: expected "
            f"{', '.join(_KNOWN)}; to leave it out give the collator ignore=({unknown[0]!r},)"
        )
    tokens = token_ids(f"items[{number}]['input_ids']", fields["input_ids"])
    length = tokens.shape[0]
    given = [name for name in _LABELS if name in fields]
    if len(given) > 1:
        raise ValueError(f"items[{number}] has the fields {given[0]!r} and {given[1]!r}: give one of them")
    labels: Tensor | None = None
    sequence_label: int | float | Tensor | None = None
    if given and _is_number(fields[given[0]]):
        value = fields[given[0]]
        sequence_label = value.item() if hasattr(value, "item") else value
    elif given:
        sequence_label = _classes(f"items[{number}][{given[0]!r}]", fields[given[0]])
        labels = _aligned(number, given[0], fields[given[0]], length) if sequence_label is None else None
    if "token_type_ids" in fields:
        _check_no_segments(number, fields["token_type_ids"], length)
    for name in ("completion_mask", "assistant_masks"):
        if name in fields:
            scored = _aligned(number, name, fields[name], length) != 0
            labels = torch.where(scored, tokens if labels is None else labels, IGNORE_INDEX)
    sizes = [length]
    if "seq_lengths" in fields:
        sizes = token_ids(f"items[{number}]['seq_lengths']", fields["seq_lengths"]).tolist()
        if sum(sizes) != length or min(sizes, default=0) < 0:
            raise ValueError(
                f"items[{number}]['seq_lengths'] sums to {sum(sizes)}, items[{number}]['input_ids'] has {length} tokens"
            )
    if "attention_mask" in fields:
        real = _aligned(number, "attention_mask", fields["attention_mask"], length) != 0
        sizes = [int(part.sum()) for part in real.split(sizes)]
        tokens, labels = tokens[real], None if labels is None else labels[real]
    first_position = int(fields.get("first_position", 0))
    parts = None if labels is None else list(labels.split(sizes))
    return _Item(list(tokens.split(sizes)), parts, first_position, sequence_label)


def _check_vocabulary(read: list[_Item], vocab_size: int) -> None:
    """Token ids, and labels that are no IGNORE_INDEX, lie in the vocabulary."""
    for name, number, part in (
        (name, number, part)
        for number, item in enumerate(read)
        for name, parts in (("input_ids", item.tokens), ("labels", item.labels or ()))
        for part in parts
    ):
        outside = (part < 0) | (part >= vocab_size)
        if name == "labels":
            outside = outside & (part != IGNORE_INDEX)
        if bool(outside.any()):
            value = int(part[outside][0])
            ignored = f", or {IGNORE_INDEX}" if name == "labels" else ""
            raise ValueError(f"items[{number}][{name!r}] holds {value}: expected 0 to {vocab_size - 1}{ignored}")


def _read(items: Sequence[Mapping[str, Any] | Tokens], ignore: Sequence[str], vocab_size: int | None) -> _Sequences:
    read = [
        _read_mapping(number, item, ignore)
        if isinstance(item, Mapping)
        else _Item([token_ids(f"items[{number}]", item)], None, 0, None)
        for number, item in enumerate(items)
    ]
    if vocab_size is not None:
        _check_vocabulary(read, vocab_size)
    for name in ("labels", "sequence_label"):
        number = next((at for at, item in enumerate(read) if getattr(item, name) is None), None)
        other = next((at for at, item in enumerate(read) if getattr(item, name) is not None), None)
        if number is not None and other is not None:
            what = "labels for its tokens" if name == "labels" else "label for the sequence"
            raise ValueError(f"items[{number}] has no {what}, items[{other}] has: give them to all or to none")
    first_positions: list[int] = []
    for number, item in enumerate(read):
        if item.sequence_label is not None and len(item.tokens) != 1:
            raise ValueError(
                f"items[{number}] has one label for {len(item.tokens)} sequences ('seq_lengths'): labels of sequences "
                "go with items of one sequence"
            )
        first_positions += [item.first_position if place == 0 else 0 for place in range(len(item.tokens))]
    has_labels = any(item.labels is not None for item in read)
    return _Sequences(
        tokens=[part for item in read for part in item.tokens],
        labels=[part for item in read for part in item.labels or ()] if has_labels else None,
        first_positions=first_positions if any(first_positions) else None,
        sequence_labels=_joined([item.sequence_label for item in read]),
    )


def _joined(labels: Sequence[int | float | Tensor | None]) -> Tensor | None:
    """Labels of whole sequences as (n_sequences,) or (n_sequences, n_classes); all of them are there, or none is."""
    if not labels or labels[0] is None:
        return None
    rows = [label for label in labels if isinstance(label, Tensor)]
    counts = [label.shape[0] if isinstance(label, Tensor) else 0 for label in labels]
    for number, count in enumerate(counts):
        if count != counts[0]:
            first, other = (f"{n} labels, one for each class" if n else "one label" for n in (counts[0], count))
            raise ValueError(
                f"items[{number}] has {other}, items[0] has {first}: give the same number to all sequences"
            )
    return torch.stack(rows) if rows else torch.tensor(labels)


def _check_output(output: str) -> None:
    if output not in ("batch", "transformers"):
        raise ValueError(f"output={output!r}: expected 'batch' or 'transformers'")


def _check_sizes(collator: PackedCollator | PaddedCollator, names: Sequence[str]) -> None:
    integer("pad_token_id", collator.pad_token_id)
    check_count("position_start", collator.position_start, least=0)
    for name in (*names, "vocab_size"):
        if getattr(collator, name) is not None:
            check_count(name, getattr(collator, name), least=0)


@dataclass(frozen=True)
class PackedCollator:
    """Packs items into one row: a PackedBatch, or the keyword arguments of a model of transformers.

    An item is a list, tensor or array of token ids, an item of ``Documents``, or a mapping with ``input_ids`` and any
    of

    * ``labels`` (also ``label``, ``label_ids``): integers, one for each token; a number for the whole sequence; or
      floating point numbers for it, one for each class;
    * ``attention_mask``: tokens where it is 0 are a tokenizer's padding and are left out, with their labels;
    * ``completion_mask``, ``assistant_masks``: tokens where one of them is 0 are no targets;
    * ``seq_lengths``: the item is packed already, and these are the lengths of its sequences;
    * ``first_position``: the position of its first token in its document;
    * ``token_type_ids``: all 0, which says nothing; others are refused.

    Trainer removes fields that the model does not know unless it is given ``remove_unused_columns=False``; among them
    is ``first_position``.

    Attributes:
        capacity: length of the row; that of the items by default.
        max_sequences: sequences that ``cu_seqlens`` has room for; those of the items by default.
        max_seqlen: an upper bound of the lengths; the longest by default. With these three, no shape and no number
            depends on the data.
        output: ``"batch"`` or ``"transformers"``.
        position_start: position id of a first token: 0, or 2 for RoBERTa and its relatives.
        pad_token_id: what places after the last sequence hold.
        ignore: fields of items that are left out; others that no batch has a place for are refused.
        vocab_size: token ids and labels outside ``[0, vocab_size)`` are refused, by item; None: not looked at.
        options: keyword arguments of ``PackedBatch.transformers_inputs``.
    """

    capacity: int | None = None
    max_sequences: int | None = None
    max_seqlen: int | None = None
    output: Literal["batch", "transformers"] = "batch"
    position_start: int = 0
    pad_token_id: int = 0
    ignore: Sequence[str] = ()
    vocab_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses unknown words and sizes now, and not in a worker."""
        _check_output(self.output)
        _check_sizes(self, ("capacity", "max_sequences", "max_seqlen"))

    def __call__(self, items: Sequence[Mapping[str, Any] | Tokens]) -> PackedBatch | dict[str, Any]:
        """The batch of ``items``.

        Raises:
            TypeError: what is no list of token ids.
            ValueError: fields of an item that disagree, named with their lengths, or more than there is room for.
        """
        read = _read(items, self.ignore, self.vocab_size)
        batch = PackedBatch.from_sequences(
            read.tokens,
            read.labels,
            self.capacity,
            max_sequences=self.max_sequences,
            max_seqlen=self.max_seqlen,
            first_positions=read.first_positions,
            position_start=self.position_start,
            sequence_labels=read.sequence_labels,
            pad_token_id=self.pad_token_id,
        )
        return batch if self.output == "batch" else batch.transformers_inputs(**self.options)


@dataclass(frozen=True)
class PaddedCollator:
    """Pads items to one length: a PaddedBatch, or the keyword arguments of a model of transformers.

    Items are those of ``PackedCollator``. The padding of the batch is never looked for in ids: with a pad token that is
    also EOS, the real EOS keeps its label and its attention.

    Attributes:
        pad_token_id: what padding holds.
        side: where it stands, ``"right"`` or ``"left"``.
        length: a fixed length; the longest of the batch by default.
        multiple_of: the length is rounded up to a multiple of this.
        output: ``"batch"`` or ``"transformers"``.
        position_start: position id of a first token: 0, or 2 for RoBERTa and its relatives.
        ignore: fields of items that are left out; others that no batch has a place for are refused.
        vocab_size: token ids and labels outside ``[0, vocab_size)`` are refused, by item; None: not looked at.
        options: keyword arguments of ``PaddedBatch.transformers_inputs``.
    """

    pad_token_id: int
    side: Literal["right", "left"] = "right"
    length: int | None = None
    multiple_of: int = 1
    output: Literal["batch", "transformers"] = "batch"
    position_start: int = 0
    ignore: Sequence[str] = ()
    vocab_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses unknown words and sizes now, and not in a worker."""
        _check_output(self.output)
        check_side(self.side)
        check_count("multiple_of", self.multiple_of)
        _check_sizes(self, ("length",))

    def __call__(self, items: Sequence[Mapping[str, Any] | Tokens]) -> PaddedBatch | dict[str, Any]:
        """The batch of ``items``; errors as in ``PackedCollator``, and for an item longer than ``length``."""
        read = _read(items, self.ignore, self.vocab_size)
        batch = pad(
            read.tokens,
            read.labels,
            pad_token_id=self.pad_token_id,
            side=self.side,
            length=self.length,
            multiple_of=self.multiple_of,
            first_positions=read.first_positions,
            position_start=self.position_start,
            sequence_labels=read.sequence_labels,
        )
        return batch if self.output == "batch" else batch.transformers_inputs(**self.options)
