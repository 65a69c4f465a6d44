"""The strategies on whole matrices, written from their equations with numpy's own decompositions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Gradient = Callable[[Matrix], Matrix]


def product(u: Matrix, s: Matrix, vt: Matrix) -> Matrix:
    found: Matrix = (u * s) @ vt
    return found


def average(taus: Sequence[Matrix], w: Sequence[float]) -> Matrix:
    return summed(taus, [x / sum(w) for x in w])


def summed(taus: Sequence[Matrix], w: Sequence[float]) -> Matrix:
    found: Matrix = np.tensordot(np.array(w), np.stack(taus), 1)
    return found


def rank_for(values: Matrix, share: float) -> int:
    return int(np.searchsorted(np.cumsum(values), share * values.sum() * (1 - 1e-14))) + 1


def star(taus: Sequence[Matrix], w: Sequence[float], eta: float) -> Matrix:
    def cut(tau: Matrix) -> Matrix:
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        if s[0] == 0:
            return tau
        r = min(rank_for(s, eta), len(s))
        return product(u[:, :r], s[:r] * s.sum() / s[:r].sum(), vt[:r])

    return average([cut(tau) for tau in taus], w)


def truncated(tau: Matrix, r: int) -> Matrix:
    u, s, vt = np.linalg.svd(tau, full_matrices=False)
    return product(u[:, :r], s[:r], vt[:r])


def iso_c(taus: Sequence[Matrix], w: Sequence[float]) -> Matrix:
    u, s, vt = np.linalg.svd(summed(taus, w), full_matrices=False)
    return product(u, np.full(len(s), s.mean()), vt)


def whitened(a: Matrix) -> Matrix:
    """A (A^T A)^(-1/2), by the eigenvalues of the smaller Gram matrix."""
    if a.shape[0] < a.shape[1]:
        return whitened(a.T).T
    values, q = np.linalg.eigh(a.T @ a)
    return product(a @ q, 1 / np.sqrt(values), q.T)


def iso_cts(taus: Sequence[Matrix], w: Sequence[float], common: float) -> Matrix:
    u, s, vt = np.linalg.svd(summed(taus, w), full_matrices=False)
    r, k = len(s), len(taus)
    own = round((r - int(common * r)) / k)
    c = r - k * own
    us, ss, vs = [u[:, :c]], [s[:c]], [vt[:c].T]
    for tau, weight in zip(taus, w, strict=True):
        a, z, bt = np.linalg.svd(weight * tau - u[:, :c] @ (u[:, :c].T @ (weight * tau)), full_matrices=False)
        us.append(a[:, :own])
        ss.append(z[:own])
        vs.append(bt[:own].T)
    left, right = whitened(np.hstack(us)), whitened(np.hstack(vs))
    return product(left, np.full(left.shape[1], np.concatenate(ss).mean()), right.T)


def tsv_m(taus: Sequence[Matrix], w: Sequence[float]) -> Matrix:
    q = max(1, min(taus[0].shape) // len(taus))
    parts = [np.linalg.svd(weight * tau, full_matrices=False) for tau, weight in zip(taus, w, strict=True)]
    left = whitened(np.hstack([u[:, :q] for u, _, _ in parts]))
    right = whitened(np.hstack([vt[:q].T for _, _, vt in parts]))
    return product(left, np.concatenate([s[:q] for _, s, _ in parts]), right.T)


def ties(parts: Sequence[Matrix], w: Sequence[float], density: float) -> Matrix:
    """Trim, elect by the sum, disjoint weighted mean; element by element."""
    count = max(1, int(density * parts[0].size + 1e-9))
    kept = []
    for part in parts:
        order = [i for _, i in sorted((-abs(value), i) for i, value in enumerate(part.reshape(-1).tolist()))]
        mask = np.zeros(part.size, bool)
        mask[order[:count]] = True
        kept.append(np.where(mask.reshape(part.shape), part, 0.0))
    merged = np.zeros_like(parts[0])
    for at in np.ndindex(merged.shape):
        values = [(weight * x[at], weight) for x, weight in zip(kept, w, strict=True)]
        plus = sum(v for v, _ in values) >= 0
        chosen = [(v, weight) for v, weight in values if (v > 0 if plus else v < 0)]
        merged[at] = sum(v for v, _ in chosen) / (sum(weight for _, weight in chosen) or 1.0)
    return merged


def knots(taus: Sequence[Matrix], w: Sequence[float], density: float) -> Matrix:
    u, s, vt = np.linalg.svd(np.hstack(taus), full_matrices=False)
    signs = np.sign(u[abs(u).argmax(axis=0), np.arange(len(s))])
    rows = (s * signs)[:, None] * vt
    return product(u, signs, ties(np.split(rows, len(taus), axis=1), w, density))


def descended(gradient: Gradient, start: Matrix, time: float, fastest: float) -> Matrix:
    """Gradient flow by the classical Runge-Kutta method in steps of a fortieth, time in units of 1 / fastest."""
    steps = 1 + int(40 * time)
    x, h = start, time / steps / fastest
    for _ in range(steps):
        a = -gradient(x)
        b = -gradient(x + h / 2 * a)
        c = -gradient(x + h / 2 * b)
        d = -gradient(x + h * c)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def wudi_grams(taus: Sequence[Matrix], w: Sequence[float]) -> list[Matrix]:
    return [weight * tau.T @ tau / np.sum(tau * tau) for tau, weight in zip(taus, w, strict=True)]


def regmean(ws: Sequence[Matrix], grams: Sequence[Matrix]) -> Matrix:
    """The W with W sum G_i = sum W_i G_i, of least norm."""
    right = np.sum([x @ g for x, g in zip(ws, grams, strict=True)], axis=0)
    inverse = np.linalg.pinv(np.sum(grams, axis=0), rcond=1e-13)
    return product(right, np.ones(len(inverse)), inverse)


def leading(tau: Matrix, energy: float) -> Matrix:
    if energy == 1:
        return tau
    _, s, _ = np.linalg.svd(tau, full_matrices=False)
    return truncated(tau, rank_for(s * s, energy))


def dop_gradient(taus: Sequence[Matrix], a: Sequence[float], energy: float, space: str) -> tuple[Gradient, float]:
    """Half the gradient of the loss of dual projections, and the fastest rate of its descent."""
    parts = [leading(tau, energy) for tau in taus]
    p = np.sum([c * t @ t.T for t, c in zip(parts, a, strict=True)], axis=0) * ("u" in space)
    q = np.sum([c * t.T @ t for t, c in zip(parts, a, strict=True)], axis=0) * ("v" in space)

    terms = [
        (tau, c * t @ t.T * ("u" in space), c * t.T @ t * ("v" in space))
        for tau, t, c in zip(taus, parts, a, strict=True)
    ]

    def gradient(d: Matrix) -> Matrix:
        total: Matrix = np.sum([left @ (d - tau) + (d - tau) @ right for tau, left, right in terms], axis=0)
        return total

    return gradient, float(np.linalg.norm(p, 2) + np.linalg.norm(q, 2))


def dop_exact(taus: Sequence[Matrix], a: Sequence[float]) -> Matrix:
    """The minimum for full energy, as one linear system: (1 x P + Q x 1) vec D = vec R."""
    out, rest = taus[0].shape
    p = np.sum([c * t @ t.T for t, c in zip(taus, a, strict=True)], axis=0)
    q = np.sum([c * t.T @ t for t, c in zip(taus, a, strict=True)], axis=0)
    r = 2 * np.sum([c * t @ t.T @ t for t, c in zip(taus, a, strict=True)], axis=0)
    system = np.kron(p, np.eye(rest)) + np.kron(np.eye(out), q)
    found: Matrix = np.linalg.lstsq(system, r.reshape(-1), rcond=1e-12)[0].reshape(out, rest)
    return found


def cosine(v: Matrix, d: Matrix) -> float:
    c = v @ v.T @ d
    return float(np.sum(c * d) / (np.linalg.norm(c) * np.linalg.norm(d)))
