"""The equations of mergekit's deterministic methods in float64 numpy, a tensor at a time.

Written from the equations, without mergekit's code or ours. x_i are the models, b the base, w_i the weights, d_i = x_i
- b. Where an equation selects elements by rank, the order is (largest magnitude, lowest index).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Xs = Sequence[Array]
Weights = Sequence[float]


def linear(xs: Xs, b: Array | None, w: Weights, *, normalize: bool = True) -> Array:
    """sum w_i x_i, divided by sum w_i if normalised."""
    whole = _sum(wi * x for wi, x in zip(w, xs, strict=True))
    return whole / math.fsum(w) if normalize else whole


def passthrough(xs: Xs, b: Array | None, w: Weights, *, scale: float = 1.0) -> Array:
    """x times scale."""
    return xs[0] * scale


def slerp(xs: Xs, b: Array | None, w: Weights, *, t: float) -> Array:
    """(sin((1-t) W) x_0 + sin(t W) x_1) / sin W; the straight line where |cos W| > 0.9995."""
    cosine = float(_unit(xs[0]).ravel() @ _unit(xs[1]).ravel())
    if abs(cosine) > 0.9995:
        return (1 - t) * xs[0] + t * xs[1]
    return _arc(xs[0], xs[1], math.acos(cosine), t)


def nuslerp(xs: Xs, b: Array | None, w: Weights, *, rows: str = "") -> Array:
    """Slerp of v_i = x_i (or d_i) with t = w_1 / (w_0 + w_1), flattened, by rows ("last") or by columns ("first")."""
    t = w[1] / (w[0] + w[1])
    v = [x if b is None else x - b for x in xs]
    found = np.empty_like(v[0])
    if not rows or v[0].ndim == 1:
        found[...] = _arc(v[0], v[1], _angle(v[0], v[1]), t)
    else:
        axis = {"last": 0, "first": 1}[rows]
        for i in range(v[0].shape[axis]):
            at = (i, slice(None)) if axis == 0 else (slice(None), i)
            found[at] = _arc(v[0][at], v[1][at], _angle(v[0][at], v[1][at]), t)
    return found if b is None else found + b


def multislerp(xs: Xs, b: Array | None, w: Weights) -> Array:
    """exp_m(sum w_i (u_i - <u_i, m> m)) sum w_i |v_i|, with m the direction of sum w_i u_i and sum w_i = 1."""
    shares = [wi / math.fsum(w) for wi in w]
    v = [x if b is None else x - b for x in xs]
    u = [_unit(x) for x in v]
    m = _unit(_sum(a * x for a, x in zip(shares, u, strict=True)))
    tangent = _sum(a * (x - np.vdot(x, m) * m) for a, x in zip(shares, u, strict=True))
    length = float(np.linalg.norm(tangent))
    point = m * math.cos(length) + tangent * (math.sin(length) / length if length else 1.0)
    found = point * math.fsum(a * float(np.linalg.norm(x)) for a, x in zip(shares, v, strict=True))
    return found if b is None else found + b


def karcher(xs: Xs, b: Array | None, w: Weights, *, steps: int = 200, tolerance: float = 1e-15) -> Array:
    """The m on the sphere with sum_i w_i log_m(u_i) = 0, times sum w_i |x_i|, where sum w_i = 1."""
    shares = [wi / math.fsum(w) for wi in w]
    u = [_unit(x) for x in xs]
    m = _unit(_sum(a * x for a, x in zip(shares, u, strict=True)))
    for _ in range(steps):
        step = np.zeros_like(m)
        for a, x in zip(shares, u, strict=True):
            angle = _angle(m, x)
            step += a * (angle / math.sin(angle) if angle > 1e-12 else 1.0) * (x - float(np.vdot(x, m)) * m)
        length = float(np.linalg.norm(step))
        if length < tolerance:
            break
        m = _unit(math.cos(length) * m + math.sin(length) / length * step)
    return m * math.fsum(a * float(np.linalg.norm(x)) for a, x in zip(shares, xs, strict=True))


def task_arithmetic(xs: Xs, b: Array | None, w: Weights, *, scale: float = 1.0) -> Array:
    """b + lambda sum w_i d_i."""
    assert b is not None
    return b + scale * _sum(wi * (x - b) for wi, x in zip(w, xs, strict=True))


def ties(xs: Xs, b: Array | None, w: Weights, *, density: float, scale: float = 1.0) -> Array:
    """Trim each d_i to its density, elect the sign of sum w_i d_i, take the weighted mean of those that agree."""
    assert b is not None
    kept = [_between(x - b, 0, max(1, math.floor(density * b.size))) for x in xs]
    return b + scale * _agreed(kept, w, mean=True)


def breadcrumbs(
    xs: Xs, b: Array | None, w: Weights, *, density: float, gamma: float, scale: float = 1.0, elect: bool = False
) -> Array:
    """Drop the gamma n largest and the smallest of each d_i so that density n are left; then add (elected) up."""
    assert b is not None
    top = math.floor(gamma * b.size)
    kept = [_between(x - b, top, top + math.floor(density * b.size)) for x in xs]
    summed = _agreed(kept, w, mean=False) if elect else _sum(wi * d for wi, d in zip(w, kept, strict=True))
    return b + scale * summed


def model_stock(xs: Xs, b: Array | None, w: Weights) -> Array:
    """t mean(x) + (1-t) b with t = k c / (1 + (k-1) c) and c the mean cosine of the pairs of d_i."""
    assert b is not None
    units = [_unit(x - b).ravel() for x in xs]
    c = float(np.mean([float(one @ other) for one, other in itertools.combinations(units, 2)]))
    t = len(xs) * c / (1 + (len(xs) - 1) * c)
    return t * _sum(xs) / len(xs) + (1 - t) * b


def sce(xs: Xs, b: Array | None, w: Weights, *, select_topk: float = 1.0) -> Array:
    """Keep floor(select_topk n) positions of largest variance; w_i = mean(d_i^2) / sum; elect signs; weighted mean.

    The variance is that of all pairs, sum (d_i - d_j)^2 / k^2, whose differences are exact: equal variances are equal.
    """
    assert b is not None
    d = np.stack([x - b for x in xs])
    variance = _sum((one - other) ** 2 for one, other in itertools.combinations(d, 2))
    kept = np.zeros(b.size)
    kept[np.argsort(-variance.ravel(), kind="stable")[: math.floor(select_topk * b.size)]] = 1.0
    d = d * kept.reshape(b.shape)
    energy = [float(np.mean(one**2)) for one in d]
    shares = [one / math.fsum(energy) for one in energy] if math.fsum(energy) > 0 else [1.0 / len(xs)] * len(xs)
    agree = np.sign(d) == np.where(d.sum(0) >= 0, 1.0, -1.0)
    above = _sum(a * one * yes for a, one, yes in zip(shares, d, agree, strict=True))
    below = _sum(a * yes for a, yes in zip(shares, agree, strict=True))
    return b + above / np.where(below == 0, 1.0, below)


def nearswap(xs: Xs, b: Array | None, w: Weights, *, t: float) -> Array:
    """s x + (1 - s) b with s = clip(t / |x - b|, 0, 1)."""
    assert b is not None
    distance = np.abs(xs[0] - b)
    s = np.clip(t / np.where(distance == 0, 1.0, distance), 0, 1)
    return np.where(distance == 0, b, s * xs[0] + (1 - s) * b)


def arcee_fusion(xs: Xs, b: Array | None, w: Weights) -> Array:
    """Keep d where |d| KL(softmax(x) || softmax(b)) by rows reaches median + 1.5 (upper - lower quartile)."""
    assert b is not None
    p, q = _softmax(xs[0]) + 1e-8, _softmax(b) + 1e-8
    divergence = np.sum(p * np.log(p / q), axis=-1, keepdims=True)
    importance = np.abs(xs[0] - b) * divergence
    ranked = np.sort(importance.ravel())
    low, middle, high = (ranked[math.floor(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75))
    return b + np.where(importance >= middle + 1.5 * (high - low), xs[0] - b, 0.0)


def ram(xs: Xs, b: Array | None, w: Weights, *, epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.2) -> Array:
    """Where one |d_i| alone exceeds epsilon it counts whole (1 + r clip(shared_i / unique_i, 0, alpha) fold), where
    several do, their mean. shared_i and unique_i count where |d_i| exceeds epsilon with others and alone.
    """
    assert b is not None
    d = np.stack([x - b for x in xs])
    active = np.abs(d) > epsilon
    count = active.sum(0)
    for i in range(len(xs)):
        alone = active[i] & (count == 1)
        ratio = int((active[i] & (count > 1)).sum()) / max(int(alone.sum()), 1)
        d[i] = np.where(alone, (1 + r * min(ratio, alpha)) * d[i], d[i])
    found: Array = b + (d * active).sum(0) / np.where(count == 0, 1, count)
    return found


# ---------------------------------------------------------------- parts of the equations


def _sum(parts: object) -> Array:
    total: Array = np.sum(np.stack(list(parts)), axis=0)  # type: ignore[call-overload]
    return total


def _unit(x: Array) -> Array:
    unit: Array = x / np.linalg.norm(x)
    return unit


def _angle(x: Array, y: Array) -> float:
    """The angle between two vectors, exact near 0 too."""
    u, v = _unit(x), _unit(y)
    return 2 * math.atan2(float(np.linalg.norm(u - v)), float(np.linalg.norm(u + v)))


def _arc(x: Array, y: Array, angle: float, t: float) -> Array:
    if abs(math.sin(angle)) < 1e-8:
        return (1 - t) * x + t * y
    found: Array = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    return found


def _between(d: Array, first: int, end: int) -> Array:
    """The elements of rank first..end-1 by magnitude, the others zero."""
    order = np.argsort(-np.abs(d).ravel(), kind="stable")
    kept = np.zeros(d.size)
    kept[order[first:end]] = d.ravel()[order[first:end]]
    return kept.reshape(d.shape)


def _agreed(kept: Xs, w: Weights, *, mean: bool) -> Array:
    weighted = [wi * d for wi, d in zip(w, kept, strict=True)]
    gamma = np.where(_sum(weighted) >= 0, 1.0, -1.0)
    agree = [np.sign(d) == gamma for d in weighted]
    above = _sum(d * yes for d, yes in zip(weighted, agree, strict=True))
    below = _sum(wi * yes for wi, yes in zip(w, agree, strict=True))
    return above / np.where(below == 0, 1.0, below) if mean else above


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    found: Array = powers / powers.sum(axis=-1, keepdims=True)
    return found
