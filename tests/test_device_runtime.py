"""csrc/cuda/device.cu and shared_memory.h on a machine with several GPUs, which is played: what they ask and say."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import maskops
from maskops import extension
from tools import emulation

ROOT = Path(__file__).parent.parent
EXPECTED = """\
machine: runs the kernels
device 0: the kernels of backend 'cuda' need compute capability 7.5, device 0 has 7.0
device 1: runs them
device 2: runs them
0 reads more, 200 and 300 multiprocessors
torch: from device 0 to 1
stream 41
torch: back to device 0
maskops: reading a device: no such device
nothing is left for the next launch
maskops: out of memory: clearing memory: no
nothing is left for the next launch
maskops: out of memory: asking for shared memory: no
kernel 1 on device 1: 190 bytes
kernel 1 on device 2: 290 bytes
kernel 2 on device 1: 180 bytes
"""


def test_several_devices(tmp_path: Path) -> None:
    """Each has its own answer, read once; only a device that is not the current one is made so, and by torch.

    An error that was told is not told again, and a kernel asks for shared memory once on each device.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder, target = ROOT / "tests/device_runtime", tmp_path / "devices"
    # -rdynamic: what main.cpp has of torch is found by name, as in torch's own library.
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unused-value", f"-I{folder}", "-rdynamic"]
    sources = ["-x", "c++", str(ROOT / "csrc/cuda/device.cu"), str(folder / "main.cpp")]
    command = [compiler, *flags, "-o", str(target), *sources, "-ldl", "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([target], capture_output=True, text=True, timeout=60)
    assert result.stdout == EXPECTED


def test_a_call_on_a_device_that_is_too_old_says_so() -> None:
    """Backends are chosen by the type of a device; which of several it is shows at the call."""
    if not extension.cuda_is_emulated():
        pytest.skip("the emulation of CUDA is not loaded")
    library = ctypes.CDLL(str(emulation.library()))
    library.maskops_emulate_capability(7, 0)
    try:
        with (
            maskops.use_backend("cuda"),
            pytest.raises(RuntimeError, match=r"compute capability 7\.5, device .* has 7\.0"),
        ):
            maskops.masked_softmax(torch.randn(2, 3), maskops.masks.full())
    finally:
        library.maskops_emulate_capability(9, 0)
