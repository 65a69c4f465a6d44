"""Real nodes: processes of ``crdtmerge serve`` on loopback, replicas for them, and waiting for what must come.

with Served(folder, "--period", "0.5") as node:
    wait_until(lambda: node.report["visible_count"] == 3, "three are visible")
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from crdtmerge.keys import Key
from crdtmerge.pool.replica import Replica
from tests.pool.replicas import second
from tests.resolve.running import environment, program

LIMIT_SECONDS = 120.0
"""For anything that must happen at last; a fast machine never waits so long."""


class Served:
    """A node in a process of its own while in the context, with its first line of JSON."""

    def __init__(self, folder: Path, *options: object, listen: str = "127.0.0.1:0") -> None:
        self.folder, self.options, self.listen = folder, options, listen
        self.said: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if error is not None:
            error.add_note(f"the node of {self.folder} said:\n{self.log[-3000:]}")

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when the node has ended
        self.process = subprocess.Popen(
            program(
                "serve", "-C", self.folder, "--listen", self.listen, "--status", "127.0.0.1:0", "--json", *self.options
            ),
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(OMP_NUM_THREADS="1"),
            text=True,
        )
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        threading.Thread(
            target=lambda pipe: lines.put(pipe.readline()), args=[self.process.stdout], daemon=True
        ).start()
        line = lines.get(timeout=LIMIT_SECONDS)
        assert line, f"the node ended at once:\n{self.log}"
        self.said = json.loads(line)

    def kill(self) -> None:
        """As power loss does."""
        self._end(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """As it should be; its exit code."""
        return self._end(number)

    def _end(self, number: int) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        code = self.process.wait(LIMIT_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    @property
    def log(self) -> str:
        """What it wrote on stderr."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.said["url"].partition("#")[0].rpartition(":")[2])

    @property
    def url(self) -> str:
        """With its key."""
        return self.said["url"]

    @property
    def report(self) -> dict[str, Any]:
        """What its status page says."""
        with urllib.request.urlopen(f"{self.said['status']}/api/status", timeout=LIMIT_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    @property
    def memory_bytes(self) -> int:
        """Resident memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def wait_until(condition: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS, pause: float = 0.1) -> None:
    """Wait for what must come; only a node that never gets there fails."""
    end = time.monotonic() + seconds
    while not _holds(condition):
        assert time.monotonic() < end, f"after {seconds:.0f} s it does not hold that {what}"
        time.sleep(pause)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except OSError:  # a status page that is not there yet answers 503
        return False


def key_of(number: int) -> Key:
    """The key of a replica."""
    return Key.from_seed(bytes([number + 1]) * 32)


@contextmanager
def replicas(root: Path, first: Replica, count: int) -> Iterator[list[Replica]]:
    """``first`` and as many more as make ``count``, of the same pool."""
    others = [second(first, root / f"replica{number}", key_of(number)) for number in range(1, count)]
    try:
        yield [first, *others]
    finally:
        for one in others:
            one.close()


def trust_each_other(*found: Replica) -> None:
    """Every replica trusts the keys of the others."""
    for one in found:
        for other in found:
            if one is not other:
                one.peers.trust(other.author)
