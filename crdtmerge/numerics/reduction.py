"""Sums and dot products in float64 with one fixed order of additions: the definition, in torch.

The order is part of the format. A tensor is cut into blocks of 65,536 elements (the last one padded with zeros);
a block is 16 rows of 4,096 lanes; rows are added from the first to the last, the lanes are folded by halves
(x[i] + x[i + h]), and the sums of the blocks, padded with zeros to a power of two, are folded by halves again.
Products of float32, bfloat16 and float16 values are exact in float64; of float64 values they are rounded once.

Rules: elementwise additions only, never a library's own sum or dot; a result depends on the values alone, not on
threads, SIMD width or how the tensor was read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ROWS, LANES = 16, 4096
BLOCK = ROWS * LANES
"""Elements of a reduction block. Stretches that are reduced apart start at multiples of it."""


def block_sums(values: Tensor) -> Tensor:
    """Sum of each block of 65,536 elements: float64 [n] -> float64 [ceil(n / 65536)]."""
    n = values.numel()
    blocks = -(-n // BLOCK)
    height = ROWS if blocks != 1 else -(-n // LANES)
    width = LANES if height != 1 else 1 << (n - 1).bit_length()
    padded = torch.zeros(blocks * height * width, dtype=torch.float64, device=values.device)
    padded[:n] = values
    rows = padded.view(blocks, height, width)
    lanes = rows[:, 0, :]
    for row in range(1, height):
        lanes = lanes + rows[:, row, :]
    if height < ROWS:
        lanes = lanes + 0.0  # what adding all the zeros that are left out does: -0 becomes 0
    half = width // 2
    while half >= 1:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]


def gram_block_sums(rows: Sequence[Tensor]) -> Tensor:
    """Block sums of the products of all pairs i <= j of rows: k tensors [n] -> float64 [pairs, blocks].

    Pairs are in the order (0, 0), (0, 1), ..., (1, 1), ...; see ``pairs``.
    """
    wide = [row.to(torch.float64) for row in rows]
    return torch.stack([block_sums(wide[i] * wide[j]) for i, j in pairs(len(wide))])


def pairs(k: int) -> list[tuple[int, int]]:
    """All (i, j) with i <= j < k, row by row."""
    return [(i, j) for i in range(k) for j in range(i, k)]


def fold(sums: NDArray[np.float64]) -> float:
    """The sum of a tensor from the sums of its blocks, in their order.

    >>> fold(np.array([1.0, 2.0, 3.0]))
    6.0
    """
    size = 1
    while size < len(sums):
        size *= 2
    level = np.zeros(size)
    level[: len(sums)] = sums
    while size > 1:
        size //= 2
        level = level[:size] + level[size : 2 * size]
    return float(level[0])


def tree_sum(x: Tensor) -> float:
    """Sum of a tensor's elements.

    >>> import torch
    >>> tree_sum(torch.full((10,), 0.5))
    5.0
    """
    return fold(block_sums(x.reshape(-1).to(torch.float64)).cpu().numpy()) if x.numel() else 0.0


def dot(x: Tensor, y: Tensor) -> float:
    """Sum of the products of two tensors of one shape."""
    assert x.shape == y.shape, "a dot product needs two tensors of one shape"
    return tree_sum(x.to(torch.float64) * y.to(torch.float64))


def norm(x: Tensor) -> float:
    """Euclidean norm of all elements: the correctly rounded root of ``dot(x, x)``."""
    return math.sqrt(dot(x, x))
