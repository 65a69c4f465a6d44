"""What is known of a value of a graph, and of one call of an operator: dimensions as atoms, and what they come from.

The claim that a value carries: reorder the parameters by permutations of the atoms, and the value is reordered by the
same permutations along its own dimensions. Each rule of ``rules`` keeps the claim, or freezes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crdtmerge.symmetry.atoms import Atoms, Dim, IrregularError

if TYPE_CHECKING:
    import torch

Origin = tuple[tuple[str, tuple[frozenset[int], ...]], ...]
"""For each parameter that a value is made of alone: its name, and for each dimension of the value those of it."""


class NotUnderstoodError(Exception):
    """A call that no rule keeps the claim for."""


@dataclass
class Value:
    """A tensor of the graph.

    ``points``: it holds indices into a dimension of these atoms, and follows their permutation. ``live``: it depends on
    the program's inputs. ``origin``: it is made of parameters alone, without sums. ``mask``: it holds truth values.
    ``node``: who made it.
    """

    dims: list[Dim]
    shape: tuple[Any, ...]
    points: Dim | None = None
    live: bool = False
    origin: Origin = ()
    mask: bool = False
    node: str = ""

    def replaced(self, at: int, dim: Dim, shape: tuple[Any, ...]) -> Value:
        """With another dimension in the place of one."""
        return Value([*self.dims[:at], dim, *self.dims[at + 1 :]], shape, self.points, origin=self.origin)

    def last(self, back: int) -> Dim:
        """The dimension that is ``back`` from the end, from 1 on."""
        return self.dims[-back]


@dataclass
class Uses:
    """Where sums run over an activation's dimension and a parameter's at once."""

    columns: list[tuple[str, int, Dim]] = field(default_factory=list)
    activations: list[tuple[str, int]] = field(default_factory=list)


class Call:
    """One call of an operator: its arguments by name, tensors among them as values, and what it is known to give."""

    def __init__(
        self, name: str, args: dict[str, Any], outs: Sequence[tuple[Any, ...] | None], atoms: Atoms, uses: Uses
    ) -> None:
        self.name, self.args, self.outs, self.atoms, self.uses = name, args, outs, atoms, uses

    def value(self, name: str) -> Value:
        """A tensor among the arguments. Raises NotUnderstoodError."""
        found = self.args.get(name)
        if not isinstance(found, Value):
            raise NotUnderstoodError
        return found

    def values(self) -> list[Value]:
        """All tensors among the arguments, in their order."""
        return list(tensors_in(self.args.values()))

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the one result. Raises NotUnderstoodError where there is none."""
        if len(self.outs) != 1 or self.outs[0] is None:
            raise NotUnderstoodError
        return self.outs[0]

    def axis(self, x: Value, name: str = "dim") -> int:
        """An argument that is a dimension of x, from 0 on."""
        given = self.args.get(name)
        if type(given) is not int or not x.dims:
            raise NotUnderstoodError
        return given % len(x.dims)

    def axes(self, x: Value, name: str = "dim") -> list[int]:
        """An argument that is dimensions of x; all of them where it is left out."""
        given = self.args.get(name)
        if given is None or given == []:
            return list(range(len(x.dims)))
        return [one % len(x.dims) for one in (given if isinstance(given, list | tuple) else [given])]

    def new(self, shape: Sequence[Any], *, frozen: bool = False) -> Value:
        """A value of new atoms."""
        return Value([self.atoms.dim(size, frozen=frozen) for size in shape], tuple(shape))

    def freeze(self, *dims: Dim) -> None:
        """Take all permutations from dimensions."""
        for dim in dims:
            self.atoms.freeze(dim)

    def unite(self, one: Dim, other: Dim) -> None:
        """Reorder two dimensions alike."""
        self.atoms.unite(one, other)

    def contract(self, x: Value, i: int, y: Value, j: int) -> None:
        """A sum over dimension i of x and j of y at once."""
        self.unite(x.dims[i], y.dims[j])
        for one, at, other, there in ((x, i, y, j), (y, j, x, i)):
            if one.live and other.origin:
                self.uses.activations.append((one.node, at % len(one.dims)))
                for name, come in other.origin:
                    self.uses.columns += [(name, dim, other.dims[there]) for dim in sorted(come[there])]

    def broadcast(self, values: Sequence[Value], shape: tuple[Any, ...]) -> Value:
        """What values come to elementwise: dimensions of one size are reordered alike, one of size one with any."""
        dims = []
        for back in range(len(shape), 0, -1):
            given = [x.last(back) for x in values if len(x.dims) >= back and not one(x.shape[-back])]
            for other in given[1:]:
                self.unite(given[0], other)
            dims.append(given[0] if given else self.atoms.dim(shape[-back]))
        origin = () if any(x.live for x in values) else tuple(o for x in values for o in _padded(x, shape))
        return Value(dims, shape, origin=origin)


