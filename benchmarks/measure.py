"""Runs one command as a child process and measures it: wall, CPU, peak memory, exit code.

RULES
- CPU seconds and peak RSS are the kernel's own account of that child (wait4), descendants it waited for included.
- Peak anonymous memory is the greatest sum of RssAnon over the child and its descendants, looked at every 20 ms: a
  shorter peak can be missed, and mapped files do not count. Descendants are the processes of the child's session; new
  ones are looked for ten times less often, because that means reading all of /proc.
- The kernel charges a child the peak RSS of the process that starts it, so the caller must stay small: no torch in it.
- Output goes to files, not pipes, so that a child never waits for its reader.

Example: python -m benchmarks.measure -- sleep 0.1
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
SAMPLES_PER_SEARCH = 10


@dataclass(frozen=True)
class Measurement:
    """What one run of a command cost."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anon_bytes: int
    timed_out: bool
    stdout: str
    stderr: str


class _Watcher(threading.Thread):
    """Samples the anonymous memory of a process tree, and ends the tree when its time is over."""

    def __init__(self, pid: int, limit_seconds: float | None) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
        self.peak_anon_bytes = 0
        self.timed_out = False
        self.done = threading.Event()

    def run(self) -> None:
        """Look every 20 ms until told to stop."""
        members = [self.pid]
        for sample in itertools.count(1):
            if sample % SAMPLES_PER_SEARCH == 0:
                members = _session(self.pid)
            self.peak_anon_bytes = max(self.peak_anon_bytes, sum(map(_anon_bytes, members)))
            self._end_when_late()
            if self.done.wait(SAMPLE_SECONDS):
                return

    def _end_when_late(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline and not self.timed_out:
            self.timed_out = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def measure(
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    limit_seconds: float | None = None,
    cwd: Path | None = None,
) -> Measurement:
    """Run `argv` to its end, or to the limit, and return what it cost."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        variables = {**os.environ, **(environment or {})}
        start = time.perf_counter()
        child = subprocess.Popen(argv, stdout=out, stderr=err, env=variables, cwd=cwd, start_new_session=True)
        watcher = _Watcher(child.pid, limit_seconds)
        watcher.start()
        status, usage = _wait(child.pid)
        wall_seconds = time.perf_counter() - start
        watcher.done.set()
        watcher.join()
        child.returncode = os.waitstatus_to_exitcode(status)  # the child is reaped: Popen must not wait for it again
        return Measurement(
            exit_code=child.returncode,
            wall_seconds=wall_seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_rss_bytes=usage.ru_maxrss * 1024,
            peak_anon_bytes=watcher.peak_anon_bytes,
            timed_out=watcher.timed_out,
            stdout=_text(out.fileno()),
            stderr=_text(err.fileno()),
        )


def _wait(pid: int) -> tuple[int, resource.struct_rusage]:
    """Wait for a child; when we are interrupted, it does not live on in its own session."""
    try:
        _, status, usage = os.wait4(pid, 0)
    except BaseException:
        os.killpg(pid, signal.SIGKILL)
        raise
    return status, usage


def _session(leader: int) -> list[int]:
    """Return the processes of the session that `leader` began."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if _session_id(pid) == leader]


def _session_id(pid: int) -> int:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()  # the name before may hold spaces
    return int(fields[3]) if fields else 0


def _anon_bytes(pid: int) -> int:
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def _text(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one command.")
    parser.add_argument("command", nargs="+")
    done = measure(parser.parse_args().command)
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    print(f"exit {done.exit_code}  wall {done.wall_seconds:.2f} s  CPU {done.cpu_seconds:.2f} s", end="  ")
    print(f"peak RSS {done.peak_rss_bytes / 1e9:.3f} GB  peak anon {done.peak_anon_bytes / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
