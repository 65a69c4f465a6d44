"""Strategies that project task vectors on each other's spaces: wudi, dual_projection, safe_merge.

The first two minimise a quadratic function of the merged task vector. Both have its minimum in closed form, and the
point that gradient descent from the usual mean has reached after a given time: each mode of the quadratic decays
exponentially, so no step is taken. ``time`` counts in units of one over the fastest rate of the matrix at hand; it does
not depend on the scale of the weights. Stopping early leaves the slow modes, which are those that little is known of,
near their start; the papers take some hundred steps of Adam, which no closed form gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from crdtmerge.canonical import complement
from crdtmerge.errors import NeedsError
from crdtmerge.numerics.elementary import exp
from crdtmerge.numerics.products import Matrix, column_sums, scaled
from crdtmerge.numerics.scalars import left_sum, nearest
from crdtmerge.strategies.dense import (
    Algebra,
    DenseParameters,
    DenseStrategy,
    algebra_of,
    as_matrix,
    as_tensor,
    is_matrix,
    largest,
    mean,
    require_finite,
    weighted,
)
from crdtmerge.strategies.linear import divided, divisor_of, total
from crdtmerge.strategies.parameters import Number, Share, WithLambda
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.spectral import covering

if TYPE_CHECKING:
    from torch import Tensor

SLOWEST = 1e-12
"""Modes whose rate is below this share of the fastest keep the value that they start with."""


class FlowParameters(DenseParameters):
    """Parameters of strategies that minimise a quadratic function."""

    solver: Literal["gradient_flow", "exact"] = Field(
        "gradient_flow", description="gradient descent in small steps for a time, or its end: the minimum"
    )
    time: Number = Field(Decimal(10), ge=0, description="solver=gradient_flow: in units of one over the fastest rate")


def squares(x: Matrix) -> float:
    """The sum of the squares of a matrix's elements."""
    return float(column_sums(column_sums(x * x)[:, None])[0])


def exponent(taus: Sequence[Matrix]) -> int:
    """The e for which all elements are below 2^e, the largest not below 2^(e - 1); 0 where all are zero."""
    return max(math.frexp(largest(tau))[1] for tau in taus)


def brought_to(taus: Sequence[Matrix], e: int) -> list[Matrix]:
    """Each matrix times 2^e, so that squares and cubes of what is between neither overflow nor vanish."""
    return [scaled(tau, np.array([e])) for tau in taus]


def gone(rates: Matrix, fastest: float, p: FlowParameters) -> Matrix:
    """Which part of its way to the minimum each mode has gone: 1 - e^(-time rate / fastest); 0 for the slowest."""
    relative = rates / fastest
    if p.solver == "exact":
        part = np.ones_like(relative)
    else:
        part = 1.0 - exp(-relative * nearest(p.time))
    return np.where(relative > SLOWEST, part, 0.0)


