"""`make bench`: merges the same checkpoints with us, plain torch, mergekit and crdt-merge, and prints one table.

RULES
- Contestants take turns (ours, a peer, ours, a peer ...), so that a busy minute of the machine hits all of them.
- The inputs are in the page cache before each method; outputs lie under .bench/out and are deleted after every run.
- This process stays small (no torch): the kernel charges a child the peak memory of its parent.
- A contestant that fails, is not there or passes the limit gets a line with the reason, and the rest goes on.

Example: python -m benchmarks.merge --size mid --runs 3
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import (
    CONTESTANTS,
    OURS,
    OURS_WARM,
    ROOT,
    SCRATCH,
    WARM_CACHE,
    NoSuchMergeError,
    NotRunError,
    Task,
)
from benchmarks.floor import Floor, floor_of
from benchmarks.measure import Measurement, measure
from benchmarks.methods import METHODS, Method
from benchmarks.report import GB, Row, Run, aligned, floor_lines, machine, machine_line, reasons, table

MEMORY_METHODS = ("linear", "ties", "ties (model)")
MEMORY_MODELS = (3, 10)


def build_checkpoints(size: str, models: int) -> None:
    """Build what is missing, in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.checkpoints", "--size", size, "--models", str(models)]
    if subprocess.run(argv, cwd=ROOT, check=False).returncode:
        raise SystemExit("the checkpoints could not be built; the reason stands above")


def run_once(task: Task, who: str, limit_seconds: float) -> Run:
    """Run one contestant once on one task, and delete what it wrote."""
    out = ROOT / task.out
    shutil.rmtree(out, ignore_errors=True)
    try:
        call = CONTESTANTS[who](task)
        done = measure(call.argv, call.environment, limit_seconds, ROOT)
        _check(done, out, limit_seconds)
        return _run(done, who)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _check(done: Measurement, out: Path, limit_seconds: float) -> None:
    if done.timed_out:
        raise NotRunError(f"not run: took more than {limit_seconds:.0f} s")
    if done.exit_code:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotRunError(f"exit {done.exit_code}: {last[:100]}")
    if not any(out.glob("*.safetensors")):
        raise NotRunError("exit 0, but no weights were written")


def _run(done: Measurement, who: str) -> Run:
    said = _said(done.stdout) if who.startswith(OURS) else {}
    fsync_seconds = float(said.get("fsync_seconds", 0.0))
    return Run(
        wall_seconds=done.wall_seconds - fsync_seconds,
        fsync_seconds=fsync_seconds,
        cpu_seconds=done.cpu_seconds,
        peak_anon_bytes=done.peak_anon_bytes,
        peak_rss_bytes=done.peak_rss_bytes,
        output_digest=str(said.get("output_digest", "")),
    )


def _said(stdout: str) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(stdout)
    except ValueError as error:
        raise NotRunError(f"exit 0, but its --json is not one JSON document: {error}") from error
    return said


def bench(method: Method, size: str, who: Sequence[str], runs: int, limit_seconds: float) -> list[Row]:
    """Measure every contestant on one method, taking turns."""
    task = Task(method, size)
    floor = _floor(task)
    who = [name for name in who if _offers(name, task)]
    done: dict[str, list[Run]] = {name: [] for name in who}
    failed: dict[str, str] = {}
    if any(name.startswith(OURS) for name in who):
        _attempt(task, OURS_WARM, limit_seconds, [], {})  # not counted: fills the digest cache and the compiled kernels
    for _ in range(runs):
        for name in who:
            if name not in failed:
                _attempt(task, name, limit_seconds, done[name], failed)
    return [_row(task, name, done[name], failed.get(name, ""), floor) for name in who]


def _offers(who: str, task: Task) -> bool:
    try:
        CONTESTANTS[who](task)
    except NoSuchMergeError:
        return False
    except NotRunError:
        return True  # the reason gets its line
    return True


def _attempt(task: Task, who: str, limit_seconds: float, runs: list[Run], failed: dict[str, str]) -> None:
    try:
        runs.append(run_once(task, who, limit_seconds))
    except NotRunError as error:
        failed[who] = str(error)
    said = failed.get(who) or (f"{runs[-1].wall_seconds:.2f} s" if runs else "")
    print(f"{task.size} {task.method.name}: {who}: {said}", file=sys.stderr, flush=True)


def _floor(task: Task) -> Floor:
    output_bytes = sum(path.stat().st_size for path in (ROOT / task.folder("ft1")).glob("*.safetensors"))
    return floor_of(task.files(), output_bytes)


def _row(task: Task, who: str, runs: list[Run], reason: str, floor: Floor) -> Row:
    input_bytes = sum(path.stat().st_size for path in task.files())
    return Row(task.method.name, who, () if reason else tuple(runs), reason, input_bytes, floor)


def memory(methods: Sequence[str], size: str, runs: int, limit_seconds: float) -> list[list[str]]:
    """Return our peak memory with few and with many models, a line for each."""
    lines = [["method", "models", "wall s", "anon GB", "RSS GB"]]
    for name in methods:
        for models in MEMORY_MODELS:
            method = dataclasses.replace(METHODS[name], models=models)
            [row] = bench(method, size, [OURS], runs, limit_seconds)
            lines.append([name, str(models), *_memory_cells(row)])
    return lines


def _memory_cells(row: Row) -> list[str]:
    if not row.runs:
        return [row.reason, "-", "-"]
    anon, resident = row.median(lambda run: run.peak_anon_bytes), row.median(lambda run: run.peak_rss_bytes)
    return [f"{row.wall_seconds:.2f}", f"{anon / GB:.3f}", f"{resident / GB:.3f}"]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure crdtmerge beside plain torch, mergekit and crdt-merge.")
    parser.add_argument("--size", choices=("tiny", "mid", "big"), default="mid", help="which checkpoints (mid)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each contestant; the median counts (3)")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="only this one; may be given again")
    parser.add_argument("--who", action="append", choices=list(CONTESTANTS), help="only this one; may be given again")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one run may take (300)")
    parser.add_argument("--memory", action="store_true", help="instead: our peak memory with 3 and with 10 models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to FILE as well")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    facts = machine()
    (ROOT / SCRATCH).mkdir(parents=True, exist_ok=True)
    build_checkpoints(chosen.size, max(MEMORY_MODELS) if chosen.memory else 3)
    shutil.rmtree(ROOT / WARM_CACHE, ignore_errors=True)
    if chosen.memory:
        lines = memory(chosen.method or MEMORY_METHODS, chosen.size, chosen.runs, chosen.limit)
        report: dict[str, object] = {"memory": lines}
        print(f"{chosen.size}, {machine_line(facts)}\n\n{aligned(lines)}")
    else:
        methods = [METHODS[name] for name in chosen.method or METHODS]
        who = chosen.who or list(CONTESTANTS)
        rows = [row for method in methods for row in bench(method, chosen.size, who, chosen.runs, chosen.limit)]
        report = {"rows": [row.as_json() for row in rows]}
        print(f"{chosen.size}, {machine_line(facts)}\n{floor_lines(rows)}\n\n{table(rows)}\n\n{reasons(rows)}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"size": chosen.size, "machine": facts, **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
