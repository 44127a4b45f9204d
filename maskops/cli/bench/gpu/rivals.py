"""Who does attention: torch's own kernels on a device, from what people do to the best there is, and maskops."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import maskops
from maskops import masks
from maskops.cli.bench.contests.attention import PACKED, PADDED, ROWS, AttentionContest
from maskops.cli.bench.contests.contest import Contender, Function, Leaves
from maskops.masks import Mask
from maskops.spans import RowSpans

_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LONGEST_SCORES = 4096
"""Longest sequence whose scores are worth materialising."""


class Attention(AttentionContest):
    """See the base class."""

    def contenders(self) -> list[Contender]:
        """Everybody who can do it, peers first."""
        return _attention(self)


def _attention(contest: AttentionContest) -> list[Contender]:
    found = [*_sdpa(contest), *_varlen(contest), *_flex(contest), *_naive(contest)]
    for index, backend in enumerate(contest.setting.backends("attention")):
        for layout in _our_layouts(contest):
            label = f"maskops {backend}" + (f", {layout}" if contest.ragged and layout != ROWS else "")
            compiles = backend == "triton"
            found.append(Contender(label, _ours(contest, layout, backend), layout, ours=True, compiles=compiles))
            if index == 0:
                made = _ours(contest, layout, backend, planned=True)
                found.append(Contender(f"{label}, plan made before", made, layout, ours=True, partial=True))
    return found


def _our_layouts(contest: AttentionContest) -> tuple[str, ...]:
    if contest.n_rows:
        return (ROWS,)
    return (PACKED, PADDED) if contest.ragged else (PADDED,)


def _mask(contest: AttentionContest, layout: str) -> Mask:
    if layout == PACKED:
        return masks.documents(cu_seqlens=contest.cu_seqlens) & contest.pattern
    if layout == ROWS:
        return masks.documents(contest.ids.view(contest.n_rows, -1)) & contest.pattern
    return masks.padding(contest.lengths_on_device) & contest.pattern if contest.ragged else contest.pattern


def _ours(
    contest: AttentionContest, layout: str, backend: str, *, planned: bool = False
) -> Callable[[Leaves], Function]:
    """With the plan in every step, or made once before."""

    def plan(leaves: Leaves) -> RowSpans:
        q = leaves[0]
        batch, length = (1, q.shape[0]) if layout == PACKED else (q.shape[0], q.shape[2])
        return _mask(contest, layout).spans(
            length, length, batch=batch, device=q.device, grad=torch.is_grad_enabled() or planned
        )

    def make(leaves: Leaves) -> Function:
        kept = plan(leaves) if planned else None

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            spans = plan((q, k, v)) if kept is None else kept
            if layout == PACKED:
                return maskops.varlen_attention(q, k, v, mask=spans, backend=backend)
            return maskops.attention(q, k, v, spans, backend=backend)

        return run

    return make


# ---- torch -----------------------------------------------------------------------------------------------------------


def _dense(contest: AttentionContest) -> Tensor | None:
    """The mask of a padded layout as bool, made in every step like any mask of a batch."""
    if contest.allowed is not None:
        return contest.allowed
    if contest.window is None and not contest.ragged:
        return None
    key = torch.arange(contest.longest, device=contest.setting.device)
    seen = key <= key[:, None] if contest.causal else torch.ones_like(key, dtype=torch.bool).expand(len(key), -1)
    if contest.window is not None:
        seen = seen & (key >= key[:, None] - contest.window)
    if contest.ragged:
        seen = seen & (key < contest.lengths_on_device[:, None, None, None])
    return seen


def _dense_rows(contest: AttentionContest) -> Tensor:
    ids = contest.ids.view(contest.n_rows, -1)
    seen = ids[:, None, :, None] == ids[:, None, None, :]
    return seen.tril() if contest.causal else seen


def _sdpa(contest: AttentionContest) -> list[Contender]:
    grouped = contest.heads != contest.kv_heads
    layout = ROWS if contest.n_rows else PADDED

    def make(kernel: str | None, is_causal: bool) -> Callable[[Leaves], Function]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = None if is_causal else _dense_rows(contest) if contest.n_rows else _dense(contest)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

        def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(_KERNELS[str(kernel)]):
                return run(q, k, v)

        return lambda leaves: run if kernel is None else by_kernel

    kernels: list[str | None] = [None] if contest.setting.device.type == "cpu" else list(_KERNELS)
    names = {kernel: "SDPA" if kernel is None else f"SDPA {kernel}" for kernel in kernels}
    found = []
    # Right padding lies after every token, so that causality alone hides it.
    simple = contest.allowed is None and contest.window is None and not contest.n_rows
    if simple and (contest.causal or not contest.ragged):
        note = ", padded, is_causal" if contest.ragged else ""
        found += [Contender(names[kernel] + note, make(kernel, contest.causal), layout) for kernel in kernels]
    if not simple or contest.ragged:
        # The mask by the kernel that torch chooses, and by the one that takes masks and might be quicker.
        for kernel in [None, *(kernel for kernel in kernels if kernel in ("cuDNN", "efficient"))]:
            name = names.get(kernel, "SDPA")
            found.append(Contender(f"{name}, dense mask", make(kernel, False), layout, habit=kernel is None))
    return found


def _varlen(contest: AttentionContest) -> list[Contender]:
    """torch's packed attention; its signature differs between versions."""
    if contest.allowed is not None or contest.n_rows:
        return []

    def make(leaves: Leaves) -> Function:
        from torch.nn.attention import varlen

        known = inspect.signature(varlen.varlen_attn).parameters
        keywords: dict[str, Any] = {}
        if "window_size" in known:
            keywords["window_size"] = (
                -1 if contest.window is None else contest.window,
                0 if contest.causal else -1,
            )
        elif contest.window is None:
            keywords["is_causal"] = contest.causal
        else:
            raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no window_size")
        if contest.heads != contest.kv_heads and "enable_gqa" in known:
            keywords["enable_gqa"] = True
        offsets, longest = contest.cu_seqlens, contest.longest

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cast(Tensor, varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest, **keywords))

        return run

    return [Contender("varlen_attn", make, PACKED)]


