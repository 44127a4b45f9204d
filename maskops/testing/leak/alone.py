"""One document of a batch by itself: the inputs of the batch without everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskops.testing.leak.documents import OFFSETS, Stream

_SQUARE_MASKS = ("mask", "src_mask", "attn_mask", "tgt_mask")  # (length, length), for every row
_OF_BATCHES = ("seq_idx", "cache_position", "src_key_padding_mask", "key_padding_mask", "padding_mask")


def stream_alone(stream: Stream, document: int) -> Stream:
    """The stream of a document by itself, one row without padding."""
    return Stream(stream.name, torch.zeros(1, len(stream.places(document)), dtype=torch.int64))


def inputs_alone(inputs: Mapping[str, Any], streams: tuple[Stream, ...], document: int) -> dict[str, Any]:
    """The inputs of a document by itself: its part of all that goes by tokens, and nothing that tells documents apart.

    Args:
        inputs: of the batch.
        streams: of the batch.
        document: which.
    """
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith((*OFFSETS, "max_length_", "max_seqlen")) or name in _OF_BATCHES:
            continue
        if not isinstance(value, Tensor):
            result[name] = value
            continue
        part = _part(name, value, streams, document)
        if part is not None:
            result[name] = part
    return result


def _part(name: str, value: Tensor, streams: tuple[Stream, ...], document: int) -> Tensor | None:
    """Of one tensor what belongs to a document; None for what a document by itself does without."""
    stream = _stream_of(name, value, streams)
    if stream is None:
        return value
    batch, length = stream.documents.shape
    places = stream.places(document)
    row, column = (part.to(value.device) for part in (places // length, places % length))
    if "position_ids" in name:
        return _positions(value, stream, row, column)
    if name.endswith("attention_mask") and value.dim() == 2:
        return None
    if name.endswith("mask") and value.dim() == 4:
        own: Tensor = value.expand(batch, *value.shape[1:])[row[:1]]
        return own[..., column.unsqueeze(1), column]
    if name in _SQUARE_MASKS and tuple(value.shape) == (length, length):
        return value[column.unsqueeze(1), column]
    # What goes by tokens, such as token_type_ids.
    part: Tensor = value[row, column].unsqueeze(0)
    return part


def _stream_of(name: str, value: Tensor, streams: tuple[Stream, ...]) -> Stream | None:
    """The stream that a tensor goes by: that of its name, else that of its shape."""
    for stream in streams[-1:] if name.startswith(("decoder_", "tgt")) else streams:
        batch, length = stream.documents.shape
        if name == stream.name or tuple(value.shape[:2]) == (batch, length):
            return stream
        if value.dim() >= 2 and value.shape[-1] == length and ("position_ids" in name or name.endswith("mask")):
            return stream
    return None


def _positions(value: Tensor, stream: Stream, row: Tensor, column: Tensor) -> Tensor | None:
    """None: the model counts by itself. A piece from the middle of a document keeps its positions."""
    batch = stream.documents.shape[0]
    if value.dim() == 3:  # of images and text
        return value.expand(-1, batch, -1)[:, row, column].unsqueeze(1)
    expanded = value.expand(batch, -1)
    flat = expanded.detach().cpu().flatten()
    firsts = [int(flat[stream.places(number)[0]]) for number in stream.numbers]
    if not len(row):
        return None
    own, before = int(expanded[row[0], column[0]]), int(column[0]) - 1
    # Positions that go on from the document before, in the same row, have not restarted: that is a mistake.
    is_continued = before >= 0 and own == int(expanded[row[0], before]) + 1
    return expanded[row, column].unsqueeze(0) if own > min(firsts) and not is_continued else None
