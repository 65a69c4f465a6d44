"""Blobs: the bytes of tensors and small files, each kept once, under its digest.

    blobs/aa/aabb…   the bytes        the table ``blobs``   their count and pieces; the bytes themselves up to 16 KiB

RULES
1. A blob is staged under a temporary name, written whole, made durable, and only then named and entered, in the one
   transaction that also enters what refers to it. A crash leaves a staged folder or a file that nobody refers to.
2. A blob never changes. The pieces in the table hash to its name, so every piece can be checked apart from the others.
3. What is collected is first marked as trash, in a transaction, and its file removed in a later one. Whoever adds the
   same bytes meanwhile takes it back. Files appear and vanish only under the lock of the database.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import DatabaseError, ReplicaError, StorageError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.store.database import Database
from crdtmerge.store.disk import Disk, failing
from crdtmerge.weights.digests import piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry
from crdtmerge.weights.tensorfile import bytes_of

INLINE_BYTES = 16 << 10
"""Up to this size a blob lies in the database: a file would cost more than its bytes."""

SYNCS = 4
"""Files being made durable at once: the disk orders them better than we do."""

RESERVE_BYTES = 64 << 20
"""Left free on the disk, so that the database can always commit."""


class Blob(NamedTuple):
    """A row of the table: what is known of a blob's bytes; ``dtype`` and ``shape`` are None for a file."""

    digest: bytes
    nbytes: int
    pieces: bytes
    dtype: DType | None
    shape: tuple[int, ...]
    nonfinite: tuple[int, int] | None
    inline: bytes | None

    @property
    def facts(self) -> Facts:
        """What one reading says of the tensor."""
        return Facts(self.digest, self.nonfinite)


