"""The variants of the strategies on statistics of contributions that all general laws are tried with."""

from __future__ import annotations

from typing import Any

from tests.strategies.models import SIGNED, Row

IMPORTANCE = ("importance", "importance_base")

ROWS = [
    Row("fisher_merge", stats=("fisher",)),
    Row("fisher_merge", {"normalize": "model", "floor": "0.01"}, stats=("fisher",)),
    Row("fisher_merge", {"normalize": "tensor"}, stats=("fisher",)),
    Row("regression_mean", stats=("gram",)),
    Row("regression_mean", {"alpha": 1}, stats=("gram",)),
    Row("regression_mean", {"alpha": "0.1", "ridge": "0.01"}, stats=("gram",)),
    Row("led_merge", stats=IMPORTANCE),
    Row("led_merge", {"density": "0.3", "lambda": "0.7"}, SIGNED, stats=IMPORTANCE),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding; statistics belong to contents
    "fisher_merge": ({}, True, False, True),
    "fisher_merge normalised": ({"normalize": "model"}, True, False, True),
    "regression_mean": ({}, True, False, True),
    "led_merge": ({}, True, False, False),
}
