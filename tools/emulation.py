"""`python -m tools.emulation`: compiles the CUDA kernels as host code into a library that the tests load.

Every ``csrc/cuda/*.cu`` and ``csrc/ops/cuda/*.cpp``, with ``tests/emulation`` in the place of CUDA: the operators of
the backend ``cuda`` then take tensors on the processor. It shows mistakes in the kernels' logic and barriers that are
missing; it does not show that a kernel is free of races.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-psabi -fno-strict-aliasing -DMASKOPS_EMULATION "
    "-Daoti_torch_empty_strided=maskops_emulated_empty_strided"  # tests/emulation/allocation.cpp
)
DEVICE = "device.cu"  # what tests/emulation/device.cpp stands for


def sources() -> list[Path]:
    """Everything that goes into the library."""
    kernels = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.name != DEVICE]
    folders = (ROOT / "csrc/ops/cuda", ROOT / "tests/emulation")
    return [
        *kernels,
        ROOT / "csrc/large_memory.cpp",
        *(path for folder in folders for path in sorted(folder.glob("*.cpp"))),
    ]


def library() -> Path:
    """Where the library lies once it is built."""
    return ROOT / "build" / "emulation" / "libmaskops_emulation.so"


def ninja_graph(build: Path, compiler: str) -> str:
    """The build.ninja of the library; as the extension it is linked against an empty libtorch_cpu."""
    stub = build / "libtorch_cpu.so"
    lines = [
        f"flags = {FLAGS} -I{ROOT / 'tests/emulation'} {os.environ.get('CXXFLAGS', '')}",
        f"rule compile\n  command = {compiler} $flags -MMD -MF $out.d -c -x c++ $in -o $out\n  depfile = $out.d\n"
        "  deps = gcc",
        f"rule link\n  command = {compiler} -shared $objects -o $out -L{build} -Wl,--no-as-needed -ltorch_cpu -lm",
        f"rule stub\n  command = {compiler} -shared -x c++ /dev/null -Wl,-soname,libtorch_cpu.so -o $out",
        f"build {stub}: stub",
    ]
    objects = []
    for source in sources():
        objects.append(build / source.relative_to(ROOT).with_suffix(f"{source.suffix}.o"))
        lines.append(f"build {objects[-1]}: compile {source}")
    names = " ".join(map(str, objects))
    lines += [f"build {library()}: link {names} | {stub}", f"  objects = {names}"]
    return "\n".join(lines) + "\n"


def build() -> str | None:
    """Builds the library where it is not up to date. Returns why it cannot be built here, None when it is there.

    Raises:
        RuntimeError: the compiler refused the sources.
    """
    if sys.platform != "linux":
        return "the emulation of CUDA is built on Linux"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next((name for name in names if shutil.which(name.split()[0])), None)
    if compiler is None:
        return f"no C++ compiler (looked for {', '.join(names)})"
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    if shutil.which(ninja[0]) is None:
        return "ninja is not installed"
    folder = library().parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_graph(folder, compiler))
    command = [*ninja, "-C", str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the emulation of the CUDA kernels cannot be compiled:\n{result.stdout[-4000:]}")
    return None


def main() -> int:
    """Builds the library and says where it is."""
    reason = build()
    print(reason or library())
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
