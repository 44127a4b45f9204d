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
        "packers: the first fit is any",
        "maskops/data/first_fit.py",
        "place = self._tree.first(length, place + 1)",
        "place = None",
        TESTS,
    ),
)
