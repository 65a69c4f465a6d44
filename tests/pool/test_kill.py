"""A process that is killed at any instant loses nothing that it acknowledged and leaves nothing half.

Replay one with: CRDTMERGE_KILL_SEED=17 python -m pytest tests/pool/test_kill.py -m soak -k replay
(a seed fixes what the process does and when it is killed, as far as the machine is as busy as then).
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
from crdtmerge.resolve.verify import intact
from tests.pool.kill_driver import WORKS, complete
from tests.pool.replicas import KEYS, broken, founded, model, second
from tests.pool.test_many_processes import ROOT, check_chains


def _killed(folder: Path, seed: int) -> list[list[str]]:
    """What a driver said before it was killed at a random instant."""
    rng = random.Random(f"kill {seed}")
    kind = WORKS[seed % len(WORKS)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.pool.kill_driver", str(folder), str(seed), kind],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    first = child.stdout.readline()
    assert first == b"ready\n", child.stderr.read().decode()
    lines = [child.stdout.readline() for _ in range(rng.randrange(3 if kind == "resolve" else 12))]
    time.sleep(rng.random() * rng.choice((0.002, 0.01, 0.05)))
    assert child.poll() is None, child.stderr.read().decode()
    child.kill()
    lines += child.stdout.readlines()
    child.stdout.close()
    child.stderr.close()
    child.wait()
    return [line.decode().split() for line in lines if line.endswith(b"\n")]


class Drained:
    """A folder that drivers are killed on, one after the other, and what they acknowledged."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "pool"
        with founded(self.folder) as replica:
            replica.add(model(0))
            second(replica, root / "peer", KEYS[1]).close()
        self.ops: set[bytes] = set()
        self.contents: set[bytes] = set()
        self.outs: set[str] = set()

    def kill(self, seed: int) -> None:
        """Run a driver, kill it, and look whether all is as it said."""
        try:
            self._note(_killed(self.folder, seed))
            self._check()
        except BaseException as fault:
            raise AssertionError(
                f"kill seed {seed} ({WORKS[seed % len(WORKS)]}): {type(fault).__name__}: {fault}\n"
                f"replay: CRDTMERGE_KILL_SEED={seed} python -m pytest tests/pool/test_kill.py -m soak -k replay"
            ) from fault

    def _note(self, said: list[list[str]]) -> None:
        for what, which in (line for line in said if len(line) == 2):
            if what == "op":
                self.ops.add(bytes.fromhex(which))
            elif what == "content":
                self.contents.add(bytes.fromhex(which))
            elif what == "going":
                self.contents.discard(bytes.fromhex(which))
            elif what == "out":
                self.outs.add(which)

    def _check(self) -> None:
        with Replica.open(self.folder) as replica:
            lost = [op.hex()[:16] for op in self.ops if op not in replica.opset]
            assert not lost, f"acknowledged operations are gone: {lost}"
            absent = [_told(replica, content) for content in sorted(self.contents - replica.ready())]
            assert not absent, f"acknowledged tensors are gone: {absent}"
            assert not broken(replica), broken(replica)
            report = replica.fsck()
            assert report.clean, (report.faults, report.lost)
            check_chains(replica)
            self._check_outputs(replica)
            replica.gc(0)
            assert not list((replica.folder / "staged").iterdir()), "nobody is at work any more"
            after = replica.add(model(1))
            assert replica.is_ready(after.id)
            self.ops.add(after.op)
            check_chains(replica)

    def _check_outputs(self, replica: Replica) -> None:
        """An output is whole or absent; what is being written bears another name; each comes up to date again."""
        for name in ("out", "out.safetensors"):
            out = self.root / name
            receipt = out / "receipt.json" if name == "out" else self.root / f"{name}.receipt.json"
            if out.exists() and receipt.exists():
                from crdtmerge.resolve.receipt import Receipt

                assert intact(out, Receipt.from_bytes(receipt.read_bytes(), str(receipt))), f"{name} is not whole"
            elif name == "out.safetensors":  # between two renames a file stands without its receipt: it claims nothing
                for path in self.root.glob(f"{name}*"):
                    path.unlink()
            else:
                assert not out.exists(), f"{name} has no receipt"
        for path in self.root.glob(".out*crdtmerge-*"):
            assert path.name.startswith(".out"), "a hidden name, which nobody takes for an output"


def _told(replica: Replica, content: bytes) -> str:
    """What a replica knows of a content whose tensors should be here."""
    ops = [(op.kind, op.author.hex()[:4], op.seq) for op in replica.opset.history(content)]
    return f"{content.hex()[:16]}: live {len(replica.opset.live(content))}, here {replica.bytes_of(content)}, {ops}"


def test_what_was_acknowledged_outlives_a_kill_at_any_instant(tmp_path: Path) -> None:
    drained = Drained(tmp_path)
    for seed in range(20):
        drained.kill(seed)
    assert drained.ops
    assert drained.contents
    with Replica.open(drained.folder) as replica:
        complete(drained.folder, replica)
        resolved = replica.resolve_to(tmp_path / "out", threads=1)
        assert intact(tmp_path / "out", resolved.receipt)


@pytest.mark.soak
def test_what_was_acknowledged_outlives_two_hundred_kills(tmp_path: Path) -> None:
    for part in range(10):
        root = tmp_path / str(part)
        root.mkdir()
        drained = Drained(root)
        for seed in range(1000 + 20 * part, 1020 + 20 * part):
            drained.kill(seed)


@pytest.mark.soak
@pytest.mark.skipif("CRDTMERGE_KILL_SEED" not in os.environ, reason="CRDTMERGE_KILL_SEED says which one")
def test_replay_of_one_kill(tmp_path: Path) -> None:
    drained = Drained(tmp_path)
    for _ in range(20):
        drained.kill(int(os.environ["CRDTMERGE_KILL_SEED"]))


def test_a_replica_can_be_begun_where_a_killed_process_began_one(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.pool.replicas import founded, model\n"
        "print('go', flush=True)\n"
        "founded(Path(sys.argv[1]), recipe='task_arithmetic', like=None, base=model(0))"
    )
    rng = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "pool")], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.random() * 0.03)
        child.kill()
        child.communicate()
        if (tmp_path / "pool").exists():
            with Replica.open(tmp_path / "pool") as replica:
                assert replica.fsck().clean
                assert replica.genesis.base is not None
            break
        assert all(path.name.startswith(".pool.crdtmerge-") for path in tmp_path.iterdir())
    else:
        founded(tmp_path / "pool", recipe="task_arithmetic", like=None, base=model(0)).close()
