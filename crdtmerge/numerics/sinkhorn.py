"""Entropic optimal transport with the same bits on every machine: Sinkhorn sweeps, finished by sparse Newton steps.

    min_P <P, C> + epsilon sum_ij P_ij (log P_ij - 1)   with P 1 = a, P^T 1 = b
    P_ij = exp((f_i + g_j - C_ij) / epsilon)            f, g maximise  <f, a> + <g, b> - epsilon sum_ij P_ij

A sweep sets f, then g, so that one marginal fits; near the optimum that gains a fixed factor only. A Newton step solves

    [diag(P 1)  P~ ; P~^T  diag(P^T 1)] (df, dg) = epsilon (a - P 1, b - P^T 1)

by conjugate gradients, where P~ holds the large entries of P alone, and goes as far along (df, dg) as the dual grows.
Everything is in the log domain: no epsilon underflows. (Tang et al., Accelerating Sinkhorn algorithm with sparse Newton
iterations, ICLR 2024, arXiv:2401.12253; Cuturi, NeurIPS 2013.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import InputError, ParameterError
from crdtmerge.numerics.elementary import exp, log
from crdtmerge.numerics.products import Matrix, column_sums, row_sums

TOLERANCE = 1e-9
"""How far the marginals of a plan may be off, absolutely, summed over rows and columns; the whole mass is 1."""

WARM_UP = 20
"""Sweeps before the first Newton step."""

STAGES_SWEEPS = 5
"""Sweeps at each of the larger epsilons, a quarter of the one before, from which the wanted one is approached."""

STEPS_MAX = 200
GRADIENTS_MAX = 400
"""Newton steps, and conjugate gradients in one of them."""

LEFT_OUT = 1e-3
"""Entries below this share of the smaller marginal, over the longer side, are left out of a Newton step; later fewer:

