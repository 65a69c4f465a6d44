"""A process that changes a replica and syncs it with a folder or bucket until its input ends, or it is killed.

    python -m tests.gossip.bucket_driver FOLDER WHERE SEED

A line is printed, and flushed, after each step that was acknowledged: ``op ID``, ``content ID``, ``going ID``,
``synced``. torch is never loaded.
"""

from __future__ import annotations

import random
import select
import sys
from pathlib import Path

from crdtmerge.pool.replica import Replica
from tests.gossip.bucket_replicas import sync
from tests.pool.replicas import contents, model


def say(*said: str) -> None:
    """One line that whoever kills us reads."""
    sys.stdout.write(" ".join(said) + "\n")
    sys.stdout.flush()


def step(replica: Replica, where: str, rng: random.Random) -> None:
    """Add, remove or sync."""
    chance = rng.random()
    visible = sorted(contents(replica))
    if chance < 0.4:
        added = replica.add(model(rng.randrange(1 << 20)), note=str(rng.random()))
        say("op", added.op.hex())
        say("content", added.id.hex())
    elif chance < 0.5 and visible:
        content = rng.choice(visible)
        say("going", content.hex())
        for op in replica.remove(content).ops:
            say("op", op.hex())
    else:
        report = sync(replica, where)
        assert not report.false, report.false
        assert not report.failing, report.failing
        say("synced")


def main() -> None:
    """Work until the input ends."""
    folder, where, rng = Path(sys.argv[1]), sys.argv[2], random.Random(sys.argv[3])
    with Replica.open(folder) as replica:
        say("ready")
        while not select.select([sys.stdin], [], [], 0)[0]:
            step(replica, where, rng)


if __name__ == "__main__":
    main()
