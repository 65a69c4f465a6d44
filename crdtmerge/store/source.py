"""A content of a replica as the source of a merge (structurally a ``resolve.sources.Source``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import NeedsError, ReplicaError, some
from crdtmerge.numerics.workers import Workers
from crdtmerge.replica.contribution import Manifest
from crdtmerge.store.blobs import Blob, Blobs
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry


class BlobSource:
    """The tensors of a manifest among the blobs. Raises ReplicaError where one is not here."""

    def __init__(self, blobs: Blobs, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        self.label = f"contribution {manifest.id.hex()[:16]}"
        self._blobs, self._files = blobs, files
        found = {row.name: blobs.get(row.digest) for row in manifest.rows}
        lacks = [name for name, blob in found.items() if blob is None]
        if lacks:
            raise ReplicaError(
                f"{self.label} is announced, but not all of it is here: {some(lacks)}. Import it, fetch it from a "
                "peer, or add the model here."
            )
        self._found: dict[str, Blob] = {name: blob for name, blob in found.items() if blob is not None}
        self.entries: Mapping[str, Entry] = {
            name: Entry(name, blob.dtype, blob.shape, 0, blob.nbytes)
            for name, blob in self._found.items()
            if blob.dtype is not None
        }
        self.path: Path | None = blobs.folder.parent
        self.bytes_read = 0

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """The files that came with it and are here."""
        here = {name: digest for name, digest in sorted(self._files.items()) if self._blobs.get(digest)}
        missing = sorted(self._files.keys() - here.keys())
        notes = [f"{self.label}: {some(missing)} not here yet"] if missing else []
        return {name: self._blobs.read(digest) for name, digest in here.items()}, notes

    def carried_file(self, name: str) -> bytes | None:
        """One of these files. Raises NeedsError where it is not here yet."""
        digest = self._files.get(name)
        if digest is not None and not self._blobs.get(digest):
            raise NeedsError(f"{self.label}: its {name} is announced and not here yet. Import it, or fetch it.")
        return None if digest is None else self._blobs.read(digest)

    def where(self, name: str) -> str:
        """The file of a tensor, or the contribution."""
        blob = self._found.get(name)
        return self.label if blob is None or blob.inline is not None else str(self._blobs.path(blob.digest))

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer."""
        self._blobs.read_into(self._found[name], offset, buffer)
        self.bytes_read += buffer.nbytes

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Callable[[int], None]) -> dict[str, Facts]:
        """As they were found when the blobs were written; a merge hashes what it reads again."""
        return {name: blob.facts for name, blob in self._found.items()}

    def check_unchanged(self) -> None:
        """Blobs never change; what the disk did to one shows in its digest."""

    def close(self) -> None:
        """Nothing is held open."""
