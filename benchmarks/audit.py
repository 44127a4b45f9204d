"""`python -m benchmarks.audit`: what the attention of transformers leaks, audited on tiny models of every family.

Random weights, float32, documents of random tokens. Each model is audited with each attention of its own, in every way
that documents arrive, padded and packed, and once more after `maskops.attach`. A figure is the largest difference of an
output from that of the same document alone through the same model.

Expected before the first run, from reading transformers' code: padded batches are right everywhere; packed ones leak in
every model that is simply called, because models keep a cache by default and the detection of packing is off beside
one; without a cache decoders are right, but for those that do not hand positions to their masks, and encoders leak
whatever they are given. Found: so it is. Beside that the BART family miscounts positions under padding on the left, and
layers that carry a state (convolutions, state spaces) leak where attention does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import maskops
from maskops.cli.bench.report import aligned
from maskops.testing.leak import BatchAudit

LENGTHS = (11, 5, 17)
OURS = "maskops"
STOCK = ("eager", "sdpa")
COLUMNS = {
    "padded": ("padded right", "padded left"),
    "packed": ("packed",),
    "no cache": ("packed, no cache",),
    "mask of ones, tail": ("packed, mask of ones", "packed, padded tail"),
    "several rows": ("packed, several rows",),
    "cu_seq_lens": ("packed, cu_seq_lens",),
}
"""Ways in which documents arrive that stand in one column."""


def summary(batch: BatchAudit) -> dict[str, Any]:
    """What one batch came to, without its matrix."""
    if batch.refused is not None:
        return {"verdict": batch.verdict, "refused": batch.refused[:200]}
    worst, alone = batch.worst, batch.alone
    found: dict[str, Any] = {"verdict": batch.verdict}
    if alone is not None:
        found["error"] = _rounded(alone.change.max_abs)
        if alone.change.kl is not None:
            found.update(kl=_rounded(alone.change.kl), flipped=_rounded(alone.change.flipped or 0.0))
        if alone.nll_alone is not None and alone.nll_batch is not None:
            found.update(nll_alone=_rounded(alone.nll_alone), nll=_rounded(alone.nll_batch))
    if worst is not None:
        found.update(leak=_rounded(worst.change.max_abs), enters=[each.name for each in batch.layers if each.leaks])
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """Each family with each attention."""
    # By name: mypy does not follow it into the tests, which are not typed as strictly.
    families = import_module("tests.transformers_models").FAMILIES
    for name in names or families:
        for attention in (*STOCK, OURS):
            row: dict[str, Any] = {"model": name, "kind": families[name].kind, "attention": attention}
            try:
                model = families[name].build("eager" if attention == OURS else attention)
                if attention == OURS:
                    maskops.attach(model)
            except Exception as error:  # a refusal is a result, whatever its class
                first = " ".join(str(error).split()).split(". ")[0]
                yield {**row, "refused": f"{type(error).__name__}: {first}"}
                continue
            report = maskops.audit(model, lengths=LENGTHS)
            yield {**row, "batches": {batch.name: summary(batch) for batch in report.batches}}


def cell(row: dict[str, Any], names: tuple[str, ...]) -> tuple[float, bool] | None:
    """The largest error of some batches, and whether anything is wrong with one; None if none was taken."""
    taken = [row["batches"][name] for name in names if name in row["batches"]]
    taken = [batch for batch in taken if "refused" not in batch]
    if not taken:
        return None
    return max(batch.get("error", 0.0) for batch in taken), any(batch["verdict"] != "clean" for batch in taken)


def text_of(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """A cell: the error, with an exclamation mark where something is wrong; "refused", or "-" for no such batch."""
    found = cell(row, names)
    if found is not None:
        return f"{found[0]:.1g}{' !' if found[1] else '  '}"
    # A name of an error stands before the reason where the model was called and declined.
    refusals = [row["batches"][name].get("refused", "") for name in names if name in row["batches"]]
    return "refused  " if any("Error: " in refusal for refusal in refusals) else "-  "


def table(found: list[dict[str, Any]]) -> str:
    """A line for each model and attention; what is wrong has an exclamation mark."""
    lines = [["model", "attention", *COLUMNS]]
    for row in found:
        if "refused" in row:
            lines.append([row["model"], row["attention"], *["refused  "] * len(COLUMNS)])
            continue
        lines.append([row["model"], row["attention"], *(text_of(row, names) for names in COLUMNS.values())])
    return "\n".join(aligned(lines, left=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], help="names of families (default: all)")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args()
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # of kernels that are not installed
    torch.set_num_threads(1)
    started = time.process_time()
    found = list(rows(arguments.models))
    print(table(found))
    for row in found:
        if "refused" in row:
            print(f"{row['model']}, {row['attention']}: {row['refused']}")
    if arguments.json:
        about = {
            "command": "python -m benchmarks.audit --json benchmarks/results/audit.json",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lengths": list(LENGTHS),
            "processor_seconds": round(time.process_time() - started),
        }
        lines = ",\n".join(json.dumps(row) for row in found)
        arguments.json.write_text(f'{json.dumps(about)[:-1]},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
