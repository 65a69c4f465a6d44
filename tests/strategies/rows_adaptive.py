"""Variants of adaptive strategies and searches that all general laws are tried with: those that run no program.

What they learn is tried in test_adaptive_family, test_search_family and tests/programs.
"""

from __future__ import annotations

from typing import Any

from tests.strategies.models import SIGNED, Row

ROWS = [
    Row("ada_merging", {"steps": 0}),
    Row("ada_merging", {"steps": 0, "tau_preprocess": "ties", "init": "0.7"}),
    Row("dam", {"steps": 0}),
    Row("adarank", {"steps": 0}),
    Row("adarank", {"steps": 0, "variant": "cart", "rank_ratio": "0.3"}),
    Row("representation_surgery", {"steps": 0}, SIGNED),
    Row("representation_surgery", {"steps": 0, "inner": "ties", "settings": "density=0.5"}),
    Row("evolutionary_merge", {"generations": 0}),
    Row("evolutionary_merge", {"generations": 0, "inner": "dare_ties"}, random=True),
    Row("genetic_merge", {"generations": 0}),
    Row("genetic_merge", {"generations": 0, "inner": "linear"}, SIGNED),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "ada_merging": ({"steps": 0}, True, False, False),
    "dam": ({"steps": 0}, True, False, True),
    "adarank": ({"steps": 0, "rank_ratio": "0.3"}, True, False, False),
    "representation_surgery": ({"steps": 0}, True, True, False),
    "evolutionary_merge": ({"generations": 0, "settings": "density=0.5"}, True, False, False),
    "genetic_merge": ({"generations": 0}, True, False, True),
}
