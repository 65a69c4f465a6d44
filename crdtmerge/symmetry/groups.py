"""The permutation symmetry of an architecture: which axes of which tensors may be reordered together.

    {"format": "crdtmerge/symmetry/1",
     "groups": [{"axes": [["fc1.weight", 0, 0], ["fc1.bias", 0, 0], ["fc2.weight", 1, 1]], "size": 128}],
     "tensors": {"fc1.bias": [[128]], "fc1.weight": [[128], [64]], "fc2.weight": [[10], [128]]}}

``tensors`` splits each dimension of a tensor into factors, of which it is the row-major product: the rows of a query
projection [heads * width, d] are ``[[heads, width], [d]]``. An axis is a tensor, the position of one factor among all
of its factors, and 1 where the tensor consumes what the group's units give out (the columns of a linear layer), 0 where
it makes or scales it. A permutation of a group reorders all its axes at once; the network computes the same as before.
Where parameters are one under several names there is ``"tied": [["embedding.weight", "head.weight"]]`` too: a model may
lack some of those.

RULES
1. A permutation p is a list of indices: what was at p[i] comes to i.
2. A symmetry has one text: ASCII, sorted keys, no spaces, a newline at the end; its digest is the SHA-256 of that.
   A file that differs from it is refused; reading is bounded (``SYMMETRY_BYTES_MAX``).
3. No two axes are the same, all axes of a group have its size, and sizes are at least two.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from crdtmerge import strict_json
from crdtmerge.errors import InputError, MismatchError

FORMAT = "crdtmerge/symmetry/1"

SYMMETRY_BYTES_MAX = 64 << 20
"""A symmetry's text: some 100 bytes a tensor."""

DEPTH_MAX = 6

Permutation = NDArray[np.int64]
"""Indices: what was at p[i] comes to i."""

Array = TypeVar("Array")
"""A numpy array or a torch tensor."""


class Axis(NamedTuple):
    """One factor of one dimension of a tensor: its position among all factors of the tensor, from left to right.

    ``consumes`` says that a sum over this axis takes in what the group's units give out.
    """

    tensor: str
    position: int
    consumes: bool = False


