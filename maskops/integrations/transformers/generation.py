"""Generation: prompts through the model as packed rows, and a cache from which ``model.generate`` goes on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
)

from maskops.data import PackedBatch, PaddedBatch, pack
from maskops.data.arguments import Tokens, integer, token_ids
from maskops.data.lengths import check_count
from maskops.integrations.transformers.calls import is_attached

Prompts = PackedBatch | PaddedBatch | Mapping[str, Any] | Iterable[Tokens]


@torch.no_grad()
def packed_prefill(
    model: Any,
    prompts: Prompts,
    cache: str | Cache,
    max_length: int | None,
    chunk_size: int | None,
    expand_size: int,
    pad_token_id: int | None,
) -> dict[str, Any]:
    """``maskops.packed_prefill``, whose documentation says what the arguments are."""
    if not is_attached(model):
        raise ValueError(
            f"model ({type(model).__name__}) is not attached, and its own attention would let the prompts of a row see "
            "one another: call maskops.attach(model) first"
        )
    # The forward of a wrapper would compute the head as well, which nothing is asked of.
    model = next(inner for inner in model.modules() if isinstance(inner, PreTrainedModel))
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no generate: expected a causal language model or encoder-decoder")
    if not model.config.is_encoder_decoder and not _is_causal(model):
        raise ValueError(
            f"{type(model).__name__} attends in both directions, so that keys change with each new token and no cache "
            "holds them: build it with is_decoder=True"
        )
    tokens = _token_lists(prompts)
    lengths = [prompt.shape[0] for prompt in tokens]
    check_count("expand_size", expand_size)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    padding = _padding(model, pad_token_id)
    device = model.device
    tokens = [prompt.to(device) for prompt in tokens]
    encodes = bool(model.config.is_encoder_decoder)
    padded = PackedBatch.from_sequences(tokens).to_padded(padding_value=padding, side="right" if encodes else "left")
    inputs: dict[str, Any] = {
        "input_ids": padded.input_ids,
        "attention_mask": padded.attention_mask.to(torch.int64),
    }
    if encodes:
        if cache != "dynamic" or max_length is not None:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, whose cache belongs to the decoder, which starts in "
                "generate: leave out cache and max_length, and give cache_implementation to generate"
            )
        inputs["encoder_outputs"] = _encode(model, tokens, chunk_size)
        return inputs
    target = _target(model, cache, max_length, max(lengths))
    _fill(model, tokens, _PackedCache(target, lengths, expand_size, device), chunk_size)
    return {**inputs, "past_key_values": target}


# ---- the arguments ---------------------------------------------------------------------------------------------------


def _is_causal(model: Any) -> bool:
    """Whether no token attends to later ones: not so in encoders with a language-model head, which say it twice."""
    if getattr(model.config, "is_decoder", True):
        return True
    return any(getattr(module, "is_causal", None) is True for module in model.modules())


def _token_lists(prompts: Any) -> list[Tensor]:
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise ValueError(f"prompts is a mapping with {sorted(prompts)}: expected input_ids")
        ids, mask = prompts["input_ids"], prompts.get("attention_mask")
        tokens = [token_ids(f"input_ids[{number}]", row) for number, row in enumerate(ids)]
        if mask is not None:
            if len(mask) != len(tokens):
                raise ValueError(f"attention_mask has {len(mask)} rows, input_ids {len(tokens)}")
            tokens = [_kept(number, *pair) for number, pair in enumerate(zip(tokens, mask, strict=True))]
        elif isinstance(ids, Tensor):
            raise ValueError(
                "prompts has input_ids as one tensor and no attention_mask, which would tell tokens from padding: give "
                "it, or lists of token ids"
            )
    elif isinstance(prompts, (PackedBatch, PaddedBatch)):
        if prompts.first_positions is not None and bool(prompts.first_positions.any()):
            raise ValueError("prompts has first_positions other than 0: a prompt starts at its document's first token")
        row = (prompts.to_packed() if isinstance(prompts, PaddedBatch) else prompts).input_ids
        sizes = prompts.lengths.tolist()
        tokens = list(row[: sum(sizes)].split(sizes))
    elif isinstance(prompts, Tensor) and prompts.dim() == 2:
        raise ValueError(
            f"prompts is one tensor {tuple(prompts.shape)}, in which tokens and padding look alike: give a list of "
            "token ids, a PaddedBatch, or a mapping with input_ids and attention_mask"
        )
    elif isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is {type(prompts).__name__}: expected a list of token ids for each prompt")
    else:
        tokens = [token_ids(f"prompts[{number}]", prompt) for number, prompt in enumerate(prompts)]
    if not tokens:
        raise ValueError("prompts is empty: expected at least one prompt")
    for number, prompt in enumerate(tokens):
        if not prompt.shape[0]:
            raise ValueError(f"prompts[{number}] has no tokens, and nothing to go on from: leave it out or give it one")
    return tokens


def _kept(number: int, row: Tensor, mask: Any) -> Tensor:
    kept = torch.as_tensor(mask, device=row.device).to(torch.bool)
    if kept.shape != row.shape:
        raise ValueError(f"attention_mask[{number}] has {kept.shape[0]} places, input_ids[{number}] {row.shape[0]}")
    places = kept.nonzero().squeeze(1)
    if places.shape[0] and int(places[-1] - places[0]) + 1 != places.shape[0]:
        raise ValueError(f"attention_mask[{number}] has holes between tokens: expected padding on one side alone")
    return row[kept]


def _padding(model: Any, pad_token_id: int | None) -> int:
    if pad_token_id is not None:
        return integer("pad_token_id", pad_token_id)
    for known in (model.generation_config.pad_token_id, model.generation_config.eos_token_id):
        if isinstance(known, int):
            return known
        if known:
            return int(known[0])
    return 0


def _target(model: Any, cache: str | Cache, max_length: int | None, longest: int) -> Cache:
    """The cache that the prompts end up in, empty and long enough."""
    if max_length is not None and cache != "static":
        raise ValueError(f"max_length={max_length} is the size of a static cache, and cache is {cache!r}")
    config = model.config.get_text_config(decoder=True)
    if cache == "dynamic":
        cache = DynamicCache(config=config)
    elif cache == "static":
        if max_length is None:
            raise ValueError("cache='static' needs max_length: the tokens of a row, prompt and generated ones together")
        check_count("max_length", max_length)
        cache = StaticCache(config=config, max_cache_len=max_length)
    elif not isinstance(cache, Cache):
        raise TypeError(f"cache is {cache!r}: expected 'dynamic', 'static' or a Cache of transformers")
    if isinstance(cache, EncoderDecoderCache):
        raise ValueError(f"cache is an EncoderDecoderCache, and {type(model).__name__} is a decoder: give a Cache")
    for layer in cache.layers:
        plain = isinstance(layer, (CacheLayerMixin, DummyLayer)) and getattr(layer, "_layer_type", None) is None
        if not plain or isinstance(layer, (LinearAttentionCacheLayerMixin, DynamicIndexedLayer, StaticIndexedLayer)):
            raise ValueError(
                f"the cache of {type(model).__name__} has a layer {type(layer).__name__}, which keeps more than keys "
                "and values of single tokens: use generate with left-padded prompts"
            )
        if isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()):
            raise ValueError(
                f"cache already holds {int(layer.get_seq_length())} tokens: packed_prefill starts a conversation. Give "
                "an empty cache, or go on with generate"
            )
        if isinstance(layer, StaticLayer) and not layer.is_sliding and layer.max_cache_len < longest:
            raise ValueError(
                f"the static cache has room for {layer.max_cache_len} tokens a row, the longest prompt has {longest}: "
                "give max_length (or a cache) for prompt and generated tokens together"
            )
    return cache


# ---- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Tokens ``start`` to ``stop`` of a document."""

    document: int
    start: int
    stop: int


