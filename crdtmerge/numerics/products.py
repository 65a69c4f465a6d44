"""Matrix products in float64 with the same bits on every machine: exact products of integer slices, added in one order.

    C = A B:   A ~= sum_p S_p 2^(e_i - (p + 1) beta),   B ~= sum_q T_q 2^(f_j - (q + 1) beta)
    C_ij    =  2^(e_i + f_j) sum_s 2^(-(s + 2) beta) sum_(p + q = s) (S_p T_q)_ij

Rows of A and columns of B are scaled by powers of two and split into slices of integers below 2^beta, where
beta = (53 - ceil(log2 K)) // 2 for an inner dimension K: every partial sum of a slice product is an integer below 2^53,
so a library's product of slices is exact, whatever its order of additions, threads, instructions and fused operations.
What remains are elementwise additions in a fixed order. (Ozaki, Ogita, Oishi, Rump, Numer. Algorithms 59, 2012.)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Exponents = NDArray[np.int64]

INNER_MAX = 4096
"""Longest inner dimension of one product; longer ones are cut, and the pieces added from left to right."""

BITS = 60
"""Bits kept below the largest element of a row of A and a column of B, at least."""

STEP = 1000
"""The largest power of two by which a number is scaled at once, so that the factor itself is a normal number."""


def matmul(a: Matrix, b: Matrix) -> Matrix:
    """a b for float64 [m, K] and [K, n]: |error_ij| <= 2^-52 |c_ij| + K 2^-57 max_k |a_ik| max_k |b_kj|.

    >>> matmul(np.array([[1.0, 2.0]]), np.array([[3.0], [0.5]]))
    array([[4.]])
    """
    assert a.shape[1] == b.shape[0], "a product needs [m, K] and [K, n]"
    inner = a.shape[1]
    product = np.zeros((a.shape[0], b.shape[1]))
    if not product.size:
        return product
    for start in range(0, inner, INNER_MAX):
        part = _product(a[:, start : start + INNER_MAX], b[start : start + INNER_MAX])
        product = part if start == 0 else product + part
    return product


def gram(a: Matrix) -> Matrix:
    """a^T a, symmetric to the bit, as ``matmul``."""
    return matmul(a.T, a)


def column_sums(x: Matrix) -> Matrix:
    """Sums over the first axis by halves: x[i] + x[i + h], rows padded with zeros to a power of two.

    >>> column_sums(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    array([ 9., 12.])
    """
    rows = x.shape[0]
    if rows == 0:
        return np.zeros(x.shape[1:])
    half = 1 << max(0, (rows - 1).bit_length() - 1)
    level = x[:half] + 0.0
    level[: rows - half] += x[half:]
    while half > 1:
        half //= 2
        level = level[:half] + level[half : 2 * half]
    found: Matrix = level[0]
    return found


def row_sums(x: Matrix) -> Matrix:
    """Sums over the last axis of a matrix, to the bit those of ``column_sums`` of its transpose."""
    columns = x.shape[1]
    if columns == 0:
        return np.zeros(x.shape[0])
    half = 1 << max(0, (columns - 1).bit_length() - 1)
    level = x[:, :half] + 0.0
    level[:, : columns - half] += x[:, half:]
    while half > 1:
        half //= 2
        level = level[:, :half] + level[:, half : 2 * half]
    found: Matrix = level[:, 0]
    return found


def power_of_two(exponents: Exponents) -> Matrix:
    """2^e as float64, |e| <= 1022, made of its bits."""
    found: Matrix = ((exponents + 1023) << 52).view(np.float64)
    return found


def scaled(x: Matrix, exponents: Exponents) -> Matrix:
    """x 2^e, in steps of at most 2^1000 so that no factor is out of range."""
    rest = exponents
    while True:
        step = np.where(rest > STEP, STEP, np.where(rest < -STEP, -STEP, rest))
        x = x * power_of_two(step)
        rest = rest - step
        if not rest.any():
            return x


def _product(a: Matrix, b: Matrix) -> Matrix:
    inner = a.shape[1]
    beta = (53 - (inner - 1).bit_length()) // 2
    kept = -(-BITS // beta)
    left, e = _slices(a, beta, kept, 1)
    right, f = _slices(b, beta, kept, 0)
    total = np.zeros((a.shape[0], b.shape[1]))
    for s in range(min(kept, len(left) + len(right) - 1) - 1, -1, -1):
        for p in range(s // 2 + 1):
            pair = _both(left, right, p, s - p)
            if pair is not None:
                total = total + pair * math.ldexp(1.0, -(s + 2) * beta)
    return scaled(scaled(total, e), f)


def _both(left: list[Matrix], right: list[Matrix], p: int, q: int) -> Matrix | None:
    """S_p T_q + S_q T_p, those that there are: paired so that a Gram matrix is symmetric to the bit."""
    one = _exact(left[p], right[q]) if p < len(left) and q < len(right) else None
    other = _exact(left[q], right[p]) if p != q and q < len(left) and p < len(right) else None
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _exact(s: Matrix, t: Matrix) -> Matrix:
    """The product of two slices: integers below 2^53 at every step, exact in any order."""
    found: Matrix = np.matmul(s, t)
    return found


def _slices(x: Matrix, beta: int, kept: int, axis: int) -> tuple[list[Matrix], Exponents]:
    """Integer slices of rows (axis 1) or columns (axis 0), the most significant first, and their exponents.

    The first slice is rounded to at most 2^beta in magnitude, the others to at most 2^(beta - 1); zero slices at the
    end are left out.
    """
    largest = np.abs(x).max(axis=axis, keepdims=True)
    _, exponents = np.frexp(largest)
    e = exponents.astype(np.int64)
    rest = scaled(x, beta - e)
    slices = []
    for _ in range(kept):
        whole = np.rint(rest)
        slices.append(whole)
        rest = (rest - whole) * float(1 << beta)
        if not rest.any():
            break
    return slices, e
