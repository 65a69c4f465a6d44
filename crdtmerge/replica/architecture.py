"""The architecture of a pool: which tensors its models have; and whether a contribution fits it.

Integer and bool tensors (positions, counters) are never averaged, so they are part of it by their digests: a model in
which one differs could not be merged with the others.

Leniency comes from the pool's own recipe and so is the same on every replica: excluded tensors are not compared, the
dtype of floats is free where the recipe names an output dtype, and names may be missing where it says what then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from crdtmerge.canonical import digest
from crdtmerge.errors import MismatchError, some
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Row, is_id, natural, tensor_name


class Tensor(NamedTuple):
    """What all models of an architecture have in common of a tensor; ``fixed`` is its digest unless it is of floats."""

    dtype: str
    shape: tuple[int, ...]
    fixed: bytes | None


@dataclass(frozen=True)
class Architecture:
    """Tensors by name in sorted order."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Architecture:
        """The architecture of a manifest's rows.

        >>> Architecture.of([Row("w", "F32", (2,), bytes(32))]).id.hex()[:8]
        '432ebfe4'
        """
        return cls({row.name: _tensor(row.dtype, row.shape, row.digest) for row in sorted(rows)})

    @cached_property
    def id(self) -> bytes:
        """Its digest, 32 bytes."""
        return digest("architecture", self.canonical())

    def canonical(self) -> list[Any]:
        """[[name, dtype, shape, fixed]...] in the order of names."""
        return [[name, dtype, list(shape), fixed] for name, (dtype, shape, fixed) in self.tensors.items()]

    @classmethod
    def of_value(cls, rows: Iterable[Any]) -> Architecture:
        """Read the canonical value. Raises ValueError or TypeError for anything else."""
        tensors = {
            tensor_name(name): Tensor(tensor_name(dtype), tuple(map(natural, shape)), fixed)
            for name, dtype, shape, fixed in rows
        }
        if list(tensors) != sorted(tensors):
            raise ValueError("tensors are not in the order of their names")
        if not all(one.fixed is None if _float(one.dtype) else is_id(one.fixed) for one in tensors.values()):
            raise ValueError("a tensor is fixed by a digest exactly if it is not of floats")
        return cls(tensors)

    def check(self, other: Architecture, recipe: Recipe, where: str) -> None:
        """Raise MismatchError, naming the first difference, unless ``other`` fits this one under a recipe."""
        mine, theirs = self._compared(recipe), other._compared(recipe)
        for name in sorted(mine.keys() & theirs.keys()):
            (dtype, shape, fixed), (found, found_shape, found_fixed) = mine[name], theirs[name]
            if shape != found_shape:
                raise MismatchError(
                    f"{where}: tensor {name!a} has shape {list(found_shape)}; the pool's has {list(shape)} "
                    f"(architecture {other.id.hex()[:16]}, not {self.id.hex()[:16]}). It belongs in a pool of its own."
                )
            if dtype != found and not (recipe.dtype and _float(dtype) and _float(found)):
                raise MismatchError(
                    f"{where}: tensor {name!a} is {found}; the pool's is {dtype} (architecture {other.id.hex()[:16]}, "
                    f"not {self.id.hex()[:16]}). Convert it, or name an output dtype in the recipe of a new pool."
                )
            if fixed != found_fixed:
                raise MismatchError(
                    f"{where}: tensor {name!a} ({dtype}) differs from the pool's. Integer and bool tensors are never "
                    "averaged: make it equal, or leave it out with the exclude of a new pool's recipe."
                )
        if recipe.missing is None and mine.keys() != theirs.keys():
            lacks, more = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
            what = f"lacks {some(lacks)}" if lacks else f"has {some(more)}, which the pool's models lack"
            raise MismatchError(
                f"{where}: {what} (architecture {other.id.hex()[:16]}, not {self.id.hex()[:16]}). "
                "A recipe with missing or exclude makes room for that, in a pool of its own."
            )

    def _compared(self, recipe: Recipe) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if not recipe.excludes(name)}


def _tensor(dtype: str, shape: tuple[int, ...], digest: bytes) -> Tensor:
    return Tensor(dtype, shape, None if _float(dtype) else digest)


def _float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))
