"""The ways in which documents arrive at a model: padded, packed, and what says where each begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskops.data import PackedBatch, pad
from maskops.masks import Mask, causal, full
from maskops.testing.leak.documents import Stream


@dataclass(frozen=True)
class Arrival:
    """One batch for a model.

    Attributes:
        name: of ``ARRIVALS``, or what the caller's batch is called.
        inputs: keyword arguments of the model.
        streams: the documents of its tokens.
    """

    name: str
    inputs: dict[str, Any]
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class Taken:
    """What a model's forward takes.

    Attributes:
        names: of its parameters.
        others: whether it takes any keyword.
        has_decoder: whether it is an encoder with a decoder.
        position_start: the position id of a document's first token.
        has_cache: whether it keeps keys for later tokens, which encoders do not, though some take ``use_cache``.
        pad: the id of padding.
        pattern: who sees whom inside a document, where the caller makes the mask.
    """

    names: frozenset[str]
    others: bool
    has_decoder: bool
    position_start: int
    has_cache: bool
    pad: int
    pattern: Mask

    def takes(self, name: str) -> bool:
        """Whether a keyword reaches the model."""
        return name in self.names or self.others

    @property
    def without_cache(self) -> dict[str, Any]:
        """``use_cache=False`` where that means something."""
        return {"use_cache": False} if "use_cache" in self.names and self.has_cache else {}


def taken_by(model: object, is_causal: bool = True, has_cache: bool = True) -> Taken:
    """Looks at the signature of a model's forward, below the wrappers of other libraries, and at its config."""
    inner: Any = model
    for _ in range(8):  # wrappers lie in one another: compiled, distributed, adapters
        wrapped = next(
            (found for name in ("_orig_mod", "module") if isinstance(found := getattr(inner, name, None), nn.Module)),
            None,
        )
        if wrapped is None and hasattr(inner, "get_base_model"):
            wrapped = inner.get_base_model()
        if wrapped is None or wrapped is inner:
            break
        inner = wrapped
    forward = inner.forward if isinstance(inner, nn.Module) else inner
    parameters = inspect.signature(forward).parameters.values()
    config = getattr(inner, "config", None)
    padding = getattr(config, "pad_token_id", None)
    return Taken(
        names=frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL),
        others=any(p.kind is p.VAR_KEYWORD for p in parameters),
        has_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        position_start=_position_start(inner),
        has_cache=has_cache,
        pad=padding if isinstance(padding, int) and padding >= 0 else 0,
        pattern=causal() if is_causal else full(),
    )


