"""Cross-entropy of logits and of a linear layer, and the masked softmax."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskops.cli.bench.contests.contest import Contest, Leaves, Setting
from maskops.cli.bench.jobs import Outcome

_IGNORED = -100
_SAMPLED = 64
_LOGITS_AT_ONCE = 1 << 25


def _targets(setting: Setting, rows: int, vocabulary: int, ignored: float) -> Tensor:
    generator = torch.Generator().manual_seed(setting.seed)
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    # Exactly this share, at random places.
    target[torch.randperm(rows, generator=generator)[: round(rows * ignored)]] = _IGNORED
    return target.to(setting.device)


class LossContest(Contest):
    """Mean cross-entropy of logits (rows, vocabulary), of which a share is ignored."""

    group = "cross-entropy"

    def __init__(self, setting: Setting, rows: int, vocabulary: int, ignored: float, name: str) -> None:
        self.setting, self.rows, self.vocabulary = setting, rows, vocabulary
        self.name = name
        self.target = _targets(setting, rows, vocabulary, ignored)
        self.kept = (self.target != _IGNORED).nonzero().flatten()
        self._leaves = (setting.randn(rows, vocabulary).requires_grad_(),)
        self._sampled = torch.linspace(0, rows - 1, min(rows, _SAMPLED)).long().to(setting.device)

    def leaves(self, layout: str) -> Leaves:
        """The logits."""
        return self._leaves

    def bytes(self, backward: bool) -> float:
        """Forward reads the kept rows; backward reads them and writes the gradient of all."""
        kept, row = len(self.kept), self.vocabulary * self._leaves[0].element_size()
        return float(row * (2 * kept + self.rows if backward else kept))

    def sample(self, layout: str, results: Sequence[Tensor]) -> Outcome:
        """The loss, and the gradients of some rows."""
        named = {"loss": results[0].double()}
        if len(results) > 1:
            named["dlogits"] = results[1][self._sampled].double()
        return named

    def exact(self, backward: bool) -> Outcome:
        """Row block by row block in float64."""
        logits, count = self._leaves[0].detach(), max(len(self.kept), 1)
        chunk = max(1, _LOGITS_AT_ONCE // self.vocabulary)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for rows in self.kept.split(chunk):
            total += F.cross_entropy(logits[rows].double(), self.target[rows], reduction="sum")
        named = {"loss": total / count}
        if backward:
            target = self.target[self._sampled]
            gradient = logits[self._sampled].double().softmax(-1)
            gradient.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(gradient[:, :1]))
            named["dlogits"] = gradient * (target != _IGNORED)[:, None] / count
        return named

    def plain(self, backward: bool) -> Outcome:
        """The loss of torch's function, and its gradients of the sampled rows."""
        logits = self._leaves[0].detach()
        named = {"loss": F.cross_entropy(logits, self.target).double()}
        if backward:
            rows = logits[self._sampled].requires_grad_()
            total = F.cross_entropy(rows, self.target[self._sampled], reduction="sum") / max(len(self.kept), 1)
            named["dlogits"] = torch.autograd.grad(total, rows)[0].double()
        return named


