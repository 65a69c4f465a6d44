"""A replica's set as a merged model: in memory, or in an output that is kept up to date.

An output that already is the merge of the set is recognised by its merge id, hashed and left as it is. The plan of a
merge is remembered too, so that an output that was lost is written again without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from crdtmerge.canonical import digest
from crdtmerge.errors import ChangedError, ReceiptError, ReplicaError, UsageError
from crdtmerge.pool.room import Room
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve.asking import refuse_version
from crdtmerge.resolve.beside import Beside
from crdtmerge.resolve.merge import Merged, into_files, into_memory, is_folder
from crdtmerge.resolve.merging import Merge, Options
from crdtmerge.resolve.receipt import Receipt, merge_id
from crdtmerge.resolve.verify import intact
from crdtmerge.store.leases import Lease
from crdtmerge.store.schema import sound
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
    """What is merged, and the files that are carried along with each content."""

    models: list[tuple[Any, Claim]]
    recipe: Recipe
    base: BlobSource | None
    beside: Beside
    files: list[Any]

    def identity(self, one: Merge) -> bytes:
        """Names a merge with the files that are carried along and the build, which a merge id leaves out."""
        return digest("cached-merge", [merge_id(one.gathered.root, one.recipe), self.files, one.build])


def resolve(room: Room, options: Options, inputs: Mapping[str, Any], plan: Plan | str | Path | None) -> Merged:
    """Merge the visible set into memory."""
    with Lease(room.database) as lease:
        said = _inputs(room, lease, inputs, plan)
        with _blaming_the_disk():
            return into_memory(said.models, said.recipe, said.base, replace(options, rehash=True), said.beside)


def resolve_to(
    room: Room, out: Path, options: Options, inputs: Mapping[str, Any], plan: Plan | str | Path | None
) -> Resolved:
    """Bring an output up to date."""
    room.refuse_inside(out)
    options = replace(options, rehash=True)
    with Lease(room.database) as lease:
        said = _inputs(room, lease, inputs, plan)
        with _blaming_the_disk(), Merge(said.models, said.recipe, said.base, options, said.beside) as one:
            cached = said.identity(one)
            identity = cached + bytes([is_folder(out)])
            known = _remembered(room, identity)
            if known is not None and out.exists() and intact(out, known, options.threads):
                return Resolved(known, 0, 0, False, 0.0, ())
            one.recall(_remembered_plan(room, cached))
            receipt, fsync_seconds, nbytes = into_files(one, out)
            _remember(room, identity, receipt, cached, one.plan)
            return Resolved(receipt, nbytes, one.bytes_read, True, fsync_seconds, tuple(one.notes))


@contextmanager
def _blaming_the_disk() -> Iterator[None]:
    """Blobs never change: one that is not what it was is damaged."""
    try:
        yield
    except ChangedError as fault:
        raise ReplicaError(f"{fault} Nothing writes to a blob: it is damaged. Run `crdtmerge fsck --mend`.") from None


def _inputs(room: Room, lease: Lease, inputs: Mapping[str, Any], plan: Plan | str | Path | None) -> _Inputs:
    """The visible set as sources with claims, the recipe and the base; their blobs are held by the lease."""
    root = None
    while root != room.opset.root:  # until nothing was removed, and perhaps collected, before it was held
        with room.database.snapshot():
            visible, recipe, root = room.opset.visible(), room.opset.recipe, room.opset.root
        base = room.genesis.base
        manifests = (room.manifest(one) for one in [*(entry.id for entry in visible), *([base] if base else [])])
        lease.hold(row.digest for manifest in manifests if manifest for row in manifest.rows)
        lease.hold(file for entry in visible for file in (*entry.files.values(), *entry.claim.stats.values()))
    refuse_version(recipe)
    if not visible:
        raise UsageError("nothing to merge: the visible set is empty. Add models with `crdtmerge add`.")
    models: list[tuple[Any, Claim]] = [(room.source(entry.id, entry.files), entry.claim) for entry in visible]
    base_source = room.source(base, room.genesis.files) if base else None
    files = [[entry.id, dict(entry.files)] for entry in visible]
    stats = [room.statistics(entry.claim.stats) for entry in visible]
    return _Inputs(models, recipe, base_source, Beside(stats, inputs, plan), files)


def _remembered(room: Room, identity: bytes) -> Receipt | None:
    """The receipt of an earlier merge; None if there is none, or the row is damaged: a cache makes nothing fail."""
    data = _kept(room, "merges", "receipt", identity)
    try:
        return None if data is None else Receipt.from_bytes(data, "the cache of merges")
    except ReceiptError:
        return None


def _remembered_plan(room: Room, identity: bytes) -> Plan | None:
    data = _kept(room, "plans", "plan", identity)
    return None if data is None else Plan(msgpack.unpackb(data))


def _kept(room: Room, table: str, column: str, identity: bytes) -> bytes | None:
    """The bytes of a row, unless they are not those that were kept."""
    row = room.database.one(f"SELECT {column} FROM {table} WHERE merge = ? AND {sound(table)}", (identity,))
    data = row[0] if row else None
    if not isinstance(data, bytes) or hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    return data[32:]


def _remember(room: Room, identity: bytes, receipt: Receipt, plan_identity: bytes, plan: Plan) -> None:
    packed: bytes = msgpack.packb(dict(plan.data), use_bin_type=True)
    with room.database.transaction():
        for table, name, data in (("merges", identity, receipt.to_bytes()), ("plans", plan_identity, packed)):
            row = (name, hashlib.sha256(data).digest() + data)
            room.database.run(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", row)
            newest = f"SELECT rowid FROM {table} ORDER BY rowid DESC LIMIT ?"
            room.database.run(f"DELETE FROM {table} WHERE rowid NOT IN ({newest})", (REMEMBERED_MAX,))
