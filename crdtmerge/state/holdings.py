"""What a state in memory holds besides operations: tensors by digest, manifests by content, small files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import BundleError, ChangedError, NeedsError, UsageError
from crdtmerge.numerics.dtypes import DType
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.workers import Workers
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Op
from crdtmerge.resolve.gather import known
from crdtmerge.resolve.sources import FileSource, MemorySource, Progress
from crdtmerge.resolve.statistic import Kept, kept_bytes
from crdtmerge.store import bundle
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts, refuse_nonfinite
from crdtmerge.weights.header import Entry


class Held(NamedTuple):
    """A tensor that a state holds: its bytes, or the checkpoint where they were found."""

    dtype: DType
    shape: tuple[int, ...]
    facts: Facts
    raw: NDArray[np.uint8] | None
    found: tuple[Path, str] | None

    def read(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with its bytes from an offset."""
        if self.raw is not None:
            buffer[:] = self.raw[offset : offset + buffer.nbytes]
            return
        assert self.found is not None, "a tensor is in memory or on disk"
        path, name = self.found
        with Checkpoint.open(path) as checkpoint:
            _refuse_changed(checkpoint.entries, name, self, str(path))
            checkpoint.read_into(name, offset, buffer)


@dataclass(frozen=True)
class Holdings:
    """What a state keeps besides operations: tensors by digest, manifests by content, files by digest."""

    tensors: Mapping[bytes, Held]
    manifests: Mapping[bytes, Manifest]
    files: Mapping[bytes, bytes]

    def __or__(self, other: Holdings) -> Holdings:
        return Holdings(
            {**other.tensors, **self.tensors},
            {**other.manifests, **self.manifests},
            {**other.files, **self.files},
        )

    def of(self, content: bytes) -> Holdings:
        """The same with one manifest."""
        return replace(self, manifests={content: self.manifests[content]})

    def statistics(self, stats: Mapping[str, bytes]) -> dict[str, Kept]:
        """The statistics of a contribution that are here."""
        here = {name: digest for name, digest in stats.items() if digest in self.files}
        return {name: Kept.in_memory(digest, self.files[digest]) for name, digest in here.items()}

    def only(self, contents: Iterable[bytes], files: Iterable[bytes]) -> Holdings:
        """Without the tensors of other contents and other files."""
        wanted = {
            row.digest for content in contents if content in self.manifests for row in self.manifests[content].rows
        }
        tensors = {digest: held for digest, held in self.tensors.items() if digest in wanted}
        kept = set(files)
        return Holdings(tensors, self.manifests, {d: data for d, data in self.files.items() if d in kept})


STATE_ANYWAY = "or leave the tensor out: only a recipe with exclude or allow_nonfinite takes it."
EMPTY = Holdings({}, {}, {})
NONE: Mapping[str, Any] = {}


