"""Collection: what nothing needs goes in two phases; what is needed, leased or young never does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crdtmerge.pool.replica import Replica
from crdtmerge.store.collect import GRACE_SECONDS
from crdtmerge.store.leases import Lease
from tests.pool.replicas import (
    ELEMENTS,
    KEYS,
    blob_files,
    broken,
    contents,
    exchange,
    founded,
    model,
    second,
    sql,
)
from tests.pool.test_replica import _checkpoint

ROOT = Path(__file__).parents[2]


class Clock:
    """The time of day, as a test wants it."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        """Now."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands until the test moves it."""
    found = Clock()
    monkeypatch.setattr(time, "time", found.time)
    return found


@pytest.fixture
def pool(tmp_path: Path) -> Replica:
    """A pool in which model 1 is visible and model 2 was removed."""
    replica = founded(tmp_path / "pool")
    replica.add(model(1))
    replica.remove(replica.add(model(2)).id)
    return replica


def _states(replica: Replica) -> dict[str, int]:
    """How many blobs are in which state."""
    return dict(sql(replica.folder, "SELECT state, count(*) FROM blobs GROUP BY state"))


def test_what_nothing_needs_goes_in_two_phases_each_after_a_time_of_grace(pool: Replica, clock: Clock) -> None:
    large = 4 * ELEMENTS
    assert pool.gc().trashed == 0, "it is young"
    clock.now += GRACE_SECONDS + 1
    first = pool.gc()
    assert (first.trashed, first.trashed_bytes, first.removed) == (2, large + 8, 0)
    assert len(blob_files(pool.folder)) == 3, "trash is still there"
    clock.now += GRACE_SECONDS - 1
    between = pool.gc()
    assert (between.trashed, between.removed) == (0, 0)
    clock.now += 2
    last = pool.gc()
    assert (last.trashed, last.removed, last.removed_bytes) == (0, 2, large + 8)
    assert len(blob_files(pool.folder)) == 2
    assert pool.gc() == type(last)(0, 0, 0, 0, 0)
    assert not broken(pool)
    assert pool.fsck().clean


def test_what_is_shared_with_a_live_content_stays(pool: Replica) -> None:
    pool.gc(0)
    pool.gc(0)
    (entry,) = pool.visible
    assert pool.is_ready(entry.id)
    assert _states(pool) == {"ready": 3}
    assert len(pool.resolve()) == 3


def test_a_retracted_content_is_kept_and_a_removed_one_is_not_ready_any_more(pool: Replica) -> None:
    (entry,) = pool.visible
    pool.retract(entry.id)
    pool.gc(0)
    pool.gc(0)
    assert _states(pool) == {"ready": 3}
    assert pool.ready() == {entry.id}
    pool.unretract(entry.id)
    assert len(pool.resolve()) == 3


def test_the_base_and_every_carried_file_are_kept(tmp_path: Path) -> None:
    long = '{"a": "' + "x" * 20000 + '"}'
    base = _checkpoint(tmp_path / "base", model(0), {"tokenizer.json": long, "config.json": "{}"})
    other = _checkpoint(tmp_path / "ft", model(1), {"vocab.json": long + " ", "config.json": "{ }"})
    with founded(tmp_path / "pool", recipe="task_arithmetic", like=None, base=base) as replica:
        replica.add(other)
        before = len(blob_files(tmp_path / "pool"))
        for _ in range(3):
            assert replica.gc(0).removed == 0
        assert len(blob_files(tmp_path / "pool")) == before
        assert replica.fsck().clean
        replica.resolve_to(tmp_path / "out")
        assert (tmp_path / "out" / "tokenizer.json").read_text() == long


def test_trash_that_is_needed_again_is_taken_back_by_the_collection(pool: Replica, tmp_path: Path) -> None:
    with second(pool, tmp_path / "two", KEYS[1]) as two:
        removed = next(content for content in pool.opset.contents() if content not in contents(pool))
        concurrent = two.add(model(2))
        assert concurrent.id == removed
        pool.gc(0)
        assert _states(pool) == {"ready": 3, "trash": 2}
        exchange(pool, two)
        pool.gc(0)
        assert _states(pool) == {"ready": 5}
        assert removed in contents(pool)
        assert len(pool.resolve()) == 3, "its tensors never left"
        assert pool.fsck().clean


def test_a_content_whose_trash_was_taken_back_is_ready_again(pool: Replica, tmp_path: Path) -> None:
    with second(pool, tmp_path / "two", KEYS[1]) as two:
        concurrent = two.add(model(2))
        pool.gc(0)
        exchange(pool, two)
        pool.gc(0)
        assert len(pool.resolve()) == 3
        assert pool.is_ready(concurrent.id)


def test_adding_again_takes_trash_back(pool: Replica) -> None:
    pool.gc(0)
    before = {path: path.read_bytes() for path in blob_files(pool.folder)}
    again = pool.add(model(2))
    assert again.new_bytes == 0
    assert _states(pool) == {"ready": 5}
    pool.gc(0)
    pool.gc(0)
    assert {path: path.read_bytes() for path in blob_files(pool.folder)} == before
    assert pool.ready() == contents(pool)
    assert pool.fsck().clean


