"""Build of the C++ extension: one ninja graph, no torch. Everything else about the package is in pyproject.toml.

MASKOPS_BUILD: "auto" (default) installs without the extension when it cannot be built and keeps the reason for
`python -m maskops info`; "require" makes that an error; "skip" does not try.
"""

import importlib.util
import json
import os
import platform
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


def ninja_graph(output: Path, build: Path) -> str:
    """The build.ninja of the extension.

    It links against an empty library that only carries the name of libtorch_cpu: torch loads its own copy locally, so
    that undefined symbols without this dependency would not be found at run time.
    """
    mac = platform.system() == "Darwin"
    stub = build / "libtorch_cpu.so"
    link = "-undefined dynamic_lookup" if mac else f"-L{build} -Wl,--no-as-needed -ltorch_cpu -lm"
    lines = [
        f"cxx = {compiler()}",
        f"flags = {FLAGS} -Wno-psabi {os.environ.get('CXXFLAGS', '')}",
        "rule compile\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared $objects -o $out {link}",
        "rule stub\n  command = $cxx -shared -x c++ /dev/null -Wl,-soname,libtorch_cpu.so -o $out",
    ]
    objects = []
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        objects.append(build / source.relative_to(ROOT).with_suffix(".o"))
        lines.append(f"build {objects[-1]}: compile {source.resolve()}")
    if not objects:
        raise RuntimeError("csrc holds no C++ source: this source distribution is incomplete")
    names = " ".join(map(str, objects))
    lines += [f"build {output}: link {names}{'' if mac else f' | {stub}'}", f"  objects = {names}"]
    if not mac:
        lines.append(f"build {stub}: stub")
    return "\n".join(lines) + "\n"


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
        report: dict[str, str | None] = {"compiler": None, "reason": None}
        try:
            if mode == "skip":
                raise RuntimeError("the build was told to leave it out (MASKOPS_BUILD=skip)")
            report["compiler"] = self.compile(output)
        except (RuntimeError, OSError) as error:
            if mode == "require":
                sys.exit(f"maskops: the C++ extension was not built: {error}")
            report["reason"] = str(error)
            output.unlink(missing_ok=True)  # an older binary would be worse than none
            print(f"maskops: installing without the C++ extension: {error}", file=sys.stderr)
        output.with_name("_build_report.json").write_text(json.dumps(report, indent=1) + "\n")

    def compile(self, output: Path) -> str:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_graph(output, build))
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
