"""pytest-benchmark cases: `python -m pytest benchmarks`. The variants and cases are those of the engine and the kit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from maskops import testing
from maskops.cli.bench.jobs import JOBS, Job, Settings
from maskops.cli.bench.sweep import cut_documents, lengths_with_fill
from maskops.cli.bench.variants import Variant, chosen

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install torch-maskops[bench]")

SETTINGS = Settings(
    batch_size=8,
    vocabulary=512,
    width=64,
    heads=2,
    layers=1,
    max_length=128,
    dtype=torch.float32,
    device=torch.device("cpu"),
    seed=0,
)
TEXT = [torch.randint(1, SETTINGS.vocabulary, (4096,), generator=torch.Generator().manual_seed(0))]
DOCUMENTS = cut_documents(TEXT, lengths_with_fill(0.4, 16, 128))
WORK = [
    pytest.param(job, variant, id=f"{job.name}-{variant.name}")
    for job in JOBS
    for variant in chosen(job.name, SETTINGS.device, SETTINGS.dtype, compiled=False)
]
CASES = [case for case in testing.cases("attention") if not testing.refusals("cpu", case)]


@pytest.mark.parametrize(("job", "variant"), WORK)
def test_variant(benchmark: BenchmarkFixture, job: Job, variant: Variant) -> None:
    benchmark.group = job.title
    benchmark(job.work(variant, DOCUMENTS, SETTINGS, True).run)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(benchmark: BenchmarkFixture, case: testing.Case) -> None:
    mask = case.mask("cpu")
    q = torch.randn(case.batch, case.heads, case.q_len, case.head_dim, dtype=case.dtype)
    k = torch.randn(case.batch, case.kv_heads, case.k_len, case.head_dim, dtype=case.dtype)
    v = torch.randn(case.batch, case.kv_heads, case.k_len, case.value_dim, dtype=case.dtype)
    allowed = case.allowed()
    attention = testing.attention_on("cpu", case)
    assert mask is None or allowed.dtype == torch.bool
    benchmark(attention, q, k, v, allowed, softmax_scale=case.softmax_scale)
