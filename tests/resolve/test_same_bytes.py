"""The same set and the same recipe give the same bytes: in any order, process or file, with any threads or kernels.

Each test runs ``matrix_driver`` in a process of its own and holds every result against ``pinned_digests``, so that
processes, machines and releases are compared with each other and not only with themselves.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resolve import matrix_driver, models
from tests.resolve.pinned_digests import PINNED
from tests.resolve.running import ROOT, environment, process

LEVELS = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}


def driven(folder: Path, mode: str, *dtypes: str, **settings: str) -> dict[str, Any]:
    """What the driver prints, in a process with these settings."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.resolve.matrix_driver", str(folder), mode, *dtypes],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**settings),
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def deviating(results: dict[str, dict[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """The ways that do not give what is pinned, by case."""
    return {
        case: [(way, found) for way, found in by_way.items() if found != PINNED[case]]
        for case, by_way in results.items()
        if set(by_way.values()) != {PINNED[case]}
    }


def test_every_strategy_and_type_is_pinned_and_all_differ() -> None:
    cases = {f"{case} {dtype}" for case in matrix_driver.STRATEGIES for dtype in models.TYPES}
    assert cases <= PINNED.keys()
    assert len(set(PINNED.values())) == len(PINNED)
    assert {strategy for strategy, _ in matrix_driver.STRATEGIES.values()} == {
        *("weight_average", "linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "magmax")
    }


def test_the_ways_go_through_every_order_thread_count_block_length_and_layout() -> None:
    ways = list(matrix_driver.ways())
    assert {way.order for way in ways} == {"".join(order) for order in itertools.permutations("abc")}
    by_kernels = {(way.threads, way.kernels) for way in ways} | {(way.block, way.kernels) for way in ways}
    assert set(itertools.product((1, 2, 4, 65536, 131072, 262144), ("torch", "numba"))) <= by_kernels
    assert {(way.threads, way.block) for way in ways} >= set(itertools.product((1, 2, 4), (65536, 131072, 262144)))
    assert {way.files for way in ways} == {"one", "shards of 2", "shards of 3", "reordered", "mixed"}
    assert {(way.rehash, way.kernels) for way in ways} == set(itertools.product((True, False), ("torch", "numba")))


@pytest.mark.parametrize("dtype", models.TYPES)
def test_nothing_that_varies_within_a_process_enters(dtype: str, tmp_path: Path) -> None:
    found = driven(tmp_path, "ways", dtype, OMP_NUM_THREADS="1")
    assert deviating(found["results"]) == {}
    ways = len(set(matrix_driver.ways()))
    assert {len(found["results"][f"{case} {dtype}"]) for case in matrix_driver.STRATEGIES} == {ways}


@pytest.mark.parametrize(
    ("level", "seed", "torch_threads"),
    [("default", "0", "1"), ("avx2", "1", "1"), ("avx512", "2", "1"), (None, "3", "4")],
)
def test_no_instruction_set_hash_seed_or_thread_setting_enters(
    level: str | None, seed: str, torch_threads: str, tmp_path: Path
) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    if level and LEVELS.get(here, 0) < LEVELS[level.upper()]:
        pytest.skip(f"this processor has no {level}")
    settings = {"ATEN_CPU_CAPABILITY": level} if level else {}
    dtypes = models.TYPES if level else ("BF16",)
    found = driven(tmp_path, "settings", *dtypes, PYTHONHASHSEED=seed, OMP_NUM_THREADS=torch_threads, **settings)
    assert deviating(found["results"]) == {}
    assert found["capability"] == (level.upper() if level else here)
    assert len(found["results"]) == len(matrix_driver.STRATEGIES) * len(dtypes)


def test_hash_seeds_are_really_different() -> None:
    program = [sys.executable, "-c", "print(hash('crdtmerge'))"]
    assert len({subprocess.check_output(program, env=environment(PYTHONHASHSEED=seed)) for seed in "0123"}) == 4


@pytest.mark.parametrize(
    ("case", "dtype", "order", "options", "settings"),
    [
        ("ties model", "BF16", "cab", ["--threads", 4], {"PYTHONHASHSEED": "3", "ATEN_CPU_CAPABILITY": "default"}),
        ("slerp", "F32", "bca", ["--rehash"], {"PYTHONHASHSEED": "0", "CRDTMERGE_KERNELS": "numba"}),
        ("dare", "F16", "acb", ["--threads", 1], {"PYTHONHASHSEED": "1", "CRDTMERGE_BLOCK": "65536"}),
    ],
)
def test_the_command_line_gives_the_pinned_bytes_too(
    case: str, dtype: str, order: str, options: list[object], settings: dict[str, str], tmp_path: Path
) -> None:
    paths = matrix_driver.written(tmp_path / "models", dtype, models.SHAPES)
    strategy, params = matrix_driver.STRATEGIES[case]
    weights = [part for who in order for part in ("--weight", matrix_driver.WEIGHTS[who])]
    base = [] if strategy in matrix_driver.NO_BASE else ["--base", paths["one", "base"]]
    asked = [part for key, value in params.items() for part in ("--set", f"{key}={value}")]
    ran = process(
        *("merge", *(paths["mixed", who] for who in order), *weights, *base, *asked, *options),
        *("--strategy", strategy, "-o", tmp_path / "out.safetensors", "--json"),
        settings=settings,
    )
    assert ran.code == 0, ran.err
    receipt = (tmp_path / "out.safetensors.receipt.json").read_bytes()
    found = f"{ran.json['output_digest'][:16]} {hashlib.sha256(receipt).hexdigest()[:16]}"
    assert found == PINNED[f"{case} {dtype}"]


def test_a_merge_run_twice_in_two_processes_gives_the_same_files(tmp_path: Path) -> None:
    models.save(tmp_path / "a.safetensors", models.state("a"))
    models.save(tmp_path / "b.safetensors", models.state("b"))
    for order, out, seed in (("ab", "one", "1"), ("ba", "two", "2")):
        inputs = [tmp_path / f"{who}.safetensors" for who in order]
        ran = process("merge", *inputs, "-o", tmp_path / out, settings={"PYTHONHASHSEED": seed})
        assert ran.code == 0, ran.err
    names = {"model.safetensors", "receipt.json", "inputs.json"}
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two
    assert one.keys() == names
