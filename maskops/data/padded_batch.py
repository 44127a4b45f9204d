"""The padded batch: a row for each sequence, with masks, positions and labels from lengths and never from ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from maskops import masks
from maskops.checks import check_tensor
from maskops.data.arguments import Tokens, first_positions_of, integer, labels_of_sequences, token_lists
from maskops.data.batch import Batch
from maskops.data.fit import check_rows
from maskops.data.labels import IGNORE_INDEX, shift_labels, without_first_tokens
from maskops.data.lengths import check_count
from maskops.data.packed_batch import PackedBatch, additive
from maskops.data.places import check_batch, check_side, gathered, packed_places, padded_places, position_ids
from maskops.layouts import values_can_be_read
from maskops.spans import RowSpans


@dataclass(frozen=True, eq=False, repr=False)
class PaddedBatch(Batch):
    """Sequences of tokens, a row each. The lengths are the one truth: a pad token that is also EOS hides nothing.

    Attributes:
        input_ids: int64 (batch, length).
        lengths: int32 (batch,); zeros are legal.
        side: where the padding stands, ``"right"`` or ``"left"``.
        labels: int64 (batch, length), aligned with ``input_ids`` (not shifted), IGNORE_INDEX where there is no target;
            or None.
        first_positions: int64 (batch,), the position of each sequence's first token in its document; None: all 0.
        position_start: the position id of a document's first token: 0, or 2 for RoBERTa and its relatives.
        sequence_labels: (batch,), int64 classes or floating point targets of whole sequences, or (batch, n_classes),
            one for each class; or None.

    Narrow integers become int32 (lengths) and int64, which hold IGNORE_INDEX and sums.

    Registered with ``torch.utils._pytree``; the tensors are its leaves.
    """

    input_ids: Tensor
    lengths: Tensor
    side: Literal["right", "left"] = "right"
    labels: Tensor | None = None
    first_positions: Tensor | None = None
    position_start: int = 0
    sequence_labels: Tensor | None = None

    TENSORS: ClassVar[tuple[str, ...]] = ("input_ids", "lengths", "labels", "first_positions", "sequence_labels")

    def __post_init__(self) -> None:
        """Checks shapes and dtypes; where values can be read without waiting for a device, also the lengths."""
        check_side(self.side)
        check_tensor("input_ids", self.input_ids, "(batch, length)")
        if self.input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(self.input_ids.shape)}, expected (batch, length)")
        check_batch(self)
        if self.lengths.shape[0] != self.input_ids.shape[0]:
            raise ValueError(f"lengths has {self.lengths.shape[0]} elements, input_ids {self.input_ids.shape[0]} rows")

    def __repr__(self) -> str:
        size = f"{self.n_sequences} x {self.max_seqlen}"
        if values_can_be_read([self.lengths], self.lengths.device):
            size = f"{int(self.lengths.sum())} tokens in {size}"
        labels = "" if self.labels is None else ", labels"
        return f"PaddedBatch({size}, side={self.side!r}{labels}, device={str(self.input_ids.device)!r})"

    # ---- what follows from the lengths -------------------------------------------------------------------------------

    @property
    def n_sequences(self) -> int:
        """Rows, with the empty ones."""
        return self.input_ids.shape[0]

    @property
    def max_seqlen(self) -> int:
        """Columns: the longest length, or more."""
        return self.input_ids.shape[1]

    @property
    def attention_mask(self) -> Tensor:
        """bool (batch, length): the real tokens."""
        return padded_places(self.lengths, self.max_seqlen, self.side)[1]

    @property
    def sequence_ids(self) -> Tensor:
        """int64 (batch, length): the row's number at its real tokens, -1 at padding."""
        row = torch.arange(self.n_sequences, device=self.lengths.device).unsqueeze(1)
        return torch.where(self.attention_mask, row, -1)

    @property
    def position_ids(self) -> Tensor:
        """int64 (batch, length): position inside the document, from ``position_start`` at its first real token.

        At padding ``position_start - 1``, but at least 0: where RoBERTa puts it.
        """
        place, _ = padded_places(self.lengths, self.max_seqlen, self.side)
        return position_ids(place, self.sequence_ids, self.first_positions, self.position_start)

    @property
    def shift_labels(self) -> Tensor:
        """int64 (batch, length): the label of the next real token of the row, IGNORE_INDEX at the last and at padding.

        From ``labels``, or from ``input_ids`` where there are none.
        """
        return shift_labels(self.input_ids if self.labels is None else self.labels, self.sequence_ids)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (batch + 1,): of the packed row."""
        return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def mask(self) -> masks.Mask:
        """Padding sees nothing and is not seen; combine with a pattern, such as ``batch.mask & masks.causal()``."""
        return masks.padding(self.lengths, side=self.side)

    def spans(self, pattern: masks.Mask | None = None, grad: bool = True) -> RowSpans:
        """The plan of ``mask & pattern``: what attention takes as its mask.

        Args:
            pattern: who sees whom inside a sequence; causal by default, ``masks.full()`` for encoders.
            grad: also plan the backward pass.
        """
        mask = self.mask & (masks.causal() if pattern is None else pattern)
        return mask.spans(self.max_seqlen, self.max_seqlen, batch=self.n_sequences, grad=grad)

    def dense_mask(self, pattern: masks.Mask | None = None) -> Tensor:
        """bool (batch, 1, length, length), True = attend; ``pattern`` as in ``spans``. Padded rows see nothing."""
        return self.spans(pattern, grad=False).to_dense()

    def check(self, **values: Tensor) -> None:
        """Raise ValueError for what does not go with the tokens of this batch: its name, and the first such sequence.

        Args:
            values: by name what is (batch, length, ...), such as logits and labels.
        """
        known = values_can_be_read([self.lengths], self.lengths.device)
        lengths = self.lengths.tolist() if known else None
        for name, value in values.items():
            check_tensor(name, value, "(batch, length, ...)")
            check_rows(name, value.shape, self.n_sequences, self.max_seqlen, lengths)

    # ---- to packed, and back -----------------------------------------------------------------------------------------

    @overload
    def to_packed(self, padded: None = None, *, capacity: int | None = None) -> PackedBatch: ...

    @overload
    def to_packed(self, padded: Tensor, *, capacity: int | None = None) -> Tensor: ...

    def to_packed(self, padded: Tensor | None = None, *, capacity: int | None = None) -> Tensor | PackedBatch:
        """The real tokens of ``padded`` (batch, length, ...) as (total, ...); without it the batch as a whole.

        Differentiable; what the padding holds reaches neither a value nor a gradient.

        Args:
            padded: (batch, length, ...), such as hidden states; None: a PackedBatch with the same sequences and labels.
            capacity: length of the row, 0 after the last token. By default the sum of the lengths, for which a device
                is waited for.

        Raises:
            ValueError: another shape; on the CPU or under ``maskops.validate()`` also more tokens than ``capacity``.
        """
        if padded is not None and padded.shape[:2] != self.input_ids.shape:
            raise ValueError(
                f"padded has shape {tuple(padded.shape)}, expected ({self.n_sequences}, {self.max_seqlen}, ...), the "
                "shape of input_ids"
            )
        if capacity is not None and values_can_be_read([self.lengths], self.lengths.device):
            tokens = int(self.lengths.sum())
            if tokens > capacity:
                raise ValueError(f"the batch holds {tokens} tokens, more than capacity={capacity}")
        total = int(self.lengths.sum()) if capacity is None else capacity
        index = packed_places(self.lengths, self.cu_seqlens, total, self.max_seqlen, self.side)
        if padded is not None:
            return gathered(padded.flatten(0, 1), index, 0)
        return PackedBatch(
            input_ids=gathered(self.input_ids.flatten(), index, 0),
            lengths=self.lengths,
            max_seqlen=self.max_seqlen,
            labels=None if self.labels is None else gathered(self.labels.flatten(), index, IGNORE_INDEX),
            first_positions=self.first_positions,
            position_start=self.position_start,
            sequence_labels=self.sequence_labels,
            has_room=capacity is not None,
        )

    def to_padded(self, packed: Tensor, padding_value: float = 0) -> Tensor:
        """The way back of ``to_packed``: (total, ...) as (batch, length, ...). Differentiable.

        Args:
            packed: (total, ...), rows of the real tokens in their order; more rows after them are not read.
            padding_value: what the padding holds.
        """
        place, real = padded_places(self.lengths, self.max_seqlen, self.side)
        total = packed.shape[0] if packed.dim() else 0
        if values_can_be_read([self.lengths], self.lengths.device) and total < int(self.lengths.sum()):
            raise ValueError(
                f"packed has shape {tuple(packed.shape)}, expected ({int(self.lengths.sum())}, ...) or more rows, the "
                "sum of lengths"
            )
        index = torch.where(real, self.cu_seqlens[:-1].unsqueeze(1) + place, total).clamp(max=total)
        return gathered(packed, index, padding_value)

    # ---- for transformers --------------------------------------------------------------------------------------------

    def transformers_inputs(
        self,
        *,
        labels: Literal["causal", "aligned"] | None = "causal",
        shift_labels: bool = False,
        position_ids: bool = True,
        attention_mask: Literal["padding", "dense"] = "padding",
        mask_dtype: torch.dtype = torch.float32,
        pattern: masks.Mask | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of a model of transformers, spelled as it spells them.

        Args:
            labels: ``"causal"``: labels with the first token of each sequence ignored, for models that shift them;
                ``"aligned"``: labels as they are, for token classification and masked language models; None: none.
                A batch with ``sequence_labels`` gives those instead.
            shift_labels: also labels that are already shifted, where the loss of the model knows them.
            position_ids: also position ids, which restart at the first real token; models without absolute or rotary
                positions, such as T5, take none.
            attention_mask: ``"padding"``: int64 (batch, length); ``"dense"``: (batch, 1, length, length).
            mask_dtype: of the dense mask, as in ``PackedBatch.transformers_inputs``.
            pattern: of the dense mask; causal by default.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids}
        if attention_mask == "padding":
            inputs["attention_mask"] = self.attention_mask.to(torch.int64)
        elif attention_mask == "dense":
            # Rows that see nothing are NaN in some implementations, and NaN spreads through the next layer.
            alone = torch.eye(self.max_seqlen, dtype=torch.bool, device=self.lengths.device)
            alone = alone & ~self.attention_mask[:, None, :, None]
            inputs["attention_mask"] = additive(self.dense_mask(pattern) | alone, mask_dtype)
        else:
            raise ValueError(f"attention_mask={attention_mask!r}: expected 'padding' or 'dense'")
        if position_ids:
            inputs["position_ids"] = self.position_ids
        if labels not in ("causal", "aligned", None):
            raise ValueError(f"labels={labels!r}: expected 'causal', 'aligned' or None")
        if self.sequence_labels is not None and labels is not None:
            inputs["labels"] = self.sequence_labels
        elif labels == "causal":
            source = self.input_ids if self.labels is None else self.labels
            inputs["labels"] = without_first_tokens(source, self.sequence_ids)
        elif labels == "aligned" and self.labels is not None:
            inputs["labels"] = self.labels
        if shift_labels:
            inputs["shift_labels"] = self.shift_labels
        return inputs


def pad(
    sequences: Iterable[Tokens],
    labels: Iterable[Tokens] | None = None,
    *,
    pad_token_id: int,
    side: Literal["right", "left"] = "right",
    length: int | None = None,
    multiple_of: int = 1,
    first_positions: Tensor | Sequence[int] | None = None,
    position_start: int = 0,
    sequence_labels: Tensor | Sequence[Any] | None = None,
) -> PaddedBatch:
    """Pad sequences of tokens to one length: ``[bos, 5, 7, eos, pad, pad]``.

    Args:
        sequences: one list, tensor or array of token ids each; empty ones are legal.
        labels: for each sequence a label per token, or None; padding holds IGNORE_INDEX.
        pad_token_id: what padding holds. It may be the id of a real token, such as EOS: nothing is read from ids.
        side: where the padding stands.
        length: a fixed length; the longest of the batch by default.
        multiple_of: the length is rounded up to a multiple of this.
        first_positions: for each sequence the position of its first token in its document; all 0 by default.
        position_start: the position id of a document's first token.
        sequence_labels: for each sequence a class or a target, or a row of targets, one for each class.

    Raises:
        TypeError: token ids, labels or sizes that are not integers.
        ValueError: labels that do not match the sequences, or a sequence that is longer than ``length``.
    """
    check_side(side)
    check_count("multiple_of", multiple_of)
    if length is not None:
        check_count("length", length, least=0)
    check_count("position_start", position_start, least=0)
    integer("pad_token_id", pad_token_id)
    tokens, targets = token_lists(sequences, labels)
    sizes = [sequence.shape[0] for sequence in tokens]
    width = max(sizes, default=0) if length is None else length
    for number, size in enumerate(sizes):
        if size > width:
            raise ValueError(
                f"sequences[{number}] has {size} tokens, more than length={length}: shorten or split it first, as "
                f"data.prepare(sequences, max_length={length}, overlong='split') does"
            )
    width = -(-width // multiple_of) * multiple_of
    device = tokens[0].device if tokens else torch.device("cpu")
    lengths = torch.tensor(sizes, dtype=torch.int32, device=device)
    _, real = padded_places(lengths, width, side)

    def filled(parts: list[Tensor], value: int) -> Tensor:
        rows = torch.full((len(sizes), width), value, dtype=torch.int64, device=device)
        return rows.masked_scatter(real, torch.cat(parts)) if parts else rows

    firsts = first_positions_of(first_positions, len(sizes))
    classes = labels_of_sequences(sequence_labels, len(sizes))
    return PaddedBatch(
        input_ids=filled(tokens, pad_token_id),
        lengths=lengths,
        side=side,
        labels=None if labels is None else filled(targets, IGNORE_INDEX),
        first_positions=None if firsts is None else firsts.to(device),
        position_start=position_start,
        sequence_labels=None if classes is None else classes.to(device),
    )
