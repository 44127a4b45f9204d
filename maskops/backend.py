"""What a backend declares, how one is chosen, and why one refuses.

One table, ``BACKENDS``, says for every backend on which devices it runs and, for every op, which dtypes it takes and
which features it lacks, each with the reason a user gets to read. Nothing here imports a kernel, and nothing else in
the package decides between implementations.
"""

import contextlib
import contextvars
import functools
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from maskops.checks import constant_when_compiling

ENVIRONMENT_VARIABLE = "MASKOPS_BACKEND"
REFERENCE = "reference"
AUTO = "auto"

_HALVES_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_ALL_FLOATS = (*_HALVES_AND_SINGLE, torch.float64)


class BackendFallbackWarning(UserWarning):
    """A call runs on the reference, because every faster backend refused it. Given once per op and reason."""


class Call(NamedTuple):
    """What a backend has to know about a call in order to accept or refuse it; the fields as in ``choose``."""

    op: str
    device: str
    dtype: torch.dtype
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """What a backend promises for one op.

    Attributes:
        dtypes: the dtypes that it takes.
        lacks: feature, a key of ``FEATURES``, -> the reason why this backend does not serve it, a full clause.
        needs_key_tiles: whether its backward pass reads ``RowSpans.key_tiles``. Where it does not, plans are made
            with ``grad=False``, which is cheaper.
    """

    dtypes: tuple[torch.dtype, ...]
    lacks: Mapping[str, str] = field(default_factory=dict)
    needs_key_tiles: bool = False


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: what users write.
        devices: device types on which it runs; empty means every device.
        unavailable: returns the reason why it cannot run in this process, None when it can.
        ops: op -> declaration; an op that is absent is not served.
        plans: whether it implements ``build_plan``.
        compiles_masks: whether it implements ``compile_mask``, which reads a dense mask once.
        on_host: whether its kernels run on the processor in this process, for tests: interpreted, or compiled as host
            code. ``"auto"`` never chooses that.
    """

    name: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None]
    ops: Mapping[str, Declaration]
    plans: bool = False
    compiles_masks: bool = False
    on_host: Callable[[], bool] = lambda: False

    def is_at_home(self, device: str) -> bool:
        """Whether tensors on a device are what it was made for."""
        return not self.devices or device in self.devices

    def refusals_of(self, device: str) -> list[str]:
        """Why it cannot run on tensors of a device, in a list of at most one reason."""
        if not self.is_at_home(device) and not (device == "cpu" and self.on_host()):
            return [f"it runs on {' and '.join(self.devices)} tensors, these are on {device}"]
        reason = self.unavailable()
        return [] if reason is None else [reason]

    def refusals(self, call: Call) -> list[str]:
        """Every reason why this backend cannot serve the call; empty when it can."""
        declaration = self.ops.get(call.op)
        if declaration is None:
            return [f"it has no {call.op}"]
        reasons = self.refusals_of(call.device)
        if call.dtype not in declaration.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in declaration.dtypes)
            reasons.append(f"it takes {known}, not {str(call.dtype).removeprefix('torch.')}")
        reasons.extend(declaration.lacks[feature] for feature in call.features if feature in declaration.lacks)
        return reasons


@functools.cache
def _extension() -> ModuleType:
    """Imported at the first call, not with the package."""
    from maskops import extension

    return extension


def _extension_reason() -> str | None:
    reason: str | None = _extension().reason()
    return reason


def _triton_reason() -> str | None:
    if not _has_triton():
        return "Triton is not installed; install it with: python -m pip install triton"
    if _triton_is_interpreted():
        return interpreter_problem()
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _capability_reason(torch.cuda.current_device())


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    is_blocked = "triton" in sys.modules and sys.modules["triton"] is None
    return not is_blocked and importlib.util.find_spec("triton") is not None


@functools.cache
def _capability_reason(device: int) -> str | None:
    """Of one device, asked of the current one: a choice of backends knows a call's type of device, not which it is.

    Where a machine has cards of several generations, a call on tensors of another card than the current one is chosen
    by what the current one can.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"its kernels need compute capability 8.0, this device has {major}.{minor}"


def _triton_is_interpreted() -> bool:
    # As Triton itself reads it, when kernels are first imported.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _cuda_reason() -> str | None:
    from maskops import extension

    return extension.cuda_reason()


def _cuda_is_emulated() -> bool:
    from maskops import extension

    return extension.cuda_is_emulated()


