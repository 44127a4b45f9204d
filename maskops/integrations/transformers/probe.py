"""Proof of an attached model: two documents through its own eager attention one at a time, then through maskops.

A probe has two halves. ``Reference`` runs before anything is attached: each document alone, with eager attention. It
keeps the outputs of the model and, of each module in which tokens meet, what it read and what it gave. ``prove`` runs
when maskops is attached: each way in which a batch can arrive, once as it is (the outputs of the model must agree) and
once with every such module reading what it read in the reference, so that an error shows in the module that makes it,
is not blurred by rounding before it, and does not spread.

Attention that is nearly uniform hides what is wrong with it: a dropped softcap changes nothing where scores are near 0,
as they are in a model that has just been initialised. Scores that are far apart hide as much, and eager attention in
bfloat16 rounds them badly. In the second kind of run a module therefore reads its input multiplied by a factor, in the
reference as well, that brings the spread of its scores to about 1.
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

from maskops.integrations.transformers.calls import Steps
from maskops.integrations.transformers.mixers import Mixer, token_mixers
from maskops.integrations.transformers.probe_batches import (
    PACKED,
    Documents,
    Side,
    Slots,
    Way,
    choose_documents,
    ways,
    windows,
)
from maskops.integrations.transformers.report import (
    NOT_TAKEN,
    OWN_LIMIT,
    REFUSED,
    RIGHT,
    WRONG,
    ArrivalProof,
    LayerProof,
    Report,
)

# Errors of a token's vector relative to its length that count as rounding: a few products of the model's own in a row,
# summed in another order. What a dropped window, sink, cap or mask changes is of the order of 1, a tenth at the least.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_REDUCED_PRECISION = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}
# Rows whose vector is far shorter than those of the others are held against a share of the others' length.
_FLOOR = 0.1
_OUTPUT_FACTOR = 4.0  # outputs went through all layers
_WIDEST_FACTOR = 64.0  # also as a divisor
# Of encoder-decoders and heads: what is not compared, being no result of the model.
_NO_RESULTS = ("loss", "past_key_values", "hidden_states", "attentions")


Results = dict[str, list[Tensor]]
"""Of each output, by name, what it says of each document: its tokens (length, ...), or one row (1, ...)."""


class _Seen(NamedTuple):
    """One call of a module with one document: what it read, by argument, what it gave, and the side of its tokens."""

    inputs: dict[str, tuple[Side, Tensor]]
    output: Tensor
    side: Side | None


def unprovable(model: nn.Module, root: Any) -> str:
    """Why a probe cannot run on a model, of which it would call `root`; or the empty text."""
    if any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    ):
        return "it is compiled, and a probe would compile graphs of its own shapes; attach before compiling"
    for module in model.modules():
        bases = {base.__name__ for base in type(module).__mro__}
        if bases & {"FullyShardedDataParallel", "FSDPModule"}:
            return "it is sharded (FSDP): its forward needs all ranks at once; attach before sharding"
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "it is sharded (DeepSpeed ZeRO-3): its forward needs all ranks at once"
    if any(
        type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor" for parameter in parameters
    ):
        return "its parameters are distributed tensors: its forward needs all ranks at once"
    places = getattr(root, "hf_device_map", None) or {}
    if any(str(place) in ("cpu", "disk") for place in places.values()) and len(set(map(str, places.values()))) > 1:
        return "parts of it are offloaded (device_map), and running it would move them"
    if any(parameter.is_meta for parameter in parameters):
        return "its parameters have no values (meta device); attach again once they are loaded"
    if not parameters:
        return "it has no parameters"
    inside = {id(module) for module in root.modules()}
    outside = [m for m in model.modules() if hasattr(m, "main_input_name") and id(m) not in inside]
    if outside:
        return f"it holds several models ({type(root).__name__}, {type(outside[0]).__name__}); attach each by itself"
    names = inspect.signature(root.forward).parameters
    wanted = root.main_input_name
    if wanted != "input_ids" or "input_ids" not in names:
        return f"its input is {wanted}, and the probe can make up token ids only"
    return ""


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


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _change_inputs(
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


def _first_tensor(output: object) -> Tensor | None:
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
        self.seen: dict[str, list[list[_Seen]]] = {mixer.name: [] for mixer in self.mixers}
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
            return self.found(_run(model, way), way.phases[-1].slots)[0]
        except Exception as error:
            return type(error)

    def _measure_spread(self, name: str, output: object, index: int) -> None:
        tensor = _first_tensor(output)
        if tensor is not None and self._side(tensor, index) is not None:
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
                before = functools.partial(self._before_watched, mixer.name, index, reading, _arguments(mixer.module))
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
            side = self._side(value, index)
            if side is None:
                return None
            reading[mixer][name] = (side, value * self._factors.get(mixer, 1.0))
            return reading[mixer][name][1]

        return _change_inputs(names, args, kwargs, read)

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
        tensor = _first_tensor(output)
        if tensor is not None:
            self.seen[mixer][index].append(_Seen(reading.pop(mixer), tensor.clone(), self._side(tensor, index)))

    @property
    def fields(self) -> dict[str, Side | None]:
        """The outputs that are compared, and whose tokens they tell of; None for one row a document."""
        found: dict[str, Side | None] = {}
        for name, tensor in self.outputs[0].items() if hasattr(self.outputs[0], "items") else ():
            if name in _NO_RESULTS or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            sides = {self._side(output[name], index) for index, output in enumerate(self.outputs)}
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

    def _side(self, tensor: Tensor, index: int) -> Side | None:
        """Which side's tokens lie along axis 1 of a tensor of one document; None if none do."""
        if tensor.dim() < 2 or tensor.shape[0] != 1:
            return None
        return next((side for side in self.sides if tensor.shape[1] == len(self.documents.side(side)[index])), None)


