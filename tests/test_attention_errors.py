"""Every error of attention and varlen_attention, by its text."""

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import maskops
from maskops import PackedBatch, masks
from maskops.backend import planner


def tensors(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 6, 8),
        "v": torch.zeros(2, 2, 6, 3),
    }
    return {**arguments, **changes}


def packed(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "q": torch.zeros(7, 4, 8),
        "k": torch.zeros(7, 2, 8),
        "v": torch.zeros(7, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 3, 7]),
    }
    return {**arguments, **changes}


def zeros(*size: int, **options: Any) -> torch.Tensor:
    return torch.zeros(size, **options)


META = {"device": "meta"}
ERRORS = [
    # Tensors
    ({"q": [1.0]}, TypeError, "q is a list: expected a tensor (batch, heads, length, head_dim)"),
    ({"k": None}, TypeError, "k is a NoneType: expected a tensor (batch, heads, length, head_dim)"),
    (
        {"v": zeros(2, 6, 3)},
        ValueError,
        "v has shape (2, 6, 3): expected 4 dimensions, (batch, heads, length, head_dim)",
    ),
    (
        {"q": zeros(2, 4, 5, 8, dtype=torch.int64)},
        TypeError,
        "q is torch.int64: expected float32, bfloat16, float16 or float64",
    ),
    (
        {name: x.to(torch.float8_e4m3fn) for name, x in tensors().items()},
        TypeError,
        "q is torch.float8_e4m3fn: expected float32, bfloat16, float16 or float64",
    ),
    (
        {"k": zeros(2, 2, 6, 8, dtype=torch.float16)},
        TypeError,
        "q, k and v are torch.float32, torch.float16 and torch.float32: they must have one dtype",
    ),
    ({"k": zeros(2, 2, 6, 8, **META)}, ValueError, "k is on meta, q on cpu: they must be on one device"),
    ({"v": zeros(3, 2, 6, 3)}, ValueError, "q, k and v have batch sizes 2, 2 and 3: they must be equal"),
    ({"q": zeros(2, 4, 5, 7)}, ValueError, "q and k have head_dim 7 and 8: they must be equal, and at least 1"),
    (
        {"q": zeros(2, 4, 5, 0), "k": zeros(2, 2, 6, 0)},
        ValueError,
        "q and k have head_dim 0 and 0: they must be equal, and at least 1",
    ),
    (
        {"q": zeros(2, 4, 5, 0), "k": zeros(2, 2, 6, 0), "softmax_scale": 0.5},
        ValueError,
        "q and k have head_dim 0 and 0: they must be equal, and at least 1",
    ),
    (
        {"v": zeros(2, 2, 5, 3)},
        ValueError,
        "k has 2 heads and 6 keys, v has 2 heads and 5 keys: they must be equal",
    ),
    (
        {"q": zeros(2, 3, 5, 8)},
        ValueError,
        "q has 3 heads, k and v have 2: expected a multiple of the heads of k",
    ),
    (
        {"k": zeros(2, 0, 6, 8), "v": zeros(2, 0, 6, 3)},
        ValueError,
        "q has 4 heads, k and v have 0: expected a multiple of the heads of k",
    ),
    # Masks
    (
        {"mask": zeros(2, 6, dtype=torch.bool)},
        TypeError,
        "mask has shape (2, 6): for padding use masks.padding(mask)",
    ),
    (
        {"mask": zeros(2, 6, dtype=torch.int64)},
        TypeError,
        "mask has shape (2, 6): for padding use masks.padding(mask)",
    ),
    (
        {"mask": zeros(5, 6, dtype=torch.bool)},
        TypeError,
        "mask has shape (5, 6): for one bool per query and key use masks.dense(mask[None, None]), (batch|1, heads|1, "
        "q_len, k_len)",
    ),
    (
        {"mask": zeros(2, 5, 6, dtype=torch.bool)},
        TypeError,
        "mask has shape (2, 5, 6): for one bool per query and key use masks.dense(mask.unsqueeze(1)), (batch|1, "
        "heads|1, q_len, k_len)",
    ),
    (
        {"mask": zeros(2, 1, 5, 6, dtype=torch.bool)},
        TypeError,
        "mask has shape (2, 1, 5, 6): for one bool per query and key use masks.dense(mask), (batch|1, heads|1, q_len, "
        "k_len)",
    ),
    (
        {"mask": zeros(2, 1, 5, 6)},
        TypeError,
        "mask is a torch.float32 tensor with shape (2, 1, 5, 6): to add it to the scores use bias=mask",
    ),
    (
        {"mask": "causal"},
        TypeError,
        "mask is a str: expected a mask of maskops.masks, a RowSpans or None",
    ),
    (
        {"mask": PackedBatch.from_sequences([[1]])},
        TypeError,
        "mask is a PackedBatch: expected a mask of maskops.masks, a RowSpans or None; of a batch give "
        "batch.spans(pattern)",
    ),
    (
        {"mask": masks.causal},
        TypeError,
        "mask is a function: expected a mask of maskops.masks, a RowSpans or None",
    ),
    (
        {"mask": masks.causal().spans(5, 7)},
        ValueError,
        "mask is a plan for 5 queries and 7 keys, q and k have 5 and 6: plan it with mask.spans(5, 6)",
    ),
    (
        {"mask": masks.key_padding(torch.tensor([1, 2, 3])).spans(5, 6)},
        ValueError,
        "mask is a plan for a batch of 3, q has a batch of 2",
    ),
    (
        {"mask": masks.causal().spans(5, 6, device="meta")},
        ValueError,
        "mask is a plan on meta, q is on cpu: plan it with device=q.device",
    ),
    (
        {"mask": masks.dense(zeros(1, 3, 5, 6, dtype=torch.bool))},
        ValueError,
        "mask holds a dense mask with shape (1, 3, 5, 6): expected (2 or 1, 4 or 1, 5, 6)",
    ),
    (
        {"mask": masks.key_padding(torch.tensor([1, 2, 3]))},
        ValueError,
        "key_padding: lengths has batch 3, q has batch 2",
    ),
    (
        {"mask": zeros(2, dtype=torch.int64)},
        TypeError,
        "mask has shape (2,): for padding use masks.padding(lengths)",
    ),
    (
        {"mask": zeros(6, dtype=torch.bool)},
        TypeError,
        "mask has shape (6,): for padding use masks.padding(mask.unsqueeze(0))",
    ),
    # Features
    ({"bias": 1.0}, TypeError, "bias is float: expected a floating tensor; for a bool mask use mask=masks.dense(...)"),
    (
        {"bias": zeros(5, 6, dtype=torch.bool)},
        TypeError,
        "bias is torch.bool: expected a floating tensor; for a bool mask use mask=masks.dense(...)",
    ),
    (
        {"bias": zeros(3, 1, 5, 6)},
        ValueError,
        "bias has shape (3, 1, 5, 6): expected one that broadcasts to (batch, heads, q_len, k_len) = (2, 4, 5, 6)",
    ),
    (
        {"bias": zeros(1, 2, 4, 5, 6)},
        ValueError,
        "bias has shape (1, 2, 4, 5, 6): expected one that broadcasts to (batch, heads, q_len, k_len) = (2, 4, 5, 6)",
    ),
    ({"bias": zeros(5, 6, **META)}, ValueError, "bias is on meta, q on cpu: they must be on one device"),
    ({"alibi_slopes": zeros(3)}, ValueError, "alibi_slopes has shape (3,): expected (4,) or (2, 4)"),
    ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes is float: expected a floating tensor"),
    (
        {"alibi_slopes": zeros(4, dtype=torch.int64)},
        TypeError,
        "alibi_slopes is torch.int64: expected a floating tensor",
    ),
    ({"sinks": zeros(2, 4)}, ValueError, "sinks has shape (2, 4): expected (4,)"),
    ({"sinks": zeros(4, **META)}, ValueError, "sinks is on meta, q on cpu: they must be on one device"),
    (
        {"alibi_slopes": zeros(4), "mask": masks.causal().spans(5, 6)},
        ValueError,
        "alibi_slopes needs the positions of rows, which this RowSpans lacks: plan it with mask.spans(..., "
        "positions=True)",
    ),
    (
        {"dropout_p": 0.1, "mask": masks.causal().spans(5, 6)},
        ValueError,
        "dropout_p needs the positions of rows, which this RowSpans lacks: plan it with mask.spans(..., "
        "positions=True)",
    ),
    # Numbers
    ({"softcap": -1.0}, ValueError, "softcap is -1.0: expected 0 (none) or a positive number"),
    ({"softcap": 1e-39}, ValueError, "softcap is 1e-39: expected 0 (none) or a positive number, 1e-30 or more"),
    ({"softmax_scale": 1e39}, ValueError, "softmax_scale is 1e+39: expected a finite number, in the range of float32"),
    ({"softcap": float("nan")}, ValueError, "softcap is nan: expected 0 (none) or a positive number"),
    ({"softcap": None}, TypeError, "softcap is a NoneType: expected a float"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0: expected a probability in [0, 1)"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1: expected a probability in [0, 1)"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p is a str: expected a float"),
    ({"softmax_scale": "0.1"}, TypeError, "softmax_scale is a str: expected a float"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale is nan: expected a finite number"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu': expected one of 'auto', 'cpu', 'triton', 'cuda', 'reference'"),
    (
        {"backend": "cpu"} | {name: zeros(2, 4, 6, 8, dtype=torch.float64) for name in "qkv"},
        ValueError,
        "backend 'cpu' cannot run maskops.attention: it takes float32, bfloat16, float16, not float64",
    ),
]
VARLEN_ERRORS = [
    ({"q": zeros(1, 4, 7, 8)}, ValueError, "q has shape (1, 4, 7, 8): expected 3 dimensions, (total, heads, head_dim)"),
    ({"k": zeros(6, 2, 8)}, ValueError, "k has 2 heads and 6 keys, v has 2 heads and 7 keys: they must be equal"),
    (
        {"cu_seqlens_q": None},
        ValueError,
        "varlen_attention needs cu_seqlens_q, or a RowSpans of the packed rows as mask",
    ),
    (
        {"cu_seqlens_q": None, "cu_seqlens_k": torch.tensor([0, 7])},
        ValueError,
        "varlen_attention needs cu_seqlens_q, or a RowSpans of the packed rows as mask",
    ),
    (
        {"mask": masks.causal().spans(7, 7)},
        ValueError,
        "mask is a RowSpans, which already holds the sequences: leave out cu_seqlens_q and cu_seqlens_k",
    ),
    (
        {"cu_seqlens_q": [0, 3, 7]},
        TypeError,
        "cu_seqlens_q is list: expected an int32 or int64 tensor of cumulative lengths",
    ),
    (
        {"cu_seqlens_q": zeros(3)},
        TypeError,
        "cu_seqlens_q is torch.float32: expected an int32 or int64 tensor of cumulative lengths",
    ),
    (
        {"cu_seqlens_q": zeros(1, 3, dtype=torch.int32)},
        ValueError,
        "cu_seqlens_q has shape (1, 3): expected (sequences + 1,)",
    ),
    (
        {"cu_seqlens_k": zeros(0, dtype=torch.int32)},
        ValueError,
        "cu_seqlens_k has shape (0,): expected (sequences + 1,)",
    ),
    (
        {"cu_seqlens_q": zeros(3, dtype=torch.int32, **META)},
        ValueError,
        "cu_seqlens_q is on meta, q on cpu: they must be on one device",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 7])},
        ValueError,
        "cu_seqlens_q has 3 elements, cu_seqlens_k has 2: queries and keys need the same number of sequences",
    ),
    (
        {"mask": zeros(1, 7, dtype=torch.bool)},
        TypeError,
        "mask has shape (1, 7): for padding use masks.padding(mask)",
    ),
    (
        {"alibi_slopes": zeros(3, 4)},
        ValueError,
        "alibi_slopes has shape (3, 4): expected (4,) or (2, 4)",
    ),
    ({"alibi_slopes": [0.1, 0.2]}, TypeError, "alibi_slopes is list: expected a floating tensor"),
    (
        {"q": zeros(6, 4, 8)},
        ValueError,
        "cu_seqlens_q describes queries and keys alike, which cannot hold for the 6 rows of q and the 7 rows of k: "
        "give cu_seqlens_k for the keys",
    ),
    (
        {"mask": masks.prefix(torch.tensor([1, 2, 3]))},
        ValueError,
        "prefix: lengths has 3 elements, cu_seqlens_q describes 2 sequences",
    ),
    (
        {"mask": masks.padding(torch.tensor([7, 7]))},
        ValueError,
        "cu_seqlens_q describes one packed row, so the batch must be 1; that of padding: lengths is 2: give a mask "
        "that holds inside each sequence, such as masks.causal()",
    ),
    # Values
    (
        {"cu_seqlens_q": torch.tensor([1, 3, 7])},
        ValueError,
        "cu_seqlens_q[0]=1: must be 0",
    ),
    (
        {"cu_seqlens_q": torch.tensor([0, 5, 3, 7])},
        ValueError,
        "cu_seqlens_q[2]=3 < cu_seqlens_q[1]=5: cumulative lengths never decrease",
    ),
    (
        {"cu_seqlens_q": torch.tensor([0, 3, 8])},
        ValueError,
        "cu_seqlens_q[-1]=8 is more than the 7 rows of q",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 52, 40])},
        ValueError,
        "cu_seqlens_k[2]=40 < cu_seqlens_k[1]=52: cumulative lengths never decrease",
    ),
    (
        {"cu_seqlens_k": torch.tensor([2, 3, 7])},
        ValueError,
        "cu_seqlens_k[0]=2: must be 0",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 3, 8])},
        ValueError,
        "cu_seqlens_k[-1]=8 is more than the 7 rows of k",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:48] for _, _, message in ERRORS])
def test_attention(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        maskops.attention(**tensors(**changes))


@pytest.mark.parametrize("is_planned_by", ["the operator", "torch"])
@pytest.mark.parametrize(
    ("changes", "error", "message"), VARLEN_ERRORS, ids=[message[:48] for _, _, message in VARLEN_ERRORS]
)
def test_varlen_attention(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    is_planned_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_planned_by == "torch":
        # The path of other devices, and of a process without the extension.
        monkeypatch.setattr("maskops.lowering.planner", lambda device: None)
    elif planner("cpu") is None:
        pytest.skip("the C++ extension is not built, so there is no operator")
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        maskops.varlen_attention(**packed(**changes))


def test_the_arguments_are_right_without_the_mistakes() -> None:
    maskops.attention(**tensors())
    # Scalars of numpy and fractions are numbers too.
    exact = maskops.attention(**tensors(q=torch.ones(2, 4, 5, 8)), softmax_scale=0.5, softcap=3.0)
    for number in (np.float32, np.float64, Fraction):
        other = maskops.attention(**tensors(q=torch.ones(2, 4, 5, 8)), softmax_scale=number(0.5), softcap=number(3))
        assert torch.equal(exact, other)
    maskops.varlen_attention(**packed())
