"""`python -m tools.readme`: writes the figures of README.md from the JSON of a benchmark run, so that they agree.

The runs:
    python -m maskops bench --json benchmarks/results/cpu.json --chart benchmarks/results/cpu.png
    python -m maskops bench cpu --instruction-set avx2 --json benchmarks/results/cpu-kernels-avx2.json
    python -m maskops bench cpu --instruction-set avx512 --json benchmarks/results/cpu-kernels-avx512.json
        with --chart benchmarks/results/cpu-kernels-avx2.png and -avx512.png
    python -m benchmarks.padding --json benchmarks/results/padding.json
    python -m maskops bench text --model minilm --full --json benchmarks/results/minilm.json
    python -m maskops bench text --model smollm2 --full --json benchmarks/results/smollm2.json
    python -m maskops bench train --json benchmarks/results/train.json --chart benchmarks/results/train.png
    python -m benchmarks.audit --json benchmarks/results/audit.json

    make gpu        # which leaves benchmarks/results/gpu-<device>.json

The table of features is written from the declarations of the backends, and says of each whether it has run on a GPU:
whether there is a result of one.

`--check` only compares and fails if they differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.audit import COLUMNS, OURS, cell
from benchmarks.padding import EARLIER
from maskops.backend import BACKENDS, FEATURES
from maskops.cli.bench.cpu.contest import MODES
from maskops.cli.bench.cpu.limits import STEADY
from maskops.cli.bench.cpu.measure import PEER_WRONG_ABOVE
from maskops.cli.bench.gpu.report import summary, tables_of
from maskops.cli.bench.measure import WRONG_ABOVE
from maskops.cli.bench.report import BUSY_ABOVE
from tools.environment import ROOT

README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
CHART = RESULT.with_suffix(".png")
KERNELS = {name: RESULT.with_name(f"cpu-kernels-{name}.json") for name in ("avx2", "avx512")}
"""Results of `maskops bench cpu`, by instruction set; the picture lies beside each."""

PADDING = RESULT.with_name("padding.json")
MODELS = (RESULT.with_name("minilm.json"), RESULT.with_name("smollm2.json"))
TRAINING = RESULT.with_name("train.json")
AUDIT = RESULT.with_name("audit.json")
AUDITED = (
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt-oss",
    "phi",
    "deepseek-v3",
    "bert",
    "roberta",
    "modernbert",
    "t5",
    "bart",
)
"""Families in the table of the README; the others stand in the JSON."""
BLOCKS = {
    name: (f"<!-- {name}: begin (python -m tools.readme) -->\n", f"<!-- {name}: end -->\n")
    for name in ("results", "kernels", "models", "gpu", "padding", "audit", "features")
}
NOT_YET = "compiled and interpreted; not yet run on a GPU"
NOT_YET_BUT = {"triton": NOT_YET, "cuda": "compiled, and run as host code; not yet run on a GPU"}


def figures(result: dict[str, Any]) -> str:
    """The tables of the README for a run of `maskops bench`."""
    machine, documents, settings = result["machine"], result["documents"], result["settings"]
    random = result["waste"][0]
    lines = [
        f"![Speed of a training step, one batch with its padding and its spans, and the speed-up over the fill factor]"
        f"({CHART.relative_to(ROOT).as_posix()})",
        "",
        f"{documents['source'].capitalize()}, tokenizer {documents['tokenizer']}; in random batches of "
        f"{random['batch_size']} documents {1 - random['fill']:.0%} of all positions are padding. {machine['device']}, "
        f"{machine['threads']} threads, {machine['instruction_set']}, {settings['dtype']}; a model of "
        f"{settings['layers']} layers, width {settings['width']}, vocabulary {settings['vocabulary']:,}; torch "
        f"{machine['torch']}. Forward and backward, thousands of real tokens per second, and in brackets how many "
        f"times the best variant without maskops:",
        "",
        "| | attention | cross-entropy | training step |",
        "|---|---|---|---|",
    ]
    tables = {table["job"]: table for table in result["tables"] if table["backward"]}
    for row in tables["step"]["rows"]:
        cells = [_cell(tables[job], row["name"]) for job in ("attention", "loss", "step")]
        name = f"{row['name']} (what people do)" if row["habit"] else row["name"]
        name = f"**{name}**" if row["ours"] else name
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def kernel_figures(runs: dict[str, dict[str, Any]]) -> str:
    """The table of `maskops bench cpu`, from its runs by instruction set; a sentence where there is none."""
    if not runs:
        return "`python -m maskops bench cpu` holds each kernel against torch and the machine. No run is stored here.\n"
    lines = []
    picture = next((path for name in runs if (path := KERNELS[name].with_suffix(".png")).exists()), None)
    if picture is not None:
        place = picture.relative_to(ROOT).as_posix()
        lines += [f"![Times the speed of torch, kernel by kernel, and the share of the limits]({place})", ""]
    places: dict[str, list[str]] = {}
    for name, run in runs.items():
        machine = run["machine"]
        place = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
        places.setdefault(place, []).append(f"in {name} {machine['instruction_set']}")
    where = "; ".join(f"{place}: {', '.join(sets)}" for place, sets in places.items())
    lines += [
        f"On a CPU ({where}): each kernel against plain torch's named ways to do the same work, in one process, in "
        "turn, medians of the rounds' ratios. torch.compile takes part in whole runs alone, not in those of `--quick`. "
        "`python -m maskops bench cpu` repeats it.",
        "",
        "| | goals reached | multiply-add | of bfloat16 | read | copy | first touch | rounds | spread of a row |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_summary(name, run) for name, run in runs.items()),
        "",
        *(f"{name}:{warning}\n" for name, run in runs.items() if (warning := _busy(run["machine"]))),
        "<details>",
        "<summary>The whole table in figures</summary>",
        "",
        "**Bold** stays below what is wanted at least. In brackets the share of what the machine does at most "
        "(multiplications in registers, those of bfloat16 in torch's products where these are quicker, reading, "
        "copying, first touch of pages), measured right around the rounds; a row under which that moved by more than "
        f"{STEADY:.0%} is *unsteady* and has no speed, nor has one whose error is above {WRONG_ABOVE:.0f} times "
        f"torch's own (a peer's: {PEER_WRONG_ABOVE:.0f} times). *Huge pages*: the peer in a process whose allocator "
        "asks for them; *first touch*: maskops without the memory of the run before, which it keeps otherwise. MB, of "
        f"{next(iter(runs))}: what a call takes at its peak, and its results with what no way can spare.",
        "",
        f"| | against | at least | aim | {' | '.join(runs)} | MB, floor |",
        f"|---|---|---|---|{'---|' * len(runs)}---|",
    ]
    found: dict[tuple[str, str, str, int], tuple[dict[str, Any], dict[str, str], str]] = {}
    for name, run in runs.items():
        for result in run["results"]:
            speeds = {row["name"]: row for row in result["rows"]}
            for outcome in result["outcomes"]:
                for number, reached in enumerate(outcome["reached"]):
                    key = (result["group"], result["mode"], outcome["line"]["name"], number)
                    own = speeds.get(outcome["line"]["ours"], {})
                    entry = found.setdefault(key, (reached, {}, "" if number else _memory(own)))
                    entry[1][name] = _reached(outcome, reached, own, number)
    for (group, mode, line, number), (reached, cells, memory) in found.items():
        work = "" if number else f"{group}, {MODES[mode]}: {line}"
        goal = reached["goal"]
        peer = goal["peers"][0] if len(goal["peers"]) == 1 else f"best of {len(goal['peers'])}: {reached['peer']}"
        aim = "" if goal["aim"] is None else f"{goal['aim']:.3g}x"
        columns = " | ".join(cells.get(name, "") for name in runs)
        lines.append(f"| {work} | {peer} | {goal['at_least']:.3g}x | {aim} | {columns} | {memory} |")
    return "\n".join([*lines, "", "</details>"]) + "\n"


def _reached(outcome: dict[str, Any], reached: dict[str, Any], own: dict[str, Any], number: int) -> str:
    """A ratio, bold where it is too low; beside the first of a line the share of the limit."""
    if reached["ratio"] is None:
        return str(own.get("problem") or "-").split(":")[0]
    ratio = f"{reached['ratio']:.2f}x"
    text = ratio if reached["ratio"] >= reached["goal"]["at_least"] else f"**{ratio}**"
    return text if number or outcome["share"] is None else f"{text} ({outcome['share']:.0%})"


def _problem(result: dict[str, Any], outcome: dict[str, Any]) -> str | None:
    """Why our row of a line has no speed, in a word; None where it has one."""
    problem = next((row["problem"] for row in result["rows"] if row["name"] == outcome["line"]["ours"]), None)
    return None if problem is None else str(problem).split(":")[0]


def _memory(own: dict[str, Any]) -> str:
    """Megabytes at the peak of a call and the floor; nothing where a call is too small to be measured."""
    if own.get("memory") is None or not own.get("floor"):
        return ""
    return f"{own['memory'] / 1e6:,.0f}, {own['floor'] / 1e6:,.0f}"


def _summary(name: str, run: dict[str, Any]) -> str:
    """A row for a run: how many goals it reached, the middle of its limits, its rounds and how far they were apart."""
    stretches = [stretch for result in run["results"] for stretch in result["stretches"]]
    measured = [run["limits"], *(stretch[side] for stretch in stretches for side in ("before", "after"))]

    def middle(limit: str, unit: str) -> str:
        values = [limits[limit] for limits in measured if limit in limits]
        return f"{statistics.median(values):.0f} {unit}" if values else ""

    known: list[dict[str, Any]] = []
    failed = unsteady = left = 0
    for result in run["results"]:
        for outcome in result["outcomes"]:
            problem = _problem(result, outcome)
            for each in outcome["reached"]:
                if each["ratio"] is not None:
                    known.append(each)
                elif problem == "unsteady":
                    unsteady += 1
                elif problem is not None:
                    failed += 1  # wrong or refused: not reached
                else:
                    left += 1
    met = sum(each["ratio"] >= each["goal"]["at_least"] for each in known)
    goals = f"{met} of {len(known) + failed}"
    goals += f", {unsteady} unsteady" if unsteady else ""
    goals += f", {left} without their peer" if left else ""
    counts = [each["rounds"] for each in known] or [0]
    spreads = [each["spread"] for each in known if each["spread"] is not None and each["rounds"] > 1]
    cells = [
        f"{name} (`--quick`)" if run["mode"] == "quick" else name,
        goals,
        middle("multiply_add", "GFLOP/s"),
        middle("multiply_pairs", "GFLOP/s"),
        *(middle(limit, "GB/s") for limit in ("read", "copy", "touch")),
        f"{min(counts)} to {max(counts)}",
        f"±{statistics.median(spreads):.0%}, at most {max(spreads):.0%}" if spreads else "",
    ]
    return f"| {' | '.join(cells)} |"


def padding_figures(runs: dict[str, Any], batch_size: int = 32) -> str:
    """What padding costs, in a sentence, from the runs of `benchmarks.padding`."""
    tokenizer, run = next(iter(runs.items()))
    report = next(report for report in run["padded"] if report["batch_size"] == batch_size)
    rows = {row["name"]: row for row in report["strategies"]}
    random, balanced = rows["random"], rows["balanced"]
    sizes = [report["batch_size"] for report in run["padded"]]
    theirs = zip(sizes, run["grouped_by_transformers"], strict=True)
    again = ", ".join(f"{fill:.1%} in batches of {size}" for size, fill in theirs if fill is not None)
    return (
        f"Of {run['documents']:,} docstrings, cut at {report['max_length']:,} tokens of {tokenizer}, padding to that "
        f"length fills {rows['fixed']['fill']:.1%} of what is computed, random batches of {batch_size} "
        f"{random['fill']:.1%}, batches grouped by length {rows['grouped']['fill']:.1%} and packed rows "
        f"{balanced['fill']:.1%}, whose attention costs {balanced['attention_flops'] / random['attention_flops']:.0%} "
        f"of that of the random batches and the whole model {balanced['flops'] / random['flops']:.0%}. "
        f"Groups depend on the documents and on how they are made: the {EARLIER['grouped'][1]:.0%} once measured with "
        f"the sampler of transformers on docstrings of other versions is not reproduced; on these it fills {again}.\n"
    )


def model_figures(runs: Sequence[dict[str, Any]], training: dict[str, Any] | None = None) -> str:
    """A table for each run of `maskops bench text --model`, and what one of `maskops bench train` found."""
    lines = []
    for run in runs:
        model, documents, settings, machine = run["model"], run["documents"], run["settings"], run["machine"]
        work = "sentence embeddings" if model["task"] == "embedding" else "a training step, forward and backward"
        passes = f", at most {settings['positions']:,} positions a pass" if settings["positions"] else ""
        repeated = settings["repeats"] > 1
        measured = f"medians of {settings['repeats']} repeats" if repeated else "measured once"
        lines += [
            f"**{model['name']}** ({model['architecture']}, {model['parameters'] / 1e6:.0f} M parameters, "
            f"{settings['dtype']}; {model['origin'].get('package', 'a folder')}), {work}: {documents['count']} "
            f"docstrings in arrival order, {documents['tokens']:,} tokens of its own tokenizer, batches of "
            f"{settings['batch_size']}{passes}. {_place(machine)}, transformers {settings['transformers']}; "
            f"{measured}, batch by batch in turn; errors against one document at a time in "
            f"float64.{_busy(machine)}",
            "",
            f"| | tokens/s | | fill | peak memory | {' | '.join(_ERRORS[name] for name in run['own_error'])} "
            "| products | attention | loss | other |",
            f"|{'---|' * (9 + len(run['own_error']))}",
        ]
        shares = {entry["name"]: entry for entry in run["shares"]}
        for row in run["rows"]:
            name = f"{row['name']} (what people do)" if row["habit"] else row["name"]
            name = f"**{name}**" if row["ours"] else name
            if row["timing"] is None:
                lines.append(f"| {name} | {str(row['problem']).split(':')[0]} |{' |' * (7 + len(run['own_error']))}")
                continue
            memory = "" if row["memory"] is None else f"{row['memory'] / 2**30:.2f} GiB"
            parts = [f"{shares[row['name']][part]:.0%}" for part in ("gemm", "attention", "loss", "rest")]
            cells = [
                f"{row['tokens_per_second']:,.0f}" + (f" ± {row['timing']['spread']:.0%}" if repeated else ""),
                f"{row['speedup']:.2f}x",
                f"{row['fill']:.0%}",
                memory,
                *(f"{row['errors'][error]:.0e}" for error in run["own_error"]),
                *parts,
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        best = shares.get(run["baseline"])
        if best is not None:
            lines += [
                f"The most that kernels can bring: with attention and loss for nothing, the best row without maskops "
                f"would be {best['ceiling']:.2f}x as fast.",
                "",
            ]
    if training is not None:
        lines += [_training(training), ""]
    return "\n".join(lines[:-1]) + "\n"


_ERRORS = {"cosine": "1 - cosine", "loss": "loss, nats off", "gradient": "gradient off"}


def _training(run: dict[str, Any]) -> str:
    """What a training run to a fixed loss found, in a sentence."""
    settings = run["settings"]
    slow = run["curves"][0]
    taken = ", ".join(
        f"{curve['name']} {sum(curve['seconds']):.0f} s"
        + (f" ({sum(slow['seconds']) / sum(curve['seconds']):.2f}x)" if curve is not slow else "")
        for curve in run["curves"]
    )
    reached = f"after {run['reached']} steps" if run["reached"] else f"not reached in {len(slow['losses'])} steps"
    return (
        f"**Trained to a fixed loss** (`python -m maskops bench train`): a Llama of {settings['layers']} layers, width "
        f"{settings['width']}, {settings['parameters'] / 1e6:.1f} M parameters, {settings['batch_size']} documents a "
        f"step in the same order, to {settings['until']:g} nats ({reached}): {taken}. The loss of a step never differs "
        f"by more than {run['deviation']:.0e} nats.{_busy(run['machine'])}"
    )


def _place(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} threads, {machine['instruction_set']}, torch {machine['torch']}"


def _busy(machine: dict[str, Any]) -> str:
    """A warning where other programs had the processors."""
    if machine["load"] <= BUSY_ABOVE:
        return ""
    return f" **Measured while other programs kept {machine['load']:.1f} processors busy: not to be trusted.**"


def audit_figures(run: dict[str, Any], families: Sequence[str] = AUDITED) -> str:
    """What the attention of transformers does to documents, beside maskops, from a run of `benchmarks.audit`."""
    lines = [
        f"| | {' | '.join(COLUMNS)} | maskops, all of these |",
        f"|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for family in families:
        rows = [row for row in run["rows"] if row["model"] == family and "batches" in row]
        stock = [row for row in rows if row["attention"] != OURS]
        cells = [_audited(stock, names) for names in COLUMNS.values()]
        everything = tuple(name for names in COLUMNS.values() for name in names)
        lines.append(
            f"| {family} | {' | '.join(cells)} | {_audited([row for row in rows if row not in stock], everything)} |"
        )
    audited = {row["model"] for row in run["rows"]}
    stock = [row for row in run["rows"] if row["attention"] != OURS and "batches" in row]
    leaking = {row["model"] for row in stock if _faults(row)}
    ours = [row for row in run["rows"] if row["attention"] == OURS and "batches" in row]
    wrong = [f"{row['model']}, {name}: {fault}" for row in ours for name, fault in _faults(row).items()]
    return "\n".join(
        [
            f"Tiny models with random weights, float32, transformers {run['transformers']}; the largest error of an "
            "output against the same document alone through the same model, the worse of eager and sdpa attention, "
            "bold where something leaks or is wrong:",
            "",
            *lines,
            "",
            f"{len(leaking)} of {len(audited)} families leak in some batch with an attention of their own; of the "
            f"{len(ours)} that take maskops, {'these do: ' + '; '.join(wrong) if wrong else 'none does'}.",
            "",
        ]
    )


def _faults(row: dict[str, Any]) -> dict[str, str]:
    """The batches that a model got wrong, with the verdict and the modules in which a leak enters."""
    return {
        name: f"{batch['verdict'].lower()} in {', '.join(batch['enters'])}" if "enters" in batch else batch["verdict"]
        for name, batch in row["batches"].items()
        if batch["verdict"] not in ("clean", "not taken")
    }


def _audited(rows: Sequence[dict[str, Any]], names: tuple[str, ...]) -> str:
    """The largest error of several attentions."""
    found = [each for row in rows if (each := cell(row, names)) is not None]
    if not found:
        return "-"
    text = f"{max(error for error, _ in found):.1g}"
    return f"**{text}**" if any(is_wrong for _, is_wrong in found) else text


def _cell(table: dict[str, Any], name: str) -> str:
    row = next((row for row in table["rows"] if row["name"] == name), None)
    if row is None:
        return ""
    if row["timing"] is None:
        return str(row["problem"]).split(":")[0]
    return f"{row['tokens_per_second'] / 1e3:.1f} ({row['speedup']:.2f}x)"


def on_gpus(folder: Path = RESULT.parent) -> list[dict[str, Any]]:
    """The finished runs of `maskops bench gpu` that are stored."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
    return [result for result in found if result["finished"] and result["settings"]["mode"] != "dry run"]


