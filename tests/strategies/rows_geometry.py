"""The variants of the strategies on each tensor's geometry that all general laws are tried with."""

from __future__ import annotations

from typing import Any

from tests.strategies.models import Row

ROWS = [
    Row("karcher"),
    Row("karcher", {"space": "task_vectors", "max_iter": 10, "tolerance": "1e-5"}),
    Row("nuslerp", k=2),
    Row("nuslerp", {"space": "task_vectors"}, k=2),
    Row("nuslerp", {"granularity": "row"}, k=2),
    Row("nuslerp", {"granularity": "column", "space": "task_vectors"}, k=2),
    Row("multislerp"),
    Row("multislerp", {"space": "task_vectors"}),
    Row("multislerp", {"normalize": False}),
    Row("model_stock"),
    Row("model_stock", {"filter_wise": True}),
    Row("model_stock", {"epsilon": "1e-6"}),
    Row("weight_scope_alignment"),
    Row("weight_scope_alignment", {"target": "rms", "restore_scope": True}),
    Row("weight_scope_alignment", {"target": "median", "vectors": True}),
    Row("weight_scope_alignment", {"target": "base", "restore_scope": True}),
    Row("arcee_fusion"),
    Row("arcee_fusion", {"spread": "0.5"}),
]

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "karcher": ({}, True, False, True),
    "nuslerp": ({}, True, False, True),
    "nuslerp by rows": ({"granularity": "row"}, True, False, True),
    "multislerp": ({}, True, False, True),
    "model_stock": ({}, True, False, True),
    "model_stock by rows": ({"filter_wise": True}, True, False, True),
    "weight_scope_alignment": ({}, True, False, True),
    "weight_scope_alignment restored": ({"restore_scope": True}, True, False, True),
    "arcee_fusion": ({}, True, False, False),
}
