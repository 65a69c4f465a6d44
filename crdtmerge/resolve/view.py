"""The whole input of a merge as strategies' plans see it: lazy, read in stretches, reduced in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics import fused, reduction, selection
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.numerics.selection import Cut, Search
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.blocks import Reader, Rows, Span, compute_dtype, quiet_torch, spans, unit, within
from crdtmerge.resolve.fit import Merging
from crdtmerge.strategies.protocol import Meta, Unit

Scanned = TypeVar("Scanned")
Counts = NDArray[np.int64]
Found = tuple[Counts, Counts]

PASS_STRETCHES = 16
"""Stretches of one piece of work in a pass that counts: its result is one histogram."""

SAMPLE_ELEMENTS = 1 << 15
SAMPLE_SPANS = 16, 256
"""Elements of a sample, and the least and most spans they are read in: a few for each tensor of the group."""


class TensorView:
    """The view over files and state dicts; see ``strategies.protocol.View``."""

    def __init__(
        self,
        tensors: Sequence[Merging],
        workers: Workers,
        *,
        stretch: int,
        use_kernels: bool,
        compute: str,
        device: str = "cpu",
        canonical_nan: bool = False,
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.names = sorted(self._tensors)
        self._workers, self._stretch, self._use_kernels = workers, stretch, use_kernels
        self._compute, self._device, self._canonical_nan = compute, device, canonical_nan
        self._reader = Reader()

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
            return span.tensor.name, work(self._unit(self._reader.read(span)))

        return self._workers.map(one, self._spans(self.names, 1))

    def _unit(self, rows: Rows) -> Unit:
        dtype = compute_dtype(rows.span.tensor, self._compute)
        return unit(rows, dtype, self._device, self._canonical_nan)

    def _spans(self, names: Sequence[str], stretches: int) -> Iterator[Span]:
        for name in names:
            yield from spans(self._tensors[name], stretches * self._stretch)

    # ------------------------------------------------------------ dot products

    def gram(self, names: Sequence[str], *, task_vectors: bool = False) -> Mapping[str, NDArray[np.float64]]:
        """For each named tensor, the k x k matrix of dot products of its contributions (or of their task vectors)."""
        sums: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
        work = partial(self._gram_sums, task_vectors=task_vectors)
        for name, part in self._workers.map(work, self._spans(list(names), 1)):
            sums[name].append(part)
        return {name: _matrix(np.concatenate(parts, axis=1), len(self.meta(name))) for name, parts in sums.items()}

    def _gram_sums(self, span: Span, *, task_vectors: bool) -> tuple[str, NDArray[np.float64]]:
        rows = self._reader.read(span)
        tensor, part = span.tensor, None
        if self._use_kernels and tensor.dtype and rows.stack is not None:
            part = fused.gram(rows.stack, rows.base if task_vectors else None, tensor.dtype)
        if part is None:
            quiet_torch()
            u = unit(rows, DTYPES["F64"], self._device, self._canonical_nan)
            part = reduction.gram_block_sums(u.task_vectors() if task_vectors else u.xs).cpu().numpy()
        return tensor.name, part

    # ------------------------------------------------------------ selection

    def cuts(self, density: Callable[[str], Decimal], *, whole_model: bool) -> Mapping[str, list[tuple[int, int]]]:
        """For each tensor and contribution, the cut that keeps the max(1, floor(density * n)) largest |x - base|."""
        groups = [self.names] if whole_model else [[name] for name in self.names]
        found: dict[str, list[tuple[int, int]]] = {}
        for names in groups:
            group = _Group([self._tensors[name] for name in names], density(names[0]), self._compute)
            found |= self._group_cuts(group)
        return found

    def _group_cuts(self, group: _Group) -> dict[str, list[tuple[int, int]]]:
        searches = self._first_searches(group)
        cuts: dict[int, Cut] = {member: Cut(group.top, -1, -1) for member in group.sizes if member not in searches}
        while searches:
            for member, search, parts in self._pass(group, searches):
                answer = self._conclude(group, member, search, parts)
                if isinstance(answer, Cut):
                    cuts[member] = answer
                    del searches[member]
                else:
                    searches[member] = answer
        return {
            tensor.name: [group.cut_in(t, tensor, cuts[member]) for member in tensor.members]
            for t, tensor in enumerate(group.tensors)
        }

    def _first_searches(self, group: _Group) -> dict[int, Search]:
        """A search for each contribution, in a range guessed from a sample where all of it is too much to collect."""
        searches = {
            member: Search(group.kept(size), group.top, 0, group.top, 0, size)
            for member, size in group.sizes.items()
            if size
        }
        samples = self._samples(group) if any(not search.collects for search in searches.values()) else {}
        for member, search in searches.items():
            if not search.collects and len(samples[member]):
                searches[member] = search.guess(*selection.guess(samples[member], search.k / group.sizes[member]))
        return searches

    def _samples(self, group: _Group) -> dict[int, Counts]:
        """Patterns of each contribution from short spans, evenly over the group."""
        found: dict[int, list[Counts]] = {member: [] for member in group.sizes}
        everything = Search.over(1, group.top)
        for span in group.sample():
            for member, (bits, _) in self._collected(
                group, span, dict.fromkeys(span.tensor.members, everything)
            ).items():
                found[member].append(bits)
        return {member: np.concatenate(parts) if parts else np.empty(0, np.int64) for member, parts in found.items()}

    def _pass(
        self, group: _Group, searches: Mapping[int, Search]
    ) -> list[tuple[int, Search, list[tuple[Span, Counts | Found]]]]:
        """One reading of the group: for each search its counts (added up unless it is a last pass) or what is left."""
        results: dict[int, list[tuple[Span, Counts | Found]]] = {member: [] for member in searches}
        work = partial(self._look, group, dict(searches))
        for span, looked in self._workers.map(work, self._spans([t.name for t in group.tensors], PASS_STRETCHES)):
            for member, result in looked.items():
                parts, search = results[member], searches[member]
                if parts and not search.collects and not search.last:
                    parts[0][1].__iadd__(result)  # type: ignore[union-attr]
                else:
                    parts.append((span, result))
        return [(member, searches[member], parts) for member, parts in results.items()]

    def _look(self, group: _Group, searches: dict[int, Search], span: Span) -> tuple[Span, dict[int, Counts | Found]]:
        own = {member: searches[member] for member in span.tensor.members if member in searches}
        collecting = {member: search for member, search in own.items() if search.collects}
        counting = {member: search for member, search in own.items() if not search.collects}
        looked: dict[int, Counts | Found] = {}
        if collecting:
            looked |= self._collected(group, span, collecting)
        if counting:
            looked |= self._counted(group, span, counting)
        return span, looked

    def _counted(self, group: _Group, span: Span, searches: Mapping[int, Search]) -> dict[int, Counts]:
        counts = {member: np.zeros(search.steps + 1, np.int64) for member, search in searches.items()}
        for stretch in within(span, self._stretch):
            rows = self._reader.read(stretch)
            for member, search in searches.items():
                self._count(group, rows, span.tensor.members.index(member), search, counts[member])
        return counts

    def _count(self, group: _Group, rows: Rows, i: int, search: Search, counts: Counts) -> None:
        dtype = rows.span.tensor.dtype
        if self._use_kernels and dtype and rows.base is not None:
            if fused.count(rows.xs[i], rows.base, search, dtype, group.wide, counts):
                return
        counts += selection.count(self._tau(group, rows, i), search)

    def _collected(self, group: _Group, span: Span, searches: Mapping[int, Search]) -> dict[int, Found]:
        """Patterns within each search's range, and their flat indices."""
        parts: dict[int, list[Found]] = {member: [] for member in searches}
        for stretch in within(span, self._stretch):
            rows = self._reader.read(stretch)
            for member, search in searches.items():
                bits, at = self._collect(group, rows, span.tensor.members.index(member), search)
                parts[member].append((bits, at + stretch.start))
        return {
            member: (np.concatenate([bits for bits, _ in found]), np.concatenate([at for _, at in found]))
            for member, found in parts.items()
        }

    def _collect(self, group: _Group, rows: Rows, i: int, search: Search) -> Found:
        dtype, found = rows.span.tensor.dtype, None
        if self._use_kernels and dtype and rows.base is not None:
            found = fused.collect(rows.xs[i], rows.base, search, dtype, group.wide)
        return selection.collect(self._tau(group, rows, i), search) if found is None else found

    def _tau(self, group: _Group, rows: Rows, i: int):  # type: ignore[no-untyped-def]
        quiet_torch()
        u = self._unit(rows)
        assert u.base is not None, "cuts are of task vectors"
        tau = u.xs[i] - u.base
        return tau.double() if group.wide else tau

    def _conclude(
        self, group: _Group, member: int, search: Search, parts: list[tuple[Span, Counts | Found]]
    ) -> Cut | Search:
        """What a pass says of one contribution: its cut, or where to look next."""
        if search.collects:
            return group.cut_of(search, [(span, found) for span, found in parts if isinstance(found, tuple)])
        counts = [count for _, count in parts if not isinstance(count, tuple)]
        answer = search.found(counts) if search.last else None
        if answer is None:
            return search.narrow(np.sum(counts, axis=0))
        bits, stretch, rank = answer
        span = parts[stretch][0]
        only = Search(1, group.top, bits, bits + 1, 0)
        _, at = self._collected(group, span, {member: only})[member]
        return Cut(bits, group.position(span.tensor), int(at[rank - 1]))


