"""Proof of an attached model: two documents through its own eager attention one at a time, then through maskops.

A probe has two halves. ``Reference`` runs before anything is attached: each document alone, with eager attention. It
keeps the outputs of the model and, of each module in which tokens meet, what it read and what it gave. ``prove`` runs
when maskops is attached: each way in which a batch can arrive, once as it is (the outputs of the model must agree) and
once with every such module reading what it read in the reference, so that an error shows in the module that makes it,
is not blurred by rounding before it, and does not spread.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maskops.integrations.transformers.calls import Steps, innermost
from maskops.integrations.transformers.mixers import Mixer
from maskops.integrations.transformers.probe_batches import PACKED, Side, Slots, Way, ways, windows
from maskops.integrations.transformers.probe_reference import (
    Reference,
    Results,
    Seen,
    argument_names,
    change_inputs,
    first_tensor,
    run,
    untouched,
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
# Eager attention and many norms go through float32, so that the reference of a float64 model is no better than that.
_TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_REDUCED_PRECISION = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}
# Rows whose vector is far shorter than those of the others are held against a share of the others' length.
_FLOOR = 0.1
_OUTPUT_FACTOR = 10.0  # outputs went through all layers; 30 of a trained model in float32 reach a tenth of it
_LARGEST_BOUND = 0.1  # beyond it no rounding is told from an error; 30 layers of a trained model in bfloat16 reach 0.02


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
    # Of the class: wrappers such as those of PEFT lend the attributes of the model inside them.
    outside = [m for m in model.modules() if hasattr(type(m), "main_input_name") and id(m) not in inside]
    if outside:
        return f"it holds several models ({type(root).__name__}, {type(outside[0]).__name__}); attach each by itself"
    names = inspect.signature(root.forward).parameters
    wanted = root.main_input_name
    if wanted != "input_ids" or "input_ids" not in names:
        return f"its input is {wanted}, and the probe can make up token ids only"
    return ""


def tolerance(tensor: Tensor) -> float:
    """What counts as rounding of a tensor, relative to the length of a token's vector."""
    dtype = tensor.dtype
    if dtype == torch.float32:
        with contextlib.suppress(RuntimeError):  # torch refuses to say where it was set in two ways
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
        bound = max(bound, min(_OUTPUT_FACTOR * tolerance(found[name][0]), _LARGEST_BOUND))
    for name in found:
        for rows, expected_rows in zip(found[name], expected.get(name, []), strict=False):
            errors = row_errors(rows, expected_rows)
            # Rounding in low precision may send a token to other experts, so that single rows differ at will.
            error = float(errors.max() if bound < 1e-2 else errors.median())
            if error > worst:
                worst, reason = error, f"{name} differs by {error:.2g} of its size"
    return worst, reason if worst > bound else "", bound


def _is_inside(layer: LayerProof, names: list[str]) -> bool:
    """Whether a layer lies in one of the modules of these names; "" is the whole model."""
    return any(not name or layer.name.startswith(f"{name}.") for name in names)


class _Calls:
    """Who calls the functions that are registered with transformers under a name."""

    def __init__(self) -> None:
        self.modules: set[int] = set()
        self.masks: set[int] = set()

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
            call = innermost()
            self.masks.update(() if call is None else [id(call.module)])
            return mask(*args, **kwargs)

        AttentionInterface.register(name, noting_attention)
        AttentionMaskInterface.register(name, noting_mask)
        try:
            yield
        finally:
            AttentionInterface.register(name, attention)
            AttentionMaskInterface.register(name, mask)


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
            output = run(self.model, way)
        except Exception as error:
            return self._raised(way, error)
        found, missing = self.reference.found(output, slots)
        worst, reason, bound = _compare(found, self.reference.results(slots))
        if missing:
            worst, reason = math.inf, missing
        asked = self._watched(way)
        wrong = [layer for layer in self.layers.values() if layer.wrong(way.name)]
        if worst <= bound and not wrong:
            return ArrivalProof(RIGHT, worst)
        if way.name not in PACKED and self._is_own(way, found, all(layer.recurrent for layer in wrong)):
            return ArrivalProof(OWN_LIMIT, worst, f"{reason or 'a layer differs'}, as with its own attention")
        if way.name in PACKED and (not asked or (wrong and not any(_is_inside(layer, asked) for layer in wrong))):
            kinds = ", ".join(sorted({layer.kind for layer in wrong}))
            whose = (
                f"its code makes the masks of its {kinds} by itself"
                if asked
                else "its code makes attention masks of its own"
            )
            return ArrivalProof(REFUSED, worst, f"{whose}, which know no documents")
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

    def _watched(self, way: Way) -> list[str]:
        """Each mixer reads what it read in the reference, laid out as this arrival has it, and is compared.

        Returns the names of the models inside this one that asked for masks.
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
        return [name for name, module in self.model.named_modules() if id(module) in calls.masks]

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
        self.names = argument_names(mixer.module)
        self.seen = reference.seen[mixer.name]
        self.spread = max(1.0, reference.spreads.get(mixer.name, 1.0))
        self.slots = slots
        self.layer = layer
        self.way = way
        self.callers = callers
        self.call = 0

    def _expected(self) -> list[Seen]:
        """What the reference saw of this call, a document each; empty if it saw no such call."""
        if any(self.call >= len(calls) for calls in self.seen):
            return []
        return [calls[self.call] for calls in self.seen]

    def before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: what was read in the reference, in the slots of the documents."""
        return change_inputs(self.names, args, kwargs, self._laid)

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
        expected, tensor = self._expected(), first_tensor(output)
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
    report.unreached = [window for window in windows(model) if window >= max(lengths)]
    report.notes += [
        f"a window of {window} tokens was not reached: the documents of the probe have up to {max(lengths)}"
        for window in report.unreached
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
