"""Replicas that meet in a folder or bucket: syncing them, models of large tensors, and what must hold in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from crdtmerge.errors import PeerError
from crdtmerge.gossip import bucket
from crdtmerge.gossip.bucket import BucketReport
from crdtmerge.gossip.folder import Folder
from crdtmerge.gossip.places import Place
from crdtmerge.pool.replica import Replica
from tests.pool.replicas import KEYS, Model, broken, contents, founded, model

LARGE_ELEMENTS = 1_600_000
"""Of float32: 6.4 MB, seven pieces, more than goes in one part."""


def sync(replica: Replica, where: str | Path | Place, **options: Any) -> BucketReport:
    """One sync."""
    return asyncio.run(bucket.sync_bucket(replica, where, **options))


def begun(folder: Path, where: str | Path | Place, **options: Any) -> Replica:
    """A replica from a folder or bucket alone."""
    return asyncio.run(bucket.begin_from_bucket(folder, where, **options))[0]


def large(number: int) -> Model:
    """A model with a large tensor of its own, one that all share, and small ones."""
    own = np.random.default_rng(number).standard_normal(LARGE_ELEMENTS, np.float32)
    return {**model(number), "large": own, "same": np.arange(LARGE_ELEMENTS, dtype=np.float32)}


def pair(root: Path, where: str | Path | Place, **options: Any) -> tuple[Replica, Replica]:
    """Two replicas of a pool, the second begun from the place."""
    one = founded(root / "one", **options)
    sync(one, where)
    return one, begun(root / "two", where, key=KEYS[1])


def check_equal(replicas: Iterable[Replica]) -> None:
    """All have one set, all of its tensors, and merge to the same bytes."""
    first, *others = replicas
    for other in others:
        assert other.root == first.root
        assert other.state_root == first.state_root
        assert set(other.heads) == set(first.heads)
    for one in (first, *others):
        assert contents(one) <= one.ready()
        assert not broken(one), broken(one)
        assert one.fsck().clean
    if contents(first):
        assert len({one.resolve(threads=1).receipt.output_digest for one in (first, *others)}) == 1


def stored(folder: Path, kind: str) -> list[Path]:
    """The objects of a kind in a folder, in order."""
    return sorted(path for path in folder.glob(f"v1/*/{kind}/**/*") if path.is_file())


class BreakingFolder(Folder):
    """A folder of which so many bytes of stretches can be read."""

    def __init__(self, path: Path, nbytes: int) -> None:
        super().__init__(path)
        self.left = nbytes

    async def stretch(self, name: str, begin: int, end: int) -> AsyncIterator[bytes]:
        async for data in super().stretch(name, begin, end):
            self.left -= len(data)
            if self.left < 0:
                raise PeerError(f"{self.name}: is gone.")
            yield data


class CountingFolder(Folder):
    """A folder that says which objects were read and put."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[str] = []
        self.puts: list[str] = []

    async def read(self, name: str, bytes_max: int) -> bytes | None:
        self.reads.append(name)
        return await super().read(name, bytes_max)

    async def put_parts(self, name: str, nbytes: int, parts: AsyncIterator[bytes]) -> None:
        self.puts.append(name)
        await super().put_parts(name, nbytes, parts)
