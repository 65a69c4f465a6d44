"""Strategies that choose elements by comparing task vectors with each other: sce, emr, consensus_ta, ram."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from crdtmerge.errors import ParameterError
from crdtmerge.numerics import reduction, selection
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.scalars import left_sum, nearest
from crdtmerge.strategies import stages
from crdtmerge.strategies.composition import Sums, absolute, folded
from crdtmerge.strategies.linear import total
from crdtmerge.strategies.parameters import Number, Parameters, Share, WithLambda
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View

if TYPE_CHECKING:
    from torch import Tensor


class SceParameters(WithLambda):
    """Parameters of sce."""

    density: Share = Field(Decimal("0.1"), description="share of the positions of each tensor that is kept")


class Sce(Strategy[SceParameters]):
    """SCE: select positions by variance, calculate a coefficient a tensor, erase the minority sign.

        S     =  the floor(density n) positions of largest sum_i (tau_i - mean tau)^2 (at least one; ties by lowest)
        tau_i <- tau_i on S, else 0
        eta_i =  w_i |tau_i|^2 / sum_j w_j |tau_j|^2,   0 where all are 0
        gamma =  sign(sum_i tau_i), zero counted as plus
        theta =  theta_0 + lambda * (sum eta_i tau_i / sum eta_i over the i with sign(tau_i) = gamma)

    All in float64, tensor by tensor. Task vectors that are all equal have no variance: the lowest positions are kept.
    mergekit makes the coefficients equal below a mean square of 1e-6, where most fine-tunes lie; there is no such
    threshold here.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "sce", 1, "statistics"
    reference = "Wan et al. 2024 (FuseChat), arXiv:2408.07990"
    Params = SceParameters

    def needs(self, p: SceParameters) -> Needs:
        return Needs(base="required", unit="tensor", compute="double")

    def apply(self, u: Unit, plan: Plan, p: SceParameters, rng: Rng) -> Tensor:
        taus = u.task_vectors()
        chosen = most_various(taus, p.density)
        taus = [torch.where(chosen, tau, torch.zeros_like(tau)) for tau in taus]
        energies = [w * reduction.tree_sum(tau * tau) for tau, w in zip(taus, u.weights(), strict=True)]
        all_of_it = left_sum(energies) or 1.0
        eta = [energy / all_of_it for energy in energies]
        selected = stages.agreeing(taus, stages.elect(taus, "sum"))
        m = stages.combine(stages.weighted(taus, eta), eta, selected, "mean")
        assert u.base is not None
        return u.base + m * u.scalar(p.lambda_)


