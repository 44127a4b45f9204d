"""A process that compiles: `python -m maskops.cli.bench.compilation.worker`.

Its first line of output says which Triton it has and what there is to compile (architecture, name, and whether it is
compiled for every change); then it answers each line of its input, the architecture and the name of a compilation as
JSON, with a line, the result as JSON.
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Iterator

import maskops.ops
from maskops.cli.bench.compilation import triton_compiler
from maskops.ops.compilation import Compilation
from maskops.tuning import ARCHITECTURES


def compilations() -> Iterator[Compilation]:
    """What the ops declare, for every architecture."""
    for package in pkgutil.iter_modules(maskops.ops.__path__, "maskops.ops."):
        kernels = importlib.util.find_spec(f"{package.name}.triton_kernels") if package.ispkg else None
        if kernels is None or kernels.submodule_search_locations is None:
            continue  # no kernel of its own
        variants = importlib.import_module(f"{package.name}.triton_kernels.variants")
        for architecture in ARCHITECTURES:
            yield from variants.compilations(architecture)


def main() -> None:
    """Serves until the input ends."""
    # What libraries and compilers print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    declared: dict[tuple[str, str], Compilation] = {}
    for compilation in compilations():
        key = (compilation.architecture, compilation.name)
        if key in declared:
            raise ValueError(f"two compilations for {key[0]} are called {key[1]!r}")
        declared[key] = compilation
    keys = [[*key, compilation.everyday] for key, compilation in declared.items()]
    print(json.dumps({"triton": triton_compiler.version(), "declared": keys}), file=answers)
    for line in sys.stdin:
        architecture, name = json.loads(line)
        result = triton_compiler.compile_kernel(declared[architecture, name])
        print(json.dumps(result.as_json()), file=answers)


if __name__ == "__main__":
    main()
