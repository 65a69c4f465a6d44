"""What some honest source has arrives, whatever the others do, and nothing wrong ever enters."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from crdtmerge import limits
from crdtmerge.errors import PeerError, StorageError
from crdtmerge.gossip import fetch
from crdtmerge.gossip.batches import batches
from crdtmerge.gossip.fetch import Fetch
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.pool.replica import Replica
from crdtmerge.pool.transfer import Want
from tests.gossip.sources import BAD, Empty, Ending, Failing, Honest, Lying, Overdoing, Source, fetched
from tests.pool.replicas import KEYS, Model, broken, founded, said_by, second


def pieces_model(number: int) -> Model:
    """Two tensors of some pieces, one that all models share, and small ones."""
    source = np.random.default_rng(number)
    return {
        "a": source.standard_normal(700_000, np.float32),
        "b": source.standard_normal((5, 262_144), np.float32),
        "c": np.full(300_000, 7, np.float32),
        "small": np.float32([number, 1]),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica with all of three models."""
    with founded(tmp_path_factory.mktemp("whole") / "pool", like=pieces_model(0)) as replica:
        for number in range(1, 4):
            replica.add(pieces_model(number))
        yield replica


@pytest.fixture
def late(whole: Replica, tmp_path: Path) -> Iterator[Replica]:
    """One that knows of them and has nothing."""
    with founded(tmp_path / "first", like=pieces_model(0)) as same, second(same, tmp_path / "late", KEYS[1]) as replica:
        replica.join(*said_by(whole))
        yield replica


def wanted(replica: Replica) -> set[bytes]:
    return {want.digest for want in replica.receiving().lacking().tensors}


def run(replica: Replica, *sources: Source) -> fetch.Fetched:
    return asyncio.run(asyncio.wait_for(fetched(replica, *sources), 120))


def test_all_comes_from_several_sources_and_each_gives_a_part(whole: Replica, late: Replica) -> None:
    total, sources = late.receiving().lacking().nbytes, [Honest(name, whole) for name in "abc"]
    done = run(late, *sources)
    assert (done.lacking, done.false, done.failing) == (0, {}, {})
    assert done.nbytes == total
    assert all(sum(source.sent.values()) for source in sources)
    assert late.ready() == whole.ready()
    assert not broken(late)
    assert run(late, *sources).nbytes == 0


@pytest.mark.parametrize("seed", range(24))
def test_what_an_honest_source_has_arrives_whatever_the_others_do(whole: Replica, late: Replica, seed: int) -> None:
    source = random.Random(seed)
    digests = sorted(wanted(late))
    parts: list[set[bytes]] = [set(source.sample(digests, source.randrange(len(digests) + 1))) for _ in range(2)]
    honest: list[Honest] = [Honest(f"honest {n}", whole, seed, part) for n, part in enumerate(parts)]
    bad = [source.choice(BAD)(f"bad {n}", whole, seed * 10 + n) for n in range(source.randrange(1, 4))]
    sources = [*honest, *bad]
    source.shuffle(sources)
    done = run(late, *sources)
    left = wanted(late)
    assert not left & (parts[0] | parts[1]), f"seed {seed}: {[type(one).__name__ for one in sources]}"
    assert done.lacking == len(left), f"seed {seed}"
    assert not broken(late), f"seed {seed}"
    assert late.fsck().clean, f"seed {seed}"
    assert not {one.name for one in honest} & (done.false.keys() | done.failing.keys()), f"seed {seed}: {done}"


@pytest.mark.parametrize("kind", [Ending, Overdoing, Lying, Failing, Empty])
def test_what_a_bad_source_spoils_another_gives(whole: Replica, late: Replica, kind: type[Honest]) -> None:
    done = run(late, kind("bad", whole), Honest("good", whole))
    assert done.lacking == 0
    assert "good" not in done.false
    assert ("bad" in done.false) == (kind in (Overdoing, Lying))
    assert late.ready() == whole.ready()


def test_a_source_alone_that_lacks_what_is_wanted_ends_the_fetch(whole: Replica, late: Replica) -> None:
    done = run(late, Honest("nothing", whole, only=()))
    assert (done.blobs, done.failing, done.false) == (0, {}, {})
    assert done.lacking == len(wanted(late))
    assert run(late).lacking == done.lacking


def test_one_blob_that_only_the_second_source_has_arrives(whole: Replica, late: Replica) -> None:
    run(late, Honest("most", whole, only=wanted(late) - {max(_large(late))}))
    (left,) = wanted(late)
    done = run(late, Honest("nothing", whole, only=()), Honest("all", whole))
    assert (done.blobs, done.lacking) == (1, 0)
    assert left not in wanted(late)


def test_blobs_that_nobody_has_do_not_keep_the_others_away(
    whole: Replica, late: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "OPEN_MAX", 2)
    last = _large(late)[-1]
    assert run(late, Honest("one", whole, only={last})).blobs == 1
    assert last not in wanted(late)