@functools.lru_cache(maxsize=1)
def interpreter_problem() -> str | None:
    """Why the installed Triton's interpreter cannot run kernels here, None where it can or where there is none."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return None
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} needs numpy < 2.4, this is numpy {numpy}"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


WIDEST_HEADS = 256
"""``head_dim`` or Dv beyond which heads are a feature of their own: the kernels of `triton` hold a row in a tile."""

_NO_WIDE_HEADS = f"its tiles hold heads of at most {WIDEST_HEADS}"
_NO_DOUBLE_BACKWARD = "a kernel's backward pass cannot be differentiated: it says so, backend 'reference' can"

# What users ask of each op, in the words of the README's table (tools/readme.py writes it from here and from the
# declarations below; a test runs every feature on every backend that does not say it lacks it).
FEATURES: dict[str, dict[str, str]] = {
    "attention": {
        "masks": "masks `full causal sliding_window prefix chunked padding key_padding documents`, `&`, `\\|`: one "
        "span a row or several",
        "dense mask": "`masks.dense`: a mask with holes, one for each batch element and head",
        "shapes": "padded, packed, Sq != Sk, grouped queries, Dv != D, any strides",
        "wide heads": f"`head_dim` or Dv above {WIDEST_HEADS}",
        "softcap": "`softmax_scale`, `softcap`",
        "lse": "`return_lse`, with its gradient",
        "bias": "`bias` of every broadcastable shape, with its gradient",
        "alibi_slopes": "`alibi_slopes`, one a head or one a sequence and head",
        "sinks": "`sinks`, with their gradient",
        "dropout": "`dropout_p`: the same places padded and packed, forward and backward",
        "autocast": "autocast, as `scaled_dot_product_attention` does it",
        "compile": "`torch.compile(fullgraph=True)`, forward and backward",
        "double backward": "double backward",
    },
    "append_kv": {
        "contiguous": "a cache (batch, kv_heads, capacity, D) of any strides, appended to in place",
        "paged": "pages (pages, kv_heads, page_size, D) and a `block_table`",
        "batch_index": "`batch_index`: rows of the batch in any rows of the cache",
    },
    "decode_attention": {
        "masks": "masks, or a `RowSpans`; one query or many, lengths from 0 to the capacity",
        "paged": "a `block_table`: read in place (on `cpu` by few queries, else gathered)",
        "batch_index": "`batch_index`",
        "wide heads": f"`head_dim` or Dv above {WIDEST_HEADS}",
        "leftpad": "`leftpad`",
        "dense mask": "`masks.dense`",
        "alibi_slopes": "`alibi_slopes`",
        "sinks": "`sinks`",
        "softcap": "`softmax_scale`, `softcap`",
        "lse": "`return_lse`",
        "compile": "`torch.compile(fullgraph=True)`: growing lengths compile nothing anew",
    },
    "cross_entropy": {
        "ignored": "`ignore_index`, `mask`, `token_weights`: skipped tokens are not read",
        "scores": "`label_smoothing`, `z_loss`, `softcap`, `logit_scale`",
        "confident": "loss and gradient of the label's logit to 1e-6 where its probability is within 1e-7 of 1",
        "soft labels": "probabilities as `target`, with their gradient",
        "class_weights": "`class_weights`, with torch's denominators",
        "reductions": "`mean`, `sum`, `none`, `sequence_mean` over `cu_seqlens`, `num_items`, `shift`",
        "outputs": "`return_lse`, `return_logprobs`, `return_entropy` with gradients, `return_argmax`",
        "compile": "`torch.compile(fullgraph=True)`, forward and backward",
        "double backward": "double backward",
    },
    "masked_softmax": {
        "masks": "a mask of `masks` or a `RowSpans`, over scores (..., q_len, k_len)",
        "broadcast mask": "a bool or 0/1 mask that broadcasts, of any strides: an expanded one is never materialised",
        "dim": "any `dim`, any strides, any length; what masked places hold, NaN included, reaches nothing",
        "lse": "`return_lse`, with its gradient",
        "autocast": "autocast, as `torch.softmax` does it",
        "compile": "`torch.compile(fullgraph=True)`, forward and backward",
        "double backward": "double backward",
    },
    "linear_cross_entropy": {
        "ignored": "`ignore_index`, `mask`, `token_weights`: skipped tokens take no part in a matrix product (on "
        "devices: as rows of zeros)",
        "layer": "`bias`; `hidden` and `weight` of different dtypes; gradients of all three, summed in float32",
        "scores": "`label_smoothing`, `z_loss`, `softcap`, `logit_scale`",
        "class_weights": "`class_weights`, with torch's denominators",
        "reductions": "`mean`, `sum`, `none`, `sequence_mean` over `cu_seqlens`, `num_items`, `shift`",
        "outputs": "`return_lse`, `return_logprobs`, `return_entropy` with gradients, `return_argmax`",
        "compile": "`torch.compile(fullgraph=True)`, forward and backward",
        "double backward": "double backward",
    },
}

# In the order in which "auto" tries them; the reference is last, and serves everything.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        name="cpu",
        devices=("cpu",),
        unavailable=_extension_reason,
        plans=True,
        ops={
            # Its backward pass walks the query tiles and accumulates dK and dV per tile, so it needs no key_tiles.
            "attention": Declaration(
                dtypes=_HALVES_AND_SINGLE,
                lacks={
                    "double backward": _NO_DOUBLE_BACKWARD,
                },
            ),
            "append_kv": Declaration(dtypes=_ALL_FLOATS),
            "decode_attention": Declaration(dtypes=_HALVES_AND_SINGLE),
            "cross_entropy": Declaration(dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}),
            "masked_softmax": Declaration(dtypes=_HALVES_AND_SINGLE),
            "linear_cross_entropy": Declaration(
                dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}
            ),
        },
    ),
    "triton": Backend(
        name="triton",
        devices=("cuda",),
        unavailable=_triton_reason,
        plans=True,
        on_host=_triton_is_interpreted,
        ops={
            "attention": Declaration(
                dtypes=_HALVES_AND_SINGLE,
                lacks={"wide heads": _NO_WIDE_HEADS, "double backward": _NO_DOUBLE_BACKWARD},
                needs_key_tiles=True,
            ),
            "append_kv": Declaration(dtypes=_ALL_FLOATS),
            "decode_attention": Declaration(dtypes=_HALVES_AND_SINGLE, lacks={"wide heads": _NO_WIDE_HEADS}),
            "cross_entropy": Declaration(dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}),
            "masked_softmax": Declaration(dtypes=_HALVES_AND_SINGLE),
            "linear_cross_entropy": Declaration(
                dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}
            ),
        },
    ),
    "cuda": Backend(
        name="cuda",
        devices=("cuda",),
        unavailable=_cuda_reason,
        plans=True,
        compiles_masks=True,
        on_host=_cuda_is_emulated,
        ops={
            "attention": Declaration(
                dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}, needs_key_tiles=True
            ),
            "append_kv": Declaration(dtypes=_ALL_FLOATS),
            "decode_attention": Declaration(dtypes=_HALVES_AND_SINGLE),
            "cross_entropy": Declaration(dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}),
            "masked_softmax": Declaration(dtypes=_HALVES_AND_SINGLE),
            "linear_cross_entropy": Declaration(
                dtypes=_HALVES_AND_SINGLE, lacks={"double backward": _NO_DOUBLE_BACKWARD}
            ),
        },
    ),
    REFERENCE: Backend(
        name=REFERENCE,
        devices=(),
        unavailable=lambda: None,
        ops={
            "attention": Declaration(dtypes=_ALL_FLOATS),
            "append_kv": Declaration(dtypes=_ALL_FLOATS),
            "decode_attention": Declaration(dtypes=_ALL_FLOATS),
            "cross_entropy": Declaration(dtypes=_ALL_FLOATS),
            "masked_softmax": Declaration(dtypes=_ALL_FLOATS),
            "linear_cross_entropy": Declaration(dtypes=_ALL_FLOATS),
        },
    ),
}


class _Preference(NamedTuple):
    name: str = AUTO
    fallback: str = "warn"


_preference: contextvars.ContextVar[_Preference | None] = contextvars.ContextVar("maskops_preference", default=None)
_validating: contextvars.ContextVar[bool] = contextvars.ContextVar("maskops_validating", default=False)
_warned: set[tuple[str, str]] = set()


def _known(name: str, where: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}: expected one of {', '.join(map(repr, (AUTO, *BACKENDS)))}")
    return name


@functools.lru_cache(maxsize=8)
def _environment(value: str) -> _Preference:
    """Reads ``MASKOPS_BACKEND``; ``cpu:avx2`` also selects the instruction set, once."""
    name, _, instruction_set = value.partition(":")
    _known(name, f"the environment variable {ENVIRONMENT_VARIABLE}")
    if instruction_set:
        if name != "cpu":
            raise ValueError(
                f"the environment variable {ENVIRONMENT_VARIABLE} is {value!r}: only cpu takes an instruction set"
            )
        from maskops import extension

        if extension.reason() is None:
            extension.select_instruction_set(instruction_set)
    return _Preference(name)


_NO_PREFERENCE = _Preference()
# What lies behind os.environ, where this Python has it: a variable that is not set, which is the normal case, costs
# os.environ an exception, more than all other questions of a choice together.
_VARIABLES = getattr(os.environ, "_data", os.environ)
_VARIABLE = os.environ.encodekey(ENVIRONMENT_VARIABLE) if _VARIABLES is not os.environ else ENVIRONMENT_VARIABLE


def _preferred() -> _Preference:
    preference = _preference.get()
    if preference is not None:
        return preference
    if _VARIABLE not in _VARIABLES:
        return _NO_PREFERENCE
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    return _environment(value) if value else _NO_PREFERENCE


def processor_is_free() -> bool:
    """Whether ``choose`` would give ``cpu`` to a call on the processor that names no backend and uses no feature."""
    preference = _preference.get()
    if preference is not None:
        return preference.name in (AUTO, "cpu") and _extension_reason() is None
    value = _VARIABLES.get(_VARIABLE)
    return (value is None or _leaves_processor(value)) and _extension_reason() is None


@functools.lru_cache(maxsize=8)
def _leaves_processor(value: str | bytes) -> bool:
    """Whether ``MASKOPS_BACKEND``, as the system has it, leaves the processor to ``cpu``."""
    try:
        return not value or _environment(os.fsdecode(value)).name in (AUTO, "cpu")
    except ValueError:  # for choose to raise
        return False


def _stacklevel_of_user() -> int:
    """Stack level, seen from the caller, of the nearest frame outside this package."""
    package = os.path.dirname(__file__)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def _size(nbytes: int | Callable[[], int] | None) -> str:
    if nbytes is None:
        return "it materialises its intermediate values"
    if callable(nbytes):
        nbytes = nbytes()
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes = (nbytes + 512) // 1024
    return f"about {nbytes} {unit}"


def _pick(call: Call, preferred: str) -> tuple[str, str]:
    """The backend that serves a call, and why it is the reference where nobody asked for that, else nothing."""
    refused = {}
    for name in [preferred] if preferred != AUTO else []:
        refused[name] = BACKENDS[name].refusals(call)
        if not refused[name]:
            return name, ""
    for name, backend in BACKENDS.items():
        # A backend for other devices is no candidate, and its refusal would only hide the reason that matters.
        if name == REFERENCE or name in refused or not backend.is_at_home(call.device):
            continue
        reasons = backend.refusals(call)
        if not reasons:
            return name, ""
        refused[name] = reasons
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    return REFERENCE, why or f"no other backend runs on {call.device} tensors"


@constant_when_compiling
def refusal(op: str, device: str, dtype: torch.dtype, features: tuple[str, ...] = ()) -> str | None:
    """Why a call would end on the reference without anybody having asked for it, None if it would not.

    For callers that have another way; the arguments as in ``choose``, which warns or raises.
    """
    return _pick(Call(op, device, dtype, features), _preferred().name)[1] or None


@constant_when_compiling
def choose(
    op: str,
    device: str,
    dtype: torch.dtype,
    features: tuple[str, ...] = (),
    requested: str | None = None,
    reference_bytes: int | Callable[[], int] | None = None,
) -> str:
    """Chooses the backend of a call. Takes Python constants only: no tensor, no shape.

    Args:
        op: name of the op, a key of ``Backend.ops``.
        device: device type of the tensors, ``"cpu"`` or ``"cuda"``.
        dtype: dtype of the tensors after autocast.
        features: what the call uses beyond the plain op, in the words of ``Declaration.lacks``.
        requested: the ``backend=`` argument of the public function. A named backend serves the call or raises.
        reference_bytes: memory that the reference would take, for the warning, or a function that finds out; None
            under compilation, where sizes may be symbolic.

    Returns:
        The name of a backend that serves the call.

    Raises:
        ValueError: ``requested`` is no backend, or it (or, under ``fallback="error"``, every backend but the
            reference) refuses the call; the message lists the reasons.
    """
    call = Call(op, device, dtype, features)
    if requested is not None and _known(requested, "backend") != AUTO:
        if reasons := BACKENDS[requested].refusals(call):
            raise ValueError(f"backend {requested!r} cannot run maskops.{call.op}: {'; '.join(reasons)}")
        return requested
    preference = _preferred()
    name, why = _pick(call, preference.name)
    if not why:
        return name
    if preference.fallback == "error":
        raise ValueError(f"no fast backend can run maskops.{call.op}, and fallback is 'error': {why}")
    if (call.op, why) not in _warned:
        _warned.add((call.op, why))
        warnings.warn(
            f"maskops.{call.op} runs on the reference, plain PyTorch ({_size(reference_bytes)}). {why}. "
            f"maskops.use_backend('reference') accepts it silently, use_backend(fallback='error') makes it an error.",
            BackendFallbackWarning,
            stacklevel=_stacklevel_of_user(),
        )
    return REFERENCE


@constant_when_compiling
def needs_key_tiles(op: str, device: str, requested: str | None = None) -> bool:
    """Whether a backend that may serve the op on this device reads ``RowSpans.key_tiles`` in its backward pass.

    Args:
        op: name of the op.
        device: device type of the tensors.
        requested: the ``backend=`` argument of the public function.
    """
    named = (requested, _preferred().name)
    return any(
        backend.ops[op].needs_key_tiles
        for name, backend in BACKENDS.items()
        if op in backend.ops and (backend.is_at_home(device) or name in named)
    )


@constant_when_compiling
def planner(device: str) -> str | None:
    """The backend whose ``build_plan`` plans masks on a device; None where torch operations do."""
    return _first(device, lambda backend: backend.plans)


@constant_when_compiling
def mask_compiler(device: str) -> str | None:
    """The backend whose ``compile_mask`` reads dense masks on a device; None where torch operations do."""
    return _first(device, lambda backend: backend.compiles_masks)


def _first(device: str, can: Callable[[Backend], bool]) -> str | None:
    preferred = _preferred().name
    for name in (preferred, *BACKENDS):
        backend = BACKENDS.get(name)
        if backend is None or not can(backend) or not (name == preferred or backend.is_at_home(device)):
            continue
        if not backend.refusals_of(device):
            return name
    return None


@constant_when_compiling
def moves_rows(device: str) -> bool:
    """Whether the kernels of ``cuda`` pack and unpad rows of tensors on a device."""
    cuda = BACKENDS["cuda"]
    return (cuda.is_at_home(device) or _preferred().name == cuda.name) and not cuda.refusals_of(device)


@contextlib.contextmanager
def use_backend(name: str = AUTO, fallback: Literal["warn", "error"] = "warn") -> Iterator[None]:
    """Prefers a backend inside a ``with`` block (or a decorated function), in this thread only.

    Args:
        name: ``"cpu"``, ``"triton"``, ``"cuda"``, ``"reference"`` or ``"auto"``.
        fallback: what to do where the call ends on the reference without having asked for it: ``"warn"`` (once per
            op and reason) or ``"error"``.

    A compiled function keeps the backend that was in force when it was compiled. Put the ``with`` block around the call
    of a compiled function, not inside it: ``torch.compile(fullgraph=True)`` cannot trace the block.
    """
    if fallback not in ("warn", "error"):
        raise ValueError(f"fallback is {fallback!r}: expected 'warn' or 'error'")
    token = _preference.set(_Preference(_known(name, "name"), fallback))
    try:
        yield
    finally:
        _preference.reset(token)


@contextlib.contextmanager
def validate() -> Iterator[None]:
    """Checks the values of offsets, lengths and labels on every device inside a ``with`` block, in this thread only.

    Structure (dtypes, shapes, devices) is always checked, and so are values on the CPU. On a GPU a look at a value
    waits for the device, so it happens only here.
    """
    token = _validating.set(True)
    try:
        yield
    finally:
        _validating.reset(token)


@constant_when_compiling
def validating() -> bool:
    """Whether values are to be checked on devices where that means to wait."""
    return _validating.get()


def backends() -> dict[str, str]:
    """Maps every backend's name to ``"available"``, or to the reason why it cannot run here."""
    return {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()}
