"""Correctly rounded scalar functions: the same float64 on every machine, whatever its mathematics library.

Each evaluates in 200 bits and rounds once. Half-way cases closer than 2^-140 to a rounding boundary do not occur
for these functions in float64, so the result is the float nearest to the exact value. Square roots and the four
operations need no help: IEEE 754 makes them exact already (``math.sqrt``, ``+ - * /``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

PRECISION_BITS = 200

_lock = threading.Lock()  # an mpmath context changes its own precision while it works


@cache
def _context() -> Any:
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.prec = PRECISION_BITS
    return context


def _nearest(value: Any) -> float:
    """The float64 nearest to an mpmath number: integer division rounds correctly, to subnormals too."""
    sign, mantissa, exponent, _ = value._mpf_
    if not mantissa:
        return 0.0
    top, bottom = (mantissa << exponent, 1) if exponent >= 0 else (mantissa, 1 << -exponent)
    try:
        return float(-(top / bottom) if sign else top / bottom)
    except OverflowError:
        return float("-inf" if sign else "inf")


def _evaluated(function: Callable[[Any, Any], Any], x: float) -> float:
    with _lock:
        context = _context()
        return _nearest(function(context, context.mpf(x)))


def acos(x: float) -> float:
    """Inverse cosine of -1 <= x <= 1, in radians.

    >>> acos(-1.0)
    3.141592653589793
    """
    assert -1.0 <= x <= 1.0, "acos is defined on [-1, 1]"
    return _evaluated(lambda m, v: m.acos(v), x)


def sin(x: float) -> float:
    """Sine of x radians."""
    return _evaluated(lambda m, v: m.sin(v), x)


def cos(x: float) -> float:
    """Cosine of x radians."""
    return _evaluated(lambda m, v: m.cos(v), x)


def exp(x: float) -> float:
    """e to the power of x."""
    return _evaluated(lambda m, v: m.exp(v), x)


def log(x: float) -> float:
    """Natural logarithm of x > 0."""
    assert x > 0.0, "log is defined on positive numbers"
    return _evaluated(lambda m, v: m.log(v), x)


def nearest(number: Decimal | Fraction) -> float:
    """The float64 nearest to an exact decimal or fraction."""
    top, bottom = number.as_integer_ratio()
    return top / bottom


def nearest_f32(x: float) -> float:
    """A float64 rounded to the nearest float32, as a Python float."""
    import numpy as np

    return float(np.float32(x))


def left_sum(values: Iterable[float]) -> float:
    """The sum of floats from left to right. (The built-in ``sum`` compensates since Python 3.12: other bits.)"""
    total = 0.0
    for value in values:
        total = total + value
    return total
