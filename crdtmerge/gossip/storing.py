"""Putting what is here and not there into a folder or bucket, in the order blobs, trees, manifests, operations.

What an operation refers to is there before it. Where the place takes no more, nothing that comes after is put; a blob
that is damaged here counts as one that is not here.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, PeerError, ReplicaError
from crdtmerge.gossip import objects
from crdtmerge.gossip.objects import blob_name, manifest_name, tree_name
from crdtmerge.gossip.places import PART_BYTES
from crdtmerge.gossip.stored import Stored, groups
from crdtmerge.gossip.stored_ops import StoredOps
from crdtmerge.gossip.talk import Call
from crdtmerge.pool.replica import Replica
from crdtmerge.pool.room import Progress
from crdtmerge.store.blobs import Blob
from crdtmerge.weights.digests import piece_digests


class _Put(NamedTuple):
    """An object to be put: its name, about its bytes, and how to make them; None if they are gone."""

    name: str
    nbytes: int
    make: Callable[[], bytes | None]


class Storing:
    """Puts what a replica knows."""

    def __init__(self, replica: Replica, stored: Stored, ops: StoredOps, call: Call, progress: Progress) -> None:
        self._replica, self._stored, self._ops = replica, stored, ops
        self._giving = replica.giving()
        self._call, self._progress = call, progress
        self._sent, self._total = 0, 0

    async def put(self, hold: Callable[[Iterable[bytes]], None], *, rehash: bool) -> None:
        """Put all that is not there; ``hold`` keeps blobs from being collected."""
        try:
            plan = await self._call(self._plan)  # what these operations refer to is looked for after them
            needed = await self._call(self._needed, hold)
            if rehash:
                await self._look_at(needed)
            await self._stored.place.sweep()
            await self._put_genesis()
            await self._put_blobs(await self._call(self._blobs, needed))
            await self._put_some(await self._call(self._trees, needed))
            await self._put_some(await self._call(self._manifests))
            for puts, count in plan:
                await self._put_some(puts)
                self._stored.report.ops_sent += count
        except PeerError as fault:
            self._stored.failed(self._stored.place.name, fault)

    # ---- what

    def _plan(self) -> list[tuple[list[_Put], int]]:
        """Segments of what is not there, of each chain, and how many operations are new in them."""
        plan = []
        for key in [key for key, _, _ in self._replica.opset.tables.every("tips")]:
            found = self._ops.lacking(key)
            if found is not None:
                chain, lacks = found
                plan.append(([self._segment(key, first, ids) for first, ids in chain.cut(lacks)], len(lacks)))
        return plan

    def _segment(self, key: bytes, first: int, ids: list[bytes]) -> _Put:
        make = partial(self._pack, ids)
        segment = objects.segment_of(key, first, make())
        return _Put(segment.name, segment.nbytes, make)

    def _pack(self, ids: list[bytes]) -> bytes:
        return objects.pack(map(self._ops.wire, ids))

    def _needed(self, hold: Callable[[Iterable[bytes]], None]) -> list[Blob]:
        """The blobs that contents need and that are here."""
        digests = sorted(self._giving.needed())
        hold(digests)
        return [blob for one in digests if (blob := self._giving.blob(one)) is not None]

    def _blobs(self, blobs: Iterable[Blob]) -> list[Blob]:
        found = {blob.digest: blob for blob in blobs}
        sizes = {one: blob.nbytes for one, blob in found.items()}
        return [found[one] for one in self._lacking(blob_name, self._stored.listing.blobs, sizes)]

    def _trees(self, blobs: Iterable[Blob]) -> list[_Put]:
        found = {blob.digest: self._giving.tree(blob.digest) or b"" for blob in blobs if _is_large(blob)}
        sizes = {one: len(tree) for one, tree in found.items()}
        lacking = self._lacking(tree_name, self._stored.listing.trees, sizes)
        return [_Put(tree_name(one), sizes[one], partial(self._giving.tree, one)) for one in lacking]

    def _manifests(self) -> list[_Put]:
        """Those of all contents that were ever added, and of the base."""
        sizes = self._giving.manifest_sizes()
        lacking = self._lacking(manifest_name, self._stored.listing.manifests, sizes)
        return [_Put(manifest_name(one), sizes[one], partial(self._manifest, one)) for one in lacking]

    def _manifest(self, content: bytes) -> bytes | None:
        manifest = self._replica.manifest(content)
        return None if manifest is None else manifest.to_bytes()

    def _lacking(
        self, name: Callable[[bytes], str], listed: Mapping[bytes, int], sizes: Mapping[bytes, int]
    ) -> list[bytes]:
        """What is not there, or known to be wrong, or has another size."""
        for one, nbytes in sizes.items():
            if listed.get(one, nbytes) != nbytes:
                self._stored.found_wrong(name(one), f"has {listed[one]} bytes, not {nbytes}.")
        return [one for one in sizes if one not in listed or name(one) in self._stored.wrong]

    # ---- putting

    async def _put_genesis(self) -> None:
        genesis = self._replica.genesis.to_bytes()
        found = await self._stored.read("genesis", limits.MANIFEST_BYTES_MAX)
        if found is not None and found != genesis:
            self._stored.found_wrong("genesis", "is not that of this pool.")
        if found != genesis:
            await self._put_one(_Put("genesis", len(genesis), lambda: genesis))

    async def _put_blobs(self, blobs: list[Blob]) -> None:
        self._total = sum(blob.nbytes for blob in blobs)
        small = [blob for blob in blobs if blob.dtype is None or blob.nbytes <= PART_BYTES]
        puts = [_Put(blob_name(one.digest), one.nbytes, partial(self._bytes, one)) for one in small]
        self._stored.report.blobs_sent += await self._put_some(puts)
        for blob in (one for one in blobs if one.dtype is not None and one.nbytes > PART_BYTES):
            name = blob_name(blob.digest)
            try:
                await self._stored.place.put_parts(self._stored.path(name), blob.nbytes, self._pieces(blob))
            except (ReplicaError, FalsePeerError) as fault:
                self._stored.failed(name, fault)
                continue
            self._stored.report.blobs_sent += 1
            self._stored.report.bytes_sent += blob.nbytes

    def _bytes(self, blob: Blob) -> bytes | None:
        if blob.dtype is None:
            return self._giving.whole(blob.digest)
        return b"".join(self._giving.piece(blob, number).tobytes() for number in range(_parts(blob)))

    async def _pieces(self, blob: Blob) -> AsyncIterator[bytes]:
        for number in range(_parts(blob)):
            piece = await asyncio.to_thread(self._giving.piece, blob, number)
            yield piece.tobytes()
            self._advance(piece.nbytes)

    async def _put_some(self, puts: list[_Put]) -> int:
        """Put some at a time; how many were new."""
        new = 0
        for group in groups(puts, lambda put: put.nbytes):
            new += sum(await asyncio.gather(*map(self._put_one, group)))
        return new

    async def _put_one(self, put: _Put) -> bool:
        over = put.name in self._stored.wrong
        try:
            data = await self._call(put.make)
            new = data is not None and await self._stored.place.put(self._stored.path(put.name), data, over=over)
        except (ReplicaError, FalsePeerError) as fault:  # damaged here, or something else has the name there
            self._stored.failed(put.name, fault)
            return False
        if new:
            self._stored.report.bytes_sent += len(data)
            self._advance(len(data))
        return new

    def _advance(self, nbytes: int) -> None:
        self._sent = min(self._sent + nbytes, self._total)
        self._progress("sending", self._sent, self._total)

    # ---- looking at what both have

    async def _look_at(self, blobs: Iterable[Blob]) -> None:
        """Find what is wrong there though it is here: it is put anew."""
        listing = self._stored.listing
        both = [one for one in blobs if one.digest in listing.blobs]
        for group in groups(both, lambda blob: min(blob.nbytes, PART_BYTES)):
            await asyncio.gather(*map(self._look_at_blob, group))
        trees = {tree_name(one.digest): partial(self._giving.tree, one.digest) for one in both if _is_large(one)}
        manifests = {manifest_name(one): partial(self._manifest, one) for one in listing.manifests}
        for some in groups({**trees, **manifests}.items(), lambda item: 0):
            await asyncio.gather(*(self._look_at_small(name, ours) for name, ours in some))

    async def _look_at_small(self, name: str, ours: Callable[[], bytes | None]) -> None:
        data, right = await self._stored.read(name, limits.TREE_BYTES_MAX), await self._call(ours)
        if data is not None and right is not None and data != right:
            self._stored.found_wrong(name, "holds other bytes than its name says.")

    async def _look_at_blob(self, blob: Blob) -> None:
        name, seen, pieces, buffer = blob_name(blob.digest), hashlib.sha256(), bytearray(), bytearray()
        try:
            async for data in self._stored.place.stretch(self._stored.path(name), 0, blob.nbytes):
                if blob.dtype is None:
                    seen.update(data)
                    continue
                buffer += data
                whole = len(buffer) - len(buffer) % limits.PIECE_BYTES
                pieces += piece_digests(buffer[:whole])
                del buffer[:whole]
        except FalsePeerError as fault:
            self._stored.found_wrong(name, str(fault))
            return
        right = seen.digest() == blob.digest if blob.dtype is None else pieces + piece_digests(buffer) == blob.pieces
        if not right:
            self._stored.found_wrong(name, "holds other bytes than its name says.")


def _is_large(blob: Blob) -> bool:
    """Whether a blob has a tree."""
    return blob.dtype is not None and blob.nbytes > limits.PIECE_BYTES


def _parts(blob: Blob) -> int:
    return -(-blob.nbytes // limits.PIECE_BYTES)
