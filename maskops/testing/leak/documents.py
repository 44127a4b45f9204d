"""Which document each place of a batch belongs to, read from what the batch itself says.

This reading is on purpose independent of the integrations of this package: it is what they are judged by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS = ("input_ids", "inputs_embeds", "src", "input", "x", "tokens")
"""Names of the argument that holds the tokens, in the order in which they are looked for."""
DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "tgt")
OFFSETS = ("cu_seq_lens", "cu_seqlens")
_DROPPED_MASKS = ("src_key_padding_mask", "key_padding_mask", "padding_mask")  # torch's: True = padding
_PADDING = -1
_FORBIDS = -9999.0


@dataclass(frozen=True)
class Stream:
    """Tokens of a batch with their documents: one in most models, two in encoder-decoders.

    Attributes:
        name: the argument of the model that holds the tokens.
        documents: int64 (batch, length) on the CPU: the number of each place's document, -1 at padding.
        sequences: how many sequences the batch has with those that are no documents, such as empty ones and padding
            that offsets count as one: outputs of one row for each may have as many. 0: as many as documents.
    """

    name: str
    documents: Tensor
    sequences: int = 0

    @property
    def numbers(self) -> list[int]:
        """The documents, in ascending order."""
        return [number for number in self.documents.unique().tolist() if number != _PADDING]

    def places(self, document: int) -> Tensor:
        """int64 (n,): indices into the flattened batch, in order."""
        return (self.documents.flatten() == document).nonzero().flatten()

    @property
    def padding(self) -> Tensor:
        """As ``places``, of padding."""
        return self.places(_PADDING)


def streams_of(
    inputs: Mapping[str, Any], documents: Tensor | Mapping[str, Tensor] | None = None, tokens: str | None = None
) -> tuple[Stream, ...]:
    """The streams of a batch; the output of the model is aligned with the last.

    Args:
        inputs: keyword arguments of the model.
        documents: given by the caller: integers (batch, length), negative at padding; by name for several streams.
        tokens: the argument that holds the tokens, where its name is none of the usual.

    Raises:
        TypeError: documents that are no integers.
        ValueError: no tokens, or shapes that contradict each other.
    """
    first = _named(inputs, TOKENS if tokens is None else (tokens,))
    if first is None:
        raise ValueError(
            f"batch: none of its entries ({', '.join(inputs) or 'none'}) is a tensor of tokens called "
            f"{' or '.join(TOKENS if tokens is None else (tokens,))}; name yours with tokens="
        )
    second = _named(inputs, DECODER_TOKENS)
    names = [first] if second is None else [first, second]
    return tuple(
        Stream(name, _documents_of(inputs, name, documents, names), _sequences(inputs, name, names)) for name in names
    )


def without_padding(stream: Stream, tokens: Tensor, pad: int | None) -> Stream:
    """The stream with documents of nothing but padding tokens as padding: offsets and positions count it as documents.

    Args:
        stream: as the batch says.
        tokens: (batch, length, ...) of the stream.
        pad: the id of padding, None where there is none.
    """
    if pad is None or tokens.is_floating_point() or tokens.dim() != 2:
        return stream
    is_real = (tokens.detach().cpu() != pad) & (stream.documents != _PADDING)
    real = stream.documents[is_real].unique()
    documents = torch.where(torch.isin(stream.documents, real), stream.documents, _PADDING)
    # A batch of nothing else is left as it is.
    return Stream(stream.name, documents, stream.sequences) if len(real) else stream


def _named(inputs: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].dim() >= 2), None)


def _documents_of(
    inputs: Mapping[str, Any], name: str, given: Tensor | Mapping[str, Tensor] | None, names: list[str]
) -> Tensor:
    batch, length = inputs[name].shape[:2]
    explicit = given.get(name) if isinstance(given, Mapping) else given if name == names[0] else None
    if explicit is not None:
        return _explicit(explicit, batch, length)
    is_decoder = name != names[0]
    kept, segments = _kept(inputs, batch, length, is_decoder)
    row = torch.arange(batch).unsqueeze(1).expand(batch, length)
    offsets = _offsets(inputs, "q" if is_decoder or len(names) == 1 else "k")
    if offsets is not None:
        ids = _of_offsets(offsets, batch, length)
    elif isinstance(inputs.get("seq_idx"), Tensor) and not is_decoder:
        ids = _joined(row, inputs["seq_idx"].detach().cpu().long().expand(batch, length))
    else:
        positions = inputs.get("decoder_position_ids" if is_decoder else "position_ids")
        begins = torch.zeros(batch, length, dtype=torch.int64)
        if isinstance(positions, Tensor):
            begins = _restarts(positions.detach().cpu(), kept)
        ids = _joined(row, segments, begins)
        mask = inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and not isinstance(positions, Tensor):
            ids = _components(mask, batch, length)
    if offsets is None:
        ids = _numbered(torch.where(kept, ids, _PADDING))
    return torch.where(kept, ids, _PADDING)


def _sequences(inputs: Mapping[str, Any], name: str, names: list[str]) -> int:
    offsets = _offsets(inputs, "k" if name == names[0] and len(names) > 1 else "q")
    return int(inputs[name].shape[0]) if offsets is None else offsets.numel() - 1


def _explicit(documents: Tensor, batch: int, length: int) -> Tensor:
    if not isinstance(documents, Tensor) or documents.is_floating_point() or documents.dtype == torch.bool:
        kind = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise TypeError(f"documents: expected a tensor of integers ({batch}, {length}), got {kind}")
    if documents.dim() == 1 and batch == 1:
        documents = documents.unsqueeze(0)
    if tuple(documents.shape) != (batch, length):
        raise ValueError(f"documents has shape {tuple(documents.shape)}, expected ({batch}, {length}), as the tokens")
    return documents.detach().cpu().long().clamp(min=_PADDING)


def _kept(inputs: Mapping[str, Any], batch: int, length: int, is_decoder: bool) -> tuple[Tensor, Tensor]:
    """Real tokens, bool (batch, length), and what a two-dimensional mask counts them as."""
    mask = inputs.get("decoder_attention_mask" if is_decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask.detach().cpu()[:, -length:]  # over a cache the mask speaks of its tokens as well
        if tuple(mask.shape) != (batch, length):
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {length})")
        segments = mask.long()
        return segments > 0, segments
    for name in () if is_decoder else _DROPPED_MASKS:
        dropped = inputs.get(name)
        if isinstance(dropped, Tensor) and tuple(dropped.shape) == (batch, length):
            kept = dropped.detach().cpu() == 0  # False, or what an additive mask adds to real keys
            return kept, kept.long()
    return torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, length, dtype=torch.int64)


def _offsets(inputs: Mapping[str, Any], side: str) -> Tensor | None:
    for stem in OFFSETS:
        for name in (f"{stem}_{side}", stem, f"{stem}_q", f"{stem}_k"):
            value = inputs.get(name)
            if isinstance(value, Tensor):
                return value.detach().cpu().long().flatten()
    return None


def _of_offsets(offsets: Tensor, batch: int, length: int) -> Tensor:
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()) or int(offsets[-1]) > batch * length:
        raise ValueError(
            f"batch: cu_seq_lens {offsets.tolist()}: expected offsets that begin at 0, ascend and end at or before "
            f"{batch * length}, the tokens of the batch"
        )
    ids = torch.searchsorted(offsets, torch.arange(batch * length), right=True) - 1
    # What stands after the last offset belongs to no document.
    return torch.where(ids < offsets.numel() - 1, ids, _PADDING).view(batch, length)


def _restarts(positions: Tensor, kept: Tensor) -> Tensor:
    """Ordinal of the document in its row, int64 (batch, length): a position that does not continue begins one."""
    batch, length = kept.shape
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    if positions.dim() == 3:
        if positions.shape[0] != 4:  # multimodal positions without those of text: they say nothing of documents
            return torch.zeros(batch, length, dtype=torch.int64)
        positions = positions[0]
    if positions.shape[1] != length or positions.shape[0] not in (1, batch):
        raise ValueError(f"position_ids has shape {tuple(positions.shape)}, expected ({batch}, {length})")
    positions = positions.expand(batch, length).long()
    place = torch.arange(length).expand(batch, length)
    last = torch.where(kept, place, -1).cummax(1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)  # the real token before, -1 for none
    step = positions - positions.gather(1, before.clamp(min=0))
    # Positions that count the slots of a hole in the mask go on behind it.
    begins = kept & (before >= 0) & (step != 1) & (step != place - before)
    return begins.long().cumsum(1)


def _components(mask: Tensor, batch: int, length: int) -> Tensor:
    """Documents of a four-dimensional mask: places that see each other, directly or through others."""
    allowed = mask.detach().cpu()
    if allowed.dtype != torch.bool:
        # Added to scores: a bias may be negative, what forbids is -10,000 or less in everybody's masks.
        allowed = allowed > (_FORBIDS if allowed.is_floating_point() else 0)
    allowed = allowed.expand(batch, *allowed.shape[1:]).any(1)
    if tuple(allowed.shape) != (batch, length, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: documents can be read from (batch, heads, {length}, "
            f"{length}) alone; give documents="
        )
    linked = allowed | allowed.transpose(1, 2) | torch.eye(length, dtype=torch.bool)
    label = torch.arange(length).expand(batch, length)
    while True:  # the smallest place that each one is linked to, until nothing changes
        smaller = torch.where(linked, label.unsqueeze(1), length).amin(2)
        smaller = smaller.gather(1, smaller)
        if torch.equal(smaller, label):
            break
        label = smaller
    row = torch.arange(batch).unsqueeze(1) * length
    return row + label


def _joined(*parts: Tensor) -> Tensor:
    """Ids that are equal where all parts are."""
    result = torch.zeros_like(parts[0])
    for part in parts:
        low = int(part.min()) if part.numel() else 0
        span = int(part.max()) - low + 1 if part.numel() else 1
        result = result * span + (part - low)
    return result


def _numbered(ids: Tensor) -> Tensor:
    """The row for rows of one document; else ids counted from 0 in the order in which they appear. Padding stays."""
    length = ids.shape[1]
    ends = torch.where(ids == _PADDING, torch.iinfo(torch.int64).max, ids).amin(1), ids.amax(1)
    if length and bool(((ends[0] >= ends[1]) | (ends[1] == _PADDING)).all()):
        # Numbers that the streams of an encoder-decoder share, also where a row is empty.
        return torch.where(ids == _PADDING, _PADDING, torch.arange(ids.shape[0]).unsqueeze(1))
    flat = ids.flatten().tolist()
    known: dict[int, int] = {}
    numbers = [_PADDING if value == _PADDING else known.setdefault(value, len(known)) for value in flat]
    return torch.tensor(numbers, dtype=torch.int64).view(ids.shape)
