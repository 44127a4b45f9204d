"""Batches dealt to ranks: the same number on every rank, in an order that only seed and epoch decide, resumable."""

from __future__ import annotations

import random
import sys
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Sampler

from maskops.data.bins import Bin
from maskops.data.lengths import check_count

Last = Literal["repeat", "drop"]


def check_word(name: str, value: object, words: object) -> None:
    """Raises ValueError for a value that is none of the words of a Literal."""
    if value not in get_args(words):
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, get_args(words)))}")


def rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The rank of this process and the number of ranks: those given, else torch.distributed's, else 0 and 1.

    Raises:
        ValueError: only one of the two, a rank that does not exist, or none under several processes of accelerate.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank}, world_size={world_size}: give both or neither")
    if rank is None or world_size is None:
        processes = _processes_of_accelerate()
        if processes > 1:
            raise ValueError(
                f"rank: accelerate runs {processes} processes, and a DataLoader that it prepares, Trainer's too, deals "
                "batches a second time, so that some are never seen. For such a loader give rank=0, world_size=1 and "
                f"ranks={processes} (a packing: pack(..., ranks={processes})); for one that is not prepared, "
                "rank=accelerator.process_index, world_size=accelerator.num_processes"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    check_count("world_size", world_size)
    if not 0 <= check_count("rank", rank, least=0) < world_size:
        raise ValueError(f"rank={rank}: expected 0 to {world_size - 1}, world_size={world_size}")
    return rank, world_size


def _processes_of_accelerate() -> int:
    """Processes that accelerate, where it is in use, deals batches to; 0 where it is not."""
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    return int(getattr(state, "_shared_state", {}).get("num_processes", 0))


def checksum(numbers: Iterable[object]) -> int:
    """A number that differs where the numbers do, the same on every machine."""
    return zlib.crc32(" ".join(map(str, numbers)).encode())


def check_state(saved: object, here: dict[str, Any]) -> None:
    """Raises ValueError for the first argument that a state was saved with and that is another here."""
    if not isinstance(saved, dict):
        raise ValueError("the state has no 'arguments': it is not one of this class")
    for name, value in here.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the state was saved with {name}={saved.get(name)!r}, here it is {value!r}: batches would differ"
            )


class RankedBatches(Sampler[Bin]):
    """A batch sampler that deals batches to ranks by itself: batch i of an epoch goes to rank ``i % world_size``.

    It is given to torch's DataLoader as ``batch_sampler``. accelerate and transformers' Trainer deal batches to
    processes themselves, in the same way: there give ``rank=0, world_size=1`` and, as ``ranks``, the number of
    processes. Left out under several processes of accelerate, the rank is an error: dealt twice, most batches would
    never be seen. ``batch_size`` is None, by which they know that sizes vary.

    Attributes:
        ranks: Batches that are computed side by side, and that are alike.
        rank: Which batches are yielded.
        world_size: Of how many.
        seed: With the epoch, decides the order.
        last: What happens to the last step if there are fewer batches than ranks.
        epoch: The epoch; see ``set_epoch``.
    """

    batch_size = None
    drop_last = False

    def __init__(self, ranks: int | None, rank: int | None, world_size: int | None, seed: int, last: Last) -> None:
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.ranks = self.world_size if ranks is None else check_count("ranks", ranks)
        if self.ranks % self.world_size:
            raise ValueError(
                f"ranks={self.ranks}: expected a multiple of world_size={self.world_size}, so that each process has as "
                "many batches of a step as the others"
            )
        check_word("last", last, Last)
        self.seed = check_count("seed", seed, least=0)
        self.last = last
        self.epoch = 0
        self._position = self._resume = 0
        self._planned: tuple[int, list[Bin], int] | None = None

    @property
    def sampler(self) -> RankedBatches:
        """Itself: accelerate hands an epoch to the ``sampler`` of a batch sampler."""
        return self

    @abstractmethod
    def plan(self, epoch: int) -> list[Bin]:
        """All batches of an epoch, those of a step one after the other; empty ones where the last has too few."""

    def _plan(self) -> tuple[list[Bin], int]:
        if self._planned is None or self._planned[0] != self.epoch:
            batches = self.plan(self.epoch)
            whole = len(batches) - len(batches) % self.ranks
            if not all(batches[whole - self.ranks : whole]):
                whole -= self.ranks
            rest = [batch for batch in batches[whole:] if batch]
            if not rest:
                change = 0
            elif self.last == "drop":
                change = -sum(map(len, rest))
                rest = []
            else:
                # From the front of the epoch, whose documents are as good as any; of the rest where there is no front.
                source = batches[:whole] or rest
                added = [source[number % len(source)] for number in range(self.ranks - len(rest))]
                change = sum(map(len, added))
                rest = rest + added
            self._planned = (self.epoch, batches[:whole] + rest, change)
        return self._planned[1], self._planned[2]

    @property
    def repeated(self) -> int:
        """Documents of this epoch, over all ranks, that come a second time so that every rank has a last batch."""
        return max(0, self._plan()[1])

    @property
    def dropped(self) -> int:
        """Documents of this epoch, over all ranks, that are left out because not every rank has a last batch."""
        return max(0, -self._plan()[1])

    def __len__(self) -> int:
        """Batches of this rank in this epoch, the same number on every rank.

        Those of the whole epoch, also after ``load_state_dict``, whose next iteration yields only the rest.
        """
        return len(self._plan()[0]) // self.world_size

    def __iter__(self) -> Iterator[Bin]:
        """From the first batch; after ``load_state_dict``, once, from where that left off.

        Of several iterators each has its own position; ``state_dict`` tells that of the one that was last drawn from.
        """
        batches = self._plan()[0][self.rank :: self.world_size]
        position, self._resume = self._resume, 0
        self._position = position
        for number in range(position, len(batches)):
            self._position = number + 1
            yield list(batches[number])

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch; call it before each. An epoch that is already set keeps its position."""
        check_count("epoch", epoch, least=0)
        if epoch != self.epoch:
            self.epoch = epoch
            self._position = self._resume = 0

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the epoch stands.

        Args:
            batches: batches of this epoch that were trained on; those drawn so far by default. Workers of a DataLoader
                and accelerate draw ahead: count them there.
        """
        position = self._position if batches is None else check_count("batches", batches, least=0)
        return {"epoch": self.epoch, "position": position, "arguments": self._arguments()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was called. All ranks are there: one state is for all.

        Raises:
            ValueError: the state of another class, of other arguments or other documents, whose batches are others.
        """
        check_state(state.get("arguments"), self._arguments())
        self.epoch = state["epoch"]
        self._position = self._resume = state["position"]

    @abstractmethod
    def _decisive(self) -> dict[str, Any]:
        """What decides the batches, beside the arguments that all samplers have: plain values."""

    def _arguments(self) -> dict[str, Any]:
        return {
            "sampler": type(self).__name__,
            "seed": self.seed,
            "ranks": self.ranks,
            "world_size": self.world_size,
            "last": self.last,
            **self._decisive(),
        }


def chance_of(seed: int, epoch: int) -> random.Random:
    """Random numbers of an epoch, unlike those of the epochs and seeds beside it."""
    return random.Random(f"{seed} {epoch}")
