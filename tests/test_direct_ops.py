"""The shorter ways of packed attention, losses, softmax and caches give what the full ways give, errors included."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import maskops
from maskops import masks
from tests.served import AT_HOME
from tests.test_direct import assert_same, outcome

pytestmark = [
    pytest.mark.skipif(
        "cpu" not in AT_HOME or maskops.backends()["cpu"] != "available",
        reason="only the backend cpu has a shorter way",
    ),
    pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning"),
]

WAYS = {
    "varlen_attention": "attention",
    "cross_entropy": "cross_entropy",
    "masked_softmax": "softmax",
    "append_kv": "decode",
    "decode_attention": "decode",
}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls an op both ways, and compares what comes and whether the shorter way was gone."""

    def compare(name: str, call: Callable[[], Any], directly: bool) -> None:
        module = importlib.import_module(f"maskops.ops.{WAYS[name]}.direct")
        real, went = getattr(module, name), []

        def watched(*arguments: Any) -> Any:
            result = real(*arguments)
            went.append(result is not None and result is not False)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(module, name, watched)
            first = outcome(call)
            patch.setattr(module, name, lambda *arguments: None)
            second = outcome(call)
        assert_same(first, second)
        assert went == [directly]

    return compare


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pulled(call: Callable[..., Any], *leaves: Tensor) -> Callable[[], Any]:
    """A call with the gradients of its first result."""

    def both() -> Any:
        inputs = [x.detach().requires_grad_() for x in leaves]
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out) * torch.arange(1.0, out.shape[-1] + 1))

    return both


# ---- packed attention ------------------------------------------------------------------------------------------------

OFFSETS = torch.tensor([0, 3, 3, 9])
OTHER = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
PACKED: dict[str, tuple[bool, tuple[Any, ...], dict[str, Any]]] = {
    "offsets": (True, (OFFSETS,), {}),
    "causal": (True, (OFFSETS,), {"mask": masks.causal()}),
    "same offsets twice": (True, (OFFSETS, OFFSETS), {"mask": masks.sliding_window(1, 0)}),
    "other keys": (True, (OFFSETS, OTHER), {"mask": masks.causal(), "return_lse": True}),
    "plan": (True, (), {"mask": (masks.documents(cu_seqlens=OFFSETS) & masks.causal()).spans(9, 9)}),
    "plan and offsets": (False, (OFFSETS,), {"mask": masks.causal().spans(9, 9)}),
    "neither": (False, (), {"mask": masks.causal()}),
    "keys alone": (False, (None, OFFSETS), {}),
    "prefixes": (False, (OFFSETS,), {"mask": masks.prefix(torch.tensor([1, 2, 3]))}),
    "documents": (False, (OFFSETS,), {"mask": masks.documents(cu_seqlens=OFFSETS)}),
    "decreasing": (False, (torch.tensor([0, 5, 3]),), {}),
    "beyond": (False, (torch.tensor([0, 50]),), {}),
    "not from 0": (False, (torch.tensor([1, 9]),), {}),
    "empty": (False, (torch.tensor([], dtype=torch.int64),), {}),
    "two dimensions": (False, (OFFSETS[None],), {}),
    "bytes": (False, (OFFSETS.to(torch.uint8),), {}),
    "another number of sequences": (False, (OFFSETS, OTHER[:3]), {}),
    "a list": (False, ([0, 9],), {}),
    "meta": (False, (OFFSETS.to("meta"),), {}),
    "plan of other lengths": (False, (), {"mask": masks.causal().spans(8, 9)}),
    "slopes": (False, (OFFSETS,), {"alibi_slopes": torch.ones(4)}),
}


@pytest.mark.parametrize("name", PACKED)
def test_varlen_attention(name: str, compare: Callable[..., None]) -> None:
    directly, offsets, keywords = PACKED[name]
    k_len = 12 if name in ("other keys", "another number of sequences") else 9
    q, k, v = random(9, 4, 8), random(k_len, 2, 8, seed=1), random(k_len, 2, 4, seed=2)
    compare("varlen_attention", lambda: maskops.varlen_attention(q, k, v, *offsets, **keywords), directly)
    if directly and "return_lse" not in keywords:
        call = pulled(lambda *x: maskops.varlen_attention(*x, *offsets, **keywords), q, k, v)
        compare("varlen_attention", call, True)


def test_varlen_attention_of_wrong_tensors(compare: Callable[..., None]) -> None:
    q, k, v = random(9, 4, 8), random(9, 2, 8), random(9, 2, 4)
    for wrong in ((q[0], k, v), (q, k[:4], v), (q[:, :3], k, v), (q, k, v[None]), (q.double(), k, v), (q[:4], k, v)):
        compare("varlen_attention", lambda wrong=wrong: maskops.varlen_attention(*wrong, OFFSETS), False)


# ---- losses ----------------------------------------------------------------------------------------------------------

