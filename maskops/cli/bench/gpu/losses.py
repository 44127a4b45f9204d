"""Who does losses and softmax on a device: torch eager and compiled, Liger, cut_cross_entropy, maskops."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import maskops
from maskops import masks
from maskops.cli.bench.contests.contest import Contender, Function, Leaves, always
from maskops.cli.bench.contests.losses import LinearLossContest, LossContest, SoftmaxContest


def _with_backend(function: Callable[..., Any], backend: str, *rest: Any, **keywords: Any) -> Function:
    def run(*leaves: Tensor) -> Tensor:
        with maskops.use_backend(backend, fallback="error"):
            found: Tensor = function(*leaves, *rest, **keywords)
        return found

    return run


def _imported(module: str, name: str) -> Callable[..., Any]:
    """A function of a package that may not be there: ImportError becomes the reason of a row."""
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


class Loss(LossContest):
    """See the base class."""

    def contenders(self) -> list[Contender]:
        """Those on all rows, those on the rows that count, Liger, maskops."""
        target, kept, setting = self.target, self.kept, self.setting

        def plain(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, target)

        def upcast(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), target)

        def gathered(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits[kept], target[kept])

        def liger(leaves: Leaves) -> Function:
            function = _imported("liger_kernel.transformers.functional", "liger_cross_entropy")
            return lambda logits: function(logits, target)

        found = [
            Contender("F.cross_entropy", always(plain)),
            Contender("F.cross_entropy in float32", always(upcast), habit=True),
            Contender("torch.compile(F.cross_entropy)", lambda leaves: setting.compiled(plain), compiles=True),
            Contender("Liger", liger, compiles=True, consumes=True),
        ]
        if len(kept) < self.rows:
            found.insert(2, Contender("F.cross_entropy of the rows that count", always(gathered)))
        for name in setting.backends("cross_entropy"):
            ours = _with_backend(maskops.cross_entropy, name, target)
            found.append(Contender(f"maskops {name}", always(ours), ours=True, compiles=name == "triton"))
        return found


class LinearLoss(LinearLossContest):
    """See the base class."""

    def contenders(self) -> list[Contender]:
        """Through whole logits, compiled, Liger, CCE, maskops."""
        target, kept, setting = self.target, self.kept, self.setting

        def plain(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight), target)

        def gathered(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden[kept], weight), target[kept])

        def liger(leaves: Leaves) -> Function:
            function = _imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
            return lambda hidden, weight: function(hidden, weight, target)

        def cce(leaves: Leaves) -> Function:
            function = _imported("cut_cross_entropy", "linear_cross_entropy")
            return lambda hidden, weight: function(hidden, weight, target)

        found = [
            Contender("F.linear, F.cross_entropy", always(plain), habit=True),
            Contender("F.linear, F.cross_entropy of the rows that count", always(gathered)),
            Contender("torch.compile of it", lambda leaves: setting.compiled(gathered), compiles=True),
            Contender("Liger", liger, compiles=True),
            Contender("cut_cross_entropy", cce, compiles=True),
        ]
        for name in setting.backends("linear_cross_entropy"):
            ours = _with_backend(maskops.linear_cross_entropy, name, target)
            found.append(Contender(f"maskops {name}", always(ours), ours=True, compiles=name == "triton"))
        return found


class Softmax(SoftmaxContest):
    """See the base class."""

    def contenders(self) -> list[Contender]:
        """What people write, a bias made before, compiled, maskops."""
        setting, visible = self.setting, self._visible
        mask = masks.padding(self._lengths) & masks.causal()

        def filled(scores: Tensor) -> Tensor:
            seen = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
            return seen.masked_fill(~visible, 0.0)

        found = [
            Contender("masked_fill, softmax", always(filled), habit=True),
            Contender("torch.compile of it", lambda leaves: setting.compiled(filled), compiles=True),
        ]
        for name in setting.backends("masked_softmax"):
            ours = _with_backend(maskops.masked_softmax, name, mask)
            found.append(Contender(f"maskops {name}", always(ours), ours=True, compiles=name == "triton"))
        return found
