"""The best permutation for a matrix of scores: linear assignment in integers, the same on every machine.

    p = argmax over permutations of sum_i S[i, p[i]],  S the scores times a power of two, rounded to whole numbers

Shortest augmenting paths with potentials (Crouse, IEEE Trans. Aerosp. Electron. Syst. 52, 2016, as scipy has it) add
and subtract costs only. Costs are integers in [0, 2^39] here, and the total of the potentials, which the cost of the
assignment bounds, is at most n 2^39 <= 2^52 for n <= 2^13: every number is an integer that float64 holds exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError

Permutation = NDArray[np.int64]

SIZE_MAX = 1 << 13

BITS = 38
"""Scores are whole numbers of at most 2^38 in magnitude: they count to one part in 2^38 of the largest."""


def best_assignment(scores: NDArray[np.float64], held: Permutation | None = None) -> Permutation:
    """The permutation p that maximises sum_i scores[i, p[i]] of float64 [n, n]; int64 [n].

    ``held`` is given back unless another one's sum is greater by more than the scores' rounding; of several that are
    greatest otherwise, the algorithm takes one: rows are placed in their order, each by a shortest path. Raises
    MismatchError for n > 8192.

    >>> best_assignment(np.array([[1.0, 5.0], [4.0, 6.0]]))
    array([1, 0])
    >>> best_assignment(np.zeros((3, 3)), held=np.array([2, 0, 1]))
    array([2, 0, 1])
    """
    from scipy.optimize import linear_sum_assignment

    size = len(scores)
    assert scores.shape == (size, size), "scores are square"
    if size > SIZE_MAX:
        raise MismatchError(f"a group of {size} units cannot be matched; at most {SIZE_MAX} are.")
    assert np.isfinite(scores).all(), "scores are numbers"
    whole = integers(scores)
    _, found = linear_sum_assignment(whole.max(axis=1, keepdims=True, initial=0.0) - whole)
    best: Permutation = found.astype(np.int64)
    rows = np.arange(size)
    if held is not None and whole[rows, best].sum() <= whole[rows, held].sum() + size:
        return held
    return best


def integers(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores times a power of two, as whole numbers of at most 2^38 in magnitude.

    >>> integers(np.array([[0.75, -0.5]])).tolist() == [[0.75 * 2**38, -0.5 * 2**38]]
    True
    """
    _, exponent = np.frexp(np.abs(scores).max(initial=0.0))
    whole: NDArray[np.float64] = np.rint(np.ldexp(scores, BITS - int(exponent)))
    return whole
