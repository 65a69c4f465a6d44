"""Every effect on a replica's files outside its database, in one place, so that tests can make each of them fail.

RULES
1. What fsync refused is lost: the file is given up and never synced again (Linux forgets what it could not write).
2. A name appears by rename, after its bytes are durable; it lasts once its folder is synced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crdtmerge.errors import StorageError
from crdtmerge.weights.descriptors import bytes_of, open_file


class Disk:
    """The disk as it is. Every method raises OSError."""

    def create(self, path: Path) -> int:
        """A descriptor of a new file."""
        return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def write(self, descriptor: int, offset: int, data: Any) -> None:
        """Write all of some bytes at an offset."""
        view = bytes_of(data)
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)

    def sync(self, descriptor: int) -> None:
        """Make a file's bytes durable."""
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, new: Path) -> None:
        """Give a file another name."""
        path.rename(new)

    def link(self, path: Path, new: Path) -> None:
        """Give a file a second name, where nothing stands."""
        os.link(path, new)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """Make a folder for its owner alone, if it is not there."""
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def failing(where: Path) -> Iterator[None]:
    """Turn OSError into StorageError with what to do."""
    try:
        yield
    except OSError as fault:
        raise StorageError(
            f"{where}: cannot be written: {fault.strerror or fault}. Nothing that was acknowledged is lost; make room "
            "or mend the disk, then run `crdtmerge fsck` and repeat what you did."
        ) from fault
