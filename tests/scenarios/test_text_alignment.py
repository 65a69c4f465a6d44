"""Two transformers trained apart on Python's help: turning their streams and heads takes down most of the barrier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "dimat_text.py"


def figures(*given: str) -> dict[str, float]:
    """What the example prints, run as it is."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *given, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["A10"]
    row: dict[str, float] = found["A10"]
    assert row["ratio"] == pytest.approx(row["orthogonal"] / row["plain"], abs=1e-3)
    return row


def test_after_a_few_steps() -> None:
    row = figures("--seeds", "1", "--steps", "20")
    assert row["ends"] < 3.3, "of 94 bytes, log 94 = 4.5 nats before training"
    assert row["plain"] > 0.1
    assert row["ratio"] <= 0.5
    assert row["orthogonal"] < row["permutations"]


@pytest.mark.soak
def test_of_three_seeds_the_aligned_barrier_is_at_most_half_of_the_plain_one() -> None:
    row = figures("--seeds", "3")
    assert row["ends"] < 1.8
    assert row["plain"] > 0.8
    assert row["ratio"] <= 0.5
    assert row["orthogonal"] < row["permutations"]
