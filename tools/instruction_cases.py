"""What ``tools.instruction_sets`` computes on every instruction set: each kernel of ``csrc/cpu/isa.h``, by calls.

A piece of work is run in the dtype under test on a processor's kernels, and in float64 and in that dtype on the
reference. Places that no result may depend on hold NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import maskops
from maskops import masks, testing
from maskops.testing import Case

SINGLE = (torch.float32,)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = 1200
"""So many that decoding splits them into tasks, twice."""


class Run(NamedTuple):
    """How a piece of work is computed.

    Attributes:
        held: the dtype that holds every number of the problem without rounding.
        dtype: the dtype that it is computed in: ``held`` or float64.
        backend: of maskops, ``cpu`` or ``reference``.
    """

    held: torch.dtype
    dtype: torch.dtype
    backend: str

    def draw(self, seed: int, *sizes: int) -> Tensor:
        """Standard normal numbers, the same for every run."""
        numbers = torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return numbers.to(self.held).to(self.dtype)

    def single(self, x: Tensor) -> Tensor:
        """A tensor that is float32 whatever the dtype, or float64."""
        return x.float().to(torch.float64 if self.dtype == torch.float64 else torch.float32)


Results = dict[str, Tensor]


class Work(NamedTuple):
    """A problem of an op.

    Attributes:
        op: the op.
        name: unique among those of its op.
        dtypes: those that it is run in.
        compute: results by name. Those of ``gradient of ...`` share one scale.
        growth: how many times its scale the terms of a result are large that cancel.
    """

    op: str
    name: str
    dtypes: tuple[torch.dtype, ...]
    compute: Callable[[Run], Results]
    growth: Mapping[str, float] = {}


def _gradients(outputs: dict[str, Tensor], inputs: dict[str, Tensor], incoming: list[Tensor]) -> Results:
    """The gradients of the inputs, and those that came in: differences that cancel are of their size, too."""
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), incoming)
    return {f"gradient of {name}": x for name, x in zip([*outputs, *inputs], [*incoming, *found], strict=True)}


# ---- attention ----


def _attention(case: Case, dropout_p: float, run: Run) -> Results:
    case = case.with_dtype(run.held)
    inputs = {name: x.to(run.dtype) for name, x in zip("qkv", case.inputs(), strict=True)}
    features: dict[str, Any] = dict(case.extras())
    for name, value in features.items():
        if isinstance(value, Tensor):
            inputs[name] = features[name] = run.single(value)
    for x in inputs.values():
        x.requires_grad_()
    torch.manual_seed(11)  # of dropout
    q, k, v = (inputs[name] for name in "qkv")
    out, lse = maskops.attention(
        q, k, v, case.mask("cpu"), softmax_scale=case.softmax_scale, dropout_p=dropout_p, return_lse=True,
        backend=run.backend, **features,
    )  # fmt: skip
    incoming = [run.draw(4, *out.shape), run.single(run.draw(5, *lse.shape))]
    return {"out": out.detach(), "lse": lse.detach(), **_gradients({"out": out, "lse": lse}, inputs, incoming)}


def _growth(case: Case) -> dict[str, float]:
    """Of gradients that sum over pairs: their roundings add up like the steps of a random walk (as in ``check``)."""
    pairs = case.batch * case.heads * case.q_len * case.k_len
    growth = {}
    for name, x in case.extras().items():
        if isinstance(x, Tensor) and name != "sinks":
            distance = max(case.q_len, case.k_len) if name == "alibi_slopes" else 1
            growth[f"gradient of {name}"] = distance * max(1.0, pairs / x.numel()) ** 0.5
    return growth


def _attention_works() -> list[Work]:
    works = [
        Work("attention", case.name, DTYPES, functools.partial(_attention, case, 0.0), _growth(case))
        for case in testing.cases("attention", features=True)
    ]
    few_rows = Case("keys in parts", "", batch=1, heads=1, kv_heads=1, q_len=96, k_len=2048, head_dim=64, value_dim=64)
    works.append(Work("attention", few_rows.name, SINGLE, functools.partial(_attention, few_rows, 0.0)))
    padding = next(case for case in testing.cases("attention") if case.name == "padding left, causal")
    works.append(Work("attention", "dropout", DTYPES, functools.partial(_attention, padding, 0.4)))
    return works


# ---- decode_attention ----


def _decode(heads: int, kv_heads: int, q_len: int, widths: tuple[int, int], has_features: bool, run: Run) -> Results:
    lengths = torch.tensor([KEYS, 515, 3, 0])
    batch, page = len(lengths), 16
    k, v = (run.draw(seed, batch, kv_heads, KEYS, width) for seed, width in zip((1, 2), widths, strict=True))
    is_held = (torch.arange(KEYS) < lengths[:, None])[:, None, :, None]
    k, v = torch.where(is_held, k, math.nan), torch.where(is_held, v, math.nan)
    features: dict[str, Any] = {}
    mask = None
    if has_features:
        mask = masks.causal() & (masks.sliding_window(900, 0) | masks.prefix(4))
        slopes, sinks = run.draw(6, batch, heads).abs() / 64, run.draw(7, heads)
        features = {"softcap": 3.0, "alibi_slopes": run.single(slopes), "sinks": run.single(sinks)}
        # In pages, in an order of their own.
        order = torch.randperm(batch * KEYS // page, generator=torch.Generator().manual_seed(8))
        features["block_table"] = order.argsort().view(batch, KEYS // page)
        k, v = (x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)[order] for x in (k, v))
    q = run.draw(3, batch, heads, q_len, widths[0])
    out, lse = maskops.decode_attention(q, k, v, lengths, mask, return_lse=True, backend=run.backend, **features)
    return {"out": out, "lse": lse}


def _append(run: Run) -> Results:
    lengths = torch.tensor([30, 0, 61])
    k_cache, v_cache = run.draw(1, 3, 2, 64, 24), run.draw(2, 3, 2, 64, 24)
    maskops.append_kv(
        k_cache, v_cache, run.draw(3, 3, 2, 3, 24), run.draw(4, 3, 2, 3, 24), lengths, backend=run.backend
    )
    return {"k": k_cache, "v": v_cache}


def _decode_works() -> list[Work]:
    shapes = {
        "one head": (1, 1, 1, (64, 32), False),
        "grouped queries": (8, 2, 1, (64, 64), False),
        "odd widths, several rows, all features, pages": (6, 2, 3, (37, 21), True),
        "many rows": (7, 1, 11, (16, 48), True),
    }
    works = [
        Work("decode_attention", name, DTYPES, functools.partial(_decode, *shape)) for name, shape in shapes.items()
    ]
    return [*works, Work("decode_attention", "append_kv", DTYPES, _append)]


# ---- cross_entropy ----


def _loss(rows: int, vocabulary: int, options: dict[str, Any], run: Run) -> Results:
    logits = (3 * run.draw(1, rows, vocabulary)).to(run.held).to(run.dtype)
    generator = torch.Generator().manual_seed(2)
    options = dict(options)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    if options.pop("soft", False):
        target = run.draw(3, rows, vocabulary).float().softmax(-1).to(run.held).to(run.dtype)
    else:
        target[torch.arange(rows) % 4 == 3] = -100
        logits = torch.where((target == -100)[:, None], math.nan, logits)
    if options.pop("weighted", False):
        options["class_weights"] = run.single(run.draw(4, vocabulary).abs())
    if options.get("return_argmax"):  # ties would be anybody's
        logits[torch.arange(rows), torch.randint(vocabulary, (rows,), generator=generator)] = 13.0
    logits.requires_grad_()
    if run.backend == "reference":
        options.pop("inplace_backward", None)
    if options.pop("into_buffer", False) and run.backend != "reference":
        options["grad_buffer"] = torch.full_like(logits, math.nan, requires_grad=False)
    # A leaf cannot be written over.
    read = logits * 1.0
    with maskops.use_backend(run.backend):
        found = maskops.cross_entropy(read, target, **options)
    outputs = (
        {"loss": found} if isinstance(found, Tensor) else {k: v for k, v in found._asdict().items() if v is not None}
    )
    argmax = outputs.pop("argmax", None)
    received = [run.single(run.draw(5 + index, *x.shape)) for index, x in enumerate(outputs.values())]
    gradients = _gradients(outputs, {"logits": logits}, received)
    results = {name: x.detach() for name, x in outputs.items()} | gradients
    return results if argmax is None else {**results, "argmax": argmax}


def _loss_works() -> list[Work]:
    none: dict[str, Any] = {"reduction": "none"}
    total: dict[str, Any] = {"reduction": "sum", "into_buffer": True}  # of a mean the gradients are too small to miss
    everything = {**none, "return_lse": True, "return_logprobs": True, "return_entropy": True, "return_argmax": True}
    options: dict[str, dict[str, Any]] = {
        "plain": none,
        "all outputs": everything,
        "label smoothing, z-loss": {**none, "label_smoothing": 0.1, "z_loss": 0.01},
        "softcap, scale": {**none, "softcap": 5.0, "logit_scale": 0.7},
        "class weights": {**none, "weighted": True, "label_smoothing": 0.2},
        "probabilities": {**none, "soft": True, "label_smoothing": 0.1},
        "all outputs, softcap, smoothing": {**everything, "softcap": 9.0, "label_smoothing": 0.1, "weighted": True},
        "over the logits": {**none, "inplace_backward": True},
        "into a buffer": total,
        "into a buffer, softcap, smoothing": {**total, "softcap": 5.0, "label_smoothing": 0.1},
        "into a buffer, probabilities": {**total, "soft": True},
    }
    # An entropy is a difference of numbers as large as the logits, and so is a part of its gradient.
    differences = {"entropy": 16.0, "gradient of logits": 4.0}
    works = [
        Work("cross_entropy", name, DTYPES, functools.partial(_loss, 11, 1003, chosen),
             differences if "return_entropy" in chosen else {})
        for name, chosen in options.items()
    ]  # fmt: skip
    # Gradients past the caches, from 32 MiB on.
    for name, chosen in (("large", none), ("large, into a buffer", total)):
        works.append(Work("cross_entropy", name, SINGLE, functools.partial(_loss, 9, 1_000_003, chosen)))
    return works


# ---- masked_softmax ----


def _softmax(sizes: tuple[int, ...], dim: int, kind: str, run: Run) -> Results:
    x = run.draw(1, *sizes)
    mask: Any = None
    if kind == "holes":
        mask = torch.rand(sizes, generator=torch.Generator().manual_seed(2)) < 0.6
        x = torch.where(mask, x, math.nan)
    elif kind == "spans":
        mask = masks.causal() & masks.padding(torch.tensor([sizes[-1], sizes[-1] // 3]))
    x.requires_grad_()
    weights, lse = maskops.masked_softmax(x, mask, dim, return_lse=True, backend=run.backend)
    incoming = [run.draw(3, *weights.shape), run.single(run.draw(4, *lse.shape))]
    return {
        "weights": weights.detach(),
        "lse": lse.detach(),
        **_gradients({"weights": weights, "lse": lse}, {"x": x}, incoming),
    }


def _softmax_works() -> list[Work]:
    shapes: dict[str, tuple[tuple[int, ...], int, str]] = {
        "rows": ((5, 133), -1, "none"),
        "rows with holes": ((2, 3, 70), -1, "holes"),
        "rows, spans": ((2, 3, 67, 67), -1, "spans"),
        "lanes": ((3, 41, 37), 1, "none"),
        "lanes with holes": ((19, 70), 0, "holes"),
    }
    return [Work("masked_softmax", name, DTYPES, functools.partial(_softmax, *shape)) for name, shape in shapes.items()]


# ---- linear_cross_entropy ----


def _linear_loss(rows: int, width: int, vocabulary: int, softcap: float, run: Run) -> Results:
    inputs = {
        "hidden": run.draw(1, rows, width),
        "weight": run.draw(2, vocabulary, width),
        "bias": run.draw(4, vocabulary),
    }
    inputs["weight"] *= width**-0.5
    for x in inputs.values():
        x.requires_grad_()
    target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    target[::5] = -100
    with maskops.use_backend(run.backend):
        loss = maskops.linear_cross_entropy(
            inputs["hidden"], inputs["weight"], target, bias=inputs["bias"], reduction="sum", softcap=softcap
        )
    return {"loss": loss.detach(), **_gradients({"loss": loss}, inputs, [run.single(torch.tensor(1.0))])}


def _linear_works() -> list[Work]:
    # The second is deeper than a part of the depth and wider than a block of the products.
    shapes: dict[str, tuple[int, int, int, float]] = {
        "softcap, ignored rows": (40, 24, 301, 9.0),
        "deep": (70, 300, 700, 0.0),
    }
    return [
        Work("linear_cross_entropy", name, DTYPES, functools.partial(_linear_loss, *shape))
        for name, shape in shapes.items()
    ]


def works() -> list[Work]:
    """All of them."""
    return [*_attention_works(), *_decode_works(), *_loss_works(), *_softmax_works(), *_linear_works()]
