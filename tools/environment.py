"""Makes the development environment: `python3 -m tools.environment`, which `make` runs when it has to.

A virtual environment, torch, and this package with its extension built in place. A torch that the Python at hand
already has is reused and nothing is downloaded for it. Everything that has to be there is checked first, and what is
missing is reported with the one command that repairs it.

Environment variables: TORCH, a requirement (or options for pip) that replaces the choice of torch; VENV, the folder of
the environment; CXX, the compiler.
"""

# This file is the first thing that runs, so that it has to parse on a Python that is too old for everything else.
from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
TORCH = "torch==2.13.0"
COMPILERS = ("g++", "clang++", "c++")
GIGABYTES = {"torch": 6.0, "tools": 2.0}
"""Free disk that an installation needs, with and without a torch to download (a build for CUDA is the large case)."""


class MissingError(Exception):
    """Something that has to be installed first; the message ends with the command that does it."""


def main() -> int:
    """Checks, then brings the environment up to date."""
    try:
        prepare(Path(os.environ.get("VENV") or ROOT / ".venv"), os.environ.get("TORCH") or None)
    except MissingError as missing:
        print(f"maskops: {missing}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"maskops: this command failed: {shlex.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    return 0


def prepare(venv: Path, requirement: str | None) -> None:
    """Makes `venv` hold torch, this package in place and its tools, and marks it as ready.

    Args:
        venv: Folder of the virtual environment.
        requirement: What to install as torch; by default the torch that this Python has, else `TORCH`.
    """
    check_python()
    check_compiler()
    reused = None if requirement else torch_here()
    stamp = venv / "ready"
    wanted = fingerprint(reused, requirement)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        # Only the sources of the extension changed.
        run([python, "setup.py", "--quiet", "build_ext", "--inplace"], False, **build_options())
        stamp.touch()
        return
    check_disk(venv, GIGABYTES["tools"] if reused else GIGABYTES["torch"])
    print(f"maskops: preparing {venv} (once)", flush=True)
    run([sys.executable, "-m", "venv", "--clear", venv])
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if reused:
        version, folder = reused
        print(f"maskops: using torch {version} from {folder}", flush=True)
        site = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture=True)
        # Not --system-site-packages: a Python that is itself a virtual environment would not pass its packages on.
        Path(site.strip(), "torch_of_the_base_python.pth").write_text(folder + "\n")
    else:
        print(f"maskops: installing {requirement or TORCH}", flush=True)
        run([*pip, *shlex.split(requirement or TORCH)])
    print("maskops: building the extension and installing the tools", flush=True)
    run([*pip, "--editable", f"{ROOT}[bench,dev]"], False, **build_options())
    stamp.write_text(wanted)


def build_options() -> dict[str, str]:
    """For a build in place. Without a GPU the CUDA kernels run as host code alone, which spares the minutes of nvcc."""
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    spared = {} if has_driver or "NVCC" in os.environ else {"NVCC": ""}
    return {"MASKOPS_BUILD": "require", **spared}


def check_python() -> None:
    """Refuses a Python that is too old or that cannot make virtual environments."""
    if sys.version_info < OLDEST_PYTHON:
        names = (f"python3.{minor}" for minor in range(14, 9, -1))
        newer = next((name for name in names if shutil.which(name)), None)
        repair = f"make PYTHON={newer}" if newer else install("python3.12", brew="python@3.12")
        raise MissingError(f"Python {platform.python_version()} is too old, 3.10 is needed: {repair}")
    try:
        import ensurepip
        import venv
    except ImportError:
        repair = install(f"python3.{sys.version_info[1]}-venv", dnf="python3-pip")
        raise MissingError(f"this Python cannot make virtual environments: {repair}") from None
    del ensurepip, venv


def check_compiler() -> None:
    """Refuses a machine without a C++ compiler."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else list(COMPILERS)
    if not any(shutil.which(name) for name in names):
        repair = (
            "xcode-select --install" if platform.system() == "Darwin" else install("g++", dnf="gcc-c++", pacman="gcc")
        )
        raise MissingError(f"no C++ compiler (looked for {', '.join(names)}): {repair}")


def check_disk(venv: Path, gigabytes: float) -> None:
    """Refuses a disk on which the installation would end half-way."""
    folder = next(parent for parent in (venv.resolve(), *venv.resolve().parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise MissingError(
            f"{folder} has {free:.1f} GB free, {gigabytes:.1f} are needed: make VENV=/a/larger/disk/venv"
        )


def install(package: str, **other: str) -> str:
    """The command by which this machine's package manager installs something."""
    commands = {
        "apt-get": "sudo apt-get install -y",
        "dnf": "sudo dnf install -y",
        "pacman": "sudo pacman -S --noconfirm",
        "zypper": "sudo zypper install -y",
        "apk": "sudo apk add",
        "brew": "brew install",
    }
    manager = next((name for name in commands if shutil.which(name)), "apt-get")
    return f"{commands[manager]} {other.get(manager, package)}"


def torch_here() -> tuple[str, str] | None:
    """Version and folder of the torch that this Python has, if it is new enough."""
    code = "import json, os, torch; print(json.dumps([torch.__version__, os.path.dirname(torch.__path__[0])]))"
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if result.returncode != 0:
        return None
    version, folder = json.loads(result.stdout.splitlines()[-1])
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return (version, folder) if numbers >= OLDEST_TORCH else None


def fingerprint(reused: tuple[str, str] | None, requirement: str | None) -> str:
    """Changes when the environment has to be made again; not when only a source of the extension did."""
    declared = (ROOT / "pyproject.toml").read_bytes()
    content = json.dumps([sys.executable, platform.python_version(), reused, requirement, str(ROOT)]).encode()
    return hashlib.sha256(declared + content).hexdigest() + "\n"


def run(command: list[object], capture: bool = False, **environment: str) -> str:
    """Runs a command in the root of the checkout; subprocess.CalledProcessError if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        check=True,
        cwd=str(ROOT),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    return result.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