def test_blobs_that_were_begun_and_nobody_has_do_not_keep_the_others_away(
    whole: Replica, late: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "OPEN_MAX", 2)
    *some, last = _large(late)
    with late.receiving() as receiving:
        for digest in some[:3]:
            want = next(one for one in receiving.lacking().tensors if one.digest == digest)
            tree = whole.giving().tree(digest)
            assert tree is not None
            assert receiving.begin(want, tree) is not None
    done = run(late, Honest("one", whole, only={last}), Honest("nothing", whole, only=()))
    assert (done.failing, done.false) == ({}, {})
    assert last not in wanted(late)


def test_a_blob_that_another_process_fetches_is_still_lacking(whole: Replica, late: Replica) -> None:
    digest = _large(late)[0]
    with late.receiving() as other:
        want = next(one for one in other.lacking().tensors if one.digest == digest)
        tree = whole.giving().tree(digest)
        assert tree is not None
        assert other.begin(want, tree) is not None
        assert run(late, Honest("all", whole)).lacking == 1
    assert run(late, Honest("all", whole)).lacking == 0


def test_what_came_before_a_source_broke_off_is_not_asked_for_again(whole: Replica, late: Replica) -> None:
    class Breaking(Honest):
        async def stretch(self, digest: bytes, begin: int, end: int):  # type: ignore[no-untyped-def]
            sent = 0
            async for data in super().stretch(digest, begin, end):
                yield data
                sent += len(data)
                if sent > limits.PIECE_BYTES + 10:
                    raise PeerError("broken off")

    run(late, Breaking("breaking", whole))
    before = late.receiving()
    resumed = sum(one.done_bytes for want in before.lacking().tensors if (one := before.begun(want)))
    before._partials.__exit__()
    assert resumed >= limits.PIECE_BYTES
    good = Honest("good", whole)
    total = sum(want.nbytes for want in late.receiving().lacking().tensors)
    done = run(late, good)
    assert done.resumed_bytes == resumed
    assert sum(good.sent.values()) == total - resumed


def test_a_source_whose_last_piece_is_wrong_before_it_ends_is_false(whole: Replica, late: Replica) -> None:
    class Both(Honest):
        def chunks(self, digest: bytes, begin: int, end: int) -> list[bytes]:
            data = b"".join(super().chunks(digest, begin, end))
            return [bytes(limits.PIECE_BYTES)] if len(data) > limits.PIECE_BYTES else [data]

    assert "both" in run(late, Both("both", whole)).false


def test_a_full_disk_ends_the_fetch_and_what_came_stays(
    whole: Replica, late: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = type(late._room.blobs.disk).write, 0

    def failing(disk: object, descriptor: int, offset: int, data: object) -> None:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(28, "No space left on device")
        write(disk, descriptor, offset, data)  # type: ignore[arg-type]

    with monkeypatch.context() as full:
        full.setattr(type(late._room.blobs.disk), "write", failing)
        with pytest.raises(StorageError, match="No space"):
            run(late, Honest("a", whole), Honest("b", whole))
    done = run(late, Honest("a", whole))
    assert done.lacking == 0
    assert done.resumed_bytes > 0


def test_a_fetch_that_is_cancelled_keeps_what_came(whole: Replica, late: Replica) -> None:
    class Stuck(Honest):
        async def stretch(self, digest: bytes, begin: int, end: int):  # type: ignore[no-untyped-def]
            async for data in super().stretch(digest, begin, begin + limits.PIECE_BYTES):
                yield data
            await asyncio.sleep(3600)

    async def cancelled() -> None:
        with late.receiving() as receiving:
            task = asyncio.create_task(Fetch(receiving, [Stuck("stuck", whole)]).run())
            while receiving.lacking().tensors and not sum(one.done_bytes for one in receiving._partials._open.values()):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    assert run(late, Honest("a", whole)).resumed_bytes >= limits.PIECE_BYTES


@pytest.mark.parametrize("sizes", [[], [1], [fetch.SMALL_BYTES_MAX] * 3, [1] * 3000, [0] * 2000, [5 << 20, 1, 5 << 20]])
def test_small_blobs_are_asked_for_in_groups_within_bounds(sizes: Sequence[int]) -> None:
    wants = [Want(bytes([n % 256]) * 32, DTYPES["U8"], (nbytes,)) for n, nbytes in enumerate(sizes)]
    bounds = {"bytes_max": fetch.SMALL_BYTES_MAX, "count_max": fetch.SMALL_MAX}
    groups = list(batches(wants, lambda want: want.nbytes, **bounds))
    assert [want for group in groups for want in group] == wants
    for group in groups:
        assert len(group) <= fetch.SMALL_MAX
        assert len(group) == 1 or sum(want.nbytes for want in group) <= fetch.SMALL_BYTES_MAX


def _large(replica: Replica) -> list[bytes]:
    """The tensors of pieces, in the order in which they are fetched."""
    return [want.digest for want in replica.receiving().lacking().tensors if not want.whole]
