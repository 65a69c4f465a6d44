"""A disk that fails at every single effect: what was acknowledged stays, and what failed succeeds when it is repeated.

Every effect on files outside the database goes through ``Disk``, every one on the database through statements; a test
makes the k-th of them fail, for every k of a script that does all that a replica does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdtmerge.errors import CrdtMergeError, OutputError, StorageError, UsageError
from crdtmerge.pool.replica import Replica
from crdtmerge.resolve.verify import intact
from crdtmerge.store.disk import Disk
from tests.pool.replicas import KEYS, blob_files, broken, check_whole, founded, model, second, tree
from tests.pool.test_replica import _checkpoint


class Count:
    """Counts effects and says which one fails."""

    def __init__(self) -> None:
        self.count = 0
        self.at: int | None = None
        self.names: list[str] = []
        self._lock = threading.Lock()

    def fails(self, name: str) -> bool:
        """Whether this effect is the one."""
        with self._lock:
            self.count += 1
            self.names.append(name)
            return self.count == self.at

    def begin(self, at: int | None) -> None:
        """Count anew; the ``at``-th effect fails."""
        self.count, self.at, self.names = 0, at, []


class FailingDisk(Disk):
    """A disk of which one effect fails: nothing of it happens, or half of it."""

    def __init__(self, count: Count, number: int, *, short: bool = False) -> None:
        self._count, self._number, self._short = count, number, short

    def _may_fail(self, name: str) -> None:
        if self._count.fails(name):
            raise OSError(self._number, os.strerror(self._number))

    def create(self, path: Path) -> int:
        self._may_fail("create")
        return super().create(path)

    def write(self, descriptor: int, offset: int, data: Any) -> None:
        if self._count.fails("write"):
            if self._short:
                view = memoryview(data).cast("B")
                super().write(descriptor, offset, view[: len(view) // 2])
            raise OSError(self._number, os.strerror(self._number))
        super().write(descriptor, offset, data)

    def sync(self, descriptor: int) -> None:
        self._may_fail("sync")
        super().sync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        self._may_fail("sync_folder")
        super().sync_folder(folder)

    def rename(self, path: Path, new: Path) -> None:
        self._may_fail("rename")
        super().rename(path, new)

    def link(self, path: Path, new: Path) -> None:
        self._may_fail("link")
        super().link(path, new)

    def remove(self, path: Path) -> None:
        self._may_fail("remove")
        super().remove(path)

    def make_folder(self, path: Path) -> None:
        self._may_fail("make_folder")
        super().make_folder(path)


class Story:
    """All that a replica does, step by step; what it acknowledged is remembered."""

    def __init__(self, root: Path, parts: Path, disk: Disk) -> None:
        self.folder, self.parts, self.disk = root / "pool", parts, disk
        self.root = root
        self.ops: set[bytes] = set()
        self.ready: set[bytes] = set()
        self.replica: Replica | None = None
        self.removed: bytes | None = None
        self.failed: str | None = None

    @property
    def steps(self) -> list[Callable[[], object]]:
        """The script."""
        return [
            lambda: self._add(self.parts / "ft"),
            lambda: self._add(model(2)),
            lambda: self._add(model(3)),
            self._remove,
            lambda: self._here.gc(0),
            lambda: self._here.gc(0),
            self._export,
            self._include,
            self._resolve,
        ]

    @property
    def _here(self) -> Replica:
        if self.replica is None:
            self.replica = Replica.open(self.folder, disk=self.disk)
        return self.replica

    def begin(self) -> None:
        """An empty pool, in the folders of the last story."""
        if self.folder.exists():
            for path in [*self.root.glob("*/*"), *self.root.glob("pool/*/*"), *self.root.glob("pool/blobs/*/*")]:
                path.unlink() if path.is_file() else shutil.rmtree(path) if path.parent.name == "staged" else None
            (self.root / "bundle").unlink(missing_ok=True)
            shutil.rmtree(self.root / "out", ignore_errors=True)
            for path in (self.parts / "empty").iterdir():
                shutil.copy(path, self.folder) if path.is_file() else None
        else:
            shutil.copytree(self.parts / "empty", self.folder)

    def _add(self, what: object) -> None:
        added = self._here.add(what)
        self.ops.add(added.op)
        self.ready.add(added.id)
        self.removed = added.id

    def _remove(self) -> None:
        assert self.removed is not None
        self.ready.discard(self.removed)
        self.ops.update(self._here.remove(self.removed).ops)

    def _export(self) -> None:
        (self.root / "bundle").unlink(missing_ok=True)
        self._here.export(self.root / "bundle")

    def _include(self) -> None:
        joined, _ = self._here.include(self.parts / "bundle")
        self.ops.update(op.id for op in joined.new)

    def _resolve(self) -> None:
        resolved = self._here.resolve_to(self.root / "out", threads=1)
        assert intact(self.root / "out", resolved.receipt)

    def again(self) -> None:
        """Close and open when it is next needed."""
        if self.replica is not None:
            self.replica.close()
        self.replica = None


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with files beside it, and a bundle of another replica of the same pool."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as own:
        own.setenv("XDG_STATE_HOME", str(folder / "state"))
        own.setenv("CRDTMERGE_CACHE", str(folder / "cache"))
        vocabulary = '{"a": "' + "x" * 20000 + '"}'
        _checkpoint(folder / "ft", model(1), {"vocab.json": vocabulary, "config.json": "{}"})
        founded(folder / "empty").close()
        with founded(folder / "one") as one, second(one, folder / "two", KEYS[1]) as two:
            two.add(model(7))
            two.export(folder / "bundle")
    return folder


def _check_after_fault(story: Story, count: Count, k: int) -> None:
    """What was acknowledged is there; what failed succeeds when it is repeated, and so does the rest."""
    count.begin(None)
    if k % 2:
        story.again()
    check_whole(story.folder, story.ops, story.ready)


def _tell(story: Story, count: Count, k: int) -> bool:
    """Tell a story whose k-th effect fails; whether there was such an effect."""
    story.begin()
    count.begin(k)
    failed = 0
    for step in story.steps:
        try:
            step()
        except CrdtMergeError as fault:
            if count.count < k:
                raise AssertionError("refused without a fault") from fault
            failed += 1
            story.failed = f"{count.names[k - 1]:.40}"
            assert failed == 1, "only one effect fails"
            _check_after_fault(story, count, k)
            # the piece of work whose RELEASE failed is done all the same: see the test of that below
            with suppress(UsageError) if story.failed.startswith("RELEASE") else nullcontext():
                step()
    count.begin(None)
    check_whole(story.folder, story.ops, story.ready)
    assert not list((story.folder / "staged").iterdir()) or story._here.gc(0).strays >= 0
    story.again()
    return failed > 0


def _effects(tmp_path: Path, parts: Path) -> list[str]:
    """The effects of the whole script on files, by name."""
    count = Count()
    story = Story(tmp_path, parts, FailingDisk(count, errno.EIO))
    story.begin()
    count.begin(None)
    for step in story.steps:
        step()
    story.again()
    return list(count.names)


NUMBERS = {"no space": errno.ENOSPC, "failing": errno.EIO, "short": errno.ENOSPC}


@pytest.mark.parametrize("mode", list(NUMBERS))
def test_whatever_effect_on_files_fails_nothing_acknowledged_is_lost(tmp_path: Path, parts: Path, mode: str) -> None:
    (tmp_path / "whole").mkdir()
    names = _effects(tmp_path / "whole", parts)
    assert {"create", "write", "sync", "sync_folder", "rename", "link", "remove", "make_folder"} == set(names)
    for k, name in enumerate(names, 1):
        if mode == "short" and name != "write":
            continue
        count = Count()
        try:
            _tell(Story(tmp_path / "whole", parts, FailingDisk(count, NUMBERS[mode], short=mode == "short")), count, k)
        except (Exception, pytest.fail.Exception) as fault:
            raise AssertionError(f"effect {k} of {len(names)}, {name}: {type(fault).__name__}: {fault}") from fault


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whatever_effect_fails_while_a_pool_begins_nothing_is_left(tmp_path: Path, parts: Path, number: int) -> None:
    count = Count()
    disk = FailingDisk(count, number)
    founded(tmp_path / "whole", recipe="task_arithmetic", like=None, base=parts / "ft", disk=disk).close()
    names = count.names
    assert len(names) > 260
    folders = [k for k, name in enumerate(names, 1) if name == "make_folder"]
    for k in [*folders[:3], *folders[100:250:50], *range(folders[-2], len(names) + 1)]:
        count.begin(k)
        with pytest.raises(CrdtMergeError):
            founded(tmp_path / "pool", recipe="task_arithmetic", like=None, base=parts / "ft", disk=disk)
        assert {path.name for path in tmp_path.iterdir()} == {"whole"}, f"effect {k}, {names[k - 1]}"
    count.begin(None)
    founded(tmp_path / "pool", recipe="task_arithmetic", like=None, base=parts / "ft", disk=disk).close()
    check_whole(tmp_path / "pool", [])


def test_an_export_whose_last_sync_failed_can_be_repeated(tmp_path: Path) -> None:
    count = Count()
    with founded(tmp_path / "pool", disk=FailingDisk(count, errno.EIO)) as replica:
        replica.add(model(1))
        count.begin(None)
        replica.export(tmp_path / "whole")
        count.begin(count.names.index("sync_folder") + 1)
        with pytest.raises(OutputError, match="cannot be written"):
            replica.export(tmp_path / "bundle")
        replica.export(tmp_path / "bundle")
        assert (tmp_path / "bundle").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_disk_that_fills_up_while_mending_raises_our_error(tmp_path: Path) -> None:
    count = Count()
    with founded(tmp_path / "pool", disk=FailingDisk(count, errno.EIO)) as replica:
        replica.add(model(1))
        os.truncate(blob_files(tmp_path / "pool")[0], 5)
        count.begin(1)
        with pytest.raises(StorageError):
            replica.fsck(mending=True)
        replica.fsck(mending=True)
        replica.add(model(1))
        assert replica.fsck().clean


# ---- the database


class FailingConnection(sqlite3.Connection):
    """A connection of which one statement fails; ``rolls_back`` as SQLite does by itself on a full disk."""

    effects = Count()
    message = "disk I/O error"
    rolls_back = False

    def _may_fail(self, statement: str) -> None:
        cls = type(self)
        if statement == "ROLLBACK" or not cls.effects.fails(statement):
            return  # a ROLLBACK needs nothing of the disk
        if cls.rolls_back and self.in_transaction:
            super().execute("ROLLBACK")
        raise sqlite3.OperationalError(cls.message)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._may_fail(statement)
        return super().execute(statement, *values)

    def executemany(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._may_fail(statement)
        return super().executemany(statement, *values)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> type[FailingConnection]:
    """Every connection made in a test can fail."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FailingConnection))
    monkeypatch.setattr(FailingConnection, "effects", Count())
    return FailingConnection


