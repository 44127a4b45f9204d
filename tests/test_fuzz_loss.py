"""Cross-entropy, from logits and from a layer, on problems that nobody chose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

import maskops
from maskops.testing import error_budget
from tests.cross_entropy_oracle import RETURNS, check_case, token_by_token
from tests.fuzz import Property, dtypes
from tests.served import running_on

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Problem(NamedTuple):
    rows: tuple[int, ...]
    vocabulary: int
    width: int
    dtype: torch.dtype
    seed: int
    scale: float
    strides: str
    options: dict[str, Any]


@st.composite
def problems(draw: Draw) -> Problem:
    rows = draw(st.sampled_from(((0,), (1,), (7,), (3, 5), (2, 1), (2, 0), (17,))))
    count = math.prod(rows)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["mask"] = torch.tensor(
            draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool
        ).reshape(rows)
    if draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from((0.0, 0.5, 1.0, 3.0)), min_size=count, max_size=count))
        options["token_weights"] = torch.tensor(weights, dtype=torch.float32).reshape(rows)
    for name, values in (
        ("label_smoothing", (0.0, 0.1, 1.0)),
        ("z_loss", (0.0, 1e-2)),
        ("softcap", (0.0, 5.0)),
        ("logit_scale", (1.0, 0.3)),
        ("reduction", ("mean", "sum", "none", "sequence_mean")),
        ("shift", (False, True)),
    ):
        options[name] = draw(st.sampled_from(values))
    if draw(st.booleans()) or (options["reduction"] == "sequence_mean" and len(rows) == 1):
        cuts = sorted(draw(st.lists(st.integers(0, count), max_size=4)))
        options["cu_seqlens"] = torch.tensor([0, *cuts])
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["num_items"] = draw(st.integers(1, 20))
    return Problem(
        rows,
        draw(st.sampled_from((1, 2, 15, 16, 17, 33, 64, 65, 129, 257)) | st.integers(1, 300)),
        draw(st.sampled_from((1, 5, 16, 33))),
        draw(dtypes),
        draw(st.integers(0, 1000)),
        # Beyond, the normaliser that is kept for the backward pass rounds more than plain operations do: its float32
        # shows in the gradient of the entropy.
        draw(st.sampled_from((0.0, 1.0, 3.0))),
        draw(st.sampled_from(("dense", "wide", "columns"))),
        options,
    )


def tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, of which a quarter is ignored."""
    generator = torch.Generator().manual_seed(problem.seed)
    logits = problem.scale * torch.randn(*problem.rows, problem.vocabulary, generator=generator)
    target = torch.randint(problem.vocabulary, problem.rows, generator=generator)
    target[torch.rand(problem.rows, generator=generator) < 0.25] = -100
    logits = logits.to(problem.dtype)
    if problem.strides == "wide":
        logits = torch.nn.functional.pad(logits, (2, 3), value=math.nan)[..., 2 : problem.vocabulary + 2]
    elif problem.strides == "columns":
        logits = logits.transpose(0, -1).contiguous().transpose(0, -1)
    return logits, target


def check_cross_entropy(problem: Problem) -> None:
    """Every output and the gradient of all of them, against a loop over tokens in float64."""
    logits, target = tensors(problem)
    with running_on("cpu"):
        if target.numel() > 0:
            check_case(logits, target, **problem.options)
            return
        leaf = logits.requires_grad_()
        loss = maskops.cross_entropy(leaf, target, **problem.options)
        assert not loss.any()
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == logits.shape


def check_linear(problem: Problem) -> None:
    """The same of a layer, whose gradients are those of the logits carried on."""
    generator = torch.Generator().manual_seed(problem.seed)
    rows, width = math.prod(problem.rows), problem.width
    hidden = torch.randn(*problem.rows, width, generator=generator).to(problem.dtype)
    weight = (problem.scale * torch.randn(problem.vocabulary, width, generator=generator) / width**0.5).to(
        problem.dtype
    )
    bias = torch.randn(problem.vocabulary, generator=generator).to(problem.dtype)
    _, target = tensors(problem)

    def run(dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        if ours:
            outputs: Any = maskops.linear_cross_entropy(
                leaves[0], leaves[1], target, bias=leaves[2], **problem.options, **RETURNS
            )
        else:
            outputs = token_by_token(leaves[0] @ leaves[1].T + leaves[2], target, **problem.options)
        probe = torch.zeros((), dtype=outputs.loss.dtype, requires_grad=True)
        total = gradient_target(outputs) + probe
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        filled = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]
        return [outputs.loss.detach(), outputs.lse.detach(), *filled]

    with running_on("cpu"):
        ours = run(problem.dtype, True)
    oracle, plain = run(torch.float64, False), run(problem.dtype, False)
    largest = max([1.0, *(float(x.abs().max()) for x in oracle if x.numel())])
    for name, a, p, o in zip(("loss", "lse", "hidden", "weight", "bias"), ours, plain, oracle, strict=True):
        budget = error_budget(a, p, o, problem.dtype, largest * max(1, rows) ** 0.5)
        assert budget.passed, (name, budget)


def gradient_target(outputs: Any) -> torch.Tensor:
    """One number that every differentiable output moves."""
    return outputs.loss.sum() + 0.3 * outputs.lse.sum() - 0.4 * outputs.logprobs.sum() + 0.25 * outputs.entropy.sum()


PROPERTIES = {
    "cross_entropy": Property(problems(), check_cross_entropy),
    "linear_cross_entropy": Property(problems(), check_linear),
}

test_cross_entropy = PROPERTIES["cross_entropy"].test(40)
test_linear_cross_entropy = PROPERTIES["linear_cross_entropy"].test(20)
