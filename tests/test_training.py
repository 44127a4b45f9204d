"""Training curves: small models learn along the same losses with maskops as with eager torch."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskops
from maskops import masks
from maskops.backend import REFERENCE
from maskops.ops.attention import reference
from tests.served import AT_HOME

STEPS, VOCABULARY, WIDTH, HEADS, LONGEST = 30, 13, 16, 2, 12
HEAD_DIM = WIDTH // HEADS


class Step:
    """A batch of one training step: documents that repeat a short pattern, so that there is something to learn.

    ``ids`` (B, S) right padded, ``real`` (B, S), ``lengths`` (B,); ``cu_seqlens`` and ``packed`` (total,) the same
    documents one after the other.
    """

    def __init__(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.lengths = torch.randint(2, LONGEST + 1, (4,), generator=generator)
        self.lengths[0] = LONGEST
        begin = torch.randint(VOCABULARY - 1, (4, 1), generator=generator)
        self.ids = (begin + torch.arange(LONGEST) * torch.tensor([1, 2, 3, 5])[:, None]) % (VOCABULARY - 1)
        self.real = torch.arange(LONGEST) < self.lengths[:, None]
        self.cu_seqlens = F.pad(self.lengths.cumsum(0), (1, 0)).int()
        self.packed = self.ids[self.real]
        self.positions = torch.arange(LONGEST).expand(4, LONGEST)
        self.seed = torch.tensor(number)


class Model(nn.Module):
    """One layer of a transformer and a head; what its attention is comes from outside."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LONGEST, WIDTH)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        # One table of a model: a learned bias of relative positions (T5), or a learned sink a head.
        self.relative = nn.Embedding(2 * LONGEST - 1, HEADS)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.125]))

    def hidden(self, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """What the head sees."""
        x = self.embedding(ids)
        if self.kind == "bert":
            x = x + self.place(positions)
        q, k, v = self.projection(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        x = x + self.output(attend(self, q, k, v).flatten(-2))
        return x + self.mlp(self.norms[1](x))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        return self.head(self.hidden(ids, positions, attend))  # type: ignore[no-any-return]

    def bias(self, rows: Tensor, keys: Tensor) -> Tensor:
        """T5's bias (heads, rows, keys) from the places of rows and keys in their sequences."""
        distance = (keys[None, :] - rows[:, None]).clamp(1 - LONGEST, LONGEST - 1)
        return self.relative(distance + LONGEST - 1).movedim(-1, 0)  # type: ignore[no-any-return]


# ---- the models ------------------------------------------------------------------------------------------------------

DROPOUT = 0.2
WINDOW = 3


def mask_of(kind: str) -> masks.Mask | None:
    """The pattern of a model inside a sequence."""
    patterns = {"gpt": masks.causal(), "sinks": masks.causal() & masks.sliding_window(WINDOW, 0)}
    return patterns.get(kind)


def features_of(kind: str, model: Model, step: Step, is_packed: bool) -> dict[str, Any]:
    """Keywords of maskops.attention."""
    if kind == "gpt":
        return {"alibi_slopes": model.slopes}
    if kind == "sinks":
        return {"sinks": model.sinks}
    if kind == "t5":
        places = step.positions[step.real] if is_packed else torch.arange(LONGEST)
        return {"bias": model.bias(places, places), "softmax_scale": 1.0}
    return {"dropout_p": DROPOUT} if kind == "bert-dropout" else {}


def padded_attend(kind: str, step: Step) -> Callable[..., Tensor]:
    def attend(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pattern = mask_of(kind)
        mask = masks.padding(step.lengths) if pattern is None else masks.padding(step.lengths) & pattern
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return maskops.attention(q, k, v, mask, **features_of(kind, model, step, False)).transpose(1, 2)

    return attend


def packed_attend(kind: str, step: Step) -> Callable[..., Tensor]:
    def attend(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = features_of(kind, model, step, True)
        return maskops.varlen_attention(q, k, v, step.cu_seqlens, mask=mask_of(kind), **features)

    return attend


def eager_attend(kind: str, step: Step) -> Callable[..., Tensor]:
    """The textbook: scores, -inf, softmax, dropout; no maskops but the numbers that dropout draws."""

    def attend(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        row, key = torch.arange(LONGEST)[:, None], torch.arange(LONGEST)
        allowed = step.real[:, None, None, :] & torch.ones(LONGEST, LONGEST, dtype=torch.bool)
        scores = q @ k.transpose(-1, -2) * (1.0 if kind == "t5" else HEAD_DIM**-0.5)
        if kind in ("gpt", "sinks"):
            allowed = allowed & (key <= row)
        if kind == "gpt":
            scores = scores - model.slopes[:, None, None] * (row - key).abs()
        if kind == "sinks":
            allowed = allowed & (key >= row - WINDOW)
            column = model.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat((scores.masked_fill(~allowed, -math.inf), column), -1).softmax(-1)[..., :-1]
        else:
            if kind == "t5":
                scores = scores + model.bias(torch.arange(LONGEST), torch.arange(LONGEST))
            weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        if kind == "bert-dropout":
            weights = weights * kept(step) / (1 - DROPOUT)
        return (weights @ v).transpose(1, 2)

    return attend


def kept(step: Step) -> Tensor:
    """What our rule of dropout keeps, read out of the reference: with one-hot values, out is the weights."""
    torch.manual_seed(int(step.seed))
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    plan = masks.full().spans(LONGEST, LONGEST, batch=4, positions=True)
    zeros, eye = torch.zeros(4, HEADS, LONGEST, 1), torch.eye(LONGEST).expand(4, HEADS, LONGEST, LONGEST)
    weights, _ = reference.attention(zeros, zeros, eye, plan, softmax_scale=1.0, dropout_p=DROPOUT, seed=seed)
    return weights > 0


# ---- the curves ------------------------------------------------------------------------------------------------------


def padded_loss(kind: str, model: Model, step: Step) -> Tensor:
    logits = model(step.ids, step.positions, padded_attend(kind, step))
    return maskops.cross_entropy(logits, targets(kind, step), mask=step.real, shift=shifts(kind))


def packed_loss(kind: str, model: Model, step: Step) -> Tensor:
    """The last layer and its loss are one here: no logits."""
    hidden = model.hidden(step.packed, step.positions[step.real], packed_attend(kind, step))
    head, target = model.head, targets(kind, step)[step.real]
    return maskops.linear_cross_entropy(
        hidden, head.weight, target, bias=head.bias, cu_seqlens=step.cu_seqlens, shift=shifts(kind)
    )


def eager_loss(kind: str, model: Model, step: Step) -> Tensor:
    logits = model(step.ids, step.positions, eager_attend(kind, step))
    target = targets(kind, step).masked_fill(~step.real, -100)
    if shifts(kind):
        logits, target = logits[:, :-1], target[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def shifts(kind: str) -> bool:
    """A decoder predicts the next token, an encoder what it sees."""
    return kind in ("gpt", "sinks")


def targets(kind: str, step: Step) -> Tensor:
    """An encoder says what comes before the token before: it has to look at its neighbours."""
    return step.ids if shifts(kind) else step.ids.roll(2, 1)


def curve(loss_of: Callable[[str, Model, Step], Tensor], kind: str, steps: int) -> list[float]:
    """The losses of training, and the last values of what is only learned through attention."""
    model = Model("bert" if kind == "bert-dropout" else kind)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.9)
    losses = []
    for number in range(steps):
        step = Step(number)
        torch.manual_seed(number)  # the seed of dropout is the only number that a step draws
        loss = loss_of(kind, model, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    tables = {"gpt": model.slopes, "sinks": model.sinks, "t5": model.relative.weight}
    return [*losses, *tables.get(kind, model.place.weight).detach().flatten().tolist()]


@functools.cache
def eager_curve(kind: str, steps: int) -> list[float]:
    """That of torch alone, which no backend changes."""
    return curve(eager_loss, kind, steps)


@pytest.fixture(params=AT_HOME, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs here, in turn; none falls back on another."""
    name = str(request.param)
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    with maskops.use_backend(name, fallback="error"):
        yield name


@pytest.fixture
def steps(backend: str) -> int:
    """The reference, many small operations of torch, follows a third of the curve."""
    return STEPS // 3 if backend == REFERENCE else STEPS


@pytest.mark.parametrize("kind", ["bert", "bert-dropout", "gpt", "t5", "sinks"])
def test_curves(kind: str, steps: int) -> None:
    """Padded, packed and eager torch learn alike, and so do the tables that are only learned through attention."""
    whole, expected = eager_curve(kind, STEPS), eager_curve(kind, steps)
    assert whole[STEPS - 1] < 0.7 * whole[0]  # it learns
    for loss_of in (padded_loss, packed_loss):
        assert curve(loss_of, kind, steps) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def encoder_curve(is_replaced: bool, norm_first: bool, steps: int) -> list[float]:
    """The losses of torch's own encoder, with or without maskops beneath it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    embedding, place, head = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    parts = nn.ModuleList((encoder, embedding, place, head)).train()
    optimiser = torch.optim.SGD(parts.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number in range(steps):
        step = Step(number)
        target = targets("bert", step).masked_fill(~step.real, -100)
        with maskops.replace_sdpa() if is_replaced else contextlib.nullcontext() as report:
            x = encoder(embedding(step.ids) + place(step.positions), src_key_padding_mask=~step.real)
            loss = F.cross_entropy(head(x).flatten(0, 1), target.flatten())
        if report is not None:
            assert report.served == {"nn.MultiheadAttention": 2, "cross_entropy": 1} and not report.unserved
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@functools.cache
def eager_encoder_curve(norm_first: bool) -> list[float]:
    """That of torch alone, which no backend changes."""
    return encoder_curve(False, norm_first, STEPS)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_of_torch(norm_first: bool, steps: int) -> None:
    expected = eager_encoder_curve(norm_first)
    assert expected[-1] < 0.8 * expected[0]
    assert encoder_curve(True, norm_first, steps) == pytest.approx(expected[:steps], rel=1e-5)
