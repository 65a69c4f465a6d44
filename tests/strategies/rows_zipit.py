"""Variants of zipit that all general laws are tried with: those that run no program, on the symmetries of alignment."""

from __future__ import annotations

from typing import Any

from tests.strategies.models import Row

ROWS = [
    Row("zipit", {"method": "weights"}),
    Row("zipit", {"method": "weights", "alpha": "0.5", "beta": "0.5"}),
    Row("zipit", {"method": "weights", "alpha": 0, "beta": 1}),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "zipit": ({"method": "weights"}, True, False, True),
}