class LinearLossContest(Contest):
    """Mean cross-entropy of a linear layer: hidden (rows, width), weight (vocabulary, width)."""

    group = "linear cross-entropy"

    def __init__(self, setting: Setting, rows: int, width: int, vocabulary: int, ignored: float, name: str) -> None:
        self.setting, self.rows, self.width, self.vocabulary = setting, rows, width, vocabulary
        self.name = name
        self.target = _targets(setting, rows, vocabulary, ignored)
        self.kept = (self.target != _IGNORED).nonzero().flatten()
        weight = setting.randn(vocabulary, width, stream=1) * width**-0.5
        self._leaves = (setting.randn(rows, width).requires_grad_(), weight.detach().requires_grad_())
        self._sampled_rows = torch.linspace(0, rows - 1, min(rows, _SAMPLED)).long().to(setting.device)
        self._sampled_words = torch.linspace(0, vocabulary - 1, min(vocabulary, _SAMPLED)).long().to(setting.device)

    def leaves(self, layout: str) -> Leaves:
        """Hidden states and weight."""
        return self._leaves

    def flops(self, backward: bool) -> float:
        """One product of the kept rows forward, two more backward."""
        return (3 if backward else 1) * 2.0 * len(self.kept) * self.width * self.vocabulary

    def sample(self, layout: str, results: Sequence[Tensor]) -> Outcome:
        """The loss, and the gradients of some rows and of some words."""
        named = {"loss": results[0].double()}
        if len(results) > 1:
            named["dhidden"] = results[1][self._sampled_rows].double()
            named["dweight"] = results[2][self._sampled_words].double()
        return named

    def exact(self, backward: bool) -> Outcome:
        """Row block by row block in float64."""
        hidden, weight = (x.detach() for x in self._leaves)
        wide, count = weight.double(), max(len(self.kept), 1)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        words = torch.zeros(len(self._sampled_words), self.width, dtype=torch.float64, device=hidden.device)
        for rows in self.kept.split(max(1, _LOGITS_AT_ONCE // self.vocabulary)):
            logits, target = hidden[rows].double() @ wide.T, self.target[rows]
            total += F.cross_entropy(logits, target, reduction="sum")
            if backward:
                gradient = logits.softmax(-1)[:, self._sampled_words]
                gradient -= (target[:, None] == self._sampled_words).double()
                words += gradient.T @ hidden[rows].double()
        named = {"loss": total / count}
        if backward:
            target = self.target[self._sampled_rows]
            gradient = (hidden[self._sampled_rows].double() @ wide.T).softmax(-1)
            gradient.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(gradient[:, :1]))
            gradient *= (target != _IGNORED)[:, None]
            named |= {"dhidden": gradient @ wide / count, "dweight": words / count}
        return named

    def plain(self, backward: bool) -> Outcome:
        """Through whole logits."""
        loss = F.cross_entropy(F.linear(*self._leaves), self.target)
        gradients = torch.autograd.grad(loss, self._leaves) if backward else ()
        return self.sample("", (loss.detach(), *gradients))


class SoftmaxContest(Contest):
    """Softmax of scores (batch, heads, length, length) under padding and causality."""

    group = "masked softmax"

    def __init__(self, setting: Setting, batch: int, heads: int, length: int, name: str) -> None:
        self.setting, self._heads, self.name = setting, heads, name
        self._lengths = torch.linspace(length / 2, length, batch).long().to(setting.device)
        place = torch.arange(length, device=setting.device)
        real = place < self._lengths[:, None]
        self._visible = (real[:, None, :] & real[:, :, None] & (place <= place[:, None]))[:, None]
        self._leaves = (setting.randn(batch, heads, length, length).requires_grad_(),)
        self._upstream = setting.randn(batch, heads, length, length, stream=1)

    def leaves(self, layout: str) -> Leaves:
        """The scores."""
        return self._leaves

    def upstream(self, layout: str, out: Tensor) -> Tensor:
        """Random."""
        return self._upstream

    def bytes(self, backward: bool) -> float:
        """Forward reads what is visible and writes all; backward reads both visible parts and writes all."""
        size = self._leaves[0].element_size()
        visible = float(self._visible.sum()) * self._heads * size
        written = float(self._leaves[0].numel() * size)
        return 3 * visible + 2 * written if backward else visible + written

    def sample(self, layout: str, results: Sequence[Tensor]) -> Outcome:
        """The first head of the first and of the last batch element."""
        return {name: x[[0, -1], 0].double() for name, x in zip(("out", "dscores"), results, strict=False)}

    def exact(self, backward: bool) -> Outcome:
        """In float64."""
        return self._written_out(torch.float64, backward)

    def plain(self, backward: bool) -> Outcome:
        """In the dtype of the run."""
        return self._written_out(self.setting.dtype, backward)

    def _written_out(self, dtype: torch.dtype, backward: bool) -> Outcome:
        hidden = ~self._visible[[0, -1], 0]
        scores = self._leaves[0].detach()[[0, -1], 0].to(dtype).requires_grad_()
        out = scores.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0.0)
        named = {"out": out.detach().double()}
        if backward:
            named["dscores"] = torch.autograd.grad(out, scores, self._upstream[[0, -1], 0].to(dtype))[0].double()
        return named
