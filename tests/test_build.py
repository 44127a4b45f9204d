"""The binary and its build: declarations agree with torch's headers, every instruction set runs, nothing leaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import maskops
from maskops import extension, masks
from maskops.ops.attention.registration import Features, filled, operator_arguments
from tests.mutate import MUTATIONS

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"

needs_extension = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))


def test_declarations_agree_with_torch(tmp_path: Path) -> None:
    """Both declare the same extern "C" functions, so a difference in a parameter or a result does not compile."""
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip(f"this torch comes without its headers in {headers}")
    source = tmp_path / "both.cpp"
    source.write_text(
        "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
        "#include <torch/csrc/stable/c/shim.h>\n"
        "#include <torch/headeronly/core/ScalarType.h>\n"
        f'#include "{ROOT / "csrc/torch_abi.h"}"\n'
        "using torch::headeronly::ScalarType;\n"
        "template <ScalarType theirs, maskops::DType ours>\n"
        "constexpr bool same = static_cast<int>(theirs) == static_cast<int>(ours);\n"
        "static_assert(same<ScalarType::Byte, maskops::DType::uint8>);\n"
        "static_assert(same<ScalarType::Int, maskops::DType::int32>);\n"
        "static_assert(same<ScalarType::Long, maskops::DType::int64>);\n"
        "static_assert(same<ScalarType::Half, maskops::DType::float16>);\n"
        "static_assert(same<ScalarType::Float, maskops::DType::float32>);\n"
        "static_assert(same<ScalarType::Double, maskops::DType::float64>);\n"
        "static_assert(same<ScalarType::Bool, maskops::DType::boolean>);\n"
        "static_assert(same<ScalarType::BFloat16, maskops::DType::bfloat16>);\n"
    )
    command = [CXX, "-std=c++17", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{headers}"]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_extension
def test_the_binary_needs_only_torch_and_the_c_library() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    output = subprocess.run(["readelf", "-d", extension.path()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", output))
    assert "libtorch_cpu.so" in needed
    system = ("libtorch_cpu.so", "libstdc++", "libm.so", "libgcc_s", "libc.so", "libc++", "ld-linux")
    assert not [name for name in needed if not name.startswith(system)]


@needs_extension
@pytest.mark.parametrize("name", extension.instruction_sets() or ["none"])
def test_instruction_sets_agree(name: str) -> None:
    """Every set that this processor runs gives the reference's answer, on shapes with every kind of ragged tail."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, width, generator=generator)
        for heads, length, width in ((4, 37, 13), (2, 70, 13), (2, 70, 21))
    )
    mask = masks.causal() & masks.sliding_window(30, 0) & masks.key_padding(torch.tensor([70, 41]))
    in_use = extension.instruction_set()
    assert in_use is not None
    try:
        extension.select_instruction_set(name)
        assert extension.instruction_set() == name
        out = maskops.attention(q, k, v, mask, softcap=5.0, backend="cpu")
    finally:
        extension.select_instruction_set(in_use)
    expected = maskops.attention(q.double(), k.double(), v.double(), mask, softcap=5.0, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"instruction set must be one of those that this machine has .*, got 'vax'"):
        extension.select_instruction_set("vax")


@needs_extension
def test_calls_do_not_leak_tensors() -> None:
    """Inputs and outputs of 1 MiB each would add up to more than 300 MiB if the binary kept a reference to one."""
    resource = pytest.importorskip("resource", reason="the peak of memory is read with the resource module of Unix")

    def step() -> None:
        q = torch.randn(1, 4, 512, 128, requires_grad=True)
        maskops.attention(q, q, q, masks.sliding_window(4, 4)).sum().backward()

    for _ in range(10):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        step()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100 * 2**20


def test_errors_of_the_binary_are_value_errors() -> None:
    if extension.reason() is not None:
        pytest.skip(str(extension.reason()))
    q = torch.randn(1, 2, 16, 8)
    spans = masks.causal().spans(16, 16)
    wrong = spans.tiles.clone()
    wrong[0, 2] += 1  # one row more than there is
    arguments = filled(operator_arguments(spans._replace(tiles=wrong), Features(), "cpu"), q)
    with pytest.raises(ValueError, match="the work list does not cover the rows of q in order"):
        torch.ops.maskops.attention_forward(q, q, q, *arguments)


def run_setup(environment: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A build of a copy of the sources, so that the binary under test stays."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "maskops").mkdir()
    shutil.copy(ROOT / "setup.py", copy)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "NVCC": "", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_reason_is_kept(tmp_path: Path) -> None:
    result = run_setup({"CXX": "no-such-compiler"}, tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "copy/maskops/_build_report.json").read_text())
    assert report["reason"].startswith("no C++ compiler (looked for no-such-compiler)")
    assert not (tmp_path / "copy/maskops/_native.so").exists()


def test_a_required_build_fails_without_a_compiler(tmp_path: Path) -> None:
    result = run_setup({"CXX": "no-such-compiler", "MASKOPS_BUILD": "require"}, tmp_path)
    assert result.returncode != 0
    assert "maskops: the C++ extension was not built: no C++ compiler" in result.stderr


def test_a_build_can_be_left_out(tmp_path: Path) -> None:
    assert run_setup({"MASKOPS_BUILD": "skip"}, tmp_path).returncode == 0
    reason = json.loads((tmp_path / "copy/maskops/_build_report.json").read_text())["reason"]
    assert reason == "the build was told to leave it out (MASKOPS_BUILD=skip)"


