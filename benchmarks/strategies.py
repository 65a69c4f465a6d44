"""How long each strategy takes on ten 64 x 64 tensors through ``MergeState``, once its plan is made.

    python -m benchmarks.strategies [--json]

The paper's setting: one float32 tensor a contribution. Times are of a whole ``resolve``: reading, hashing,
merging and the receipt, the median of several, with kernels that were compiled before; of strategies that learn or
search, with a plan of no steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import numpy as np

import crdtmerge as cm
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.testing.case import symmetry_file

SIDE, COUNT, RUNS = 64, 10, 5

os.environ.setdefault("CRDTMERGE_KERNELS", "numba")

UNTRAINED: dict[str, dict[str, Any]] = {
    "adaptive": {"steps": 0},
    "search": {"generations": 0},
    "alignment": {"method": "weights"},
}

LEFT_OUT = ("regmean_plus_plus",)
"""Strategies that have no plan without running a program."""

COUNTS = {"passthrough": 1, "nuslerp": 2}


def state_of(strategy: str) -> tuple[cm.MergeState, dict[str, Any]]:
    """Contributions with what the strategy needs of each, and its further models."""
    source = np.random.default_rng(7)

    def tensor(scale: float = 1.0) -> dict[str, Any]:
        return {"w": (source.standard_normal((SIDE, SIDE)) * scale).astype(np.float32)}

    kind = registry.get(strategy)
    params = UNTRAINED.get(kind.family, {})
    needs = kind.needs(Filled(strategy, kind.Params, params).general)
    base = tensor()
    state = cm.MergeState(cm.Recipe.of(strategy, params), base=base if needs.base != "unused" else None)
    for number in range(COUNTS.get(strategy, COUNT)):
        tuned = {"w": base["w"] + tensor(0.1)["w"]}
        inputs = source.standard_normal((4 * SIDE, SIDE))
        made = {"gram": (inputs.T @ inputs / len(inputs)).astype(np.float32)}
        found = {name: {"w": made.get(name, np.abs(tensor()["w"]) + 0.01)} for name in needs.stats}
        state = state.add(tuned, stats=found, role="safety" if strategy == "safe_merge" and number == 0 else None)
    return state, {name: tensor() for name in needs.models} | {
        name: symmetry_file((("w", (SIDE, SIDE)),)) for name in needs.inputs
    }


def seconds_of(strategy: str) -> float:
    """The median seconds of a resolve."""
    state, inputs = state_of(strategy)
    state.resolve(inputs=inputs)
    found = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        state.resolve(inputs=inputs)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time every strategy on small tensors.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {name: round(1000 * seconds_of(name), 1) for name in sorted(set(registry.BUILT_IN) - {*LEFT_OUT})}
    if arguments.json:
        print(json.dumps({"milliseconds": found}, indent=2))
        return
    for name, milliseconds in sorted(found.items(), key=lambda row: -row[1]):
        print(f"{name:<24} {milliseconds:8.1f} ms")


if __name__ == "__main__":
    main()
