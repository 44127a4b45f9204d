"""`python -m benchmarks.padding`: what padding costs on real documents, beside what was measured with other libraries.

The documents are the docstrings of this Python's standard library and of torch, without those of tests, each text once.
Lengths decide everything here, so the figures hang on the tokenizer; there is no time in them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from pathlib import Path
from typing import Any

import torch

from maskops.cli.bench.chart import available
from maskops.cli.bench.corpus import docstrings, source_files
from maskops.cli.bench.report import aligned
from maskops.cli.report import load_tokenizer
from maskops.data import padding_report
from tools.environment import ROOT

RESULT = ROOT / "benchmarks" / "results" / "padding.json"
BATCH_SIZES = (8, 32, 128)
PADDED_TO = 1024
CAPACITY = 2048
PACKED = 20_000

EARLIER: dict[str, tuple[float, ...]] = {
    "fixed": (0.079, 0.079, 0.079),
    "random": (0.258, 0.136, 0.091),
    "grouped": (0.83, 0.83, 0.825),
    "sorted": (0.998, 0.991, 0.965),
    "best_fit_decreasing": (0.9991,),
    "first_fit": (0.9991,),
    "best_fit_by_1000": (0.9871,),
    "in_order": (0.9053,),
}
"""Fill measured once with the code of others on such a corpus, 21,677 docstrings of other versions, tokens of SmolLM2:
for the batch sizes the sampler of transformers, for rows of 2048 the packers of TRL, axolotl and torchtune. That of
transformers is measured again here, where it is installed, because its groups depend on the number of documents."""


def lengths_of_docstrings(tokenizer: str | None) -> tuple[list[int], str]:
    """Lengths of the documents in a seeded random order, and the name of the tokenizer."""
    encode = load_tokenizer(tokenizer)
    files = [path for path in source_files() if not {"test", "tests"} & set(path.parts)]
    texts = list(dict.fromkeys(text for found in docstrings(files) for text in found))
    random.Random(0).shuffle(texts)
    return [len(encode.encode(text)) for text in texts], Path(encode.name).name


def grouped_by_transformers(lengths: list[int], batch_size: int) -> float | None:
    """Fill of batches that the sampler of transformers groups; None where it is not installed."""
    try:
        from transformers.trainer_pt_utils import LengthGroupedSampler
    except ImportError:
        return None
    generator = torch.Generator().manual_seed(0)
    order = list(LengthGroupedSampler(batch_size, lengths=lengths, generator=generator))
    batches = [[lengths[at] for at in order[first : first + batch_size]] for first in range(0, len(order), batch_size)]
    return float(sum(lengths) / sum(max(batch) * len(batch) for batch in batches))


def measure(lengths: list[int]) -> dict[str, Any]:
    """Reports for padding at each batch size, cut to 1024 tokens, and for packing 20,000 documents, cut to 2048."""
    cut = [min(length, PADDED_TO) for length in lengths]
    return {
        "grouped_by_transformers": [grouped_by_transformers(cut, size) for size in BATCH_SIZES],
        "padded": [padding_report(lengths, batch_size=size, max_length=PADDED_TO).to_dict() for size in BATCH_SIZES],
        "packed": padding_report(lengths[:PACKED], capacity=CAPACITY, max_length=CAPACITY).to_dict(),
    }


def compare(found: dict[str, Any]) -> list[list[str]]:
    """A line for each earlier figure: where, then, now."""
    lines = []
    for name, figures in EARLIER.items():
        reports = found["padded"] if len(figures) > 1 else [found["packed"]]
        for report, then in zip(reports, figures, strict=True):
            row = next(row for row in report["strategies"] if row["name"] == name)
            where = f"{row['label']}, {report['batch_size']} documents" if len(figures) > 1 else row["label"]
            lines.append([where, f"{then:.4g}", f"{row['fill']:.4f}"])
    for size, fill in zip(BATCH_SIZES, found["grouped_by_transformers"], strict=True):
        lines.append(
            [f"grouped by transformers, {size} documents", "", "not installed" if fill is None else f"{fill:.4f}"]
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__)
    parser.add_argument("--tokenizer", metavar="NAME", help="as of `python -m maskops report`")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="add the run to this file, by tokenizer")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the report of 32 documents a batch")
    options = parser.parse_args(arguments)
    lengths, tokenizer = lengths_of_docstrings(options.tokenizer)
    found = measure(lengths)
    print(f"{len(lengths):,} docstrings, {sum(lengths):,} tokens of {tokenizer}, the longest {max(lengths):,}\n")
    print("\n".join(aligned([["share of the places that hold a token", "earlier", "now"], *compare(found)])))
    shown = padding_report(lengths, max_length=PADDED_TO)
    print(f"\n{shown}")
    if options.json is not None:
        runs = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        runs[tokenizer] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "documents": len(lengths),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "earlier": EARLIER,
            **found,
        }
        options.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    if options.chart is not None:
        reason = available()
        if reason is None:
            shown.chart(options.chart)
        print(f"chart: {reason or options.chart}")


if __name__ == "__main__":
    main()
