"""A source whose tensors come reordered: whole tensors are read, turned in their own dtype, and served in stretches."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.sources import Source
from crdtmerge.strategies.turning import turned
from crdtmerge.symmetry.groups import Permutation, Symmetry
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry

KEPT = 3
"""Reordered tensors of a source that stay in memory, the last that were read from."""


class TurnedSource:
    """Another source, its tensors reordered by one permutation a group of a symmetry."""

    def __init__(
        self, source: Source, symmetry: Symmetry, permutations: Sequence[Permutation], statistic: str | None
    ) -> None:
        self._source, self._symmetry, self._permutations = source, symmetry, permutations
        self._statistic, self._lock = statistic, threading.Lock()
        self._kept: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()

    @property
    def label(self) -> str:
        """That of the other source."""
        return self._source.label

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Those of the other source: reordering changes no shape."""
        return self._source.entries

    @property
    def bytes_read(self) -> int:
        """What the other source read."""
        return self._source.bytes_read

    @property
    def path(self) -> Path | None:
        """Where the other source can be found again."""
        return self._source.path

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """Those of the other source."""
        return self._source.carried()

    def carried_file(self, name: str) -> bytes | None:
        """That of the other source."""
        return self._source.carried_file(name)

    def where(self, name: str) -> str:
        """The file of a tensor."""
        return self._source.where(name)

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with a reordered tensor's bytes from ``offset`` on."""
        if self._symmetry.of_tensor.get(name):
            buffer[:] = self._whole(name)[offset : offset + buffer.nbytes]
        else:
            self._source.read_into(name, offset, buffer)

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Callable[[int], None]) -> dict[str, Facts]:
        """Those of the other source, of its tensors as they are there."""
        return self._source.facts(workers, cache, progress)

    def check_unchanged(self) -> None:
        """As the other source."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Let go of the reordered tensors; the other source is closed by whoever opened it."""
        self._kept.clear()

    def _whole(self, name: str) -> NDArray[np.uint8]:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
            entry = self._source.entries[name]
            stored = np.empty(entry.nbytes, np.uint8)
            self._source.read_into(name, 0, stored)
            x = stored.view(entry.dtype.raw).reshape(entry.shape)
            x = turned(self._symmetry, name, x, entry.shape, self._permutations, self._statistic)
            self._kept[name] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[name]


def turned_tensors(
    tensors: Sequence[Merging], symmetry: Symmetry, permutations: Mapping[bytes, Sequence[Permutation]]
) -> list[Merging]:
    """Tensors whose contributions, with their statistics, are reordered; base and further models are as they were."""
    made: dict[tuple[int, bytes, str | None], TurnedSource] = {}

    def of(source: Source, content: bytes, statistic: str | None = None) -> Source:
        key = id(source), content, statistic
        if key not in made:
            made[key] = TurnedSource(source, symmetry, permutations[content], statistic)
        return made[key]

    def one(tensor: Merging) -> Merging:
        if not symmetry.of_tensor.get(tensor.name):
            return tensor
        ids = [m.id for m in tensor.meta]
        stats = {
            name: tuple(of(source, content, name) for source, content in zip(having, ids, strict=True))
            for name, having in tensor.stats.items()
        }
        sources = tuple(of(source, content) for source, content in zip(tensor.sources, ids, strict=True))
        return replace(tensor, sources=sources, stats=stats)

    return [one(tensor) for tensor in tensors]
