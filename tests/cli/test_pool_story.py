"""Stories of people who share a pool by files, each with programs, a machine and keys of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from crdtmerge.keys import Key
from crdtmerge.pool import exchange
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.contribution import Says
from crdtmerge.replica.op import Add, Op, signed
from crdtmerge.store import bundle
from tests.cli.folders import document, refused, saved, told
from tests.resolve import models
from tests.resolve.running import Ran, here, process

Said = dict[str, Any]


class Person(NamedTuple):
    """Someone with a machine: a replica's folder, a home that no one else sees, and how programs run there."""

    folder: Path
    home: Path
    apart: bool = False

    def run(self, *arguments: object) -> Ran:
        """A command on the replica: in a process of its own where people are apart."""
        if self.apart:
            return process(*arguments, "-C", self.folder, settings=self._settings)
        return self.looks(*arguments)

    def looks(self, *arguments: object) -> Ran:
        """A command in this process: where it only looks, that is all the same."""
        with patch.dict(os.environ, self._settings):
            return here(*arguments, "-C", self.folder)

    @property
    def _settings(self) -> dict[str, str]:
        return {"XDG_STATE_HOME": str(self.home), "CRDTMERGE_CACHE": str(self.home / "cache")}

    def asks(self, *arguments: object) -> Any:
        """The document that a command answers with."""
        looking = arguments[0] in ("status", "log", "show") or arguments[:2] == ("keys", "show")
        return document((self.looks if looking else self.run)(*arguments, "--json"))

    def begins(self, *options: object) -> str:
        """Begin a replica; the key that signs there."""
        self.home.mkdir()
        with patch.dict(os.environ, self._settings):
            return str(document(here("init", self.folder, *options, "--json"))["actor"])

    def adds(self, model: Path, *options: object) -> str:
        """Add a model; its id."""
        return str(self.asks("add", model, *options)["id"])

    def gives(self, other: Person) -> Said:
        """Hand everything over by a file."""
        file = self.home / "state.safetensors"
        file.unlink(missing_ok=True)
        told(self.run("export", "-o", file))
        joined: Said = other.asks("import", file)
        return joined

    @property
    def status(self) -> Said:
        """What `status --json` says."""
        found: Said = self.asks("status")
        return found

    @property
    def visible(self) -> list[str]:
        """The ids of what is visible."""
        return [one["id"] for one in self.status["visible"]]


class Two(NamedTuple):
    """Two people, their keys, and the models they have."""

    a: Person
    b: Person
    a_key: str
    b_key: str
    models: dict[str, Path]


@pytest.fixture
def two(tmp_path: Path) -> Callable[..., Two]:
    """Begins a pool at A's and joins B to it."""

    def begin(*options: object, apart: bool = False) -> Two:
        found = saved(tmp_path)
        a, b = (Person(tmp_path / who / "pool", tmp_path / who, apart) for who in "AB")
        a_key = a.begins("--base", found["base"], "--strategy", "task_arithmetic", *options)
        told(a.run("export", "-o", tmp_path / "begin.safetensors"))
        b_key = b.begins("--from", tmp_path / "begin.safetensors")
        return Two(a, b, a_key, b_key, found)

    return begin


def agree(one: Person, other: Person) -> None:
    """Both hold one state."""
    keys = ("pool", "root", "state_root", "recipe", "ops", "visible", "hidden", "forks")
    assert {key: one.status[key] for key in keys} == {key: other.status[key] for key in keys}