def test_what_was_removed_for_good_can_be_added_again(pool: Replica) -> None:
    pool.gc(0)
    pool.gc(0)
    assert pool.add(model(2)).new_bytes == 4 * ELEMENTS + 8
    assert not broken(pool)
    assert pool.fsck().clean


def test_what_a_living_process_leased_is_kept(pool: Replica) -> None:
    digests = [row[0] for row in sql(pool.folder, "SELECT digest FROM blobs")]
    with Lease(pool._room.database) as lease:
        lease.hold(digests)
        for _ in range(3):
            assert pool.gc(0).trashed == 0
    assert pool.gc(0).trashed == 2
    with Lease(pool._room.database) as lease:
        lease.hold(digests)
        pool.gc(0)
        assert _states(pool) == {"ready": 5}, "leased trash is taken back"


HOLDER = """
import sys, time
from pathlib import Path
from crdtmerge.store.database import Database
from crdtmerge.store.leases import Lease

database = Database.open(Path(sys.argv[1]))
with Lease(database) as lease:
    lease.hold([row[0] for row in database.rows("SELECT digest FROM blobs")])
    (Path(sys.argv[1]) / "staged" / "half").mkdir()
    (Path(sys.argv[1]) / "staged" / "half" / "file").write_bytes(bytes(1000))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_s_lease_is_none_and_what_it_staged_is_removed(pool: Replica) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, pool.folder], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n", child.stderr and child.stderr.read()
        assert pool.gc(0).trashed == 0
        assert (pool.folder / "staged" / "half" / "file").exists(), "whoever staged it lives"
    finally:
        child.kill()
        child.communicate()
    collected = pool.gc(0)
    assert (collected.trashed, collected.strays) == (2, 1)
    assert not list((pool.folder / "staged").iterdir())
    assert sql(pool.folder, "SELECT count(*) FROM leases") == [(0,)]
    assert sql(pool.folder, "SELECT count(*) FROM leased") == [(0,)]


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(pool: Replica) -> None:
    with Lease(pool._room.database) as lease:
        lease.hold([row[0] for row in sql(pool.folder, "SELECT digest FROM blobs")])
        sql(pool.folder, "UPDATE leases SET started = started - 1")
        assert pool.gc(0).trashed == 2


def test_the_lease_of_another_boot_is_none(pool: Replica) -> None:
    with Lease(pool._room.database) as lease:
        lease.hold([row[0] for row in sql(pool.folder, "SELECT digest FROM blobs")])
        sql(pool.folder, "UPDATE leases SET boot = 'before'")
        assert pool.gc(0).trashed == 2


def test_files_that_no_row_names_are_removed_when_they_are_old_enough(pool: Replica, clock: Clock) -> None:
    stray, foreign = (pool.folder / "blobs" / "cd" / name for name in ("cd" * 32, "x (conflicted copy)"))
    for path in (stray, foreign):
        path.write_bytes(b"left over")
        os.utime(path, (clock.now, clock.now))
    assert pool.gc().strays == 0
    clock.now += GRACE_SECONDS + 1
    assert pool.gc().strays == 1
    assert not stray.exists()
    assert foreign.exists(), "what has no name of ours is not ours to remove"


@pytest.mark.parametrize("where", ["blobs/.DS_Store", "blobs/ab/folder/"])
def test_what_strangers_left_among_the_blobs_does_not_stop_a_collection(pool: Replica, where: str) -> None:
    path = pool.folder / where
    path.mkdir() if where.endswith("/") else path.write_bytes(b"")
    assert pool.gc(0).trashed == 2
    assert pool.gc(0).removed == 2


def test_a_clock_that_was_set_back_collects_nothing_too_early(pool: Replica, clock: Clock) -> None:
    clock.now += GRACE_SECONDS + 1
    pool.gc()
    clock.now -= 10 * GRACE_SECONDS
    assert pool.gc().removed == 0
    assert not broken(pool)


def test_a_collection_while_others_add_takes_nothing_from_them(tmp_path: Path) -> None:
    """A blob that is here and unneeded while it is staged, and collected before it is published."""
    with founded(tmp_path / "pool") as replica, Replica.open(tmp_path / "pool") as other:
        path = _checkpoint(tmp_path / "ft", model(1))
        os.utime(path / "model.safetensors", (1e9, 1e9))
        replica.remove(replica.add(path).id)
        real = replica._room.group.run

        def collected_first(work: object) -> object:
            replica._room.group.run = real  # type: ignore[method-assign]
            other.gc(0)
            other.gc(0)
            return real(work)  # type: ignore[arg-type]

        replica._room.group.run = collected_first  # type: ignore[method-assign, assignment]
        added = replica.add(path)
        assert replica.is_ready(added.id)
        assert not broken(replica)
        assert replica.fsck().clean


def test_an_empty_pool_has_nothing_to_collect(tmp_path: Path) -> None:
    with founded(tmp_path / "pool", like={"w": np.float32([1])}) as replica:
        collected = replica.gc(0)
        assert (collected.trashed, collected.removed, collected.strays) == (0, 0, 0)
