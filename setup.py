"""Build of the C++ extension: one ninja graph, no torch. Everything else about the package is in pyproject.toml.

MASKOPS_BUILD: "auto" (default) installs without the extension when it cannot be built and keeps the reason for
`python -m maskops info`; "require" makes that an error; "skip" does not try.

The CUDA kernels are part of the same graph where there is nvcc (NVCC, else that of CUDA_HOME, CUDA_PATH or PATH; an
empty NVCC leaves them out); where CXX is set, nvcc takes it as its host compiler, too. They are never required:
"require" only makes it an error when nvcc is there and fails.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MINIMUM_TORCH = (2, 10)
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra"

OLDEST_NVCC = 12
# Code for the cards that the kernels are tuned for, sm_90a for its clusters; PTX, which the driver compiles, for those
# that are older (from 7.5 on) and newer.
ARCHITECTURES = (
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a "
    "-gencode arch=compute_75,code=compute_75 -gencode arch=compute_90,code=compute_90"
)
NVCC_FLAGS = f"-std=c++17 -O3 {ARCHITECTURES} -Xfatbin=-compress-all -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
CUDA_FOLDERS = ("cuda", "ops/cuda")  # of csrc
CUDA_STAND_IN = "cuda/absent.cpp"  # what a binary without CUDA kernels has instead of them


def refuse_an_older_torch() -> None:
    """Stop before pip would replace a torch that is too old; an isolated build sees it in the outer environment."""
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        for info in Path(site or ".").glob("torch-*.dist-info"):
            version = info.name.removeprefix("torch-").removesuffix(".dist-info")
            if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
                sys.exit(f"maskops needs torch >= 2.10, but {site} has torch {version}: upgrade torch first")


def compiler() -> str:
    """The C++ compiler, or a RuntimeError with the reason why there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if shutil.which(name.split()[0]):
            return name
    raise RuntimeError(f"no C++ compiler (looked for {', '.join(names)}); install one, e.g. g++, or set CXX")


