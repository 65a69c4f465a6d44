"""Atoms of dimensions: each dimension of a tensor is an ordered product of them, united and split as operations demand.

    [heads * width, d] = [(a, b), (c)]    a view as [heads, width, d] splits the first dimension into its atoms

A permutation of an atom reorders every dimension that holds it. Uniting two atoms says that they are reordered alike;
freezing one, that it is not reordered at all. Both only take permutations away: what is united or frozen without need
costs a symmetry, never the truth of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

Dim = tuple[int, ...]
"""The atoms of a dimension, from the slowest to the fastest; none where its size is one."""


class IrregularError(Exception):
    """A dimension that does not split as asked."""


class Atoms:
    """A union-find of atoms in which an atom may be split into two.

    >>> atoms = Atoms()
    >>> x, y, z = (atoms.new(6),), (atoms.new(2), atoms.new(3)), (atoms.new(3),)
    >>> atoms.unite(x, y)
    >>> atoms.unite(z, y[1:])
    >>> [atoms.size(a) for a in atoms.flat(x)], atoms.flat(x)[1] == atoms.flat(z)[0]
    ([2, 3], True)
    """

    def __init__(self) -> None:
        self._size: list[int | None] = []
        self._parent: list[int] = []
        self._parts: dict[int, Dim] = {}
        self._frozen: set[int] = set()

    def new(self, size: object, *, frozen: bool = False) -> int:
        """A new atom. One whose size is no number, or zero, is frozen."""
        atom = len(self._size)
        known = size if type(size) is int and size > 0 else None
        self._size.append(known)
        self._parent.append(atom)
        if frozen or known is None:
            self._frozen.add(atom)
        return atom

    def dim(self, size: object, *, frozen: bool = False) -> Dim:
        """A dimension of one new atom, or of none where the size is one."""
        return () if type(size) is int and size == 1 else (self.new(size, frozen=frozen),)

    def find(self, atom: int) -> int:
        """The first of the atoms that are united with one."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def size(self, atom: int) -> int | None:
        """The size, None where it is not known."""
        return self._size[self.find(atom)]

    def frozen(self, atom: int) -> bool:
        """Whether an atom is not to be reordered."""
        return self.find(atom) in self._frozen

    def flat(self, dim: Iterable[int]) -> list[int]:
        """The atoms that a dimension has by now: each the first of its kind and not split, of a size other than one."""
        found: list[int] = []
        for atom in dim:
            first = self.find(atom)
            if first in self._parts:
                found += self.flat(self._parts[first])
            elif self._size[first] != 1:
                found.append(first)
        return found

    def freeze(self, dim: Iterable[int]) -> None:
        """Take all permutations from a dimension's atoms."""
        self._frozen.update(self.flat(dim))

    def unite(self, one: Dim, other: Dim) -> None:
        """Reorder two dimensions of one size alike, splitting where they are made differently.

        Where sizes do not divide each other both are frozen.
        """
        while True:
            x, y = self.flat(one), self.flat(other)
            sizes, others = [self._size[a] for a in x], [self._size[b] for b in y]
            if sizes == others and None not in sizes:
                for a, b in zip(x, y, strict=True):
                    self._join(a, b)
                return
            pair = next(((a, b) for a, b in zip(x, y, strict=False) if self._size[a] != self._size[b]), None)
            if pair is None or None in (*sizes, *others):
                break
            small, big = sorted(pair, key=lambda atom: self._size[atom] or 0)
            if (self._size[big] or 0) % (self._size[small] or 1):
                break
            self._split(big, self._size[small] or 1)
        self.freeze((*one, *other))

    def take(self, stream: list[int], size: int) -> Dim:
        """Atoms of a size in all from the front of a stream, which they leave; one is split where need be.

        Raises IrregularError where that cannot be.
        """
        got: list[int] = []
        lacking = size
        while lacking > 1:
            if not stream:
                raise IrregularError
            stream[:1] = self.flat(stream[:1])
            if not stream:
                raise IrregularError
            have = self._size[stream[0]]
            if have is None or (have > lacking and have % lacking) or (have <= lacking and lacking % have):
                raise IrregularError
            if have > lacking:
                stream[:1] = self._split(stream[0], lacking)
            first = stream.pop(0)
            got.append(first)
            lacking //= self._size[first] or 1
        return tuple(got)

    def divided(self, dim: Dim, size: int) -> tuple[Dim, Dim]:
        """A dimension as (outer of that size, inner). Raises IrregularError."""
        stream = self.flat(dim)
        outer = self.take(stream, size)
        return outer, tuple(stream)

    def total(self, dim: Iterable[int]) -> int | None:
        """The product of the sizes, None where one is not known."""
        sizes = [self._size[atom] for atom in self.flat(dim)]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def _split(self, atom: int, outer: int) -> Dim:
        frozen, size = atom in self._frozen, self._size[atom]
        assert size is not None, "an atom of unknown size is never split"
        parts = (self.new(outer, frozen=frozen), self.new(size // outer, frozen=frozen))
        self._parts[atom] = parts
        return parts

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        if first != second:
            self._parent[second] = first
            if second in self._frozen:
                self._frozen.add(first)
