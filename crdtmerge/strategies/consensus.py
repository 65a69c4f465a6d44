"""Strategies on sparse task vectors that agree on a sign: ties, dare, dare_ties, magmax.

With tau_i = theta_i - theta_0 in the compute dtype, each is sparsify, then elect, then combine:

    theta = theta_0 + lambda * combine(elect(sparsify(tau_1), ..., sparsify(tau_k)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from crdtmerge.errors import ParameterError
from crdtmerge.numerics import philox
from crdtmerge.numerics.programs import Consensus, Program
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies import stages
from crdtmerge.strategies.parameters import Number, Share, WithLambda
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit, View

if TYPE_CHECKING:
    from torch import Tensor


def weights_of(meta: Sequence[Meta]) -> tuple[float, ...]:
    """The claimed weights as floats."""
    return tuple(nearest(m.weight) for m in meta)


class TiesParameters(WithLambda):
    """Parameters of ties."""

    density: Share = Field(Decimal("0.2"), description="share of each task vector that is kept, by magnitude")
    scope: Literal["model", "tensor"] = Field("model", description="what the share is taken of")
    elect: Literal["sum", "count"] = Field("sum", description="sign of the sum of values, or of the count of signs")
    combine: Literal["mean", "sum", "max"] = Field("mean", description="how values of the elected sign become one")


class Ties(Strategy[TiesParameters]):
    """TIES: trim, elect sign, disjoint merge.

        tau_i  <- the floor(density n) largest |tau_i|, exactly (at least one; ties by lowest position), else 0
        gamma  =  sign(sum_i w_i tau_i), zero counted as plus
        m      =  sum w_i tau_i / sum w_i over the i with sign(tau_i) = gamma
        theta  =  theta_0 + lambda m

    ``scope=model`` takes the share of the whole flattened model as the paper does, ``tensor`` of each tensor.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "ties", 1, "statistics"
    reference = "Yadav et al., NeurIPS 2023, arXiv:2306.01708"
    Params = TiesParameters

    def needs(self, p: TiesParameters) -> Needs:
        return Needs(base="required", plan="scan" if p.density < 1 else "none")

    def plan(self, view: View, p: Callable[[str], TiesParameters], rng: Rng) -> Plan:
        asked = {(p(name).scope, p(name).density) for name in view.names}
        scopes = {scope for scope, _ in asked}
        if "model" in scopes and len(asked) > 1:
            raise ParameterError(
                "strategy 'ties': scope=model takes one share of the whole model; a density for some tensors needs "
                "scope=tensor."
            )
        if all(density == 1 for _, density in asked):
            return EMPTY
        return Plan({"cuts": view.cuts(lambda name: p(name).density, whole_model="model" in scopes)})

    def apply(self, u: Unit, plan: Plan, p: TiesParameters, rng: Rng) -> Tensor:
        taus = u.task_vectors()
        if p.density < 1:
            taus = [stages.trim(tau, cut, u.start) for tau, cut in zip(taus, plan["cuts"][u.name], strict=True)]
        taus = stages.weighted(taus, u.weights())
        gamma = stages.elect(taus, p.elect)
        m = stages.combine(taus, u.weights(), stages.agreeing(taus, gamma), p.combine)
        assert u.base is not None
        return u.base + m * u.scalar(p.lambda_)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: TiesParameters, rng: Rng) -> Program:
        cuts = tuple(plan["cuts"][name]) if p.density < 1 else ()
        return Consensus(weights_of(meta), cuts, elect=p.elect, combine=p.combine, scale=nearest(p.lambda_))


class Dropping(WithLambda):
    """Parameters of strategies that drop elements at random."""

    density: Share = Field(Decimal("0.1"), description="probability with which an element is kept (drop = 1 - density)")
    rescale: bool = Field(True, description="divide what is kept by the density, so that its mean is the task vector")

    @property
    def factor(self) -> float:
        """What kept elements are multiplied by: the float nearest to 1 / density."""
        top, bottom = self.density.as_integer_ratio()
        return bottom / top if self.rescale else 1.0


class DareParameters(Dropping):
    """Parameters of dare."""

    combine: Literal["sum", "mean"] = Field("sum", description="task arithmetic, or the weighted mean of task vectors")


