"""Who merges: the command line of each contestant for one method, or the reason why there is none.

RULES
- A contestant is a function of a task; it prepares what its command reads and says nothing about time.
- Paths are relative to the root of the repository, where every command runs: mergekit cannot read paths with + or @.
- `ours` begins every run with an empty digest cache, as a first merge does; `ours, warm` has seen the inputs.

mergekit runs with its defaults (it does not fsync), and once more with one OpenMP thread, beside `ours, 1 thread`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.methods import Method

ROOT = Path(__file__).resolve().parent.parent
BENCH = Path(".bench")
SCRATCH = BENCH / "out"
WARM_CACHE = BENCH / "cache-warm"
COLD_CACHE = BENCH / "cache-cold"
OURS = "ours"
OURS_WARM = "ours, warm"
PUBLISHED_SIZES = ("tiny", "mid")  # crdt-merge widens everything to float64


class NoSuchMergeError(Exception):
    """A contestant does not offer this method at all: the table has no row for it."""


class NotRunError(Exception):
    """A contestant cannot do this task; the message is the reason shown in the table."""


@dataclass(frozen=True)
class Task:
    """One method on one size of model, with the folder that the output goes to."""

    method: Method
    size: str
    out: Path = SCRATCH / "merged"

    def folder(self, name: str) -> Path:
        """Return where the checkpoint of that name lies, relative to the root."""
        return BENCH / self.size / name

    def models(self) -> list[str]:
        """Return the paths of the fine-tunes."""
        return [str(self.folder(f"ft{number + 1}")) for number in range(self.method.models)]

    def base(self) -> list[str]:
        """Return `--base PATH`, or nothing."""
        return ["--base", str(self.folder("base"))] if self.method.base else []

    def files(self) -> list[Path]:
        """Return the weight files that are read."""
        return [
            path for name in self.method.inputs() for path in sorted((ROOT / self.folder(name)).glob("*.safetensors"))
        ]


@dataclass(frozen=True)
class Call:
    """A command and the environment variables it gets besides ours."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def ours_cold(task: Task) -> Call:
    """Our command with an empty digest cache."""
    shutil.rmtree(ROOT / COLD_CACHE, ignore_errors=True)
    return _ours(task, COLD_CACHE)


def ours_warm(task: Task) -> Call:
    """Our command when it has seen the inputs before."""
    return _ours(task, WARM_CACHE)


def ours_one_thread(task: Task) -> Call:
    """Our command on one thread, with an empty digest cache."""
    call = ours_cold(task)
    return Call([*call.argv, "--threads", "1"], call.environment)


def _ours(task: Task, cache: Path) -> Call:
    program = Path(sys.executable).parent / "crdtmerge"
    if not program.exists():
        raise NotRunError("not available: install the package first (pip install -e .)")
    (ROOT / cache).mkdir(parents=True, exist_ok=True)
    settings = [word for key, value in task.method.ours.items() for word in ("--set", f"{key}={value}")]
    argv = [str(program), "merge", *task.models(), *task.base(), "--strategy", task.method.strategy, *settings]
    return Call([*argv, "-o", str(task.out), "--json"], {"CRDTMERGE_CACHE": str(ROOT / cache)})


def plain_torch(task: Task) -> Call:
    """Run `plain_torch.py` in our own environment."""
    if task.method.plain is None:
        raise NoSuchMergeError(task.method.name)
    argv = [sys.executable, "-P", "benchmarks/plain_torch.py", task.method.plain, *task.models(), *task.base()]
    return Call([*argv, "--out", str(task.out)])


def mergekit(task: Task) -> Call:
    """Run `mergekit-yaml` with its defaults."""
    config = _mergekit_config(task)
    program = _peer("mergekit", "mergekit-yaml")
    path = SCRATCH / "mergekit.yml"
    (ROOT / path).write_text(json.dumps(config, indent=2))  # every JSON document is YAML
    return Call([program, "--quiet", str(path), str(task.out)], {"HF_HUB_OFFLINE": "1"})


def mergekit_one_thread(task: Task) -> Call:
    """Run mergekit with one OpenMP thread."""
    call = mergekit(task)
    return Call(call.argv, {**call.environment, "OMP_NUM_THREADS": "1"})


def _mergekit_config(task: Task) -> dict[str, object]:
    method = task.method
    if method.mergekit_models is None:
        raise NoSuchMergeError(task.method.name)
    config: dict[str, object] = {
        "merge_method": method.strategy,
        "models": [{"model": model, "parameters": method.mergekit_models} for model in task.models()],
        "parameters": method.mergekit_global,
        "dtype": "bfloat16",
    }
    if method.base:
        config["base_model"] = str(task.folder("base"))
    elif method.strategy == "slerp":
        config["base_model"] = task.models()[0]  # it wants one of the two named as base
    return config


def crdt_merge(task: Task) -> Call:
    """Run `published_run.py` in the environment of crdt-merge."""
    if task.method.published is None:
        raise NoSuchMergeError(task.method.name)
    if task.size not in PUBLISHED_SIZES:
        raise NotRunError(f"not run on {task.size}")
    program = _peer("crdt-merge", "python")
    argv = [program, "-P", "benchmarks/published_run.py", task.method.published, *task.models(), *task.base()]
    return Call([*argv, "--out", str(task.out)])


def _peer(name: str, program: str) -> str:
    place = Path(".peers") / name
    if not (ROOT / place / "pins.txt").exists():  # peers.sh writes it when the environment is whole
        raise NotRunError("not available: run benchmarks/peers.sh")
    return str(place / "bin" / program)


Contestant = Callable[[Task], Call]
CONTESTANTS: dict[str, Contestant] = {
    OURS: ours_cold,
    "plain torch": plain_torch,
    OURS_WARM: ours_warm,
    "mergekit": mergekit,
    "ours, 1 thread": ours_one_thread,
    "mergekit, 1 thread": mergekit_one_thread,
    "crdt-merge": crdt_merge,
}
