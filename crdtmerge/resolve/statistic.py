"""A statistic of a model: a safetensors file as a source, wherever its bytes lie, named by the SHA-256 of the file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import ChangedError, HeaderError, MismatchError, NonFiniteError, UsageError, some
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.sources import MemorySource, Progress
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.digests import piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import LENGTH_BYTES, Entry, header_length, parse_header
from crdtmerge.weights.layout import plan_output
from crdtmerge.weights.tensorfile import TensorFile, bytes_of

STRETCH_BYTES = 8 * limits.PIECE_BYTES

Read = Callable[[Entry, int, NDArray[np.uint8]], None]
"""Fills a buffer with a tensor's bytes from an offset on."""


class Kept(NamedTuple):
    """A file that a replica or a state keeps: its digest and size, what fills a buffer from an offset, and where."""

    digest: bytes
    nbytes: int
    read: Callable[[int, NDArray[np.uint8]], None]
    path: Path | None

    @classmethod
    def in_memory(cls, digest: bytes, data: bytes) -> Kept:
        """A file whose bytes are in memory."""

        def read(offset: int, buffer: NDArray[np.uint8]) -> None:
            buffer[:] = np.frombuffer(data, np.uint8, buffer.nbytes, offset)

        return cls(digest, len(data), read, None)


