"""fsck finds every fault, says what is lost and what brings it back; mending does that; nothing makes it crash."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crdtmerge.errors import CrdtMergeError
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.tables import NAMES
from tests.pool.replicas import KEYS, blob_files, broken, contents, flip, flipped, founded, model, second, sql
from tests.pool.test_replica import _checkpoint

FILLED = tuple(name for name in NAMES if name not in ("forks", "void", "recipes", "members", "context", "contexts"))
"""The tables that hold anything in the pool of these tests."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with a base, three contributions, one of them retracted, and one that was removed; and a bundle of it."""
    tmp_path = tmp_path_factory.mktemp("template")
    with (
        pytest.MonkeyPatch.context() as own,
        founded(tmp_path / "pool", recipe="task_arithmetic", like=None, base=model(0)) as replica,
    ):
        own.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        own.setenv("CRDTMERGE_CACHE", str(tmp_path / "cache"))
        long = '{"a": "' + "x" * 20000 + '"}'
        replica.add(_checkpoint(tmp_path / "ft", model(1), {"vocab.json": long, "config.json": "{}"}), weight=2)
        replica.add(model(2))
        replica.retract(replica.add(model(3)).id)
        replica.remove(replica.add(model(4)).id)
        replica.export(tmp_path / "bundle")
        assert replica.fsck().clean
    return tmp_path


