"""Syncing a replica with whatever an address names: a peer, a folder, a bucket; and beginning one from there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from crdtmerge.errors import UsageError
from crdtmerge.gossip import address
from crdtmerge.gossip.sync import Synced, begin_from_peer, sync_peer
from crdtmerge.keys import Key
from crdtmerge.pool.room import Progress, silent

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica


def sync(replica: Replica, where: str | Path, *, insecure: bool = False, progress: Progress = silent) -> Synced:
    """Bring a replica and a peer (``https://…``), a folder or a bucket (``s3://bucket/prefix``) to the same set.

    Raises PeerError where it cannot be reached, FalsePeerError where it answers what no honest one does,
    PoolMismatchError, StorageError, UsageError; what came before is kept.
    """
    text = str(where)
    if address.is_url(text):
        found = address.peer(text, replica.peers, insecure=insecure)
        return asyncio.run(sync_peer(replica, found, progress=progress))
    from crdtmerge.gossip.bucket import sync_bucket

    report = asyncio.run(sync_bucket(replica, where, progress=progress))
    fields = {name: value for name, value in vars(report).items() if name in Synced.__dataclass_fields__}
    return Synced(**{**fields, "rounds": 1, "ignored": report.ignored_count, "root": report.root.hex()})


def begin(
    folder: str | Path,
    where: str | Path,
    *,
    key: Key | None = None,
    quota: int | None = None,
    progress: Progress = silent,
) -> Replica:
    """A new replica of an existing pool, from a peer's invitation, a folder, a bucket, or a file that was exported.

    Raises what ``sync`` does, OutputError where the folder is not free, BundleError for a broken file.
    """
    from crdtmerge.pool.replica import Replica

    text = str(where)
    if address.is_url(text):
        invitation = address.invitation(text)
        if invitation is None:
            raise UsageError(
                f"{text}: is no invitation. Whoever runs that peer makes one with: crdtmerge keys invite {text}"
            )
        return asyncio.run(begin_from_peer(folder, invitation, key, quota=quota, progress=progress))
    if "://" in text or Path(where).is_dir():
        from crdtmerge.gossip.bucket import begin_from_bucket

        return asyncio.run(begin_from_bucket(folder, where, key=key, quota=quota, progress=progress))[0]
    return Replica.of_bundle(folder, Path(where), key=key, quota=quota, progress=progress)
