"""What is found of one whole tensor in memory, in a fixed order of operations: its rows, their sums, order statistics.

A row is a vector along the last dimension (or along the first, for ``columns``); a tensor of one dimension or none is
one row. Sums of rows fold halves, padded with zeros to a power of two, like those of ``numerics.reduction``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crdtmerge.numerics import selection
from crdtmerge.numerics.elementary import sqrt
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.selection import Search

if TYPE_CHECKING:
    from torch import Tensor


def rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A flat tensor as [rows, length of a row]; it must have elements."""
    return x.reshape(-1, shape[-1]) if len(shape) > 1 else x.reshape(1, -1)


def columns(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A flat tensor as [columns, length of a column], a column being a vector along the first dimension."""
    return x.reshape(shape).transpose(0, -1).reshape(-1, shape[0]) if len(shape) > 1 else x.reshape(1, -1)


def from_columns(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The flat tensor whose ``columns`` are given."""
    if len(shape) <= 1:
        return x.reshape(-1)
    turned = (shape[-1], *shape[1:-1], shape[0])
    return x.reshape(turned).transpose(0, -1).reshape(-1)


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row: [r, n] -> [r]."""
    size = 1 << max(0, x.shape[1] - 1).bit_length()
    level = torch.zeros(x.shape[0], size, dtype=x.dtype, device=x.device)
    level[:, : x.shape[1]] = x
    while size > 1:
        size //= 2
        level = level[:, :size] + level[:, size : 2 * size]
    return level[:, 0]


def row_largest(x: Tensor) -> Tensor:
    """The largest value of each row: [r, n] -> [r]; n must not be zero."""
    level = x
    while level.shape[1] > 1:
        half = (level.shape[1] + 1) // 2
        rest = level[:, half:]
        first = level[:, : rest.shape[1]]
        level = torch.cat([torch.where(rest > first, rest, first), level[:, rest.shape[1] : half]], dim=1)
    return level[:, 0]


def roots(x: Tensor) -> Tensor:
    """The correctly rounded square root of each element of a float64 tensor."""
    return torch.from_numpy(sqrt(x.cpu().numpy())).to(x.device)


def cut(x: Tensor, k: int) -> tuple[int, int]:
    """(pattern, last index) such that the k largest |x| are kept, ties by lowest index; 1 <= k <= elements."""
    if x.numel() <= selection.COLLECT_MAX:
        ordered = torch.sort(selection.patterns(x), descending=True, stable=True)
        return int(ordered.values[k - 1]), int(ordered.indices[k - 1])
    search = Search.over(k, selection.TOP["F32" if x.dtype == torch.float32 else "F64"])
    while not search.last:
        search = search.narrow(selection.count(x, search))
    found = search.found([selection.count(x, search)])
    assert found is not None, "a range that was narrowed holds the k-th largest"
    bits, _, rank = found
    ties = torch.nonzero(selection.patterns(x) == bits).reshape(-1)
    return bits, int(ties[rank - 1])


def largest(x: Tensor, k: int) -> Tensor:
    """Which elements are the k largest |x|, as bool: exactly k, ties by lowest index."""
    if k == 0:
        return torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    return selection.largest(x, *cut(x, k), 0)


def ascending(x: Tensor, index: int) -> float:
    """The element of a tensor of non-negative values that stands at an index when they are sorted from the least."""
    bits, _ = cut(x, x.numel() - index)
    integer = torch.int32 if x.dtype == torch.float32 else torch.int64
    return float(torch.tensor([bits], dtype=integer).view(x.dtype))
