"""Whether the inputs fit each other, tensor by tensor, and what becomes of each tensor: merged or copied.

Rules: names and shapes agree in all inputs, dtypes too unless an output dtype is asked for; integer and bool tensors
are never averaged and must be equal; nothing is skipped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from crdtmerge.errors import MismatchError, some
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.recipe import Recipe
from crdtmerge.resolve.gather import Contribution, Gathered, Known
from crdtmerge.resolve.sources import Source
from crdtmerge.strategies.protocol import Meta
from crdtmerge.weights.header import Entry


@dataclass(frozen=True)
class Merging:
    """A tensor that a strategy merges: its sources in canonical order (the base stands in where one lacks it)."""

    name: str
    shape: tuple[int, ...]
    elements: int
    sources: tuple[Source, ...]
    members: tuple[int, ...]
    meta: tuple[Meta, ...]
    base: Source | None
    dtypes: tuple[DType, ...]
    out: DType
    stats: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    models: Mapping[str, Source] = field(default_factory=dict)

    @property
    def dtype(self) -> DType | None:
        """The one storage dtype of all its inputs, None if they differ."""
        return self.dtypes[0] if len(set(self.dtypes)) == 1 else None

    @property
    def half(self) -> bool:
        """Whether all its inputs are 16-bit floats."""
        return all(dtype.itemsize == 2 for dtype in self.dtypes)


@dataclass(frozen=True)
class Copying:
    """A tensor that is carried over: an integer buffer, or floats left out of the merge, in the output dtype."""

    name: str
    shape: tuple[int, ...]
    elements: int
    source: Source
    dtype: DType
    out: DType


def fit(gathered: Gathered, recipe: Recipe, base_used: bool) -> tuple[list[Merging], list[Copying]]:
    """What becomes of each tensor, in the order of names. Raises MismatchError."""
    everyone = [one.known for one in gathered.contributions]
    compared = ([gathered.base] if gathered.base else []) + everyone
    names = _names(compared, recipe)
    merging: list[Merging] = []
    copying: list[Copying] = []
    for name in names:
        holders = [one for one in compared if name in one.source.entries]
        if recipe.excludes(name):
            if holders[0] is compared[0]:
                copying.append(_copy(name, holders[0], recipe))
        elif not holders[0].source.entries[name].dtype.floating:
            copying.append(_equal_in_all(name, holders, recipe))
        else:
            _same_shape_and_dtype(name, holders, recipe.dtype)
            if any(holder is not gathered.base for holder in holders):
                merging.append(_merged(name, gathered, recipe, base_used))
            else:
                copying.append(_copy(name, holders[0], recipe))
    if not merging and not copying:
        raise MismatchError("there is no tensor to merge: the models are empty or --exclude leaves out all of them.")
    return merging, copying


def _names(compared: Sequence[Known], recipe: Recipe) -> list[str]:
    """The union of all names. Raises MismatchError if they differ and nobody said what to do then."""
    union = sorted(set().union(*(one.source.entries for one in compared)))
    checked = [name for name in union if not recipe.excludes(name)]
    for one in compared if recipe.missing is None else ():
        lacks = [name for name in checked if name not in one.source.entries]
        if lacks:
            holder = next(other for other in compared if lacks[0] in other.source.entries)
            raise MismatchError(_difference(one, holder, lacks))
    return union


def _difference(one: Known, holder: Known, lacks: Sequence[str]) -> str:
    tied = _tied(holder, lacks[0])
    hint = f" There {lacks[0]!a} equals {tied!a} (tied weights): --exclude {lacks[0]}." if tied else ""
    return (
        f"{one.source.label} lacks {len(lacks)} tensors that {holder.source.label} has: {some(list(lacks))}.{hint} "
        "Say what to do: --missing base (the base's values stand in), --missing skip (merge those that have it) "
        "or --exclude GLOB."
    )


def _tied(holder: Known, name: str) -> str | None:
    """Another tensor of the same model with the same bytes."""
    same = (
        other for other in holder.facts if other != name and holder.facts[other].digest == holder.facts[name].digest
    )
    return next(same, None)


def _copy(name: str, holder: Known, recipe: Recipe) -> Copying:
    entry = holder.source.entries[name]
    out = DTYPES[recipe.dtype] if recipe.dtype and entry.dtype.floating else entry.dtype
    return Copying(name, entry.shape, entry.elements, holder.source, entry.dtype, out)


def _equal_in_all(name: str, holders: Sequence[Known], recipe: Recipe) -> Copying:
    """The copy of an integer or bool tensor. Raises MismatchError if it is not the same everywhere."""
    first = holders[0]
    for other in holders[1:]:
        _same_shape_and_dtype(name, [first, other], None)
        if other.facts[name].digest != first.facts[name].digest:
            kind, there = first.source.entries[name].dtype.name, first.source.where(name)
            raise MismatchError(
                f"{other.source.where(name)}: tensor {name!a} ({kind}) differs from that of {there}. "
                "Integer and bool tensors are never averaged; make them equal, or leave it out with --exclude."
            )
    return _copy(name, first, recipe)


def _same_shape_and_dtype(name: str, holders: Sequence[Known], dtype: str | None) -> None:
    first, entry = holders[0].source, holders[0].source.entries[name]
    for one in holders[1:]:
        other = one.source.entries[name]
        if other.shape != entry.shape:
            hint = (
                "Resize the vocabulary first" if _vocabulary(name, entry, other) else "Use models of one architecture"
            )
            raise MismatchError(
                f"{one.source.where(name)}: tensor {name!a} has shape {list(other.shape)}; {first.label} has "
                f"{list(entry.shape)}. {hint}, or leave it out with --exclude."
            )
        both_float = other.dtype.floating and entry.dtype.floating
        if other.dtype != entry.dtype and not (dtype and both_float):
            way_out = (
                "Say which dtype the result shall have with --dtype."
                if both_float
                else "Integers are never averaged: make them one dtype and equal, or leave it out with --exclude."
            )
            raise MismatchError(
                f"{one.source.where(name)}: tensor {name!a} is {other.dtype.name}; in {first.label} it is "
                f"{entry.dtype.name}. {way_out}"
            )


def _vocabulary(name: str, one: Entry, other: Entry) -> bool:
    return ("embed" in name or "lm_head" in name) and one.shape[1:] == other.shape[1:]


def _merged(name: str, gathered: Gathered, recipe: Recipe, base_used: bool) -> Merging:
    base = gathered.base.source if gathered.base and name in gathered.base.source.entries else None
    members = [(i, _stand_in(name, one, base, recipe)) for i, one in enumerate(gathered.contributions)]
    present = [(i, source) for i, source in members if source is not None]
    if base_used and base is None:
        raise MismatchError(
            f"the base lacks tensor {name!a}, which {present[0][1].label} has, and the strategy works on differences "
            "from the base. Leave it out with --exclude."
        )
    sources = tuple(source for _, source in present)
    entries = [source.entries[name] for source in (*sources, *([base] if base_used and base else []))]
    out = DTYPES[recipe.dtype] if recipe.dtype else entries[0].dtype
    return Merging(
        name,
        entries[0].shape,
        entries[0].elements,
        sources,
        tuple(i for i, _ in present),
        tuple(gathered.contributions[i].meta for i, _ in present),
        base if base_used else None,
        tuple(entry.dtype for entry in entries),
        out,
    )


def _stand_in(name: str, one: Contribution, base: Source | None, recipe: Recipe) -> Source | None:
    if name in one.source.entries:
        return one.source
    if recipe.missing == "base" and base is None:
        raise MismatchError(
            f"{one.source.label} lacks tensor {name!a}, and so does the base: with --missing base nothing can stand "
            "in. Use --missing skip, or leave it out with --exclude."
        )
    return base if recipe.missing == "base" else None
