"""Where tensors come from: a checkpoint on disk or a state dict in memory, read in stretches of raw bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import InputError, UsageError
from crdtmerge.numerics.dtypes import BY_TORCH_NAME, DType
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint, piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry

Progress = Callable[[int], None]


class Source(Protocol):
    """A model: named tensors, read-only. ``folder`` is where files to carry along may lie."""

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
    def folder(self) -> Path | None:
        """The checkpoint folder, if it is one."""
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
        self.folder = self.checkpoint.folder
        self.bytes_read = 0
        self._lock = threading.Lock()

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
    """A state dict: name to torch tensor or numpy array. Nothing is copied; the caller leaves it alone meanwhile."""

    def __init__(self, tensors: Mapping[str, Any], label: str) -> None:
        self.label, self.folder, self.bytes_read = label, None, 0
        self._bytes: dict[str, NDArray[np.uint8]] = {}
        self.entries: Mapping[str, Entry] = {
            name: self._entry(name, tensors[name]) for name in sorted(map(_name, tensors))
        }

    def _entry(self, name: str, tensor: Any) -> Entry:
        raw, dtype = _raw(f"{self.label}: tensor {name!a}", tensor)
        self._bytes[name] = raw
        return Entry(name, dtype, tuple(int(size) for size in tensor.shape), 0, raw.nbytes)

    def where(self, name: str) -> str:
        """The label: there is no file."""
        return self.label

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer by copying."""
        buffer[:] = self._bytes[name][offset : offset + buffer.nbytes]

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """By hashing what is in memory."""

        def one(entry: Entry) -> Facts:
            raw = self._bytes[entry.name]
            bad = nonfinite(raw, entry.dtype) if entry.dtype.floating else None
            return Facts(tensor_digest(entry.dtype, entry.shape, piece_digests(raw)), bad)

        return dict(zip(self.entries, workers.map(one, self.entries.values()), strict=True))

    def check_unchanged(self) -> None:
        """Nothing to compare with: the digest of what was read is checked where it matters."""

    def close(self) -> None:
        """Nothing is held open."""


def _name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise UsageError(f"a state dict maps non-empty strings to tensors, not {name!r}.")
    return name


def _raw(where: str, tensor: Any) -> tuple[NDArray[np.uint8], DType]:
    """A tensor's bytes in row-major order, and its dtype."""
    if isinstance(tensor, np.ndarray):
        dtype = BY_TORCH_NAME.get(tensor.dtype.name)
        if dtype is None or tensor.dtype.byteorder == ">":
            raise InputError(
                f"{where} is a numpy array of {tensor.dtype}; use a little-endian type that torch has too."
            )
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), dtype
    if type(tensor).__module__.partition(".")[0] != "torch" or not hasattr(tensor, "detach"):
        raise InputError(f"{where} is {type(tensor).__name__}; a torch tensor or numpy array is needed.")
    import torch

    dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or dtype.kind == "packed":
        raise InputError(f"{where} has dtype {tensor.dtype}, which cannot be merged.")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw, dtype


def open_source(model: object, label: str) -> Source:
    """A path or a state dict as a source. Raises InputError or UsageError."""
    if isinstance(model, str | Path):
        return FileSource(model)
    if isinstance(model, Mapping):
        return MemorySource(model, label)
    raise UsageError(f"{label} is {type(model).__name__}; a path or a mapping of names to tensors is needed.")
