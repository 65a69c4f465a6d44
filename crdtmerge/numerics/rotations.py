"""Kernels of pivoted QR and of Jacobi rotations in numba: what ``decompositions`` defines in numpy, to the bit.

Columns of a factorisation and rows that are turned are rows of one array here, so that every loop runs along memory.
No fast-math flag is set; ``fused`` checks the results against a stored answer before it trusts them. Numbers are finite
and so small that no square of a norm overflows; the callers see to that.

Nothing here has type annotations, as in ``kernels``. Importing this module imports numba.
"""

from __future__ import annotations

import math

import numpy as np

from crdtmerge.numerics.kernels import compiled

PAIRS = 8
"""Pairs of rows whose angles are computed at once."""


@compiled
def _dot(x, y, level):
    """The sum of x y by halves, as ``products.column_sums`` of the products, in a scratch array."""
    n = x.shape[0]
    half = 1
    while 2 * half < n:
        half *= 2
    upper_x, upper_y = x[half:], y[half:]
    both = n - half
    for j in range(both):
        level[j] = (x[j] * y[j] + 0.0) + upper_x[j] * upper_y[j]
    alone_x, alone_y, rest = x[both:half], y[both:half], level[both:half]
    for j in range(half - both):  # from zero on, so that the compiler knows indices to be positive
        rest[j] = alone_x[j] * alone_y[j] + 0.0
    while half > 4:
        half //= 2
        upper = level[half:]
        for j in range(half):
            level[j] = level[j] + upper[j]
    if half == 4:
        return (level[0] + level[2]) + (level[1] + level[3])
    if half == 2:
        return level[0] + level[1]
    return level[0]


@compiled
def pivoted_qr(columns, order, epsilon):
    """``decompositions.pivoted_qr`` of columns [n, m], which become those of r: q's columns [rank, m]; order [n]."""
    reflectors = triangle(columns, order, epsilon)
    rank, m = reflectors.shape
    level = np.empty(m)
    q = np.zeros((rank, m))
    for j in range(rank - 1, -1, -1):
        q[j, j] = 1.0
        _reflect(reflectors[j, j:], q[j:, j:], level)
    return q


@compiled
def triangle(columns, order, epsilon):
    """``pivoted_qr`` without q: the vectors of its reflections [rank, m]."""
    n, m = columns.shape
    least = min(m, n)
    reflectors, norms, level = np.empty((least, m)), np.empty(n), np.empty(m)
    smallest, rank = 0.0, 0
    for j in range(least):
        pivot = j
        for k in range(j, n):
            norms[k] = _dot(columns[k, j:], columns[k, j:], level)
            if norms[k] > norms[pivot]:
                pivot = k
        length = math.sqrt(norms[pivot])
        if j == 0:
            smallest = length * max(m, n) * epsilon
        if not length > smallest:
            break
        order[j], order[pivot] = order[pivot], order[j]
        for i in range(m):
            columns[j, i], columns[pivot, i] = columns[pivot, i], columns[j, i]
        own, v = columns[j, j:], reflectors[j, j:]
        beta = -length if own[0] >= 0 else length
        first = own[0] - beta
        by = math.sqrt(length * abs(first))
        v[0] = first / by
        for i in range(1, m - j):
            v[i] = own[i] / by
        _reflect(v, columns[j + 1 :, j:], level)
        own[0] = beta
        own[1:] = 0.0
        rank += 1
    return reflectors[:rank]


@compiled
def _reflect(v, rows, level):
    """Subtract from each row v times its product with v."""
    for k in range(rows.shape[0]):
        row = rows[k]
        along = _dot(v, row, level)
        for i in range(v.shape[0]):
            row[i] = row[i] - v[i] * along


