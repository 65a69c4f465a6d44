"""A replica's set as a merged model: in memory, or in an output that is kept up to date.

An output that already is the merge of the set is recognised by its merge id, hashed and left as it is. The plan of a
merge is remembered too, so that an output that was lost is written again without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from crdtmerge.errors import ChangedError, ReplicaError, UsageError
from crdtmerge.pool.room import Progress, Room
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve.asking import refuse_version
from crdtmerge.resolve.merge import Merged, into_files, into_memory, is_folder
from crdtmerge.resolve.merging import Merge, Options
from crdtmerge.resolve.receipt import Receipt, merge_id
from crdtmerge.resolve.verify import intact
from crdtmerge.store.leases import Lease
from crdtmerge.store.source import BlobSource
from crdtmerge.strategies.protocol import Plan

REMEMBERED_MAX = 16
"""Merges whose receipts and plans are remembered."""


class Resolved(NamedTuple):
    """An output that is up to date: receipt, bytes written and read, whether a merge ran, seconds of fsync, notes."""

    receipt: Receipt
    nbytes: int
    bytes_read: int
    merged: bool
    fsync_seconds: float
    notes: tuple[str, ...]


class _Inputs(NamedTuple):
    models: list[tuple[Any, Claim]]
    recipe: Recipe
    base: BlobSource | None
    merge_id: bytes


def resolve(room: Room, threads: int | None, device: str, progress: Progress) -> Merged:
    """Merge the visible set into memory."""
    with Lease(room.database) as lease:
        inputs = _inputs(room, lease)
        options = Options(threads=threads, device=device, rehash=True, progress=progress)
        with _blaming_the_disk():
            return into_memory(inputs.models, inputs.recipe, inputs.base, options)


def resolve_to(room: Room, out: Path, threads: int | None, device: str, progress: Progress) -> Resolved:
    """Bring an output up to date."""
    room.refuse_inside(out)
    with Lease(room.database) as lease:
        inputs = _inputs(room, lease)
        known = _remembered(room, inputs.merge_id, is_folder(out))
        if known is not None and out.exists() and intact(out, known, threads):
            return Resolved(known, 0, 0, False, 0.0, ())
        options = Options(threads=threads, device=device, rehash=True, progress=progress)
        with _blaming_the_disk(), Merge(inputs.models, inputs.recipe, inputs.base, options) as one:
            receipt, fsync_seconds, nbytes = into_files(one, out, _remembered_plan(room, inputs.merge_id))
            _remember(room, inputs.merge_id, is_folder(out), receipt, one.plan)
            return Resolved(receipt, nbytes, one.bytes_read, True, fsync_seconds, tuple(one.notes))


@contextmanager
def _blaming_the_disk() -> Iterator[None]:
    """Blobs never change: one that is not what it was is damaged."""
    try:
        yield
    except ChangedError as fault:
        raise ReplicaError(f"{fault} Nothing writes to a blob: it is damaged. Run `crdtmerge fsck --mend`.") from None


def _inputs(room: Room, lease: Lease) -> _Inputs:
    """The visible set as sources with claims, the recipe and the base; their blobs are held by the lease."""
    with room.database.snapshot():
        visible, recipe, root = room.opset.visible(), room.opset.recipe, room.opset.root
    refuse_version(recipe)
    if not visible:
        raise UsageError("nothing to merge: the visible set is empty. Add models with `crdtmerge add`.")
    base = room.genesis.base
    manifests = (room.manifest(content) for content in [*(entry.id for entry in visible), *([base] if base else [])])
    lease.hold(row.digest for manifest in manifests if manifest for row in manifest.rows)
    lease.hold(digest for entry in visible for digest in entry.files.values())
    models: list[tuple[Any, Claim]] = [(room.source(entry.id, entry.files), entry.claim) for entry in visible]
    base_source = room.source(base, room.genesis.files) if base else None
    return _Inputs(models, recipe, base_source, merge_id(root, recipe))


def _remembered(room: Room, identity: bytes, folder: bool) -> Receipt | None:
    row = room.database.one("SELECT receipt FROM merges WHERE merge = ?", (identity + bytes([folder]),))
    return None if row is None else Receipt.from_bytes(row[0], "the cache of merges")


def _remembered_plan(room: Room, identity: bytes) -> Plan | None:
    row = room.database.one("SELECT plan FROM plans WHERE merge = ?", (identity,))
    return None if row is None else Plan(msgpack.unpackb(row[0]))


def _remember(room: Room, identity: bytes, folder: bool, receipt: Receipt, plan: Plan) -> None:
    with room.database.transaction():
        kept = (identity + bytes([folder]), receipt.to_bytes())
        room.database.run("INSERT OR REPLACE INTO merges VALUES (?, ?)", kept)
        packed = msgpack.packb(dict(plan.data), use_bin_type=True)
        room.database.run("INSERT OR REPLACE INTO plans VALUES (?, ?)", (identity, packed))
        for table in ("merges", "plans"):
            newest = f"SELECT rowid FROM {table} ORDER BY rowid DESC LIMIT ?"
            room.database.run(f"DELETE FROM {table} WHERE rowid NOT IN ({newest})", (REMEMBERED_MAX,))
