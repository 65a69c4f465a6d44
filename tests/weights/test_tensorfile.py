"""Reading an open file: positional, from any thread, and never past a change of the file."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crdtmerge.errors import ChangedError, InputError
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint
from crdtmerge.weights.tensorfile import TensorFile
from tests.weights.small_checkpoints import random_tensors, save

TENSORS = random_tensors(3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path / "m.safetensors", TENSORS)


def test_any_stretch_of_a_tensor_is_read_into_any_buffer(path: Path) -> None:
    data = TENSORS["layer.1.f32"][2]
    with Checkpoint.open(path) as checkpoint:
        for buffer in (bytearray(8), np.zeros(8, np.uint8), np.zeros(2, "<f4"), memoryview(bytearray(8))):
            checkpoint.read_into("layer.1.f32", 12, buffer)
            assert bytes(buffer) == data[12:20]
        checkpoint.read_into("empty", 0, np.empty((0, 4), "<f4"))


def test_many_threads_read_the_same_bytes(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint, Workers(4) as workers:

        def read(name: str) -> bytes:
            buffer = bytearray(checkpoint.entries[name].nbytes)
            checkpoint.read_into(name, 0, buffer)
            return bytes(buffer)

        names = sorted(TENSORS) * 20
        assert list(workers.map(read, names)) == [TENSORS[name][2] for name in names]


def test_a_read_in_short_steps_reads_it_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:3]], at))
    with TensorFile.open(path) as file:
        entry = file.entries["layer.1.f32"]
        buffer = bytearray(entry.nbytes)
        file.read_into(entry.begin, buffer)
    assert bytes(buffer) == TENSORS["layer.1.f32"][2]


CHANGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "grown": lambda path: path.open("ab").write(b"x"),
    "written": lambda path: path.open("r+b").write(b"\1"),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "replaced": lambda path: path.with_name("other").write_bytes(b"") or path.with_name("other").replace(path),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_open_is_found_and_named(change: str, path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))
    with Checkpoint.open(path) as checkpoint:
        checkpoint.check_unchanged()
        CHANGES[change](path)
        with pytest.raises(ChangedError, match=r"m\.safetensors: changed while it was read: .* was \d+, is \d+"):
            checkpoint.check_unchanged()


def test_truncation_while_open_is_an_error_not_a_signal(path: Path) -> None:
    with TensorFile.open(path) as file:
        last = max(file.entries.values(), key=lambda entry: entry.end)
        os.truncate(path, last.begin + 1)
        with pytest.raises(
            ChangedError, match=f"ends at byte {last.begin + 1}; it had {last.end} bytes when it was opened"
        ):
            file.read_into(last.begin, bytearray(last.nbytes))


def test_truncation_before_pass_1_is_an_error(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint, Workers(2) as workers:
        os.truncate(path, 1000)
        with pytest.raises(ChangedError):
            digest_checkpoint(checkpoint, workers)


def test_a_disk_that_fails_is_our_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with TensorFile.open(path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(InputError, match="cannot be read at byte 100: Input/output error"):
            file.read_into(100, bytearray(1))


def test_closing_twice_is_harmless_and_a_refused_file_is_closed(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    checkpoint.close()
    checkpoint.close()
    path.write_bytes(b"no")
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(InputError):
            Checkpoint.open(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


MANY_FILES = """
import resource, sys
from pathlib import Path
from crdtmerge.weights.checkpoint import Checkpoint
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
open_ = [Checkpoint.open(Path(sys.argv[1])) for _ in range(100)]
"""


def test_more_shards_than_the_soft_limit_on_open_files_are_opened(path: Path) -> None:
    hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    subprocess.run([sys.executable, "-c", MANY_FILES, str(path), str(hard)], check=True)
