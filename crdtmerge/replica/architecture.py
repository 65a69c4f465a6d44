"""The architecture of a pool: which tensors its models have; and whether a contribution fits it.

Leniency comes from the pool's own recipe and so is the same on every replica: excluded tensors are not compared, the
dtype of floats is free where the recipe names an output dtype, and names may be missing where it says what then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crdtmerge.canonical import digest
from crdtmerge.errors import MismatchError, some
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Row, natural, tensor_name


@dataclass(frozen=True)
class Architecture:
    """Tensors by name in sorted order: (dtype, shape)."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Architecture:
        """The architecture of a manifest's rows.

        >>> Architecture.of([Row("w", "F32", (2,), bytes(32))]).id.hex()[:8]
        'f42ecbfa'
        """
        return cls({row.name: (row.dtype, row.shape) for row in sorted(rows)})

    @cached_property
    def id(self) -> bytes:
        """Its digest, 32 bytes."""
        return digest("architecture", self.canonical())

    def canonical(self) -> list[Any]:
        """[[name, dtype, shape]...] in the order of names."""
        return [[name, dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()]

    @classmethod
    def of_value(cls, rows: Iterable[Any]) -> Architecture:
        """Read the canonical value. Raises ValueError or TypeError for anything else."""
        tensors = {tensor_name(name): (tensor_name(dtype), tuple(map(natural, shape))) for name, dtype, shape in rows}
        if list(tensors) != sorted(tensors):
            raise ValueError("tensors are not in the order of their names")
        return cls(tensors)

    def check(self, other: Architecture, recipe: Recipe, where: str) -> None:
        """Raise MismatchError, naming the first difference, unless ``other`` fits this one under a recipe."""
        mine, theirs = self._compared(recipe), other._compared(recipe)
        for name in sorted(mine.keys() & theirs.keys()):
            (dtype, shape), (found, found_shape) = mine[name], theirs[name]
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
        if recipe.missing is None and mine.keys() != theirs.keys():
            lacks, more = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
            what = f"lacks {some(lacks)}" if lacks else f"has {some(more)}, which the pool's models lack"
            raise MismatchError(
                f"{where}: {what} (architecture {other.id.hex()[:16]}, not {self.id.hex()[:16]}). "
                "A recipe with missing or exclude makes room for that, in a pool of its own."
            )

    def _compared(self, recipe: Recipe) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: tensor for name, tensor in self.tensors.items() if not recipe.excludes(name)}


def _float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))
