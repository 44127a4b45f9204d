"""Running calls of attached models: which arguments the forward that is running was given, and by whom.

transformers makes its masks deep inside a forward, from a fraction of what the caller said. A pre-hook on every
``PreTrainedModel`` of an attached model therefore puts its call on a stack of the thread, a post-hook takes it off
again; the mask function and everything else that has to know how a batch arrived reads the innermost call.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_MAIN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Call:
    """One running forward of a ``PreTrainedModel``.

    Attributes:
        module: the model that runs.
        arguments: its arguments by name, those of ``**kwargs`` included. Change them with ``set`` and ``remove``.
        parent: the call of the attached model around it, or None.
        accepts: names of the parameters of its forward; ``**kwargs`` takes others, and most models hand them on.
        notes: what steps and the mask function keep for the time of the call, by name.
        segments: by the name of a mask, the numbers of documents that the caller gave in its place.
        frame: the Python frame that runs the forward, while it does; None for one that is compiled.
    """

    __slots__ = ("accepts", "arguments", "changed", "frame", "module", "notes", "parent", "segments", "steps")

    def __init__(
        self,
        module: nn.Module,
        arguments: dict[str, Any],
        parent: Call | None,
        steps: Steps,
        accepts: frozenset[str],
    ) -> None:
        self.module = module
        self.accepts = accepts
        self.arguments = arguments
        self.parent = parent
        self.steps = steps
        self.notes: dict[str, Any] = {}
        self.segments: dict[str, Tensor] = {}
        self.changed = False
        self.frame: FrameType | None = None

    def set(self, name: str, value: object) -> None:
        """Hand another value of an argument to the forward."""
        self.arguments[name] = value
        self.segments.pop(name, None)
        self.changed = True

    def remove(self, name: str) -> None:
        """Keep an argument from the forward."""
        if name in self.arguments:
            del self.arguments[name]
            self.changed = True

    def tensor(self, name: str) -> Tensor | None:
        """The argument if it is a tensor, else None."""
        value = self.arguments.get(name)
        return value if isinstance(value, Tensor) else None

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Batch and length of the ids or embeddings that the forward was given; None where it was given none."""
        for name in ("input_ids", "inputs_embeds"):
            value = self.tensor(name)
            if value is not None and value.dim() >= 2:
                return value.shape[0], value.shape[1]
        return None


class Steps:
    """What an attachment does around each call; the same object for all models inside the attached one."""

    def __init__(self, backend: str | None = None) -> None:
        self.before: list[Callable[[Call], None]] = []
        """Run in order when a call begins, with the call on the stack; may change its arguments, may raise."""
        self.after: list[Callable[[Call, Any], Any]] = []
        """Run in order when a forward has returned; what a step returns replaces the output, None keeps it."""
        self.dense_masks = False
        """Whether models are handed masks as bool (batch, 1, q_len, k_len): their code computes with them."""
        self.backend = backend
        """The backend of the attention, None for the fastest."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Models that were pickled while attached may be the first of their process that need the attention."""
        from maskops.integrations.transformers.attach import register

        vars(self).update(state)
        register(self.backend)


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []


_running = _Running()


def innermost() -> Call | None:
    """The call that is running in this thread and not yet left, None outside of attached models."""
    calls = _running.calls
    if not torch.compiler.is_compiling():
        while calls and not _is_running(calls[-1].frame):
            calls.pop()
    return calls[-1] if calls else None


def _is_running(frame: FrameType | None) -> bool:
    """Whether a frame is one of those around: hooks after a forward do not run when it is left by a Ctrl-C."""
    if frame is None:
        return True
    around: FrameType | None = sys._getframe()
    while around is not None and around is not frame:
        around = around.f_back
    return around is not None


def _drop_from(calls: list[Call], module: nn.Module) -> Call | None:
    """Take the call of a model off the stack, and what lies above it."""
    for index in range(len(calls) - 1, -1, -1):
        if calls[index].module is module:
            call = calls[index]
            del calls[index:]
            return call
    return None


class Enter:
    """Forward pre-hook that begins a call."""

    def __init__(self, model: nn.Module, steps: Steps) -> None:
        kinds = inspect.Parameter
        parameters = inspect.signature(type(model).forward).parameters.values()
        in_order = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        self.steps = steps
        self.positional = tuple(x.name for x in parameters if x.kind in in_order)[1:]
        self.accepts = frozenset(x.name for x in parameters if x.kind == kinds.KEYWORD_ONLY).union(self.positional)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the call on the stack and run the steps before it."""
        arguments = dict(zip(self.positional, args, strict=False))
        arguments.update(kwargs)
        calls = _running.calls
        _drop_from(calls, module)  # left over from a forward that was interrupted: no model runs inside itself
        parent = innermost()
        if parent is not None and parent.steps is not self.steps:
            parent = None
        call = Call(module, arguments, parent, self.steps, self.accepts)
        if not torch.compiler.is_compiling():
            call.frame = sys._getframe(1)
        calls.append(call)
        for step in self.steps.before:
            step(call)
        return (args[len(self.positional) :], call.arguments) if call.changed else None


class Leave:
    """Forward hook, also called when the forward raises, that ends a call."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> object:
        """Take the call off the stack and run the steps after it."""
        call = _drop_from(_running.calls, module)
        if call is None or output is None:  # the forward raised, or a hook before the one that begins the call
            _explain(sys.exc_info()[1])
            return None
        call.frame = None  # it holds all that the forward was given
        result = output
        for step in self.steps.after:
            changed = step(call, result)
            result = result if changed is None else changed
        return None if result is output else result


def _explain(error: BaseException | None) -> None:
    """Add to the error of a model whose code computes with its masks, which no plan can be part of, what to do."""
    text = str(error)
    if isinstance(error, (AttributeError, TypeError)) and "RowSpans" in text and "attach(" not in text:
        error.args = (
            f"{text}: its code computes with attention masks. Attach it with attach(model, probe=True), which finds "
            "that out and hands it dense ones",
        )


def is_attached(module: nn.Module) -> bool:
    """Whether a model is attached, or one inside it."""
    hooks = (hook for inner in module.modules() for hook in inner._forward_pre_hooks.values())
    return any(isinstance(hook, Enter) for hook in hooks)


def install(model: nn.Module, steps: Steps) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook a ``PreTrainedModel``; the handles that undo it."""
    return [
        # First of all hooks before the forward and last of all after it, so that the others run inside the call.
        model.register_forward_pre_hook(Enter(model, steps), prepend=True, with_kwargs=True),
        model.register_forward_hook(Leave(steps), always_call=True),
    ]
