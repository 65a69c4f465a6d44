"""Measures the floor under every merge: reading the inputs from the page cache and writing the output into it.

RULES
- The very files of the run are read, after one pass that brings them into the page cache, with readinto of 8 MiB.
- As many bytes as the merge writes are written to a new file on the same disk, without fsync, and deleted.
- Each figure is the median of three passes. floor seconds = input / read speed + output / write speed.

Example: python -m benchmarks.floor --output-bytes 1000000 .bench/mid/ft1/model.safetensors
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import measure

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / ".bench" / "out"
BUFFER_BYTES = 8 << 20
COPY_BYTES = 256 << 20
PASSES = 3


@dataclass(frozen=True)
class Floor:
    """Speeds of this machine at this moment, and the least seconds that a merge of these bytes can take."""

    read_bytes_per_second: float
    write_bytes_per_second: float
    copy_bytes_per_second: float
    seconds: float


def floor_of(files: Sequence[Path], output_bytes: int) -> Floor:
    """Measure the floor in a process of its own, so that the caller stays small."""
    argv = [sys.executable, "-m", "benchmarks.floor", "--json", "--output-bytes", str(output_bytes), *map(str, files)]
    done = measure(argv, cwd=ROOT)
    if done.exit_code:
        raise SystemExit(f"the floor could not be measured: {done.stderr.strip()}")
    return Floor(**json.loads(done.stdout))


def measure_floor(files: Sequence[Path], output_bytes: int) -> Floor:
    """Measure the floor in this process."""
    input_bytes = sum(path.stat().st_size for path in files)
    _read_seconds(files)
    read = input_bytes / _median(lambda: _read_seconds(files))
    write = output_bytes / _median(lambda: _write_seconds(output_bytes))
    source, target = memoryview(bytearray(COPY_BYTES)), memoryview(bytearray(COPY_BYTES))
    copy = COPY_BYTES / _median(lambda: _copy_seconds(source, target))
    return Floor(read, write, copy, input_bytes / read + output_bytes / write)


def _median(seconds: Callable[[], float]) -> float:
    return statistics.median(seconds() for _ in range(PASSES))


def _read_seconds(files: Sequence[Path]) -> float:
    buffer = bytearray(BUFFER_BYTES)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def _write_seconds(count: int) -> float:
    """Write `count` bytes to a new file; taking it away again is not in the time."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = SCRATCH / "floor.bin"
    buffer = memoryview(bytearray(b"\x5a" * BUFFER_BYTES))
    start = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while count > 0:
                count -= file.write(buffer[:count])
        return time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)


def _copy_seconds(source: memoryview, target: memoryview) -> float:
    start = time.perf_counter()
    target[:] = source
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure page-cache read, page-cache write and memcpy.")
    parser.add_argument("files", nargs="+", type=Path, help="the inputs of the merge")
    parser.add_argument("--output-bytes", type=int, required=True, help="bytes that the merge writes")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    floor = measure_floor(arguments.files, arguments.output_bytes)
    if arguments.json:
        print(json.dumps(asdict(floor)))
        return
    for label, speed in (("read", floor.read_bytes_per_second), ("write", floor.write_bytes_per_second)):
        print(f"{label:7}{speed / 1e9:6.2f} GB/s")
    print(f"memcpy {floor.copy_bytes_per_second / 1e9:6.2f} GB/s\nfloor  {floor.seconds:6.3f} s")


if __name__ == "__main__":
    main()
