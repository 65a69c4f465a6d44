"""Bundles: what comes in is what went out, equal states are equal bytes, and nothing but a whole one comes in."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest
from safetensors import safe_open

from crdtmerge.errors import BundleError, CrdtMergeError, HeaderError, InputError, OutputError, PoolMismatchError
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.architecture import Architecture
from crdtmerge.store import bundle
from crdtmerge.weights.digests import tensor_digest
from tests.pool.replicas import KEYS, blob_files, broken, contents, exchange, flipped, founded, model, second, tree
from tests.pool.test_replica import _checkpoint

Parts = dict[str, tuple[str, list[int], bytes]]
"""Name to (dtype, shape, bytes)."""


@pytest.fixture
def one(tmp_path: Path) -> Replica:
    """A pool with a base, files, shared tensors, a removed content and a retracted one."""
    vocabulary = '{"a": "' + "x" * 20000 + '"}'
    base = _checkpoint(tmp_path / "base", model(0), {"config.json": "{}", "vocab.json": vocabulary})
    replica = founded(tmp_path / "one", recipe="task_arithmetic", like=None, base=base)
    replica.add(_checkpoint(tmp_path / "ft", model(1), {"config.json": '{"a": 1}'}), weight="0.5")
    replica.remove(replica.add(model(2)).id)
    replica.retract(replica.add(model(3)).id)
    return replica


def _tiny(folder: Path, **options: Any) -> Replica:
    """A pool whose bundles take a few kilobytes."""
    return founded(folder, **{"like": {"w": np.float32([0, 0])}, **options})


def _state(replica: Replica) -> tuple[object, ...]:
    """All that equal replicas have in common."""
    return replica.root, replica.state_root, replica.heads, contents(replica), replica.ready() & contents(replica)


def _unchanged(replica: Replica) -> tuple[object, ...]:
    """All that a refused bundle must leave as it was."""
    rows = replica._room.database.rows("SELECT digest, state FROM blobs ORDER BY digest")
    return (*_state(replica), replica.ready(), rows, len(list(replica.opset.ops())))


# ---- there and back


def test_a_replica_of_a_bundle_is_equal_to_the_one_that_wrote_it(one: Replica, tmp_path: Path) -> None:
    size = one.export(tmp_path / "bundle")
    assert size == (tmp_path / "bundle").stat().st_size
    with Replica.of_bundle(tmp_path / "two", tmp_path / "bundle", key=KEYS[1]) as two:
        assert _state(two) == _state(one)
        assert two.genesis.id == one.genesis.id
        assert two.author == KEYS[1].public
        assert not broken(two)
        assert two.fsck().clean
        assert two.is_ready(one.genesis.base or b"")
        one.resolve_to(tmp_path / "out1")
        two.resolve_to(tmp_path / "out2")
        here, there = tree(tmp_path / "out1"), tree(tmp_path / "out2")
        assert here.pop("inputs.json") != there.pop("inputs.json")
        assert here == there


def test_including_a_bundle_is_joining_and_doing_so_again_changes_nothing(one: Replica, tmp_path: Path) -> None:
    with second(one, tmp_path / "two") as two:
        mine, theirs = one.add(model(10)), two.add(model(11))
        one.export(tmp_path / "from-one")
        two.export(tmp_path / "from-two")
        first, _ = one.include(tmp_path / "from-two")
        assert [op.id for op in first.new] == [theirs.op]
        second_time, new_bytes = one.include(tmp_path / "from-two")
        assert (second_time.new, new_bytes) == ([], 0)
        two.include(tmp_path / "from-one")
        assert _state(one) == _state(two)
        assert {mine.id, theirs.id} <= contents(one)


def test_equal_states_are_exported_as_equal_bytes(one: Replica, tmp_path: Path) -> None:
    with second(one, tmp_path / "two") as two:
        one.gc(0)
        two.gc(0)
        one.export(tmp_path / "b1")
        two.export(tmp_path / "b2")
        assert (tmp_path / "b1").read_bytes() == (tmp_path / "b2").read_bytes()
        two.add(model(5))
        one.add(model(4))
        for source, target, name in ((one, two, "c1"), (two, one, "c2")):
            source.export(tmp_path / name)
            target.include(tmp_path / name)
        one.export(tmp_path / "b3")
        two.export(tmp_path / "b4")
        assert (tmp_path / "b3").read_bytes() == (tmp_path / "b4").read_bytes()


def test_any_tool_lists_a_bundle(one: Replica, tmp_path: Path) -> None:
    one.export(tmp_path / "bundle")
    with safe_open(tmp_path / "bundle", "np") as opened:
        names = set(opened.keys())
    assert {"genesis", "ops", "manifests"} <= names
    assert all(name.partition(".")[0] in ("genesis", "ops", "manifests", "tensor", "file") for name in names)


def test_a_delta_holds_what_one_lacks_and_no_more(one: Replica, tmp_path: Path) -> None:
    with second(one, tmp_path / "two") as two:
        whole = one.export(tmp_path / "whole")
        heads = two.heads
        added = one.add(model(10))
        part = one.export(tmp_path / "delta", heads)
        assert part < whole
        joined, _ = two.include(tmp_path / "delta")
        assert [op.id for op in joined.new] == [added.op]
        assert two.is_ready(added.id), "the shared tensor comes along or is here"
        assert _state(two) == _state(one)
        one.export(tmp_path / "nothing", two.heads)
        assert two.include(tmp_path / "nothing")[0].new == []


def test_the_files_of_a_retracted_content_come_along_for_the_day_it_shows_again(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as replica:
        added = replica.add(_checkpoint(tmp_path / "ft", model(1), {"config.json": '{"a": 1}'}))
        replica.retract(added.id)
        with second(replica, tmp_path / "two") as two:
            replica.unretract(added.id)
            exchange(replica, two)
            assert two.opset.entry(added.id).files  # type: ignore[union-attr]
            assert two.resolve().receipt.to_bytes() == replica.resolve().receipt.to_bytes()
            two.resolve().save(tmp_path / "out")
            assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'


def test_a_delta_of_nothing_carries_nothing(one: Replica, tmp_path: Path) -> None:
    one.export(tmp_path / "nothing", one.heads)
    assert set(_parts((tmp_path / "nothing").read_bytes())) == {"genesis", "ops", "manifests"}


def test_a_delta_for_one_who_knows_more_is_refused_with_what_to_do(one: Replica, tmp_path: Path) -> None:
    with second(one, tmp_path / "two") as two:
        one.add(model(10))
        heads = one.heads
        one.add(model(11))
        one.export(tmp_path / "delta", heads)
        before = _unchanged(two)
        with pytest.raises(BundleError, match=r"exported for a replica that knows more.*since these heads"):
            two.include(tmp_path / "delta")
        assert _unchanged(two) == before
        with pytest.raises(BundleError, match="knows more"):
            Replica.of_bundle(tmp_path / "three", tmp_path / "delta")
        assert not (tmp_path / "three").exists()


def test_heads_that_nobody_knows_mean_everything(one: Replica, tmp_path: Path) -> None:
    one.export(tmp_path / "whole")
    one.export(tmp_path / "since", [bytes(32)])
    whole, since = (_parts((tmp_path / name).read_bytes()) for name in ("whole", "since"))
    assert whole["ops"] == since["ops"]


def test_a_bundle_of_another_pool_names_both(one: Replica, tmp_path: Path) -> None:
    with _tiny(tmp_path / "other") as other:
        other.add({"w": np.float32([1, 1])})
        other.export(tmp_path / "bundle")
        before = _unchanged(one)
        with pytest.raises(PoolMismatchError) as caught:
            one.include(tmp_path / "bundle")
        assert one.pool_id.hex() in str(caught.value)
        assert other.pool_id.hex() in str(caught.value)
        assert _unchanged(one) == before


@pytest.mark.parametrize("there", ["a file", "a folder", "a link", "a link to nothing"])
def test_an_export_never_takes_the_place_of_anything(one: Replica, tmp_path: Path, there: str) -> None:
    place = tmp_path / "bundle"
    if there == "a file":
        place.write_text("dear")
    elif there == "a folder":
        place.mkdir()
    else:
        place.symlink_to("base" if there == "a link" else "nothing")
    before = tree(tmp_path).keys()
    with pytest.raises(OutputError, match="exists"):
        one.export(place)
    assert tree(tmp_path).keys() == before
    assert place.is_symlink() or place.is_dir() or place.read_text() == "dear"


def test_an_export_into_nowhere_is_refused(one: Replica, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        one.export(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize("place", [".", "/"])
def test_an_export_onto_a_folder_without_a_name_is_refused(one: Replica, place: str) -> None:
    with pytest.raises(OutputError):
        one.export(place)


def test_a_damaged_blob_is_never_exported(one: Replica, tmp_path: Path) -> None:
    from tests.pool.replicas import flip

    for path in blob_files(one.folder):
        flip(path, 99)
    with pytest.raises(CrdtMergeError):
        one.export(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".*crdtmerge-*"))


def test_an_announced_content_is_announced_further(tmp_path: Path) -> None:
    from tests.pool.replicas import said_by

    with _tiny(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = one.add({"w": np.float32([1, 1])})
        two.join(*said_by(one))
        with second(two, tmp_path / "three", KEYS[2]) as three:
            assert contents(three) == {added.id}
            assert not three.is_ready(added.id)
            assert three.fsck().clean
            one.export(tmp_path / "whole")
            three.include(tmp_path / "whole")
            assert three.is_ready(added.id)


# ---- damaged


def _parts(data: bytes) -> Parts:
    """The parts of a bundle, read without our own reader."""
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    return {
        name: (row["dtype"], row["shape"], data[8 + length :][slice(*row["data_offsets"])])
        for name, row in table.items()
    }


def _joined(parts: Parts) -> bytes:
    """A bundle of parts, written without our own writer."""
    table, at = {}, 0
    for name, (dtype, shape, data) in parts.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(data for _, _, data in parts.values())


@pytest.fixture
def small(tmp_path: Path) -> tuple[Replica, bytes]:
    """A replica that has nothing yet, and a small bundle of another one."""
    with _tiny(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        path = _checkpoint(tmp_path / "ft", {"w": np.float32([1, 2])}, {"config.json": '{"a": 1}'})
        two.add(path, weight="0.5", note="mine")
        two.add({"w": np.float32([3, 4])})
        two.retract(bytes(32), "poison")
        two.export(tmp_path / "bundle")
    return Replica.open(tmp_path / "one"), (tmp_path / "bundle").read_bytes()


def test_a_bundle_that_other_tools_wrote_comes_in_all_the_same(small: tuple[Replica, bytes], tmp_path: Path) -> None:
    replica, data = small
    (tmp_path / "other").write_bytes(_joined(dict(reversed(_parts(data).items()))))
    replica.include(tmp_path / "other")
    assert len(replica.visible) == 2
    assert replica.fsck().clean


def _refused(replica: Replica, path: Path, data: bytes) -> str:
    """The refusal of a bundle, after which nothing is changed."""
    before = _unchanged(replica)
    path.write_bytes(data)
    with pytest.raises(CrdtMergeError) as caught:
        replica.include(path)
    assert isinstance(caught.value, InputError | PoolMismatchError), caught.value
    assert _unchanged(replica) == before
    assert not list((replica.folder / "staged").iterdir())
    return str(caught.value)


def test_whichever_bit_of_a_bundle_is_flipped_it_is_refused_and_nothing_changes(
    small: tuple[Replica, bytes], tmp_path: Path
) -> None:
    replica, data = small
    (length,) = struct.unpack("<Q", data[:8])
    rng = random.Random(7)
    header = [rng.randrange(8 + length) for _ in range(100)]
    rest = [rng.randrange(8 + length, len(data)) for _ in range(200)]
    kept: list[int] = []
    before = _unchanged(replica)
    for at in [*header, *rest]:
        damaged = flipped(data, at, rng.randrange(8))
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            replica.include(tmp_path / "damaged")
        except (InputError, PoolMismatchError):
            assert _unchanged(replica) == before, f"byte {at}"
        else:
            kept.append(at)
    assert not kept, f"taken all the same: bytes {kept} of {len(data)}, header {length}"
    (tmp_path / "whole").write_bytes(data)
    replica.include(tmp_path / "whole")
    assert len(replica.visible) == 2


def test_a_bundle_that_is_cut_short_anywhere_is_refused(small: tuple[Replica, bytes], tmp_path: Path) -> None:
    replica, data = small
    for size in [*range(12), *range(12, len(data), 37), len(data) - 1]:
        _refused(replica, tmp_path / "cut", data[:size])
    _refused(replica, tmp_path / "more", data + b"\0")


PARTS: dict[str, Callable[[Parts], None]] = {
    "no genesis": lambda parts: parts.__delitem__("genesis"),
    "no operations": lambda parts: parts.__delitem__("ops"),
    "no manifests": lambda parts: parts.__delitem__("manifests"),
    "manifests that are none": lambda parts: _put(parts, "manifests", b""),
    "a genesis that is none": lambda parts: _put(parts, "genesis", b"\xc0"),
    "nested arrays as genesis": lambda parts: _put(parts, "genesis", b"\x91" * 100_000 + b"\xc0"),
    "nested arrays as an operation": lambda parts: _put(parts, "ops", _framed(bytes(64) + b"\x91" * 60_000 + b"\xc0")),
    "nested arrays as a manifest": lambda parts: _put(parts, "manifests", _framed(b"\x91" * 100_000 + b"\xc0")),
    "nested maps as a manifest": lambda parts: _put(parts, "manifests", _framed(b"\x81" * 100_000 + b"\xc0")),
    "an array of 4 billion": lambda parts: _put(parts, "manifests", _framed(b"\xdd\xff\xff\xff\xff")),
    "bytes of 4 billion": lambda parts: _put(parts, "genesis", b"\xc6\xff\xff\xff\xff"),
    "a length of 4 billion": lambda parts: _put(parts, "ops", b"\xff\xff\xff\xff" + b"x" * 100),
    "half a length": lambda parts: _put(parts, "ops", parts["ops"][2] + b"\0\0"),
    "many empty operations": lambda parts: _put(parts, "ops", bytes(4 * 10_000)),
    "an operation twice as large as any": lambda parts: _put(parts, "ops", _framed(bytes(128 << 10))),
    "an unknown name": lambda parts: _put(parts, "letter", b"dear"),
    "a path as a name": lambda parts: _put(parts, "file.../../etc/passwd", b"dear"),
    "a file under another digest": lambda parts: _put(parts, "file." + "ab" * 32, b"dear"),
    "a digest in capitals": lambda parts: _put(parts, "tensor." + "AB" * 32, b"dear"),
    "a short digest": lambda parts: _put(parts, "tensor.abcd", b"dear"),
    "a tensor under another digest": lambda parts: _put(parts, "tensor." + "ab" * 32, b"dear"),
    "operations of another type": lambda parts: parts.update(ops=("I8", *parts["ops"][1:])),
    "operations of two dimensions": lambda parts: parts.update(ops=("U8", [1, len(parts["ops"][2])], parts["ops"][2])),
    "a file of another type": lambda parts: _retyped(parts, "file."),
}


def _put(parts: Parts, name: str, data: bytes) -> None:
    parts[name] = ("U8", [len(data)], data)


def _framed(*items: bytes) -> bytes:
    return bundle.framed(items)


def _retyped(parts: Parts, kind: str) -> None:
    for name in [name for name in parts if name.startswith(kind)]:
        _, _, data = parts[name]
        parts[name] = ("U16", [len(data) // 2], data) if len(data) % 2 == 0 else ("I8", [len(data)], data + b"")
    parts["letter"] = ("U8", [0], b"")  # refused in any case; no crash is what counts


@pytest.mark.parametrize("what", list(PARTS))
def test_a_hostile_bundle_is_refused_and_nothing_changes(
    small: tuple[Replica, bytes], tmp_path: Path, what: str
) -> None:
    replica, data = small
    parts = _parts(data)
    PARTS[what](parts)
    _refused(replica, tmp_path / "hostile", _joined(parts))
    try:
        Replica.of_bundle(tmp_path / "new", tmp_path / "hostile").close()
    except CrdtMergeError:
        assert not (tmp_path / "new").exists()
    else:
        raise AssertionError("a replica began from a hostile bundle")


@pytest.mark.parametrize("lacks", ["ops", "manifests"])
def test_a_bundle_that_says_nothing_changes_nothing(small: tuple[Replica, bytes], tmp_path: Path, lacks: str) -> None:
    replica, data = small
    parts = {name: part for name, part in _parts(data).items() if name in ("genesis", "ops", "manifests")}
    _put(parts, "ops", b"")
    _put(parts, lacks, b"")
    (tmp_path / "empty").write_bytes(_joined(parts))
    before = _state(replica)
    assert replica.include(tmp_path / "empty")[0].new == []
    assert _state(replica) == before


def test_operations_in_any_order_come_in(small: tuple[Replica, bytes], tmp_path: Path) -> None:
    replica, data = small
    parts = _parts(data)
    items = bundle.unframed(parts["ops"][2], 100)
    assert len(items) == 3
    _put(parts, "ops", _framed(*reversed(items), *items))
    (tmp_path / "shuffled").write_bytes(_joined(parts))
    assert len(replica.include(tmp_path / "shuffled")[0].new) == 3


def test_a_tensor_that_nothing_names_is_refused_or_collected(small: tuple[Replica, bytes], tmp_path: Path) -> None:
    replica, data = small
    parts = _parts(data)
    extra = b"dear" * 5000
    digest = tensor_digest(DTYPES["U8"], (len(extra),), blake3.blake3(extra).digest())
    parts[f"tensor.{digest.hex()}"] = ("U8", [len(extra)], extra)
    (tmp_path / "extra").write_bytes(_joined(parts))
    try:
        replica.include(tmp_path / "extra")
    except (BundleError, HeaderError):
        return
    assert len(replica.visible) == 2
    replica.gc(0)
    assert replica.gc(0).removed == 1
    assert not blob_files(replica.folder)
    assert replica.fsck().clean


def test_a_bundle_without_tensors_announces(small: tuple[Replica, bytes], tmp_path: Path) -> None:
    replica, data = small
    parts = {name: part for name, part in _parts(data).items() if not name.startswith("tensor.")}
    (tmp_path / "bare").write_bytes(_joined(parts))
    replica.include(tmp_path / "bare")
    assert len(replica.visible) == 2
    assert not replica.ready()
    (tmp_path / "whole").write_bytes(data)
    replica.include(tmp_path / "whole")
    assert replica.ready() == contents(replica)


def test_an_operation_that_the_pool_refuses_keeps_the_whole_bundle_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _tiny(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        two.add({"w": np.float32([1, 1])})
        with monkeypatch.context() as lenient:
            lenient.setattr(Architecture, "check", lambda *said: None)
            two.add({"w": np.float32([1, 1, 1])})
        two.export(tmp_path / "bundle")
        assert "shape" in _refused(one, tmp_path / "misfit", (tmp_path / "bundle").read_bytes())


@pytest.mark.parametrize("what", ["nothing", "a folder", "an empty file", "text", "a checkpoint"])
def test_what_is_no_bundle_is_refused(small: tuple[Replica, bytes], tmp_path: Path, what: str) -> None:
    replica, _ = small
    place = {"a folder": tmp_path / "ft", "a checkpoint": tmp_path / "ft" / "model.safetensors"}.get(
        what, tmp_path / "no"
    )
    if what in ("an empty file", "text"):
        place.write_text("" if what == "an empty file" else "dear" * 100)
    with pytest.raises(InputError):
        replica.include(place)
    with pytest.raises(InputError):
        Replica.of_bundle(tmp_path / "new", place)
    assert not (tmp_path / "new").exists()


def test_replicas_that_exchange_bundles_in_a_ring_agree(tmp_path: Path) -> None:
    rng = random.Random(3)
    with _tiny(tmp_path / "0") as first:
        replicas = [first, *(second(first, tmp_path / str(n), KEYS[n]) for n in range(1, 4))]
        for number in range(30):
            one, other = rng.sample(replicas, 2)
            one.add({"w": np.float32([number, rng.random()])}, weight=number % 5)
            if rng.random() < 0.3:
                own = [entry.id for entry in one.visible if one.author in entry.adders]
                one.remove(rng.choice(own))
            path = tmp_path / f"bundle{number}"
            one.export(path, other.heads if rng.random() < 0.5 else ())
            other.include(path)
        for n, one in enumerate([*replicas, *replicas]):
            other = replicas[(n + 1) % 4]
            one.export(tmp_path / f"last{n}")
            other.include(tmp_path / f"last{n}")
        exchange(*replicas)
        states = [_state(one) for one in replicas]
        assert all(state == states[0] for state in states)
        for one in replicas:
            assert one.fsck().clean
            assert not one.opset.forks()
            one.close()
