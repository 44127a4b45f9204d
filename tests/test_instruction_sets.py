"""tools.instruction_sets: it compares what there is, and sees what is wrong."""

import math
import re

import pytest
import torch

from maskops import extension
from maskops.backend import BACKENDS
from tools import instruction_cases, instruction_sets
from tools.instrument import ROOT

needs_extension = pytest.mark.skipif(
    extension.reason() is not None, reason=f"the extension is not there: {extension.reason()}"
)


def test_every_kernel_can_be_left_out() -> None:
    """The program's list is the table's: a kernel that it does not name is one that --prove does not miss."""
    table = (ROOT / "csrc/cpu/isa.h").read_text()
    kernels = re.findall(r"^  void \(\*(\w+)\)\(", table, re.M)
    assert "attention_forward" in kernels and "softmax_backward" in kernels
    named = re.findall(r"KERNEL\((\w+)\),", (ROOT / "tools/processor.cpp").read_text())
    assert [name for name in kernels if not name.startswith("limit_")] == named


def test_every_op_has_work_in_every_dtype() -> None:
    works = instruction_cases.works()
    assert {work.op for work in works} | {"append_kv"} == set(BACKENDS["cpu"].ops)
    assert len({(work.op, work.name) for work in works}) == len(works)
    for op in {work.op for work in works}:
        dtypes = {dtype for work in works if work.op == op for dtype in work.dtypes}
        assert dtypes == set(BACKENDS["cpu"].ops["attention"].dtypes)


@needs_extension
@pytest.mark.parametrize("change", ["nothing", "a rounding too many", "NaN", "another column"])
def test_what_is_wrong_is_seen(change: str) -> None:
    work = next(work for work in instruction_cases.works() if work.name == "all outputs")
    problem = instruction_sets.problem_of(work, torch.float32)
    right = problem.compute()
    found = {name: x.clone() for name, x in right.items()}
    if change == "a rounding too many":
        found["lse"][0] += 3e-5
    elif change == "NaN":
        found["loss"][0] = math.nan
    elif change == "another column":
        found["argmax"][0] += 1
    verdict = instruction_sets.Verdict("this one", "that one")
    verdict.add(problem, found, right)
    if change == "nothing":
        assert not verdict.wrong
    else:
        name = {"a rounding too many": "lse", "NaN": "loss", "another column": "argmax"}[change]
        assert len(verdict.wrong) == 1
        assert f"this one: cross_entropy, all outputs, float32: {name} is off by" in verdict.wrong[0]
    assert str(verdict).startswith("this one")
