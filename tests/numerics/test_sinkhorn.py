"""Entropic transport against linear programs, closed forms and plain sweeps."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog

from crdtmerge.errors import InputError, ParameterError
from crdtmerge.numerics.sinkhorn import TOLERANCE, transport

Wide = NDArray[np.float64]


def least(cost: Wide, a: Wide, b: Wide) -> float:
    """The cost of the cheapest plan, by a linear program."""
    m, n = cost.shape
    marginals = np.zeros((m + n, m * n))
    for i in range(m):
        marginals[i, i * n : (i + 1) * n] = 1
    for j in range(n):
        marginals[m + j, j::n] = 1
    return float(linprog(cost.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b])).fun)


def drawn(seed: int) -> tuple[Wide, Wide, Wide]:
    rng = np.random.default_rng(seed)
    m, n = rng.integers(1, 9, 2)
    kinds = [rng.random((m, n)), rng.integers(0, 3, (m, n)).astype(float), np.zeros((m, n)), rng.normal(size=(m, n))]
    a, b = (rng.integers(1, 4, size).astype(float) for size in (m, n))
    return kinds[seed % 4], a, b


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_has_its_marginals_and_is_within_the_entropy_of_the_cheapest(seed: int) -> None:
    cost, a, b = drawn(seed)
    for epsilon in (1.0, 0.03, 0.0003):
        found = transport(cost, epsilon, a, b)
        off = np.abs(found.plan.sum(1) - a / a.sum()).sum() + np.abs(found.plan.sum(0) - b / b.sum()).sum()
        assert off <= 2 * TOLERANCE
        assert (found.plan >= 0).all()
        cheapest = least(cost, a / a.sum(), b / b.sum())
        paid = (found.plan * cost).sum()
        assert cheapest - 1e-8 <= paid <= cheapest + epsilon * np.log(cost.size) + 1e-8
        assert np.allclose(found.plan, np.exp((found.f[:, None] + found.g - cost) / epsilon), rtol=1e-9, atol=1e-300)


def test_at_a_large_epsilon_it_is_the_product_of_its_marginals() -> None:
    cost, a, b = drawn(4)
    found = transport(cost, 1e6, a, b).plan
    assert np.allclose(found, np.outer(a / a.sum(), b / b.sum()), rtol=0, atol=1e-6)


def test_of_equal_costs_it_is_the_product_at_any_epsilon() -> None:
    assert np.allclose(transport(np.full((3, 5), 7.0), 1e-3).plan, 1 / 15, rtol=0, atol=1e-12)


def test_of_symmetric_costs_it_is_symmetric() -> None:
    x = np.random.default_rng(1).random((6, 6))
    found = transport(x + x.T, 0.05).plan
    assert np.allclose(found, found.T, rtol=0, atol=1e-9)


def test_two_by_two_has_a_closed_form() -> None:
    """P_00 P_11 / (P_01 P_10) = exp(-(C_00 + C_11 - C_01 - C_10) / epsilon)."""
    cost, epsilon = np.array([[0.0, 0.7], [0.4, 0.3]]), 0.2
    root = np.exp(-(cost[0, 0] + cost[1, 1] - cost[0, 1] - cost[1, 0]) / (2 * epsilon))
    on = 0.5 * root / (1 + root)
    assert np.allclose(transport(cost, epsilon).plan, [[on, 0.5 - on], [0.5 - on, on]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [5, 32])
def test_at_a_small_epsilon_it_is_the_best_assignment(n: int) -> None:
    cost = np.random.default_rng(n).random((n, n))
    rows, columns = linear_sum_assignment(cost)
    wanted = np.zeros((n, n))
    wanted[rows, columns] = 1
    assert np.allclose(n * transport(cost, 1e-5).plan, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "epsilon"), [((20, 20), 0.03), ((24, 40), 0.01), ((40, 40), 0.01)])
def test_newton_steps_take_the_place_of_many_sweeps(shape: tuple[int, int], epsilon: float) -> None:
    cost = np.random.default_rng(0).random(shape)
    quick = transport(cost, epsilon)
    plain = transport(cost, epsilon, newton=False, sweeps_max=1000)
    assert np.allclose(quick.plan, plain.plan, rtol=0, atol=1e-8)
    assert plain.steps == 0
    assert plain.sweeps >= 100
    assert quick.sweeps <= 26
    assert 0 < quick.steps <= 8


def test_the_same_bits_again() -> None:
    cost = np.random.default_rng(2).random((17, 30))
    one, again = transport(cost, 0.01), transport(np.asfortranarray(cost), 0.01)
    assert one.plan.tobytes() == np.ascontiguousarray(again.plan).tobytes()


def test_what_cannot_be_done_is_a_sentence() -> None:
    cost = np.random.default_rng(3).random((4, 4))
    with pytest.raises(InputError, match="its marginals are off by"):
        transport(np.random.default_rng(0).random((20, 20)), 0.01, newton=False)
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ParameterError, match="epsilon"):
            transport(cost, epsilon)
    for marginal in (np.zeros(4), np.ones(3), np.array([1.0, 1, 1, np.nan])):
        with pytest.raises(ParameterError, match="4 positive numbers"):
            transport(cost, 1.0, marginal)
    for wrong in (np.full((2, 2), np.nan), np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(InputError, match="finite numbers"):
            transport(wrong, 1.0)
