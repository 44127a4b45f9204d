"""What the Triton kernels share."""

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import maskops
from maskops.ops import triton_language
from maskops.ops.attention.triton_kernels.backward_scores import terms_of
from maskops.ops.triton_language import dot, launch


@triton.jit
def _product(A, B, OUT, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(OUT + at, dot(tl.load(A + at), tl.load(B + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(dtype: torch.dtype) -> None:
    """Those of bfloat16 are the ones that the interpreter gets wrong by itself."""
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    launch(_product, (1,), out, (a, b, out), num_warps=4, num_stages=1, SIDE=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def _terms(TERMS, FOUND, term_stride, HAS_ALL: tl.constexpr):
    index = tl.arange(0, 16)
    terms = terms_of(TERMS, index, term_stride, HAS_ALL, HAS_ALL)
    tl.store(FOUND + index, terms.lse)
    tl.store(FOUND + 16 + index, terms.delta)
    tl.store(FOUND + 32 + index, terms.log2_sum)
    tl.store(FOUND + 48 + index, terms.share)


def test_terms_far_apart(tmp_path: Path) -> None:
    """A term is as far from the next as rows and heads are many: in 32 bits the third one would lie elsewhere."""
    stride = 2**30 + 16
    content = torch.arange(64.0).view(4, 16)
    far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 16).as_strided((4, 16), (stride, 1))
    far.copy_(content)
    found = torch.empty(4, 16)
    launch(_terms, (1,), far, (far, found, stride), num_warps=1, num_stages=1, HAS_ALL=True)
    (tmp_path / "sparse").unlink()
    assert torch.equal(found, content)


def test_only_products_know_of_the_interpreter() -> None:
    """A kernel that ran other code in the interpreter would not be the one that is tested."""
    root = Path(maskops.__file__).parent
    uses = {
        f"{path.relative_to(root)}:{line.strip()}"
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"INTERPRETED\b|TRITON_INTERPRET|knobs\.runtime\.interpret", line)
    }
    named = [use for use in uses if use.startswith("ops/")]
    assert sorted(named) == [
        "ops/triton_language.py:INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))",
        "ops/triton_language.py:Kernels run where Triton compiles them, or in its interpreter (``TRITON_INTERPRET=1``)"
        " on CPU tensors, where the suite",
        "ops/triton_language.py:if INTERPRETED:",
    ]
    # Outside of ops the choice of a backend asks, and tools that compile.
    assert {use.partition(":")[0].partition("/")[0] for use in uses - set(named)} <= {"backend.py", "cli"}


def test_every_product_is_the_guarded_one() -> None:
    root = Path(triton_language.__file__).parent
    direct = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if "tl.dot(" in line
    ]
    assert direct == ["triton_language.py"]


@pytest.mark.parametrize(("width", "expected"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (192, 256)])
def test_padded_widths(width: int, expected: int) -> None:
    assert triton_language.padded(width) == expected


def test_float32_is_exact_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "none"
        assert triton_language.float32_precision() == "ieee"
        matmul.fp32_precision = "tf32"
        assert triton_language.float32_precision() == "tf32"
    finally:
        matmul.fp32_precision = before