def one(size: Any) -> bool:
    """Whether a size is one, for certain."""
    return type(size) is int and size == 1


def tensors_in(items: Iterable[Any]) -> Iterable[Value]:
    """The values among arguments, in lists too."""
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, list | tuple):
            yield from tensors_in(item)


def regrouped(atoms: Atoms, x: Value, shape: tuple[Any, ...]) -> Value:
    """A value read in its row-major order as another shape: dimensions are merged and split.

    Where both shapes have a boundary in common the parts before and after it are regrouped apart; a part that does not
    split is frozen.
    """
    old = [i for i, size in enumerate(x.shape) if not one(size)]
    new = [j for j, size in enumerate(shape) if not one(size)]
    dims: list[Dim] = [()] * len(shape)
    come: list[list[int]] = [[] for _ in shape]
    for inner, outer in _chunks([x.shape[i] for i in old], [shape[j] for j in new]):
        held = [old[i] for i in inner]
        made = [new[j] for j in outer]
        stream = atoms.flat(atom for i in held for atom in x.dims[i])
        sizes = [shape[j] for j in made]
        if len(held) == len(made) == 1:
            dims[made[0]] = x.dims[held[0]]
        else:
            for j, dim in zip(made, _taken(atoms, stream, sizes), strict=True):
                dims[j] = dim
        for j in made:
            come[j] = held
    origin = tuple((name, tuple(frozenset().union(*(of[i] for i in c)) for c in come)) for name, of in x.origin)
    return Value(dims, shape, x.points, origin=origin)


def _taken(atoms: Atoms, stream: list[int], sizes: list[Any]) -> list[Dim]:
    """Atoms in their order as dimensions of these sizes; new frozen ones, and frozen atoms, where they do not split."""
    rest = list(stream)
    if all(type(size) is int for size in sizes) and atoms.total(stream) == math.prod(sizes):
        try:
            return [atoms.take(rest, size) for size in sizes]
        except IrregularError:
            pass
    atoms.freeze(stream)
    return [atoms.dim(size, frozen=True) for size in sizes]


def _chunks(old: list[Any], new: list[Any]) -> Iterable[tuple[range, range]]:
    """Runs of dimensions of both shapes that have one product, as short as they can be."""
    i = j = 0
    while i < len(old) or j < len(new):
        end, there = i + 1, j + 1
        found = next(
            (
                (a, b)
                for a, b in _growing(len(old) - i, len(new) - j)
                if same_size(_product(old[i : i + a]), _product(new[j : j + b]))
            ),
            None,
        )
        end, there = (i + found[0], j + found[1]) if found else (len(old), len(new))
        yield range(i, end), range(j, there)
        i, j = end, there


def _growing(old: int, new: int) -> Iterable[tuple[int, int]]:
    pairs = [(a, b) for a in range(1, old + 1) for b in range(1, new + 1)]
    return sorted(pairs, key=lambda pair: (sum(pair), pair))


def _product(sizes: Sequence[Any]) -> Any:
    return math.prod(_expression(size) for size in sizes)


def _expression(size: Any) -> Any:
    return size.node.expr if hasattr(size, "node") else size


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for certain."""
    x, y = _expression(one), _expression(other)
    return bool(x == y) if type(x) is int and type(y) is int else bool((x - y).expand() == 0)


def _padded(x: Value, shape: tuple[Any, ...]) -> Origin:
    """Where a value's origin is after it was broadcast."""
    lacking = len(shape) - len(x.dims)
    return tuple(
        (name, (frozenset(),) * lacking + tuple(frozenset() if one(x.shape[i]) else d for i, d in enumerate(of)))
        for name, of in x.origin
    )


def shape_of(value: torch.Tensor) -> tuple[Any, ...]:
    """A tensor's shape: whole numbers, and symbols where the program leaves a size open."""
    return tuple(value.shape)
