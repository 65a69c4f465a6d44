"""Distances between whole models, and the geometry of affine combinations that follows from them alone.

A model is one point: all its merged tensors, flattened. With D_ij = |x_i - x_j|^2, for coefficients that sum to one,

    |sum_a c_a x_a - x_i|^2 = sum_a c_a D_ai - 1/2 sum_ab c_a c_b D_ab

so that one pass over the models is enough for rules that move an affine combination about; what remains is arithmetic
on k x k numbers in float64. Distances are unchanged when everything is shifted, which matters for weights: unlike
gradients they have no meaningful zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, NonFiniteError, some
from crdtmerge.numerics import reduction
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.scalars import left_sum
from crdtmerge.strategies.protocol import Meta, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

Matrix = NDArray[np.float64]
TOGETHER_MAX = 1 << 20
"""Squares that are held at once."""

Points = Callable[[Unit], Sequence["Tensor"]]


def everyone(view: View, strategy: str) -> tuple[Meta, ...]:
    """The contributions of a model whose every tensor all of them have. Raises MismatchError if one lacks some.

    Between models that share only some tensors there is no distance: one that brings few would be near to all.
    """
    whole = view.meta(view.names[0])
    lacking = [name for name in view.names if view.meta(name) != whole]
    if lacking:
        raise MismatchError(
            f"strategy '{strategy}' compares whole models, and not all contributions have {some(lacking)}. Let the "
            "base stand in with --missing base, or leave the tensors out with --exclude."
        )
    return whole


def squared_distances(view: View, k: int, points: Points = lambda u: u.xs) -> Matrix:
    """D_ij = sum over all tensors and elements of (x_i - x_j)^2, for the k contributions or k ``points`` made of them.

    In float64; each tensor's sum in the order of ``numerics.reduction``, the tensors' sums in the order of their names,
    so that blocks, threads and machines cannot matter. Differences first, squares afterwards: dot products would
    lose what is small beside the weights themselves. Raises NonFiniteError where a distance exceeds float64.
    """
    pairs = [(i, j) for i in range(k) for j in range(i)]

    def work(u: Unit) -> Matrix:
        return block_sums(points(u), pairs).cpu().numpy() if pairs else np.zeros((0, 0))

    parts: dict[str, list[Matrix]] = {}
    for name, part in view.scan(work):
        parts.setdefault(name, []).append(part)
    whole = np.zeros((k, k))
    for found in parts.values():
        for row, (i, j) in zip(np.concatenate(found, axis=1), pairs, strict=True):
            whole[i, j] = whole[j, i] = whole[i, j] + reduction.fold(row)
    if not np.isfinite(whole).all():
        raise NonFiniteError(
            "the squared distance between two contributions exceeds float64, so nothing can be said of who is near "
            "whom. Leave out the contribution or the tensors with such numbers."
        )
    return whole


def block_sums(xs: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """For each pair the sums over blocks of (x_i - x_j)^2: float64 [pairs, blocks].

    Small tensors, of which models have many, are summed for all pairs at once, without the zeros that fill a block:
    no square is changed by adding them.
    """
    n = xs[0].numel()
    if n > reduction.LANES or n * len(pairs) > TOGETHER_MAX:
        return torch.stack([reduction.block_sums(squares(xs[i] - xs[j])) for i, j in pairs])
    width = 1
    while width < n:
        width *= 2
    stack = torch.stack(list(xs))
    first, second = (torch.tensor(side, device=stack.device) for side in zip(*pairs, strict=True))
    rows = torch.zeros((len(pairs), width), dtype=torch.float64, device=stack.device)
    rows[:, :n] = squares(stack[first] - stack[second])
    while width > 1:
        width //= 2
        rows = rows[:, :width] + rows[:, width:]
    return rows


def squares(x: Tensor) -> Tensor:
    """x^2, one multiplication an element."""
    return x * x


def of_mixtures(d: Matrix, a: Matrix) -> Matrix:
    """Squared distances between y_i = sum_j a_ij x_j, rows of ``a`` summing to one, from those between the x_j.

    |y_i - y_j|^2 = B_ij - (B_ii + B_jj) / 2 with B = A D A^T. Equal rows are at distance zero exactly.
    """
    b = _product(_product(a, d), a.T)
    k = len(b)
    found = np.zeros((k, k))
    for i in range(k):
        for j in range(i):
            between = (b[i, j] + b[j, i]) * 0.5 - (b[i, i] + b[j, j]) * 0.5
            found[i, j] = found[j, i] = between if between > 0.0 else 0.0
    return found


def _product(a: Matrix, b: Matrix) -> Matrix:
    """The product of two small matrices, each entry summed from left to right."""
    acc = np.zeros((len(a), b.shape[1]))
    for j in range(len(b)):
        acc = acc + a[:, j : j + 1] * b[j : j + 1, :]
    return acc


def from_point(d: Matrix, c: Sequence[float]) -> list[float]:
    """The distances |sum_a c_a x_a - x_i| of an affine combination from every x_i."""
    along = np.zeros(len(c))
    for a, share in enumerate(c):
        along = along + d[a] * share
    spread = left_sum(share * float(v) for share, v in zip(c, along, strict=True)) * 0.5
    squared = [float(v) - spread for v in along]
    return [math.sqrt(v) if v > 0.0 else 0.0 for v in squared]


def nearest(d: Matrix, i: int, count: int, ids: Sequence[bytes]) -> list[int]:
    """The ``count`` points nearest to x_i, itself first; of equally near ones those with the lowest ids."""
    order = sorted(range(len(ids)), key=lambda j: (float(d[i, j]), j != i, ids[j]))
    return order[:count]


def medoid(d: Matrix, ids: Sequence[bytes]) -> int:
    """The point with the least sum of distances to all others; of equal sums the one with the lowest id."""
    spread = [left_sum(math.sqrt(float(v)) for v in row) for row in d]
    return min(range(len(ids)), key=lambda i: (spread[i], ids[i]))


def majority(k: int) -> int:
    """The smallest number that is more than half of k."""
    return k // 2 + 1


def majority_radius(d: Matrix) -> tuple[float, int]:
    """The least radius about one of the points within which a majority of them lies, and that point's position.

    With an honest majority it is at most the largest distance between two honest points, whatever the others do.
    """
    most = majority(len(d)) - 1
    radii = [sorted(map(float, row))[most] for row in d]
    at = min(range(len(radii)), key=lambda i: radii[i])
    return math.sqrt(radii[at]), at
