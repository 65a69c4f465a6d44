"""Where tensors come from: a checkpoint on disk or a state dict in memory, read in stretches of raw bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import UsageError
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.carried import carried_file, carried_files
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry
from crdtmerge.weights.state_dict import StateDict

Progress = Callable[[int], None]


@runtime_checkable
class Source(Protocol):
    """A model: named tensors, read-only."""

    @property
    def label(self) -> str:
        """What messages call it: a path, or its position."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Its tensors in the order of their names."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        ...

    @property
    def path(self) -> Path | None:
        """Where it can be found again, if it is on a disk."""
        ...

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """The files to carry along, by name, and notes on those that are not."""
        ...

    def carried_file(self, name: str) -> bytes | None:
        """One of them as it is there; None where it has none. Raises NeedsError where it is announced and not here."""
        ...

    def where(self, name: str) -> str:
        """What messages call the file of a tensor."""
        ...

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with a tensor's bytes from ``offset`` on."""
        ...

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """Digest and finiteness of every tensor."""
        ...

    def check_unchanged(self) -> None:
        """Raise ChangedError if what was read is no longer what is there."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class FileSource:
    """A checkpoint file or folder. Counts the bytes that are read from it."""

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = Checkpoint.open(path)
        self.label = str(path)
        self.entries: Mapping[str, Entry] = self.checkpoint.entries
        self.path: Path | None = Path(path)
        self.bytes_read = 0
        self._lock = threading.Lock()

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """Those of the folder, if it is one."""
        return carried_files(self.checkpoint.folder) if self.checkpoint.folder else ({}, [])

    def carried_file(self, name: str) -> bytes | None:
        """That of the folder, if it is one."""
        return carried_file(self.checkpoint.folder, name) if self.checkpoint.folder else None

    def where(self, name: str) -> str:
        """The file of a tensor; the model's path for a tensor it does not have."""
        return self.checkpoint.where(name) if name in self.entries else self.label

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer by pread."""
        self.checkpoint.read_into(name, offset, buffer)
        self._count(buffer.nbytes)

    def _count(self, read: int) -> None:
        with self._lock:
            self.bytes_read += read

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """By reading, or from the cache."""

        def both(read: int) -> None:
            self._count(read)
            progress(read)

        return digest_checkpoint(self.checkpoint, workers, cache, both)

    def check_unchanged(self) -> None:
        """Compare each file's identity, size and times with those at opening."""
        self.checkpoint.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()


class MemorySource:
    """A state dict: name to torch tensor or numpy array. Unless it is copied, the caller leaves it alone meanwhile."""

    def __init__(self, tensors: Mapping[str, Any], label: str, *, copied: bool = False) -> None:
        self.label, self.path, self.bytes_read = label, None, 0
        self._state = StateDict(tensors, label).copied() if copied else StateDict(tensors, label)
        self.entries: Mapping[str, Entry] = self._state.entries

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """None."""
        return {}, []

    def carried_file(self, name: str) -> None:
        """None."""

    def where(self, name: str) -> str:
        """The label: there is no file."""
        return self.label

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer by copying."""
        buffer[:] = self._state.raw[name][offset : offset + buffer.nbytes]

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """By hashing what is in memory."""
        return self._state.digest(workers)

    def check_unchanged(self) -> None:
        """Nothing to compare with: the digest of what was read is checked where it matters."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, without a copy."""
        return self._state.raw[name]

    def close(self) -> None:
        """Nothing is held open."""


def open_source(model: object, label: str) -> Source:
    """A path, a state dict or what is a source already. Raises InputError or UsageError."""
    if isinstance(model, str | Path):
        return FileSource(model)
    if isinstance(model, Mapping):
        return MemorySource(model, label)
    if isinstance(model, Source):
        return model
    raise UsageError(f"{label} is {type(model).__name__}; a path or a mapping of names to tensors is needed.")
