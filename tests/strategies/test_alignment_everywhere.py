"""Units are matched alike under every instruction set, BLAS, number of threads, hash seed and order of arrival.

Run as a program it prints the digests of some merges, as JSON; the test compares such processes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdtmerge.resolve.merge import merge
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from tests.resolve.running import ROOT, environment

SIZES = (5, 24, 17, 4)

ASKED: dict[str, dict[str, Any]] = {
    "rebasin": {},
    "dimat": {"method": "weights", "onto": "mean"},
    "aligned": {"inner": "median"},
    "zipit": {"method": "weights"},
}


def symmetry() -> Symmetry:
    """That of a perceptron."""
    layers = list(enumerate(itertools.pairwise(SIZES)))
    groups = [
        Group(size, (Axis(f"{i}.weight", 0), Axis(f"{i}.bias", 0), Axis(f"{i + 1}.weight", 1, True)))
        for i, size in enumerate(SIZES[1:-1])
    ]
    weights = {f"{i}.weight": ((out,), (inn,)) for i, (inn, out) in layers}
    return Symmetry(tuple(groups), weights | {f"{i}.bias": ((SIZES[i + 1],),) for i in range(len(groups))})


def models() -> list[dict[str, np.ndarray[Any, Any]]]:
    """Relatives of one network, each in an order of units of its own."""
    rng, spec = np.random.default_rng(5), symmetry()
    shapes = {name: tuple(size for factors in dims for size in factors) for name, dims in spec.tensors.items()}
    common = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    found = []
    for _ in range(4):
        turns = [rng.permutation(group.size) for group in spec.groups]
        own = {name: x + 0.7 * rng.standard_normal(x.shape) for name, x in common.items()}
        found.append({name: spec.turned(name, x, turns).astype(np.float32) for name, x in own.items()})
    return found


def digests() -> dict[str, list[str]]:
    """Of each merge, the digests of output and receipt over orders of arrival and threads."""
    made = models()
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "symmetry.json"
        path.write_bytes(symmetry().encode())
        for strategy, params in ASKED.items():
            every = set()
            for order, threads in itertools.product(((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)), (1, 3)):
                arrived = [made[i] for i in order]
                done = merge(arrived, strategy=strategy, inputs={"symmetry": path}, threads=threads, **params)
                receipt = hashlib.sha256(done.receipt.to_bytes()).hexdigest()
                every.add(f"{done.receipt.output_digest.hex()} {receipt}")
            found[strategy] = sorted(every)
    return found


SETTINGS = (
    {"ATEN_CPU_CAPABILITY": "default", "OPENBLAS_CORETYPE": "Prescott", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "2"},
    {"OMP_NUM_THREADS": "4", "PYTHONHASHSEED": "3", "CRDTMERGE_BLOCK": "65536"},
)


@pytest.fixture(scope="module")
def here() -> dict[str, list[str]]:
    return digests()


def test_orders_of_arrival_and_threads_give_one_digest(here: dict[str, list[str]]) -> None:
    assert {strategy: len(every) for strategy, every in here.items()} == dict.fromkeys(ASKED, 1)
    assert len({every[0] for every in here.values()}) == len(ASKED)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.get("OPENBLAS_CORETYPE", "blocks"))
def test_other_processes_give_the_same(settings: dict[str, str], here: dict[str, list[str]]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.strategies.test_alignment_everywhere"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**settings),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == here


if __name__ == "__main__":
    print(json.dumps(digests()))
