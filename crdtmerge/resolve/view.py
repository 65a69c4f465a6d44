"""The whole input of a merge as strategies' plans see it: lazy, read in stretches, reduced in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics import reduction
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.numerics.fused import Kernels
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.blocks import Reader, Rows, Span, compute_dtype, quiet_torch, spans, unit
from crdtmerge.resolve.cutting import Cutter, Group
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.inner import NOTHING_RUNS, Inside, Programs, Running
from crdtmerge.resolve.turned import turned_tensors
from crdtmerge.strategies.protocol import Inner, InputFile, Meta, Plan, Ran, Rng, Unit
from crdtmerge.symmetry.groups import Permutation, Symmetry

if TYPE_CHECKING:
    from torch import Tensor

Scanned = TypeVar("Scanned")


class TensorView:
    """The view over files and state dicts; see ``strategies.protocol.View``."""

    def __init__(
        self,
        tensors: Sequence[Merging],
        workers: Workers,
        *,
        stretch: int,
        kernels: Kernels | None,
        compute: str,
        device: str = "cpu",
        canonical_nan: bool = False,
        files: Mapping[str, Path] | None = None,
        carried: Mapping[str, InputFile] | None = None,
        models: Running = NOTHING_RUNS,
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.names = sorted(self._tensors)
        self._workers, self._stretch, self._kernels = workers, stretch, kernels
        self._compute, self.device, self._canonical_nan = compute, device, canonical_nan
        self._reader, self._files, self._carried = Reader(), files or {}, carried or {}
        self._programs = Programs(list(tensors), self, models, files or {})

    def meta(self, name: str) -> tuple[Meta, ...]:
        """The contributions that have a tensor, in canonical order."""
        return self._tensors[name].meta

    def elements(self, name: str) -> int:
        """How many elements a tensor has."""
        return self._tensors[name].elements

    def scan(self, work: Callable[[Unit], Scanned]) -> Iterator[tuple[str, Scanned]]:
        """``work`` of every unit, in canonical order."""

        def one(span: Span) -> tuple[str, Scanned]:
            quiet_torch()
            return span.tensor.name, work(
                self._unit(self._reader.read(span), compute_dtype(span.tensor, self._compute))
            )

        return self._workers.map(one, self._spans(self.names))

    def whole(self, name: str) -> Unit:
        """A tensor as one unit."""
        quiet_torch()
        tensor = self._tensors[name]
        return self._unit(self._reader.read(Span(tensor, 0, tensor.elements)), compute_dtype(tensor, self._compute))

    def input(self, name: str, bytes_max: int) -> InputFile:
        """A file that the recipe names, given or carried by a model; of a longer one ``bytes_max`` + 1 bytes."""
        if name in self._carried:
            return self._carried[name]
        path = self._files[name]
        with path.open("rb") as file:
            return InputFile(file.read(bytes_max + 1), str(path))

    def run(
        self,
        job: str,
        params: Mapping[str, Any],
        groups: Callable[[Unit], Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
        rng: Rng,
        models: Mapping[str, Inner] | None = None,
    ) -> Ran:
        """Run a job on the inputs ``program`` and ``data``, in a process of its own."""
        return self._programs.run(job, params, groups, rng, models or {})

    def planned(self, inner: Inner, rng: Rng) -> Plan:
        """The plan of a merge inside this one."""
        return self._programs.inside(inner, rng).plan

    def score(self, metric: str, inner: Inner, rng: Rng, done: tuple[int, int]) -> float:
        """How good an inner merge is."""
        return self._programs.score(metric, inner, rng, done)

    def merged(self, one: Inside) -> dict[str, Tensor]:
        """The tensors of a merge inside the plan."""
        return one.merged(self._workers, self._kernels, self._stretch)

    def over(self, tensors: Sequence[Merging], compute: str) -> TensorView:
        """The same view over other tensors, in another arithmetic, without programs."""
        return TensorView(
            tensors,
            self._workers,
            stretch=self._stretch,
            kernels=self._kernels,
            compute=compute,
            device=self.device,
            canonical_nan=self._canonical_nan,
            files=self._files,
            carried=self._carried,
        )

    def turned(self, symmetry: Symmetry, permutations: Mapping[bytes, Sequence[Permutation]]) -> TensorView:
        """The same view with the contributions' units reordered, without programs."""
        return self.over(turned_tensors(list(self._tensors.values()), symmetry, permutations), self._compute)

    def close(self) -> None:
        """End the process that ran programs, if there is one."""
        self._programs.close()

    def _unit(self, rows: Rows, dtype: DType) -> Unit:
        return unit(rows, dtype, self.device, self._canonical_nan)

    def _spans(self, names: Sequence[str]) -> Iterator[Span]:
        for name in names:
            yield from spans(self._tensors[name], self._stretch)

    def gram(self, names: Sequence[str], *, task_vectors: bool = False) -> Mapping[str, NDArray[np.float64]]:
        """For each named tensor, the k x k matrix of dot products of its contributions (or of their task vectors)."""
        sums: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
        work = partial(self._gram_sums, task_vectors=task_vectors)
        for name, part in self._workers.map(work, self._spans(names)):
            sums[name].append(part)
        return {name: _matrix(np.concatenate(parts, axis=1), len(self.meta(name))) for name, parts in sums.items()}

    def _gram_sums(self, span: Span, *, task_vectors: bool) -> tuple[str, NDArray[np.float64]]:
        rows = self._reader.read(span)
        tensor, part = span.tensor, None
        if self._kernels and tensor.dtype and rows.stack is not None:
            part = self._kernels.gram(rows.stack, rows.base if task_vectors else None, tensor.dtype)
        if part is None:
            quiet_torch()
            u = self._unit(rows, DTYPES["F64"])
            part = reduction.gram_block_sums(u.task_vectors() if task_vectors else u.xs).cpu().numpy()
        return tensor.name, part

    def cuts(self, density: Callable[[str], Decimal], *, whole_model: bool) -> Mapping[str, list[tuple[int, int]]]:
        """For each tensor and contribution, the cut that keeps the max(1, floor(density * n)) largest |x - base|."""
        groups = [self.names] if whole_model else [[name] for name in self.names]
        found: dict[str, list[tuple[int, int]]] = {}
        for names in groups:
            group = Group([self._tensors[name] for name in names], density(names[0]), self._compute)
            found |= Cutter(group, self._workers, self._stretch, self._kernels, self._unit).cuts()
        return found


def _matrix(sums: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Block sums of all pairs, folded into a symmetric matrix."""
    matrix = np.zeros((k, k))
    for row, (i, j) in zip(sums, reduction.pairs(k), strict=True):
        matrix[i, j] = matrix[j, i] = reduction.fold(row)
    return matrix
