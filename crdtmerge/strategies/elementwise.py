"""Strategies that move single models element by element: passthrough, nearswap."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from pydantic import Field

from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.programs import Affine, Program
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies import stages
from crdtmerge.strategies.parameters import Number, Parameters
from crdtmerge.strategies.protocol import Meta, Needs, Plan, Rng, Strategy, Unit

if TYPE_CHECKING:
    from torch import Tensor


class PassthroughParameters(Parameters):
    """Parameters of passthrough."""

    scale: Number = Field(Decimal(1), description="what every element is multiplied by")


class Passthrough(Strategy[PassthroughParameters]):
    """One model, times a number: theta = scale * theta_1.

    With rules for tensors it scales some of them, with an output dtype it is a conversion. The weight of the one model
    has no meaning and is not looked at.

    Properties: with one model there are none to speak of; at scale 1 the result is the model.
    """

    name, version, family = "passthrough", 1, "elementwise"
    reference = "mergekit's passthrough"
    Params = PassthroughParameters

    def needs(self, p: PassthroughParameters) -> Needs:
        return Needs(max_k=1, compute="double", weights="any")

    def apply(self, u: Unit, plan: Plan, p: PassthroughParameters, rng: Rng) -> Tensor:
        return u.xs[0] * u.scalar(p.scale)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: PassthroughParameters, rng: Rng) -> Program:
        return Affine((nearest(p.scale),))


class NearswapParameters(Parameters):
    """Parameters of nearswap."""

    threshold: Number = Field(Decimal("0.0001"), ge=0, description="how far an element moves from the base at most")


class Nearswap(Strategy[NearswapParameters]):
    """NearSwap: elements that lie near the base's are taken, the others move no further than ``threshold``.

        d_i   =  tau_i where |tau_i| <= threshold, else threshold sign(tau_i)
        theta =  theta_0 + sum_i w_i d_i / sum_i w_i

    For one model it is mergekit's (1 - c) theta_0 + c theta_1 with c = min(threshold / |tau_1|, 1), but for its bound
    of 1e-6 on |tau_1|, which is not needed here. More models, which it refuses, are the weighted mean of their moves.

    Properties: commutative; idempotent for models within the threshold of the base; not associative.
    """

    name, version, family = "nearswap", 1, "elementwise"
    reference = "mergekit's nearswap (alchemonaut)"
    Params = NearswapParameters

    def needs(self, p: NearswapParameters) -> Needs:
        return Needs(base="required", compute="double")

    def apply(self, u: Unit, plan: Plan, p: NearswapParameters, rng: Rng) -> Tensor:
        bound = u.scalar(p.threshold)
        moves = [torch.where(tau.abs() <= bound, tau, torch.sign(tau) * bound) for tau in u.task_vectors()]
        assert u.base is not None
        return u.base + stages.merge(moves, u.weights(), "none", "mean")


STRATEGIES = (Passthrough, Nearswap)
