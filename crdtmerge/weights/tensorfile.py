"""One safetensors file, opened once and read in stretches.

RULES
1. Only regular files: a pipe or device is refused without waiting on it.
2. Nothing is allocated on the file's word: its size is known before its header is read.
3. Reading is positional (pread): no mapping, so a file that shrinks is an error and never a signal, and any
   number of threads may read at once.
4. What the file was when opened is kept (``Stamp``); ``check_unchanged`` compares.
5. Formats that can run code or hold no plain numbers are recognised and refused, with a way on.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from numpy.typing import NDArray

from crdtmerge.errors import ChangedError, CheckpointError, HeaderError, InputError
from crdtmerge.weights.descriptors import bytes_of, open_file
from crdtmerge.weights.header import LENGTH_BYTES, Entry, header_length, parse_header

__all__ = ["Entry", "Stamp", "TensorFile", "bytes_of", "parse_header", "read_at", "refuse_format"]

PICKLE = (
    "a pickle can run code when it is loaded, so crdtmerge never reads one. Convert it where you trust its source: "
    "safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'model.safetensors')."
)
GGUF = "quantised blocks have no linear structure to average; merge the original weights, then convert."

_REFUSED_SUFFIXES = dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), PICKLE) | {".gguf": GGUF}
_MAGICS = {b"GGUF": GGUF, b"PK\x03\x04": PICKLE} | {bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)}


class Stamp(NamedTuple):
    """Which file this is and what state it is in: equal stamps mean the same bytes, up to the clock's resolution."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


_CHANGES = Stamp("device", "file", "size", "modification time", "status time (it was replaced, linked or renamed)")  # type: ignore[arg-type]


class TensorFile:
    """An open safetensors file: ``path``, ``stamp``, and ``entries`` by name in sorted order.

    >>> with TensorFile.open(Path("model.safetensors")) as file:  # doctest: +SKIP
    ...     entry = file.entries["lm_head.weight"]
    ...     file.read_into(entry.begin, buffer[: entry.nbytes])
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.stamp = _stamp(descriptor)
        self.entries = _read_entries(path, descriptor, self.stamp.size)

    @classmethod
    def open(cls, path: Path, real: Path | None = None) -> Self:
        """Open and check a file; ``real`` is where ``path`` leads, when links were resolved before.

        Raises HeaderError for a malformed header, CheckpointError for another format or no regular file,
        InputError where the system refuses to read.
        """
        refuse_format(path)
        try:
            descriptor = open_file(real or path, os.O_RDONLY | os.O_NONBLOCK | (os.O_NOFOLLOW if real else 0))
        except (OSError, ValueError) as fault:
            raise InputError(f"{path}: cannot be opened: {_reason(fault)}.") from fault
        try:
            _check_regular(path, descriptor)
            return cls(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def read_into(self, offset: int, buffer: memoryview | bytearray | NDArray[Any]) -> None:
        """Fill a writable buffer with the file's bytes from an absolute offset. Safe to call from any thread.

        Raises ChangedError when the file has become shorter, InputError when the system cannot read it.
        """
        view = bytes_of(buffer)
        done = read_at(self.path, self._descriptor, offset, view)
        if done < len(view):
            raise ChangedError(
                f"{self.path}: ends at byte {offset + done}; it had {self.stamp.size} bytes when it was opened. "
                "It changed while it was read: run again when nothing writes to it."
            )

    def check_unchanged(self) -> None:
        """Raises ChangedError, naming what differs, unless the file is as it was when opened."""
        now = _stamp(self._descriptor)
        for what, then, found in zip(_CHANGES, self.stamp, now, strict=True):
            if then != found:
                raise ChangedError(
                    f"{self.path}: changed while it was read: {what} was {then}, is {found}. "
                    "Run again when nothing writes to it."
                )

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refuse_format(path: Path) -> None:
    """Raises CheckpointError for a file whose name says it is a pickle or GGUF."""
    reason = _REFUSED_SUFFIXES.get(path.suffix.lower())
    if reason:
        raise CheckpointError(f"{path}: {reason}")


def read_at(path: Path, descriptor: int, offset: int, view: memoryview) -> int:
    """Read until ``view`` is full or the file ends; the count of bytes read. Raises InputError."""
    done = 0
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
    except OSError as fault:
        raise InputError(f"{path}: cannot be read at byte {offset + done}: {_reason(fault)}.") from fault
    return done


def _reason(fault: OSError | ValueError) -> str:
    return (fault.strerror if isinstance(fault, OSError) else str(fault)) or type(fault).__name__


def _stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _check_regular(path: Path, descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: is a folder where a file is wanted.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is a pipe, socket or device; only regular files are read.")


def _read_entries(path: Path, descriptor: int, size: int) -> dict[str, Entry]:
    prefix = bytearray(LENGTH_BYTES)
    read_at(path, descriptor, 0, memoryview(prefix))
    try:
        length = header_length(bytes(prefix), size, str(path))
    except HeaderError:
        _refuse_magic(path, bytes(prefix))
        raise
    header = bytearray(length)
    if read_at(path, descriptor, LENGTH_BYTES, memoryview(header)) < length:
        raise ChangedError(f"{path}: became shorter than {LENGTH_BYTES + length} bytes while its header was read.")
    return parse_header(bytes(header), size - LENGTH_BYTES - length, str(path))


def _refuse_magic(path: Path, prefix: bytes) -> None:
    for magic, reason in _MAGICS.items():
        if prefix.startswith(magic):
            raise CheckpointError(f"{path}: {reason}")
