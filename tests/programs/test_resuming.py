"""A search that was stopped goes on: the same plan, no score computed twice, and none of another merge's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from crdtmerge.cli.app import app
from crdtmerge.programs.runner import Runner
from crdtmerge.testing.programs import write
from crdtmerge.testing.small_program import one_process, small_program
from tests.programs.conftest import normal

SIZE = 4
SEARCHES = {
    "evolutionary_merge": ["inner=task_arithmetic", "generations=25", "population=6", "metric=loss"],
    "genetic_merge": ["inner=linear", "generations=30", "population=6", "metric=loss", "levels=0"],
}
ENOUGH = 12
"""Lines of scores after which a search is killed, long before its end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models and two bases, the program and its data."""
    made = tmp_path_factory.mktemp("resuming")
    for seed, name in enumerate(("base", "other", "a", "b")):
        write({"weight": normal(seed, SIZE, SIZE).double()}, made / f"{name}.safetensors")
    with small_program(SIZE) as files, one_process():
        shutil.copy(files["program"], made / "model.pt2")
        shutil.copy(files["data"], made / "data.safetensors")
        yield made


def options(strategy: str, out: Path, base: str = "base", more: Sequence[str] = ()) -> list[str]:
    """The command after the program's name."""
    home = out.parent
    models = [str(home / "a.safetensors"), str(home / "b.safetensors"), "--base", str(home / f"{base}.safetensors")]
    inputs = ["--input", f"program={home / 'model.pt2'}", "--input", f"data={home / 'data.safetensors'}"]
    settings = [word for setting in SEARCHES[strategy] for word in ("--set", setting)]
    return ["plan", *models, "--strategy", strategy, *inputs, *settings, *more, "-o", str(out), "--json"]


class Counted:
    """How many candidates ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, ran = 0, Runner.run

        def run(runner: Runner, job: str, *rest: Any, **how: Any) -> Any:
            self.count += job == "fitness"
            return ran(runner, job, *rest, **how)

        monkeypatch.setattr(Runner, "run", run)

    def plan(self, command: list[str]) -> int:
        """Make a plan here; how many candidates that took."""
        before = self.count
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        return self.count - before


def complete(scores: Path) -> list[str]:
    """The lines of a file of scores that were not cut off, without the first, which names the merge."""
    return scores.read_text().split("\n")[1:-1]


def killed(command: list[str], scores: Path) -> None:
    """Begin in a process and kill it in the middle."""
    with subprocess.Popen([sys.executable, "-m", "crdtmerge", *command], stdout=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if scores.exists() and len(complete(scores)) >= ENOUGH:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was still searching"


def interrupted(command: list[str], scores: Path, after: int = ENOUGH) -> None:
    """Begin here, and stop after so many candidates."""
    ran, left = Runner.run, iter(range(after))

    def run(runner: Runner, *rest: Any, **how: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return ran(runner, *rest, **how)

    with mock.patch.object(Runner, "run", run):
        assert CliRunner().invoke(app, command).exit_code != 0
    assert scores.exists()


@pytest.mark.parametrize(("strategy", "stop"), [("evolutionary_merge", killed), ("genetic_merge", interrupted)])
def test_a_search_that_was_stopped_goes_on_and_finds_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, stop: Callable[[list[str], Path], None]
) -> None:
    counted = Counted(monkeypatch)
    whole, out = folder / f"{strategy}.whole.plan", folder / f"{strategy}.plan"
    every = counted.plan(options(strategy, whole))
    scores = out.with_name(f"{out.name}.scores")
    stop(options(strategy, out), scores)
    assert not out.exists()
    known = len(complete(scores))
    assert ENOUGH <= known < every
    kept, torn = complete(scores), scores.read_text() + scores.read_text().split("\n")[1][:-3]

    assert counted.plan(options(strategy, out)) == every - known
    assert out.read_bytes() == whole.read_bytes()
    assert not scores.exists(), "a plan that is done needs no scores"

    scores.write_text(torn)
    interrupted(options(strategy, out), scores, 1)
    assert complete(scores)[:-1] == kept, "a last line that was cut off is away, and the next is whole"
    assert counted.plan(options(strategy, out)) == every - known - 1
    assert out.read_bytes() == whole.read_bytes()


def test_scores_of_another_merge_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another base or dtype, cut off or garbled: everything is computed anew, and the plan is its own."""
    counted = Counted(monkeypatch)
    strategy, out = "evolutionary_merge", folder / "one.plan"
    scores = out.with_name(f"{out.name}.scores")
    interrupted(options(strategy, out), scores)
    kept = scores.read_text()
    key, *lines = kept.splitlines()
    asked: list[tuple[str, list[str]]] = [("other", []), ("base", ["--dtype", "bfloat16"])]
    for number, (base, more) in enumerate(asked):
        whole = folder / f"{number}.plan"
        every = counted.plan(options(strategy, whole, base, more))
        scores.write_text(kept)
        assert counted.plan(options(strategy, out, base, more)) == every
        assert out.read_bytes() == whole.read_bytes()
    for strange in (key[:-1].encode(), "\n".join(["0" * 64, *lines, ""]).encode(), b"\xff" + kept.encode()):
        scores.write_bytes(strange)
        assert counted.plan(options(strategy, out)) == every
    first, *rest = lines
    scores.write_text("\n".join([key, "no score", f"{first}?", *rest, ""]))
    assert counted.plan(options(strategy, out)) == every - len(rest), "a line that is none is passed over"
