"""Finding NaN and infinity in raw weights, on their bit patterns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.dtypes import DType

_INFINITY = {  # storage type: the signed and unsigned integer of its size, and the bits of an infinity
    "BF16": ("<i2", "<u2", 0x7F80),
    "F16": ("<i2", "<u2", 0x7C00),
    "F32": ("<i4", "<u4", 0x7F800000),
    "F64": ("<i8", "<u8", 0x7FF0000000000000),
}


def nonfinite(raw: NDArray[np.uint8], dtype: DType) -> tuple[int, int] | None:
    """How many elements of a stretch of bytes are NaN or infinite, and the index of the first; None if none.

    Patterns of one sign grow with the magnitude: the largest signed integer is the largest of the positive numbers, the
    largest unsigned one that of the negative numbers. Two maxima decide, without a copy.

    >>> from crdtmerge.numerics.dtypes import DTYPES
    >>> nonfinite(np.array([1, np.inf, np.nan], "<f4").view(np.uint8), DTYPES["F32"])
    (2, 1)
    """
    signed, unsigned, infinity = _INFINITY[dtype.name]
    sign = 1 << (dtype.bits - 1)
    positive, negative = raw.view(signed), raw.view(unsigned)
    if raw.size == 0 or (int(positive.max()) < infinity and int(negative.max()) < sign + infinity):
        return None
    where = np.flatnonzero((positive >= infinity) | (negative >= np.array(sign + infinity, unsigned)))
    return len(where), int(where[0])
