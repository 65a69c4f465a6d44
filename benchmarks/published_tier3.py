"""The same joins and one resolve of slerp with the published package crdt-merge, for ``paper_tier3``.

Run by the Python of its own environment; prints one JSON document.

Example: .peers/crdt-merge/bin/python benchmarks/published_tier3.py 100 512
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from typing import Any

import numpy as np

STATE = importlib.import_module("crdt_merge.model.crdt_state").CRDTMergeState  # not importable where mypy runs


def nodes_of(count: int, size: int) -> list[Any]:
    source, states = np.random.default_rng(42), []
    for number in range(count):
        state = STATE("slerp")
        state.add(source.standard_normal((size, size)).astype(np.float32), model_id=f"node{number}")
        states.append(state)
    return states


def main() -> None:
    count, size = map(int, sys.argv[1:3])
    nodes = nodes_of(count, size)
    order = random.Random(0).sample(range(count), count)
    begin = time.perf_counter()
    whole = nodes[order[0]]
    for number in order[1:]:
        whole.merge(nodes[number])
    for node in nodes:
        node.merge(whole)
    gossip = time.perf_counter() - begin
    begin = time.perf_counter()
    whole.resolve()
    resolve = time.perf_counter() - begin
    hashes = {node.state_hash for node in nodes}
    print(json.dumps({"gossip_seconds": gossip, "resolve_seconds": resolve, "hashes": len(hashes)}))


if __name__ == "__main__":
    main()
