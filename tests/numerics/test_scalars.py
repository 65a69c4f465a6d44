"""Scalar functions give the float64 nearest to the exact value."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.numerics import scalars
from tests.numerics.examples import examples

REFERENCE = mpmath.mp.clone()
REFERENCE.prec = 400


def exact(name: str, x: float) -> Fraction:
    """The function's value to 400 bits, as a fraction."""
    sign, mantissa, exponent, _ = getattr(REFERENCE, name)(REFERENCE.mpf(x))._mpf_
    found: Fraction = Fraction(-mantissa if sign else mantissa) * Fraction(2) ** exponent
    return found


def is_nearest(found: float, wanted: Fraction) -> bool:
    """Whether no other float64 lies closer; of two equally close ones the even one counts."""
    if not math.isfinite(found):
        return False
    off = abs(Fraction(found) - wanted)
    for side in (-math.inf, math.inf):
        other = math.nextafter(found, side)
        if not math.isfinite(other):
            continue
        its = abs(Fraction(other) - wanted)
        if its < off or (its == off and bits(found) % 2):
            return False
    return True


def bits(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


Function = Callable[[float], float]
near_one = st.builds(lambda e, m: 1.0 - m * 2.0**e, st.integers(-53, -1), st.floats(0, 1))
DOMAINS: dict[str, tuple[Function, Function, st.SearchStrategy[float]]] = {
    "acos": (scalars.acos, math.acos, st.one_of(st.floats(-1, 1), near_one, near_one.map(lambda x: -x))),
    "sin": (scalars.sin, math.sin, st.one_of(st.floats(-4, 4), st.floats(-1e300, 1e300), st.floats(0, 1e-150))),
    "cos": (scalars.cos, math.cos, st.one_of(st.floats(-4, 4), st.floats(-1e300, 1e300), st.floats(0, 1e-150))),
    "exp": (scalars.exp, math.exp, st.one_of(st.floats(-745, 709), st.floats(-1e-6, 1e-6))),
    "log": (scalars.log, math.log, st.one_of(st.floats(0, exclude_min=True, allow_infinity=False), st.floats(0.5, 2))),
}


@pytest.mark.parametrize("name", DOMAINS)
@examples(250)
@given(data=st.data())
def test_a_function_is_correctly_rounded_and_libm_is_within_one_ulp_of_it(name: str, data: st.DataObject) -> None:
    function, libm, domain = DOMAINS[name]
    x = data.draw(domain)
    found = function(x)
    assert is_nearest(found, exact(name, x))
    assert abs(found - libm(x)) <= math.ulp(found)


HARD = [
    ("exp", float.fromhex("-0x1.ed318efb627eap-27")),
    ("exp", float.fromhex("0x1.9e9cbbfd6080bp-31")),
    ("log", float.fromhex("0x1.62f71c4656b61p-1")),
    ("log", float.fromhex("0x1.fd15e6a1b5b7dp+0")),
    ("sin", float.fromhex("0x1.e0000000001c2p-20")),
    ("cos", float.fromhex("0x1.8000000000009p-23")),
    ("acos", float.fromhex("0x1.fffffffffffffp-1")),
    ("acos", 5e-324),
    ("sin", math.pi),
    ("cos", math.pi / 2),
    ("log", math.nextafter(1.0, 2.0)),
]


@pytest.mark.parametrize(("name", "x"), HARD)
def test_values_close_to_a_midpoint_are_rounded_correctly(name: str, x: float) -> None:
    assert is_nearest(DOMAINS[name][0](x), exact(name, x))


def test_ends_of_the_domains_are_exact() -> None:
    assert scalars.acos(1.0) == 0.0
    assert scalars.acos(-1.0) == math.pi
    assert scalars.sin(0.0) == 0.0
    assert scalars.cos(0.0) == 1.0
    assert scalars.exp(0.0) == 1.0
    assert scalars.log(1.0) == 0.0
    assert scalars.exp(-745.0) == 5e-324


@pytest.mark.parametrize(("function", "x"), [(scalars.acos, 1.0 + 2**-52), (scalars.acos, -2.0), (scalars.log, 0.0)])
def test_arguments_outside_the_domain_are_refused(function: Function, x: float) -> None:
    with pytest.raises(AssertionError, match="defined on"):
        function(x)


@examples(300)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**300), max_value=10**300))
def test_the_float_of_a_decimal_is_the_one_that_its_spelling_means(number: Decimal) -> None:
    assert scalars.nearest(number) == float(str(number))


@examples(300)
@given(st.fractions(min_value=-(10**30), max_value=10**30))
def test_the_float_of_a_fraction_is_the_nearest(number: Fraction) -> None:
    assert is_nearest(scalars.nearest(number), number)


@examples(300)
@given(st.floats(width=64, min_value=-3e38, max_value=3e38))
def test_nearest_f32_is_one_rounding_to_float32(x: float) -> None:
    assert scalars.nearest_f32(x) == struct.unpack("<f", struct.pack("<f", x))[0]


def test_left_sum_adds_from_left_to_right_without_compensation() -> None:
    assert scalars.left_sum([1.0, 1e100, 1.0, -1e100]) == 0.0
    assert scalars.left_sum([0.1] * 10) == 0.9999999999999999
    assert scalars.left_sum([]) == 0.0
