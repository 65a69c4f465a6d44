"""Exact k-th magnitude of a stream, by counting bit patterns: which elements are the k largest, ties by lowest index.

The magnitudes of IEEE numbers are ordered like their bit patterns read as integers. The search holds a half-open
range of patterns in which the k-th largest lies, counts the patterns of the stream in equal steps of that range,
and goes on in the step that holds it, until the range is small enough to name the element. Counting is integer
addition, so blocks, threads and order cannot matter; the first range may come from a sample, which decides how
many passes are needed and nothing else.

The answer is a ``Cut``: an element is kept if its pattern is above ``bits``, or equal to it at a position that does
not come after ``(tensor, index)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 1 << 14
"""Steps into which a range is counted in one pass."""

ROWS_STEPS = 256
"""A last pass over a range of at most this many patterns keeps the counts of every stretch, to find the tie."""

COLLECT_MAX = 1 << 16
"""When no more elements than this are left in the range, a pass collects them instead of counting."""


class Cut(NamedTuple):
    """Where the k largest end: the pattern of the k-th, and where the last element lies that has it and is kept."""

    bits: int
    tensor: int
    at: int

    def index_in(self, tensor: int) -> int:
        """The last index of a tensor at which the k-th pattern itself is kept; -1 for none."""
        return self.at if tensor == self.tensor else (1 << 62 if tensor < self.tensor else -1)


@dataclass(frozen=True)
class Search:
    """The k-th largest of the stream is the ``k - above``-th largest of the patterns in [lo, hi).

    ``above`` counts the patterns from ``hi`` on; it is None while the range is a guess.
    """

    k: int
    top: int
    lo: int
    hi: int
    above: int | None
    inside: int | None = None

    @classmethod
    def over(cls, k: int, top: int) -> Search:
        """A search over all patterns below ``top``."""
        return cls(k, top, 0, top, 0)

    def guess(self, lo: int, hi: int) -> Search:
        """The same search in a range that is only likely to be the right one."""
        return replace(self, lo=max(self.lo, lo), hi=min(self.hi, hi), above=None)

    @property
    def shift(self) -> int:
        """The step is 2^shift patterns."""
        return max(0, (self.hi - self.lo - 1).bit_length() - STEPS.bit_length() + 1)

    @property
    def steps(self) -> int:
        """Steps of the range; a count has one slot more, for the patterns above it."""
        return ((self.hi - self.lo - 1) >> self.shift) + 1

    @property
    def last(self) -> bool:
        """Whether a count of this range names the pattern, so that the counts of all stretches are worth keeping."""
        return self.hi - self.lo <= ROWS_STEPS

    @property
    def collects(self) -> bool:
        """Whether so few elements are left that they can be collected."""
        return self.inside is not None and self.inside <= COLLECT_MAX

    def narrow(self, counts: NDArray[np.int64]) -> Search:
        """The search after a pass that found ``counts[s]`` patterns in step s and ``counts[-1]`` above the range."""
        above, inside = int(counts[-1]), int(counts[:-1].sum())
        if above >= self.k:
            return Search(self.k, self.top, self.hi, self.top, 0)
        if above + inside < self.k:
            return Search(self.k, self.top, 0, self.lo, above + inside)
        step, above = self._step(counts, above)
        lo = self.lo + (step << self.shift)
        return Search(self.k, self.top, lo, min(self.hi, lo + (1 << self.shift)), above, int(counts[step]))

    def _step(self, counts: NDArray[np.int64], above: int) -> tuple[int, int]:
        """The step that holds the k-th largest, and how many patterns lie above that step."""
        from_top = above + np.cumsum(counts[-2::-1])
        back = int(np.searchsorted(from_top, self.k))
        step = len(counts) - 2 - back
        return step, int(from_top[back]) - int(counts[step])

    def found(self, rows: list[NDArray[np.int64]]) -> tuple[int, int, int] | None:
        """From the counts of each stretch in a ``last`` pass: pattern, stretch of the last kept tie, its rank there.

        The rank counts the stretch's own ties from 1. None if the k-th largest is not in the range.
        """
        counts = np.sum(rows, axis=0)
        above, inside = int(counts[-1]), int(counts[:-1].sum())
        if not above < self.k <= above + inside:
            return None
        step, above = self._step(counts, above)
        ties = np.cumsum([row[step] for row in rows])
        stretch = int(np.searchsorted(ties, self.k - above))
        before = int(ties[stretch - 1]) if stretch else 0
        return self.lo + step, stretch, self.k - above - before


def patterns(x: Tensor) -> Tensor:
    """Magnitudes of a float32 or float64 tensor as ordered integers, int64."""
    integer = torch.int32 if x.dtype == torch.float32 else torch.int64
    return x.abs().view(integer).to(torch.int64)


def in_float32(bits: int, last_index: int) -> tuple[int, int]:
    """A cut among float64 patterns as one among the float32 patterns of float32 values: it keeps the same elements."""
    value = np.array([bits], np.int64).view(np.float64)
    with np.errstate(over="ignore"):
        near = value.astype(np.float32)
    own = int(near.view(np.int32)[0])
    if near[0] == value[0]:
        return own, last_index
    return (own - 1 if near[0] > value[0] else own), -1


TOP = {"F32": 0x7FC00001, "F64": 0x7FF8000000000001}
"""One above the largest pattern of a compute type: that of its quiet NaN."""


def count(x: Tensor, search: Search) -> NDArray[np.int64]:
    """The definition of a count: patterns in each step of the search's range, and last the number above it."""
    bits = patterns(x)
    inside = bits[(bits >= search.lo) & (bits < search.hi)]
    counts = torch.zeros(search.steps + 1, dtype=torch.int64, device=x.device)
    counts[:-1] = torch.bincount((inside - search.lo) >> search.shift, minlength=search.steps)
    counts[-1] = torch.count_nonzero(bits >= search.hi)
    result: NDArray[np.int64] = counts.cpu().numpy()
    return result


def collect(x: Tensor, search: Search) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Patterns in the range and their indices within x, in the order of the indices."""
    bits = patterns(x)
    at = torch.nonzero((bits >= search.lo) & (bits < search.hi)).reshape(-1)
    return bits[at].cpu().numpy(), at.cpu().numpy()


def largest(x: Tensor, bits: int, last_index: int, start: int) -> Tensor:
    """Which elements a cut keeps, as bool: x holds the elements from flat index ``start`` on."""
    own = patterns(x)
    index = torch.arange(start, start + x.numel(), dtype=torch.int64, device=x.device)
    return (own > bits) | ((own == bits) & (index <= last_index))


def guess(sample: NDArray[np.int64], fraction: float, margin: float = 0.008) -> tuple[int, int]:
    """A likely range of patterns for the element above which a fraction of all lies, from a sample of patterns."""
    n = len(sample)
    low, high = (int(n * (1.0 - fraction + side)) for side in (-margin, margin))
    ordered = np.partition(sample, [max(low, 0), min(high, n - 1)])
    return int(ordered[low]) if low >= 0 else 0, int(ordered[high]) + 1 if high < n else 1 << 63
