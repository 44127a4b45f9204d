"""One epoch over the same documents, with frozen weights: padded, bucketed and packed training are the same training.

Losses are summed in float64 and divided by the true number of targets, so nothing hides in a mean of means.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import maskops
from maskops import data
from maskops.data import Documents, PackedBatch, PackedCollator, PaddedBatch, PaddedCollator
from maskops.data.packers import Strategy

BOS, EOS = 1, 2
VOCABULARY = 40
WIDTH, HEADS, LAYERS = 32, 2, 2
LONGEST = 64
BATCH = 6
CAPACITY = 96

Batch = PackedBatch | PaddedBatch
Epoch = Callable[[Documents], Iterable[Batch]]


class Block(nn.Module):
    """Attention and a feed-forward network, on (..., width) of either layout."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        x = x + self.out(attend(q, k, v).flatten(-2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class LanguageModel(nn.Module):
    """A small decoder with learned positions, so that positions which do not restart would show."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, attend)
        return self.head(x)


def attention_of(batch: Batch) -> Callable[..., Tensor]:
    plan = batch.spans()
    if isinstance(batch, PackedBatch):
        return partial(maskops.varlen_attention, mask=plan)
    return lambda q, k, v: maskops.attention(*(x.transpose(1, 2) for x in (q, k, v)), plan).transpose(1, 2)


def losses_of(model: LanguageModel, batch: Batch) -> Tensor:
    logits = model(batch.input_ids, batch.position_ids, attention_of(batch))
    return maskops.cross_entropy(logits, batch.shift_labels, reduction="none")


def train(model: nn.Module, batches: Iterable[Tensor], targets: int) -> tuple[float, Tensor]:
    """Mean loss and gradient of an epoch, both summed in float64.

    Args:
        model: its weights stay as they are.
        batches: the losses of each batch.
        targets: the true number of targets.
    """
    parameters = list(model.parameters())
    loss, gradient = 0.0, [torch.zeros_like(x, dtype=torch.float64) for x in parameters]
    for losses in batches:
        total = losses.to(torch.float64).sum()
        loss += float(total.detach())
        for into, new in zip(gradient, torch.autograd.grad(total, parameters), strict=True):
            into += new
    return loss / targets, torch.cat([x.flatten() for x in gradient]) / targets


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Lengths with a heavy tail, among them no token, one and the longest; half of the labels of some are ignored."""
    chance = random.Random(0)
    lengths = [0, 1, 1, 2, LONGEST - 2, *(min(LONGEST - 2, int(chance.lognormvariate(2.2, 1.0))) for _ in range(40))]
    sequences = [[chance.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
    labels = [[x if number % 3 or at % 2 else -100 for at, x in enumerate(s)] for number, s in enumerate(sequences)]
    prepared = data.prepare(sequences, labels, bos=BOS, eos=EOS)
    bare = data.prepare([[], [5]])  # what no policy has touched: nothing to learn from
    joined = data.prepare(
        [*prepared.sequences, *bare.sequences], [*(prepared.labels or ()), *([-100] * n for n in bare.lengths)]
    )
    assert {0, 1, 2, 3, LONGEST} <= set(joined.lengths)
    return joined


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


@pytest.fixture(scope="module")
def truth(documents: Documents, model: LanguageModel) -> tuple[float, Tensor]:
    """Each document alone, by torch, in float64."""
    exact = LanguageModel().to(torch.float64)
    exact.load_state_dict(model.state_dict())

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)

    def batches() -> Iterable[Tensor]:
        for tokens, labels in zip(documents.sequences, documents.labels or (), strict=True):
            if len(tokens) > 1:
                logits = exact(tokens, torch.arange(len(tokens)), causal)
                yield F.cross_entropy(logits[:-1], labels[1:], reduction="none")

    return train(exact, batches(), targets_of(documents))


def targets_of(documents: Documents) -> int:
    """Tokens that a model is asked to predict: each but the first of its document, unless it is ignored."""
    return sum(int((labels[1:] != -100).sum()) for labels in documents.labels or ())


def loader(documents: Documents, batches: object, collate: Callable[..., Batch]) -> Iterable[Batch]:
    return DataLoader(documents, batch_sampler=batches, collate_fn=collate)  # type: ignore[arg-type]


def in_groups(order: Sequence[int]) -> list[Sequence[int]]:
    return [order[first : first + BATCH] for first in range(0, len(order), BATCH)]


def random_order(documents: Documents) -> list[Sequence[int]]:
    return in_groups(random.Random(1).sample(range(len(documents)), len(documents)))


def packed(documents: Documents, strategy: Strategy) -> Iterable[Batch]:
    packing = data.pack(documents.lengths, CAPACITY, strategy, ranks=1)
    return loader(documents, data.PackingSampler(packing), PackedCollator(CAPACITY))


def bucketed(documents: Documents) -> Iterable[Batch]:
    return loader(documents, data.LengthBucketSampler(documents.lengths, BATCH, mega_batch=3), PaddedCollator(EOS))


def within_budget(documents: Documents) -> Iterable[Batch]:
    return loader(documents, data.TokenBudgetSampler(documents.lengths, CAPACITY), PaddedCollator(EOS, side="left"))


EPOCHS: dict[str, Epoch] = {
    "padded right": lambda docs: loader(docs, random_order(docs), PaddedCollator(EOS)),
    "padded left": lambda docs: loader(docs, random_order(docs), PaddedCollator(EOS, side="left")),
    "padded to a length": lambda docs: loader(docs, random_order(docs), PaddedCollator(EOS, length=LONGEST)),
    "bucketed": bucketed,
    "within a budget of tokens": within_budget,
    "packed": lambda docs: loader(docs, random_order(docs), PackedCollator()),
    "packed with room": lambda docs: loader(
        docs, random_order(docs), PackedCollator(BATCH * LONGEST, max_sequences=2 * BATCH, max_seqlen=LONGEST)
    ),
    "packed, first fit": lambda docs: packed(docs, "first_fit"),
    "packed, best fit": lambda docs: packed(docs, "best_fit_decreasing"),
    "packed, balanced": lambda docs: packed(docs, "balanced"),
}


@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
@pytest.mark.parametrize("name", EPOCHS)
def test_an_epoch_is_the_same_in_every_layout(
    name: str, documents: Documents, model: LanguageModel, truth: tuple[float, Tensor]
) -> None:
    batches = list(EPOCHS[name](documents))
    targets = targets_of(documents)
    assert sum(int(batch.lengths.sum()) for batch in batches) == sum(documents.lengths)
    assert sum(int((batch.shift_labels != -100).sum()) for batch in batches) == targets
    loss, gradient = train(model, (losses_of(model, batch) for batch in batches), targets)
    assert loss == pytest.approx(truth[0], rel=1e-6)
    assert float((gradient - truth[1]).norm()) <= 1e-5 * float(truth[1].norm())


def test_what_is_compared_can_differ(documents: Documents, model: LanguageModel, truth: tuple[float, Tensor]) -> None:
    """The classical mistakes are far outside the bounds above."""
    batches = list(EPOCHS["packed"](documents))
    targets = targets_of(documents)

    def contaminated(batch: Batch) -> Tensor:
        plan = maskops.masks.causal().spans(batch.input_ids.shape[0], batch.input_ids.shape[0])
        logits = model(batch.input_ids, batch.position_ids, partial(maskops.varlen_attention, mask=plan))
        return maskops.cross_entropy(logits, batch.shift_labels, reduction="none")

    def running_positions(batch: Batch) -> Tensor:
        positions = torch.arange(batch.input_ids.shape[0]) % LONGEST
        logits = model(batch.input_ids, positions, attention_of(batch))
        return maskops.cross_entropy(logits, batch.shift_labels, reduction="none")

    def across_boundaries(batch: Batch) -> Tensor:
        logits = model(batch.input_ids, batch.position_ids, attention_of(batch))
        labels = F.pad(batch.input_ids[1:], (0, 1), value=-100)
        return maskops.cross_entropy(logits, labels, reduction="none")

    for wrong in (contaminated, running_positions, across_boundaries):
        loss, gradient = train(model, map(wrong, batches), targets)
        assert abs(loss / truth[0] - 1) > 1e-4, wrong.__name__
        assert float((gradient - truth[1]).norm()) > 1e-3 * float(truth[1].norm()), wrong.__name__
    with torch.no_grad():
        means = [float(losses_of(model, batch).sum()) / int((batch.shift_labels != -100).sum()) for batch in batches]
    assert abs(sum(means) / len(means) / truth[0] - 1) > 1e-4  # a mean of means weighs short batches too much
