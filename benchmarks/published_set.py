"""Times the set of the published package crdt-merge: add of a tensor, and merge of one entry into n.

Run by the Python of its own environment; prints one JSON document. Its set holds single tensors, so a gigabyte is one
float32 array here.

Example: .peers/crdt-merge/bin/python benchmarks/published_set.py
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from typing import Any

import numpy as np

STATE = importlib.import_module("crdt_merge.model.crdt_state").CRDTMergeState  # not importable where mypy runs
ADD_BYTES = 1 << 28
SIZES = (100, 1000, 10_000)


def filled(count: int, seed: int) -> Any:
    """A state of ``count`` tensors of four numbers."""
    state, random = STATE("weight_average"), np.random.default_rng(seed)
    for number in range(count):
        state.add(random.normal(size=4), model_id=f"{seed}-{number}")
    return state


def seconds_of_merge(count: int) -> float:
    """The median of five merges of one entry into ``count``."""
    times = []
    for seed in range(5):
        state, other = filled(count, 0), filled(1, seed + 1)
        begin = time.perf_counter()
        state.merge(other)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    state, array = STATE("weight_average"), np.random.default_rng(0).normal(size=ADD_BYTES // 4).astype(np.float32)
    begin = time.perf_counter()
    state.add(array, model_id="large")
    add_seconds = time.perf_counter() - begin
    merges = {count: seconds_of_merge(count) for count in SIZES}
    print(json.dumps({"add_gb_per_second": ADD_BYTES / 1e9 / add_seconds, "merge_seconds": merges}))


if __name__ == "__main__":
    main()
