"""Without mergekit: our outputs are those that were held against it, and they are what the equations say.

golden.json was written by ``python -m tests.differential.comparing golden`` after ``make differential`` had passed.
"""

from __future__ import annotations

import json

import pytest

from tests.differential.cases import CASES, UNPUBLISHED, Case
from tests.differential.comparing import GOLDEN, RANKED_SHARE_MAX, available, distance, exact, ours, values
from tests.differential.models import DTYPES

STORED: dict[str, str] = json.loads(GOLDEN.read_text())

EVERY = pytest.mark.parametrize("case", [*CASES, *UNPUBLISHED], ids=lambda case: case.name)


def test_every_case_is_stored_and_all_differ() -> None:
    assert set(STORED) == {f"{case.name} {dtype}" for case in [*CASES, *UNPUBLISHED] for dtype in DTYPES}
    assert len(set(STORED.values())) == len(STORED)
    assert available(CASES) == CASES


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_gives_the_stored_digest(case: Case, dtype: str) -> None:
    assert ours(case, dtype).receipt.output_digest.hex()[:32] == STORED[f"{case.name} {dtype}"]


@EVERY
def test_a_merge_in_f32_is_the_equation_in_float64(case: Case) -> None:
    """One rounding: 2^-24 of the value; where elements are ranked, as many may fall on the other side of a cut."""
    apart = distance(exact(case, "F32"), values(ours(case, "F32")))
    assert apart.beyond <= (RANKED_SHARE_MAX if case.ranked else 0.0)
    assert apart.mean <= 2e-9
    if not case.ranked:
        assert apart.largest <= 1.2e-7
