"""Mutations of what figures of benchmarks hang on."""

from __future__ import annotations

from tests.mutations import Mutation

_TESTS = ("tests/test_bench_cpu.py",)
_FOLDER = "maskops/cli/bench"

MUTATIONS = (
    Mutation(
        "bench: a round counts that only one of two took part in",
        f"{_FOLDER}/cpu/measure.py",
        "common = min(len(ours.seconds), len(theirs.seconds))",
        "common = max(len(ours.seconds), len(theirs.seconds))",
        _TESTS,
    ),
    Mutation(
        "bench: the slowest peer of a goal counts",
        f"{_FOLDER}/cpu/measure.py",
        "peer = min(there, key=lambda name: timings[name].median)",
        "peer = there[-1]",
        _TESTS,
    ),
    Mutation(
        "bench: a wrong contender is timed",
        f"{_FOLDER}/cpu/measure.py",
        "if error is not None and not error <= (WRONG_ABOVE if contender.ours else PEER_WRONG_ABOVE):",
        "if error is not None and not error <= 1e9:",
        _TESTS,
    ),
    Mutation(
        "bench: maskops may be as wrong as its peers",
        f"{_FOLDER}/cpu/measure.py",
        "(WRONG_ABOVE if contender.ours else PEER_WRONG_ABOVE)",
        "PEER_WRONG_ABOVE",
        _TESTS,
    ),
    Mutation(
        "bench: a first touch finds the memory of the run before",
        f"{_FOLDER}/cpu/measure.py",
        "        if self._contender.releases:\n",
        "        if False:\n",
        _TESTS,
    ),
    Mutation(
        "bench: what the machine moved under stays without a speed",
        f"{_FOLDER}/cpu/command.py",
        "if result.unsteady and",
        "if not result and",
        _TESTS,
    ),
    Mutation(
        "bench: inputs that were overwritten stay so",
        f"{_FOLDER}/cpu/measure.py",
        "leaf.detach().copy_(kept.detach())",
        "leaf.detach()",
        _TESTS,
    ),
    Mutation(
        "bench: rounds between limits that moved count",
        f"{_FOLDER}/cpu/rounds.py",
        "            if share <= STEADY:",
        "            if share <= 1e9 * STEADY:",
        _TESTS,
    ),
    Mutation(
        "bench: what moved is made up for as long as it takes",
        f"{_FOLDER}/cpu/rounds.py",
        "lost += time.perf_counter() - started",
        "lost += 0.0",
        _TESTS,
    ),
    Mutation(
        "bench: too few rounds give a speed",
        f"{_FOLDER}/cpu/rounds.py",
        "if stretches and count < min(pace.min_rounds, FEWEST):",
        "if stretches and count < 0:",
        _TESTS,
    ),
    Mutation(
        "bench: each round is held against the first limits",
        f"{_FOLDER}/cpu/measure.py",
        "limits = best(stretch.before, stretch.after)",
        "limits = found.stretches[0].before",
        _TESTS,
    ),
    Mutation(
        "bench: options that mean nothing are taken",
        f"{_FOLDER}/command.py",
        "if options.work in works or getattr(options, name) == getattr(defaults, name):",
        "if options.work in works or not getattr(defaults, name):",
        _TESTS,
    ),
    Mutation(
        "bench: idle processors are busy",
        f"{_FOLDER}/others.py",
        "_IDLE = (3, 4)",
        "_IDLE = (4,)",
        _TESTS,
    ),
    Mutation(
        "bench: children are others",
        f"{_FOLDER}/others.py",
        "if parent in family and number not in family:",
        "if parent in family and number in family:",
        _TESTS,
    ),
    Mutation(
        "bench: the last float of a stream is not read",
        "csrc/cpu/limits.inc",
        "part; i < n; i++) rest += x[i];",
        "part; i + 1 < n; i++) rest += x[i];",
        _TESTS,
    ),
)
