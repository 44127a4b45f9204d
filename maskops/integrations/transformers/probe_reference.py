"""The first half of a probe: what a model makes of two documents by itself, one at a time.

Attention that is nearly uniform hides what is wrong with it: a dropped softcap changes nothing where scores are near 0,
as they are in a model that has just been initialised. Scores that are far apart hide as much, and eager attention in
bfloat16 rounds them badly. A module therefore reads its input multiplied by a factor that brings the spread of its
scores to about 1.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskops.integrations.transformers.mixers import Mixer, token_mixers
from maskops.integrations.transformers.probe_batches import PACKED, Documents, Side, Slots, Way, choose_documents, ways

_WIDEST_FACTOR = 64.0  # also as a divisor
# Of encoder-decoders and heads: what is not compared, being no result of the model.
_NO_RESULTS = ("loss", "past_key_values", "hidden_states", "attentions")


Results = dict[str, list[Tensor]]
"""Of each output, by name, what it says of each document: its tokens (length, ...), or one row (1, ...)."""


class Seen(NamedTuple):
    """One call of a module with one document: what it read, by argument, what it gave, and the side of its tokens."""

    inputs: dict[str, tuple[Side, Tensor]]
    output: Tensor
    side: Side | None


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Runs the body in eval mode without gradients and puts back what forwards may have left in the modules.

    Instance attributes and buffers (also those that a forward replaces), training flags and the states of the global
    generators are afterwards what they were before.
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    # Buffers, hooks and the like are dictionaries among the attributes.
    contents = [
        {name: dict(value) for name, value in before.items() if isinstance(value, dict)} for before in attributes
    ]
    device = next(model.parameters()).device
    indices = [device.index or 0] if device.type not in ("cpu", "meta") else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(indices, device_type=device.type if indices else "cuda"))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, before, named in zip(modules, attributes, contents, strict=True):
                for name in [name for name in module.__dict__ if name not in before]:
                    del module.__dict__[name]
                module.__dict__.update(before)
                for name, content in named.items():
                    before[name].clear()
                    before[name].update(content)


@contextlib.contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Runs the body with the model's own eager attention."""
    configs: dict[int, Any] = {}

    def collect(config: Any) -> None:
        configs[id(config)] = config
        for name in getattr(config, "sub_configs", {}):
            if getattr(config, name, None) is not None:
                collect(getattr(config, name))

    for module in model.modules():
        if hasattr(getattr(module, "config", None), "sub_configs"):
            collect(module.config)
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def argument_names(module: nn.Module) -> list[str]:
    """The names of what a module's forward takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def change_inputs(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[str, Tensor], Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in which each tensor of hidden states is what `change` returns for it; None keeps it."""

    def changed(name: str, value: Any) -> Any:
        hidden = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
        if not hidden or any(word in name for word in ("mask", "bias", "position")):
            return value
        other = change(name, value)
        return value if other is None else other

    named = [*names, *(f"argument {index}" for index in range(len(names), len(args)))]
    return (
        tuple(changed(name, value) for name, value in zip(named, args, strict=False)),
        {name: changed(name, value) for name, value in kwargs.items()},
    )


