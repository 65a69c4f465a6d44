"""Decompositions of float64 matrices with the same bits on every machine: Cholesky, QR, eigenvalues, singular values.

Everything is elementwise operations in a fixed order, sums by ``products.column_sums`` and exact products of blocks by
``products.matmul``; thresholds and pivots are decided by values alone, ties by the lowest index. What is written here
is the definition; QR and rotations have kernels that give the same bits (``rotations``, chosen by ``fused``).
"""

from __future__ import annotations

import math

import numpy as np

from crdtmerge.numerics import fused
from crdtmerge.numerics.elementary import sqrt
from crdtmerge.numerics.products import STEP, Matrix, column_sums, matmul, row_sums, scaled

BLOCK = 64
"""Columns that are eliminated one by one before a product of blocks brings the rest up to date."""

SIDE_MAX = 512
"""The smaller side up to which strategies decompose matrices with the same bits everywhere.

Measured for normal numbers on one core of a busy server, processor time: 256 x 256 in 1.0 s, 512 x 512 in 16 s,
512 x 2048 in 17 s; by kernels 64 x 64 in 2.5 ms, 256 x 256 in 0.13 s, 512 x 512 in 1.0 s. Time grows with the cube of
the smaller side.
"""

EPSILON = math.ldexp(1.0, -52)
"""The relative distance of neighbouring float64 numbers; times the larger side, the bound of the numerical rank."""

SWEEPS_MAX = 40
"""Sweeps of a Jacobi iteration at most; some 5 to 10 suffice."""

ORTHOGONAL = math.ldexp(1.0, -49)
"""The cosine up to which two columns count as orthogonal."""

KERNEL_EXPONENT_MAX = 400
"""Kernels are for matrices below 2 to this power: no square of a norm overflows, so that nothing becomes NaN."""


def cholesky(g: Matrix) -> Matrix | None:
    """The lower L with g = L L^T for a symmetric g, of which the lower triangle is read; None if a pivot is not > 0.

    >>> cholesky(np.array([[4.0, 2.0], [2.0, 5.0]]))
    array([[2., 0.],
           [1., 2.]])
    """
    n = len(g)
    rest = g.copy()
    factor = np.zeros((n, n))
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        panel = rest[start:, start:stop].copy()
        for j in range(stop - start):
            pivot = panel[j, j]
            if not (0.0 < pivot < math.inf):
                return None
            panel[j:, j] = panel[j:, j] / math.sqrt(pivot)
            panel[j + 1 :, j + 1 :] -= panel[j + 1 :, j : j + 1] * panel[None, j + 1 : stop - start, j]
            panel[:j, j] = 0.0
        factor[start:, start:stop] = panel
        below = panel[stop - start :]
        rest[stop:, stop:] -= matmul(below, below.T)
    return factor


def cholesky_solve(g: Matrix, b: Matrix) -> Matrix | None:
    """x with g x = b for g [n, n] symmetric positive definite and b [n, m]; None if g is not positive definite.

    >>> cholesky_solve(np.array([[4.0, 2.0], [2.0, 5.0]]), np.array([[6.0], [7.0]]))
    array([[1.],
           [1.]])
    """
    factor = cholesky(g)
    if factor is None:
        return None
    return _backward(factor, _forward(factor, b))


def _forward(lower: Matrix, b: Matrix) -> Matrix:
    """y with L y = b."""
    n, y = len(lower), b.copy()
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        for j in range(start, stop):
            y[j] = y[j] / lower[j, j]
            y[j + 1 : stop] -= lower[j + 1 : stop, j : j + 1] * y[j]
        y[stop:] -= matmul(lower[stop:, start:stop], y[start:stop])
    return y


