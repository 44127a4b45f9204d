"""torch's ways of differentiating: checkpointing, repeated and double backward, torch.func."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import maskops
from maskops import masks
from tests.served import AT_HOME

VOCABULARY = 5


@pytest.fixture(params=AT_HOME, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Every backend that runs here, in turn, for all calls of the test."""
    name = str(request.param)
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    torch.manual_seed(0)
    with maskops.use_backend(name):
        yield name


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return maskops.attention(q, k, v, masks.causal() & masks.sliding_window(3, 0), softcap=5.0)


def qkv(*leading: int, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(*leading, 2, 4, 6, 8),
        torch.randn(*leading, 2, kv_heads, 6, 8),
        torch.randn(*leading, 2, kv_heads, 6, 3),
    )


def logits_and_target(*leading: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(VOCABULARY, (*leading, 7))
    target[..., 2] = -100
    return torch.randn(*leading, 7, VOCABULARY), target


def assert_close(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return maskops.linear_cross_entropy(hidden, weight, target, bias=bias, label_smoothing=0.1, softcap=4.0)


class Block(nn.Module):
    """Attention with dropout, and the loss of a head, over packed sequences."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24)
        self.head = nn.Linear(8, VOCABULARY)
        self.dropout_p = dropout_p

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        q, k, v = self.projection(x).unflatten(1, (3, 2, 4)).unbind(1)
        offsets = torch.tensor([0, 3, 7])
        out = maskops.varlen_attention(q, k, v, offsets, mask=masks.causal(), dropout_p=self.dropout_p)
        return maskops.cross_entropy(self.head(out.flatten(1)), target, cu_seqlens=offsets, shift=True)


# ---- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, dropout_p: float) -> None:
    """Recomputation draws the mask of the first pass again: its seed comes from torch's generator."""
    block = Block(dropout_p)
    x, target = torch.randn(7, 8), torch.randint(VOCABULARY, (7,))
    results = []
    for recompute in (False, True):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        loss = checkpoint(block, leaf, target, use_reentrant=use_reentrant) if recompute else block(leaf, target)
        torch.rand(5)  # the generator moves on before the backward pass
        loss.backward()
        results.append([loss.detach(), leaf.grad, *(x.grad for x in block.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
def test_seed_of_dropout_is_that_of_torch() -> None:
    block, x, target = Block(0.5), torch.randn(7, 8), torch.randint(VOCABULARY, (7,))
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(block(x, target).item())
    assert losses[0] == losses[1] != losses[2]


# ---- the same graph more than once -----------------------------------------------------------------------------------


def test_backward_twice() -> None:
    block = Block()
    x, target = torch.randn(7, 8, requires_grad=True), torch.randint(VOCABULARY, (7,))
    loss = block(x, target)
    first = torch.autograd.grad(loss, [x, *block.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *block.parameters()])
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward(backend: str) -> None:
    """The kernels say which backend has one; the reference has."""
    q, k, v = (x.double() if backend == "reference" else x for x in qkv())
    logits, target = logits_and_target()
    logits = logits.to(q.dtype)
    functions: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda *x: attend(*x), (q[:1, :, :3], k[:1, :, :3], v[:1, :, :3])),
        (lambda x: maskops.cross_entropy(x, target, z_loss=0.1, label_smoothing=0.1), (logits,)),
        (lambda x, w: maskops.linear_cross_entropy(x, w, target, z_loss=0.1), (logits, torch.randn(9, 5).to(q.dtype))),
    ]
    for function, inputs in functions:
        leaves = tuple(x.clone().requires_grad_() for x in inputs)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
            continue
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no double backward in a kernel.*reference"):
            torch.autograd.grad(grads[0].sum(), leaves)


def test_double_backward_of_softmax() -> None:
    """Its gradient is written in terms of its result, so every backend has a second one; merging is plain torch."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.rand(2, 1, 4) < 0.7
    expected = torch.where(mask, x, -1e30).softmax(-1) * mask.any(-1, keepdim=True)
    seconds = []
    for weights in (maskops.masked_softmax(x, mask), expected):
        (first,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x))
    assert_close(*seconds)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def test_func_grad_and_vjp() -> None:
    target = torch.randint(VOCABULARY, (3, 7))
    inputs = qkv()
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    cotangent = torch.randn(2, 4, 6, 3)
    expected = torch.autograd.grad(attend(*leaves), leaves, cotangent)
    assert_close(vjp(attend, *inputs)[1](cotangent), expected)
    assert_close(grad(lambda *x: (attend(*x) * cotangent).sum(), argnums=(0, 1, 2))(*inputs), expected)

    logits = torch.randn(3, 7, VOCABULARY)
    leaf = logits.clone().requires_grad_()
    (expected_,) = torch.autograd.grad(maskops.cross_entropy(leaf, target), leaf)
    assert_close(grad(maskops.cross_entropy)(logits, target), expected_)
    assert_close(vjp(lambda x: maskops.cross_entropy(x, target), logits)[1](torch.ones(()))[0], expected_)

    layer = (torch.randn(3, 7, 6), torch.randn(VOCABULARY, 6), torch.randn(VOCABULARY))
    leaves = tuple(x.clone().requires_grad_() for x in layer)
    expected = torch.autograd.grad(linear_loss(*leaves, target), leaves)
    assert_close(grad(linear_loss, argnums=(0, 1, 2))(*layer, target), expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, 1, 0), (0, None, None), (None, 0, 1)])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_vmap_of_attention(in_dims: tuple[int | None, ...], kv_heads: int) -> None:
    """Samples become heads: the results are those of one call for each."""
    samples = qkv(3, kv_heads=kv_heads)
    inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(samples, in_dims, strict=True)]

    def sample(number: int) -> list[Tensor]:
        return [x[0 if dim is None else number] for x, dim in zip(samples, in_dims, strict=True)]

    assert_close(vmap(attend, in_dims)(*inputs), torch.stack([attend(*sample(i)) for i in range(3)]))
    grads = grad(lambda *x: attend(*x).square().sum(), argnums=(0, 1, 2))
    expected = [torch.stack(parts) for parts in zip(*(grads(*sample(i)) for i in range(3)), strict=True)]
    assert_close(vmap(grads, in_dims)(*inputs), tuple(expected))


def test_vmap_of_plans() -> None:
    """Lengths of their own give every sample a plan of its own."""
    q, k, v = qkv(3)
    lengths = torch.tensor([[6, 2], [3, 0], [1, 5]])

    def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return maskops.attention(q, k, v, masks.padding(lengths) & masks.causal())

    expected = torch.stack([padded(*sample) for sample in zip(q, k, v, lengths, strict=True)])
    assert_close(vmap(padded)(q, k, v, lengths), expected)
    grads = grad(lambda *x: padded(*x).square().sum())
    expected = torch.stack([grads(*sample) for sample in zip(q, k, v, lengths, strict=True)])
    assert_close(vmap(grads)(q, k, v, lengths), expected)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 0)])
def test_vmap_of_cross_entropy(in_dims: tuple[int | None, int | None]) -> None:
    """Samples become rows."""
    logits, target = logits_and_target(3)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return maskops.cross_entropy(logits, target, z_loss=0.1, label_smoothing=0.1)

    inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip((logits, target), in_dims, strict=True)]
    pairs = [[x[0 if dim is None else i] for x, dim in zip((logits, target), in_dims, strict=True)] for i in range(3)]
    assert_close(vmap(loss, in_dims)(*inputs), torch.stack([loss(*pair) for pair in pairs]))
    assert_close(vmap(grad(loss), in_dims)(*inputs), torch.stack([grad(loss)(*pair) for pair in pairs]))

    def everything(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        mask = (target != 1).to(torch.int32)
        found = maskops.cross_entropy(logits, target, mask=mask, return_entropy=True, return_argmax=True)
        return found.loss, found.entropy, found.argmax

    expected = tuple(torch.stack(parts) for parts in zip(*(everything(*pair) for pair in pairs), strict=True))
    assert_close(vmap(everything, in_dims)(*inputs), expected)


@pytest.mark.parametrize("in_dims", [(0, None, None, 0), (1, 2, None, 0), (None, 0, 0, None)])
def test_vmap_of_linear_cross_entropy(in_dims: tuple[int | None, ...]) -> None:
    _, target = logits_and_target(3)
    samples = (torch.randn(3, 7, 6), torch.randn(3, VOCABULARY, 6), torch.randn(3, VOCABULARY), target)
    inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(samples, in_dims, strict=True)]
    calls = [[x[0 if dim is None else i] for x, dim in zip(samples, in_dims, strict=True)] for i in range(3)]
    assert_close(vmap(linear_loss, in_dims)(*inputs), torch.stack([linear_loss(*call) for call in calls]))
    for argnums in ((0,), (0, 1, 2)):
        grads = grad(linear_loss, argnums=argnums)
        expected = [torch.stack(parts) for parts in zip(*(grads(*call) for call in calls), strict=True)]
        assert_close(vmap(grads, in_dims)(*inputs), tuple(expected))


@pytest.mark.parametrize("kind", ["bool", "samples", "causal", "lengths", "none"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_vmap_of_softmax(kind: str, dim: int) -> None:
    x, lengths = torch.randn(3, 2, 2, 5, 5), torch.tensor([[5, 2], [1, 4], [3, 3]])
    shared, own = torch.rand(5, 5) < 0.5, torch.rand(3, 5, 5) < 0.5

    def weights(x: Tensor, own: Tensor, lengths: Tensor) -> Tensor:
        every = {
            "bool": shared,
            "samples": own,
            "causal": masks.causal(),
            "lengths": masks.padding(lengths) & masks.causal(),
        }
        return maskops.masked_softmax(x, every.get(kind), dim)

    expected = torch.stack([weights(*sample) for sample in zip(x, own, lengths, strict=True)])
    assert_close(vmap(weights)(x, own, lengths), expected)
    grads = grad(lambda *inputs: weights(*inputs).square().sum())
    expected = torch.stack([grads(*sample) for sample in zip(x, own, lengths, strict=True)])
    assert_close(vmap(grads)(x, own, lengths), expected)


@pytest.mark.parametrize("op", ["attention", "cross_entropy", "linear_cross_entropy", "masked_softmax"])
def test_grad_of_vmap(op: str) -> None:
    """Inside of vmap a tensor does not say that it is differentiated outside of it."""
    x, weight, target = torch.randn(3, 2, 4, 6), torch.randn(6, 6), torch.tensor([[1, 5, 0, 3], [2, 2, 4, 0]])

    def loss(x: Tensor) -> Tensor:
        if op == "attention":
            return maskops.attention(x[None], x[None], x[None], masks.causal()).square().sum()
        if op == "masked_softmax":
            return maskops.masked_softmax(x, torch.arange(6) < 4).square().sum()
        extra = (weight,) if op == "linear_cross_entropy" else ()
        result: Tensor = getattr(maskops, op)(x, *extra, target)
        return result

    expected = torch.stack([grad(loss)(sample) for sample in x])
    assert expected.abs().max() > 1e-3
    assert_close(grad(lambda x: vmap(loss)(x).sum())(x), expected)


def test_vmap_of_decoding() -> None:
    """A cache holds no graph: gradients are refused, also where vmap hides that they are wanted."""
    q, keys, lengths = torch.randn(3, 2, 4, 1, 8), torch.randn(2, 4, 9, 8), torch.tensor([9, 3])

    def decoded(q: Tensor) -> Tensor:
        return vmap(lambda q: maskops.decode_attention(q, keys, keys, lengths))(q)

    expected = torch.stack([maskops.decode_attention(x, keys, keys, lengths) for x in q])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch runs the samples one by one
        assert_close(decoded(q), expected)
    with pytest.raises(ValueError, match="q requires a gradient"):
        grad(lambda q: decoded(q).sum())(q)


def test_vmap_of_merge() -> None:
    parts = (torch.randn(3, 2, 4, 6, 8), torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6, 8), torch.randn(3, 2, 4, 6))
    expected = [maskops.merge_attention(*sample) for sample in zip(*parts, strict=True)]
    assert_close(vmap(maskops.merge_attention)(*parts), tuple(torch.stack(x) for x in zip(*expected, strict=True)))


def test_vmap_of_checks(backend: str) -> None:
    """A label outside the vocabulary is found in a sample as well, where values are looked at."""
    logits, target = logits_and_target(3)
    target[1, 3] = VOCABULARY
    if backend == "reference":
        # Plain torch cannot look at values under vmap: the label is clamped, and no memory outside is touched.
        assert vmap(maskops.cross_entropy)(logits, target).shape == (3,)
    else:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            vmap(maskops.cross_entropy)(logits, target)


def test_gradients_of_each_sample() -> None:
    block = Block()
    parameters = {name: x.detach() for name, x in block.named_parameters()}
    x, target = torch.randn(3, 7, 8), torch.randint(VOCABULARY, (3, 7))

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return functional_call(block, parameters, (x, target))  # type: ignore[no-any-return]

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, target)
    for sample in range(3):
        for name, expected in grad(loss)(parameters, x[sample], target[sample]).items():
            assert_close(found[name][sample], expected)


def test_jacobian() -> None:
    """jacrev is vmap over vjp: cotangents become heads and rows."""
    q, k, v = (x[:1, :1, :3, :4] for x in qkv())
    expected = torch.autograd.functional.jacobian(lambda q: attend(q, k, v), q)
    assert_close(jacrev(lambda q: attend(q, k, v))(q), expected)
    logits, target = logits_and_target()

    def losses(logits: Tensor) -> Tensor:
        return maskops.cross_entropy(logits, target, reduction="none")

    assert_close(jacrev(losses)(logits), torch.autograd.functional.jacobian(losses, logits))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode(backend: str) -> None:
    """The kernels refuse it by name, never without a word; the reference has it."""
    inputs, (logits, target) = qkv(), logits_and_target()
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (attend, inputs),
        (lambda q: attend(q, *inputs[1:]), inputs[:1]),
        (lambda x: maskops.cross_entropy(x, target), (logits,)),
        (lambda x: maskops.linear_cross_entropy(x, logits, target), (torch.randn(7, VOCABULARY),)),
        (lambda x: maskops.masked_softmax(x, masks.causal()), (torch.randn(4, 4),)),
    ]
    for function, primals in calls:
        tangents = tuple(torch.randn_like(x) for x in primals)
        if backend != "reference":
            for refused in (
                lambda: jvp(function, primals, tangents),  # noqa: B023
                lambda: hessian(lambda x: function(x, *primals[1:]).sum())(primals[0]),  # noqa: B023
            ):
                with pytest.raises(NotImplementedError, match=r"forward mode AD.*reference"):
                    refused()
            continue
        _, tangent = jvp(function, primals, tangents)
        steps = [function(*(x + s * t for x, t in zip(primals, tangents, strict=True))) for s in (1e-3, -1e-3)]
        torch.testing.assert_close(tangent, (steps[0] - steps[1]) / 2e-3, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_of_something_else() -> None:
    """Inside a forward-mode computation, calls on tensors without a tangent are calls like any other."""
    q, k, v = qkv()
    out, tangent = jvp(lambda s: attend(q, k, v) * s, (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert_close(out, 2 * attend(q, k, v))
    assert_close(tangent, attend(q, k, v))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batched_incoming_gradients(backend: str) -> None:
    """Also where a loss has its gradients already, or may write them over the logits."""
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    target, scales = torch.tensor([1, 2, -100, 3]), torch.tensor([0.5, -2.0, 3.0])
    with maskops.use_backend(backend):

        def linear() -> torch.Tensor:
            return maskops.linear_cross_entropy(hidden, weight, target)

        def in_place() -> torch.Tensor:
            return maskops.cross_entropy((hidden @ weight.t()) * 1.0, target, inplace_backward=True)

        for loss in (linear, in_place):
            batched = torch.autograd.grad(loss(), [hidden, weight], scales, is_grads_batched=True)
            single = torch.autograd.grad(loss(), [hidden, weight])
            for ours, expected in zip(batched, single, strict=True):
                torch.testing.assert_close(ours, expected * scales[:, None, None])