@compiled
def orthogonalised(x, columns, sweeps_max, orthogonal):
    """``decompositions.defined_rotations`` of rows x [2 half, ...] in place: their order, and their squares."""
    n = x.shape[0]
    half = n // 2
    order, moved = np.arange(n), np.empty(n, np.int64)
    squares, factors, level = np.empty(n), np.ones(n), np.empty(max(columns, 1))
    plain, angles = np.empty(n, np.bool_), np.ones((8, PAIRS))
    turned = 1
    for _ in range(sweeps_max):
        _settle(x, factors, plain)
        for i in range(n):
            squares[i] = _dot(x[i, :columns], x[i, :columns], level)
        _sort(order, squares)
        if turned == 0:
            return order, squares
        before = squares.copy()
        turned = 0
        for _ in range(n - 1):
            for first in range(0, half, PAIRS):
                pairs = min(PAIRS, half - first)
                upper, lower = order[first : first + pairs], order[half + first : half + first + pairs]
                turned += _turn(x, upper, lower, columns, factors, squares, plain, orthogonal, level, angles)
            _move(order, moved)
        squares[:] = before
    _settle(x, factors, plain)
    return order, squares


@compiled
def _settle(x, factors, plain):
    """Multiply each row by its factor, which becomes one; plain rows hold no negative zero.

    A plain row stays plain until it is settled again: a difference is a negative zero only where its first term is one.
    """
    for i in range(x.shape[0]):
        row, factor = x[i], factors[i]
        found = np.int64(0)
        for j in range(row.shape[0]):
            row[j] = row[j] * factor
            found += (row[j] == 0.0) & (math.copysign(1.0, row[j]) < 0.0)
        factors[i] = 1.0
        plain[i] = found == 0


@compiled
def _sort(order, squares):
    """Rows by their squares, descending, those of equal squares in the order that they have."""
    for i in range(1, order.shape[0]):
        own = order[i]
        at = i
        while at > 0 and squares[order[at - 1]] < squares[own]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = own


@compiled
def _move(order, moved):
    """All but the first of a ring of two halves move on by one, as in ``decompositions``."""
    n = order.shape[0]
    half = n // 2
    if half < 2:
        return
    moved[0], moved[1] = order[0], order[half]
    for i in range(2, half):
        moved[i] = order[i - 1]
    for i in range(half, n - 1):
        moved[i] = order[i + 1]
    moved[n - 1] = order[half - 1]
    order[:] = moved


@compiled
def _turn(x, upper, lower, columns, factors, squares, plain, orthogonal, level, angles):
    """Turn some pairs of rows, kept as a factor times a vector; how many were not orthogonal.

    Those that are orthogonal are turned by nothing, which changes signs of zeros alone: none in plain rows.
    """
    pairs = upper.shape[0]
    p, q, a, b, c, less, more, found = angles
    for j in range(pairs):
        i, k = upper[j], lower[j]
        p[j], q[j], a[j], b[j] = factors[i], factors[k], squares[i], squares[k]
        c[j] = _dot(x[i, :columns], x[k, :columns], level) * p[j] * q[j]
    for j in range(PAIRS):
        active = abs(c[j]) > orthogonal * math.sqrt(a[j] * b[j])
        along = c[j] if active else 1.0
        z = (b[j] - a[j]) / (along + along)
        t = (1.0 if z >= 0 else -1.0) / (abs(z) + math.sqrt(1.0 + z * z))
        t = t if active else 0.0
        cosine = 1.0 / math.sqrt(1.0 + t * t)
        less[j], more[j] = t * (q[j] / p[j]), t * (p[j] / q[j])
        p[j], q[j] = p[j] * cosine, q[j] * cosine
        a[j], b[j] = a[j] - t * along, b[j] + t * along
        found[j] = 1.0 if active else 0.0
    turned = 0
    for j in range(pairs):
        i, k = upper[j], lower[j]
        if found[j] == 0.0 and plain[i] and plain[k]:
            continue
        turned += int(found[j])
        _rotate(x[i], x[k], less[j], more[j])
        factors[i], factors[k], squares[i], squares[k] = p[j], q[j], a[j], b[j]
    return turned


@compiled
def _rotate(upper, lower, less, more):
    for j in range(upper.shape[0]):
        own, other = upper[j], lower[j]
        upper[j] = own - other * less
        lower[j] = other + own * more
