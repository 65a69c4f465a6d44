"""Merging a case with ours, with the equation and with mergekit, and how far they lie apart.

python -m tests.differential.comparing           the table of docs/differential.md (needs .peers/mergekit)
python -m tests.differential.comparing golden    the digests of ours that golden.json keeps
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from crdtmerge.resolve.merge import Merged, merge
from crdtmerge.strategies import registry
from tests.differential import models
from tests.differential.cases import CASES, UNPUBLISHED, Case
from tests.differential.models import State
from tests.differential.oracle import Array

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers" / "mergekit" / "bin" / "python"
GOLDEN = Path(__file__).with_name("golden.json")

TOLERANCE = 5e-7
RANKED_SHARE_MAX = 1e-4
FLOAT64 = 1e-14
"""What the rounding of the equation itself may be, of a value."""

Values = Mapping[str, Array]
Jobs = Mapping[str, tuple[str, Mapping[str, Mapping[str, object]], str, Mapping[str, object]]]
"""A merge by name: method, parameters of each model, base or nothing, parameters of the merge."""


def available(cases: Iterable[Case]) -> list[Case]:
    """The cases whose strategy the registry has."""
    return [case for case in cases if case.strategy in registry.names()]


@cache
def loaded(who: str, dtype: str) -> State:
    """A model, made once."""
    return models.state(who, dtype)


def ours(case: Case, dtype: str) -> Merged:
    """Our merge."""
    said: dict[str, Any] = {} if "t" in case.ours else {"weights": case.claimed}
    return merge(
        [loaded(who, dtype) for who in case.models],
        strategy=case.strategy,
        base=loaded("base", dtype) if case.base else None,
        **said,
        **case.ours,
    )


def exact(case: Case, dtype: str) -> dict[str, Array]:
    """The equation in float64, not rounded."""
    inputs = [loaded(who, dtype) for who in case.models]
    base = loaded("base", dtype)
    return {
        name: case.equation([wide(one[name]) for one in inputs], wide(base[name]) if case.base else None, case.claimed)
        for name in base
    }


def wide(x: torch.Tensor) -> Array:
    """The values as float64."""
    found: Array = x.double().numpy()
    return found


def values(one: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """All values of a model as float64."""
    return {name: wide(one[name]) for name in one}


class Distance(NamedTuple):
    """How far two models lie apart: the largest and the mean |a - b|, and the share beyond the tolerance."""

    largest: float
    mean: float
    beyond: float


def distance(one: Values, other: Values) -> Distance:
    """|a - b| over all elements; an element is beyond where it exceeds 5e-7 max(1, |a|)."""
    assert one.keys() == other.keys()
    a = np.concatenate([one[name].ravel() for name in sorted(one)])
    b = np.concatenate([other[name].ravel() for name in sorted(other)])
    apart = np.abs(a - b)
    beyond = float(np.mean(~(apart <= TOLERANCE * np.maximum(1.0, np.abs(a)))))
    return Distance(float(apart.max()), float(apart.mean()), beyond)


def further(one: Values, other: Values, truth: Values) -> int:
    """How many elements of one lie further from the truth than those of the other, by more than float64 can tell."""
    count = 0
    for name, true in truth.items():
        excess = np.abs(one[name] - true) - np.abs(other[name] - true)
        count += int(np.count_nonzero(excess > FLOAT64 * np.abs(true)))
    return count


@dataclass(frozen=True)
class Peer:
    """What mergekit made of each job: a model, or a sentence."""

    folder: Path

    def model(self, job: str) -> State:
        """The merged model. Raises AssertionError with what mergekit said."""
        place = self.folder / job
        assert not self.said(job), f"mergekit on {job}: {self.said(job)}"
        merged: State = {}
        for path in sorted(place.glob("*.safetensors")):
            merged |= load_file(path)
        return merged

    def said(self, job: str) -> str:
        """What mergekit raised, if it did."""
        error = self.folder / job / "error.txt"
        return error.read_text() if error.exists() else ""


def run_peer(folder: Path, jobs: Mapping[str, dict[str, object]]) -> Peer:
    """Mergekit on configurations by name; the outputs lie in folders of these names."""
    assert PEER.exists(), "mergekit is not installed: run benchmarks/peers.sh"
    listed = [{"config": config, "out": str(folder / name)} for name, config in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(listed))
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(PEER), "-P", str(Path(__file__).with_name("peer_driver.py")), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Peer(folder)


def job(case: Case, dtype: str) -> str:
    """The folder of a case."""
    return f"{case.name}-{dtype}".replace(" ", "-")


def compared(folder: Path, further_models: Mapping[str, State] | None = None, jobs: Jobs | None = None) -> Peer:
    """All cases in both types by mergekit, and further jobs in F32 on these and further models, named by {who}."""
    asked: dict[str, dict[str, object]] = {}
    for dtype, word in models.WORDS.items():
        for who in models.NAMES:
            models.write(folder / dtype / who, models.state(who, dtype), dtype)
        asked |= {job(case, dtype): case.config(str(folder / dtype), word) for case in CASES}
    for who, tensors in (further_models or {}).items():
        models.write(folder / "F32" / who, tensors, "F32")
    for name, (method, inputs, base, common) in (jobs or {}).items():
        listed = [{"model": str(folder / "F32" / who), "parameters": said} for who, said in inputs.items()]
        config: dict[str, object] = {"merge_method": method, "models": listed, "parameters": common, "dtype": "float32"}
        asked[name] = config | ({"base_model": str(folder / "F32" / base)} if base else {})
    return run_peer(folder, asked)


def golden() -> dict[str, str]:
    """The digests of our outputs, by case and type."""
    return {
        f"{case.name} {dtype}": ours(case, dtype).receipt.output_digest.hex()[:32]
        for case in available([*CASES, *UNPUBLISHED])
        for dtype in models.DTYPES
    }


def table() -> None:
    """Print the table of docs/differential.md."""
    print("| method | parameters | max F32 | beyond F32 | BF16 ours: max, mean | BF16 mergekit: max, mean | further |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        peer = compared(Path(folder))
        for case in available(CASES):
            apart = distance(values(peer.model(job(case, "F32"))), values(ours(case, "F32")))
            truth, mine = exact(case, "BF16"), values(ours(case, "BF16"))
            theirs = values(peer.model(job(case, "BF16")))
            us, them = distance(truth, mine), distance(truth, theirs)
            print(
                f"| {case.name} | {case.parameters or '-'} | {apart.largest:.1e} | {apart.beyond:.1e} "
                f"| {us.largest:.2e}, {us.mean:.2e} | {them.largest:.2e}, {them.mean:.2e} "
                f"| {further(mine, theirs, truth)} |"
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["golden"]:
        GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
    else:
        table()
