"""Losses of transformers' models over the tokens that have a target: the signatures and meanings of its ``loss_utils``.

What differs from there: no float32 copy of the logits, nothing is predicted across the boundary of two documents or
from padding, a batch without a target has loss 0 (with zero gradients) instead of NaN, and float64 stays float64.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from maskops.data.labels import IGNORE_INDEX, shift_labels
from maskops.data.places import sequence_ids
from maskops.integrations.transformers.arrival import (
    cu_seqlens_of_call,
    documents_of_call,
    is_encoder_decoder,
    of_cu_seqlens,
    same_sizes,
)
from maskops.integrations.transformers.calls import Call, innermost
from maskops.ops.cross_entropy.api import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from maskops.integrations.transformers.attach import Installation, Options


class Score(Protocol):
    """The mean loss of targets (...), -100 or another ``ignore_index`` where there is none; what it scores it holds."""

    def __call__(self, target: Tensor, *, ignore_index: int, num_items: int | Tensor | None) -> Tensor:
        """0-dim: the sum by ``num_items``, or by the number of targets."""


def next_token_targets(
    labels: Tensor, *, documents: Tensor | None = None, cu_seqlens: Tensor | None = None, ignore_index: int
) -> Tensor:
    """What each place is scored against: the label of the next token of the same document.

    Args:
        labels: integers (..., length), aligned with the tokens.
        documents: integers, same shape: the document of each token, negative = padding. None: those of
            ``cu_seqlens``, or each row is one.
        cu_seqlens: int32 or int64 (n_documents + 1,), offsets from 0 in the flattened tokens, ascending; places after
            the last document are padding.
        ignore_index: the label of no target.

    Returns:
        int64, same shape.
    """
    if documents is None:
        if cu_seqlens is None:
            documents = torch.zeros_like(labels)
        else:
            documents = sequence_ids(cu_seqlens.to(labels.device, torch.int32), labels.numel()).reshape(labels.shape)
    return shift_labels(labels, documents.to(labels.device), ignore_index)


def denominator(num_items_in_batch: float | Tensor | None, device: torch.device) -> int | Tensor | None:
    """What Trainer and others divide by, as ``maskops.cross_entropy`` takes it: any number, from any device."""
    if num_items_in_batch is None or isinstance(num_items_in_batch, int):
        return num_items_in_batch
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch has shape {tuple(num_items_in_batch.shape)}: expected a number or a tensor of one"
            )
        return num_items_in_batch.detach().to(device)
    return torch.tensor(num_items_in_batch, dtype=torch.float32, device=device)


def score_logits(logits: Tensor, vocab_size: int | None = None) -> Score:
    """Scores the rows of ``logits`` (..., V), float of any width.

    Args:
        logits: (..., V).
        vocab_size: V where the last dimension holds several rows, as that of models with codebooks does.
    """

    def score(target: Tensor, *, ignore_index: int, num_items: int | Tensor | None) -> Tensor:
        rows = logits
        if target.shape != logits.shape[:-1] and vocab_size is not None and logits.numel() % vocab_size == 0:
            rows, flat = logits.reshape(-1, vocab_size), target.reshape(-1)
            target = flat if flat.shape == rows.shape[:1] else target
        loss: Tensor = cross_entropy(rows, target, ignore_index=ignore_index, num_items=num_items)
        return loss

    return score


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    score: Score | None = None,
    **unused: Any,
) -> Tensor:
    """The loss of a causal language model: transformers' ``ForCausalLMLoss``, document by document.

    Args:
        logits: (..., length, V) float32, bfloat16, float16 or float64; no copy is made of them.
        labels: integers (..., length), aligned with the tokens; None where ``shift_labels`` are given.
        vocab_size: V.
        num_items_in_batch: replaces the denominator of the mean, as Trainer's number of targets of all micro-batches
            of a step does: a number, or a tensor of one, on any device. It is taken as given: a collator that leaves
            labels on first tokens of packed documents makes Trainer count them, though nothing predicts them.
        ignore_index: the label of no target.
        shift_labels: integers (..., length): what each place is scored against. Taken as they are: ``labels`` and the
            boundaries of documents are not looked at.
        documents: integers (..., length): the document of each token, negative = padding.
        cu_seq_lens_q: offsets of packed documents in the flattened tokens, where ``documents`` is None.
        score: what scores the targets instead of ``logits``.
        unused: the other keyword arguments of the model's call, which transformers hands to every loss.

    Returns:
        0-dim, float32 (float64 for float64 logits): the sum over targets by their number or ``num_items_in_batch``; 0
        with zero gradients where there is none.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels and shift_labels are None: the loss needs one of them")
        labels = labels.to(logits.device)
        target = next_token_targets(labels, documents=documents, cu_seqlens=cu_seq_lens_q, ignore_index=ignore_index)
    else:
        target = shift_labels
    return _mean(logits, target, vocab_size, num_items_in_batch, ignore_index, score)


