"""Variants of the robust rules that all general laws are tried with, and their raw laws for two and three models."""

from __future__ import annotations

from typing import Any

from tests.strategies.models import Row

EQUAL = ("1", "1", "1", "1")
"""These rules count every contribution once and refuse unequal weights."""

ROWS = [
    Row("median", weights=EQUAL),
    Row("median", {"before": "nnm"}, EQUAL),
    Row("trimmed_mean", weights=EQUAL),
    Row("trimmed_mean", {"byzantine": 0}, EQUAL),
    Row("meamed", weights=EQUAL),
    Row("meamed", {"before": "nnm"}, EQUAL),
    Row("krum", weights=EQUAL),
    Row("krum", {"before": "nnm"}, EQUAL),
    Row("multi_krum"),
    Row("mda"),
    Row("mda", {"before": "nnm"}, EQUAL),
    Row("nna"),
    Row("nna", {"byzantine": 0}),
    Row("geometric_median", weights=EQUAL),
    Row("geometric_median", {"iterations": 7, "smoothing": "0.1", "before": "nnm"}, EQUAL),
    Row("centered_clip", weights=EQUAL),
    Row("centered_clip", {"start": "medoid", "radius": "0.5", "iterations": 2}, EQUAL),
    Row("centered_clip", {"before": "nnm"}, EQUAL),
]
"""Without bucketing, whose few ways to cut three contributions often agree for two seeds: see test_robust_family."""

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding; of two most rules are the mean
    "median": ({}, True, False, True),
    "trimmed_mean": ({}, True, False, True),
    "meamed": ({}, True, False, True),
    "krum": ({}, True, True, True),  # of two: the one with the lower content id
    "multi_krum": ({}, True, False, True),
    "mda": ({}, True, False, True),
    "nna": ({}, True, False, True),
    "geometric_median": ({}, True, False, True),
    "centered_clip": ({}, True, False, True),
}
