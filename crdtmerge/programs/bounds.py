"""What the process of a program may take: so much memory, and so long a silence.

A program is written by others: one that asks for all memory, or never ends, must not take the machine with it.
"""

from __future__ import annotations

import io
import os
import resource
import select
from pathlib import Path
from typing import IO, Any

SILENCE_SECONDS = 4 * 60 * 60.0
"""Between two messages: a step of the largest models takes minutes on a core, 256 examples of them hours."""

_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_here() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _CONTAINERS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min(found)


def bound_memory(nbytes: int) -> None:
    """Let this process have no more private memory than this, for good: allocating more fails.

    Reserved addresses do not count (RLIMIT_DATA, not RLIMIT_AS): torch maps several times what it uses.
    """
    known = [one for one in resource.getrlimit(resource.RLIMIT_DATA) if one != resource.RLIM_INFINITY]
    least = min([nbytes, *known])
    resource.setrlimit(resource.RLIMIT_DATA, (least, least))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had; torch says so in words."""
    words = ("can't allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


class Patient(io.RawIOBase):
    """A pipe that is read while it says something now and then.

    Reading raises TimeoutError after ``seconds`` without a byte.
    """

    def __init__(self, pipe: IO[bytes], seconds: float) -> None:
        self._pipe, self.seconds = pipe, seconds
        self._poll = select.poll()
        self._poll.register(pipe.fileno(), select.POLLIN)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """As of any raw stream."""
        if not self._poll.poll(self.seconds * 1000):
            raise TimeoutError
        return os.readv(self._pipe.fileno(), [buffer])

    def close(self) -> None:
        """Close the pipe too."""
        self._pipe.close()
        super().close()