def most_various(taus: Sequence[Tensor], density: Decimal) -> Tensor:
    """Where the max(1, floor(density n)) largest variances over task vectors lie, as bool; ties by lowest position.

    k^2 times a variance is sum_(i < j) (tau_i - tau_j)^2, which divides nothing, so that equal ones are equal.
    """
    pairs = [a - b for a, b in combinations(taus, 2)]
    spread = total([x * x for x in pairs]) if pairs else torch.zeros_like(taus[0])
    top, bottom = density.as_integer_ratio()
    order = torch.sort(selection.patterns(spread), descending=True, stable=True).indices
    chosen = torch.zeros_like(spread, dtype=torch.bool)
    chosen[order[: max(1, top * len(spread) // bottom)]] = True
    return chosen


class EmrParameters(Parameters):
    """Parameters of emr."""

    emit: Literal["unified", "modulated"] = Field("unified", description="the shared vector, or one task's own of it")
    task: str = Field("", description="the task, as claimed for a contribution, whose vector is emitted (modulated)")
    rescale_norm: Literal["global", "tensor_mean"] = Field(
        "global", description="the rescaler is a ratio of sums, or of sums of the tensors' means (modulated)"
    )

    @field_validator("task")
    @classmethod
    def _named_if_asked(cls, task: str, info: ValidationInfo) -> str:
        if info.data.get("emit") == "modulated" and not task:
            raise ValueError("emit=modulated emits the vector of one task; name it")
        if info.data.get("emit") == "unified" and task:
            raise ValueError("emit=unified is one vector for all tasks and does not use it. Leave it out")
        return task

    @field_validator("rescale_norm")
    @classmethod
    def _used(cls, rescale_norm: str, info: ValidationInfo) -> str:
        if info.data.get("emit") == "unified" and rescale_norm != "global":
            raise ValueError("emit=unified is not rescaled and does not use it. Leave it out")
        return rescale_norm


class Emr(Strategy[EmrParameters]):
    """EMR: elect one vector for all tasks; mask and rescale it for each.

        gamma    =  sign(sum_i w_i tau_i), zero counted as plus
        tau_uni  =  gamma max_i |w_i tau_i| over the i with sign(tau_i) = gamma
        M_t      =  1 where tau_t and tau_uni have one sign, else 0
        lambda_t =  sum |tau_t| / sum |M_t tau_uni| over the whole model,   1 where both are 0
        theta    =  theta_0 + tau_uni              (emit=unified)
        theta    =  theta_0 + lambda_t M_t tau_uni (emit=modulated, t the contribution with the claimed task)

    ``rescale_norm=tensor_mean`` is the official code's rescaler: sums over tensors of the means of |tau_t| and of
    |M_t tau_uni|. The official code counts a zero sum as minus; plus makes the unified vector of two contributions
    that of magmax, to the bit. A tensor that the task's contribution lacks stays that of the base.

    Properties, of the unified vector: commutative, associative and idempotent for two at weights 1; of more it is not
    the fold of two. The modulated one is none of these but commutative.
    """

    name, version, family = "emr", 1, "statistics"
    reference = "Huang et al., NeurIPS 2024, arXiv:2405.17461"
    Params = EmrParameters

    def needs(self, p: EmrParameters) -> Needs:
        return Needs(base="required", plan="scan" if p.emit == "modulated" else "none")

    def plan(self, view: View, p: Callable[[str], EmrParameters], rng: Rng) -> Plan:
        asked = [p(name) for name in view.names]
        if any(one != asked[0] for one in asked):
            raise ParameterError("strategy 'emr': its parameters hold for the whole model; none can have rules.")
        if not asked or asked[0].emit == "unified":
            return EMPTY
        task = asked[0].task
        ids = sorted({m.id for name in view.names for m in view.meta(name) if m.task == task})
        if len(ids) != 1:
            known = sorted({m.task for name in view.names for m in view.meta(name) if m.task is not None})
            raise ParameterError(
                f"strategy 'emr': task = {task!r}: {len(ids)} contributions have this task, one must. "
                f"Tasks claimed: {', '.join(map(ascii, known)) or 'none'}."
            )

        def work(u: Unit) -> Sums:
            own = _of_task(u, task)
            return (absolute(own), absolute(modulated(unified(u), own))) if own is not None else (NOTHING, NOTHING)

        sums = folded(view.scan(work))
        if asked[0].rescale_norm == "tensor_mean":
            sizes = {name: max(view.elements(name), 1) for name in view.names}
            sums = tuple({name: one[name] / sizes[name] for name in one} for one in sums)  # type: ignore[assignment]
        above, below = (left_sum(one.values()) for one in sums)
        return Plan({"scale": above / below if below else 1.0})

    def apply(self, u: Unit, plan: Plan, p: EmrParameters, rng: Rng) -> Tensor:
        assert u.base is not None
        if p.emit == "unified":
            return u.base + unified(u)
        own = _of_task(u, p.task)
        return u.base if own is None else u.base + modulated(unified(u), own) * u.scalar(plan["scale"])


NOTHING = np.zeros(0)


def unified(u: Unit) -> Tensor:
    """tau_uni: of what has the elected sign, the largest."""
    return stages.merge(u.task_vectors(), u.weights(), "sum", "max")


def modulated(vector: Tensor, own: Tensor) -> Tensor:
    """A vector where another has its sign, else zero."""
    return torch.where(((vector > 0) & (own > 0)) | ((vector < 0) & (own < 0)), vector, torch.zeros_like(vector))


def _of_task(u: Unit, task: str) -> Tensor | None:
    assert u.base is not None
    return next((x - u.base for x, m in zip(u.xs, u.meta, strict=True) if m.task == task), None)


class ConsensusParameters(WithLambda):
    """Parameters of consensus_ta."""

    lambda_mask: Number = Field(
        Decimal("0.4"), ge=0, description="how much of the rest of the sum a task must outweigh"
    )
    k_thr: int = Field(2, ge=0, description="contributions that must need an element for it to be kept")


class ConsensusTaskArithmetic(Strategy[ConsensusParameters]):
    """Consensus task arithmetic: of the summed task vector, what enough of the tasks need.

        tau_mtl =  sum_i w_i tau_i
        m_i     =  1 where |w_i tau_i| > lambda_mask |tau_mtl - w_i tau_i|, else 0
        theta   =  theta_0 + lambda tau_mtl where sum_i m_i >= k_thr,  theta_0 elsewhere

    With k_thr = 0 it is task arithmetic, with k_thr above k the base. The paper tunes lambda_mask for each task from
    0.2 to 0.6; here it is one for all.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "consensus_ta", 1, "elementwise"
    reference = "Wang et al., ICML 2024 (TALL-masks), arXiv:2405.07813"
    Params = ConsensusParameters

    def needs(self, p: ConsensusParameters) -> Needs:
        return Needs(base="required", compute="double", weights="any")

    def apply(self, u: Unit, plan: Plan, p: ConsensusParameters, rng: Rng) -> Tensor:
        taus = stages.weighted(u.task_vectors(), u.weights())
        tau = total(taus)
        bound = u.scalar(p.lambda_mask)
        needed = torch.zeros_like(tau, dtype=torch.int64)
        for own in taus:
            needed = needed + (own.abs() > (tau - own).abs() * bound).to(torch.int64)
        assert u.base is not None
        return u.base + torch.where(needed >= p.k_thr, tau, torch.zeros_like(tau)) * u.scalar(p.lambda_)


class RamParameters(Parameters):
    """Parameters of ram."""

    epsilon: Number = Field(Decimal("1e-5"), ge=0, description="magnitude up to which a difference counts as none")
    r: Number = Field(Decimal(0), ge=0, description="strength of the rescaling of RAM+; 0 for none")
    alpha: Number = Field(Decimal("0.2"), ge=0, description="the largest ratio of shared to unique that counts (RAM+)")
    scope: Literal["model", "tensor"] = Field("model", description="where shared and unique are counted (RAM+)")


class Ram(Strategy[RamParameters]):
    """Reinforced agent merging: what one task changed is added, what several changed is averaged.

        A_i   =  where |tau_i| > epsilon
        theta =  theta_0 + sum w_i tau_i / sum w_i over the i with A_i;  theta_0 where there is none
        theta =  theta_0 + lambda_i tau_i, lambda_i = 1 + r clip(shared_i / unique_i, 0, alpha), where only A_i holds

    shared_i and unique_i count the elements of A_i that others changed too and that nobody else did. With r = 0 it is
    RAM. With r = 0.1 it is RAM+, of the whole model or, with ``scope=tensor``, of each tensor, which is mergekit's
    ramplus_tl. All in float64.

    Properties: commutative; neither associative nor idempotent (the mean of means; what is within epsilon is lost).
    """

    name, version, family = "ram", 1, "elementwise"
    reference = "Reinforced Agent Merging 2026, arXiv:2601.13572"
    Params = RamParameters

    def needs(self, p: RamParameters) -> Needs:
        return Needs(base="required", compute="double", plan="scan" if p.r else "none")

    def plan(self, view: View, p: Callable[[str], RamParameters], rng: Rng) -> Plan:
        if not any(p(name).r for name in view.names):
            return EMPTY
        by_tensor: dict[str, dict[bytes, tuple[int, int]]] = {}
        for name, counts in view.scan(lambda u: _counted(u, p(u.name))):
            _add(by_tensor.setdefault(name, {}), counts)
        everywhere: dict[bytes, tuple[int, int]] = {}
        for counts in by_tensor.values():
            _add(everywhere, counts)
        scales = {}
        for name, own in by_tensor.items():
            said = everywhere if p(name).scope == "model" else own
            scales[name] = [_ram_scale(*said[m.id], p(name)) for m in view.meta(name)]
        return Plan({"scales": scales})

    def apply(self, u: Unit, plan: Plan, p: RamParameters, rng: Rng) -> Tensor:
        taus = u.task_vectors()
        changed, count = _changed(taus, u.scalar(p.epsilon))
        m = stages.combine(stages.weighted(taus, u.weights()), u.weights(), changed, "mean")
        for own, scale in zip(changed, plan["scales"][u.name] if p.r else (), strict=bool(p.r)):
            m = torch.where(own & (count == 1), m * scale, m)
        assert u.base is not None
        return u.base + m


class RamPlusParameters(RamParameters):
    """Parameters of ramplus_tl."""

    r: Number = Field(Decimal("0.1"), ge=0, description="strength of the rescaling; 0 for none")
    scope: Literal["model", "tensor"] = Field("tensor", description="where shared and unique are counted")


class RamPlus(Ram):
    """RAM+ of each tensor: ``ram`` with r = 0.1 and ``scope=tensor``, under mergekit's name for it.

        theta = theta_0 + (1 + r clip(shared_i / unique_i, 0, alpha)) tau_i, where one task alone changed it
        theta = theta_0 + sum w_i tau_i / sum w_i over the i that changed it, elsewhere

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "ramplus_tl", 1, "elementwise"
    Params = RamPlusParameters


def _changed(taus: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Where each task vector differs from zero, and how many do."""
    changed = [tau.abs() > epsilon for tau in taus]
    return changed, total([one.to(torch.int64) for one in changed])


def _counted(u: Unit, p: RamParameters) -> dict[bytes, tuple[int, int]]:
    """Shared and unique elements of each contribution in a stretch."""
    changed, count = _changed(u.task_vectors(), u.scalar(p.epsilon))
    counts = {}
    for m, own in zip(u.meta, changed, strict=True):
        unique = int(torch.count_nonzero(own & (count == 1)))
        counts[m.id] = int(torch.count_nonzero(own)) - unique, unique
    return counts


def _add(to: dict[bytes, tuple[int, int]], counts: dict[bytes, tuple[int, int]]) -> None:
    for one, (shared, unique) in counts.items():
        before = to.get(one, (0, 0))
        to[one] = before[0] + shared, before[1] + unique


def _ram_scale(shared: int, unique: int, p: RamParameters) -> float:
    ratio = min(Fraction(shared, unique), Fraction(p.alpha)) if unique else Fraction(0)
    return nearest(1 + Fraction(p.r) * ratio)


STRATEGIES = (Sce, Emr, ConsensusTaskArithmetic, Ram, RamPlus)
