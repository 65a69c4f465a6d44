"""The storage formats as IEEE 754 defines them, in exact rational arithmetic: the oracle of every rounding."""

from __future__ import annotations

import math
from fractions import Fraction

FORMATS = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}
"""Bits of the significand, and the exponent of the smallest normal number."""

INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
SIGN = {"BF16": 0x8000, "F16": 0x8000, "F32": 0x80000000, "F64": 0x8000000000000000}


def exponent(x: Fraction) -> int:
    """The largest e with 2^e <= |x|, for x that is not zero."""
    top, bottom = abs(x.numerator), x.denominator
    guess = top.bit_length() - bottom.bit_length()
    return guess if bottom << max(guess, 0) <= top << max(-guess, 0) else guess - 1


def pattern(x: float, dtype: str) -> int:
    """The bits of the number of a format that is nearest to a float, with the float's sign."""
    sign = SIGN[dtype] if math.copysign(1.0, x) < 0 else 0
    return sign | magnitude(abs(Fraction(x)), dtype)


def magnitude(x: Fraction, dtype: str) -> int:
    """The bits of the number of a format that is nearest to x >= 0; half-way cases to the even one."""
    if x == 0:
        return 0
    precision, smallest = FORMATS[dtype]
    lowest = smallest - (precision - 1)
    unit = max(exponent(x) - (precision - 1), lowest)
    bottom = x.denominator << max(unit, 0)
    steps, left = divmod(x.numerator << max(-unit, 0), bottom)
    steps += 2 * left > bottom or (2 * left == bottom and steps % 2)
    return min(((unit - lowest) << (precision - 1)) + steps, INFINITY[dtype])


def value(bits: int, dtype: str) -> float:
    """The exact value of a positive finite pattern."""
    precision, smallest = FORMATS[dtype]
    raised, steps = divmod(bits, 1 << (precision - 1))
    if raised:
        return math.ldexp(steps + (1 << (precision - 1)), raised - 1 + smallest - (precision - 1))
    return math.ldexp(steps, smallest - (precision - 1))


def nearest(x: Fraction, dtype: str) -> float:
    """The number of a format that is nearest to x; infinite where x is too large."""
    bits = magnitude(abs(x), dtype)
    found = math.inf if bits == INFINITY[dtype] else value(bits, dtype)
    return -found if x < 0 else found
