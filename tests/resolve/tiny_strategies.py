"""Strategies for tests that read what no built-in one of theirs reads together, and the statistics of small models.

weighed     sum_i s_i x_i / sum_i s_i            s_i: the statistic ``curvature``
anchored    mean_i x_i + shift * anchor          shift: a number in the file ``shift``, in the plan
learnt      mean_i x_i + shift                   as if a model had been run for the plan
guessed     mean_i x_i                           class P
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Parameters
from crdtmerge.strategies.protocol import Needs, Plan, Rng, Strategy, Unit, View
from tests.resolve import models


def mean(xs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    total = torch.zeros_like(xs[0])
    for x in xs:
        total = total + x
    return total / len(xs)


class Weighed(Strategy[Parameters]):
    """sum_i s_i x_i / sum_i s_i."""

    name, version, family, reference = "weighed", 1, "elementwise", "a test"

    def needs(self, p: Parameters) -> Needs:
        return Needs(stats=("curvature",), compute="double")

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> torch.Tensor:
        above, below = torch.zeros_like(u.xs[0]), torch.zeros_like(u.xs[0])
        for x, s in zip(u.xs, u.stats["curvature"], strict=True):
            above, below = above + s * x, below + s
        return above / below


class Anchored(Strategy[Parameters]):
    """mean_i x_i + shift * anchor."""

    name, version, family, reference = "anchored", 1, "elementwise", "a test"
    plans = 0

    def needs(self, p: Parameters) -> Needs:
        return Needs(models=("anchor",), inputs=("shift",), plan="scan", compute="double")

    def plan(self, view: View, p: Callable[[str], Parameters], rng: Rng) -> Plan:
        Anchored.plans += 1
        return Plan({"shift": float(view.input("shift", 100).data)})

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> torch.Tensor:
        return mean(u.xs) + plan["shift"] * u.models["anchor"]


class Learnt(Strategy[Parameters]):
    """mean_i x_i + shift."""

    name, version, family, reference = "learnt", 1, "elementwise", "a test"
    found = 0.25

    def needs(self, p: Parameters) -> Needs:
        return Needs(plan="model", compute="double")

    def plan(self, view: View, p: Callable[[str], Parameters], rng: Rng) -> Plan:
        return Plan({"shift": Learnt.found})

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> torch.Tensor:
        return mean(u.xs) + plan["shift"]


class Guessed(Strategy[Parameters]):
    """mean_i x_i, said to be of class P."""

    name, version, family, reference = "guessed", 1, "elementwise", "a test"

    def needs(self, p: Parameters) -> Needs:
        return Needs(exact=False, compute="double")

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> torch.Tensor:
        return mean(u.xs)


MADE: dict[str, type[Strategy[Any]]] = {one.name: one for one in (Weighed, Anchored, Learnt, Guessed)}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make them known as if a package had brought them."""
    monkeypatch.setattr(registry, "_installed", lambda: dict.fromkeys(MADE))
    monkeypatch.setattr(registry, "_loaded", MADE.__getitem__)


def curvature(who: str) -> dict[str, torch.Tensor]:
    """A positive statistic for every float tensor of a small model."""
    return {
        name: models.numbers(f"curvature of {who}/{name}", x.numel()).abs().add(0.5).reshape(x.shape).float()
        for name, x in models.state(who).items()
        if x.is_floating_point()
    }


def saved(folder: Path, *people: str) -> tuple[list[Path], list[Path]]:
    """Models and their curvatures as files."""
    found = [models.save(folder / f"{who}.safetensors", models.state(who)) for who in people]
    return found, [models.save(folder / f"{who}.curvature.safetensors", curvature(who)) for who in people]
