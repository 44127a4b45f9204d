"""maskops.linear_cross_entropy on the backend `cuda`: a device's chunks, scored and differentiated by one kernel."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from maskops import backend as backends
from maskops.ops.linear_cross_entropy import device_chunks
from tests import test_triton_linear_loss as common
from tests.linear_cross_entropy_oracle import RETURNS, Problem, check
from tests.served import DEVICE, running_on

NAME = "cuda"
pytestmark = pytest.mark.devices


@pytest.fixture(autouse=True)
def on_cuda() -> Iterator[None]:
    if reasons := backends.BACKENDS[NAME].refusals_of(DEVICE):
        pytest.skip(f"{NAME}: {'; '.join(reasons)}")
    with running_on(NAME):
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a chunk, so that small problems have many."""
    monkeypatch.setattr(device_chunks, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(device_chunks, "_LEAST_ROWS", 4)


@pytest.mark.parametrize("returns", [{}, RETURNS], ids=["loss", "all"])
@pytest.mark.parametrize("options", [{}, common.EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scoring(dtype: torch.dtype, options: dict[str, Any], returns: dict[str, Any]) -> None:
    check(Problem((2, 4), dtype=dtype), **options, **returns)


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean"])
def test_masks_and_reductions(reduction: str) -> None:
    common.test_masks_and_reductions(reduction)


@pytest.mark.parametrize("step", [1, 5, 12])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    common.test_chunks_change_nothing(monkeypatch, step)


def test_odd_sizes_and_strides() -> None:
    common.test_odd_sizes_and_strides()


@pytest.mark.parametrize("returns", [{}, RETURNS], ids=["loss", "all"])
def test_skipped_tokens_are_never_read(returns: dict[str, Any]) -> None:
    common.test_skipped_tokens_are_never_read(returns)


def test_incoming_gradients_of_skipped_tokens_are_never_read() -> None:
    common.test_incoming_gradients_of_skipped_tokens_are_never_read()


def test_nothing_to_score() -> None:
    common.test_nothing_to_score(torch.float32)
    common.test_no_tokens((3, 0))


def test_labels_outside_the_vocabulary() -> None:
    common.test_labels_outside_the_vocabulary()
