"""Processes that write to one folder at once, and are killed at any instant, lose nothing that they acknowledged.

Replay a seed with: CRDTMERGE_BUCKET_SEED=17 python -m pytest tests/gossip/test_bucket_kills.py -m soak -k replay
(a seed fixes what the processes do and which is killed when, as far as the machine is as busy as then).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crdtmerge.pool.replica import Replica
from tests.gossip.bucket_replicas import begun, check_equal, pair, sync
from tests.pool.replicas import KEYS
from tests.pool.test_many_processes import ROOT


class Driver:
    """A process at work on a replica."""

    def __init__(self, folder: Path, where: Path, seed: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gossip.bucket_driver", str(folder), str(where), seed],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.lines: list[bytes] = []

    def read(self, count: int) -> None:
        """Wait for some lines."""
        assert self.process.stdout is not None
        for _ in range(count):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read().decode() if self.process.stderr else ""
            self.lines.append(line)

    def end(self, *, kill: bool) -> list[list[str]]:
        """What it said until it ended."""
        if kill:
            self.process.kill()
        out, err = self.process.communicate()
        assert kill or self.process.returncode == 0, err.decode()
        said = b"".join(self.lines) + out
        return [line.decode().split() for line in said.splitlines(keepends=True) if line.endswith(b"\n")]


class Meeting:
    """Two replicas that meet in a folder, and what their processes acknowledged."""

    def __init__(self, root: Path) -> None:
        self.root, self.shared = root, root / "shared"
        for replica in pair(root, self.shared, curators="any"):
            replica.close()
        self.ops: set[bytes] = set()
        self.given: set[bytes] = set()
        """Operations that were acknowledged before a sync that was."""
        self.contents: set[bytes] = set()

    def round(self, seed: int) -> None:
        """Two processes at once, one of which is killed."""
        rng = random.Random(f"bucket {seed}")
        victim = rng.randrange(2)
        drivers = [Driver(self.root / name, self.shared, f"{seed} {name}") for name in ("one", "two")]
        try:
            for driver in drivers:
                driver.read(1)
            drivers[victim].read(rng.randrange(15))
            time.sleep(rng.random() * rng.choice((0.002, 0.02, 0.1)))
        finally:
            said = [drivers[victim].end(kill=True), drivers[1 - victim].end(kill=False)]
        for lines in said:
            self._note(lines)

    def _note(self, lines: list[list[str]]) -> None:
        mine: set[bytes] = set()
        for what, *which in lines:
            if what == "op":
                mine.add(bytes.fromhex(which[0]))
            elif what == "content":
                self.contents.add(bytes.fromhex(which[0]))
            elif what == "going":
                self.contents.discard(bytes.fromhex(which[0]))
            elif what == "synced":
                self.given |= mine
        self.ops |= mine

    def check(self, number: int) -> None:
        """All that was acknowledged is where it must be."""
        with begun(self.root / f"reader{number}", self.shared, key=KEYS[2]) as reader:
            missing = [op.hex()[:16] for op in self.given if op not in reader.opset]
            assert not missing, f"operations of an acknowledged sync are not in the folder: {missing}"
            with Replica.open(self.root / "one") as one, Replica.open(self.root / "two") as two:
                for replica in (one, two, one, reader):
                    report = sync(replica, self.shared)
                    assert not report.false
                    assert not report.failing
                    assert not report.waiting
                lost = [op.hex()[:16] for op in self.ops if op not in one.opset]
                assert not lost, f"acknowledged operations are gone: {lost}"
                check_equal([one, two, reader])
                assert self.contents - one.ready() <= {hidden.id for hidden in one.opset.hidden()}


def _rounds(root: Path, seeds: range) -> None:
    meeting = Meeting(root)
    for seed in seeds:
        try:
            meeting.round(seed)
            if seed % 10 == 9 or seed == seeds[-1]:
                meeting.check(seed)
        except BaseException as fault:
            raise AssertionError(
                f"bucket seed {seed} (of rounds from {seeds[0]} on): {type(fault).__name__}: {fault}\n"
                f"replay: CRDTMERGE_BUCKET_SEED={seed} python -m pytest tests/gossip/test_bucket_kills.py -m soak "
                "-k replay"
            ) from fault
    assert meeting.ops
    assert meeting.given


def test_writers_that_are_killed_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    _rounds(tmp_path, range(4))


@pytest.mark.soak
def test_writers_that_are_killed_a_hundred_times_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    for part in range(5):
        root = tmp_path / str(part)
        root.mkdir()
        _rounds(root, range(100 + 20 * part, 120 + 20 * part))


@pytest.mark.soak
@pytest.mark.skipif("CRDTMERGE_BUCKET_SEED" not in os.environ, reason="CRDTMERGE_BUCKET_SEED says which one")
def test_replay_of_one_seed(tmp_path: Path) -> None:
    for number in range(20):
        root = tmp_path / str(number)
        root.mkdir()
        _rounds(root, range(int(os.environ["CRDTMERGE_BUCKET_SEED"]), int(os.environ["CRDTMERGE_BUCKET_SEED"]) + 1))