def first_tensor(output: object) -> Tensor | None:
    """What a module gives, without weights and the like beside it."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _is_weights(item: object, length: int) -> bool:
    if not isinstance(item, Tensor) or not item.is_floating_point() or item.dim() != 4 or item.shape[2] != length:
        return False
    return bool((item >= 0).all()) and bool(((item.double().sum(-1) - 1).abs() < 0.1).all())


def _score_spread(output: object, length: int) -> float | None:
    """Standard deviation of the scores of an attention that returns its weights, None for others."""
    # Beside the weights some return a bias of the same shape; only weights sum to 1.
    found = [item for item in output[1:] if _is_weights(item, length)] if isinstance(output, tuple) else []
    if not found:
        return None
    logarithms = found[-1].double().log()
    allowed = logarithms.isfinite() & (logarithms > -60)
    count = allowed.sum(-1, keepdim=True)
    logarithms = logarithms.where(allowed, 0)
    deviations = (logarithms - logarithms.sum(-1, keepdim=True) / count.clamp_min(1)).where(allowed & (count > 1), 0)
    pairs = (allowed & (count > 1)).sum()
    return math.sqrt(float(deviations.square().sum() / pairs)) if pairs else None


class Reference:
    """What a model makes of two documents, one at a time, with its own eager attention.

    Build it before anything is attached, inside ``untouched``.

    Attributes:
        documents: the two documents.
        outputs: of each document, what the model returned.
        mixers: the modules in which tokens meet.
        seen: by mixer, document and call, what it read and gave.
        spreads: by mixer, the standard deviation of its scores in what was seen, where it returns its weights.
        own: by way of arrival of padded batches, what the model makes of them itself, or what it raises.
        cached: whether its calls return keys and values.
        device: where its parameters are.
    """

    def __init__(self, model: Any) -> None:
        self.device = next(model.parameters()).device
        self.documents: Documents = choose_documents(model, self.device)
        self.mixers: list[Mixer] = token_mixers(model)
        self.outputs: list[Any] = []
        self.seen: dict[str, list[list[Seen]]] = {mixer.name: [] for mixer in self.mixers}
        self.spreads: dict[str, float] = {}
        self.own: dict[str, Results | type[Exception]] = {}
        self._factors: dict[str, float] = {}
        with own_attention(model):
            for index in range(len(self.documents.target)):
                self.outputs.append(self._plain_call(model, index))
            for name, spread in self.spreads.items():
                # Scores grow with the square of what is read: queries and keys both do.
                self._factors[name] = min(max(spread**-0.5, 1 / _WIDEST_FACTOR), _WIDEST_FACTOR) if spread else 1.0
            self.spreads.clear()
            for index in range(len(self.documents.target)):
                self._watched_call(model, index)
            self.cached = getattr(self.outputs[0], "past_key_values", None) is not None
            for way in ways(model, self.documents, self.device, cached=self.cached):
                if way.name not in PACKED:
                    self.own[way.name] = self._own(model, way)

    def _own(self, model: Any, way: Way) -> Results | type[Exception]:
        try:
            return self.found(run(model, way), way.phases[-1].slots)[0]
        except Exception as error:
            return type(error)

    def _measure_spread(self, name: str, output: object, index: int) -> None:
        tensor = first_tensor(output)
        if tensor is not None and self.side_of(tensor, index) is not None:
            spread = _score_spread(output, tensor.shape[1])
            if spread is not None:
                self.spreads[name] = max(self.spreads.get(name, 0.0), spread)

    def _plain_call(self, model: Any, index: int) -> Any:
        with contextlib.ExitStack() as stack:
            for mixer in self.mixers:
                hook = functools.partial(self._after_plain, mixer.name, index)
                stack.callback(mixer.module.register_forward_hook(hook).remove)
            return model(**self.documents.alone(index))

    def _after_plain(self, name: str, index: int, _: nn.Module, __: Any, output: object) -> None:
        self._measure_spread(name, output, index)

    def _watched_call(self, model: Any, index: int) -> None:
        reading: dict[str, dict[str, tuple[Side, Tensor]]] = {}
        with contextlib.ExitStack() as stack:
            for mixer in self.mixers:
                self.seen[mixer.name].append([])
                before = functools.partial(
                    self._before_watched, mixer.name, index, reading, argument_names(mixer.module)
                )
                after = functools.partial(self._after_watched, mixer.name, index, reading)
                stack.callback(mixer.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(mixer.module.register_forward_hook(after).remove)
            model(**self.documents.alone(index))

    def _before_watched(
        self,
        mixer: str,
        index: int,
        reading: dict[str, dict[str, tuple[Side, Tensor]]],
        names: list[str],
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        reading[mixer] = {}

        def read(name: str, value: Tensor) -> Tensor | None:
            side = self.side_of(value, index)
            if side is None:
                return None
            reading[mixer][name] = (side, value * self._factors.get(mixer, 1.0))
            return reading[mixer][name][1]

        return change_inputs(names, args, kwargs, read)

    def _after_watched(
        self,
        mixer: str,
        index: int,
        reading: dict[str, dict[str, tuple[Side, Tensor]]],
        _: nn.Module,
        __: Any,
        output: object,
    ) -> None:
        self._measure_spread(mixer, output, index)
        tensor = first_tensor(output)
        if tensor is not None:
            self.seen[mixer][index].append(Seen(reading.pop(mixer), tensor.clone(), self.side_of(tensor, index)))

    @property
    def fields(self) -> dict[str, Side | None]:
        """The outputs that are compared, and whose tokens they tell of; None for one row a document."""
        found: dict[str, Side | None] = {}
        for name, tensor in self.outputs[0].items() if hasattr(self.outputs[0], "items") else ():
            if name in _NO_RESULTS or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            sides = {self.side_of(output[name], index) for index, output in enumerate(self.outputs)}
            if tensor.dim() >= 2 and len(sides) == 1:
                found[name] = sides.pop()
        return found

    def results(self, slots: dict[Side, Slots]) -> Results:
        """What the outputs say of each document, of those tokens that lie in `slots`."""
        results: Results = {}
        for name, side in self.fields.items():
            spots = slots[side].spots if side is not None else ()
            results[name] = [
                output[name] if side is None else output[name][0, spots[index].first :][: spots[index].length]
                for index, output in enumerate(self.outputs)
            ]
        return results

    def found(self, output: Any, slots: dict[Side, Slots]) -> tuple[Results, str]:
        """What an output has of each document, and what it lacks."""
        found: Results = {}
        for name, side in self.fields.items():
            tensor = output.get(name)
            if side is not None and isinstance(tensor, Tensor):
                spots = slots[side].spots
                if tuple(tensor.shape[:2]) == (slots[side].rows, slots[side].length):
                    found[name] = [tensor[row, column : column + length] for row, column, _, length in spots]
            elif isinstance(tensor, Tensor):
                count = len(self.outputs)
                if len(tensor) != count:
                    return found, f"{name} has {len(tensor)} row{'s' * (len(tensor) > 1)} for {count} documents"
                found[name] = list(tensor.split(1))
        return found, "" if found else f"its output has no {' or '.join(self.fields)} of the batch's shape"

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that the documents have."""
        return ("target", "source") if self.documents.source else ("target",)

    def side_of(self, tensor: Tensor, index: int) -> Side | None:
        """Which side's tokens lie along axis 1 of a tensor of one document; None if none do."""
        if tensor.dim() < 2 or tensor.shape[0] != 1:
            return None
        return next((side for side in self.sides if tensor.shape[1] == len(self.documents.side(side)[index])), None)


def run(model: Any, way: Way) -> Any:
    """The output of the last call of an arrival."""
    output: Any = None
    for phase in way.phases:
        output = model(**phase.inputs(output))
    return output
