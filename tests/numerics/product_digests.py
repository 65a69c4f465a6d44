"""Prints what products and decompositions give on this machine, as digests: to be run under other settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crdtmerge.numerics.decompositions import cholesky_solve, eigh, right_vectors, svd
from crdtmerge.numerics.elementary import exp, log
from crdtmerge.numerics.products import gram, matmul


def digests() -> dict[str, str]:
    """A digest of each function's results, and of the library's own product."""
    rng = np.random.default_rng(77)
    a, b = rng.standard_normal((150, 333)), rng.standard_normal((333, 120))
    wide = rng.standard_normal((60, 90)) * 10.0 ** rng.integers(-6, 7, (60, 90))
    g = gram(a.T)
    made: dict[str, Sequence[NDArray[np.float64] | None]] = {
        "matmul": [matmul(a, b)],
        "gram": [g],
        "cholesky": [cholesky_solve(g, b[:150])],
        "svd": svd(wide),
        "right_vectors": right_vectors(wide.T),
        "eigh": eigh(g[:70, :70]),
        "elementary": [exp(b), log(np.abs(a))],
        "library": [a @ b],
    }
    found = {}
    for name, arrays in made.items():
        hasher = hashlib.sha256()
        for x in arrays:
            assert x is not None
            hasher.update(np.ascontiguousarray(x).tobytes())
        found[name] = hasher.hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(digests()))
