"""What a replica gives and takes: checked both ways, leased while it is on its way, ready when it is whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, NotAllowedError, StorageError
from crdtmerge.gossip.uploads import Uploads
from crdtmerge.pool.replica import Replica
from crdtmerge.pool.transfer import Receiving
from tests.gossip.sources import Honest, fetched
from tests.pool.replicas import KEYS, Model, blob_files, broken, flip, flipped, founded, said_by, second, sql


def mixed(number: int) -> Model:
    """A model with a tensor of three pieces, one in a file, one in the database, and an empty one."""
    source = np.random.default_rng(number)
    return {
        "large": source.standard_normal(700_000, np.float32),
        "file": source.standard_normal(10_000, np.float32),
        "small": np.float32([number]),
        "none": np.zeros(0, np.float32),
    }


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Replica, Replica]]:
    """A replica with a contribution, and one that knows of it."""
    with founded(tmp_path / "one", like=mixed(0)) as one, second(one, tmp_path / "two", KEYS[1]) as two:
        one.add(mixed(1))
        two.join(*said_by(one))
        yield one, two


def give_all(one: Replica, receiving: Receiving) -> None:
    giving, lacking = one.giving(), receiving.lacking()
    receiving.keep([(want, giving.whole(want.digest) or b"") for want in lacking.tensors if want.whole])
    for want in lacking.tensors:
        if not want.whole:
            tree, blob = giving.tree(want.digest), giving.blob(want.digest)
            assert tree is not None
            assert blob is not None
            partial = receiving.begin(want, tree)
            assert partial is not None
            for number in partial.lacks():
                receiving.write(partial, number, giving.piece(blob, number).tobytes())
            receiving.finish(partial)


def test_a_content_is_ready_when_its_last_tensor_came_and_holds_no_lease_then(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    with two.receiving() as receiving:
        lacking = receiving.lacking()
        assert {want.whole for want in lacking.tensors} == {True, False}
        assert lacking.nbytes == sum(tensor.nbytes for tensor in mixed(1).values())
        give_all(one, receiving)
        assert two.ready() == one.ready()
        assert not receiving.lacking().tensors
        assert not sql(two.folder, "SELECT * FROM leased"), "a node that runs for years keeps no row of each blob"
        assert len(sql(two.folder, "SELECT * FROM leases")) == 1
    assert not sql(two.folder, "SELECT * FROM leases")
    assert not broken(two)


def test_what_is_removed_while_it_is_fetched_is_collected_in_the_end(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    (content,) = one.ready()
    with two.receiving() as receiving:
        lacking = receiving.lacking()
        one.remove(content)
        two.join(*said_by(one))
        assert not receiving.lacking().tensors
        give = one.giving()
        receiving.keep([(want, give.whole(want.digest) or b"") for want in lacking.tensors if want.whole])
        (want,) = [want for want in lacking.tensors if not want.whole]
        partial = receiving.begin(want, give.tree(want.digest) or b"")
        assert partial is not None
        two.gc(0)
        assert receiving.begun(want) is partial, "what is on its way is kept"
    for _ in range(3):
        two.gc(0)
    assert not blob_files(two.folder)
    assert not list((two.folder / "partial").iterdir())
    assert not sql(two.folder, "SELECT * FROM partials")
    assert two.fsck().clean


def test_a_tensor_that_is_here_already_is_not_begun_again(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    with two.receiving() as receiving, two.receiving() as other:
        (want,) = [want for want in receiving.lacking().tensors if not want.whole]
        tree = one.giving().tree(want.digest)
        assert tree is not None
        give_all(one, other)
        assert receiving.begin(want, tree) is None
        assert not sql(two.folder, "SELECT * FROM partials")
        assert not receiving.lacking().tensors


def test_finishing_twice_does_no_harm(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    with two.receiving() as receiving:
        (want,) = [want for want in receiving.lacking().tensors if not want.whole]
        giving = one.giving()
        blob, partial = giving.blob(want.digest), receiving.begin(want, giving.tree(want.digest) or b"")
        assert blob is not None
        assert partial is not None
        for number in partial.lacks():
            receiving.write(partial, number, giving.piece(blob, number).tobytes())
        receiving.finish(partial)
        receiving.finish(partial)
        receiving.write(partial, 0, giving.piece(blob, 0).tobytes())
    assert two.giving().tree(want.digest) == giving.tree(want.digest)
    assert not broken(two)


def test_a_finish_that_failed_succeeds_when_it_is_repeated(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    with two.receiving() as receiving:
        with monkeypatch.context() as failing:

            def fail(*_: object) -> None:
                raise StorageError("the disk is full")

            failing.setattr(type(receiving._lease), "release", fail)
            (want,) = [want for want in receiving.lacking().tensors if not want.whole]
            giving = one.giving()
            blob, partial = giving.blob(want.digest), receiving.begin(want, giving.tree(want.digest) or b"")
            assert blob is not None
            assert partial is not None
            for number in partial.lacks():
                receiving.write(partial, number, giving.piece(blob, number).tobytes())
            receiving.commit()
            with pytest.raises(StorageError, match="full"):
                receiving.finish(partial)
            assert two.giving().blob(want.digest) is None
        again = receiving.begun(want)
        assert again is not None
        assert again.complete, "nothing of it is fetched again"
        receiving.finish(again)
        give_all(one, receiving)
    assert two.ready() == one.ready()
    assert not broken(two)


def test_wrong_trees_tensors_and_files_are_refused(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    with two.receiving() as receiving:
        wants = {want.nbytes: want for want in receiving.lacking().tensors}
        large, small = wants[max(wants)], wants[4]
        tree = one.giving().tree(large.digest)
        assert tree is not None
        dtype, shape, pieces = msgpack.unpackb(tree)
        trees = [b"", b"\xc1", tree[:-1], tree + b"x", flipped(tree, len(tree) - 5), msgpack.packb([dtype, shape])]
        values = (
            ["F16", shape, pieces],
            [dtype, [1], pieces],
            [dtype, shape, pieces[:-32]],
            [dtype, shape, 5],
            [1, 2, 3],
        )
        trees += [msgpack.packb(value) for value in values]
        for wrong in trees:
            with pytest.raises(FalsePeerError):
                receiving.begin(large, wrong)
        data = one.giving().whole(small.digest)
        assert data is not None
        for wrong in (b"", flipped(data, 0), data + b"x"):
            with pytest.raises(FalsePeerError, match="other bytes"):
                receiving.keep([(small, wrong)])
        with pytest.raises(FalsePeerError, match="other bytes"):
            receiving.keep_file(hashlib.sha256(b"x").digest(), b"y")
        with pytest.raises(FalsePeerError):
            receiving.keep_base(b"nonsense")
        assert not sql(two.folder, "SELECT * FROM partials")
    assert two.fsck().clean


def test_a_damaged_blob_is_not_given(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    for path in blob_files(one.folder):
        path.chmod(0o600)
        flip(path, 100)
    with pytest.raises(Exception, match="is damaged"):
        asyncio.run(fetched(two, Honest("damaged", one)))
    assert len(two.giving().whole(next(w.digest for w in _lacking(one, two) if w.nbytes == 4)) or b"") in (0, 4)
    assert not broken(two)


def _lacking(one: Replica, two: Replica) -> list[object]:
    manifest = one.manifest(next(iter(one.ready())))
    assert manifest is not None
    from crdtmerge.pool.transfer import _wants

    return list(_wants(manifest))  # type: ignore[arg-type]


def test_what_is_not_here_is_not_given(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    giving = two.giving()
    assert giving.tree(bytes(32)) is giving.whole(bytes(32)) is giving.blob(bytes(32)) is None
    for want in _lacking(one, two):
        assert one.giving().whole(want.digest) is None or want.whole  # type: ignore[attr-defined]


def test_uploads_take_only_what_was_said_to_be_lacking(pair: tuple[Replica, Replica]) -> None:
    one, two = pair

    async def main() -> None:
        with two.receiving() as receiving:
            uploads, giving = Uploads(receiving, asyncio.to_thread), one.giving()
            with pytest.raises(NotAllowedError):
                await uploads.take_tree(bytes(32), b"")
            lacking = await uploads.lacking()
            (large,) = lacking.large
            tree, blob = giving.tree(large), giving.blob(large)
            assert tree is not None
            assert blob is not None
            with pytest.raises(NotAllowedError):
                await uploads.take_piece(large, 0, giving.piece(blob, 0).tobytes())
            for digest in lacking.whole:
                with pytest.raises(NotAllowedError):
                    await uploads.take_tree(digest, tree)
            await uploads.take_tree(large, tree)
            for number in (-1, 3, 1 << 40):
                with pytest.raises(NotAllowedError):
                    await uploads.take_piece(large, number, b"")
            with pytest.raises(FalsePeerError):
                await uploads.take_piece(large, 0, bytes(limits.PIECE_BYTES))
            assert not await uploads.take_piece(large, 1, giving.piece(blob, 1).tobytes())
            assert (await uploads.lacking()).large == {large: b"\x02"}
            last = [uploads.take_piece(large, number, giving.piece(blob, number).tobytes()) for number in (0, 2, 0, 2)]
            assert sum(one is True for one in await asyncio.gather(*last, return_exceptions=True)) == 1
            await uploads.take_whole({one: giving.whole(one) or b"" for one in lacking.whole} | {bytes(32): b"x"})
            assert await uploads.lacking() == ([], {})

    asyncio.run(main())
    assert two.ready() == one.ready()
    assert not broken(two)


def test_pieces_that_come_and_are_fetched_at_once_end_in_one_blob(pair: tuple[Replica, Replica]) -> None:
    one, two = pair

    async def main() -> None:
        from crdtmerge.gossip.fetch import Fetch

        with two.receiving() as receiving:
            lock = asyncio.Lock()

            async def call(work, *arguments):  # type: ignore[no-untyped-def]
                async with lock:
                    return await asyncio.to_thread(work, *arguments)

            uploads, giving = Uploads(receiving, call), one.giving()
            fetch = asyncio.create_task(Fetch(receiving, [Honest("one", one)], call=call).run())
            lacking = await uploads.lacking()
            for digest in lacking.large:
                blob, tree = giving.blob(digest), giving.tree(digest)
                assert blob is not None
                assert tree is not None
                try:
                    await uploads.take_tree(digest, tree)
                    for number in range(3):
                        await uploads.take_piece(digest, number, giving.piece(blob, number).tobytes())
                except NotAllowedError:
                    pass
            await fetch

    for _ in range(5):
        asyncio.run(main())
    assert two.ready() == one.ready()
    assert not broken(two)
