"""``crdtmerge laws``: what it prints, what its document holds, how it ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from crdtmerge.numerics.lazy import torch
from crdtmerge.strategies.consensus import Ties
from crdtmerge.strategies.protocol import Plan, Rng, Unit
from crdtmerge.testing import laws as measuring
from tests.resolve.running import here


def test_it_prints_a_row_for_each_strategy_that_is_named() -> None:
    lines = here("laws", "ties", "magmax", "--trials", 2).out.splitlines()
    assert [line.split()[0] for line in lines] == ["alone", "strategy", "ties", "magmax"]
    assert re.fullmatch(r"ties +yes +no 0\.\d +no 0\.\d +yes +yes +yes +yes", lines[2])
    assert lines[3].split()[1:] == ["yes"] * 7


def test_its_document_holds_every_law_with_its_largest_deviation() -> None:
    document = here("laws", "slerp", "passthrough", "--dim", 3, "--trials", 2, "--json").json
    assert (document["dim"], document["trials"]) == (3, 2)
    slerp, passthrough = document["strategies"]
    assert set(slerp) == {"name", "class", "params", "alone", "through_the_set", "why"}
    assert (slerp["name"], slerp["class"], slerp["why"]) == ("slerp", "E", None)
    assert [law["holds"] for law in slerp["alone"].values()] == [True, False, True]
    assert slerp["alone"]["associative"]["deviation"] > 0.01
    assert slerp["through_the_set"] == {
        law: {"holds": True, "deviation": 0.0} for law in ("commutative", "associative", "idempotent", "convergent")
    }
    assert passthrough["alone"] is None
    assert "no function of two models" in passthrough["why"]


def test_a_seeded_measurement_is_the_same_again_and_grows_with_the_size() -> None:
    one, again, larger = (here("laws", "karcher", "--trials", 1, "--dim", n, "--json").json for n in (4, 4, 9))
    assert one == again
    assert one["strategies"] != larger["strategies"]


@pytest.mark.parametrize("name", ["fisher_merge", "regression_mean", "led_merge", "safe_merge", "nuslerp"])
def test_what_a_strategy_needs_is_made_for_it(name: str) -> None:
    (row,) = here("laws", name, "--trials", 1, "--json").json["strategies"]
    assert row["why"] is None
    assert row["alone"]["commutative"]["holds"]


def test_strategies_that_run_a_program_run_one_that_ships_with_the_command() -> None:
    (row,) = here("laws", "representation_surgery", "--trials", 1, "--json").json["strategies"]
    assert (row["params"], row["class"], row["why"]) == ({"steps": 4}, "P", None)
    assert [law["holds"] for law in row["alone"].values()] == [True, True, False]
    assert all(law["holds"] for law in row["through_the_set"].values())


@pytest.mark.parametrize("arguments", [[], ["ties", "--all"], ["tis"], ["ties", "--dim", "0"]], ids=str)
def test_a_wrong_request_ends_with_2(arguments: list[str]) -> None:
    ran = here("laws", *arguments)
    assert ran.code == 2
    assert ran.err


class Forgetful(Ties):
    """Depends on how often it was called."""

    calls = 0

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        type(self).calls += 1
        return super().apply(u, plan, p, rng) + type(self).calls

    def program(self, *given: Any) -> None:
        return None


def test_a_law_of_the_set_that_fails_is_told_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crdtmerge.strategies.registry.get", lambda name: Forgetful())
    ran = here("laws", "ties", "--trials", 1)
    assert ran.code == 1
    assert ran.out.split()[-4:] == ["NO"] * 4


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Ties):
        def needs(self, p: Any) -> Any:
            return super().needs(p)._replace(inputs=("oracle",))

    monkeypatch.setattr("crdtmerge.strategies.registry.get", lambda name: Hungry())
    (row,) = here("laws", "ties", "--json").json["strategies"]
    assert (row["alone"], row["through_the_set"], row["why"]) == (None, None, "needs inputs: oracle")


def test_all_means_every_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    from crdtmerge.strategies import registry

    def none(names: list[str], **how: Any) -> Iterator[measuring.Measured]:
        yield from (replace(measuring.Measured("", True), strategy=name, why="skipped") for name in names)

    monkeypatch.setattr(measuring, "measured", none)
    assert [row["name"] for row in here("laws", "--all", "--json").json["strategies"]] == registry.names()
