"""The blobs that a replica gives to others and takes from them. Whoever moves them, they are checked here.

A tensor of one piece travels whole, a larger one as its tree and pieces, a carried file whole: its name is the SHA-256
of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, InputError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.pool.key_quota import KeyQuota
from crdtmerge.pool.room import Room
from crdtmerge.replica.contribution import Manifest
from crdtmerge.store.blobs import Blob, Staging
from crdtmerge.store.leases import Lease
from crdtmerge.store.partials import Partial, Partials, Tree, checked_values
from crdtmerge.weights.digests import piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry


class Want(NamedTuple):
    """A tensor that is not here, and what it is known to be."""

    digest: bytes
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.dtype.nbytes(self.shape)

    @property
    def whole(self) -> bool:
        """Whether it travels whole: it has one piece at most."""
        return self.nbytes <= limits.PIECE_BYTES


class Lacking(NamedTuple):
    """What is not here: tensors and files, each in the order of the contents that need them; the base's manifest."""

    tensors: list[Want]
    files: list[bytes]
    base: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(want.nbytes for want in self.tensors)


class Giving:
    """What a replica gives. Raises ReplicaError where its own disk fails it."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def needed(self) -> set[bytes]:
        """The blobs that contents with a live ADD and the base need, here or not."""
        return self._room.needed()

    def manifest_sizes(self) -> dict[bytes, int]:
        """The bytes of each manifest that is here, by content."""
        return dict(
            self._room.database.rows("SELECT content, length(manifest) AS bytes FROM manifests ORDER BY content")
        )

    def lease(self) -> Lease:
        """A context in which blobs that it is told of are not collected."""
        return Lease(self._room.database)

    def blob(self, digest: bytes) -> Blob | None:
        """A blob that is here."""
        return self._room.blobs.get(digest)

    def tree(self, digest: bytes) -> bytes | None:
        """The tree of a tensor that is here, as it travels."""
        blob = self.blob(digest)
        if blob is None or blob.dtype is None:
            return None
        packed: bytes = msgpack.packb([blob.dtype.name, list(blob.shape), blob.pieces])
        return packed

    def piece(self, blob: Blob, number: int) -> NDArray[np.uint8]:
        """A piece of a tensor, checked."""
        return self._room.blobs.read_piece(blob, number)

    def whole(self, digest: bytes) -> bytes | None:
        """All bytes of a file, or of a tensor of one piece, checked; None for what is not here, or longer."""
        blob = self.blob(digest)
        if blob is None:
            return None
        if blob.dtype is None:
            return self._room.blobs.read(digest)
        if blob.nbytes > limits.PIECE_BYTES:
            return None
        return self.piece(blob, 0).tobytes() if blob.nbytes else b""


class Receiving:
    """What a replica takes, while in the context; a lease keeps what arrives from being collected."""

    def __init__(self, room: Room, key_quota: int | None = None) -> None:
        self._room, self._key_quota = room, KeyQuota(room, key_quota)
        self._lease = Lease(room.database)
        self._partials = Partials(room.blobs, room.quota)
        self._needs: dict[bytes, set[bytes]] = {}
        self.arrived = 0
        """Grows with everything that arrives."""

    def __enter__(self) -> Self:
        self._lease.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._partials.__exit__(kind, error, trace)
        finally:
            self._lease.__exit__(kind, error, trace)

    @property
    def over_quota(self) -> Mapping[bytes, int]:
        """Keys of which not all is taken, and how many contents, statistics and files are not."""
        return dict(self._key_quota.over)

    def lacking(self) -> Lacking:
        """What contents with a live ADD need, and the base, and is not here; not what is over its author's quota."""
        opset, genesis = self._room.opset, self._room.genesis
        ready = self._room.ready()
        contents = [*([genesis.base] if genesis.base else []), *self._key_quota.contents(opset.held())]
        tensors: dict[bytes, Want] = {}
        self._needs.clear()
        for content in contents:
            manifest = None if content in ready else self._room.manifest(content)
            if manifest is None:
                continue
            wants = [want for want in _wants(manifest) if self._room.blobs.get(want.digest) is None]
            tensors.update((want.digest, want) for want in wants)
            self._needs[content] = {want.digest for want in wants}
            if not wants:
                self._mark([content])
        files = sorted(self._key_quota.files() | set(genesis.files.values()))
        base = genesis.base if genesis.base and self._room.manifest(genesis.base) is None else None
        return Lacking(list(tensors.values()), [one for one in files if self._room.blobs.get(one) is None], base)

    def needed_by(self, digest: bytes) -> bytes | None:
        """A content that lacks a tensor."""
        return next((content for content, needs in list(self._needs.items()) if digest in needs), None)

    def keep_base(self, data: bytes) -> None:
        """Keep the manifest of the base. Raises FalsePeerError for another one."""
        try:
            manifest = Manifest.from_bytes(data)
        except InputError as fault:
            raise FalsePeerError(str(fault)) from None
        if manifest.id != self._room.genesis.base:
            raise FalsePeerError(f"{manifest.id.hex()[:16]} is not the base of this pool.")

        def work() -> None:
            self._room.keep_manifest(manifest)
            self._room.refresh_ready([manifest.id])

        self._room.group.run(work)

    def begin(self, want: Want, tree: bytes) -> Partial | None:
        """Begin a tensor in pieces, or go on with it; None where another process does. Raises FalsePeerError."""
        self._lease.hold([want.digest])
        if self._room.blobs.get(want.digest) is not None:
            self._lease.release([want.digest])
            return None
        return self._partials.begin(_read_tree(want, tree))

    def begun(self, want: Want) -> Partial | None:
        """Go on with a tensor whose tree is here already."""
        tree = self._partials.known(want.digest)
        if tree is None:
            return None
        self._lease.hold([want.digest])
        return self._partials.begin(tree)

    def write(self, partial: Partial, number: int, data: bytes | bytearray | memoryview) -> None:
        """Check a piece and write it. Raises FalsePeerError, StorageError."""
        self._partials.write(partial, number, data)

    def commit(self) -> None:
        """Make what was written durable."""
        self._partials.commit()

    def finish(self, partial: Partial) -> None:
        """Keep a tensor whose pieces are all here; nothing where that was done already."""
        digest = partial.tree.digest
        if partial.closed and self._room.blobs.get(digest) is not None:
            return

        def work() -> None:
            self._partials.finish(partial)
            self._lease.release([digest])

        try:
            self._room.group.run(work)
        finally:
            self._partials.close(partial)
        self._arrived([digest])

    def keep(self, found: Iterable[tuple[Want, bytes]]) -> None:
        """Keep tensors that came whole. Raises FalsePeerError for wrong bytes, StorageError."""
        checked = [(want, data, *_checked(want, data)) for want, data in found]
        self._lease.hold(want.digest for want, *_ in checked)
        with self._room.blobs.staging() as staging:
            for want, data, pieces, facts in checked:
                entry = Entry(want.digest.hex(), want.dtype, want.shape, 0, want.nbytes)
                if data:
                    staging.piece(entry, 0, np.frombuffer(data, np.uint8))
                staging.tensor(entry, pieces, facts)
            staging.sync()
            self._publish(staging, [want.digest for want, *_ in checked])
        self._arrived(want.digest for want, *_ in checked)

    def keep_file(self, digest: bytes, data: bytes) -> None:
        """Keep a file, unless it is over its author's quota. Raises FalsePeerError for wrong bytes, StorageError."""
        if hashlib.sha256(data).digest() != digest:
            raise FalsePeerError(f"file {digest.hex()} holds other bytes than its name says.")
        if not self._key_quota.takes(digest, len(data)):
            return
        self._lease.hold([digest])
        with self._room.blobs.staging() as staging:
            staging.file(data)
            staging.sync()
            self._publish(staging, [digest])

    def _publish(self, staging: Staging, digests: Iterable[bytes]) -> None:
        def work() -> None:
            staging.publish(self._room.quota)
            self._lease.release(digests)

        self._room.group.run(work)

    def _arrived(self, digests: Iterable[bytes]) -> None:
        here = set(digests)
        self.arrived += 1
        whole = []
        for content, needs in list(self._needs.items()):
            if needs & here:
                needs -= here
                if not needs:
                    whole.append(content)
        self._mark(whole)

    def _mark(self, contents: list[bytes]) -> None:
        if contents:
            self._room.group.run(lambda: self._room.refresh_ready(contents))


