"""Giving a peer the blobs that it lacks and cannot fetch: one that listens nowhere has to bring what it made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from crdtmerge import limits
from crdtmerge.gossip import wire
from crdtmerge.gossip.batches import batches
from crdtmerge.gossip.client import HttpPeer
from crdtmerge.gossip.fetch import SMALL_BYTES_MAX, SMALL_MAX
from crdtmerge.pool.room import Progress, silent
from crdtmerge.pool.transfer import Giving
from crdtmerge.store.blobs import Blob


@dataclass
class Given:
    """Blobs that a peer was given, and their bytes."""

    blobs: int = 0
    nbytes: int = 0


async def give(giving: Giving, peer: HttpPeer, progress: Progress = silent) -> Given:
    """Give a peer what it lacks and is here, until it lacks no more of that. Raises PeerError, ReplicaError."""
    given, before = Given(), -1
    while before != given.blobs:
        before = given.blobs
        await _give(giving, await peer.lacking(), peer, given, progress)
    return given


async def _give(giving: Giving, there: wire.LackingThere, peer: HttpPeer, given: Given, progress: Progress) -> None:
    """As much as it named."""
    blobs = {digest: blob for digest in (*there.whole, *there.large) if (blob := giving.blob(digest))}
    total, begun = sum(blob.nbytes for blob in blobs.values()), given.nbytes

    def sent(nbytes: int) -> None:
        given.nbytes += nbytes
        progress("sending", min(given.nbytes - begun, total), total)

    small = (one for one in there.whole if one in blobs)
    for batch in batches(small, lambda one: blobs[one].nbytes, bytes_max=SMALL_BYTES_MAX, count_max=SMALL_MAX):
        found = {one: data for one in batch if (data := await asyncio.to_thread(giving.whole, one)) is not None}
        await peer.give_whole(found)
        given.blobs += len(found)
        sent(sum(map(len, found.values())))
    for digest in there.large.keys() & blobs.keys():
        await _give_pieces(giving, blobs[digest], there.large[digest], peer, sent)
        given.blobs += 1


async def _give_pieces(giving: Giving, blob: Blob, have: bytes, peer: HttpPeer, sent: Callable[[int], None]) -> None:
    """The pieces of a tensor that the peer has not; ``have`` is empty where it has not even its tree."""
    if not have:
        tree = giving.tree(blob.digest)
        assert tree is not None, "what is here has a tree"
        await peer.give_tree(blob.digest, tree)
    for number in range(-(-blob.nbytes // limits.PIECE_BYTES)):
        if not (have and have[number // 8] >> number % 8 & 1):
            data = bytes(await asyncio.to_thread(giving.piece, blob, number))
            await peer.give_piece(blob.digest, number, data, blob.nbytes)
            sent(len(data))
