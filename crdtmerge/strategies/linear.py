"""Linear combinations: weight_average, linear, task_arithmetic.

All are computed in float64 with one rounding at the end, so that a result lies within one rounding of the exact
combination for bfloat16, float16 and float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from pydantic import Field

from crdtmerge.errors import UsageError
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.programs import Affine, Program
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies.parameters import Parameters, WithLambda
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.stages import weighted

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SUM = Fraction(1, 10**8)


def total(xs: list[Tensor]) -> Tensor:
    """x_1 + x_2 + ..., from left to right."""
    acc = xs[0]
    for x in xs[1:]:
        acc = acc + x
    return acc


def divided(x: Tensor, divisor: float) -> Tensor:
    """x / divisor as an IEEE division on every device (a Python divisor becomes a reciprocal on CUDA)."""
    return x / torch.full((1,), divisor, dtype=x.dtype, device=x.device)


def divisor_of(meta: tuple[Meta, ...]) -> float:
    """The sum of the weights. Raises UsageError if it is too close to zero to divide by."""
    whole = sum((Fraction(m.weight) for m in meta), Fraction(0))
    if abs(whole) < SMALLEST_SUM:
        raise UsageError(
            f"the weights sum to {float(whole)}; a weighted mean divides by their sum. Change a --weight or set "
            "normalize=false."
        )
    return nearest(whole)


def shares(meta: Sequence[Meta]) -> list[float]:
    """The weights divided by their sum. Raises UsageError if that is too close to zero."""
    divisor_of(tuple(meta))
    mass = Fraction(0)
    for m in meta:
        mass += Fraction(m.weight)
    return [nearest(Fraction(m.weight) / mass) for m in meta]


class WeightAverage(Strategy[Parameters]):
    """Weighted mean: theta = sum_i w_i theta_i / sum_i w_i.

    The weights are those claimed for the contributions (numbers of examples for federated averaging; 1 for a uniform
    model soup). Divided once, at the end.

    Properties: commutative, idempotent; not associative (the mean of means), which the op set mends.
    """

    name, version, family = "weight_average", 1, "elementwise"
    reference = "McMahan et al. 2017, arXiv:1602.05629; Wortsman et al. 2022, arXiv:2203.05482"

    def needs(self, p: Parameters) -> Needs:
        return Needs(base="unused", compute="double")

    def plan(self, view: View, p: Callable[[str], Parameters], rng: Rng) -> Plan:
        for name in view.names:
            divisor_of(view.meta(name))
        return EMPTY

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> Tensor:
        return divided(total(weighted(u.xs, u.weights())), divisor_of(u.meta))

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: Parameters, rng: Rng) -> Program:
        return Affine(tuple(nearest(m.weight) for m in meta), divisor=divisor_of(meta))


class LinearParameters(Parameters):
    """Parameters of linear."""

    normalize: bool = Field(True, description="divide by the sum of the weights")


class Linear(Strategy[LinearParameters]):
    """Linear combination: theta = sum_i w_i theta_i, divided by sum_i w_i if ``normalize``.

    Weights may be negative; a sum close to zero is refused where it would be divided by.
    """

    name, version, family = "linear", 1, "elementwise"
    reference = "Wortsman et al. 2022, arXiv:2203.05482; mergekit's linear"
    Params = LinearParameters

    def needs(self, p: LinearParameters) -> Needs:
        return Needs(base="unused", compute="double", weights="any")

    def plan(self, view: View, p: Callable[[str], LinearParameters], rng: Rng) -> Plan:
        for name in view.names:
            if p(name).normalize:
                divisor_of(view.meta(name))
        return EMPTY

    def apply(self, u: Unit, plan: Plan, p: LinearParameters, rng: Rng) -> Tensor:
        acc = total(weighted(u.xs, u.weights()))
        return divided(acc, divisor_of(u.meta)) if p.normalize else acc

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: LinearParameters, rng: Rng) -> Program:
        return Affine(tuple(nearest(m.weight) for m in meta), divisor=divisor_of(meta) if p.normalize else None)


class TaskArithmetic(Strategy[WithLambda]):
    """Task arithmetic: theta = theta_0 + lambda * sum_i w_i tau_i, where tau_i = theta_i - theta_0.

    Weights are not normalised: with lambda = 1/k and equal weights it is the average; a negative lambda forgets.

    Properties: commutative; associative for lambda = 1 up to rounding; not idempotent.
    """

    name, version, family = "task_arithmetic", 1, "elementwise"
    reference = "Ilharco et al., ICLR 2023, arXiv:2212.04089"
    Params = WithLambda

    def needs(self, p: WithLambda) -> Needs:
        return Needs(base="required", compute="double", weights="any")

    def apply(self, u: Unit, plan: Plan, p: WithLambda, rng: Rng) -> Tensor:
        tau = total(weighted(u.task_vectors(), u.weights()))
        assert u.base is not None
        return u.base + tau * u.scalar(p.lambda_)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: WithLambda, rng: Rng) -> Program:
        return Affine(tuple(nearest(m.weight) for m in meta), on_base=True, scale=nearest(p.lambda_))


STRATEGIES = (WeightAverage, Linear, TaskArithmetic)
