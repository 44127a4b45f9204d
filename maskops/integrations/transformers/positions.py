"""Places of the tokens of packed and left-padded batches, for models that would count them from slots.

A token of a packed row is at the place that it has in its own document, and padding on the left moves no token. Models
are told so in one of three ways:

- forwards that take ``position_ids`` and were given none are given them;
- embeddings of positions that count from shapes (BART, Marian, Pegasus, ...: no argument of the model says where a
  token is) are handed the places in a pre-hook;
- tables of sinusoids that count tokens which are not padding (M2M100, NLLB, ...) are asked for the row of one whole
  sequence, from which the places are taken.

Relative biases (T5) need nothing. Position ids that the caller gave are never changed.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskops.integrations.transformers.arrival import documents_of_call, given_positions, is_continued, kept_tokens
from maskops.integrations.transformers.calls import Call, innermost
from maskops.layouts import values_can_be_read

if TYPE_CHECKING:
    from maskops.integrations.transformers.attach import Installation, Options

_COUNTING_TOKENS = "create_position_ids_from_input_ids"
_NOTE = "places"


def _counts_tokens(module: nn.Module) -> bool:
    """Whether positions are counted over the tokens that are not padding, from ``padding_idx + 1``."""
    if not isinstance(getattr(module, "padding_idx", None), int):
        return False
    return hasattr(module, _COUNTING_TOKENS) or (
        "position_ids" in _parameters(module) and hasattr(sys.modules[type(module).__module__], _COUNTING_TOKENS)
    )


def _parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a forward."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _embeds_positions(module: nn.Module) -> bool:
    """Whether a module has rows for the places of tokens (rotary, relative and convolutional ones have not)."""
    name = type(module).__name__
    return re.search(r"Position(al)?Embedding", name) is not None and not re.search(r"Rotary|Rel|Conv|Vision", name)


class _Counting(NamedTuple):
    """How one model counts positions."""

    first: int
    """Position of the first token of a sequence."""
    by: str
    """What it counts by itself: ``"slots"``, ``"tokens"`` that are not padding, or the ``"mask"``."""
    embeddings: tuple[nn.Module, ...]
    """Its embeddings of positions, where its forward takes no position ids."""
    is_multimodal: bool
    """Whether places come from what is in the images between the text."""
    drops_tokens: nn.Module | None
    """Embeddings that are scaled by the share of masked tokens of a row."""


def _own_modules(model: nn.Module, models: set[nn.Module]) -> list[nn.Module]:
    """The modules of a model that are in no other model inside it."""
    found, left = [], [model]
    while left:
        module = left.pop()
        found.append(module)
        left.extend(child for child in module.children() if child not in models)
    return found


def _counting(model: nn.Module, models: set[nn.Module]) -> _Counting:
    own = _own_modules(model, models)
    if "position_ids" in _parameters(model):
        everywhere = list(model.modules())
        tokens = next((module for module in everywhere if _counts_tokens(module)), None)
        by_mask = any(_embeds_positions(module) and "attention_mask" in _parameters(module) for module in own)
        return _Counting(
            first=0 if tokens is None else int(tokens.padding_idx) + 1,  # type: ignore[arg-type]
            by="tokens" if tokens is not None else "mask" if by_mask else "slots",
            embeddings=(),
            is_multimodal=any(hasattr(module, "get_rope_index") for module in everywhere),
            drops_tokens=next((module for module in everywhere if getattr(module, "token_dropout", False)), None),
        )
    embeddings = tuple(module for module in own if _embeds_positions(module))
    by_tokens = any(hasattr(module, _COUNTING_TOKENS) for module in embeddings)
    return _Counting(0, "tokens" if by_tokens else "slots", embeddings, False, None)


def _length_of_cache(call: Call) -> int | Tensor:
    """Tokens that the cache of a call holds: an integer, or for a static cache a tensor."""
    cache = call.arguments.get("past_key_values")
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    length: int | Tensor = cache.get_seq_length()
    return length


def places_of_call(call: Call, *, counts_padding: bool) -> Tensor | None:
    """int64 (batch, length): places of the tokens of a call in their documents; None where they are the slots.

    Args:
        call: one whose ``sizes`` are known.
        counts_padding: the model leaves padding out by itself, so that only packed batches need places.
    """
    if call.sizes is None:
        return None
    batch, length = call.sizes
    past = _length_of_cache(call)
    mask = call.tensor("attention_mask")
    kept = kept_tokens(mask) if mask is not None and mask.dim() == 2 and mask.shape[0] == batch else None
    columns: slice | Tensor = slice(0, length)
    if kept is not None and kept.shape[1] != length:
        columns = slice(past, past + length) if isinstance(past, int) else past + _slots(call, length)
        if isinstance(past, int) and kept.shape[1] < past + length:
            return None
    own = None if kept is None else kept[:, columns]
    documents = documents_of_call(call, batch, length, own, columns=columns, is_continued=is_continued(past))
    if documents is not None:
        start = documents.start if kept is None else torch.maximum(documents.start, _first_kept(kept))
        return torch.where(documents.ids >= 0, _slots(call, length) - start, 0).clamp(min=0)
    if counts_padding or kept is None:
        return None
    if values_can_be_read([kept], kept.device):
        # Most batches are padded on the right: every row begins in the first column.
        if kept.shape[1] and bool(kept[:, 0].all()):
            return None
        if not _first_kept(kept).any():
            return None
    offset = 0 if isinstance(columns, slice) and kept.shape[1] == length else past
    return (_slots(call, length) + offset - _first_kept(kept)).clamp(min=0)


def _first_kept(kept: Tensor) -> Tensor:
    """int64 (batch, 1): the first column of each row that is kept, 0 in a row without one."""
    return kept.to(torch.uint8).argmax(1, keepdim=True)


def _slots(call: Call, length: int) -> Tensor:
    for name in ("input_ids", "inputs_embeds"):
        tensor = call.tensor(name)
        if tensor is not None:
            return torch.arange(length, device=tensor.device)
    raise AssertionError("a call with sizes has ids or embeddings")


class _Tell:
    """Step before each call: position ids for forwards that take them, places for embeddings that count."""

    def __init__(self, countings: dict[nn.Module, _Counting]) -> None:
        self.countings = countings

    def __call__(self, call: Call) -> None:
        """Fill in what the caller left out."""
        counting = self.countings.get(call.module)
        if counting is None or call.sizes is None:
            return
        takes = "position_ids" in call.accepts
        # The top of an encoder-decoder speaks of two sequences at once: each part is told about its own.
        if takes and (call.arguments.get("position_ids") is not None or "decoder_input_ids" in call.accepts):
            return
        batch, length = call.sizes
        positions = given_positions(call, batch, length)
        if positions is None or positions.dim() == 3:
            has_ids = call.tensor("input_ids") is not None
            counts_padding = counting.by == "mask" or (counting.by == "tokens" and has_ids) or counting.is_multimodal
            places = places_of_call(call, counts_padding=counts_padding)
            if places is None:
                return
            _refuse(call, counting)
            positions = places + counting.first
        if takes:
            call.set("position_ids", positions)
        else:
            call.notes[_NOTE] = positions


def _refuse(call: Call, counting: _Counting) -> None:
    """Raise for packed batches whose places only the model could know."""
    if counting.is_multimodal:
        images = [name for name in call.arguments if re.match(r"(pixel|image|video|audio|input_feat)", name)]
        if any(call.tensor(name) is not None for name in images):
            raise ValueError(
                f"position_ids are missing: {type(call.module).__name__} counts places in images, which a packed "
                "batch does not tell; give the position_ids of each document, made by its get_rope_index"
            )
    if counting.drops_tokens is not None:
        ids = call.tensor("input_ids")
        masked = getattr(counting.drops_tokens, "mask_token_id", None)
        if ids is None or masked is None or not values_can_be_read([ids], ids.device) or (ids == masked).any():
            raise ValueError(
                f"{type(call.module).__name__} with token_dropout=True scales a row by its share of masked tokens, so "
                "documents of a packed row change each other: pad them, or set token_dropout=False"
            )


class _Embedding:
    """Hooks around one embedding of positions."""

    def __init__(self, owner: Any, names: list[str]) -> None:
        self.owner = owner
        self.names = names

    def places(self) -> Tensor | None:
        """What the running call of the owner says; None leaves the embedding to itself."""
        call = innermost()
        if call is None or call.module is not self.owner:
            return None
        places: Tensor | None = call.notes.get(_NOTE)
        return places


class _HandPlaces(_Embedding):
    """Pre-hook of embeddings that take position ids, which their model computes from shapes."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand in the places of all tokens in one row: some of these classes put a dimension in front."""
        places = self.places()
        if places is None:
            return None
        row = places.reshape(-1)
        if self.names[0] == "inputs_embeds":  # PegasusX: a column of places, and as many of them as the row has tokens
            states: Tensor = args[0] if args else kwargs["inputs_embeds"]
            return (states.new_empty(1, len(row), 1),), {"position_ids": row[:, None]}
        return args[: self.names.index("position_ids")], {**kwargs, "position_ids": row}


