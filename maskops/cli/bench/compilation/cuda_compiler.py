"""Compiles the .cu files of the checkout with nvcc, and reads registers, spills and loops of every kernel in them."""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import maskops
from maskops.cli.bench.compilation import sass
from maskops.cli.bench.compilation.result import Result, from_json

SOURCES = Path(maskops.__file__).parent.parent / "csrc"
ARCHITECTURES = {"sm_80": "sm_80", "sm_90": "sm_90a"}
"""Names of the tuning tables and of nvcc; the letter allows what only this architecture has."""

FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v", "-cubin")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NOTE = re.compile(r"\(C75\d\d\)[^\n]*")


def unavailable() -> str | None:
    """Why no .cu file can be compiled here, None if they can."""
    if not sources():
        return "no .cu files here (they are in the repository, not in an installed package)"
    if compiler() is None:
        return "not here (looked for NVCC, and in CUDA_HOME, CUDA_PATH and PATH)"
    return None


def sources() -> list[Path]:
    """The .cu files of the checkout."""
    return sorted(SOURCES.glob("cuda/*.cu"))


def compiler() -> list[str] | None:
    """nvcc as a command: NVCC, else that of CUDA_HOME, CUDA_PATH or PATH; an empty NVCC leaves it out."""
    wanted = os.environ.get("NVCC")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [*(shutil.which("nvcc", path=f"{home}/bin") for home in homes), shutil.which("nvcc")]
    candidates = [path for path in found if path] if wanted is None else [wanted]
    command = shlex.split(candidates[0]) if candidates else []
    return command if command and shutil.which(command[0]) else None


def version(nvcc: list[str]) -> str:
    """Of nvcc."""
    output = subprocess.run([*nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", output)
    return found.group(1) if found else "unknown"


def disassembler(nvcc: list[str], triton: Path | None) -> str | None:
    """Path of nvdisasm: the one beside nvcc, else that of a Triton; there may be none."""
    beside = shutil.which("nvdisasm", path=str(Path(str(shutil.which(nvcc[0]))).resolve().parent))
    if beside or shutil.which("nvdisasm"):
        return beside or shutil.which("nvdisasm")
    if triton is not None:
        folder = triton / "triton"
    else:
        found = importlib.util.find_spec("triton")
        if found is None or found.origin is None:
            return None
        folder = Path(found.origin).parent
    return shutil.which("nvdisasm", path=str(folder / "backends" / "nvidia" / "bin"))


def compile_all(
    chosen: Callable[[tuple[str, str]], bool],
    *,
    triton: Path | None,
    cache: Path | None,
    processes: int,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Compiles every .cu file for every architecture.

    Args:
        chosen: Takes the architecture and the name of a kernel, ``<file>: <kernel>``.
        triton: Folder of a Triton whose disassembler may be used.
        cache: Where results are kept between runs.
        processes: Compilations at a time.
        on_result: Called with each result.
    """
    nvcc = compiler()
    assert nvcc is not None
    nvdisasm = disassembler(nvcc, triton)
    tasks = [(path, architecture) for path in sources() for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(processes) as pool:
        found = pool.map(lambda task: _compile(task[0], task[1], nvcc, nvdisasm, cache), tasks)
        results = []
        for of_file in found:
            for result in of_file:
                if chosen((result.architecture, result.name)):
                    results.append(result)
                    on_result(result)
    return results


def _compile(path: Path, architecture: str, nvcc: list[str], nvdisasm: str | None, cache: Path | None) -> list[Result]:
    name = f"{path.stem}-{architecture}-{_fingerprint(path, nvcc, nvdisasm)}.json"
    kept = None if cache is None else cache / "nvcc" / name
    if kept is not None and kept.exists():
        return [from_json(values) for values in json.loads(kept.read_text())]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.cubin")
        target = ARCHITECTURES[architecture]
        command = [*nvcc, *FLAGS, f"-arch={target}", f"-I{SOURCES}", str(path), "-o", str(binary)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            lines = [line for line in ran.stderr.splitlines() if "error" in line] or ran.stderr.splitlines()
            error = f"nvcc: {lines[0] if lines else ran.returncode}"[:300]
            return [Result(path.name, architecture, f"csrc/cuda/{path.name}", error=error)]
        results = _read(path, architecture, ran.stderr, _disassemble(nvdisasm, binary), time.perf_counter() - began)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([{**result.as_json(), "seconds": 0.0} for result in results]))
    return results


def _read(path: Path, architecture: str, log: str, functions: dict[str, sass.Function], seconds: float) -> list[Result]:
    _, *parts = _ENTRY.split(log)
    mangled, texts = parts[::2], parts[1::2]
    results = []
    for name, plain, text in zip(mangled, _demangle(mangled), texts, strict=True):
        frames = _FRAME.findall(text)
        function = functions.get(name, sass.Function())
        results.append(
            Result(
                name=f"{path.name}: {plain}",
                architecture=architecture,
                source=f"csrc/cuda/{path.name}",
                registers=max(map(int, _REGISTERS.findall(text)), default=0),
                shared=max(map(int, _SHARED.findall(text)), default=0),
                spill_stores=sum(int(stores) for stores, _ in frames),
                spill_loads=sum(int(loads) for _, loads in frames),
                notes=tuple(dict.fromkeys(_NOTE.findall(text))),
                loops=tuple(sass.hot_loops(function)),
                instructions=len(function.instructions),
                seconds=seconds / len(mangled),
            )
        )
    return results


def _disassemble(nvdisasm: str | None, binary: Path) -> dict[str, sass.Function]:
    if nvdisasm is None:
        return {}
    # A disassembler that is older than nvcc refuses its binaries; registers and spills are known without it.
    ran = subprocess.run([nvdisasm, "-c", str(binary)], capture_output=True, text=True)
    return sass.functions(ran.stdout) if ran.returncode == 0 else {}


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    output = subprocess.run([tool], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    return [_short(line) for line in output.splitlines()]


def _short(declaration: str) -> str:
    """A kernel's name and template arguments without its type, namespaces and parameters."""
    text = re.sub(r"\(anonymous namespace\)::|\bmaskops::|\bvoid |\((int|bool|unsigned int|long)\)", "", declaration)
    depth = 0
    for position, character in enumerate(text):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return text[:position]
    return text


def _fingerprint(path: Path, nvcc: list[str], nvdisasm: str | None) -> str:
    content = hashlib.sha256(json.dumps([version(nvcc), nvdisasm, FLAGS, ARCHITECTURES]).encode())
    headers = (*SOURCES.glob("*.h"), *SOURCES.glob("cuda/*.h"), *SOURCES.glob("cuda/*.cuh"))
    for part in (path, *sorted(headers), Path(__file__), Path(sass.__file__)):
        content.update(part.read_bytes())
    return content.hexdigest()[:16]