def _backward(lower: Matrix, y: Matrix) -> Matrix:
    """x with L^T x = y."""
    n, x = len(lower), y.copy()
    for start in range((n - 1) // BLOCK * BLOCK, -1, -BLOCK):
        stop = min(n, start + BLOCK)
        for j in range(stop - 1, start - 1, -1):
            x[j] = x[j] / lower[j, j]
            x[start:j] -= lower[j, start:j, None] * x[j]
        x[:start] -= matmul(lower[start:stop, :start].T, x[start:stop])
    return x


# ---------------------------------------------------------------- QR


def pivoted_qr(a: Matrix) -> tuple[Matrix, Matrix, list[int]]:
    """a[:, order] = q r for a [m, n], with q [m, rank] of orthonormal columns and r [rank, n] upper trapezoidal.

    Householder reflections; each step takes the column of the largest remaining norm (the lowest index of equal ones),
    until that is below max(m, n) 2^-52 of the first: the rank.
    """
    kernels = fused.rotations(min(a.shape)) if _moderate(a) else None
    if kernels is None:
        return defined_qr(a)
    columns, order = a.T.copy(), np.arange(a.shape[1])
    q = kernels.pivoted_qr(columns, order, EPSILON)
    return np.ascontiguousarray(q.T), np.ascontiguousarray(columns[:, : len(q)].T), order.tolist()


def triangle(a: Matrix) -> tuple[Matrix, list[int]]:
    """r and order of ``pivoted_qr``, without q."""
    kernels = fused.rotations(min(a.shape)) if _moderate(a) else None
    if kernels is None:
        return defined_qr(a)[1:]
    columns, order = a.T.copy(), np.arange(a.shape[1])
    rank = len(kernels.triangle(columns, order, EPSILON))
    return np.ascontiguousarray(columns[:, :rank].T), order.tolist()


def _moderate(a: Matrix) -> bool:
    """Whether a matrix has elements, all finite and below the kernels' bound."""
    return bool(a.size and np.abs(a).max() < math.ldexp(1.0, KERNEL_EXPONENT_MAX))


def defined_qr(a: Matrix) -> tuple[Matrix, Matrix, list[int]]:
    """``pivoted_qr`` in numpy."""
    m, n = a.shape
    rest = a.copy()
    order = list(range(n))
    reflectors: list[Matrix] = []
    norms = column_sums(rest * rest)
    smallest = 0.0
    for j in range(min(m, n)):
        norms = column_sums(rest[j:, j:] * rest[j:, j:])
        pivot = _first_largest(norms)
        length = math.sqrt(norms[pivot])
        if j == 0:
            smallest = length * max(m, n) * EPSILON
        if not length > smallest:
            break
        order[j], order[j + pivot] = order[j + pivot], order[j]
        rest[:, [j, j + pivot]] = rest[:, [j + pivot, j]]
        v = rest[j:, j].copy()
        beta = -length if v[0] >= 0 else length
        v[0] = v[0] - beta
        # |v|^2 = 2 length (length + |x_0|)
        v = v / math.sqrt(length * abs(v[0]))
        rest[j:, j + 1 :] -= v[:, None] * column_sums(v[:, None] * rest[j:, j + 1 :])
        rest[j, j], rest[j + 1 :, j] = beta, 0.0
        reflectors.append(v)
    rank = len(reflectors)
    q = np.zeros((m, rank))
    for j in range(rank - 1, -1, -1):
        q[j, j] = 1.0
        v = reflectors[j]
        q[j:, j:] -= v[:, None] * column_sums(v[:, None] * q[j:, j:])
    return q, rest[:rank], order


def _first_largest(x: Matrix) -> int:
    """The lowest index of the largest of non-negative numbers."""
    return int(np.argsort(-x, kind="stable")[0])


# ---------------------------------------------------------------- Jacobi


def svd(a: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """a = u diag(s) vt for a [m, n], to the numerical rank r: u [m, r], s [r] > 0 descending, vt [r, n].

    One-sided Jacobi rotations of the transposed factor r of a pivoted QR (Drmac, Veselic, SIAM J. Matrix Anal. Appl.
    29, 2008), in round-robin order. Of each column of u the entry of largest magnitude, the first of equal ones, is
    positive. A matrix of zeros, or that holds NaN or infinity, has no values and no vectors.
    """
    m, n = a.shape
    if m < n:
        v, s, ut = _tall_svd(a.T)
        u, vt = ut.T, v.T
    else:
        u, s, vt = _tall_svd(a)
    signs = signs_of(u)
    return u * signs, s, vt * signs[:, None]


def right_vectors(a: Matrix) -> tuple[Matrix, Matrix]:
    """s and vt of ``svd``, in half its time where a has no fewer rows than columns.

    Of each row of vt the entry of largest magnitude, the first of equal ones, is positive. Singular values may differ
    from those of ``svd`` by some ulps.
    """
    if a.shape[0] < a.shape[1]:
        _, s, vt = svd(a)
    else:
        moderate, e = _brought_near_one(a)
        r, order = triangle(moderate)
        turned, _, s = _orthogonalised(r, np.zeros((len(r), 0)))
        vt = np.zeros((len(r), a.shape[1]))
        vt[:, order] = turned / s[:, None]
        s = s * math.ldexp(1.0, e)
    return s, vt * signs_of(vt.T)[:, None]


def _brought_near_one(a: Matrix) -> tuple[Matrix, int]:
    """a 2^-e and e such that the largest magnitude is in [1/2, 1); zeros where there is NaN or infinity."""
    size = np.abs(a).max(initial=0.0)
    if size == 0.0 or not math.isfinite(size):
        return np.zeros_like(a), 0
    _, e = math.frexp(size)
    # one factor, as long as it is a number
    return (a * math.ldexp(1.0, -e) if -e <= STEP else scaled(a, np.array([-e]))), e


def _tall_svd(a: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    moderate, e = _brought_near_one(a)
    q, r, order = pivoted_qr(moderate)
    rank = len(r)
    if rank == 0:
        return q, np.zeros(0), r
    # columns of r^T turned to u s, turned by v: r^T v = u s, so that a[:, order] = (q v) s u^T
    turned, v, s = _orthogonalised(r, np.eye(rank))
    # many rotations stretch rows by some ulps, those of v as those of u s
    stretch = sqrt(row_sums(v * v))
    right = np.zeros((rank, a.shape[1]))
    right[:, order] = turned / s[:, None]
    return matmul(q, (v / stretch[:, None]).T), s / stretch * math.ldexp(1.0, e), right


def eigh(a: Matrix) -> tuple[Matrix, Matrix]:
    """Eigenvalues ascending [n] and eigenvectors as columns [n, n] of a symmetric a, errors relative to the largest.

    One-sided Jacobi rotations of a + c 1, where c, twice the largest row sum of magnitudes, makes it well-conditioned.
    Of each vector the entry of largest magnitude, the first of equal ones, is positive.
    """
    n = len(a)
    rows = column_sums(np.abs(a))
    size = float(rows.max(initial=0.0))
    if size == 0.0:
        return np.zeros(n), np.eye(n)
    _, e = math.frexp(size)
    shift = math.ldexp(1.0, e + 1)
    shifted = a.copy()
    shifted[np.arange(n), np.arange(n)] += shift
    turned, _, s = _orthogonalised(shifted, np.zeros((n, 0)))
    vectors = (turned / s[:, None]).T
    values = column_sums(vectors * matmul(a, vectors))
    by_size = np.argsort(values, kind="stable")
    vectors = vectors[:, by_size]
    return values[by_size], vectors * signs_of(vectors)


def signs_of(u: Matrix) -> Matrix:
    """For each column +1, or -1 where its entry of largest magnitude, the first of equal ones, is negative."""
    if not u.size:
        return np.ones(u.shape[1])
    first = np.abs(u).argmax(axis=0)
    return np.where(u[first, np.arange(u.shape[1])] < 0, -1.0, 1.0)


def _orthogonalised(rows: Matrix, beside: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Rows turned by plane rotations until they are orthogonal, the rows beside them turned alike, and their norms.

    A sweep turns every pair once: in each of its rounds the upper half of a ring is paired with the lower half, then
    all but the first move on by one. Before each sweep and at the end rows are sorted by their norms, descending. No
    row may be zero.
    """
    n, m = rows.shape
    x = np.zeros((n + n % 2, m + beside.shape[1]))
    x[:n, :m], x[:n, m:] = rows, beside
    kernels = fused.rotations(n) if _moderate(rows) else None
    if kernels is None:
        x, squares = defined_rotations(x, m)
    else:
        order, found = kernels.orthogonalised(x, m, SWEEPS_MAX, ORTHOGONAL)
        x, squares = x[order], found[order]
    return x[:n, :m], x[:n, m:], sqrt(squares[:n])


def defined_rotations(x: Matrix, m: int) -> tuple[Matrix, Matrix]:
    """An even number of rows turned until their first m columns are orthogonal, and their squares, in numpy."""
    half = len(x) // 2
    turned = 1
    for _ in range(SWEEPS_MAX):
        squares = row_sums(x[:, :m] * x[:, :m])
        by_size = np.argsort(-squares, kind="stable")
        x, squares = x[by_size], squares[by_size]
        if turned == 0:
            break
        ring = _Ring(x, squares, m)
        turned = 0
        for _ in range(2 * half - 1):
            turned += ring.turn()
        x = ring.rows()
    return x, squares


class _Ring:
    """Rows in two halves: row i of the upper, x, is paired with row i of the lower, y.

    A row is kept as a number times a vector, so that a rotation costs one multiplication and one addition an element:
    cos (x - tan y) and cos (y + tan x), where only the numbers are multiplied by the cosine.
    """

    def __init__(self, rows: Matrix, squares: Matrix, columns: int) -> None:
        half = len(rows) // 2
        self._x, self._y = rows[:half], rows[half:]
        self._next_x, self._next_y = np.empty_like(self._x), np.empty_like(self._y)
        self._by_x, self._by_y = np.empty_like(self._x), np.empty_like(self._y)
        self._p, self._q = np.ones(half), np.ones(half)
        self._a, self._b = squares[:half], squares[half:]
        self._columns = columns

    def turn(self) -> int:
        """Turn every pair that is not orthogonal, then move on; how many were turned."""
        x, y, p, q, a, b = self._x, self._y, self._p, self._q, self._a, self._b
        c = row_sums(x[:, : self._columns] * y[:, : self._columns]) * p * q
        active = np.abs(c) > ORTHOGONAL * sqrt(a * b)
        c = np.where(active, c, 1.0)
        z = (b - a) / (c + c)
        t = np.where(z >= 0, 1.0, -1.0) / (np.abs(z) + sqrt(1.0 + z * z))
        t = np.where(active, t, 0.0)
        cosine = 1.0 / sqrt(1.0 + t * t)
        np.multiply(y, (t * (q / p))[:, None], out=self._by_y)
        np.multiply(x, (t * (p / q))[:, None], out=self._by_x)
        _move(x, self._by_y, y, self._by_x, self._next_x, self._next_y)
        self._x, self._y, self._next_x, self._next_y = self._next_x, self._next_y, x, y
        self._p, self._q = _moved(p * cosine, q * cosine)
        self._a, self._b = _moved(a - t * c, b + t * c)
        return int(np.count_nonzero(active))

    def rows(self) -> Matrix:
        """All rows, in the order of the ring's halves."""
        return np.concatenate([self._x * self._p[:, None], self._y * self._q[:, None]])


def _move(x: Matrix, less: Matrix, y: Matrix, more: Matrix, to_x: Matrix, to_y: Matrix) -> None:
    """x - less and y + more, written where all but the first have moved on by one, as by ``_moved``."""
    if len(x) < 2:
        np.subtract(x, less, out=to_x)
        np.add(y, more, out=to_y)
        return
    np.subtract(x[:1], less[:1], out=to_x[:1])
    np.add(y[:1], more[:1], out=to_x[1:2])
    np.subtract(x[1:-1], less[1:-1], out=to_x[2:])
    np.add(y[1:], more[1:], out=to_y[:-1])
    np.subtract(x[-1:], less[-1:], out=to_y[-1:])


def _moved(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """A number for each row, moved on with the rows."""
    if len(x) < 2:
        return x, y
    return np.concatenate([x[:1], y[:1], x[1:-1]]), np.concatenate([y[1:], x[-1:]])