@pytest.fixture
def pool(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(template / "pool", tmp_path / "pool")
    shutil.copy(template / "bundle", tmp_path / "bundle")
    return tmp_path / "pool"


def _faults(folder: Path) -> list[str]:
    with Replica.open(folder) as replica:
        report = replica.fsck()
        assert report.clean == (not report.faults and not report.lost)
        return report.faults


def _lost(folder: Path) -> dict[bytes, list[str]]:
    with Replica.open(folder) as replica:
        return replica.fsck().lost


def _check_mended(folder: Path) -> None:
    """Mending and what peers have brings everything back."""
    with Replica.open(folder) as replica:
        replica.fsck(mending=True)
    with Replica.open(folder) as replica:
        replica.include(folder.parent / "bundle")
        for number in (2, 3, 4):
            replica.add(model(number))
        report = replica.fsck()
        assert report.clean, (report.faults, report.lost)
        assert not broken(replica)
        assert not replica.opset.forks()


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("how", ["a bit", "cut short", "longer", "gone"])
def test_a_blob_that_is_not_as_it_was_is_named_with_what_needs_it(pool: Path, number: int, how: str) -> None:
    path = blob_files(pool)[number]
    size = path.stat().st_size
    if how == "a bit":
        flip(path, random.Random(number).randrange(size), number)
    elif how == "gone":
        path.unlink()
    else:
        os.truncate(path, size - 1 if how == "cut short" else size + 1)
    digest = bytes.fromhex(path.name)
    with Replica.open(pool) as replica:
        report = replica.fsck()
        assert report.damaged == [digest]
        assert any(path.name in fault for fault in report.faults)
        needing = {content for content in replica.ready() if digest in {row.digest for row in _rows(replica, content)}}
        assert set(report.lost) == needing
        assert all(set(names) <= {"own", "shared", "small"} for names in report.lost.values())
    _check_mended(pool)


def _rows(replica: Replica, content: bytes) -> tuple[object, ...]:
    manifest = replica.manifest(content)
    assert manifest is not None
    return manifest.rows


def test_there_are_as_many_files_as_the_tests_above_damage(pool: Path) -> None:
    assert len(blob_files(pool)) == 7


@pytest.mark.parametrize("table", FILLED)
@pytest.mark.parametrize("column", ["key", "member", "value"])
def test_a_flipped_bit_in_any_table_of_the_set_is_found_and_mended(pool: Path, table: str, column: str) -> None:
    key, member, value = sql(pool, f"SELECT key, member, value FROM set_{table} LIMIT 1")[0]
    row = {"key": key, "member": member, "value": value}
    if not row[column]:
        pytest.skip("nothing is kept there")
    at = len(row[column]) // 2
    changed = flipped(row[column], at)
    sql(pool, f"UPDATE set_{table} SET {column} = ? WHERE key = ? AND member = ?", (changed, key, member))
    try:
        assert _faults(pool)
    except CrdtMergeError:
        return
    _check_mended(pool)


@pytest.mark.parametrize("table", ["forks", "void", "recipes", "members", "retracts", "live", "visible", "tips"])
def test_a_row_that_does_not_belong_to_a_table_of_the_set_is_found_and_mended(pool: Path, table: str) -> None:
    sql(pool, f"INSERT INTO set_{table} VALUES (?, ?, ?)", (bytes(32), b"", b"\xc0"))
    assert any(table in fault for fault in _faults(pool))
    _check_mended(pool)


@pytest.mark.parametrize("table", FILLED)
def test_a_row_that_is_missing_from_a_table_of_the_set_is_found_and_mended(pool: Path, table: str) -> None:
    before = sql(pool, "SELECT count(*) FROM set_ops")
    key, member = sql(pool, f"SELECT key, member FROM set_{table} LIMIT 1")[0]
    sql(pool, f"DELETE FROM set_{table} WHERE key = ? AND member = ?", (key, member))
    assert _faults(pool)
    _check_mended(pool)
    assert table == "ops" or sql(pool, "SELECT count(*) FROM set_ops") > before


@pytest.mark.parametrize("part", ["signature", "body"])
@pytest.mark.parametrize("number", range(7))
def test_a_flipped_bit_in_an_operation_is_found_and_a_peer_brings_it_back(pool: Path, part: str, number: int) -> None:
    rows = sql(pool, "SELECT key, value FROM set_ops ORDER BY key")
    assert len(rows) == 6
    identity, wire = rows[number % len(rows)]
    at = 10 if part == "signature" else 70 + 10 * number
    sql(pool, "UPDATE set_ops SET value = ? WHERE key = ?", (flipped(wire, at, number), identity))
    assert any(identity.hex() in fault and "peer" in fault for fault in _faults(pool))
    _check_mended(pool)


def test_a_flipped_bit_in_a_manifest_is_found_and_its_content_is_named(pool: Path) -> None:
    content, data = sql(pool, "SELECT content, manifest FROM manifests ORDER BY content")[0]
    sql(pool, "UPDATE manifests SET manifest = ? WHERE content = ?", (flipped(data, len(data) - 3), content))
    assert any(content.hex() in fault for fault in _faults(pool))
    assert _lost(pool).get(content, ["its manifest"]) == ["its manifest"]


def test_a_damaged_manifest_is_mended(pool: Path) -> None:
    content, data = sql(pool, "SELECT content, manifest FROM manifests ORDER BY content")[0]
    sql(pool, "UPDATE manifests SET manifest = ? WHERE content = ?", (flipped(data, len(data) - 3), content))
    _check_mended(pool)


@pytest.mark.parametrize("what", ["manifest", "operation"])
def test_mending_never_drops_an_operation_that_is_sound(pool: Path, what: str) -> None:
    with Replica.open(pool) as replica:
        first, *others = [op.id for op in replica.opset.ops()]
        content = replica.opset.op(first).payload.content  # type: ignore[union-attr]
    if what == "manifest":
        ((data,),) = sql(pool, "SELECT manifest FROM manifests WHERE content = ?", (content,))
        sql(pool, "UPDATE manifests SET manifest = ? WHERE content = ?", (flipped(data, len(data) - 3), content))
        others.append(first)
    else:
        ((wire,),) = sql(pool, "SELECT value FROM set_ops WHERE key = ?", (first,))
        sql(pool, "UPDATE set_ops SET value = ? WHERE key = ?", (flipped(wire, 80), first))
    with Replica.open(pool) as replica:
        replica.fsck(mending=True)
    kept = {row[0] for row in sql(pool, "SELECT key FROM set_ops UNION SELECT op FROM waiting")}
    assert set(others) <= kept


def test_a_content_that_was_never_here_but_is_marked_ready_is_found(pool: Path) -> None:
    sql(pool, "INSERT INTO ready VALUES (?)", (bytes(32),))
    assert _lost(pool) == {bytes(32): ["its manifest"]}
    _check_mended(pool)


def test_a_content_whose_mark_vanished_is_found_or_marked_again_by_mending(pool: Path) -> None:
    ((content,),) = sql(pool, "SELECT content FROM ready ORDER BY content LIMIT 1")
    sql(pool, "UPDATE ready SET content = ? WHERE content = ?", (flipped(content, 7), content))
    with Replica.open(pool) as replica:
        replica.fsck(mending=True)
        assert replica.fsck().faults or replica.is_ready(content)


def test_mending_what_is_sound_changes_nothing(pool: Path) -> None:
    with Replica.open(pool) as replica:
        before = replica.root, replica.state_root, replica.heads, replica.ready()
        assert replica.fsck(mending=True).clean
        assert (replica.root, replica.state_root, replica.heads, replica.ready()) == before
    with Replica.open(pool) as replica:
        assert (replica.root, replica.state_root, replica.heads, replica.ready()) == before


def test_fsck_of_a_replica_with_announced_contents_is_clean(pool: Path, tmp_path: Path) -> None:
    from tests.pool.replicas import said_by

    with Replica.open(pool) as replica, second(replica, tmp_path / "two", KEYS[1]) as two:
        replica.add(model(9))
        two.join(*said_by(replica))
        assert contents(two) == contents(replica)
        assert two.fsck().clean


def test_fsck_counts_what_it_checked_and_says_how_far_it_is(pool: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with Replica.open(pool) as replica:
        report = replica.fsck(progress=lambda *said: told.append(said))
        assert report.ops == 6
        assert report.blobs == sql(pool, "SELECT count(*) FROM blobs")[0][0]
        assert report.nbytes == replica._room.blobs.used()
    assert {stage for stage, _, _ in told} == {"operations", "blobs"}
    assert told[-1][1] == told[-1][2] == report.nbytes


def test_a_database_page_that_is_damaged_is_found(pool: Path) -> None:
    database = pool / "pool.sqlite"
    whole = database.read_bytes()
    size = 4096
    found = 0
    for page in range(1, len(whole) // size, 5):
        database.write_bytes(whole[: page * size] + bytes(size) + whole[(page + 1) * size :])
        try:
            found += bool(_faults(pool))
        except CrdtMergeError:
            found += 1
    # a page may be free, or hold nothing but what is remembered and never relied on
    assert found >= 0.7 * (len(whole) // size // 5)


USES: list[Callable[[Replica, Path], object]] = [
    lambda replica, out: replica.fsck(),
    lambda replica, out: (replica.visible, replica.opset.hidden(), replica.root, replica.state_root, replica.heads),
    lambda replica, out: replica.add({"w": np.float32([9, 9])}),
    lambda replica, out: replica.gc(0),
    lambda replica, out: replica.export(out),
    lambda replica, out: replica.fsck(mending=True),
    lambda replica, out: replica.fsck(),
]


def _survives(folder: Path, out: Path, uses: list[Callable[[Replica, Path], object]]) -> str | None:
    """What came out of using a damaged replica that is none of our errors."""
    try:
        replica = Replica.open(folder)
    except CrdtMergeError:
        return None
    except Exception as fault:  # noqa: BLE001 - that is what is looked for
        return f"{type(fault).__name__} while opening: {fault}"
    with replica:
        for use in uses:
            try:
                use(replica, out)
            except CrdtMergeError:
                continue
            except Exception as fault:  # noqa: BLE001 - that is what is looked for
                return f"{type(fault).__name__}: {fault}"
    return None


def _flipped_databases(tmp_path: Path, seeds: range, uses: list[Callable[[Replica, Path], object]]) -> list[str]:
    with founded(tmp_path / "pool", like={"w": np.float32([0, 0])}) as replica:
        for n in range(4):
            replica.add({"w": np.float32([n, 1])}, weight=n)
        replica.remove(contents(replica).pop())
    whole = (tmp_path / "pool" / "pool.sqlite").read_bytes()
    used = [page for page in range(len(whole) // 4096) if any(whole[page * 4096 + 100 : (page + 1) * 4096])]
    failures, folder = [], tmp_path / "pool"
    for seed in seeds:
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 32))):
            page = rng.choice(used) * 4096
            held = [at for at in range(page, page + 4096) if data[at]] or [page]
            data[rng.choice(held)] ^= 1 << rng.randrange(8)
        for beside in folder.glob("pool.sqlite-*"):
            beside.unlink()
        (folder / "pool.sqlite").write_bytes(data)
        found = _survives(folder, tmp_path / f"bundle{seed}", uses)
        if found:
            failures.append(f"seed {seed}: {found:.200}")
    return failures


def test_fsck_of_a_database_with_random_flips_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    failures = _flipped_databases(tmp_path, range(200), [USES[0]])
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:20]])


def test_a_database_with_random_flips_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    failures = _flipped_databases(tmp_path, range(1000, 1200), USES)
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:20]])
