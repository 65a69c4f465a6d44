"""A folder or bucket as a replica that has no process: ``sync_bucket`` brings it and a replica to the same set.

    ops and manifests that are there and not here are taken
    blobs, trees, manifests and ops that are here and not there are put, in this order
    blobs that are lacking here are fetched

RULES
1. There are no locks, and nothing is remembered from one sync to the next: a folder may be copied, put back or cleared.
   Any number of replicas may sync at once, and any may be killed.
2. What an operation refers to was put before it, by every writer that has it. So what a listing shows of operations is
   followed by a listing of what they refer to. A listing is no snapshot; what it misses, the next sync finds.
3. All bytes are checked as those of a peer are. What is wrong is reported and passed over; the others go on.
4. A writer replaces an object only when it found wrong bytes under the name, and with bytes that hash to the name. So
   right bytes are only ever replaced by the same ones, and nothing is removed. Unless asked to (``rehash``), a writer
   does not read what it has itself: it notices other sizes alone.
5. Every replica puts what it knows, whoever signed it: who reads the folder after it knows all that it knew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, InputError, OutputError, PeerError, UsageError
from crdtmerge.gossip import objects
from crdtmerge.gossip.fetch import Fetch
from crdtmerge.gossip.folder import Folder
from crdtmerge.gossip.object_store import Bucket
from crdtmerge.gossip.places import Place
from crdtmerge.gossip.stored import BucketReport, Stored
from crdtmerge.gossip.stored_blobs import Offered, StoredBlobs
from crdtmerge.gossip.stored_ops import StoredOps
from crdtmerge.gossip.storing import Storing
from crdtmerge.gossip.talk import Call
from crdtmerge.keys import Key
from crdtmerge.pool.replica import Replica
from crdtmerge.pool.room import Progress, silent
from crdtmerge.replica.genesis import Genesis

__all__ = ["BucketReport", "begin_from_bucket", "genesis_of", "place_of", "sync_bucket"]

Entered = TypeVar("Entered")


def place_of(where: str | Path | Place) -> Place:
    """A folder's path, or a URL such as s3://bucket/prefix, as a place. Raises UsageError."""
    if not isinstance(where, str | Path):
        return where
    if isinstance(where, Path) or "://" not in where:
        return Folder(Path(where))
    return Folder(Path(unquote(urlsplit(where).path))) if where.startswith("file://") else Bucket.of_url(where)


async def sync_bucket(
    replica: Replica,
    where: str | Path | Place,
    *,
    rehash: bool = False,
    progress: Progress = silent,
    call: Call = asyncio.to_thread,
) -> BucketReport:
    """Bring a replica and a folder or bucket to the same set.

    Args:
        replica: the replica.
        where: a folder, or a URL such as s3://bucket/prefix; credentials come from the environment.
        rehash: read also what both have, and replace what is damaged there.
        progress, call: how it is shown, and how what may block is run beside the event loop.

    Raises:
        PeerError: it cannot be reached. UsageError: it cannot be such a place. StorageError: the replica's own disk.
    """
    place = place_of(where)
    if isinstance(place, Folder):
        replica.refuse_inside(place.path)
    stored = Stored(place, replica.pool_id)
    await stored.list()
    ops = StoredOps(replica, stored, call, rehash=rehash)
    await ops.take()
    async with _entered(call, replica.giving().lease()) as lease:
        await Storing(replica, stored, ops, call, progress).put(lease.hold, rehash=rehash)
    await _fetch(replica, stored, progress, call)
    stored.report.root = await call(lambda: replica.root)
    return stored.report


async def _fetch(replica: Replica, stored: Stored, progress: Progress, call: Call) -> None:
    """Fetch the blobs that are lacking here and there."""
    async with _entered(call, Offered(replica._room, stored)) as offered:
        wrong = -1
        while wrong < len(stored.wrong):  # a source that was left for one wrong blob has others
            wrong = len(stored.wrong)
            fetched = await Fetch(offered, [StoredBlobs(stored, offered)], call=call, progress=progress).run()
            stored.report.blobs_fetched += fetched.blobs
            stored.report.bytes_fetched += fetched.nbytes
            for name, why in fetched.failing.items():
                stored.failed(name, PeerError(why))
        stored.report.resumed_bytes = sum(offered.resumed.values())
        stored.report.lacking = await call(offered.left)


@asynccontextmanager
async def _entered(call: Call, context: AbstractContextManager[Entered]) -> AsyncIterator[Entered]:
    """A context that is entered and left beside the event loop."""
    entered: Entered = await call(context.__enter__)
    try:
        yield entered
    finally:
        await call(context.__exit__, None, None, None)


async def genesis_of(where: str | Path | Place, pool: bytes | None = None) -> Genesis:
    """How the pool in a folder or bucket began; where it has several, ``pool`` says which.

    Raises PeerError, UsageError.
    """
    place = place_of(where)
    found = [bytes.fromhex(name) for name in await place.level(objects.VERSION) if objects.is_pool(name)]
    if pool is None and len(found) > 1:
        names = ", ".join(sorted(one.hex()[:16] for one in found)[:5])
        raise UsageError(f"{place.name}: has {len(found)} pools ({names}); say which.")
    if pool not in (None, *found) or not found:
        raise PeerError(f"{place.name}: has no such pool; a replica must sync with it first.")
    wanted = pool or found[0]
    data = await place.read(f"{objects.pool_prefix(wanted)}/genesis", limits.MANIFEST_BYTES_MAX)
    if data is None:
        raise PeerError(f"{place.name}: the genesis record of pool {wanted.hex()} is not there; sync a replica again.")
    try:
        genesis = Genesis.from_bytes(data)
    except InputError as fault:
        raise FalsePeerError(f"{place.name}: {fault}") from None
    if genesis.id != wanted:
        raise FalsePeerError(f"{place.name}: the genesis record of pool {wanted.hex()} is that of {genesis.id.hex()}.")
    return genesis


async def begin_from_bucket(
    folder: str | Path,
    where: str | Path | Place,
    *,
    pool: bytes | None = None,
    key: Key | None = None,
    quota: int | None = None,
    progress: Progress = silent,
    call: Call = asyncio.to_thread,
) -> tuple[Replica, BucketReport]:
    """Begin a replica of the pool in a folder or bucket. What breaks off is gone on with by ``sync_bucket``.

    Raises OutputError where ``folder`` is not free, else what ``genesis_of`` and ``sync_bucket`` raise.
    """
    place = place_of(where)
    if isinstance(place, Folder) and place.path.resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
        raise OutputError(f"{folder}: lies in the folder {place.path}; choose another place for the replica.")
    genesis = await genesis_of(place, pool)
    replica = Replica.of_genesis(folder, genesis, key=key, quota=quota)
    try:
        return replica, await sync_bucket(replica, place, progress=progress, call=call)
    except BaseException:
        replica.close()
        raise
