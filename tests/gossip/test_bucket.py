"""Replicas that meet in a folder or bucket, without a process that serves it, come to one set whatever lies there."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, OutputError, PeerError, UsageError
from crdtmerge.gossip import bucket, objects, stored_ops
from crdtmerge.gossip.fetch import Fetch
from crdtmerge.gossip.folder import IDLE_SECONDS_MAX, Folder
from crdtmerge.gossip.object_store import Bucket
from crdtmerge.gossip.stored import Stored
from crdtmerge.gossip.stored_blobs import Offered, StoredBlobs
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.op import Retract, signed
from tests.gossip.bucket_replicas import (
    BreakingFolder,
    CountingFolder,
    begun,
    check_equal,
    large,
    pair,
    stored,
    sync,
)
from tests.pool.replicas import KEYS, contents, flip, founded, model


class S3(NamedTuple):
    """A server on this machine."""

    url: str


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3(f"http://{host}:{port}")
    finally:
        server.stop()


def s3_bucket(server: S3, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket, with what is needed to reach it in the environment."""
    import boto3  # type: ignore[import-untyped]

    said = {"AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    for key, value in {**said, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(key, value)
    boto3.client("s3", endpoint_url=server.url, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}/some/prefix"


@pytest.fixture(params=["folder", "s3", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str | Bucket:
    """A place of each kind."""
    if request.param == "folder":
        return str(tmp_path / "shared")
    if request.param == "memory":
        from obstore.store import MemoryStore

        return Bucket(MemoryStore(), "memory")
    return s3_bucket(request.getfixturevalue("s3"), f"bucket-{secrets.token_hex(8)}", monkeypatch)


# ---- meeting


def test_replicas_that_meet_in_one_place_merge_to_the_same_bytes(tmp_path: Path, where: str | Bucket) -> None:
    one = founded(tmp_path / "one", like=large(0))
    first = one.add(large(1), weight=2)
    report = sync(one, where)
    assert (report.ops_sent, report.ops_received, report.failing) == (1, 0, {})
    two = begun(tmp_path / "two", where, key=KEYS[1])
    two.add(large(2))
    two.remove(two.add(large(3)).id)
    one.add(large(4))
    reports = [sync(replica, where) for replica in (two, one, two)]
    assert [report.ops_received for report in reports] == [0, 3, 1]
    assert all(not (report.false or report.failing or report.ignored or report.lacking) for report in reports)
    assert first.id in contents(two)
    check_equal([one, two])
    for replica in (one, two):
        again = sync(replica, where)
        assert (again.ops_sent, again.ops_received, again.bytes_sent, again.bytes_fetched) == (0, 0, 0, 0)
        assert again.root == replica.root
    with begun(tmp_path / "three", where) as three:
        check_equal([one, two, three])


def test_a_pool_with_a_base_is_begun_from_a_folder_alone(tmp_path: Path) -> None:
    one, two = pair(tmp_path, tmp_path / "shared", recipe="task_arithmetic", like=None, base=large(0))
    one.add(large(1))
    sync(one, tmp_path / "shared")
    sync(two, tmp_path / "shared")
    assert two.genesis == one.genesis
    check_equal([one, two])


def test_carried_files_travel(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file(model(1), checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text('{"model_type": "x"}')
    (checkpoint / "tokenizer.json").write_text('{"a": "' + 30_000 * "b" + '"}')
    one = founded(tmp_path / "one")
    one.add(checkpoint)
    sync(one, tmp_path / "shared")
    with begun(tmp_path / "two", tmp_path / "shared") as two:
        two.resolve_to(tmp_path / "out", threads=1)
        assert (tmp_path / "out" / "config.json").exists()
        assert not two.receiving().lacking().files


def test_a_replica_that_went_back_or_was_copied_loses_nothing(tmp_path: Path) -> None:
    one, two = pair(tmp_path, tmp_path / "shared")
    one.add(model(1))
    one.close()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with Replica.open(tmp_path / "one") as one, Replica.open(tmp_path / "copy") as copy:
        one.add(model(2))
        copy.add(model(3))
        for replica in (one, copy, two, one, copy, two):
            sync(replica, tmp_path / "shared")
        assert not one.opset.forks()
        assert len(contents(two)) == 3
        check_equal([one, copy, two])


def test_a_folder_that_was_put_back_is_filled_again(tmp_path: Path) -> None:
    one, two = pair(tmp_path, tmp_path / "shared")
    shutil.copytree(tmp_path / "shared", tmp_path / "backup")
    one.add(model(1))
    sync(one, tmp_path / "shared")
    sync(two, tmp_path / "shared")
    shutil.rmtree(tmp_path / "shared")
    shutil.copytree(tmp_path / "backup", tmp_path / "shared")
    one.add(model(2))
    for replica in (two, one, two):
        sync(replica, tmp_path / "shared")
    with begun(tmp_path / "three", tmp_path / "shared") as three:
        check_equal([one, two, three])


def test_forks_travel(tmp_path: Path) -> None:
    one, two = pair(tmp_path, tmp_path / "shared")
    key, incarnation = KEYS[2], bytes(16)
    forked = [signed(key, one.pool_id, incarnation, 1, None, (), 1, Retract(bytes([n]) * 32)) for n in range(2)]
    third = signed(key, one.pool_id, incarnation, 2, forked[1].id, (), 2, Retract(bytes(32)))
    one.join([forked[0]])
    two.join([forked[1], third])
    for replica in (one, two, one):
        assert not sync(replica, tmp_path / "shared").false
    assert len(one.opset.forks()) == 1
    check_equal([one, two])
    assert sync(one, tmp_path / "shared").ops_sent == 0
    assert sync(two, tmp_path / "shared").ops_sent == 0


def test_another_pool_in_the_same_folder_stays_apart(tmp_path: Path) -> None:
    one = founded(tmp_path / "one")
    other = founded(tmp_path / "other", key=KEYS[3])
    one.add(model(1))
    other.add(model(2))
    for replica in (one, other, one):
        report = sync(replica, tmp_path / "shared")
        assert (report.ops_received, report.ignored, report.false) == (0, [], {})
    with pytest.raises(UsageError, match="has 2 pools"):
        begun(tmp_path / "two", tmp_path / "shared")
    with begun(tmp_path / "two", tmp_path / "shared", pool=other.pool_id) as two:
        check_equal([other, two])
    # segments and manifests of one pool under the name of the other
    for path in stored(tmp_path / "shared", "ops"):
        pool, rest = path.parts[-4], path.parts[-3:]
        target = tmp_path / "shared" / "v1" / ({one.pool_id.hex(), other.pool_id.hex()} - {pool}).pop()
        (target / Path(*rest)).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(path, target / Path(*rest))
    report = sync(one, tmp_path / "shared")
    assert list(report.false.values()) == ["holds operations of another pool or chain."]
    assert len(contents(one)) == 1


# ---- what it costs


def test_what_is_known_is_not_read_again(tmp_path: Path) -> None:
    one, two = pair(tmp_path, tmp_path / "shared")
    for number in range(5):
        one.add(model(number))
        sync(one, tmp_path / "shared")
        sync(two, tmp_path / "shared")
    for replica in (one, two):
        place = CountingFolder(tmp_path / "shared")
        sync(replica, place)
        assert [name.rpartition("/")[2] for name in place.reads] == ["genesis"]
        assert not place.puts


@pytest.mark.parametrize("together", [1, 3])
def test_a_chain_that_grew_little_by_little_is_read_in_few_segments(tmp_path: Path, together: int) -> None:
    one = founded(tmp_path / "one")
    for number in range(45):
        one.retract(hashlib.sha256(bytes([number])).digest())
        if number % together == together - 1:
            sync(one, tmp_path / "shared")
    assert len(stored(tmp_path / "shared", "ops")) == 45 // together
    place = CountingFolder(tmp_path / "shared")
    with begun(tmp_path / "two", place) as two:
        assert len(two.opset) == 45
    assert sum("/ops/" in name for name in place.reads) < 8


def test_operations_that_wait_for_more_than_memory_holds_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair(tmp_path, tmp_path / "shared")
    for number in range(30):
        one.retract(hashlib.sha256(bytes([number])).digest())
        two.join(list(one.opset.ops()))
        two.retract(hashlib.sha256(bytes([number, 1])).digest())
        one.join(list(two.opset.ops()))
    sync(one, tmp_path / "shared")
    monkeypatch.setattr(stored_ops, "PENDING_BYTES_MAX", 3000)
    with begun(tmp_path / "three", tmp_path / "shared") as three:
        assert len(three.opset) == 60
        check_equal([one, three])


def test_a_segment_is_known_unread_only_by_its_own_bytes() -> None:
    wires = {bytes([number]) * 32: bytes([number]) * (100 + number) for number in range(1, 9)}
    chain = objects.Chain(((number, bytes([number]) * 32) for number in range(1, 9)), wires.__getitem__)
    data = objects.pack(wires[bytes([number]) * 32] for number in (3, 4, 5))
    right = objects.segment_of(bytes(48), 3, data)
    assert chain.within(right) == range(2, 5)
    for wrong in (
        right._replace(first=2),
        right._replace(nbytes=right.nbytes + 1),
        right._replace(nbytes=0),
        right._replace(sha256=bytes(32)),
        right._replace(first=9),
    ):
        assert chain.within(wrong) is None
    holes = objects.segment_of(bytes(48), 3, objects.pack(wires[bytes([number]) * 32] for number in (3, 5)))
    assert chain.within(holes) is None
    unknown, lacks = chain.examine([right, holes])
    assert unknown == [holes]
    assert lacks == {bytes([number]) * 32 for number in (1, 2, 6, 7, 8)}
    assert [(first, len(ids)) for first, ids in chain.cut(lacks)] == [(1, 2), (1, 8)]


# ---- what is nobody's


STRANGE = (
    "v1/POOL/genesis (conflicted copy)",
    "v1/POOL/ops/.DS_Store",
    "v1/POOL/ops/CHAIN/000000000001-x (conflicted copy).seg",
    "v1/POOL/ops/CHAIN/SEGMENT~",
    "v1/POOL/ops/CHAIN/.SEGMENT.swp",
    "v1/POOL/ops/CHAIN/SEGMENT (Anna's conflicted copy 2026-11-22).seg",
    "v1/POOL/OPS/upper.seg",
    "v1/POOL/manifests/UPPER",
    "v1/POOL/blobs/00/11" + 62 * "a",
    "v1/POOL/blobs/aa/bb/deep",
    "v1/POOL/trees/aa/" + 64 * "A",
    "v1/POOL/ops/CHAIN/\udcff\n.seg",
)


def test_conflict_copies_and_droppings_are_ignored(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared)
    one.add(model(1))
    sync(one, shared)
    segment = stored(shared, "ops")[-1]
    for name in STRANGE:
        said = {"POOL": one.pool_id.hex(), "CHAIN": segment.parent.name, "SEGMENT": segment.name}
        for key, value in said.items():
            name = name.replace(key, value)
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_bytes(segment.read_bytes())
    (shared / "v1" / "not a pool").mkdir()
    report = sync(two, shared)
    assert report.ignored_count == len(report.ignored) == len(STRANGE)
    assert all(name.isascii() and name.isprintable() for name in report.ignored)
    assert not report.false
    check_equal([one, two])


# ---- what is wrong


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(limits.MANIFEST_BYTES_MAX + 1)


def _linked(path: Path) -> None:
    outside = path.with_name("outside")
    outside.parent.parent.parent.parent.parent.joinpath("outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(path.parents[4] / "outside")


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink()
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name[:90])
            Path(path.name[:90]).rename(path.name)
    finally:
        os.chdir(here)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swapped(path: Path) -> None:
    """Another object of its kind under its name."""
    kind = path.parts[path.parts.index("v1") + 2]
    others = [one for one in stored(path.parents[len(path.parts) - path.parts.index("v1") - 1], kind) if one != path]
    path.write_bytes(max(others, key=lambda one: one.stat().st_size).read_bytes())


TAMPERINGS = (_truncated, _emptied, _flipped, _longer, _linked, _piped, _socket, _folder, _swapped)


@pytest.mark.parametrize("tampering", TAMPERINGS)
@pytest.mark.parametrize("kind", ["ops", "manifests", "trees", "blobs"])
def test_what_is_tampered_with_is_reported_and_the_others_go_on(
    tmp_path: Path, kind: str, tampering: Callable[[Path], None]
) -> None:
    shared = tmp_path / "shared"
    one, two = founded(tmp_path / "one", like=_two_large(0)), founded(tmp_path / "x", key=KEYS[1])
    two = begun(tmp_path / "two", _synced(one, shared), key=KEYS[1])
    contributed = {"one": one.add(_two_large(1)).id, "two": two.add(_two_large(2)).id}
    sync(one, shared)
    sync(two, shared)
    victim = max(stored(shared, kind), key=lambda path: (path.stat().st_size, path))
    right = victim.read_bytes()
    tampering(victim)
    three = begun(tmp_path / "three", shared)
    report = sync(three, shared)
    name = str(victim.relative_to(shared / "v1" / one.pool_id.hex()))
    assert name in report.false or (tampering, kind) == (_folder, "manifests"), report
    visible = contents(three)
    assert visible <= set(contributed.values())
    assert len(visible) == (1 if kind in ("ops", "manifests") else 2)
    assert len(visible & three.ready()) == 1, "the other contribution is whole"
    assert three.fsck().clean
    # whoever has the right bytes puts them there again, and then all is well
    for replica in (one, two):
        sync(replica, shared, rehash=tampering in (_flipped, _swapped))
    if tampering is _folder:
        assert name in sync(one, shared).failing or name in sync(two, shared).failing
    else:
        assert victim.read_bytes() == right
        assert not victim.is_symlink()
        sync(three, shared)
        check_equal([one, two, three])


def _two_large(number: int) -> dict[str, np.ndarray]:
    own = np.random.default_rng(number).standard_normal(LARGE, np.float32)
    return {**model(number), "large": own}


LARGE = 400_000
"""Of float32: 1.6 MB, two pieces."""


def _synced(replica: Replica, shared: Path) -> Path:
    sync(replica, shared)
    return shared


def test_a_wrong_genesis_record_begins_nothing_and_is_put_right(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one = founded(tmp_path / "one")
    (genesis,) = _synced(one, shared).glob("v1/*/genesis")
    right = genesis.read_bytes()
    for tampering in (_truncated, _flipped, _emptied, _longer, _linked_genesis, _piped):
        tampering(genesis)
        with pytest.raises(FalsePeerError):
            begun(tmp_path / "two", shared)
        assert not (tmp_path / "two").exists()
        assert "genesis" in sync(one, shared).false
        assert genesis.read_bytes() == right
    genesis.unlink()
    with pytest.raises(PeerError, match="is not there"):
        begun(tmp_path / "two", shared)
    with founded(tmp_path / "other", key=KEYS[1]) as other:
        genesis.write_bytes(other.genesis.to_bytes())
    with pytest.raises(FalsePeerError, match="is that of"):
        begun(tmp_path / "two", shared)


def _linked_genesis(path: Path) -> None:
    outside = path.parents[2] / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def test_an_operation_that_the_pool_refuses_is_reported(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared, membership="members")
    one.add(model(1))
    sync(one, shared)
    stranger = signed(KEYS[3], one.pool_id, bytes(16), 1, None, (), 1, Retract(bytes(32)))
    data = objects.pack([stranger.wire])
    segment = objects.segment_of(stranger.author + stranger.incarnation, 1, data)
    path = shared / objects.pool_prefix(one.pool_id) / segment.name
    path.parent.mkdir()
    path.write_bytes(data)
    report = sync(two, shared)
    assert "is refused" in report.false[segment.name]
    assert stranger.id not in two.opset
    check_equal([one, two])


def test_an_operation_without_its_past_waits(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared)
    for number in range(3):
        one.add(model(number))
        sync(one, shared)
    for path in stored(shared, "ops"):
        if path.name.startswith("000000000001"):
            path.unlink()
    report = sync(two, shared)
    assert (report.ops_received, report.waiting) == (0, 1)
    sync(one, shared)
    assert (sync(two, shared).waiting, len(contents(two))) == (0, 3)


# ---- folders that lead elsewhere


def test_links_to_other_folders_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    shared, outside = tmp_path / "shared", tmp_path / "outside"
    one, two = pair(tmp_path, shared)
    one.add(model(1))
    sync(one, shared)
    pool = shared / objects.pool_prefix(one.pool_id)
    for kind in objects.KINDS:
        if (pool / kind).exists():
            shutil.move(pool / kind, outside / kind)
            (pool / kind).symlink_to(outside / kind)
    before = sorted(outside.rglob("*"))
    one.add(model(2))
    for replica in (one, two):
        report = sync(replica, shared)
        assert "ops" in report.false
        assert bool(report.failing) == (replica is one), "one has something to put"
    assert not contents(two)
    assert sorted(outside.rglob("*")) == before


def test_a_replica_and_its_folder_do_not_lie_in_each_other(tmp_path: Path) -> None:
    one = founded(tmp_path / "one")
    for inside in (tmp_path / "one", tmp_path / "one" / "shared", tmp_path):
        with pytest.raises(OutputError):
            sync(one, inside)
    sync(one, tmp_path / "shared")
    with pytest.raises(OutputError):
        begun(tmp_path / "shared" / "two", tmp_path / "shared")


@pytest.mark.parametrize("url", ["s3://", "nonsense://x", "s3:///x", "file"])
def test_what_is_no_place_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, PeerError)):
        asyncio.run(bucket.genesis_of(url))


def test_names_that_lead_out_of_a_bucket_are_not_names(tmp_path: Path) -> None:
    listing = objects.Listing()
    digest = 64 * "a"
    for name in (
        f"blobs/aa/../{digest}",
        f"../blobs/aa/{digest}",
        f"/blobs/aa/{digest}",
        f"blobs//aa/{digest}",
        f"blobs/aa/{digest}\n",
        f"manifests/{digest}/..",
        f"ops/{digest}-{32 * 'b'}/{'٠' * 12}-{digest}.seg",
    ):
        assert not listing.enter(name, 1)
    assert listing.count == 0


# ---- what breaks off


def test_an_interrupted_download_goes_on_where_it_was(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared, like=large(0))
    added = one.add(large(1))
    sync(one, shared)
    broken_off = sync(two, BreakingFolder(shared, 5 * limits.MIB))
    assert broken_off.failing
    assert broken_off.lacking > 0
    assert not two.is_ready(added.id)
    whole = sync(two, shared)
    assert whole.resumed_bytes >= 4 * limits.MIB
    assert broken_off.bytes_fetched + whole.bytes_fetched < added.nbytes + 3 * limits.MIB
    assert two.is_ready(added.id)
    check_equal([one, two])


def test_what_nobody_has_holds_nothing_up(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared, like=_two_large(0))
    added = [one.add(_two_large(number)).id for number in range(1, 11)]
    sync(one, shared)
    for path in [*stored(shared, "trees"), *stored(shared, "blobs")]:
        if path.name != one.manifest(added[-1]).rows[0].digest.hex() and path.stat().st_size > limits.MIB:  # type: ignore[union-attr]
            path.unlink()
    report = sync(two, shared)
    assert (report.lacking, report.failing, report.false) == (9, {}, {})
    assert len(two.ready()) == 1


def test_a_source_that_has_none_of_the_first_blobs_is_asked_for_the_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared, like=_two_large(0))
    for number in range(1, 11):
        one.add(_two_large(number))
    sync(one, shared)
    two.join(list(one.opset.ops()), {content: one.manifest(content) for content in contents(one)})  # type: ignore[misc]
    with two.receiving() as receiving:
        wanted = [want.digest.hex() for want in receiving.lacking().tensors if not want.whole]
        for path in stored(shared, "trees"):
            if path.name != wanted[-1]:
                path.unlink()
        store = Stored(Folder(shared), one.pool_id)
        source = StoredBlobs(store, Offered(two._room, store))
        asyncio.run(Fetch(receiving, [source]).run())
        left = [want.digest.hex() for want in receiving.lacking().tensors if not want.whole]
    assert left == wanted[:-1]


def test_a_killed_writer_leaves_nothing_that_is_taken_for_real(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one = founded(tmp_path / "one", like=large(0))
    one.add(large(1))

    class Killed(BaseException):
        """No error that anyone handles."""

    class Killing(Folder):
        def __init__(self, most: int) -> None:
            super().__init__(shared)
            self.named: list[str] = []
            self._most, self._one_by_one = most, threading.Lock()

        def _name(self, descriptor: int, temporary: str, name: str) -> None:
            with self._one_by_one:
                if len(self.named) >= self._most:
                    raise Killed
                self.named.append(name)
                super()._name(descriptor, temporary, name)

    for most in range(8):
        place = Killing(most)
        shutil.rmtree(shared, ignore_errors=True)
        with pytest.raises(Killed):
            sync(one, place)
        assert sum(path.is_file() for path in shared.rglob("*") if ".writing" not in path.parts) == most
    kinds = [name.split("/")[2] for name in place.named]
    assert kinds == sorted(kinds, key=["genesis", "blobs", "trees", "manifests", "ops"].index)


def test_unfinished_files_are_removed_when_they_are_old(tmp_path: Path) -> None:
    one = founded(tmp_path / "one")
    shared = _synced(one, tmp_path / "shared")
    old, new = shared / ".writing" / "old", shared / ".writing" / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, old.stat().st_mtime - IDLE_SECONDS_MAX - 1))
    sync(one, shared)
    assert not old.exists()
    assert new.exists()


def test_what_cannot_be_put_is_reported_and_what_is_there_is_taken(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    one, two = pair(tmp_path, shared)
    one.add(model(1))
    sync(one, shared)

    class Full(Folder):
        def _create(self, temporary: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    own = two.add(model(2))
    report = sync(two, Full(shared))
    assert report.failing
    assert report.ops_sent == 0
    assert (report.ops_received, report.lacking) == (1, 0)
    assert sync(two, shared).ops_sent == 1
    sync(one, shared)
    assert own.id in contents(one)
    check_equal([one, two])


def test_a_bucket_that_cannot_be_reached_is_a_peer_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for key, value in {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ALLOW_HTTP": "true", "REGION": "x"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "x")
    with founded(tmp_path / "one") as one, pytest.raises(PeerError):
        sync(one, "s3://bucket/x")


def test_tampering_in_a_bucket_is_reported_and_put_right(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    where = s3_bucket(s3, "tampered", monkeypatch)
    client = boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1")
    one = founded(tmp_path / "one", like=large(0))
    one.add(large(1))
    sync(one, where)
    keys = [found["Key"] for found in client.list_objects_v2(Bucket="tampered")["Contents"]]
    client.put_object(Bucket="tampered", Key="some/prefix/v1/x (conflicted copy)", Body=b"")
    client.put_object(Bucket="tampered", Key=f"{keys[0].rpartition('/')[0]}/x.tmp", Body=b"")
    right = {key: client.get_object(Bucket="tampered", Key=key)["Body"].read() for key in keys if "genesis" not in key}
    for key, data in right.items():
        client.put_object(Bucket="tampered", Key=key, Body=data[:-1] + bytes([data[-1] ^ 1]))
    shutil.rmtree(tmp_path / "two", ignore_errors=True)
    with begun(tmp_path / "two", where) as two:
        report = sync(two, where)
        assert report.false
        assert report.ignored_count == 1
        assert not contents(two)
        sync(one, where, rehash=True)
        for key, data in right.items():
            assert client.get_object(Bucket="tampered", Key=key)["Body"].read() == data, key
        sync(two, where)
        check_equal([one, two])


def test_a_name_that_hides_others_in_a_bucket_is_reported(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    where = s3_bucket(s3, "hidden", monkeypatch)
    client = boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1")
    one, two = pair(tmp_path, where)
    one.add(model(1))
    sync(one, where)
    prefix = f"some/prefix/{objects.pool_prefix(one.pool_id)}"
    client.put_object(Bucket="hidden", Key=f"{prefix}/trees//x", Body=b"")
    report = sync(two, where)
    assert list(report.false) == ["trees"]
    check_equal([one, two])


def test_bytes_are_durable_before_their_name_and_the_name_before_the_sync_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = founded(tmp_path / "one")
    one.add(model(1))
    done: list[str] = []
    rename = os.rename

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink()}")

    def renamed(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        done.append(f"name {Path(f'/proc/self/fd/{dst_dir_fd}').readlink()}/{new} {old}")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    sync(one, tmp_path / "shared")
    names = [entry.split() for entry in done if entry.startswith("name")]
    assert len(names) == 6
    for at, (_, new, old) in [(done.index(" ".join(name)), name) for name in names]:
        assert f"sync {tmp_path}/shared/.writing/{old}" in done[:at]
        assert f"sync {Path(new).parent}" in done[at:]


def test_a_folder_in_a_folder_that_is_not_there_is_a_peer_error(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one:
        assert sync(one, tmp_path / "not" / "there").failing
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(PeerError, match="Not a directory"):
            sync(one, tmp_path / "file")
