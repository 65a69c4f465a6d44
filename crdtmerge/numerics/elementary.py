"""Elementwise functions of float64 arrays made of IEEE operations alone: sqrt, exp, log with the same bits everywhere.

Libraries' own functions differ between builds, processors and numbers of threads. These use additions,
multiplications, divisions and bit patterns, in the order written here; errors are below one unit in the last place
(measured against 200 bits). Scalars that must be correctly rounded come from ``scalars``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
"""ln 2 = high + low; the high part has 33 bits, so that its multiples by exponents are exact."""

ONE_OVER_LN2 = float.fromhex("0x1.71547652b82fep+0")
EXP_MAX, EXP_MIN = 709.782712893384, -745.2
"""Above the first, e^x exceeds float64; below the second it is zero."""

TAYLOR = tuple(1.0 / math.factorial(n) for n in range(2, 15))
"""1/n! from n = 2 on: for |x| <= ln(2)/2 what is left out is below 2^-62."""

ATANH = tuple(2.0 / (2 * n + 1) for n in range(1, 13))
"""2/(2n + 1) from n = 1 on: for |s| <= 0.1716 what is left out is below 2^-65."""

ROOT_HALF = 0.7071067811865476


def sqrt(x: Array) -> Array:
    """The square root, correctly rounded: IEEE 754 defines it, and numpy uses the processor's own."""
    return np.sqrt(x)


def exp(x: Array) -> Array:
    """e^x: 2^k e^r with k = rint(x / ln 2) and the Taylor polynomial of e^r. Infinity above 709.78; NaN stays.

    >>> exp(np.array([0.0, 1.0]))
    array([1.        , 2.71828183])
    """
    x = np.asarray(x, np.float64)
    inside = (x <= EXP_MAX) & (x >= EXP_MIN)
    y = np.where(inside, x, 0.0)
    k = np.rint(y * ONE_OVER_LN2)
    high = y - k * LN2_HIGH
    low = k * LN2_LOW
    r = high - low
    lost = (high - r) - low
    p = np.full_like(r, TAYLOR[-1])
    for c in TAYLOR[-2::-1]:
        p = p * r + c
    value = 1.0 + (r + (lost + r * r * p))
    e = k.astype(np.int64)
    last = np.where(e > 1000, 1, np.where(e < -1000, -54, 0))
    result = value * _power(e - last) * _power(last)
    result = np.where(x > EXP_MAX, np.inf, np.where(x < EXP_MIN, 0.0, result))
    return np.where(np.isnan(x), x, result)


def log(x: Array) -> Array:
    """The natural logarithm: k ln 2 + 2 atanh(f / (2 + f)) with x = 2^k (1 + f). -inf at 0, NaN below.

    >>> log(np.array([1.0, 10.0]))
    array([0.        , 2.30258509])
    """
    x = np.asarray(x, np.float64)
    inside = (x > 0) & (x < np.inf)
    m, k = np.frexp(np.where(inside, x, 1.0))
    small = m < ROOT_HALF
    m = np.where(small, m + m, m)
    e = (k - small).astype(np.float64)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = np.full_like(z, ATANH[-1])
    for c in ATANH[-2::-1]:
        r = r * z + c
    r = r * z
    half = 0.5 * f * f
    result = e * LN2_HIGH - ((half - (s * (half + r) + e * LN2_LOW)) - f)
    result = np.where(inside, result, np.where(x == 0, -np.inf, np.where(x == np.inf, np.inf, np.nan)))
    return np.asarray(result, np.float64)


def _power(e: NDArray[np.int64]) -> Array:
    return ((e + 1023) << 52).view(np.float64)