def aligned_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    *,
    score: Score | None = None,
    **unused: Any,
) -> Tensor:
    """The loss of labels that stand where they are predicted: transformers' ``ForMaskedLMLoss``.

    Args:
        logits: (..., V), as for ``causal_lm_loss``.
        labels: integers (...).
        vocab_size: as for ``causal_lm_loss``, as are the other arguments and the result.
        num_items_in_batch: see there.
        ignore_index: see there.
        score: see there.
        unused: see there.
    """
    return _mean(logits, labels, vocab_size, num_items_in_batch, ignore_index, score)


def token_classification_loss(
    logits: Tensor,
    labels: Tensor,
    config: Any,
    num_items_in_batch: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **unused: Any,
) -> Tensor:
    """The loss of a class for every token: transformers' ``ForTokenClassification``.

    Args:
        logits: (..., number of classes), as for ``causal_lm_loss``.
        labels: integers (...).
        config: the model's, whose ``num_labels`` is the number of classes.
        num_items_in_batch: as for ``causal_lm_loss``, as are the other arguments and the result.
        ignore_index: see there.
        unused: see there.
    """
    return _mean(logits, labels, config.num_labels, num_items_in_batch, ignore_index, None)


def _mean(
    logits: Tensor,
    target: Tensor,
    vocab_size: int | None,
    num_items_in_batch: float | Tensor | None,
    ignore_index: int,
    score: Score | None,
) -> Tensor:
    target = target.to(logits.device)
    if target.dtype not in (torch.int64, torch.int32):
        target = target.to(torch.int64)
    score = score_logits(logits, vocab_size) if score is None else score
    return score(target, ignore_index=ignore_index, num_items=denominator(num_items_in_batch, logits.device))


# ---- of attached models ----------------------------------------------------------------------------------------------


def documents_of_labels(call: Call, labels: Tensor) -> Tensor | None:
    """Which document each label of a running call belongs to, as the call's attention has it.

    Args:
        call: the call of the model that computes the loss.
        labels: (batch, length) of its tokens; or as many in another shape; or, with ``logits_to_keep``, (batch, kept).

    Returns:
        int64, the shape of ``labels``, -1 = padding; None where the call says nothing of places like these.
    """
    sizes = None if is_encoder_decoder(call) else call.sizes
    if sizes is None:
        return _documents_of_tokens(call, labels.shape[0], labels.shape[1]) if labels.dim() == 2 else None
    keep = call.arguments.get("logits_to_keep")
    if not _fits(labels, sizes, keep):
        return None
    return _laid_out(_documents_of_tokens(call, *sizes), labels, sizes, keep)


def _fits(labels: Tensor, sizes: tuple[int, int], keep: Any) -> bool:
    """Whether it is known which of (batch, length) tokens labels stand for."""
    if labels.dim() == 2 and same_sizes(sizes, (labels.shape[0], labels.shape[1])):
        return True
    if labels.numel() == sizes[0] * sizes[1]:
        return True
    if labels.dim() != 2 or labels.shape[0] != sizes[0] or keep is None:
        return False
    return bool(labels.shape[1] == (keep.numel() if isinstance(keep, Tensor) else keep))