class Wudi(DenseStrategy[FlowParameters]):
    """WUDI: the task vector whose interference with the rows of every task is least.

        minimise  sum_i w_i |(tau - tau_i) tau_i^T|_F^2 / |tau_i|_F^2    from    tau(0) = sum_i w_i tau_i
        G = sum_i w_i tau_i^T tau_i / |tau_i|_F^2 = V diag(l) V^T,   R = sum_i w_i tau_i tau_i^T tau_i / |tau_i|_F^2
        tau(t) = tau(0) + (R V diag(1/l) - tau(0) V) diag(1 - e^(-t l / l_1)) V^T

    solver=exact is t = infinity: tau G = R, the equations of RegMean with the Gram matrices of the task vectors'
    own rows in place of those of inputs. V and l come from the singular values of the stacked task vectors, whose
    squares they are. Task vectors that are zero are left out. Tensors that are no matrices are averaged.

    Unsettled in the paper, chosen here: the unit and the default of ``time``; weights enter as factors of the terms.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "wudi", 1, "spectral"
    reference = "Cheng et al., ICML 2025, arXiv:2503.08099"
    Params = FlowParameters

    def side(self, out: int, rest: int, k: int, p: FlowParameters) -> int:
        return min(k * out, rest)

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: FlowParameters, algebra: Algebra) -> Matrix:
        e = exponent(taus)
        taus = brought_to(taus, -e)
        start = weighted(taus, u.weights())
        sizes = [squares(tau) for tau in taus]
        terms = [(tau, w / size) for tau, w, size in zip(taus, u.weights(), sizes, strict=True) if size > 0 and w > 0]
        if not terms:
            return scaled(start, np.array([e]))
        s, vt = algebra.space(np.concatenate([tau * math.sqrt(c) for tau, c in terms], axis=0))
        rates = s * s
        # in the basis of V: what R and tau(0) are there
        goal = np.zeros((len(start), len(s)))
        for tau, c in terms:
            seen = algebra.product(tau, vt.T)
            goal = goal + algebra.product(tau, algebra.product(tau.T, seen)) * c
        here = algebra.product(start, vt.T)
        way = (goal - here * rates) / rates
        moved = algebra.product(way * gone(rates, float(rates[0]), p), vt)
        return scaled(start + moved, np.array([e]))


class DualParameters(FlowParameters):
    """Parameters of dual_projection."""

    mode: Literal["joint", "sequential"] = Field("joint", description="all at once, or one by one in canonical order")
    space: Literal["uv", "u", "v"] = Field("uv", description="project on column spaces (u), row spaces (v) or both")
    energy: Share = Field(Decimal("0.99999"), description="share of each task vector's sum of s^2 that is projected on")
    old: Share = Field(Decimal("0.8"), lt=1, description="mode=sequential: weight of what was merged before")


class DualProjection(DenseStrategy[DualParameters]):
    """Dual projections (DOP): stay near every task vector in its column space and in its row space.

        minimise  sum_j a_j (|S_j U_j^T (D - tau_j)|_F^2 + |(D - tau_j) V_j S_j|_F^2)   from   D(0) = mean tau_j
        t_j = U_j S_j V_j^T, the leading triplets of tau_j with ``energy`` of its sum of squares
        P = sum a_j t_j t_j^T = E diag(l) E^T,   Q = sum a_j t_j^T t_j = F diag(m) F^T,   R = 2 sum a_j t_j t_j^T t_j
        P D + D Q = R at the minimum:   (E^T D F)_ij = (E^T R F)_ij / (l_i + m_j)
        D(t) = D(inf) + e^(-t (l_i + m_j) / (l_1 + m_1)) (D(0) - D(inf)), mode by mode

    mode=joint takes all contributions at once, a_j = w_j / sum w, and is symmetric. mode=sequential is the paper's:
    what was merged so far counts as one task vector with weight ``old`` against 1 - old (each times the claimed weight,
    for what was merged the mean of the weights so far), in canonical order. The paper adapts the a_j while it descends;
    here they are fixed. Tensors that are no matrices are averaged.

    Properties (joint): commutative; idempotent; not associative.
    """

    name, version, family = "dual_projection", 1, "spectral"
    reference = "Yang et al., NeurIPS 2025, OpenReview zD5cUX67b9"
    Params = DualParameters

    def side(self, out: int, rest: int, k: int, p: DualParameters) -> int:
        joined = k if p.mode == "joint" else min(k, 2)
        return max(min(out, joined * rest), min(joined * out, rest))

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: DualParameters, algebra: Algebra) -> Matrix:
        e = exponent(taus)
        return scaled(self._merged(brought_to(taus, -e), u, p, algebra), np.array([e]))

    def _merged(self, taus: Sequence[Matrix], u: Unit, p: DualParameters, algebra: Algebra) -> Matrix:
        weights = u.weights()
        if p.mode == "joint":
            mass = left_sum(weights)
            return merged(taus, [w / mass for w in weights], mean(taus, u), p, algebra)
        old = nearest(p.old)
        d = taus[0]
        for j in range(1, len(taus)):
            so_far = left_sum(weights[:j]) / j
            pair, both = (d, taus[j]), (so_far, weights[j])
            if so_far + weights[j] == 0.0:
                continue
            start = weighted(pair, both) / (so_far + weights[j])
            d = merged(pair, [old * so_far, (1.0 - old) * weights[j]], start, p, algebra)
        return d


def merged(taus: Sequence[Matrix], a: Sequence[float], start: Matrix, p: DualParameters, algebra: Algebra) -> Matrix:
    """D after a time, or at the minimum, for fixed a_j."""
    terms = [(*leading(tau, p.energy, algebra), c) for tau, c in zip(taus, a, strict=True) if c > 0]
    rooted = [algebra.product(us * math.sqrt(c), vt) for us, _, vt, c in terms]
    out, rest = start.shape
    e, left = np.zeros((out, 0)), np.zeros(0)
    f, right = np.zeros((0, rest)), np.zeros(0)
    if p.space != "v":
        s, et = algebra.space(np.concatenate(rooted, axis=1).T)
        e, left = et.T, s * s
    if p.space != "u":
        s, f = algebra.space(np.concatenate(rooted, axis=0))
        right = s * s
    fastest = (left[0] if len(left) else 0.0) + (right[0] if len(right) else 0.0)
    if not fastest > 0.0:
        return start
    # t t^T t = u s^3 vt, all of them in one product
    twice = 2.0 if p.space == "uv" else 1.0
    cubes = np.concatenate([us * (s * s * (c * twice)) for us, s, _, c in terms], axis=1)
    goal = algebra.product(cubes, np.concatenate([vt for _, _, vt, _ in terms], axis=0))
    # the matrix in modes of E and F, of E alone outside of F, and of F alone outside of E
    start_e, goal_e = algebra.product(e.T, start), algebra.product(e.T, goal)
    start_f, goal_f = algebra.product(start, f.T), algebra.product(goal, f.T)
    start_ef, goal_ef = algebra.product(start_e, f.T), algebra.product(goal_e, f.T)
    both = _way(start_ef, goal_ef, left[:, None] + right, fastest, p)
    only_e = _way(
        start_e - algebra.product(start_ef, f), goal_e - algebra.product(goal_ef, f), left[:, None], fastest, p
    )
    alone = start_f - algebra.product(e, start_ef), goal_f - algebra.product(e, goal_ef)
    only_f = _way(*alone, right, fastest, p)
    moved = algebra.product(e, algebra.product(both, f) + only_e) + algebra.product(only_f, f)
    return start + moved


def _way(start: Matrix, goal: Matrix, rates: Matrix, fastest: float, p: DualParameters) -> Matrix:
    """What a mode moves by: (goal / rate - start) times the part of the way that it has gone."""
    part = gone(rates, fastest, p)
    safe = np.where(rates > 0, rates, 1.0)
    return (goal - start * rates) / safe * part


def leading(tau: Matrix, energy: Decimal, algebra: Algebra) -> tuple[Matrix, Matrix, Matrix]:
    """u s, s and vt of a matrix's best approximation u s vt with a share of its sum of squares."""
    s, vt = algebra.space(tau)
    r = covering((s * s).tolist(), energy)
    return algebra.product(tau, vt[:r].T), s[:r], vt[:r]