class _Reshape(_Embedding):
    """Hook after embeddings that were handed one row."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Give the rows back: (batch, length, width)."""
        places = self.places()
        return None if places is None else output.reshape(*places.shape, output.shape[-1])


class _AskWholeRow(_Embedding):
    """Pre-hook of tables that count tokens: one sequence without padding, of as many slots as the batch has."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Ask for the places 0, 1, ..., length - 1."""
        places = self.places()
        if places is None:
            return None
        return (), {"inputs_embeds": torch.empty(1, places.shape[1], 1, device=places.device)}


class _TakePlaces(_Embedding):
    """Hook after tables that were asked for one whole row."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Take the row of each token: (batch, length, width)."""
        places = self.places()
        return None if places is None else output.reshape(-1, output.shape[-1])[places]


class _Unserved(_Embedding):
    """Pre-hook of embeddings of positions that cannot be told."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise where the places are not the slots."""
        if self.places() is not None:
            raise ValueError(
                f"{type(self.owner).__name__} takes no position_ids and {type(module).__name__} counts positions in "
                "a way that is not known: pad its batches on the right"
            )


def _hook(module: nn.Module, owner: nn.Module) -> list[RemovableHandle]:
    names = _parameters(module)
    if "position_ids" in names:
        before: _HandPlaces | _AskWholeRow = _HandPlaces(owner, names)
        after: _Reshape | _TakePlaces = _Reshape(owner, names)
    elif names[:2] == ["input_ids", "inputs_embeds"]:
        before, after = _AskWholeRow(owner, names), _TakePlaces(owner, names)
    else:
        return [module.register_forward_pre_hook(_Unserved(owner, names))]
    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


def install(installation: Installation, options: Options) -> None:
    """Tell all models of an attachment the places of their tokens."""
    models: set[nn.Module] = set(installation.models)
    countings = {module: _counting(module, models) for module in models}
    installation.steps.before.append(_Tell(countings))
    for owner, counting in countings.items():
        for module in counting.embeddings:
            for handle in _hook(module, owner):
                installation.undo.callback(handle.remove)
