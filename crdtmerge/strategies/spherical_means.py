"""Means on the sphere beside slerp: karcher, nuslerp, multislerp.

As in ``spherical``, a flattened tensor's result is sum_i c_i v_i, where v_i is theta_i or tau_i = theta_i - theta_0 and
the coefficients depend on the k x k matrix of the dot products <v_i, v_j> alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from crdtmerge.errors import MismatchError
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.programs import Program
from crdtmerge.numerics.scalars import acos, left_sum, nearest, sin
from crdtmerge.strategies.linear import shares
from crdtmerge.strategies.parameters import Number
from crdtmerge.strategies.protocol import Meta, Needs, Plan, Rng, Unit
from crdtmerge.strategies.spherical import SHORTEST_MEAN, Gram, InSpace, OnSphere, OppositeError, finite, karcher
from crdtmerge.strategies.whole_tensors import columns, from_columns, roots, row_sums, rows

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 1.0 / (1 << 20)
"""The sine below which two directions count as one line: a cosine in float64 tells angles from 2^-26 on from none."""


class KarcherParameters(InSpace):
    """Parameters of karcher."""

    max_iter: int = Field(100, ge=0, le=10_000, description="most steps of the fixed point")
    tolerance: Number = Field(Decimal("1e-12"), gt=0, description="length of a step at which it ends, in radians")
    epsilon: Number = Field(Decimal("1e-8"), ge=0, description="norm up to which a tensor has no direction")


class Karcher(OnSphere[KarcherParameters]):
    """Weighted Karcher mean of the directions, times the weighted mean of the norms, each tensor flattened.

        u_i   = v_i / |v_i|,  a_i = w_i / sum_j w_j
        m     : sum_i a_i log_m(u_i) = 0,  log_m(u) = W / sin W (u - cos W m),  cos W = <m, u>
        theta = m sum_i a_i |v_i|

    found by m <- exp_m(sum_i a_i log_m(u_i)) from the normalised mean. Tensors of norm ``epsilon`` or less have no
    direction and count for the norm alone; a tensor of one element is the weighted mean. Directions without a mean
    (opposite ones that balance) are refused. For two models of equal norms it is slerp.

    mergekit's karcher: equal weights, max_iter=10, tolerance=1e-5 and its base among the models; where the directions
    balance it takes the first.

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "karcher", 1, "statistics"
    reference = "Karcher, Comm. Pure Appl. Math. 30, 1977; mergekit's karcher"
    Params = KarcherParameters

    def coefficients(
        self, name: str, gram: Gram, meta: Sequence[Meta], elements: int, p: KarcherParameters
    ) -> list[float]:
        finite(name, self.name, gram)
        a = shares(meta)
        norms = [math.sqrt(gram[i, i]) for i in range(len(a))]
        pointing = [i for i, norm in enumerate(norms) if norm > nearest(p.epsilon) and meta[i].weight]
        if len(a) == 1 or elements <= 1 or not pointing:
            return a
        radius = left_sum(a[i] * norms[i] for i in range(len(a)))
        own = shares([meta[i] for i in pointing])
        cosine = [[bounded(float(gram[i, j]) / (norms[i] * norms[j])) for j in pointing] for i in pointing]
        lengths, limit = [norms[i] for i in pointing], nearest(p.tolerance)
        try:
            found = karcher(cosine, lengths, own, radius, steps=p.max_iter, tolerance=limit)
        except OppositeError as opposite:
            raise MismatchError(
                f"tensor {name!a}: opposite directions (cosine {opposite.cosine:.6f}) have no Karcher mean. "
                "Leave the tensor out with --exclude, or merge with --strategy linear."
            ) from None
        c = [0.0] * len(a)
        for i, value in zip(pointing, found, strict=True):
            c[i] = value
        return c


class NuSlerpParameters(InSpace):
    """Parameters of nuslerp."""

    granularity: Literal["tensor", "row", "column"] = Field(
        "tensor", description="interpolate flattened tensors, vectors along the last dimension, or along the first"
    )
    epsilon: Number = Field(Decimal("1e-7"), gt=0, description="least norm that a vector is divided by")


