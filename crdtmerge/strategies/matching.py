"""Which unit of one network is which of another: permutations that bring models of one architecture together.

    argmax over one permutation a group of  sum_t <A_t, turned(B_t)>,  t the tensors that the symmetry reorders

The same as min ||A - turned(B)||: reordering changes no norm. Jointly it is NP-hard; group by group, the others held,
it is a linear assignment, and descent from group to group ends where no group gains (Ainsworth, Hayase, Srinivasa, Git
Re-Basin, ICLR 2023, arXiv:2209.04836, algorithm 1). Tensors are float64 arrays by name, raw weights as in the paper.

Class E: products are ``numerics.products``, sums have a fixed order, assignments are of integers, and the order in
which groups are visited is drawn from the symmetry alone: which models there are besides does not enter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics import philox
from crdtmerge.numerics.assignment import best_assignment
from crdtmerge.numerics.products import matmul, row_sums
from crdtmerge.strategies.evolution import Draws
from crdtmerge.symmetry.groups import Axis, Group, Permutation, Symmetry, inverse

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]

SWEEPS = 100
"""Most passes over all groups, or over all models; descent ends long before."""


def match_to(
    symmetry: Symmetry,
    reference: Tensors,
    model: Tensors,
    start: Sequence[Permutation] | None = None,
    sweeps: int = SWEEPS,
) -> list[Permutation]:
    """One permutation a group that brings a model's units into the order of the reference's.

        S_g = sum over the axes of g of  unfold(A_t) unfold(B_t, turned by all other axes)^T   [size, size]
        p_g = argmax_p sum_i S_g[i, p[i]],  taken if the objective grows

    Groups are visited in an order drawn anew for each sweep, until none gains. A group with two axes in one tensor is
    matched with the other axis as it stands, and without that tensor; the better of the two is taken. Of permutations
    that do equally well the one held stays, so that a model is matched to itself by the identity.

    Without a ``start``, each group is first matched by the tensors alone whose other axes were matched before, where
    the paper takes all as they are: of 420 copies of small networks, hidden by permutations and by noise of up to half
    their weights' spread, all were found so, and 404 from the identity.
    """
    draws = _draws(symmetry, "groups")
    apart = {
        g for g, group in enumerate(symmetry.groups) if all(len(symmetry.of_tensor[t]) == 1 for t, *_ in group.axes)
    }
    """Groups whose scores do not depend on how others are matched: they are visited once."""
    found = [p.copy() for p in start] if start is not None else symmetry.identities()
    if start is None and sweeps:
        known: set[int] = set()
        for group in shuffled(len(symmetry.groups), draws):
            *_, scores = _scores(symmetry, group, reference, model, found, known)
            found[group] = best_assignment(scores, found[group])
            known.add(group)
    settled = apart if start is None and sweeps else set()
    aligned = {name: _dot(reference[name], symmetry.turned(name, model[name], found)) for name in symmetry.of_tensor}
    others = set(range(len(symmetry.groups)))
    for _ in range(sweeps):
        moved = False
        for group in shuffled(len(symmetry.groups), draws):
            if group in settled:
                continue
            held = found[group]
            touched = sorted({axis.tensor for axis in symmetry.groups[group].axes})
            for scores in _scores(symmetry, group, reference, model, found, others - {group}):
                tried = [*found]
                tried[group] = best_assignment(scores, held)
                if tried[group] is held:
                    continue
                new = {name: _dot(reference[name], symmetry.turned(name, model[name], tried)) for name in touched}
                if _total(aligned | new) > _total(aligned):
                    aligned, found, moved = aligned | new, tried, True
        settled = apart
        if not moved:
            break
    return found


def match_many(
    symmetry: Symmetry, models: Sequence[Tensors], kept: int = 0, sweeps: int = SWEEPS
) -> list[list[Permutation]]:
    """One list of permutations a model that brings all of them together, none of them being the measure.

        repeat, i in a drawn order:  P_i = match_to(sum over j != i of turned(B_j), B_i)    until no model moves

    The first time round, j goes over those that had their turn before, where the paper begins with all as they are.
    Each further step lessens the sum of squared distances to the mean of all. Every model counts once. What comes out
    is told in the order of units of the model ``kept``, whose permutations are identities; which order it is told in
    changes no distance. (MergeMany, algorithm 3 of the same paper.)
    """
    found = [symmetry.identities() for _ in models]
    turned = [{name: model[name] for name in symmetry.of_tensor} for model in models]
    draws = _draws(symmetry, "models")
    placed: set[int] = set()
    settled: set[int] = set()
    """Models that another turn would not move, since none has moved after theirs."""
    for _ in range(sweeps):
        for i in shuffled(len(models), draws):
            if i in settled:
                continue
            others = [one for j, one in enumerate(turned) if j in placed and j != i]
            start = found[i] if i in placed else None
            settled = settled | {i} if i in placed else set()
            placed.add(i)
            new = match_to(symmetry, _sum(others), models[i], start, sweeps) if others else found[i]
            if any((p != q).any() for p, q in zip(new, found[i], strict=True)):
                found[i], settled = new, set()
                turned[i] = {name: symmetry.turned(name, models[i][name], new) for name in symmetry.of_tensor}
        if len(settled) == len(models):
            break
    back = [inverse(p) for p in found[kept]] if models else []
    return [[p[q] for p, q in zip(one, back, strict=True)] for one in found]


def standing_for(symmetry: Symmetry, activations: Sequence[Sequence[Array]]) -> tuple[Symmetry, list[dict[str, Array]]]:
    """Activations of each model as tensors that a symmetry with the same groups reorders, to be matched like weights.

    Args:
        symmetry: of the models.
        activations: of each model what the units of each group give out, float64 [size, samples].

    Returns:
        A symmetry in which each group has one tensor, on whose first axis it is; and those tensors of each model.
    """
    names = [f"group.{g}" for g in range(len(symmetry.groups))]
    groups = tuple(Group(group.size, (Axis(name, 0),)) for name, group in zip(names, symmetry.groups, strict=True))
    models = [dict(zip(names, rows, strict=True)) for rows in activations]
    return Symmetry(groups, {name: tuple((n,) for n in x.shape) for name, x in models[0].items()}), models


def shuffled(count: int, draws: Draws) -> list[int]:
    """The numbers below ``count`` in a drawn order (Fisher and Yates)."""
    order = list(range(count))
    for i in range(count - 1, 0, -1):
        j = draws.below(i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def _draws(symmetry: Symmetry, purpose: str) -> Draws:
    return Draws(philox.stream(symmetry.digest, f"matching {purpose}", b"", ""))


def _scores(
    symmetry: Symmetry,
    group: int,
    reference: Tensors,
    model: Tensors,
    permutations: Sequence[Permutation],
    known: Set[int],
) -> list[Array]:
    """How well unit j of the model does in the place of unit i of the reference: float64 [size, size].

    By all tensors, and where there are others by those alone whose other axes belong to known groups.
    """
    size = symmetry.groups[group].size
    found = {True: np.zeros((size, size)), False: np.zeros((size, size))}
    told: set[bool] = set()
    for name, position, _ in symmetry.groups[group].axes:
        factors = symmetry.factors(name)
        turned = model[name].reshape(factors)
        for at, other in symmetry.of_tensor[name]:
            if at != position:
                turned = turned[(slice(None),) * at + (permutations[other],)]
        a = np.moveaxis(reference[name].reshape(factors), position, 0).reshape(size, -1)
        b = np.moveaxis(turned, position, 0).reshape(size, -1)
        sure = all(other in known for at, other in symmetry.of_tensor[name] if at != position)
        found[sure] = found[sure] + matmul(a, np.ascontiguousarray(b.T))
        told.add(sure)
    return [found[True] + found[False]] + ([found[True]] if len(told) > 1 else [])


def _dot(one: Array, other: Array) -> float:
    """The sum of products, by halves."""
    return float(row_sums((one * other).reshape(1, -1))[0])


def _total(dots: Mapping[str, float]) -> float:
    total = 0.0
    for name in sorted(dots):
        total += dots[name]
    return total


def _sum(models: Sequence[Tensors]) -> Tensors:
    """Tensor by tensor, from left to right."""
    total = dict(models[0])
    for one in models[1:]:
        total = {name: total[name] + one[name] for name in total}
    return total
