"""The quota of a key: contents, statistics and files count, whoever sends them; one's own and the founder's do not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from crdtmerge.gossip.fetch import Fetch, Fetched
from crdtmerge.pool.replica import Replica
from crdtmerge.pool.transfer import Receiving
from tests.gossip.sources import Honest
from tests.pool.replicas import KEYS, Model, exchange, founded, model, second

CONTENT = sum(x.nbytes for x in model(0).values())


def statistic(number: float) -> Model:
    """A statistic of a model of these tests, of half its bytes."""
    return {name: np.full_like(x, number, np.float16) for name, x in model(0).items()}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Replica]:
    """Two models of one key, with statistics."""
    with founded(tmp_path / "pool") as replica:
        for number in (1, 2):
            replica.add(model(number), stats={"curvature": statistic(number)})
        yield replica


@pytest.fixture
def late(pool: Replica, tmp_path: Path) -> Iterator[Replica]:
    """A replica that knows what is said there and has none of it."""
    with founded(tmp_path / "same") as same, second(same, tmp_path / "late", KEYS[2]) as replica:
        exchange(pool, replica)
        yield replica


def sizes(replica: Replica) -> list[int]:
    """The bytes of the statistics that are here."""
    blobs = [replica._room.blobs.get(digest) for digest in sorted(replica._room.opset.attached())]
    return [blob.nbytes for blob in blobs if blob is not None]


def fetch(receiving: Receiving, *sources: Replica) -> Fetched:
    found = [Honest(str(number), source) for number, source in enumerate(sources)]
    return asyncio.run(asyncio.wait_for(Fetch(receiving, found, call=asyncio.to_thread).run(), 60))


def test_statistics_count_beside_contents(pool: Replica, late: Replica) -> None:
    one, other = sizes(pool)
    with late.receiving(2 * CONTENT + one) as receiving:
        assert len(receiving.lacking().files) == 2
        assert receiving.over_quota == {}
        fetched = fetch(receiving, pool)
        assert late.ready() == pool.ready()
        assert sizes(late) == [one], "the second one came, and was not kept"
        assert receiving.over_quota == {KEYS[0].public: 1}
        assert fetched.lacking == 0
        assert receiving.lacking().files == [], "it is not asked for again"
        assert receiving.over_quota == {KEYS[0].public: 1}
    with late.receiving(2 * CONTENT + one + other) as receiving:
        fetch(receiving, pool)
        assert sizes(late) == [one, other]
        assert receiving.over_quota == {}


def test_a_key_whose_quota_is_used_up_gives_nothing_more(pool: Replica, late: Replica) -> None:
    """Statistics that are here take the room of contents that come later; what is whole here is not counted out."""
    one, _ = sizes(pool)
    with late.receiving(CONTENT) as receiving:
        lacking = receiving.lacking()
        assert (lacking.nbytes, lacking.files) == (CONTENT, [])
        fetch(receiving, pool)
        assert len(late.ready()) == 1
        assert receiving.over_quota == {KEYS[0].public: 2}, "a content, and the statistic of the other"
    with late.receiving(CONTENT + one) as receiving:
        fetch(receiving, pool)
        assert sizes(late) == [one]
    with late.receiving(2 * CONTENT + one - 1) as receiving:
        assert receiving.lacking().tensors == []
        assert receiving.over_quota == {KEYS[0].public: 1}
    with late.receiving(1) as receiving:
        assert receiving.lacking().tensors == []
        assert receiving.over_quota == {KEYS[0].public: 1}, "only what is not here"


def test_ones_own_has_no_quota(pool: Replica, late: Replica) -> None:
    late.add(model(3), stats={"curvature": statistic(3)})
    (own,) = late.ready()
    with late.receiving(1) as receiving:
        assert receiving.lacking().nbytes == 0
        assert receiving.over_quota == {KEYS[0].public: 2}
    late.gc(0)
    assert late.ready() == {own}


def test_a_statistic_is_of_any_who_speaks_of_it_and_has_room(pool: Replica, late: Replica, tmp_path: Path) -> None:
    with second(pool, tmp_path / "third", KEYS[1]) as third:
        spoken = third.add(model(1), stats={"curvature": statistic(1)})
        exchange(pool, late, third)
    assert spoken.new_bytes == 0
    with late.receiving(2 * CONTENT) as receiving:
        fetch(receiving, pool)
        assert late.ready() == pool.ready()
        assert len(sizes(late)) == 1
        assert receiving.over_quota == {KEYS[0].public: 1}


def test_two_who_bring_the_same_statistic_use_the_quota_once(pool: Replica, late: Replica) -> None:
    blobs = pool._room.blobs
    with late.receiving(2 * CONTENT + sum(sizes(pool))) as receiving:
        for digest in receiving.lacking().files * 2:
            receiving.keep_file(digest, blobs.read(digest))
        assert len(sizes(late)) == 2
        assert receiving.over_quota == {}
