"""Small models, and ways to merge them that lead past the set: a model may come twice, in any order, in any cut.

``merged`` runs a strategy's plan and the engine on state dicts in the order given; ``applied`` calls its plan and its
``apply`` on units cut anywhere.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.numerics.fused import Kernels
from crdtmerge.numerics.reduction import BLOCK
from crdtmerge.numerics.rounding import round_to
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.beside import Opened
from crdtmerge.resolve.blocks import compute_dtype
from crdtmerge.resolve.engine import Work, run
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.merge import Memory
from crdtmerge.resolve.sources import MemorySource, Source
from crdtmerge.resolve.view import TensorView
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit
from tests.numerics.examples import STORED, same, stored

Model = Mapping[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "one": (1,),
    "bias": (37,),
    "weight": (11, 13),
}
"""What a small model holds: no dimension, no element, one element, one dimension, two."""

SEED = b"a seed of thirty-two bytes, say."


def identity(number: int) -> bytes:
    """An id for the model at a position."""
    return hashlib.sha256(f"model {number}".encode()).digest()


def model(
    number: int,
    dtype: str = "F32",
    *,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    around: Model | None = None,
    scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """A model of normal numbers; ``around`` another one, if given."""
    rng = np.random.default_rng(number)
    made = {}
    for name, shape in sorted(shapes.items()):
        x = rng.standard_normal(int(np.prod(shape, dtype=np.int64))) * scale
        if around is not None:
            x = x + around[name].double().reshape(-1).numpy()
        made[name] = stored(x, dtype).reshape(shape)
    return made


def family(k: int, dtype: str = "F32", *, number: int = 100, **how: Any) -> tuple[list[Model], Model]:
    """k models fine-tuned from a base, and the base."""
    base = model(number, dtype, **how)
    return [model(number + 1 + i, dtype, around=base, **(how | {"scale": 0.25})) for i in range(k)], base


def constant(like: Model, value: float = 0.0) -> dict[str, torch.Tensor]:
    """A model of one number."""
    return {name: torch.full_like(x, value) for name, x in like.items()}


def name_of(x: torch.Tensor) -> str:
    """The safetensors name of a tensor's dtype."""
    return next(name for name, dtype in STORED.items() if dtype == x.dtype)


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
) -> Iterator[TensorView]:
    """The view that a plan sees of tensors."""
    with Workers(threads) as workers:
        yield TensorView(merging, workers, stretch=stretch, kernels=Kernels() if use_kernels else None, compute=compute)


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
        roles: Sequence[str] = (),
        **params: Any,
    ) -> None:
        self.strategy = registry.get(strategy) if isinstance(strategy, str) else strategy
        self.params: Filled[Any] = Filled(self.strategy.name, self.strategy.Params, params)
        self.needs: Needs = self.strategy.needs(self.params.general)
        assert base is not None or self.needs.base != "required", "this strategy needs a base"
        meta = metas(weights or [1] * len(models), ids)
        if roles:
            meta = tuple(one._replace(role=role) for one, role in zip(meta, roles, strict=True))
        self.tensors = tensors(models, None if self.needs.base == "unused" else base, meta, out)
        named: dict[Any, dict[str, Source]] = {
            i: {name: MemorySource(stat, f"{name} of model {i}") for name, stat in one.items()}
            for i, one in enumerate(stats)
        }
        others: dict[str, Source] = {name: MemorySource(one, name) for name, one in (beside or {}).items()}
        self.tensors = [Opened(named, others).of(tensor, list(range(len(models)))) for tensor in self.tensors]
        self.rng = Rng(seed)
        self.stretch, self.use_kernels, self.threads = stretch, use_kernels, threads
        self.plan: Plan = EMPTY
        with viewed(
            self.tensors, compute=self.needs.compute, stretch=stretch, use_kernels=use_kernels, threads=threads
        ) as view:
            self.plan = self.strategy.plan(view, self.params.at, self.rng)

    def run(self, *, use_kernels: bool | None = None) -> dict[str, torch.Tensor]:
        """The merged model, by the engine."""
        kernels = self.use_kernels if use_kernels is None else use_kernels
        chosen = Kernels() if kernels else None
        work = Work(self.strategy, self.needs, self.params, self.plan, self.rng, chosen)
        memory = Memory([(t.name, t.out, t.shape) for t in self.tensors])
        with Workers(self.threads) as workers:
            run(work, self.tensors, [], memory, workers, stretch=self.stretch)
        return {name: _viewed(data, dtype.name).reshape(shape) for name, (dtype, shape, data) in memory.tensors.items()}

    def unit(self, tensor: Merging, start: int, stop: int) -> Unit:
        """Any stretch of a tensor, widened by torch itself."""
        compute: DType = compute_dtype(tensor, self.needs.compute)
        read = [_flat(source, tensor)[start:stop].to(STORED[compute.name]) for source in tensor.sources]
        base = _flat(tensor.base, tensor)[start:stop].to(STORED[compute.name]) if tensor.base else None
        compute_as = STORED[compute.name]

        def beside(source: Any) -> torch.Tensor:
            whole = source.entries[tensor.name].shape != tensor.shape
            return _flat(source, tensor)[slice(None) if whole else slice(start, stop)].to(compute_as)

        stats = {name: tuple(map(beside, having)) for name, having in tensor.stats.items()}
        others = {name: beside(source) for name, source in tensor.models.items()}
        return Unit(tensor.name, start, stop, tensor.shape, base, tuple(read), tensor.meta, stats, others)

    def applied(self, ends: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """The merged model by ``apply`` on units that end where it is said (each tensor as a whole by default)."""
        found = {}
        assert not ends or self.needs.unit == "element", "this strategy takes whole tensors"
        for tensor in self.tensors:
            inside = sorted({end for end in ends or () if 0 < end < tensor.elements})
            edges = [0, *inside, tensor.elements]
            parts = []
            for start, stop in itertools.pairwise(edges):
                part = self.strategy.apply(
                    self.unit(tensor, start, stop), self.plan, self.params.at(tensor.name), self.rng
                )
                assert part.shape == (stop - start,)
                parts.append(round_to(part, tensor.out))
            found[tensor.name] = torch.cat(parts).reshape(tensor.shape)
        return found


def _flat(source: Any, tensor: Merging) -> torch.Tensor:
    entry = source.entries[tensor.name]
    data: NDArray[np.uint8] = np.empty(entry.nbytes, np.uint8)
    source.read_into(tensor.name, 0, data)
    return _viewed(data, entry.dtype.name)


def _viewed(data: NDArray[np.uint8], dtype: str) -> torch.Tensor:
    return torch.from_numpy(data).view(STORED[dtype]) if len(data) else torch.empty(0, dtype=STORED[dtype])


def merged(strategy: str | Strategy[Any], models: Sequence[Model], base: Model | None = None, **how: Any) -> Model:
    """The models merged in the order given."""
    return Prepared(strategy, models, base, **how).run()


def copied(one: Mapping[str, torch.Tensor]) -> Model:
    """The tensors of what a merge returned."""
    return {name: one[name].clone() for name in one}


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two models have the same names, dtypes, shapes and bytes."""
    return set(one) == set(other) and all(same(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class Row:
    """One variant of a strategy that all general laws are tried with."""

    strategy: str
    params: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ("1", "0.1", "2.5", "0.75")
    random: bool = False
    stats: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    k: int = 4

    def __str__(self) -> str:
        said = [f"{name}={value}" for name, value in self.params.items()]
        return " ".join([self.strategy, *said])


SIGNED = ("1", "-0.7", "2.5", "0.3")

ROWS = [
    Row("weight_average"),
    Row("linear"),
    Row("linear", {"normalize": False}, SIGNED),
    Row("slerp"),
    Row("slerp", {"space": "task_vectors"}),
    Row("slerp", {"reduce": "fold"}),
    Row("slerp", {"dot_threshold": "0.5"}),
    Row("task_arithmetic"),
    Row("task_arithmetic", {"lambda": "0.3"}, SIGNED),
    Row("ties"),
    Row("ties", {"scope": "tensor", "density": "0.37"}),
    Row("ties", {"density": 1, "elect": "count", "combine": "sum", "lambda": "-0.5"}),
    Row("ties", {"combine": "max", "elect": "count", "lambda": "0.7"}),
    Row("ties", {"density": "0.5", "combine": "sum"}),
    Row("dare", random=True),
    Row("dare", {"density": "0.7", "combine": "mean", "rescale": False}, random=True),
    Row("dare", {"density": "0.3333333333", "lambda": "0.3"}, SIGNED, random=True),
    Row("dare_ties", random=True),
    Row("dare_ties", {"density": "0.7", "elect": "count", "combine": "max", "lambda": "0.3"}, random=True),
    Row("dare_ties", {"density": "0.5", "combine": "sum", "rescale": False}, random=True),
    Row("magmax"),
    Row("magmax", {"lambda": "0.5"}, SIGNED),
]
"""What everything in test_block_invariance and the general laws of test_laws is tried with: strategies with kernels."""

DEEP = tuple(dict.fromkeys(row.strategy for row in ROWS))

EACH = pytest.mark.parametrize("row", ROWS, ids=str)
