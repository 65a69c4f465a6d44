"""Merged tensors in memory: a sink that keeps them, and bytes seen as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.dtypes import DType
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.rounding import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Memory:
    """A sink that keeps the merged tensors."""

    def __init__(self, tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> None:
        self.tensors = {name: (dtype, shape, np.empty(dtype.nbytes(shape), np.uint8)) for name, dtype, shape in tensors}

    def write(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Keep a stretch."""
        self.tensors[name][2][offset : offset + data.nbytes] = data

    def tensor(self, name: str) -> Tensor:
        """A tensor that shares its memory with what is kept."""
        dtype, shape, data = self.tensors[name]
        return viewed(data, dtype, shape)


def viewed(data: NDArray[np.uint8], dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """Bytes as a tensor, without a copy."""
    kind = torch_dtype(dtype)
    flat = torch.from_numpy(data).view(kind) if data.size else torch.empty(0, dtype=kind)
    found: Tensor = flat.reshape(shape)
    return found