class SafeParameters(WithLambda):
    """Parameters of safe_merge."""

    threshold: Number = Field(Decimal("0.35"), description="cosine below which a layer is mixed with the safety model")
    alpha: Share = Field(Decimal("0.8"), description="share of the fine-tuned layer in the mixture")
    combine: Literal["mean", "sum"] = Field("mean", description="the weighted mean of the gated tasks, or the sum")
    no_signal: Literal["mix", "keep"] = Field(
        "mix", description="a layer in which aligned and unaligned are equal is mixed as in the paper, or kept"
    )
    dense: Literal["exact", "lapack"] = Field(
        "exact", description="products with the same bits everywhere, or the library's"
    )


class SafeMerge(Strategy[SafeParameters]):
    """SafeMERGE: layers of a task that leave the directions of alignment are mixed with the safety model's.

        V     = W_aligned - W_unaligned,   D_i = theta_i - theta_0,   D_safe = the mean of the role ``safety``
        rho_i = cos(V V^T D_i, D_i) = |V^T D_i|_F^2 / (|V V^T D_i|_F |D_i|_F), 0 where a norm is 0
        D_i  <- alpha D_i + (1 - alpha) D_safe   if rho_i < threshold
        theta = theta_0 + lambda sum_i w_i D_i / sum_i w_i    over the tasks

    Tensors that are no matrices keep D_i. rho is not rounded before it is compared (the paper's program rounds it to
    five digits). Adapters are merged as the dense matrices that they make.

    Errors: NeedsError where a tensor has no contribution of role ``safety`` or none of role ``task``.

    Properties: commutative; not associative; not idempotent where the gate opens.
    """

    name, version, family = "safe_merge", 1, "spectral"
    reference = "Djuhera et al., arXiv:2503.17239"
    Params = SafeParameters

    def needs(self, p: SafeParameters) -> Needs:
        return Needs(
            base="required",
            models=("aligned", "unaligned"),
            roles=("task", "safety"),
            unit="tensor",
            compute="double",
            exact=p.dense == "exact",
            min_k=2,
        )

    def plan(self, view: View, p: Callable[[str], SafeParameters], rng: Rng) -> Plan:
        for name in view.names:
            meta = view.meta(name)
            for role, who in (("safety", "a model tuned for safety"), ("task", "a model tuned for a task")):
                if not any(m.role == role for m in meta):
                    raise NeedsError(
                        f"strategy 'safe_merge' needs {who}: tensor {name!a} has no contribution of role '{role}'. "
                        f"Contribute one with --role {role}."
                    )
            divisor_of(_of(meta, "safety"))
            if p(name).combine == "mean":
                divisor_of(_of(meta, "task"))
        return EMPTY

    def apply(self, u: Unit, plan: Plan, p: SafeParameters, rng: Rng) -> Tensor:
        assert u.base is not None, "task vectors need a base; Needs.base says so"
        found = list(zip(u.task_vectors(), u.meta, u.weights(), strict=True))
        safe = divided(total([d * w for d, m, w in found if m.role == "safety"]), divisor_of(_of(u.meta, "safety")))
        tasks = [(d, w) for d, m, w in found if m.role == "task"]
        if is_matrix(u.shape):
            v = as_matrix(u.models["aligned"] - u.models["unaligned"], u.shape)
            algebra = algebra_of(p.dense, u.name)
            tasks = [(self._gated(d, safe, v, u, p, algebra), w) for d, w in tasks]
        merged = total([d * w for d, w in tasks])
        if p.combine == "mean":
            merged = divided(merged, divisor_of(_of(u.meta, "task")))
        return u.base + merged * u.scalar(p.lambda_)

    def _gated(self, d: Tensor, safe: Tensor, v: Matrix, u: Unit, p: SafeParameters, algebra: Algebra) -> Tensor:
        tau = as_matrix(d, u.shape)
        require_finite(tau, u.name)
        require_finite(v, u.name)
        if not v.any() and p.no_signal == "keep":
            return d
        if alignment(v, tau, algebra) >= nearest(p.threshold):
            return d
        alpha = nearest(p.alpha)
        return as_tensor(tau * alpha + as_matrix(safe, u.shape) * nearest(complement(p.alpha)), d)


def _of(meta: Sequence[Meta], role: str) -> tuple[Meta, ...]:
    return tuple(m for m in meta if m.role == role)


def alignment(v: Matrix, d: Matrix, algebra: Algebra) -> float:
    """cos(v v^T d, d): how much of d lies in the column space of v. 0 where a norm is 0."""
    (v,), (d,) = brought_to([v], -exponent([v])), brought_to([d], -exponent([d]))
    seen = algebra.product(v.T, d)
    sizes = squares(algebra.product(v, seen)), squares(d)
    if min(sizes) == 0.0:
        return 0.0
    return squares(seen) / (math.sqrt(sizes[0]) * math.sqrt(sizes[1]))


STRATEGIES = (Wudi, DualProjection, SafeMerge)
