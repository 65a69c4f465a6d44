"""An output appears whole or not at all, and replaces nothing but an earlier output of ours."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from crdtmerge.errors import OutputError
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.writer import Output, plan_output
from tests.weights.small_checkpoints import RECEIPT, random_tensors, save, specs, tree

OLD, NEW = random_tensors(1), random_tensors(2)
NEW_RECEIPT = RECEIPT.replace(b"}", b', "new": true}')
KINDS = pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])


def place(tmp_path: Path, folder: bool) -> Path:
    return tmp_path / ("merged" if folder else "merged.safetensors")


def start(path: Path, *, folder: bool, shard_bytes: int = 200) -> Output:
    """An output with every tensor of NEW written, and its receipt."""
    layout = plan_output(specs(NEW), single_file=None if folder else path.name, shard_bytes=shard_bytes)
    output = Output(path, layout, folder=folder)
    for name, (_, _, data) in NEW.items():
        output.write(name, 0, data[:5])
        output.write(name, min(5, len(data)), data[5:])
    output.add("receipt.json" if folder else f"{path.name}.receipt.json", NEW_RECEIPT)
    return output


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def held(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes as a reader sees them."""
    found = {}
    with Checkpoint.open(path) as checkpoint:
        for name, entry in checkpoint.entries.items():
            buffer = bytearray(entry.nbytes)
            checkpoint.read_into(name, 0, buffer)
            found[name] = bytes(buffer)
    return found


def data_of(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, bytes]:
    return {name: data for name, (_, _, data) in sorted(tensors.items())}


@KINDS
def test_nothing_is_at_the_place_before_commit_and_all_of_it_after(folder: bool, tmp_path: Path) -> None:
    path = place(tmp_path, folder)
    with start(path, folder=folder) as output:
        assert not path.exists()
        assert output.commit() >= 0
        assert held(path) == data_of(NEW)
    assert [name for name in listing(tmp_path) if name.startswith(".")] == []


@KINDS
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaving_without_commit_leaves_nothing(folder: bool, error: type[BaseException] | None, tmp_path: Path) -> None:
    def work() -> None:
        with start(place(tmp_path, folder), folder=folder):
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert tree(tmp_path) == {}
    assert listing(tmp_path) == []


@KINDS
def test_an_earlier_output_of_ours_is_replaced(folder: bool, tmp_path: Path) -> None:
    path = save(place(tmp_path, folder), OLD, folder=folder)
    with start(path, folder=folder) as output:
        assert held(path) == data_of(OLD)
        output.commit()
    assert held(path) == data_of(NEW)
    assert len(listing(tmp_path)) == (1 if folder else 2)


@KINDS
def test_an_earlier_output_of_ours_survives_an_abort(folder: bool, tmp_path: Path) -> None:
    path = save(place(tmp_path, folder), OLD, folder=folder)
    before = tree(tmp_path)
    start(path, folder=folder).abort()
    assert tree(tmp_path) == before


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with start(tmp_path / "merged", folder=True) as output:
        output.commit()
    assert held(tmp_path / "merged") == data_of(NEW)


FOREIGN = {
    "a folder of others": (True, {"merged/model.safetensors": b"x"}),
    "a receipt that is not JSON": (True, {"merged/receipt.json": b"crdtmerge"}),
    "a receipt of another program": (True, {"merged/receipt.json": b'{"format": "mergekit"}'}),
    "a receipt that is a list": (True, {"merged/receipt.json": b'["crdtmerge"]'}),
    "a file in place of a folder": (True, {"merged": b"x"}),
    "a file of others": (False, {"merged.safetensors": b"x"}),
    "a file with another's receipt": (False, {"merged.safetensors": b"x", "merged.safetensors.receipt.json": b"{}"}),
    "a folder in place of a file": (False, {"merged.safetensors/x": b""}),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_crdtmerge_did_not_write_is_refused_and_untouched(case: str, tmp_path: Path) -> None:
    folder, files = FOREIGN[case]
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(OutputError, match="exists and was not written by crdtmerge; choose another -o or remove it"):
        start(place(tmp_path, folder), folder=folder)
    assert tree(tmp_path) == files


@pytest.mark.parametrize(
    "name", ["eval.txt", "checkpoint-500/model.safetensors", "optimizer.pt", "model-1.safetensors"]
)
def test_an_output_that_others_have_added_to_is_not_deleted(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "merged", OLD, folder=True)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"work of days")
    with pytest.raises(OutputError, match="now holds what crdtmerge did not write"):
        start(path, folder=True)
    assert (path / name).read_bytes() == b"work of days"


@KINDS
def test_a_link_at_the_place_is_refused(folder: bool, tmp_path: Path) -> None:
    real = save(tmp_path / "real", OLD, folder=True) if folder else save(tmp_path / "real.safetensors", OLD)
    place(tmp_path, folder).symlink_to(real.name)
    with pytest.raises(OutputError, match="was not written by crdtmerge"):
        start(place(tmp_path, folder), folder=folder)


