"""Spherical interpolation: slerp of two models, the Karcher mean of more, the paper's fold on request.

Every result is a linear combination of the inputs, sum_i c_i theta_i, whose coefficients depend on the dot products
<theta_i, theta_j> of a tensor alone. So the plan is one pass that computes these k x k matrices, all curved arithmetic
happens on k numbers, and ``apply`` is a linear combination in float64.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from crdtmerge.errors import MismatchError, NonFiniteError
from crdtmerge.numerics.programs import Affine, Program
from crdtmerge.numerics.scalars import acos, cos, left_sum, nearest, sin
from crdtmerge.strategies.linear import shares, total
from crdtmerge.strategies.parameters import Number, Parameters, Share
from crdtmerge.strategies.protocol import Meta, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.stages import weighted

if TYPE_CHECKING:
    from torch import Tensor

Gram = NDArray[np.float64]

OPPOSITE = -0.9995
"""The cosine below which two directions count as opposite."""

SHORTEST_MEAN = 1e-3
"""The length below which the mean of unit vectors has no direction to start from."""

KARCHER_STEPS_MAX = 100
KARCHER_TOLERANCE = 1e-12


class InSpace(Parameters):
    """Parameters of strategies on the sphere."""

    space: Literal["weights", "task_vectors"] = Field("weights", description="what points at the sphere")


P = TypeVar("P", bound=InSpace)


def finite(name: str, strategy: str, gram: Gram) -> None:
    """Raise NonFiniteError where dot products exceed float64."""
    if not np.isfinite(gram).all():
        raise NonFiniteError(
            f"tensor {name!a}: its dot products exceed float64, so {strategy} knows no angle. Scale the weights down, "
            "or leave the tensor out with --exclude."
        )


class OnSphere(Strategy[P], Generic[P]):
    """A strategy whose result is sum_i c_i v_i with coefficients that depend on dot products."""

    def needs(self, p: P) -> Needs:
        return Needs(base="required" if p.space == "task_vectors" else "unused", plan="scan", compute="double")

    @abstractmethod
    def coefficients(self, name: str, gram: Gram, meta: Sequence[Meta], elements: int, p: P) -> list[float]:
        """c_1, ..., c_k of one tensor."""

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        found: dict[str, list[float]] = {}
        for task_vectors in (False, True):
            names = [name for name in view.names if (p(name).space == "task_vectors") == task_vectors]
            for name, gram in view.gram(names, task_vectors=task_vectors).items():
                found[name] = self.coefficients(name, gram, view.meta(name), view.elements(name), p(name))
        return Plan({"coefficients": found})

    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        c = plan["coefficients"][u.name]
        if p.space == "weights":
            return total(weighted(u.xs, c))
        assert u.base is not None
        return u.base + total(weighted(u.task_vectors(), c))

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: P, rng: Rng) -> Program | None:
        return Affine(tuple(plan["coefficients"][name]), on_base=p.space == "task_vectors")


class SlerpParameters(InSpace):
    """Parameters of slerp."""

    reduce: Literal["karcher", "fold"] = Field("karcher", description="more than two models: their mean, or one by one")
    dot_threshold: Share = Field(Decimal("0.9995"), description="cosine from which on the linear mean is taken")
    epsilon: Number = Field(Decimal("1e-8"), ge=0, description="norm up to which a tensor has no direction")


class Slerp(OnSphere[SlerpParameters]):
    """Spherical linear interpolation of each tensor, flattened.

        cos W = <a, b> / (|a| |b|)
        theta = sin((1-t) W) / sin W * a + sin(t W) / sin W * b,      t = w_b / (w_a + w_b)

    applied to the tensors as they are, not to unit vectors. Where the cosine is ``dot_threshold`` or more, a norm is
    ``epsilon`` or less, or the tensor has one element, it is (1-t) a + t b. Opposite tensors have no shortest arc
    between them and are refused.

    More than two models: ``karcher`` is their weighted mean on the sphere (the m with sum_i w_i log_m(u_i) = 0), times
    the weighted mean of the norms; ``fold`` interpolates one by one in canonical order, each time between what came
    before, which bears the mean of the weights so far, and the next.

    Properties: commutative for equal weights; idempotent; not associative.
    """

    name, version, family = "slerp", 1, "statistics"
    reference = "Shoemake, SIGGRAPH 1985; Karcher, Comm. Pure Appl. Math. 30, 1977"
    Params = SlerpParameters

    def coefficients(
        self, name: str, gram: Gram, meta: Sequence[Meta], elements: int, p: SlerpParameters
    ) -> list[float]:
        return arc(name, gram, meta, elements, p)


def arc(name: str, gram: Gram, meta: Sequence[Meta], elements: int, p: SlerpParameters) -> list[float]:
    """The coefficients c_i of one tensor. Raises MismatchError where its inputs point in opposite directions."""
    a = shares(meta)
    if len(a) == 1 or elements <= 1:
        return a
    finite(name, "slerp", gram)
    norms = [math.sqrt(gram[i, i]) for i in range(len(a))]
    if min(norms) <= nearest(p.epsilon):
        return a
    cosine = [
        [max(-1.0, min(1.0, float(gram[i, j]) / (norms[i] * norms[j]))) for j in range(len(a))] for i in range(len(a))
    ]
    near = nearest(p.dot_threshold)
    if all(cosine[i][j] >= near for i in range(len(a)) for j in range(i)):
        return a
    try:
        if len(a) == 2:
            return slerp(cosine[0][1], a[0], a[1], near)
        if p.reduce == "fold":
            return folded(gram, [nearest(m.weight) for m in meta], nearest(p.epsilon), near)
        return karcher(cosine, norms, a, left_sum(a[i] * norms[i] for i in range(len(a))))
    except OppositeError as opposite:
        raise MismatchError(
            f"tensor {name!a}: slerp has no shortest arc between opposite directions (cosine {opposite.cosine:.6f}). "
            f"Leave the tensor out with --exclude, or merge with --strategy linear."
        ) from None


class OppositeError(Exception):
    """Directions between which no arc is the shortest, and their cosine."""

    def __init__(self, cosine: float) -> None:
        self.cosine = cosine


def slerp(cosine: float, a: float, b: float, near: float) -> list[float]:
    """Coefficients for two vectors with shares a and b = 1 - a: sin(a W) / sin W and sin(b W) / sin W."""
    if cosine < OPPOSITE:
        raise OppositeError(cosine)
    if cosine >= near:
        return [a, b]
    w = acos(cosine)
    return [sin(a * w) / sin(w), sin(b * w) / sin(w)]


def karcher(
    cosine: list[list[float]],
    norms: list[float],
    a: list[float],
    radius: float,
    *,
    steps: int = KARCHER_STEPS_MAX,
    tolerance: float = KARCHER_TOLERANCE,
) -> list[float]:
    """Coefficients of the weighted Karcher mean times a radius: the fixed point m <- exp_m(sum_i a_i log_m(u_i)).

    All vectors are held as coefficients of the unit vectors u_i, whose dot products are ``cosine``. It ends after
    ``steps``, or at a step that is shorter than ``tolerance``.
    """
    k = range(len(a))

    def dot(x: list[float], y: list[float]) -> float:
        return left_sum(x[i] * left_sum(cosine[i][j] * y[j] for j in k) for i in k)

    def scaled(x: list[float], s: float) -> list[float]:
        return [s * v for v in x]

    size = math.sqrt(max(dot(a, a), 0.0))
    if size < SHORTEST_MEAN:
        raise OppositeError(min(cosine[i][j] for i in k for j in k))
    m = scaled(a, 1.0 / size)
    for _ in range(steps):
        p = [max(-1.0, min(1.0, dot(m, [1.0 if i == j else 0.0 for j in k]))) for i in k]
        if min(p) < OPPOSITE:
            raise OppositeError(min(p))
        angles = [acos(v) for v in p]
        pull = [a[i] * (angles[i] / sin(angles[i]) if p[i] < 1.0 else 1.0) for i in k]
        along = left_sum(pull[i] * p[i] for i in k)
        step = [pull[i] - along * m[i] for i in k]
        length = math.sqrt(max(dot(step, step), 0.0))
        if length < tolerance:
            break
        m = [cos(length) * m[i] + sin(length) / length * step[i] for i in k]
        m = scaled(m, 1.0 / math.sqrt(dot(m, m)))
    return [radius * m[i] / norms[i] for i in k]


def folded(gram: Gram, weights: list[float], epsilon: float, near: float) -> list[float]:
    """Coefficients of slerp(... slerp(slerp(x_1, x_2), x_3) ..., x_k); the left side bears the mean weight so far."""
    k = len(weights)
    c = [1.0] + [0.0] * (k - 1)
    for i in range(1, k):
        mass = left_sum(weights[:i]) / i
        along = [left_sum(c[j] * float(gram[j, m]) for j in range(k)) for m in range(k)]
        left = math.sqrt(max(left_sum(c[m] * along[m] for m in range(k)), 0.0))
        right = math.sqrt(float(gram[i, i]))
        t = weights[i] / (mass + weights[i])
        cosine = 1.0 if min(left, right) <= epsilon else max(-1.0, min(1.0, along[i] / (left * right)))
        s0, s1 = slerp(cosine, 1.0 - t, t, near)
        c = [s0 * v for v in c[:i]] + [s1] + [0.0] * (k - i - 1)
    return c


STRATEGIES = (Slerp,)
