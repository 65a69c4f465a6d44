"""Strategies on sparse task vectors that agree on a sign: ties, dare, dare_ties, magmax.

With tau_i = theta_i - theta_0 in the compute dtype, each is sparsify, then elect, then combine:

    theta = theta_0 + lambda * combine(elect(sparsify(tau_1), ..., sparsify(tau_k)))
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Literal

from pydantic import Field

from crdtmerge.errors import ParameterError
from crdtmerge.strategies.parameters import Share, WithLambda
from crdtmerge.strategies.protocol import EMPTY, Plan, Rng, View
from crdtmerge.strategies.stages import Chain, Composition


class TiesParameters(WithLambda):
    """Parameters of ties."""

    density: Share = Field(Decimal("0.2"), description="share of each task vector that is kept, by magnitude")
    scope: Literal["model", "tensor"] = Field("model", description="what the share is taken of")
    elect: Literal["sum", "count"] = Field("sum", description="sign of the sum of values, or of the count of signs")
    combine: Literal["mean", "sum", "max"] = Field("mean", description="how values of the elected sign become one")


class Ties(Composition[TiesParameters]):
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

    def chain(self, p: TiesParameters) -> Chain:
        return Chain("magnitude", p.elect, p.combine, p.lambda_, p.density, whole_model=p.scope == "model")

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


class Dropping(WithLambda):
    """Parameters of strategies that drop elements at random."""

    density: Share = Field(Decimal("0.1"), description="probability with which an element is kept (drop = 1 - density)")
    rescale: bool = Field(True, description="divide what is kept by the density, so that its mean is the task vector")


class DareParameters(Dropping):
    """Parameters of dare."""

    combine: Literal["sum", "mean"] = Field("sum", description="task arithmetic, or the weighted mean of task vectors")


class Dare(Composition[DareParameters]):
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

    def chain(self, p: DareParameters) -> Chain:
        return Chain("bernoulli", "none", p.combine, p.lambda_, p.density, rescale=p.rescale)


class DareTiesParameters(Dropping):
    """Parameters of dare_ties."""

    elect: Literal["sum", "count"] = Field("sum", description="sign of the sum of values, or of the count of signs")
    combine: Literal["mean", "sum", "max"] = Field("mean", description="how values of the elected sign become one")


class DareTies(Composition[DareTiesParameters]):
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

    def chain(self, p: DareTiesParameters) -> Chain:
        return Chain("bernoulli", p.elect, p.combine, p.lambda_, p.density, rescale=p.rescale)


class MagMax(Composition[WithLambda]):
    """MagMax: of all task vectors the element of largest magnitude: theta_0 + lambda tau_(argmax_i |w_i tau_i|).

    Of two equal magnitudes the positive wins, so no order of contributions enters. The one strategy here that is a
    join by itself, commutative, associative and idempotent, at weights 1 and lambda 1, wherever theta_i - theta_0 is
    exact in the compute dtype (as it is unless the two are many binades apart): the positive control for everything
    that the op set promises.
    """

    name, version, family = "magmax", 1, "elementwise"
    reference = "Marczak et al., ECCV 2024, arXiv:2407.06322"
    Params = WithLambda

    def chain(self, p: WithLambda) -> Chain:
        return Chain("none", "none", "max", p.lambda_)


STRATEGIES = (Ties, Dare, DareTies, MagMax)