def _laid_out(found: Tensor | None, labels: Tensor, sizes: tuple[int, int], keep: Any) -> Tensor | None:
    """Documents (batch, length) of tokens, for labels that stand for them, all or those that are kept."""
    batch, length = sizes
    if labels.dim() == 2 and same_sizes(sizes, (labels.shape[0], labels.shape[1])):
        return found
    if labels.numel() == batch * length:
        if found is None:
            found = torch.zeros(batch, length, dtype=torch.int64, device=labels.device)
        row = torch.arange(batch, device=found.device)[:, None]
        return torch.where(found >= 0, found + row * length, -1).reshape(labels.shape)
    if found is None:
        return None
    return found[:, keep.to(found.device)] if isinstance(keep, Tensor) else found[:, length - keep :]


def _documents_of_tokens(call: Call, batch: int, length: int) -> Tensor | None:
    """The documents of the tokens of a call, int64 (batch, length), -1 = padding; None for one a row."""
    two_sides = is_encoder_decoder(call)
    mask = call.tensor("decoder_attention_mask" if two_sides else "attention_mask")
    if mask is not None and mask.dim() == 4:
        return _documents_of_pairs(mask, batch, length)
    if mask is None or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        mask, columns, kept = None, slice(0, length), None
    else:
        columns = slice(mask.shape[1] - length, mask.shape[1])  # behind those of a cache
        kept = mask[:, columns] != 0
    if two_sides:
        cu_seqlens = cu_seqlens_of_call(call, "q")
        found = None if cu_seqlens is None else of_cu_seqlens(cu_seqlens[1], batch, length, cu_seqlens[0])
    else:
        found = documents_of_call(call, batch, length, kept, columns=columns, is_continued=False)
    if found is None:
        return None if kept is None else torch.where(kept, 0, -1)
    return found.ids if kept is None else torch.where(kept, found.ids, -1)


def _documents_of_pairs(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """Documents by a 4-D mask, bool or additive: a token that does not see the one before it begins another."""
    if mask.shape[0] not in (1, batch) or mask.shape[2] != length or mask.shape[3] != length:
        return None
    pairs = mask.detach().diagonal(-1, dim1=2, dim2=3)
    seen = pairs if pairs.dtype == torch.bool else pairs > torch.finfo(pairs.dtype).min
    begins = torch.nn.functional.pad(~seen.any(1), (1, 0), value=False)
    return begins.to(torch.int64).cumsum(1).expand(batch, length)


class Fused(Protocol):
    """What scores targets without logits, where a call of its model is a training step."""

    def score(self, logits: Tensor) -> Score | None:
        """None: the logits are those of the batch."""


class _Apart(threading.local):
    """What was read in calls of the model inside another one, whose own forward was called without its hooks."""

    def __init__(self) -> None:
        self.found: list[tuple[int, tuple[int, int], Tensor | None]] = []


_apart = _Apart()


class LossFunction:
    """``model.loss_function`` of one attached model.

    Attributes:
        model: the model, whose running call says where documents lie.
        loss: ``causal_lm_loss``, ``aligned_loss`` or ``token_classification_loss``.
        fused: the output layer, if it is fused into the loss.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        self.model = model
        self.loss = loss
        self.fused: Fused | None = None

    def __call__(self, logits: Tensor, labels: Tensor | None, *arguments: Any, **keywords: Any) -> Tensor:
        """The loss, for the arguments that transformers' own function takes."""
        call = innermost()
        if self.loss is causal_lm_loss and labels is not None:
            is_running = call is not None and call.module is self.model
            documents = (
                documents_of_labels(call, labels) if call is not None and is_running else self._of_forward(labels)
            )
            if documents is not None:
                keywords["documents"] = documents
        score = None if self.fused is None else self.fused.score(logits)
        if score is not None:
            keywords["score"] = score
        return self.loss(logits, labels, *arguments, **keywords)

    def remember(self, call: Call, _: Any) -> None:
        """Step after each call: adapters call ``forward`` of the model itself, and only the model inside says where."""
        inside = getattr(self.model, "base_model", None)
        if call.parent is None and call.sizes is not None and call.module is inside is not self.model:
            _apart.found[:] = [(id(self), call.sizes, _documents_of_tokens(call, *call.sizes))]

    def _of_forward(self, labels: Tensor) -> Tensor | None:
        """The documents of labels in a forward that was called without the hooks of its model."""
        if not _apart.found or _apart.found[0][0] != id(self):
            return None
        if self.fused is not None and self.model.training:
            _apart.found.clear()
            raise RuntimeError(
                f"fuse_lm_head=True: the forward of {type(self.model).__name__} was called without its hooks, as "
                "wrappers with adapters do, so that its output layer is not fused: attach without it"
            )
        _, sizes, found = _apart.found.pop()
        keep = labels.shape[1] if labels.dim() == 2 else None
        return _laid_out(found, labels, sizes, keep) if _fits(labels, sizes, keep) else None


class Served(NamedTuple):
    """Whose loss a model computes.

    Attributes:
        model: the model.
        function: what it calls now; None: its own loss stays.
        reason: in words.
    """

    model: PreTrainedModel
    function: LossFunction | None
    reason: str

    def __str__(self) -> str:
        return f"loss of {type(self.model).__name__}: {self.reason}"


def _names_in_methods(kind: type, base: type) -> set[str]:
    """Names that the methods of a model use, those of its bases up to ``base`` included."""
    names: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(base)]:
        for method in vars(owner).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None:
                names.update(code.co_names, code.co_varnames)
    return names


