"""Every strategy on real data: digits networks fine-tuned to different classes from one base, and their merges.

    python -m benchmarks.digits [--seeds N] [--json]        (``make demo-strategies``)

Each fine-tune sees all images of some classes and a fiftieth of the others; merges are measured on images of all
classes that nobody trained on. Statistics, programs, batches and plans are those of the command line: the Fisher
and Gram of each model are of its own images, unlabelled batches and the fitness of searches on images of the training
set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import crdtmerge as cm
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.symmetry import permutation_groups
from crdtmerge.testing import digits, programs
from crdtmerge.testing.digits import FAVOURED, Digits, StateDict

HALF = {"lambda": "0.5"}

ASKED: dict[str, dict[str, Any]] = {
    "task_arithmetic": HALF,
    "ties": {"density": "0.5"},
    "dare": {"density": "0.5", "combine": "mean"},
    "dare_ties": {"density": "0.5"},
    "dare_linear": {"density": "0.5", "combine": "mean"},
    "della": {"density": "0.5"},
    "della_linear": {"density": "0.5", "combine": "mean"},
    "model_breadcrumbs": {"drop_low": "0.5", "lambda": "0.5"},
    "breadcrumbs_ties": {"drop_low": "0.5"},
    "stages": {"sparsify": "magnitude", "elect": "sum", "combine": "mean", "density": "0.5"},
    "sce": {"density": "0.5"},
    "consensus_ta": HALF,
    "nearswap": {"threshold": "0.05"},
    "dam": {"steps": 200, "lr": "0.003"},
    "adarank": {"steps": 200, "lr": "0.01"},
    "representation_surgery": {"steps": 200, "settings": HALF},
    "evolutionary_merge": {"generations": 10, "inner": "linear"},
    "genetic_merge": {"generations": 10, "inner": "linear"},
}
"""What is asked for beside the defaults, on all seeds alike."""

COUNTS = {"passthrough": 1, "nuslerp": 2}
"""Strategies that take fewer models than three."""

OTHERS, EPOCHS = 0.02, 20
"""The share of other classes that a fine-tune sees, and how long it is trained."""

SEARCHED = 300
"""Images for unlabelled batches and fitness, of the training set."""


class Ground:
    """The models of one seed on disk, with everything that strategies read beside them."""

    def __init__(self, folder: Path, data: Digits, seed: int) -> None:
        self.data, self.folder = data, folder
        self.seen = [digits.mix(data, favoured, OTHERS, 10 * seed + i) for i, favoured in enumerate(FAVOURED)]
        base = digits.train(None, data.train_x[:200], data.train_y[:200], epochs=8, seed=seed + 1)
        tuned = [
            digits.train(base, data.train_x[own], data.train_y[own], epochs=EPOCHS, seed=seed, rate=0.02)
            for own in self.seen
        ]
        self.states: dict[str, StateDict] = {"base": base, **{f"ft{i}": one for i, one in enumerate(tuned)}}
        self.states["start"] = {name: x.detach().clone() for name, x in digits.network().state_dict().items()}
        for name, state in self.states.items():
            programs.write(state, self.path(name))
        self.models = [self.path(f"ft{i}") for i in range(len(tuned))]
        programs.export(digits.network(), [data.train_x[:2]], folder / "network.pt2")
        (folder / "symmetry.json").write_bytes(permutation_groups(digits.network(), (data.train_x[:2],)).encode())
        picked = torch.from_numpy(digits.mix(data, range(10), 1.0, seed))[:SEARCHED]
        programs.write(
            {"inputs": data.train_x[picked], "labels": data.train_y[picked]}, folder / "labelled.safetensors"
        )
        batches = {f"task{i}.inputs": data.train_x[own][:SEARCHED] for i, own in enumerate(self.seen)}
        programs.write(batches, folder / "batches.safetensors")
        self.stats = [self._statistics(i) for i in range(len(tuned))]

    def path(self, name: str) -> Path:
        """Where a model lies."""
        return self.folder / f"{name}.safetensors"

    def _statistics(self, i: int) -> dict[str, Path]:
        own = self.seen[i]
        batch = self.folder / f"own{i}.safetensors"
        programs.write({"inputs": self.data.train_x[own], "labels": self.data.train_y[own]}, batch)
        found: dict[str, Path] = {}
        for kind in ("fisher", "gram", "importance"):
            more = ["--base", self.path("base")] if kind == "importance" else []
            command = ["stats", kind, self.models[i], "--program", self.folder / "network.pt2", "--data", batch, *more]
            words = [sys.executable, "-m", "crdtmerge", *map(str, command), "--json"]
            ran = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
            found |= {one["name"]: Path(one["path"]) for one in ran["statistics"]}
            for one in ran["statistics"]:
                if one["name"] == "importance_base":
                    found["importance_base"] = self.folder / f"base{i}.importance_base.safetensors"
                    Path(one["path"]).rename(found["importance_base"])
        return found

    def merged(self, strategy: str) -> tuple[float, float]:
        """The accuracy of a merge by a strategy on all classes, and its seconds."""
        params = ASKED.get(strategy, {})
        kind = registry.get(strategy)
        needs = kind.needs(Filled(strategy, kind.Params, params).general)
        models = self.models[: COUNTS.get(strategy, len(self.models))]
        inputs = {
            "program": self.folder / "network.pt2",
            "symmetry": self.folder / "symmetry.json",
            "data": self.folder / ("labelled" if kind.family in ("search", "alignment") else "batches"),
            "aligned": self.path("base"),
            "unaligned": self.path("start"),
        }
        inputs["data"] = inputs["data"].with_suffix(".safetensors")
        tasks = [f"task{i}" for i in range(len(models))]
        begin = time.perf_counter()
        done = merge(
            models,
            strategy=strategy,
            base=self.path("base") if needs.base != "unused" else None,
            roles=["task", "task", "safety"] if strategy == "safe_merge" else None,
            tasks=tasks if kind.family in ("adaptive", "layerwise") else None,
            stats=[{name: one[name] for name in needs.stats} for one in self.stats[: len(models)]],
            inputs={name: inputs[name] for name in (*needs.models, *needs.inputs)},
            **params,
        )
        seconds = time.perf_counter() - begin
        state = {name: done[name] for name in self.states["base"]}
        return digits.accuracy(state, self.data.test_x, self.data.test_y), seconds


def table(seeds: int) -> dict[str, Any]:
    """Accuracy of the models and of every strategy's merge, for each seed."""
    data = digits.load()
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(prefix="crdtmerge-digits-") as folder:
            os.environ["XDG_STATE_HOME"] = os.environ["CRDTMERGE_CACHE"] = str(Path(folder) / "state")
            ground = Ground(Path(folder), data, seed)
            for name in ("base", *(f"ft{i}" for i in range(len(FAVOURED)))):
                found = digits.accuracy(ground.states[name], data.test_x, data.test_y)
                rows.setdefault(name, {"params": None, "accuracy": [], "seconds": []})["accuracy"].append(found)
            for strategy in sorted(registry.BUILT_IN):
                found, seconds = ground.merged(strategy)
                row = rows.setdefault(strategy, {"params": ASKED.get(strategy, {}), "accuracy": [], "seconds": []})
                row["accuracy"].append(round(found, 4))
                row["seconds"].append(round(seconds, 3))
                print(f"seed {seed}: {strategy} {found:.1%} in {seconds:.1f} s", file=sys.stderr, flush=True)
    return {"crdtmerge": cm.__version__, "seeds": seeds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every strategy on digits.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = table(arguments.seeds)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"| strategy | asked for | accuracy, mean of {arguments.seeds} seeds | least | s |")
    print("|---|---|---|---|---|")
    for name, row in found["rows"].items():
        said = ", ".join(f"{key} {value}" for key, value in (row["params"] or {}).items())
        seconds = f"{statistics.median(row['seconds']):.2f}" if row["seconds"] else ""
        mean, least = statistics.mean(row["accuracy"]), min(row["accuracy"])
        print(f"| {name} | {said} | {mean:.1%} | {least:.1%} | {seconds} |")


if __name__ == "__main__":
    main()
