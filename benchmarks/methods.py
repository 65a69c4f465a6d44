"""The merges that are measured: which models go in, and the same parameters in the words of each contestant.

RULES
- Parameters are what a user would write, and the same for all as far as each can be told. Where a contestant has no
  such merge its word is None, and the table has no row for it.
- `ties` trims each tensor by itself, as mergekit does; `ties (model)` is our default, which trims over the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One merge: its inputs and its parameters in each contestant's words."""

    name: str
    strategy: str  # ours and mergekit's name
    models: int
    base: bool
    ours: dict[str, str]
    mergekit_models: dict[str, float] | None  # parameters of each model
    mergekit_global: dict[str, float]
    plain: str | None
    published: str | None  # the name in crdt-merge

    def inputs(self) -> list[str]:
        """Return the names of the checkpoints that are read."""
        return [f"ft{number + 1}" for number in range(self.models)] + (["base"] if self.base else [])


METHODS = {
    method.name: method
    for method in (
        Method("linear", "linear", 3, False, {}, {"weight": 1.0}, {}, "linear", "weight_average"),
        Method("slerp", "slerp", 2, False, {"t": "0.5"}, {}, {"t": 0.5}, "slerp", "slerp"),
        Method(
            "task_arithmetic",
            "task_arithmetic",
            3,
            True,
            {"lambda": "0.5"},
            {"weight": 1.0},
            {"lambda": 0.5},
            "task_arithmetic",
            "task_arithmetic",
        ),
        Method(
            "ties",
            "ties",
            3,
            True,
            {"density": "0.2", "scope": "tensor"},
            {"weight": 1.0, "density": 0.2},
            {},
            "ties",
            "ties",
        ),
        Method("ties (model)", "ties", 3, True, {"density": "0.2", "scope": "model"}, None, {}, None, None),
        Method(
            "dare_ties",
            "dare_ties",
            3,
            True,
            {"density": "0.5"},
            {"weight": 1.0, "density": 0.5},
            {},
            "dare_ties",
            "dare_ties",
        ),
    )
}
