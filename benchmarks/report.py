"""The rows of a benchmark, the table they are printed as, and the facts of the machine they were measured on.

RULES
- Wall seconds are without fsync, which only ours does; its seconds stand in their own column.
- Every figure is the median over the runs of that row. Ratios are this row divided by the row of `ours` (cold digest
  cache) of the same method; "x floor" is wall divided by the floor measured just before that method.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contestants import OURS, ROOT
from benchmarks.floor import Floor

GB = 1e9
HEADINGS = ["method", "who", "wall s", "fsync s", "CPU s", "anon GB", "GB in/s", "wall/ours", "CPU/ours", "x floor"]
PEERS = {"mergekit": "mergekit", "crdt-merge": "crdt-merge"}


@dataclass(frozen=True)
class Run:
    """What one run cost; wall is without fsync."""

    wall_seconds: float
    fsync_seconds: float
    cpu_seconds: float
    peak_anon_bytes: int
    peak_rss_bytes: int
    output_digest: str


@dataclass(frozen=True)
class Row:
    """All runs of one contestant on one method, or the reason why there are none."""

    method: str
    who: str
    runs: tuple[Run, ...]
    reason: str
    input_bytes: int
    floor: Floor

    def median(self, value: Callable[[Run], float]) -> float:
        """Return the median of one figure over the runs."""
        return statistics.median(map(value, self.runs))

    @property
    def wall_seconds(self) -> float:
        """Return the median wall seconds without fsync."""
        return self.median(lambda run: run.wall_seconds)

    @property
    def cpu_seconds(self) -> float:
        """Return the median of user and system seconds."""
        return self.median(lambda run: run.cpu_seconds)

    def as_json(self) -> dict[str, object]:
        """Return everything that is known of this row."""
        medians = {"wall_seconds": self.wall_seconds, "cpu_seconds": self.cpu_seconds} if self.runs else {}
        return asdict(self) | {"medians": medians}


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, whose columns also line up as plain text."""
    ours = {row.method: row for row in rows if row.who == OURS and row.runs}
    return aligned([HEADINGS, *(_cells(row, ours.get(row.method)) for row in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells, padded; the first line holds the headings."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(_line(cells, widths) for cells in [lines[0], rule, *lines[1:]])


def _line(cells: Iterable[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"


def _cells(row: Row, ours: Row | None) -> list[str]:
    if not row.runs:
        return [row.method, row.who, *["-"] * 8]
    wall, cpu = row.wall_seconds, row.cpu_seconds
    fsync = row.median(lambda run: run.fsync_seconds)
    anon = row.median(lambda run: run.peak_anon_bytes)
    ratios = [f"{wall / ours.wall_seconds:.2f}", f"{cpu / ours.cpu_seconds:.2f}"] if ours else ["-", "-"]
    figures = [f"{wall:.2f}", f"{fsync:.2f}" if fsync else "-", f"{cpu:.2f}", f"{anon / GB:.2f}"]
    return [
        row.method,
        row.who,
        *figures,
        f"{row.input_bytes / wall / GB:.2f}",
        *ratios,
        f"{wall / row.floor.seconds:.1f}",
    ]


def reasons(rows: Sequence[Row]) -> str:
    """Return a line for each row of the table that has no figures, saying why."""
    return "\n".join(f"{row.method}, {row.who}: {row.reason}" for row in rows if not row.runs)


def floor_lines(rows: Sequence[Row]) -> str:
    """Return one line a method: the speeds that were measured before it and the floor that follows."""
    floors = {row.method: row.floor for row in rows}
    return "\n".join(
        f"floor of {method}: {floor.seconds:.3f} s (read {floor.read_bytes_per_second / GB:.1f}, write "
        f"{floor.write_bytes_per_second / GB:.1f}, memcpy {floor.copy_bytes_per_second / GB:.1f} GB/s)"
        for method, floor in floors.items()
    )


def machine() -> dict[str, str]:
    """Return the facts that a reader needs to place the figures."""
    names = ("crdtmerge", "torch", "numba", "numpy", "safetensors")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        **{f"peer {name}": _peer_version(name) for name in PEERS},
    }


def machine_line(facts: dict[str, str]) -> str:
    """Return the facts in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _peer_version(name: str) -> str:
    places = [str(path) for path in (ROOT / ".peers" / name).glob("lib/python*/site-packages")]
    for found in importlib.metadata.distributions(name=PEERS[name], path=places):
        return found.version
    return "not available"
