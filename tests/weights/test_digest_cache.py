"""The cache of digests never makes a result wrong, and never makes a run fail."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from crdtmerge.errors import ChangedError
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights import cache as cache_module
from crdtmerge.weights.cache import DigestCache, default_folder
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_checkpoint
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.tensorfile import Stamp
from tests.weights.small_checkpoints import random_tensors, save

TENSORS = random_tensors(6)
STAMP = Stamp(1, 2, 3, 4, 5)
FACTS = {"a": Facts(b"d" * 32, None), "größe": Facts(b"e" * 32, (3, 7))}


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "cache", now_ns=lambda: 1 << 62)


def run(path: Path, cache: DigestCache | None) -> tuple[dict[str, Facts], int]:
    """The facts, and how many bytes were read for them."""
    read: list[int] = []
    with Checkpoint.open(path) as checkpoint, Workers(2) as workers:
        return digest_checkpoint(checkpoint, workers, cache, read.append), sum(read)


def entries(cache: DigestCache) -> list[Path]:
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


def test_what_was_put_is_got(cache: DigestCache) -> None:
    cache.put(STAMP, FACTS)
    assert cache.get(STAMP) == FACTS


@pytest.mark.parametrize("field", Stamp._fields)
def test_every_part_of_the_stamp_counts(field: str, cache: DigestCache) -> None:
    cache.put(STAMP, FACTS)
    assert cache.get(STAMP._replace(**{field: 9})) is None


def test_a_second_run_reads_nothing_and_finds_the_same(cache: DigestCache, tmp_path: Path) -> None:
    path = save(tmp_path / "model", TENSORS, folder=True, shard_bytes=150)
    first, read = run(path, cache)
    assert read > 0
    assert run(path, cache) == (first, 0)
    assert run(path, None) == (first, read)


def test_a_changed_file_is_read_again(cache: DigestCache, tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", TENSORS)
    first, read = run(path, cache)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0" if path.read_bytes()[-1] else b"\1")
    second, again = run(path, cache)
    assert again == read
    assert second != first


def test_a_file_changed_less_than_two_seconds_ago_is_not_remembered(tmp_path: Path) -> None:
    for old, kept in ((1_999_999_999, 0), (2_000_000_000, 1), (-5, 0)):
        cache = DigestCache(tmp_path / str(old), now_ns=lambda old=old: 10**18 + old)  # type: ignore[misc]
        cache.put(STAMP._replace(mtime_ns=10**18), FACTS)
        cache.put(STAMP._replace(ctime_ns=10**18), FACTS)
        assert len(entries(cache)) == 2 * kept


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"x" * 40,
        None,
        hashlib.sha256(b"\xc1").digest() + b"\xc1",
        hashlib.sha256(b"\x91\x01").digest() + b"\x91\x01",
    ],
)
def test_a_damaged_entry_is_dropped_and_the_file_read(damage: bytes | None, cache: DigestCache, tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", TENSORS)
    first, read = run(path, cache)
    entry = entries(cache)[0]
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data if damage is None else damage)
    assert run(path, cache) == (first, read)
    assert run(path, cache) == (first, 0)


def test_a_file_that_changes_under_pass_1_is_an_error_and_not_remembered(cache: DigestCache, tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", TENSORS)
    with (
        Checkpoint.open(path) as checkpoint,
        Workers(1) as workers,
        pytest.raises(ChangedError, match="modification time was"),
    ):
        digest_checkpoint(checkpoint, workers, cache, lambda count: os.utime(path, ns=(1, 1)))
    assert entries(cache) == []


def test_a_remembered_file_that_changes_after_it_was_opened_is_an_error(cache: DigestCache, tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", TENSORS)
    run(path, cache)
    with Checkpoint.open(path) as checkpoint, Workers(1) as workers:
        os.utime(path, ns=(1, 1))
        with pytest.raises(ChangedError, match="modification time was"):
            digest_checkpoint(checkpoint, workers, cache)


def test_facts_of_other_tensors_are_not_believed(cache: DigestCache, tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", TENSORS)
    with Checkpoint.open(path) as checkpoint:
        cache.put(checkpoint.files[0].stamp, FACTS)
    assert run(path, cache)[1] > 0


def test_a_folder_that_cannot_be_used_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = save(tmp_path / "m.safetensors", TENSORS)
    cache = DigestCache(tmp_path / "file", now_ns=lambda: 1 << 62)
    assert run(path, cache) == run(path, cache)
    assert run(path, cache)[1] > 0


def test_a_folder_in_place_of_an_entry_is_no_entry(cache: DigestCache) -> None:
    cache.put(STAMP, FACTS)
    entry = entries(cache)[0]
    entry.unlink()
    entry.mkdir()
    assert cache.get(STAMP) is None
    cache.put(STAMP, FACTS)


def test_the_oldest_entries_beyond_the_limit_are_removed(cache: DigestCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "ENTRIES_MAX", 3)
    stamps = [STAMP._replace(inode=number) for number in range(6)]
    for number, stamp in enumerate(stamps):
        cache.put(stamp, FACTS)
        os.utime(entries(cache)[0].parent / cache._path(stamp).name, ns=(number, number))
    assert [cache.get(stamp) is not None for stamp in stamps] == [False] * 3 + [True] * 3
    assert len(entries(cache)) == 3


def test_the_folder_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRDTMERGE_CACHE", "one")
    monkeypatch.setenv("XDG_CACHE_HOME", "two")
    monkeypatch.setenv("HOME", "three")
    assert default_folder() == Path("one")
    monkeypatch.delenv("CRDTMERGE_CACHE")
    assert default_folder() == Path("two/crdtmerge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path("three/.cache/crdtmerge")
