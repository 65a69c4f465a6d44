"""Every strategy keeps every law: one row of a table for each variant worth trying, one table for the bare functions.

The laws are those of ``crdtmerge.testing.demands``; the rows stand in ``models.ROWS`` and in the files ``rows_*.py``,
one a family.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from crdtmerge.strategies import registry
from crdtmerge.testing import check_strategy
from crdtmerge.testing.case import Case
from crdtmerge.testing.laws import ALONE, alone
from crdtmerge.testing.models import SHAPES
from tests.strategies import models
from tests.strategies.models import Row
from tests.strategies.test_laws import RAW as FIRST_RAW

ELSEWHERE: dict[str, str] = {"regmean_plus_plus": "strategies/test_layerwise.py"}
"""Strategies without a row here, and the test file that tries them: they run a program, which takes seconds."""

TABLES = [
    importlib.import_module(f"tests.strategies.{path.stem}") for path in sorted(Path(__file__).parent.glob("rows_*.py"))
]
ROWS: list[Row] = [*models.ROWS, *(row for table in TABLES for row in table.ROWS)]
Raw = dict[str, tuple[dict[str, Any], bool, bool, bool]]
RAW: Raw = FIRST_RAW | {case: said for table in TABLES for case, said in getattr(table, "RAW", {}).items()}

SMALL = {"matrix": {"weight": (4, 4)}, "small": SHAPES}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_it_keeps_every_law(row: Row) -> None:
    check_strategy(row.strategy, row.params, weights=row.weights, roles=row.roles, k=min(row.k, 3), random=row.random)


def test_there_is_a_row_for_every_strategy_or_a_reason_why_not() -> None:
    built_in, rows = set(registry.BUILT_IN), {row.strategy for row in ROWS}
    assert built_in == rows | set(ELSEWHERE)
    assert not rows & set(ELSEWHERE)
    for name in ELSEWHERE.values():
        assert (Path(__file__).parents[1] / name).exists(), name


def test_rows_say_what_their_strategies_need() -> None:
    for row in ROWS:
        needs = Case(registry.get(row.strategy), row.params).needs
        assert (set(needs.stats), set(needs.models)) == (set(row.stats), set(row.models)), str(row)


def test_every_strategy_of_two_models_has_a_row_of_raw_laws() -> None:
    needs = {row.strategy: Case(registry.get(row.strategy), row.params).needs for row in ROWS}
    of_two = {name for name, one in needs.items() if one.min_k <= 2 <= (one.max_k or 2)}
    assert {case.partition(" ")[0] for case in RAW} == of_two


@pytest.mark.parametrize("shapes", SMALL)
@pytest.mark.parametrize("case", RAW)
def test_alone_it_has_the_laws_of_the_table_and_no_others(case: str, shapes: str) -> None:
    params, *stated = RAW[case]
    found = alone(Case(registry.get(case.partition(" ")[0]), params), SMALL[shapes], trials=3)
    assert {law: one.holds for law, one in found.items()} == dict(zip(ALONE, stated, strict=True)), found
