"""Run as a program: merges the same models by every strategy and prints what came out, as one JSON document.

    python -m tests.scenarios.one_process THREADS

The kernels are those of the environment; the first face is a MergeState, the second a Replica of its exported bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from crdtmerge.pool.replica import Replica
from crdtmerge.recipe import Recipe
from crdtmerge.state import MergeState
from tests.resolve.models import state
from tests.scenarios.worlds import output
from tests.strategies.models import DEEP

SHAPES = {"long": (3 * 65536 + 11,), "matrix": (64, 65), "one": (1,)}
"""More than three blocks, so that threads have something to share."""

TYPES = ("F32", "BF16")


def main(threads: int) -> dict[str, list[str]]:
    """Digests of receipt and tensors, for each strategy and dtype."""
    found = {}
    for name in DEEP:
        for dtype in TYPES:
            base, *models = (state(who, dtype, SHAPES) for who in ("base", "a", "b", "c"))
            pool = MergeState(Recipe(name), base=base)
            for number, model in enumerate(models, 1):
                pool |= MergeState(Recipe(name), base=base).add(model, weight=number)
            with tempfile.TemporaryDirectory() as folder:
                bundle = Path(folder) / "state"
                bundle.write_bytes(pool.to_bytes())
                with Replica.of_bundle(Path(folder) / "replica", bundle) as replica:
                    merged = [pool.resolve(threads=threads), replica.resolve(threads=threads)]
            found[f"{name} {dtype}"] = [hashlib.sha256(b"".join(output(one))).hexdigest() for one in merged]
    return found


if __name__ == "__main__":
    json.dump(main(int(sys.argv[1])), sys.stdout)
