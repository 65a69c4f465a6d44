"""A strategy under given conditions: parameters, weights, roles, and models with all that it needs beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from crdtmerge.errors import NeedsError
from crdtmerge.recipe import Recipe
from crdtmerge.resolve.merge import Merged, merge
from crdtmerge.resolve.merging import combined
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import Needs, Strategy
from crdtmerge.testing.models import SHAPES, Maker, Model, Shapes, family, identity, model, statistics, symmetry
from crdtmerge.testing.prepared import Prepared

SYMMETRY = "symmetry"
"""The input that is made for any models."""

FurtherModel = Callable[[Model], Model]
"""A further model, made from the base."""


@dataclass(frozen=True)
class Material:
    """What one merge reads: models with their claims, the base, statistics, further models."""

    models: Sequence[Model]
    base: Model | None
    weights: tuple[str, ...]
    roles: tuple[str, ...]
    stats: tuple[Mapping[str, Model], ...] = ()
    beside: Mapping[str, Model] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    def of(self, models: Sequence[Model], base: Model | None = None) -> Material:
        """The same with other models; the base stays unless one is given."""
        return replace(self, models=list(models), base=self.base if base is None else base)


WEIGHTS = ("1", "0.1", "2.5", "0.75")


@dataclass(frozen=True)
class Case:
    """A strategy, its parameters, and how its material is made from a number."""

    strategy: Strategy[Any]
    params: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[str] = WEIGHTS
    roles: Sequence[str] = ()
    makers: Mapping[str, Maker] = field(default_factory=dict)
    further: Mapping[str, FurtherModel] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    k: int = 3
    random: bool = False
    number: int = 0

    @property
    def needs(self) -> Needs:
        """What it requires for these parameters. Raises ParameterError."""
        filled: Filled[Any] = Filled(self.strategy.name, self.strategy.Params, self.params)
        return combined([self.strategy.needs(p) for p in filled.variants()])

    @property
    def some(self) -> int:
        """How many models are merged where the law does not say: ``k``, as far as the strategy takes so many."""
        return max(self.needs.min_k, min(self.k, self.needs.max_k or self.k))

    def recipe(self, **options: Any) -> Recipe:
        """Its recipe."""
        return Recipe.of(self.strategy.name, self.params, **options)

    def roles_of(self, k: int) -> tuple[str, ...]:
        """The roles of k models: as given, over and over; else all have the first role that the strategy takes."""
        given = self.roles or self.needs.roles[:1]
        return tuple(given[i % len(given)] for i in range(k))

    def material(self, dtype: str = "F32", k: int | None = None, shapes: Shapes = SHAPES) -> Material:
        """Seeded models of a dtype. Raises NeedsError for a strategy that runs a program."""
        needs, k = self.needs, self.some if k is None else k
        files = self.inputs_for(shapes)
        lacking = sorted(set(needs.inputs) - files.keys())
        if lacking:
            raise NeedsError(
                f"strategy '{self.strategy.name}' runs a program (it needs the input '{lacking[0]}'), which fits "
                "models of its own only. Try it with parameters under which it runs none, and its plan by a test of "
                "its own."
            )
        first = 1000 * (self.number + 1)
        models, base = family(k, dtype, number=first, shapes=shapes)
        weights = tuple(self.weights[i % len(self.weights)] for i in range(k))
        stats = tuple(statistics(needs.stats, first + i, shapes, self.makers) for i in range(k)) if needs.stats else ()
        beside = self.beside(base, dtype, shapes)
        base_used = None if needs.base == "unused" else base
        return Material(models, base_used, weights, self.roles_of(k), stats, beside, files)

    def inputs_for(self, shapes: Shapes) -> dict[str, Path]:
        """The files that it reads, as far as there are any: those given, and a symmetry of models of these shapes."""
        known = {SYMMETRY: symmetry_file(tuple(sorted(shapes.items())))} if SYMMETRY in self.needs.inputs else {}
        return {name: path for name, path in {**known, **self.files}.items() if name in self.needs.inputs}

    def beside(self, base: Model, dtype: str, shapes: Shapes) -> dict[str, Model]:
        """The further models that it needs: as said how, else fine-tunes of the base."""
        first, made = 1000 * (self.number + 1) + 500, {}
        for at, name in enumerate(sorted(self.needs.models)):
            how = self.further.get(name)
            made[name] = how(base) if how else model(first + at, dtype, shapes=shapes, around=base, scale=0.25)
        return made

    def prepared(self, given: Material, **how: Any) -> Prepared:
        """Its plan for a material, ready to be applied past the set, models in the order given."""
        ids = [identity(i) for i in range(len(given.models))]
        return Prepared(
            self.strategy,
            given.models,
            given.base,
            weights=given.weights,
            ids=ids,
            stats=given.stats,
            beside=given.beside,
            files=given.files,
            roles=given.roles,
            **{**how, **self.params},
        )

    def merge(self, given: Material, order: Sequence[int] | None = None, **how: Any) -> Merged:
        """Merge a material as a caller does, models in some order of arrival."""
        order = range(len(given.models)) if order is None else order
        return merge(
            [given.models[i] for i in order],
            strategy=self.recipe(**how),
            base=given.base,
            weights=[given.weights[i] for i in order],
            roles=[given.roles[i] for i in order],
            stats=[given.stats[i] for i in order] if given.stats else None,
            inputs={**given.beside, **given.files},
        )


@cache
def symmetry_file(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Path:
    """A file with a symmetry of small models, while this process lasts."""
    found = symmetry(dict(shapes))
    path = Path(_scratch().name) / f"{found.digest.hex()}.json"
    path.write_bytes(found.encode())
    return path


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="crdtmerge-symmetry-")


@contextmanager
def installed(strategy: Strategy[Any]) -> Iterator[None]:
    """As if the package of a strategy were installed: the registry knows it meanwhile."""
    known = registry.get

    def get(name: str) -> Strategy[Any]:
        return strategy if name == strategy.name else known(name)

    with mock.patch.object(registry, "get", get):
        yield
