"""`python -m tools.instruction_sets`: every instruction set, against float64 and against one another.

The binary's own are those of this processor. NEON comes from a build without torch for 64-bit ARM, by the system's
cross compiler (aarch64-linux-gnu-g++, or AARCH64_CXX), under QEMU (qemu-aarch64-static, or QEMU_AARCH64). Where one of
them is missing, a line says that NEON is not compiled, or not run. All compute the works of
``tools/instruction_cases.py``.

What is allowed is ``maskops.testing.error_budget``: twice the error of plain PyTorch in the same dtype and four
roundings of the largest result. Two instruction sets add the same numbers in another order, so that the same bound
holds for what lies between them.

``--prove`` shows that nothing goes unnoticed: one kernel after the other does nothing, and lines of the vectors' layer
are changed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from maskops import extension, testing
from maskops.testing import error_budget
from tools.instruction_cases import Results, Run, Work, works
from tools.instrument import ROOT
from tools.processor import PLACE, Machine, Processor, cross_compiler, emulator, start_build

OF_X86 = ("baseline", "avx2", "avx512")


class Problem(NamedTuple):
    """A piece of work in a dtype, and what it should give.

    Attributes:
        work: the work.
        dtype: the dtype.
        oracle: the results in float64.
        plain: the results of the reference in the dtype.
    """

    work: Work
    dtype: torch.dtype
    oracle: Results
    plain: Results

    def compute(self) -> Results:
        """The results of the kernels in use."""
        return self.work.compute(Run(self.dtype, self.dtype, "cpu"))

    def __str__(self) -> str:
        return f"{self.work.op}, {self.work.name}, {str(self.dtype).removeprefix('torch.')}"


class Difference(NamedTuple):
    """How far a result is from what it should be.

    Attributes:
        result: its name.
        error: from float64, as a share of what is allowed.
        apart: from another instruction set, as a share of the same.
        roundings: the latter in roundings of the largest result.
    """

    result: str
    error: float
    apart: float
    roundings: float


def problem_of(work: Work, dtype: torch.dtype) -> Problem:
    """A piece of work with its truth."""
    oracle = work.compute(Run(dtype, torch.float64, "reference"))
    return Problem(work, dtype, oracle, work.compute(Run(dtype, dtype, "reference")))


def compare(problem: Problem, found: Results, others: Results) -> Iterator[Difference]:
    """Each result against float64 and against that of another instruction set."""
    gradients = [x for name, x in problem.oracle.items() if name.startswith("gradient")]
    largest = max((float(x.abs().max()) for x in gradients if x.numel()), default=0.0)
    eps = torch.finfo(problem.dtype).eps
    for name, oracle in problem.oracle.items():
        if not oracle.is_floating_point():
            is_equal = torch.equal(found[name], oracle)
            yield Difference(name, 0.0 if is_equal else float("inf"), 0.0, 0.0)
            continue
        finite = oracle.isfinite()
        own = float(oracle[finite].abs().max()) if finite.any() else 0.0
        size = largest if name.startswith("gradient") else own
        magnitude = max(own, size * problem.work.growth.get(name, 1.0))
        budget = error_budget(found[name], problem.plain[name], oracle, problem.dtype, magnitude)
        apart = error_budget(found[name], problem.plain[name], others[name].double(), problem.dtype, magnitude).error
        limit = max(budget.limit, 1e-30)
        yield Difference(name, budget.error / limit, apart / limit, apart / max(eps * magnitude, 1e-30))


class Verdict:
    """What one instruction set got wrong, and how far its worst results are off, by op."""

    def __init__(self, name: str, other: str) -> None:
        self._name, self._other = name, other
        self._worst: dict[str, list[Difference]] = {}
        self.wrong: list[str] = []

    def add(self, problem: Problem, found: Results, others: Results) -> None:
        """Counts the results of a problem."""
        for difference in compare(problem, found, others):
            self._worst.setdefault(problem.work.op, []).append(difference)
            if not (difference.error <= 1.0 and difference.apart <= 1.0):
                self.wrong.append(
                    f"{self._name}: {problem}: {difference.result} is off by {difference.error:.3g} of what is allowed,"
                    f" and {difference.apart:.3g} from {self._other}"
                )

    def __str__(self) -> str:
        lines = []
        for op, differences in self._worst.items():
            error = max(difference.error for difference in differences)
            roundings = max(difference.roundings for difference in differences)
            lines.append(
                f"{self._name:8s} {op:20s} {len(differences):4d} results, at worst {error:.2f} of the allowed error, "
                f"{roundings:.1f} roundings from {self._other}"
            )
        return "\n".join(lines)


def poisoned(name: str) -> list[str]:
    """What NaN in places that nobody may read does to attention with the kernels in use."""
    reports = [
        testing.check(testing.attention_on("cpu", case), case, parts=("poison",))
        for case in testing.cases("attention", features=True)
    ]
    return [f"{name}: {report}" for report in reports if not report.passed]


def check(name: str, problems: list[Problem], other: str, others: list[Results]) -> list[str]:
    """Runs the kernels in use on all problems; prints a line an op, returns what is wrong."""
    verdict = Verdict(name, other)
    for problem, found_there in zip(problems, others, strict=True):
        verdict.add(problem, problem.compute(), found_there)
    print(verdict, flush=True)
    return verdict.wrong + poisoned(name)


@contextlib.contextmanager
def selected(instruction_set: str) -> Iterator[None]:
    """The kernels of one instruction set of this processor."""
    before = extension.instruction_set()
    extension.select_instruction_set(instruction_set)
    try:
        yield
    finally:
        extension.select_instruction_set(str(before))


def aarch64() -> Machine:
    """64-bit ARM, as far as it can be had here; RuntimeError where nothing compiles for it."""
    return Machine("aarch64", cross_compiler(), emulator())


def compare_all() -> int:
    """Everything that this machine can run; 1 where something is wrong."""
    begin = time.monotonic()
    here = extension.instruction_sets()
    build = None
    machine: Machine | None = None
    if "neon" not in here:
        try:
            machine = aarch64()
            build = start_build(machine)
        except RuntimeError as missing:
            print(f"instruction_sets: NEON is neither compiled nor run: {missing}", flush=True)
    problems = [problem_of(work, dtype) for work in works() for dtype in work.dtypes]
    # Against AVX2, the one that most machines have, or the widest that there is.
    other = "avx2" if "avx2" in here else here[-1]
    with selected(other):
        others = [problem.compute() for problem in problems]
    wrong = []
    for name in here:
        with selected(name):
            wrong += check(name, problems, other, others)
    for name in OF_X86:
        if here[0] in OF_X86 and name not in here:
            print(f"instruction_sets: {name} is compiled and not run: this processor does not have it", flush=True)
    if machine is not None and build is not None:
        program = build()
        if not machine.emulator:
            print("instruction_sets: NEON is compiled and not run: there is no qemu-aarch64-static", flush=True)
        else:
            processor = Processor([*machine.emulator, str(program)])
            with processor.in_place():
                wrong += check(processor.instruction_set, problems, other, others)
            processor.close()
    for line in wrong:
        print(line, file=sys.stderr)
    verdict = "SOMETHING IS WRONG" if wrong else "all within the error that is allowed"
    print(f"instruction_sets: {len(problems)} problems, {verdict} ({time.monotonic() - begin:.0f} s)")
    return 1 if wrong else 0


class Break(NamedTuple):
    """A change of the vectors' layer that has to be noticed."""

    name: str
    old: str
    new: str


