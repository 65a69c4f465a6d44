"""ZipIt: units of several networks, and of one alone, are merged where they are alike, down to one network's number.

    theta = M_out blockdiag(W_1, ..., W_k) U_in        M U = 1

For each group of the symmetry the k n units of k models are put into n clusters. U [k n, n] holds a one where a unit is
in a cluster, M [n, k n] averages the units of a cluster: what makes units is averaged, what takes them in is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from crdtmerge.errors import MismatchError
from crdtmerge.numerics.assignment import best_assignment
from crdtmerge.numerics.elementary import sqrt
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.products import matmul, row_sums
from crdtmerge.strategies.inside import the_same
from crdtmerge.strategies.linear import divisor_of
from crdtmerge.strategies.matching import match_many
from crdtmerge.strategies.observing import ObservingParameters, everyone, observed, symmetry_of
from crdtmerge.strategies.parameters import Number
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.turning import decoded
from crdtmerge.symmetry.groups import Group, Symmetry, inverse

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Clusters = NDArray[np.int64]
"""For each unit the cluster that it is in."""


class ZipItParameters(ObservingParameters):
    """Parameters of zipit."""

    method: Literal["weights", "activations"] = Field("activations", description="what units are told by")
    alpha: Number = Field(
        Decimal("0.0001"), ge=0, le=1, description="factor on the similarities of what was merged, where positive"
    )
    beta: Number = Field(
        Decimal("0.075"), ge=0, le=1, description="share of a model's mergers that may be within it; 0: permutations"
    )


class ZipIt(Strategy[ZipItParameters]):
    """ZipIt: merge the units that are most alike, across models and within each, then the layers between them.

        theta = sum_i w_i A_out,i W_i A_in,i^T / sum_i w_i (A_out,i 1),   A [clusters, units] of zeros and ones

    Division is of each row of the result: a cluster's unit is the weighted mean of its members, and takes the sum of
    what each model's members gave on. All groups are merged, and all layers between them (no partial zip, which keeps
    the models' last layers apart); along dimensions that no group has, models are averaged.

    Clusters are made greedily for all k models at once: of k n units the two most alike become one cluster, until n are
    left. A cluster is as like another as the least like of its members (times ``alpha`` for each merger, where that is
    positive: near 0 a unit is merged again only when nothing else is alike). Of a model's share of the mergers,
    floor((k - 1) n / k), the share ``beta`` may join clusters that both hold units of it; afterwards none may, so that
    beta = 0 gives one unit of each model to each cluster. For k > 2 that can end too early; then the most alike are
    merged all the same.

        method=activations  units are alike by the correlation of what they give out on the data, or on noise
        method=weights      by the cosine of the weights that make them, once all models are matched by weights (as in
                            aligned, onto=mean)

    A group that no tensor consumes (what queries and keys meet by) is summed over in a product of two activations;
    merging its units would change that sum, so its clusters are the best permutation onto the first model. Where two
    groups split a dimension (heads and their widths), a place of which no model has both clusters is zero.

    Needs the inputs of ``aligned``; every contribution must have every tensor of the symmetry. Claimed weights enter
    the means, not the clusters. The paper's code counts a cluster to the model of its first unit; here it counts to all
    models whose units it holds.

    Properties: commutative; of equal contributions, or copies of one with other orders of units, that one while beta
    lets it be; not associative.
    """

    name, version, family = "zipit", 1, "alignment"
    reference = "Stoica et al., ICLR 2024, arXiv:2305.03053"
    Params = ZipItParameters

    def needs(self, p: ZipItParameters) -> Needs:
        return Needs(inputs=p.inputs, unit="tensor", plan="model" if p.runs else "scan", compute="double")

    def plan(self, view: View, p: Callable[[str], ZipItParameters], rng: Rng) -> Plan:
        if not view.names:
            return EMPTY
        one = the_same(view, p, self.name)
        symmetry = symmetry_of(view)
        ids = everyone(view, symmetry)
        like, models, _ = observed(view, symmetry, ids, one, rng)
        orders = match_many(like, models) if one.method == "weights" else [like.identities() for _ in ids]
        aligned = [
            {name: like.turned(name, x, order) for name, x in model.items()}
            for model, order in zip(models, orders, strict=True)
        ]
        clusters: list[list[list[int]]] = [[] for _ in ids]
        for g, group in enumerate(like.groups):
            similarity = similarities(like, group, aligned)
            if any(axis.consumes for axis in symmetry.groups[g].axes):
                found = zipped(similarity, len(ids), one.alpha, one.beta)
            else:
                found = permuted(similarity, len(ids))
            for own, order, of_model in zip(found, orders, clusters, strict=True):
                of_model.append(own[inverse(order[g])].tolist())
        by_id = {content.hex(): own for content, own in zip(ids, clusters, strict=True)}
        return Plan({"symmetry": symmetry.encode().decode(), "clusters": by_id})

    def apply(self, u: Unit, plan: Plan, p: ZipItParameters, rng: Rng) -> Tensor:
        symmetry = decoded(plan["symmetry"])
        axes = symmetry.of_tensor.get(u.name, ())
        own = [axis for group in symmetry.groups for axis in group.axes if axis.tensor == u.name]
        consumed = {axis.position for axis in own if axis.consumes}
        divisor_of(u.meta)
        factors = symmetry.factors(u.name) if axes else u.shape
        above, below = np.zeros(factors), np.zeros([1] * len(factors))
        for x, weight, meta in zip(u.xs, u.weights(), u.meta, strict=True):
            part, members = x.cpu().numpy().reshape(factors), np.ones([1] * len(factors))
            for position, group in axes:
                clusters = _clusters(plan["clusters"].get(meta.id.hex()), group, symmetry, meta.id)
                part = gathered(part, position, clusters)
                if position not in consumed:
                    ones = np.ones([len(clusters) if at == position else 1 for at in range(len(factors))])
                    members = members * gathered(ones, position, clusters)
            above, below = above + weight * part, below + weight * members
        merged = np.where(below > 0.0, above / np.where(below > 0.0, below, 1.0), 0.0)
        return torch.from_numpy(np.ascontiguousarray(merged).reshape(-1)).to(device=u.xs[0].device)


def similarities(like: Symmetry, group: Group, models: Sequence[Mapping[str, Array]]) -> Array:
    """Cosines of what makes the units of a group, of all models: float64 [k n, k n], model by model.

    Of a group that nothing makes, of what consumes it. The cosine with a unit that is all zeros is 0.
    """
    axes = [axis for axis in group.axes if not axis.consumes] or list(group.axes)
    rows = []
    for model in models:
        shaped = [np.moveaxis(model[name].reshape(like.factors(name)), at, 0) for name, at, _ in axes]
        rows.append(np.concatenate([x.reshape(group.size, -1) for x in shaped], axis=1))
    features = np.concatenate(rows)
    norms = sqrt(row_sums(features * features))[:, None]
    features = np.where(norms > 0.0, features / np.where(norms > 0.0, norms, 1.0), 0.0)
    return matmul(features, np.ascontiguousarray(features.T))


def permuted(similarity: Array, k: int) -> Clusters:
    """The clusters [k, n] that hold one unit of each model: each model's best assignment to the first."""
    n = len(similarity) // k
    return np.stack([inverse(best_assignment(similarity[:n, i * n : (i + 1) * n])) for i in range(k)])


