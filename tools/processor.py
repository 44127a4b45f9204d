"""The operators of the extension on a processor that is not this one.

``build`` compiles the C++ operators without torch (``tools/processor.cpp``) for a machine, ``Processor`` runs that
program, under an emulator where it needs one, and ``Processor.in_place`` puts it behind the operators of this process:
whatever calls ``maskops`` in the meantime, forward or backward, computes over there.

A call is the operator's name and its arguments by kind: ``t`` tensor, ``w`` tensor that the operator may write, ``i``
int, ``b`` bool, ``f`` float, ``s`` text; then the number of results. The answer is 1 and the results, followed by the
tensors that may have been written, or 0 and why not. A tensor is its dtype, its number of dimensions, sizes, strides,
and the elements that they reach over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.instrument import ROOT

PLACE = ROOT / "build" / "instruction-sets"
FLAGS = "-std=c++17 -O2 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Wno-psabi"
LINKED = "-static -pthread -Wl,--wrap=aligned_alloc"
# The program has one table of kernels, and nobody asks it for what Python asks the binary for.
LEFT_OUT = ("csrc/exports.cpp", "csrc/cpu/isa.cpp", "csrc/cpu/isa_avx2.cpp", "csrc/cpu/isa_avx512.cpp")
STAND_IN = ("fuzz/torch.cpp", "tools/processor.cpp")

# The values of torch's ScalarType, which its serialization format fixes.
_DTYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
_DTYPE_OF = {number: dtype for dtype, number in _DTYPES.items()}


@dataclass(frozen=True)
class Machine:
    """What programs are compiled for, and how they run here.

    Attributes:
        name: of the architecture.
        compiler: a command.
        emulator: a command that runs its programs; empty where none is needed.
    """

    name: str
    compiler: str
    emulator: tuple[str, ...] = ()


def _named_or_found(variable: str, names: tuple[str, ...]) -> str | None:
    """The command that a variable of the environment holds, else the first of the names that is installed."""
    wanted = os.environ.get(variable)
    return next((name for name in ((wanted,) if wanted else names) if shutil.which(shlex.split(name)[0])), None)


def cross_compiler() -> str:
    """A compiler for 64-bit ARM on Linux: AARCH64_CXX, else the system's.

    Raises:
        RuntimeError: there is none.
    """
    names = ("aarch64-linux-gnu-g++", *(f"aarch64-linux-gnu-g++-{version}" for version in range(15, 10, -1)))
    if found := _named_or_found("AARCH64_CXX", names):
        return found
    raise RuntimeError("no cross compiler for 64-bit ARM: install aarch64-linux-gnu-g++ or set AARCH64_CXX")


def emulator() -> tuple[str, ...]:
    """QEMU for programs of 64-bit ARM: QEMU_AARCH64, else what is installed; () where nothing is."""
    found = _named_or_found("QEMU_AARCH64", ("qemu-aarch64-static", "qemu-aarch64"))
    return () if found is None else tuple(shlex.split(found))


def sources(root: Path) -> list[Path]:
    """What the program is made of, the kernels first: they take longest."""
    found = [path for path in (root / "csrc").rglob("*.cpp") if "cuda" not in path.relative_to(root).parts]
    chosen = [path for path in found if path.relative_to(root).as_posix() not in LEFT_OUT]
    chosen += [root / name for name in STAND_IN]
    return sorted(chosen, key=lambda path: (not path.stem.startswith("isa_"), path))


def graph(machine: Machine, place: Path, root: Path) -> str:
    """The build.ninja of the program."""
    lines = [
        f"rule compile\n  command = {machine.compiler} {FLAGS} -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {machine.compiler} $in -o $out {LINKED}",
    ]
    objects = []
    for path in sources(root):
        objects.append(place / path.relative_to(root).with_suffix(".o"))
        lines.append(f"build {objects[-1]}: compile {path}")
    return "\n".join([*lines, f"build {place / 'processor'}: link {' '.join(map(str, objects))}"]) + "\n"


def start_build(machine: Machine, root: Path = ROOT) -> Callable[[], Path]:
    """Begins to build the program of the project in ``root``; what it returns waits for the path of the program.

    Raises:
        RuntimeError: (when waiting) the compiler failed; with its words.
    """
    place = (PLACE if root == ROOT else root / "build") / machine.name
    place.mkdir(parents=True, exist_ok=True)
    (place / "build.ninja").write_text(graph(machine, place, root))
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    process = subprocess.Popen([*ninja, "-C", str(place)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish() -> Path:
        said = process.communicate()[0]
        if process.returncode != 0:
            raise RuntimeError(f"{machine.compiler} does not build the kernels:\n{said[-6000:]}")
        return place / "processor"

    return finish


def _memory(x: Tensor) -> Tensor:
    """The elements that a tensor's sizes and strides reach over, as bytes that share its memory."""
    extent = 0 if x.numel() == 0 else 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((extent,), (1,)).view(torch.uint8)


