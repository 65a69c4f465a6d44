"""The variants of the strategies on whole matrices that all general laws are tried with."""

from __future__ import annotations

from typing import Any

from tests.strategies.models import Row

ROWS = [
    Row("star"),
    Row("star", {"eta": "1", "lambda": "0.7"}),
    Row("star", {"dense": "lapack"}),
    Row("svd_truncate"),
    Row("svd_truncate", {"keep": "rank", "share": "0.3", "combine": "sum"}),
    Row("iso_c"),
    Row("iso_cts"),
    Row("iso_cts", {"common": "0.5"}),
    Row("tsv_m"),
    Row("svd_knot_tying"),
    Row("svd_knot_tying", {"concat": "out", "density": "0.5", "lambda": "1"}),
    Row("svd_knot_tying", {"inner": "task_arithmetic"}),
    Row("wudi"),
    Row("wudi", {"solver": "exact"}),
    Row("wudi", {"time": "3", "dense": "lapack"}),
    Row("dual_projection"),
    Row("dual_projection", {"solver": "exact", "energy": "1"}),
    Row("dual_projection", {"mode": "sequential", "energy": "0.9"}),
    Row("dual_projection", {"space": "u", "energy": "0.8"}),
    Row("dual_projection", {"space": "v", "time": "2"}),
    Row("safe_merge", models=("aligned", "unaligned"), roles=("task", "safety", "task", "task")),
    Row(
        "safe_merge",
        {"threshold": "0.9", "combine": "sum", "alpha": "0.5"},
        models=("aligned", "unaligned"),
        roles=("safety", "task", "task", "safety"),
    ),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "star": ({}, True, False, False),
    "star without truncation": ({"eta": "1"}, True, False, True),
    "svd_truncate": ({}, True, False, False),
    "iso_c": ({}, True, False, False),
    "iso_cts": ({}, True, False, False),
    "tsv_m": ({}, True, False, False),
    "svd_knot_tying": ({}, True, False, False),
    "svd_knot_tying by sums": ({"inner": "task_arithmetic", "lambda": "1"}, True, True, False),
    "wudi": ({}, True, False, False),
    "dual_projection": ({}, True, False, True),
    "dual_projection one by one": ({"mode": "sequential"}, False, False, True),
    "safe_merge": ({}, True, False, True),  # no layer of these falls below the threshold
    "safe_merge with every gate open": ({"threshold": "1.5"}, True, False, False),
}
