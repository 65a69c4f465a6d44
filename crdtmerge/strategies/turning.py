"""What reordering the units of a network does to a tensor, to statistics of it, and to a unit by what a plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from crdtmerge.errors import MismatchError
from crdtmerge.numerics.lazy import torch
from crdtmerge.strategies.protocol import Plan, Unit
from crdtmerge.symmetry.groups import Permutation, Symmetry, decode

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array")
"""A numpy array or a torch tensor."""

OF_THE_BASE = ("importance_base",)
"""Statistics of the base, whose units stay where they are."""


def turned(
    symmetry: Symmetry,
    name: str,
    x: Array,
    shape: tuple[int, ...],
    permutations: Sequence[Permutation],
    statistic: str | None = None,
) -> Array:
    """A tensor of this name and shape, or a statistic of it, in any shape of as many elements; reordered in that shape.

    A Gram matrix [in, in] of a weight [out, in...] is reordered on both its axes as the weight is on those after the
    first. Every other statistic has one value for each element. Raises MismatchError for one that has not.
    """
    if not symmetry.of_tensor.get(name) or statistic in OF_THE_BASE:
        return x
    found: Any = x
    if statistic == "gram":
        first = len(symmetry.tensors[name][0])
        axes = [(position - first, group) for position, group in symmetry.of_tensor[name] if position >= first]
        factors = symmetry.factors(name)[first:]
        axes += [(position + len(factors), group) for position, group in axes]
        factors = (*factors, *factors)
    else:
        axes, factors = list(symmetry.of_tensor[name]), symmetry.factors(name)
    given = found.shape
    try:
        found = found.reshape(factors)
    except (RuntimeError, ValueError):
        raise MismatchError(
            f"tensor {name!a}: its {statistic} has shape {list(given)}, of which nobody knows how it changes with the "
            f"order of the units of {list(shape)}. Merge with a strategy that needs no such statistic."
        ) from None
    for position, group in axes:
        found = found[(slice(None),) * position + (permutations[group],)]
    one: Array = found.reshape(given)
    return one


def turned_unit(u: Unit, plan: Plan) -> Unit:
    """A unit with its contributions in the plan's order of units. Raises MismatchError."""
    symmetry = decoded(plan["symmetry"])
    own = {group for _, group in symmetry.of_tensor.get(u.name, ())}
    if not own:
        return u
    orders = [_orders(symmetry, plan["permutations"].get(m.id.hex()), own, m.id) for m in u.meta]

    def one(x: Tensor, order: Sequence[Permutation], statistic: str | None = None) -> Tensor:
        shaped = x.reshape(u.shape) if statistic is None else x
        return turned(symmetry, u.name, shaped, u.shape, order, statistic).reshape(-1)

    xs = tuple(one(x, order) for x, order in zip(u.xs, orders, strict=True))
    stats = {
        name: tuple(one(x, order, name) for x, order in zip(having, orders, strict=True))
        for name, having in u.stats.items()
    }
    return replace(u, xs=xs, stats=stats)


def repaired(u: Unit, merged: Tensor, repair: Mapping[str, Any]) -> Tensor:
    """A merged tensor after the repair of a plan. Raises MismatchError for that of another merge."""
    scales, values = repair["scales"].get(u.name), repair["values"].get(u.name)
    if scales is None and values is None:
        return merged
    if len(scales or values) != (u.shape[0] if scales and u.shape else merged.numel()):
        raise MismatchError(f"tensor {u.name!a}: the plan's repair is of another shape; it is of another merge.")
    found = torch.tensor(scales or values, dtype=torch.float64).to(merged)
    return (merged.reshape(len(found), -1) * found[:, None]).reshape(-1) if scales else found


@lru_cache(4)
def decoded(text: str) -> Symmetry:
    """The symmetry of a plan, which the last few calls remember. Raises InputError."""
    return decode(text.encode(), "the plan's symmetry")


def _orders(symmetry: Symmetry, found: Any, own: set[int], content: bytes) -> list[Permutation]:
    """The permutations of the groups that a tensor has. Raises MismatchError for a plan that has none of that kind."""
    orders: list[Permutation] = [np.arange(0)] * len(symmetry.groups)
    for group in own:
        size = symmetry.groups[group].size
        given = found[group] if isinstance(found, list) and len(found) == len(orders) else None
        if not isinstance(given, list) or sorted(given) != list(range(size)):
            raise MismatchError(
                f"the plan has no permutation of {size} units for contribution {content.hex()[:16]}: it is of another "
                "merge. Make its own with `crdtmerge plan`."
            )
        orders[group] = np.array(given, np.int64)
    return orders