TARGET = torch.tensor([0, 4, -100, 2, 6])
LOSSES: dict[str, tuple[bool, dict[str, Any]]] = {
    "mean": (True, {}),
    "sum": (True, {"reduction": "sum"}),
    "another index": (True, {"ignore_index": 2, "target": TARGET.clamp(min=0)}),
    "int32": (True, {"target": TARGET.int()}),
    "bfloat16": (True, {"dtype": torch.bfloat16}),
    "nothing kept": (True, {"target": torch.full((5,), -100)}),
    "rows of a batch": (True, {"target": TARGET[None, :, None].expand(2, 5, 3), "leading": (2, 5, 3)}),
    "rows of a batch turned": (False, {"target": TARGET[:, None].expand(5, 2), "leading": (2, 5), "turned": True}),
    "rows of another batch": (False, {"target": TARGET[:, None], "leading": (1, 5)}),
    "none": (False, {"reduction": "none"}),
    "unknown": (False, {"reduction": "median"}),
    "label outside": (False, {"target": torch.tensor([0, 1, 2, 3, 7])}),
    "negative label": (False, {"target": torch.tensor([0, 1, 2, 3, -1])}),
    "float64": (False, {"dtype": torch.float64}),
    "shape": (False, {"target": TARGET[:4]}),
    "smoothing": (False, {"label_smoothing": 0.1}),
    "scale": (False, {"logit_scale": 2.0}),
    "mask": (False, {"mask": torch.ones(5, dtype=torch.bool)}),
    "shift": (False, {"shift": True}),
    "lse": (False, {"return_lse": True}),
    "in place": (False, {"inplace_backward": True}),
    "buffer": (False, {"grad_buffer": torch.zeros(5, 7)}),
    "index of another dtype": (False, {"ignore_index": 2**40, "target": TARGET.int()}),
    "index is a float": (False, {"ignore_index": -100.0}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy(name: str, compare: Callable[..., None]) -> None:
    directly, given = LOSSES[name]
    keywords = dict(given)
    target, logits = keywords.pop("target", TARGET), random(*keywords.pop("leading", (5,)), 7)
    logits = logits.to(keywords.pop("dtype", torch.float32))
    if keywords.pop("turned", False):
        logits = logits.transpose(0, 1)
    compare("cross_entropy", lambda: maskops.cross_entropy(logits, target, **keywords), directly)
    if directly:
        call = pulled(lambda x: maskops.cross_entropy(x, target, **keywords)[None], logits)
        compare("cross_entropy", call, True)


def test_cross_entropy_differentiated_in_other_ways() -> None:
    logits = random(5, 7).requires_grad_()
    loss = maskops.cross_entropy(logits, TARGET)
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5])
    (batched,) = vmap(lambda g: torch.autograd.grad(loss, logits, g, retain_graph=True))(factors)
    torch.testing.assert_close(batched, expected * factors[:, None, None])
    (kept,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close(kept, expected)
    with pytest.raises(RuntimeError, match=r"maskops\.cross_entropy has no double backward"):
        kept.sum().backward()


# ---- softmax ---------------------------------------------------------------------------------------------------------

VISIBLE = torch.tensor([1, 1, 0, 1, 0], dtype=torch.bool)
SOFTMAXES: dict[str, tuple[bool, Any, dict[str, Any]]] = {
    "nothing": (True, None, {}),
    "causal": (True, masks.causal(), {}),
    "plan": (True, masks.causal().spans(5, 5), {"dim": 3}),
    "plan of a batch": (True, masks.key_padding(torch.tensor([5, 2])).spans(5, 5), {}),
    "bool": (True, VISIBLE, {}),
    "bool of each row": (True, torch.ones(5, 5, dtype=torch.bool).tril(), {}),
    "padding": (False, masks.key_padding(torch.tensor([5, 2])), {}),
    "dense": (False, masks.dense(VISIBLE.expand(1, 1, 5, 5)).spans(5, 5), {}),
    "integers": (False, VISIBLE.int(), {}),
    "too large": (False, VISIBLE.expand(2, 2, 3, 5, 5), {}),
    "another dim": (False, VISIBLE[:, None], {"dim": 2}),
    "no dim": (False, None, {"dim": 4}),
    "plan of other lengths": (False, masks.causal().spans(4, 5), {}),
    "plan of another batch": (False, masks.key_padding(torch.tensor([5, 2, 3])).spans(5, 5), {}),
    "a word": (False, "causal", {}),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_masked_softmax(name: str, compare: Callable[..., None]) -> None:
    directly, mask, keywords = SOFTMAXES[name]
    x = random(2, 3, 5, 5)
    for return_lse in (False, True):
        wanted = {**keywords, "return_lse": return_lse}
        compare("masked_softmax", lambda wanted=wanted: maskops.masked_softmax(x, mask, **wanted), directly)
    if directly:
        compare("masked_softmax", pulled(lambda x: maskops.masked_softmax(x, mask, **keywords), x), True)
        lse = pulled(lambda x: maskops.masked_softmax(x, mask, **keywords, return_lse=True)[1], x)
        compare("masked_softmax", lse, True)


def test_masked_softmax_of_other_scores(compare: Callable[..., None]) -> None:
    x = random(2, 3, 5, 5)
    for other in (x.mT, x.double(), x.int(), x[0, 0, 0], x[:0]):
        mask = masks.causal() if other.dim() == 1 else None
        compare("masked_softmax", lambda x=other, mask=mask: maskops.masked_softmax(x, mask), False)


def test_masked_softmax_differentiated_twice() -> None:
    x = random(2, 5, 5).double().float().requires_grad_()
    expected = torch.autograd.functional.hessian(
        lambda x: torch.softmax(x.masked_fill(~VISIBLE, -torch.inf), -1).square().sum(), x
    )
    actual = torch.autograd.functional.hessian(lambda x: maskops.masked_softmax(x, VISIBLE).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- caches ----------------------------------------------------------------------------------------------------------


def cached(**changed: Tensor) -> dict[str, Any]:
    named = {
        "k_cache": random(2, 2, 6, 4),
        "v_cache": random(2, 2, 6, 3),
        "k": random(2, 2, 1, 4, seed=1),
        "v": random(2, 2, 1, 3, seed=2),
        "lengths": torch.tensor([3, 5]),
    }
    return {**named, **changed}


APPENDED: dict[str, tuple[bool, Callable[[], dict[str, Any]]]] = {
    "plain": (True, cached),
    "int32": (True, lambda: cached(lengths=torch.tensor([0, 1], dtype=torch.int32))),
    "full": (False, lambda: cached(lengths=torch.tensor([3, 6]))),
    "negative": (False, lambda: cached(lengths=torch.tensor([-1, 2]))),
    "two dimensions": (False, lambda: cached(k=random(2, 4))),
    "another batch": (False, lambda: cached(k=random(1, 2, 1, 4), v=random(1, 2, 1, 3), lengths=torch.tensor([1]))),
    "another dtype": (False, lambda: cached(k=random(2, 2, 1, 4).bfloat16())),
    "a graph": (False, lambda: cached(k=random(2, 2, 1, 4).requires_grad_())),
    "expanded": (False, lambda: cached(k_cache=random(1, 2, 6, 4).expand(2, 2, 6, 4))),
    "indices": (False, lambda: cached(batch_index=torch.tensor([1, 0]))),
    "pages": (False, lambda: cached(block_table=torch.tensor([[0], [1]]))),
}


@pytest.mark.parametrize("name", APPENDED)
def test_append_kv(name: str, compare: Callable[..., None]) -> None:
    directly, given = APPENDED[name]

    def append() -> Any:
        arguments = given()
        before = arguments["k_cache"]._version
        maskops.append_kv(**arguments)
        assert arguments["k_cache"]._version > before
        return arguments["k_cache"], arguments["v_cache"]

    compare("append_kv", append, directly)


DECODED: dict[str, tuple[bool, Callable[[], dict[str, Any]]]] = {
    "plain": (True, dict),
    "causal": (True, lambda: {"mask": masks.causal()}),
    "several queries": (True, lambda: {"q": random(2, 4, 3, 4)}),
    "lse": (False, lambda: {"return_lse": True}),
    "scale": (True, lambda: {"softmax_scale": 0.3}),
    "several queries, causal": (False, lambda: {"q": random(2, 4, 3, 4), "mask": masks.causal()}),
    "window": (False, lambda: {"mask": masks.sliding_window(1, 0)}),
    "lengths": (False, lambda: {"lengths": torch.tensor([3, 9])}),
    "width": (False, lambda: {"q": random(2, 4, 1, 3)}),
    "no width": (False, lambda: {"q": random(2, 4, 1, 0), "k_cache": random(2, 2, 6, 0)}),
    "heads": (False, lambda: {"q": random(2, 3, 1, 4)}),
    "batch": (False, lambda: {"q": random(1, 4, 1, 4)}),
    "dimensions": (False, lambda: {"q": random(4, 1, 4)}),
    "a graph": (False, lambda: {"q": random(2, 4, 1, 4).requires_grad_()}),
    "float64": (False, lambda: {"q": random(2, 4, 1, 4).double()}),
    "left padding": (False, lambda: {"leftpad": torch.tensor([1, 0])}),
    "infinite scale": (False, lambda: {"softmax_scale": float("inf")}),
}


@pytest.mark.parametrize("name", DECODED)
def test_decode_attention(name: str, compare: Callable[..., None]) -> None:
    directly, given = DECODED[name]
    cache = cached()
    named = {"q": random(2, 4, 1, 4), **{key: cache[key] for key in ("k_cache", "v_cache", "lengths")}, **given()}
    compare("decode_attention", lambda: maskops.decode_attention(**named), directly)


def test_operators_without_a_fake_kernel_promise_nothing_to_the_compiler() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("maskops::")]
    assert "maskops::attention_pattern" in names and "maskops::attention_forward" in names
    for name in names:
        operator = getattr(torch.ops.maskops, name.removeprefix("maskops::").split(".")[0]).default
        entry = torch._library.simple_registry.singleton.find(operator.name())
        is_known = entry.fake_impl.kernel is not None or operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.Meta)
        assert is_known or torch.Tag.pt2_compliant_tag not in operator.tags, name
