"""Export and import: a replica's state, or what another lacks of it, as one safetensors file (``store.bundle``)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import BundleError, ChangedError, OutputError, ReplicaError
from crdtmerge.numerics.workers import Workers
from crdtmerge.pool.room import Progress, Room, Taking
from crdtmerge.replica.op import Add
from crdtmerge.replica.opset import Joined
from crdtmerge.store import bundle
from crdtmerge.store.blobs import Staging
from crdtmerge.store.leases import Lease
from crdtmerge.weights.digests import digest_file
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry
from crdtmerge.weights.tensorfile import TensorFile


def export(room: Room, path: Path, since: Sequence[bytes]) -> int:
    """Write the state, or what one with the heads ``since`` lacks; its bytes.

    Raises OutputError where something stands at ``path``, ReplicaError or ChangedError where a blob is damaged.
    """
    room.refuse_inside(path)
    with room.database.snapshot():
        ops = room.opset.delta(since) if since else list(room.opset.ops())
        added = {op.payload.content for op in ops if isinstance(op.payload, Add)}
        base = [room.genesis.base] if room.genesis.base and not since else []
        manifests = {one: manifest for one in [*added, *base] if (manifest := room.manifest(one)) is not None}
        held = [one for one in room.opset.held() if one in added and room.is_ready(one)] + base
        attached = room.opset.attached()
    says = [op.payload.says for op in ops if isinstance(op.payload, Add)]
    names = {digest for one in says for digest in (*(one.files or {}).values(), *one.stats.values())} & attached
    names |= set() if since else set(room.genesis.files.values())
    lost = [one.hex() for one in held if one not in manifests]
    if lost:
        raise ReplicaError(f"{room.folder}: the manifest of {', '.join(lost)} is lost. Run `crdtmerge fsck`.")
    digests = sorted({row.digest for one in held for row in manifests[one].rows})
    with Lease(room.database) as lease:
        lease.hold([*digests, *names])
        files = {digest: room.blobs.read(digest) for digest in sorted(names) if room.blobs.get(digest)}
        return _write(room, path, bundle.Contents(room.genesis, ops, manifests, files), digests)


def _write(room: Room, path: Path, said: bundle.Contents, digests: Sequence[bytes]) -> int:
    """Under a temporary name first; it appears whole, and never in the place of another."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 (links are not followed)
    size, stretches = bundle.write(said, (part for one in digests if (part := _part(room, one))), path.name)
    disk = room.blobs.disk
    temporary = path.with_name(f".{path.name}.crdtmerge-{secrets.token_hex(4)}")
    try:
        descriptor = disk.create(temporary)
        try:
            for offset, data in stretches:
                disk.write(descriptor, offset, data)
            disk.sync(descriptor)
        finally:
            os.close(descriptor)
        disk.link(temporary, path)
        try:
            disk.sync_folder(path.parent)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except ChangedError as fault:
        raise ReplicaError(f"{fault} Nothing writes to a blob: it is damaged. Run `crdtmerge fsck --mend`.") from None
    except FileExistsError:
        raise OutputError(f"{path}: exists; choose another name or remove it.") from None
    except OSError as fault:
        raise OutputError(f"{path}: cannot be written: {fault.strerror or fault}.") from fault
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _part(room: Room, digest: bytes) -> bundle.Part | None:
    blob = room.blobs.get(digest)
    if blob is None or blob.dtype is None:
        return None

    def read(offset: int, buffer: NDArray[np.uint8]) -> None:
        room.blobs.read_into(blob, offset, buffer)

    return bundle.Part(digest, blob.dtype, blob.shape, read, str(room.blobs.path(digest)))


def contents_of(path: Path) -> bundle.Contents:
    """What a bundle says besides tensors. Raises BundleError, HeaderError."""
    with TensorFile.open(path) as file:
        return _said(file)


def include(room: Room, path: Path, threads: int | None, progress: Progress) -> tuple[Joined, int]:
    """Join an exported state, all of it or nothing: what became of its operations, and bytes that are new here.

    Raises BundleError, HeaderError, PoolMismatchError, StorageError.
    """
    with TensorFile.open(path) as file:
        said = _said(file)
        room.genesis.refuse_other(said.genesis)
        with Taking(room, said.genesis.recipe, None, threads, progress) as (_, staging):
            _stage(room, file, staging, threads, progress)
            for data in said.files.values():
                staging.file(data)
            staging.sync()
            return room.group.run(lambda: _take(room, said, staging, str(path)))


def _said(file: TensorFile) -> bundle.Contents:
    def get(entry: Entry) -> bytes:
        data = bytearray(entry.nbytes)
        file.read_into(entry.begin, data)
        return bytes(data)

    return bundle.read(file.entries, get, str(file.path))


def _stage(room: Room, file: TensorFile, staging: Staging, threads: int | None, progress: Progress) -> None:
    total, done = sum(entry.nbytes for entry in file.entries.values()), 0
    room.blobs.check_space(total)

    def advance(step: int) -> None:
        nonlocal done
        done += step
        progress("importing", done, total)

    with Workers(threads) as workers:
        digest_file(file, workers, advance, _Tensors(staging, str(file.path)))


class _Tensors:
    """Passes the tensors of a bundle on to the staging area, each checked against its name."""

    def __init__(self, staging: Staging, where: str) -> None:
        self._staging, self._where = staging, where

    def piece(self, entry: Entry, at: int, data: NDArray[np.uint8]) -> None:
        """Some bytes of a tensor."""
        if bundle.tensor_digest_of(entry.name) is not None:
            self._staging.piece(entry, at, data)

    def tensor(self, entry: Entry, pieces: bytes, facts: Facts) -> None:
        """A whole tensor."""
        named = bundle.tensor_digest_of(entry.name)
        if named is None:
            return
        if facts.digest != named:
            raise BundleError(f"{self._where}: {entry.name} holds other bytes than its name says.")
        self._staging.tensor(entry, pieces, facts)


def _take(room: Room, said: bundle.Contents, staging: Staging, where: str) -> tuple[Joined, int]:
    new = staging.publish(room.quota)
    joined = room.take(list(said.ops), said.manifests)
    if joined.refused:
        raise BundleError(f"{where}: {joined.refused[0][1]}")
    if joined.waiting:
        heads = ", ".join(head.hex()[:16] for head in room.opset.heads()) or "none"
        raise BundleError(
            f"{where}: builds on operations that are not here; it was exported for a replica that knows more. "
            f"Export all of it, or since these heads: {heads}."
        )
    base = said.manifests.get(room.genesis.base or b"")
    if base is not None:
        room.keep_manifest(base)
    room.refresh_ready(said.manifests)
    return joined, new
