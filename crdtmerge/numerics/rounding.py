"""Between storage and arithmetic: widening, which is exact, and the one rounding at the end.

float64 to bfloat16 or float16 goes through float32; two roundings to nearest can miss the nearest value, so the
first rounds to odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008): towards zero, with
the last bit set if anything was cut off. The second then rounds as if it had seen the exact value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crdtmerge.numerics.dtypes import DType
from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's object for a dtype."""
    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found


def round_to(x: Tensor, dtype: DType) -> Tensor:
    """A float32 or float64 tensor rounded once, to nearest even, to a storage dtype."""
    if x.dtype == torch.float64 and dtype.name in ("BF16", "F16"):
        x = _to_odd_f32(x)
    return x.to(torch_dtype(dtype))


def _to_odd_f32(x: Tensor) -> Tensor:
    near = x.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    bits = bits - (back.abs() > x.abs()).to(torch.int32)  # step back towards zero
    bits = torch.where(back != x, bits | 1, bits)
    return torch.where(torch.isfinite(x), bits.view(torch.float32), near)


def canonical_nan(x: Tensor) -> Tensor:
    """Every NaN replaced by the one quiet NaN, whose bits differ between machines otherwise."""
    return torch.where(x != x, torch.full_like(x, float("nan")), x)