class _Group:
    """Tensors that share one share of kept elements: the whole model, or one tensor."""

    def __init__(self, tensors: Sequence[Merging], density: Decimal, compute: str) -> None:
        self.tensors = tensors
        self._positions = {tensor.name: t for t, tensor in enumerate(tensors)}
        self._density = density
        types = {compute_dtype(tensor, compute).name for tensor in tensors}
        self.wide = types != {"F32"}
        """Whether patterns are those of float64 values: float32 ones widen exactly and keep their order."""
        self._own_type = {tensor.name: compute_dtype(tensor, compute).name for tensor in tensors}
        self.top = selection.TOP["F64" if self.wide else "F32"]
        self.sizes: dict[int, int] = {}
        for tensor in tensors:
            for member in tensor.members:
                self.sizes[member] = self.sizes.get(member, 0) + tensor.elements

    def kept(self, size: int) -> int:
        """max(1, floor(density * n))."""
        top, bottom = self._density.as_integer_ratio()
        return max(1, top * size // bottom)

    def position(self, tensor: Merging) -> int:
        """The place of a tensor in the group's order."""
        return self._positions[tensor.name]

    def sample(self) -> Iterator[Span]:
        """Short spans, evenly over all elements of the group."""
        ends = np.cumsum([tensor.elements for tensor in self.tensors])
        count = int(np.clip(4 * len(self.tensors), *SAMPLE_SPANS))
        for at in np.linspace(0, int(ends[-1]), count, endpoint=False).astype(np.int64):
            t = int(np.searchsorted(ends, at, side="right"))
            tensor = self.tensors[t]
            start = int(at) - int(ends[t]) + tensor.elements
            yield Span(tensor, start, min(start + SAMPLE_ELEMENTS // count, tensor.elements))

    def cut_of(self, search: Search, parts: list[tuple[Span, Found]]) -> Cut | Search:
        """The cut among collected elements; the next search if the range was a wrong guess."""
        bits = np.concatenate([found[0] for _, found in parts])
        tensor = np.concatenate([np.full(len(found[0]), self.position(span.tensor)) for span, found in parts])
        at = np.concatenate([found[1] for _, found in parts])
        assert search.above is not None, "elements are collected only from a range that was counted"
        rank = search.k - search.above - 1
        chosen = np.lexsort((at, tensor, -bits))[rank]
        return Cut(int(bits[chosen]), int(tensor[chosen]), int(at[chosen]))

    def cut_in(self, position: int, tensor: Merging, cut: Cut) -> tuple[int, int]:
        """A cut as one tensor's ``apply`` needs it: (pattern of its compute dtype, last index)."""
        bits, last = cut.bits, cut.index_in(position)
        return selection.in_float32(bits, last) if self.wide and self._own_type[tensor.name] == "F32" else (bits, last)


def _matrix(sums: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Block sums of all pairs, folded into a symmetric matrix."""
    matrix = np.zeros((k, k))
    for row, (i, j) in zip(sums, reduction.pairs(k), strict=True):
        matrix[i, j] = matrix[j, i] = reduction.fold(row)
    return matrix