class Statistic:
    """An open statistic, a ``sources.Source`` with the ``digest`` of the file; read once to be hashed."""

    def __init__(self, label: str, header: bytes, entries: Mapping[str, Entry], read: Read, path: Path | None) -> None:
        """Use ``of``."""
        self.label, self.entries, self.path, self.bytes_read = label, entries, path, 0
        self._header, self._read = header, read
        self._file: TensorFile | None = None
        self._expected: bytes | None = None
        self._found: tuple[bytes, dict[str, Facts]] | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, value: Any, label: str) -> Statistic:
        """A path, a mapping of names to tensors (the file that it would be written as), or what is kept.

        Raises InputError for what cannot be read, UsageError for anything else.
        """
        if isinstance(value, Mapping):
            return cls._of_mapping(value, label)
        if isinstance(value, Kept):
            return cls._of_kept(value, label)
        if not isinstance(value, str | Path):
            raise UsageError(f"{label} is {type(value).__name__}; a path or a mapping of names to tensors is needed.")
        file = TensorFile.open(Path(value))
        header = bytearray(min((entry.begin for entry in file.entries.values()), default=file.stamp.size))
        file.read_into(0, header)

        def read(entry: Entry, offset: int, buffer: NDArray[np.uint8]) -> None:
            file.read_into(entry.begin + offset, buffer)

        made = cls(label, bytes(header), file.entries, read, Path(value))
        made._file = file
        return made

    @classmethod
    def _of_mapping(cls, tensors: Mapping[str, Any], label: str) -> Statistic:
        source = MemorySource(tensors, label)
        rows = [(entry.name, entry.dtype, entry.shape) for entry in source.entries.values()]
        (file,) = plan_output(rows, single_file="statistics.safetensors").files

        def read(entry: Entry, offset: int, buffer: NDArray[np.uint8]) -> None:
            source.read_into(entry.name, offset, buffer)

        return cls(label, file.header, file.entries, read, None)

    @classmethod
    def _of_kept(cls, kept: Kept, label: str) -> Statistic:
        def read(entry: Entry, offset: int, buffer: NDArray[np.uint8]) -> None:
            kept.read(entry.begin + offset, buffer)

        try:
            prefix = np.zeros(min(LENGTH_BYTES, kept.nbytes), np.uint8)
            kept.read(0, prefix)
            header = np.empty(LENGTH_BYTES + header_length(prefix.tobytes(), kept.nbytes, label), np.uint8)
            kept.read(0, header)
            entries = parse_header(header[LENGTH_BYTES:].tobytes(), kept.nbytes - header.nbytes, label)
        except HeaderError as fault:
            raise ChangedError(f"{fault} It is not the file {kept.digest.hex()[:16]} that was kept.") from None
        made = cls(label, header.tobytes(), entries, read, kept.path)
        made._expected = kept.digest
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self._header) + sum(entry.nbytes for entry in self.entries.values())

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the file."""
        return self._hashed(lambda read: None)[0]

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """As the pass that hashed it found them."""
        return self._hashed(progress)[1]

    def _hashed(self, progress: Progress) -> tuple[bytes, dict[str, Facts]]:
        if self._found is None:
            self._found = self._hash(progress)
            if self._expected not in (None, self._found[0]):
                raise ChangedError(f"{self.label}: its bytes are no longer those that were kept.")
        return self._found

    def _hash(self, progress: Progress) -> tuple[bytes, dict[str, Facts]]:
        """One pass over the file: its digest, and the facts of each tensor."""
        whole, facts = hashlib.sha256(self._header), {}
        for entry in self._in_order():
            pieces, bad, first = [], 0, -1
            for at, stretch in self._stretches(entry):
                whole.update(bytes_of(stretch))
                pieces.append(piece_digests(stretch))
                found = nonfinite(stretch, entry.dtype) if entry.dtype.floating else None
                if found:
                    first = at // entry.dtype.itemsize + found[1] if first < 0 else first
                    bad += found[0]
                progress(stretch.nbytes)
            named = tensor_digest(entry.dtype, entry.shape, b"".join(pieces))
            facts[entry.name] = Facts(named, (bad, first) if bad else None)
        return whole.digest(), facts

    def _in_order(self) -> Iterable[Entry]:
        return sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end))

    def _stretches(self, entry: Entry) -> Iterable[tuple[int, NDArray[np.uint8]]]:
        for at in range(0, entry.nbytes, STRETCH_BYTES):
            stretch = np.empty(min(STRETCH_BYTES, entry.nbytes - at), np.uint8)
            self.read_into(entry.name, at, stretch)
            yield at, stretch

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        parts = (stretch.tobytes() for entry in self._in_order() for _, stretch in self._stretches(entry))
        return self._header + b"".join(parts)

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with a tensor's bytes from an offset on."""
        self._read(self.entries[name], offset, buffer)
        with self._lock:
            self.bytes_read += buffer.nbytes

    def where(self, name: str) -> str:
        """What messages call it."""
        return self.label if self._file is None else f"{self.label} ({self.path})"

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """Nothing travels with it."""
        return {}, []

    def carried_file(self, name: str) -> None:
        """Nothing travels with it."""

    def check_names(self, names: Iterable[str]) -> None:
        """Raise MismatchError where it has none of a model's tensors."""
        if self.entries.keys().isdisjoint(names):
            raise MismatchError(
                f"{self.where('')} has none of the model's tensors; it holds {some(list(self.entries)) or 'nothing'}. "
                "A statistic's tensors have the names of the model's."
            )

    def refuse_nonfinite(self) -> None:
        """Raise NonFiniteError where it holds NaN or infinity."""
        for name, fact in self._hashed(lambda read: None)[1].items():
            if fact.nonfinite:
                raise NonFiniteError(
                    f"{self.where(name)}: tensor {name!a} holds {fact.nonfinite[0]} values that are NaN or infinite, "
                    f"the first at index {fact.nonfinite[1]}. Compute the statistic anew."
                )

    def check_unchanged(self) -> None:
        """Raise ChangedError unless its file is as it was when it was opened."""
        if self._file is not None:
            self._file.check_unchanged()

    def check_again(self) -> None:
        """Raise ChangedError unless its bytes, read once more, are those that were hashed."""
        if self._hash(lambda read: None)[0] != self.digest:
            raise ChangedError(
                f"{self.where('')} changed while it was read: its digest is no longer {self.digest.hex()[:16]}. Run "
                "again when nothing writes to it."
            )

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def kept_bytes(value: Any, label: str, names: Iterable[str], *, allow_nonfinite: bool) -> bytes:
    """The bytes of a statistic that is to be kept and passed on with a model that has tensors of these names.

    Raises InputError, MismatchError, NonFiniteError; UsageError where it is larger than what peers pass on.
    """
    with closing(Statistic.of(value, label)) as statistic:
        if statistic.nbytes > limits.CARRIED_FILES_BYTES_MAX:
            raise UsageError(
                f"{statistic.where('')} has {statistic.nbytes} bytes; a pool keeps and passes on statistics of at most "
                f"{limits.CARRIED_FILES_BYTES_MAX} (limits.CARRIED_FILES_BYTES_MAX). Save it in a smaller dtype, or "
                "merge once with `crdtmerge merge --stats`, which has no such bound."
            )
        statistic.check_names(names)
        if not allow_nonfinite:
            statistic.refuse_nonfinite()
        data = statistic.to_bytes()
        statistic.check_unchanged()
    return data
