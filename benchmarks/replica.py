"""Benchmarks of a replica: opening it, joining one operation, status, and adding a checkpoint; beside floor and peer.

RULES
- The set is made of signed operations as peers send them: 60 % ADDs of new contents, 20 % REMOVEs, 15 % ADDs that say
  something new of a content, 5 % RETRACTs, by 16 keys.
- One more operation is read, checked and joined 200 times, each in a commit of its own: with the syncs that durability
  asks for, and on a copy without them (synchronous=OFF), which is the work beside the sync.
- The floor of an add is what the machine needs to hash the same files by BLAKE3 (memory-mapped, all cores, as b3sum
  does), copy them and fsync the copies. Both alternate, after a pass that brings the files into the page cache.

Example: python -m benchmarks.replica --ops 100000 --model .bench/big/ft1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import blake3

from benchmarks.measure import measure
from crdtmerge.keys import Key
from crdtmerge.pool.replica import Replica
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Manifest, Row, Says
from crdtmerge.replica.op import Add, Op, Payload, Remove, Retract, signed

KEYS = [Key.from_seed(bytes([number]) * 32) for number in range(16)]
PEER = Path(".peers/crdt-merge/bin/python")
BATCH = 1000


class Author:
    """Makes operations as many peers would, each after all that came before."""

    def __init__(self, pool: bytes, seed: int) -> None:
        self.pool, self.random, self.last = pool, random.Random(seed), None
        self.chains: dict[bytes, Op] = {}
        self.dots: list[Op] = []
        self.height = 0
        self.head: bytes | None = None

    def next(self) -> tuple[Op, Manifest | None]:
        """An operation and, for a new content, its manifest."""
        kind = self.random.random()
        manifest = None
        if kind < 0.60 or not self.dots:
            manifest = Manifest((Row("w", "F32", (2,), self.random.randbytes(32)),))
            op = self._signed(Add(manifest.id), self.random.choice(KEYS))
            self.dots.append(op)
            return op, manifest
        dot = self.random.choice(self.dots)
        key = next(key for key in KEYS if key.public == dot.author)
        assert isinstance(dot.payload, Add)
        if kind < 0.80:
            self.dots = [one for one in self.dots if one is not dot]
            return self._signed(Remove((dot.id,)), key), None
        if kind < 0.95:
            return self._signed(Add(dot.payload.content, Says(note=f"number {self.height}")), key), None
        return self._signed(Retract(dot.payload.content, "measured"), key), None

    def _signed(self, payload: Payload, key: Key) -> Op:
        tip = self.chains.get(key.public)
        deps = (self.head,) if self.head and (tip is None or self.head != tip.id) else ()
        self.height += 1
        op = signed(
            key, self.pool, bytes(16), tip.seq + 1 if tip else 1, tip.id if tip else None, deps, self.height, payload
        )
        self.chains[key.public], self.head = op, op.id
        return op


def build(folder: Path, count: int) -> tuple[Author, float]:
    """A replica with ``count`` operations; (who makes more of them, operations a second while joining)."""
    import numpy as np

    replica = Replica.create(folder, Recipe("weight_average"), like={"w": np.zeros(2, np.float32)}, key=KEYS[0])
    author = Author(replica.pool_id, 0)
    seconds = 0.0
    for at in range(0, count, BATCH):
        made = [author.next() for _ in range(min(BATCH, count - at))]
        begin = time.perf_counter()
        replica.join([op for op, _ in made], {manifest.id: manifest for _, manifest in made if manifest})
        seconds += time.perf_counter() - begin
    assert len(replica.opset) == count
    replica.close()
    return author, count / seconds


OPEN = """
import sys, time
from crdtmerge.pool.replica import Replica
begin = time.perf_counter()
replica = Replica.open(sys.argv[1])
found = replica.root, replica.state_root, replica.heads, len(replica.opset)
print(time.perf_counter() - begin)
"""


def set_figures(folder: Path, count: int) -> dict[str, Any]:
    """Opening, status, and joining one more, at ``count`` operations."""
    author, rate = build(folder, count)
    opened = [float(_child(OPEN, folder)) for _ in range(5)]
    status = [measure([sys.executable, "-m", "crdtmerge", "status", "--json", "-C", str(folder)]) for _ in range(5)]
    assert all(one.exit_code == 0 for one in status)
    with Replica.open(folder) as replica:
        visible = len(replica.visible)
        durable = seconds_of_joins(replica, author)
        replica._room.database.run("PRAGMA synchronous = OFF")
        unsynced = seconds_of_joins(replica, author)
    return {
        "ops": count,
        "visible": visible,
        "database_bytes": sum(path.stat().st_size for path in folder.glob("pool.sqlite*")),
        "join_ops_per_second_in_batches": rate,
        "open_seconds": statistics.median(opened),
        "status_process_seconds": statistics.median(one.wall_seconds for one in status),
        "join_one_ms": durable * 1e3,
        "join_one_without_sync_ms": unsynced * 1e3,
    }


def seconds_of_joins(replica: Replica, author: Author) -> float:
    """The median of 200 joins of one operation each, from its bytes on."""
    seconds = []
    for _ in range(200):
        op, manifest = author.next()
        wire, manifests = op.wire, {manifest.id: manifest} if manifest else {}
        begin = time.perf_counter()
        replica.join([Op.from_wire(wire)], manifests)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _child(program: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


def floor_seconds(model: Path, scratch: Path) -> float:
    """Hash the files of a model, copy them, make the copies durable."""
    files = sorted(model.glob("*.safetensors"))
    scratch.mkdir()

    begin = time.perf_counter()
    for path in files:
        blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).digest()
        copied = scratch / path.name
        shutil.copyfile(path, copied)
        descriptor = os.open(copied, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begin
    shutil.rmtree(scratch)
    return seconds


def add_figures(model: Path, scratch: Path, runs: int) -> dict[str, Any]:
    """Adding a checkpoint to a new replica, beside hash, copy and fsync of the same files."""
    os.environ["CRDTMERGE_CACHE"] = str(scratch / "cache")
    for path in model.glob("*.safetensors"):
        blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).digest()
    adds, floors, nbytes = [], [], 0
    for run in range(runs):
        floors.append(floor_seconds(model, scratch / "floor"))
        folder = scratch / f"add{run}"
        with Replica.create(folder, Recipe("weight_average"), like=model) as replica:
            begin = time.perf_counter()
            nbytes = replica.add(model).nbytes
            adds.append(time.perf_counter() - begin)
        shutil.rmtree(folder)
        shutil.rmtree(scratch / "cache", ignore_errors=True)
    add_seconds, floor = statistics.median(adds), statistics.median(floors)
    pairs = [below / above for above, below in zip(adds, floors, strict=True)]
    return {
        "bytes": nbytes,
        "add_seconds": add_seconds,
        "floor_seconds": floor,
        "share_of_floor_speed": statistics.median(pairs),
        "add_gb_per_second": nbytes / 1e9 / add_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a replica.")
    parser.add_argument("--ops", type=int, default=100_000)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(".bench"))
    arguments = parser.parse_args()
    arguments.scratch.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        os.environ["XDG_STATE_HOME"] = str(scratch / "state")
        if arguments.model:
            figures["add"] = add_figures(arguments.model, scratch, arguments.runs)
        for count in sorted({100, 10_000, arguments.ops} & set(range(arguments.ops + 1))):
            figures[f"set of {count}"] = set_figures(scratch / f"set{count}", count)
        if PEER.exists():
            figures["crdt-merge"] = json.loads(_peer())
    print(json.dumps(figures, indent=2))


def _peer() -> str:
    done = subprocess.run([PEER, "benchmarks/published_set.py"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
