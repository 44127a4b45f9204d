"""Where in a model a leak enters: each layer is watched on its own.

Two runs with hooks: the batch, and the batch with one document changed. In the second each layer is given what it was
given in the first at the places of the document that should not notice. A layer whose output there is another then
lets the leak in itself, whatever those before it do; so do the parts of a layer that are a list themselves. Inside it
the innermost module whose inputs are the same there and whose output is not is the one to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskops.testing.leak.documents import Stream

_WATCHED = 128  # places at which all modules are compared; the inputs of layers are restored at all


@dataclass(frozen=True)
class LayerLeak:
    """One layer.

    Attributes:
        name: its name in the model, such as ``model.layers.3``; of what lies outside of layers, that of the module.
        change: largest change of its output, in units of its largest output, where its input there was the same.
        leaks: whether that is more than rounding.
        culprits: the innermost modules where it enters, such as ``model.layers.3.self_attn``.
    """

    name: str
    change: float
    leaks: bool
    culprits: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name."""
        return {"name": self.name, "change": self.change, "leaks": self.leaks, "culprits": list(self.culprits)}


class Alignment:
    """Finds which tensors have a row for each token of which stream."""

    def __init__(self, streams: tuple[Stream, ...], places: tuple[Tensor, ...]) -> None:
        self._streams = streams
        self._places = places

    def index(self, value: Any, module: str) -> tuple[Tensor, ...] | None:
        """What picks the rows of the places from a tensor that has a row for each token, None for any other."""
        if not isinstance(value, Tensor) or value.is_nested or not value.is_floating_point() or value.dim() < 2:
            return None
        fitting: list[tuple[Tensor, ...]] = []
        for stream, places in zip(self._streams, self._places, strict=True):
            batch, length = stream.documents.shape
            row, column = places // length, places % length
            if value.dim() >= 3 and tuple(value.shape[:2]) == (batch, length):
                fitting.append((row, column))
            elif value.shape[0] == batch * length:
                fitting.append((places,))
            elif value.dim() >= 3 and tuple(value.shape[:2]) == (length, batch):
                fitting.append((column, row))
        if not fitting:
            return None
        # Of streams with one shape, what a module's name says decides.
        found = fitting[0] if "encoder" in module.split(".") else fitting[-1]
        return tuple(part.to(value.device) for part in found)

    def rows(self, value: Any, module: str) -> Tensor | None:
        """A copy of the rows at the places, (n, ...), or None for what has no rows of tokens."""
        index = self.index(value, module)
        return None if index is None else value.detach()[index]

    def replaced(self, value: Tensor, rows: Tensor, module: str) -> Tensor:
        """A copy of a tensor with these rows at the places."""
        index = self.index(value, module)
        return value if index is None else value.detach().clone().index_put(index, rows)


@dataclass
class _Event:
    """One call of a module."""

    name: str
    call: int
    parent: _Event | None
    same_inputs: bool = True
    change: float = 0.0
    leaks: bool = False
    children: list[_Event] = field(default_factory=list)

    @property
    def enters(self) -> bool:
        return self.same_inputs and self.leaks

    def innermost(self) -> Iterator[str]:
        """The names of the innermost calls below, or this one's, where the leak enters."""
        below = [name for child in self.children for name in child.innermost()]
        yield from below or ([self.name] if self.enters else [])

    def largest(self) -> float:
        """The largest change of an output where the leak enters, here or below."""
        return max([self.change if self.enters else 0.0, *(child.largest() for child in self.children)])


