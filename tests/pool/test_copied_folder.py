"""A folder that was copied, moved or put back from a backup: never two different operations in one place of a chain."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from crdtmerge.pool.replica import Replica
from crdtmerge.replica.op import Op
from crdtmerge.store import incarnation
from tests.pool.replicas import contents, exchange, founded, model
from tests.pool.test_many_processes import check_chains


def _say(folder: Path, number: int) -> Op:
    """One more operation of a replica; each number says something else."""
    with Replica.open(folder) as replica:
        return replica.opset.op(replica.retract(bytes([number]) * 32).ops[0])


def _copy(folder: Path, new: Path) -> Path:
    subprocess.run(["cp", "-a", folder, new], check=True)
    return new


def _copy_in_place(backup: Path, folder: Path) -> None:
    """Every file's old bytes into the file that stands there: the inodes stay."""
    for path in folder.rglob("*"):
        if path.is_file() and not (backup / path.relative_to(folder)).exists():
            path.unlink()
    subprocess.run(["cp", "-r", f"{backup}/.", folder], check=True)


def _state() -> Path:
    """The second places of all replicas of this test."""
    return Path(os.environ["XDG_STATE_HOME"]) / "crdtmerge" / "replicas"


def _check_together(*folders: Path) -> None:
    """All that was ever said fits together on every replica."""
    replicas = [Replica.open(folder) for folder in folders]
    exchange(*replicas)
    for one in replicas:
        check_chains(one)
        assert one.state_root == replicas[0].state_root
        one.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A replica that has said three things."""
    with founded(tmp_path / "pool"):
        pass
    for n in range(3):
        _say(tmp_path / "pool", n)
    return tmp_path / "pool"


def test_a_folder_that_stays_goes_on_in_one_chain(folder: Path) -> None:
    first, second = _say(folder, 10), _say(folder, 11)
    assert (second.incarnation, second.seq, second.prev) == (first.incarnation, first.seq + 1, first.id)
    assert second.seq == 5


def test_a_folder_that_was_moved_goes_on_in_its_chain(folder: Path, tmp_path: Path) -> None:
    before = _say(folder, 10)
    folder.rename(tmp_path / "moved")
    after = _say(tmp_path / "moved", 11)
    assert (after.incarnation, after.seq) == (before.incarnation, before.seq + 1)
    (tmp_path / "deep").mkdir()
    (tmp_path / "moved").rename(tmp_path / "deep" / "er")
    assert _say(tmp_path / "deep" / "er", 12).seq == after.seq + 1


def test_a_copy_begins_a_chain_of_its_own_and_the_original_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    before = _say(folder, 10)
    copy = _copy(folder, tmp_path / "copy")
    there, here = _say(copy, 11), _say(folder, 12)
    assert there.incarnation != before.incarnation == here.incarnation
    assert (there.seq, here.seq) == (1, before.seq + 1)
    assert _say(copy, 13).prev == there.id
    assert _say(folder, 14).prev == here.id
    _check_together(folder, copy)


def test_copies_of_copies_never_meet(folder: Path, tmp_path: Path) -> None:
    folders = [folder]
    number = 10
    for n in range(5):
        folders.append(_copy(folders[n], tmp_path / f"copy{n}"))
        for one in folders:
            _say(one, number)
            number += 1
    _check_together(*folders)


@pytest.mark.parametrize("how", ["replaced", "in place", "removed first"])
@pytest.mark.parametrize("meanwhile", [0, 1, 3])
def test_a_backup_that_was_put_back_begins_a_new_chain(folder: Path, tmp_path: Path, how: str, meanwhile: int) -> None:
    _say(folder, 10)
    backup = _copy(folder, tmp_path / "backup")
    later = [_say(folder, 20 + n) for n in range(meanwhile)]
    witness = _copy(folder, tmp_path / "witness")
    if how == "in place":
        _copy_in_place(backup, folder)
    elif how == "replaced":
        folder.rename(tmp_path / "aside")
        _copy(backup, folder)
    else:
        shutil.rmtree(folder)
        _copy(backup, folder)
    after = _say(folder, 30)
    if meanwhile:
        assert after.incarnation != later[0].incarnation
        assert after.seq == 1
    assert _say(folder, 31).prev == after.id
    _check_together(folder, witness)


def test_a_backup_that_was_put_back_twice_never_forks(folder: Path, tmp_path: Path) -> None:
    backup = _copy(folder, tmp_path / "backup")
    witnesses = []
    for n in range(3):
        _say(folder, 10 + n)
        witnesses.append(_copy(folder, tmp_path / f"witness{n}"))
        _copy_in_place(backup, folder)
    _say(folder, 20)
    _check_together(folder, *witnesses)


def test_without_its_second_place_a_replica_begins_a_new_chain(folder: Path) -> None:
    before = _say(folder, 10)
    shutil.rmtree(_state())
    after = _say(folder, 11)
    assert after.incarnation != before.incarnation
    assert _say(folder, 12).prev == after.id
    _check_together(folder)


@pytest.mark.parametrize("said", ["", "x", "abc def", "00 1", "\0\0\0", "é" * 3, f"{'ab' * 16} 99", " ", "1\n2\n3"])
def test_a_second_place_that_says_nothing_sensible_begins_a_new_chain(folder: Path, said: str) -> None:
    before = _say(folder, 10)
    (place,) = _state().iterdir()
    place.write_text(said)
    assert _say(folder, 11).incarnation != before.incarnation
    _check_together(folder)


def test_a_second_place_that_is_no_text_begins_a_new_chain(folder: Path) -> None:
    before = _say(folder, 10)
    (place,) = _state().iterdir()
    place.write_bytes(b"\xff\xfe\xfd")
    assert _say(folder, 11).incarnation != before.incarnation


def test_where_nothing_can_be_remembered_every_operation_begins_a_chain(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    incarnations = {_say(folder, 10 + n).incarnation for n in range(3)}
    assert len(incarnations) == 3
    _check_together(folder)


def test_a_second_place_that_could_not_be_written_is_not_believed_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = _copy(folder, tmp_path / "backup")
    with monkeypatch.context() as full:

        def write_text(path: Path, text: str) -> int:
            raise OSError(28, "No space left on device")

        full.setattr(Path, "write_text", write_text)
        _say(folder, 10)
    witness = _copy(folder, tmp_path / "witness")
    _copy_in_place(backup, folder)
    _say(folder, 11)
    _check_together(folder, witness)


def test_another_machine_begins_a_chain_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _say(folder, 10)
    monkeypatch.setattr(incarnation, "_machine", lambda: "another")
    after = _say(folder, 11)
    assert after.incarnation != before.incarnation
    assert _say(folder, 12).prev == after.id
    _check_together(folder)


def test_another_user_s_state_folder_begins_a_chain_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _say(folder, 10)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    after = _say(folder, 11)
    assert after.incarnation != before.incarnation
    assert _say(folder, 12).seq == 2


def test_an_open_replica_whose_folder_is_put_back_under_it_never_forks(folder: Path, tmp_path: Path) -> None:
    backup = _copy(folder, tmp_path / "backup")
    with Replica.open(folder) as replica:
        replica.retract(bytes([10]) * 32)
        witness = _copy(folder, tmp_path / "witness")
    _copy_in_place(backup, folder)
    _say(folder, 11)
    _check_together(folder, witness)


def test_a_reader_begins_no_chain(folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path / "copy")
    names = {path.name for path in _state().iterdir()}
    with Replica.open(copy) as replica:
        assert len(list(replica.opset.ops())) == 3
        assert replica.fsck().clean
    assert {path.name for path in _state().iterdir()} == names


def test_a_copy_holds_the_tensors_too(folder: Path, tmp_path: Path) -> None:
    with Replica.open(folder) as replica:
        added = replica.add(model(1))
    copy = _copy(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    with Replica.open(copy) as replica:
        assert contents(replica) == {added.id}
        assert replica.fsck().clean
        replica.resolve_to(tmp_path / "out")


@pytest.mark.parametrize("seed", range(6))
def test_no_history_of_copies_moves_and_backups_ever_forks(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with founded(tmp_path / "0"):
        pass
    living, every, number = [tmp_path / "0"], [tmp_path / "0"], 1
    for step in range(25):
        one = rng.choice(living)
        what = rng.choice(["say", "say", "say", "copy", "back", "move", "forget"])
        if what == "say":
            _say(one, number)
            number += 1
        elif what == "copy":
            living.append(_copy(one, tmp_path / f"copy{step}"))
            every.append(living[-1])
        elif what == "back":
            every.append(_copy(one, tmp_path / f"witness{step}"))
            other = rng.choice(every)
            if other != one:
                _copy_in_place(other, one)
        elif what == "move":
            new = tmp_path / f"moved{step}"
            one.rename(new)
            living[living.index(one)] = every[every.index(one)] = new
        elif rng.random() < 0.3 and _state().exists():
            shutil.rmtree(_state())
    try:
        _check_together(*every)
    except AssertionError as fault:
        raise AssertionError(f"seed {seed}") from fault