def zipped(similarity: Array, k: int, alpha: Decimal, beta: Decimal) -> Clusters:
    """n clusters of the k n units of a symmetric similarity matrix, greedily: int64 [k, n].

    Clusters are numbered by their first units. Of pairs that are equally alike the first is taken, by rows.

    >>> s = np.array([[1, 0.9, 0, 0.1], [0.9, 1, 0.1, 0], [0, 0.1, 1, 0.2], [0.1, 0, 0.2, 1]])
    >>> zipped(s, 2, Decimal(1), Decimal(1)).tolist()
    [[0, 0], [1, 1]]
    >>> zipped(s, 2, Decimal(1), Decimal(0)).tolist()
    [[0, 1], [1, 0]]
    """
    n = len(similarity) // k
    left = _Greedy(similarity, k, float(alpha), int(((k - 1) * n // k) * beta))
    for _ in range((k - 1) * n):
        left.merge()
    _, numbered = np.unique(left.root, return_inverse=True)
    return numbered.astype(np.int64).reshape(k, n)


class _Greedy:
    """Clusters that are merged one pair at a time; a cluster is known by its first unit, ``root`` of each unit."""

    def __init__(self, similarity: Array, k: int, alpha: float, budget: int) -> None:
        n = len(similarity) // k
        self.root = np.arange(k * n)
        self._alpha, self._budget = alpha, [budget] * k
        self._any = similarity.copy()
        np.fill_diagonal(self._any, -np.inf)
        self._open = self._any.copy()
        """Those pairs that may be merged; -inf elsewhere."""
        self._has = np.arange(k * n)[None, :] // n == np.arange(k)[:, None]
        if budget == 0:
            for model in range(k):
                self._close(model)
        self._at = self._open.argmax(axis=1)
        self._best = self._open[np.arange(k * n), self._at]

    def merge(self) -> None:
        """Merge the pair that is most alike of those that may be; of all where none may."""
        row = int(self._best.argmax())
        column = int(self._at[row])
        if self._best[row] == -np.inf:
            row, column = divmod(int(self._any.argmax()), len(self._any))
        first, second = min(row, column), max(row, column)
        for x in (self._open, self._any):
            least = np.where(x[first] < x[second], x[first], x[second])
            positive = least > 0.0
            x[first] = x[:, first] = np.where(positive, np.where(positive, least, 0.0) * self._alpha, least)
            x[second] = x[:, second] = -np.inf
            x[first, first] = -np.inf
        self.root[self.root == second] = first
        changed = (self._at == first) | (self._at == second)
        shared = np.flatnonzero(self._has[:, first] & self._has[:, second])
        self._has[:, first] |= self._has[:, second]
        self._has[:, second] = False
        for model in shared:
            self._budget[model] -= 1
        for model in np.flatnonzero(self._has[:, first]):
            if self._budget[model] <= 0:
                changed |= self._close(int(model))
        changed[first] = changed[second] = True
        rows = np.flatnonzero(changed)
        self._at[rows] = self._open[rows].argmax(axis=1)
        self._best[rows] = self._open[rows, self._at[rows]]

    def _close(self, model: int) -> NDArray[np.bool_]:
        """No more mergers of clusters that both hold units of a model; which clusters do."""
        holding = np.flatnonzero(self._has[model])
        self._open[np.ix_(holding, holding)] = -np.inf
        found: NDArray[np.bool_] = self._has[model].copy()
        return found


def gathered(x: Array, position: int, clusters: Clusters) -> Array:
    """Sums along one axis over the members of each cluster, from the first to the last: as many clusters as units.

    >>> gathered(np.array([[1.0, 2.0, 4.0]]), 1, np.array([0, 2, 0])).tolist()
    [[5.0, 0.0, 2.0]]
    """
    moved = np.moveaxis(x, position, 0)
    found = np.zeros_like(moved)
    order = np.argsort(clusters, kind="stable")
    held = clusters[order]
    rank = np.arange(len(held)) - np.searchsorted(held, held, side="left")
    for r in range(int(rank.max(initial=-1)) + 1):
        found[held[rank == r]] += moved[order[rank == r]]
    return np.moveaxis(found, 0, position)


def _clusters(found: Any, group: int, symmetry: Symmetry, content: bytes) -> Clusters:
    """A contribution's clusters of a group. Raises MismatchError for a plan that has none of that kind."""
    size = symmetry.groups[group].size
    given = found[group] if isinstance(found, list) and len(found) == len(symmetry.groups) else None
    if not isinstance(given, list) or len(given) != size or any(type(c) is not int or not 0 <= c < size for c in given):
        raise MismatchError(
            f"the plan has no clusters of {size} units for contribution {content.hex()[:16]}: it is of another merge. "
            "Make its own with `crdtmerge plan`."
        )
    return np.array(given, np.int64)


STRATEGIES = (ZipIt,)
