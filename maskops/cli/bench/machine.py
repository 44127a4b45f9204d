"""What a result was measured on: device, threads, versions, commit, and the machine's peaks in the same process."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import maskops
from maskops import extension
from maskops.cli.bench.timing import once


@dataclass(frozen=True)
class Peaks:
    """What plain torch reaches on this machine: an upper bound on what any kernel can do.

    Attributes:
        multiply_add: GFLOP/s of a large matrix product in the working dtype.
        read: GB/s of the sum of a tensor that fits no cache.
        copy: GB/s of a copy of it, read and written bytes together.
    """

    multiply_add: float
    read: float
    copy: float


@dataclass(frozen=True)
class Machine:
    """Where and with what a run was made. `load`: processors that other programs took during the run, see `Others`."""

    device: str
    threads: int
    instruction_set: str
    backends: dict[str, str]
    python: str
    torch: str
    maskops: str
    commit: str
    platform: str
    huge_pages: bool
    load: float
    command: str
    peaks: Peaks


def describe(device: torch.device, dtype: torch.dtype) -> Machine:
    """Collects all of it but the load, which is known at the end; measuring the peaks takes about a second.

    Args:
        device: Where the work is done.
        dtype: Of the matrix product that shows the peak.
    """
    return Machine(
        device=device_name(device),
        threads=torch.get_num_threads(),
        instruction_set=instruction_set(),
        backends=dict(maskops.backends()),
        python=platform.python_version(),
        torch=torch.__version__,
        maskops=maskops.__version__,
        commit=commit(),
        platform=f"{platform.system()} {platform.machine()}",
        huge_pages=huge_pages(),
        load=0.0,
        command=" ".join(["python -m maskops", *sys.argv[1:]]),
        peaks=peaks(device, dtype),
    )


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def instruction_set() -> str:
    """What the CPU kernels of maskops and of torch use."""
    return f"maskops {extension.instruction_set() or 'no extension'}, torch {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit of the checkout that this package runs from, with a plus sign when files differ from it."""
    root = Path(maskops.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "not a checkout"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def huge_pages() -> bool:
    """Whether torch's CPU allocator asks for huge pages (THP_MEM_ALLOC_ENABLE)."""
    return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"


def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Best of several runs each."""
    size, numel = (8192, 1 << 28) if device.type == "cuda" else (1536, 1 << 26)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)

    def best(runner: Callable[[], object]) -> float:
        return min(once(runner, device) for _ in range(5))

    return Peaks(
        multiply_add=2 * size**3 / best(lambda: left @ right) * 1e-9,
        read=4 * numel / best(source.sum) * 1e-9,
        copy=8 * numel / best(lambda: target.copy_(source)) * 1e-9,
    )
