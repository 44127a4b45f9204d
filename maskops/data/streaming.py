"""Packing of a stream: documents in, bins out, a bounded number of documents held."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from maskops.data.bins import Bin, Item, Piece, from_plain, plain
from maskops.data.lengths import check_count
from maskops.data.limits import Limits
from maskops.data.packers import Strategy, least_held, make_placer
from maskops.data.pieces import aligned_fields, cut, join, tokens_of
from maskops.data.sharding import check_state, rank_and_world


class StreamingPacker(IterableDataset[list[Any]]):
    """Packs a stream of documents; each iteration yields the documents of this rank's next bin.

    Every rank reads the whole stream, packs it in the same way and keeps its own bins: ranks need not talk to each
    other, and all have the same number of steps. Give it to a DataLoader with ``batch_size=None`` and a collator as
    ``collate_fn``. Several workers would each read the whole stream; at most one is allowed.

    To go on after an interruption, save ``state_dict`` in the process that iterates: with ``num_workers=1`` that is the
    worker, whose place this process does not know, and ``state_dict`` here would say that nothing was read. Use
    ``num_workers=0``, or torchdata's StatefulDataLoader, which asks the worker.

    In the last step some ranks may have no documents. They get the bin of another rank again, counted in ``repeated``,
    so that no rank waits for them.

    Args:
        documents: an iterable of token lists, tensors or mappings with ``input_ids``. After ``load_state_dict`` it is
            read from its beginning and what had been read is skipped; one that has ``state_dict`` and
            ``load_state_dict`` itself is asked instead.
        capacity: tokens of a bin.
        buffer_size: documents that are held at most, before they are in a bin. "balanced" needs twice ``ranks``, those
            of three steps or more for full bins, and more where documents have a heavy tail.
        strategy: as for `data.pack`. "chunks" cuts documents, and yields mappings of their pieces.
        ranks: bins of a step; ``world_size`` by default, or a multiple of it.
        rank: of this process; torch.distributed's by default, 0 without it. accelerate and Trainer deal batches of a
            stream out again: do not let accelerate prepare its DataLoader, and give
            ``rank=accelerator.process_index, world_size=accelerator.num_processes``.
        world_size: number of processes; likewise.
        seed: of the order in which steps leave the buffer. The order of documents is the stream's.
        max_segments: documents of a bin, at most.
        max_attention_work: sum of squared lengths of a bin, at most; not for "chunks".
        isolate: whether documents that share a bin are sequences of their own. Without it, which only "chunks" allows,
            a bin is one mapping with the fields that have an element for each token.
        length: tells the tokens of a document; by default what ``len`` says.

    Raises:
        ValueError: an argument out of range; during the iteration, a document that fits no bin.
    """

    def __init__(
        self,
        documents: Iterable[Any],
        capacity: int,
        *,
        buffer_size: int = 1000,
        strategy: Strategy = "balanced",
        ranks: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        max_segments: int | None = None,
        max_attention_work: int | None = None,
        isolate: bool = True,
        length: Callable[[Any], int] = tokens_of,
    ) -> None:
        self.documents = documents
        self.limits = Limits(capacity, max_segments, max_attention_work)
        self.buffer_size = check_count("buffer_size", buffer_size)
        self.strategy = strategy
        self.rank, self.world_size = rank_and_world(rank, world_size)
        self.ranks = self.world_size if ranks is None else check_count("ranks", ranks)
        if self.ranks % self.world_size:
            raise ValueError(f"ranks={self.ranks}: expected a multiple of world_size={self.world_size}")
        if strategy == "balanced" and self.buffer_size < least_held(self.ranks):
            raise ValueError(
                f"buffer_size={buffer_size}: strategy 'balanced' needs {least_held(self.ranks)} or more for "
                f"ranks={self.ranks}, or ranks would stay without documents; for full bins those of three steps"
            )
        self.seed = check_count("seed", seed, least=0)
        self.isolate = isolate
        self.length = length
        self._loaded: dict[str, Any] | None = None
        self._begin()

    def _begin(self) -> None:
        seed = random.Random(self.seed).getrandbits(32)
        self._placer = make_placer(
            self.strategy, self.limits, ranks=self.ranks, buffer=self.buffer_size, seed=seed, isolate=self.isolate
        )
        self._read = 0
        self._finished = False
        self._held: dict[int, Any] = {}  # documents that are not in a bin of a whole step, by number
        self._left: dict[int, int] = {}  # their tokens that are not
        self._bins: list[Bin] = []  # of the step that is not whole
        self._ready: list[list[tuple[Item, Any]]] = []  # this rank's, with their documents, not yet yielded
        self._repeated = 0

    @property
    def repeated(self) -> int:
        """Documents that came a second time to this rank, because it had none in the last step."""
        return self._repeated

    def __iter__(self) -> Iterator[list[Any]]:
        """This rank's bins from the beginning of the stream; after ``load_state_dict``, once, from where that left."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"num_workers={worker.num_workers}: each worker would pack the whole stream; use 0 or 1, and tokenise "
                "in parallel before the packer"
            )
        if self._loaded is None:
            self._begin()
        source = self._source()
        self._loaded = None
        while True:
            while self._ready:
                yield self._documents(self._ready.pop(0))
            if self._finished:
                return
            self._fill(source)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, with the documents that are held. A rank's own: save one for each.

        Plain lists and numbers beside the documents, which are saved as they came: JSON keeps those that are lists,
        ``torch.load(weights_only=True)`` tensors as well. In the process of a DataLoader's worker; see the class.
        """
        state = {
            "placer": self._placer.state_dict(),
            "read": self._read,
            "finished": self._finished,
            "held": [[number, self._left[number], document] for number, document in self._held.items()],
            "bins": [[plain(item) for item in items] for items in self._bins],
            "ready": [[[plain(item), document] for item, document in items] for items in self._ready],
            "repeated": self._repeated,
            "arguments": self._arguments(),
        }
        if hasattr(self.documents, "state_dict"):
            state["documents"] = self.documents.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on where ``state_dict`` was called.

        Raises:
            ValueError: a state of other arguments, whose bins would be others.
        """
        check_state(state.get("arguments"), self._arguments())
        self._begin()
        self._placer.load_state_dict(state["placer"])
        self._read, self._finished, self._repeated = state["read"], state["finished"], state["repeated"]
        self._held = {number: document for number, _, document in state["held"]}
        self._left = {number: tokens for number, tokens, _ in state["held"]}
        self._bins = [[from_plain(item) for item in items] for items in state["bins"]]
        self._ready = [[(from_plain(item), document) for item, document in items] for items in state["ready"]]
        self._loaded = state

    def _arguments(self) -> dict[str, Any]:
        return {
            "capacity": self.limits.capacity,
            "max_segments": self.limits.max_segments,
            "max_attention_work": self.limits.max_attention_work,
            "buffer_size": self.buffer_size,
            "strategy": self.strategy,
            "ranks": self.ranks,
            "rank": self.rank,
            "world_size": self.world_size,
            "seed": self.seed,
            "isolate": self.isolate,
        }

    def _source(self) -> Iterator[Any]:
        if self._loaded is None:
            return iter(self.documents)
        if "documents" in self._loaded and hasattr(self.documents, "load_state_dict"):
            self.documents.load_state_dict(self._loaded["documents"])
            return iter(self.documents)
        return islice(self.documents, self._read, None)

    def _fill(self, source: Iterator[Any]) -> None:
        """Reads until this rank has a bin, or to the end."""
        for document in source:
            number, length = self._read, self._length_of(document)
            if self.strategy != "chunks":
                self.limits.check(number, length)
            self._held[number], self._left[number] = document, length
            self._read += 1
            self._close(self._placer.add(number, length))
            if self._ready:
                return
        bins = self._placer.finish()
        self._close(bins + [[] for _ in range(-(len(self._bins) + len(bins)) % self.ranks)])
        self._finished = True

    def _close(self, bins: list[Bin]) -> None:
        """Takes this rank's share of the steps that are whole, and lets the documents of all of them go."""
        self._bins += bins
        while len(self._bins) >= self.ranks:
            step, self._bins = self._bins[: self.ranks], self._bins[self.ranks :]
            used = [items for items in step if items]
            for place in range(self.rank, self.ranks, self.world_size):
                items = step[place]
                if not items:
                    items = used[place % len(used)]
                    self._repeated += len(items)
                self._ready.append([(item, self._held[_number(item)]) for item in items])
            for item in (item for items in step for item in items):
                self._let_go(item)

    def _documents(self, items: list[tuple[Item, Any]]) -> list[Any]:
        pieces = [cut(document, item) if isinstance(item, Piece) else document for item, document in items]
        if self.isolate:
            return pieces
        return [join([item for item, _ in items], [aligned_fields(piece) for piece in pieces])]

    def _length_of(self, document: Any) -> int:
        try:
            return check_count("length", self.length(document), least=0)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"document {self._read} of the stream: {error}") from error

    def _let_go(self, item: Item) -> None:
        number = _number(item)
        self._left[number] -= item.stop - item.start if isinstance(item, Piece) else self._left[number]
        if not self._left[number]:
            del self._held[number], self._left[number]


def _number(item: Item) -> int:
    return item.document if isinstance(item, Piece) else item
