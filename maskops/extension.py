"""The extension: loading it, the reason when it or its CUDA half is not there, and its choice of instruction set."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from maskops.origin import reinstall_command

_LIBRARY = Path(__file__).with_name("_native.so")
_REPORT = Path(__file__).with_name("_build_report.json")


@functools.lru_cache(maxsize=1)
def _report() -> dict[str, str | None]:
    """What the build has left; read once, because whether the kernels run is asked at every call."""
    found: dict[str, str | None] = json.loads(_REPORT.read_text()) if _REPORT.exists() else {}
    return found


def _why_not_built() -> str:
    reason = f"the C++ extension was never built in {_LIBRARY.parent}"
    if reported := _report().get("reason"):
        reason = f"the C++ extension was not built: {reported}"
    return f"{reason}; rebuild with: {reinstall_command()}"


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not _LIBRARY.exists():
        return None, _why_not_built()
    try:
        torch.ops.load_library(str(_LIBRARY))
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, f"the C++ extension {_LIBRARY} cannot be loaded: {error}"
    for name in ("maskops_instruction_sets", "maskops_instruction_set", "maskops_cuda_reason"):
        getattr(library, name).restype = ctypes.c_char_p
    library.maskops_select_instruction_set.argtypes = [ctypes.c_char_p]
    library.maskops_limit_multiply_add.argtypes = [ctypes.c_int64]
    library.maskops_limit_multiply_add.restype = ctypes.c_double
    library.maskops_limit_multiply_pairs.argtypes = [ctypes.c_int64]
    library.maskops_limit_multiply_pairs.restype = ctypes.c_double
    library.maskops_limit_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.maskops_limit_read.restype = ctypes.c_float
    library.maskops_limit_read_ways.argtypes = []
    library.maskops_limit_read_ways.restype = ctypes.c_int64
    library.maskops_limit_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.maskops_limit_copy.restype = None
    library.maskops_release_memory.argtypes = []
    library.maskops_release_memory.restype = ctypes.c_int64
    library.maskops_trace_tasks.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.maskops_trace_tasks.restype = ctypes.c_int64
    return library, None


_emulation: Path | None = None

# Loaded with this module, so that whether it is there is a plain fact that torch.compile may read while it traces.
_library, _reason = _load()


def reason() -> str | None:
    """Why the extension is missing, with the command that rebuilds it; None when it is loaded."""
    return _reason


def path() -> Path:
    """Where the binary lies, or would lie."""
    return _LIBRARY


def compiler() -> str | None:
    """The compiler that built the binary, as it named itself; None when that is not known."""
    return _report().get("compiler")


def cuda_compiler() -> str | None:
    """The CUDA compiler of the binary's kernels, as it named itself; None when they are not there."""
    return _report().get("nvcc")


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that both the binary and this processor have, narrowest first; () without the extension."""
    return () if _library is None else tuple(_library.maskops_instruction_sets().decode().split())


def instruction_set() -> str | None:
    """The instruction set in use; None without the extension."""
    return None if _library is None else str(_library.maskops_instruction_set().decode())


def limit_multiply_add(rounds: int) -> float:
    """Multiplies and adds in registers on the calling thread, without the interpreter's lock; how many operations.

    Like those below, a limit of the machine to hold kernels against; RuntimeError without the extension.
    """
    return float(_loaded().maskops_limit_multiply_add(rounds))


def limit_multiply_pairs(rounds: int) -> float:
    """The same of pairs of bfloat16 that add up in float32; in float32 where the processor multiplies no pairs."""
    return float(_loaded().maskops_limit_multiply_pairs(rounds))


def limit_read(source: torch.Tensor, way: int) -> float:
    """The sum of a contiguous float32 tensor on the processor, read once on the calling thread.

    `way` is one of `limit_read_ways()`: in one stream or several, with or without asking for memory beforehand.
    """
    return float(_loaded().maskops_limit_read(source.data_ptr(), source.numel(), way))


def limit_read_ways() -> range:
    """The ways in which `limit_read` reads; which is the fastest depends on the processor and on its threads."""
    return range(_loaded().maskops_limit_read_ways())


def limit_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a contiguous float32 tensor past the caches on the calling thread; `target` is aligned to 64 bytes."""
    _loaded().maskops_limit_copy(target.data_ptr(), source.data_ptr(), source.numel())


def release_memory() -> int:
    """Returns memory that is kept for the next large result to the system; how many bytes that were.

    On Linux the memory of results of 8 MiB and more is kept when they are freed, at most 16 blocks and a sixteenth
    of the machine's memory: new memory takes longer to get than most results to compute. It counts as resident, but the
    system takes it back by itself when it runs short.
    """
    return 0 if _library is None else int(_library.maskops_release_memory())


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(f"this needs the C++ extension: {_reason}")
    return _library


def select_instruction_set(name: str) -> None:
    """Use the kernels of one instruction set in the whole process, for comparisons and tests.

    Raises:
        ValueError: if this processor or binary does not have it; the message lists those it has.
    """
    if _library is None or not _library.maskops_select_instruction_set(name.encode()):
        have = ", ".join(instruction_sets()) or "none"
        raise ValueError(f"instruction set must be one of those that this machine has ({have}), got {name!r}")


class TaskTime(NamedTuple):
    """One task of the kernels' schedule; tasks of a region start in order, and end before the next region begins."""

    region: int
    most_workers: int
    nanoseconds: int
    chain: int = -1
    """Tasks of one chain of a region add to the same sums, one behind the other; -1 for a task of no chain."""
    keys: int = 0
    """Keys that a task of a chain sees: it goes from one to the next, and the task behind it follows."""


def trace_tasks(call: Callable[[], object]) -> list[TaskTime]:
    """Runs `call` with every task of every kernel on the calling thread, and tells how much of its time each took.

    The tasks and their order are those that `torch.get_num_threads()` threads would have taken from. Not while other
    threads use the kernels.

    Raises:
        RuntimeError: if the extension is missing.
    """
    if _library is None:
        raise RuntimeError(str(_reason))
    capacity = 1 << 16
    while True:
        times = (ctypes.c_int64 * (5 * capacity))()
        _library.maskops_trace_tasks(times, capacity)
        try:
            call()
        finally:
            found = _library.maskops_trace_tasks(None, 0)
        if found <= capacity:
            return [TaskTime(*times[5 * task : 5 * task + 5]) for task in range(found)]
        capacity = found


def cuda_reason() -> str | None:
    """Why the CUDA kernels cannot run here, None when they can (on a device, or emulated on the processor)."""
    if _emulation is not None:
        return None
    if (why := reason()) is not None:
        return why
    if _library is None or (problem := _library.maskops_cuda_reason()) is None:
        return None
    reported = _report().get("cuda_reason")
    return f"{problem.decode()}: {reported}" if reported else str(problem.decode())


def cuda_is_emulated() -> bool:
    """Whether the CUDA kernels run on the processor in this process, compiled as host code."""
    return _emulation is not None


def load_cuda_emulation(library: Path) -> None:
    """Loads CUDA kernels compiled as host code: the backend ``cuda`` then takes tensors on the processor, for tests."""
    global _emulation
    torch.ops.load_library(str(library))
    _emulation = library
