"""`maskops.attach`: what it does to a model and to its copies, where its calls run, and that `detach` undoes it."""

import contextlib
import copy
import functools
import io
import json
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

import maskops  # noqa: E402
from maskops.integrations.transformers import attach as attaching  # noqa: E402
from maskops.integrations.transformers import attention, calls  # noqa: E402
from maskops.masks import Mask  # noqa: E402
from maskops.spans import RowSpans  # noqa: E402
from tests import transformers_models as zoo  # noqa: E402

NAMES = ("llama", "bert", "t5", "gpt2")
WAY = "packed by position_ids and cu"


def _new(name: str = "llama", implementation: str = "sdpa") -> Any:
    return zoo.FAMILIES[name].build(implementation)


def _inputs(name: str = "llama", way: str = WAY) -> dict[str, Tensor]:
    return zoo.arrive(way, name, zoo.documents(name)).inputs


@functools.cache
def _expected(way: str = WAY) -> Tensor:
    """Logits of llama for `_inputs`."""
    model = _new()
    with torch.no_grad(), maskops.attach(model, probe=False):
        logits: Tensor = model(**_inputs(way=way)).logits
    return logits


def _state(model: nn.Module) -> Any:
    """Everything of a model that attaching may touch, by identity where it is an object."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items()}
        hooks = [tuple(vars(module)[key]) for key in vars(module) if key.endswith(("_hooks", "_kwargs", "_called"))]
        modules[name] = (attributes, hooks)
    return modules, model.config._attn_implementation_internal


class _Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_mask_of_a_padded_batch_is_read_once(name):
    """A mask of ones and zeros is told by its extremes, for all models inside, and that it is padded on the right by
    its first column: each operation takes as long as a good part of a step of generation.
    """
    model = _new(name)
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()}
    counts = []
    for attached in (False, True):
        with maskops.attach(model, probe=False) if attached else contextlib.nullcontext():
            with torch.no_grad(), _Counting() as counting:
                model(**inputs)
        counts.append(counting.names)
    stock, ours = counts
    assert ours["aminmax"] == 1
    for operator in ("amax", "argmax", "nonzero", "cummax", "searchsorted"):
        assert ours[operator] <= stock[operator], operator


# ---- attaching and detaching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_detach_restores_the_model(name):
    model = _new(name)
    before = _state(model)
    attachment = maskops.attach(model, probe=False)
    assert model.config._attn_implementation == "maskops"
    assert _state(model) != before
    attachment.detach()
    assert _state(model) == before
    attachment.detach()
    assert _state(model) == before


def test_a_part_that_fails_leaves_nothing_attached(monkeypatch):
    model = _new()
    before = _state(model)

    def fails(installation, options):
        raise RuntimeError("no")

    monkeypatch.setattr(attaching, "PARTS", (*attaching.PARTS, fails))
    with pytest.raises(RuntimeError, match="no"):
        maskops.attach(model, probe=False)
    assert _state(model) == before
    assert not attaching._attached


def test_attaching_twice_is_refused():
    model = _new()
    with maskops.attach(model, probe=False):
        attached = _state(model)
        for again in (model, model.model, nn.Sequential(model)):
            with pytest.raises(attaching.AttachError, match="attached already: detach it first"):
                maskops.attach(again, probe=False)
        assert _state(model) == attached
    maskops.attach(model, probe=False).detach()


def test_a_wrapper_is_served_through_the_model_inside():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = Wrapper(_new())
    with torch.no_grad(), maskops.attach(model, probe=False):
        got = model(**_inputs()).logits
    assert torch.equal(got, _expected())


def test_models_that_share_a_config_are_restored_with_the_last_of_them():
    first = _new()
    second = type(first)(first.config).eval()
    own = first.config._attn_implementation
    one, two = maskops.attach(first, probe=False), maskops.attach(second, probe=False)
    one.detach()
    assert second.config._attn_implementation == "maskops"
    with torch.no_grad():
        packed = second(**_inputs()).logits
    two.detach()
    assert second.config._attn_implementation == own
    with torch.no_grad():
        parts = [second(input_ids=part.tokens[None]).logits[0] for part in zoo.documents("llama")]
    torch.testing.assert_close(packed[0], torch.cat(parts), atol=1e-5, rtol=0)


def test_another_backend_on_a_shared_config_is_refused():
    first = _new()
    second = type(first)(first.config)
    with maskops.attach(first, probe=False, backend="reference"):
        assert first.config._attn_implementation == "maskops.reference"
        with pytest.raises(attaching.AttachError, match="same config object"):
            maskops.attach(second, probe=False)
    assert not attaching._attached


def test_registered_without_attach_means_what_transformers_means():
    model = _new()
    attaching.register(None)
    inputs = [_inputs(way="padded right"), _inputs(way="packed by position_ids") | {"use_cache": False}]
    with torch.no_grad():
        expected = [model(**x).logits for x in inputs]
        model.set_attn_implementation("maskops")
        for x, logits in zip(inputs, expected, strict=True):
            kept = x.get("attention_mask", torch.ones(logits.shape[:2])) == 1
            torch.testing.assert_close(model(**x).logits[kept], logits[kept], atol=1e-5, rtol=0)


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_an_attached_model_are_attached(how, monkeypatch):
    model = _new()
    with maskops.attach(model, probe=False):
        if how == "deepcopy":
            made = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            # As in a process that has attached nothing yet.
            for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
                monkeypatch.delitem(interface._global_mapping, "maskops")
            made = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(made(**_inputs()).logits, _expected())


def test_saved_models_know_nothing_of_it(tmp_path):
    model = _new()
    with maskops.attach(model, probe=False):
        model.save_pretrained(tmp_path)
    assert "maskops" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    with torch.no_grad(), maskops.attach(again, probe=False):
        assert torch.equal(again(**_inputs()).logits, _expected())


# ---- where calls run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plans"), [("llama", 1), ("gemma3", 2), ("bert", 1), ("modernbert", 2), ("t5", 3), ("bart", 3)]
)
def test_one_plan_for_each_kind_of_mask_and_forward(name, plans, monkeypatch):
    model, built, seen = _new(name, "eager"), [], Counter()

    def counting(made):
        def count(*args, **kwargs):
            built.append(made(*args, **kwargs))
            return built[-1]

        return count

    for maker in ("spans", "spans_in"):
        monkeypatch.setattr(Mask, maker, counting(getattr(Mask, maker)))
    attend = attention.attention

    def look(query, key, value, mask, **keywords):
        assert isinstance(mask, RowSpans)
        seen[id(mask)] += 1
        return attend(query, key, value, mask, **keywords)

    monkeypatch.setattr(attention, "attention", look)
    for way in ("padded right", "packed by cu"):
        built.clear()
        seen.clear()
        with torch.no_grad(), maskops.attach(model, probe=False):
            model(**_inputs(name, way))
        assert len(built) == len(seen) == plans
        assert {id(plan) for plan in built} == set(seen)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_is_interrupted_leaves_no_call_behind_for_the_next(error):
    model, other = _new(), _new()

    def interrupt(module, args):
        raise error

    with torch.no_grad(), maskops.attach(model, probe=False), maskops.attach(other, probe=False):
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(**_inputs(way="padded right"))
        handle.remove()
        if error is RuntimeError:
            assert calls.innermost() is None
        assert torch.equal(model(**_inputs()).logits, _expected())
        assert torch.equal(other(**_inputs()).logits, _expected())
        assert calls.innermost() is None


def test_threads_do_not_see_each_other():
    model = _new()
    ways = (WAY, "padded left", "rows by segments", "packed + tail by cu")
    expected = {way: _expected(way) for way in ways}
    wrong, start = [], threading.Barrier(len(ways))

    def run(way):
        inputs = _inputs(way=way)
        start.wait()
        with torch.no_grad():
            wrong.extend(way for _ in range(5) if not torch.equal(model(**inputs).logits, expected[way]))

    with maskops.attach(model, probe=False):
        threads = [threading.Thread(target=run, args=(way,)) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_checkpointing_recomputes_layers_outside_of_any_call(name, reentrant):
    gradients = []
    for checkpoint in (False, True):
        model = _new(name, "eager").train()
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        inputs = _inputs(name, "rows by segments")
        torch.manual_seed(0)  # T5 drops weights
        with maskops.attach(model, probe=False):
            logits = model(**inputs, use_cache=False).logits
            (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], msg=lambda text, key=key: f"{key}: {text}")


def _ragged(seed: int, total: int = 32, capacity: int = 12) -> dict[str, Tensor]:
    """A packed row of a fixed length; its offsets are filled up to a fixed number with the last of them."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 + seed % (capacity - 3)
    cuts = torch.randperm(total - 1, generator=generator)[:count].sort().values + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.full((capacity - count - 1,), total)])
    positions = torch.arange(total) - offsets[torch.searchsorted(offsets, torch.arange(total), right=True) - 1]
    return {
        "input_ids": torch.randint(4, zoo.VOCABULARY, (1, total), generator=generator),
        "position_ids": positions[None],
        "cu_seq_lens_q": offsets.int(),
        "cu_seq_lens_k": offsets.int(),
    }


