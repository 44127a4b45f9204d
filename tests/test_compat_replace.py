"""replace_sdpa: torch's own modules give torch's answers on maskops, and the report tells what ran where."""

import contextlib
import copy
import math
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import maskops
from maskops.compat import recognise

F = torch.nn.functional
SDPA, MULTI_HEAD, CROSS_ENTROPY = "scaled_dot_product_attention", "nn.MultiheadAttention", "cross_entropy"

pytestmark = pytest.mark.skipif(
    maskops.backends()["cpu"] != "available", reason=f"what is replaced runs on cpu: {maskops.backends()['cpu']}"
)


@pytest.fixture(autouse=True)
def _torch_deprecates_masks_of_two_kinds() -> object:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched .* is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
        warnings.filterwarnings("ignore", "enable_nested_tensor is True", UserWarning)
        yield


def gradients(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """Output, and gradients of all parameters that have one."""
    module = copy.deepcopy(module)
    out = run(module)
    torch.manual_seed(5)
    (out * torch.randn_like(out)).sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


def test_scaled_dot_product_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
    calls = [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(1)},
        {"attn_mask": torch.zeros(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)},
        {"scale": 0.5},
    ]
    expected = [F.scaled_dot_product_attention(q, k, v, **call) for call in calls]
    with maskops.replace_sdpa() as report:
        for call, theirs in zip(calls, expected, strict=True):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **call), theirs)
            torch.testing.assert_close(F.scaled_dot_product_attention(query=q, key=k, value=v, **call), theirs)
    assert report.served == {SDPA: 10} and not report.unserved
    F.scaled_dot_product_attention(q, k, v)
    assert report.served == {SDPA: 10}


_PADDED = torch.arange(6) >= torch.tensor([[4], [6], [5]])
_CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
_ENCODER_ARGUMENTS = {
    "no mask": {},
    "causal": {"mask": _CAUSAL},
    "causal hint": {"mask": _CAUSAL, "is_causal": True},
    "padding": {"src_key_padding_mask": _PADDED},
    "padding and causal": {"mask": _CAUSAL, "src_key_padding_mask": _PADDED},
    "bool mask": {"mask": -math.inf == _CAUSAL, "src_key_padding_mask": _PADDED},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", _ENCODER_ARGUMENTS.values(), ids=_ENCODER_ARGUMENTS)
def test_transformer_encoder(arguments: dict[str, object], training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 3).train(training), torch.randn(3, 6, 16)
    keep = ~_PADDED if "src_key_padding_mask" in arguments else torch.ones(3, 6, dtype=torch.bool)
    expected = gradients(encoder, lambda module: module(x, **arguments)[keep])
    with maskops.replace_sdpa() as report:
        assert_same(gradients(encoder, lambda module: module(x, **arguments)[keep]), expected)
    assert report.served == {MULTI_HEAD: 3} and not report.unserved
    # Without gradients torch would take its fast path, which never comes to attention by name.
    if not training:
        with torch.no_grad(), maskops.replace_sdpa() as report:
            torch.testing.assert_close(encoder(x, **arguments)[keep], expected[0])
        assert report.served == {MULTI_HEAD: 3} and "fast path" in report.notes[0]


def test_masks_of_an_encoder_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = recognise._exact_runs
    monkeypatch.setattr(recognise, "_exact_runs", lambda allowed: reads.append(allowed.shape) or original(allowed))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 4)
    with maskops.replace_sdpa() as report:
        encoder(torch.randn(3, 6, 16), mask=_CAUSAL.clone(), src_key_padding_mask=_PADDED)
    assert report.served == {MULTI_HEAD: 4}
    # Each on its own, and never their sum of the size of the scores.
    assert sorted(reads) == [(1, 1, 6, 6), (3, 1, 1, 6)]


@pytest.mark.parametrize("batch_first", [True, False])
def test_whole_transformer(batch_first: bool) -> None:
    torch.manual_seed(1)
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=batch_first)
    source, target = torch.randn(3, 6, 16), torch.randn(3, 6, 16)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)

    def run(module: nn.Module) -> Tensor:
        return module(source, target, tgt_mask=_CAUSAL, memory_key_padding_mask=_PADDED)

    expected = gradients(model, run)
    with maskops.replace_sdpa() as report:
        assert_same(gradients(model, run), expected)
    assert report.served == {MULTI_HEAD: 6} and not report.unserved