def _wants(manifest: Manifest) -> list[Want]:
    """The tensors of a manifest whose dtype this version knows; the others can never be merged here."""
    return [Want(row.digest, DTYPES[row.dtype], row.shape) for row in manifest.rows if row.dtype in DTYPES]


def _read_tree(want: Want, data: bytes) -> Tree:
    try:
        dtype, shape, pieces = msgpack.unpackb(data, max_bin_len=limits.TREE_BYTES_MAX)
        if (dtype, tuple(shape)) != (want.dtype.name, want.shape) or not isinstance(pieces, bytes):
            raise ValueError("of another dtype or shape")
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as fault:
        raise FalsePeerError(f"the tree of {want.digest.hex()} is malformed: {fault!s:.80}.") from None
    return Tree.of(want.digest, want.dtype, want.shape, pieces)


def _checked(want: Want, data: bytes) -> tuple[bytes, Facts]:
    """The digests of its pieces, and the facts of a whole tensor. Raises FalsePeerError."""
    pieces = piece_digests(data)
    if len(data) != want.nbytes or tensor_digest(want.dtype, want.shape, pieces) != want.digest:
        raise FalsePeerError(f"tensor {want.digest.hex()} holds other bytes than its name says.")
    return pieces, Facts(want.digest, checked_values(data, 0, want.dtype, want.digest) if data else None)
