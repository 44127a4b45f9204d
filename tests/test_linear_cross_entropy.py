"""maskops.linear_cross_entropy against cross-entropy over explicit logits in float64, on every backend."""

import itertools
import math
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import maskops
from maskops.ops.linear_cross_entropy import chunks
from maskops.testing import error_budget
from tests.served import AT_HOME, DEVICE

pytestmark = pytest.mark.devices

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RETURNS = {"return_lse": True, "return_logprobs": True, "return_entropy": True, "return_argmax": True}


@pytest.fixture(params=AT_HOME)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    if (available := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {available}")
    with maskops.use_backend(name, fallback="error" if name != "reference" else "warn"):
        yield name


@pytest.fixture
def on_cpu() -> Iterator[None]:
    if (available := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {available}")
    with maskops.use_backend("cpu", fallback="error"):
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a chunk and a few columns a tile, so that small problems have many of both."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 4)
    monkeypatch.setattr(chunks, "_TILE_BYTES", 7 * 4 * 16)


class Problem:
    """A linear layer and targets."""

    def __init__(
        self,
        rows: tuple[int, ...] = (3, 5),
        width: int = 16,
        vocabulary: int = 33,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        ignored: float = 0.25,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(*rows, width, generator=generator).to(dtype)
        self.weight = torch.randn(vocabulary, width, generator=generator).to(weight_dtype or dtype)
        self.bias: Tensor | None = torch.randn(vocabulary, generator=generator).to(weight_dtype or dtype)
        self.target = torch.randint(vocabulary, rows, generator=generator)
        self.target[torch.rand(rows, generator=generator) < ignored] = IGNORE

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]

    def score(self, leaves: list[Tensor], **options: Any) -> Any:
        bias = leaves[2] if len(leaves) > 2 else None
        return maskops.linear_cross_entropy(leaves[0], leaves[1], self.target, bias=bias, **options)

    def explicit(self, leaves: list[Tensor], **options: Any) -> Any:
        """Cross-entropy over explicit logits, on the reference; skipped rows stay out of the product."""
        skipped = torch.zeros_like(self.target, dtype=torch.bool)
        if options.get("mask") is None and not options.get("shift"):
            skipped = self.target == options.get("ignore_index", IGNORE)
        logits = F.linear(torch.where(skipped[..., None], 0.0, leaves[0]), *leaves[1:])
        with maskops.use_backend("reference"):
            return maskops.cross_entropy(logits, self.target, **options)


def ramp(like: Tensor, factor: float) -> Tensor:
    return factor * torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape)


def gradients(outputs: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every differentiable output has a share that differs from token to token."""
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    total = torch.zeros((), dtype=torch.float64)
    for factor, value in zip((1.0, 0.3, -0.4, 0.25), outputs[:4], strict=False):
        if value is not None and value.requires_grad:
            total = total + (value * ramp(value, factor)).sum()
    return torch.autograd.grad(total, leaves)


def check(problem: Problem, **options: Any) -> None:
    """Outputs and gradients within the error budget against plain float32, relative to float64."""
    runs = []
    for run, dtype in ((problem.score, None), (problem.explicit, torch.float32), (problem.explicit, torch.float64)):
        leaves = problem.leaves(dtype)
        outputs = run(leaves, **options)
        runs.append((outputs if isinstance(outputs, tuple) else (outputs,), gradients(outputs, leaves)))
    (ours, our_grads), (plain, plain_grads), (oracle, oracle_grads) = runs
    scale = max((float(out.detach().abs().max()) for out in oracle[:2] if out is not None and out.numel()), default=1.0)
    for name, actual, approximate, expected in zip(
        ("loss", "lse", "logprobs", "entropy", "argmax"), ours, plain, oracle, strict=False
    ):
        if expected is None:
            assert actual is None
            continue
        assert actual.shape == expected.shape, name
        if name == "argmax":
            assert torch.equal(actual, expected)
            continue
        assert actual.dtype == torch.float32
        values = (actual.detach(), approximate.detach(), expected.detach())
        budget = error_budget(*values, torch.float32, max(1.0, scale))
        assert budget.passed, (name, budget)
    # One of the gradients may be a sum that cancels: its parts are as large as the others.
    largest = max((float(grad.abs().max()) for grad in oracle_grads if grad.numel()), default=1.0)
    for leaf, actual, approximate, expected in zip(problem.leaves(), our_grads, plain_grads, oracle_grads, strict=True):
        assert actual.dtype == leaf.dtype and actual.shape == leaf.shape
        budget = error_budget(actual, approximate.to(leaf.dtype), expected, leaf.dtype, largest)
        assert budget.passed, budget


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
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])
WEIGHTS = torch.tensor([[0.5, 2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.25, 1.0, 1.0, 4.0, -0.5]])
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
def test_double_backward_is_refused(on_cpu: None) -> None:
    problem = Problem()
    for reduction in ("mean", "none"):
        leaves = problem.leaves()
        loss = problem.score(leaves, reduction=reduction).sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        plain = torch.autograd.grad(problem.score(leaves, reduction=reduction).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
        with pytest.raises(RuntimeError, match="linear_cross_entropy has no double backward in a kernel"):
            grads[0].sum().backward()


def test_the_reference_differentiates_twice() -> None:
    problem = Problem((3,), width=4, vocabulary=5, dtype=torch.float64)
    with maskops.use_backend("reference"):

        def scored(*leaves: Tensor) -> Tensor:
            result: Tensor = problem.score(list(leaves), label_smoothing=0.1, softcap=4.0)
            return result

        assert torch.autograd.gradgradcheck(scored, problem.leaves())


@pytest.mark.processor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # what forward mode loads
def test_transforms(on_cpu: None) -> None:
    problem = Problem()
    leaves = problem.leaves()
    for reduction in ("mean", "none"):

        def total(hidden: Tensor, weight: Tensor, bias: Tensor, reduction: str = reduction) -> Tensor:
            result: Tensor = problem.score([hidden, weight, bias], reduction=reduction).sum()
            return result

        expected = torch.autograd.grad(total(*leaves), leaves)
        actual = torch.func.grad(total, argnums=(0, 1, 2))(*[leaf.detach() for leaf in leaves])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        found = torch.func.vmap(lambda hidden, total=total: total(hidden, *leaves[1:]))(leaves[0].expand(2, 3, 5, 16))
        torch.testing.assert_close(found, total(*leaves).expand(2))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
            total(forward_ad.make_dual(leaves[0].detach(), leaves[0].detach()), *leaves[1:])


@pytest.mark.processor
def test_autocast_changes_nothing_on_processors(backend: str) -> None:
    problem = Problem()
    for options in ({}, {"reduction": "none"}):
        leaves = problem.leaves()
        plain = problem.score(leaves, **options)
        grads = torch.autograd.grad(plain.sum(), leaves)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            under = problem.score(leaves, **options)
        under_grads = torch.autograd.grad(under.sum(), leaves)
        assert torch.equal(plain, under) and all(torch.equal(a, b) for a, b in zip(grads, under_grads, strict=True))


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repetition(on_cpu: None, dtype: torch.dtype) -> None:
    """Repeated, the same bits. With other threads the products are as equal as torch's library makes them."""
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
        torch.testing.assert_close(a, b)


class Recorder(TorchDispatchMode):
    """Multiplications of all matrix products, and the most bytes that were alive at once of what was allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            assert left.dtype == torch.float32 and right.dtype == torch.float32
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.seen:
                    self.seen.add(key)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._free, key, storage.nbytes())
        return results


def record(problem: Problem, incoming: Tensor | None = None, *, gradients: bool = True) -> Recorder:
    nothing = torch.empty(0)
    assert problem.bias is not None
    with Recorder() as recorder:
        results = chunks.linear_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.bias,
            problem.target,
            nothing,
            *(nothing if incoming is None else incoming, nothing, nothing, nothing),
            *(IGNORE, 0.0, 0.0, 0.0, 1.0, False, False, True),
            *[gradients] * 3,
        )
    del results
    return recorder


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipped_tokens_cost_no_product(on_cpu: None, dtype: torch.dtype) -> None:
    problem = Problem((400,), 64, 1000, dtype)
    kept = int((problem.target != IGNORE).sum())
    assert 0 < kept < 400
    assert record(problem, gradients=False).products == kept * 64 * 1000
    assert record(problem, torch.ones(400)).products == 3 * kept * 64 * 1000


@pytest.mark.processor
def test_tokens_without_an_incoming_gradient_cost_no_product(on_cpu: None) -> None:
    problem = Problem((40,), ignored=0.0)
    problem.hidden[1] = math.nan
    leaves = problem.leaves()
    losses = problem.score(leaves, reduction="none")
    grads = torch.autograd.grad(losses[0] + losses[2], leaves)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert (grads[0] != 0).any(1).nonzero().flatten().tolist() == [0, 2]


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_a_chunk(on_cpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 64 * 1000 * 4)
    monkeypatch.setattr(chunks, "_LEAST_ROWS", 16)
    monkeypatch.setattr(chunks, "_TILE_BYTES", 100 * 64 * 4)
    problem = Problem((1000,), 64, 1000, dtype, ignored=0.0)
    chunk, tile, rows = 64 * 1000 * 4, 100 * 64 * 4, 64 * 64 * 4
    small = 40 * 1000  # values of tokens and of words
    assert record(problem, gradients=False).peak <= chunk + 2 * tile + 2 * rows + small
    grads = dtype.itemsize * 64 * (1000 + 1000)
    sums = 0 if dtype == torch.float32 else 4 * 64 * 1000
    assert record(problem, torch.ones(1000)).peak <= chunk + 2 * tile + 3 * rows + small + grads + sums


def test_the_vocabulary_does_not_make_chunks_too_small() -> None:
    assert chunks._Rows(torch.ones(1000, dtype=torch.bool), 2**20).step == 125
    assert chunks._Rows(torch.ones(1000, dtype=torch.bool), 10).step == 1000
    assert chunks._Rows(torch.ones(0, dtype=torch.bool), 10).chunks == []


@pytest.mark.processor
def test_operator(on_cpu: None) -> None:
    problem = Problem((9,))
    nothing, ones = torch.empty(0), torch.ones(9)
    numbers = (IGNORE, 0.1, 0.01, 5.0, 0.7)
    weights = torch.linspace(0.5, 2.0, 33)
    tensors = (problem.hidden, problem.weight.t().contiguous().t(), problem.bias, problem.target, weights)
    operator = torch.ops.maskops.linear_cross_entropy.default
    for incoming, flags in (
        ((nothing, nothing, nothing, nothing), (True, True, True, False, False, False)),
        ((ones, nothing, ones, ones), (True, False, False, True, True, True)),
        ((ones, nothing, nothing, nothing), (False, True, True, True, False, False)),
    ):
        torch.library.opcheck(operator, (*tensors, *incoming, *numbers, *flags))


@pytest.mark.processor
def test_compile(on_cpu: None) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, scale: float) -> tuple[Tensor, ...]:
        mean = maskops.linear_cross_entropy(
            hidden, weight, target, bias=bias, softcap=5.0, logit_scale=scale, shift=True
        )
        rows = maskops.linear_cross_entropy(hidden, weight, target, reduction="none", return_entropy=True)
        assert isinstance(rows, maskops.CrossEntropyOutput) and rows.entropy is not None
        return mean, rows.loss, rows.entropy

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows, scale in ((12, 0.5), (31, 2.0), (7, 1.5)):
        problem = Problem((rows,))
        runs = []
        for function in (step, compiled):
            leaves = problem.leaves()
            outputs = function(*leaves, problem.target, scale)
            total = 3.0 * outputs[0] + outputs[1].sum() + (outputs[2] * ramp(outputs[2], 1.0)).sum()
            runs.append((*outputs, *torch.autograd.grad(total, leaves)))
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b)
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


def test_export(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return maskops.linear_cross_entropy(hidden, weight, target, shift=True)

    problem = Problem((12,))
    rows = torch.export.Dim("rows", min=3)
    exported = torch.export.export(
        Layer(), (problem.hidden, problem.weight, problem.target), dynamic_shapes=({0: rows}, None, {0: rows})
    )
    other = Problem((29,))
    inputs = (other.hidden, other.weight, other.target)
    torch.testing.assert_close(exported.module()(*inputs), Layer()(*inputs))


HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3, 8), torch.zeros(10, 8), torch.zeros(2, 3, dtype=torch.int64)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "hidden: expected a tensor (..., H), got list", {"hidden": [1.0]}),
    (TypeError, "hidden has dtype int64: expected float32, bfloat16, float16 or float64", {"hidden": HIDDEN.long()}),
    (ValueError, "hidden has shape (): expected (..., H)", {"hidden": torch.zeros(())}),
    (TypeError, "weight: expected a tensor (V, H), got Linear", {"weight": torch.nn.Linear(8, 10)}),
    (TypeError, "weight has dtype complex64: expected float32", {"weight": WEIGHT.to(torch.complex64)}),
    (
        ValueError,
        "weight has shape (8, 10): expected (V, 8), a row for every word of the vocabulary, since hidden has shape "
        "(2, 3, 8): weight.t() is that",
        {"weight": torch.zeros(8, 10)},
    ),
    (ValueError, "weight has shape (0, 8): expected (V, 8)", {"weight": torch.zeros(0, 8)}),
    (ValueError, "weight is on meta, hidden on cpu: put them on one device", {"weight": WEIGHT.to("meta")}),
    (ValueError, "bias has shape (8,): expected (10,), as weight has rows", {"bias": torch.zeros(8)}),
    (TypeError, "bias: expected a tensor (V,) or None, got float", {"bias": 1.0}),
    (
        ValueError,
        "target has shape (3, 2): expected (2, 3), the shape of hidden (2, 3, 8) without the last dimension",
        {"target": TARGET.mT},
    ),
    (TypeError, "target has dtype int16: expected int64 or int32", {"target": TARGET.short()}),
    (
        TypeError,
        "target has dtype float32: expected int64 or int32 labels. Probabilities for every token are as large as the "
        "logits: maskops.cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target)",
        {"target": torch.zeros(2, 3, 10)},
    ),
    (ValueError, "class_weights has shape (8,): expected (10,)", {"class_weights": torch.ones(8)}),
    (
        ValueError,
        "target: the label that row 0 of the logits is scored against is 10, outside the vocabulary of 10",
        {"target": TARGET + 10},
    ),
    (ValueError, "mask has shape (2, 1): expected one value per target", {"mask": torch.ones(2, 1).bool()}),
    (ValueError, "label_smoothing is 2.0: expected a number in [0, 1]", {"label_smoothing": 2.0}),
    (ValueError, "reduction is 'median': expected one of", {"reduction": "median"}),
    (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 2])}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), REFUSED, ids=[words[:40] for _, words, _ in REFUSED])
def test_refusals(backend: str, kind: type[Exception], words: str, changes: dict[str, Any]) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | changes
    with pytest.raises(kind, match=re.escape(words)):
        maskops.linear_cross_entropy(**arguments)