class NuSlerp(OnSphere[NuSlerpParameters]):
    """Spherical interpolation of two models, or of two task vectors, at t = w_2 / (w_1 + w_2).

        cos W = <v_1, v_2> / (max(|v_1|, epsilon) max(|v_2|, epsilon))
        theta = sin((1-t) W) / sin W * v_1 + sin(t W) / sin W * v_2   (+ theta_0)

    applied to the vectors as they are. Where |sin W| is below 2^-20 (vectors on one line, opposite ones too) it is
    (1-t) v_1 + t v_2. ``granularity`` says what a vector is; a tensor of one dimension is one vector. One model is
    itself.

    mergekit's nuslerp: nuslerp_flatten=false is ``granularity=row``, with nuslerp_row_wise=true ``column``; a base
    model given there is ``space=task_vectors`` here. Its line is 1e-8 wide, which is within the rounding of a cosine;
    of weights that sum to zero, which are refused here, it takes t = 1/2.

    Properties: commutative (each weight goes with its model); idempotent; not associative.
    """

    name, version, family = "nuslerp", 1, "statistics"
    reference = "mergekit's nuslerp; Shoemake, SIGGRAPH 1985"
    Params = NuSlerpParameters

    def needs(self, p: NuSlerpParameters) -> Needs:
        needs = super().needs(p)._replace(max_k=2)
        return needs if p.granularity == "tensor" else needs._replace(unit="tensor")

    def coefficients(
        self, name: str, gram: Gram, meta: Sequence[Meta], elements: int, p: NuSlerpParameters
    ) -> list[float]:
        finite(name, self.name, gram)
        a = shares(meta)
        if len(a) == 1 or p.granularity != "tensor":
            return a
        floor = nearest(p.epsilon)
        one, two = (max(math.sqrt(gram[i, i]), floor) for i in range(2))
        return arc(float(gram[0, 1]) / (one * two), a)

    def apply(self, u: Unit, plan: Plan, p: NuSlerpParameters, rng: Rng) -> Tensor:
        if p.granularity == "tensor" or len(u.xs) == 1 or not u.xs[0].numel():
            return super().apply(u, plan, p, rng)
        cut, join = (rows, lambda x, shape: x.reshape(-1)) if p.granularity == "row" else (columns, from_columns)
        v, w = (cut(x, u.shape) for x in (u.xs if p.space == "weights" else u.task_vectors()))
        floor = torch.full((len(v),), nearest(p.epsilon), dtype=v.dtype, device=v.device)
        one, two = (roots(row_sums(x * x)) for x in (v, w))
        one, two = torch.where(one < floor, floor, one), torch.where(two < floor, floor, two)
        a = plan["coefficients"][u.name]
        c = [arc(cosine, a) for cosine in (row_sums(v * w) / (one * two)).tolist()]
        left, right = (torch.tensor(column, dtype=v.dtype, device=v.device) for column in zip(*c, strict=True))
        found: Tensor = join(v * left[:, None] + w * right[:, None], u.shape)
        return found if u.base is None or p.space == "weights" else u.base + found

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: NuSlerpParameters, rng: Rng) -> Program | None:
        return super().program(name, meta, plan, p, rng) if p.granularity == "tensor" else None


class MultiSlerpParameters(InSpace):
    """Parameters of multislerp."""

    normalize: bool = Field(True, description="divide the weights by their sum")
    epsilon: Number = Field(Decimal("1e-8"), gt=0, description="what is added to a norm before dividing by it")


class MultiSlerp(OnSphere[MultiSlerpParameters]):
    """Barycentre on the sphere by one tangent step at the normalised mean of the directions, each tensor flattened.

        u_i   = v_i / (|v_i| + epsilon),  a_i = w_i / sum_j w_j (or w_i, unless ``normalize``)
        m     = sum_i a_i u_i,  n = m / |m|
        T     = sum_i a_i (u_i - <u_i, n> n)
        theta = (cos|T| n + sin|T| / |T| T) sum_i a_i |v_i|   (+ theta_0)

    T is m - <m, n> n, which is zero, so that theta is n sum_i a_i |v_i|: the direction of the weighted mean of
    directions with the weighted mean of the norms, and this is what is computed. (For a barycentre in the sense of
    distances along the sphere there is ``karcher``.)

    Where there is no such direction, |m| < 0.001 |sum_i a_i|, it is the weighted mean sum_i a_i v_i: opposite
    directions that balance, and tensors that no model has changed, in ``space=task_vectors``. mergekit does so for two
    models and |m| < epsilon, and fails for more.

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "multislerp", 1, "statistics"
    reference = "mergekit's multislerp (Goddard 2025)"
    Params = MultiSlerpParameters

    def coefficients(
        self, name: str, gram: Gram, meta: Sequence[Meta], elements: int, p: MultiSlerpParameters
    ) -> list[float]:
        finite(name, self.name, gram)
        a = shares(meta) if p.normalize else [nearest(m.weight) for m in meta]
        if len(a) == 1:
            return a
        k = range(len(a))
        norms = [math.sqrt(gram[i, i]) for i in k]
        pull = [a[i] / (norms[i] + nearest(p.epsilon)) for i in k]
        along = left_sum(pull[i] * left_sum(float(gram[i, j]) * pull[j] for j in k) for i in k)
        length = math.sqrt(max(along, 0.0))
        if length <= SHORTEST_MEAN * abs(left_sum(a)):
            return a
        radius = left_sum(a[i] * norms[i] for i in k)
        return [radius * pull[i] / length for i in k]


def bounded(cosine: float) -> float:
    """A cosine within [-1, 1], whatever rounding has done to it."""
    return -1.0 if cosine < -1.0 else min(cosine, 1.0)


def arc(cosine: float, a: Sequence[float]) -> list[float]:
    """sin(a_1 W) / sin W and sin(a_2 W) / sin W with a_1 + a_2 = 1; a_1 and a_2 on a line."""
    w = acos(bounded(cosine))
    s = sin(w)
    return list(a) if abs(s) < PARALLEL else [sin(share * w) / s for share in a]


STRATEGIES = (Karcher, NuSlerp, MultiSlerp)
