"""Strategies that are chains of stages under a name of their own, and ``stages``, where a recipe names the stages.

With tau_i = theta_i - theta_0 in the compute dtype:

    theta = theta_0 + scale * combine(elect(sparsify(tau_1), ..., sparsify(tau_k)))
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from crdtmerge.canonical import decimal
from crdtmerge.numerics import reduction
from crdtmerge.numerics.programs import Affine, Program
from crdtmerge.numerics.scalars import left_sum, nearest
from crdtmerge.strategies.consensus import Dare, DareParameters
from crdtmerge.strategies.linear import total
from crdtmerge.strategies.parameters import Number, Parameters, Share, WithLambda
from crdtmerge.strategies.protocol import Meta, Needs, Plan, Rng, Unit, View
from crdtmerge.strategies.stages import Chain, Combine, Composition, Elect, Sparsify, merge, weighted

Dropped = Annotated[Number, Field(ge=0, lt=1)]
Disjoint = Literal["mean", "sum", "max"]
Sums = tuple[NDArray[np.float64], NDArray[np.float64]]


# ---------------------------------------------------------------- drop at random


class DareLinear(Dare):
    """DARE and task arithmetic: ``dare`` under the name that it has elsewhere, to the bit.

        theta = theta_0 + lambda sum_i w_i m_i tau_i / density,   m_i ~ Bernoulli(density)

    Kept elements are divided by the density, as in the paper; mergekit scales so that the L1 norm of each tensor stays
    what it was, which is not unbiased.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "dare_linear", 1, "elementwise"
    Params = DareParameters


def within_density(epsilon: Decimal, density: Decimal) -> Decimal:
    """An epsilon for which every probability lies in (0, 1]. Raises ValueError."""
    if not 0 < density - epsilon <= density + epsilon <= 1:
        raise ValueError(
            f"keeps with probabilities from {density - epsilon} to {density + epsilon}; they must be above 0 and at "
            "most 1. Change it or the density"
        )
    return epsilon


class Pruning(WithLambda):
    """Parameters of strategies that drop small elements more often than large ones."""

    density: Share = Field(Decimal("0.7"), description="mean probability with which an element is kept")
    epsilon: Number = Field(Decimal("0.07"), ge=0, description="how far probabilities lie from the density at most")
    rescale: bool = Field(True, description="divide each kept element by its own probability")

    @field_validator("epsilon")
    @classmethod
    def _probabilities(cls, epsilon: Decimal, info: ValidationInfo) -> Decimal:
        return within_density(epsilon, info.data.get("density", Decimal(1)))


class DellaParameters(Pruning):
    """Parameters of della."""

    elect: Literal["sum", "count"] = Field("sum", description="sign of the sum of values, or of the count of signs")
    combine: Disjoint = Field("mean", description="how values of the elected sign become one")


class Della(Composition[DellaParameters]):
    """DELLA: drop by rank of magnitude and rescale, elect a sign, fuse what agrees.

        r      =  rank of |tau_ij| in its row of n, ascending from 0 (ties by position)
        q_ij   =  density - epsilon + 2 epsilon r / (n - 1);  density where n = 1
        tau_ij <- tau_ij / q_ij with probability q_ij, else 0
        gamma  =  sign(sum_i w_i tau_i), zero counted as plus
        theta  =  theta_0 + lambda * (sum w_i tau_i / sum w_i over the i with sign(tau_i) = gamma)

    Rows are those of a matrix [out, rest]; any other tensor is one row. The official code has a window of 2 epsilon.
    Each kept element is divided by its own probability, so that over seeds the mean of the sparse task vector is the
    task vector; mergekit matches L1 norms and divides by zero where n = 1. The random words are those of dare: with
    epsilon 0 the masks are too.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "della", 1, "statistics"
    reference = "Deep, Bhardwaj, Poria 2024, arXiv:2406.11617"
    Params = DellaParameters

    def chain(self, p: DellaParameters) -> Chain:
        return Chain("magprune", p.elect, p.combine, p.lambda_, p.density, epsilon=p.epsilon, rescale=p.rescale)


class DellaLinearParameters(Pruning):
    """Parameters of della_linear."""

    combine: Literal["sum", "mean"] = Field("sum", description="task arithmetic, or the weighted mean of task vectors")


class DellaLinear(Composition[DellaLinearParameters]):
    """DELLA without an election: theta = theta_0 + lambda sum_i w_i m_i tau_i / q_i, with m_i and q_i as in ``della``.

    Unbiased: over seeds the mean of the result is task arithmetic.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "della_linear", 1, "statistics"
    reference = "Deep, Bhardwaj, Poria 2024, arXiv:2406.11617; mergekit's della_linear"
    Params = DellaLinearParameters

    def chain(self, p: DellaLinearParameters) -> Chain:
        return Chain("magprune", "none", p.combine, p.lambda_, p.density, epsilon=p.epsilon, rescale=p.rescale)


