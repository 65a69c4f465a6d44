"""What all laws of arithmetic are tried with: settings of hypothesis, and the bits of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import HealthCheck, seed, settings
from numpy.typing import NDArray

Law = TypeVar("Law", bound=Callable[..., object])

STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes that are merged, by their names in safetensors."""

INTEGERS = {"F64": torch.int64, "F32": torch.int32, "BF16": torch.int16, "F16": torch.int16}


def examples(count: int, number: int = 20_250_401) -> Callable[[Law], Law]:
    """Try a law on so many examples, the same ones in every run."""
    how = settings(
        max_examples=count,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
    return lambda law: how(seed(number)(law))


def numbers(count: int, number: int, *, binades: int = 12) -> NDArray[np.float64]:
    """Full float64 mantissas of both signs over some binades, and a few zeros."""
    rng = np.random.default_rng(number)
    x = rng.standard_normal(count) * np.exp2(rng.integers(-binades, 1, count).astype(np.float64))
    x[rng.random(count) < 0.02] = 0.0
    return x


def stored(x: NDArray[np.float64], dtype: str) -> torch.Tensor:
    """Numbers rounded to a storage dtype."""
    return (
        torch.from_numpy(np.ascontiguousarray(x)).to(STORED[dtype]) if len(x) else torch.empty(0, dtype=STORED[dtype])
    )


def raw(x: torch.Tensor) -> NDArray[Any]:
    """The stored values as unsigned integers of their size."""
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.element_size()]
    found: NDArray[Any] = x.contiguous().reshape(-1).view(torch.uint8).numpy().view(unsigned)
    return found


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes."""
    return x.dtype == y.dtype and x.shape == y.shape and bool((raw(x) == raw(y)).all())