class HeldSource:
    """A content of a state as the source of a merge."""

    def __init__(self, manifest: Manifest, tensors: Mapping[bytes, Held], files: Mapping[str, bytes | None]) -> None:
        """``files`` are None where they are announced and not here."""
        self.label = f"contribution {manifest.id.hex()[:16]}"
        self._held = {row.name: tensors[row.digest] for row in manifest.rows}
        self.entries: Mapping[str, Entry] = {
            row.name: Entry(row.name, held.dtype, held.shape, 0, held.dtype.nbytes(held.shape))
            for row, held in zip(manifest.rows, self._held.values(), strict=True)
        }
        self.path: Path | None = None
        self.bytes_read = 0
        self._files = dict(files)
        paths = {held.found[0] for held in self._held.values() if held.raw is None and held.found is not None}
        self._open = {path: FileSource(path) for path in sorted(paths)}

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """The files that came with it."""
        return {name: data for name, data in self._files.items() if data is not None}, []

    def carried_file(self, name: str) -> bytes | None:
        """One of these files. Raises NeedsError where it is not here."""
        if name in self._files and self._files[name] is None:
            raise NeedsError(f"{self.label}: its {name} is announced and not here. Merge with a state that has it.")
        return self._files.get(name)

    def where(self, name: str) -> str:
        """The file of a tensor, or the contribution."""
        held = self._held.get(name)
        if held is None or held.raw is not None or held.found is None:
            return self.label
        return self._open[held.found[0]].where(held.found[1])

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer."""
        held = self._held[name]
        if held.raw is not None:
            buffer[:] = held.raw[offset : offset + buffer.nbytes]
        else:
            assert held.found is not None, "a tensor is in memory or on disk"
            self._open[held.found[0]].read_into(held.found[1], offset, buffer)

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """As they were found when it was added; of files, whose bytes are hashed again when they are merged."""
        for held in self._held.values():
            if held.raw is None and held.found is not None:
                source = self._open[held.found[0]]
                _refuse_changed(source.entries, held.found[1], held, source.label)
        return {name: held.facts for name, held in self._held.items()}

    def check_unchanged(self) -> None:
        """That the files are as they were when they were opened."""
        for source in self._open.values():
            source.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        for source in self._open.values():
            source.close()


def _refuse_changed(entries: Mapping[str, Entry], name: str, held: Held, where: str) -> None:
    """Raise ChangedError unless a file still has a tensor of this name, dtype and shape; its bytes are hashed later."""
    entry = entries.get(name)
    if entry is None or (entry.dtype, entry.shape) != (held.dtype, held.shape):
        found = "is gone" if entry is None else f"is {entry.dtype.name} {list(entry.shape)} now"
        raise ChangedError(
            f"{where}: tensor {name!a} {found}; it was {held.dtype.name} {list(held.shape)} when it was added."
        )


class Taken(NamedTuple):
    """A model that nobody can change any more, its files by name, and the statistics that came with it."""

    manifest: Manifest
    holdings: Holdings
    files: dict[str, bytes]
    stats: dict[str, bytes]


def taken(model: object, label: str, recipe: Recipe, stats: Mapping[str, Any] = NONE) -> Taken:
    """A model that nobody can change any more: copied, or a path with digests; its statistics are copied.

    Raises InputError, MismatchError, UsageError.
    """
    source: FileSource | MemorySource
    if isinstance(model, str | Path):
        source = FileSource(model)
    elif isinstance(model, Mapping):
        source = MemorySource(model, label, copied=True)
    else:
        raise UsageError(f"{label} is {type(model).__name__}; a path or a mapping of names to tensors is needed.")
    try:
        with Workers() as workers:
            one = known(source, workers, DigestCache(), lambda read: None)
        carried, _ = source.carried()
    finally:
        source.close()
    if not recipe.allow_nonfinite:
        refuse_nonfinite(one.facts, recipe.excludes, source.where, STATE_ANYWAY)
    tensors = {
        one.facts[name].digest: Held(
            entry.dtype,
            entry.shape,
            one.facts[name],
            source.raw(name) if isinstance(source, MemorySource) else None,
            (source.path.resolve(), name) if source.path else None,
        )
        for name, entry in source.entries.items()
    }
    allowed = recipe.allow_nonfinite
    held = {
        name: kept_bytes(value, f"the {name} of {label}", source.entries, allow_nonfinite=allowed)
        for name, value in stats.items()
    }
    files, named = _digests(carried), _digests(held)
    together = {files[name]: data for name, data in carried.items()} | {named[name]: held[name] for name in held}
    return Taken(one.manifest, Holdings(tensors, {one.id: one.manifest}, together), files, named)


def _digests(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: hashlib.sha256(data).digest() for name, data in files.items()}


def to_bytes(genesis: Genesis, ops: tuple[Op, ...], holdings: Holdings) -> bytes:
    """A bundle of operations and holdings. Raises ChangedError where a file is not what it was."""
    parts = (
        bundle.Part(digest, held.dtype, held.shape, held.read, str(held.found[0]) if held.found else "a tensor")
        for digest, held in sorted(holdings.tensors.items())
    )
    return bundle.to_bytes(bundle.Contents(genesis, ops, holdings.manifests, holdings.files), parts)


def from_bytes(data: bytes) -> tuple[bundle.Contents, dict[bytes, Held]]:
    """A bundle's contents and its tensors, each hashed. Raises BundleError, HeaderError."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UsageError(f"a state is read from bytes, not from {type(data).__name__}.")
    data = bytes(data)
    entries = bundle.entries_of(data, "the state")
    contents = bundle.read(entries, lambda entry: data[entry.begin : entry.end], "the state")
    tensors = {}
    for name, entry in entries.items():
        digest = bundle.tensor_digest_of(name)
        if digest is None:
            continue
        raw = np.frombuffer(data, np.uint8, entry.nbytes, entry.begin)
        if tensor_digest(entry.dtype, entry.shape, piece_digests(raw)) != digest:
            raise BundleError(f"the state: tensor {digest.hex()[:16]} holds other bytes than its name says.")
        bad = nonfinite(raw, entry.dtype) if entry.dtype.floating else None
        tensors[digest] = Held(entry.dtype, entry.shape, Facts(digest, bad), raw, None)
    return contents, tensors
