"""A strategy with all that it needs, run past the set: a model may come twice, in any order, in any cut.

``run`` is the engine; ``applied`` calls ``apply`` itself on units that end anywhere, widened by torch alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.numerics.fused import Kernels
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.reduction import BLOCK
from crdtmerge.numerics.rounding import round_to, torch_dtype
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.blocks import compute_dtype
from crdtmerge.resolve.engine import Work, run
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.memory import Memory
from crdtmerge.resolve.merging import combined
from crdtmerge.resolve.sources import MemorySource, Source
from crdtmerge.resolve.view import TensorView
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit
from crdtmerge.testing.models import Model, identity

if TYPE_CHECKING:
    from torch import Tensor

SEED = b"a seed of thirty-two bytes, say."


def metas(weights: Sequence[object], ids: Sequence[bytes] | None = None) -> tuple[Meta, ...]:
    """What is said of models, by position."""
    named = ids or [identity(i) for i in range(len(weights))]
    return tuple(Meta(one, Decimal(str(w))) for one, w in zip(named, weights, strict=True))


def tensors(
    models: Sequence[Model], base: Model | None, meta: tuple[Meta, ...], out: str | None = None
) -> list[Merging]:
    """The tensors of models, ready to be merged in the order given. A model may lack some."""
    sources = [MemorySource(one, f"model {i}") for i, one in enumerate(models)]
    origin = MemorySource(base, "base") if base is not None else None
    found = []
    for name in sorted(set().union(*models)):
        members = tuple(i for i, one in enumerate(models) if name in one)
        first = sources[members[0]].entries[name]
        entries = [sources[i].entries[name] for i in members] + ([origin.entries[name]] if origin else [])
        dtypes = tuple(entry.dtype for entry in entries)
        result = DTYPES[out] if out else first.dtype
        xs, said = tuple(sources[i] for i in members), tuple(meta[i] for i in members)
        found.append(Merging(name, first.shape, first.elements, xs, members, said, origin, dtypes, result))
    return found


@contextmanager
def viewed(
    merging: Sequence[Merging],
    *,
    compute: str = "storage",
    stretch: int = BLOCK,
    use_kernels: bool = False,
    threads: int = 1,
    files: Mapping[str, Path] | None = None,
) -> Iterator[TensorView]:
    """The view that a plan sees of tensors."""
    kernels = Kernels() if use_kernels else None
    with Workers(threads) as workers:
        view = TensorView(merging, workers, stretch=stretch, kernels=kernels, compute=compute, files=files)
        with closing(view):
            yield view


class Prepared:
    """A strategy with its parameters and the tensors it is to merge, and its plan."""

    def __init__(
        self,
        strategy: str | Strategy[Any],
        models: Sequence[Model],
        base: Model | None = None,
        *,
        weights: Sequence[object] | None = None,
        ids: Sequence[bytes] | None = None,
        seed: bytes = SEED,
        out: str | None = None,
        stretch: int = BLOCK,
        use_kernels: bool = False,
        threads: int = 1,
        stats: Sequence[Mapping[str, Model]] = (),
        beside: Mapping[str, Model] | None = None,
        files: Mapping[str, Path] | None = None,
        roles: Sequence[str] = (),
        tasks: Sequence[str] = (),
        **params: Any,
    ) -> None:
        self.strategy = registry.get(strategy) if isinstance(strategy, str) else strategy
        self.params: Filled[Any] = Filled(self.strategy.name, self.strategy.Params, params)
        self.needs: Needs = combined([self.strategy.needs(p) for p in self.params.variants()])
        assert base is not None or self.needs.base != "required", "this strategy needs a base"
        meta = metas(weights or [1] * len(models), ids)
        if roles:
            meta = tuple(one._replace(role=role) for one, role in zip(meta, roles, strict=True))
        if tasks:
            meta = tuple(one._replace(task=task) for one, task in zip(meta, tasks, strict=True))
        merging = tensors(models, None if self.needs.base == "unused" else base, meta, out)
        others: dict[str, Source] = {name: MemorySource(one, name) for name, one in (beside or {}).items()}
        named = [
            {name: MemorySource(stat, f"{name} of model {i}") for name, stat in one.items()}
            for i, one in enumerate(stats)
        ]
        self.tensors = [replace(tensor, stats=_having(tensor, named), models=others) for tensor in merging]
        self.rng = Rng(seed)
        self.stretch, self.use_kernels, self.threads = stretch, use_kernels, threads
        self._files = files
        self.plan: Plan = EMPTY
        self.plan = self.planned()

    def planned(self) -> Plan:
        """The plan, made anew."""
        with viewed(
            self.tensors,
            compute=self.needs.compute,
            stretch=self.stretch,
            use_kernels=self.use_kernels,
            threads=self.threads,
            files=self._files,
        ) as view:
            return self.strategy.plan(view, self.params.at, self.rng)

    def run(self, *, use_kernels: bool | None = None) -> dict[str, Tensor]:
        """The merged model, by the engine."""
        kernels = self.use_kernels if use_kernels is None else use_kernels
        chosen = Kernels() if kernels else None
        work = Work(self.strategy, self.needs, self.params, self.plan, self.rng, chosen)
        memory = Memory([(t.name, t.out, t.shape) for t in self.tensors])
        with Workers(self.threads) as workers:
            run(work, self.tensors, [], memory, workers, stretch=self.stretch)
        return {name: _viewed(data, dtype).reshape(shape) for name, (dtype, shape, data) in memory.tensors.items()}

    def unit(self, tensor: Merging, start: int, stop: int) -> Unit:
        """Any stretch of a tensor, widened by torch itself."""
        compute = torch_dtype(compute_dtype(tensor, self.needs.compute))
        read = [_flat(source, tensor)[start:stop].to(compute) for source in tensor.sources]
        base = _flat(tensor.base, tensor)[start:stop].to(compute) if tensor.base else None

        def beside(source: Any) -> Tensor:
            whole = source.entries[tensor.name].shape != tensor.shape
            return _flat(source, tensor)[slice(None) if whole else slice(start, stop)].to(compute)

        stats = {name: tuple(map(beside, having)) for name, having in tensor.stats.items()}
        others = {name: beside(source) for name, source in tensor.models.items()}
        return Unit(tensor.name, start, stop, tensor.shape, base, tuple(read), tensor.meta, stats, others)

    def apply(self, tensor: Merging, unit: Unit) -> Tensor:
        """What ``apply`` gives for a unit, in the compute dtype."""
        part = self.strategy.apply(unit, self.plan, self.params.at(tensor.name), self.rng)
        wanted = torch_dtype(compute_dtype(tensor, self.needs.compute))
        assert part.shape == (unit.stop - unit.start,), (
            f"apply returned shape {list(part.shape)} for {unit.stop - unit.start} elements of {tensor.name}"
        )
        assert part.dtype == wanted, f"apply returned {part.dtype} for {tensor.name}; its units are {wanted}"
        return part

    def applied(self, ends: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The merged model by ``apply`` on units that end where it is said (each tensor as a whole by default)."""
        found = {}
        assert not ends or self.needs.unit == "element", "this strategy takes whole tensors"
        for tensor in self.tensors:
            inside = sorted({end for end in ends or () if 0 < end < tensor.elements})
            edges = [0, *inside, tensor.elements]
            parts = [
                round_to(self.apply(tensor, self.unit(tensor, start, stop)), tensor.out)
                for start, stop in itertools.pairwise(edges)
            ]
            found[tensor.name] = torch.cat(parts).reshape(tensor.shape)
        return found


def _having(tensor: Merging, stats: Sequence[Mapping[str, Source]]) -> dict[str, tuple[Source, ...]]:
    """The statistics of a tensor's contributions, by name, where there are any."""
    members = [stats[i] for i in tensor.members] if stats else []
    names = sorted(set().union(*members))
    found = {name: [one[name] for one in members if tensor.name in one[name].entries] for name in names}
    return {name: tuple(having) for name, having in found.items() if having}


def _flat(source: Any, tensor: Merging) -> Tensor:
    entry = source.entries[tensor.name]
    data: NDArray[np.uint8] = np.empty(entry.nbytes, np.uint8)
    source.read_into(tensor.name, 0, data)
    return _viewed(data, entry.dtype)


def _viewed(data: NDArray[np.uint8], dtype: DType) -> Tensor:
    kind = torch_dtype(dtype)
    found: Tensor = torch.from_numpy(data).view(kind) if len(data) else torch.empty(0, dtype=kind)
    return found


def merged(strategy: str | Strategy[Any], models: Sequence[Model], base: Model | None = None, **how: Any) -> Model:
    """The models merged in the order given."""
    return Prepared(strategy, models, base, **how).run()