def _flex(contest: AttentionContest) -> list[Contender]:
    """FlexAttention, its BlockMask made in every step and made before.

    Where the mask is that of a batch, making it is a part of every step, and the row without it is no rival.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    layout = ROWS if contest.n_rows else PACKED if contest.ragged else PADDED
    batches = contest.n_rows or 1
    length = contest.total // batches if contest.n_rows or contest.ragged else contest.longest
    ids = contest.ids.view(batches, -1) if contest.n_rows or contest.ragged else None

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if contest.allowed is not None:
            return contest.allowed[row, key]
        seen = row >= key if contest.causal else row >= 0
        if contest.window is not None:
            seen = seen & (row - key <= contest.window)
        return seen if ids is None else seen & (ids[b, row] == ids[b, key])

    create: Callable[..., BlockMask] = contest.setting.compiled(create_block_mask)

    def block_mask() -> BlockMask:
        return create(sees, contest.n_rows or None, None, length, length, device=contest.setting.device)

    def make(planned: bool) -> Callable[[Leaves], Function]:
        def prepare(leaves: Leaves) -> Function:
            kernel: Callable[..., Tensor] = contest.setting.compiled(flex_attention)
            unmasked = contest.allowed is None and not contest.causal and contest.window is None and ids is None
            kept = block_mask() if planned and not unmasked else None

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                mask = None if unmasked else kept if planned else block_mask()
                if layout == PACKED:
                    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # in a dry run it says that it is not compiled
                    out = kernel(q, k, v, block_mask=mask, enable_gqa=contest.heads != contest.kv_heads)
                return out[0].transpose(0, 1) if layout == PACKED else out

            return run

        return prepare

    if contest.allowed is None and contest.window is None and ids is None and not contest.causal:
        return [Contender("FlexAttention", make(True), layout, compiles=True)]
    # The mask of a batch, or one that a model keeps.
    of_a_batch = ids is not None or contest.allowed is not None
    return [
        Contender("FlexAttention with its BlockMask", make(False), layout, compiles=True),
        Contender("FlexAttention, BlockMask made before", make(True), layout, partial=of_a_batch),
    ]


def _naive(contest: AttentionContest) -> list[Contender]:
    """The formula, compiled."""
    if contest.ragged or contest.n_rows or contest.longest > _LONGEST_SCORES or contest.heads != contest.kv_heads:
        return []

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * contest.head_dim**-0.5
        mask = _dense(contest)
        if mask is None and contest.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return torch.matmul(scores.softmax(-1), v)

    return [
        Contender(
            "torch.compile of the formula", lambda leaves: contest.setting.compiled(formula), PADDED, compiles=True
        )
    ]