def test_ragged_batches_compile_to_one_graph():
    model = _new("gemma3", "eager")
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), maskops.attach(model, probe=False):
        for seed in range(5):
            inputs = _ragged(seed) | {"use_cache": False}
            got, expected = compiled(**inputs)[0], model(**inputs)[0]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [WAY, "padded left", "rows by segments", "rows by position_ids and mask"])
def test_nothing_is_read_from_tensors_that_hold_no_values(way):
    """A forward with fake tensors, which raise where a value is asked for: on a GPU it would wait for the device."""
    inputs = _inputs("gemma3", way)
    model = _new("gemma3", "eager")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
        with maskops.attach(model, probe=False):
            logits = model(**fake).logits
    assert logits.shape == (*inputs["input_ids"].shape, zoo.VOCABULARY)


def test_autocast():
    model = _new()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), maskops.attach(model, probe=False):
        got = model(**_inputs()).logits
    assert (got.float() - _expected()).abs().mean() < 0.05 * _expected().abs().mean()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_four_dimensions_win(kind):
    model, parts = _new(), zoo.documents("llama")
    number = torch.cat([torch.full((len(part.tokens),), index) for index, part in enumerate(parts)])
    place = torch.arange(len(number))
    allowed = ((number[:, None] == number) & (place[:, None] >= place))[None, None]
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)
    inputs = _inputs(way="packed by position_ids")
    with torch.no_grad(), maskops.attach(model, probe=False):
        got = model(**inputs, attention_mask=mask).logits
        torch.testing.assert_close(got, _expected(), atol=1e-5, rtol=0)
        # The offsets of another packing do not count beside it.
        wrong = torch.tensor([0, 2, len(number)])
        assert torch.equal(model(**inputs, attention_mask=mask, cu_seq_lens_q=wrong, cu_seq_lens_k=wrong).logits, got)


