"""What a program may take: memory that runs out is an error that says so, and a long silence ends the process."""

from __future__ import annotations

import io
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from crdtmerge.errors import InputError
from crdtmerge.programs.bounds import Patient, bound_memory, memory_here, out_of_memory
from crdtmerge.programs.runner import Runner
from crdtmerge.testing.programs import export
from tests.programs.conftest import normal

GIB = 1 << 30


class Greedy(torch.nn.Module):
    """Takes as many GiB as there are examples, and two more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x)
        return logits + x.new_zeros(x.shape[0] + 2, GIB // 4).sum()


def test_a_program_that_takes_too_much_or_says_nothing_is_refused(tmp_path: Path) -> None:
    """Out of memory it goes on and serves the next job; stopped, it is ended, and later requests say how."""
    torch.manual_seed(1)
    module = Greedy()
    digest = export(module, [torch.zeros(2, 2)], tmp_path / "model.pt2")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with Runner(tmp_path / "model.pt2", digest, memory=2 * GIB, silence=120) as runner:
        assert resource.prlimit(runner.pid, resource.RLIMIT_DATA) == (2 * GIB, 2 * GIB)
        runner.keep("data", {"inputs": normal(5, 3, 2), "labels": torch.tensor([0, 1, 1])})
        runner.keep("model", {name: x.detach() for name, x in module.state_dict().items()})
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"needs more memory than there is; give it less data.*5368709120 bytes"
            ):
                runner.run("fitness", {"metric": "loss"}, ["model"])
        os.kill(runner.pid, signal.SIGSTOP)
        runner._patient.seconds = 0.2
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"said nothing for 0\.2 seconds and was ended: it hangs, or a step"):
            runner.run("fitness", {"metric": "loss"}, ["model"])
        assert time.monotonic() - begin < 30
        with pytest.raises(InputError, match="ended by signal 9"):
            runner.run("fitness", {"metric": "loss"}, ["model"])
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_pipe_is_read_to_its_end_while_it_says_something_now_and_then() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as there:
        here = io.BufferedReader(Patient(os.fdopen(reading, "rb", buffering=0), 0.05))
        there.write(b"abc")
        assert here.read(2) == b"ab"
        with pytest.raises(TimeoutError):
            here.read(2)
        there.write(b"def")
        there.close()
        assert here.read().endswith(b"def")
        here.close()


def test_the_bound_is_what_the_machine_has_and_never_more_than_there_was() -> None:
    assert 1 << 28 < memory_here() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    child = os.fork()
    if child == 0:
        bound_memory(4 * GIB)
        bound_memory(8 * GIB)
        os._exit(resource.getrlimit(resource.RLIMIT_DATA) != (4 * GIB, 4 * GIB))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("the shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: BaseException, said: bool) -> None:
    assert out_of_memory(error) == said
