"""Many processes and threads on one folder: they take turns, and nothing is lost or said twice."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from crdtmerge.errors import ReplicaError
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.op import Add, Op
from crdtmerge.store import group_commit
from crdtmerge.store.database import Database
from crdtmerge.store.leases import Lease
from tests.pool.replicas import KEYS, contents, exchange, founded, model, said_by, second

ROOT = Path(__file__).parents[2]

ADDER = """
import sys
import numpy as np
from crdtmerge.pool.replica import Replica

folder, number = sys.argv[1], int(sys.argv[2])
with Replica.open(folder) as replica:
    assert replica._room.database.one("PRAGMA synchronous") == (2,), "a commit waits for the disk"
    assert replica._room.database.one("PRAGMA journal_mode") == ("wal",)
    for n in range(5):
        added = replica.add({"w": np.float32([number, n])}, weight=n)
        print(added.op.hex(), flush=True)
        if n % 2:
            print(replica.remove(added.id).ops[0].hex(), flush=True)
        else:
            print(replica.retract(added.id).ops[0].hex(), flush=True)
"""

READER = """
import sys, time
from crdtmerge.pool.replica import Replica

with Replica.open(sys.argv[1]) as replica:
    version, root = replica.version(), replica.root
    print("ready", flush=True)
    while replica.version() == version:
        time.sleep(0.01)
    while replica.root == root:  # it took a lease first
        time.sleep(0.01)
    print(time.time(), flush=True)
