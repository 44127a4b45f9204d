"""A worker of `bench compile` with kernels of its own (`python -m tests.compiled_kernels`), for test_compilation.py.

The kernels of a test run are interpreted; these have to be compiled, so they live in another process.
"""

from unittest import mock

import triton
import triton.language as tl

from maskops.cli.bench.compilation import worker
from maskops.ops.compilation import Compilation


@triton.jit
def total_of_rows(x, out, stride, columns, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, columns, BLOCK_V):
        inside = start + offsets < columns
        total += tl.exp2(tl.load(x + row * stride + start + offsets, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + row, tl.sum(total))


@triton.jit
def product(a, b, out, steps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, steps):
        left = tl.load(a + step * WIDTH * BLOCK_M + rows[:, None] * WIDTH + inner[None, :])
        right = tl.load(b + step * WIDTH * BLOCK_N + inner[:, None] * BLOCK_N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + rows[:, None] * BLOCK_N + columns[None, :], total)


STREAM = {"x": "*bf16", "out": "*fp32", "stride": "i32", "columns": "i32"}
MATRICES = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "steps": "i32"}
COLUMNS = {"BLOCK_V": 1024}
TILES = {"WIDTH": 64, "BLOCK_M": 64, "BLOCK_N": 64}
KERNELS = [
    Compilation("ragged rows", total_of_rows, STREAM, COLUMNS, "sm_90", 4, 2, ("stride",)),
    Compilation("even rows", total_of_rows, STREAM, COLUMNS, "sm_80", 4, 2, ("stride", "columns")),
    Compilation("product", product, MATRICES, TILES, "sm_80", 4, 3),
    Compilation("product", product, MATRICES, TILES, "sm_90", 4, 3),
    Compilation("broken", product, MATRICES, {**TILES, "WIDTH": 48}, "sm_90", 4, 3),
    Compilation("a feature", total_of_rows, STREAM, COLUMNS, "sm_80", 4, 2, everyday=False),
]

if __name__ == "__main__":
    with mock.patch.object(worker, "compilations", return_value=KERNELS):
        worker.main()