MODES = {
    "failing": ("disk I/O error", False),
    "full": ("database or disk is full", False),
    "full, rolled back": ("database or disk is full", True),
}


def _statements_fail(tmp_path: Path, parts: Path, kind: type[FailingConnection], ks: Callable[[int], range]) -> None:
    (tmp_path / "whole").mkdir()
    first = Story(tmp_path / "whole", parts, Disk())
    first.begin()
    kind.effects.begin(None)
    for step in first.steps:
        step()
    names = kind.effects.names
    first.again()
    faults = []
    for k in ks(len(names)):
        story = Story(tmp_path / "whole", parts, Disk())
        try:
            _tell(story, kind.effects, k)
        except Exception as fault:  # noqa: BLE001 - all of them are told together
            faults.append(f"statement {k} of {len(names)}, {story.failed}: {type(fault).__name__}: {fault}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:20]])


ROLLED_BACK = "full, rolled back"


@pytest.mark.parametrize("mode", ["failing", "full", ROLLED_BACK])
def test_whatever_statement_fails_nothing_acknowledged_is_lost(
    tmp_path: Path,
    parts: Path,
    statements: type[FailingConnection],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    number = list(MODES).index(mode)
    message, rolls_back = MODES[mode]
    monkeypatch.setattr(statements, "message", message)
    monkeypatch.setattr(statements, "rolls_back", rolls_back)
    _statements_fail(tmp_path, parts, statements, lambda total: range(1 + 2 * number, total + 1, 6))


def test_a_piece_whose_savepoint_cannot_be_released_did_not_happen(
    tmp_path: Path, statements: type[FailingConnection]
) -> None:
    with founded(tmp_path / "pool") as replica:
        replica.retract(bytes(32))  # the first draws an incarnation
        statements.effects.begin(None)
        replica.retract(bytes([2]) * 32)
        near = statements.effects.names.index("RELEASE part") + 1
        for number, k in enumerate(range(near - 3, near + 4)):  # how many statements come before depends on the set
            before = replica.state_root
            statements.effects.begin(k)
            with contextlib.suppress(StorageError):
                replica.retract(bytes([3 + number]) * 32)
            if statements.effects.names[k - 1] == "RELEASE part":
                statements.effects.begin(None)
                assert replica.state_root == before
                return
        pytest.fail("no savepoint was released where one was")


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["failing", "full", ROLLED_BACK])
def test_every_single_statement_may_fail(
    tmp_path: Path, parts: Path, statements: type[FailingConnection], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    message, rolls_back = MODES[mode]
    monkeypatch.setattr(statements, "message", message)
    monkeypatch.setattr(statements, "rolls_back", rolls_back)
    _statements_fail(tmp_path, parts, statements, lambda total: range(1, total + 1))


def test_a_connection_that_cannot_be_made_raises_our_error(tmp_path: Path, statements: type[FailingConnection]) -> None:
    faults: list[BaseException] = []
    with founded(tmp_path / "pool") as replica:

        def use(what: Callable[[], object], k: int) -> None:
            statements.effects.begin(k)
            try:
                what()
            except CrdtMergeError:
                pass
            except BaseException as fault:  # noqa: BLE001 - that is what is looked for
                faults.append(fault)
            finally:
                statements.effects.begin(None)

        def snapshot() -> None:
            with replica.snapshot():
                replica.root  # noqa: B018

        for what in (lambda: replica.retract(bytes(32)), snapshot, lambda: replica.root, replica.version):
            for k in (1, 2, 3):
                thread = threading.Thread(target=use, args=(what, k))
                thread.start()
                thread.join()
    assert not faults, faults


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 5, 8, 13, 21])
def test_a_database_that_may_not_grow_refuses_and_goes_on_when_it_may(tmp_path: Path, parts: Path, pages: int) -> None:
    with founded(tmp_path / "pool") as replica:
        kept = replica.add(model(1))
        connection = replica._room.database._connection()
        ((count,),) = connection.execute("PRAGMA page_count").fetchall()
        connection.execute(f"PRAGMA max_page_count = {count + pages}")
        ops, ready = {kept.op}, {kept.id}
        refused = 0
        for n in range(2, 60):
            rng = np.random.default_rng(n)
            try:
                added = replica.add({**model(n), "small": rng.random(2, np.float32)}, note="x" * 1000)
            except StorageError:
                refused += 1
                break
            ops.add(added.op)
            ready.add(added.id)
        assert refused == 1
        with suppress(StorageError):
            replica.include(parts / "bundle")
        with suppress(StorageError):
            replica.gc(0)
        check_whole(tmp_path / "pool", ops, ready)
        connection.execute("PRAGMA max_page_count = 1000000")
        added = replica.add(model(n), note="x" * 1000)
        check_whole(tmp_path / "pool", {*ops, added.op}, {*ready, added.id})
        assert not replica.opset.forks()


