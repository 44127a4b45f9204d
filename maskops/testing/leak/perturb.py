"""Other tokens for a document, and which documents are given other tokens at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

_FEW = 5


class Replacement:
    """Draws other tokens of the same shape: other ids of the vocabulary, or other vectors of the same size.

    Args:
        model: whose vocabulary and special tokens are looked up.
        special_ids: more ids that mean something: they are neither drawn nor replaced.
        seed: of the draws.
    """

    def __init__(self, model: object, special_ids: Iterable[int], seed: int) -> None:
        self.special = torch.tensor(sorted({*_special_ids(model), *special_ids}), dtype=torch.int64)
        self.vocabulary = vocabulary_of(model)
        self._generator = torch.Generator().manual_seed(seed)

    def can_change(self, tokens: Tensor) -> Tensor:
        """Which tokens are replaced, bool, of their first two dimensions: all but special ones."""
        if tokens.is_floating_point():
            return torch.ones(tokens.shape[:2], dtype=torch.bool)
        free = ~torch.isin(tokens.cpu().long(), self.special)
        return free if free.dim() == 2 else free.flatten(2).all(-1)  # several codes a token

    def drawn(self, count: int) -> Tensor:
        """int64 (count,): ids that mean nothing special."""
        ids = self._ids()
        return ids[torch.randint(len(ids), (count,), generator=self._generator)]

    def replaced(self, tokens: Tensor, places: Tensor) -> Tensor:
        """A copy of (batch, length, ...) with others at ``places``, indices into the flattened batch."""
        result = tokens.clone()
        flat = result.flatten(0, 1)
        if tokens.is_floating_point():
            values = tokens.detach().float().cpu()
            noise = torch.randn((len(places), *flat.shape[1:]), generator=self._generator)
            drawn = noise * values.std() + values.mean()
        else:
            ids = self._ids(at_least=int(tokens.max()) + 1)
            old = flat.cpu()[places].long()
            index = torch.randint(len(ids), (len(places), *flat.shape[1:]), generator=self._generator)
            # The next one where a token was drawn that is there already.
            drawn = torch.where(ids[index] == old, ids[(index + 1) % len(ids)], ids[index])
        flat[places.to(flat.device)] = drawn.to(device=flat.device, dtype=flat.dtype)
        return result

    def _ids(self, at_least: int = 0) -> Tensor:
        size = self.vocabulary if self.vocabulary is not None else at_least
        ids = torch.arange(size)
        ids = ids[~torch.isin(ids, self.special)]
        if len(ids) < 2:
            raise ValueError(
                f"the vocabulary of {size} ids has {len(ids)} that are not special, expected 2 or more to replace "
                "tokens by others"
            )
        return ids


def separating_sets(items: int) -> list[list[int]]:
    """Sets such that for each ordered pair of items one set holds the first and not the second.

    Few items stand alone. More are given different subsets of equal size of the sets (Sperner, 1928: no subset of equal
    size holds another), the fewest sets that can tell every pair apart; 100 items take 9 sets.
    """
    if items <= _FEW:
        return [[item] for item in range(items)]
    sets = next(count for count in range(items) if math.comb(count, count // 2) >= items)
    members: list[list[int]] = [[] for _ in range(sets)]
    for item, chosen in zip(range(items), combinations(range(sets), sets // 2), strict=False):
        for number in chosen:
            members[number].append(item)
    return members


def input_embedding(model: object) -> nn.Module | None:
    """The module whose rows are tokens, or None where that is not clear."""
    if not isinstance(model, nn.Module):
        return None
    try:
        found: nn.Module | None = model.get_input_embeddings()  # type: ignore[operator]
        return found
    except (AttributeError, NotImplementedError, TypeError):  # a plain module; a model of transformers without tokens
        modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return modules[0] if len(modules) == 1 else None


def vocabulary_of(model: object) -> int | None:
    """Ids that the input embedding has a row for, or None."""
    embedding = input_embedding(model)
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        weight = getattr(embedding, "weight", None)
        rows = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None
    config = getattr(model, "config", None)
    declared = [
        value for place in _texts(config) if isinstance(value := getattr(place, "vocab_size", None), int) and value > 0
    ]
    sizes = [size for size in (rows, *declared) if isinstance(size, int)]
    return min(sizes) if sizes else None


def pad_of(model: object) -> int | None:
    """The id of padding, or None."""
    declared = [getattr(config, "pad_token_id", None) for config in _texts(getattr(model, "config", None))]
    index = getattr(input_embedding(model), "padding_idx", None)
    return next((pad for pad in (*declared, index) if isinstance(pad, int) and pad >= 0), None)


def _texts(config: Any) -> Iterator[Any]:
    if config is None:
        return
    yield config.get_text_config() if hasattr(config, "get_text_config") else config


def _special_ids(model: object) -> set[int]:
    """Ids that a config calls tokens of some kind: padding, ends, separators, images."""
    found: set[int] = set()
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if config is not None and hasattr(config, "to_dict"):
            found.update(_token_ids(config.to_dict()))
    index = getattr(input_embedding(model), "padding_idx", None)
    if isinstance(index, int):
        found.add(index)
    return found


def _token_ids(values: Mapping[Any, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif isinstance(name, str) and name.endswith(("_token_id", "_token_ids", "_token_index")):
            several = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in several if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
