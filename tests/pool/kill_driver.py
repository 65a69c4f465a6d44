"""A process that works on a replica until it is killed, and says each thing that it was told is done.

    python -m tests.pool.kill_driver FOLDER SEED KIND        KIND: one of ``WORKS``

A line is printed, and flushed, after each step that was acknowledged: ``op ID``, ``content ID``, ``gone ID``,
``out NAME``. torch is never loaded.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from crdtmerge.pool.replica import Replica
from tests.pool.replicas import contents, model, said_by

WORKS = ("add", "include", "collect", "resolve")


def say(*said: str) -> None:
    """One line that whoever kills us reads."""
    sys.stdout.write(" ".join(said) + "\n")
    sys.stdout.flush()


def add(replica: Replica, rng: random.Random) -> None:
    """One more content."""
    added = replica.add(model(rng.randrange(1 << 20)), note=str(rng.random()))
    say("op", added.op.hex())
    say("content", added.id.hex())


def remove(replica: Replica, rng: random.Random) -> None:
    """One content less."""
    found = sorted(contents(replica))
    if found:
        content = rng.choice(found)
        say("going", content.hex())
        for op in replica.remove(content).ops:
            say("op", op.hex())


def work_add(folder: Path, replica: Replica, rng: random.Random) -> None:
    """Add, and now and then remove or retract."""
    add(replica, rng)
    if rng.random() < 0.3:
        remove(replica, rng)
    if rng.random() < 0.2:
        for op in replica.retract(rng.randbytes(32)).ops:
            say("op", op.hex())


def complete(folder: Path, replica: Replica) -> None:
    """All that the peer has comes in, also what was only announced so far."""
    bundle = folder.parent / f"whole{time.time_ns()}"
    with Replica.open(folder.parent / "peer") as peer:
        peer.export(bundle)
    replica.include(bundle)
    bundle.unlink()


def work_include(folder: Path, replica: Replica, rng: random.Random) -> None:
    """Another replica adds; its state comes in as a bundle, or as operations alone."""
    with Replica.open(folder.parent / "peer") as peer:
        added = peer.add(model(rng.randrange(1 << 20)))
        announced = rng.random() < 0.3
        if announced:
            for op in replica.join(*said_by(peer)).new:
                say("op", op.id.hex())
        bundle = folder.parent / f"bundle{rng.randrange(1 << 40)}"
        peer.export(bundle, replica.heads if not announced and rng.random() < 0.5 else ())
    for op in replica.include(bundle)[0].new:
        say("op", op.id.hex())
    say("content", added.id.hex())
    bundle.unlink()


def work_collect(folder: Path, replica: Replica, rng: random.Random) -> None:
    """Add, remove and collect at once what nothing needs."""
    add(replica, rng)
    remove(replica, rng)
    replica.gc(0)
    if rng.random() < 0.5:
        add(replica, rng)


def work_resolve(folder: Path, replica: Replica, rng: random.Random) -> None:
    """Add, and bring outputs up to date."""
    add(replica, rng)
    complete(folder, replica)
    for name in ("out", "out.safetensors"):
        replica.resolve_to(folder.parent / name, threads=1)
        say("out", name)


def main() -> None:
    """Work until killed."""
    folder, rng, kind = Path(sys.argv[1]), random.Random(int(sys.argv[2])), sys.argv[3]
    work: Callable[[Path, Replica, random.Random], None] = globals()[f"work_{kind}"]
    with Replica.open(folder) as replica:
        say("ready")
        while True:
            work(folder, replica, rng)


if __name__ == "__main__":
    main()
