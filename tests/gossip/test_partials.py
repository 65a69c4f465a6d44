"""Blobs that arrive in pieces: whatever the order, the threads, the crashes and the faults, whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, StorageError
from crdtmerge.pool.replica import Replica
from crdtmerge.store import partials as of_partials
from crdtmerge.store.blobs import fault_in
from crdtmerge.store.partials import Partial, Partials, Tree
from tests.gossip.blobs_in_pieces import Pieces, PowerLossError, VolatileDisk
from tests.pool.replicas import flipped, founded, sql
from tests.store.test_faults import Count, FailingDisk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    with founded(tmp_path / "pool") as found:
        yield found


def partials_of(replica: Replica, quota: int | None = None) -> Partials:
    return Partials(replica._room.blobs, quota)


def finish(replica: Replica, partials: Partials, partial: Partial) -> None:
    replica._room.group.run(lambda: partials.finish(partial))
    partials.close(partial)


def begun(partials: Partials, tensor: Pieces, numbers: int = 0) -> Partial:
    partial = partials.begin(tensor.tree)
    assert partial is not None
    for number in range(numbers):
        partials.write(partial, number, tensor.piece(number))
    return partial


def check_here(replica: Replica, tensor: Pieces) -> None:
    blob = replica._room.blobs.get(tensor.tree.digest)
    assert blob is not None
    assert fault_in(replica._room.blobs, blob) is None
    assert blob.nbytes == len(tensor.data)
    assert not list((replica.folder / "partial").iterdir())
    assert not sql(replica.folder, "SELECT * FROM partials")


@pytest.mark.parametrize("seed", range(8))
def test_pieces_come_in_any_order_from_any_thread_also_twice(replica: Replica, seed: int) -> None:
    source = random.Random(seed)
    tensors = [Pieces.of(seed * 10 + n, source.uniform(1.1, 7)) for n in range(3)]
    with partials_of(replica) as partials, ThreadPoolExecutor(8) as threads:
        found = {tensor: begun(partials, tensor) for tensor in tensors}
        jobs = [(tensor, number) for tensor in tensors for number in range(tensor.tree.parts)] * 2
        source.shuffle(jobs)
        list(threads.map(lambda job: partials.write(found[job[0]], job[1], job[0].piece(job[1])), jobs))
        for tensor, partial in found.items():
            assert partial.complete
            assert partial.done_bytes == len(tensor.data)
            finish(replica, partials, partial)
            check = replica._room.blobs.get(tensor.tree.digest)
            assert check is not None
            assert check.nonfinite is None
    for tensor in tensors:
        check_here(replica, tensor)


def test_what_was_committed_is_never_asked_for_again(replica: Replica) -> None:
    tensor = Pieces.of(1, 4.5)
    with partials_of(replica) as partials:
        begun(partials, tensor, 2)
        assert partials.begin(tensor.tree) is partials.begin(tensor.tree)
    with partials_of(replica) as partials:
        assert partials.known(tensor.tree.digest) == tensor.tree
        partial = begun(partials, tensor)
        assert partial.lacks() == [2, 3, 4]
        assert partial.done_bytes == 2 * limits.PIECE_BYTES


def test_wrong_pieces_and_wrong_trees_are_refused(replica: Replica) -> None:
    tensor = Pieces.of(1)
    with partials_of(replica) as partials:
        partial = begun(partials, tensor)
        wrongs = (b"", b"x", flipped(tensor.piece(0), 5), tensor.piece(1), tensor.piece(0)[:-1], tensor.data)
        for wrong in wrongs:
            with pytest.raises(FalsePeerError, match="other bytes"):
                partials.write(partial, 0, wrong)
        assert partial.lacks() == [0, 1, 2, 3]
    for pieces in (b"", tensor.tree.pieces[:-1], tensor.tree.pieces + bytes(32), flipped(tensor.tree.pieces, 40)):
        with pytest.raises(FalsePeerError, match="do not hash"):
            Tree.of(tensor.tree.digest, tensor.tree.dtype, tensor.tree.shape, pieces)


def test_bytes_that_no_replica_takes_are_the_fault_of_who_serves_them(replica: Replica) -> None:
    values = np.ones(2 * limits.PIECE_BYTES, np.uint8)
    values[-1] = 2
    tensor = Pieces.made_of(values)
    with partials_of(replica) as partials:
        partial = begun(partials, tensor, 1)
        with pytest.raises(FalsePeerError, match="BOOL"):
            partials.write(partial, 1, tensor.piece(1))


def test_where_values_are_not_finite_is_known_also_over_crashes(replica: Replica) -> None:
    values = np.ones(limits.PIECE_BYTES, np.float32)
    values[[5, 600_000, 900_000]] = np.nan
    tensor = Pieces.made_of(values)
    for numbers in ([3], [2, 1], [0]):
        with partials_of(replica) as partials:
            partial = begun(partials, tensor)
            for number in numbers:
                partials.write(partial, number, tensor.piece(number))
            if partial.complete:
                finish(replica, partials, partial)
    blob = replica._room.blobs.get(tensor.tree.digest)
    assert blob is not None
    assert blob.nonfinite == (3, 5)


# ---- faults


def script(partials: Partials, replica: Replica, tensors: list[Pieces]) -> None:
    """Fetch some tensors, now and then durably."""
    for tensor in tensors:
        partial = partials.begin(tensor.tree)
        assert partial is not None
        for number in partial.lacks():
            partials.write(partial, number, tensor.piece(number))
            if number == 1:
                partials.commit()
        finish(replica, partials, partial)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 20))])
def test_power_may_go_at_any_step_and_all_is_whole_in_the_end(tmp_path: Path, seed: int) -> None:
    tensors = [Pieces.of(seed, 2.5), Pieces.of(seed + 100, 4)]
    disk = VolatileDisk(seed)
    founded(tmp_path / "empty").close()
    at = 0
    while True:
        folder = tmp_path / "pool"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "empty", folder)
        disk.begin(at)
        replica = Replica.open(folder, disk=disk)
        partials = partials_of(replica)
        try:
            script(partials, replica, tensors)
            break
        except PowerLossError:
            with suppress(StorageError):
                partials.__exit__()
            replica.close()
        disk.lose_power()
        disk.begin()
        with Replica.open(folder, disk=disk) as again, partials_of(again) as left:
            script(left, again, [one for one in tensors if again._room.blobs.get(one.tree.digest) is None])
            for tensor in tensors:
                check_here(again, tensor)
        at += 1
    replica.close()
    assert at > 12
    assert {"write", "sync", "rename", "sync_folder"} <= set(disk.names)


def test_a_file_that_was_named_and_not_entered_is_not_fetched_again(replica: Replica) -> None:
    tensor = Pieces.of(1, 6)
    with partials_of(replica) as partials:
        partial = begun(partials, tensor, tensor.tree.parts)
        partials.commit()

        def crash() -> None:
            partials.finish(partial)
            raise PowerLossError

        with pytest.raises(PowerLossError):
            replica._room.group.run(crash)
    with partials_of(replica) as partials:
        partial = begun(partials, tensor)
        assert partial.complete
        finish(replica, partials, partial)
    check_here(replica, tensor)


@pytest.mark.parametrize(("number", "short"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_whatever_effect_fails_repeating_it_succeeds(tmp_path: Path, number: int, short: bool) -> None:
    tensors = [Pieces.of(1, 2.5), Pieces.of(2, 3)]
    count = Count()
    k, failed = 0, True
    while failed:
        k, failed = k + 1, False
        shutil.rmtree(tmp_path / "pool", ignore_errors=True)
        founded(tmp_path / "pool").close()
        with Replica.open(tmp_path / "pool", disk=FailingDisk(count, number, short=short)) as replica:
            count.begin(k)
            with partials_of(replica) as partials:
                left = list(tensors)
                while left:
                    try:
                        script(partials, replica, left)
                        break
                    except StorageError:
                        assert not failed, "only one effect fails"
                        failed = True
                        left = [one for one in left if replica._room.blobs.get(one.tree.digest) is None]
                        for open_one in list(partials._open.values()):
                            if open_one.complete:
                                partials.close(open_one)
            for tensor in tensors:
                check_here(replica, tensor)
    assert k > 12


def test_what_a_sync_refused_is_fetched_again_and_never_synced_again(tmp_path: Path) -> None:
    count, tensor = Count(), Pieces.of(1, 4)
    founded(tmp_path / "pool").close()
    with Replica.open(tmp_path / "pool", disk=FailingDisk(count, errno.EIO)) as replica:
        partials = partials_of(replica)
        partial = begun(partials, tensor, 1)
        partials.commit()
        partials.write(partial, 1, tensor.piece(1))
        count.begin(1)
        with pytest.raises(StorageError):
            partials.commit()
        with pytest.raises(StorageError, match="given up"):
            partials.write(partial, 2, tensor.piece(2))
        again = partials.begin(tensor.tree)
        assert again is not None
        assert again is not partial
        assert again.lacks() == [1, 2, 3]


def test_a_file_is_let_go_of_only_when_its_last_writer_is_done(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = Pieces.of(1, 3)
    with partials_of(replica) as partials:
        partial = begun(partials, tensor)
        write = type(replica._room.blobs.disk).write

        def slow(disk: object, descriptor: int, offset: int, data: object) -> None:
            partials.close(partial)
            os.fstat(descriptor)
            write(disk, descriptor, offset, data)  # type: ignore[arg-type]

        monkeypatch.setattr(type(replica._room.blobs.disk), "write", slow)
        partials.write(partial, 0, tensor.piece(0))
    with pytest.raises(OSError):
        os.fstat(partial.descriptor)


def test_a_blob_that_a_thread_still_begins_when_a_fetch_ends_is_let_go_of(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, known = Pieces.of(5, 3), Partials._known
    beginning, go_on = threading.Event(), threading.Event()

    def slow(self: Partials, tree: Tree, size: int) -> object:
        beginning.set()
        go_on.wait(20)
        return known(self, tree, size)

    ended = partials_of(replica)
    with ThreadPoolExecutor(2) as threads, monkeypatch.context() as slowly:
        slowly.setattr(Partials, "_known", slow)
        begin = threads.submit(ended.begin, tensor.tree)
        assert beginning.wait(20)
        end = threads.submit(ended.__exit__)
        wait([end], timeout=0.3)
        go_on.set()
        end.result()
        begin.result()
    assert ended.begin(tensor.tree) is None
    with partials_of(replica) as partials:
        assert begun(partials, tensor, 3).complete


def test_the_bytes_that_wait_for_a_sync_are_bounded(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_partials, "UNSYNCED_BYTES_MAX", 2 * limits.PIECE_BYTES)
    tensor = Pieces.of(1, 9)
    partials = partials_of(replica)
    partial = begun(partials, tensor)
    for number in range(tensor.tree.parts):
        partials.write(partial, number, tensor.piece(number))
        assert partial.unsynced <= 2 * limits.PIECE_BYTES
    (have,) = sql(replica.folder, "SELECT have FROM partials")[0]
    assert sum(byte.bit_count() for byte in have) >= tensor.tree.parts - 2


# ---- damage


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE partials SET have = x'00'",
        "UPDATE partials SET have = 'text'",
        "UPDATE partials SET have = 7",
        "UPDATE partials SET nonfinite = x'c1'",
        "UPDATE partials SET nonfinite = 5",
        "UPDATE partials SET shape = x'c1'",
        "UPDATE partials SET shape = x'91a178'",
        "UPDATE partials SET dtype = 'F99'",
        "UPDATE partials SET pieces = x'00'",
        "DELETE FROM partials",
    ],
)
def test_a_damaged_row_counts_for_nothing(replica: Replica, damage: str) -> None:
    tensor = Pieces.of(1, 9.5)
    with partials_of(replica) as partials:
        begun(partials, tensor, 3)
    sql(replica.folder, damage)
    with partials_of(replica) as partials:
        assert partials.known(tensor.tree.digest) in (None, tensor.tree)
        script(partials, replica, [tensor])
    check_here(replica, tensor)


@pytest.mark.parametrize("size", [0, 1, limits.PIECE_BYTES, 3 * limits.PIECE_BYTES - 1])
def test_a_truncated_or_vanished_file_is_begun_anew(replica: Replica, size: int) -> None:
    tensor = Pieces.of(1, 4.5)
    with partials_of(replica) as partials:
        begun(partials, tensor, 3)
    path = replica.folder / "partial" / tensor.tree.digest.hex()
    if size == 1:
        path.unlink()
    else:
        os.truncate(path, size)
    with partials_of(replica) as partials:
        assert len(begun(partials, tensor).lacks()) == 5
        script(partials, replica, [tensor])
    check_here(replica, tensor)


# ---- room


def test_a_blob_that_exceeds_the_quota_is_not_begun(replica: Replica) -> None:
    small, large = Pieces.of(1, 2), Pieces.of(2, 5)
    used = replica._room.blobs.used()
    with partials_of(replica, used + 4 * limits.MIB) as partials:
        with pytest.raises(StorageError, match="quota"):
            partials.begin(large.tree)
        begun(partials, small)
        with pytest.raises(StorageError, match="quota"):
            partials.begin(Pieces.of(3, 3).tree)
    assert replica._room.blobs.used() == used + len(small.data)


def test_a_blob_for_which_the_disk_has_no_room_is_not_begun(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(replica.folder)._replace(free=65 * limits.MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with partials_of(replica) as partials:
        with pytest.raises(StorageError, match="free"):
            partials.begin(Pieces.of(1, 2).tree)
        monkeypatch.undo()
        begun(partials, Pieces.of(1, 2))


def test_collection_keeps_what_is_needed_or_young_and_removes_the_rest(replica: Replica) -> None:
    old, young = Pieces.of(1, 2), Pieces.of(2, 2)
    with partials_of(replica) as partials:
        begun(partials, old, 1)
    sql(replica.folder, "UPDATE partials SET touched = touched - 100000")
    with partials_of(replica) as partials:
        begun(partials, young, 1)
    stray = replica.folder / "partial" / "something"
    stray.write_bytes(b"x")
    replica.gc(3600)
    assert [path.name for path in (replica.folder / "partial").iterdir()] == [young.tree.digest.hex()]
    assert sql(replica.folder, "SELECT digest FROM partials") == [(young.tree.digest,)]


def test_collection_leaves_alone_what_a_process_writes(replica: Replica) -> None:
    tensor = Pieces.of(1, 3)
    with partials_of(replica) as partials:
        partial = begun(partials, tensor, 1)
        replica.gc(0)
        assert sql(replica.folder, "SELECT digest FROM partials") == [(tensor.tree.digest,)]
        for number in partial.lacks():
            partials.write(partial, number, tensor.piece(number))
        finish(replica, partials, partial)
    check_here(replica, tensor)


# ---- processes

HOLDER = """
import sys, time
from pathlib import Path
from crdtmerge.pool.replica import Replica
from tests.gossip.blobs_in_pieces import Pieces
from tests.gossip.test_partials import begun, finish, partials_of

with Replica.open(sys.argv[1]) as replica:
    partials, tensor = partials_of(replica), Pieces.of(1, 4)
    partial = begun(partials, tensor, 2)
    partials.commit()
    print("holds", flush=True)
    sys.stdin.readline()
    for number in partial.lacks():
        partials.write(partial, number, tensor.piece(number))
    finish(replica, partials, partial)
    print("done", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["killed", "done"])
def test_one_process_at_a_time_writes_a_blob(replica: Replica, end: str) -> None:
    tensor = Pieces.of(1, 4)
    command = [sys.executable, "-c", HOLDER, str(replica.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        with partials_of(replica) as partials:
            assert partials.begin(tensor.tree) is None
            replica.gc(0)
            if end == "killed":
                holder.kill()
                holder.wait(60)
                assert begun(partials, tensor).lacks() == [2, 3]
                script(partials, replica, [tensor])
            else:
                holder.stdin.write("\n")
                holder.stdin.flush()
                assert holder.stdout.readline() == "done\n"
                holder.kill()
    check_here(replica, tensor)
