"""The attention function of transformers' interface: every keyword that models hand over, against float64."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

from maskops import masks  # noqa: E402
from maskops.integrations.transformers.attention import attention_function  # noqa: E402

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, WIDTH = 2, 4, 2, 5, 7, 8


class Layer(nn.Module):
    """Stands for an attention module."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal


def _inputs(q_len=QUERIES, k_len=KEYS, value_width=WIDTH, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(0)

    def states(heads, length, width):
        # As models make them: a view of (batch, length, heads, width).
        made = torch.randn(BATCH, length, heads, width, generator=generator).to(dtype).transpose(1, 2)
        return made.requires_grad_() if grad else made

    return states(HEADS, q_len, WIDTH), states(KV_HEADS, k_len, WIDTH), states(KV_HEADS, k_len, value_width)


def _expected(q, k, v, allowed=None, *, scaling=None, bias=None, softcap=None, sinks=None):
    """Attention in float64, (batch, queries, heads, value width); rows that see nothing are 0."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q @ k.mT * (WIDTH**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    allowed = torch.ones(scores.shape, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    weights = torch.where(allowed, scores - scores.amax(-1, keepdim=True).detach(), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.double()[:, None, None] - scores.amax(-1, keepdim=True).detach()).exp()
    return (weights / torch.where(total > 0, total, 1.0) @ v).transpose(1, 2)


def _bottom_right(q_len, k_len, left=None, right=0):
    place, key = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
    allowed = torch.ones(q_len, k_len, dtype=torch.bool) if right is None else key <= place + right
    return allowed if left is None else allowed & (key >= place - left)


def _check(got, expected, **tolerance):
    out, weights = got
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))


@pytest.mark.parametrize("q_len", [1, QUERIES, KEYS])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("of_module", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_without_a_mask_the_module_says_what_is_seen(q_len, is_causal, of_module, window):
    q, k, v = _inputs(q_len)
    got = attention_function(Layer(of_module), q, k, v, None, is_causal=is_causal, sliding_window=window)
    causal = of_module if is_causal is None else is_causal
    left = None if window is None else window - 1
    right = 0 if causal else left
    _check(got, _expected(q, k, v, _bottom_right(q_len, KEYS, left, right)))


def test_without_a_mask_offsets_are_documents():
    offsets = torch.tensor([0, 2, 2, KEYS], dtype=torch.int32)
    q, k, v = (x[:1] for x in _inputs(KEYS))
    got = attention_function(Layer(False), q, k, v, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    number = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    _check(got, _expected(q, k, v, number[:, None] == number))
    with pytest.raises(ValueError, match="one packed row"):
        attention_function(Layer(), *_inputs(KEYS), None, cu_seq_lens_q=offsets)


def test_a_plan_counts_and_nothing_else():
    q, k, v = _inputs(value_width=6)
    kept = torch.rand(BATCH, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
    plan = masks.key_padding(kept).spans(QUERIES, KEYS, batch=BATCH)
    got = attention_function(Layer(), q, k, v, plan, is_causal=True, sliding_window=2, scaling=0.7, softcap=1.5)
    _check(got, _expected(q, k, v, kept[:, None, None], scaling=0.7, softcap=1.5))


@pytest.mark.parametrize("shape", [(1, 1), (BATCH, 1), (BATCH, HEADS), (1, HEADS)])
@pytest.mark.parametrize("hidden", ["bool", "-inf", "minimum"])
def test_masks_of_four_dimensions(shape, hidden):
    q, k, v = _inputs()
    allowed = torch.rand(*shape, QUERIES, KEYS, generator=torch.Generator().manual_seed(2)) > 0.5
    allowed[:, :, 1] = False  # a row that sees nothing
    mask = allowed
    if hidden != "bool":
        mask = torch.zeros(allowed.shape).masked_fill(
            ~allowed, -torch.inf if hidden == "-inf" else torch.finfo(torch.float32).min
        )
    _check(attention_function(Layer(), q, k, v, mask), _expected(q, k, v, allowed))


def test_a_longer_mask_of_four_dimensions_is_cut():
    q, k, v = _inputs()
    allowed = torch.rand(1, 1, QUERIES, KEYS + 3, generator=torch.Generator().manual_seed(2)) > 0.5
    _check(attention_function(Layer(), q, k, v, allowed), _expected(q, k, v, allowed[..., :KEYS]))


def test_an_additive_mask_gets_its_gradient():
    q, k, v = _inputs()
    numbers = torch.randn(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(3))
    hidden = torch.rand(numbers.shape, generator=torch.Generator().manual_seed(4)) > 0.6
    gradients = []
    for function in (
        lambda mask: attention_function(Layer(), q, k, v, mask)[0].double(),
        lambda mask: _expected(q, k, v, ~hidden, bias=mask.masked_fill(hidden, 0.0)),
    ):
        leaf = numbers.clone().requires_grad_()
        out = function(leaf.masked_fill(hidden, torch.finfo(torch.float32).min))
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        gradients.append((out.detach(), leaf.grad))
    torch.testing.assert_close(*(pair[0] for pair in gradients), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*(pair[1] for pair in gradients), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias_batch", [1, BATCH])
def test_position_bias_joins_the_mask_and_gets_its_gradient(bias_batch):
    q, k, v = _inputs()
    # As T5 makes it: (1, heads, queries, keys) as a view of (queries, keys, heads).
    numbers = torch.randn(bias_batch, QUERIES, KEYS, HEADS, generator=torch.Generator().manual_seed(5))
    kept = torch.tensor([[True] * KEYS, [True] * 4 + [False] * 3])
    extra = torch.randn(BATCH, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(6))
    plan = masks.key_padding(kept).spans(QUERIES, KEYS, batch=BATCH)
    for mask, allowed, added in ((plan, kept[:, None, None], 0.0), (extra, None, extra)):
        gradients = []
        for function in (
            lambda bias, mask=mask: attention_function(
                Layer(), q, k, v, mask, scaling=1.0, position_bias=bias.permute(0, 3, 1, 2)
            )[0].double(),
            lambda bias, allowed=allowed, added=added: _expected(
                q, k, v, allowed, scaling=1.0, bias=bias.permute(0, 3, 1, 2) + added
            ),
        ):
            leaf = numbers.clone().requires_grad_()
            out = function(leaf)
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            gradients.append((out.detach(), leaf.grad))
        torch.testing.assert_close(*(pair[0] for pair in gradients), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(*(pair[1] for pair in gradients), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks_take_their_share_under_both_names(name):
    q, k, v = _inputs()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    out, _ = attention_function(Layer(False), q, k, v, None, **{name: sinks})
    _check((out, None), _expected(q, k, v, sinks=sinks))
    out.sum().backward()
    assert sinks.grad is not None
    assert sinks.grad.abs().min() > 0
    with pytest.raises(ValueError, match="two names of one argument"):
        attention_function(Layer(), q, k, v, None, sinks=sinks, s_aux=sinks)


def test_wider_queries_and_keys_are_narrowed_to_the_values():
    q, k, v = _inputs()
    out, _ = attention_function(Layer(False), q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), _expected(q, k, v), atol=0.03, rtol=0.03)


def test_autocast_narrows_everything():
    q, k, v = _inputs()
    bias = torch.randn(1, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention_function(Layer(False), q, k, v, None, position_bias=bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), _expected(q, k, v, bias=bias), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("batch_of_plan", [1, BATCH])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_dropout_with_a_plan_that_was_made_without_positions(batch_of_plan, backend):
    """The weights that are dropped are those of the same mask as a dense one: a row of the batch is a sequence."""
    q, k, v = _inputs()
    kept = torch.tensor([[True] * 5 + [False] * 2]).expand(batch_of_plan, KEYS)
    plan = masks.key_padding(kept).spans(QUERIES, KEYS, batch=None if batch_of_plan == 1 else BATCH)
    assert plan.positions is None
    exact = masks.dense(kept[:1, None, None].expand(BATCH, 1, QUERIES, KEYS))
    outputs = []
    for mask in (plan, exact.spans(QUERIES, KEYS, batch=BATCH, positions=True)):
        torch.manual_seed(0)
        outputs.append(attention_function(Layer(), q, k, v, mask, dropout=0.3, backend=backend)[0])
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0].double(), _expected(q, k, v, kept[:1, None, None]))


@pytest.mark.parametrize(
    ("name", "value"),
    [("indices", torch.zeros(1)), ("block_indices", torch.zeros(1)), ("cache", object()), ("output_attentions", True)],
)
def test_what_is_not_served_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        attention_function(Layer(), *_inputs(), None, **{name: value})


@pytest.mark.parametrize(
    "mask", [torch.ones(BATCH, KEYS, dtype=torch.bool), torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.int64)]
)
def test_other_masks_are_refused(mask):
    with pytest.raises(TypeError, match="attention_mask has shape"):
        attention_function(Layer(), *_inputs(), mask)


def test_what_changes_nothing_is_ignored():
    q, k, v = _inputs()
    got = attention_function(
        Layer(), q, k, v, None, output_attentions=False, indices=None, position_ids=torch.zeros(1), max_length_q=3, x=1
    )
    _check(got, _expected(q, k, v, _bottom_right(QUERIES, KEYS)))