"""


def _child(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_chains(replica: Replica) -> None:
    """No evidence against anyone, and the sequence numbers of each incarnation begin with 1 and have no gap."""
    assert not replica.opset.forks()
    chains: dict[bytes, list[Op]] = defaultdict(list)
    for op in replica.opset.ops():
        chains[op.author + op.incarnation].append(op)
    for chain in chains.values():
        chain.sort(key=lambda op: op.seq)
        assert [op.seq for op in chain] == list(range(1, len(chain) + 1))
        assert [op.prev for op in chain] == [None, *(op.id for op in chain[:-1])]


def test_processes_that_write_at_once_lose_nothing_and_never_fork(tmp_path: Path) -> None:
    like = {"w": np.float32([0, 0])}
    with founded(tmp_path / "pool", like=like) as replica:
        children = [_child(ADDER, replica.folder, n) for n in range(4)]
        said = []
        for child in children:
            out, err = child.communicate(timeout=60)
            assert child.returncode == 0, err
            said += [bytes.fromhex(line) for line in out.split()]
        assert len(said) == len(set(said)) == 40
        assert {op.id for op in replica.opset.ops()} == set(said)
        assert len({op.incarnation for op in replica.opset.ops()}) == 1
        assert not replica.visible
        assert len(replica.opset.contents()) == 20
        check_chains(replica)
        assert replica.fsck().clean


def test_processes_that_begin_to_write_at_once_share_one_incarnation(tmp_path: Path) -> None:
    with founded(tmp_path / "pool", like={"w": np.float32([0, 0])}) as replica:
        replicas = [Replica.open(tmp_path / "pool") for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda one: one.retract(bytes(32)), replicas))
        check_chains(replica)
        assert len(list(replica.opset.ops())) == 4
        assert len({op.incarnation for op in replica.opset.ops()}) == 1
        for one in replicas:
            one.close()


def test_another_process_notices_within_a_second(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        child = _child(READER, replica.folder)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", child.communicate()[1]
        replica.add(model(1))
        committed = time.time()
        out, err = child.communicate(timeout=30)
        assert child.returncode == 0, err
        assert float(out) < committed + 1


def test_the_version_grows_with_what_others_commit_and_with_nothing_else(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica, Replica.open(tmp_path / "pool") as other:
        before = replica.version()
        assert replica.version() == before
        assert not other.visible
        assert replica.version() == before, "reading changes nothing"
        other.retract(bytes(32))
        after = replica.version()
        assert after != before
        threading.Thread(target=lambda: replica.retract(bytes([1]) * 32)).start()
        end = time.monotonic() + 5
        while replica.version() == after:
            assert time.monotonic() < end, "another thread of this process counts as another"
            time.sleep(0.01)


def test_a_snapshot_sees_one_state_whatever_others_commit(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica, Replica.open(tmp_path / "pool") as other:
        with replica.snapshot():
            root = replica.root
            other.add(model(1))
            assert replica.root == root
            assert not replica.visible
        assert replica.root == other.root != root


def test_threads_that_join_at_once_share_commits_and_take_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with founded(tmp_path / "one", like={"w": np.float32([0, 0])}) as one, second(one, tmp_path / "two") as two:
        for n in range(40):
            one.retract(bytes([n]) * 32)
        ops, manifests = said_by(one)
        begun = 0
        real = Database.transaction

        def counted(database: Database) -> object:
            nonlocal begun
            begun += not database.in_transaction
            return real(database)

        monkeypatch.setattr(Database, "transaction", counted)
        with two._room.group._leading, ThreadPoolExecutor(40) as threads:
            waiting = [threads.submit(two.join, ops[: n + 1], manifests) for n in range(40)]
            while len(two._room.group._waiting) < 40:
                time.sleep(0.005)
            two._room.group._leading.release()
            taken = sum(len(one.result().new) for one in waiting)
            two._room.group._leading.acquire()
        assert taken == 40, "each operation is new to exactly one of them"
        assert begun <= 2
        assert two.state_root == one.state_root
        check_chains(two)


def test_a_piece_of_work_that_fails_is_undone_alone(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        group, database = replica._room.group, replica._room.database

        def work(n: int) -> int:
            database.keep(f"n{n}", n)
            if n % 3 == 0:
                raise ZeroDivisionError(n)
            return n

        def outcome(n: int) -> int | str:
            try:
                return group.run(lambda: work(n))
            except ZeroDivisionError as fault:
                return str(fault)

        with ThreadPoolExecutor(16) as threads:
            found = list(threads.map(outcome, range(64)))
        assert found == [str(n) if n % 3 == 0 else n for n in range(64)]
        assert [database.meta(f"n{n}") for n in range(64)] == [None if n % 3 == 0 else n for n in range(64)]


def test_more_work_than_one_transaction_takes_is_all_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "TOGETHER_MAX", 2)
    with founded(tmp_path / "pool") as replica:
        group, database = replica._room.group, replica._room.database
        group._waiting.extend((lambda: None, _Nobody()) for _ in range(2))  # two that came before, not yet led
        done = threading.Event()

        def late() -> None:
            group.run(lambda: database.keep("late", 1))
            done.set()

        threading.Thread(target=late, daemon=True).start()
        assert done.wait(2), "nobody leads any more, and it still waits"


class _Nobody:
    """A future that nobody waits for."""

    def set_result(self, result: object) -> None:
        """Drop it."""

    def set_exception(self, fault: BaseException) -> None:
        """Drop it."""

    def done(self) -> bool:
        """Never asked."""
        return False


def test_threads_add_remove_collect_and_merge_on_one_replica_at_once(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica, second(replica, tmp_path / "two", KEYS[1]) as two:
        keep = replica.add(model(99))

        def add(n: int) -> bytes:
            return replica.add(model(n)).id

        def take_back(n: int) -> bytes:
            added = replica.add(model(100 + n))
            replica.remove(added.id)
            return added.id

        def rest(n: int) -> None:
            replica.gc(0)
            with suppress(ReplicaError):  # collected under it: see the test of that below
                assert len(replica.resolve(threads=1)) == 3
            replica.export(tmp_path / f"bundle{n}")
            two.include(tmp_path / f"bundle{n}")

        with ThreadPoolExecutor(6) as threads:
            added = [threads.submit(add, n) for n in range(8)]
            gone = [threads.submit(take_back, n) for n in range(4)]
            others = [threads.submit(rest, n) for n in range(4)]
            expected = {keep.id, *(one.result() for one in added)}
            removed = {one.result() for one in gone}
            for other in others:
                other.result()
        assert contents(replica) == expected
        assert not removed & contents(replica)
        replica.gc(0)
        replica.gc(0)
        assert replica.fsck().clean
        check_chains(replica)
        exchange(replica, two)
        assert two.root == replica.root
        replica.export(tmp_path / "last")
        two.include(tmp_path / "last")
        assert contents(replica) <= two.ready()
        assert two.fsck().clean
        assert sum(isinstance(op.payload, Add) for op in two.opset.ops()) == 13


def test_what_a_merge_is_about_to_read_is_not_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with founded(tmp_path / "pool") as replica, Replica.open(tmp_path / "pool") as other:
        replica.add(model(1))
        gone = replica.add(model(2))
        real = Lease.hold

        def late(lease: Lease, digests: Iterable[bytes]) -> None:
            monkeypatch.setattr(Lease, "hold", real)
            other.remove(gone.id)
            other.gc(0)
            other.gc(0)
            real(lease, digests)

        monkeypatch.setattr(Lease, "hold", late)
        assert len(replica.resolve(threads=1)) == 3
