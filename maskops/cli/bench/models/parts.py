"""Where the time of a pass goes: matrix products, attention, loss, and everything else."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from maskops.cli.bench.measure import Shares
from maskops.cli.bench.timing import once

_PREFIX = "maskops.bench: "
_ATTENTION, _LOSS = f"{_PREFIX}attention", f"{_PREFIX}loss"
_ENGINE = "autograd::engine"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn::_linear")
_OWN = {"maskops::attention": "attention", "maskops::build_plan": "attention", "cross_entropy": "loss"}
"""Operators whose name says it: they are inside an `autograd.Function`, whose backward no range of ours surrounds."""


def split(name: str, model: Any, run: Callable[[], object], device: torch.device, *, with_loss: bool) -> Shares:
    """Runs something once under torch's profiler.

    What the attention function, the mask function and the loss function of the model do is theirs, and so is the
    backward of every operator that they called; matrix products of the loss (a fused output layer) count as products.

    Args:
        name: Of the row.
        model: Of transformers, whose functions are looked at.
        run: One pass; run once before, unprofiled.
        device: Where it runs.
        with_loss: Whether the pass computes a loss.
    """
    run()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with _named(model, with_loss), profile(activities=activities, acc_events=True) as profiler:
        total = once(run, device)
    events = [event for event in profiler.events() or () if event.device_type.name == "CPU"]
    sums = {"gemm": 0.0, "attention": 0.0, "loss": 0.0}
    for event, kind in zip(events, kinds(events), strict=True):
        if kind is not None:
            sums[kind] += (event.self_device_time_total if on_device else event.self_cpu_time_total) * 1e-6
    gemm, attention, loss = (value / total for value in sums.values())
    return Shares(name, gemm, attention, loss, rest=1.0 - gemm - attention - loss)


def kinds(events: Sequence[FunctionEvent]) -> list[str | None]:
    """The part that each operator belongs to, None for everything else."""
    forward: dict[int, str | None] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        # Several operators may see a number before one of them, the last, makes the node that carries it.
        if event.sequence_nr >= 0 and not any(caller.name.startswith(_ENGINE) for caller in _callers(event)):
            kind = _kind(event, {})
            forward[event.sequence_nr] = None if kind == "gemm" else kind
    return [_kind(event, forward) for event in events]


def _callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The operator itself, the one that called it, and so on."""
    caller: FunctionEvent | None = event
    while caller is not None:
        yield caller
        caller = caller.cpu_parent


def _kind(event: FunctionEvent, forward: dict[int, str | None]) -> str | None:
    """By the operator and those that called it; in backward also by the operator that it is the gradient of."""
    product = False
    for caller in _callers(event):
        name = caller.name
        product = product or any(name.startswith(one) for one in _PRODUCTS)
        found = "attention" if name == _ATTENTION else "loss" if name == _LOSS else None
        found = found or next((kind for part, kind in _OWN.items() if part in name), None)
        if found is None and name.startswith(_ENGINE):
            found = forward.get(caller.sequence_nr)
        if found is not None:
            return "gemm" if product and found == "loss" else found
    return "gemm" if product else None


@contextmanager
def _named(model: Any, with_loss: bool) -> Iterator[None]:
    """Surrounds the functions that transformers calls for this model with names for the profiler."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    key = model.config._attn_implementation
    with ExitStack() as stack:
        for interface, functions in (
            (AttentionInterface, ALL_ATTENTION_FUNCTIONS),
            (AttentionMaskInterface, ALL_MASK_ATTENTION_FUNCTIONS),
        ):
            original = functions[key]
            interface.register(key, _ranged(_ATTENTION, original))
            stack.callback(interface.register, key, original)
        if with_loss:
            loss = model.loss_function
            model.loss_function = _ranged(_LOSS, loss)
            stack.callback(setattr, model, "loss_function", loss)
        yield


def _ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return function(*arguments, **keywords)

    return ranged
