"""`python -m maskops info`: what runs here, and if something does not, why not and what repairs it."""

import argparse
import importlib.metadata
import platform

import torch

import maskops
from maskops import extension


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command; it has no options."""
    parser = commands.add_parser("info", help="what runs on this machine and, if not, why not")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints `describe()`."""
    del options
    print(describe())
    return 0


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> str:
    """Backends with their reasons, the extension, versions and threads, as aligned text."""
    reason = extension.reason()
    lines = [
        ("maskops", maskops.__version__),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", _triton()),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("threads", str(torch.get_num_threads())),
        *((f"backend {name}", state) for name, state in maskops.backends().items()),
        ("extension", str(extension.path()) if reason is None else f"not loaded: {reason}"),
    ]
    if reason is None:
        lines.append(("compiler", extension.compiler() or "unknown"))
        lines.append(("CUDA compiler", extension.cuda_compiler() or "none"))
        lines.append(("instruction set", f"{extension.instruction_set()} of {', '.join(extension.instruction_sets())}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