_ATTENTION_MODULES = {
    "self": ({}, 16, 16),
    "no bias": ({"bias": False}, 16, 16),
    "other widths": ({"kdim": 12, "vdim": 10}, 12, 10),
    "keys appended": ({"add_bias_kv": True, "add_zero_attn": True}, 16, 16),
}


@pytest.mark.parametrize(("options", "k_width", "v_width"), _ATTENTION_MODULES.values(), ids=_ATTENTION_MODULES)
@pytest.mark.parametrize("is_batched", [True, False])
def test_multi_head_attention(options: dict[str, object], k_width: int, v_width: int, is_batched: bool) -> None:
    torch.manual_seed(2)
    module = nn.MultiheadAttention(16, 2, **options)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    q, k, v = torch.randn(5, 3, 16), torch.randn(6, 3, k_width), torch.randn(6, 3, v_width)
    padded = _PADDED
    if not is_batched:
        q, k, v, padded = q[:, 0], k[:, 0], v[:, 0], padded[0]
    hidden = torch.ones(5, 6, dtype=torch.bool).triu(2)
    masks = [
        {},
        {"key_padding_mask": padded},
        {"attn_mask": hidden},
        {"attn_mask": hidden.expand(6 if is_batched else 2, 5, 6).contiguous(), "key_padding_mask": padded},
    ]
    for arguments in masks:
        expected = gradients(module, lambda m, a=arguments: m(q, k, v, need_weights=False, **a)[0])
        with maskops.replace_sdpa() as report:
            assert_same(gradients(module, lambda m, a=arguments: m(q, k, v, need_weights=False, **a)[0]), expected)
        assert report.served == {MULTI_HEAD: 1} and not report.unserved