def tolerance(tensor: Tensor) -> float:
    """What counts as rounding of a tensor, relative to the length of a token's vector."""
    dtype = tensor.dtype
    if dtype == torch.float32 and tensor.device.type == "cuda":
        dtype = _REDUCED_PRECISION[torch.get_float32_matmul_precision()]
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16])


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Length of the difference of each row, relative to that of the expected row; infinite where it is NaN."""
    expected = expected.reshape(len(expected), -1).double()
    difference = found.reshape(len(found), -1).double() - expected
    lengths = expected.norm(dim=1)
    floor = _FLOOR * lengths.square().mean().sqrt()
    errors = difference.norm(dim=1) / lengths.clamp_min(floor).clamp_min(1e-30)
    finite: Tensor = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    return finite


def _compare(found: Results, expected: Results) -> tuple[float, str, float]:
    """The largest error of results, which one it is and how large, and what counts as rounding."""
    worst, reason, bound = 0.0, "", 0.0
    for name in found.keys() & expected.keys():
        bound = max(bound, _OUTPUT_FACTOR * tolerance(found[name][0]))
    for name in found:
        for rows, expected_rows in zip(found[name], expected.get(name, []), strict=False):
            errors = row_errors(rows, expected_rows)
            # Rounding in low precision may send a token to other experts, so that single rows differ at will.
            error = float(errors.max() if bound < 1e-3 else errors.median())
            if error > worst:
                worst, reason = error, f"{name} differs by {error:.2g} of its size"
    return worst, reason if worst > bound else "", bound


class _Calls:
    """Who calls the functions that are registered with transformers under a name."""

    def __init__(self) -> None:
        self.modules: set[int] = set()
        self.masks = 0

    @contextlib.contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Notes calls while the body runs; other models and threads that call meanwhile are let through."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention, mask = ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]

        def noting_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.modules.add(id(module))
            return attention(module, *args, **kwargs)

        def noting_mask(*args: Any, **kwargs: Any) -> Any:
            self.masks += 1
            return mask(*args, **kwargs)

        AttentionInterface.register(name, noting_attention)
        AttentionMaskInterface.register(name, noting_mask)
        try:
            yield
        finally:
            AttentionInterface.register(name, attention)
            AttentionMaskInterface.register(name, mask)


def _run(model: Any, way: Way) -> Any:
    """The output of the last call of an arrival."""
    output: Any = None
    for phase in way.phases:
        output = model(**phase.inputs(output))
    return output


class _Prover:
    """Runs the ways of arrival on an attached model and collects what they show."""

    def __init__(self, model: Any, reference: Reference, name: str) -> None:
        self.model = model
        self.reference = reference
        self.name = name
        self.layers = {
            mixer.name: LayerProof(mixer.name, type(mixer.module).__name__, recurrent=mixer.recurrent)
            for mixer in reference.mixers
        }

    def run(self, way: Way) -> ArrivalProof:
        """One way of arrival: the outputs as they are, then each module on what it read in the reference."""
        slots = way.phases[-1].slots
        try:
            output = _run(self.model, way)
        except Exception as error:
            return self._raised(way, error)
        found, missing = self.reference.found(output, slots)
        worst, reason, bound = _compare(found, self.reference.results(slots))
        if missing:
            worst, reason = math.inf, missing
        made_masks = self._watched(way)
        wrong = [layer for layer in self.layers.values() if layer.wrong(way.name)]
        if worst <= bound and not wrong:
            return ArrivalProof(RIGHT, worst)
        if way.name not in PACKED and self._is_own(way, found, all(layer.recurrent for layer in wrong)):
            return ArrivalProof(OWN_LIMIT, worst, f"{reason or 'a layer differs'}, as with its own attention")
        if way.name in PACKED and not made_masks:
            return ArrivalProof(REFUSED, worst, "its code makes attention masks of its own, which know no documents")
        return ArrivalProof(WRONG, worst, reason or "layers differ, if not the outputs")

    def _is_own(self, way: Way, found: Results, elsewhere: bool) -> bool:
        """Whether the model's own attention is wrong too: in the same way, unless what is wrong lies `elsewhere`."""
        own = self.reference.own.get(way.name)
        if not isinstance(own, dict):
            return False
        difference, _, bound = _compare(found, own)
        error, _, own_bound = _compare(own, self.reference.results(way.phases[-1].slots))
        return error > own_bound and (elsewhere or difference <= bound)

    def _raised(self, way: Way, error: Exception) -> ArrivalProof:
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        if way.name in PACKED:
            return ArrivalProof(REFUSED, None, reason)
        if self.reference.own.get(way.name) is type(error):
            return ArrivalProof(NOT_TAKEN, None, f"also with its own attention: {reason}")
        return ArrivalProof(WRONG, None, reason)

    def _watched(self, way: Way) -> bool:
        """Each mixer reads what it read in the reference, laid out as this arrival has it, and is compared.

        Returns whether masks were asked for.
        """
        output, calls = None, _Calls()
        for phase in way.phases:
            with contextlib.ExitStack() as stack:
                stack.enter_context(calls.noted(self.name))
                for mixer in self.reference.mixers:
                    layer = self.layers[mixer.name]
                    watcher = _Watcher(mixer, self.reference, phase.slots, layer, way.name, calls.modules)
                    stack.callback(mixer.module.register_forward_pre_hook(watcher.before, with_kwargs=True).remove)
                    stack.callback(mixer.module.register_forward_hook(watcher.after).remove)
                output = self.model(**phase.inputs(output))
            self._add_strangers(calls.modules)
        return calls.masks > 0

    def _add_strangers(self, callers: set[int]) -> None:
        """Modules that called maskops although nothing about them says that they are attention: not compared."""
        for name, module in self.model.named_modules() if callers else ():
            if id(module) in callers:
                layer = self.layers.setdefault(name, LayerProof(name, type(module).__name__))
                layer.ran, layer.called = layer.ran + 1, layer.called + 1
        callers.clear()


