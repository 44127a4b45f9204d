"""The list of ways to run a model over a batch: padded as it comes, bucketed, packed with torch alone, maskops."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops.cli.bench.batches import IGNORED, Batch, Layout
from maskops.cli.bench.models.sources import Pooling, Task, first_position
from maskops.integrations import pool

PLUG_IN = "maskops.bench.document_loop"
"""The name that transformers knows the plain torch plug-in by."""


class Runner(Protocol):
    """A model made ready for one way. `model` is what runs, for a profile of it."""

    model: Any

    def embeddings(self, batch: Batch) -> Tensor:
        """`(documents, width)`, one for each document in order."""

    def loss(self, batch: Batch, targets: int) -> Tensor:
        """The sum of the documents' next-token losses, divided by `targets`."""


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        name: Its label.
        layout: How documents become tensors.
        prepare: From a model and how it pools, a runner for as long as the context lasts. It shares the model's
            weights and gradients.
        tasks: Where it is shown.
        ours: Whether it calls maskops; the best of the others is what speed-ups are measured against.
        habit: Whether it is what people do today.
        batch_size: Documents of a batch, where that is what the way is about.
    """

    name: str
    layout: Layout
    prepare: Callable[[Any, Pooling], AbstractContextManager[Runner]]
    tasks: tuple[Task, ...] = ("embedding", "language")
    ours: bool = False
    habit: bool = False
    batch_size: int | None = None


def twin(model: Any, implementation: str | None) -> Any:
    """A model of its own configuration and hooks that shares the weights, their gradients and the buffers."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, shared)
    if implementation is not None:
        other.set_attn_implementation(implementation)
    return other


def pool_padded(hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """Embeddings from `(documents, longest, width)`, as sentence-transformers computes them."""
    if pooling == "cls":
        return hidden.select(1, 0)
    kept = _real(batch)[..., None].to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1)


def _real(batch: Batch) -> Tensor:
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return places < batch.lengths_on_device[:, None]


