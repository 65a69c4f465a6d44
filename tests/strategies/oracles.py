"""What the strategies compute, written from their equations in exact fractions; and how far a float may be from it.

The oracles share no code with the package. A result is ``within`` a bound of the exact one if it is the
nearest number of its format to some number that is no further from it; the bounds leave most elements no choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from tests.numerics.formats import nearest
from tests.numerics.random123 import kept, name

Row = list[Fraction]
ZERO = Fraction(0)
DOUBLE, SINGLE = Fraction(1, 2**53), Fraction(1, 2**24)
"""The relative error of one rounding in float64 and in float32."""


def exact(x: torch.Tensor) -> Row:
    """The elements of a tensor as fractions."""
    return [Fraction(v) for v in x.double().reshape(-1).tolist()]


def within(found: torch.Tensor, wanted: Sequence[Fraction], bound: Sequence[Fraction], dtype: str) -> int:
    """Require every element to be one rounding of something within a bound; how many had no choice."""
    decided = 0
    values = found.double().reshape(-1).tolist()
    for i, (got, middle, off) in enumerate(zip(values, wanted, bound, strict=True)):
        low, high = nearest(middle - off, dtype), nearest(middle + off, dtype)
        assert low <= got <= high, f"element {i}: {got!r} is not in [{low!r}, {high!r}]"
        decided += low == high
    return decided


# ---------------------------------------------------------------- linear combinations


def combination(xs: Sequence[Row], c: Sequence[Fraction]) -> Row:
    """sum_i c_i x_i."""
    return [sum((w * x[j] for w, x in zip(c, xs, strict=True)), ZERO) for j in range(len(xs[0]))]


def absolute(xs: Sequence[Row], c: Sequence[Fraction]) -> Row:
    """sum_i |c_i x_i|: what rounding errors are measured against."""
    return combination([[abs(v) for v in x] for x in xs], [abs(w) for w in c])


def task_vectors(xs: Sequence[Row], base: Row) -> list[Row]:
    """x_i - base."""
    return [[v - b for v, b in zip(x, base, strict=True)] for x in xs]


def scaled(x: Row, s: Fraction) -> Row:
    """s x."""
    return [s * v for v in x]


def added(x: Row, y: Row) -> Row:
    """x + y."""
    return [a + b for a, b in zip(x, y, strict=True)]


def magnitudes(x: Row) -> Row:
    """|x|."""
    return [abs(v) for v in x]


# ---------------------------------------------------------------- spherical ones, in float64 on whole vectors

Vector = NDArray[np.float64]


def angle(a: Vector, b: Vector) -> float:
    """The angle between unit vectors, by the form that is stable at both ends."""
    return 2.0 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b)))


def unit(a: Vector) -> Vector:
    """a / |a|."""
    return a / np.linalg.norm(a)


def slerp(a: Vector, b: Vector, t: float) -> Vector:
    """Shoemake's formula on vectors as they are; the straight line where it does not apply."""
    if len(a) <= 1 or min(np.linalg.norm(a), np.linalg.norm(b)) < 1e-8:
        return (1 - t) * a + t * b
    w = angle(unit(a), unit(b))
    if math.cos(w) > 0.9995:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * w) * a + math.sin(t * w) * b) / math.sin(w)


