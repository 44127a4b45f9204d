"""Mutations of packers."""

from __future__ import annotations

from tests.mutations import Mutation

BALANCE = "maskops/data/balance.py"
TESTS = ("tests/test_data_packers.py",)

MUTATIONS = (
    Mutation(
        "packers: giants do not wait", BALANCE, "most = 0 if last else int(HELD * self.buffer)", "most = 0", TESTS
    ),
    Mutation("packers: gaps stay", BALANCE, "step.top_up(rest, lengths)", "pass", TESTS),
    Mutation("packers: one sequence too many", BALANCE, ">= limits.segments", "> limits.segments", TESTS),
    Mutation(
        "packers: a room without its work",
        "maskops/data/first_fit.py",
        "return min(self._room[place], self.limits.longest(self._work[place]))",
        "return self._room[place]",
        TESTS,
    ),
    Mutation(
        "packers: bins that have no work left are forgotten",
        "maskops/data/first_fit.py",
        "while later and length <= -later[0][0]:",
        "while False:",
        TESTS,
    ),
    Mutation(
        "pieces: those that are joined are not",
        "maskops/data/first_fit.py",
        "Piece(number, start, stop, self.isolate)",
        "Piece(number, start, stop)",
        ("tests/test_data_samplers.py",),
    ),
    Mutation(
        "samplers: a default rank under accelerate",
        "maskops/data/sharding.py",
        "if processes > 1:",
        "if processes < 0:",
        ("tests/test_data_samplers.py",),
    ),
    Mutation(
        "samplers: a state of other documents",
        "maskops/data/sharding.py",
        "if saved.get(name) != value:",
        "if name == 'seed' and saved.get(name) != value:",
        ("tests/test_data_samplers.py",),
    ),
)
