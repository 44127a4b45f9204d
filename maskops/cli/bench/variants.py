"""The one list of ways to do the work: torch's own, from what people do to the best it has, and maskops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import maskops
from maskops import masks
from maskops.cli.bench.batches import IGNORED, Batch, Layout
from maskops.spans import RowSpans


@dataclass(frozen=True)
class AttentionWay:
    """Causal attention inside each document of a batch.

    Attributes:
        prepare: Batch to whatever the attention needs for it (a mask, a plan). Called once per batch, inside the
            timed region, and shared by all layers.
        attend: `(q, k, v, prepared) -> out`; padded `(batch, heads, sequence, head_dim)`, packed
            `(total, heads, head_dim)`.
    """

    prepare: Callable[[Batch], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


LossWay = Callable[[Tensor, Tensor], Tensor]
"""`(logits (rows, vocabulary), targets (rows,)) -> sum of the losses of the rows that have a target`."""

JOBS = ("attention", "loss", "step")


@dataclass(frozen=True)
class Variant:
    """One row of the tables.

    Attributes:
        name: The row's label.
        layout: How documents become tensors.
        attention: See `AttentionWay`.
        loss: See `LossWay`.
        gather: In a training step, drop the rows without a target before the output layer. One line in a padded model,
            so every padded variant does it, except the one that people write.
        ours: Whether it calls maskops; the others are the baselines.
        habit: Whether it is what people do today.
        jobs: Where the row is shown. A variant that repeats another one's work in a job is left out of it.
        devices: Where it can run.
        compiled: Needs torch.compile, hence a long warm-up: only in the full run.
        upcast: Computes in float32 inside: a row only where the inputs are of lower precision.
    """

    name: str
    layout: Layout
    attention: AttentionWay
    loss: LossWay
    gather: bool = False
    ours: bool = False
    habit: bool = False
    jobs: tuple[str, ...] = JOBS
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    upcast: bool = False


def _dense_mask(batch: Batch) -> Tensor:
    length = batch.tokens.shape[1]
    keys = torch.arange(length, device=batch.tokens.device)
    real = keys < batch.lengths_on_device[:, None]
    return real[:, None, None, :] & (keys[:, None] >= keys)


def _nothing(batch: Batch) -> None:
    del batch


def _host_lengths(batch: Batch) -> tuple[int, ...]:
    return batch.lengths


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor, nothing: None) -> Tensor:
    # Right padding lies after every real token, so causality alone hides it from them.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _causal_sdpa_by(backend: SDPBackend) -> AttentionWay:
    def attend(q: Tensor, k: Tensor, v: Tensor, nothing: None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return AttentionWay(_nothing, attend)


def _document_loop(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    pieces = [
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
        for query, key, value in zip(*(_by_document(packed, lengths) for packed in (q, k, v)), strict=True)
    ]
    return torch.cat([piece.squeeze(0).transpose(0, 1) for piece in pieces])


def _by_document(packed: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Views `(1, heads, length, head_dim)` of a packed `(total, heads, head_dim)`."""
    return [document.transpose(0, 1).unsqueeze(0) for document in packed.split(list(lengths))]


def _upcast_loop(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    return _document_loop(q.float(), k.float(), v.float(), lengths).to(q.dtype)


def _plan_padded(batch: Batch) -> RowSpans:
    size, length = batch.tokens.shape
    mask = masks.padding(batch.lengths_on_device) & masks.causal()
    return mask.spans(length, length, batch=size, device=batch.tokens.device, grad=torch.is_grad_enabled())


def _plan_packed(batch: Batch) -> RowSpans:
    total = batch.tokens.shape[0]
    mask = masks.documents(cu_seqlens=batch.cu_seqlens) & masks.causal()
    return mask.spans(total, total, device=batch.tokens.device, grad=torch.is_grad_enabled())


def _maskops_padded(q: Tensor, k: Tensor, v: Tensor, plan: RowSpans) -> Tensor:
    return maskops.attention(q, k, v, plan)


def _maskops_packed(q: Tensor, k: Tensor, v: Tensor, plan: RowSpans) -> Tensor:
    return maskops.varlen_attention(q, k, v, mask=plan)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    pieces = []
    for query, key, value in zip(*(_by_document(packed, lengths) for packed in (q, k, v)), strict=True):
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        pieces.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(pieces)


def _explicit_loss(logits: Tensor, targets: Tensor) -> Tensor:
    real = targets != IGNORED
    picked = logits[real].gather(1, targets[real, None]).squeeze(1)
    return (logits[real].logsumexp(1) - picked).sum()


def torch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's cross-entropy, summed over the rows that have a target."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _upcast_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch_loss(logits.float(), targets)


@cache
def _compile_loss() -> LossWay:
    return torch.compile(torch_loss, dynamic=True)


def _compiled_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return _compile_loss()(logits, targets)


def _maskops_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return maskops.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


DENSE = AttentionWay(_dense_mask, _masked_sdpa)
CAUSAL = AttentionWay(_nothing, _causal_sdpa)
LOOP = AttentionWay(_host_lengths, _document_loop)
UPCAST_LOOP = AttentionWay(_host_lengths, _upcast_loop)
MASKOPS_PADDED = AttentionWay(_plan_padded, _maskops_padded)
MASKOPS_PACKED = AttentionWay(_plan_packed, _maskops_packed)

ORACLE = Variant("oracle", "packed", AttentionWay(_host_lengths, _explicit_attention), _explicit_loss)
"""The formulas, written out; run in float64 they are what every variant is compared with. Never timed."""

PLAIN = Variant("packed, SDPA document by document", "packed", LOOP, torch_loss)
"""Plain torch without any padding: what the errors of all variants are measured in."""

_PADDED_LAYOUTS: tuple[Layout, ...] = ("padded", "bucketed")
_WITHOUT_LOSS = ("attention", "step")

VARIANTS = (
    Variant("padded, dense mask", "padded", DENSE, torch_loss, habit=True),
    Variant("padded, is_causal", "padded", CAUSAL, torch_loss, gather=True, jobs=_WITHOUT_LOSS),
    Variant("bucketed by length, is_causal", "bucketed", CAUSAL, torch_loss, gather=True, jobs=_WITHOUT_LOSS),
    PLAIN,
    Variant("packed, document by document in fp32", "packed", UPCAST_LOOP, _upcast_loss, upcast=True),
    Variant("packed, compiled loss", "packed", LOOP, _compiled_loss, jobs=("loss", "step"), compiled=True),
    *(
        Variant(
            f"{layout}, is_causal, {label}",
            layout,
            _causal_sdpa_by(backend),
            torch_loss,
            gather=True,
            jobs=_WITHOUT_LOSS,
            devices=("cuda",),
        )
        for label, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION))
        for layout in _PADDED_LAYOUTS
    ),
    Variant("maskops padded", "padded", MASKOPS_PADDED, _maskops_loss, gather=True, ours=True),
    Variant("maskops packed", "packed", MASKOPS_PACKED, _maskops_loss, ours=True),
)


def chosen(
    job: str, device: torch.device, dtype: torch.dtype, *, compiled: bool, variants: Sequence[Variant] = VARIANTS
) -> list[Variant]:
    """The rows of a job's table on a device."""
    return [
        variant
        for variant in variants
        if job in variant.jobs
        and device.type in variant.devices
        and (compiled or not variant.compiled)
        and (dtype != torch.float32 or not variant.upcast)
    ]
