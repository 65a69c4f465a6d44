"""Tensor digests: what a tensor is, independent of the file that holds it; and pass 1, which takes them.

A tensor's digest is SHA-256 over its dtype, shape, byte count and the BLAKE3 digests of its consecutive pieces of
``limits.PIECE_BYTES``. File order, padding and shard boundaries do not enter.

RULES
1. A file is read once, in stretches, into one buffer for each thread; hash and check run on the same hot bytes.
2. A file's stamp is compared after it was read; what changed meanwhile is ChangedError, and never cached.
3. A bool is 0 or 1: other bytes would mean the same and hash differently, so they are InputError.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import blake3
import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.canonical import digest
from crdtmerge.errors import InputError
from crdtmerge.numerics.dtypes import DType
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.tensorfile import Entry, TensorFile, bytes_of

if TYPE_CHECKING:
    from crdtmerge.weights.checkpoint import Checkpoint

STRETCH_BYTES = 8 * limits.PIECE_BYTES
"""Bytes of one piece of work: whole pieces, enough of them to make handing them out cheap."""


def piece_digests(data: bytes | bytearray | memoryview | NDArray[Any]) -> bytes:
    """The BLAKE3 digests, 32 bytes each, of consecutive pieces of contiguous data, joined.

    >>> piece_digests(b"")
    b''
    >>> len(piece_digests(bytes(limits.PIECE_BYTES + 1)))
    64
    """
    view = bytes_of(data)
    step = limits.PIECE_BYTES
    return b"".join(blake3.blake3(view[at : at + step]).digest() for at in range(0, len(view), step))


def tensor_digest(dtype: DType, shape: tuple[int, ...], pieces: bytes) -> bytes:
    """A tensor's digest, 32 bytes, from the joined digests of its pieces."""
    count = dtype.nbytes(shape)
    assert len(pieces) == 32 * -(-count // limits.PIECE_BYTES), "one digest of 32 bytes for each piece"
    return digest("tensor", {"dtype": dtype.name, "shape": list(shape), "bytes": count, "pieces": pieces})


def digest_checkpoint(
    checkpoint: Checkpoint,
    workers: Workers,
    cache: DigestCache | None = None,
    progress: Callable[[int], None] = lambda read_bytes: None,
) -> dict[str, Facts]:
    """The facts of every tensor, by name in sorted order. ``progress`` is told of bytes as they are read.

    Raises ChangedError when a file changes meanwhile, InputError for unreadable files and bad bools.
    """
    facts: dict[str, Facts] = {}
    for file in checkpoint.files:
        known = cache.get(file.stamp) if cache else None
        if known is None or known.keys() != file.entries.keys():
            known = digest_file(file, workers, progress)
            if cache:
                cache.put(file.stamp, known)
        file.check_unchanged()
        facts.update(known)
    return {name: facts[name] for name in sorted(facts)}


class Copy(Protocol):
    """Who gets a copy of the bytes while they are hashed."""

    def piece(self, entry: Entry, at: int, data: NDArray[np.uint8]) -> None:
        """Some bytes of a tensor, from ``at`` within it. Called from many threads; ``data`` is reused afterwards."""
        ...

    def tensor(self, entry: Entry, pieces: bytes, facts: Facts) -> None:
        """What a whole tensor was found to be, after all of its pieces."""
        ...


def digest_file(
    file: TensorFile,
    workers: Workers,
    progress: Callable[[int], None] = lambda read_bytes: None,
    copy: Copy | None = None,
) -> dict[str, Facts]:
    """The facts of every tensor of one file, read in the order of the file; ``copy`` gets what was read."""
    found: dict[str, list[_Stretch]] = {name: [] for name in file.entries}
    for name, stretch in workers.map(partial(_read_stretch, file, threading.local(), copy), _stretches(file)):
        found[name].append(stretch)
        progress(stretch.nbytes)
    file.check_unchanged()
    return {name: _joined(file.entries[name], stretches, copy) for name, stretches in found.items()}


class _Stretch(NamedTuple):
    nbytes: int
    pieces: bytes
    nonfinite: tuple[int, int] | None


def _stretches(file: TensorFile) -> Iterator[tuple[Entry, int]]:
    for entry in sorted(file.entries.values(), key=lambda entry: entry.begin):
        for begin in range(0, entry.nbytes, STRETCH_BYTES):
            yield entry, begin


def _read_stretch(
    file: TensorFile, local: threading.local, copy: Copy | None, work: tuple[Entry, int]
) -> tuple[str, _Stretch]:
    """Read, hash and check one stretch, a piece at a time: it stays in the processor's cache for all three."""
    entry, begin = work
    end = min(begin + STRETCH_BYTES, entry.nbytes)
    buffer = _buffer(local)
    digests, bad = [], None
    for at in range(begin, end, limits.PIECE_BYTES):
        piece = buffer[: min(limits.PIECE_BYTES, end - at)]
        file.read_into(entry.begin + at, piece)
        digests.append(blake3.blake3(bytes_of(piece)).digest())
        bad = _add(bad, _check_values(file, entry, at, piece))
        if copy is not None:
            copy.piece(entry, at, piece)
    return entry.name, _Stretch(end - begin, b"".join(digests), bad)


def _buffer(local: threading.local) -> NDArray[np.uint8]:
    if not hasattr(local, "buffer"):
        local.buffer = np.empty(limits.PIECE_BYTES, np.uint8)
    buffer: NDArray[np.uint8] = local.buffer
    return buffer


def _check_values(file: TensorFile, entry: Entry, at: int, piece: NDArray[np.uint8]) -> tuple[int, int] | None:
    return check_values(piece, at, entry.dtype, f"{file.path}: tensor {entry.name!a}")


def check_values(piece: NDArray[np.uint8], at: int, dtype: DType, what: str) -> tuple[int, int] | None:
    """How many elements of the piece at byte ``at`` are not finite, and which is the first. Raises InputError."""
    if dtype.kind == "bool" and int(piece.max()) > 1:
        index = at + int(np.argmax(piece > 1))
        raise InputError(
            f"{what} is BOOL but holds {int(piece[index - at])} at index {index}; "
            "a bool is 0 or 1. Save it again from a framework that writes bools."
        )
    bad = nonfinite(piece, dtype) if dtype.floating else None
    return bad and (bad[0], bad[1] + at // dtype.itemsize)


def _add(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    return (one[0] + other[0], one[1]) if one and other else one or other


def _joined(entry: Entry, stretches: list[_Stretch], copy: Copy | None) -> Facts:
    bad: tuple[int, int] | None = None
    for stretch in stretches:
        bad = _add(bad, stretch.nonfinite)
    pieces = b"".join(stretch.pieces for stretch in stretches)
    facts = Facts(tensor_digest(entry.dtype, entry.shape, pieces), bad)
    if copy is not None:
        copy.tensor(entry, pieces, facts)
    return facts
