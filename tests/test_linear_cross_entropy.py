"""maskops.linear_cross_entropy against cross-entropy over explicit logits in float64, on every backend."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.ops.linear_cross_entropy import chunks
from tests.linear_cross_entropy_oracle import (
    DTYPES,
    IGNORE,
    MASK,
    RETURNS,
    WEIGHTS,
    Problem,
    check,
    gradients,
)
from tests.served import AT_HOME, each_of

pytestmark = pytest.mark.devices

backend = each_of(AT_HOME)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a chunk and a few columns a tile, so that small problems have many of both."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 4)
    monkeypatch.setattr(chunks, "_TILE_BYTES", 7 * 4 * 16)


SCORING = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.6},
    "class weights": {"class_weights": torch.linspace(0.0, 2.0, 33)},
    "everything": {
        "label_smoothing": 0.2,
        "z_loss": 0.05,
        "softcap": 7.0,
        "logit_scale": 1.5,
        "class_weights": torch.linspace(2.0, 0.5, 33).double(),
    },
}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "sequence mean": {"reduction": "sequence_mean"},
    "packed sequence mean": {"reduction": "sequence_mean", "cu_seqlens": torch.tensor([0, 4, 4, 9, 13])},
    "num items": {"num_items": 7},
    "num items tensor": {"num_items": torch.tensor(5)},
}
MASKING: dict[str, dict[str, Any]] = {
    "labels": {},
    "mask": {"mask": MASK},
    "weights": {"token_weights": WEIGHTS},
    "both, shifted": {"mask": MASK.bool(), "token_weights": WEIGHTS.double(), "shift": True},
    "class weights": {"token_weights": WEIGHTS, "class_weights": torch.linspace(0.5, 2.0, 33)},
}


@pytest.mark.parametrize("returns", [{}, {"return_argmax": True}, RETURNS], ids=["loss", "argmax", "all"])
@pytest.mark.parametrize("scoring", SCORING.values(), ids=SCORING)
def test_scoring(backend: str, small_chunks: None, scoring: dict[str, Any], returns: dict[str, Any]) -> None:
    for dtype in DTYPES:
        check(Problem(dtype=dtype), **scoring, **returns)


@pytest.mark.parametrize("returns", [{}, RETURNS], ids=["loss", "all"])
@pytest.mark.parametrize("masking", MASKING.values(), ids=MASKING)
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions(
    backend: str, small_chunks: None, reduction: dict[str, Any], masking: dict[str, Any], returns: dict[str, Any]
) -> None:
    check(Problem(), **reduction, **masking, **returns)


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes_mix(small_chunks: None, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Each input keeps its dtype and its gradient has it; everything between is float32, or float64 where one is."""
    with maskops.use_backend(fallback="warn"):
        problem = Problem(dtype=dtype, weight_dtype=weight_dtype)
        if torch.float64 in (dtype, weight_dtype):
            with maskops.use_backend("reference"):
                leaves, wide = problem.leaves(), problem.leaves(torch.float64)
                loss, expected = problem.score(leaves, reduction="none"), problem.explicit(wide, reduction="none")
                assert loss.dtype == torch.float64
                torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        else:
            check(problem)
            check(problem, reduction="none")


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("least_rows", [1, 3, 11, 12, 13])
def test_chunks_change_nothing(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, least_rows: int
) -> None:
    """Rows that fill chunks exactly, by one more and by one less, and tiles of the vocabulary likewise."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", least_rows)
    for columns, ignored in itertools.product((1, 32, 33, 34), (0.0, 0.4)):
        monkeypatch.setattr(chunks, "_TILE_BYTES", columns * 4 * 16)
        check(Problem((12,), dtype=dtype, ignored=ignored))
        check(Problem((12,), dtype=dtype, ignored=ignored), reduction="none", **RETURNS)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [((1,), 1, 1), ((2,), 1, 7), ((5,), 3, 2), ((200,), 70, 517)])
def test_odd_sizes(backend: str, rows: tuple[int, ...], width: int, vocabulary: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(rows, width, vocabulary, dtype, ignored=0.0)
        check(problem, label_smoothing=0.1, **RETURNS)
        problem.bias = None
        check(problem)


def test_a_layer_without_inputs_scores_its_bias(backend: str) -> None:
    problem = Problem((4,), width=0, ignored=0.0)
    leaves = problem.leaves()
    loss = problem.score(leaves)
    assert problem.bias is not None
    torch.testing.assert_close(loss, F.cross_entropy(problem.bias.expand(4, -1), problem.target))
    assert [grad.shape for grad in torch.autograd.grad(loss, leaves)] == [(4, 0), (33, 0), (33,)]


def test_a_single_token_without_dimensions(backend: str) -> None:
    hidden, weight = torch.randn(8), torch.randn(6, 8)
    loss = maskops.linear_cross_entropy(hidden, weight, torch.tensor(2), reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(weight @ hidden, torch.tensor(2)))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens(backend: str, shape: tuple[int, ...]) -> None:
    problem = Problem(shape)
    for reduction in ("mean", "sum", "none"):
        for returns in ({}, RETURNS):
            leaves = problem.leaves()
            outputs = problem.score(leaves, reduction=reduction, **returns)
            loss = outputs.loss if returns else outputs
            assert loss.shape == (shape if reduction == "none" else ()) and bool((loss == 0).all())
            for leaf, grad in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
                assert grad.shape == leaf.shape and bool((grad == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_nothing_to_score(backend: str, reduction: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype)
    problem.hidden.fill_(math.nan)
    problem.target.fill_(IGNORE)
    leaves = problem.leaves()
    loss = problem.score(leaves, reduction=reduction)
    assert bool((loss == 0).all())
    for grad in torch.autograd.grad(loss.sum(), leaves):
        assert bool((grad == 0).all())


@pytest.mark.parametrize("returns", [{}, RETURNS], ids=["loss", "all"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skipped_tokens_are_never_read(backend: str, small_chunks: None, value: float, returns: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(dtype=dtype)
        skipped = (problem.target == IGNORE) | (MASK == 0) | (WEIGHTS == 0)
        options = {"mask": MASK, "token_weights": WEIGHTS, "label_smoothing": 0.1, **returns}
        problem.hidden[skipped] = 0.0
        leaves = problem.leaves()
        expected = problem.score(leaves, **options)
        expected_grads = gradients(expected, leaves)
        problem.hidden[skipped] = value
        leaves = problem.leaves()
        ours = problem.score(leaves, **options)
        for a, b in zip(ours if returns else [ours], expected if returns else [expected], strict=True):
            assert torch.equal(a, b)
        grads = gradients(ours, leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
        assert bool((grads[0][skipped] == 0).all())


def test_incoming_gradients_of_skipped_tokens_are_never_read(backend: str, small_chunks: None) -> None:
    problem = Problem()
    leaves = problem.leaves()
    outputs = problem.score(leaves, reduction="none", **RETURNS)
    poison = torch.where(problem.target == IGNORE, math.nan, 1.0)
    for grad in torch.autograd.grad(outputs[:4], leaves, [poison] * 4):
        assert bool(grad.isfinite().all())


def test_tokens_after_the_last_sequence_are_never_read(backend: str) -> None:
    problem = Problem((10,), ignored=0.0)
    problem.hidden[7:] = math.nan
    problem.target[7:] = 10**6  # not even their labels
    leaves = problem.leaves()
    loss = problem.score(leaves, cu_seqlens=torch.tensor([0, 3, 7]))
    grads = torch.autograd.grad(loss, leaves)
    assert loss.isfinite() and all(bool(grad.isfinite().all()) for grad in grads) and bool((grads[0][7:] == 0).all())


def test_a_kept_token_does_not_hide_what_is_not_finite(backend: str) -> None:
    problem = Problem((4,), ignored=0.0)
    problem.hidden[1] = math.nan
    losses = problem.score(problem.leaves(), reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False]


def test_a_bias_bans_columns(backend: str) -> None:
    problem = Problem(ignored=0.0)
    assert problem.bias is not None
    problem.target.clamp_(min=10)
    problem.bias[:10] = -math.inf
    leaves = problem.leaves()
    outputs = problem.score(leaves, label_smoothing=0.1, **RETURNS)
    assert all(bool(value.isfinite().all()) for value in outputs[:4]) and int(outputs.argmax.min()) >= 10
    grads = gradients(outputs, leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((grads[1][:10] == 0).all()) and bool((grads[2][:10] == 0).all())
    problem.weight, problem.bias, problem.target = problem.weight[10:], problem.bias[10:], problem.target - 10
    fewer = problem.score(problem.leaves(), label_smoothing=0.1)
    torch.testing.assert_close(outputs.loss, fewer)


@pytest.mark.processor
def test_confident_tokens_keep_their_relative_accuracy(on_cpu: None) -> None:
    """p = 0.99998: plain float32 is 8 % off."""
    hidden = torch.zeros(2, 4)
    hidden[:, 0] = 1.0
    weight = torch.zeros(1000, 4)
    weight[7, 0] = 17.7
    loss = maskops.linear_cross_entropy(hidden, weight, torch.tensor([7, 7]))
    expected = math.log1p(999 * math.exp(-float(weight[7, 0])))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_strides(backend: str, small_chunks: None) -> None:
    problem = Problem()
    weight = problem.weight
    weights = {
        "columns contiguous": weight.t().contiguous().t(),
        "cut out": F.pad(weight, (3, 2))[:, 3:-2],
        "every second row": weight.repeat_interleave(2, 0)[::2],
        "every second column": weight.repeat_interleave(2, 1)[:, ::2],
        "one row for all": weight[:1].expand(33, -1),
        "one column for all": weight[:, :1].expand(-1, 16),
    }
    for dtype, (name, view) in itertools.product((torch.float32, torch.bfloat16), weights.items()):
        problem.weight = view.to(dtype)
        if name not in ("columns contiguous",):
            problem.weight = (
                torch.empty_strided(view.shape, view.stride(), dtype=dtype).copy_(view)
                if (0 not in view.stride())
                else view.to(dtype)
            )
        check(problem)
        check(problem, reduction="none")
    problem.weight = weight
    for hidden in (
        problem.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        problem.hidden.repeat_interleave(2, 2)[..., ::2],
        problem.hidden.transpose(1, 2).contiguous().transpose(1, 2),
        problem.hidden[:1, :1].expand(3, 5, 16),
    ):
        problem.hidden = hidden
        check(problem)


def test_a_tied_embedding_gets_both_gradients(backend: str) -> None:
    problem = Problem(ignored=0.0)
    embedding = problem.weight.clone().requires_grad_()
    tokens = torch.randint(33, (3, 5), generator=torch.Generator().manual_seed(1))

    def loss(embedding: Tensor, score: Any) -> Tensor:
        result: Tensor = score(F.embedding(tokens, embedding), embedding)
        return result

    ours = loss(embedding, lambda x, w: maskops.linear_cross_entropy(x, w, problem.target))
    (grad,) = torch.autograd.grad(ours, embedding)
    wide = problem.weight.double().requires_grad_()
    expected = loss(wide, lambda x, w: F.cross_entropy(F.linear(x, w).flatten(0, 1), problem.target.flatten()))
    torch.testing.assert_close(grad, torch.autograd.grad(expected, wide)[0].float())


@pytest.mark.processor
def test_a_weight_held_transposed_gets_its_gradient_transposed(on_cpu: None) -> None:
    problem = Problem()
    held = problem.weight.t().contiguous().requires_grad_()
    maskops.linear_cross_entropy(problem.hidden, held.t(), problem.target).backward()
    assert held.grad is not None and held.grad.stride() == held.stride()


@pytest.mark.parametrize("frozen", range(3))
def test_only_what_asks_gets_a_gradient(backend: str, frozen: int) -> None:
    problem = Problem()
    for reduction in ("mean", "none"):
        leaves, all_leaves = problem.leaves(), problem.leaves()
        leaves[frozen].requires_grad_(False)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(problem.score(leaves, reduction=reduction).sum(), wanted)
        expected = list(torch.autograd.grad(problem.score(all_leaves, reduction=reduction).sum(), all_leaves))
        del expected[frozen]
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(backend: str, small_chunks: None, reduction: str, dtype: torch.dtype) -> None:
    """The second pass neither needs nor changes what the first one handed out."""
    problem = Problem(dtype=dtype)
    leaves = problem.leaves()
    loss = problem.score(leaves, reduction=reduction).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for grad in first:
        grad.fill_(math.nan)
    third = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(kept, third, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_multiple(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype)
    leaves = problem.leaves()
    loss = problem.score(leaves)
    first = torch.autograd.grad(loss * 4.0, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 4.0 * b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_float16_gradients_survive_a_loss_scale(backend: str) -> None:
    """Rounded to float16 before the loss scale multiplies them, most of these gradients would be 0."""
    problem = Problem((64,), vocabulary=50, dtype=torch.float16, ignored=0.0)
    problem.hidden *= 2.0**-14
    leaves, wide = problem.leaves(), problem.leaves(torch.float64)
    actual = torch.autograd.grad(problem.score(leaves) * 2.0**14, leaves)[1]
    expected = torch.autograd.grad(problem.explicit(wide) * 2.0**14, wide)[1]
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repetition(on_cpu: None, dtype: torch.dtype) -> None:
    """Repeated, the same bits; with other threads, too, but for products of bfloat16, which are torch's."""
    problem = Problem((300,), 64, 517, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            leaves = problem.leaves()
            loss = problem.score(leaves)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for a, b in zip(results[0], results[2], strict=True):
        if dtype == torch.bfloat16 and chunks.multiplies_bfloat16():
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
