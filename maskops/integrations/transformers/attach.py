"""``attach``: a model of transformers computes its attention with maskops until it is detached."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from maskops import backend as backends
from maskops.integrations.transformers import arrival, calls, heads, positions, refusals, unpadding
from maskops.integrations.transformers import loss as loss_of_models
from maskops.integrations.transformers import probe as probing
from maskops.integrations.transformers.attention import attention_function
from maskops.integrations.transformers.masking import mask_function
from maskops.integrations.transformers.report import AttachError, Report

__all__ = ["PARTS", "AttachError", "Attachment", "Installation", "Options", "Part", "Report", "attach"]

IMPLEMENTATION = "maskops"


class Installation(NamedTuple):
    """What the parts of ``attach`` work on, while it runs."""

    model: nn.Module
    models: tuple[PreTrainedModel, ...]
    """Every ``PreTrainedModel`` in it, outermost first, but vision and audio towers, which keep their attention."""
    steps: calls.Steps
    undo: contextlib.ExitStack
    """Callbacks that restore the model, run by ``detach`` in the reverse order, and where attach itself fails."""
    report: Report

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set an instance attribute of a module until ``detach``, which leaves one that was set meanwhile."""
        had, before = name in vars(module), vars(module).get(name)
        setattr(module, name, value)

        def restore() -> None:
            if vars(module).get(name) is not value:
                return
            if had:
                setattr(module, name, before)
            else:
                delattr(module, name)

        self.undo.callback(restore)


class Attachment:
    """Handle of an attached model; also a context manager that detaches it.

    Attributes:
        model: the model that was given to ``attach``.
        report: what was attached and what was proven of it; print it.
    """

    def __init__(self, model: nn.Module, report: Report, undo: contextlib.ExitStack) -> None:
        self.model = model
        self.report = report
        self._undo = undo

    def detach(self) -> None:
        """Restore the model exactly. Doing it twice is harmless."""
        self._undo.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = self.report.word if self.report.proven else "unproven"
        return f"Attachment of {type(self.model).__name__}: {len(self.report.layers)} layers, {state}"


Part = Callable[[Installation, "Options"], None]


class Options(NamedTuple):
    """The arguments of ``maskops.attach`` but the model."""

    loss: bool
    fuse_lm_head: bool
    unpad: bool
    probe: bool
    backend: str | None


PARTS: tuple[Part, ...] = (
    heads.install,
    unpadding.install,
    positions.install,
    loss_of_models.install,
)
"""What ``attach`` installs beyond attention, in this order; each adds steps, attributes and notes to the report."""