@dataclass(frozen=True)
class Group:
    """Axes that are reordered together."""

    size: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Symmetry:
    """The groups of an architecture, and the factors of each dimension of the tensors that they reorder.

    >>> hidden = Group(3, (Axis("a.weight", 0), Axis("b.weight", 1, True)))
    >>> s = Symmetry((hidden,), {"a.weight": ((3,), (2,)), "b.weight": ((1,), (3,))})
    >>> decode(s.encode(), "x.json") == s
    True
    >>> s.turned("b.weight", np.array([[10.0, 11.0, 12.0]]), [np.array([2, 0, 1])])
    array([[12., 10., 11.]])
    """

    groups: tuple[Group, ...]
    tensors: Mapping[str, tuple[tuple[int, ...], ...]]
    tied: tuple[tuple[str, ...], ...] = ()

    def encode(self) -> bytes:
        """The one text of the symmetry."""
        table = {
            "format": FORMAT,
            "groups": [
                {"axes": [[name, at, int(consumes)] for name, at, consumes in group.axes], "size": group.size}
                for group in self.groups
            ],
            "tensors": {name: [list(factors) for factors in dims] for name, dims in self.tensors.items()},
        } | ({"tied": [list(names) for names in self.tied]} if self.tied else {})
        return (json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n").encode()

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the text."""
        return hashlib.sha256(self.encode()).digest()

    @cached_property
    def of_tensor(self) -> Mapping[str, tuple[tuple[int, int], ...]]:
        """For each tensor, (position, index of the group) of its axes."""
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in self.tensors}
        for index, group in enumerate(self.groups):
            for axis in group.axes:
                found[axis.tensor].append((axis.position, index))
        return {name: tuple(sorted(axes)) for name, axes in found.items()}

    def factors(self, name: str) -> tuple[int, ...]:
        """All factors of a tensor, from left to right: the shape in which its axes are single dimensions."""
        return tuple(size for dimension in self.tensors[name] for size in dimension)

    def check_fits(self, shapes: Mapping[str, Sequence[int]], label: str) -> None:
        """Raise MismatchError unless a model has every tensor of the symmetry in its shape, of tied ones one."""
        for name, dims in self.tensors.items():
            shape = [math.prod(factors) for factors in dims]
            if name not in shapes:
                if any(name in names and any(other in shapes for other in names) for names in self.tied):
                    continue
                raise MismatchError(
                    f"the symmetry reorders {name!a}, which {label} lacks. Derive it from a program whose parameters "
                    "have the checkpoint's names (crdtmerge symmetry --program P.pt2)."
                )
            if list(shapes[name]) != shape:
                raise MismatchError(
                    f"tensor {name!a} has shape {list(shapes[name])} in {label}; the symmetry is of one with shape "
                    f"{shape}. Derive it from a program of the same architecture."
                )

    def fitted(self, shapes: Mapping[str, Sequence[int]], label: str) -> Symmetry:
        """The symmetry without the tied tensors that a model lacks. Raises MismatchError as ``check_fits`` does."""
        self.check_fits(shapes, label)
        if all(name in shapes for name in self.tensors):
            return self
        groups = tuple(Group(g.size, tuple(axis for axis in g.axes if axis.tensor in shapes)) for g in self.groups)
        return Symmetry(groups, {name: dims for name, dims in self.tensors.items() if name in shapes})

    def turned(self, name: str, x: Array, permutations: Sequence[Permutation]) -> Array:
        """A tensor reordered by one permutation a group, in the shape that it has; itself if no group has it."""
        axes = self.of_tensor.get(name)
        if not axes:
            return x
        found: Any = x
        shape = found.shape
        found = found.reshape(self.factors(name))
        for position, group in axes:
            found = found[(slice(None),) * position + (permutations[group],)]
        turned: Array = found.reshape(shape)
        return turned

    def identities(self) -> list[Permutation]:
        """The permutations that change nothing."""
        return [np.arange(group.size) for group in self.groups]


def inverse(p: Permutation) -> Permutation:
    """The permutation that undoes p.

    >>> p = np.array([2, 0, 1])
    >>> inverse(p)[p]
    array([0, 1, 2])
    """
    found = np.empty_like(p)
    found[p] = np.arange(len(p))
    return found


def decode(data: bytes, where: str) -> Symmetry:
    """The symmetry of a text. Raises InputError."""
    if len(data) > SYMMETRY_BYTES_MAX:
        raise InputError(f"{where}: a symmetry of {len(data)} bytes; at most {SYMMETRY_BYTES_MAX} are read.")
    table = strict_json.parse(data, where, InputError, what="symmetry", depth=DEPTH_MAX)
    if table.get("format") != FORMAT:
        raise InputError(f"{where}: is no symmetry: format is {table.get('format')!a:.80}, not {FORMAT}.")
    try:
        if set(table) - {"tied"} != {"format", "groups", "tensors"}:
            raise ValueError("other fields than format, groups, tensors and tied")
        tensors = {name: tuple(tuple(_sizes(d)) for d in dims) for name, dims in dict(table["tensors"]).items()}
        groups = tuple(_group(one) for one in table["groups"])
        found = Symmetry(groups, tensors, tuple(tuple(names) for names in table.get("tied", ())))
        _check(found)
        if found.encode() != data:
            raise ValueError("not the one text of what it says")
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise InputError(f"{where}: a malformed symmetry ({fault}); make it again with `crdtmerge symmetry`.") from None
    return found


def _group(table: Any) -> Group:
    if set(table) != {"axes", "size"}:
        raise ValueError("a group has the fields axes and size")
    return Group(
        _sizes([table["size"]])[0], tuple(Axis(name, at, bool(consumes)) for name, at, consumes in table["axes"])
    )


def _sizes(given: Any) -> list[int]:
    if not isinstance(given, list) or not given or any(type(size) is not int or size < 1 for size in given):
        raise ValueError("sizes are lists of one or more numbers from 1 on")
    return given


def _check(found: Symmetry) -> None:
    """Raise ValueError for what breaks rule 3."""
    seen: set[tuple[str, int]] = set()
    factors = {name: found.factors(name) for name in found.tensors}
    names = [name for names in found.tied for name in names]
    if len(set(names)) != len(names) or not set(names) <= set(factors) or any(len(one) < 2 for one in found.tied):
        raise ValueError("tied tensors are two or more of the symmetry's, each in one list")
    for group in found.groups:
        if group.size < 2 or not group.axes:
            raise ValueError("a group of fewer than two elements, or of no axes")
        for axis in group.axes:
            sizes = factors[axis.tensor]
            if type(axis.position) is not int or not 0 <= axis.position < len(sizes):
                raise ValueError(f"{axis.tensor!a} has no axis {axis.position!a:.20}")
            if sizes[axis.position] != group.size:
                raise ValueError(f"{axis.tensor!a} has no axis of size {group.size} at {axis.position}")
            if axis[:2] in seen:
                raise ValueError(f"{axis.tensor!a} has the axis {axis.position} in two groups")
            seen.add(axis[:2])
