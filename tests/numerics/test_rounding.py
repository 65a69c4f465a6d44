"""There is one rounding, to nearest and even, from float64 to every storage type: in torch and in the kernels."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from crdtmerge.numerics import kernels
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.rounding import canonical_nan, round_to
from tests.numerics.examples import examples, raw
from tests.numerics.formats import FORMATS, INFINITY, SIGN, pattern, value

NARROWER = ("BF16", "F16", "F32")
UNSIGNED = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}


@numba.njit
def narrowed(out: NDArray[Any], values: NDArray[Any], kind: int) -> None:  # pragma: no cover
    for j in range(len(out)):
        out[j] = kernels.narrow(out[j], values[j], kind)  # type: ignore[no-untyped-call]


@numba.njit
def widened(out: NDArray[Any], values: NDArray[Any], kind: int) -> None:  # pragma: no cover
    for j in range(len(out)):
        out[j] = kernels.widen(values[j], kind)  # type: ignore[no-untyped-call]


def by_kernel(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    out = np.empty(len(values), UNSIGNED[dtype])
    narrowed(out, values, kernels.KINDS[dtype])
    return out


def require_one_rounding(values: NDArray[np.float64], dtype: str) -> None:
    wanted = np.array([pattern(x, dtype) for x in values.tolist()], UNSIGNED[dtype])
    by_torch = raw(round_to(torch.from_numpy(values), DTYPES[dtype]))
    assert by_torch.tolist() == wanted.tolist()
    assert by_kernel(values, dtype).tolist() == wanted.tolist()


@pytest.mark.parametrize("dtype", NARROWER)
@examples(150)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_any_float64_is_rounded_once(dtype: str, values: list[float]) -> None:
    require_one_rounding(np.array(values), dtype)


def traps(dtype: str) -> NDArray[np.float64]:
    """Numbers within 2^-30 of a midpoint of two neighbours and closer, on it, and one float64 beside it."""
    rng = np.random.default_rng(30)
    top = INFINITY[dtype]
    edges = [0, 1, 2, (1 << (FORMATS[dtype][0] - 1)) - 1, 1 << (FORMATS[dtype][0] - 1), top - 2, top - 1]
    found: list[float] = []
    for bits in [*edges, *rng.integers(0, top, 250).tolist()]:
        low = value(bits, dtype)
        high = value(bits + 1, dtype) if bits + 1 < top else 2.0 * low - value(bits - 1, dtype)
        middle = (low + high) / 2
        off = [2.0**-25, 2.0**-30, 2.0**-31, 2.0**-40, 2.0**-51]
        found += [low, middle, *(middle * (1 + d) for d in off), *(middle * (1 - d) for d in off)]
        found += [math.nextafter(middle, 0.0), math.nextafter(middle, math.inf)]
    return np.array([*found, *(-x for x in found)])


@pytest.mark.parametrize("dtype", NARROWER)
def test_numbers_next_to_a_midpoint_are_rounded_once(dtype: str) -> None:
    """Subnormals, the smallest normal number and the step to infinity are among them."""
    require_one_rounding(traps(dtype), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_through_float32_would_fall_into_these_traps(dtype: str) -> None:
    values = traps(dtype)
    with np.errstate(over="ignore"):
        twice = [pattern(x, dtype) for x in values.astype(np.float32).astype(np.float64).clip(-1e39, 1e39).tolist()]
    assert twice != [pattern(x, dtype) for x in values.tolist()]


@pytest.mark.parametrize("dtype", NARROWER)
def test_signs_of_zero_overflow_and_the_far_ends_of_float64(dtype: str) -> None:
    far = [0.0, 5e-324, 1e-320, 1e-46, 3e-8, 65519.99, 65520.0, 65536.0, 3.4e38, 3.5e38, 1e39, 1.7e308]
    values = np.array([*far, *(-x for x in far)])
    require_one_rounding(values, dtype)
    infinite = np.array([math.inf, -math.inf])
    assert by_kernel(infinite, dtype).tolist() == [INFINITY[dtype], INFINITY[dtype] | SIGN[dtype]]
    assert raw(round_to(torch.from_numpy(infinite), DTYPES[dtype])).tolist() == by_kernel(infinite, dtype).tolist()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@examples(150)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_any_float32_is_rounded_once(dtype: str, values: list[float]) -> None:
    single = np.array(values, np.float32)
    wanted = [pattern(x, dtype) for x in values]
    assert raw(round_to(torch.from_numpy(single), DTYPES[dtype])).tolist() == wanted
    assert by_kernel(single, dtype).tolist() == wanted


def test_float64_stays_what_it_is() -> None:
    values = np.array([0.0, -0.0, 5e-324, 1.1, -1.7e308])
    assert raw(round_to(torch.from_numpy(values), DTYPES["F64"])).tolist() == values.view(np.uint64).tolist()
    assert by_kernel(values, "F64").tolist() == values.view(np.uint64).tolist()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_stored_16_bit_number_survives_widening_and_rounding(dtype: str) -> None:
    bits = np.arange(65_536, dtype=np.uint16)
    bits = bits[(bits & INFINITY[dtype]) != INFINITY[dtype]]
    sign = np.where(bits & 0x8000, -1.0, 1.0)
    wanted = np.array([value(b & 0x7FFF, dtype) for b in bits.tolist()]) * sign
    out = np.empty(len(bits), np.float32)
    widened(out, bits, kernels.KINDS[dtype])
    assert out.astype(np.float64).view(np.uint64).tolist() == wanted.view(np.uint64).tolist()
    for x in (wanted, wanted.astype(np.float32)):
        assert raw(round_to(torch.from_numpy(x), DTYPES[dtype])).tolist() == bits.tolist()
        assert by_kernel(x, dtype).tolist() == bits.tolist()


def test_all_kinds_of_nan_become_the_quiet_one() -> None:
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0x3F800000], dtype=torch.int32)
    assert canonical_nan(bits.view(torch.float32)).view(torch.int32).tolist() == [
        *([0x7FC00000] * 4),
        0x7F800000,
        0x3F800000,
    ]
