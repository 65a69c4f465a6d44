"""The merges that are compared: the same one in our words, in mergekit's, and as an equation.

RULES
- A case is a deterministic method of mergekit 0.1.4 with parameters that mean the same in both. What means something
  else on purpose is no case; test_differential shows each such deviation by itself.
- ``ranked`` says that elements are selected by rank: a few may fall on the other side of a cut.
- densities and gammas are binary fractions, so that both count the same elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.differential import oracle

NEAR = ("ft1", "ft2", "ft3")
FAR = ("far1", "far2", "far3")

Equation = Callable[..., oracle.Array]


@dataclass(frozen=True)
class Case:
    """One merge. ``each`` are mergekit's parameters of every model beside the weight, ``common`` those of the merge."""

    name: str
    strategy: str
    equation: Equation
    ours: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = NEAR
    weights: tuple[float, ...] = ()
    base: bool = True
    method: str = ""  # mergekit's name; ours where empty
    each: Mapping[str, Any] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    ranked: bool = False
    weightless: bool = False  # mergekit takes no weights
    parameters: str = ""  # as the table shows them

    @property
    def claimed(self) -> tuple[float, ...]:
        """The weight of each model."""
        return self.weights or (1.0,) * len(self.models)

    def config(self, folder: str, dtype: str) -> dict[str, Any]:
        """The merge as a configuration of mergekit, models in a folder."""
        models = [
            {"model": f"{folder}/{who}", "parameters": {**self.each, **({} if self.weightless else {"weight": weight})}}
            for who, weight in zip(self.models, self.claimed, strict=True)
        ]
        config: dict[str, Any] = {"merge_method": self.method or self.strategy, "models": models, "dtype": dtype}
        if self.common:
            config["parameters"] = dict(self.common)
        if self.base:
            config["base_model"] = f"{folder}/base"
        elif self.strategy == "slerp":
            config["base_model"] = f"{folder}/{self.models[0]}"
        return config


TASK = {"space": "task_vectors"}
TWO, FAR_TWO = NEAR[:2], FAR[:2]
UNEVEN = (1.0, 0.75, 0.5)
"""Binary fractions: where weighted votes cancel exactly, they do so in every arithmetic."""


def _slerp(models: tuple[str, ...], t: float, label: str) -> Case:
    equation = partial(oracle.slerp, t=t)
    said: dict[str, Any] = {"ours": {"t": t}, "common": {"t": t}, "parameters": f"t={t}"}
    return Case(f"slerp {label}", "slerp", equation, models=models, base=False, weightless=True, **said)


def _ties(density: float, scale: float, weights: tuple[float, ...]) -> Case:
    return Case(
        f"ties {density}",
        "ties",
        partial(oracle.ties, density=density, scale=scale),
        {"density": density, "lambda": scale, "scope": "tensor"},
        weights=weights,
        each={"density": density},
        common={"lambda": scale},
        ranked=density < 1,
        parameters=f"density={density}, lambda={scale}" + (", weights 1, 0.5, 0.25" if weights else ""),
    )


def _nuslerp(label: str, models: tuple[str, ...], *, base: bool, rows: str = "") -> Case:
    granularity = {"": "tensor", "last": "row", "first": "column"}[rows]
    common = {"nuslerp_flatten": not rows, "nuslerp_row_wise": rows == "first"}
    return Case(
        f"nuslerp {label}",
        "nuslerp",
        partial(oracle.nuslerp, rows=rows),
        {"granularity": granularity} | (TASK if base else {}),
        models=models,
        weights=(1.0, 3.0),
        base=base,
        common=common,
        parameters=f"{granularity}, weights 1 and 3" + (", base" if base else ""),
    )


def _multislerp(label: str, models: tuple[str, ...], *, base: bool) -> Case:
    ours = TASK if base else {}
    said = "weights 1, 0.75, 0.5" + (", base" if base else "")
    equation = oracle.multislerp
    return Case(
        f"multislerp {label}", "multislerp", equation, ours, models=models, weights=UNEVEN, base=base, parameters=said
    )


def _karcher(label: str, models: tuple[str, ...]) -> Case:
    return Case(
        f"karcher {label}",
        "karcher",
        partial(oracle.karcher, steps=10, tolerance=1e-5),
        {"max_iter": 10, "tolerance": 1e-5},
        models=models,
        base=False,
        weightless=True,
        parameters="max_iter=10, tolerance=1e-5",
    )


