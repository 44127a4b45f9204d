"""`bench compile`: what it reads out of compiled kernels, what it objects to, and that no compiler can stop it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from maskops.cli.bench.compilation import command, cuda_compiler, sass, workers
from maskops.cli.bench.compilation.budgets import ALLOWANCES, Allowance, judge, problems
from maskops.cli.bench.compilation.report import Report, render
from maskops.cli.bench.compilation.result import Result, from_json
from maskops.cli.bench.compilation.sass import Loop
from maskops.cli.main import main
from tools import compilation as tool

DISASSEMBLY = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_0:
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_2:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0070*/              @!P1 BRA `(.L_x_2) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MUFU.EX2 R5, R6 ;
        /*00a0*/                   LDL R7, [R1] ;
        /*00b0*/               @P0 BRA `(.L_x_1) ;
        /*00c0*/               @P2 BRA `(.L_x_0) ;
        /*00d0*/                   EXIT ;
.text.other:
.L_x_3:
        /*0000*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_3) ;
"""


def test_the_hot_loop_is_the_innermost_with_the_products() -> None:
    found = sass.functions(DISASSEMBLY)
    assert sass.hot_loops(found["kernel"]) == [
        Loop(9, {"HGMMA": 2}, {"LDGSTS.16": 1}, spills=1, exponentials=1, order="L Mx2 W e")
    ]
    assert sass.count(found["kernel"], "STL", "LDL") == 2
    assert [loop.loads for loop in sass.hot_loops(found["other"])] == [{"LDG.8": 1}]


def loop(**changes: object) -> Loop:
    values = {
        "instructions": 100,
        "tensor_cores": {"HMMA": 8},
        "loads": {},
        "spills": 0,
        "exponentials": 4,
        "order": "",
    }
    return Loop(**{**values, **changes})  # type: ignore[arg-type]


SOUND = Result("forward", "sm_90", warps=8, registers=200, shared=90_000, loops=(loop(),), scores=128 * 128, dots=True)
WRONG = {
    "error": {"error": "ptxas died"},
    "spills": {"loops": (loop(), loop(spills=2)), "spill_stores": 8},
    "serialised": {"notes": ("(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",)},
    "narrow loads": {"loops": (loop(loads={"LDG.2": 4, "LDGSTS.16": 8}),)},
    "no tensor cores": {"loops": (loop(tensor_cores={}),)},
    "shared memory": {"shared": 300_000},
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_budget(kind: str) -> None:
    result = dataclasses.replace(SOUND, **WRONG[kind])  # type: ignore[arg-type]
    assert not problems(SOUND)
    assert [problem.kind for problem in problems(result)] == [kind]
    most = problems(result)[0].number
    excuses = [
        (Allowance("for*", kind, "known", most=most), True),
        (Allowance("for*", kind, "known, but fewer", most=most - 1), False),
        (Allowance("backward*", kind, "another kernel", most=most), False),
        (Allowance("*", kind, "another machine", architecture="sm_80", most=most), False),
        (Allowance("*", kind, "another compiler", triton=("3.6",), most=most), False),
        (Allowance("*", kind, "this compiler", triton=("3.6", "3.9"), most=most), True),
        (Allowance("*", "something else", "another problem", most=most), False),
    ]
    for allowance, excused in excuses:
        (verdict,) = judge([result], "3.9.0", [allowance])
        # A kernel that does not compile is never excused.
        assert bool(verdict.problems) is (kind == "error" or not excused)
        assert len(verdict.problems) + len(verdict.allowed) == 1


def test_every_allowance_has_a_reason() -> None:
    assert all(len(allowance.reason.split()) >= 3 and allowance.kind in WRONG for allowance in ALLOWANCES)
    assert len({(allowance.name, allowance.kind, allowance.architecture) for allowance in ALLOWANCES}) == len(
        ALLOWANCES
    )


def test_figures_that_follow_from_others() -> None:
    assert SOUND.blocks == 1 and SOUND.issue == 100 * 8 / 2
    assert dataclasses.replace(SOUND, registers=128, shared=40_000).blocks == 2
    assert dataclasses.replace(SOUND, registers=32, shared=100_000).blocks == 2
    assert from_json(json.loads(json.dumps(SOUND.as_json()))) == SOUND


WORKER = """
import json, os, sys, time
names = ("a", "crash", "hang", "b", "c")
keys = [["sm_90", name, name != "rare"] for name in (*names, "rare")]
print(json.dumps({"triton": "9.9", "declared": keys}), flush=True)
for line in sys.stdin:
    architecture, name = json.loads(line)
    if name == "crash":
        print("LLVM ERROR: out of ideas", file=sys.stderr, flush=True)
        os.abort()
    if name == "hang":
        time.sleep(60)
    print(json.dumps({**BLANK, "name": name, "architecture": architecture}), flush=True)
"""


def test_a_compiler_that_crashes_or_hangs_costs_one_kernel() -> None:
    blank = json.dumps(SOUND.as_json()).replace("true", "True").replace("false", "False").replace("null", "None")
    script = WORKER.replace("BLANK", blank)
    seen: list[tuple[int, int]] = []
    version, results = workers.compile_all(
        lambda key: key[1] != "c",
        everyday=True,
        environment={},
        processes=2,
        limit=1.0,
        command=(sys.executable, "-c", script),
        on_result=lambda result, done, total: seen.append((done, total)),
    )
    assert version == "9.9" and sorted(seen) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(result.name, bool(result.error)) for result in results] == [
        ("a", False),
        ("crash", True),
        ("hang", True),
        ("b", False),
    ]
    assert "LLVM ERROR: out of ideas" in results[1].error
    assert "more than 1 s" in results[2].error


