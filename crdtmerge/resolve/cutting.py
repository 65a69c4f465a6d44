"""Where to cut: for each contribution the k-th largest |x - base| of a group of tensors, in a few readings of it.

Decisions are those of ``numerics.selection``; this file reads, counts and asks it. Each reading looks at a range of bit
patterns for every contribution that is not settled yet. The first range is guessed from a sample; a wrong guess costs
a reading and changes nothing. Memory is a histogram a contribution, or the few elements that are left in its range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics import selection
from crdtmerge.numerics.dtypes import DType
from crdtmerge.numerics.fused import Kernels
from crdtmerge.numerics.selection import Cut, Search
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.blocks import Reader, Rows, Span, compute_dtype, quiet_torch, spans, within
from crdtmerge.resolve.fit import Merging
from crdtmerge.strategies.protocol import Unit

if TYPE_CHECKING:
    from torch import Tensor

Counts = NDArray[np.int64]
Units = Callable[[Rows, DType], Unit]
Found = tuple[Counts, Counts]
"""Patterns, and the flat indices at which they were found."""

SPAN_STRETCHES = 16
"""Stretches of one piece of work, whose result is one histogram a contribution. A last reading goes stretch by stretch:
its histograms are small, and the one that holds the cut is read once more to find it."""

SAMPLE_ELEMENTS = 1 << 15
SAMPLE_SPANS = 16, 256
"""Elements of a sample, and the least and most spans they are read in: a few for each tensor of the group."""


class Group:
    """Tensors that share one share of kept elements: the whole model, or one tensor."""

    def __init__(self, tensors: Sequence[Merging], density: Decimal, compute: str) -> None:
        self.tensors = tensors
        self.compute = {tensor.name: compute_dtype(tensor, compute) for tensor in tensors}
        self.wide = any(dtype.name != "F32" for dtype in self.compute.values())
        """Whether patterns are those of float64 values: float32 ones widen exactly and keep their order."""
        self.top = selection.TOP["F64" if self.wide else "F32"]
        self.sizes: dict[int, int] = {}
        for tensor in tensors:
            for member in tensor.members:
                self.sizes[member] = self.sizes.get(member, 0) + tensor.elements
        self._density = density
        self._positions = {tensor.name: t for t, tensor in enumerate(tensors)}

    def kept(self, member: int) -> int:
        """max(1, floor(density * n))."""
        top, bottom = self._density.as_integer_ratio()
        return max(1, top * self.sizes[member] // bottom)

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

    def within(self, tensor: Merging, cut: Cut) -> tuple[int, int]:
        """A cut as ``apply`` of one tensor needs it: (pattern of its compute dtype, last index)."""
        bits, last = cut.bits, cut.index_in(self.position(tensor))
        narrow = self.wide and self.compute[tensor.name].name == "F32"
        return selection.in_float32(bits, last) if narrow else (bits, last)


@dataclass
class Evidence:
    """What one reading found for one contribution: counts (of each span in a last pass, else in all), or elements."""

    search: Search
    spans: list[Span] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    elements: list[Found] = field(default_factory=list)

    def add(self, span: Span, result: Counts | Found) -> None:
        """Take the result of a span."""
        self.spans.append(span)
        if isinstance(result, tuple):
            self.elements.append(result)
        elif self.search.last or not self.counts:
            self.counts.append(result)
        else:
            self.counts[0] += result


class Cutter:
    """Finds the cuts of a group."""

    def __init__(self, group: Group, workers: Workers, stretch: int, kernels: Kernels | None, units: Units) -> None:
        self._group, self._workers, self._stretch = group, workers, stretch
        self._kernels, self._units = kernels, units
        self._reader = Reader()

    def cuts(self) -> dict[str, list[tuple[int, int]]]:
        """For each tensor, the cut of each contribution that has it."""
        group = self._group
        found = {member: Cut(group.top, -1, -1) for member, size in group.sizes.items() if not size}
        searches = self._first()
        while searches:
            for member, evidence in self._read(searches).items():
                answer = self._conclude(member, evidence)
                if isinstance(answer, Cut):
                    found[member] = answer
                    del searches[member]
                else:
                    searches[member] = answer
        return {tensor.name: [group.within(tensor, found[m]) for m in tensor.members] for tensor in group.tensors}

    # ------------------------------------------------------------ decisions

    def _first(self) -> dict[int, Search]:
        """A search for each contribution, in a guessed range where there is too much to collect at once."""
        group = self._group
        searches = {
            member: Search(group.kept(member), group.top, 0, group.top, 0, size)
            for member, size in group.sizes.items()
            if size
        }
        if all(search.collects for search in searches.values()):
            return searches
        samples = self._samples()
        return {
            member: search
            if search.collects or not len(samples[member])
            else search.guess(*selection.guess(samples[member], search.k / group.sizes[member]))
            for member, search in searches.items()
        }

    def _conclude(self, member: int, evidence: Evidence) -> Cut | Search:
        """What a reading says of one contribution: its cut, or where to look next."""
        search = evidence.search
        if search.collects:
            return self._cut_among(evidence)
        answer = search.found(evidence.counts) if search.last else None
        if answer is None:
            return search.narrow(np.sum(evidence.counts, axis=0))
        bits, at, rank = answer
        only = Search(1, self._group.top, bits, bits + 1, 0)
        _, indices = self._collect_span(evidence.spans[at], {member: only})[member]
        return Cut(bits, self._group.position(evidence.spans[at].tensor), int(indices[rank - 1]))

    def _cut_among(self, evidence: Evidence) -> Cut:
        """The cut among collected elements: by pattern from the top, then by position."""
        search, spans_ = evidence.search, evidence.spans
        assert search.above is not None, "elements are collected only from a range that was counted"
        bits = np.concatenate([found[0] for found in evidence.elements])
        index = np.concatenate([found[1] for found in evidence.elements])
        tensor = np.repeat(
            [self._group.position(span.tensor) for span in spans_], [len(found[0]) for found in evidence.elements]
        )
        chosen = np.lexsort((index, tensor, -bits))[search.k - search.above - 1]
        return Cut(int(bits[chosen]), int(tensor[chosen]), int(index[chosen]))

    # ------------------------------------------------------------ reading

    def _samples(self) -> dict[int, Counts]:
        """Patterns of each contribution from short spans."""
        found: dict[int, list[Counts]] = {member: [np.empty(0, np.int64)] for member in self._group.sizes}
        everything = Search.over(1, self._group.top)
        for span in self._group.sample():
            taken = self._collect_span(span, dict.fromkeys(span.tensor.members, everything))
            for member, (bits, _) in taken.items():
                found[member].append(bits)
        return {member: np.concatenate(parts) for member, parts in found.items()}

    def _read(self, searches: Mapping[int, Search]) -> dict[int, Evidence]:
        """One reading of the group, for all searches at once."""
        evidence = {member: Evidence(search) for member, search in searches.items()}
        stretches = 1 if any(search.last for search in searches.values()) else SPAN_STRETCHES
        pieces = (span for tensor in self._group.tensors for span in spans(tensor, stretches * self._stretch))
        for span, looked in self._workers.map(partial(self._look, dict(searches)), pieces):
            for member, result in looked.items():
                evidence[member].add(span, result)
        return evidence

    def _look(self, searches: dict[int, Search], span: Span) -> tuple[Span, dict[int, Counts | Found]]:
        own = {member: searches[member] for member in span.tensor.members if member in searches}
        collecting = {member: search for member, search in own.items() if search.collects}
        counting = {member: search for member, search in own.items() if not search.collects}
        return span, {**self._collect_span(span, collecting), **self._count_span(span, counting)}

    def _count_span(self, span: Span, searches: Mapping[int, Search]) -> dict[int, Counts]:
        counts = {member: np.zeros(search.steps + 1, np.int64) for member, search in searches.items()}
        for stretch in within(span, self._stretch) if searches else ():
            rows = self._reader.read(stretch)
            for member, search in searches.items():
                self._count(rows, span.tensor.members.index(member), search, counts[member])
        return counts

    def _collect_span(self, span: Span, searches: Mapping[int, Search]) -> dict[int, Found]:
        parts: dict[int, list[Found]] = {member: [] for member in searches}
        for stretch in within(span, self._stretch) if searches else ():
            rows = self._reader.read(stretch)
            for member, search in searches.items():
                bits, at = self._collect(rows, span.tensor.members.index(member), search)
                parts[member].append((bits, at + stretch.start))
        return {
            member: (np.concatenate([bits for bits, _ in found]), np.concatenate([at for _, at in found]))
            for member, found in parts.items()
        }

    def _count(self, rows: Rows, i: int, search: Search, counts: Counts) -> None:
        dtype, base, counted = rows.span.tensor.dtype, rows.base, False
        if self._kernels and dtype and base is not None:
            counted = self._kernels.count(rows.xs[i], base, search, dtype, self._group.wide, counts)
        if not counted:
            counts += selection.count(self._tau(rows, i), search)

    def _collect(self, rows: Rows, i: int, search: Search) -> Found:
        dtype, base, found = rows.span.tensor.dtype, rows.base, None
        if self._kernels and dtype and base is not None:
            found = self._kernels.collect(rows.xs[i], base, search, dtype, self._group.wide)
        return selection.collect(self._tau(rows, i), search) if found is None else found

    def _tau(self, rows: Rows, i: int) -> Tensor:
        """The task vector of one contribution, as float64 where patterns are wide."""
        quiet_torch()
        u = self._units(rows, self._group.compute[rows.span.tensor.name])
        assert u.base is not None, "cuts are of task vectors"
        tau = u.xs[i] - u.base
        return tau.double() if self._group.wide else tau