def test_a_stranger_contributes_once_a_founder_granted_it(two: Callable[..., Two], tmp_path: Path) -> None:
    a, b, a_key, b_key, found = two("--members-only", apart=True)
    before = b.status
    granting = f"A founder makes it one with: crdtmerge keys grant {b_key} --role"
    refused(b.run("add", found["b"]), f"add by {b_key[:16]}", "a member of the pool", f"{granting} member\n")
    assert "keys grant" not in refused(
        b.run("keys", "grant", b_key), f"grant by {b_key[:16]}", "a founder of the pool", "the key was no member"
    )
    assert b.asks("keys", "show")["rank"] == "nobody"
    assert b.status == before
    one = a.adds(found["a"], "--note", "from A")
    told(a.run("keys", "grant", b_key), "is a member now")
    assert a.gives(b)["new_ops"] == 2
    other = b.adds(found["b"], "--weight", "2", "--note", "from B")
    refused(b.run("recipe", "linear"), f"recipe by {b_key[:16]}", "a curator of the pool", f"{granting} curator\n")
    assert b.gives(a)["new_ops"] == 1
    agree(a, b)
    text = told(a.looks("status"), f'{other[:12]}  weight 2  by {b_key[:12]}  "from B"')
    assert f'{one[:12]}  weight 1  by you  "from A"' in text
    untrusted = {"trusted": False, "url": None}
    ranks = [{"key": a_key, "rank": "founder", **untrusted}, {"key": b_key, "rank": "member", **untrusted}]
    assert sorted(a.asks("keys", "show")["keys"], key=str) == sorted(ranks, key=str)
    assert a.asks("resolve", "-o", tmp_path / "at-a")["merged"]
    assert b.asks("resolve", "-o", tmp_path / "at-b")["merged"]
    for name in ("model.safetensors", "receipt.json"):
        assert (tmp_path / "at-a" / name).read_bytes() == (tmp_path / "at-b" / name).read_bytes()


def test_one_removes_ones_own_and_is_told_who_can_remove_the_rest(two: Callable[..., Two]) -> None:
    a, b, a_key, _, found = two()
    one = a.adds(found["a"])
    a.gives(b)
    before = b.status
    words = (f"was added by {a_key[:16]}", "only they and curators can remove it")
    refused(b.run("remove", one[:8], "--reason", "I do not like it"), one[:16], *words)
    assert b.run("remove", one, "--json").json["error"]["kind"] == "NotAllowedError"
    assert b.status == before
    assert b.adds(found["a"]) == one
    told(b.run("remove", one), f"removed {one}", f"  it stays visible: added by {a_key[:12]}\n")
    assert b.visible == [one]
    b.adds(found["a"])
    ended = b.asks("remove", one)
    assert (ended["visible"], ended["adders"]) == (True, [a_key])
    b.adds(found["a"])
    b.gives(a)
    assert told(a.run("remove", one)) == f"removed {one}\n"  # a curator ends everyone's
    a.gives(b)
    assert a.visible == b.visible == []
    agree(a, b)


def test_what_is_added_elsewhere_meanwhile_outlives_a_removal(two: Callable[..., Two]) -> None:
    a, b, _, b_key, found = two()
    one = a.adds(found["a"])
    a.gives(b)
    assert a.run("remove", one).code == 0
    b.adds(found["a"])
    b.gives(a)
    a.gives(b)
    assert a.visible == b.visible == [one]
    assert a.status["visible"][0]["adders"] == [b_key]
    agree(a, b)


def test_what_is_retracted_stays_hidden_from_those_who_add_it_meanwhile(two: Callable[..., Two]) -> None:
    a, b, a_key, _, found = two(apart=True)
    one, other = a.adds(found["a"]), a.adds(found["b"])
    a.gives(b)
    told(a.run("retract", one, "--reason", "poisoned"), f"retracted {one}")
    assert b.adds(found["a"], "--note", "it is so good") == one
    assert one in b.visible
    b.gives(a)
    a.gives(b)
    agree(a, b)
    assert a.visible == b.visible == [other]
    for person, who in ((a, "you"), (b, a_key[:12])):
        (retract,) = (op for op in person.asks("log") if op["kind"] == "retract")
        assert (retract["author"], retract["content"], retract["reason"]) == (a_key, one, "poisoned")
        assert person.status["hidden"] == [{"id": one, "why": "retracted", "by": retract["id"]}]
        told(person.looks("status"), f'{one[:12]}  hidden: retracted by {who} because "poisoned"\n')
        (line,) = (line for line in told(person.looks("log")).splitlines() if " retract " in line)
        assert line.split()[:4] == [retract["id"][:12], *retract["seen"].split(), who]
        assert 'because "poisoned"' in line
    told(b.run("add", found["a"]), "hidden all the same: it is retracted")
    refused(b.run("retract", one, "--undo"), "was retracted by another key")
    assert a.run("retract", one, "--undo", "--reason", "a mistake").code == 0
    a.gives(b)
    b.gives(a)
    assert a.visible == b.visible == sorted([one, other])
    agree(a, b)