class _Watcher:
    """Of one mixer in one call of the model: hands it the reference's inputs, and compares what it gives."""

    def __init__(
        self,
        mixer: Mixer,
        reference: Reference,
        slots: dict[Side, Slots],
        layer: LayerProof,
        way: str,
        callers: set[int],
    ) -> None:
        self.names = _arguments(mixer.module)
        self.seen = reference.seen[mixer.name]
        self.spread = max(1.0, reference.spreads.get(mixer.name, 1.0))
        self.slots = slots
        self.layer = layer
        self.way = way
        self.callers = callers
        self.call = 0

    def _expected(self) -> list[_Seen]:
        """What the reference saw of this call, a document each; empty if it saw no such call."""
        if any(self.call >= len(calls) for calls in self.seen):
            return []
        return [calls[self.call] for calls in self.seen]

    def before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: what was read in the reference, in the slots of the documents."""
        return _change_inputs(self.names, args, kwargs, self._laid)

    def _laid(self, name: str, value: Tensor) -> Tensor | None:
        expected = self._expected()
        if not expected or any(name not in one.inputs for one in expected):
            return None
        slots = self.slots.get(expected[0].inputs[name][0])
        if slots is None or tuple(value.shape[:2]) != (slots.rows, slots.length):
            return None
        laid = value.clone()
        for (row, column, first, length), one in zip(slots.spots, expected, strict=True):
            laid[row, column : column + length] = one.inputs[name][1][0, first : first + length]
        return laid

    def after(self, module: nn.Module, _: Any, output: object) -> None:
        """Forward hook: compares the output with the reference's."""
        self.layer.ran += 1
        self.layer.called += id(module) in self.callers
        self.callers.discard(id(module))
        expected, tensor = self._expected(), _first_tensor(output)
        self.call += 1
        if not expected or tensor is None or expected[0].side is None:
            return
        slots = self.slots[expected[0].side]
        if tuple(tensor.shape[:2]) != (slots.rows, slots.length):
            return
        self.layer.tolerance = max(self.layer.tolerance, tolerance(tensor) * self.spread)
        for (row, column, first, length), one in zip(slots.spots, expected, strict=True):
            errors = row_errors(tensor[row, column : column + length], one.output[0, first : first + length])
            self.layer.errors[self.way] = max(self.layer.errors.get(self.way, 0.0), float(errors.max()))


