"""torch.export of small models with open dimensions: the exported program runs on other lengths, also after a save."""

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import maskops
from maskops import masks
from tests.served import AT_HOME

VOCABULARY, WIDTH, HEADS = 11, 16, 2

# What torch 2.11 says when it loads a program.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


@pytest.fixture(params=AT_HOME, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs here, in turn; none falls back on another."""
    name = str(request.param)
    if (reason := maskops.backends()[name]) != "available":
        pytest.skip(f"{name}: {reason}")
    torch.manual_seed(0)
    with maskops.use_backend(name, fallback="error"):
        yield name


class Model(nn.Module):
    """Embedding, attention with sinks and ALiBi, and the loss of a head; packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]))

    def attended(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.projection(self.embedding(ids)).unflatten(1, (3, HEADS, WIDTH // HEADS)).unbind(1)
        mask = masks.causal() & masks.sliding_window(5, 0)
        return maskops.varlen_attention(
            q, k, v, cu_seqlens, mask=mask, sinks=self.sinks, alibi_slopes=self.slopes
        ).flatten(1)

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.attended(ids, cu_seqlens)
        loss = maskops.cross_entropy(self.head(x), ids, cu_seqlens=cu_seqlens, shift=True, reduction="sequence_mean")
        return loss, maskops.linear_cross_entropy(
            x, self.head.weight, ids, bias=self.head.bias, cu_seqlens=cu_seqlens, shift=True
        )


class Padded(Model):
    """The same in a padded batch, with a softmax over what the head says."""

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.projection(self.embedding(ids)).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        mask = masks.padding(lengths) & masks.causal()
        x = maskops.attention(q, k, v, mask, sinks=self.sinks, alibi_slopes=self.slopes)
        scores = q @ k.transpose(-1, -2)
        return x, maskops.masked_softmax(scores, mask)


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def assert_same(module: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    for found, expected in zip(module(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_packed_model() -> None:
    model = Model()
    ids, cu_seqlens = torch.randint(VOCABULARY, (20,)), torch.tensor([0, 4, 9, 20])
    open_sizes = {"ids": {0: Dim("total")}, "cu_seqlens": {0: Dim("one_more_than_sequences")}}
    module = saved_and_loaded(export(model, (ids, cu_seqlens), dynamic_shapes=open_sizes))
    for total, cuts in ((20, [0, 4, 9, 20]), (300, [0, 130, 130, 131, 290]), (6, [0, 6])):
        assert_same(module, model, torch.randint(VOCABULARY, (total,)), torch.tensor(cuts))


def test_padded_model() -> None:
    model = Padded()
    ids, lengths = torch.randint(VOCABULARY, (3, 12)), torch.tensor([12, 5, 0])
    batch, length = Dim("batch"), Dim("length")
    open_sizes = {"ids": {0: batch, 1: length}, "lengths": {0: batch}}
    module = saved_and_loaded(export(model, (ids, lengths), dynamic_shapes=open_sizes))
    for found in ([12, 5, 0], [150, 2], [3, 3, 3, 3, 3]):
        assert_same(module, model, torch.randint(VOCABULARY, (len(found), max(found))), torch.tensor(found))