class _Watch:
    """Hooks on every module but the model itself."""

    def __init__(self, model: nn.Module, watched: Alignment, whole: Alignment) -> None:
        self.events: list[_Event] = []
        self._watched = watched
        self._whole = whole
        self._members = _members(model)
        self._layers = {name for name in self._members if not any(_is_inside(name, other) for other in self._members)}
        self._modules = [(name, module) for name, module in model.named_modules() if name]
        self._stack: list[_Event] = []
        self._calls: dict[str, int] = {}
        self._inputs: dict[tuple[str, int], list[Tensor]] = {}
        self._outputs: dict[tuple[str, int], list[Tensor]] = {}
        self._restored: dict[tuple[str, int, int | str], Tensor] = {}
        self._is_second = False

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> None:
        """Both runs; the hooks are gone afterwards."""
        handles = []
        try:
            for name, module in self._modules:
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(), with_kwargs=True))
            first()
            self._is_second, self._stack, self._calls, self.events = True, [], {}, []
            second()
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._calls[name] = self._calls.get(name, 0) + 1
            parent = self._stack[-1] if self._stack else None
            changed = None
            if name in self._members:
                changed = self._keep_or_restore((name, call), args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            given = [value for value in _tensors((args, kwargs)) if value.is_floating_point()]
            inputs = [row for value in given if (row := self._watched.rows(value, name)) is not None]
            event = _Event(name, call, parent)
            if self._is_second:
                before = self._inputs.get((name, call))
                # Of a module with other arguments alone, such as (batch, channels, length), nothing can be said.
                is_known = before is not None and (bool(inputs) or not given)
                event.same_inputs = is_known and not any(_changes(before or [], inputs))
            else:
                self._inputs[name, call] = inputs
            (self.events if parent is None else parent.children).append(event)
            self._stack.append(event)
            return changed

        return hook

    def _after(self) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            event = self._stack.pop()
            key = (event.name, event.call)
            outputs = [row for value in _tensors(output) if (row := self._watched.rows(value, event.name)) is not None]
            if not self._is_second:
                self._outputs[key] = outputs
                return
            for change, leaks in _compared(self._outputs.get(key, []), outputs):
                event.change, event.leaks = max(event.change, change), event.leaks or leaks

        return hook

    def _keep_or_restore(self, key: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps what a layer is given for each token in the first run, and returns its arguments with it in the second.

        Beside hidden states that is what an encoder hands to the layers of its decoder.
        """
        entries: dict[int | str, Any] = dict(enumerate(args))
        entries.update(kwargs)
        for place, value in entries.items():
            if not self._is_second:
                kept = self._whole.rows(value, key[0])
                if kept is not None:
                    self._restored[(*key, place)] = kept
            elif (*key, place) in self._restored:
                entries[place] = self._whole.replaced(value, self._restored[(*key, place)], key[0])
        if not self._is_second:
            return None
        return tuple(entries[number] for number in range(len(args))), {name: entries[name] for name in kwargs}

    def report(self) -> tuple[LayerLeak, ...]:
        """The layers in the order in which they ran, and what leaks outside of them."""
        return tuple(self._reported(self.events))

    def _reported(self, events: list[_Event]) -> Iterator[LayerLeak]:
        for event in events:
            if event.name in self._layers:
                culprits = tuple(dict.fromkeys(event.innermost()))
                yield LayerLeak(event.name, event.largest() if culprits else 0.0, bool(culprits), culprits)
                continue
            below = list(self._reported(event.children))
            yield from below
            if event.enters and not any(layer.leaks for layer in below):
                yield LayerLeak(event.name, event.change, True, (event.name,))


def find_layers(
    model: nn.Module,
    streams: tuple[Stream, ...],
    victim: int,
    first: Callable[[], Any],
    second: Callable[[], Any],
) -> tuple[LayerLeak, ...]:
    """Which layers let the change of the second run reach the places of a document.

    Args:
        model: its modules are given hooks for the time of the two runs.
        streams: of the batch.
        victim: the document whose places are compared.
        first: runs the model on the batch.
        second: runs it on the batch that was changed elsewhere.
    """
    places = tuple(stream.places(victim) for stream in streams)
    watched = tuple(some[torch.linspace(0, max(len(some) - 1, 0), min(len(some), _WATCHED)).long()] for some in places)
    watch = _Watch(model, Alignment(streams, watched), Alignment(streams, places))
    watch.run(first, second)
    return watch.report()


def _members(model: nn.Module) -> set[str]:
    """Names of the members of lists of modules."""
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child, _ in module.named_children()
    }


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _changes(before: list[Tensor], after: list[Tensor]) -> Iterator[bool]:
    if len(before) != len(after):
        yield True
    for _, changed in _compared(before, after):
        yield changed


def _compared(before: list[Tensor], after: list[Tensor]) -> Iterator[tuple[float, bool]]:
    """For each pair the largest change in units of the largest value, and whether it is more than rounding."""
    for ours, theirs in zip(before, after, strict=False):
        if ours.shape != theirs.shape:
            yield float("inf"), True
            continue
        if ours.numel() == 0:
            continue
        scale = float(ours.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        moved = torch.where(same, 0.0, (ours.float() - theirs.float()).abs().nan_to_num(nan=torch.inf))
        change = float(moved.max())
        yield change / scale if scale else change, change > 2 * torch.finfo(ours.dtype).eps * scale