# ---------------------------------------------------------------- drop both ends


def below_one(high: Decimal, low: Decimal) -> Decimal:
    """A share to drop that leaves something. Raises ValueError."""
    if low + high >= 1:
        raise ValueError(f"drop_low + drop_high = {low + high}; must be below 1, or nothing is kept")
    return high


class Band(WithLambda):
    """Parameters of strategies that keep the middle of the magnitudes."""

    drop_low: Dropped = Field(Decimal("0.85"), description="share of each tensor that is dropped as too small")
    drop_high: Dropped = Field(Decimal("0.007"), description="share of each tensor that is dropped as too large")

    @field_validator("drop_high")
    @classmethod
    def _leaves_some(cls, high: Decimal, info: ValidationInfo) -> Decimal:
        return below_one(high, info.data.get("drop_low", Decimal(0)))


class ModelBreadcrumbs(Composition[Band]):
    """Model Breadcrumbs: drop the smallest and the largest elements of each task vector, then task arithmetic.

        tau_i <- 0 at the floor(drop_low n) smallest and the floor(drop_high n) largest |tau_i| of each tensor, exactly
        theta =  theta_0 + lambda sum_i w_i tau_i

    Of equal magnitudes the one at the lower position counts as the larger, as in ties. What the paper calls beta and
    gamma are percentiles, what others call so are shares kept or dropped, and the official code takes the last
    dimension for a layer; so the parameters here say what they drop, of each tensor, and the defaults, from the
    paper's percentiles 85 and 99.3, are only a starting point. Where floor(drop_high n) is 0 nothing is too large
    (mergekit drops the whole tensor then).

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "model_breadcrumbs", 1, "statistics"
    reference = "Davari, Belilovsky, ECCV 2024, arXiv:2312.06795"
    Params = Band

    def chain(self, p: Band) -> Chain:
        return Chain("band", "none", "sum", p.lambda_, drop_low=p.drop_low, drop_high=p.drop_high)


class Breadcrumbs(ModelBreadcrumbs):
    """Model Breadcrumbs under mergekit's name: ``model_breadcrumbs``, to the bit.

        tau_i <- 0 at the floor(drop_low n) smallest and the floor(drop_high n) largest |tau_i| of each tensor, exactly
        theta =  theta_0 + lambda sum_i w_i tau_i

    mergekit's density is 1 - drop_low - drop_high here, its gamma is drop_high.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "breadcrumbs", 1, "statistics"


class BreadcrumbsTiesParameters(Band):
    """Parameters of breadcrumbs_ties."""

    elect: Literal["sum", "count"] = Field("sum", description="sign of the sum of values, or of the count of signs")
    combine: Disjoint = Field("mean", description="how values of the elected sign become one")


class BreadcrumbsTies(Composition[BreadcrumbsTiesParameters]):
    """Model Breadcrumbs, then the sign election and disjoint mean of TIES.

        tau_i <- as in model_breadcrumbs
        gamma =  sign(sum_i w_i tau_i), zero counted as plus
        theta =  theta_0 + lambda * (sum w_i tau_i / sum w_i over the i with sign(tau_i) = gamma)

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "breadcrumbs_ties", 1, "statistics"
    reference = "Davari, Belilovsky, arXiv:2312.06795, with Yadav et al., arXiv:2306.01708; mergekit's breadcrumbs_ties"
    Params = BreadcrumbsTiesParameters

    def chain(self, p: BreadcrumbsTiesParameters) -> Chain:
        return Chain("band", p.elect, p.combine, p.lambda_, drop_low=p.drop_low, drop_high=p.drop_high)


# ---------------------------------------------------------------- scales that grow with depth


def number_or_auto(value: Any) -> Any:
    """``auto`` as it is, all else as an exact decimal. Raises ValueError."""
    return value if value == "auto" else decimal(value)


def with_one_number(layer: str) -> str:
    """A text with one # in it. Raises ValueError."""
    if layer.count("#") != 1:
        raise ValueError(f"{layer!a} must hold one # where the number of a layer stands, as layers.#. does")
    return layer


Layer = Annotated[str, AfterValidator(with_one_number)]
Alpha = Annotated[Decimal | Literal["auto"], BeforeValidator(number_or_auto)]


class LinesParameters(Parameters):
    """Parameters of lines."""

    alpha: Alpha = Field("auto", description="scale of the first layer and of what lies in no layer; auto, or a number")
    beta: Number = Field(Decimal("0.5"), description="by how much the scale of the last layer is larger")
    layer: Layer = Field(".#.", description="what stands around a layer's number, #, in the names of its tensors")


