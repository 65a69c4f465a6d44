"""A strategy of one's own in ten lines: halfway between the least and the greatest value of each element."""

from __future__ import annotations

import torch

from crdtmerge.strategies.parameters import Parameters
from crdtmerge.strategies.protocol import Needs, Plan, Rng, Strategy, Unit


class Midrange(Strategy[Parameters]):
    """Midrange: theta = (min_i theta_i + max_i theta_i) / 2, elementwise. Commutative, idempotent; not associative."""

    name, version, family, reference = "midrange", 1, "robust", "the midrange of a sample"

    def needs(self, p: Parameters) -> Needs:
        return Needs()

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> torch.Tensor:
        x = torch.stack(u.xs).sort(dim=0, stable=True).values
        return x[0] / 2 + x[-1] / 2
