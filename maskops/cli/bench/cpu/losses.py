"""Who does losses and softmax on a processor: torch eager and compiled, what people write around them, and maskops."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import masks
from maskops.cli.bench.contests.contest import Contender, Function, Leaves, Setting, always
from maskops.cli.bench.contests.losses import LinearLossContest, LossContest, SoftmaxContest
from maskops.cli.bench.jobs import Outcome

EAGER, COMPILED, GATHERED = "eager", "torch.compile", "rows gathered"
UPCAST, CHUNKED, CHUNKS_OF_256 = "eager in float32", "torch's chunked", "torch's chunked, 256 rows"
OURS, UNMASKED, IN_PLACE, REUSED = "maskops", "maskops, unmasked", "maskops, in place", "maskops, reused buffer"
FIRST_TOUCH = "maskops, first touch"
"""With memory that the system has to grant anew; otherwise it is that of the run before."""

_ROWS_OF_LOGITS = 256
"""Rows of logits that a linear cross-entropy has to hold at once for its products to be worth their name."""


class Loss(LossContest):
    """Mean cross-entropy; see the base class."""

    _exact: Outcome | None = None

    def bytes(self, backward: bool) -> float:
        """Rows that count are read once, the gradient of all is written: what a single pass would move."""
        row = self.vocabulary * self._leaves[0].element_size()
        return float(row * len(self.kept)) + self.written(backward)

    def written(self, backward: bool) -> float:
        """Bytes of the gradient."""
        return float(self.rows * self.vocabulary * self._leaves[0].element_size()) if backward else 0.0

    def exact(self, backward: bool) -> Outcome:
        """See the base class; the loss is computed once."""
        if self._exact is None:
            self._exact = super().exact(True)
        return self._exact if backward else {"loss": self._exact["loss"]}

    def contenders(self) -> list[Contender]:
        """Eager, compiled, on gathered rows; maskops in all its ways."""
        target, kept = self.target, self.kept
        everything = self.target.clamp(min=0)

        def plain(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, target)

        def gathered(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits[kept], target[kept])

        def ours(logits: Tensor) -> Tensor:
            return maskops.cross_entropy(logits, target)

        def unmasked(logits: Tensor) -> Tensor:
            return maskops.cross_entropy(logits, everything)

        def in_place(logits: Tensor) -> Tensor:
            return maskops.cross_entropy(logits, target, grad_buffer=logits)

        def reused(leaves: Leaves) -> Function:
            buffer = torch.empty_like(leaves[0]).zero_()
            return lambda logits: maskops.cross_entropy(logits, target, grad_buffer=buffer)

        return [
            Contender(EAGER, always(plain)),
            Contender(COMPILED, lambda leaves: self.setting.compiled(plain), compiles=True),
            Contender(GATHERED, always(gathered)),
            # Another loss, of all rows: what the mask saves; never compared with the others.
            Contender(UNMASKED, always(unmasked), ours=True, partial=True),
            Contender(IN_PLACE, always(in_place), ours=True, consumes=True),
            Contender(REUSED, reused, ours=True, reuses=True),
            Contender(FIRST_TOUCH, always(ours), ours=True, releases=True),
            Contender(OURS, always(ours), ours=True),
        ]


class LinearLoss(LinearLossContest):
    """Mean cross-entropy of a linear layer; see the base class."""

    def scratch(self) -> float:
        """Bytes that the op cannot do without beyond its results: a chunk of logits in float32."""
        return 4.0 * min(_ROWS_OF_LOGITS, len(self.kept)) * self.vocabulary

    def contenders(self) -> list[Contender]:
        """Whole logits, torch's chunks, gathered rows, float32; maskops."""
        target, kept = self.target, self.kept

        def plain(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight), target)

        def gathered(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden[kept], weight), target[kept])

        def upcast(hidden: Tensor, weight: Tensor) -> Tensor:
            return plain(hidden.float(), weight.float())

        def ours(hidden: Tensor, weight: Tensor) -> Tensor:
            return maskops.linear_cross_entropy(hidden, weight, target)

        return [
            Contender(EAGER, always(plain)),
            Contender(GATHERED, always(gathered)),
            Contender(UPCAST, always(upcast)),
            Contender(CHUNKED, self._chunked(None)),
            Contender(CHUNKS_OF_256, self._chunked(256)),
            Contender(OURS, always(ours), ours=True),
        ]

    def _chunked(self, rows: int | None) -> Callable[[Leaves], Function]:
        def make(leaves: Leaves) -> Function:
            options_of = getattr(torch.nn, "LinearCrossEntropyOptions", None)
            if options_of is None:
                raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
            options = options_of() if rows is None else options_of(batch_chunk_size=rows)
            return lambda hidden, weight: F.linear_cross_entropy(hidden, weight, self.target, options=options)

        return make

    def plain(self, backward: bool) -> Outcome:
        """Products that add up in float32, rounded to the dtype: low-precision products of torch may take minutes."""
        if self.setting.dtype == torch.float32:
            return super().plain(backward)
        hidden, weight = (x.detach().float().requires_grad_() for x in self._leaves)
        loss = F.cross_entropy(F.linear(hidden, weight).to(self.setting.dtype).float(), self.target)
        gradients = torch.autograd.grad(loss, (hidden, weight)) if backward else ()
        return self.sample("", [x.detach().to(self.setting.dtype) for x in (loss, *gradients)])


class Softmax(SoftmaxContest):
    """Softmax of scores (batch, heads, length, length) where keys are padding, or under causality."""

    def __init__(self, setting: Setting, batch: int, heads: int, length: int, causal: bool, name: str) -> None:
        super().__init__(setting, batch, heads, length, name)
        place = torch.arange(length)
        self._causal = causal
        self._short = place <= place[:, None] if causal else (place < self._lengths[:, None])[:, None, None]
        self._visible = self._short.expand(batch, 1, length, length)

    def written(self, backward: bool) -> float:
        """Bytes of the weights, and of the gradient."""
        return float((1 + backward) * self._leaves[0].nbytes)

    def contenders(self) -> list[Contender]:
        """What people write, compiled or not; maskops."""
        hidden = ~self._short
        mask = masks.causal() if self._causal else masks.key_padding(self._lengths)

        def filled(scores: Tensor) -> Tensor:
            return scores.masked_fill(hidden, -torch.inf).softmax(-1)

        def ours(scores: Tensor) -> Tensor:
            return maskops.masked_softmax(scores, mask)

        return [
            Contender(EAGER, always(filled)),
            Contender(COMPILED, lambda leaves: self.setting.compiled(filled), compiles=True),
            Contender(FIRST_TOUCH, always(ours), ours=True, releases=True),
            Contender(OURS, always(ours), ours=True),
        ]
