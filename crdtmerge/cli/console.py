"""What every command prints with: JSON on stdout, everything else on stderr, progress bars, this process's memory."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crdtmerge.errors import CrdtMergeError

SAMPLE_SECONDS = 0.02


def say(text: str) -> None:
    """A line for people, beside the result."""
    print(printable(text), file=sys.stderr)


def tell(text: str = "") -> None:
    """Lines of the result, for people."""
    print(printable(text))


def printable(text: str) -> str:
    r"""A text in which no file's or tensor's name can move the cursor, change colours or fail to be encoded.

    >>> print(printable("a\x1b[31m"))
    a\x1b[31m
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text
    )


def emit(document: object, *, compact: bool = False) -> None:
    """The one JSON document of a command; compact where it may be long."""
    print(json.dumps(document, indent=None if compact else 2))


def fail(error: CrdtMergeError, *, as_json: bool) -> int:
    """Say what is wrong; the exit code for it."""
    if as_json:
        emit({"error": {"kind": type(error).__name__, "message": str(error)}})
    say(f"error: {error}")
    return 2


@contextmanager
def many_values() -> Iterator[None]:
    """While many small values are built that live until the end: looking among them for garbage takes half the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quoted(text: str) -> str:
    """Words of others, on one line whatever they hold.

    >>> quoted("one\\ntwo")
    '"one\\\\ntwo"'
    """
    return json.dumps(text, ensure_ascii=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for (stage, bytes done, bytes in all), where stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield advance


class Memory:
    """Peak memory of this process: resident from the kernel, anonymous from samples taken while work goes on."""

    def __init__(self) -> None:
        self.peak_anon_bytes = 0
        self._next = 0.0

    def sample(self) -> None:
        """Look at the anonymous memory, at most every 20 ms."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + SAMPLE_SECONDS
            self.peak_anon_bytes = max(self.peak_anon_bytes, anonymous_bytes())

    def finish(self) -> tuple[int, int]:
        """(peak resident bytes, peak anonymous bytes)."""
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        self._next = 0.0
        self.sample()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, self.peak_anon_bytes


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process in bytes; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)
