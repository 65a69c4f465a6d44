"""A cache of what pass 1 found: facts of tensors, under the stamp of the file that holds them.

RULES
1. It never makes anything wrong or fail: damaged entries are dropped, an unusable folder is no cache at all.
2. A file changed less than two seconds ago is not cached: its times could stay equal over another change.
3. Entries are written to a temporary name and renamed; the oldest beyond ``ENTRIES_MAX`` are removed.

The folder is ``$CRDTMERGE_CACHE``, else ``$XDG_CACHE_HOME/crdtmerge``, else ``~/.cache/crdtmerge``. Whoever may write
there may lie about digests, as whoever may write to the checkpoints may change them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack

from crdtmerge.canonical import digest, pack
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.tensorfile import Stamp

FORMAT = 1
"""Enters every key: raise it when facts come to mean something else."""

ENTRIES_MAX = 4096
"""Files remembered: some 100 bytes a tensor each."""

ENTRY_BYTES_MAX = 256 << 20
"""No entry of ours is larger: a million tensors with names of usual length."""

RACY_NS = 2_000_000_000
"""A change within this time of another may leave the same timestamps: the coarsest filesystems count in 2 s."""


class DigestCache:
    """Facts by stamp, on disk.

    >>> cache = DigestCache(Path("/nonexistent"))
    >>> cache.get(Stamp(1, 2, 3, 4, 5)) is None
    True
    """

    def __init__(self, folder: Path | None = None, now_ns: Callable[[], int] = time.time_ns) -> None:
        self.folder = (default_folder() if folder is None else folder) / "digests"
        self._now_ns = now_ns

    def get(self, stamp: Stamp) -> dict[str, Facts] | None:
        """What is known of the file with this stamp, or None."""
        path = self._path(stamp)
        try:
            with path.open("rb") as file:
                data = file.read(ENTRY_BYTES_MAX + 1)
        except OSError:
            return None
        facts = _unpacked(data)
        with contextlib.suppress(OSError):
            if facts is None:
                path.unlink()
            else:
                os.utime(path)
        return facts

    def put(self, stamp: Stamp, facts: Mapping[str, Facts]) -> None:
        """Remember the facts of every tensor of a file, unless the file is too young or the folder cannot be used."""
        if self._now_ns() - max(stamp.mtime_ns, stamp.ctime_ns) < RACY_NS:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(self._path(stamp), _packed(facts))
            self._prune()

    def _path(self, stamp: Stamp) -> Path:
        return self.folder / digest("digest-cache", [FORMAT, *(str(field) for field in stamp)]).hex()

    def _prune(self) -> None:
        with os.scandir(self.folder) as listing:
            entries = list(listing)
        if len(entries) <= ENTRIES_MAX:
            return
        by_age = sorted((entry.stat().st_mtime_ns, entry.path) for entry in entries)
        for _, path in by_age[: len(entries) - ENTRIES_MAX]:
            Path(path).unlink(missing_ok=True)


def default_folder() -> Path:
    """Where caches of this program live for this user."""
    named, shared = os.environ.get("CRDTMERGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    return (Path(shared) if shared else Path(os.path.expanduser("~")) / ".cache") / "crdtmerge"  # noqa: PTH111


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _packed(facts: Mapping[str, Facts]) -> bytes:
    body = pack([[name, found.digest, list(found.nonfinite or ())] for name, found in facts.items()])
    return hashlib.sha256(body).digest() + body


def _unpacked(data: bytes) -> dict[str, Facts] | None:
    """The facts in an entry's bytes; None if they are damaged."""
    if len(data) > ENTRY_BYTES_MAX or hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    try:
        rows: list[Any] = msgpack.unpackb(data[32:])
        return {name: Facts(found, (bad[0], bad[1]) if bad else None) for name, found, bad in rows}
    except (ValueError, TypeError, IndexError, msgpack.exceptions.UnpackException):
        return None