def reference(model: nn.Module, root: Any, report: Report) -> Reference | None:
    """Runs the first half of a probe, before anything is attached.

    Args:
        model: what is attached.
        root: the ``PreTrainedModel`` that the probe calls: the model itself, or the one that it wraps.
        report: says ``unproven`` afterwards, and why, where the probe cannot run.

    Returns:
        The reference, or None where the probe cannot run.
    """
    report.unproven = unprovable(model, root)
    if report.unproven:
        return None
    try:
        with untouched(model):
            return Reference(root)
    except Exception as error:
        report.unproven = f"it does not run on token ids alone ({type(error).__name__}: {error})".split("\n", 1)[0]
        return None


def prove(model: Any, reference: Reference, report: Report, steps: Steps) -> None:
    """Runs an attached model on the documents of a reference, and reports what it does with them, layer by layer.

    Args:
        model: the ``PreTrainedModel`` that the reference is of, attached.
        reference: of the same model before it was attached.
        report: is completed; its ``failures()`` say what is wrong.
        steps: of the attachment. Where the model's code computes with masks, and so fails on spans, they say afterwards
            that it gets dense masks.
    """
    lengths = tuple(map(len, reference.documents.target))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    report.dtype, report.device, report.lengths = str(dtype).removeprefix("torch."), str(reference.device), lengths
    arrivals, layers = _all_ways(model, reference, report.implementation)
    if raised := _raised_by(arrivals):
        steps.dense_masks = True
        again = _all_ways(model, reference, report.implementation)
        if len(_raised_by(again[0])) < len(raised):
            arrivals, layers = again
            report.notes.append(
                "its code computes with attention masks: it gets dense ones, which each layer reads anew"
            )
        else:
            steps.dense_masks = False
    report.arrivals, report.layers = arrivals, layers
    report.tolerance = max((layer.tolerance for layer in layers), default=0.0)
    report.notes += [
        f"a window of {window} tokens was not reached: the documents of the probe have up to {max(lengths)}"
        for window in windows(model)
        if window >= max(lengths)
    ]


def _all_ways(model: Any, reference: Reference, name: str) -> tuple[dict[str, ArrivalProof], list[LayerProof]]:
    prover, arrivals = _Prover(model, reference, name), dict[str, ArrivalProof]()
    with untouched(model):
        for way in ways(model, reference.documents, reference.device, cached=reference.cached):
            missing = ArrivalProof(NOT_TAKEN, None, way.missing)
            arrivals[way.name] = missing if way.missing else prover.run(way)
    return arrivals, list(prover.layers.values())


def _raised_by(arrivals: dict[str, ArrivalProof]) -> list[str]:
    """The ways in which an attached model raised."""
    return [way for way, proof in arrivals.items() if proof.error is None and proof.verdict in (WRONG, REFUSED)]
