"""Statistics in a replica: they are blobs that gossip fetches, collection keeps, and every check looks at."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crdtmerge.errors import FalsePeerError, NeedsError, ReplicaError
from crdtmerge.pool import outputs
from crdtmerge.pool.replica import Replica
from tests.gossip.sources import Honest, fetched
from tests.pool.replicas import KEYS, Model, blob_files, flip, founded, model, said_by, second, sql
from tests.resolve.tiny_strategies import Anchored, register

MONTH = 31 * 24 * 3600.0


def curvature(number: float) -> Model:
    """A statistic of a model of these tests, too large to lie in the database."""
    return {name: np.full_like(x, number) for name, x in model(0).items()}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Replica]:
    """Two models with statistics."""
    with founded(tmp_path / "pool", recipe="weighed") as replica:
        for number in (1, 2):
            replica.add(model(number), stats={"curvature": curvature(number)})
        yield replica


def digests(replica: Replica) -> list[bytes]:
    return sorted(entry.claim.stats["curvature"] for entry in replica.visible)


def test_a_statistic_is_kept_once_as_a_blob_under_its_claim(pool: Replica) -> None:
    one, other = digests(pool)
    for digest in (one, other):
        blob = pool._room.blobs.get(digest)
        assert blob is not None
        assert (blob.dtype, hashlib.sha256(pool._room.blobs.read(digest)).digest()) == (None, digest)
    again = pool.add(model(1), stats={"curvature": curvature(1)})
    assert again.new_bytes == 0
    assert pool.resolve()["own"][0].item() == pytest.approx((1 * 1 + 2 * 2) / 3)


def test_a_statistic_that_comes_later_is_claimed_of_the_same_content(tmp_path: Path) -> None:
    with founded(tmp_path / "pool", recipe="weighed") as replica:
        first = replica.add(model(1), weight=3)
        with pytest.raises(NeedsError, match="needs the statistic 'curvature' of every model"):
            replica.resolve()
        root = replica.root
        later = replica.add(model(1), stats={"curvature": curvature(1)})
        assert (later.id, later.entry and str(later.entry.weight)) == (first.id, "3")
        assert replica.root != root
        assert replica.resolve()["own"][0].item() == 1


def test_collection_keeps_what_is_claimed_and_what_a_merge_reads(
    pool: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    ticks = iter(range(1, 1000))
    monkeypatch.setattr(time, "time", lambda: now + next(ticks) * MONTH)
    kept = digests(pool)
    for _ in range(3):
        pool.gc(0)
    assert all(pool._room.blobs.get(digest) for digest in kept)
    gone = pool.visible[0]
    pool.remove(gone.id)
    pool.gc(0)
    collected = pool.gc(0)
    assert collected.removed >= 2, "tensor and statistic"
    assert pool._room.blobs.get(gone.claim.stats["curvature"]) is None
    assert pool.fsck().clean
    assert [one for one in digests(pool) if pool._room.blobs.get(one) is None] == []


def test_a_merge_that_runs_holds_the_statistics_that_others_remove(
    pool: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = pool.resolve().receipt
    kept = digests(pool)
    inner = outputs.into_memory

    def meanwhile(*arguments: object) -> object:
        with Replica.open(pool.folder) as other:
            for entry in other.visible:
                other.remove(entry.id)
            other.gc(0)
            other.gc(0)
            assert all(other._room.blobs.get(digest) for digest in kept), "the lease holds them"
        return inner(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs, "into_memory", meanwhile)
    assert pool.resolve().receipt.to_bytes() == receipt.to_bytes()
    pool.gc(0)
    pool.gc(0)
    assert not any(pool._room.blobs.get(digest) for digest in kept)


@pytest.mark.parametrize("at", [0, 20, -1])
def test_a_damaged_statistic_is_found_mended_and_brought_again(pool: Replica, tmp_path: Path, at: int) -> None:
    receipt = pool.resolve().receipt
    flip(pool._room.blobs.path(digests(pool)[0]), at)
    with pytest.raises(ReplicaError, match=r"it is damaged. Run `crdtmerge fsck --mend`"):
        pool.resolve()
    with pytest.raises(ReplicaError, match="it is damaged"):
        pool.resolve_to(tmp_path / "out")
    report = pool.fsck()
    assert report.damaged == digests(pool)[:1]
    pool.fsck(mending=True)
    assert pool.fsck().clean
    with pytest.raises(NeedsError, match=rf"is claimed as {digests(pool)[0].hex()[:16]} and not here"):
        pool.resolve()
    assert pool.receiving().lacking().files == digests(pool)[:1]
    for number in (1, 2):
        pool.add(model(number), stats={"curvature": curvature(number)})
    assert pool.resolve().receipt.to_bytes() == receipt.to_bytes()


def test_a_blob_that_vanished_is_said_to(pool: Replica) -> None:
    pool._room.blobs.path(digests(pool)[0]).unlink()
    with pytest.raises(ReplicaError, match="cannot be read"):
        pool.resolve()


def test_peers_fetch_statistics_and_refuse_wrong_ones(pool: Replica, tmp_path: Path) -> None:
    with founded(tmp_path / "same", recipe="weighed") as same, second(same, tmp_path / "late", KEYS[2]) as late:
        late.join(*said_by(pool))
        assert late.receiving().lacking().files == digests(pool)
        with late.receiving() as receiving, pytest.raises(FalsePeerError, match="other bytes than its name says"):
            receiving.keep_file(digests(pool)[0], b"wrong")
        asyncio.run(asyncio.wait_for(fetched(late, Honest("pool", pool)), 60))
        assert late.receiving().lacking().files == []
        assert late.resolve().receipt.to_bytes() == pool.resolve().receipt.to_bytes()
        assert late.fsck().clean


def test_what_lacks_statistics_can_be_exported_and_says_so_elsewhere(pool: Replica, tmp_path: Path) -> None:
    pool.add(model(3), stats={"curvature": bytes(32)})
    since = pool.heads
    pool.add(model(4), stats={"curvature": curvature(4)})
    pool.export(tmp_path / "whole")
    pool.export(tmp_path / "some", since)
    with Replica.of_bundle(tmp_path / "other", tmp_path / "whole") as other:
        assert [one for one in digests(other) if other._room.blobs.get(one) is None] == [bytes(32)]
        with pytest.raises(NeedsError, match="0000000000000000 and not here"):
            other.resolve()
        assert other.fsck().clean
    assert curvature_bytes(4) in (tmp_path / "some").read_bytes()
    assert curvature_bytes(1) not in (tmp_path / "some").read_bytes()


def curvature_bytes(number: float) -> bytes:
    return curvature(number)["own"].tobytes()


def test_small_statistics_lie_in_the_database(tmp_path: Path) -> None:
    like = {"w": np.ones(3, np.float32)}
    with founded(tmp_path / "pool", recipe="weighed", like=like) as replica:
        replica.add({"w": np.float32([1, 2, 3])}, stats={"curvature": like})
        assert blob_files(tmp_path / "pool") == []
        assert replica.resolve()["w"].tolist() == [1, 2, 3]
        damaged = sql(tmp_path / "pool", "UPDATE blobs SET inline = zeroblob(length(inline)) WHERE dtype IS NULL")
        assert damaged == []
        with pytest.raises(ReplicaError, match="it is damaged"):
            replica.resolve()


def test_the_plan_of_a_merge_with_inputs_is_remembered_for_them_alone(tmp_path: Path) -> None:
    shift = tmp_path / "shift"
    shift.write_text("0.5")
    inputs = {"anchor": model(9), "shift": shift}
    with founded(tmp_path / "pool", recipe="anchored") as replica:
        replica.add(model(1))
        replica.resolve_to(tmp_path / "one", inputs=inputs)
        before = Anchored.plans
        assert replica.resolve_to(tmp_path / "two", inputs=inputs).merged
        assert Anchored.plans == before, "it was kept"
        shift.write_text("0.25")
        replica.resolve_to(tmp_path / "two", inputs=inputs)
        assert Anchored.plans == before + 1
