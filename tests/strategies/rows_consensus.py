"""What the general laws of strategies are tried with in the families of composed, masking and forgetting strategies."""

from __future__ import annotations

from typing import Any

from tests.strategies.models import Row

SIGNED = ("1", "-0.7", "2.5", "0.3")

ROWS = [
    Row("dare_linear", random=True),
    Row("dare_linear", {"density": "0.4", "lambda": "0.3"}, SIGNED, random=True),
    Row("della", random=True),
    Row("della", {"density": "0.5", "epsilon": "0.3", "elect": "count", "combine": "max"}, random=True),
    Row("della", {"density": "0.4", "epsilon": 0, "rescale": False, "combine": "sum"}, random=True),
    Row("della_linear", random=True),
    Row("della_linear", {"density": "0.5", "epsilon": "0.25", "lambda": "0.5"}, SIGNED, random=True),
    Row("della_linear", {"combine": "mean"}, random=True),
    Row("model_breadcrumbs"),
    Row("model_breadcrumbs", {"drop_low": "0.3", "drop_high": "0.2", "lambda": "0.4"}, SIGNED),
    Row("model_breadcrumbs", {"drop_low": 0, "drop_high": 0}),
    Row("breadcrumbs", {"drop_low": "0.3", "drop_high": "0.2"}),
    Row("breadcrumbs_ties"),
    Row("breadcrumbs_ties", {"drop_low": "0.25", "drop_high": "0.1", "elect": "count", "combine": "sum"}),
    Row("sce"),
    Row("sce", {"density": "0.6", "lambda": "0.7"}),
    Row("sce", {"density": 1}),
    Row("emr"),
    Row("consensus_ta"),
    Row("consensus_ta", {"lambda_mask": "0.2", "k_thr": 1, "lambda": "0.5"}, SIGNED),
    Row("lines"),
    Row("lines", {"alpha": "0.25", "beta": "-0.1", "layer": "b#."}, SIGNED),
    Row("negative_merge"),
    Row("negative_merge", {"consensus": "0.5", "lambda": "0.3"}),
    Row("negative_merge", {"lambda_task": "0.7"}, roles=("task", "forget", "forget", "task")),
    Row("split_unlearn_merge"),
    Row("split_unlearn_merge", {"tvn_lambda": "0.5"}, roles=("forget", "unlearned", "task", "forget")),
    Row("split_unlearn_merge", {"inner": "task_arithmetic", "lambda": "0.5"}, roles=("forget",) * 4),
    Row("passthrough", k=1),
    Row("passthrough", {"scale": "-0.3"}, k=1),
    Row("nearswap"),
    Row("nearswap", {"threshold": "0.2"}),
    Row("ram"),
    Row("ram", {"epsilon": "0.2", "r": "0.1"}),
    Row("ram", {"epsilon": "0.3", "r": 2, "alpha": "0.9", "scope": "tensor"}),
    Row("ramplus_tl", {"epsilon": "0.2"}),
    Row("stages"),
    Row("stages", {"sparsify": "magnitude", "elect": "count", "combine": "max", "density": "0.4"}),
    Row("stages", {"sparsify": "magnitude", "scope": "tensor", "combine": "mean"}),
    Row("stages", {"sparsify": "band", "elect": "sum", "combine": "mean", "drop_low": "0.4", "lambda": "0.5"}),
    Row("stages", {"sparsify": "bernoulli", "elect": "sum", "density": "0.6"}, random=True),
    Row("stages", {"sparsify": "magprune", "combine": "max", "density": "0.5"}, random=True),
    Row("stages", {"sparsify": "magnitude", "elect": "sum", "combine": "mean", "scale": "lines"}),
    Row("stages", {"scale": "lines", "alpha": "0.3", "beta": 1, "combine": "max"}, SIGNED),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "dare_linear": ({"density": "0.5"}, True, False, False),
    "della": ({"density": "0.5"}, True, False, False),
    "della_linear": ({"density": "0.5"}, True, False, False),
    "model_breadcrumbs": ({}, True, False, False),
    "breadcrumbs": ({}, True, False, False),
    "breadcrumbs_ties": ({}, True, False, False),
    "sce": ({"density": "0.5"}, True, False, False),
    "sce of all positions": ({"density": 1}, True, False, True),
    "emr": ({}, True, True, True),
    "consensus_ta": ({}, True, False, False),
    "consensus_ta at threshold 0": ({"k_thr": 0}, True, True, False),  # task arithmetic
    "lines": ({}, True, False, True),  # one half of the sum of two, as long as no name has a layer
    "lines at 0.3": ({"alpha": "0.3"}, True, False, False),
    "negative_merge": ({}, True, False, False),
    "split_unlearn_merge": ({"density": "0.5"}, True, False, False),
    "nearswap": ({}, True, False, False),
    "nearswap of a wide threshold": ({"threshold": 100}, True, False, True),
    "ram": ({"epsilon": "0.1"}, True, False, False),
    "ramplus_tl": ({"epsilon": "0.1"}, True, False, False),
    "stages": ({}, True, True, False),  # task arithmetic
}
"""Passthrough takes one model: none of the laws of two can be asked of it."""
