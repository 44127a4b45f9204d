"""replace_sdpa: models that call torch's attention and loss run on maskops, unchanged, and a report tells what did."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from maskops.compat.loss import cross_entropy
from maskops.compat.multi_head import multi_head_attention_forward
from maskops.compat.sdpa import NotServedError, served

functional = torch.nn.functional

SDPA = "scaled_dot_product_attention"
MULTI_HEAD = "nn.MultiheadAttention"
CROSS_ENTROPY = "cross_entropy"

# What goes around the three functions above when it is called by its own name.
_BYPASSES: dict[object, str] = {
    getattr(torch, name): f"torch.{name} is one fused call: torch's fast path, called directly"
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
    if hasattr(torch, name)
}


def _undispatched(function: FunctionType) -> FunctionType:
    """A function of torch that does not ask whether a mode wants it instead."""
    nobody = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda *_: False)
    copy = FunctionType(
        function.__code__, function.__globals__ | nobody, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# A backward pass calls the model where it is checkpointed, and torch would run all of it with this mode switched off.
_BACKWARD: dict[object, FunctionType] = {
    function: _undispatched(function)
    for function in (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
    if isinstance(function, FunctionType)
}


@dataclass
class ReplacementReport:
    """What ran on maskops inside a ``replace_sdpa`` block, and what ran on torch and why. Printing it gives a table.

    Attributes:
        served: calls that ran on maskops, by kind: ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` (also as
            a part of ``nn.TransformerEncoderLayer`` and its like) and ``cross_entropy``.
        unserved: calls that ran on torch, by kind and reason.
        notes: what the block did beyond that.
    """

    served: dict[str, int] = field(default_factory=dict)
    unserved: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{count:6d}  {kind}: on maskops" for kind, count in self.served.items()]
        lines += [f"{count:6d}  {kind}: on torch, {reason}" for (kind, reason), count in self.unserved.items()]
        lines = lines or ["     0  calls of attention or cross_entropy seen"]
        return "\n".join(["replace_sdpa:", *lines, *(f"   note: {note}" for note in self.notes)])


class replace_sdpa(TorchFunctionMode):  # noqa: N801 - reads as a function, as torch.no_grad does
    """Runs the attention and the cross-entropy of torch on maskops inside a ``with`` block, in this thread only.

    ::

        with maskops.replace_sdpa() as report:
            loss = model(batch)
            loss.backward()
        print(report)

    Replaced are ``F.scaled_dot_product_attention`` (``maskops.scaled_dot_product_attention`` says how masks are
    recognised), ``nn.MultiheadAttention`` with ``need_weights=False`` and so ``nn.TransformerEncoder``,
    ``nn.TransformerDecoder`` and ``nn.Transformer``, and ``F.cross_entropy``. A call that no fast backend serves runs
    on torch, unchanged, and is reported with the reason; so is one whose arguments maskops refuses, which torch then
    takes or refuses in its own words; a few that torch refuses, such as a mask of another dtype, are served. Results
    differ only where they are better defined here: a query row that sees no key is 0 (also
    where ``nn.MultiheadAttention`` gives NaN), and the mean loss is 0, not NaN, where every label is ignored.

    The fast path of ``nn.MultiheadAttention`` and of ``nn.TransformerEncoder`` in evaluation bypasses all of that. It
    is switched off inside, for the whole process, and comes back when the last block of any thread ends.

    A function compiled by ``torch.compile`` takes part if it is called inside the block: Dynamo compiles it again for
    the block, in one graph, and its calls are counted. Masks cannot be read there, so that dense ones stay dense. What
    a backward pass calls again (``torch.utils.checkpoint``) is replaced if ``backward`` is called inside the block,
    and has to be. Blocks nest; the inner one takes the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report = ReplacementReport()

    def __enter__(self) -> ReplacementReport:
        if _fast_path.leave():
            note = "the fast path of nn.MultiheadAttention and nn.TransformerEncoder is switched off inside"
            if note not in self.report.notes:
                self.report.notes.append(note)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        _fast_path.come_back()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions, with this mode switched off."""
        kwargs = {} if kwargs is None else kwargs
        if func is functional.scaled_dot_product_attention:
            return self._replace(SDPA, _fast_sdpa, func, types, args, kwargs)
        if func is functional.multi_head_attention_forward:
            return self._replace(MULTI_HEAD, multi_head_attention_forward, func, types, args, kwargs)
        if func is functional.cross_entropy:
            return self._replace(CROSS_ENTROPY, cross_entropy, func, types, args, kwargs)
        if func in _BACKWARD and _are_plain(types):
            with self._again():
                return _BACKWARD[func](*args, **kwargs)
        if func in _BYPASSES:
            self._count_unserved(MULTI_HEAD, _BYPASSES[func])
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Switches the mode on while torch has it switched off."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _replace(
        self,
        kind: str,
        ours: Callable[..., Any],
        theirs: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        reason = _why_not(types, args, kwargs)
        if reason is None:
            try:
                result = ours(*args, **kwargs)
            except (NotServedError, TypeError, ValueError) as refused:
                # An argument that is wrong for us as well: torch says so in its own words, or takes it.
                reason = str(refused)
            else:
                self.report.served[kind] = self.report.served.get(kind, 0) + 1
                return result
        self._count_unserved(kind, reason)
        return theirs(*args, **kwargs)

    def _count_unserved(self, kind: str, reason: str) -> None:
        self.report.unserved[kind, reason] = self.report.unserved.get((kind, reason), 0) + 1


def _fast_sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return served(*args, fast_only=True, **kwargs)


def _are_plain(types: Iterable[type]) -> bool:
    return all(kind in (Tensor, torch.nn.Parameter) for kind in types)


def _why_not(types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call has to be left alone whatever its arguments say."""
    if not _are_plain(types):
        return "tensors of another class than torch.Tensor are left to it"
    if torch.compiler.is_compiling():
        return None
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    if any(x.is_nested or x.layout != torch.strided for x in tensors):
        return "nested and sparse tensors are torch's"
    if any(_is_under_vmap(x) for x in tensors):
        return "under torch.vmap there is no kernel of ours"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "forward-mode differentiation has no kernel of ours"
    return None


def _is_under_vmap(x: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


class _FastPath:
    """torch's switch of its fast path, which is one for the process: off while any block of any thread is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._was_on = False

    def leave(self) -> bool:
        """Switch it off; whether it was on before the first block."""
        with self._lock:
            if self._blocks == 0:
                self._was_on = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._blocks += 1
            return self._was_on

    def come_back(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                torch.backends.mha.set_fastpath_enabled(self._was_on)


_fast_path = _FastPath()