def _position_start(model: object) -> int:
    """RoBERTa and its relatives count from behind the index of padding, which their table of positions keeps."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, module in modules:
        index = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(index, int):
            return index + 1
    return 0


Sequences = Sequence[Tensor]
_Maker = Callable[[Taken, Sequences, "Sequences | None"], "Arrival | str"]


def _padded(side: Literal["right", "left"]) -> _Maker:
    def make(taken: Taken, tokens: Sequences, decoder: Sequences | None) -> Arrival | str:
        batch = pad(list(tokens), pad_token_id=taken.pad, side=side, position_start=taken.position_start)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if taken.takes("attention_mask"):
            inputs["attention_mask"] = batch.attention_mask.long()
        else:
            return "takes no attention_mask"
        # Padding on the right leaves the positions that a model counts by itself as they should be.
        if side == "left" and "position_ids" in taken.names:
            inputs["position_ids"] = batch.position_ids
        streams = [Stream("input_ids", batch.sequence_ids)]
        if decoder is not None:
            target = pad(list(decoder), pad_token_id=taken.pad)
            inputs["decoder_input_ids"] = target.input_ids
            inputs["decoder_attention_mask"] = target.attention_mask.long()
            streams.append(Stream("decoder_input_ids", target.sequence_ids))
        return Arrival("", inputs, tuple(streams))

    return make


def _packed(
    *,
    positions: bool = True,
    without_cache: bool = False,
    offsets: bool = False,
    mask: Literal["ones", "segments", "dense"] | None = None,
    rows: int = 1,
    tail: int = 0,
) -> _Maker:
    """One packed row, or several of equal length, in which the documents stand in another order."""

    def make(taken: Taken, tokens: Sequences, decoder: Sequences | None) -> Arrival | str:
        has_positions = positions and "position_ids" in taken.names
        if offsets and not taken.takes("cu_seq_lens_q"):
            return "takes no cu_seq_lens"
        if not offsets and mask != "dense" and mask != "segments" and not has_positions:
            return "takes no position_ids, and nothing else would say where documents begin"
        if decoder is not None and not offsets:
            return "nothing but cu_seq_lens says where the documents of a decoder begin"
        packs = [
            PackedBatch.from_sequences(
                [tokens[(number + turn) % len(tokens)] for number in range(len(tokens))],
                capacity=sum(map(len, tokens)) + tail,
                position_start=taken.position_start,
                pad_token_id=taken.pad,
            )
            for turn in range(rows)
        ]
        inputs: dict[str, Any] = {"input_ids": _stacked([pack.input_ids for pack in packs])}
        if has_positions:
            inputs["position_ids"] = _stacked([pack.position_ids for pack in packs])
        if mask == "ones" or (tail and mask is None and not offsets):
            inputs["attention_mask"] = _stacked([pack.row_mask[0].long() for pack in packs])
        elif mask == "segments":
            inputs["attention_mask"] = _stacked([pack.segment_ids for pack in packs])
        elif mask == "dense":
            allowed = torch.cat([pack.dense_mask(taken.pattern) for pack in packs])
            alone = torch.eye(allowed.shape[-1], dtype=torch.bool)  # rows that see nothing are NaN to some
            low = torch.finfo(torch.float32).min
            inputs["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~(allowed | alone), low)
        if offsets:
            inputs.update(_offsets(packs, "k" if decoder is not None else "qk"))
        streams = [Stream("input_ids", _documents(packs))]
        if decoder is not None:
            target = PackedBatch.from_sequences(list(decoder), pad_token_id=taken.pad)
            inputs["decoder_input_ids"] = target.input_ids.unsqueeze(0)
            inputs.update(_offsets([target], "q"))
            streams.append(Stream("decoder_input_ids", target.sequence_ids.unsqueeze(0)))
        return Arrival("", {**inputs, **(taken.without_cache if without_cache else {})}, tuple(streams))

    return make


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows)


def _offsets(packs: list[PackedBatch], sides: str) -> dict[str, Any]:
    lengths = torch.cat([pack.lengths for pack in packs])
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = max(pack.max_seqlen for pack in packs)
    inputs: dict[str, Any] = {f"cu_seq_lens_{side}": offsets for side in sides}
    return inputs | {f"max_length_{side}": longest for side in sides}


def _documents(packs: list[PackedBatch]) -> Tensor:
    ids = torch.stack([pack.sequence_ids for pack in packs])
    first = torch.arange(len(packs)).unsqueeze(1) * max(pack.n_sequences for pack in packs)
    return torch.where(ids >= 0, ids + first, -1)


_MAKERS: dict[str, _Maker] = {
    "padded right": _padded("right"),
    "padded left": _padded("left"),
    "packed": _packed(),
    "packed, no cache": _packed(without_cache=True),
    "packed, mask of ones": _packed(without_cache=True, mask="ones"),
    "packed, segment mask": _packed(positions=False, without_cache=True, mask="segments"),
    "packed, cu_seq_lens": _packed(without_cache=True, offsets=True),
    "packed, several rows": _packed(without_cache=True, rows=2),
    "packed, padded tail": _packed(without_cache=True, tail=4),
    "packed, 4-D mask": _packed(without_cache=True, mask="dense"),
}
ARRIVALS = tuple(_MAKERS)
"""Names of the ways in which documents can arrive."""
_CUSTOMARY = tuple(name for name in ARRIVALS if name not in ("packed, segment mask", "packed, 4-D mask"))


def arrivals_of(
    taken: Taken, tokens: Sequences, decoder: Sequences | None, names: Sequence[str] | None
) -> Iterator[tuple[str, Arrival | str]]:
    """The documents in each way that the model takes, or the reason why it does not.

    Args:
        taken: what the model takes.
        tokens: int64 (length,) for each document.
        decoder: tokens for the decoder, one document for each of ``tokens``; None for models of one stream.
        names: of ``ARRIVALS``; None: those that a model of transformers knows, or claims to.

    Raises:
        ValueError: an unknown name.
    """
    for name in names if names is not None else _CUSTOMARY:
        if name not in _MAKERS:
            raise ValueError(f"arrivals: {name!r} is unknown, expected some of: {', '.join(map(repr, ARRIVALS))}")
        if names is None and name == "packed, no cache" and not taken.without_cache:
            continue  # the same as the one before
        made = _MAKERS[name](taken, tokens, decoder)
        yield name, made if isinstance(made, str) else Arrival(name, made.inputs, made.streams)
