"""Variants of alignment that all general laws are tried with: those that run no program.

Dimensions of one size are reordered together there, which is no network's symmetry but obeys the same rules. What
activations do is tried in tests/programs.
"""

from __future__ import annotations

from typing import Any

from tests.strategies.models import SIGNED, Row

ROWS = [
    Row("aligned"),
    Row("aligned", {"inner": "ties", "settings": "density=0.5"}),
    Row("aligned", {"inner": "task_arithmetic", "sweeps": 1}, SIGNED),
    Row("aligned", {"inner": "fisher_merge"}, stats=("fisher",)),
    Row("aligned", {"inner": "dare"}, random=True),
    Row("dimat", {"method": "weights"}),
    Row("rebasin", {"onto": "base"}),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "aligned": ({}, True, False, True),
    "dimat": ({"method": "weights"}, True, False, True),
    "rebasin": ({}, True, False, True),
}
