"""Memory of large results and the system, in a program of its own: without torch, with any version of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

resource = pytest.importorskip("resource", reason="only POSIX limits address space")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="large results lie in memory of their own on Linux alone"),
    pytest.mark.skipif(
        resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY,
        reason="nothing is kept where address space is limited (ulimit -v)",
    ),
]


def test_whoever_gives_memory_back_to_the_system_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Blocks come and go while others are unmapped; and where torch has no tensors over others' memory, as before 2.11,
    large results in its own are to lie in huge pages all the same.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    root, target = Path(__file__).parent.parent, tmp_path / "large_memory"
    sources = [root / "tests/large_memory/main.cpp", root / "csrc/large_memory.cpp"]
    flags = ["-std=c++17", "-Wall", "-Wextra", f"-I{root / 'csrc'}", "-Wl,--wrap=munmap,--wrap=madvise", "-pthread"]
    built = subprocess.run([compiler, *flags, "-o", target, *sources], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([target], capture_output=True, text=True, timeout=60)
    assert result.stdout == "kept while another block was unmapped\nhuge pages for torch's own memory: 1\n"