def nvcc() -> list[str]:
    """The CUDA compiler as a command, or a RuntimeError with the reason why there is none that can be used."""
    wanted = os.environ.get("NVCC")
    if wanted is not None and not wanted.strip():
        raise RuntimeError("the build was told to leave them out (NVCC is empty)")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [wanted] if wanted else [*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            version = nvcc_version(command)
            release = re.search(r"release (\d+)", version)
            if release is None or int(release[1]) < OLDEST_NVCC:
                raise RuntimeError(
                    f"{candidate} is {version or 'not a CUDA compiler'}: expected {OLDEST_NVCC}.0 or newer"
                )
            return command
    raise RuntimeError(f"no CUDA compiler (looked for {', '.join(candidates)}); install nvcc, or set CUDA_HOME")


def host_compiler() -> list[str]:
    """Options that make nvcc compile with CXX where that is set; without it nvcc takes the gcc of the PATH."""
    words = shlex.split(os.environ.get("CXX", ""))
    if words and Path(words[0]).stem in ("ccache", "distcc", "sccache"):
        words = words[1:]
    # What is behind the name of the compiler is passed on to it as it is.
    options = [f"-Xcompiler={word}" for word in words[1:]]
    return ["-ccbin", words[0], *options] if words else []


def nvcc_version(command: list[str]) -> str:
    """The line with the release in what nvcc says of itself."""
    printed = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return next((line for line in printed.splitlines() if "release" in line), "")


def cuda_libraries(command: list[str]) -> str:
    """Options of the linker that find the static CUDA runtime; nvcc itself may be a script that lies elsewhere."""
    plan = subprocess.run([*command, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    folders = re.findall(r"^#\$ LIBRARIES=(.*)$", plan.stderr + plan.stdout, re.M)
    # Its symbols stay inside the binary: torch has a CUDA runtime of its own.
    hidden = "-Wl,--exclude-libs,libcudart_static.a -Wl,--as-needed"
    return f"{' '.join(folders)} {hidden} -lcudart_static -ldl -lrt -lpthread"


def ninja_graph(output: Path, build: Path, cuda: list[str] | None) -> str:
    """The build.ninja of the extension, with the CUDA kernels where the command of their compiler is given.

    It links against an empty library that only carries the name of libtorch_cpu: torch loads its own copy locally, so
    that undefined symbols without this dependency would not be found at run time.
    """
    mac = platform.system() == "Darwin"
    cuda = [*cuda, *host_compiler()] if cuda else None
    stub = build / "libtorch_cpu.so"
    link = "-undefined dynamic_lookup" if mac else f"-L{build} -Wl,--no-as-needed -ltorch_cpu -lm"
    lines = [
        f"cxx = {compiler()}",
        f"flags = {FLAGS} -Wno-psabi {os.environ.get('CXXFLAGS', '')}",
        "rule compile\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared $objects -o $out {link} {cuda_libraries(cuda) if cuda else ''}",
        "rule stub\n  command = $cxx -shared -x c++ /dev/null -Wl,-soname,libtorch_cpu.so -o $out",
    ]
    if cuda:
        compile_cuda = f"{shlex.join(cuda)} {NVCC_FLAGS} -MMD -MF $out.d -c $in -o $out"
        lines.append(f"rule compile_cuda\n  command = {compile_cuda}\n  depfile = $out.d\n  deps = gcc")
    objects = []
    for source, rule in sources(cuda is not None):
        objects.append(build / source.relative_to(ROOT).with_suffix(".cu.o" if source.suffix == ".cu" else ".o"))
        lines.append(f"build {objects[-1]}: {rule} {source.resolve()}")
    if not objects:
        raise RuntimeError("csrc holds no C++ source: this source distribution is incomplete")
    names = " ".join(map(str, objects))
    lines += [f"build {output}: link {names}{'' if mac else f' | {stub}'}", f"  objects = {names}"]
    if not mac:
        lines.append(f"build {stub}: stub")
    return "\n".join(lines) + "\n"


def sources(with_cuda: bool) -> list[tuple[Path, str]]:
    """The sources and the rule for each: first the CUDA kernels, then those of processors, which take longest."""
    root = ROOT / "csrc"
    stand_in = root / CUDA_STAND_IN
    of_cuda = [path for folder in CUDA_FOLDERS for path in (root / folder).glob("*.cpp") if path != stand_in]
    everywhere = [path for path in sorted(root.rglob("*.cpp")) if path not in of_cuda and path != stand_in]
    everywhere.sort(key=lambda path: not path.name.startswith("isa_"))
    if not with_cuda:
        return [(path, "compile") for path in [*everywhere, stand_in] if path.exists()]
    kernels = sorted((root / "cuda").glob("*.cu"))
    return [
        *((path, "compile_cuda") for path in kernels),
        *((path, "compile") for path in [*sorted(of_cuda), *everywhere]),
    ]


class NinjaBuild(build_ext):
    """Builds maskops/_native.so and writes maskops/_build_report.json beside it: what was built, or why not."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        mode = os.environ.get("MASKOPS_BUILD", "auto")
        if mode not in ("auto", "require", "skip"):
            sys.exit(f"MASKOPS_BUILD must be auto, require or skip, got {mode!r}")
        output = Path(self.get_ext_fullpath("maskops._native")).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        report: dict[str, str | None] = {"compiler": None, "reason": None, "nvcc": None, "cuda_reason": None}
        try:
            if platform.system() == "Windows":
                raise RuntimeError(
                    "it is not built on Windows; there the backend triton serves CUDA tensors where Triton is "
                    "installed, and reference everything else"
                )
            if mode == "skip":
                raise RuntimeError("the build was told to leave it out (MASKOPS_BUILD=skip)")
            try:
                cuda = nvcc()
            except RuntimeError as missing:
                report["compiler"] = self.compile(output, None)
                report["cuda_reason"] = str(missing)
            else:
                report |= self.compile_with_cuda(output, cuda, is_required=mode == "require")
        except (RuntimeError, OSError) as error:
            if mode == "require":
                sys.exit(f"maskops: the C++ extension was not built: {error}")
            report["reason"] = str(error)
            output.unlink(missing_ok=True)  # an older binary would be worse than none
            print(f"maskops: installing without the C++ extension: {error}", file=sys.stderr)
        output.with_name("_build_report.json").write_text(json.dumps(report, indent=1) + "\n")

    def compile_with_cuda(self, output: Path, cuda: list[str], is_required: bool) -> dict[str, str | None]:
        """Builds with the CUDA kernels; without them where they fail and need not be there. Entries of the report."""
        try:
            return {"compiler": self.compile(output, cuda), "nvcc": nvcc_version(cuda)}
        except RuntimeError as error:
            if is_required:
                raise
            print(f"maskops: building without the CUDA kernels: {error}", file=sys.stderr)
            return {"compiler": self.compile(output, None), "cuda_reason": f"with {nvcc_version(cuda)} {error}"}

    def compile(self, output: Path, cuda: list[str] | None) -> str:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_graph(output, build, cuda))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        result = subprocess.run([*ninja, "-C", str(build)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"the compiler failed:\n{result.stdout[-4000:]}")
        version = subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True).stdout
        return version.splitlines()[0] if version else compiler()

    def get_outputs(self) -> list[str]:
        output = Path(self.get_ext_fullpath("maskops._native"))
        report = output.with_name("_build_report.json")
        return [str(path) for path in (output, report) if path.exists()]


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the extension is loaded by torch and knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


refuse_an_older_torch()
setup(
    ext_modules=[Extension("maskops._native", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": PlatformWheel},
)