def _rows(lengths: list[int], chunk_size: int | None, *, divisible: bool) -> list[list[_Piece]]:
    """Which documents stand in which row. A piece that does not begin its document has a row to itself."""
    whole = [document for document, length in enumerate(lengths) if length]
    if chunk_size is None:
        return [[_Piece(document, 0, lengths[document]) for document in whole]] if whole else []
    rows: list[list[_Piece]] = []
    for document in (document for document in whole if lengths[document] > chunk_size):
        length = lengths[document]
        size = chunk_size if divisible else length
        rows += [[_Piece(document, start, min(start + size, length))] for start in range(0, length, size)]
    fitting = [document for document in whole if lengths[document] <= chunk_size]
    if fitting:
        packing = pack([lengths[document] for document in fitting], chunk_size, "best_fit_decreasing")
        for items in packing.bins:
            documents = [fitting[item] for item in items if isinstance(item, int)]
            rows.append([_Piece(document, 0, lengths[document]) for document in documents])
    return rows


def _arguments(module: Any, tokens: list[Tensor], row: list[_Piece]) -> dict[str, Any]:
    """What a module is called with for one row, as far as its forward knows it."""
    parameters = inspect.signature(module.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    start = row[0].start
    batch = PackedBatch.from_sequences(
        [tokens[piece.document][piece.start : piece.stop] for piece in row],
        first_positions=[piece.start for piece in row] if start else None,
    )
    arguments: dict[str, Any] = {"input_ids": batch.input_ids.unsqueeze(0)}
    if "position_ids" in parameters:
        arguments["position_ids"] = batch.position_ids.unsqueeze(0)
    if not start and (anything or "cu_seq_lens_q" in parameters):
        arguments.update(cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens)
    return arguments


def _fill(model: Any, tokens: list[Tensor], cache: _PackedCache, chunk_size: int | None) -> None:
    """Runs all tokens but the last of each prompt through the layers below the head, which no logits are needed of."""
    body = model.base_model
    rows = _rows([prompt.shape[0] - 1 for prompt in tokens], chunk_size, divisible=True)
    for number, row in enumerate(rows):
        cache.expect(row, last=number == len(rows) - 1)
        body(**_arguments(body, tokens, row), past_key_values=cache, use_cache=True)
    if rows and not cache.handed_on:
        raise ValueError(
            f"{type(model).__name__} wrote nothing to the cache that it was given: gradient checkpointing in training "
            "switches caches off, call model.eval()"
        )


def _encode(model: Any, tokens: list[Tensor], chunk_size: int | None) -> Any:
    """Outputs of the encoder for all prompts, hidden states (prompts, longest, width)."""
    encoder = model.get_encoder()
    output: Any = None
    parts: dict[int, Tensor] = {}
    for row in _rows([prompt.shape[0] for prompt in tokens], chunk_size, divisible=False):
        output = encoder(**_arguments(encoder, tokens, row), return_dict=True)
        sizes = [piece.stop - piece.start for piece in row]
        parts.update(zip((piece.document for piece in row), output.last_hidden_state[0].split(sizes), strict=True))
    states = [parts[document] for document in range(len(tokens))]
    # Of the encoder's own class, because decoders read more fields than the hidden states.
    return type(output)(last_hidden_state=torch.nn.utils.rnn.pad_sequence(states, batch_first=True))


class _PackedCache(Cache):
    """What the model takes for its cache while rows are run: hands keys and values on to the cache of the prompts.

    No layer of it slides: a window over the packed row would drop the keys of the first documents. The layers of the
    target cut what they are given, each prompt for itself, because the last tokens of all stand in the last column.
    """

    def __init__(self, target: Cache, lengths: list[int], expand_size: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.target = target
        self.width = max(lengths) - 1
        self.expand_size = expand_size
        # The column of each document's first token.
        self.columns = [self.width - (length - 1) for length in lengths]
        self.device = device
        self.row: list[_Piece] = []
        self.last = False
        self.places: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.handed_on = False

    def expect(self, row: list[_Piece], *, last: bool) -> None:
        """The next calls of ``update`` bring the keys of this row."""
        self.row, self.last = row, last
        self.places = {}

    @property
    def past(self) -> int:
        """Tokens of the row's only document that came before; 0 if the row begins its documents."""
        return self.row[0].start if self.row else 0

    def _places_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each token of the row the prompt and the column that it belongs to."""
        if device not in self.places:
            documents, columns = [], []
            for piece in self.row:
                documents.append(torch.full((piece.stop - piece.start,), piece.document))
                columns.append(torch.arange(piece.start, piece.stop) + self.columns[piece.document])
            self.places[device] = (torch.cat(documents).to(device), torch.cat(columns).to(device))
        return self.places[device]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values (1, heads, tokens, dim) of the row; returns those that its queries may see."""
        documents, columns = self._places_on(key_states.device)
        if key_states.dim() != 4 or key_states.shape[0] != 1 or key_states.shape[2] != documents.shape[0]:
            raise ValueError(
                f"layer {layer_idx} hands keys {tuple(key_states.shape)} to its cache, expected (1, heads, "
                f"{documents.shape[0]}, head_dim): this model cannot be prefilled packed"
            )
        if layer_idx not in self.kept:
            prompts = len(self.columns)
            self.kept[layer_idx] = tuple(  # type: ignore[assignment]  # two of them
                x.new_zeros(prompts, x.shape[1], self.width, x.shape[3]) for x in (key_states, value_states)
            )
        kept = self.kept[layer_idx]
        for padded, packed in zip(kept, (key_states, value_states), strict=True):
            padded[documents, :, columns] = packed[0].transpose(0, 1)
        seen = (key_states, value_states)
        if self.past:
            document, end = self.row[0].document, self.row[0].stop + self.columns[self.row[0].document]
            rows = slice(document, document + 1)
            seen = tuple(x[rows, :, self.columns[document] : end] for x in kept)  # type: ignore[assignment]
        if self.last:
            del self.kept[layer_idx]
            keys, values = (x.repeat_interleave(self.expand_size, 0) if self.expand_size > 1 else x for x in kept)
            self.target.update(keys, values, layer_idx)
            self.handed_on = True
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of the row."""
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Tokens before those of the row."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that ``update`` returns, and the place of the first."""
        return self.past + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit of its own."""
        return -1