def test_a_filled_cache_refuses_packed_tokens():
    model = _new()
    with torch.no_grad(), maskops.attach(model, probe=False):
        cache = model(input_ids=torch.tensor([[5, 6, 7]])).past_key_values
        tokens = torch.tensor([[8, 9, 10, 11]])
        with pytest.raises(ValueError, match=r"begins another document.* although the cache already holds tokens"):
            model(input_ids=tokens, past_key_values=cache, position_ids=torch.tensor([[3, 4, 0, 1]]))
        offsets = torch.tensor([0, 2, 4])
        with pytest.raises(ValueError, match="cu_seq_lens_q with a cache"):
            model(input_ids=tokens, past_key_values=cache, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 4], r"cu_seq_lens_q\[0\]=1: must be 0"),
        ([0, 5, 3, 9], "never decrease"),
        ([0, 10, 20, 20, 21], "is more than the"),
        ([0, 15, 25], "crosses the end of a row"),
    ],
)
def test_offsets_that_describe_no_batch_are_refused(offsets, message):
    model = _new()
    offsets = torch.tensor(offsets)
    with torch.no_grad(), maskops.attach(model, probe=False), pytest.raises(ValueError, match=message):
        model(torch.full((2, 10), 5), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


def test_floats_number_documents_as_integers_do():
    parts = zoo.documents("llama")
    model, ids = _new(), torch.cat([part.tokens for part in parts])[None]
    segments = torch.cat([torch.full((len(part.tokens),), index + 1.0) for index, part in enumerate(parts)])[None]
    with torch.no_grad(), maskops.attach(model, probe=False):
        expected = model(ids, attention_mask=segments.long()).logits
        torch.testing.assert_close(model(ids, attention_mask=segments).logits, expected, atol=0, rtol=0)
        whole = model(ids, attention_mask=torch.ones_like(segments)).logits
        assert (whole - expected).abs().max() > 1e-3
        for value in (-torch.inf, torch.nan, 0.5):
            mask = torch.zeros_like(segments)
            mask[0, 3] = value
            with pytest.raises(ValueError, match=rf"attention_mask\[0, 3\] is {value}: .* four dimensions"):
                model(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"attention_mask\[0, 0\] is -1: expected 1 for tokens and 0 for padding"):
            model(ids, attention_mask=-torch.ones_like(ids))


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"cu_seq_lens_q": [0, 4, 10]}, TypeError, "cu_seq_lens_q is a list: expected a tensor"),
        ({"position_ids": torch.arange(10.0)[None]}, TypeError, "position_ids has dtype torch.float32"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 10]), "cu_seq_lens_k": torch.tensor([0, 5, 10])},
            ValueError,
            "cu_seq_lens_q and cu_seq_lens_k differ",
        ),
        ({"attention_mask": torch.ones(2, 10)}, ValueError, r"attention_mask has shape \(2, 10\): expected \(1, 10\)"),
        ({"attention_mask": torch.ones(1, 9)}, ValueError, r"attention_mask has shape \(1, 9\): expected \(1, 10\)"),
        ({"seq_idx": torch.zeros(1, 10, dtype=torch.int32)}, ValueError, "seq_idx alone does not tell"),
        ({"cu_seqlens": torch.tensor([0, 4, 10])}, ValueError, "was given cu_seqlens, which nothing reads"),
    ],
)
def test_offsets_that_nobody_would_read_are_refused(argument, error, message):
    model = _new()
    with torch.no_grad(), maskops.attach(model, probe=False), pytest.raises(error, match=message):
        model(torch.full((1, 10), 5), **argument)


