"""The blobs in a folder or bucket as a source for ``Fetch``, which asks for those alone that a listing shows.

A peer that serves wrong bytes is left; in a folder one object is wrong and the others are not. So what is wrong is
remembered by its name and not asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError
from crdtmerge.gossip.objects import blob_name, tree_name
from crdtmerge.gossip.places import FLIGHT_MAX
from crdtmerge.gossip.stored import Stored
from crdtmerge.pool.room import Room
from crdtmerge.pool.transfer import Lacking, Receiving, Want
from crdtmerge.store.partials import Partial
from crdtmerge.weights.digests import piece_digests, tensor_digest


class Offered(Receiving):
    """What a replica takes of the blobs that a place has."""

    def __init__(self, room: Room, stored: Stored) -> None:
        super().__init__(room)
        self._stored = stored
        self.wants: dict[bytes, Want] = {}
        self.resumed: dict[bytes, int] = {}
        """Bytes of each blob that were here before."""

    def lacking(self) -> Lacking:
        """What is not here and there."""
        tensors, files, base = super().lacking()
        tensors = [want for want in tensors if self._has(want.digest, want.nbytes) and self._has_tree(want)]
        self.wants = {want.digest: want for want in tensors}
        return Lacking(tensors, [one for one in files if self._has(one, None)], base)

    def left(self) -> int:
        """How many blobs are still not here."""
        tensors, files, base = super().lacking()
        return len(tensors) + len(files) + (base is not None)

    def begin(self, want: Want, tree: bytes) -> Partial | None:
        """Begin a tensor in pieces; None for a tree that is wrong."""
        try:
            return super().begin(want, tree)
        except FalsePeerError as fault:
            self._stored.found_wrong(tree_name(want.digest), str(fault))
            return None

    def begun(self, want: Want) -> Partial | None:
        """Go on with a tensor."""
        partial = super().begun(want)
        self.resumed.setdefault(want.digest, partial.done_bytes if partial is not None else 0)
        return partial

    def write(self, partial: Partial, number: int, data: bytes | bytearray | memoryview) -> None:
        """Check a piece and write it."""
        try:
            super().write(partial, number, data)
        except FalsePeerError as fault:
            self._stored.found_wrong(blob_name(partial.tree.digest), str(fault))
            raise

    def _has(self, digest: bytes, nbytes: int | None) -> bool:
        name, there = blob_name(digest), self._stored.listing.blobs.get(digest)
        if there is not None and nbytes is not None and there != nbytes:
            self._stored.found_wrong(name, f"has {there} bytes, not {nbytes}.")
        return there is not None and name not in self._stored.wrong

    def _has_tree(self, want: Want) -> bool:
        return want.whole or (
            want.digest in self._stored.listing.trees and tree_name(want.digest) not in self._stored.wrong
        )


class StoredBlobs:
    """The blobs of a pool in a place: a ``Source``."""

    def __init__(self, stored: Stored, offered: Offered) -> None:
        self._stored, self._offered = stored, offered

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._stored.place.name

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest, if it is right."""
        found = await self._stored.manifest(content)
        return None if found is None else found.to_bytes()

    async def whole(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of some files and tensors of one piece that are there and right."""
        found: dict[bytes, bytes] = {}
        for at in range(0, len(digests), FLIGHT_MAX):
            some = digests[at : at + FLIGHT_MAX]
            read = await asyncio.gather(*map(self._one, some))
            found |= {digest: data for digest, data in zip(some, read, strict=True) if data is not None}
        return found

    async def tree(self, digest: bytes) -> bytes | None:
        """The tree of a tensor."""
        return await self._stored.read(tree_name(digest), limits.TREE_BYTES_MAX)

    async def stretch(self, digest: bytes, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of a tensor; an object that cannot be read as one is remembered as wrong."""
        name, got = blob_name(digest), 0
        try:
            async for data in self._stored.place.stretch(self._stored.path(name), begin, end):
                got += len(data)
                yield data
        except FalsePeerError as fault:
            self._stored.found_wrong(name, str(fault))
            raise
        if got < end - begin:
            self._stored.found_wrong(name, "is shorter than it was listed.")
            raise FalsePeerError(f"{self.name}: {name} is shorter than it was listed.")

    async def _one(self, digest: bytes) -> bytes | None:
        want = self._offered.wants.get(digest)
        most = want.nbytes if want is not None else limits.CARRIED_FILES_BYTES_MAX
        data = await self._stored.read(blob_name(digest), most)
        if data is None or await asyncio.to_thread(_is_right, digest, want, data):
            return data
        self._stored.found_wrong(blob_name(digest), "holds other bytes than its name says.")
        return None


def _is_right(digest: bytes, want: Want | None, data: bytes) -> bool:
    if want is None:
        return hashlib.sha256(data).digest() == digest
    return len(data) == want.nbytes and tensor_digest(want.dtype, want.shape, piece_digests(data)) == digest
