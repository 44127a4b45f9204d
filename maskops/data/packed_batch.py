"""The packed batch: sequences one after the other in one row, and everything that follows from their lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from maskops import masks
from maskops.checks import check_tensor
from maskops.data.arguments import Tokens, first_positions_of, integer, labels_of_sequences, token_lists
from maskops.data.batch import Batch
from maskops.data.fit import check_row
from maskops.data.labels import IGNORE_INDEX, shift_labels, without_first_tokens
from maskops.data.lengths import check_count
from maskops.data.places import check_batch, gathered, packed_places, padded_places, position_ids, sequence_ids
from maskops.layouts import values_can_be_read
from maskops.spans import RowSpans

if TYPE_CHECKING:
    from maskops.data.padded_batch import PaddedBatch


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch(Batch):
    """Sequences of tokens packed into one row. The lengths are the one truth; everything else follows from them.

    Attributes:
        input_ids: int64 (total,); places after the last sequence hold 0 (or the pad id that ``from_sequences`` got).
        lengths: int32 (n_sequences,); zeros are legal, and fill up ``max_sequences``.
        max_seqlen: the longest length or an upper bound of it, known on the host; the width of ``to_padded``.
        labels: int64 (total,), aligned with ``input_ids`` (not shifted), IGNORE_INDEX where there is no target; or
            None. A loss takes ``shift_labels``, or these with both ``shift=True`` and ``cu_seqlens=batch.cu_seqlens``:
            shifted without ``cu_seqlens``, the last token of each sequence is scored against the first of the next.
        first_positions: int64 (n_sequences,), the position of each sequence's first token in its document, for pieces
            of a document that was split; or None: all 0.
        position_start: the position id of a document's first token: 0, or 2 for RoBERTa and its relatives.
        sequence_labels: (n_sequences,), int64 classes or floating point targets of whole sequences, or (n_sequences,
            n_classes), one for each class; or None.
        has_room: whether there may be places after the last sequence; False: ``lengths`` sum to ``total``, which
            ``transformers_inputs`` makes use of. Part of the layout, as shapes are: not read from the lengths.

    Narrow integers become int32 (lengths) and int64, which hold IGNORE_INDEX and sums.

    Registered with ``torch.utils._pytree``; the tensors are its leaves.
    """

    input_ids: Tensor
    lengths: Tensor
    max_seqlen: int
    labels: Tensor | None = None
    first_positions: Tensor | None = None
    position_start: int = 0
    sequence_labels: Tensor | None = None
    has_room: bool = True

    TENSORS: ClassVar[tuple[str, ...]] = ("input_ids", "lengths", "labels", "first_positions", "sequence_labels")

    def __post_init__(self) -> None:
        """Checks shapes and dtypes; where values can be read without waiting for a device, also the lengths."""
        check_tensor("input_ids", self.input_ids, "(total,)")
        if self.input_ids.dim() != 1:
            raise ValueError(f"input_ids has shape {tuple(self.input_ids.shape)}, expected (total,)")
        check_batch(self)
        if values_can_be_read([self.lengths], self.lengths.device):
            tokens = int(self.lengths.sum())
            if tokens > self.total:
                raise ValueError(f"lengths sum to {tokens}, more than the {self.total} places of input_ids")
            if tokens < self.total and not self.has_room:
                raise ValueError(f"lengths sum to {tokens}, input_ids has {self.total} places, and has_room=False")

    @classmethod
    def from_sequences(
        cls,
        sequences: Iterable[Tokens],
        labels: Iterable[Tokens] | None = None,
        capacity: int | None = None,
        *,
        max_sequences: int | None = None,
        max_seqlen: int | None = None,
        first_positions: Tensor | Sequence[int] | None = None,
        position_start: int = 0,
        sequence_labels: Tensor | Sequence[Any] | None = None,
        pad_token_id: int = 0,
    ) -> PackedBatch:
        """Pack sequences of tokens in their order.

        With ``capacity``, ``max_sequences`` and ``max_seqlen`` no shape and no number depends on the data: compiled
        code sees one graph.

        Args:
            sequences: one list, tensor or array of token ids each; empty ones are legal.
            labels: for each sequence a label per token, or None.
            capacity: length of the row, the total by default.
            max_sequences: sequences that ``lengths`` and ``cu_seqlens`` have room for; the rest are empty.
            max_seqlen: an upper bound of the lengths; the longest by default.
            first_positions: as the attribute; one for each sequence.
            position_start: as the attribute.
            sequence_labels: as the attribute; one for each sequence. Places up to ``max_sequences`` hold IGNORE_INDEX,
                NaN in floating point.
            pad_token_id: what places after the last sequence hold; nothing reads them.

        Raises:
            TypeError: token ids, labels or sizes that are not integers.
            ValueError: labels that do not match the sequences, or more tokens, sequences or a longer sequence than
                there is room for.
        """
        for name, size in (("capacity", capacity), ("max_sequences", max_sequences), ("max_seqlen", max_seqlen)):
            if size is not None:
                check_count(name, size, least=0)
        check_count("position_start", position_start, least=0)
        integer("pad_token_id", pad_token_id)
        tokens, targets = token_lists(sequences, labels)
        sizes = [sequence.shape[0] for sequence in tokens]
        total, count, longest = sum(sizes), len(sizes), max(sizes, default=0)
        room = total if capacity is None else capacity
        if total > room:
            raise ValueError(f"sequences hold {total} tokens, more than capacity={capacity}")
        places = count if max_sequences is None else max_sequences
        if count > places:
            raise ValueError(f"sequences holds {count} sequences, more than max_sequences={max_sequences}")
        if max_seqlen is not None and longest > max_seqlen:
            raise ValueError(f"sequences[{sizes.index(longest)}] has {longest} tokens, more than {max_seqlen=}")
        device = tokens[0].device if tokens else torch.device("cpu")
        firsts = first_positions_of(first_positions, count)
        classes = labels_of_sequences(sequence_labels, count)
        rest = (0, places - count)
        if firsts is not None:
            firsts = torch.nn.functional.pad(firsts, rest).to(device)
        if classes is not None:
            nothing = IGNORE_INDEX if classes.dtype == torch.int64 else float("nan")
            classes = torch.nn.functional.pad(classes, (0, 0) * (classes.dim() - 1) + rest, value=nothing).to(device)
        return cls(
            input_ids=_joined(tokens, room, pad_token_id, device),
            lengths=torch.tensor(sizes + [0] * (places - count), dtype=torch.int32, device=device),
            max_seqlen=longest if max_seqlen is None else max_seqlen,
            labels=None if labels is None else _joined(targets, room, IGNORE_INDEX, device),
            first_positions=firsts,
            position_start=position_start,
            sequence_labels=classes,
            has_room=capacity is not None,
        )

    def __repr__(self) -> str:
        tokens = f"{self.total} places"
        if values_can_be_read([self.lengths], self.lengths.device):
            tokens = f"{int(self.lengths.sum())} tokens in {tokens}"
        labels = "" if self.labels is None else ", labels"
        where = f"max_seqlen={self.max_seqlen}{labels}, device={str(self.input_ids.device)!r}"
        return f"PackedBatch({self.n_sequences} sequences, {tokens}, {where})"

    # ---- what follows from the lengths -------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Places of the row, with those after the last sequence."""
        return self.input_ids.shape[0]

    @property
    def n_sequences(self) -> int:
        """Sequences, with the empty ones."""
        return self.lengths.shape[0]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (n_sequences + 1,)."""
        return torch.nn.functional.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    @property
    def sequence_ids(self) -> Tensor:
        """int64 (total,): which sequence each token belongs to, -1 after the last; what ``masks.documents`` takes."""
        return sequence_ids(self.cu_seqlens, self.total)

    @property
    def segment_ids(self) -> Tensor:
        """int64 (total,): ``sequence_ids`` counted from 1, 0 after the last sequence, such as 1, 1, 1, 2, 2, 0."""
        return self.sequence_ids + 1

    @property
    def position_ids(self) -> Tensor:
        """int64 (total,): position inside the document, from ``position_start``.

        After the last sequence ``position_start - 1``, but at least 0: where RoBERTa puts padding.
        """
        ids = self.sequence_ids
        place = torch.arange(self.total, device=self.lengths.device)
        inside = place - self.cu_seqlens[ids.clamp(min=0)]
        return position_ids(inside, ids, self.first_positions, self.position_start)

    @property
    def shift_labels(self) -> Tensor:
        """int64 (total,): the label of the next token of the same sequence, IGNORE_INDEX at the end of each.

        From ``labels``, or from ``input_ids`` where there are none. No sequence predicts the beginning of the next.
        """
        return shift_labels(self.input_ids if self.labels is None else self.labels, self.sequence_ids)

    @property
    def attention_mask(self) -> Tensor:
        """bool (n_sequences, max_seqlen): the real tokens of ``to_padded``."""
        return torch.arange(self.max_seqlen, device=self.lengths.device) < self.lengths.unsqueeze(1)

    @property
    def row_mask(self) -> Tensor:
        """bool (1, total): the real tokens of the packed row; False after the last sequence."""
        return (torch.arange(self.total, device=self.lengths.device) < self.cu_seqlens[-1]).unsqueeze(0)

    @property
    def mask(self) -> masks.Mask:
        """No sequence sees another; combine with a pattern, such as ``batch.mask & masks.causal()``."""
        return masks.documents(cu_seqlens=self.cu_seqlens)

    def spans(self, pattern: masks.Mask | None = None, grad: bool = True) -> RowSpans:
        """The plan of ``mask & pattern`` for the packed row: what attention takes as its mask.

        Args:
            pattern: who sees whom inside a sequence; causal by default, ``masks.full()`` for encoders.
            grad: also plan the backward pass.
        """
        mask = self.mask & (masks.causal() if pattern is None else pattern)
        return mask.spans(self.total, self.total, batch=1, grad=grad)

    def dense_mask(self, pattern: masks.Mask | None = None) -> Tensor:
        """bool (1, 1, total, total), True = attend; ``pattern`` as in ``spans``. Rows after the end see nothing."""
        return self.spans(pattern, grad=False).to_dense()

    def check(self, **values: Tensor) -> None:
        """Raise ValueError for what does not go with the tokens of this batch: its name, and the first such sequence.

        Args:
            values: by name what is (total, ...) or (1, total, ...), such as logits and labels.
        """
        known = values_can_be_read([self.lengths], self.lengths.device)
        lengths = self.lengths.tolist() if known else None
        for name, value in values.items():
            check_tensor(name, value, "(total, ...)")
            check_row(name, value.shape, self.total, self.max_seqlen, lengths)

    # ---- to padded, and back -----------------------------------------------------------------------------------------

    @overload
    def to_padded(
        self, packed: None = None, padding_value: int = 0, *, side: Literal["right", "left"] = "right"
    ) -> PaddedBatch: ...

    @overload
    def to_padded(
        self, packed: Tensor, padding_value: float = 0, *, side: Literal["right", "left"] = "right"
    ) -> Tensor: ...

    def to_padded(
        self, packed: Tensor | None = None, padding_value: float = 0, *, side: Literal["right", "left"] = "right"
    ) -> Tensor | PaddedBatch:
        """The tokens of ``packed`` (total, ...) as (n_sequences, max_seqlen, ...); without it the batch as a whole.

        Differentiable; what stands after the last sequence reaches neither a value nor a gradient.

        Args:
            packed: (total, ...), such as hidden states; None: a PaddedBatch with the same sequences and labels.
            padding_value: what the padding holds; of a PaddedBatch, its pad token id.
            side: where the padding stands.
        """
        place, real = padded_places(self.lengths, self.max_seqlen, side)
        index = torch.where(real, self.cu_seqlens[:-1].unsqueeze(1) + place, self.total)
        if packed is None:
            from maskops.data.padded_batch import PaddedBatch  # which imports this module

            return PaddedBatch(
                input_ids=gathered(self.input_ids, index, padding_value),
                lengths=self.lengths,
                side=side,
                labels=None if self.labels is None else gathered(self.labels, index, IGNORE_INDEX),
                first_positions=self.first_positions,
                position_start=self.position_start,
                sequence_labels=self.sequence_labels,
            )
        if packed.dim() < 1 or packed.shape[0] != self.total:
            raise ValueError(f"packed has shape {tuple(packed.shape)}, expected ({self.total}, ...)")
        return gathered(packed, index, padding_value)

    def to_packed(self, padded: Tensor, *, side: Literal["right", "left"] = "right") -> Tensor:
        """The way back of ``to_padded``: (n_sequences, max_seqlen, ...) as (total, ...), 0 after the last sequence.

        Differentiable; what the padding holds reaches neither a value nor a gradient.

        Args:
            padded: (n_sequences, max_seqlen, ...).
            side: where its padding stands.
        """
        shape = (self.n_sequences, self.max_seqlen)
        if tuple(padded.shape[:2]) != shape:
            raise ValueError(
                f"padded has shape {tuple(padded.shape)}, expected ({shape[0]}, {shape[1]}, ...), n_sequences and "
                "max_seqlen of this batch"
            )
        index = packed_places(self.lengths, self.cu_seqlens, self.total, self.max_seqlen, side)
        return gathered(padded.flatten(0, 1), index, 0)

    # ---- for transformers --------------------------------------------------------------------------------------------

    def transformers_inputs(
        self,
        *,
        labels: Literal["causal", "aligned", "sequences"] | None = "causal",
        cu_seqlens: bool = True,
        seq_idx: bool = False,
        attention_mask: Literal["dense"] | None = None,
        mask_dtype: torch.dtype = torch.float32,
        pattern: masks.Mask | None = None,
        use_cache: bool | None = False,
    ) -> dict[str, Any]:
        """Keyword arguments of a model of transformers for this row, spelled as it spells them.

        There is no 2-D mask, which would switch transformers' own detection of packing off. Decoders on its eager and
        sdpa attention detect sequences by position ids that do not continue, and only without a cache; encoders, and
        models that do not hand position ids to their masks, do not detect any; a document's pieces whose positions
        continue (``first_positions``) look like one sequence if they lie side by side. In these cases give
        ``attention_mask="dense"``.

        Args:
            labels: ``"causal"``: ``labels`` with the first token of each sequence ignored, for models that shift them,
                and ``shift_labels``, which wins where a loss knows it and makes Trainer's count of targets exact;
                ``"aligned"``: labels as they are, for token classification and masked language models;
                ``"sequences"``: ``sequence_labels``, for models that know which sequences there are, and so only by
                name: classifiers of transformers do once ``maskops.attach`` has been called on them; None: none.
            cu_seqlens: also ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32), ``max_length_q`` and ``max_length_k`` (int).
                Places after the last sequence are one more sequence there, because kernels leave rows unwritten that
                no sequence covers. With ``has_room`` that sequence is always there, without a token if need be, and
                the longest length is given as ``total``, which bounds it: shapes and numbers are the same for every
                batch. With ``labels="sequences"`` it is left out, because what gives one output a sequence would
                give it one too.
            seq_idx: also ``seq_idx``, int32 (1, total), which state-space layers read.
            attention_mask: ``"dense"``: also a 4-D mask (1, 1, total, total), which every layer takes as it is, also
                those that would look through a window. Places after the last sequence see themselves.
            mask_dtype: of that mask: float32 (0 and its lowest number) for eager and sdpa attention in float32 and
                below; float64 for models in float64, where torch's kernel misreads a float32 mask; bool for sdpa alone.
            pattern: of that mask; causal by default, ``masks.full()`` for encoders.
            use_cache: passed on, because a cache switches the detection of packing off; None: not passed on, for models
                that know no such argument.

        Returns:
            Tensors (1, total) and the above.

        Raises:
            ValueError: an unknown word; ``sequence_labels`` that were not asked for, or that are not there.
        """
        if labels not in ("causal", "aligned", "sequences", None):
            raise ValueError(f"labels={labels!r}: expected 'causal', 'aligned', 'sequences' or None")
        if labels == "sequences" and self.sequence_labels is None:
            raise ValueError("labels='sequences': the batch has no sequence_labels")
        if labels in ("causal", "aligned") and self.sequence_labels is not None:
            raise ValueError(
                f"labels={labels!r}, and the batch has sequence_labels: a classifier of transformers takes the packed "
                f"row for one sequence, not for {self.n_sequences}. Use data.PaddedCollator, or maskops.attach(model), "
                "with which it does not, and ask for the labels with labels='sequences'"
            )
        row: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        ids = self.sequence_ids
        if labels == "causal":
            source = self.input_ids if self.labels is None else self.labels
            row["labels"] = without_first_tokens(source, ids)
            row["shift_labels"] = self.shift_labels
        elif labels == "aligned" and self.labels is not None:
            row["labels"] = self.labels
        if seq_idx:
            row["seq_idx"] = ids.to(torch.int32)
        inputs = {name: tensor.unsqueeze(0) for name, tensor in row.items()}
        if labels == "sequences":
            inputs["labels"] = self.sequence_labels
        if cu_seqlens:
            covered, longest = self.cu_seqlens, self.max_seqlen
            if self.has_room and labels != "sequences":
                covered, longest = torch.nn.functional.pad(covered, (0, 1), value=self.total), self.total
            inputs.update(cu_seq_lens_q=covered, cu_seq_lens_k=covered, max_length_q=longest, max_length_k=longest)
        if use_cache is not None:
            inputs["use_cache"] = use_cache
        if attention_mask == "dense":
            allowed = self.dense_mask(pattern)
            # Rows that see nothing are NaN in some implementations, and NaN spreads through the next layer.
            alone = torch.eye(self.total, dtype=torch.bool, device=ids.device) & (ids < 0)
            inputs["attention_mask"] = additive(allowed | alone, mask_dtype)
        elif attention_mask is not None:
            raise ValueError(f"attention_mask={attention_mask!r}: expected 'dense' or None")
        return inputs


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as it is, or as 0 and the lowest number of a floating point dtype, which is added to scores."""
    if dtype == torch.bool:
        return allowed
    if not dtype.is_floating_point:
        raise ValueError(f"mask_dtype={dtype}: expected torch.bool or a floating point dtype")
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def _joined(parts: list[Tensor], room: int, filler: int, device: torch.device) -> Tensor:
    rest = room - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, torch.full((rest,), filler, dtype=torch.int64, device=device)])
