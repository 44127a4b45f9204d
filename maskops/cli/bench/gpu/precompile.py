"""Compiles what a run will need before it runs, in as many processes as there are processors."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from maskops.cli.bench.contests.contest import step
from maskops.cli.bench.gpu.schedule import Entry


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton's kernels are compiled for the arguments of each launch and put into its cache, but not launched.

    What a launch would have written stays as it was: results mean nothing inside.
    """
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:  # nothing to compile
        yield
        return
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        return original(self, *args, grid=grid, warmup=True, **keywords)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def precompile(entries: Sequence[Entry], part: int, parts: int) -> list[str]:
    """Runs whoever compiles something in every `parts`-th contest once, from number `part` on; what failed, in words.

    Kernels of maskops are compiled only. Peers run: their compilers are torch's.
    """
    failed = []
    for entry in entries[part::parts]:
        torch.compiler.reset()
        contest = entry.make(entry.name)
        for contender in contest.contenders():
            if not contender.compiles:
                continue
            try:
                with without_launches() if contender.ours else contextlib.nullcontext():
                    for backward in (False, True) if contest.differentiated else (False,):
                        renew, run = step(contest, contender, backward)
                        renew()
                        run()
            except Exception as error:  # the run itself will say it again, beside its name
                failed.append(f"{entry.group}: {entry.name}: {contender.name}: {type(error).__name__}: {error}")
    return failed
