"""Faults put into the op set on purpose are caught by the histories. Three here, all of them in the soak."""

from __future__ import annotations

import pytest

from tests.replica.mutants import MUTANTS, QUICK, SEEDS, survived


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_caught_soon(name: str) -> None:
    assert survived(MUTANTS[name], seeds=50) is not None


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_every_fault_is_caught_within_a_thousand_histories(name: str) -> None:
    assert survived(MUTANTS[name]) is not None, f"{SEEDS} histories went on in peace"


def test_the_faults_are_many_and_none_of_them_stays_behind() -> None:
    assert len(MUTANTS) >= 12
    for mutant in MUTANTS.values():
        assert getattr(mutant.where, mutant.name) is not mutant.by