def run_in_setup(code: str, tmp_path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs code beside a setup.py that tells its version."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    command = [sys.executable, "-c", f"import sys; sys.argv = ['setup.py', '--version']; import setup; {code}"]
    return subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("cxx", "expected"),
    [
        ("", "[]"),
        ("clang++-18", "['-ccbin', 'clang++-18']"),
        ("/usr/bin/ccache /opt/bin/g++ -m64", "['-ccbin', '/opt/bin/g++', '-Xcompiler=-m64']"),
    ],
)
def test_nvcc_takes_the_compiler_that_was_chosen(tmp_path: Path, cxx: str, expected: str) -> None:
    result = run_in_setup("print(setup.host_compiler())", tmp_path, {"CXX": cxx})
    assert result.stdout.splitlines()[-1] == expected, result.stderr


def test_the_chosen_compiler_stands_in_the_graph(tmp_path: Path) -> None:
    code = "print(setup.ninja_graph(setup.Path('a.so'), setup.Path('build'), [sys.executable, '-c', '']))"
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    (tmp_path / "csrc/cuda/kernel.cu").touch()
    compiler = Path(CXX.split()[-1] if "/" in CXX else str(shutil.which(CXX)))
    result = run_in_setup(code, tmp_path, {"CXX": str(compiler)})
    (line,) = [line for line in result.stdout.splitlines() if "$in" in line and "-gencode" in line]
    assert f"-ccbin {compiler}" in line, result.stderr


def test_nothing_is_built_on_windows(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "maskops").mkdir()
    code = (
        "import platform, runpy, sys; platform.system = lambda: 'Windows'; "
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reason = json.loads((tmp_path / "maskops/_build_report.json").read_text())["reason"]
    assert reason.startswith("it is not built on Windows; there the backend triton serves CUDA tensors")


def fake_nvcc(tmp_path: Path, version: str) -> str:
    """A CUDA compiler that names itself and then fails."""
    command = tmp_path / "nvcc"
    command.write_text(
        f"#!/bin/sh\n[ \"$1\" = --version ] && echo '{version}' && exit 0\necho no such card >&2\nexit 1\n"
    )
    command.chmod(0o755)
    return str(command)


def fake_compiler(tmp_path: Path) -> str:
    """A C++ compiler whose every output is empty, with the list of what it has read that ninja asks for."""
    command = tmp_path / "c++"
    command.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do case "$1" in\n'
        '-o) : > "$2";;\n-MF) echo "${2%.d}:" > "$2";;\n--version) echo "a compiler of nothing";;\nesac; shift; done\n'
    )
    command.chmod(0o755)
    return str(command)


def test_without_nvcc_the_reason_is_kept(tmp_path: Path) -> None:
    environment = {"CXX": "no-such-compiler", "NVCC": str(tmp_path / "no-such-nvcc")}
    assert run_setup(environment, tmp_path).returncode == 0
    code = "import sys; sys.argv = ['setup.py', '--version']; import setup; print(setup.sources(False)); setup.nvcc()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "copy",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert "no CUDA compiler (looked for " in result.stderr and "absent.cpp" in result.stdout
    assert "ops/cuda" not in result.stdout


def test_kernels_of_cuda_are_required_where_nvcc_is(tmp_path: Path) -> None:
    """One that fails must not be passed over under MASKOPS_BUILD=require."""
    nvcc = fake_nvcc(tmp_path, "release 13.0, V13.0.88")
    result = run_setup({"NVCC": nvcc, "MASKOPS_BUILD": "require", "CXX": fake_compiler(tmp_path)}, tmp_path)
    assert result.returncode != 0 and "the compiler failed" in result.stderr and "no such card" in result.stderr


def test_an_older_torch_stops_the_build(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "torch-2.4.1+cpu.dist-info").mkdir(parents=True)
    result = run_setup({"PYTHONPATH": str(site)}, tmp_path)
    assert result.returncode != 0
    assert f"maskops needs torch >= 2.10, but {site} has torch 2.4.1+cpu: upgrade torch first" in result.stderr


@needs_extension
def test_the_wheel_is_for_every_python(tmp_path: Path) -> None:
    """Tag py3-none-<platform>, with the binary, the build report and the marker of types inside.

    Nothing is compiled, which `make package` does: the compiler writes empty files. An nvcc that is too old is as good
    as none here, also where a build is required.
    """
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "__pycache__", "*.egg-info", "results")
    shutil.copytree(ROOT, copy, ignore=ignore)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path / "dist")]
    nvcc = fake_nvcc(tmp_path, "release 11.8, V11.8.89")
    environment = {**os.environ, "CXX": fake_compiler(tmp_path), "NVCC": nvcc, "MASKOPS_BUILD": "require"}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.fullmatch(r"torch_maskops-[\d.]+-py3-none-.+\.whl", wheel.name), wheel.name
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert "maskops/_native.so" in names and "maskops/_build_report.json" in names and "maskops/masks.py" in names
    assert "maskops/py.typed" in names  # without it a type checker ignores the annotations
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]
    report = json.loads(archive.read("maskops/_build_report.json"))
    assert report["compiler"] == "a compiler of nothing" and "expected 12.0 or newer" in report["cuda_reason"]


def test_every_mutation_still_applies() -> None:
    """A mutation whose text is gone from the sources would silently test nothing."""
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, mutation.name
