"""`python -m maskops bench compile`: its options and its exit status."""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

from maskops.cli.bench import machine
from maskops.cli.bench.compilation import budgets, cuda_compiler, workers
from maskops.cli.bench.compilation.report import Report, render
from maskops.cli.bench.compilation.result import Result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    group = parser.add_argument_group("bench compile")
    group.add_argument("--triton", type=Path, metavar="FOLDER", help="take the Triton that was installed into FOLDER")
    group.add_argument("--processes", type=int, metavar="N", help="compilations at a time (default: processors)")
    group.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what was compiled (default: Triton's cache)")
    group.add_argument("--everyday", action="store_true", help="rows of the tuning tables, no variants of features")
    group.add_argument("--without-triton", action="store_true", help="leave the Triton kernels out")
    group.add_argument("--without-cuda", action="store_true", help="leave the .cu files out")


def absent() -> str | None:
    """Why no Triton kernel can be compiled here, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install it with: python -m pip install triton"
    return None


def run(options: argparse.Namespace) -> int:
    """Compiles everything for every architecture; 0 if it is within the budget."""
    began = time.perf_counter()
    processes = options.processes or os.cpu_count() or 1

    def chosen(key: workers.Key) -> bool:
        return options.only in f"{key[0]} {key[1]}"

    def progress(result: Result, done: int = 0, total: int = 0) -> None:
        count = f"{done}/{total} " if total else ""
        took = result.error or f"{result.seconds:.1f} s"
        print(f"{count}{result.architecture} {result.name}: {took}", file=sys.stderr)

    results: list[Result] = []
    triton = "left out" if options.without_triton else "" if options.triton else absent() or ""
    if not triton:
        try:
            triton, results = workers.compile_all(
                chosen,
                everyday=options.everyday,
                environment=workers.environment(options.triton, options.cache),
                processes=processes,
                on_result=progress,
            )
        except workers.WorkerError as error:
            print(f"maskops bench compile: the compiler does not start: {error}", file=sys.stderr)
            return 2
    nvcc = "left out" if options.without_cuda else cuda_compiler.unavailable()
    if nvcc is None:
        nvcc = cuda_compiler.version(cuda_compiler.compiler() or [])
        results += cuda_compiler.compile_all(
            chosen, triton=options.triton, cache=options.cache, processes=processes, on_result=progress
        )
    report = Report(
        triton=triton,
        nvcc=nvcc,
        commit=machine.commit(),
        verdicts=tuple(budgets.judge(results, triton)),
        seconds=time.perf_counter() - began,
    )
    print(render(report), end="")
    if options.json is not None:
        report.write_json(options.json)
        print(f"numbers: {options.json}")
    return 1 if report.problems() else 0