def test_a_worker_that_does_not_start_says_why() -> None:
    with pytest.raises(workers.WorkerError, match="exit status 1, it said: no compiler today"):
        workers.compile_all(
            lambda key: True,
            environment={},
            processes=1,
            command=(sys.executable, "-c", "import sys; sys.exit('no compiler today')"),
        )


@pytest.mark.skipif(command.absent() is not None, reason=f"Triton: {command.absent()}")
def test_kernels_are_compiled_for_machines_that_are_not_here(tmp_path: Path) -> None:
    version, results = workers.compile_all(
        lambda key: True,
        everyday=True,
        environment=workers.environment(None, tmp_path),
        processes=1,
        command=(sys.executable, "-m", "tests.compiled_kernels"),
    )
    by_name = {(result.name, result.architecture): result for result in results}
    assert ("a feature", "sm_80") not in by_name
    ragged, even = by_name["ragged rows", "sm_90"], by_name["even rows", "sm_80"]
    assert [problem.kind for problem in problems(ragged)] == ["narrow loads"]
    assert not problems(even)
    assert even.registers > 0 and even.issue is None and even.loops[0].exponentials % 8 == 0
    older, newer = by_name["product", "sm_80"], by_name["product", "sm_90"]
    assert older.dots and older.loops[0].tensor_cores.keys() == {"HMMA"} and not problems(older)
    assert older.issue == older.loops[0].instructions * 4 * 2
    assert newer.dots and newer.loops[0].tensor_cores.keys() == {"HGMMA"} and not problems(newer)
    assert older.shared >= 2 * 2 * 64 * 64 * 2 and "LDGSTS.16" in older.loops[0].loads
    assert "power of 2" in by_name["broken", "sm_90"].error
    report = Report(version, "left out", "0123456789ab", tuple(judge(results, version)), 1.0)
    text = render(report)
    assert f"ragged rows, sm_90: {problems(ragged)[0].text}" in text
    assert report.as_json()["kernels"][0]["problems"] == [dataclasses.asdict(problems(ragged)[0])]


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_90a'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    8 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_what_nvcc_says() -> None:
    results = cuda_compiler._read(Path("a.cu"), "sm_90", LOG, sass.functions(DISASSEMBLY), 1.0)
    first, second = results
    assert (first.registers, first.shared, first.spill_stores, first.loops) == (32, 1024, 0, ())
    assert (second.name, second.registers, second.spill_stores, second.spill_loads) == ("a.cu: kernel", 255, 16, 12)
    assert second.hot_spills == 1 and second.source == "csrc/cuda/a.cu"
    assert cuda_compiler._short("void maskops::(anonymous namespace)::rows<float, (int)4>(Params)") == "rows<float, 4>"


def test_what_is_absent_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "absent", lambda: "Triton is not installed")
    monkeypatch.setattr(cuda_compiler, "sources", lambda: [Path("a.cu")])
    monkeypatch.setenv("NVCC", "")
    path = tmp_path / "report.json"
    assert main(["bench", "compile", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Triton is not installed" in text and "nvcc not here" in text
    assert json.loads(path.read_text())["kernels"] == []


def test_an_allowance_that_excuses_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (Allowance("a", "spills", "one"), Allowance("b", "spills", "two"))
    monkeypatch.setattr(tool, "ALLOWANCES", known)
    run = {"triton": "3.9.0", "kernels": [{"name": "a", "allowed": [{"kind": "spills", "text": "", "reason": "one"}]}]}
    assert tool.unneeded([run, {"kernels": []}]) == ["two"]
    assert json.loads(tool.dump([run, run])) == {"runs": [run, run]}