def test_a_member_retracts_only_what_it_added_itself(two: Callable[..., Two]) -> None:
    a, b, a_key, b_key, found = two()
    one = a.adds(found["a"])
    a.gives(b)
    b.adds(found["a"])
    told(b.run("retract", one), f"retracted {one}", f"  it stays visible: added by {a_key[:12]}\n")
    assert b.status["visible"][0]["adders"] == [a_key]
    b.gives(a)
    assert a.visible == [one]
    assert a.status["visible"][0]["adders"] == [a_key]
    assert b_key != a_key


def test_show_says_of_each_operation_whether_it_is_void(two: Callable[..., Two]) -> None:
    a, b, _, b_key, found = two()
    one = a.adds(found["a"])
    a.gives(b)
    b.adds(found["a"])
    assert a.run("keys", "revoke", b_key).code == 0
    b.gives(a)
    assert a.visible == [one]
    told(a.looks("log"), "void: ")
    told(a.looks("show", one), "void")


def test_a_key_that_revoked_twice_is_named_once(two: Callable[..., Two]) -> None:
    a, b, a_key, b_key, found = two()
    for _ in range(2):
        assert a.run("keys", "revoke", b_key).code == 0
    b.adds(found["b"])
    b.gives(a)
    assert [op["void"] for op in a.asks("log") if op["kind"] == "add"] == [f"its key was revoked by {a_key[:12]}"]


def test_what_another_added_is_not_replaced_in_silence(two: Callable[..., Two]) -> None:
    a, b, *_, found = two()
    one = a.adds(found["a"])
    a.gives(b)
    refused(b.run("add", found["b"], "--replaces", one), one[:12])


def test_what_a_revoked_key_does_later_is_void_and_the_log_says_so(two: Callable[..., Two]) -> None:
    a, b, a_key, b_key, found = two("--members-only")
    assert a.run("keys", "grant", b_key).code == 0
    a.gives(b)
    before = b.adds(found["b"])
    b.gives(a)
    told(a.run("keys", "revoke", b_key, "--reason", "key was stolen"), f"{b_key} is revoked")
    later = b.adds(found["c"])
    b.gives(a)
    assert a.visible == [before]
    (hidden,) = a.status["hidden"]
    assert (hidden["id"], hidden["why"]) == (later, "revoked")
    told(a.looks("status"), f"{later[:12]}  hidden: revoked")
    voids = {op["content"]: op["void"] for op in a.asks("log") if op["kind"] == "add"}
    assert voids == {before: None, later: f"its key was revoked by {a_key[:12]}"}
    told(a.looks("log"), f"void: its key was revoked by {a_key[:12]}", 'because "key was stolen"')
    told(a.looks("show", hidden["by"]), "void", f"its key was revoked by {a_key[:12]}")
    a.gives(b)
    agree(a, b)
    refused(b.run("add", found["a"]), f"add by {b_key[:16]}", "no member")
    assert {one["key"]: one["rank"] for one in a.asks("keys", "show")["keys"]} == {a_key: "founder", b_key: "nobody"}


def test_status_names_who_revoked_the_key_of_what_is_hidden(two: Callable[..., Two]) -> None:
    a, b, a_key, b_key, found = two()
    assert a.run("keys", "revoke", b_key, "--reason", "key was stolen").code == 0
    later = b.adds(found["b"])
    b.gives(a)
    a.gives(b)
    told(a.looks("status"), f'{later[:12]}  hidden: revoked by you because "key was stolen"\n')
    told(b.looks("status"), f'{later[:12]}  hidden: revoked by {a_key[:12]} because "key was stolen"\n')


