"""Small seeded models to try a strategy with: fine-tunes of a base, their statistics, further models.

Everything is a function of a number: numpy's seeded normal numbers, rounded once to a storage dtype. Names of tensors
are drawn in sorted order.

>>> [one["bias"].shape for one in family(2, "BF16")[0]]
[torch.Size([37]), torch.Size([37])]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.rounding import torch_dtype
from crdtmerge.symmetry.groups import Axis, Group, Symmetry

if TYPE_CHECKING:
    from torch import Tensor

Model = Mapping[str, "Tensor"]
Shapes = Mapping[str, tuple[int, ...]]
Maker = Callable[[str, tuple[int, ...], np.random.Generator], "NDArray[np.float64] | None"]
"""A statistic of one tensor: its name, its shape, where numbers come from -> an array, or None where it has none."""

UNITS_MAX = 64
"""Longer dimensions of small models are not reordered."""

STORED = ("F64", "F32", "BF16", "F16")
"""The dtypes that are merged, by their names in safetensors."""

SHAPES: Shapes = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "bias": (37,),
    "weight": (11, 13),
    "conv": (5, 3, 2, 2),
}
"""What a small model holds: no dimension, no element, one element, a vector, a matrix, a convolution."""


def identity(number: int) -> bytes:
    """An id for the model at a position."""
    return hashlib.sha256(f"model {number}".encode()).digest()


def stored(x: NDArray[np.float64], dtype: str) -> Tensor:
    """Numbers rounded to a storage dtype."""
    kind = torch_dtype(DTYPES[dtype])
    return torch.from_numpy(np.array(x)).to(kind) if x.size else torch.empty(x.shape, dtype=kind)


def model(
    number: int,
    dtype: str = "F32",
    *,
    shapes: Shapes = SHAPES,
    around: Model | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """A model of normal numbers; ``around`` another one, if given."""
    rng = np.random.default_rng(number)
    made = {}
    for name, shape in sorted(shapes.items()):
        x = rng.standard_normal(int(np.prod(shape, dtype=np.int64))) * scale
        if around is not None:
            x = x + around[name].double().reshape(-1).numpy()
        made[name] = stored(x, dtype).reshape(shape)
    return made


def family(
    k: int, dtype: str = "F32", *, number: int = 100, shapes: Shapes = SHAPES, scale: float = 1.0
) -> tuple[list[Model], Model]:
    """k models fine-tuned from a base, and the base."""
    models: list[Model] = [
        {name: x.clone() for name, x in one.items()}
        for one in _family(k, dtype, number, tuple(sorted(shapes.items())), scale)
    ]
    return models[1:], models[0]


@lru_cache(maxsize=64)
def _family(
    k: int, dtype: str, number: int, shapes: tuple[tuple[str, tuple[int, ...]], ...], scale: float
) -> list[Model]:
    """The base and the models: drawn once, as laws ask for one family again and again."""
    base = model(number, dtype, shapes=dict(shapes), scale=scale)
    return [base, *(model(number + 1 + i, dtype, shapes=dict(shapes), around=base, scale=0.25) for i in range(k))]


def constant(like: Model, value: float = 0.0) -> dict[str, Tensor]:
    """A model of one number."""
    return {name: torch.full_like(x, value) for name, x in like.items()}


def positive(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """What Fisher information and importance look like: squares over many binades, of the tensor's own shape."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 1, shape).astype(np.float64))
    return np.asarray(x * x + 1e-6)


def gram(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64] | None:
    """X^T X / m of m = 2 n inputs to a weight [out, n] (a convolution's further dimensions are inputs too)."""
    if len(shape) < 2:
        return None
    n = int(np.prod(shape[1:], dtype=np.int64))
    x = rng.standard_normal((2 * n, n))
    return np.asarray(x.T @ x / (2 * n))


STATISTICS: Mapping[str, Maker] = {"gram": gram}
"""How statistics are made that are not positive numbers of the model's own shapes."""


def statistics(
    names: Sequence[str], number: int, shapes: Shapes, makers: Mapping[str, Maker] | None = None
) -> dict[str, Model]:
    """One contribution's statistics in float32, by name."""
    known = {**STATISTICS, **(makers or {})}
    made: dict[str, Model] = {}
    for at, name in enumerate(sorted(names)):
        rng = np.random.default_rng([number, at])
        arrays = {tensor: known.get(name, positive)(tensor, shape, rng) for tensor, shape in sorted(shapes.items())}
        made[name] = {tensor: stored(x, "F32") for tensor, x in arrays.items() if x is not None}
    return made


def symmetry(shapes: Shapes) -> Symmetry:
    """A symmetry of a small model: all its dimensions of one size are reordered together, up to ``UNITS_MAX`` units.

    >>> [group.size for group in symmetry({"a": (3, 2), "b": (2,), "c": (1,)}).groups]
    [2, 3]
    """
    axes: dict[int, list[Axis]] = {}
    for name, shape in sorted(shapes.items()):
        for position, size in enumerate(shape):
            if 2 <= size <= UNITS_MAX and 0 not in shape:
                axes.setdefault(size, []).append(Axis(name, position, position == 1))
    groups = tuple(Group(size, tuple(found)) for size, found in sorted(axes.items()))
    names = {axis.tensor for group in groups for axis in group.axes}
    return Symmetry(groups, {name: tuple((size,) for size in shapes[name]) for name in sorted(names)})


def raw(x: Tensor) -> NDArray[Any]:
    """The stored values as unsigned integers of their size."""
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.element_size()]
    found: NDArray[Any] = x.contiguous().reshape(-1).view(torch.uint8).numpy().view(unsigned)
    return found


def content(one: Model) -> bytes:
    """An id made of what a model holds."""
    found = hashlib.sha256()
    for name in sorted(one):
        found.update(raw(one[name]).tobytes())
    return found.digest()
