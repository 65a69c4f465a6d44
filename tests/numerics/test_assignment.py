"""The best assignment against all permutations, against scipy on the scores as they are, and against exact integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from crdtmerge.errors import MismatchError
from crdtmerge.numerics.assignment import BITS, SIZE_MAX, best_assignment, integers


def gain(scores: NDArray[np.float64], p: NDArray[np.int64]) -> float:
    return float(scores[np.arange(len(p)), p].sum())


@pytest.mark.parametrize("size", range(7))
def test_no_permutation_does_better(size: int) -> None:
    rng = np.random.default_rng(size)
    for kind in range(20):
        scores = rng.integers(-3, 4, (size, size)).astype(float) if kind % 2 else rng.standard_normal((size, size))
        found = best_assignment(scores)
        assert sorted(found) == list(range(size))
        best = max(gain(scores, np.array(p, int)) for p in itertools.permutations(range(size)))
        assert gain(scores, found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("size", [10, 33, 64])
def test_it_is_that_of_the_scores_as_floats(size: int) -> None:
    rng = np.random.default_rng(size)
    for scale in (1e-300, 1.0, 1e300):
        scores = rng.standard_normal((size, size)) * scale
        _, theirs = linear_sum_assignment(scores, maximize=True)
        assert (best_assignment(scores) == theirs).all()


def test_no_cycle_of_exchanges_gains_anything_in_exact_integers() -> None:
    """The certificate of optimality: longest walks in the graph of exchanges, in int64, where every cycle is <= 0."""
    rng = np.random.default_rng(3)
    size = 48
    for scores in (rng.integers(0, 1 << BITS, (size, size)).astype(float), -np.exp(30 * rng.random((size, size)))):
        whole = integers(scores).astype(np.int64)
        p = best_assignment(scores)
        walk = whole[:, p] - whole[np.arange(size), p][:, None]
        for k in range(size):
            walk = np.maximum(walk, walk[:, k, None] + walk[None, k, :])
        assert np.diagonal(walk).max() <= 0


def test_scores_become_whole_numbers_of_at_most_38_bits() -> None:
    for top in (1.0, np.nextafter(1.0, 0), 1e-310, 1.7e308, 3.0):
        whole = integers(np.array([[top, -top / 3], [0.0, top / 2]]))
        assert (whole == np.rint(whole)).all()
        assert 2 ** (BITS - 1) <= np.abs(whole).max() <= 2**BITS
    assert not integers(np.zeros((3, 3))).any()


def test_a_power_of_two_changes_nothing() -> None:
    scores = np.random.default_rng(5).standard_normal((40, 40))
    assert (best_assignment(scores) == best_assignment(scores * 2.0**-500)).all()


def test_what_is_held_stays_unless_another_is_better() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    for held in (np.array([0, 1, 2]), np.array([1, 0, 2])):
        assert best_assignment(scores, held) is held
    assert best_assignment(scores, np.array([2, 1, 0])).tolist() in ([0, 1, 2], [1, 0, 2])


def test_a_known_answer_where_many_are_equally_good() -> None:
    """A version of scipy that decides otherwise would change merges: this is where it shows."""
    scores = np.array([[(i * j) % 3 for j in range(8)] for i in range(8)], float)
    assert best_assignment(scores).tolist() == KNOWN
    assert best_assignment(np.zeros((5, 5))).tolist() == [0, 1, 2, 3, 4]


KNOWN = [0, 2, 1, 3, 5, 4, 6, 7]


def test_too_many_units_are_refused() -> None:
    side = SIZE_MAX + 1
    with pytest.raises(MismatchError, match="8193 units"):
        best_assignment(np.broadcast_to(np.float64(0), (side, side)))