class _Stock:
    """Right-padded rows with a 2-D mask, as tokenizers and collators give them."""

    def __init__(self, model: Any, pooling: Pooling) -> None:
        self.model = model
        self._pooling = pooling

    def embeddings(self, batch: Batch) -> Tensor:
        hidden = self.model(input_ids=batch.tokens, attention_mask=_real(batch).long()).last_hidden_state
        return pool_padded(hidden, batch, self._pooling)

    def loss(self, batch: Batch, targets: int) -> Tensor:
        real = _real(batch)
        out = self.model(
            input_ids=batch.tokens,
            attention_mask=real.long(),
            labels=batch.tokens.masked_fill(~real, IGNORED),
            num_items_in_batch=targets,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss


class _DocumentLoop:
    """All documents in one row, with the best attention that torch has on any device: SDPA, one after the other.

    Rows without a target, one a document, do not reach the output layer. The lengths stay on the host, where whoever
    packed the batch has them.
    """

    def __init__(self, model: Any, pooling: Pooling) -> None:
        self.model = model
        self._pooling = pooling
        self._first = first_position(model)

    def embeddings(self, batch: Batch) -> Tensor:
        _lengths[:] = batch.lengths
        hidden: Tensor = self.model(**_packed_inputs(batch, self._first)).last_hidden_state[0]
        if self._pooling == "cls":
            return hidden.index_select(0, batch.cu_seqlens[:-1])
        return torch.stack([document.mean(0) for document in hidden.split(_lengths)])

    def loss(self, batch: Batch, targets: int) -> Tensor:
        _lengths[:] = batch.lengths
        kept = batch.targets[batch.target_rows][None]
        out = self.model(
            **_packed_inputs(batch, self._first),
            logits_to_keep=batch.target_rows,
            labels=kept,
            shift_labels=kept,
            num_items_in_batch=targets,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss


class _Attached:
    """All documents in one row of an attached model, their offsets under the names that transformers has for them."""

    def __init__(self, model: Any, pooling: Pooling) -> None:
        self.model = model
        self._pooling = pooling
        self._first = first_position(model)

    def embeddings(self, batch: Batch) -> Tensor:
        hidden = self.model(**self._inputs(batch)).last_hidden_state
        return pool(hidden, how=self._pooling, cu_seqlens=batch.cu_seqlens)

    def loss(self, batch: Batch, targets: int) -> Tensor:
        labels = batch.targets[None]
        out = self.model(
            **self._inputs(batch),
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=targets,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        longest = max(batch.lengths)
        return {
            **_packed_inputs(batch, self._first),
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _packed_inputs(batch: Batch, first_position: int) -> dict[str, Tensor]:
    return {"input_ids": batch.tokens[None], "position_ids": batch.positions[None] + first_position}


_lengths: list[int] = []
"""Of the batch that the plug-in runs on. Autograd keeps what backward needs, so that one batch at a time is enough."""


def _loop_mask(*arguments: Any, **keywords: Any) -> None:
    """Documents are cut by lengths: no mask is needed."""


def document_loop(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention inside each document, as an attention function of transformers.

    Args:
        module, attention_mask, dropout: As transformers passes them.
        query: `(1, heads, total, head_dim)`; key and value may have fewer heads.
        key, value: See above.
        scaling, is_causal: As transformers passes them.
        sliding_window: Refused unless every document fits in it.
        keywords: What else models pass; what would change the result is refused.

    Raises:
        NotImplementedError: a feature that this loop does not have.
    """
    lacks = [name for name in ("softcap", "s_aux", "sinks", "position_bias") if keywords.get(name) is not None]
    if sliding_window is not None and max(_lengths) > sliding_window:
        lacks.append("sliding_window")
    if lacks or dropout:
        raise NotImplementedError(f"a loop over documents with SDPA has no {', '.join(lacks) or 'dropout'}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    grouped = query.shape[1] != key.shape[1]
    pieces = [
        F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
        for q, k, v in zip(*(packed.split(_lengths, 2) for packed in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, 1), None


@contextmanager
def stock(model: Any, pooling: Pooling) -> Iterator[Runner]:
    """The model on transformers' own sdpa attention."""
    yield _Stock(twin(model, "sdpa"), pooling)


@contextmanager
def plug_in(model: Any, pooling: Pooling) -> Iterator[Runner]:
    """The model with the loop over documents plugged in."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PLUG_IN, document_loop)
    AttentionMaskInterface.register(PLUG_IN, _loop_mask)
    yield _DocumentLoop(twin(model, PLUG_IN), pooling)


def attached(fuse_lm_head: bool) -> Callable[[Any, Pooling], AbstractContextManager[Runner]]:
    """The model under `maskops.attach`, proven by its probe before it is timed."""

    @contextmanager
    def prepare(model: Any, pooling: Pooling) -> Iterator[Runner]:
        served = twin(model, None)
        with maskops.attach(served, fuse_lm_head=fuse_lm_head):
            yield _Attached(served, pooling)

    return prepare


PLAIN = Way("packed, SDPA document by document", "packed", plug_in)
"""The best that torch alone does without padding."""

WAYS = (
    Way("padded, stock sdpa", "padded", stock, habit=True),
    Way("bucketed by length, stock sdpa", "bucketed", stock),
    # No padding either, where a batch is not needed to fill the machine.
    Way("one document at a time, stock sdpa", "padded", stock, tasks=("embedding",), batch_size=1),
    PLAIN,
    Way("packed, maskops", "packed", attached(False), ours=True),
    Way("packed, maskops, fused lm_head", "packed", attached(True), tasks=("language",), ours=True),
)


def chosen(task: Task, ways: Sequence[Way] = WAYS) -> list[Way]:
    """The rows of a task's table."""
    return [way for way in ways if task in way.tasks]