def attach(model: nn.Module, options: Options) -> Attachment:
    """``maskops.attach``, whose documentation says what the options are."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model is {model!r:.80}: expected a module, such as a PreTrainedModel of transformers")
    backend = options.backend
    if backend not in (None, backends.AUTO, *backends.BACKENDS):
        known = ", ".join(map(repr, (backends.AUTO, *backends.BACKENDS)))
        raise ValueError(f"attach: backend is {backend!r}: expected one of {known}, or None for the fastest")
    models = tuple(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if not models:
        raise AttachError(
            f"attach: {type(model).__name__} is no PreTrainedModel of transformers and holds none: call it inside "
            "maskops.replace_sdpa(), or use maskops.attention in its code"
        )
    for inner in models:
        if any(isinstance(hook, calls.Enter) for hook in inner._forward_pre_hooks.values()):
            raise AttachError(
                f"attach: {type(inner).__name__} is attached already: detach it first. A copy of an attached model is "
                "attached for good: copy the model before it is attached, or after detach()"
            )
    towers = refusals.towers(model)
    apart = {id(module) for tower in towers.values() for module in tower.modules()}
    served = tuple(inner for inner in models if id(inner) not in apart)
    refusals.refuse(model, served)
    name = register(backend)
    report = Report(type(models[0]).__name__, name)
    report.notes += [
        f"{name} ({type(tower).__name__}) keeps its own attention: its input is no text"
        for name, tower in towers.items()
    ]
    reference = probing.reference(model, models[0], report) if options.probe else None
    if not options.probe:
        report.unproven = "probe=False"
    with contextlib.ExitStack() as undo:
        installation = Installation(model, served, calls.Steps(backend), undo, report)
        _set_implementation(installation, name)
        for inner in served:
            for handle in calls.install(inner, installation.steps):
                undo.callback(handle.remove)
            installation.set_attribute(inner, "create_masks_for_generate", keep_mask)
        installation.steps.before += [arrival.check_arguments, arrival.separate_segments, arrival.ask_for_cross_mask]
        for part in PARTS:
            part(installation, options)
        ways: frozenset[str] = frozenset()
        if reference is not None:
            probing.prove(models[0], reference, report, installation.steps)
            ways = refusals.settle(report)
            if options.unpad and ways and unpadding.runs_packed(served):
                raise AttachError(
                    f"attach: unpad=True runs {report.model} on packed rows, which it does not take: "
                    f"{report.arrivals[min(ways)].reason}. Leave unpad out",
                    report,
                )
        installation.steps.before[2:2] = refusals.guards(models[0], report, ways)
        return Attachment(model, report, undo.pop_all())


def register(backend: str | None) -> str:
    """Make the functions known to transformers; the name of the implementation."""
    name = IMPLEMENTATION if backend is None else f"{IMPLEMENTATION}.{backend}"
    function = attention_function if backend is None else functools.partial(attention_function, backend=backend)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)
    return name


def keep_mask(
    *, attention_mask: Any = None, past_key_values: Any = None, inputs_embeds: torch.Tensor | None = None, **_: Any
) -> Any:
    """Stands for a model's ``create_masks_for_generate``, so that masks are made where the call is known.

    In steps of one token a 2-D mask, which grows with each, is filled up with padding to the length of a static cache:
    one shape, for which compiled code has one graph. Longer calls keep theirs, of which models read the last columns.
    """
    is_step = inputs_embeds is not None and inputs_embeds.shape[1] == 1
    if not is_step or attention_mask is None or attention_mask.dim() != 2 or past_key_values is None:
        return attention_mask
    missing = past_key_values.get_max_length() - attention_mask.shape[1]
    return torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask


def _configs(installation: Installation) -> Iterator[Any]:
    """Every configuration of the models, nested ones included but for those of towers, once.

    Also those of single layers: models that are put together from others may replace the configuration around them.
    """
    towers = refusals.towers(installation.model).values()
    seen = {id(vars(module).get("config")) for tower in towers for module in tower.modules()}
    layers = (vars(module).get("config") for module in installation.model.modules())
    waiting: list[Any] = [model.config for model in installation.models]
    waiting += [config for config in layers if isinstance(config, PreTrainedConfig)]
    while waiting:
        config = waiting.pop(0)
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting += [getattr(config, name, None) for name in config.sub_configs if not refusals.is_of_tower(name)]


_attached: dict[int, tuple[Any, str | None, int]] = {}
"""By id of a configuration: itself, its own implementation, and how many attached models share it."""


def _set_implementation(installation: Installation, name: str) -> None:
    for config in _configs(installation):
        _, own, count = _attached.get(id(config), (config, config._attn_implementation_internal, 0))
        if count and config._attn_implementation_internal != name:
            raise AttachError(
                "attach: another model with the same config object is attached with the implementation "
                f"{config._attn_implementation_internal!r}: give this one a copy of the config, or the same backend"
            )
        _attached[id(config)] = (config, own, count + 1)
        installation.undo.callback(_release, config)
        config._attn_implementation_internal = name


def _release(config: Any) -> None:
    _, own, count = _attached.pop(id(config))
    if count > 1:
        _attached[id(config)] = (config, own, count - 1)
    elif config._attn_implementation_internal.startswith(IMPLEMENTATION):  # not set to another meanwhile
        config._attn_implementation_internal = own