def test_a_full_database_says_that_it_is_full(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        replica.add(model(1))
        connection = replica._room.database._connection()
        ((count,),) = connection.execute("PRAGMA page_count").fetchall()
        connection.execute(f"PRAGMA max_page_count = {count + 3}")
        with pytest.raises(StorageError, match="disk is full"):
            [replica.add(model(n), note="x" * 1000) for n in range(2, 60)]


def test_on_a_full_database_what_was_refused_did_not_happen(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        group, database = replica._room.group, replica._room.database

        def fill() -> None:
            connection = database._connection()
            ((count,),) = connection.execute("PRAGMA page_count").fetchall()
            connection.execute(f"PRAGMA max_page_count = {count}")
            try:
                database.keep("large", bytes(1_000_000))
            finally:
                connection.execute("PRAGMA max_page_count = 1000000")

        outcomes: dict[str, bool] = {}

        def run(name: str, work: Callable[[], None]) -> None:
            try:
                group.run(work)
            except CrdtMergeError:
                outcomes[name] = False
            else:
                outcomes[name] = True

        pieces = [("before", lambda: database.keep("before", 1)), ("fill", fill)]
        pieces += [("after", lambda: database.keep("after", 1))]
        group._leading.acquire()
        threads = [threading.Thread(target=run, args=piece) for piece in pieces]
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(group._waiting) < number:
                time.sleep(0.001)
        group._leading.release()
        for thread in threads:
            thread.join()
        assert not outcomes["fill"]
        for name in ("before", "after"):
            assert outcomes[name] == (database.meta(name) == 1), name


def test_a_fault_while_a_key_comes_in_leaves_the_old_key_or_the_new_one(
    tmp_path: Path, statements: type[FailingConnection]
) -> None:
    for k in range(1, 6):
        with founded(tmp_path / f"pool{k}") as replica:
            replica.retract(bytes(32))
            statements.effects.begin(k)
            with suppress(CrdtMergeError):
                replica.import_key(KEYS[3])
            statements.effects.begin(None)
        with Replica.open(tmp_path / f"pool{k}") as replica:
            replica.retract(bytes([1]) * 32)
            assert replica.author in (KEYS[0].public, KEYS[3].public)


# ---- the output


class FailingSystem:
    """The system calls of an output, one of which fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = Count()
        for owner, name in ((os, "pwrite"), (os, "fsync"), (os, "ftruncate"), (Path, "rename"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, partial(self._call, name, getattr(owner, name)))
        monkeypatch.setattr(Path, "rename", lambda path, new: self._call("rename", os.rename, path, new))
        monkeypatch.setattr(Path, "mkdir", lambda path, *a, **b: self._call("mkdir", os.mkdir, path))
        monkeypatch.setattr(Path, "rmdir", lambda path: self._call("rmdir", os.rmdir, path))
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: self._unlink(path, missing_ok))

    def _call(self, name: str, real: Callable[..., Any], *arguments: Any) -> Any:
        if self.count.fails(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    def _unlink(self, path: Path, missing_ok: bool) -> None:
        try:
            self._call("unlink", os.unlink, path)
        except FileNotFoundError:
            if not missing_ok:
                raise


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("before", ["nothing", "an earlier output"])
def test_whatever_fails_an_output_is_whole_or_as_it_was(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str
) -> None:
    with founded(tmp_path / "pool") as replica:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        replica.add(model(1))
        old = replica.resolve_to(tmp_path / "a" / name).receipt
        replica.add(parts / "ft")
        new = replica.resolve_to(tmp_path / "b" / name).receipt
        with pytest.MonkeyPatch.context() as patch:
            system = FailingSystem(patch)
            replica._room.database.run("DELETE FROM merges")
            (tmp_path / "c").mkdir()
            system.count.begin(None)
            replica.resolve_to(tmp_path / "c" / name)
            total = system.count.count + 6
        outcomes = set()
        for k in range(1, total):
            place = tmp_path / f"place{k}"
            place.mkdir()
            if before != "nothing":
                for path in (tmp_path / "a").rglob("*"):
                    target = place / path.relative_to(tmp_path / "a")
                    target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
            replica._room.database.run("DELETE FROM merges")
            with pytest.MonkeyPatch.context() as patch:
                system = FailingSystem(patch)
                system.count.begin(k)
                try:
                    replica.resolve_to(place / name)
                    outcome = "written"
                except OutputError:
                    outcome = "refused"
            what = f"call {k}, {system.count.names[min(k, len(system.count.names)) - 1]}"
            found = (place / name).exists()
            whole = found and intact(place / name, new)
            earlier = found and intact(place / name, old)
            receipt = place / f"{name}.receipt.json"
            bare = found and name.endswith(".safetensors") and not receipt.exists()
            assert whole or earlier or bare or (not found and before == "nothing"), what
            assert whole or outcome == "refused", what
            outcomes.add((outcome, bool(whole)))
            if bare:  # a single file whose receipt was still to come says so by having none
                (place / name).unlink()
                (place / f"{name}.inputs.json").unlink(missing_ok=True)
            left = [path.name for path in place.iterdir() if ".crdtmerge-" in path.name and "-old" not in path.name]
            assert not left, (what, left)
            replica.resolve_to(place / name)
            assert intact(place / name, new), what
        assert ("refused", False) in outcomes
        assert ("written", True) in outcomes
        assert not broken(replica)
        assert tree(tmp_path / "b") == {
            key: value for key, value in tree(tmp_path / f"place{total - 1}").items() if "-old" not in key
        }
