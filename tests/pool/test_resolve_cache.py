"""What a replica remembers of its merges: an output that is up to date is left alone, any other is made so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from crdtmerge.errors import ChangedError, CrdtMergeError, OutputError, ReplicaError
from crdtmerge.pool.replica import Replica
from tests.pool.replicas import blob_files, flip, flipped, founded, model, sql, tree
from tests.pool.test_replica import _checkpoint


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode and times of an output's files and of itself."""
    paths = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
    return {str(path): (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for path in paths for s in [path.stat()]}


@pytest.fixture
def pool(tmp_path: Path) -> Replica:
    """A pool that needs a plan, with three models."""
    replica = founded(tmp_path / "pool", recipe="ties", like=None, base=model(0))
    for n in range(1, 4):
        replica.add(model(n), weight=n)
    return replica


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_unchanged_set_is_not_merged_again_and_its_output_not_touched(
    pool: Replica, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    first = pool.resolve_to(out)
    before = _stamps(out)
    second = pool.resolve_to(out)
    assert (first.merged, second.merged) == (True, False)
    assert second.nbytes == second.bytes_read == 0
    assert second.receipt.to_bytes() == first.receipt.to_bytes()
    assert _stamps(out) == before
    with Replica.open(pool.folder) as other:
        assert not other.resolve_to(out).merged
    assert _stamps(out) == before


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("damage", ["a bit of the weights", "cut short", "the receipt", "no receipt", "another file"])
def test_an_output_that_was_tampered_with_is_merged_again(
    pool: Replica, tmp_path: Path, name: str, damage: str
) -> None:
    out = tmp_path / name
    pool.resolve_to(out)
    weights = out / "model.safetensors" if out.is_dir() else out
    receipt = out / "receipt.json" if out.is_dir() else out.with_name(f"{name}.receipt.json")
    before = weights.read_bytes(), receipt.read_bytes()
    if damage == "a bit of the weights":
        flip(weights, -1)
    elif damage == "cut short":
        os.truncate(weights, len(before[0]) - 1)
    elif damage == "the receipt":
        receipt.write_bytes(before[1].replace(b'"weight": "1"', b'"weight": "9"').replace(b'"1"', b'"8"'))
        assert receipt.read_bytes() != before[1]
    elif damage == "no receipt":
        receipt.unlink()
    else:
        if not out.is_dir():
            pytest.skip("a single file has no other files")
        (out / "config.json").write_text("{}")
    try:
        assert pool.resolve_to(out).merged
    except OutputError:
        assert damage == "no receipt", "only what bears no receipt of ours is not replaced"
        return
    assert (weights.read_bytes(), receipt.read_bytes()) == before
    assert not (out / "config.json").exists()
    assert not list(tmp_path.glob(".*crdtmerge-*"))


def test_an_output_that_was_lost_is_written_again_from_the_remembered_plan(
    pool: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crdtmerge.strategies import registry

    pool.resolve_to(tmp_path / "one")
    strategy = type(registry.get("ties"))

    def refuse(*args: object) -> None:
        raise AssertionError("the plan is known")

    monkeypatch.setattr(strategy, "plan", refuse)
    again = pool.resolve_to(tmp_path / "two")
    assert again.merged
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    pool.resolve_to(tmp_path / "three.safetensors")
    assert (tmp_path / "three.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    pool.add(model(9))
    with pytest.raises(AssertionError, match="the plan is known"):
        pool.resolve_to(tmp_path / "four")
    assert not (tmp_path / "four").exists()


def test_an_output_follows_the_set(pool: Replica, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before, first = pool.resolve_to(out), tree(out)
    added = pool.add(model(9))
    after = pool.resolve_to(out)
    assert after.merged
    assert after.receipt.merge_id != before.receipt.merge_id
    pool.remove(added.id)
    assert pool.resolve_to(out).merged
    assert tree(out) == first
    assert pool.resolve_to(out).receipt.to_bytes() == before.receipt.to_bytes()
    pool.add(model(1), weight=5)
    assert pool.resolve_to(out).merged, "a weight is part of the set"
    pool.set_recipe(pool.recipe.__class__.of("ties", {"density": "0.3"}))
    assert pool.resolve_to(out).merged, "so is the recipe"
    assert not pool.resolve_to(out).merged


def test_an_output_follows_the_files_that_are_carried(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        replica.add(_checkpoint(tmp_path / "old", model(1), {"config.json": '{"who": "old"}'}))
        replica.resolve_to(tmp_path / "out")
        replica.add(_checkpoint(tmp_path / "new", model(1), {"config.json": '{"who": "new"}'}))
        replica.resolve_to(tmp_path / "out")
        replica.resolve().save(tmp_path / "other")
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert found == json.loads((tmp_path / "other" / "config.json").read_text()) == {"who": "new"}


@pytest.mark.parametrize("where", ["pool/out", "pool/blobs/out", "pool", ".", "link/out"])
def test_an_output_within_the_replica_or_around_it_is_refused(pool: Replica, tmp_path: Path, where: str) -> None:
    (tmp_path / "link").symlink_to("pool")
    before = tree(tmp_path / "pool")
    with pytest.raises(OutputError):
        pool.resolve_to(tmp_path / where)
    assert tree(tmp_path / "pool").keys() == before.keys()


def test_a_blob_that_the_disk_changed_is_found_and_nothing_is_written(pool: Replica, tmp_path: Path) -> None:
    pool.resolve_to(tmp_path / "before")
    whole = tree(tmp_path / "before")
    rows = [row.digest for entry in pool.visible for row in pool.manifest(entry.id).rows]  # type: ignore[union-attr]
    own = {digest for digest in rows if rows.count(digest) == 1}  # what models share, adding another would mend
    path = next(path for path in blob_files(pool.folder) if bytes.fromhex(path.name) in own)
    flip(path, 1000, bit=3)
    for out in ("out", "out.safetensors"):
        with pytest.raises((ChangedError, ReplicaError), match=path.name):
            pool.resolve_to(tmp_path / out)
        assert not (tmp_path / out).exists()
    with pytest.raises((ChangedError, ReplicaError)):
        pool.resolve()
    pool.add(model(9))
    with pytest.raises((ChangedError, ReplicaError)):
        pool.resolve_to(tmp_path / "before")
    assert tree(tmp_path / "before") == whole, "the earlier output stands"
    assert not list(tmp_path.glob(".*crdtmerge-*"))
    flip(path, 1000, bit=3)
    assert pool.resolve_to(tmp_path / "out").merged


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_blob_that_is_not_whole_is_named(pool: Replica, tmp_path: Path, damage: str) -> None:
    path = blob_files(pool.folder)[0]
    path.unlink() if damage == "gone" else os.truncate(path, 100)
    with pytest.raises(ReplicaError, match="fsck"):
        pool.resolve_to(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adding_a_model_whose_blob_is_damaged_says_nothing_untrue(pool: Replica, tmp_path: Path) -> None:
    path = blob_files(pool.folder)[0]
    flip(path, 1000)
    with pytest.raises(CrdtMergeError):
        pool.resolve()
    pool.fsck(mending=True)
    for n in range(1, 4):
        pool.add(model(n))
    base = pool.genesis.base
    assert base is not None
    if not pool.fsck().clean:
        assert base in pool.fsck().lost, "only the base cannot be added again"
    else:
        pool.resolve_to(tmp_path / "out")


def test_mending_and_adding_again_repairs_a_damaged_blob_as_the_error_advises(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        replica.add(model(1))
        flip(blob_files(replica.folder)[0], 1000)
        with pytest.raises(ReplicaError, match="fsck --mend"):
            replica.export(tmp_path / "bundle")
        replica.fsck(mending=True)
        replica.add(model(1))
        replica.export(tmp_path / "bundle")


def test_a_damaged_receipt_in_the_cache_only_costs_a_merge(pool: Replica, tmp_path: Path) -> None:
    pool.resolve_to(tmp_path / "out")
    sql(pool.folder, "UPDATE merges SET receipt = substr(receipt, 3)")
    assert pool.resolve_to(tmp_path / "out").merged


def test_a_damaged_plan_in_the_cache_never_changes_what_is_merged(pool: Replica, tmp_path: Path) -> None:
    pool.resolve_to(tmp_path / "one.safetensors")
    merged = (tmp_path / "one.safetensors").read_bytes()
    ((plan,),) = sql(pool.folder, "SELECT plan FROM plans")
    for at in range(14, 20):  # within the threshold of the first tensor
        sql(pool.folder, "UPDATE plans SET plan = ?", (flipped(plan, at, 6),))
        try:
            pool.resolve_to(tmp_path / f"{at}.safetensors")
        except CrdtMergeError:
            continue
        assert (tmp_path / f"{at}.safetensors").read_bytes() == merged


def test_a_damaged_plan_in_the_cache_gives_no_errors_but_ours(pool: Replica, tmp_path: Path) -> None:
    pool.resolve_to(tmp_path / "one.safetensors")
    ((plan,),) = sql(pool.folder, "SELECT plan FROM plans")
    for damaged in (b"", plan[:-1], b"\xc0", b"\x80", plan + b"\0", flipped(plan, 0, 7)):
        sql(pool.folder, "UPDATE plans SET plan = ?", (damaged,))
        (tmp_path / "two.safetensors").unlink(missing_ok=True)
        try:
            pool.resolve_to(tmp_path / "two.safetensors")
        except CrdtMergeError:
            assert not (tmp_path / "two.safetensors").exists()
