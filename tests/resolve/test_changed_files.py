"""Files that change while they are merged: an error, never a signal, and never an output of what nobody gave."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from crdtmerge.resolve import merging
from crdtmerge.weights.tensorfile import TensorFile
from tests.resolve import models
from tests.resolve.running import Ran, here

SHAPES = {"blocks.0.weight": (300, 517), "blocks.0.bias": (64,), "scale": ()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for who in ("base", "a", "b"):
        models.save(tmp_path / f"{who}.safetensors", models.state(who, "F32", SHAPES))
    return tmp_path


def between_the_passes(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Make a change after every input was read and named, and before any is merged."""
    fit = merging.fit

    def changing(*arguments: object) -> object:
        fitted = fit(*arguments)  # type: ignore[arg-type]
        change()
        return fitted

    monkeypatch.setattr(merging, "fit", changing)


def merge(folder: Path, *options: object, out: str = "out") -> Ran:
    inputs = (folder / "a.safetensors", folder / "b.safetensors", "--base", folder / "base.safetensors")
    return here("merge", *inputs, "--strategy", "ties", *options, "-o", folder / out, "--json")


def refused(folder: Path, ran: Ran, path: Path) -> str:
    """The message; nothing may have been left at the place of the output or beside it."""
    assert ran.code == 2, ran
    assert ran.json["error"]["kind"] == "ChangedError"
    assert {one.name for one in folder.iterdir()} <= {"a.safetensors", "b.safetensors", "base.safetensors", "other"}
    message: str = ran.json["error"]["message"]
    assert str(path) in message
    return message


def flip(path: Path, at: int = -100) -> None:
    """Change one bit in place: same file, same size."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def flip_and_put_times_back(path: Path, at: int = -100) -> None:
    status = path.stat()
    flip(path, at)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (status.st_mtime_ns, status.st_size)


def replace(path: Path) -> None:
    other = models.save(path.with_name("other"), models.state("x", "F32", SHAPES))
    other.rename(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, 1000),
    "truncated to nothing": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "overwritten in place": flip,
    "overwritten in place, times put back": flip_and_put_times_back,
    "replaced": replace,
    "removed": Path.unlink,
    "touched": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("rehash", [False, True])
@pytest.mark.parametrize("who", ["a", "base"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_the_passes_is_an_error(
    change: str, who: str, rehash: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / f"{who}.safetensors"
    between_the_passes(monkeypatch, lambda: CHANGES[change](path))
    refused(folder, merge(folder, *(["--rehash"] if rehash else [])), path)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_earlier_output_survives(out: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge(folder, "--set", "density=0.9", out=out).code == 0
    before = {name: data for name, (data, _) in models.tree(folder).items() if name.startswith("out")}
    between_the_passes(monkeypatch, lambda: flip(folder / "a.safetensors"))
    assert merge(folder, out=out).json["error"]["kind"] == "ChangedError"
    after = {name: data for name, (data, _) in models.tree(folder).items() if "out" in name}
    assert after == before


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("at", [-1, -100, -300_000])
def test_with_rehash_the_bytes_that_are_merged_are_those_that_named_the_input(
    at: int, kernels: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRDTMERGE_KERNELS", kernels)
    monkeypatch.setattr(TensorFile, "check_unchanged", lambda self: None)
    path = folder / "a.safetensors"
    between_the_passes(monkeypatch, lambda: flip(path, at))
    message = refused(folder, merge(folder, "--rehash"), path)
    assert "tensor 'blocks.0.weight'" in message or "tensor 'scale'" in message or "tensor 'blocks.0.bias'" in message
    assert "expected" in message


def test_the_test_above_would_fail_without_rehash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFile, "check_unchanged", lambda self: None)
    between_the_passes(monkeypatch, lambda: flip(folder / "a.safetensors"))
    assert merge(folder).code == 0


@pytest.mark.parametrize("options", [["--exclude", "blocks.0.weight"], []])
def test_tensors_that_are_copied_are_hashed_again_too(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for who in ("base", "a", "b"):
        models.save(tmp_path / f"{who}.safetensors", models.state(who))
    monkeypatch.setattr(TensorFile, "check_unchanged", lambda self: None)
    name = "blocks.0.weight" if options else models.BUFFER
    data = (tmp_path / "base.safetensors").read_bytes()
    values = models.state("base")[name].contiguous().view(-1).numpy().tobytes()
    at = data.index(values) - len(data)
    between_the_passes(monkeypatch, lambda: flip(tmp_path / "base.safetensors", at))
    message = refused(tmp_path, merge(tmp_path, "--rehash", *options), tmp_path / "base.safetensors")
    assert f"tensor '{name}'" in message


@pytest.mark.parametrize("shard", [1, 2])
def test_a_shard_that_changes_is_named(shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = models.save_shards(tmp_path / "a", models.state("a"), 2)
    b = models.save(tmp_path / "b.safetensors", models.state("b"))
    path = a / f"model-0000{shard}-of-00002.safetensors"
    between_the_passes(monkeypatch, lambda: flip(path, -1))
    ran = here("merge", a, b, "-o", tmp_path / "out", "--json")
    assert ran.json["error"]["kind"] == "ChangedError"
    assert str(path) in ran.json["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_while_it_is_first_read_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_into, path = TensorFile.read_into, folder / "a.safetensors"
    once = threading.Lock()

    def reading(self: TensorFile, offset: int, buffer: bytearray) -> None:
        read_into(self, offset, buffer)
        if self.path == path and once.acquire(blocking=False):
            flip(path)

    monkeypatch.setattr(TensorFile, "read_into", reading)
    assert "changed while it was read" in refused(folder, merge(folder), path)
    assert once.locked()


def test_what_the_cache_remembers_of_a_file_is_not_believed_of_another_in_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crdtmerge.weights import cache

    monkeypatch.setattr(cache, "RACY_NS", -(10**18))
    first = merge(folder).json
    again = merge(folder).json
    assert again["output_digest"] == first["output_digest"]
    assert again["bytes_read"] < first["bytes_read"], "the cache was asked"
    flip_and_put_times_back(folder / "a.safetensors")
    changed = merge(folder).json
    assert changed["root"] != first["root"]
    assert changed["bytes_read"] > again["bytes_read"]
