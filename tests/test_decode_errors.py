"""What append_kv and decode_attention refuse, and with which words; an append that fails writes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import maskops
from maskops import masks
from maskops.backend import BACKENDS
from tests.served import for_devices


@pytest.fixture(
    params=[
        name
        for name, row in BACKENDS.items()
        if {"append_kv", "decode_attention"} <= row.ops.keys() and maskops.backends()[name] == "available"
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def appending(**change: Any) -> dict[str, Any]:
    return {
        "k_cache": torch.zeros(3, 2, 8, 4),
        "v_cache": torch.zeros(3, 2, 8, 5),
        "k": torch.ones(3, 2, 2, 4),
        "v": torch.ones(3, 2, 2, 5),
        "lengths": torch.tensor([0, 6, 3]),
    } | change


def attending(**change: Any) -> dict[str, Any]:
    return {
        "q": torch.ones(3, 4, 1, 4),
        "k_cache": torch.zeros(3, 2, 8, 4),
        "v_cache": torch.zeros(3, 2, 8, 5),
        "lengths": torch.tensor([0, 8, 3]),
    } | change


def expanded(cache: Tensor) -> Tensor:
    return cache[:1].expand(3, -1, -1, -1)


APPEND_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "k_cache: expected a tensor (cache_batch, kv_heads, capacity, width)", {"k_cache": None}),
    (TypeError, "k is torch.float64, k_cache is torch.float32", {"k": torch.ones(3, 2, 2, 4).double()}),
    (TypeError, "k_cache is torch.int32: expected float32", {"k_cache": torch.zeros(3, 2, 8, 4).int()}),
    (ValueError, "v has shape (3, 2, 5): expected 4 dimensions", {"v": torch.ones(3, 2, 5)}),
    (ValueError, "v has shape (3, 2, 1, 5): expected (batch, kv_heads, new, width) = (3, 2, 2, 5)",
     {"v": torch.ones(3, 2, 1, 5)}),
    (ValueError, "k_cache has shape (3, 2, 8, 4), v_cache (3, 2, 9, 5)", {"v_cache": torch.zeros(3, 2, 9, 5)}),
    (ValueError, "k_cache has 4 rows for a batch of 3: give batch_index",
     {"k_cache": torch.zeros(4, 2, 8, 4), "v_cache": torch.zeros(4, 2, 8, 5)}),
    (ValueError, "k_cache has stride 2 in its last dimension", {"k_cache": torch.zeros(3, 2, 8, 8)[..., ::2]}),
    (ValueError, "k_cache has stride 0: an expanded tensor cannot be written to",
     {"k_cache": expanded(torch.zeros(1, 2, 8, 4))}),
    (ValueError, "k is on meta, k_cache on cpu", {"k": torch.ones(3, 2, 2, 4, device="meta")}),
    (ValueError, "k requires a gradient", {"k": torch.ones(3, 2, 2, 4, requires_grad=True)}),
    (ValueError, "v_cache requires a gradient", {"v_cache": torch.ones(3, 2, 8, 5, requires_grad=True)}),
    (TypeError, "lengths: expected a tensor (batch,), got list", {"lengths": [0, 1, 2]}),
    (TypeError, "lengths is torch.float32: expected int32 or int64", {"lengths": torch.zeros(3)}),
    (ValueError, "lengths has shape (2,): expected (batch,) = (3,)", {"lengths": torch.tensor([1, 2])}),
    (ValueError, "lengths[1]=7: appending 2 keys exceeds the 8 that a sequence can hold",
     {"lengths": torch.tensor([0, 7, 3])}),
    (ValueError, "lengths[2]=-1: expected 0 or more keys", {"lengths": torch.tensor([0, 6, -1])}),
    (ValueError, f"lengths[2]={2**63 - 1}: appending 2 keys", {"lengths": torch.tensor([0, 6, 2**63 - 1])}),
    (ValueError, "batch_index[1]=3: expected 0 to 2, a row of the cache", {"batch_index": torch.tensor([0, 3, 1])}),
    (ValueError, "rows 0 and 2 of the batch both append to key 4 of row 1 of the cache",
     {"batch_index": torch.tensor([1, 0, 1]), "lengths": torch.tensor([3, 0, 4])}),
    (TypeError, "block_table is torch.float32: expected int32 or int64", {"block_table": torch.zeros(3, 2)}),
    (ValueError, "block_table has shape (2, 2): expected (batch, max_pages) = (3, ...)",
     {"block_table": torch.zeros(2, 2).int()}),
    (ValueError, "batch_index goes with a contiguous cache",
     {"block_table": torch.zeros(3, 2).int(), "batch_index": torch.tensor([0, 1, 2])}),
    (ValueError, "block_table[1, 1]=3: expected 0 to 2, a page of the cache, for key 8 of the sequence",
     {"block_table": torch.tensor([[0, 9], [1, 3], [2, -7]]), "lengths": torch.tensor([0, 7, 3])}),
    (ValueError, "block_table[2, 0]=-1: expected 0 to 2",
     {"block_table": torch.tensor([[0, 9], [1, 2], [-1, 0]]), "lengths": torch.tensor([0, 7, 3])}),
    (ValueError, "lengths[1]=15: appending 2 keys exceeds the 16",
     {"block_table": torch.tensor([[0, 9], [1, 2], [2, 0]]), "lengths": torch.tensor([0, 15, 3])}),
    (ValueError, "rows 0 and 2 of the batch both append to key 4 of page 1 of the cache",
     {"block_table": torch.tensor([[1, 9], [0, 2], [2, 1]]), "lengths": torch.tensor([3, 0, 12])}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), APPEND_ERRORS, ids=lambda value: None)
def test_append(backend: str, error: type[Exception], message: str, change: dict[str, Any]) -> None:
    arguments = appending(**change)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor) and not x.is_meta}
    with pytest.raises(error) as raised:
        maskops.append_kv(**arguments, backend=backend)
    assert message in str(raised.value)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), f"{name} was written to"


def test_append_allows_what_is_in_order(backend: str) -> None:
    """Pages shared by their readers, gradients that nobody records, an append of nothing to a full sequence."""
    maskops.append_kv(**appending(block_table=torch.tensor([[0, 1], [0, 2], [1, 9]]), lengths=torch.tensor([8, 8, 5])),
                      backend=backend)  # fmt: skip
    with torch.no_grad():
        maskops.append_kv(**appending(k=torch.ones(3, 2, 2, 4, requires_grad=True)), backend=backend)
    nothing = {"k": torch.ones(3, 2, 0, 4), "v": torch.ones(3, 2, 0, 5), "lengths": torch.tensor([8, 8, 8])}
    maskops.append_kv(**appending(**nothing), backend=backend)


ATTEND_ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q: expected a tensor (batch, heads, length, width), got float", {"q": 1.0}),
    (TypeError, "q is torch.bfloat16, k_cache is torch.float32", {"q": torch.ones(3, 4, 1, 4).bfloat16()}),
    (ValueError, "q requires a gradient: a cache", {"q": torch.ones(3, 4, 1, 4, requires_grad=True)}),
    (ValueError, "sinks requires a gradient", {"sinks": torch.ones(4, requires_grad=True)}),
    (ValueError, "q and k_cache have head_dim 5 and 4", {"q": torch.ones(3, 4, 1, 5)}),
    (ValueError, "q has 3 heads, the cache has 2", {"q": torch.ones(3, 3, 1, 4)}),
    (ValueError, "k_cache has 3 rows for a batch of 2", {"q": torch.ones(2, 4, 1, 4)}),
    (ValueError, "lengths[1]=9: expected 0 to 8, the keys that a sequence can hold",
     {"lengths": torch.tensor([0, 9, 3])}),
    (ValueError, "lengths[0]=-2: expected 0 to 8", {"lengths": torch.tensor([-2, 9, 3])}),
    (ValueError, f"lengths[2]={2**32}: expected 0 to 8", {"lengths": torch.tensor([0, 8, 2**32])}),
    (ValueError, "leftpad[2]=-1: expected 0 or more keys", {"leftpad": torch.tensor([0, 9, -1])}),
    (TypeError, "leftpad is torch.bool: expected int32 or int64", {"leftpad": torch.tensor([False] * 3)}),
    (ValueError, "batch_index[0]=-1: expected 0 to 2, a row of the cache", {"batch_index": torch.tensor([-1, 0, 1])}),
    (ValueError, "block_table[1, 0]=3: expected 0 to 2, a page of the cache, for key 0",
     {"block_table": torch.tensor([[7, 9], [3, 2], [0, -7]])}),
    (ValueError, "lengths[1]=17: expected 0 to 16",
     {"block_table": torch.tensor([[7, 9], [0, 2], [0, -7]]), "lengths": torch.tensor([0, 17, 3])}),
    (TypeError, "mask is a tensor with shape (3, 8): expected a mask of maskops.masks", {"mask": torch.ones(3, 8)}),
    (ValueError, "mask is a plan for 1 queries and 9 keys, there are 1 queries and the cache holds 8 keys a sequence",
     {"mask": masks.causal().spans(1, 9)}),
    (ValueError, "mask is a plan for a batch of 2, q has a batch of 3",
     {"mask": masks.key_padding(torch.tensor([1, 2])).spans(1, 8)}),
    (ValueError, "alibi_slopes needs the positions of rows",
     {"mask": masks.causal().spans(1, 8), "alibi_slopes": torch.ones(4)}),
    (ValueError, "alibi_slopes has shape (2,): expected (4,) or (3, 4)", {"alibi_slopes": torch.ones(2)}),
    (TypeError, "sinks is torch.int64: expected a floating tensor", {"sinks": torch.ones(4).long()}),
    (ValueError, "softcap is -1.0: expected 0", {"softcap": -1.0}),
    (ValueError, "softmax_scale is inf: expected a finite number", {"softmax_scale": float("inf")}),
    (ValueError, "backend is 'nobody'", {"backend": "nobody"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), ATTEND_ERRORS, ids=lambda value: None)
def test_attend(backend: str, error: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(error) as raised:
        maskops.decode_attention(**{"backend": backend} | attending(**change))
    assert message in str(raised.value)


def test_what_compiled_code_cannot_check_is_never_an_access_out_of_bounds(backend: str) -> None:
    """Under compilation values cannot be read beforehand: the op itself refuses them."""

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        maskops.append_kv(k_cache, v_cache, q[:, ::2], q[:, ::2], lengths, block_table=table, backend=backend)
        return maskops.decode_attention(q, k_cache, v_cache, lengths + 1, block_table=table, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    good = torch.tensor([[0, 1], [2, 3]])
    caches = torch.zeros(4, 2, 8, 4), torch.zeros(4, 2, 8, 4)
    q = torch.ones(2, 4, 1, 4)
    assert compiled(q, *caches, torch.tensor([3, 9]), good).isfinite().all()
    for lengths, table in (
        (torch.tensor([3, 2**40]), good),
        (torch.tensor([-1, 3]), good),
        (torch.tensor([3, 9]), torch.tensor([[0, 1], [2, 4]])),
        (torch.tensor([3, 9]), torch.tensor([[-5, 1], [2, 3]])),
    ):
        if backend in for_devices("append_kv"):  # which check no values: their kernels pass over what lies outside
            compiled(q, *caches, lengths, table)
            continue
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            compiled(q, *caches, lengths, table)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("argument", ["q", "k_cache", "v_cache", "lengths", "k", "v"])
def test_nested_tensors_are_refused(argument: str) -> None:
    """Reading their shape raises something else, in the short way, too."""
    nested = torch.nested.nested_tensor([torch.ones(4, 1, 4), torch.ones(4, 2, 4)])
    assert nested.dim() == 4
    function, arguments = (
        (maskops.append_kv, appending()) if argument in "kv" else (maskops.decode_attention, attending())
    )
    arguments[argument] = nested
    with pytest.raises(TypeError, match=rf"^{argument} is a nested tensor: expected a dense one \("):
        function(**arguments)