def fold(xs: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """One by one, each time with the mean of the weights so far on the left."""
    merged = xs[0]
    for i in range(1, len(xs)):
        left = math.fsum(weights[:i]) / i
        merged = slerp(merged, xs[i], weights[i] / (left + weights[i]))
    return merged


def karcher(xs: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """The point of the sphere whose weighted tangents to all inputs sum to zero, times the mean of their norms."""
    shares = [w / math.fsum(weights) for w in weights]
    mean = sum((a * x for a, x in zip(shares, xs, strict=True)), np.zeros_like(xs[0]))
    if len(xs[0]) <= 1:
        return mean
    units = [unit(x) for x in xs]
    m = unit(sum((a * u for a, u in zip(shares, units, strict=True)), np.zeros_like(xs[0])))
    for _ in range(500):
        tangents = [angle(m, u) * unit(u - float(m @ u) * m) for u in units]
        step = sum((a * v for a, v in zip(shares, tangents, strict=True)), np.zeros_like(m))
        length = float(np.linalg.norm(step))
        if length < 1e-15:
            break
        m = unit(math.cos(length) * m + math.sin(length) / length * step)
    radius = math.fsum(a * float(np.linalg.norm(x)) for a, x in zip(shares, xs, strict=True))
    return radius * m


# ---------------------------------------------------------------- consensus


@dataclass(frozen=True)
class Consensus:
    """theta, how far a computed one may be from it, and where the election was not a matter of rounding."""

    theta: Row
    bound: Row
    sure: list[bool]


def consensus(
    xs: Sequence[Row],
    base: Row,
    weights: Sequence[Fraction],
    *,
    masks: Sequence[Sequence[bool]] | None = None,
    factor: Fraction = Fraction(1),
    elect: str = "sum",
    combine: str = "mean",
    scale: Fraction = Fraction(1),
    rounding: Fraction = DOUBLE,
) -> Consensus:
    """base + scale * combine(elect(masked tau_i * factor * w_i)), element by element."""
    k, theta, bound, sure = len(xs), [], [], []
    for j, b in enumerate(base):
        taus = [(x[j] - b) * factor if masks is None or masks[i][j] else ZERO for i, x in enumerate(xs)]
        own = [w * tau for w, tau in zip(weights, taus, strict=True)]
        mass = sum(map(abs, own), ZERO)
        plus, clear = _elected(own, elect, mass * rounding * (k + 4))
        agree = [elect == "none" or (v > 0 if plus else v < 0) for v in own]
        m, largest = _combined(own, weights, agree, combine)
        second = sorted(map(abs, own))[-2] if combine == "max" and k > 1 else None
        if second is not None and second and 0 < largest - second < largest * rounding * 8:
            clear = False
        theta.append(b + scale * m)
        # each tau is rounded relative to the numbers it is the difference of
        cancelled = sum((abs(w) * factor * (abs(x[j]) + abs(b)) for w, x in zip(weights, xs, strict=True)), ZERO)
        divisor = sum((w for w, a in zip(weights, agree, strict=True) if a), ZERO) if combine == "mean" else Fraction(1)
        size = (mass + cancelled) / (divisor or Fraction(1))
        bound.append(rounding * (k + 8) * (abs(b) + abs(scale) * abs(size)))
        sure.append(clear)
    return Consensus(theta, bound, sure)


def _elected(own: Sequence[Fraction], elect: str, close: Fraction) -> tuple[bool, bool]:
    """Whether plus is elected, and whether rounding could not have changed that."""
    if elect == "count":
        return sum((v > 0) - (v < 0) for v in own) >= 0, True
    total = sum(own, ZERO)
    return total >= 0, elect == "none" or total == 0 or abs(total) > close


def _combined(
    own: Sequence[Fraction], weights: Sequence[Fraction], agree: Sequence[bool], combine: str
) -> tuple[Fraction, Fraction]:
    """The merged task vector, and the largest magnitude in it."""
    chosen = [v if a else ZERO for v, a in zip(own, agree, strict=True)]
    best = max(chosen, key=lambda v: (abs(v), v))
    if combine == "max":
        return best, abs(best)
    total = sum(chosen, ZERO)
    if combine == "sum":
        return total, abs(best)
    mass = sum((w for w, a in zip(weights, agree, strict=True) if a), ZERO)
    return total / (mass or Fraction(1)), abs(best)


def drop_masks(seed: bytes, ids: Sequence[bytes], tensor: str, density: Fraction, elements: int) -> list[list[bool]]:
    """What DARE keeps of one tensor of each contribution."""
    return [kept(name(seed, "drop", one, tensor), density, 0, elements) for one in ids]


def trim_masks(
    models: Sequence[dict[str, torch.Tensor]], base: dict[str, torch.Tensor], density: Fraction, whole_model: bool
) -> dict[str, list[list[bool]]]:
    """What TIES keeps: the max(1, floor(density n)) largest |tau| in the compute dtype, by a stable sort."""
    names = sorted(base)
    masks: dict[str, list[list[bool]]] = {one: [] for one in names}
    for model in models:
        sizes = {one: _distance(model[one], base[one]) for one in names}
        for group in [names] if whole_model else [[one] for one in names]:
            places = [(-size, one, j) for one in group for j, size in enumerate(sizes[one])]
            count = max(1, math.floor(density * len(places)))
            chosen = {(one, j) for _, one, j in sorted(places)[:count]}
            for one in group:
                masks[one].append([(one, j) in chosen for j in range(len(sizes[one]))])
    return masks


def _distance(x: torch.Tensor, base: torch.Tensor) -> list[float]:
    real = np.float32 if x.element_size() == 2 else np.float64
    difference = x.double().reshape(-1).numpy().astype(real) - base.double().reshape(-1).numpy().astype(real)
    found: list[float] = abs(difference).astype(np.float64).tolist()
    return found
