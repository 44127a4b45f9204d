"""The emulation of CUDA itself: it has to notice what it is there for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import emulation

ROOT = Path(__file__).parent.parent
FAULTS = {
    "none": (0, "0 wrong"),
    "no barrier": (1, " wrong"),
    "a barrier that one thread passes by": (2, "not every thread of the block comes to its barrier"),
    "two barriers": (3, "threads meet at different barriers"),
    "a store past shared memory": (4, "past the end of its shared memory"),
    "a lane that has ended": (5, "not every thread of the block comes to its barrier or exchange"),
    "a lane outside of its mask": (6, "a lane is not in the mask of its own exchange"),
    "shared memory that nobody asked for": (7, "invalid configuration argument"),
    "shared memory and variables that nobody asked for": (8, "more than 48 KiB, and it was not allowed more"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    target = tmp_path_factory.mktemp("faults") / "faults"
    folder = ROOT / "tests/emulation"
    command = [compiler, *emulation.FLAGS.split(), f"-I{folder}", "-o", str(target)]
    sources = ["-x", "c++", str(folder / "faults.cu"), str(folder / "emulation.cpp")]
    result = subprocess.run([*command, *sources], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(program: Path, fault: str) -> None:
    number, expected = FAULTS[fault]
    result = subprocess.run([program, str(number)], capture_output=True, text=True, timeout=60)
    assert expected in result.stdout
    assert (result.returncode == 0) == (number == 0), result.stdout


def test_kernels_name_their_shared_memory_and_their_launches() -> None:
    """So that the emulation can fill the one with NaN, and check the other."""
    for path in (ROOT / "csrc/cuda").glob("*"):
        if path.name != "launch.h":
            text = path.read_text()
            assert "__shared__" not in text and "<<<" not in text, f"{path.name}: see launch.h"
