"""Strategies that first bring the units of all contributions into one order: aligned, dimat, rebasin.

    theta = inner(turned(x_1, P_1), ..., turned(x_k, P_k))

turned(x, P) reorders the units of a network by one permutation a group of its symmetry (``symmetry.groups``): the same
function, other coordinates. The plan is the symmetry, the permutations and the inner strategy's plan over aligned
contributions; ``apply`` turns whole tensors and calls the inner strategy's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from crdtmerge.errors import MismatchError, ParameterError
from crdtmerge.strategies import registry
from crdtmerge.strategies.inside import WithInner, the_same
from crdtmerge.strategies.linear import LinearParameters, shares
from crdtmerge.strategies.matching import match_many, match_to
from crdtmerge.strategies.observing import ObservingParameters, everyone, observed, symmetry_of
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.turning import repaired, turned_unit
from crdtmerge.symmetry.groups import Permutation, Symmetry

if TYPE_CHECKING:
    from torch import Tensor

Onto = Literal["auto", "mean", "reference", "base"]
P = TypeVar("P", bound="AlignmentParameters")


class AlignmentParameters(ObservingParameters):
    """How contributions are aligned."""

    onto: Onto = Field(
        "auto",
        description="whose order: of the mean of all, a contribution, the base; auto: base where it is used",
    )
    reference: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="content id of the contribution whose order of units is kept"
    )
    sweeps: int = Field(100, ge=0, le=1_000_000, description="most passes of the matching; 0 aligns nothing")
    repair: Literal["none", "rescale", "reset"] = Field(
        "none", description="what the probe mends afterwards: units' means and spreads, or BatchNorm's statistics"
    )

    @property
    def order(self) -> Onto:
        """Whose order it is, where it was left open too."""
        if self.onto != "auto":
            return self.onto
        return "mean" if self.strategy().needs(self.filled().general).base == "unused" else "base"

    @property
    def runs(self) -> bool:
        """Whether a program is run."""
        return self.method == "activations" or self.repair != "none"

    def strategy(self) -> Strategy[Any]:
        """The strategy inside."""
        return registry.get("linear")

    def filled(self) -> Filled[Any]:
        """Its parameters."""
        return Filled("linear", LinearParameters, {})


class AlignedParameters(AlignmentParameters, WithInner):
    """Parameters of aligned."""

    inner: str = Field("linear", description="the strategy inside")

    def strategy(self) -> Strategy[Any]:
        return WithInner.strategy(self)

    def filled(self) -> Filled[Any]:
        return WithInner.filled(self)


class DimatParameters(AlignmentParameters):
    """Parameters of dimat."""

    method: Literal["weights", "activations"] = Field("activations", description="what units are told by")
    onto: Onto = Field("reference", description="whose order: the mean's of all, a contribution's or the base's")


class RebasinParameters(AlignmentParameters):
    """Parameters of rebasin."""

    onto: Onto = Field("reference", description="whose order: the mean's of all, a contribution's or the base's")


class Alignment(Strategy[P]):
    """What the strategies of this module share."""

    def needs(self, p: P) -> Needs:
        inner: Needs = p.strategy().needs(p.filled().general)
        if inner.plan == "model" or inner.inputs or inner.models:
            raise ParameterError(
                f"strategy '{self.name}': {p.strategy().name} runs a model itself or reads further files, whose order "
                "of units nobody knows; give a strategy that merges tensors alone."
            )
        if inner.base != "unused" and p.onto in ("mean", "reference"):
            raise ParameterError(
                f"strategy '{self.name}': {p.strategy().name} works on differences from the base, whose order of units "
                f"stands; onto = {p.onto} would compare other units. Give onto = base or leave it out."
            )
        if p.reference and p.order == "base":
            raise ParameterError(f"strategy '{self.name}': the base keeps its order; leave reference out.")
        return inner._replace(
            base="required" if p.order == "base" else "unused",
            inputs=p.inputs,
            unit="tensor",
            plan="model" if p.runs else "scan",
            weights="nonnegative" if p.repair == "rescale" else inner.weights,
        )

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        if not view.names:
            return EMPTY
        one = the_same(view, p, self.name)
        symmetry = symmetry_of(view)
        ids = everyone(view, symmetry)
        found = self._permutations(view, symmetry, ids, one, rng)
        by_id = dict(zip(ids, found, strict=True))
        filled = one.filled()
        inner = one.strategy().plan(view.turned(symmetry, by_id), filled.at, rng)
        permutations = {content.hex(): [p.tolist() for p in own] for content, own in by_id.items()}
        plan = Plan(
            {
                "symmetry": symmetry.encode().decode(),
                "permutations": permutations,
                "strategy": one.strategy().name,
                "inner": dict(inner.data),
            }
        )
        return plan if one.repair == "none" else Plan({**plan.data, "repair": self._repair(view, ids, plan, one, rng)})

    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        merged = self._merged(turned_unit(u, plan), plan, p, rng)
        return repaired(u, merged, plan["repair"]) if "repair" in plan.data else merged

    def _merged(self, aligned: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        """The inner strategy's merge of aligned contributions."""
        strategy, filled = p.strategy(), p.filled()
        if strategy.needs(filled.general).base == "unused":
            aligned = replace(aligned, base=None)
        merged: Tensor = strategy.apply(aligned, Plan(plan["inner"]), filled.at(aligned.name), rng)
        return merged

    def _repair(self, view: View, ids: Sequence[bytes], plan: Plan, p: P, rng: Rng) -> dict[str, Any]:
        """What the repair of the merged model changes: factors of weights' rows, and tensors' new values."""

        def models(u: Unit) -> dict[str, Tensor]:
            aligned = turned_unit(u, plan)
            found = {"merged": self._merged(aligned, plan, p, rng)}
            if p.repair == "rescale":
                found |= {str(ids.index(m.id)): x for m, x in zip(aligned.meta, aligned.xs, strict=True)}
            return {group: x.reshape(u.shape).cpu() for group, x in found.items()}

        params = p.probing(rng) | {"kind": p.repair}
        if p.repair == "rescale":
            claimed = {m.id: m for name in view.names for m in view.meta(name)}
            params["weights"] = shares([claimed[content] for content in ids])
        ran = view.run("repair", params, models, rng)
        scales: dict[str, list[float]] = dict(ran.values.get("scales", {}))
        values = {name: x.reshape(-1).tolist() for name, x in ran.tensors.items() if name not in scales}
        return {"scales": scales, "values": values}

    def extras(self, plan: Plan) -> Mapping[str, Tensor]:
        return registry.get(plan["strategy"]).extras(Plan(plan["inner"])) if plan.data else {}

    def _permutations(
        self, view: View, symmetry: Symmetry, ids: Sequence[bytes], p: P, rng: Rng
    ) -> list[list[Permutation]]:
        """One list of permutations a contribution."""
        kept = _kept(ids, p.reference, self.name)
        onto = p.order
        if not ids or not p.sweeps:
            return [symmetry.identities() for _ in ids]
        like, models, base = observed(view, symmetry, ids, p, rng, with_base=onto == "base")
        if onto == "mean":
            return match_many(like, models, kept, p.sweeps)
        reference = base if onto == "base" else models[kept]
        assert reference is not None, "the base was asked for"
        return [match_to(like, reference, model, sweeps=p.sweeps) for model in models]


