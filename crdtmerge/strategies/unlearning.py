"""Strategies that forget: negative_merge, split_unlearn_merge."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.programs import Program
from crdtmerge.strategies import stages
from crdtmerge.strategies.consensus import TiesParameters
from crdtmerge.strategies.linear import total
from crdtmerge.strategies.parameters import Number, WithLambda
from crdtmerge.strategies.protocol import Meta, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.stages import Chain, Composition

if TYPE_CHECKING:
    from torch import Tensor


class NegativeMergeParameters(WithLambda):
    """Parameters of negative_merge."""

    consensus: Number = Field(Decimal(1), ge=0, le=1, description="share of forget models by which one sign must lead")
    lambda_task: Number = Field(Decimal(1), description="scale of the task vectors that are added")


class NegativeMerge(Strategy[NegativeMergeParameters]):
    """NegMerge: subtract what models fine-tuned on the forget set agree on.

        c     =  1 where |sum_i sign(tau_i)| >= consensus * k_forget, else 0     i over the k_forget models to forget
        theta =  theta_0 + lambda_task sum_j w_j tau_j - lambda c sum_i w_i tau_i / sum_i w_i

    j runs over the contributions of role ``task``, i over those of role ``forget``; where all have the role ``task``,
    which is said by saying nothing, all are read as ``forget``. Consensus 1 is the paper's: all signs are equal and
    none is zero. With less than that, the mean is over all models to forget. A tensor that no model to forget has
    loses nothing. All in float64.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "negative_merge", 1, "elementwise"
    reference = "Kim, Han, Choe, ICML 2025, arXiv:2410.05583"
    Params = NegativeMergeParameters

    def needs(self, p: NegativeMergeParameters) -> Needs:
        return Needs(base="required", roles=("task", "forget"), compute="double", plan="scan")

    def plan(self, view: View, p: Callable[[str], NegativeMergeParameters], rng: Rng) -> Plan:
        return Plan({"mixed": any(m.role == "forget" for name in view.names for m in view.meta(name))})

    def apply(self, u: Unit, plan: Plan, p: NegativeMergeParameters, rng: Rng) -> Tensor:
        own = list(zip(u.task_vectors(), u.weights(), u.meta, strict=True))
        added = [tau * w for tau, w, m in own if plan["mixed"] and m.role == "task"]
        forget = [(tau, w) for tau, w, m in own if not plan["mixed"] or m.role == "forget"]
        assert u.base is not None
        theta = u.base + total(added) * u.scalar(p.lambda_task) if added else u.base
        if not forget:
            return theta
        taus, weights = [tau for tau, _ in forget], [w for _, w in forget]
        lead = total([torch.sign(tau).to(torch.int64) for tau in taus]).abs()
        agreed = lead >= ceil(Fraction(p.consensus) * len(taus))
        mean = stages.merge(taus, weights, "none", "mean")
        return theta - torch.where(agreed, mean, torch.zeros_like(mean)) * u.scalar(p.lambda_)


class SplitUnlearnMergeParameters(TiesParameters):
    """Parameters of split_unlearn_merge: those of ties, and how models of role forget are unlearned and all merged."""

    tvn_lambda: Number = Field(Decimal(1), description="scale of the negation of models of role forget")
    inner: Literal["ties", "task_arithmetic"] = Field("ties", description="how the unlearned models are merged")

    @field_validator("inner")
    @classmethod
    def _unused(cls, inner: str, info: ValidationInfo) -> str:
        for name in ("density", "scope", "elect", "combine") if inner == "task_arithmetic" else ():
            if name in info.data and info.data[name] != cls.model_fields[name].default:
                raise ValueError(f"task_arithmetic does not use {name}; it belongs to ties. Leave it out")
        return inner


class SplitUnlearnMerge(Composition[SplitUnlearnMergeParameters]):
    """SPUNGE, its last step: merge the models of which each has unlearned one part of what is to be forgotten.

        theta_i <- theta_0 - tvn_lambda (theta_i - theta_0)   for role ``forget``: a model fine-tuned on its part
        theta   =  TIES(theta_0; theta_1, ..., theta_k), or task arithmetic

    A contribution of role ``unlearned``, or of the default role, is taken as it is; splitting by attribute and
    unlearning are done before. With inner=ties and no role ``forget`` the bytes are those of ties. What TIES trims is
    decided on theta_i - theta_0 before the negation, whose one factor leaves the order of magnitudes as it is. The
    paper says TIES; that its share kept is that of ties is an assumption.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "split_unlearn_merge", 1, "statistics"
    reference = "Kadhe et al. 2024 (SPUNGE), arXiv:2406.11780"
    Params = SplitUnlearnMergeParameters

    def chain(self, p: SplitUnlearnMergeParameters) -> Chain:
        if p.inner == "task_arithmetic":
            return Chain(scale=p.lambda_)
        return Chain("magnitude", p.elect, p.combine, p.lambda_, p.density, whole_model=p.scope == "model")

    def needs(self, p: SplitUnlearnMergeParameters) -> Needs:
        compute: Literal["double", "storage"] = "double" if p.inner == "task_arithmetic" else "storage"
        return super().needs(p)._replace(roles=("task", "unlearned", "forget"), compute=compute)

    def apply(self, u: Unit, plan: Plan, p: SplitUnlearnMergeParameters, rng: Rng) -> Tensor:
        c = self.chain(p)
        turned = [u.scalar(-p.tvn_lambda) if m.role == "forget" else 1.0 for m in u.meta]
        taus = stages.weighted(self.sparse(u, plan, c, rng), turned)
        assert u.base is not None
        return u.base + stages.merge(taus, u.weights(), c.elect, c.combine) * u.scalar(p.lambda_)

    def program(
        self, name: str, meta: tuple[Meta, ...], plan: Plan, p: SplitUnlearnMergeParameters, rng: Rng
    ) -> Program | None:
        if p.inner == "task_arithmetic" or any(m.role == "forget" for m in meta):
            return None
        return super().program(name, meta, plan, p, rng)


STRATEGIES = (NegativeMerge, SplitUnlearnMerge)