def _breadcrumbs(strategy: str, method: str) -> Case:
    density, gamma = 0.75, 0.03125
    combine = {"combine": "sum"} if method.endswith("ties") else {}  # mergekit's normalize is false here
    return Case(
        method,
        strategy,
        partial(oracle.breadcrumbs, density=density, gamma=gamma, scale=0.5, elect=method.endswith("ties")),
        {"drop_low": 1 - density - gamma, "drop_high": gamma, "lambda": 0.5} | combine,
        weights=UNEVEN,
        method=method,
        each={"density": density, "gamma": gamma},
        common={"lambda": 0.5},
        ranked=True,
        parameters=f"density={density}, gamma={gamma}, lambda=0.5, weights 1, 0.75, 0.5",
    )


CASES = [
    Case("linear", "linear", oracle.linear, base=False, parameters="equal weights"),
    Case(
        "linear sum",
        "linear",
        partial(oracle.linear, normalize=False),
        {"normalize": False},
        weights=(0.5, 1.25, -0.3),
        base=False,
        common={"normalize": False},
        parameters="normalize=false, weights 0.5, 1.25, -0.3",
    ),
    Case(
        "passthrough",
        "passthrough",
        partial(oracle.passthrough, scale=0.3),
        {"scale": 0.3},
        models=NEAR[:1],
        base=False,
        each={"scale": 0.3},
        weightless=True,
        parameters="scale=0.3",
    ),
    _slerp(TWO, 0.3, "near"),
    _slerp(FAR_TWO, 0.3, "far"),
    _nuslerp("near", TWO, base=False),
    _nuslerp("far", FAR_TWO, base=False),
    _nuslerp("base", TWO, base=True),
    _nuslerp("rows", FAR_TWO, base=False, rows="last"),
    _nuslerp("columns", FAR_TWO, base=False, rows="first"),
    _multislerp("near", NEAR, base=False),
    _multislerp("far", FAR, base=False),
    _multislerp("base", NEAR, base=True),
    _karcher("near", NEAR),
    _karcher("far", FAR),
    Case(
        "task_arithmetic",
        "task_arithmetic",
        partial(oracle.task_arithmetic, scale=0.5),
        {"lambda": 0.5},
        weights=UNEVEN,
        common={"lambda": 0.5},
        parameters="lambda=0.5, weights 1, 0.75, 0.5",
    ),
    _ties(0.25, 1.0, ()),
    _ties(0.5, 0.7, (1.0, 0.5, 0.25)),
    _ties(1.0, 1.0, ()),
    _breadcrumbs("model_breadcrumbs", "breadcrumbs"),
    _breadcrumbs("breadcrumbs_ties", "breadcrumbs_ties"),
    Case("model_stock", "model_stock", oracle.model_stock, {"epsilon": 1e-6}, weightless=True),
    Case(
        "sce",
        "sce",
        partial(oracle.sce, select_topk=0.5),
        {"density": 0.5},
        common={"select_topk": 0.5},
        weightless=True,
        ranked=True,
        parameters="select_topk=0.5",
    ),
    Case(
        "nearswap",
        "nearswap",
        partial(oracle.nearswap, t=0.0005),
        {"threshold": 0.0005},
        models=NEAR[:1],
        common={"t": 0.0005},
        weightless=True,
        parameters="t=0.0005",
    ),
    Case("arcee_fusion", "arcee_fusion", oracle.arcee_fusion, models=FAR[:1], weightless=True, ranked=True),
]
"""Every deterministic method that mergekit 0.1.4 registers, each with the variants that take another path."""

UNPUBLISHED = [
    Case("ram", "ram", oracle.ram),
    Case("ramplus_tl", "ram", partial(oracle.ram, r=0.1, epsilon=3e-4), {"r": 0.1, "scope": "tensor", "epsilon": 3e-4}),
]
"""Methods of mergekit's repository that 0.1.4 lacks: held against the equation alone."""

RANDOM = {"dare_linear": "dare", "dare_ties": "dare_ties", "della": "della", "della_linear": "della_linear"}
"""The methods that draw random masks, and their names here: compared by properties."""
