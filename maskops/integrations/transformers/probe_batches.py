"""The two documents of the probe, and the batches in which they reach a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["target", "source"]

LONGEST_WINDOW = 128
"""Windows up to this many tokens are exceeded by the probe; longer ones would make it slow, and are told."""

PACKED_IDS, PACKED_CU = "packed by position_ids", "packed by cu_seq_lens"
PADDED_RIGHT, PADDED_LEFT = "padded right", "padded left"
CACHED = "cached step"
PACKED = (PACKED_IDS, PACKED_CU)

_LENGTHS = (11, 7)


class Documents(NamedTuple):
    """Two documents.

    Attributes:
        target: ids of each document, (length,) int64; of the decoder where there are two sides.
        source: ids of each document on the encoder's side; empty where there is one side.
    """

    target: tuple[Tensor, ...]
    source: tuple[Tensor, ...] = ()

    def side(self, side: Side) -> tuple[Tensor, ...]:
        """The ids of one side."""
        return self.target if side == "target" else self.source

    def alone(self, index: int) -> dict[str, Tensor]:
        """The arguments of a call with one document."""
        if not self.source:
            return {"input_ids": self.target[index][None]}
        return {"input_ids": self.source[index][None], "decoder_input_ids": self.target[index][None]}


class Spot(NamedTuple):
    """Where `length` tokens of a document, beginning with its token `first`, lie in a grid of slots."""

    row: int
    column: int
    first: int
    length: int


class Slots(NamedTuple):
    """Where documents lie in (rows, length) slots; `spots` has one for each document."""

    rows: int
    length: int
    spots: tuple[Spot, ...]

    def lay(self, documents: tuple[Tensor, ...], empty: int) -> Tensor:
        """(rows, length) int64 ids, `empty` in slots without a token."""
        grid = documents[0].new_full((self.rows, self.length), empty)
        for (row, column, first, count), ids in zip(self.spots, documents, strict=True):
            grid[row, column : column + count] = ids[first : first + count]
        return grid

    def kept(self, device: torch.device) -> Tensor:
        """(rows, length) int64, 1 in slots with a token."""
        grid = torch.zeros(self.rows, self.length, dtype=torch.int64, device=device)
        for row, column, _, count in self.spots:
            grid[row, column : column + count] = 1
        return grid

    def positions(self, device: torch.device, start: int) -> Tensor:
        """(rows, length) int64 position ids; slots without a token have `start`."""
        grid = torch.full((self.rows, self.length), start, device=device)
        for row, column, first, count in self.spots:
            grid[row, column : column + count] = torch.arange(first, first + count, device=device) + start
        return grid

    def offsets(self, device: torch.device) -> Tensor:
        """(documents + 1,) int32 cu_seqlens of a packed row."""
        counts = torch.tensor([0, *(spot.length for spot in self.spots)], device=device)
        return counts.cumsum(0).int()


def _packed(lengths: list[int]) -> Slots:
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return Slots(1, sum(lengths), tuple(Spot(0, start, 0, n) for start, n in zip(starts, lengths, strict=True)))


def _padded(lengths: list[int], *, left: bool) -> Slots:
    width = max(lengths)
    return Slots(len(lengths), width, tuple(Spot(i, width - n if left else 0, 0, n) for i, n in enumerate(lengths)))


@dataclass(frozen=True)
class Phase:
    """One call of an arrival.

    Attributes:
        inputs: the arguments of the call, from the output of the call before it.
        slots: where the documents lie, by side.
    """

    inputs: Callable[[Any], dict[str, Any]]
    slots: dict[Side, Slots]


@dataclass(frozen=True)
class Way:
    """A way in which the documents arrive: its name and its calls, or why the model does not take it."""

    name: str
    phases: tuple[Phase, ...] = ()
    missing: str = ""


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configs(inner)


def _special_tokens(model: Any) -> set[int]:
    found: set[int] = set()
    for holder in (*_configs(model.config), getattr(model, "generation_config", None)):
        for name, value in vars(holder).items() if holder is not None else ():
            if name.endswith(("token_id", "token_ids", "token_index")):
                values = value if isinstance(value, (list, tuple)) else [value]
                found.update(item for item in values if isinstance(item, int))
    return found


def windows(model: Any) -> list[int]:
    """The windows and chunks, in tokens, that the configurations of a model name, ascending."""
    found: set[int] = set()
    for config in _configs(model.config):
        if getattr(config, "use_sliding_window", True) is False:
            continue
        for name in ("sliding_window", "local_attention", "attention_chunk_size", "window_size", "attention_window"):
            value = getattr(config, name, None)
            found.update({value} if isinstance(value, int) and not isinstance(value, bool) and value > 0 else ())
    return sorted(found)


def first_position(model: Any) -> int:
    """The position id of a document's first token: 0, in the RoBERTa family the place after the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def choose_documents(model: Any, device: torch.device) -> Documents:
    """Random tokens that are no special ones, the same in each probe of a model; no global generator is drawn from."""
    text = model.config.get_text_config()
    reached = max([window for window in windows(model) if window <= LONGEST_WINDOW], default=0)
    limits = [getattr(config, "max_position_embeddings", None) for config in (model.config, text)]
    limit = min([n - 2 - first_position(model) for n in limits if isinstance(n, int) and n > 0], default=1 << 30)
    long = max(3, min(max(_LENGTHS[0], reached + 7), limit - 4))
    short = max(2, min(max(_LENGTHS[1], reached + 4), long - 1))
    vocabulary = int(text.vocab_size)
    # Ends of vocabularies hold special and unused tokens more often than the middle does.
    special = _special_tokens(model)
    middle = [t for t in range(vocabulary // 8, vocabulary - vocabulary // 8) if t not in special]
    choices = torch.tensor(middle or list(range(vocabulary)))
    generator = torch.Generator().manual_seed(0)

    def draw(*lengths: int) -> tuple[Tensor, ...]:
        return tuple(choices[torch.randint(len(choices), (n,), generator=generator)].to(device) for n in lengths)

    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return Documents(draw(long, short))
    if any(base.__name__.endswith("ForSequenceClassification") for base in type(model).__mro__):
        # Classifiers make the decoder's ids of the encoder's, and read the state of the end-of-sequence token.
        end = text.eos_token_id
        documents = draw(long, short)
        for ids in documents if isinstance(end, int) else ():
            ids[-1] = end
        return Documents(documents)
    # A document's source is never as long as its target, so that the side of a tensor can be told from its length.
    return Documents(draw(long, short), draw(short + 2, long + 3))


def ways(model: Any, documents: Documents, device: torch.device, *, cached: bool) -> list[Way]:
    """The ways in which the documents can reach a model; `cached`: whether its calls return keys and values."""
    parameters = inspect.signature(model.forward).parameters
    rest = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    start = first_position(model)
    pair = bool(documents.source)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    sides: tuple[Side, ...] = ("target", "source") if pair else ("target",)
    lengths: dict[Side, list[int]] = {side: [len(ids) for ids in documents.side(side)] for side in sides}

    def ids(slots: dict[Side, Slots]) -> dict[str, Any]:
        laid = {side: slots[side].lay(documents.side(side), pad) for side in slots}
        return (
            {"input_ids": laid["source"], "decoder_input_ids": laid["target"]}
            if pair
            else {"input_ids": laid["target"]}
        )

    def masks(slots: dict[Side, Slots]) -> dict[str, Any]:
        kept = {side: slots[side].kept(device) for side in slots}
        if not pair:
            return {"attention_mask": kept["target"]}
        return {"attention_mask": kept["source"], "decoder_attention_mask": kept["target"]}

    def offsets(slots: dict[Side, Slots]) -> dict[str, Any]:
        queries, keys = slots["target"], slots["source" if pair else "target"]
        return {
            "cu_seq_lens_q": queries.offsets(device),
            "cu_seq_lens_k": keys.offsets(device),
            "max_length_q": max(spot.length for spot in queries.spots),
            "max_length_k": max(spot.length for spot in keys.spots),
        }

    def once(slots: dict[Side, Slots], inputs: dict[str, Any]) -> tuple[Phase, ...]:
        return (Phase(lambda _: inputs, slots),)

    packed = {side: _packed(lengths[side]) for side in sides}
    right = {side: _padded(lengths[side], left=False) for side in sides}
    left = {side: _padded(lengths[side], left=True) for side in sides}
    takes_positions = "position_ids" in parameters and not pair
    takes_offsets = rest or "cu_seq_lens_q" in parameters
    found = [
        Way(PACKED_IDS, once(packed, {**ids(packed), "position_ids": packed["target"].positions(device, start)}))
        if takes_positions
        else Way(PACKED_IDS, missing="its forward has no position_ids; give cu_seq_lens_q and cu_seq_lens_k"),
        Way(PACKED_CU, once(packed, {**ids(packed), **offsets(packed)}))
        if takes_offsets
        else Way(PACKED_CU, missing="its forward hands no further keywords on"),
    ]
    if "attention_mask" in parameters:
        found += [
            Way(PADDED_RIGHT, once(right, {**ids(right), **masks(right)})),
            Way(PADDED_LEFT, once(left, {**ids(left), **masks(left)})),
        ]
    if cached and "attention_mask" in parameters:
        steps = _pair_steps if pair else _steps
        found.append(Way(CACHED, steps(documents, device, pad, start if "position_ids" in parameters else None)))
    return found


def _steps(documents: Documents, device: torch.device, pad: int, start: int | None) -> tuple[Phase, ...]:
    """All tokens but the last, padded left as generate() does, then the last one over the cache."""
    counts = [len(ids) - 1 for ids in documents.target]
    before = _padded(counts, left=True)
    step = Slots(len(counts), 1, tuple(Spot(row, 0, count, 1) for row, count in enumerate(counts)))
    kept = before.kept(device)

    def positions(slots: Slots) -> dict[str, Tensor]:
        return {} if start is None else {"position_ids": slots.positions(device, start)}

    first = {"input_ids": before.lay(documents.target, pad), "attention_mask": kept, **positions(before)}
    longer = torch.cat([kept, kept.new_ones(len(counts), 1)], 1)
    second = {"input_ids": step.lay(documents.target, pad), "attention_mask": longer, **positions(step)}
    return (
        Phase(lambda _: {**first, "use_cache": True}, {"target": before}),
        Phase(lambda output: {**second, "use_cache": True, **_cache(output)}, {"target": step}),
    )


def _pair_steps(documents: Documents, device: torch.device, pad: int, _: int | None) -> tuple[Phase, ...]:
    """Decoders of one length, as generate() runs them, over padded sources: a prefix, then one token over the cache."""
    count = min(len(ids) for ids in documents.target) - 1
    rows = range(len(documents.target))
    before = Slots(len(rows), count, tuple(Spot(row, 0, 0, count) for row in rows))
    step = Slots(len(rows), 1, tuple(Spot(row, 0, count, 1) for row in rows))
    source = _padded([len(ids) for ids in documents.source], left=False)
    mask = {"attention_mask": source.kept(device), "use_cache": True}
    first = {"input_ids": source.lay(documents.source, pad), "decoder_input_ids": before.lay(documents.target, pad)}
    second = {"decoder_input_ids": step.lay(documents.target, pad)}

    def states(output: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)

    def after(output: Any) -> dict[str, Any]:
        return {**mask, **second, **_cache(output), "encoder_outputs": states(output)}

    return (
        Phase(lambda _: {**mask, **first}, {"target": before, "source": source}),
        Phase(after, {"target": step, "source": source}),
    )


def _cache(output: Any) -> dict[str, Any]:
    return {"past_key_values": output.past_key_values}