class Lines(Composition[LinesParameters]):
    """LiNeS: task arithmetic whose scale grows in a line from the first layer to the last.

        theta  =  theta_0 + (alpha + beta l / (L - 1)) sum_i w_i tau_i      in layer l = 0 .. L - 1
        theta  =  theta_0 + alpha sum_i w_i tau_i                           outside of layers, or where L = 1
        alpha  =  (|sum_i tau_i|_1 / |tau_merged|_1) / k                    for auto; 1 / k here, where both are the sum

    The number of a layer is read from the name of a tensor: ``layer`` is a text in which # stands for it, searched for
    in the name with a dot before and after; L is one more than the largest number. A model of two stacks counts both
    alike. The paper tunes beta; the default is no more than a start (with alpha 1/8 its mean scale is that which task
    arithmetic has for eight tasks). Other merges than the sum take it from ``stages`` with scale=lines.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "lines", 1, "elementwise"
    reference = "Wang et al., ICLR 2025, arXiv:2410.17146"
    Params = LinesParameters

    def chain(self, p: LinesParameters) -> Chain:
        return Chain(scale=None)

    def needs(self, p: LinesParameters) -> Needs:
        return super().needs(p)._replace(compute="double")

    def plan(self, view: View, p: Callable[[str], LinesParameters], rng: Rng) -> Plan:
        return Plan({"scales": lines(view, p, 1.0)})

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: LinesParameters, rng: Rng) -> Program:
        return Affine(tuple(nearest(m.weight) for m in meta), on_base=True, scale=plan["scales"][name])


def depth(name: str, layer: str) -> int | None:
    """The number of the layer to which a tensor belongs, None for no layer.

    >>> depth("model.layers.11.mlp.weight", ".#."), depth("model.norm.weight", ".#.")
    (11, None)
    """
    before, after = map(re.escape, layer.split("#"))
    found = re.search(f"{before}([0-9]{{1,9}}){after}", f".{name}.")
    return int(found[1]) if found else None


def lines(view: View, p: Callable[[str], Any], ratio: float) -> dict[str, float]:
    """The scale of each tensor; ``auto`` is ratio / k."""
    depths = {name: depth(name, p(name).layer) for name in view.names}
    last = max((number for number in depths.values() if number is not None), default=0)
    auto = ratio / contributions(view)
    scales = {}
    for name, number in depths.items():
        alpha = p(name).alpha
        rise = Fraction(p(name).beta) * Fraction(number, last) if number else Fraction(0)
        scales[name] = (auto if alpha == "auto" else nearest(alpha)) + nearest(rise)
    return scales


def contributions(view: View) -> int:
    """How many contributions there are, those included that lack some tensors."""
    found: Counter[bytes] = Counter()
    for name in view.names:
        found |= Counter(m.id for m in view.meta(name))
    return found.total()


# ---------------------------------------------------------------- any stages


USED_BY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "density": ("sparsify", ("magnitude", "bernoulli", "magprune")),
    "scope": ("sparsify", ("magnitude",)),
    "rescale": ("sparsify", ("bernoulli", "magprune")),
    "epsilon": ("sparsify", ("magprune",)),
    "drop_low": ("sparsify", ("band",)),
    "drop_high": ("sparsify", ("band",)),
    "lambda_": ("scale", ("const",)),
    "alpha": ("scale", ("lines",)),
    "beta": ("scale", ("lines",)),
    "layer": ("scale", ("lines",)),
}
"""For each parameter of ``stages`` but the stages themselves: the kind of stage, and the stages that use it."""


class StagesParameters(Parameters):
    """Parameters of stages."""

    sparsify: Sparsify = Field("none", description="what is dropped of each task vector")
    elect: Elect = Field("none", description="sign of the sum of values, of the count of signs, or no election")
    combine: Combine = Field("sum", description="how values that agree become one")
    scale: Literal["const", "lines"] = Field("const", description="one scale, or one that grows with depth")
    density: Share = Field(Decimal("0.2"), description="share kept (magnitude, bernoulli, magprune)")
    scope: Literal["model", "tensor"] = Field("model", description="what the share is taken of (magnitude)")
    rescale: bool = Field(True, description="divide what is kept by its probability (bernoulli, magprune)")
    epsilon: Number = Field(Decimal("0.07"), ge=0, description="as in della (magprune)")
    drop_low: Dropped = Field(Decimal("0.85"), description="share dropped as too small (band)")
    drop_high: Dropped = Field(Decimal("0.007"), description="share dropped as too large (band)")
    lambda_: Number = Field(Decimal(1), alias="lambda", description="scale of the merged task vector (const)")
    alpha: Alpha = Field("auto", description="as in lines (lines)")
    beta: Number = Field(Decimal("0.5"), description="as in lines (lines)")
    layer: Layer = Field(".#.", description="as in lines (lines)")

    @field_validator(*USED_BY)
    @classmethod
    def _used(cls, value: Any, info: ValidationInfo) -> Any:
        kind, users = USED_BY[str(info.field_name)]
        chosen = info.data.get(kind)
        if chosen is None or chosen in users:
            return value
        if value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"{kind}={chosen} does not use it; it belongs to {kind}={'|'.join(users)}. Leave it out")
        return value

    @field_validator("epsilon")
    @classmethod
    def _probabilities(cls, epsilon: Decimal, info: ValidationInfo) -> Decimal:
        if info.data.get("sparsify") != "magprune":
            return epsilon
        return within_density(epsilon, info.data.get("density", Decimal(1)))

    @field_validator("drop_high")
    @classmethod
    def _leaves_some(cls, high: Decimal, info: ValidationInfo) -> Decimal:
        return below_one(high, info.data.get("drop_low", Decimal(0)))


class Stages(Composition[StagesParameters]):
    """Any composition: sparsify, elect, combine and scale are named one by one, each with its own parameters.

        theta = theta_0 + scale * combine(elect(sparsify(tau_1), ..., sparsify(tau_k)))

    sparsify: none; magnitude (the largest, as in ties); band (the middle, as in model_breadcrumbs); bernoulli (as in
    dare); magprune (as in della). elect: none; sum; count. combine, over what agrees with the elected sign: sum; mean,
    weighted; max, by magnitude. scale: const, which is lambda; lines, as in lines, where alpha=auto is
    (|sum_i w_i tau_i|_1 / |tau_merged|_1) / k with norms over the whole model. A parameter that the named stages do
    not use is refused. ties, dare, dare_ties, della, della_linear, model_breadcrumbs, breadcrumbs_ties and magmax are
    compositions with the same bytes.

    Properties: commutative; the others depend on the stages.
    """

    name, version, family = "stages", 1, "statistics"
    reference = "the papers of ties, dare, della, model_breadcrumbs and lines"
    Params = StagesParameters

    def chain(self, p: StagesParameters) -> Chain:
        return Chain(
            p.sparsify,
            p.elect,
            p.combine,
            None if p.scale == "lines" else p.lambda_,
            p.density,
            p.sparsify == "magnitude" and p.scope == "model",
            p.drop_low,
            p.drop_high,
            p.epsilon,
            p.rescale,
        )

    def plan(self, view: View, p: Callable[[str], StagesParameters], rng: Rng) -> Plan:
        plan = super().plan(view, p, rng)
        if all(p(name).scale == "const" for name in view.names):
            return plan
        auto = any(p(name).scale == "lines" and p(name).alpha == "auto" for name in view.names)
        return Plan({**plan.data, "scales": lines(view, p, self._shrinkage(view, plan, p, rng) if auto else 1.0)})

    def _shrinkage(self, view: View, plan: Plan, p: Callable[[str], StagesParameters], rng: Rng) -> float:
        """|sum_i w_i tau_i|_1 / |tau_merged|_1 over the whole model, 1 where nothing is left of it."""

        def work(u: Unit) -> Sums:
            c = self.chain(p(u.name))
            plain = total(weighted(u.task_vectors(), u.weights()))
            merged = merge(self.sparse(u, plan, c, rng), u.weights(), c.elect, c.combine)
            return absolute(plain), absolute(merged)

        whole = any(p(name).sparsify == "magprune" for name in view.names)
        found = ((name, work(view.whole(name))) for name in view.names) if whole else view.scan(work)
        above, below = (left_sum(sums.values()) for sums in folded(found))
        return above / below if below else 1.0


def absolute(x: Any) -> NDArray[np.float64]:
    """The sums of the magnitudes of each block of a stretch."""
    sums: NDArray[np.float64] = reduction.block_sums(x.abs().double()).cpu().numpy()
    return sums


def folded(found: Iterable[tuple[str, Sums]]) -> tuple[dict[str, float], dict[str, float]]:
    """Two sums of each tensor, from those of the blocks of its stretches in their order."""
    parts: dict[str, list[Sums]] = {}
    for name, sums in found:
        parts.setdefault(name, []).append(sums)

    def fold(which: int) -> dict[str, float]:
        return {name: reduction.fold(np.concatenate([one[which] for one in sums])) for name, sums in parts.items()}

    return fold(0), fold(1)


STRATEGIES = (DareLinear, Della, DellaLinear, ModelBreadcrumbs, Breadcrumbs, BreadcrumbsTies, Lines, Stages)
