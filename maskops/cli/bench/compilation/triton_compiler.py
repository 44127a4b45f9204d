"""Compiles a Compilation with the Triton at hand, for a machine that is not here. Imported by worker processes only.

Works with Triton 3.6 to 3.9; what differs between them is in this file alone.
"""

import contextlib
import io
import re
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maskops.cli.bench.compilation import sass
from maskops.cli.bench.compilation.result import Result
from maskops.ops.compilation import Compilation

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FRAME = re.compile(r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_NOTE = re.compile(r"\(C75\d\d\)[^\n]*")
_HALVES_MULTIPLIED = re.compile(r"tt\.dot [^\n]*: tensor<[\dx]+x(bf16|f16)>")


def version() -> str:
    """Of Triton."""
    return str(triton.__version__)


def compile_kernel(compilation: Compilation) -> Result:
    """Compiles one kernel and reads what came out; a kernel that does not compile has a Result with an error."""
    began = time.perf_counter()
    blocks = compilation.blocks
    known = Result(
        name=compilation.name,
        architecture=compilation.architecture,
        warps=compilation.num_warps,
        scores=blocks.get("BLOCK_M", 0) * blocks.get("BLOCK_N", 0),
        config={**blocks, "num_stages": compilation.num_stages},
    )
    try:
        kernel, log = _compiled(compilation)
        function = sass.functions(disassemble(kernel.asm["cubin"]))[kernel.metadata.name]
    except Exception as error:
        # Whatever went wrong in the compiler is a finding about this kernel, not the end of the run.
        return replace(known, error=_reason(error), seconds=round(time.perf_counter() - began, 1))
    frames = _FRAME.findall(log)
    return replace(
        known,
        registers=max(map(int, _REGISTERS.findall(log)), default=0),
        shared=int(kernel.metadata.shared),
        spill_stores=sum(int(stores) for stores, _ in frames),
        spill_loads=sum(int(loads) for _, loads in frames),
        notes=tuple(dict.fromkeys(note.strip() for note in _NOTE.findall(log))),
        loops=tuple(sass.hot_loops(function)),
        instructions=len(function.instructions),
        dots=_HALVES_MULTIPLIED.search(kernel.asm["ttir"]) is not None,
        seconds=round(time.perf_counter() - began, 1),
    )


def source_of(compilation: Compilation) -> ASTSource:
    """The kernel as Triton's compiler wants it: types, constants, and which arguments are multiples of 16."""
    constants = compilation.constants
    names = list(compilation.function.arg_names)
    missing = [name for name in names if name not in constants and name not in compilation.signature]
    surplus = [name for name in (*constants, *compilation.signature, *compilation.divisible) if name not in names]
    if missing or surplus:
        raise ValueError(f"{compilation.name}: the kernel's arguments {missing} are missing, {surplus} are not its own")
    signature = {name: "constexpr" if name in constants else compilation.signature[name] for name in names}
    multiples = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if name in compilation.divisible or signature[name][0] == "*"
    }
    by_position = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=compilation.function, signature=signature, constexprs=by_position, attrs=multiples)


def disassemble(cubin: bytes) -> str:
    """The instructions of a binary, by the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Without an analysis of the data flow, which nobody reads here.
        command = [str(BINARIES / "nvdisasm"), "-c", "-ndf", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _compiled(compilation: Compilation) -> tuple[Any, str]:
    """The kernel, from Triton's cache where it is there, and what ptxas said when it was compiled."""
    logs = Path(triton.knobs.cache.dir) / "ptxas"
    logs.mkdir(parents=True, exist_ok=True)
    kernel, log = _compile(compilation)
    path = logs / f"{kernel.metadata.hash}.log"
    if not log and path.exists():
        return kernel, path.read_text()
    if not log:
        # Compiled before by somebody who did not keep the log.
        triton.knobs.compilation.always_compile = True
        kernel, log = _compile(compilation)
        triton.knobs.compilation.always_compile = False
    path.write_text(log)
    return kernel, log


def _compile(compilation: Compilation) -> tuple[Any, str]:
    capability = int(compilation.architecture.removeprefix("sm_"))
    options = {
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "enable_fp_fusion": True,
    }
    triton.knobs.nvidia.dump_ptxas_log = True
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        kernel = triton.compile(source_of(compilation), target=GPUTarget("cuda", capability, 32), options=options)
    return kernel, said.getvalue()


def _reason(error: BaseException) -> str:
    """The innermost cause, and the end of what it says: the lines before that quote the kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