VECTORS = "csrc/cpu/vec.h"
BREAKS = (
    Break("a coefficient of 2^x by 1e-5 of it", "2.4022242426872253e-1f", "2.40220e-1f"),
    Break("a coefficient of the logarithm", "0.48091062903404236f", "0.48090f"),
    Break("bfloat16 is cut off, not rounded", "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
    Break("NEON: float16 from the next element", "vld1_f16((const __fp16*)p)", "vld1_f16((const __fp16*)p + 1)"),
    Break("NEON: the greater is the less", "vmaxq_f32(", "vminq_f32("),
    Break("NEON: any lane is every lane", "vmaxvq_u32((uint32x4_t)condition)", "vminvq_u32((uint32x4_t)condition)"),
    Break("NEON: the high word of a product", "product >> 32", "product >> 31"),
    Break("NEON: a block is not transposed", "rows[i][j] = rows[j][i];", "rows[i][j] = swapped;"),
)


def is_noticed(command: list[str], op: str) -> str | None:
    """The first problem that shows that a program is wrong, those of an op before the others; None where none does."""
    processor = Processor(command)
    try:
        with processor.in_place():
            for work in sorted(works(), key=lambda work: op not in work.op):
                for dtype in work.dtypes:
                    problem = problem_of(work, dtype)
                    verdict = Verdict("", "itself")
                    found = problem.compute()
                    verdict.add(problem, found, found)
                    if verdict.wrong:
                        return str(problem)
    except RuntimeError as ended:  # a kernel that does nothing may leave a schedule with numbers that end the program
        return str(ended)
    finally:
        processor.close()
    return None


def prove() -> int:
    """Breaks the program on purpose, one kernel or line at a time; 1 where nobody noticed."""
    machine = aarch64()
    root = PLACE / "project"
    for folder in ("csrc", "fuzz", "tools"):
        shutil.copytree(ROOT / folder, root / folder, dirs_exist_ok=True)
    program = start_build(machine, root)()
    command = [*machine.emulator, str(program)]
    survivors = 0

    def tell(name: str, noticed: str | None) -> int:
        print(f"{name:50s} {f'noticed: {noticed}' if noticed else 'NOT NOTICED'}", flush=True)
        return noticed is None

    if (noticed := is_noticed(command, "attention")) is not None:
        print(f"instruction_sets: wrong before anything is broken: {noticed}", file=sys.stderr)
        return 2
    kernels = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for kernel in kernels:
        survivors += tell(f"without {kernel}", is_noticed([*command, "--without", kernel], kernel.split("_")[0]))
    path = root / VECTORS
    text = path.read_text()
    for broken in BREAKS:
        if text.count(broken.old) != 1:
            raise ValueError(
                f"{broken.name}: {broken.old!r} stands {text.count(broken.old)} times in {VECTORS}, not once"
            )
        path.write_text(text.replace(broken.old, broken.new))
        try:
            start_build(machine, root)()
            survivors += tell(broken.name, is_noticed(command, "attention"))
        finally:
            path.write_text(text)
    return 1 if survivors else 0


def main(arguments: list[str] | None = None) -> int:
    """Compares, or proves that it would notice; 1 where an instruction set is wrong, or a break was not noticed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.instruction_sets", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--prove", action="store_true", help="break the kernels on purpose instead")
    options = parser.parse_args(arguments)
    if (missing := extension.reason()) is not None:
        print(f"instruction_sets: {missing}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # on problems this small a second one costs more than it brings
    return prove() if options.prove else compare_all()


if __name__ == "__main__":
    sys.exit(main())
