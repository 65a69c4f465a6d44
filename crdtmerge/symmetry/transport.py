"""A network of other widths brought onto a network's own: soft matching of units by optimal transport.

    T_g = argmin <T, C_g> + epsilon <T, log T>,  T [n_a, n_b] with rows of 1 / n_a and columns of 1 / n_b
    makes units:  x <- n_a T_g x     each unit of a is an average of units of b
    takes them:   x <- x (n_b T_g)^T     what each unit of b gave on is shared out among units of a, nothing is lost

C_g holds squared distances of what makes the units, by weights or by activations; epsilon is relative to their mean.
At equal widths and epsilon -> 0, n T is the permutation of least cost. (Singh, Jaggi, Model fusion via optimal
transport, NeurIPS 2020, arXiv:1910.05653.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, NeedsError
from crdtmerge.numerics.assignment import best_assignment
from crdtmerge.numerics.products import matmul, row_sums
from crdtmerge.numerics.sinkhorn import total, transport
from crdtmerge.symmetry.groups import Axis, Group, Symmetry

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]

EPSILON = 0.01
SWEEPS = 2
"""Passes over all groups after the first, in which each is compared with all others brought over."""


class Carried(NamedTuple):
    """A model in other widths, and the plans [n_a, n_b] of each group."""

    tensors: dict[str, Array]
    plans: list[Array]


def transported(
    symmetry_a: Symmetry,
    model_a: Tensors,
    symmetry_b: Symmetry,
    model_b: Tensors,
    *,
    features: Sequence[tuple[Array, Array]] | None = None,
    epsilon: float = EPSILON,
    sweeps: int = SWEEPS,
) -> Carried:
    """Model b, whose groups are of other sizes, in the shapes of model a.

    Both symmetries have the same axes, group by group; models hold every tensor of theirs, and are float64 arrays.
    Tensors of no group are those of b. ``features`` are, for each group, activations of a's units [n_a, samples] and of
    b's [n_b, samples] on the same samples; without them units are compared by the weights that make them (by those that
    consume them where nothing makes them), first by tensors whose other dimensions can be compared already, then
    ``sweeps`` times by all.

    What comes out computes what b does as far as units that become one are alike: exactly where b has each unit of a
    equally often. A group that no tensor consumes (what queries and keys meet by) has one size in both, and is
    reordered. Raises MismatchError for symmetries that do not correspond, NeedsError where units cannot be compared.
    """
    a = symmetry_a.fitted({name: x.shape for name, x in model_a.items()}, "the model whose widths are wanted")
    b = symmetry_b.fitted({name: x.shape for name, x in model_b.items()}, "the model that is brought over")
    _check(a, b)
    both = _Both(a, model_a, b, model_b, epsilon)
    if features is not None:
        for group, (one, other) in enumerate(features):
            both.match(group, one, other)
    else:
        both.match_by_weights(sweeps)
    carried = {name: both.carried(name) if name in b.tensors else x for name, x in model_b.items()}
    return Carried(carried, [both.plans[g] for g in range(len(a.groups))])


class _Both:
    """Two models, and the plans that were found."""

    def __init__(self, a: Symmetry, model_a: Tensors, b: Symmetry, model_b: Tensors, epsilon: float) -> None:
        self._a, self._model_a, self._b, self._model_b, self._epsilon = a, model_a, b, model_b, epsilon
        self.plans: dict[int, Array] = {}
        self._axes = {axis[:2]: (g, axis.consumes) for g, group in enumerate(a.groups) for axis in group.axes}

    def match_by_weights(self, sweeps: int) -> None:
        """Plans of all groups: first of the one with most to compare, and so on; then of each again."""
        everything = range(len(self._a.groups))
        while len(self.plans) < len(everything):
            left = [g for g in everything if g not in self.plans]
            amounts = [self._comparable(g) for g in left]
            best = left[amounts.index(max(amounts))]
            if max(amounts) == 0:
                group = self._a.groups[best]
                raise NeedsError(
                    f"the units of {some_axes(group)} cannot be compared: all their weights have another dimension of "
                    "the models' own. Give the activations of both models."
                )
            self.match(best, *self._rows(best))
        for _ in range(sweeps):
            for g in everything:
                self.match(g, *self._rows(g))

    def match(self, g: int, one: Array, other: Array) -> None:
        """The plan of a group from rows that tell its units."""
        cost = squared_distances(one, other)
        mean = total(cost.reshape(-1)) / cost.size
        if not any(axis.consumes for axis in self._a.groups[g].axes):
            order = best_assignment(-cost)
            plan = np.zeros(cost.shape)
            plan[np.arange(len(order)), order] = 1.0 / len(order)
        else:
            plan = transport(cost, self._epsilon * mean if mean > 0.0 else 1.0).plan
        self.plans[g] = plan

    def carried(self, name: str, but: int | None = None) -> Array:
        """A tensor of b with all dimensions but one brought over, in a's shape (split, if one is not)."""
        x = self._model_b[name].reshape(self._b.factors(name))
        for at, g in self._b.of_tensor[name]:
            if at != but:
                plan = self.plans[g]
                share = plan * float(plan.shape[1 if self._axes[name, at][1] else 0])
                moved = np.moveaxis(x, at, 0)
                x = np.moveaxis(matmul(share, moved.reshape(len(moved), -1)).reshape(-1, *moved.shape[1:]), 0, at)
        return x if but is not None else x.reshape([math.prod(d) for d in self._a.tensors[name]])

    def _telling(self, g: int) -> list[Axis]:
        """The axes that make a group's units and can be compared now."""
        axes = self._a.groups[g].axes
        making = [axis for axis in axes if not axis.consumes] or list(axes)
        return [
            axis
            for axis in making
            if all(other in self.plans for at, other in self._a.of_tensor[axis.tensor] if at != axis.position)
        ]

    def _comparable(self, g: int) -> int:
        """How many numbers tell a unit of a group."""
        size = self._a.groups[g].size
        return sum(math.prod(self._a.factors(axis.tensor)) // size for axis in self._telling(g))

    def _rows(self, g: int) -> tuple[Array, Array]:
        """What makes each unit, of a and of b."""

        def rows(x: Array, at: int) -> Array:
            moved = np.moveaxis(x, at, 0)
            return moved.reshape(len(moved), -1)

        told = self._telling(g)
        one = [rows(self._model_a[name].reshape(self._a.factors(name)), at) for name, at, _ in told]
        other = [rows(self.carried(name, at), at) for name, at, _ in told]
        return np.concatenate(one, axis=1), np.concatenate(other, axis=1)


def squared_distances(one: Array, other: Array) -> Array:
    """|x_i - y_j|^2 of rows [m, d] and [n, d]: float64 [m, n], at least 0.

    >>> squared_distances(np.array([[0.0, 1.0]]), np.array([[0.0, 1.0], [3.0, 5.0]]))
    array([[ 0., 25.]])
    """
    found = row_sums(one * one)[:, None] + row_sums(other * other)[None, :]
    found = found - 2.0 * matmul(one, np.ascontiguousarray(other.T))
    return np.where(found > 0.0, found, 0.0)


def some_axes(group: Group) -> str:
    """A group's first tensors, for a message."""
    return ", ".join(f"{axis.tensor!a}" for axis in group.axes[:3])


def _check(a: Symmetry, b: Symmetry) -> None:
    """Raise MismatchError unless two symmetries differ in sizes alone."""
    if [group.axes for group in a.groups] != [group.axes for group in b.groups]:
        raise MismatchError(
            "the symmetries of the two models do not have the same axes: only widths may differ. Derive both from "
            "programs of one architecture."
        )
    for one, other in zip(a.groups, b.groups, strict=True):
        if one.size != other.size and not any(axis.consumes for axis in one.axes):
            raise MismatchError(
                f"the units of {some_axes(one)} are {one.size} in one model and {other.size} in the other, and no "
                "tensor sums over them alone: such widths must be equal."
            )
    owned = {axis[:2] for group in a.groups for axis in group.axes}
    for name in a.tensors:
        own, others = a.factors(name), b.factors(name)
        fixed = [at for at in range(len(own)) if (name, at) not in owned]
        if len(own) != len(others) or any(own[at] != others[at] for at in fixed):
            raise MismatchError(
                f"tensor {name!a} has factors {list(own)} in one model, {list(others)} in the other: dimensions that "
                "no group has must be equal."
            )
