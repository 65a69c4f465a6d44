"""Sorting networks: the k values of each element in ascending order, by comparisons that do not depend on the data.

A comparison exchanges two rows where the later is less (``where``, never minimum and maximum, whose choice between
plus and minus zero is the library's). So every element is sorted by itself and blocks cannot matter.

Source: Batcher's merge exchange, Knuth, The Art of Computer Programming, vol. 3, 5.2.2, algorithm M.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def exchanges(k: int) -> list[tuple[int, int]]:
    """The comparisons (i, j), i < j, that sort k numbers.

    >>> exchanges(3)
    [(0, 2), (0, 1), (1, 2)]
    """
    top = 1 << max(k - 1, 0).bit_length() >> 1
    found = []
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            found += [(i, i + d) for i in range(k - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return found


@cache
def _needed(k: int, start: int, stop: int) -> list[tuple[int, int, bool, bool]]:
    """The comparisons on which ranks start..stop-1 depend, and whether the lesser and the greater are used after."""
    used = set(range(start, stop))
    found = []
    for i, j in reversed(exchanges(k)):
        if i in used or j in used:
            found.append((i, j, i in used, j in used))
            used |= {i, j}
    return found[::-1]


def ascending(xs: Sequence[Tensor], start: int = 0, stop: int | None = None) -> list[Tensor]:
    """Elementwise the values of ranks start..stop-1 of k tensors, rank 0 the least. NaN has no rank: see ``nan_of``."""
    rows: list[Tensor] = list(xs)
    stop = len(rows) if stop is None else stop
    for i, j, lesser, greater in _needed(len(rows), start, stop):
        x, y = rows[i], rows[j]
        swap = y < x
        if lesser:
            rows[i] = torch.where(swap, y, x)
        if greater:
            rows[j] = torch.where(swap, x, y)
    return rows[start:stop]


def nan_of(xs: Sequence[Tensor], merged: Tensor) -> Tensor:
    """The merged values, and NaN wherever one of the inputs is."""
    for x in xs:
        absent = x != x
        if bool(absent.any()):
            merged = torch.where(absent, x, merged)
    return merged
