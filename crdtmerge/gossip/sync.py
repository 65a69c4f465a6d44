"""Bringing a replica and a peer to the same set, once: operations both ways, then the blobs that either lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdtmerge.errors import FalsePeerError, InputError, PeerError
from crdtmerge.gossip import tls
from crdtmerge.gossip.address import Invitation, Where
from crdtmerge.gossip.client import HttpPeer, connections
from crdtmerge.gossip.fetch import Fetch, Fetched
from crdtmerge.gossip.give import give
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.talk import Call, converse
from crdtmerge.keys import Key
from crdtmerge.pool.room import Progress, silent
from crdtmerge.replica.genesis import Genesis

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica


@dataclass
class Synced:
    """What a sync did.

    ``lacking`` blobs are in neither, ``waiting`` operations lack others. Of a folder or bucket, ``ignored`` are names
    that are nobody's, ``false`` what is other than its name says, ``failing`` what could not be read or put.
    """

    rounds: int = 0
    ops_sent: int = 0
    ops_received: int = 0
    overhead_bytes: int = 0
    blobs_fetched: int = 0
    bytes_fetched: int = 0
    resumed_bytes: int = 0
    blobs_sent: int = 0
    bytes_sent: int = 0
    lacking: int = 0
    refused: int = 0
    waiting: int = 0
    ignored: int = 0
    false: dict[str, str] = field(default_factory=dict)
    failing: dict[str, str] = field(default_factory=dict)
    root: str = ""

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


async def sync_peer(replica: Replica, where: Where, *, progress: Progress = silent) -> Synced:
    """Talk to a peer until both have the union, then move the blobs.

    Raises PeerError where it cannot be reached, FalsePeerError where it answers what no honest one does,
    PoolMismatchError, StorageError; what came before is kept.
    """
    synced = Synced()
    with ThreadPoolExecutor(1) as database:
        call: Call = partial(_run, database)
        async with connections() as session:
            context = tls.client_context(replica.folder / "key.pem", replica.author, where.key) if where.key else None
            peer = HttpPeer(session, where.url, context)
            holding = await call(Holding, replica)
            summary = await converse(holding, peer, call)
            synced.rounds, synced.overhead_bytes = summary.rounds, summary.overhead_bytes
            synced.ops_sent, synced.ops_received = summary.sent, len(summary.received)
            synced.refused = len(summary.refused)
            await _move(replica, peer, call, synced, progress)
        synced.root = (await call(lambda: replica.root)).hex()
    return synced


async def _move(replica: Replica, peer: HttpPeer, call: Call, synced: Synced, progress: Progress) -> None:
    """Blobs, there and back."""
    with replica.receiving() as receiving:
        fetched: Fetched = await Fetch(receiving, [peer], call=call, progress=progress).run()
    synced.blobs_fetched, synced.bytes_fetched = fetched.blobs, fetched.nbytes
    synced.resumed_bytes, synced.lacking = fetched.resumed_bytes, fetched.lacking
    for why in fetched.false.values():
        raise FalsePeerError(why)
    for why in fetched.failing.values():
        raise PeerError(why)
    given = await give(replica.giving(), peer, progress)
    synced.blobs_sent, synced.bytes_sent = given.blobs, given.nbytes


async def begin_from_peer(
    folder: str | Path,
    invitation: Invitation,
    key: Key | None = None,
    *,
    quota: int | None = None,
    progress: Progress = silent,
) -> Replica:
    """A new replica of the pool to which one was invited, in step with the peer, which knows ``key`` from now on.

    Raises PeerError where the invitation does not stand, OutputError where the folder is not free. Where what follows
    breaks off, the replica is there all the same and ``sync_peer`` goes on.
    """
    from crdtmerge.pool.replica import Replica

    own, where = key or Key.generate(), invitation.where
    assert where.key is not None, "an invitation names the key of its peer"
    async with connections() as session:
        peer = HttpPeer(session, where.url, tls.client_context(None, None, where.key))
        data = await peer.join(own, where.key, invitation.secret)
    try:
        genesis = Genesis.from_bytes(data)
    except InputError as fault:
        raise FalsePeerError(f"{where.url}: {fault}") from None
    replica = await asyncio.to_thread(Replica.of_genesis, folder, genesis, key=own, quota=quota)
    try:
        replica.peers.trust(where.key, where.url)
        await sync_peer(replica, where, progress=progress)
    except BaseException:
        replica.close()
        raise
    return replica


async def _run(database: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(database, partial(work, *arguments))
