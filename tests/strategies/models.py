"""Small models, and ways to merge them that lead past the set: a model may come twice, in any order, in any cut.

``merged`` runs a strategy's plan and the engine on state dicts in the order given; ``applied`` calls its plan and its
``apply`` on units cut anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from crdtmerge.testing import models as small
from crdtmerge.testing.models import Model, constant, identity
from crdtmerge.testing.prepared import SEED, Prepared, merged, metas, tensors, viewed
from tests.numerics.examples import STORED, same

__all__ = [
    "DEEP",
    "EACH",
    "ROWS",
    "SEED",
    "SHAPES",
    "SIGNED",
    "Model",
    "Prepared",
    "Row",
    "constant",
    "copied",
    "equal",
    "family",
    "identity",
    "merged",
    "metas",
    "model",
    "name_of",
    "tensors",
    "viewed",
]

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "bias": (37,),
    "weight": (11, 13),
}
"""What a small model holds: no dimension, no element, one element, one dimension, two."""


def model(number: int, dtype: str = "F32", **how: Any) -> dict[str, torch.Tensor]:
    """A model of normal numbers; ``around`` another one, if given."""
    return small.model(number, dtype, **({"shapes": SHAPES} | how))


def family(k: int, dtype: str = "F32", **how: Any) -> tuple[list[Model], Model]:
    """k models fine-tuned from a base, and the base."""
    return small.family(k, dtype, **({"shapes": SHAPES} | how))


def name_of(x: torch.Tensor) -> str:
    """The safetensors name of a tensor's dtype."""
    return next(name for name, dtype in STORED.items() if dtype == x.dtype)


def copied(one: Mapping[str, torch.Tensor]) -> Model:
    """The tensors of what a merge returned."""
    return {name: one[name].clone() for name in one}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two models have the same names, dtypes, shapes and bytes."""
    return set(one) == set(other) and all(same(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class Row:
    """One variant of a strategy that all general laws are tried with."""

    strategy: str
    params: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ("1", "0.1", "2.5", "0.75")
    random: bool = False
    stats: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    k: int = 4

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.params.items()]
        return " ".join([self.strategy, *said])


SIGNED = ("1", "-0.7", "2.5", "0.3")

ROWS = [
    Row("weight_average"),
    Row("linear"),
    Row("linear", {"normalize": False}, SIGNED),
    Row("slerp"),
    Row("slerp", {"space": "task_vectors"}),
    Row("slerp", {"reduce": "fold"}),
    Row("slerp", {"dot_threshold": "0.5"}),
    Row("task_arithmetic"),
    Row("task_arithmetic", {"lambda": "0.3"}, SIGNED),
    Row("ties"),
    Row("ties", {"scope": "tensor", "density": "0.37"}),
    Row("ties", {"density": 1, "elect": "count", "combine": "sum", "lambda": "-0.5"}),
    Row("ties", {"combine": "max", "elect": "count", "lambda": "0.7"}),
    Row("ties", {"density": "0.5", "combine": "sum"}),
    Row("dare", random=True),
    Row("dare", {"density": "0.7", "combine": "mean", "rescale": False}, random=True),
    Row("dare", {"density": "0.3333333333", "lambda": "0.3"}, SIGNED, random=True),
    Row("dare_ties", random=True),
    Row("dare_ties", {"density": "0.7", "elect": "count", "combine": "max", "lambda": "0.3"}, random=True),
    Row("dare_ties", {"density": "0.5", "combine": "sum", "rescale": False}, random=True),
    Row("magmax"),
    Row("magmax", {"lambda": "0.5"}, SIGNED),
]
"""What everything in test_block_invariance and the general laws of test_laws is tried with: strategies with kernels."""

DEEP = tuple(dict.fromkeys(row.strategy for row in ROWS))

EACH = pytest.mark.parametrize("row", ROWS, ids=str)