@KINDS
def test_a_missing_parent_is_refused(folder: bool, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        start(place(tmp_path / "nowhere", folder), folder=folder)


def test_a_foreign_file_beside_a_single_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.inputs.json").write_bytes(b"mine")
    with (
        start(tmp_path / "m.safetensors", folder=False) as output,
        pytest.raises(OutputError, match="exists beside it"),
    ):
        output.add("m.safetensors.inputs.json", b"ours")
    assert tree(tmp_path) == {"m.safetensors.inputs.json": b"mine"}


def test_what_comes_to_stand_there_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    for folder in (True, False):
        path = place(tmp_path, folder)
        with start(path, folder=folder) as output:
            (path.mkdir() or (path / "x").write_bytes(b"x")) if folder else path.write_bytes(b"x")  # type: ignore[func-returns-value]
            with pytest.raises(OutputError):
                output.commit()
    assert tree(tmp_path) == {"merged/x": b"x", "merged.safetensors": b"x"}


def test_file_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    with start(tmp_path / "m.safetensors", folder=False) as output:
        output.add("m.safetensors.Inputs.json", b"")
        with pytest.raises(OutputError, match="differs from another only in case"):
            output.add("m.safetensors.inputs.json", b"")


def test_too_little_space_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 12345))
    with pytest.raises(OutputError, match=r"needs \d+ bytes; its disk has 12345 free"):
        start(tmp_path / "merged", folder=True)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "call", ["os.pwrite", "os.ftruncate", "os.fsync", "os.mkdir", "crdtmerge.weights.writer.open_file"]
)
def test_a_full_disk_is_our_error_and_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(call, full)

    def work() -> None:
        with start(tmp_path / "merged", folder=True) as output:
            output.commit()

    with pytest.raises(OutputError, match=r"merged: cannot be written: No space left on device"):
        work()
    monkeypatch.undo()
    assert listing(tmp_path) == []


def test_writing_in_short_steps_writes_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:3], at))
    with start(tmp_path / "merged", folder=True) as output:
        output.commit()
    assert held(tmp_path / "merged") == data_of(NEW)


# Crashes


class Crash(BaseException):
    """The process ends here."""


@KINDS
@pytest.mark.parametrize("step", range(8))
def test_after_a_crash_at_any_step_no_receipt_speaks_of_other_weights(
    folder: bool, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(place(tmp_path, folder), OLD, folder=folder)
    output = start(path, folder=folder)
    output.add("inputs.json" if folder else f"{path.name}.inputs.json", b"new")
    steps = iter(range(8))

    def crashing(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **named: object) -> object:
            if next(steps, None) == step:
                raise Crash
            return real(*args, **named)

        monkeypatch.setattr(os, name, call)

    for name in ("rename", "unlink"):
        crashing(name)
    with contextlib.suppress(Crash):
        output.commit()
    monkeypatch.undo()
    if folder:
        assert any(held(at) in (data_of(OLD), data_of(NEW)) for at in tmp_path.iterdir())
        assert not path.exists() or held(path) in (data_of(OLD), data_of(NEW))
    else:
        receipt = path.with_name(f"{path.name}.receipt.json")
        weights = held(path)
        assert weights in (data_of(OLD), data_of(NEW))
        assert not receipt.exists() or receipt.read_bytes() == (RECEIPT if weights == data_of(OLD) else NEW_RECEIPT)
        complete = path.with_name(f"{path.name}.inputs.json").exists()
        assert complete or not receipt.exists() or receipt.read_bytes() == RECEIPT
    output.abort()


def test_an_error_between_the_renames_puts_the_earlier_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "merged", OLD, folder=True)
    before, rename = tree(tmp_path), os.rename

    def second_fails(one: Path, other: Path) -> None:
        if Path(other) == path and not Path(one).name.endswith("-old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(one, other)

    monkeypatch.setattr(os, "rename", second_fails)
    with start(path, folder=True) as output, pytest.raises(OutputError, match="cannot be written: Input/output error"):
        output.commit()
    assert tree(tmp_path) == before


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.weights.test_output import start
output = start(Path(sys.argv[2]), folder=sys.argv[3] == "folder")
print("ready", flush=True)
sys.stdin.read()
"""


@KINDS
def test_a_killed_process_leaves_the_place_as_it_was(folder: bool, tmp_path: Path) -> None:
    path = save(place(tmp_path, folder), OLD, folder=folder)
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), str(path), "folder" if folder else "file"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert held(path) == data_of(OLD)
    leftover = [name for name in listing(tmp_path) if not name.startswith("merged")]
    assert all(name.startswith(f".{path.name}.crdtmerge-") for name in leftover)


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    path = save(tmp_path / "merged", OLD, folder=True)
    assert (path / "model.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
