"""Sources of blobs for tests of fetching: honest ones over a replica, and all kinds of others.

source = Honest("a", replica)        what the replica has
source = Lying("b", replica, seed)   turns bits
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Sequence

from crdtmerge import limits
from crdtmerge.errors import PeerError
from crdtmerge.gossip.fetch import Fetch, Fetched
from crdtmerge.gossip.fetch import Source as Source
from crdtmerge.pool.replica import Replica
from tests.pool.replicas import flipped

CHUNK_BYTES = 200_003


class Honest:
    """Gives what a replica has, of the digests that it is said to have."""

    def __init__(self, name: str, replica: Replica, seed: int = 0, only: Collection[bytes] | None = None) -> None:
        self.name, self._replica, self._giving, self._only = name, replica, replica.giving(), only
        self.random = random.Random(f"{name} {seed}")
        self.sent: dict[bytes, int] = {}
        self.stretches: list[tuple[bytes, int, int]] = []

    def has(self, digest: bytes) -> bool:
        return self._only is None or digest in self._only

    async def manifest(self, content: bytes) -> bytes | None:
        await asyncio.sleep(0)
        found = self._replica.manifest(content)
        return found.to_bytes() if found else None

    async def whole(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        await asyncio.sleep(0)
        found = {one: self._giving.whole(one) for one in digests if self.has(one)}
        return {one: data for one, data in found.items() if data is not None}

    async def tree(self, digest: bytes) -> bytes | None:
        await asyncio.sleep(0)
        return self._giving.tree(digest) if self.has(digest) else None

    async def stretch(self, digest: bytes, begin: int, end: int) -> AsyncIterator[bytes]:
        self.stretches.append((digest, begin, end))
        for data in self.chunks(digest, begin, end):
            await asyncio.sleep(0)
            self.sent[digest] = self.sent.get(digest, 0) + len(data)
            yield data

    def chunks(self, digest: bytes, begin: int, end: int) -> list[bytes]:
        blob = self._giving.blob(digest) if self.has(digest) else None
        if blob is None:
            return []
        numbers = range(begin // limits.PIECE_BYTES, -(-end // limits.PIECE_BYTES))
        data = b"".join(self._giving.piece(blob, number).tobytes() for number in numbers)[: end - begin]
        return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]


class Slow(Honest):
    """Honest, and takes its time."""

    async def stretch(self, digest: bytes, begin: int, end: int) -> AsyncIterator[bytes]:
        async for data in super().stretch(digest, begin, end):
            await asyncio.sleep(self.random.uniform(0, 0.02))
            yield data


class Failing(Honest):
    """Breaks off, at any moment."""

    def _may_fail(self) -> None:
        if self.random.random() < 0.4:
            raise PeerError(f"{self.name} broke off.")

    async def manifest(self, content: bytes) -> bytes | None:
        self._may_fail()
        return await super().manifest(content)

    async def whole(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        self._may_fail()
        return await super().whole(digests)

    async def tree(self, digest: bytes) -> bytes | None:
        self._may_fail()
        return await super().tree(digest)

    async def stretch(self, digest: bytes, begin: int, end: int) -> AsyncIterator[bytes]:
        async for data in super().stretch(digest, begin, end):
            self._may_fail()
            yield data


class Lying(Honest):
    """Turns bits, now and then."""

    def _lie(self, data: bytes) -> bytes:
        return flipped(data, self.random.randrange(len(data))) if data and self.random.random() < 0.3 else data

    async def manifest(self, content: bytes) -> bytes | None:
        data = await super().manifest(content)
        return self._lie(data) if data else None

    async def whole(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        return {digest: self._lie(data) for digest, data in (await super().whole(digests)).items()}

    async def tree(self, digest: bytes) -> bytes | None:
        data = await super().tree(digest)
        return self._lie(data) if data else None

    def chunks(self, digest: bytes, begin: int, end: int) -> list[bytes]:
        return [self._lie(data) for data in super().chunks(digest, begin, end)]


class Ending(Honest):
    """Ends before all was sent."""

    def chunks(self, digest: bytes, begin: int, end: int) -> list[bytes]:
        found = super().chunks(digest, begin, end)
        return found[: self.random.randrange(len(found) + 1)]


class Overdoing(Honest):
    """Sends more than was asked for."""

    def chunks(self, digest: bytes, begin: int, end: int) -> list[bytes]:
        found = super().chunks(digest, begin, end)
        return [*found, bytes(self.random.randrange(1, 10))] if found else []


class Empty(Honest):
    """Has nothing of what it said it had."""

    def chunks(self, digest: bytes, begin: int, end: int) -> list[bytes]:
        return []


BAD = (Slow, Failing, Lying, Ending, Overdoing, Empty)


async def fetched(replica: Replica, *sources: Source) -> Fetched:
    """One fetch."""
    with replica.receiving() as receiving:
        return await Fetch(receiving, sources, call=asyncio.to_thread).run()
