"""Rows of logits that a block keeps in more than 48 KiB of shared memory, which a launch has to be allowed first."""

from __future__ import annotations

import pytest
import torch

import maskops
from maskops import backend as backends
from tests.served import DEVICE

pytestmark = pytest.mark.devices


@pytest.mark.parametrize(
    "vocabulary",
    [
        pytest.param(8_000, id="below 32 KiB"),
        pytest.param(12_200, id="48 KiB with the variables of the kernel"),
        pytest.param(12_500, id="above 48 KiB"),
        pytest.param(50_000, id="most of a block"),
        pytest.param(98_000, id="a block of eight above 48 KiB"),
    ],
)
@pytest.mark.parametrize("is_differentiated", [False, True])
def test_cross_entropy_of_single_precision(vocabulary: int, is_differentiated: bool) -> None:
    if reasons := backends.BACKENDS["cuda"].refusals_of(DEVICE):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    torch.manual_seed(vocabulary)
    logits = torch.randn(1, vocabulary, requires_grad=is_differentiated)
    target = torch.tensor([vocabulary - 1])
    with maskops.use_backend("cuda", fallback="error"):
        loss = maskops.cross_entropy(logits, target)
    exact = logits.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, target)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
    if is_differentiated:
        (grad,) = torch.autograd.grad(loss, logits)
        (wanted_grad,) = torch.autograd.grad(wanted, exact)
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-9)