class Aligned(Alignment[AlignedParameters]):
    """Any strategy over contributions whose units were brought into one order: inner(P_1 x_1, ..., P_k x_k).

        method=weights      P = argmax sum_t <A_t, turned(B_t, P)> over the tensors of the symmetry, group by group
        method=activations  P_g = argmax <P_g, corr(A_g, B_g)>, of what each group's units give out on a probe
        onto=mean           no contribution is the measure: each in turn is matched to the mean of the others
        onto=reference      each is matched to one contribution; onto=base: to the base, which stays as it is

    ``inner`` sees aligned contributions, and statistics of them in the same order, in its plan too. By default the
    order is that of the base where the inner strategy uses one, since its task vectors are differences of like units,
    and else the mean's. For the mean the result is told in the order of units of the contribution ``reference`` names
    by its content id, by default the first in canonical order. Claimed weights do not enter the alignment.

    Averaged units vary less than those they are made of. ``repair=rescale`` gives them back the mean of the endpoints'
    means and spreads, layer by layer, and ``repair=reset`` BatchNorm the statistics of the merged model (Jordan et al.,
    REPAIR, ICLR 2023, arXiv:2211.08403): factors and values in the plan, found on the probe.

    Needs the input ``symmetry`` (``crdtmerge symmetry``), which travels as symmetry.json with the base or the models,
    for activations and repair also ``program`` and, unless probe=noise, ``data``; with a plan none of them. Every
    contribution must have every tensor that the symmetry reorders. Planning holds these in float64, all contributions
    at once. Class E by weights without repair.

    Properties: commutative; of equal contributions, or copies of one with other orders of units, the inner strategy's
    merge of that one; else those of the inner strategy, and never associative: an alignment is of the whole set.
    """

    name, version, family = "aligned", 1, "alignment"
    reference = (
        "Ainsworth et al., ICLR 2023, arXiv:2209.04836, algorithms 1 and 3; Li et al., ICLR 2016, arXiv:1511.07543"
    )
    Params = AlignedParameters


class Dimat(Alignment[DimatParameters]):
    """DIMAT's merge step: align by activations, then mix: theta = sum_j pi_j turned(x_j, P_j) / sum_j pi_j.

        P_j,g = argmax over permutations of <P, corr(A_i,g, A_j,g)>,  A the activations of group g on the data

    i is the contribution ``reference`` names, by default the first in canonical order; pi, a row of the mixing matrix,
    are the claimed weights. Local training between merges is not part of it. The published figures match on data that
    all agents have, and reset the BatchNorm statistics of the merged model by a forward pass over it (repair=reset).

    The options of ``aligned`` hold: method=weights and probe=noise need no data. Aligning once, at the first merge, did
    better than at every merge wherever that was measured on small networks.

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "dimat", 1, "alignment"
    reference = "Saadati et al., CVPR 2024, arXiv:2404.08079"
    Params = DimatParameters


class Rebasin(Alignment[RebasinParameters]):
    """Git Re-Basin: match weights to one contribution, then the weighted mean.

        P_j   = argmax sum_t <x_i,t, turned(x_j,t, P)>, group by group until no group gains
        theta = sum_j w_j turned(x_j, P_j) / sum_j w_j

    i is the contribution ``reference`` names, by default the first in canonical order. The options of ``aligned`` hold;
    onto=mean is the paper's MergeMany, without a reference.

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "rebasin", 1, "alignment"
    reference = "Ainsworth et al., ICLR 2023, arXiv:2209.04836, algorithm 1"
    Params = RebasinParameters


def _kept(ids: Sequence[bytes], reference: str | None, strategy: str) -> int:
    """The position of the contribution whose order is kept. Raises MismatchError."""
    if reference is None:
        return 0
    content = bytes.fromhex(reference)
    if content not in ids:
        raise MismatchError(
            f"strategy '{strategy}': reference = {reference[:16]}... is none of the contributions: "
            f"{', '.join(one.hex()[:16] for one in ids)}."
        )
    return ids.index(content)


STRATEGIES = (Aligned, Dimat, Rebasin)
