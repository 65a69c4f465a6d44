"""docs/laws.md names every strategy, gives a reason for every cell that is not the paper's, and is what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from crdtmerge.strategies import registry
from crdtmerge.testing.laws import Law, Measured, measured
from tests.house.laws_page import PAPER, REASONS, differing, line, page, tally

PAGE = (Path(__file__).parents[2] / "docs" / "laws.md").read_text()
ROWS = {
    cells[0]: cells[1:] for cells in ([*map(str.strip, row.split("|")[1:-1])] for row in PAGE.splitlines()) if cells
}


@pytest.mark.parametrize("name", sorted(registry.BUILT_IN))
def test_every_strategy_has_a_row_in_which_all_laws_of_the_set_hold(name: str) -> None:
    assert ROWS[name][4] == "yes"


def test_every_cell_that_is_not_the_papers_has_its_reason_and_no_other_has_one() -> None:
    found = set()
    for name, theirs in PAPER.items():
        ours = ["P" if cell == "yes" else "F" for cell in ROWS[name][:3]]
        found |= {(name, letter) for letter, one, other in zip("CAI", ours, theirs, strict=True) if one != other}
        assert ROWS[name][3] == " ".join(theirs)
    assert found == set(REASONS)
    assert "UNKNOWN" not in PAGE


def test_the_paper_counts_what_it_says_it_counts() -> None:
    assert len(PAPER) == 26
    assert "the paper's functions: 21 commutative, 1 associative, 14 idempotent, 0 all three" in tally([])


def test_rows_measured_again_are_those_of_the_page() -> None:
    for row in measured(["weight_average", "ties", "magmax", "dare", "task_arithmetic", "passthrough"]):
        assert line(row) in PAGE, row.strategy


def test_a_law_that_fails_through_the_set_cannot_be_missed() -> None:
    failing = Measured("ties", True, through_the_set={"commutative": Law(True, 0.0), "convergent": Law(False, 1.0)})
    assert "**NO: convergent**" in line(failing)
    unsaid = Measured("ties", True, alone={law: Law(True, 0.0) for law in ("commutative", "associative", "idempotent")})
    assert differing(unsaid) == ["A", "I"]
    assert "UNKNOWN" in page([unsaid])
