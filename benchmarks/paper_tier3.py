"""The paper's convergence experiment: many nodes that join in many orders, in parts, with every strategy, bit by bit.

RULES
- A node is a MergeState that added one float32 tensor. An ordering joins the nodes' states in a random sequence into
  one of them, which the others then join: 199 joins for 100 nodes. All roots must be equal, and all resolved bytes.
- Some nodes of the first ordering and one of each other ordering resolve; the bytes of all are compared.
- In parts, ten groups of ten join among themselves first: ten roots; then all of them: one, that of no parts at all.
- Every registered strategy on ten nodes, three orderings each; slerp on 2 to 50 nodes.
- Epidemic: in every round each of 1000 nodes holds one session with a random other (production sessions, no sockets);
  rounds until one operation is everywhere, beside ceil(log2 n) + 4.
- crdt-merge does the same joins and one resolve of slerp in its own environment, in the same run.

Example: python -m benchmarks.paper_tier3
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

import crdtmerge as cm
from crdtmerge.strategies.registry import BUILT_IN
from crdtmerge.testing.epidemic import epidemic

PEER = Path(".peers/crdt-merge/bin/python")


def nodes_of(strategy: str, count: int, size: int) -> list[cm.MergeState]:
    """Nodes that added one tensor each, of a pool with a base where the strategy needs one."""
    source = np.random.default_rng(42)
    base = {"w": source.standard_normal((size, size)).astype(np.float32)}
    tensors = [{"w": base["w"] + source.standard_normal((size, size)).astype(np.float32) / 10} for _ in range(count)]
    try:
        empty = [cm.MergeState(strategy) for _ in range(count)]
    except cm.CrdtMergeError:
        empty = [cm.MergeState(strategy, base=base) for _ in range(count)]
    return [state.add(tensor) for state, tensor in zip(empty, tensors, strict=True)]


def gossiped(nodes: list[cm.MergeState], seed: int) -> tuple[list[cm.MergeState], float]:
    """The nodes after joining in a random order, and the seconds it took."""
    order = random.Random(seed).sample(range(len(nodes)), len(nodes))
    begin = time.perf_counter()
    whole = nodes[order[0]]
    for number in order[1:]:
        whole = whole | nodes[number]
    joined = [node | whole for node in nodes]
    return joined, time.perf_counter() - begin


def bytes_of(state: cm.MergeState) -> bytes:
    """The resolved tensor."""
    merged: Any = state.resolve()["w"]
    return np.asarray(merged).tobytes()


def orderings(count: int, size: int, orders: int, resolving: int) -> dict[str, Any]:
    """Random orderings of joins: roots, bytes, seconds."""
    nodes = nodes_of("slerp", count, size)
    roots, outputs, gossip, resolve = set(), set(), [], []
    for seed in range(orders):
        joined, seconds = gossiped(nodes, seed)
        gossip.append(seconds)
        roots |= {state.root for state in joined}
        for state in joined[: resolving if seed == 0 else 1]:
            begin = time.perf_counter()
            outputs.add(bytes_of(state))
            resolve.append(time.perf_counter() - begin)
    assert len(roots) == len(outputs) == 1, "all nodes in all orders are one"
    return {
        "nodes": count,
        "orderings": orders,
        "roots": len(roots),
        "outputs": len(outputs),
        "resolved": len(resolve),
        "gossip_seconds": sorted(gossip)[len(gossip) // 2],
        "resolve_seconds": sorted(resolve)[len(resolve) // 2],
    }


def parted(count: int, size: int, groups: int) -> dict[str, Any]:
    """Groups that join among themselves, then all."""
    nodes = nodes_of("slerp", count, size)
    parts = [gossiped(nodes[at::groups], at)[0] for at in range(groups)]
    assert all(len({state.root for state in part}) == 1 for part in parts)
    apart = {part[0].root for part in parts}
    begin = time.perf_counter()
    whole = parts[0][0]
    for part in parts[1:]:
        whole = whole | part[0]
    healed = [state | whole for part in parts for state in part]
    seconds = time.perf_counter() - begin
    unparted = gossiped(nodes, 99)[0][0]
    assert {state.root for state in healed} == {unparted.root}
    assert bytes_of(healed[0]) == bytes_of(unparted)
    return {"groups": groups, "roots_apart": len(apart), "roots_healed": 1, "heal_seconds": seconds}


def strategies(count: int, size: int) -> dict[str, bool]:
    """Every registered strategy: whether three orderings give one root and the same bytes."""
    found = {}
    for name in BUILT_IN:
        nodes = nodes_of(name, count, size)
        states = [state for seed in range(3) for state in (gossiped(nodes, seed)[0][0], gossiped(nodes, seed)[0][-1])]
        found[name] = len({state.root for state in states}) == len({bytes_of(state) for state in states}) == 1
    assert all(found.values()), found
    return found


def epidemics(nodes: int) -> dict[str, Any]:
    """Rounds until one operation is everywhere, for a few seeds."""
    rounds = [epidemic(nodes, seed) for seed in range(4)]
    bound = math.ceil(math.log2(nodes)) + 4
    assert max(rounds) <= bound
    return {"nodes": nodes, "rounds": rounds, "bound": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--orderings", type=int, default=20)
    parser.add_argument("--resolving", type=int, default=3, help="nodes of the first ordering that resolve")
    asked = parser.parse_args()
    report: dict[str, Any] = {
        "orderings": orderings(asked.nodes, asked.size, asked.orderings, asked.resolving),
        "parts": parted(asked.nodes, asked.size, 10),
        "strategies": strategies(10, 64),
        "epidemic": epidemics(1000),
        "scaling": [orderings(count, asked.size, 3, 1) for count in (2, 5, 10, 20, 50)],
    }
    if PEER.exists():
        command = [str(PEER), "benchmarks/published_tier3.py", str(asked.nodes), str(asked.size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report["crdt-merge"] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
