"""One of two processes of tests/test_torch_distributed.py: ``python -m tests.torch_distributed_worker RANK FILE``."""

import copy
import datetime
import random
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import maskops
from maskops import data, masks

WORLD, VOCABULARY, WIDTH = 2, 11, 8


class Model(nn.Module):
    """A packed layer with the ops that train: attention and both losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.last = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, cu_seqlens: Tensor, target: Tensor, num_items: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = self.projection(x).unflatten(1, (3, 2, WIDTH // 2)).unbind(1)
        x = x + maskops.varlen_attention(q, k, v, cu_seqlens, mask=masks.causal()).flatten(1)
        one = maskops.cross_entropy(self.head(x), target, cu_seqlens=cu_seqlens, shift=True, num_items=num_items)
        other = maskops.linear_cross_entropy(
            x, self.last.weight, target, bias=self.last.bias, cu_seqlens=cu_seqlens, shift=True, num_items=num_items
        )
        return one + other


def batch(rank: int, ignored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Other lengths, and another total, on every rank; ``ignored``: no label of the last rank counts."""
    generator = torch.Generator().manual_seed(rank)
    cu_seqlens = torch.tensor([[0, 3, 3, 9], [0, 4, 5, 16]][rank], dtype=torch.int32)
    ids = torch.randint(VOCABULARY, (int(cu_seqlens[-1]),), generator=generator)
    return ids, cu_seqlens, torch.full_like(ids, -100) if ignored and rank == 1 else ids


def scored(target: Tensor, cu_seqlens: Tensor) -> int:
    """Tokens that have a target: all but the first of each sequence, unless they are ignored."""
    first = torch.zeros(target.shape[0] + 1, dtype=torch.bool).index_fill(0, cu_seqlens.long(), True)[:-1]
    return int(((target != -100) & ~first).sum())


def full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def check(rank: int, wrap: str, ignored: bool) -> None:
    """Gradients of the wrapped model, each rank with its batch, are those of one process with both batches."""
    torch.manual_seed(0)
    model = Model()
    alone = copy.deepcopy(model)
    batches = [batch(number, ignored) for number in range(WORLD)]
    num_items = torch.tensor(sum(scored(target, cu_seqlens) for _, cu_seqlens, target in batches))
    for ids, cu_seqlens, target in batches:
        alone(ids, cu_seqlens, target, num_items).backward()

    wrapped: nn.Module
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    ids, cu_seqlens, target = batches[rank]
    # Both wrappers average over the ranks; the loss is a sum over all tokens.
    loss = WORLD * wrapped(ids, cu_seqlens, target, num_items)
    assert loss.requires_grad and bool(torch.isfinite(loss))
    assert (float(loss.detach()) == 0.0) == (ignored and rank == 1)
    loss.backward()
    for (name, expected), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(full(parameter.grad), expected.grad, rtol=1e-5, atol=1e-6, msg=f"{wrap} {name}")


def check_samplers(rank: int) -> None:
    """Left to themselves, samplers take their rank from torch.distributed: each document once, ranks in step."""
    chance = random.Random(0)
    lengths = [chance.randint(1, 60) for _ in range(101)]
    loaders: dict[str, Any] = {
        "packing": data.PackingSampler(data.pack(lengths, 64, ranks=WORLD), last="drop"),
        "buckets": data.LengthBucketSampler(lengths, 4, last="drop"),
        "budget": data.TokenBudgetSampler(lengths, 128, last="drop"),
        "stream": data.StreamingPacker(list(range(101)), 64, buffer_size=20, length=lengths.__getitem__),
    }
    for name, loader in loaders.items():
        assert (loader.rank, loader.world_size) == (rank, WORLD), name
        mine = list(loader)
        dealt: list[Any] = [None] * WORLD
        changed: list[int] = [0] * WORLD
        dist.all_gather_object(dealt, mine)
        dist.all_gather_object(changed, loader.repeated if name == "stream" else -loader.dropped)
        assert len({len(batches) for batches in dealt}) == 1, name
        seen = [document for batches in dealt for batch in batches for document in batch]
        if name == "stream":
            assert len(seen) == len(lengths) + sum(changed) and len(set(seen)) == len(lengths), name
        else:  # what is dropped is counted over all ranks
            assert len(seen) == len(set(seen)) == len(lengths) + changed[0], name


def main() -> None:
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    # A hang ends here, as an error.
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    check_samplers(rank)
    print("samplers same", flush=True)
    for wrap in ("ddp", "fsdp"):
        for ignored in (False, True):
            check(rank, wrap, ignored)
            print(wrap, "ignored" if ignored else "plain", "same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