the share is multiplied by how far the marginals are off.
"""

DAMPING = 1e-10
"""Share of the diagonal that is added to it: parts of a plan that hardly touch make the system all but singular."""

MASS_MAX = 1e100
"""A step that makes an entry as large as this is too long; sums stay finite below it."""

ARMIJO = 1e-4
HALVINGS_MAX = 40


class Transport(NamedTuple):
    """A plan [m, n], its potentials [m] and [n], and how many sweeps and Newton steps it took."""

    plan: Matrix
    f: Matrix
    g: Matrix
    sweeps: int
    steps: int


def transport(
    cost: Matrix,
    epsilon: float,
    a: Matrix | None = None,
    b: Matrix | None = None,
    *,
    newton: bool = True,
    sweeps_max: int = WARM_UP,
) -> Transport:
    """The plan of least cost + epsilon * negative entropy for float64 costs [m, n] and marginals a [m], b [n].

    Marginals are positive and are scaled to the sum 1; without them they are even. Without ``newton`` only up to
    ``sweeps_max`` sweeps are done. Raises ParameterError for an epsilon or marginals that are not positive, InputError
    for costs that are not finite and where the marginals are not met to ``TOLERANCE``.

    >>> found = transport(np.array([[0.0, 1.0], [1.0, 0.0]]), 0.01)
    >>> found.plan.round(6)
    array([[0.5, 0. ],
           [0. , 0.5]])
    """
    if not (cost.ndim == 2 and cost.size and np.isfinite(cost).all()):
        raise InputError("costs of transport are finite numbers [m, n], at least one.")
    if not 0.0 < epsilon < math.inf:
        raise ParameterError(f"epsilon = {epsilon}: the weight of the entropy is positive.")
    problem = _Problem(cost, _marginal(a, cost.shape[0]), _marginal(b, cost.shape[1]))
    f, g, sweeps = problem.approached(epsilon)
    while sweeps < sweeps_max and problem.off(problem.plan(f, g, epsilon)) > TOLERANCE:
        f, g = problem.swept(g, epsilon)
        sweeps += 1
    plan, steps = problem.plan(f, g, epsilon), 0
    while newton and steps < STEPS_MAX and problem.off(plan) > TOLERANCE:
        f, g, plan = problem.stepped(f, g, plan, epsilon)
        steps += 1
    off = problem.off(plan)
    if not off <= TOLERANCE:
        raise InputError(
            f"transport at epsilon = {epsilon} is not found: after {sweeps} sweeps and {steps} Newton steps its "
            f"marginals are off by {off:.1e}. Take a larger epsilon."
        )
    return Transport(plan, f, g, sweeps, steps)


def _marginal(given: Matrix | None, length: int) -> Matrix:
    if given is None:
        return np.full(length, 1.0 / length)
    if given.shape != (length,) or not (np.isfinite(given) & (given > 0)).all():
        raise ParameterError(f"a marginal of transport is {length} positive numbers here.")
    return given / total(given)


def total(x: Matrix) -> float:
    """The sum of all elements, in one order."""
    return float(column_sums(x.reshape(-1, 1))[0])


class _Problem:
    """Costs and marginals."""

    def __init__(self, cost: Matrix, a: Matrix, b: Matrix) -> None:
        self._cost, self._a, self._b = cost, a, b
        self._log_a, self._log_b = log(a), log(b)
        self._spread = float(cost.max() - cost.min())

    def approached(self, epsilon: float) -> tuple[Matrix, Matrix, int]:
        """Potentials after some sweeps at larger epsilons, from the spread of the costs down."""
        g, sweeps = np.zeros(len(self._b)), 0
        larger = epsilon
        while larger < self._spread:
            larger *= 4.0
        while larger > epsilon:
            for _ in range(STAGES_SWEEPS):
                _, g = self.swept(g, larger)
                sweeps += 1
            larger /= 4.0
        f, g = self.swept(g, epsilon)
        return f, g, sweeps + 1

    def swept(self, g: Matrix, epsilon: float) -> tuple[Matrix, Matrix]:
        """f with which the rows fit, then g with which the columns do."""
        f = epsilon * (self._log_a - _log_row_sums((g[None, :] - self._cost) / epsilon))
        g = epsilon * (self._log_b - _log_row_sums(((f[:, None] - self._cost) / epsilon).T))
        return f, g

    def plan(self, f: Matrix, g: Matrix, epsilon: float) -> Matrix:
        """exp((f_i + g_j - C_ij) / epsilon)."""
        return exp((f[:, None] + g[None, :] - self._cost) / epsilon)

    def off(self, plan: Matrix) -> float:
        """The absolute differences of both marginals, summed."""
        return total(np.abs(np.concatenate(self._lacking(plan))))

    def _lacking(self, plan: Matrix) -> tuple[Matrix, Matrix]:
        return self._a - row_sums(plan), self._b - column_sums(plan)

    def stepped(self, f: Matrix, g: Matrix, plan: Matrix, epsilon: float) -> tuple[Matrix, Matrix, Matrix]:
        """A Newton step, halved until the dual grows; a sweep where it never does."""
        m = len(f)
        gradient = np.concatenate(self._lacking(plan))
        step = epsilon * self._direction(plan, gradient)
        slope = total(gradient * step)
        value, off = self._dual(f, g, plan, epsilon), total(np.abs(gradient))
        longest = float(np.abs(step).max())
        size = 1.0 if longest <= self._spread else self._spread / longest
        for _ in range(HALVINGS_MAX):
            moved_f, moved_g = f + size * step[:m], g + size * step[m:]
            moved = self.plan(moved_f, moved_g, epsilon)
            if moved.max() < MASS_MAX:
                grown = self._dual(moved_f, moved_g, moved, epsilon) - value
                if self.off(moved) < 0.5 * off or (grown > 0.0 and grown >= ARMIJO * size * slope):
                    return moved_f, moved_g, moved
            size *= 0.5
        f, g = self.swept(g, epsilon)
        return f, g, self.plan(f, g, epsilon)

    def _dual(self, f: Matrix, g: Matrix, plan: Matrix, epsilon: float) -> float:
        return total(f * self._a) + total(g * self._b) - epsilon * total(plan.reshape(-1))

    def _direction(self, plan: Matrix, gradient: Matrix) -> Matrix:
        """x of the sparse system, by conjugate gradients scaled by its diagonal, until the rest is tiny."""
        m = len(self._a)
        diagonal = np.concatenate([row_sums(plan), column_sums(plan)])
        damped = diagonal * (1.0 + DAMPING)
        longer = float(max(plan.shape))
        rows, columns = diagonal[:m, None], diagonal[None, m:]
        share = LEFT_OUT * min(1.0, total(np.abs(gradient)))
        by_rows, by_columns = _sparse(plan, plan * longer > share * np.where(rows < columns, rows, columns))

        def product(v: Matrix) -> Matrix:
            found: Matrix = damped * v + np.concatenate([by_rows.times(v[m:]), by_columns.times(v[:m])])
            return found

        x, rest = np.zeros_like(gradient), gradient
        scaled = rest / diagonal
        direction, square = scaled, total(rest * scaled)
        enough = square * 1e-20
        for _ in range(GRADIENTS_MAX):
            if not square > enough:
                break
            image = product(direction)
            curvature = total(direction * image)
            if not curvature > 0.0:
                break
            along = square / curvature
            x, rest = x + along * direction, rest - along * image
            scaled = rest / diagonal
            before, square = square, total(rest * scaled)
            direction = scaled + (square / before) * direction
        return x


class _Sparse(NamedTuple):
    """Entries of each row of a matrix, filled up with zeros to the longest: columns and values [rows, most]."""

    columns: NDArray[np.int64]
    values: Matrix

    def times(self, v: Matrix) -> Matrix:
        """The product with a vector, each row's sum in one order."""
        return row_sums(self.values * v[self.columns])


def _sparse(plan: Matrix, kept: NDArray[np.bool_]) -> tuple[_Sparse, _Sparse]:
    """The kept entries of a matrix, and those of its transpose."""
    return _rows_of(plan, kept), _rows_of(plan.T, kept.T)


def _rows_of(x: Matrix, kept: NDArray[np.bool_]) -> _Sparse:
    rows, columns = np.nonzero(kept)
    counts = np.bincount(rows, minlength=len(x))
    starts = np.concatenate([np.zeros(1, np.int64), np.add.accumulate(counts)[:-1]])
    within = np.arange(len(rows)) - starts[rows]
    at = np.zeros((len(x), int(counts.max(initial=0))), np.int64)
    values = np.zeros(at.shape)
    at[rows, within], values[rows, within] = columns, x[rows, columns]
    return _Sparse(at, values)


def _log_row_sums(x: Matrix) -> Matrix:
    """log sum_j exp(x_ij), from the largest on."""
    largest = x.max(axis=1)
    found: Matrix = largest + log(row_sums(exp(x - largest[:, None])))
    return found
