"""What is compiled ahead of time: every kernel that is launched, every row of the tuning tables."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import maskops.ops
from maskops import tuning
from maskops.cli.bench.compilation import command

pytestmark = pytest.mark.skipif(command.absent() is not None, reason=f"Triton: {command.absent()}")

OPS = Path(maskops.ops.__file__).parent
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(OPS.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def is_jit(function: ast.AST) -> bool:
    return isinstance(function, ast.FunctionDef) and any(
        "triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list
    )


def launched_kernels() -> set[str]:
    """Kernels that no other kernel calls: they are launched, or nobody needs them."""
    kernels = [node for _, tree in trees() for node in ast.walk(tree) if is_jit(node)]
    called = {
        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for kernel in kernels
        for node in ast.walk(kernel)
        if isinstance(node, ast.Call)
    }
    return {kernel.name for kernel in kernels if isinstance(kernel, ast.FunctionDef)} - called


def test_every_kernel_that_is_launched_is_compiled_for_every_change_and_architecture() -> None:
    from maskops.cli.bench.compilation import worker

    compilations = list(worker.compilations())
    wanted = launched_kernels()
    assert len(wanted) > 15
    for architecture in tuning.ARCHITECTURES:
        of_it = [variant for variant in compilations if variant.architecture == architecture]
        assert {variant.function.fn.__name__ for variant in of_it} == wanted
        assert {variant.function.fn.__name__ for variant in of_it if variant.everyday} == wanted
    names = [(variant.architecture, variant.name) for variant in compilations]
    assert len(set(names)) == len(names)


def test_kernels_are_launched_through_one_function() -> None:
    """The one that examples are recorded through."""
    for path, tree in trees():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        found = [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]
        assert path.name == "triton_language.py" or not found, f"{path}, lines {found}: use triton_language.launch"


PLAIN = {
    "attention_forward": "attention forward {}",
    "attention_forward_per_pair": "attention forward {} bias",
    "attention_backward_dq": "attention grad_queries {}",
    "attention_backward_dkdv": "attention grad_keys {}",
    "decode": "decode forward {}",
    "cross_entropy": "cross_entropy sum_rows {}",
    "masked_softmax": "masked_softmax forward_rows {} long",
}
"""The compilation that a row of the tables is known by."""


def name_of(key: tuning.Key) -> str:
    return PLAIN[key.kernel].format(f"{key.element} {key.width}" if key.width else key.element)


def test_every_row_of_the_tuning_tables_is_compiled_for_every_change() -> None:
    from maskops.cli.bench.compilation import worker

    known = {(variant.architecture, variant.name): variant for variant in worker.compilations()}
    for key, row in tuning.TABLE.items():
        variant = known[key.architecture, name_of(key)]
        assert variant.everyday, key
        launched = {**variant.blocks, "num_warps": variant.num_warps, "num_stages": variant.num_stages}
        assert row.launch().items() <= launched.items(), key


def test_rows_say_what_came_of_their_compilation() -> None:
    runs = json.loads((RESULTS / "compile.json").read_text())["runs"]
    figures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for kernel in run["kernels"]:
            figures.setdefault((kernel["architecture"], kernel["name"]), []).append(kernel)
    assert {"3.6.0", "3.9.0"} <= {run["triton"] for run in runs}
    for key, row in tuning.TABLE.items():
        found = figures[key.architecture, name_of(key)]
        registers, spills, issue = (
            max(kernel.get(figure, 0) for kernel in found) for figure in ("registers", "hot_spills", "issue")
        )
        assert len(found) == 2
        assert row.provenance == tuning._compiled(registers, spills, round(issue)), key