class Blobs:
    """The blobs of a replica's folder."""

    def __init__(self, folder: Path, database: Database, disk: Disk) -> None:
        self.folder, self.staged, self.partial = folder / "blobs", folder / "staged", folder / "partial"
        self.database, self.disk = database, disk

    def make(self) -> None:
        """Make the folders of a new replica. Raises StorageError."""
        with failing(self.folder):
            self.disk.make_folder(self.folder)
            self.disk.make_folder(self.staged)
            self.disk.make_folder(self.partial)
            for number in range(256):
                self.disk.make_folder(self.folder / f"{number:02x}")

    def get(self, digest: bytes) -> Blob | None:
        """A blob that is here, and no trash."""
        row = self.database.one(f"{_SELECT} WHERE digest = ? AND state = 'ready'", (digest,))
        return None if row is None else self._blob(row)

    def every(self) -> Iterable[tuple[bytes, Blob | None, str]]:
        """All digests in order with their blobs, None where its row is damaged, and their state."""
        for digest, state in sorted(self.database.sound("digest, state", "blobs")):
            try:
                found = self.database.one(f"{_SELECT} WHERE digest = ?", (digest,))
                yield digest, None if found is None else self._blob(found), state
            except DatabaseError:
                yield digest, None, state

    def _blob(self, row: tuple[Any, ...]) -> Blob:
        digest, nbytes, pieces, dtype, shape, nonfinite, inline = row
        try:
            kind = None if dtype is None else DTYPES[dtype]
            sizes = tuple(msgpack.unpackb(shape)) if shape else ()
            bad = tuple(msgpack.unpackb(nonfinite)) if nonfinite else None
            bytes_fit = nbytes == (kind.nbytes(sizes) if kind else max(nbytes, 0))
            pieces_fit = len(pieces) == 32 * -(-nbytes // limits.PIECE_BYTES) or (kind is None and not pieces)
            if not (bytes_fit and pieces_fit and (inline is None or len(inline) == nbytes)):
                raise ValueError("its sizes contradict each other")
        except (ValueError, TypeError, KeyError, OverflowError, msgpack.exceptions.UnpackException) as fault:
            raise self.database.damaged(f"the row of a blob: {fault!s:.80}") from fault
        return Blob(digest, nbytes, pieces, kind, sizes, bad, inline)

    def path(self, digest: bytes) -> Path:
        """Where the file of a blob lies."""
        name = digest.hex()
        return self.folder / name[:2] / name

    def read_into(self, blob: Blob, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with a blob's bytes from an offset. Raises ReplicaError where they are gone."""
        if blob.inline is not None:
            buffer[:] = np.frombuffer(blob.inline, np.uint8)[offset : offset + buffer.nbytes]
            return
        path = self.path(blob.digest)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                view = bytes_of(buffer)
                while done < buffer.nbytes and (count := file.readinto(view[done:])):
                    done += count
        except OSError as fault:
            raise ReplicaError(f"{path}: cannot be read: {fault.strerror}. Run `crdtmerge fsck`.") from fault
        if done < buffer.nbytes:
            raise ReplicaError(f"{path}: ends at byte {offset + done}; {blob.nbytes} were kept. Run `crdtmerge fsck`.")

    def read_piece(self, blob: Blob, number: int) -> NDArray[np.uint8]:
        """One piece of a blob, checked against its digest. Raises ReplicaError where it is damaged."""
        at = number * limits.PIECE_BYTES
        piece = np.empty(min(limits.PIECE_BYTES, blob.nbytes - at), np.uint8)
        self.read_into(blob, at, piece)
        if piece_digests(piece) != blob.pieces[32 * number : 32 * number + 32]:
            raise ReplicaError(f"{self.path(blob.digest)}: is damaged. Run `crdtmerge fsck --mend`.")
        return piece

    def read(self, digest: bytes) -> bytes:
        """All bytes of a small file, checked. Raises ReplicaError."""
        blob = self.get(digest)
        if blob is None:
            raise ReplicaError(f"the file {digest.hex()} is not here yet.")
        buffer = np.empty(blob.nbytes, np.uint8)
        self.read_into(blob, 0, buffer)
        data = buffer.tobytes()
        if hashlib.sha256(data).digest() != digest:
            raise ReplicaError(f"{self.path(digest)}: is damaged. Run `crdtmerge fsck`.")
        return data

    def used(self) -> int:
        """Bytes of all blobs, trash and those on their way included."""
        tables = "(SELECT bytes FROM blobs UNION ALL SELECT bytes FROM partials)"
        row = self.database.one(f"SELECT coalesce(sum(bytes), 0) FROM {tables}")
        assert row is not None, "a sum is always there"
        return int(row[0])

    def take(self, blob: Blob, staged: Path | None) -> int:
        """Name and enter a blob, within a transaction; bytes that are new here. Raises OSError, StorageError.

        A blob that is here already counts as such, also one that was trash: it is taken back. The caller makes the
        name durable.
        """
        row = self.database.one("SELECT state FROM blobs WHERE digest = ?", (blob.digest,))
        there = row is not None and (blob.inline is not None or self.path(blob.digest).exists())
        if staged is not None:  # also in the place of a damaged one
            self.disk.rename(staged, self.path(blob.digest))
        now = time.time()
        if there:
            self.database.run("UPDATE blobs SET state = 'ready', touched = ? WHERE digest = ?", (now, blob.digest))
            return 0
        if blob.inline is None and staged is None:
            raise StorageError(f"blob {blob.digest.hex()} vanished while it was about to be used; repeat that.")
        _enter(self.database, blob, now)
        return blob.nbytes

    def check_space(self, nbytes: int) -> None:
        """Raise StorageError where the disk has no room for so many bytes more."""
        free = shutil.disk_usage(self.folder).free
        if nbytes + RESERVE_BYTES > free:
            raise StorageError(
                f"{self.folder}: up to {nbytes} bytes are to be written; the disk has {free} free. Make room, "
                "for example with `crdtmerge gc`."
            )

    def check_quota(self, new: int, quota: int | None) -> None:
        """Raise StorageError where new bytes that were just entered exceed the quota."""
        if quota is not None and new and self.used() > quota:
            raise StorageError(
                f"{new} new bytes would make {self.used()} in this replica; its quota is {quota} bytes. Remove "
                "contributions and collect them with `crdtmerge gc`, or begin with a larger quota."
            )

    def staging(self) -> Staging:
        """A place for new blobs."""
        return Staging(self)


_SELECT = "SELECT digest, bytes, pieces, dtype, shape, nonfinite, inline FROM blobs"


@dataclass
class _File:
    """A blob under construction: a file, or bytes in memory."""

    path: Path | None
    descriptor: int
    data: bytearray | None
    left: int
    synced: Future[None] | None = None


class Staging:
    """New blobs on their way: write, ``sync``, then ``publish`` in a transaction. Leaving the context drops the rest.

    It is a ``weights.digests.Copy``: what is read and hashed is copied in the same pass.
    """

    def __init__(self, blobs: Blobs) -> None:
        self.blobs, self._disk = blobs, blobs.disk
        self._folder = blobs.staged / secrets.token_hex(8)
        self._files: dict[str, _File] = {}
        self._found: dict[bytes, tuple[Blob, _File | None]] = {}
        self._lock = threading.Lock()
        self._syncs = ThreadPoolExecutor(SYNCS, thread_name_prefix="crdtmerge-sync")

    def __enter__(self) -> Self:
        with failing(self._folder):
            self._disk.make_folder(self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncs.shutdown(wait=True)
        for unfinished in (file for file in self._files.values() if file.path is not None and file.left):
            os.close(unfinished.descriptor)
        shutil.rmtree(self._folder, ignore_errors=True)

    def piece(self, entry: Entry, at: int, data: NDArray[np.uint8]) -> None:
        """Write a stretch of a tensor. Raises StorageError."""
        file = self._file(entry.name, entry.nbytes)
        with failing(self._folder):
            if file.data is not None:
                file.data[at : at + data.nbytes] = data.tobytes()
            else:
                self._disk.write(file.descriptor, at, data)
        self._wrote(file, data.nbytes)

    def tensor(self, entry: Entry, pieces: bytes, facts: Facts) -> None:
        """Name a tensor that was written whole."""
        file = self._file(entry.name, entry.nbytes)
        with self._lock:
            del self._files[entry.name]
        blob = Blob(facts.digest, entry.nbytes, pieces, entry.dtype, entry.shape, facts.nonfinite, _inline(file))
        self._keep(blob, file)

    def reuse(self, digest: bytes) -> bool:
        """Whether a blob is here already; if so it is kept, and ``publish`` looks again."""
        blob = self.blobs.get(digest)
        if blob is not None:
            self._keep(blob, None)
        return blob is not None

    def file(self, data: bytes) -> bytes:
        """A small file; its digest."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._found:
            if len(data) <= INLINE_BYTES:
                self._keep(Blob(digest, len(data), b"", None, (), None, data), None)
            else:
                file = self._file(digest.hex(), len(data))
                with failing(self._folder):
                    self._disk.write(file.descriptor, 0, data)
                self._wrote(file, len(data))
                self._keep(Blob(digest, len(data), piece_digests(data), None, (), None, None), file)
        return digest

    def sync(self) -> None:
        """Wait until all that was written is durable. Raises StorageError."""
        with failing(self._folder):
            for _, file in self._found.values():
                if file is not None and file.synced is not None:
                    file.synced.result()

    def publish(self, quota: int | None) -> int:
        """Name and enter the new blobs, within a transaction; bytes that are new here. Raises StorageError.

        A blob that is here already counts as such, also one that was trash: it is taken back.
        """
        blobs, new = self.blobs, 0
        with failing(blobs.folder):
            for blob, file in self._found.values():
                new += blobs.take(blob, file.path if file is not None else None)
            named = [blob for blob, file in self._found.values() if file is not None and file.path is not None]
            for folder in sorted({blobs.path(blob.digest).parent for blob in named}):
                self._disk.sync_folder(folder)
        blobs.check_quota(new, quota)
        return new

    def _file(self, name: str, nbytes: int) -> _File:
        with self._lock:
            if name not in self._files:
                if nbytes <= INLINE_BYTES:
                    self._files[name] = _File(None, -1, bytearray(nbytes), nbytes)
                else:
                    path = self._folder / secrets.token_hex(8)
                    with failing(self._folder):
                        self._files[name] = _File(path, self._disk.create(path), None, nbytes)
            return self._files[name]

    def _wrote(self, file: _File, nbytes: int) -> None:
        with self._lock:
            file.left -= nbytes
            last = file.left == 0
        if last and file.path is not None:
            file.synced = self._syncs.submit(self._finish, file.descriptor)

    def _finish(self, descriptor: int) -> None:
        try:
            self._disk.sync(descriptor)
        finally:
            os.close(descriptor)

    def _keep(self, blob: Blob, file: _File | None) -> None:
        with self._lock:
            self._found.setdefault(blob.digest, (blob, file))


def _inline(file: _File) -> bytes | None:
    return None if file.data is None else bytes(file.data)


def _enter(database: Database, blob: Blob, now: float) -> None:
    shape = None if blob.dtype is None else msgpack.packb(list(blob.shape))
    database.run(
        "INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?, ?, ?, ?, 'ready', ?)",
        (
            *(blob.digest, blob.nbytes, blob.pieces, blob.dtype.name if blob.dtype else None, shape),
            *(msgpack.packb(list(blob.nonfinite)) if blob.nonfinite else None, blob.inline, now),
        ),
    )


def fault_in(blobs: Blobs, blob: Blob) -> str | None:
    """What is wrong with a blob's bytes, read anew; None if nothing is."""
    step = limits.PIECE_BYTES
    buffer = np.empty(min(step, blob.nbytes), np.uint8)
    pieces, whole = [], hashlib.sha256()
    try:
        if blob.inline is None and blobs.path(blob.digest).stat().st_size != blob.nbytes:
            return f"has {blobs.path(blob.digest).stat().st_size} bytes; {blob.nbytes} were kept"
        for at in range(0, blob.nbytes, step):
            piece = buffer[: min(step, blob.nbytes - at)]
            blobs.read_into(blob, at, piece)
            pieces.append(piece_digests(piece))
            if blob.dtype is None:
                whole.update(bytes_of(piece))
    except (OSError, ReplicaError) as fault:
        return "is missing" if isinstance(fault, FileNotFoundError) else str(fault)
    found = whole.digest() if blob.dtype is None else tensor_digest(blob.dtype, blob.shape, b"".join(pieces))
    return None if found == blob.digest else "holds other bytes than its name says"
