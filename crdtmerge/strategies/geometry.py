"""Strategies on the geometry of each tensor: model_stock, weight_scope_alignment, arcee_fusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from crdtmerge.errors import NonFiniteError
from crdtmerge.numerics import reduction
from crdtmerge.numerics.elementary import exp, log
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.programs import Affine, Program
from crdtmerge.numerics.scalars import left_sum, nearest
from crdtmerge.strategies.linear import divided, divisor_of, shares, total
from crdtmerge.strategies.parameters import Number, Parameters
from crdtmerge.strategies.protocol import Meta, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.spherical import finite
from crdtmerge.strategies.stages import weighted
from crdtmerge.strategies.whole_tensors import ascending, roots, row_largest, row_sums, rows

if TYPE_CHECKING:
    from torch import Tensor


class ModelStockParameters(Parameters):
    """Parameters of model_stock."""

    filter_wise: bool = Field(False, description="an angle for each row instead of one for each tensor")
    epsilon: Number = Field(Decimal(0), ge=0, description="least product of norms that a dot product is divided by")


class ModelStock(Strategy[ModelStockParameters]):
    """Model Stock: as far from the base to the mean as the angle between the task vectors says.

        c     = mean over pairs i < j of cos(tau_i, tau_j), not below 0 nor above 1
        t     = k c / (1 + (k - 1) c)
        theta = theta_0 + t (mean_i theta_i - theta_0)

    for each tensor flattened, or each vector along the last dimension (``filter_wise``; a tensor of one dimension is
    one vector). A zero task vector has cosine 0 with every other; of one model, of which there is no pair, c is 1.

    Weights, with which the paper does not deal: a_i = w_i / sum_j w_j; the means are those weighted by a_i and, for
    pairs, a_i a_j; k is 1 / sum_i a_i^2, the effective number of models (k itself for equal weights, for which this is
    the t that makes theta the point nearest to the centre of the models' distribution).

    mergekit's model_stock: weights 1 and epsilon=1e-6; it bounds the cosine of each pair and not c, so that with
    c < 0 it goes beyond the base.

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "model_stock", 1, "statistics"
    reference = "Jang et al., ECCV 2024, arXiv:2403.19522"
    Params = ModelStockParameters

    def needs(self, p: ModelStockParameters) -> Needs:
        if p.filter_wise:
            return Needs(base="required", unit="tensor", compute="double")
        return Needs(base="required", plan="scan", compute="double")

    def plan(self, view: View, p: Callable[[str], ModelStockParameters], rng: Rng) -> Plan:
        found: dict[str, list[float]] = {}
        names = [name for name in view.names if not p(name).filter_wise]
        for name, gram in view.gram(names, task_vectors=True).items():
            finite(name, self.name, gram)
            meta = view.meta(name)
            products = {(i, j): torch.tensor([gram[i, j]]) for i in range(len(meta)) for j in range(i, len(meta))}
            t = float(self.ratio(products, meta, nearest(p(name).epsilon)))
            found[name] = [t * a for a in shares(meta)]
        return Plan({"coefficients": found})

    def apply(self, u: Unit, plan: Plan, p: ModelStockParameters, rng: Rng) -> Tensor:
        assert u.base is not None
        taus = u.task_vectors()
        if not p.filter_wise:
            return u.base + total(weighted(taus, plan["coefficients"][u.name]))
        if not u.base.numel():
            return u.base
        cut = [rows(tau, u.shape) for tau in taus]
        products = {(i, j): row_sums(cut[i] * cut[j]) for i, j in reduction.pairs(len(cut))}
        t = self.ratio(products, u.meta, nearest(p.epsilon))
        return u.base + (total(weighted(cut, shares(u.meta))) * t[:, None]).reshape(-1)

    def program(
        self, name: str, meta: tuple[Meta, ...], plan: Plan, p: ModelStockParameters, rng: Rng
    ) -> Program | None:
        return None if p.filter_wise else Affine(tuple(plan["coefficients"][name]), on_base=True)

    @staticmethod
    def ratio(products: Mapping[tuple[int, int], Tensor], meta: Sequence[Meta], epsilon: float) -> Tensor:
        """t from the dot products of each pair of task vectors, each a tensor with one value for each vector."""
        divisor_of(tuple(meta))
        w = [Fraction(m.weight) for m in meta]
        mass, squares, pairs = Fraction(0), Fraction(0), Fraction(0)
        for one in w:
            mass, squares = mass + one, squares + one * one
        pairs = (mass * mass - squares) / 2
        k = nearest(mass * mass / squares)
        zero = torch.zeros_like(products[0, 0])
        one_, floor = zero + 1.0, zero + epsilon
        norms = [roots(products[i, i]) for i in range(len(w))]
        c = zero if pairs else one_
        for i, j in combinations(range(len(w)), 2):
            size = norms[i] * norms[j]
            size = torch.where(size < floor, floor, size)
            cosine = products[i, j] / torch.where(size == 0, one_, size)
            cosine = torch.where(cosine > 1, one_, torch.where(cosine < -1, -one_, cosine))
            c = c + cosine * nearest(w[i] * w[j] / pairs) if pairs else c
        c = torch.where(c > 1, one_, torch.where(c > 0, c, zero))
        return (c * k) / (c * (k - 1.0) + 1.0)


class ScopeParameters(Parameters):
    """Parameters of weight_scope_alignment."""

    target: Literal["mean", "rms", "median", "base"] = Field("mean", description="the scope that all are given")
    restore_scope: bool = Field(False, description="give the target scope to the mean too, which is narrower")
    vectors: bool = Field(False, description="align tensors of one dimension too")
    epsilon: Number = Field(
        Decimal("1e-8"), ge=0, description="deviation up to which a tensor is constant, beside its mean or beside 1"
    )


class WeightScopeAlignment(Strategy[ScopeParameters]):
    """Weight scope alignment after training: every model's tensor is given one mean and deviation, then averaged.

        mu_i, sigma_i = mean and standard deviation of the elements of theta_i
        theta~_i      = (theta_i - mu_i) sigma* / sigma_i + mu*
        theta         = sum_i a_i theta~_i,  a_i = w_i / sum_j w_j

    with the target mu* = sum_i a_i mu_i and sigma* = sum_i a_i sigma_i (``mean``), sigma*^2 = sum_i a_i sigma_i^2
    (``rms``), their medians (``median``, weights aside), or those of the base (``base``). Tensors that are constant in
    some model or in the base, and those of one dimension unless ``vectors``, are averaged as they are. The mean of
    independent models is narrower than each, by 1/sqrt(k): ``restore_scope`` widens it to sigma* about mu*.

    This is our reading of a method of training, whose models are held to one scope by a regulariser and whose scopes
    are fused between rounds; applied to models that are already trained it is not what the paper measured, and its
    equations were written without access to more of it than the abstract.

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "weight_scope_alignment", 1, "statistics"
    reference = "after Xu, Li, Gan, Zhan, ECAI 2024, arXiv:2408.12237 (a method of training)"
    Params = ScopeParameters

    def needs(self, p: ScopeParameters) -> Needs:
        return Needs(base="required" if p.target == "base" else "unused", plan="scan", compute="double")

    def plan(self, view: View, p: Callable[[str], ScopeParameters], rng: Rng) -> Plan:
        for name in view.names:
            divisor_of(view.meta(name))
        means = {
            name: [value / view.elements(name) for value in values]
            for name, values in _sums(view, lambda u: _everyone(u) if len(u.shape) > 1 or p(u.name).vectors else [])
            if values and view.elements(name) > 1
        }
        centred: Callable[[Unit], list[Tensor]] = lambda u: [  # noqa: E731
            (x - mean) * (x - mean) for x, mean in zip(_everyone(u), means.get(u.name, []), strict=False)
        ]
        scopes: dict[str, dict[str, Any]] = {}
        for name, values in _sums(view, centred):
            if name in means:
                sigmas = [math.sqrt(value / view.elements(name)) for value in values]
                scope = _scope(name, means[name], sigmas, view.meta(name), p(name))
                scopes |= {name: scope} if scope else {}
        wanted = {name for name in scopes if p(name).restore_scope}

        def spread(u: Unit) -> list[Tensor]:
            if u.name not in wanted:
                return []
            off = _aligned_mean(u, scopes[u.name]) - scopes[u.name]["mean"]
            return [off * off]

        for name, values in _sums(view, spread) if wanted else ():
            if name in wanted:
                sigma = math.sqrt(values[0] / view.elements(name))
                if not _constant(scopes[name]["mean"], sigma, p(name)):
                    scopes[name]["restore"] = scopes[name]["deviation"] / sigma
        return Plan({"scopes": scopes})

    def apply(self, u: Unit, plan: Plan, p: ScopeParameters, rng: Rng) -> Tensor:
        scope = plan["scopes"].get(u.name)
        if scope is None:
            return _mean(u.xs, u)
        mean = _aligned_mean(u, scope)
        return mean if "restore" not in scope else (mean - scope["mean"]) * scope["restore"] + scope["mean"]


def _everyone(u: Unit) -> list[Tensor]:
    """The contributions, and the base where there is one."""
    return [*u.xs, *([u.base] if u.base is not None else [])]


def _sums(view: View, work: Callable[[Unit], Sequence[Tensor]]) -> list[tuple[str, list[float]]]:
    """For each tensor the sums of all elements of what ``work`` makes of its units."""

    def sums(u: Unit) -> list[NDArray[np.float64]]:
        return [reduction.block_sums(x).cpu().numpy() for x in work(u)]

    parts: dict[str, list[list[NDArray[np.float64]]]] = {}
    for name, found in view.scan(sums):
        parts.setdefault(name, []).append(found)
    return [
        (name, [reduction.fold(np.concatenate(column)) for column in zip(*found, strict=True)])
        for name, found in parts.items()
    ]


def _constant(mean: float, deviation: float, p: ScopeParameters) -> bool:
    return deviation <= nearest(p.epsilon) * max(1.0, abs(mean))


def _scope(
    name: str, means: list[float], sigmas: list[float], meta: Sequence[Meta], p: ScopeParameters
) -> dict[str, Any] | None:
    """What a tensor's elements are shifted and scaled by; None if it is constant somewhere. Raises NonFiniteError."""
    k, a = len(meta), shares(meta)
    if not all(map(math.isfinite, means + sigmas)):
        raise NonFiniteError(
            f"tensor {name!a}: its variance exceeds float64, so weight_scope_alignment knows no scope. Scale the "
            "weights down, or leave the tensor out with --exclude."
        )
    used = range(k + 1) if p.target == "base" else range(k)
    if any(_constant(means[i], sigmas[i], p) for i in used):
        return None
    if p.target == "base":
        mean, sigma = means[k], sigmas[k]
    elif p.target == "median":
        mean, sigma = _median(means[:k]), _median(sigmas[:k])
    else:
        mean = left_sum(a[i] * means[i] for i in range(k))
        power = left_sum(a[i] * sigmas[i] * sigmas[i] for i in range(k))
        sigma = math.sqrt(power) if p.target == "rms" else left_sum(a[i] * sigmas[i] for i in range(k))
    return {"means": means[:k], "scales": [sigma / one for one in sigmas[:k]], "mean": mean, "deviation": sigma}


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else 0.5 * (ordered[middle - 1] + ordered[middle])


def _mean(xs: Sequence[Tensor], u: Unit) -> Tensor:
    return divided(total(weighted(xs, u.weights())), divisor_of(u.meta))


def _aligned_mean(u: Unit, scope: Mapping[str, Any]) -> Tensor:
    """The weighted mean of the contributions after each has the target's mean and deviation."""
    given = zip(u.xs, scope["means"], scope["scales"], strict=True)
    return _mean([(x - mean) * scale + scope["mean"] for x, mean, scale in given], u)


class ArceeFusionParameters(Parameters):
    """Parameters of arcee_fusion."""

    spread: Number = Field(Decimal("1.5"), description="quartile ranges above the median at which changes are kept")
    epsilon: Number = Field(Decimal("1e-8"), gt=0, description="what is added to every probability")


class ArceeFusion(Strategy[ArceeFusionParameters]):
    """Arcee Fusion: of each task vector the elements that matter most, by the size of change and its row's divergence.

        p_i, q = softmax(row of theta_i) + epsilon, softmax(row of theta_0) + epsilon
        s_i    = |tau_i| sum_row p_i log(p_i / q)
        M_i    = [s_i >= median(s_i) + spread (Q3(s_i) - Q1(s_i))]
        theta  = theta_0 + sum_i a_i M_i tau_i,  a_i = w_i / sum_j w_j

    A row is a vector along the last dimension; a tensor of one dimension is one row. Median and quartiles are the
    elements at floor(q (n - 1)) in ascending order of the whole tensor, exact. A divergence that rounding leaves below
    zero is zero. mergekit has one model (k = 1 here), and takes the quartiles of a random sample where a tensor has
    more than a million elements; several models are ours: each is fused by itself, then what is left is averaged.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "arcee_fusion", 1, "statistics"
    reference = "mergekit's arcee_fusion (Arcee 2025)"
    Params = ArceeFusionParameters

    def needs(self, p: ArceeFusionParameters) -> Needs:
        return Needs(base="required", unit="tensor", compute="double")

    def apply(self, u: Unit, plan: Plan, p: ArceeFusionParameters, rng: Rng) -> Tensor:
        assert u.base is not None
        a = shares(u.meta)
        if not u.base.numel():
            return u.base
        epsilon, spread = nearest(p.epsilon), nearest(p.spread)
        q = _softmax(rows(u.base, u.shape)) + epsilon
        fused = []
        for x, tau in zip(u.xs, u.task_vectors(), strict=True):
            own = _softmax(rows(x, u.shape)) + epsilon
            divergence = row_sums(own * _log(own / q))
            divergence = torch.where(divergence > 0, divergence, torch.zeros_like(divergence))
            s = (rows(tau, u.shape).abs() * divergence[:, None]).reshape(-1)
            last = s.numel() - 1
            low, middle, high = (ascending(s, quarter * last // 4) for quarter in (1, 2, 3))
            fused.append(torch.where(s >= middle + spread * (high - low), tau, torch.zeros_like(tau)))
        return u.base + total(weighted(fused, a))


def _softmax(x: Tensor) -> Tensor:
    """e^x of each row divided by its sum, after the largest of the row was subtracted."""
    e = torch.from_numpy(exp((x - row_largest(x)[:, None]).cpu().numpy())).to(x.device)
    return e / row_sums(e)[:, None]


def _log(x: Tensor) -> Tensor:
    return torch.from_numpy(log(x.cpu().numpy())).to(x.device)


STRATEGIES = (ModelStock, WeightScopeAlignment, ArceeFusion)
