"""A program in a process of its own, seen from here: start it, give it tensors, run jobs, never trust what it answers.

>>> with Runner(Path("model.pt2"), digest) as runner:  # doctest: +SKIP
...     runner.keep("data", load_file("data.safetensors"))
...     runner.keep("model", load_file("model.safetensors"))
...     fisher = runner.run("fisher", {}, ["model"]).tensors
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import crdtmerge
from crdtmerge import errors
from crdtmerge.errors import InputError
from crdtmerge.programs.bounds import SILENCE_SECONDS, Patient, memory_here
from crdtmerge.programs.messages import receive, send

if TYPE_CHECKING:
    from torch import Tensor

_WORDS_BYTES = 2000

_KINDS = {
    kind.__name__: kind for kind in (errors.InputError, errors.MismatchError, errors.NeedsError, errors.UsageError)
}


class Ran(NamedTuple):
    """What a job found: JSON values, and tensors by name."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def dataless(params: Mapping[str, Any]) -> bool:
    """Whether a job with these parameters runs on inputs that it makes itself."""
    return params.get("probe") == "noise"


class Runner:
    """A process with a loaded program. It ends with this one, whatever this one dies of."""

    def __init__(
        self,
        program: Path,
        digest: bytes,
        *,
        device: str = "cpu",
        memory: int | None = None,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        """Start the process and load the program there, if its digest is this. Raises InputError, MismatchError.

        Args:
            program: the file.
            digest: its SHA-256.
            device: where it runs.
            memory: bytes that the process may take, on a CPU; by default all that this machine has.
            silence: seconds between two of its messages, after which it is ended.
        """
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "crdtmerge.programs.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
        )
        assert self._process.stdin is not None, "a pipe"
        assert self._process.stdout is not None, "a pipe"
        self._requests, self._patient = self._process.stdin, Patient(self._process.stdout, silence)
        self._answers = io.BufferedReader(self._patient)
        try:
            asked = {"digest": digest.hex(), "device": device, "memory": memory or memory_here()}
            self._send({"do": "open", "program": str(program.absolute())} | asked)
            self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def keep(self, group: str, tensors: Mapping[str, Tensor], *, anew: bool = True) -> None:
        """Give it a group of tensors, or more of a group. Raises InputError if it is gone."""
        self._send({"do": "keep", "group": group, "anew": anew}, tensors)

    def run(
        self,
        job: str,
        params: Mapping[str, Any],
        groups: Sequence[str],
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        save: Callable[[int, Mapping[str, Tensor]], None] = lambda step, tensors: None,
        resumed: tuple[int, Mapping[str, Tensor]] | None = None,
    ) -> Ran:
        """Run a job on kept groups. Raises InputError, MismatchError, NeedsError, with the job's own words."""
        step, state = resumed or (None, {})
        head = {"do": "run", "job": job, "params": dict(params), "groups": list(groups), "step": step}
        self._send(head, state)
        while True:
            found, tensors = self._answer()
            if found["say"] == "done":
                return Ran(found["values"], tensors)
            if found["say"] == "progress":
                progress(int(found["done"]), int(found["total"]))
            elif found["say"] == "state":
                save(int(found["step"]), tensors)

    def close(self) -> None:
        """End the process; closing twice is harmless."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._requests, self._answers, self._errors):
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        try:
            send(self._requests, head, tensors)
        except OSError:
            raise self._gone() from None

    def _answer(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            answer = receive(self._answers)
        except TimeoutError:
            self._process.kill()
            raise InputError(
                f"the program said nothing for {self._patient.seconds:g} seconds and was ended: it hangs, or a step "
                "of it takes too long; give it less data, or run it on a faster device."
            ) from None
        if answer is None:
            raise self._gone()
        head, tensors = answer
        if head.get("say") == "error":
            raise _KINDS.get(str(head.get("kind")), InputError)(str(head.get("message"))[:_WORDS_BYTES])
        if head.get("say") not in ("ready", "progress", "state", "done"):
            raise InputError("the process of a program answered what it never does; the program is not to be trusted.")
        return head, tensors

    def _gone(self) -> InputError:
        """The error for a process that ended: how, and its last words."""
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read()[-_WORDS_BYTES:].decode(errors="replace").strip().splitlines()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        said = words[-1] if words else "it said nothing"
        return InputError(f"the process that runs the program ended {how}; its last words: {said}")


def _environment() -> dict[str, str]:
    """That of this process, with our package found where this one found it and no file of the working folder."""
    home = str(Path(crdtmerge.__file__).parents[1])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    return os.environ | fixed | {"MKL_NUM_THREADS": "1"}
