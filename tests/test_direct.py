"""Plain calls take a shorter way: which ones do, that it gives what the full way gives, and that it raises nothing."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import maskops
from maskops import masks
from maskops.ops.attention import direct as attention_direct
from tests.served import AT_HOME

pytestmark = pytest.mark.skipif(
    "cpu" not in AT_HOME or maskops.backends()["cpu"] != "available", reason="only the backend cpu has a shorter way"
)


def qkv(batch: int = 2, heads: int = 4, q_len: int = 5, k_len: int = 7, width: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, q_len, width), (batch, 2, k_len, width), (batch, 2, k_len, 3)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of attention went the shorter way."""
    went: list[bool] = []
    real = attention_direct.attention

    def attention(*arguments: Any) -> Any:
        outputs = real(*arguments)
        went.append(outputs is not None)
        return outputs

    monkeypatch.setattr(attention_direct, "attention", attention)
    return went


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, gradients included, or the words of its error."""
    try:
        outputs = call()
    except Exception as error:
        return type(error), str(error)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(x.detach(), x.stride(), x.dtype, x.requires_grad) for x in outputs if x is not None]


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, list) and isinstance(right, list):
        assert [x[1:] for x in left] == [x[1:] for x in right]
        assert all(torch.equal(x[0], y[0]) for x, y in zip(left, right, strict=True))
    else:
        assert left == right


def both_ways(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[Any, Any]:
    """The outcomes of a call that may take the shorter way and of one that may not."""
    first = outcome(call)
    with monkeypatch.context() as patch:
        patch.setattr(attention_direct, "attention", lambda *arguments: None)
        return first, outcome(call)


MASKS = {
    "none": lambda: None,
    "causal": masks.causal,
    "window": lambda: masks.causal() & masks.sliding_window(2, 1),
    "two spans": lambda: masks.causal() & (masks.sliding_window(1, 0) | masks.prefix(1)),
    "plan": lambda: masks.causal().spans(5, 7),
    "plan of a batch": lambda: masks.key_padding(torch.tensor([7, 3])).spans(5, 7),
    "padding": lambda: masks.key_padding(torch.tensor([7, 3])),
    "dense": lambda: masks.dense(torch.ones(1, 1, 5, 7, dtype=torch.bool).tril()),
    "plan of a dense mask": lambda: masks.dense(torch.ones(1, 1, 5, 7, dtype=torch.bool).tril()).spans(5, 7),
}
DIRECT = ("none", "causal", "window", "two spans", "plan", "plan of a batch")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_what_the_full_way_gives(
    name: str, dtype: torch.dtype, directly: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [x.to(dtype).requires_grad_() for x in qkv()]
    weights = torch.randn(2, 4, 5, 3).to(dtype)

    def forward() -> Any:
        with torch.no_grad():
            return maskops.attention(*leaves, MASKS[name](), return_lse=True, softmax_scale=0.3)

    def backward() -> Any:
        out = maskops.attention(*leaves, MASKS[name]())
        return out, *torch.autograd.grad(out, leaves, weights)

    def backward_of_lse() -> Any:
        out, lse = maskops.attention(*leaves, MASKS[name](), return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), leaves, (weights, torch.ones_like(lse)))

    def backward_of_nothing_else() -> Any:
        _, lse = maskops.attention(*leaves, MASKS[name](), return_lse=True)
        return torch.autograd.grad(lse.sum(), leaves, allow_unused=True)

    def backward_of_strides() -> Any:  # a gradient whose rows are not contiguous
        out = maskops.attention(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves), MASKS[name]())
        return out, *torch.autograd.grad(out.sum(), leaves)

    for call in (forward, backward, backward_of_lse, backward_of_nothing_else, backward_of_strides):
        assert_same(*both_ways(monkeypatch, call))
    assert directly == [name in DIRECT] * len(directly) and len(directly) == 5


def refused() -> dict[str, Callable[[], Any]]:
    """Calls that are wrong, and calls whose way is another."""
    q, k, v = qkv()
    plan = masks.causal().spans(5, 7)

    def call(*tensors: Any, mask: Any = None, **keywords: Any) -> Callable[[], Any]:
        return lambda: maskops.attention(*tensors, mask, **keywords)

    return {
        "three dimensions": call(q[0], k, v),
        "no tensor": call([1.0], k, v),
        "integers": call(q.int(), k, v),
        "two dtypes": call(q, k.bfloat16(), v),
        "float64": call(q.double(), k.double(), v.double()),
        "batch": call(q[:1], k, v),
        "width": call(q[..., :4], k, v),
        "no width": call(q[..., :0], k[..., :0], v),
        "heads": call(q[:, :3], k, v),
        "keys": call(q, k[:, :, :3], v),
        "k has two dimensions": call(q, k[0, 0], v),
        "rows that are not contiguous": call(q.mT.contiguous().mT, k, v),
        "meta": call(q, k.to("meta"), v),
        "plan for other lengths": call(q[:, :, :4], k, v, mask=plan),
        "plan for another batch": call(q, k, v, mask=masks.key_padding(torch.tensor([1, 2, 3])).spans(5, 7)),
        "plan on another device": call(q, k, v, mask=plan._replace(start=plan.start.to("meta"))),
        "mask is a tensor": call(q, k, v, mask=torch.ones(5, 7, dtype=torch.bool)),
        "mask is a word": call(q, k, v, mask="causal"),
        "scale is too large": call(q, k, v, softmax_scale=1e300),
        "scale is no number": call(q, k, v, softmax_scale="1"),
        "scale is nan": call(q, k, v, softmax_scale=float("nan")),
        "softcap": call(q, k, v, softcap=2.0),
        "softcap is a tensor": call(q, k, v, softcap=torch.zeros(())),
        "dropout": call(q, k, v, dropout_p=1.5),
        "unknown backend": call(q, k, v, backend="fast"),
        "reference": call(q, k, v, backend="reference"),
        "bias": call(q, k, v, bias=torch.zeros(5, 7)),
        "sinks": call(q, k, v, sinks=torch.zeros(4)),
    }


@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
@pytest.mark.parametrize("name", refused())
def test_leaves_the_rest_to_the_full_way(name: str, directly: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(*both_ways(monkeypatch, refused()[name]))
    assert directly == [False]


def test_leaves_what_intervenes_to_the_full_way(directly: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()

    def attend(*tensors: Any) -> Any:
        return maskops.attention(*tensors)

    expected = attend(q, k, v)
    assert directly == [True]
    with maskops.use_backend("reference"):
        attend(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(q, k, v).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        attend(q, k, v)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        attend(q, k, v)
    assert torch.equal(vmap(attend)(q[None], k[None], v[None])[0], expected)
    grad(lambda x: attend(x, k, v).sum())(q)
    attend(q.as_subclass(type("Mine", (Tensor,), {})), k, v)
    monkeypatch.setenv("MASKOPS_BACKEND", "reference")
    attend(q, k, v)
    monkeypatch.setenv("MASKOPS_BACKEND", "none such")
    with pytest.raises(TypeError, match="q is a list"):
        attend([1.0], k, v)
    with pytest.raises(ValueError, match="MASKOPS_BACKEND"):
        attend(q, k, v)
    assert not any(directly[1:])
    monkeypatch.setenv("MASKOPS_BACKEND", "cpu")
    attend(q, k, v)
    assert directly[-1]


def test_what_is_left_of_a_transform() -> None:
    left: list[Tensor] = []
    q, k, v = qkv()
    grad(lambda x: left.append(x) or x.sum())(q)  # type: ignore[func-returns-value]
    assert torch.equal(maskops.attention(left[0], k, v), maskops.attention(q, k, v))


def test_backward_under_vmap_and_twice() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    out = maskops.attention(*leaves, masks.causal())
    weights = torch.randn(3, *out.shape)

    def pull(weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, weight, retain_graph=True)

    expected = [torch.stack(parts) for parts in zip(*map(pull, weights), strict=True)]
    batched = torch.autograd.grad(out, leaves, weights, retain_graph=True, is_grads_batched=True)
    for results in (vmap(pull)(weights), batched):
        for left, right in zip(results, expected, strict=True):
            torch.testing.assert_close(left, right)
    kept = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"maskops\.attention has no double backward"):
        kept[0].sum().backward()


def test_a_changed_plan_is_noticed() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    plan = masks.causal().spans(5, 7)
    out = maskops.attention(*leaves, plan)
    plan.end.fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- plans that masks keep -------------------------------------------------------------------------------------------


def test_a_mask_keeps_plans_that_nobody_else_holds() -> None:
    scores = torch.randn(2, 5, 7)
    mask = masks.causal() & masks.sliding_window(2, 0)
    expected = maskops.masked_softmax(scores, mask)
    (kept,) = mask._kept.values()
    assert torch.equal(mask.spans(5, 7, grad=False).end, kept.end)
    mask.spans(5, 7).end.zero_()
    assert torch.equal(maskops.masked_softmax(scores, mask), expected)
    for length in range(1, masks._MOST_KEPT + 3):
        maskops.masked_softmax(scores[:, :1, :1].expand(2, 1, length).contiguous(), mask)
    assert 0 < len(mask._kept) <= masks._MOST_KEPT
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert not copied._kept and torch.equal(maskops.masked_softmax(scores, copied), expected)


def test_long_plans_and_those_of_tensors_are_not_kept() -> None:
    mask = masks.causal() & masks.sliding_window(8, 0)
    maskops.masked_softmax(torch.zeros(1, masks._LONGEST_KEPT), mask)
    lengths = torch.tensor([7, 3])
    padding = masks.key_padding(lengths)
    q, k, v = qkv()
    before = maskops.attention(q, k, v, padding)
    lengths[1] = 5
    assert not mask._kept and not padding._kept and not torch.equal(maskops.attention(q, k, v, padding), before)


def test_a_plan_made_under_inference_mode_serves_training() -> None:
    mask = masks.causal() & masks.sliding_window(3, 0)
    scores = torch.randn(2, 5, 7, requires_grad=True)
    with torch.inference_mode():
        expected = maskops.masked_softmax(scores, mask)
    weights = maskops.masked_softmax(scores, mask)
    weights.square().sum().backward()
    assert torch.equal(weights, expected)


def test_a_plan_follows_the_values_of_offsets_however_they_change() -> None:
    """A kernel keeps the plans of its last calls, and finds them by these values alone."""
    values = np.array([0, 5, 9])
    offsets = torch.from_numpy(values)  # whose version does not count what numpy writes
    tensors = [torch.randn(9, 2, 4, requires_grad=True) for _ in range(3)]
    outputs = []
    for border in (5, 3, 5, 8):
        values[1] = border
        outputs.append(maskops.varlen_attention(*tensors, offsets, mask=masks.causal()))
        alone = [
            maskops.attention(*(x[rows].transpose(0, 1)[None] for x in tensors), masks.causal())
            for rows in (slice(0, border), slice(border, 9))
        ]
        torch.testing.assert_close(outputs[-1], torch.cat([x[0].transpose(0, 1) for x in alone]))
    values[:] = 0
    gradients = [torch.autograd.grad(out.sum(), tensors) for out in outputs]
    assert all(torch.equal(x, y) for x, y in zip(gradients[0], gradients[2], strict=True))
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_a_call_that_fails_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def fail(*arguments: Any) -> Any:
        called.append(arguments)
        raise RuntimeError("maskops: out of memory: no 1.00 MiB on the processor")

    monkeypatch.setattr(attention_direct, "_pattern", fail)
    monkeypatch.setattr(attention_direct, "_apply_pattern", fail)
    for leaves in (qkv(), tuple(x.requires_grad_() for x in qkv())):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            maskops.attention(*leaves)
    assert len(called) == 2


def test_checkpointing_may_meet_a_mode_in_one_of_its_passes() -> None:
    """Each way saves other tensors, and a forward pass that is computed again has to save what the first one saved."""
    x, labels = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    for call, inputs in (
        (lambda x: maskops.cross_entropy(x, labels), (x,)),
        (lambda x: maskops.masked_softmax(x, masks.causal()).square().sum(), (x,)),
        (lambda q, k, v: maskops.attention(q, k, v, masks.causal()).sum(), (q, k, v)),
    ):
        with FlopCounterMode(display=False):
            loss = checkpoint(call, *inputs, use_reentrant=False)
        again = torch.autograd.grad(loss, inputs)
        for ours, theirs in zip(again, torch.autograd.grad(call(*inputs), inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_hook_that_raises_is_called_once() -> None:
    called = []

    def pack(tensor: Tensor) -> Tensor:
        called.append(tensor.shape)
        raise RuntimeError("no room")

    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), pytest.raises(RuntimeError, match="no room"):
        maskops.attention(q, k, v)
    assert len(called) == 1


@pytest.mark.parametrize("name", ["mask", "token_weights", "class_weights", "cu_seqlens", "num_items", "grad_buffer"])
def test_false_is_no_absent_argument(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        maskops.cross_entropy(torch.randn(4, 9), torch.arange(4), **{name: False})  # type: ignore[call-overload]


def test_odd_arguments_get_the_words_of_the_full_way() -> None:
    scores = torch.randn(3, 5)
    with pytest.raises(ValueError, match="mask is a plan for"):
        maskops.masked_softmax(torch.zeros(0, 4, 5, 7), masks.causal().spans(5, 8))
    old = copy.copy(masks.sliding_window(2, 0))
    state = {name: value for name, value in old.__getstate__().items() if name != "_kept"}
    revived = object.__new__(masks.Mask)
    revived.__setstate__(state)
    assert torch.equal(maskops.masked_softmax(scores, revived), maskops.masked_softmax(scores, old))


def test_a_function_mode_leaves_nothing_in_a_mask() -> None:
    class Marks(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = function(*arguments, **(keywords or {}))
            return result.as_subclass(Marked) if type(result) is Tensor else result

    class Marked(Tensor):
        pass

    mask = masks.chunked(4)
    with Marks():
        maskops.attention(*qkv(), mask)
    assert type(maskops.attention(*qkv(), mask)) is Tensor