class Dare(Strategy[DareParameters]):
    """DARE: drop and rescale, then task arithmetic.

        m_i   ~  Bernoulli(density), elementwise, from the stream of (seed, contribution, tensor)
        tau_i <- m_i tau_i / density
        theta =  theta_0 + lambda sum_i w_i tau_i

    Unbiased: over seeds the mean of the sparse task vector is the task vector.

    Properties: commutative (masks belong to contents, not positions); neither associative nor idempotent.
    """

    name, version, family = "dare", 1, "elementwise"
    reference = "Yu et al., ICML 2024, arXiv:2311.03099"
    Params = DareParameters

    def needs(self, p: DareParameters) -> Needs:
        return Needs(base="required", weights="any" if p.combine == "sum" else "nonnegative")

    def apply(self, u: Unit, plan: Plan, p: DareParameters, rng: Rng) -> Tensor:
        taus = dropped(u, p.density, u.scalar(p.factor), rng)
        taus = stages.weighted(taus, u.weights())
        m = stages.combine(taus, u.weights(), stages.everything(taus), p.combine)
        assert u.base is not None
        return u.base + m * u.scalar(p.lambda_)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: DareParameters, rng: Rng) -> Program:
        return dropping(streams(name, meta, rng), meta, p, elect="none", combine=p.combine)


class DareTiesParameters(Dropping):
    """Parameters of dare_ties."""

    elect: Literal["sum", "count"] = Field("sum", description="sign of the sum of values, or of the count of signs")
    combine: Literal["mean", "sum", "max"] = Field("mean", description="how values of the elected sign become one")


class DareTies(Strategy[DareTiesParameters]):
    """DARE, then the sign election and disjoint mean of TIES, without its trimming.

        tau_i <- m_i tau_i / density,  m_i ~ Bernoulli(density)
        gamma =  sign(sum_i w_i tau_i), zero counted as plus
        theta =  theta_0 + lambda * (sum w_i tau_i / sum w_i over the i with sign(tau_i) = gamma)

    Dropped elements neither vote nor count. Trimming is left out as in mergekit, whose use fixed the name's meaning.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "dare_ties", 1, "elementwise"
    reference = "Yu et al., ICML 2024, arXiv:2311.03099, section 4, with Yadav et al., arXiv:2306.01708"
    Params = DareTiesParameters

    def needs(self, p: DareTiesParameters) -> Needs:
        return Needs(base="required")

    def apply(self, u: Unit, plan: Plan, p: DareTiesParameters, rng: Rng) -> Tensor:
        taus = dropped(u, p.density, u.scalar(p.factor), rng)
        taus = stages.weighted(taus, u.weights())
        gamma = stages.elect(taus, p.elect)
        m = stages.combine(taus, u.weights(), stages.agreeing(taus, gamma), p.combine)
        assert u.base is not None
        return u.base + m * u.scalar(p.lambda_)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: DareTiesParameters, rng: Rng) -> Program:
        return dropping(streams(name, meta, rng), meta, p, elect=p.elect, combine=p.combine)


class MagMax(Strategy[WithLambda]):
    """MagMax: of all task vectors the element of largest magnitude: theta_0 + lambda tau_(argmax_i |w_i tau_i|).

    Of two equal magnitudes the positive wins, so no order of contributions enters. The one strategy here that is a
    join by itself, commutative, associative and idempotent, at weights 1 and lambda 1, wherever theta_i - theta_0 is
    exact in the compute dtype (as it is unless the two are many binades apart): the positive control for everything
    that the op set promises.
    """

    name, version, family = "magmax", 1, "elementwise"
    reference = "Marczak et al., ECCV 2024, arXiv:2407.06322"
    Params = WithLambda

    def needs(self, p: WithLambda) -> Needs:
        return Needs(base="required", weights="any")

    def apply(self, u: Unit, plan: Plan, p: WithLambda, rng: Rng) -> Tensor:
        taus = stages.weighted(u.task_vectors(), u.weights())
        m = stages.combine(taus, u.weights(), stages.everything(taus), "max")
        assert u.base is not None
        return u.base + m * u.scalar(p.lambda_)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: WithLambda, rng: Rng) -> Program:
        return Consensus(weights_of(meta), elect="none", combine="max", scale=nearest(p.lambda_))


def dropped(u: Unit, density: Number, factor: float, rng: Rng) -> list[Tensor]:
    """The task vectors of a unit, each with its own mask."""
    masks = streams(u.name, u.meta, rng)
    return [
        stages.drop(tau, stream, density, u.start, factor) for tau, stream in zip(u.task_vectors(), masks, strict=True)
    ]


def dropping(
    masks: tuple[philox.Stream, ...], meta: Sequence[Meta], p: Dropping, *, elect: str, combine: str
) -> Consensus:
    """The program of a strategy that drops elements at random."""
    return Consensus(
        weights_of(meta),
        streams=masks,
        keep_below=philox.keep_below(p.density),
        rescale=p.factor,
        elect=elect,
        combine=combine,
        scale=nearest(p.lambda_),
    )


def streams(tensor: str, meta: Sequence[Meta], rng: Rng) -> tuple[philox.Stream, ...]:
    """The random stream of each contribution for dropping elements of one tensor."""
    return tuple(rng.stream("drop", m.id, tensor) for m in meta)


STRATEGIES = (Ties, Dare, DareTies, MagMax)
