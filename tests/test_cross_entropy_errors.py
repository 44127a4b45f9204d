"""What maskops.cross_entropy refuses, by the words of the refusal."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import maskops
from maskops import extension


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if (available := maskops.backends()[request.param]) != "available":
        pytest.skip(f"{request.param}: {available}")
    with maskops.use_backend(request.param):
        yield request.param


LOGITS = torch.zeros(2, 3, 10)
TARGET = torch.zeros(2, 3, dtype=torch.int64)

BAD_TENSORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "logits has dtype int64: expected float32, bfloat16, float16 or float64", {"logits": LOGITS.long()}),
    (ValueError, "logits has shape (): expected (..., V) with at least one column", {"logits": torch.zeros(())}),
    (
        ValueError,
        "logits has shape (2, 3, 0): expected (..., V) with at least one column",
        {"logits": torch.zeros(2, 3, 0)},
    ),
    (
        TypeError,
        "target has dtype float8_e4m3fn: expected labels of int64 or int32, or probabilities of float32, bfloat16, "
        "float16 or float64",
        {"target": LOGITS.to(torch.float8_e4m3fn)},
    ),
    (
        ValueError,
        "target has dtype float32, so it holds probabilities, but its shape is (2, 3): expected (2, 3, 10), the shape "
        "of logits. Labels are int64 or int32",
        {"target": TARGET.float()},
    ),
    (ValueError, "target is on meta, logits on cpu: put them on one device", {"target": LOGITS.to("meta")}),
    (
        ValueError,
        "mask has shape (2, 3, 10): expected one value per target, shape (2, 3)",
        {"target": LOGITS, "mask": LOGITS.bool()},
    ),
    (
        TypeError,
        "class_weights: expected a tensor (V,) of one number per column of the logits, got list",
        {"class_weights": [1.0] * 10},
    ),
    (TypeError, "class_weights has dtype bool: expected numbers", {"class_weights": torch.ones(10).bool()}),
    (
        ValueError,
        "class_weights has shape (9,): expected (10,), one number per column of the logits",
        {"class_weights": torch.ones(9)},
    ),
    (
        ValueError,
        "class_weights is on meta, logits on cpu: put them on one device",
        {"class_weights": torch.ones(10).to("meta")},
    ),
    (
        ValueError,
        "class_weights requires grad, but they are constants here, as in torch: pass class_weights.detach(), or put "
        "weights that are to be learned into a floating target",
        {"class_weights": torch.ones(10, requires_grad=True)},
    ),
    (TypeError, "target has dtype int16: expected int64 or int32", {"target": TARGET.short()}),
    (
        ValueError,
        "target has shape (3, 2): expected (2, 3), the shape of logits (2, 3, 10) without the last dimension",
        {"target": TARGET.mT},
    ),
    (
        ValueError,
        "target has shape (2, 10): expected (2, 3), the shape of logits (2, 3, 10) without the last dimension. "
        "The vocabulary is the last dimension here: logits.movedim(1, -1)",
        {"target": torch.zeros(2, 10, dtype=torch.int64)},
    ),
    (
        ValueError,
        "target has shape (6,): expected (2, 3), the shape of logits (2, 3, 10) without the last dimension: "
        "target.reshape((2, 3))",
        {"target": TARGET.flatten()},
    ),
    (
        ValueError,
        "target has shape (5,): expected (2, 3), the shape of logits (2, 3, 10) without the last dimension. One is "
        "packed, the other padded: to_padded(tensor) and to_packed(tensor) of a PackedBatch or a PaddedBatch turn one "
        "into the other",
        {"target": TARGET.flatten()[1:]},
    ),
    (
        ValueError,
        "target has shape (2, 2): expected (2, 3), the shape of logits (2, 3, 10) without the last dimension. Cut "
        "neither logits nor labels: shift_labels of a batch go with every row, and shift=True shifts labels that are "
        "aligned with their tokens",
        {"target": TARGET[:, 1:]},
    ),
    (
        ValueError,
        "target has shape (): expected (2, 3), the shape of logits (2, 3, 10) without the last dimension",
        {"target": TARGET[0, 0]},
    ),
    (
        ValueError,
        "target is on meta, logits on cpu: put them on one device",
        {"target": TARGET.to("meta")},
    ),
    (
        TypeError,
        "mask has dtype float32: expected bool or integers, where True (1) keeps a token; weights go into "
        "token_weights",
        {"mask": torch.ones(2, 3)},
    ),
    (
        ValueError,
        "mask has shape (2, 1): expected one value per target, shape (2, 3)",
        {"mask": torch.ones(2, 1, dtype=torch.bool)},
    ),
    (
        ValueError,
        "mask is on meta, target on cpu: put them on one device",
        {"mask": TARGET.to("meta")},
    ),
    (
        TypeError,
        "token_weights has dtype bool: expected numbers; a bool tensor goes into mask",
        {"token_weights": TARGET.bool()},
    ),
    (
        ValueError,
        "token_weights has shape (6,): expected one value per target, shape (2, 3)",
        {"token_weights": torch.ones(6)},
    ),
    (
        ValueError,
        "token_weights requires grad, but they are constants here: pass token_weights.detach(), or multiply the "
        "losses of reduction='none'",
        {"token_weights": torch.ones(2, 3, requires_grad=True)},
    ),
    (TypeError, "logits: expected a tensor (..., V), got list", {"logits": LOGITS.tolist()}),
    (
        TypeError,
        "target: expected a tensor of int64 or int32 labels, or of probabilities like the logits, got list",
        {"target": TARGET.tolist()},
    ),
    (
        TypeError,
        "mask: expected a tensor of bool or 0/1 integers, where True (1) keeps a token, got list",
        {"mask": [[True] * 3] * 2},
    ),
    (
        TypeError,
        "token_weights: expected a tensor of one number per target, got float",
        {"token_weights": 0.5},
    ),
    (
        ValueError,
        "mask[0, 2]=2: a mask holds 0 and 1; for document ids use masks.documents(ids)",
        {"mask": torch.tensor([[1, 1, 2], [0, 3, 1]])},
    ),
    (ValueError, "mask[1, 0]=-1: a mask holds 0 and 1", {"mask": torch.tensor([[1, 1, 0], [-1, 0, 0]]).short()}),
    (
        ValueError,
        "mask=2: a mask holds 0 and 1",
        {"logits": LOGITS[0, 0], "target": TARGET[0, 0], "mask": torch.tensor(2)},
    ),
]

BAD_NUMBERS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (
        ValueError,
        "ignore_index is 3, but target holds probabilities, none of which is an index: skip tokens by mask",
        {"ignore_index": 3, "target": LOGITS},
    ),
    (TypeError, "ignore_index is 1.0: expected an int", {"ignore_index": 1.0}),
    (
        ValueError,
        "ignore_index is 2147483648: it does not fit target's dtype, int32",
        {"ignore_index": 2**31, "target": TARGET.int()},
    ),
    (ValueError, "ignore_index is 100000000000000000000: it does not fit", {"ignore_index": 10**20}),
    (TypeError, "num_items has dtype complex64: expected a number", {"num_items": torch.tensor(2 + 1j)}),
    (ValueError, "num_items is -2: expected a number >= 0", {"num_items": torch.tensor(-2)}),
    (ValueError, "num_items requires grad", {"num_items": torch.tensor(3.0, requires_grad=True)}),
    (ValueError, "num_items is on meta", {"num_items": torch.tensor(3.0, device="meta")}),
    (ValueError, "label_smoothing is 1.5: expected a number in [0, 1]", {"label_smoothing": 1.5}),
    (ValueError, "label_smoothing is nan: expected a number in [0, 1]", {"label_smoothing": float("nan")}),
    (ValueError, "z_loss is -1.0: expected a finite number >= 0", {"z_loss": -1.0}),
    (ValueError, "softcap is -2.0: expected a finite number >= 0, where 0 means none", {"softcap": -2.0}),
    (ValueError, "softcap is 1e-60: expected 0 (none) or a positive number, 1e-30 or more", {"softcap": 1e-60}),
    (ValueError, "logit_scale is 0.0: expected a finite number > 0", {"logit_scale": 0.0}),
    (TypeError, "label_smoothing is 'a': expected a number in [0, 1]", {"label_smoothing": "a"}),
    (TypeError, "z_loss is None: expected a finite number >= 0", {"z_loss": None}),
    (TypeError, "softcap is [1.0]: expected a finite number >= 0, where 0 means none", {"softcap": [1.0]}),
    (
        TypeError,
        "logit_scale is a tensor (logit_scale.item() is a number): expected a finite number > 0",
        {"logit_scale": torch.ones((), requires_grad=True)},
    ),
    (ValueError, "logit_scale is inf: expected a finite number > 0", {"logit_scale": float("inf")}),
    (
        ValueError,
        "reduction is 'avg': expected one of 'mean', 'sum', 'none', 'sequence_mean'",
        {"reduction": "avg"},
    ),
    (
        ValueError,
        "reduction is 'sequence_mean' and target has shape (6,): pass cu_seqlens, or a target of shape (B, S)",
        {"reduction": "sequence_mean", "logits": LOGITS.reshape(6, 10), "target": TARGET.reshape(6)},
    ),
    (
        ValueError,
        "shift is True, but target has no dimension: there is no next token",
        {"shift": True, "logits": LOGITS[0, 0], "target": TARGET[0, 0]},
    ),
    (
        ValueError,
        "num_items replaces the denominator of reduction='mean', but reduction is 'sum': leave it out",
        {"num_items": 3, "reduction": "sum"},
    ),
    (ValueError, "num_items has shape (2,): expected an int or a 0-dim tensor", {"num_items": torch.ones(2)}),
    (TypeError, "num_items is 2.5: expected an int or a 0-dim tensor", {"num_items": 2.5}),
    (ValueError, "num_items is -1: expected a number >= 0", {"num_items": -1}),
]

BAD_OFFSETS: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "cu_seqlens: expected a tensor (n_sequences + 1,) of int32 or int64, got list", [0, 4]),
    (TypeError, "cu_seqlens has dtype float32: expected int32 or int64", torch.tensor([0.0, 6.0])),
    (ValueError, "cu_seqlens has shape (1, 2): expected (n_sequences + 1,)", torch.tensor([[0, 6]])),
    (ValueError, "cu_seqlens has shape (0,): expected (n_sequences + 1,)", torch.empty(0, dtype=torch.int64)),
    (ValueError, "cu_seqlens is on meta, target on cpu: put them on one device", torch.tensor([0, 6]).to("meta")),
    (ValueError, "cu_seqlens[0]=1: must be 0", torch.tensor([1, 6])),
    (
        ValueError,
        "cu_seqlens[2]=2 < cu_seqlens[1]=4: cumulative lengths never decrease",
        torch.tensor([0, 4, 2, 6]),
    ),
    (ValueError, "cu_seqlens[-1]=7 is more than the 6 targets", torch.tensor([0, 7])),
]


@pytest.mark.parametrize("error, message, arguments", BAD_TENSORS + BAD_NUMBERS)
def test_bad_arguments(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        maskops.cross_entropy(**{"logits": LOGITS, "target": TARGET, **arguments})


@pytest.mark.parametrize("error, message, offsets", BAD_OFFSETS)
def test_bad_offsets(error: type[Exception], message: str, offsets: Any) -> None:
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        maskops.cross_entropy(LOGITS, TARGET, cu_seqlens=offsets)


def test_values_of_a_mask_are_not_read_while_tracing() -> None:
    """Any integer but 0 keeps a token there, as documented for devices: nothing waits for a value."""
    mask = torch.tensor([[2, 1, 1], [0, 1, 0]])
    torch._dynamo.reset()
    compiled = torch.compile(lambda m: maskops.cross_entropy(LOGITS, TARGET, mask=m), fullgraph=True, backend="eager")
    assert torch.equal(compiled(mask), maskops.cross_entropy(LOGITS, TARGET, mask=mask != 0))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(LOGITS), mode.from_tensor(TARGET)
        assert maskops.cross_entropy(*fake, mask=mode.from_tensor(mask)).shape == ()


def test_numbers_of_other_kinds_are_taken() -> None:
    expected = maskops.cross_entropy(LOGITS, TARGET, z_loss=0.5, softcap=2.0)
    assert torch.equal(maskops.cross_entropy(LOGITS, TARGET, z_loss=Fraction(1, 2), softcap=2), expected)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, z: maskops.cross_entropy(x, TARGET, z_loss=z), fullgraph=True, backend="eager", dynamic=True
    )
    for z_loss in (0.5, 0.25):
        assert torch.equal(compiled(LOGITS, z_loss), maskops.cross_entropy(LOGITS, TARGET, z_loss=z_loss))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("label", [10, -1, -101, 2**31 - 1, -(2**31)])
def test_label_outside_the_vocabulary(backend: str, label: int, dtype: torch.dtype) -> None:
    target = torch.zeros(2, 3, dtype=dtype)
    target[1, 1] = label
    message = (
        f"target: the label that row {{}} of the logits is scored against is {label}, outside the vocabulary of 10. "
        "Rows to skip hold ignore_index (-100) or are masked"
    )
    for shift, row in ((False, 4), (True, 3)):
        with pytest.raises(ValueError, match=re.escape(message.format(row))):
            maskops.cross_entropy(LOGITS, target, shift=shift)
    # Not where the token is skipped.
    mask = torch.ones(2, 3)
    mask[1, 1] = 0
    for skipping in ({"mask": mask.bool()}, {"token_weights": mask}, {"ignore_index": label}):
        assert maskops.cross_entropy(LOGITS, target, **skipping).isfinite()


def test_a_label_of_64_bits_is_not_cut_to_32(backend: str) -> None:
    with pytest.raises(ValueError, match="is 4294967297, outside the vocabulary of 10"):
        maskops.cross_entropy(LOGITS[0], torch.tensor([0, 2**32 + 1, 0]))


def test_label_outside_the_vocabulary_in_compiled_code() -> None:
    if (reason := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {reason}")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: maskops.cross_entropy(x, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="is 10, outside the vocabulary of 10"):
        compiled(LOGITS, TARGET + 10)


def test_the_operator_checks_its_tensors() -> None:
    """The kernels trust nothing that Python handed over: a wrong tensor is an error, never a wild access."""
    if (reason := maskops.backends()["cpu"]) != "available":
        pytest.skip(f"cpu: {reason}")
    extension.instruction_sets()
    forward, backward = torch.ops.maskops.cross_entropy_forward, torch.ops.maskops.cross_entropy_backward
    numbers = (-100, 0.1, 0.0, 0.0, 1.0)
    logits, target, nothing = LOGITS.reshape(6, 10), TARGET.reshape(6), torch.empty(0)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"logits": logits[0]}, "logits must have 2 dimensions"),
        ({"logits": logits.mT.contiguous().mT}, "the columns of logits must be contiguous"),
        ({"target": target[:5]}, "target must have a label per row"),
        ({"target": target.short()}, "target must be int32 or int64"),
        ({"logits": logits.double()}, "the kernels take float32, bfloat16 and float16"),
        ({"weights": torch.ones(9)}, "class_weights must be float32, contiguous, one per column"),
        ({"weights": torch.ones(10).double()}, "class_weights must be float32, contiguous, one per column"),
        ({"weights": torch.ones(20)[::2]}, "class_weights must be float32, contiguous, one per column"),
        ({"probabilities": logits[:5]}, "probabilities must have the shape of logits"),
        ({"probabilities": logits.mT.contiguous().mT}, "the columns of probabilities must be contiguous"),
        ({"probabilities": logits.double()}, "the kernels take float32, bfloat16 and float16"),
        ({"probabilities": logits, "shift": True}, "under shift the last row has no next one and must be skipped"),
    ]
    given: dict[str, Any] = {
        "logits": logits, "target": target, "weights": nothing, "probabilities": nothing, "shift": False,
    }  # fmt: skip
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            forward(*{**given, **change}.values(), *numbers, False, False)
    loss, lse, logprobs, entropy, _, statistics = forward(*given.values(), *numbers, False, False)
    good: dict[str, Any] = {
        "grad": torch.ones_like(loss), "grad_lse": nothing, "grad_logprobs": nothing, "grad_entropy": nothing,
        "logits": logits, "target": target, "weights": nothing, "probabilities": nothing,
        "lse": lse, "logprobs": logprobs, "entropy": entropy, "statistics": statistics, "shift": False, "wanted": True,
    }  # fmt: skip
    for change, message in (
        ({"grad": torch.ones(5)}, "an incoming gradient must be float32 with a value per row"),
        ({"grad": torch.ones(6).double()}, "an incoming gradient must be float32 with a value per row"),
        ({"lse": lse[:5]}, "must be those of the forward pass"),
        ({"statistics": nothing}, "must be those of the forward pass"),
        ({"statistics": statistics.float()}, "must be those of the forward pass"),
        ({"statistics": statistics[:, :5]}, "must be those of the forward pass"),
        ({"statistics": statistics.mT.contiguous().mT}, "must be those of the forward pass"),
        ({"statistics": statistics + 10.0, "probabilities": logits}, "must be those of the forward pass"),
        ({"statistics": statistics * torch.nan, "probabilities": logits}, "must be those of the forward pass"),
        ({"grad_entropy": torch.ones(6)}, "must be those of the forward pass"),
    ):
        with pytest.raises(ValueError, match=message):
            backward(*{**good, **change}.values(), *numbers)
    change = {**good, "logits": logits[:1].expand(6, 10)}
    del change["wanted"]
    with pytest.raises(ValueError, match="rows of logits that overlap in memory cannot hold their gradients"):
        torch.ops.maskops.cross_entropy_backward_(*change.values(), *numbers)


def test_a_dtype_without_a_kernel_says_so() -> None:
    with maskops.use_backend(fallback="error"):
        with pytest.raises(ValueError, match="cpu: it takes float32, bfloat16, float16, not float64"):
            maskops.cross_entropy(LOGITS.double(), TARGET)