def gpu_figures(results: Sequence[dict[str, Any]]) -> str:
    """What is known of the backends of GPUs: a table a device, or that there is none."""
    if not results:
        return f"On a GPU: {NOT_YET}. `make gpu` verifies and measures everything where one is at hand.\n"
    lines = []
    for result in results:
        machine = result["machine"]
        lines += [
            f"{machine['device']}, torch {machine['torch']}, {result['settings']['dtype']}; useful work, and the speed "
            f"over the best peer of the same run ({machine['peaks']['multiply_add'] / 1e3:,.0f} TFLOP/s is the most "
            f"that a matrix product reached, {machine['peaks']['copy']:,.0f} GB/s a copy):",
            "",
            "| | | forward | ratio | backward | both | ratio | best peer |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in summary(tables_of(result))[1:]]
        lines.append("")
    return "\n".join(lines)


def _runs_on(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Where a backend has run."""
    gpus = [result["machine"]["device"] for result in results if BACKENDS[name].is_at_home("cuda")]
    places = ["processors", *gpus] if BACKENDS[name].is_at_home("cpu") else gpus
    return ", ".join(places) or NOT_YET_BUT[name]


def features(results: Sequence[dict[str, Any]] | None = None) -> str:
    """The table of what each backend serves, from the declarations, and of where it has run."""
    runs = on_gpus() if results is None else results
    lines = [f"| | {' | '.join(f'`{name}`' for name in BACKENDS)} |", f"|---|{'---|' * len(BACKENDS)}"]
    lines.append(f"| has run on | {' | '.join(_runs_on(name, runs) for name in BACKENDS)} |")
    for op, named in FEATURES.items():
        declarations = [backend.ops.get(op) for backend in BACKENDS.values()]
        dtypes = [
            ", ".join(str(dtype).removeprefix("torch.") for dtype in declared.dtypes) if declared else "no"
            for declared in declarations
        ]
        lines.append(f"| **{op}** | {' | '.join(dtypes)} |")
        for feature, text in named.items():
            cells = [
                "no" if declared is None else f"no: {declared.lacks[feature]}" if feature in declared.lacks else "yes"
                for declared in declarations
            ]
            lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The README with the features that are declared, and with the figures of the stored run if one is stored."""
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in KERNELS.items() if path.exists()}
    blocks = {"features": features(), "gpu": gpu_figures(on_gpus()), "kernels": kernel_figures(runs)}
    if RESULT.exists():
        blocks["results"] = figures(json.loads(RESULT.read_text(encoding="utf-8")))
    if PADDING.exists():
        blocks["padding"] = padding_figures(json.loads(PADDING.read_text(encoding="utf-8")))
    models = [json.loads(path.read_text(encoding="utf-8")) for path in MODELS if path.exists()]
    training = json.loads(TRAINING.read_text(encoding="utf-8")) if TRAINING.exists() else None
    if models or training:
        blocks["models"] = model_figures(models, training)
    if AUDIT.exists():
        blocks["audit"] = audit_figures(json.loads(AUDIT.read_text(encoding="utf-8")))
    for name, block in blocks.items():
        begin, end = BLOCKS[name]
        before, rest = readme.split(begin)
        readme = f"{before}{begin}{block}{end}{rest.split(end)[1]}"
    return readme


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(prog="python -m tools.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README differs instead of writing it")
    options = parser.parse_args(arguments)
    now = README.read_text(encoding="utf-8")
    wanted = updated(now)
    if options.check:
        return 0 if now == wanted else 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
