"""Whether this process does IEEE arithmetic as the promise of equal bytes needs it: rounding mode and subnormals."""

from __future__ import annotations

import sys

import numpy as np

from crdtmerge.errors import PlatformError


def require_ieee() -> None:
    """Raise PlatformError unless additions round to nearest even and subnormal numbers survive."""
    small = np.array([1e-38], np.float32) * np.array([1e-3], np.float32)
    if not small[0] > 0:
        raise PlatformError(
            "this process flushes subnormal numbers to zero (a library built with -ffast-math may have set it); "
            "the merged bytes would differ from other machines"
        )
    ones = np.array([1.0, 1.0])
    if (ones + np.array([2**-53, 2**-52 * 1.5]) != np.array([1.0, 1.0 + 2**-51])).any():
        raise PlatformError("this process does not round to nearest even; the merged bytes would differ")
    if sys.byteorder != "little":
        raise PlatformError("this machine is big-endian; only little-endian machines are supported")