def test_replicas_of_two_pools_refuse_each_other_and_name_both(two: Callable[..., Two], tmp_path: Path) -> None:
    a, b, *_, found = two()
    stranger = Person(tmp_path / "C" / "pool", tmp_path / "C")
    stranger.begins("--base", found["base"])
    stranger.adds(found["c"])
    told(stranger.run("export", "-o", tmp_path / "strange.safetensors"))
    before = b.status
    ran = b.run("import", tmp_path / "strange.safetensors", "--json")
    assert ran.json["error"]["kind"] == "PoolMismatchError"
    refused(ran, before["pool"], stranger.status["pool"])
    assert b.status == before
    assert a.status["pool"] == before["pool"]


def test_a_copied_folder_goes_on_as_another_and_is_no_fork(two: Callable[..., Two], tmp_path: Path) -> None:
    a, b, *_, found = two()
    b.adds(found["a"])
    copy = Person(tmp_path / "B" / "copy", tmp_path / "B")
    shutil.copytree(b.folder, copy.folder)
    b.adds(found["b"])
    copy.adds(found["c"])
    b.gives(a)
    copy.gives(a)
    assert len(a.visible) == 3
    assert a.status["forks"] == []
    assert len({op["incarnation"] for op in a.asks("log")}) == 2


def forked(person: Person, content: str, file: Path) -> tuple[Op, Op]:
    """Two operations of one key for one place of its chain, which no program of ours writes: as a bundle."""
    key = Key.load(person.folder / "key.pem")
    with Replica.open(person.folder) as replica:
        deps, height = tuple(sorted(replica.heads)), 1 + max(replica.opset.op(one).height for one in replica.heads)
        one, other = (
            signed(key, replica.pool_id, b"f" * 16, 1, None, deps, height, Add(bytes.fromhex(content), Says(note=note)))
            for note in ("one", "other")
        )
        manifests = {content: found for content in replica.opset.contents() if (found := replica.manifest(content))}
        said = bundle.Contents(replica.genesis, [*replica.opset.ops(), one, other], manifests, {})
    file.write_bytes(bundle.to_bytes(said, ()))
    assert len(exchange.contents_of(file).ops) == len(said.ops)
    return one, other


def test_a_fork_is_told_with_its_evidence_and_hides_nothing(two: Callable[..., Two], tmp_path: Path) -> None:
    a, b, _, b_key, found = two()
    one, other = a.adds(found["a"]), b.adds(found["b"])
    b.gives(a)
    a.gives(b)
    before = a.visible
    pair = forked(b, other, tmp_path / "fork.safetensors")
    assert a.asks("import", tmp_path / "fork.safetensors")["new_ops"] == 2
    ids = sorted(op.id.hex() for op in pair)
    assert a.status["forks"] == [{"key": b_key, "ops": ids}]
    told(a.looks("status"), f"WARNING: key {b_key[:12]} signed two operations for one place", *(i[:12] for i in ids))
    assert a.visible == before == sorted([one, other])
    assert a.asks("fsck")["clean"] is True
    a.gives(b)
    agree(a, b)


def test_a_way_over_a_third_brings_all_of_it(two: Callable[..., Two], tmp_path: Path) -> None:
    a, b, *_, found = two()
    a.adds(found["a"])
    b.adds(found["b"])
    c = Person(tmp_path / "C" / "pool", tmp_path / "C")
    told(a.run("export", "-o", tmp_path / "to-c.safetensors"))
    c.begins("--from", tmp_path / "to-c.safetensors")
    b.gives(c)
    c.gives(a)
    c.gives(b)
    agree(a, b)
    agree(b, c)
    digests = {person.asks("resolve", "-o", person.home / "out")["output_digest"] for person in (a, b, c)}
    assert len(digests) == 1
    assert len({models.tree(person.home / "out")["receipt.json"][0] for person in (a, b, c)}) == 1
