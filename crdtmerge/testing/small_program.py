"""A small program with data for strategies that run a model, and one process of it that many merges share.

The program is a linear layer without bias on float64: its one parameter is ``weight`` [n, n]. The data holds a few
labelled examples, of one task without a name or of each of ``TASKS``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from crdtmerge.numerics.lazy import torch
from crdtmerge.programs.runner import Runner
from crdtmerge.resolve import inner
from crdtmerge.symmetry.groups import Symmetry
from crdtmerge.testing.case import SYMMETRY
from crdtmerge.testing.models import content, stored
from crdtmerge.testing.programs import export, write

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("t0", "t1", "t2", "t3")
EXAMPLES = 6

OF_TASKS = "data of tasks"


@contextmanager
def small_program(n: int) -> Iterator[dict[str, Path]]:
    """The files ``program``, ``data`` and ``symmetry``, while it lasts; ``OF_TASKS`` is the data that names its tasks.

    What goes into a linear layer and what comes out has an order that others know: it has no symmetry.
    """
    rng = np.random.default_rng(n)

    def examples(prefix: str) -> dict[str, Tensor]:
        labels = torch.from_numpy(rng.integers(0, n, EXAMPLES))
        return {f"{prefix}inputs": stored(rng.standard_normal((EXAMPLES, n)), "F64"), f"{prefix}labels": labels}

    plain = examples("")
    of_tasks = {name: x for task in TASKS for name, x in examples(f"{task}.").items()}
    with tempfile.TemporaryDirectory(prefix="crdtmerge-laws-") as scratch:
        names = {
            "program": "model.pt2",
            "data": "data.safetensors",
            OF_TASKS: "tasks.safetensors",
            SYMMETRY: "symmetry.json",
        }
        files = {name: Path(scratch) / file for name, file in names.items()}
        export(torch.nn.Linear(n, n, bias=False, dtype=torch.float64), [plain["inputs"]], files["program"])
        write(plain, files["data"])
        write(of_tasks, files[OF_TASKS])
        files[SYMMETRY].write_bytes(Symmetry((), {}).encode())
        yield files


class _Pool:
    """Running processes, by program and by the data that they were fed."""

    def __init__(self) -> None:
        self._running: dict[tuple[Path, bytes, str, bytes], Runner] = {}

    def fed(self, program: Path, digest: bytes, device: str, data: Mapping[str, Tensor] | None) -> Runner:
        """A process with a program and data, started if there is none yet."""
        key = program, digest, device, content(data or {})
        if key not in self._running:
            self._running[key] = Runner(program, digest, device=device)
            if data is not None:
                self._running[key].keep("data", data)
        return self._running[key]

    def close(self) -> None:
        """End them all."""
        for runner in self._running.values():
            runner.close()


class _Lent:
    """A runner out of a pool, chosen by the data that it is given first, if any; it goes on when this one is closed."""

    def __init__(self, pool: _Pool, program: Path, digest: bytes, device: str) -> None:
        self._pool, self._which = pool, (program, digest, device)
        self._runner: Runner | None = None

    def keep(self, group: str, tensors: Mapping[str, Tensor], *, anew: bool = True) -> None:
        """Give it a group of tensors; the data first, if there is any."""
        if self._runner is None:
            self._runner = self._pool.fed(*self._which, tensors if group == "data" else None)
        if group != "data":
            self._runner.keep(group, tensors, anew=anew)

    def run(self, job: str, params: Mapping[str, Any], groups: Sequence[str], **how: Any) -> Any:
        """Run a job on kept groups."""
        assert self._runner is not None, "its tensors are given first"
        return self._runner.run(job, params, groups, **how)

    def close(self) -> None:
        """Give it back."""


@contextmanager
def one_process() -> Iterator[None]:
    """Merges that run the same program on the same data share one process meanwhile: starting one takes seconds."""
    with closing(_Pool()) as pool:

        def lend(program: Path, digest: bytes, *, device: str = "cpu") -> _Lent:
            return _Lent(pool, program, digest, device)

        with mock.patch.object(inner, "Runner", lend):
            yield
