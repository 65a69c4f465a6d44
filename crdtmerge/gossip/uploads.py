"""Blobs that a peer brings of its own accord, because nobody could fetch them there: only such as are lacking here."""

from __future__ import annotations

import asyncio

from crdtmerge.errors import NotAllowedError
from crdtmerge.gossip import wire
from crdtmerge.gossip.talk import Call
from crdtmerge.pool.transfer import Lacking, Receiving, Want
from crdtmerge.store.partials import Partial


class Uploads:
    """Takes what was said to be lacking."""

    def __init__(self, receiving: Receiving, call: Call) -> None:
        self._receiving, self._call = receiving, call
        self._wants: dict[bytes, Want] = {}
        self._files: set[bytes] = set()
        self._partials: dict[bytes, Partial] = {}

    async def lacking(self) -> wire.LackingThere:
        """What is lacking, as much as an answer takes."""
        found: Lacking = await self._call(self._receiving.lacking)
        self._wants = {want.digest: want for want in found.tensors}
        self._files = set(found.files)
        whole = [*found.files, *(want.digest for want in found.tensors if want.whole)]
        large = [want for want in found.tensors if not want.whole][: wire.LACKING_MAX]
        return wire.LackingThere(whole[: wire.LACKING_MAX], {want.digest: await self._have(want) for want in large})

    async def take_whole(self, found: dict[bytes, bytes]) -> None:
        """Keep files and small tensors. Raises FalsePeerError for wrong bytes."""
        wants = [(self._wants[one], data) for one, data in found.items() if one in self._wants]
        if wants:
            await self._call(self._receiving.keep, wants)
        for digest in found.keys() & self._files:
            await self._call(self._receiving.keep_file, digest, found[digest])
        for digest in found:
            self._wants.pop(digest, None)
            self._files.discard(digest)

    async def take_tree(self, digest: bytes, data: bytes) -> None:
        """Begin a large tensor. Raises FalsePeerError, NotAllowedError."""
        want = self._wants.get(digest)
        if want is None or want.whole:
            raise NotAllowedError(f"{digest.hex()} is not lacking here.")
        partial = await self._call(self._receiving.begin, want, data)
        if partial is None:
            raise NotAllowedError(f"{digest.hex()} is on its way already.")
        self._partials[digest] = partial

    async def take_piece(self, digest: bytes, number: int, data: bytes) -> bool:
        """Keep a piece; whether it was the last. Raises FalsePeerError for wrong bytes."""
        partial = self._partials.get(digest)
        if partial is None or not 0 <= number < partial.tree.parts:
            raise NotAllowedError(f"piece {number} of {digest.hex()} is not lacking here.")
        await asyncio.to_thread(self._receiving.write, partial, number, data)
        if not partial.complete or self._partials.pop(digest, None) is None:
            return False
        self._wants.pop(digest, None)
        await self._call(self._receiving.finish, partial)
        return True

    async def _have(self, want: Want) -> bytes:
        """The bits of the pieces that are here."""
        partial: Partial | None = await self._call(self._receiving.begun, want)
        if partial is None:
            return b""
        self._partials[want.digest] = partial
        return bytes(partial.have)
