"""`python -m tools.package`: builds the wheel as a user would and proves that it works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tools.environment import ROOT

NEEDED = ("maskops/__init__.py", "maskops/_native.so", "maskops/_build_report.json", "maskops/cli/bench/command.py")
FOREIGN = ("tests", "tools", "benchmarks", "csrc", "examples", "fuzz")
PROOF = """
import torch, maskops
from maskops import extension, masks
assert extension.reason() is None, extension.reason()
q = torch.randn(2, 2, 5, 8)
out = maskops.attention(q, q, q, masks.padding(torch.tensor([5, 3])) & masks.causal(), backend="cpu")
assert out.isfinite().all() and (out[1, :, 3:] == 0).all()
print("the installed package works:", maskops.__file__)
"""


def main() -> int:
    """Builds in isolation, looks into the wheel, installs it elsewhere and calls it."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        problems = inspect(wheel)
        if not problems:
            prove(wheel, Path(folder))
    for problem in problems:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def build(folder: Path) -> Path:
    """One wheel through `python -m build`, which builds from the source distribution that it makes first.

    Compiled with -O0 unless CXXFLAGS says otherwise: what is in the wheel is looked at, not how fast it is.
    """
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    environment = {"CXXFLAGS": "-O0", **os.environ, "MASKOPS_BUILD": "require"}
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def inspect(wheel: Path) -> list[str]:
    """What is wrong with the wheel's name and contents."""
    names = zipfile.ZipFile(wheel).namelist()
    problems = [f"{needed} is missing" for needed in NEEDED if needed not in names]
    problems += [f"{name} does not belong into it" for name in names if name.split("/")[0] in FOREIGN]
    if "-py3-none-" not in wheel.name:
        problems.append("is not a py3-none wheel: one has to do for every Python")
    return problems


def prove(wheel: Path, folder: Path) -> None:
    """Calls the package from the unpacked wheel, in another directory, with this interpreter's torch."""
    installed = folder / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True)
    # The checkout is installed in place here, so that only a folder that comes first shows the wheel's own files.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = f"{PROOF}\nassert maskops.__file__.startswith({str(installed)!r}), maskops.__file__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    sys.exit(main())