class Processor:
    """A running program of ``tools/processor.cpp``.

    Attributes:
        instruction_set: name of its kernels.
        operators: names of the operators that it has.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self.instruction_set = self._read_text()
        self.operators = [self._read_text() for _ in range(self._read_number())]

    def close(self) -> None:
        """Ends the program."""
        self._input.close()
        self._process.wait()
        self._output.close()

    def call(self, name: str, schema: torch.FunctionSchema, arguments: tuple[Any, ...]) -> list[Tensor]:
        """Runs an operator over there; what it writes is written here.

        Raises:
            RuntimeError: the operator refused, in its own words, or the program has ended.
        """
        message = [self._text(name), self._number(len(schema.arguments))]
        written = []
        for declared, value in zip(schema.arguments, arguments, strict=True):
            if isinstance(value, Tensor):
                is_written = declared.alias_info is not None and declared.alias_info.is_write
                written += [value] if is_written else []
                message += [self._number(ord("w" if is_written else "t")), self._tensor(value)]
            elif isinstance(value, str):
                message += [self._number(ord("s")), self._text(value)]
            elif isinstance(value, bool):
                message += [self._number(ord("b")), self._number(value)]
            elif str(declared.type) == "float":
                message += [self._number(ord("f")), struct.pack("<d", value)]
            else:
                message += [self._number(ord("i")), self._number(int(value))]
        message.append(self._number(len(schema.returns)))
        try:
            self._input.write(b"".join(message))
            self._input.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the program ended before {name}") from None
        if not self._read_number():
            raise RuntimeError(self._read_text())
        results = [self._read_tensor() for _ in schema.returns]
        for target in written:
            _memory(target).copy_(_memory(self._read_tensor()))
        return results

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts its operators in the place of this processor's."""
        library = torch.library.Library("maskops", "IMPL")

        def implementation(name: str) -> Callable[..., Any]:
            schema = getattr(torch.ops.maskops, name).default._schema

            def run(*arguments: Any) -> Any:
                results = self.call(name, schema, arguments)
                return None if not results else results[0] if len(results) == 1 else tuple(results)

            return run

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that kernels are overridden: that is what is wanted
                for name in self.operators:
                    library.impl(name, implementation(name), "CPU", allow_override=True)
            yield
        finally:
            library._destroy()

    @staticmethod
    def _number(value: int) -> bytes:
        return struct.pack("<q", value)

    def _text(self, text: str) -> bytes:
        return self._number(len(text.encode())) + text.encode()

    def _tensor(self, x: Tensor) -> bytes:
        numbers = [_DTYPES[x.dtype], x.dim(), *x.shape, *x.stride()]
        return b"".join([*map(self._number, numbers), _memory(x).numpy().tobytes()])

    def _read(self, count: int) -> bytes:
        data = self._output.read(count)
        if len(data) != count:
            raise RuntimeError(f"the program ended with {self._process.wait()}")
        return data

    def _read_number(self) -> int:
        return int(struct.unpack("<q", self._read(8))[0])

    def _read_text(self) -> str:
        return self._read(self._read_number()).decode()

    def _read_tensor(self) -> Tensor:
        dtype = _DTYPE_OF[self._read_number()]
        dim = self._read_number()
        sizes, strides = ([self._read_number() for _ in range(dim)] for _ in range(2))
        x = torch.empty_strided(sizes, strides, dtype=dtype)
        memory = _memory(x)
        if memory.numel():
            memory.copy_(torch.frombuffer(bytearray(self._read(memory.numel())), dtype=torch.uint8))
        return x
