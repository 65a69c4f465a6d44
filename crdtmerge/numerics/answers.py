"""Known answers: what every fused kernel must compute from fixed inputs, as the torch definition computes it.

A test recomputes them through the strategies' own ``apply``; ``make answers`` prints the table anew when the format
version changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.philox import Stream
from crdtmerge.numerics.programs import Affine, Consensus
from crdtmerge.numerics.selection import TOP, Search

ELEMENTS = 70_001
"""More than one reduction block, and no multiple of any tile."""

CONTRIBUTIONS = 3
START = 65_536 * 3


@dataclass(frozen=True)
class Sample:
    """Inputs of the known answers: raw xs [3, n] and base [n], and the programs and searches that are tried."""

    xs: NDArray[Any]
    base: NDArray[Any]
    start: int
    affine: tuple[Affine, ...]
    consensus: tuple[Consensus, ...]
    searches: tuple[tuple[Search, bool], ...]


def values(count: int) -> NDArray[np.float64]:
    """Numbers of both signs over 30 binades, with repeated magnitudes and zeros, from integer arithmetic alone."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
    sign = np.where(z & np.uint64(1), 1.0, -1.0)
    mantissa = ((z >> np.uint64(11)) & np.uint64(0xFFFF_FFFF_FFFF)).astype(np.float64)
    exponent = ((z >> np.uint64(1)) & np.uint64(31)).astype(np.int64) - 64
    return np.where(z & np.uint64(0xF800) == 0, 0.0, sign * np.ldexp(mantissa, exponent))


def stored(numbers: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Numbers in a storage type, as unsigned integers; bfloat16 by cutting float32."""
    if dtype == "F64":
        return numbers.view(np.uint64)
    single = numbers.astype(np.float32)
    if dtype == "F32":
        return single.view(np.uint32)
    if dtype == "BF16":
        return (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return single.astype(np.float16).view(np.uint16)


def sample(dtype: str) -> Sample:
    """The inputs for one storage type."""
    rows = stored(values((CONTRIBUTIONS + 1) * ELEMENTS), dtype).reshape(CONTRIBUTIONS + 1, ELEMENTS)
    own = "F32" if dtype in ("BF16", "F16") else "F64"
    middle = {"F32": 0x3B800000, "F64": 0x3F70000000000000}[own]
    streams = tuple(Stream(7 + i, 11, 13, 17 * i) for i in range(CONTRIBUTIONS))
    cuts = tuple((middle + (i << 3), START + 9_999 * i) for i in range(CONTRIBUTIONS))
    weights = (1.0, 0.75, 2.5)
    return Sample(
        xs=rows[:CONTRIBUTIONS],
        base=rows[CONTRIBUTIONS],
        start=START,
        affine=(Affine(weights, divisor=4.25), Affine((0.1, -0.7, 0.3)), Affine(weights, on_base=True, scale=0.3)),
        consensus=(
            Consensus(weights, cuts, scale=0.5),
            Consensus(
                weights, streams=streams, keep_below=(1 << 30) + (3 << 14), rescale=4.0, elect="count", combine="sum"
            ),
            Consensus(weights, streams=streams, keep_below=(3 << 30) + (1 << 13), rescale=1.5, elect="none"),
            Consensus((1.0, 1.0, 1.0), elect="none", combine="max"),
        ),
        searches=(
            (Search.over(ELEMENTS // 5, TOP[own]), False),
            (Search.over(ELEMENTS // 5, TOP[own]).guess(middle - 1000, middle + 100_000), False),
            (Search.over(ELEMENTS // 5, TOP["F64"]), True),
        ),
    )


EPSILON, ORTHOGONAL, SWEEPS = math.ldexp(1.0, -52), math.ldexp(1.0, -49), 40
TURNED_BY = 30
"""The bounds of ``decompositions``, and how many columns of the matrix below decide how its rows are turned."""


def dense() -> NDArray[np.float64]:
    """A matrix [26, 37] of numbers of many sizes, with two equal rows and a column of zeros."""
    matrix = values(26 * 37).reshape(26, 37)
    matrix[25], matrix[:, 11] = matrix[3], 0.0
    return matrix


ANSWERS = {
    "affine/F64/F64": "69295742e8c0f3aa",
    "affine/F64/F32": "33a79032b6fb771d",
    "affine/F64/BF16": "b3067d169f1a4254",
    "affine/F64/F16": "a4ee46ffcd92172d",
    "affine/F32/F64": "548f614f31fc90d1",
    "affine/F32/F32": "7a5b08443381faf3",
    "affine/F32/BF16": "ae7cd8985e749842",
    "affine/F32/F16": "93572d9b3d248ecc",
    "affine/BF16/F64": "7996053ac8094ab2",
    "affine/BF16/F32": "547fe41b9f43eec3",
    "affine/BF16/BF16": "883a9ce1bea3d02f",
    "affine/BF16/F16": "beddbb60e7981bc6",
    "affine/F16/F64": "be78664c234c8e61",
    "affine/F16/F32": "a06d4b0bed7619b7",
    "affine/F16/BF16": "e2d9834e6a88c3ae",
    "affine/F16/F16": "e9df046947dd565b",
    "consensus/F64/F64": "c0f8fe54e8ed6124",
    "consensus/F64/F32": "13d981edf77c8fef",
    "consensus/F64/BF16": "905afa3fe333d2a7",
    "consensus/F64/F16": "b75b09d917f93ef7",
    "consensus/F32/F64": "11a132ee2618b848",
    "consensus/F32/F32": "1a8a90535188a502",
    "consensus/F32/BF16": "5477e095203b331c",
    "consensus/F32/F16": "feda74ba21c2e56e",
    "consensus/BF16/F64": "1b7beee4d193c618",
    "consensus/BF16/F32": "27906dfbf3119852",
    "consensus/BF16/BF16": "9e4ad47c93fff4e5",
    "consensus/BF16/F16": "8018f6c3874dae94",
    "consensus/F16/F64": "b2181bdb9032e817",
    "consensus/F16/F32": "cf2e4f9b32254850",
    "consensus/F16/BF16": "185636f70a53114a",
    "consensus/F16/F16": "0a1f0f14d9709e43",
    "gram/F64/": "47778ea024079bc8",
    "gram/F32/": "71aad355c4c56651",
    "gram/BF16/": "42213ab662a5fedf",
    "gram/F16/": "55f74b465771d286",
    "count/F64/": "302db75d0f21ff7f",
    "count/F32/": "3bfe3f312cfd3a00",
    "count/BF16/": "101e1e43f12935c7",
    "count/F16/": "42622b4a5c86610e",
    "decompositions/F64/": "4ae85e76474a4ccc",
}
"""Kernel/input/output to the first 16 hexadecimal digits of the SHA-256 of its results on the sample."""
