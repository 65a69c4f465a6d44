"""The weight of a contribution against fractions worked by hand, and FedAU's history against its algorithm."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtmerge.errors import UsageError
from crdtmerge.train.facts import Facts
from crdtmerge.train.weighing import Weighing, gap, participation, power

A, B = b"a" * 32, b"b" * 32


def test_each_factor_by_hand() -> None:
    facts = {A: Facts(7, 100, 18), B: Facts(4, 300, 6)}
    assert Weighing().weights(facts, now=7) == {A: 1, B: 1}
    assert Weighing(examples=1).weights(facts, now=7) == {A: 100, B: 300}
    assert Weighing(examples="0.5").weights({A: Facts(7, 16)}, now=7) == {A: 4}
    assert Weighing(steps=1).weights(facts, now=7) == {A: 18, B: 6}
    assert Weighing(staleness=2).weights(facts, now=7) == {A: 1, B: Fraction(1, 16)}
    assert Weighing(staleness=1).weights(facts, now=3) == {A: 1, B: 1}, "who is ahead is not behind"
    assert Weighing(reputation={B: "0.25"}).weights(facts, now=7) == {A: 1, B: Fraction(1, 4)}
    assert Weighing(gap=True).weights(facts, now=7, gaps={B: gap(3.0, 2.0)}) == {A: 1, B: Fraction(2, 5)}
    rounds = {A: [1, 3, 5, 7], B: [4]}
    assert Weighing(participation=3).weights(facts, now=7, history=rounds) == {A: 2, B: Fraction(8, 3)}


def test_all_factors_at_once() -> None:
    rule = Weighing(examples=1, steps=1, staleness=1, participation=50, gap=True, reputation={A: "0.5"})
    found = rule.weights({A: Facts(2, 10, 3)}, now=5, history={A: [0, 2]}, gaps={A: Fraction(1)})
    assert found == {A: Fraction(10 * 3, 4) * Fraction(3, 2) * Fraction(1, 2) * Fraction(1, 2)}


def fedau(rounds: set[int], now: int, cutoff: int) -> Fraction:
    """Algorithm 2 of the paper, step by step."""
    intervals, since = [], 0
    for number in range(now + 1):
        since += 1
        if number in rounds or since == cutoff:
            intervals.append(since)
            since = 0
    return Fraction(sum(intervals), len(intervals)) if intervals else Fraction(1)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 40)), st.integers(0, 45), st.integers(1, 12))
def test_participation_is_the_algorithm_of_the_paper(rounds: set[int], now: int, cutoff: int) -> None:
    assert participation(rounds, now, cutoff) == fedau(rounds, now, cutoff)


def test_a_history_of_a_great_many_rounds_takes_no_time() -> None:
    assert participation([1 << 31], 1 << 31, 50) < 51


@pytest.mark.parametrize(
    "wrong",
    [
        {"examples": -1},
        {"examples": 5},
        {"examples": "many"},
        {"staleness": float("nan")},
        {"participation": 0},
        {"participation": True},
        {"reputation": {A: -1}},
        {"reputation": {A: "good"}},
    ],
)
def test_what_is_no_rule_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Weighing(**wrong)  # type: ignore[arg-type]


def test_powers() -> None:
    assert power(7, 0) == 1
    assert power(10, 4) == 10000
    assert abs(power(2, "0.5") ** 2 - 2) < Fraction(1, 10**15)
    assert gap(5.0, 0.0) == 0