def test_the_call_of_a_forward_that_was_interrupted_is_no_parent():
    model, ids = _new(), torch.full((1, 10), 5)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), maskops.attach(model, probe=False):
        expected = model.model(ids).last_hidden_state
        handle = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, cu_seq_lens_q=torch.tensor([0, 4, 10]))
        handle.remove()
        assert calls.innermost() is None
        assert torch.equal(model.model(ids).last_hidden_state, expected)


def test_arguments_of_attach_are_checked():
    with pytest.raises(TypeError, match=r"model is <class .*LlamaForCausalLM.*>: expected a module"):
        maskops.attach(transformers.LlamaForCausalLM)
    with pytest.raises(ValueError, match="attach: backend is 'nope': expected one of"):
        maskops.attach(_new(), backend="nope", probe=False)
    assert "maskops.nope" not in transformers.AttentionInterface()


def test_models_of_float64_are_proven():
    with maskops.attach(_new().double()) as attachment:
        assert attachment.report.proven


def test_what_was_set_meanwhile_stays():
    model = _new()

    def loss(*_, **__):
        raise AssertionError

    attachment = maskops.attach(model, probe=False)
    model.loss_function = loss
    model.set_attn_implementation("eager")
    attachment.detach()
    assert model.loss_function is loss
    assert model.config._attn_implementation == "eager"