def _twins() -> dict[Any, tuple[Callable[..., Tensor], str]]:
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, ForTokenClassification

    return {
        ForCausalLMLoss: (causal_lm_loss, "maskops, of the next token of the same document"),
        ForMaskedLMLoss: (aligned_loss, "maskops, of labels that stand where they are predicted"),
        ForTokenClassification: (token_classification_loss, "maskops, of a class for every token"),
    }


def serve(installation: Installation, model: PreTrainedModel) -> Served | None:
    """Gives a model a loss function of this package in the place of transformers', until ``detach``.

    Returns:
        Whose loss it has now; None for a model that computes none.
    """
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    kind = type(model)
    names = _names_in_methods(kind, PreTrainedModel)
    if "loss_function" not in names:  # many compute their loss by themselves, by torch's classes
        computes_one = any("loss" in name for name in names)
        return Served(model, None, f"its own, computed in {kind.__name__}.forward") if computes_one else None
    # Not model.loss_function, which logs a warning where it is the default.
    present = vars(model).get("_loss_function") or LOSS_MAPPING.get(str(model.loss_type), ForCausalLMLoss)
    loss, reason = _twins().get(present, (None, ""))
    if loss is None or kind.loss_function is not PreTrainedModel.loss_function:
        return Served(model, None, f"its own, {getattr(present, '__name__', type(present).__name__)}")
    function = LossFunction(model, loss)
    installation.set_attribute(model, "_loss_function", function)
    if loss is causal_lm_loss:
        installation.steps.after.append(function.remember)
    return Served(model, function, reason)


def install(installation: Installation, options: Options) -> None:
    """The part of ``attach`` that serves losses, and fuses the output layer into one of them.

    Raises:
        AttachError: the output layer is to be fused and cannot be.
    """
    from maskops.integrations.transformers.attach import AttachError
    from maskops.integrations.transformers.fused_loss import Refusal, fuse

    if options.fuse_lm_head and not options.loss:
        raise AttachError("attach: fuse_lm_head=True fuses the output layer into the loss of maskops: give loss=True")
    if not options.loss:
        return
    served = [one for one in (serve(installation, model) for model in installation.models) if one is not None]
    installation.report.notes.extend(map(str, served))
    if options.fuse_lm_head:
        try:
            installation.report.notes.append(fuse(installation, served))
        except Refusal as refusal:
            raise AttachError(f"attach: fuse_lm_head=True is refused: {refusal}") from refusal
