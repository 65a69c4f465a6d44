"""Finding NaN and infinity in raw weights, on their bit patterns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.dtypes import DType

_EXPONENT = {  # storage type: (unsigned integer of that size, the bits of an infinity shifted left over the sign)
    "BF16": (np.uint16, 0xFF00),
    "F16": (np.uint16, 0xF800),
    "F32": (np.uint32, 0xFF000000),
    "F64": (np.uint64, 0xFFE0000000000000),
}


def nonfinite(raw: NDArray[np.uint8], dtype: DType) -> tuple[int, int] | None:
    """How many elements of a stretch of bytes are NaN or infinite, and the index of the first; None if none.

    Shifting the sign out leaves an integer that grows with the magnitude, so one maximum decides.

    >>> from crdtmerge.numerics.dtypes import DTYPES
    >>> nonfinite(np.array([1, np.inf, np.nan], "<f4").view(np.uint8), DTYPES["F32"])
    (2, 1)
    """
    integer, infinity = _EXPONENT[dtype.name]
    magnitudes = raw.view(integer) << integer(1)
    if magnitudes.size == 0 or int(magnitudes.max()) < infinity:
        return None
    where = np.flatnonzero(magnitudes >= integer(infinity))
    return len(where), int(where[0])
