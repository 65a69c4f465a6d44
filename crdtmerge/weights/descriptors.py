"""What reading and writing share: opening files when there are many of them, and looking at any buffer as bytes.

At the limit on open files, the limit is raised as far as it goes.

Large checkpoints have hundreds of shards and a merge opens those of all its inputs, while systems often start
with a soft limit of 256 or 1024 and a far larger hard one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any


def open_file(path: Path, flags: int, mode: int = 0o666) -> int:
    """A file descriptor, closed on exec. Raises OSError as ``os.open`` does."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, mode)
    except OSError as fault:
        if fault.errno != errno.EMFILE or not _raise_limit():
            raise
    return os.open(path, flags | os.O_CLOEXEC, mode)


def _raise_limit() -> bool:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft >= wanted:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


def bytes_of(data: Any) -> memoryview:
    """Any contiguous buffer as a flat view of its bytes, without a copy."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")