def test_a_sequence_of_nothing_but_padding() -> None:
    """torch gives NaN (which its fast path hides); here the output is what a zero gives."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x, padded = torch.randn(2, 4, 16), torch.tensor([[True], [False]]).expand(2, 4)
    with maskops.replace_sdpa():
        out, _ = module(x, x, x, key_padding_mask=padded, need_weights=False)
    torch.testing.assert_close(out[0], module.out_proj.bias.expand(4, 16))
    assert bool(out.isfinite().all())


def test_what_torch_keeps_is_reported() -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 4, 16)
    expected, expected_weights = module(x, x, x)
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    wanted = F.scaled_dot_product_attention(q, q, q)
    with maskops.replace_sdpa() as report:
        out, weights = module(x, x, x)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), wanted)
    assert torch.equal(out, expected) and torch.equal(weights, expected_weights)
    assert not report.served
    reasons = dict(report.unserved.keys())
    assert reasons[MULTI_HEAD].endswith("pass need_weights=False")
    assert reasons[SDPA] == "cpu: it takes float32, bfloat16, float16, not float64"
    assert "1  nn.MultiheadAttention: on torch, need_weights=True" in str(report)
    # Asked for by name, the reference is no fall-back.
    with maskops.use_backend("reference"), maskops.replace_sdpa() as report:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), wanted)
    assert report.served == {SDPA: 1}


def test_wrong_arguments_are_refused_by_torch() -> None:
    q = torch.randn(1, 2, 4, 8)
    for call in (
        lambda: F.scaled_dot_product_attention(q, q[..., :3], q),
        lambda: F.scaled_dot_product_attention(q, q, q, torch.zeros(3, 3)),
        lambda: F.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 9])),
        lambda: F.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1])),
        lambda: F.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), reduction="median"),
        lambda: F.multi_head_attention_forward(
            q[0], q[0], q[0], 6, 2, None, None, None, None, False, 0.0, None, None, need_weights=False
        ),
    ):
        with pytest.raises(Exception) as outside:  # noqa: PT011 - whatever torch raises
            call()
        with maskops.replace_sdpa() as report, pytest.raises(type(outside.value)) as inside:
            call()
        assert str(inside.value) == str(outside.value)
        assert len(report.unserved) == 1 and not report.served


_LOSS_SHAPES = {"1d": (7,), "2d": (5, 7), "3d": (2, 7, 3), "4d": (2, 7, 3, 4)}


@pytest.mark.parametrize("shape", _LOSS_SHAPES.values(), ids=_LOSS_SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(shape: tuple[int, ...], reduction: str) -> None:
    torch.manual_seed(3)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(7, shape[:0] if len(shape) == 1 else (shape[0], *shape[2:]))
    skipped = target.clone()
    if skipped.dim():
        skipped.view(-1)[::3] = -100
    for arguments in (
        {"target": target, "label_smoothing": 0.1},
        {"target": skipped},
        {"target": target, "ignore_index": 2},
    ):
        if reduction == "mean" and bool((arguments["target"] == arguments.get("ignore_index", -100)).all()):
            continue  # NaN in torch

        def run(arguments: dict[str, object] = arguments) -> list[Tensor]:
            loss = F.cross_entropy(logits, **arguments, reduction=reduction)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), logits)]

        expected = run()
        with maskops.replace_sdpa() as report:
            assert_same(run(), expected)
        assert report.served == {CROSS_ENTROPY: 1} and not report.unserved


@pytest.mark.parametrize("shape", _LOSS_SHAPES.values(), ids=_LOSS_SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_weights_and_probabilities(shape: tuple[int, ...], reduction: str) -> None:
    torch.manual_seed(4)
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.randint(7, () if len(shape) == 1 else (shape[0], *shape[2:]))
    probabilities = torch.rand(shape).softmax(0 if len(shape) == 1 else 1).requires_grad_()
    weight = torch.rand(7)
    for target, arguments in (
        (labels, {"weight": weight}),
        (labels, {"weight": weight, "label_smoothing": 0.2}),
        (probabilities, {}),
        (probabilities, {"weight": weight, "label_smoothing": 0.2}),
    ):

        def run(target: Tensor = target, arguments: dict[str, object] = arguments) -> list[Tensor]:
            loss = F.cross_entropy(logits, target, **arguments, reduction=reduction)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), [x for x in (logits, target) if x.requires_grad])]

        expected = run()
        with maskops.replace_sdpa() as report:
            assert_same(run(), expected)
        assert report.served == {CROSS_ENTROPY: 1} and not report.unserved


def test_cross_entropy_of_nothing_is_zero() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    with maskops.replace_sdpa():
        loss = nn.CrossEntropyLoss()(logits, torch.full((3,), -100))
    assert loss.item() == 0 and not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_loss_is_that_of_torch(dtype: torch.dtype) -> None:
    logits, target = torch.randn(3, 4).to(dtype), torch.tensor([0, 1, 2])
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = F.cross_entropy(logits, target)
            with maskops.replace_sdpa() as report:
                loss = F.cross_entropy(logits, target)
        assert report.served == {CROSS_ENTROPY: 1}
        assert loss.dtype == expected.dtype
        torch.testing.assert_close(loss, expected, atol=1e-2, rtol=1e-2)


def test_old_arguments_of_cross_entropy() -> None:
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with warnings.catch_warnings(), maskops.replace_sdpa() as report:
        warnings.simplefilter("ignore", UserWarning)
        loss = F.cross_entropy(logits, target, size_average=False)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="sum"))
    assert report.served == {CROSS_ENTROPY: 1}


# ---- blocks ----------------------------------------------------------------------------------------------------------


def call_once() -> None:
    q = torch.zeros(1, 1, 2, 4)
    F.scaled_dot_product_attention(q, q, q)


def test_blocks_nest_and_the_inner_one_takes_the_calls() -> None:
    with maskops.replace_sdpa() as outer:
        call_once()
        with maskops.replace_sdpa() as inner:
            call_once()
        call_once()
    assert (outer.served, inner.served) == ({SDPA: 2}, {SDPA: 1})


def test_a_block_may_be_entered_again() -> None:
    block = maskops.replace_sdpa()
    with block as report:
        call_once()
    with block:
        call_once()
    assert report.served == {SDPA: 2} and len(report.notes) == 1


@pytest.mark.parametrize("was_on", [True, False])
def test_fast_path_comes_back_after_an_exception(was_on: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(was_on)
    try:
        with contextlib.suppress(ZeroDivisionError), maskops.replace_sdpa() as report:
            assert not torch.backends.mha.get_fastpath_enabled()
            with maskops.replace_sdpa():
                pass
            assert not torch.backends.mha.get_fastpath_enabled()
            raise ZeroDivisionError
        assert torch.backends.mha.get_fastpath_enabled() == was_on
        assert len(report.notes) == int(was_on)
        with maskops.replace_sdpa() as after:
            pass
        call_once()
        assert not after.served
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_other_threads_are_not_replaced() -> None:
    inside, done = threading.Event(), threading.Event()
    reports = []

    def replaced() -> None:
        with maskops.replace_sdpa() as report:
            inside.set()
            done.wait(10)
            call_once()
        reports.append(report)

    thread = threading.Thread(target=replaced)
    thread.start()
    assert inside.wait(10)
    call_once()  # this thread is outside
    with maskops.replace_sdpa() as mine:
        done.set()
        thread.join()
        assert not torch.backends.mha.get_fastpath_enabled()
        call_once()
        call_once()
    assert torch.backends.mha.get_fastpath_enabled()
    assert (reports[0].served, mine.served) == ({SDPA: 1}, {SDPA: 2})


def test_fast_path_called_directly_is_reported() -> None:
    module = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 4, 16)
    arguments = (
        x,
        x,
        x,
        16,
        2,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
    )
    with torch.no_grad(), maskops.replace_sdpa() as report:
        torch._native_multi_head_attention(*arguments)
    assert [reason for _, reason in report.unserved] == [
        "torch._native_multi_head_attention is one fused call: torch's fast path, called directly"
    ]


# ---- with the rest of torch ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_compiled_functions_take_part() -> None:
    torch._dynamo.reset()
    module = nn.MultiheadAttention(16, 2, batch_first=True).eval()

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = module(x, x, x, need_weights=False)[0]
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x, F.cross_entropy(x.flatten(0, 1), target)

    x, target = torch.randn(3, 6, 16), torch.randint(16, (18,))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = step(x, target)
    with maskops.replace_sdpa() as report:
        for count in (1, 2):
            assert_same(list(compiled(x, target)), list(expected))
            assert report.served == {MULTI_HEAD: count, SDPA: count, CROSS_ENTROPY: count}
    assert not report.unserved
    torch.testing.assert_close(compiled(x, target), expected)
    assert report.served[SDPA] == 2


def test_checkpointing_inside() -> None:
    q = torch.randn(1, 2, 6, 8, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    expected = torch.autograd.grad(attend(q).square().sum(), q)[0]
    for use_reentrant in (False, True):
        with maskops.replace_sdpa() as report:
            checkpoint(attend, q, use_reentrant=use_reentrant).square().sum().backward()
        torch.testing.assert_close(q.grad, expected)
        q.grad = None
        # The recomputation stops before its last call returns, or a number of saved tensors would not have matched.
        assert report.served == {SDPA: 1 + use_reentrant} and not report.unserved
    with maskops.replace_sdpa() as report:
        actual = torch.autograd.grad(checkpoint(attend, q, use_reentrant=False).square().sum(), q)[0]
    torch.testing.assert_close(actual, expected)
    assert report.served == {SDPA: 1} and not report.unserved


def test_functional_transforms() -> None:
    q = torch.randn(3, 2, 6, 8)

    def loss(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x).square().sum()

    expected, per_sample = torch.func.grad(loss)(q), torch.vmap(torch.func.grad(loss))(q)
    with maskops.replace_sdpa() as report:
        torch.testing.assert_close(torch.func.grad(loss)(q), expected)
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q), per_sample)
    assert report.served == {SDPA: 1}
    assert list(report.unserved) == [(SDPA, "under torch.vmap there is no kernel of ours")]


def test_tensors_of_another_kind_are_left_alone() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged)
    x = nested.transpose(1, 2)
    expected = F.scaled_dot_product_attention(x, x, x)
    with maskops.replace_sdpa() as report:
        out = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(out.values(), expected.values())
    assert not report.served and len(report.unserved) == 1
