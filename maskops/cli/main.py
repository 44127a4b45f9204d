"""Parses the command line and runs one command."""

import argparse
from collections.abc import Sequence
from typing import cast

import maskops
from maskops.cli import audit, info, report, verify
from maskops.cli.bench import command as bench


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="python -m maskops", description=maskops.__doc__)
    top.add_argument("--version", action="version", version=f"maskops {maskops.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    audit.add_parser(commands)
    bench.add_parser(commands)
    info.add_parser(commands)
    report.add_parser(commands)
    verify.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns the exit status."""
    options = parser().parse_args(arguments)
    return cast(int, options.run(options))
