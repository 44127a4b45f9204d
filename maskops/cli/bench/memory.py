"""How much memory a piece of work takes at its peak, over what was taken before."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from maskops import extension

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


class Peak:
    """The highest mark of this process's memory, which Linux keeps and lets be set back; on a GPU that of torch.

    Attributes:
        reason: None, or why nothing can be measured here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reason: str | None = None
        if device.type == "cpu" and not _settable():
            self.reason = "this system does not let a process set its peak of memory back"

    def over(self, work: Callable[[], Result]) -> tuple[Result, int | None]:
        """Runs something; its result, and the bytes that were taken at its peak over those before it."""
        if self.reason is not None:
            return work(), None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            result = work()
            return result, torch.cuda.max_memory_allocated(self._device) - before
        _RESET.write_text("5", encoding="ascii")
        before = _kilobytes("VmRSS")
        result = work()
        return result, 1024 * max(_kilobytes("VmHWM") - before, 0)


def tidy() -> None:
    """Collects garbage and gives free memory back, so that the next peak is not that of something earlier."""
    gc.collect()
    extension.release_memory()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def _settable() -> bool:
    try:
        _RESET.write_text("5", encoding="ascii")
        return _kilobytes("VmHWM") > 0
    except OSError:
        return False


def _kilobytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0
