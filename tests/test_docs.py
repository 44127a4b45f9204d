"""The documents: examples run, figures are those of the stored run, links lead somewhere, names exist."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import maskops
from maskops.backend import BACKENDS
from tools import readme

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore::maskops.BackendFallbackWarning")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_the_readme_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    if "transformers" in EXAMPLES[number]:
        pytest.importorskip("transformers", reason="this example is a model of transformers")
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    assert "FAIL" not in capsys.readouterr().out


def test_figures_of_the_readme_are_those_of_the_stored_run() -> None:
    assert readme.main(["--check"]) == 0, "run python -m tools.readme"


def test_figures_are_written_from_the_json() -> None:
    rows = [
        {"name": "padded", "habit": True, "ours": False, "timing": {}, "tokens_per_second": 1500.0, "speedup": 0.5},
        {"name": "ours", "habit": False, "ours": True, "timing": None, "problem": "WRONG: 3 times torch's error"},
    ]
    result = {
        "machine": {"device": "a CPU", "threads": 2, "instruction_set": "maskops avx2", "torch": "2.13.0"},
        "documents": {"source": "docstrings", "tokenizer": "words"},
        "settings": {"dtype": "float32", "layers": 2, "width": 256, "vocabulary": 4096},
        "waste": [{"batch_size": 8, "fill": 0.25}],
        "tables": [{"job": job, "backward": True, "rows": rows} for job in ("attention", "step")]
        + [{"job": "loss", "backward": True, "rows": rows[:1]}],
    }
    written = readme.figures(result)
    assert "| padded (what people do) | 1.5 (0.50x) | 1.5 (0.50x) | 1.5 (0.50x) |" in written
    assert "| **ours** | WRONG |  | WRONG |" in written
    assert "75% of all positions are padding" in written


def test_figures_of_kernels_are_written_from_the_json() -> None:
    def run(ratio: float | None, **changes: Any) -> dict[str, Any]:
        goals = [{"peers": ["SDPA"], "at_least": 1.3, "aim": 2.0}, {"peers": ["a", "b"], "at_least": 3.0, "aim": None}]
        taken = {"spread": 0.021, "rounds": 9}
        reached = [
            {"goal": goals[0], "ratio": ratio, "peer": "SDPA", **taken},
            {"goal": goals[1], "ratio": 3.5, "peer": "b", **taken, "rounds": 4},
        ]
        outcome = {"line": {"name": "dense", "ours": "maskops"}, "reached": reached, "share": 0.854}
        stretch = {"before": {"read": 30.0, "copy": 40.0}, "after": {"copy": 60.0}}
        rows = [{"name": "maskops", "problem": None, "memory": 12.6e6, "floor": 10e6, **changes}]
        result = {"group": "attention", "mode": "training", "rows": rows, "outcomes": [outcome], "stretches": [stretch]}
        machine = {"device": "a CPU", "threads": 2, "instruction_set": "avx2", "torch": "2.13.0", "load": 0.1}
        limits = {"multiply_add": 200.0, "multiply_pairs": 300.0, "read": 30.0, "copy": 50.0, "touch": 10.0}
        return {"mode": "quick", "machine": machine, "limits": limits, "results": [result]}

    written = readme.kernel_figures({"avx2": run(1.25), "avx512": run(1.5)})
    line = "| attention, forward + backward: dense | SDPA | 1.3x | 2x | **1.25x** (85%) | 1.50x (85%) | 13, 10 |"
    assert line in written
    assert "|  | best of 2: b | 3x |  | 3.50x | 3.50x |  |" in written
    assert (
        "(a CPU, 2 threads, torch 2.13.0: in avx2 avx2, in avx512 avx2)" in written
        and "not to be trusted" not in written
    )
    limits = "200 GFLOP/s | 300 GFLOP/s | 30 GB/s | 50 GB/s | 10 GB/s"
    assert f"| avx2 (`--quick`) | 1 of 2 | {limits} | 4 to 9 | ±2%, at most 2% |" in written
    assert f"| avx512 (`--quick`) | 2 of 2 | {limits} |" in written
    assert "MB, of avx2: what a call takes" in written
    busy = run(1.25)
    busy["machine"]["load"] = 3.0
    assert "avx2: **Measured while other programs" in readme.kernel_figures({"avx2": busy})
    # What has no speed does not raise the share of what was reached.
    for problem, summary in (("WRONG: by far", "1 of 2"), ("unsteady: read moved", "1 of 1, 1 unsteady")):
        text = readme.kernel_figures({"avx2": run(None, problem=problem)})
        assert f"| 2x | {problem.split(':')[0]} |" in text and f"| avx2 (`--quick`) | {summary} |" in text
    other = run(None)
    assert "| avx2 (`--quick`) | 1 of 1, 1 without their peer |" in readme.kernel_figures({"avx2": other})
    other["machine"]["device"] = "another"
    text = readme.kernel_figures({"avx2": other, "avx512": run(2.0)})
    assert "(another, 2 threads, torch 2.13.0: in avx2 avx2; a CPU, 2 threads, torch 2.13.0: in avx512 avx2)" in text
    assert "No run is stored here" in readme.kernel_figures({})


def test_figures_of_real_models_are_written_from_the_json() -> None:
    machine = {"device": "a CPU", "threads": 2, "instruction_set": "avx2", "torch": "2.13.0", "load": 0.1}
    timing = {"median": 2.0, "spread": 0.03}
    rows = [
        {"name": "padded", "habit": True, "ours": False, "timing": timing, "tokens_per_second": 1500.0, "speedup": 0.5,
         "fill": 0.25, "memory": 3 * 2**29, "errors": {"loss": 2e-6, "gradient": 3e-7}},
        {"name": "ours", "habit": False, "ours": True, "timing": None, "problem": "refused: not this model"},
    ]  # fmt: skip
    shares = [{"name": "padded", "gemm": 0.7, "attention": 0.1, "loss": 0.05, "rest": 0.15, "ceiling": 1.18}]
    run = {
        "model": {"name": "tiny", "architecture": "LlamaForCausalLM", "parameters": 135e6, "task": "language",
                  "origin": {"package": "weights==1"}},
        "documents": {"count": 256, "tokens": 18180},
        "settings": {"dtype": "float32", "positions": 4096, "batch_size": 32, "transformers": "5.23.0", "repeats": 3},
        "machine": machine, "rows": rows, "shares": shares, "baseline": "padded",
        "own_error": {"loss": 1e-6, "gradient": 1e-7},
    }  # fmt: skip
    text = readme.model_figures([run])
    row = "| padded (what people do) | 1,500 ± 3% | 0.50x | 25% | 1.50 GiB | 2e-06 | 3e-07 | 70% | 10% | 5% | 15% |"
    assert row in text
    assert "| **ours** | refused |" in text and "256 docstrings in arrival order, 18,180 tokens" in text
    assert "the best row without maskops would be 1.18x as fast" in text and "not to be trusted" not in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {12}
    once = readme.model_figures([{**run, "settings": {**run["settings"], "repeats": 1}}])
    assert "| 1,500 |" in once and "measured once, batch by batch in turn" in once
    training = {
        "settings": {"layers": 4, "width": 192, "parameters": 2.5e6, "batch_size": 32, "until": 5.2},
        "curves": [{"name": "padded", "seconds": [3.0, 3.0], "losses": [6.0, 5.0]},
                   {"name": "ours", "seconds": [1.0, 1.0], "losses": [6.0, 5.0]}],
        "reached": 2, "deviation": 0.00012, "machine": {**machine, "load": 7.06},
    }  # fmt: skip
    text = readme.model_figures([run], training)
    assert "to 5.2 nats (after 2 steps): padded 6 s, ours 2 s (3.00x). The loss of a step never differs by more" in text
    assert text.endswith("**Measured while other programs kept 7.1 processors busy: not to be trusted.**\n")


def test_the_cost_of_padding_is_written_from_the_json() -> None:
    def row(name: str, fill: float, cost: int) -> dict[str, Any]:
        return {"name": name, "fill": fill, "attention_flops": cost, "flops": 10 * cost + 100}

    rows = [row("fixed", 0.1, 900), row("random", 0.2, 400), row("grouped", 0.75, 200), row("balanced", 0.999, 100)]
    padded = [{"batch_size": size, "max_length": 1024, "strategies": rows} for size in (8, 32)]
    run = {"documents": 1234, "padded": padded, "grouped_by_transformers": [0.7, None]}
    text = readme.padding_figures({"words": run})
    assert "1,234 docstrings, cut at 1,024 tokens of words" in text
    assert "fills 10.0% of what is computed, random batches of 32 20.0%" in text
    assert "grouped by length 75.0% and packed rows 99.9%" in text
    assert "attention costs 25% of that of the random batches and the whole model 27%" in text
    assert text.endswith(
        "the 83% once measured with the sampler of transformers on docstrings of other versions is not "
        "reproduced; on these it fills 70.0% in batches of 8.\n"
    )


def test_what_leaks_is_written_from_the_json() -> None:
    def row(attention: str, error: float, verdict: str) -> dict[str, Any]:
        taken = {"verdict": verdict, "error": error}
        batches = {"packed": taken, "padded left": {**taken, "verdict": "clean"}}
        return {"model": "llama", "attention": attention, "batches": batches}

    stock = [row("eager", 0.25, "LEAKS"), row("sdpa", 0.5, "clean")]
    refused = {"model": "bloom", "attention": "maskops", "refused": "why"}
    run = {"transformers": "5.23.0", "rows": [*stock, row("maskops", 0.0, "clean"), refused]}
    text = readme.audit_figures(run, ["llama", "bloom"])
    assert "| llama | 0.5 | **0.5** | - | - | - | - | 0 |" in text
    assert "| bloom | - | - | - | - | - | - | - |" in text
    assert "1 of 2 families leak" in text and "of the 1 that take maskops, none does." in text
    run["rows"][2]["batches"]["packed"]["verdict"] = "WRONG"
    assert "of the 1 that take maskops, these do: llama, packed: WRONG." in readme.audit_figures(run, [])
    run["rows"][2]["batches"]["packed"].update(verdict="LEAKS", enters=["layers.0"])
    assert "llama, packed: leaks in layers.0." in readme.audit_figures(run, [])


def test_what_has_not_run_on_a_gpu_says_so(tmp_path: Path) -> None:
    """From the results that are stored, and from nothing else."""
    assert readme.on_gpus(tmp_path) == []
    assert "compiled and interpreted; not yet run on a GPU" in readme.gpu_figures([])
    row = {
        "name": "maskops triton",
        "ours": True,
        "habit": False,
        "partial": False,
        "timing": {"median": 1e-3, "spread": 0.0, "seconds": [1e-3]},
        "tflops": 420.0,
        "ratio": 1.25,
    }
    table = {"group": "attention", "name": "causal", "backward": False, "rows": [row], "best": "SDPA cuDNN"}
    result: dict[str, Any] = {
        "machine": {"device": "NVIDIA H100", "torch": "2.11.0", "peaks": {"multiply_add": 8e5, "copy": 3e3}},
        "settings": {"dtype": "bfloat16", "mode": "full"},
        "finished": True,
        "tables": [table],
    }
    for name, changes in (
        ("gpu-a", {}),
        ("gpu-b", {"finished": False}),
        ("gpu-c", {"settings": {"mode": "dry run"}}),
        ("cpu-d", {}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**result, **changes}))
    results = readme.on_gpus(tmp_path)
    assert results == [result]
    assert "| attention: causal | TFLOP/s | 420 | 1.25x | - | - | - | SDPA cuDNN |" in readme.gpu_figures(results)
    cells = {name: readme._runs_on(name, results) for name in BACKENDS}
    both = "processors, NVIDIA H100"
    assert cells == {"cpu": "processors", "triton": "NVIDIA H100", "cuda": "NVIDIA H100", "reference": both}
    assert readme._runs_on("triton", []) == readme.NOT_YET and readme._runs_on("reference", []) == "processors"
    assert readme._runs_on("cuda", []).endswith("not yet run on a GPU")
    assert "| has run on | processors | NVIDIA H100 |" in readme.features(results)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_that_the_documents_use_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in set(re.findall(r"\bmaskops((?:\.[a-z]\w*)+)", re.sub(r"```sh.*?```", "", text, flags=re.DOTALL))):
        found: object = maskops
        for name in path.strip(".").split("."):
            assert hasattr(found, name), f"{document} names maskops{path}"
            found = getattr(found, name)


@pytest.mark.parametrize("name", [name for name in maskops.__all__ if inspect.isfunction(getattr(maskops, name))])
def test_help_says_what_every_argument_is(name: str) -> None:
    function = getattr(maskops, name)
    documented = (inspect.getdoc(function) or "").partition("Args:\n")[2]
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    (?:[\w, ]*\b)?{argument}\b[\w, ]*:", documented, re.M), argument
