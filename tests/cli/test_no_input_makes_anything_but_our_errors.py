"""Whatever a file holds, a command ends in order: done, a check that failed, or one of our errors; never a signal."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crdtmerge.errors import CrdtMergeError
from crdtmerge.resolve.receipt import json_bytes
from crdtmerge.resolve.verify import verify
from tests.resolve import forging, models
from tests.resolve.running import ROOT, environment, here

SEEDS = 200
FIRST = int(os.environ.get("CRDTMERGE_TEST_SEED", "0"))
"""Set it to try other mutations."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space")
@pytest.mark.parametrize("half", [0, 1])
def test_no_input_makes_anything_but_our_errors(half: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.mutation_driver", str(tmp_path), str(FIRST + half * SEEDS), str(SEEDS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert int(done.stdout) > SEEDS // 4, "most mutations should be noticed"


# Receipts that hold together but mean nothing

ODD: list[Any] = [
    *(None, True, 5, -1, 2**63, 2**64, 2**70, 10**400, 1.5, "", "x", "00", "1e400", "9" * 45, "\ud800", "\0", "*"),
    *([], [5], ["a"], [-1], [2**70], [["a"]], [["a", "b"]], [None], {}, {"a": 1}, {"value": 1, "where": 5}),
    *({"value": "0.3", "where": [5]}, {"value": "0.3", "where": [[5, 5]]}, {"value": "0.3", "where": [["w", "x"]]}),
    *([{"filter": "w"}], [{"value": "0.3"}], [{"filter": 5, "value": "0.3"}]),
]
RECIPE = ("strategy", "version", "params", "base", "dtype", "seed", "missing", "exclude", "allow_nonfinite")
WHOLE = ("recipe", "contributions", "tensors", "files", "build", "class", "format", "merge_id", "root", "seed")
PLACES: list[tuple[str | int, ...]] = [
    *((name,) for name in (*WHOLE, "output_digest", "recipe_id")),
    *(("recipe", name) for name in RECIPE),
    *(("recipe", "params", name) for name in ("density", "lambda", "scope")),
    *(("contributions", 0, *rest) for rest in ((), ("id",), ("weight",), ("role",), ("task",))),
    *(("tensors", 0, *rest) for rest in ((), ("name",), ("dtype",), ("shape",), ("digest",))),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    paths = [models.save(folder / f"{who}.safetensors", models.state(who)) for who in ("a", "b", "base")]
    command = ["merge", *paths[:2], "--base", paths[2], "--strategy", "ties", "-o", folder / "out"]
    assert here(*command).code == 0
    return folder / "out"


def changed(receipt: dict[str, Any], *, whole: bool) -> Iterator[tuple[str, bytes]]:
    """The receipt with an odd value in each place, its ids made to fit again if ``whole``."""
    for where in PLACES:
        for value in ODD:
            made = copy.deepcopy(receipt)
            try:
                forging.put(made, where, value)
                made = forging.consistent(made) if whole else made
            except (AssertionError, TypeError, ValueError, KeyError, AttributeError, OverflowError):
                continue
            yield f"{'.'.join(map(str, where))} = {str(value)[:60]!a}", json_bytes(made)


def leaks(output: Path, *, whole: bool) -> list[str]:
    """What verification raises that is no error of ours; it may not call any of them the same, either."""
    receipt = output / "receipt.json"
    good = receipt.read_bytes()
    found = []
    tried = 0
    try:
        for what, data in changed(json.loads(good), whole=whole):
            receipt.write_bytes(data)
            tried += 1
            try:
                verify(output, threads=1)
            except CrdtMergeError:
                continue
            except Exception as leak:  # noqa: BLE001
                found.append(f"{what}: {type(leak).__name__}: {leak}")
    finally:
        receipt.write_bytes(good)
    assert tried > 200
    return found


def test_a_receipt_that_does_not_hold_together_is_no_more_than_our_error(output: Path) -> None:
    assert leaks(output, whole=False) == []


def test_a_receipt_that_holds_together_but_means_nothing_is_no_more_than_our_error(output: Path) -> None:
    assert leaks(output, whole=True) == []


HINTS: dict[str, Any] = {
    "a number": 5,
    "a list": [],
    "nothing": {},
    "no base": {"contributions": []},
    "no list": {"contributions": 5, "base": None},
    "texts": {"contributions": ["a"], "base": "a"},
    "numbers": {"contributions": [5], "base": 5},
    "no paths": {"contributions": [{"id": "00"}], "base": None},
    "a path that is a number": {"contributions": [{"path": 5}], "base": None},
    "a path of nothing": {"contributions": [{"path": ""}], "base": None},
    "a path with a null": {"contributions": [{"path": "\0"}], "base": None},
    "half a surrogate pair": {"contributions": [{"path": "\ud800"}], "base": None},
    "a long name": {"contributions": [{"path": "a" * 300}], "base": None},
    "a long path": {"contributions": [{"path": "a/" * 5000}], "base": None},
    "a device": {"contributions": [{"path": "/dev/zero"}], "base": {"path": "/dev/full"}},
    "a folder without end": {"contributions": [{"path": "/proc"}], "base": None},
    "a missing base": {"contributions": [], "base": {"path": "/nowhere"}},
}


@pytest.mark.parametrize("case", HINTS)
def test_a_list_of_inputs_that_means_nothing_is_no_more_than_our_error(case: str, output: Path) -> None:
    hints = output / "inputs.json"
    good = hints.read_bytes()
    hints.write_bytes(json_bytes(HINTS[case]))
    try:
        ran = here("verify", output, "--json")
        assert ran.code in (1, 2)
        plain = here("verify", output)
        assert plain.code == ran.code
    finally:
        hints.write_bytes(good)


@pytest.mark.parametrize("name", ["receipt.json", "model.safetensors"])
def test_a_pipe_in_an_output_is_not_waited_for(name: str, output: Path, tmp_path: Path) -> None:
    here_too = tmp_path / "out"
    here_too.mkdir()
    for path in output.iterdir():
        (here_too / path.name).write_bytes(path.read_bytes())
    (here_too / name).unlink()
    os.mkfifo(here_too / name)
    command = [sys.executable, "-m", "crdtmerge", "verify", str(here_too)]
    done = subprocess.run(command, env=environment(), timeout=6, check=False, capture_output=True)
    assert done.returncode in (1, 2)


@pytest.mark.parametrize(
    "name", ["strategy", "version", "base", "dtype", "missing", "exclude", "allow_nonfinite", "self"]
)
def test_a_parameter_that_no_strategy_has_is_refused_whatever_it_is_called(name: str, output: Path) -> None:
    ran = here("merge", output, "--set", f"{name}=1", "--json")
    assert ran.code == 2
    assert ran.json["error"]["kind"] == "ParameterError"


def test_a_parameter_given_by_both_its_names_is_refused(output: Path) -> None:
    command = ["merge", output, "--base", output, "--strategy", "task_arithmetic"]
    assert here(*command, "--set", "lambda=1", "--set", "lambda_=2", "--json").code == 2
