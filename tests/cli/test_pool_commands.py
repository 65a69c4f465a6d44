"""The commands on a replica, one by one: what they say to people and to machines, what they refuse, what they leave."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crdtmerge.keys import Key
from tests.cli.folders import Pool, begun, document, files, is_id, refused, saved, told
from tests.resolve import models
from tests.resolve.running import environment, here

STRANGER = "ab" * 32
UNSEEN = "ff" * 32


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return begun(tmp_path)


def short(identity: str) -> str:
    return identity[:12]


# init


def test_init_says_which_pool_it_began_and_who_signs_there(tmp_path: Path) -> None:
    base = saved(tmp_path)["base"]
    told(
        here("init", tmp_path / "one", "--base", base, "--strategy", "ties"),
        f"in {tmp_path / 'one'}",
        f"merges by ties, base {short(document(here('inspect', base, '--json'))['id'])}",
        f"signs as {document(here('keys', 'show', '-C', tmp_path / 'one', '--json'))['key']}",
    )
    found = document(here("init", tmp_path / "two", "--like", base, "--dtype", "float16", "--json"))
    assert list(found) == ["pool", "actor", "folder", "recipe", "base", "ops"]
    assert is_id(found["pool"])
    assert is_id(found["actor"])
    assert (found["folder"], found["base"], found["ops"]) == (str(tmp_path / "two"), None, 0)
    assert (found["recipe"]["strategy"], found["recipe"]["dtype"]) == ("weight_average", "F16")


def test_init_takes_an_empty_folder_and_makes_a_missing_one(tmp_path: Path) -> None:
    base = saved(tmp_path)["base"]
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert here("init", tmp_path / name, "--base", base).code == 0
        assert files(tmp_path / name) >= {"pool.sqlite", "key.pem", "blobs"}


def test_init_signs_with_the_key_that_it_is_given(tmp_path: Path) -> None:
    base, key = saved(tmp_path)["base"], Key.from_seed(bytes(range(32)))
    key.save(tmp_path / "key.pem")
    found = document(here("init", tmp_path / "pool", "--base", base, "--key", tmp_path / "key.pem", "--json"))
    assert found["actor"] == key.public.hex()


def test_two_pools_that_begin_alike_with_one_key_are_one_pool(tmp_path: Path) -> None:
    base = saved(tmp_path)["base"]
    Key.from_seed(bytes(range(32))).save(tmp_path / "key.pem")
    options = ("--base", base, "--strategy", "ties", "--key", tmp_path / "key.pem", "--json")
    ids = {document(here("init", tmp_path / name, *options))["pool"] for name in "xy"}
    other = document(here("init", tmp_path / "z", *options, "--set", "density=0.3"))["pool"]
    assert len(ids) == 1
    assert other not in ids


def test_the_quota_of_init_is_kept_and_leaves_nothing_of_what_is_too_much(tmp_path: Path) -> None:
    found = saved(tmp_path)
    assert here("init", tmp_path / "pool", "--base", found["base"], "--quota", "5 kB").code == 0
    assert here("add", found["a"], "-C", tmp_path / "pool").code == 0
    before = files(tmp_path / "pool")
    words = ("quota", "5000", "crdtmerge gc")
    refused(here("add", found["b"], "-C", tmp_path / "pool"), *words)
    assert files(tmp_path / "pool") == before


# add


def test_add_says_what_it_added_and_how_much_of_it_was_new(pool: Pool) -> None:
    c = pool.models["c"]
    text = told(pool.run("add", c, "--weight", "0.50", "--role", "forget", "--task", "math", "--note", "by hand"))
    (one,) = (one for one in pool.status["visible"] if one["id"] not in (pool.a, pool.b))
    assert text.splitlines()[0] == f"added {one['id']}"
    assert 'weight 0.5, role forget, task "math"' in text
    assert "2.4 kB, 2.3 kB of it new here" in text
    assert (one["weight"], one["role"], one["task"], one["note"]) == ("0.5", "forget", "math", "by hand")


def test_add_answers_machines_with_these_keys(pool: Pool) -> None:
    found = document(pool.run("add", pool.models["c"], "--weight", "2", "--json"))
    assert list(found) == ["id", "op", "weight", "role", "visible", "bytes", "new_bytes"]
    assert is_id(found["id"])
    assert found["op"] == pool.ops[-1]["id"]
    assert (found["weight"], found["role"], found["visible"]) == ("2", "task", True)
    assert found["bytes"] == sum(tensor.nbytes for tensor in models.state("c").values())
    assert 0 < found["new_bytes"] <= found["bytes"]
    assert found["id"] == document(here("inspect", pool.models["c"], "--json"))["id"]


def test_what_a_second_add_leaves_out_stays_as_it_was(pool: Pool) -> None:
    assert pool.run("add", pool.models["a"], "--weight", "3", "--task", "code").code == 0
    again = document(pool.run("add", pool.models["a"], "--json"))
    assert (again["id"], again["weight"], again["new_bytes"]) == (pool.a, "3", 0)
    assert next(one["task"] for one in pool.status["visible"] if one["id"] == pool.a) == "code"


def test_one_that_takes_the_place_of_another_hides_it(pool: Pool) -> None:
    added = document(pool.run("add", pool.models["c"], "--replaces", short(pool.a), "--json"))
    assert pool.visible == sorted([pool.b, added["id"]])
    assert pool.status["hidden"] == [{"id": pool.a, "why": "replaced", "by": added["op"]}]
    assert told(pool.run("log")).endswith(f"add       {short(added['id'])}  in place of 1 ADD of its own\n")


# remove, retract


def test_remove_ends_what_is_known_and_an_add_brings_it_back(pool: Pool) -> None:
    assert told(pool.run("remove", pool.a[:8], "--reason", "stale")) == f"removed {pool.a}\n"
    assert pool.visible == [pool.b]
    told(pool.run("status"), "1 removed or replaced; `crdtmerge log` tells of them")
    assert pool.run("add", pool.models["a"]).code == 0
    found = document(pool.run("remove", pool.a, "--json"))
    assert found == {"id": pool.a, "ops": [pool.ops[-1]["id"]], "visible": False, "adders": []}


def test_retract_hides_for_good_until_it_is_undone(pool: Pool) -> None:
    assert told(pool.run("retract", pool.a, "--reason", "poisoned")) == f"retracted {pool.a}\n"
    told(pool.run("status"), f'{short(pool.a)}  hidden: retracted by you because "poisoned"\n')
    told(pool.run("add", pool.models["a"]), "hidden all the same: it is retracted")
    again = document(pool.run("add", pool.models["a"], "--json"))
    assert (again["visible"], again["weight"], again["role"]) == (False, None, None)
    assert pool.visible == [pool.b]
    undone = told(pool.run("retract", pool.a, "--undo"))
    assert undone == f"no longer retracted: {pool.a}\n  visible again: added by {short(pool.status['actor'])}\n"
    assert sorted([pool.a, pool.b]) == pool.visible


def test_retract_answers_machines_with_what_is_so_now(pool: Pool) -> None:
    keys = ["id", "ops", "visible", "adders"]
    done = document(pool.run("retract", pool.a, "--json"))
    undone = document(pool.run("retract", pool.a, "--undo", "--json"))
    assert list(done) == list(undone) == keys
    assert (done["visible"], done["adders"]) == (False, [])
    assert (undone["visible"], undone["adders"]) == (True, [pool.status["actor"]])


def test_a_full_id_may_be_retracted_before_it_is_seen(pool: Pool) -> None:
    unseen = document(here("inspect", pool.models["c"], "--json"))["id"]
    assert pool.run("retract", unseen, "--reason", "bad").code == 0
    told(pool.run("add", pool.models["c"]), "hidden all the same")
    assert pool.run("retract", unseen, "--undo").code == 0
    assert unseen in pool.visible


# status, log, show


def test_status_answers_machines_with_these_keys(pool: Pool) -> None:
    assert pool.run("remove", pool.b).code == 0
    found = pool.status
    assert list(found) == [
        *("pool", "actor", "root", "state_root", "recipe", "ops", "visible", "hidden", "forks"),
    ]
    assert all(is_id(found[key]) for key in ("pool", "actor", "root", "state_root"))
    assert (found["ops"], found["forks"]) == (3, [])
    assert found["visible"] == [
        {
            "id": pool.a,
            "weight": "1",
            "role": "task",
            "task": None,
            "kind": "full",
            "adders": [found["actor"]],
            "note": None,
            "ready": True,
        }
    ]
    assert found["hidden"] == [{"id": pool.b, "why": "removed", "by": pool.ops[-1]["id"]}]
    assert found["recipe"]["strategy"] == "ties"
    assert pool.run("status", "--json").out.count("\n") == 1


def test_status_tells_people_the_same(pool: Pool) -> None:
    assert pool.run("add", pool.models["a"], "--weight", "2", "--note", "mine").code == 0
    found, text = pool.status, told(pool.run("status"))
    assert found["pool"] in text
    assert found["root"] in text
    assert "ties" in text
    assert "density=0.2" in text
    assert f'{short(pool.a)}  weight 2  by you  "mine"' in text
    assert f"{short(pool.b)}  weight 1  by you" in text
    assert "(2 contributions, 3 operations)" in text


def test_the_log_has_causes_before_effects_and_says_who_what_and_why(pool: Pool) -> None:
    grant = ("keys", "grant", STRANGER)
    for one in (
        ("remove", pool.a, "--reason", "stale"),
        ("retract", pool.b, "--reason", "poisoned"),
        ("retract", pool.b, "--undo", "--reason", "a mistake"),
        grant,
        ("keys", "revoke", STRANGER, "--reason", "left"),
        ("recipe", "slerp"),
    ):
        assert pool.run(*one).code == 0
    lines = told(pool.run("log")).splitlines()
    kinds = ["add", "add", "remove", "retract", "unretract", "grant", "revoke", "recipe"]
    words = [short(pool.a), short(pool.b), "stale", "poisoned", "a mistake", "member", "left", "slerp"]
    assert len(lines) == len(kinds)
    for line, kind, word in zip(lines, kinds, words, strict=True):
        assert re.match(rf"[0-9a-f]{{12}}  \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\dZ  you +{kind} ", line), line
        assert word in line
    ops = pool.ops
    assert [op["kind"] for op in ops] == kinds
    assert [op["height"] for op in ops] == sorted(op["height"] for op in ops)
    shared = ["id", "seen", "author", "incarnation", "seq", "height", "kind"]
    assert [list(op) for op in ops] == [
        [*shared, *own, "void"]
        for own in (
            *([["content", "says", "hidden", "replaces"]] * 2),
            *(["contents", "targets", "reason"], ["content", "reason"], ["contents", "targets", "reason"]),
            *(["key", "role"], ["key", "heads", "reason"], ["recipe"]),
        )
    ]
    assert all(op["void"] is None for op in ops)
    assert told(pool.run("log", "-n", "2")).splitlines() == lines[-2:]
    assert document(pool.run("log", "--last", "1", "--json")) == ops[-1:]


def test_the_log_of_a_pool_without_operations_is_empty(tmp_path: Path) -> None:
    assert here("init", tmp_path / "pool", "--base", saved(tmp_path)["base"]).code == 0
    assert told(here("log", "-C", tmp_path / "pool")) == ""
    assert document(here("log", "-C", tmp_path / "pool", "--json")) == []


def test_show_tells_all_that_is_known_of_a_contribution(pool: Pool) -> None:
    assert pool.run("add", pool.models["a"], "--note", "again").code == 0
    found = document(pool.run("show", pool.a[:6], "--json"))
    assert list(found) == [
        *("id", "weight", "role", "task", "kind", "adders", "note", "hidden", "ready", "tensors", "bytes", "dtypes"),
        *("files", "history"),
    ]
    assert (found["id"], found["ready"], found["tensors"], found["note"]) == (pool.a, True, 5, "again")
    assert found["bytes"] == sum(tensor.nbytes for tensor in models.state("a").values())
    assert found["dtypes"] == ["F32", "I64"]
    assert found["history"] == [pool.ops[0], pool.ops[2]]
    text = told(pool.run("show", pool.a), 'note         "again"\n', pool.a, found["adders"][0], "2.4 kB", "history")
    assert all(short(op["id"]) in text for op in found["history"])


def test_show_says_why_a_contribution_is_hidden(pool: Pool) -> None:
    assert pool.run("remove", pool.a, "--reason", "stale").code == 0
    end = pool.ops[-1]["id"]
    assert document(pool.run("show", pool.a, "--json"))["hidden"] == f"removed by operation {short(end)}"
    told(pool.run("show", pool.a), f"removed by operation {short(end)}", 'because "stale"')


def test_show_tells_of_an_operation_as_the_log_does(pool: Pool) -> None:
    op = pool.ops[1]
    assert document(pool.run("show", op["id"][:10], "--json")) == op
    told(pool.run("show", op["id"]), op["id"], op["author"], op["content"])


def test_people_are_shown_the_first_of_many_and_machines_all(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crdtmerge.cli.looking.SHOWN_MAX", 1)
    assert told(pool.run("status"), "and 1 more (--json has all)").count("  weight 1  by you") == 1
    assert len(pool.visible) == 2
    for one in (pool.a, pool.b):
        assert pool.run("retract", one).code == 0
    assert told(pool.run("status"), "and 1 more (--json has all)").count("hidden: retracted") == 1
    assert len(pool.status["hidden"]) == 2


def save(path: Path, value: float) -> Path:
    """A model of one number."""
    save_file({"w": torch.tensor([float(value)])}, path)
    return path


# resolve, recipe


def test_resolve_answers_with_the_keys_of_merge_and_the_same_merge(pool: Pool, tmp_path: Path) -> None:
    paths = [pool.models[who] for who in "ab"]
    asked = ("merge", *paths, "--base", pool.models["base"], "--strategy", "ties", "--json")
    merged = document(here(*asked, "-o", tmp_path / "merged"))
    found = document(pool.run("resolve", "-o", tmp_path / "out", "--json"))
    assert set(found) == set(merged) | {"merged"}
    assert found["merged"] is True
    shared = ("merge_id", "root", "recipe_id", "strategy", "version", "class", "seed", "tensors", "output_digest")
    assert {key: found[key] for key in shared} == {key: merged[key] for key in shared}
    assert found["root"] == pool.status["root"]
    for name in ("model.safetensors", "receipt.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert document(here("verify", tmp_path / "out", "--json"))["answer"] == "same"


def test_an_output_that_is_the_merge_already_is_only_checked(pool: Pool, tmp_path: Path) -> None:
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        first = document(pool.run("resolve", "-o", out, "--json"))
        before = models.tree(tmp_path / "out")
        again = document(pool.run("resolve", "-o", out, "--json"))
        assert (again["merged"], again["bytes_written"]) == (False, 0)
        assert again["output_digest"] == first["output_digest"]
        told(pool.run("resolve", "-o", out), "unchanged: ", first["root"], first["merge_id"], first["output_digest"])
        assert models.tree(tmp_path / "out") == before


@pytest.mark.parametrize("harm", ["damaged", "removed"])
def test_an_output_that_was_harmed_is_merged_again(harm: str, pool: Pool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pool.run("resolve", "-o", out).code == 0
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    if harm == "damaged":
        (out / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert document(pool.run("resolve", "-o", out, "--json"))["merged"] is True
    assert (out / "model.safetensors").read_bytes() == whole


def test_resolve_follows_the_set_and_the_recipe(pool: Pool, tmp_path: Path) -> None:
    def digest() -> Any:
        return document(pool.run("resolve", "-o", tmp_path / "out", "--json"))["output_digest"]

    seen = [digest()]
    for change in (("add", pool.models["c"]), ("recipe", "task_arithmetic"), ("remove", pool.a)):
        assert pool.run(*change).code == 0
        seen.append(digest())
    assert len(set(seen)) == 4
    assert pool.run("add", pool.models["a"]).code == 0
    assert pool.run("remove", document(here("inspect", pool.models["c"], "--json"))["id"]).code == 0
    assert pool.run("recipe", "ties").code == 0
    assert digest() == seen[0]


def test_the_recipe_is_told_and_changed_as_a_whole(pool: Pool) -> None:
    found = document(pool.run("recipe", "--json"))
    status = pool.status
    assert found == status["recipe"] | {"id": found["id"]}
    text = told(pool.run("recipe"), "ties (version 1)", "density = 0.2")
    assert status["recipe"]["base"] in text
    changed = document(
        pool.run(
            "recipe", "task_arithmetic", "--set", "lambda=0.5", "--dtype", "bfloat16", "--exclude", "*bias", "--json"
        )
    )
    assert (changed["strategy"], changed["params"]["lambda"], changed["dtype"]) == (
        "task_arithmetic",
        "0.5",
        "BF16",
    )
    assert (changed["exclude"], changed["base"]) == (["*bias"], found["base"])
    assert changed == document(pool.run("recipe", "--json"))
    told(pool.run("recipe"), "lambda = 0.5", 'exclude "*bias"', "dtype = BF16")


# export, import


def test_a_state_travels_as_one_file(pool: Pool, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    told(pool.run("export", "-o", state), str(state), pool.status["pool"])
    found = document(here("init", tmp_path / "other", "--from", state, "--json"))
    assert (found["pool"], found["ops"]) == (pool.status["pool"], 2)
    other = Pool(tmp_path / "other", pool.models, pool.a, pool.b)
    assert {key: other.status[key] for key in ("root", "state_root")} == {
        key: pool.status[key] for key in ("root", "state_root")
    }
    assert all(one["ready"] for one in other.status["visible"])
    assert pool.run("add", pool.models["c"]).code == 0
    report = document(pool.run("export", "-o", tmp_path / "more.safetensors", "--json"))
    assert list(report) == ["out", "pool", "bytes", "ops", "heads"]
    assert report["bytes"] == (tmp_path / "more.safetensors").stat().st_size
    assert (report["ops"], report["heads"]) == (3, [pool.ops[-1]["id"]])
    joined = document(other.run("import", tmp_path / "more.safetensors", "--json"))
    assert list(joined) == ["new_ops", "new_bytes", "root"]
    assert (joined["new_ops"], joined["root"]) == (1, pool.status["root"])
    assert 0 < joined["new_bytes"] < report["bytes"]
    told(
        other.run("import", tmp_path / "more.safetensors"), "0 operations and 0 bytes that are new here", joined["root"]
    )


def test_equal_states_are_equal_files(pool: Pool, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert pool.run("export", "-o", one).code == 0
    assert here("init", tmp_path / "other", "--from", one).code == 0
    assert here("export", "-C", tmp_path / "other", "-o", two).code == 0
    assert one.read_bytes() == two.read_bytes()


def test_an_export_since_a_head_holds_only_what_came_later(pool: Pool, tmp_path: Path) -> None:
    full, later = tmp_path / "full.safetensors", tmp_path / "later.safetensors"
    head = document(pool.run("export", "-o", full, "--json"))["heads"][0]
    assert here("init", tmp_path / "other", "--from", full).code == 0
    assert pool.run("add", pool.models["c"]).code == 0
    assert pool.run("export", "-o", later, "--since", head).code == 0
    assert later.stat().st_size < full.stat().st_size
    joined = document(here("import", later, "-C", tmp_path / "other", "--json"))
    assert (joined["new_ops"], joined["root"]) == (1, pool.status["root"])


def test_an_export_for_one_who_knows_more_is_refused_by_one_who_knows_less(pool: Pool, tmp_path: Path) -> None:
    full, later = tmp_path / "full.safetensors", tmp_path / "later.safetensors"
    assert pool.run("export", "-o", full).code == 0
    assert here("init", tmp_path / "other", "--from", full).code == 0
    assert pool.run("add", pool.models["c"]).code == 0
    assert pool.run("add", pool.models["c"], "--weight", "2").code == 0
    assert pool.run("export", "-o", later, "--since", pool.ops[2]["id"]).code == 0
    other = Pool(tmp_path / "other", pool.models, pool.a, pool.b)
    before = other.status
    refused(other.run("import", later), "operations that are not here", pool.ops[1]["id"][:16])
    assert other.status == before


# fsck, gc


@pytest.fixture
def large(tmp_path: Path) -> Pool:
    """A pool with tensors that are too large to lie in the database."""
    found = {w: models.save(tmp_path / f"{w}.safetensors", models.state(w, shapes=models.SHAPES)) for w in "ab"}
    assert here("init", tmp_path / "pool", "--like", found["a"]).code == 0
    a, b = (document(here("add", found[who], "-C", tmp_path / "pool", "--json"))["id"] for who in "ab")
    return Pool(tmp_path / "pool", found, a, b)


def harm(pool: Pool) -> str:
    """Turn one bit of the first blob; the id of the contribution that it belongs to."""
    path = min(path for path in (pool.folder / "blobs").rglob("*") if path.is_file())
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (lost,) = document(pool.run("fsck", "--json"), code=1)["lost"]
    return str(lost["id"])


def test_fsck_finds_a_whole_replica_clean(pool: Pool) -> None:
    found = document(pool.run("fsck", "--json"))
    assert list(found) == ["clean", "ops", "blobs", "bytes", "faults", "lost"]
    assert (found["clean"], found["ops"], found["faults"], found["lost"]) == (True, 2, [], [])
    text = told(pool.run("fsck"), f"2 operations, {found['blobs']} blobs")
    assert text.splitlines()[-1] == "clean"


def test_fsck_ends_with_1_and_names_what_is_damaged_and_what_brings_it_back(large: Pool, tmp_path: Path) -> None:
    lost = harm(large)
    ran = large.run("fsck")
    assert (ran.code, ran.err) == (1, "")
    assert "not clean" in ran.out
    assert f"contribution {short(lost)} lacks 'blocks.0.weight': import it" in ran.out
    found = document(large.run("fsck", "--json"), code=1)
    assert (found["clean"], len(found["faults"])) == (False, 1)
    assert found["lost"] == [{"id": lost, "tensors": ["blocks.0.weight"]}]
    refused(large.run("export", "-o", tmp_path / "state.safetensors"), "no longer those that were added")
    refused(large.run("resolve", "-o", tmp_path / "out"), "blocks.0.weight")
    assert not (tmp_path / "state.safetensors").exists()
    assert not (tmp_path / "out").exists()


def test_what_fsck_let_go_of_is_announced_until_it_is_added_again(large: Pool, tmp_path: Path) -> None:
    lost = harm(large)
    assert large.run("fsck", "--mend").code == 1
    assert document(large.run("fsck", "--json"))["clean"] is True
    assert [one["id"] for one in large.status["visible"] if not one["ready"]] == [lost]
    told(large.run("status"), f"{short(lost)}  weight 1  by you  (announced: its tensors are not here yet)\n")
    refused(large.run("resolve", "-o", tmp_path / "out"), f"contribution {lost[:16]} is announced", "blocks.0.weight")
    for path in large.models.values():
        assert large.run("add", path).code == 0
    assert all(one["ready"] for one in large.status["visible"])
    assert large.run("resolve", "-o", tmp_path / "out").code == 0


def test_gc_takes_what_nobody_needs_in_two_phases(large: Pool) -> None:
    assert large.run("remove", large.a).code == 0
    nothing = {"trashed": 0, "trashed_bytes": 0, "removed": 0, "removed_bytes": 0, "strays": 0}
    assert document(large.run("gc", "--json")) == nothing
    first = document(large.run("gc", "--grace", "0", "--json"))
    second = document(large.run("gc", "--grace", "0", "--json"))
    assert list(first) == list(nothing)
    assert first["trashed"] == second["removed"] > 0
    assert first["trashed_bytes"] == second["removed_bytes"] > 600_000
    nobody = "0 blobs (0 bytes) became trash\n0 blobs (0 bytes) removed, and 0 leftovers of crashes\n"
    assert told(large.run("gc", "--grace", "0")) == nobody
    assert document(large.run("fsck", "--json"))["clean"] is True
    assert document(large.run("show", large.a, "--json"))["ready"] is False
    assert large.run("add", large.models["a"]).code == 0
    assert document(large.run("fsck", "--json"))["clean"] is True


# keys


def test_keys_show_says_who_signs_and_who_else_may_do_what(pool: Pool) -> None:
    assert pool.run("keys", "grant", STRANGER, "--role", "curator").code == 0
    found = document(pool.run("keys", "show", "--json"))
    own = pool.status["actor"]
    assert list(found) == ["key", "file", "rank", "keys"]
    assert (found["key"], found["rank"], found["file"]) == (own, "founder", str(pool.folder / "key.pem"))
    untrusted = {"trusted": False, "url": None}
    assert found["keys"] == [
        {"key": own, "rank": "founder", **untrusted},
        {"key": STRANGER, "rank": "curator", **untrusted},
    ]
    told(pool.run("keys", "show"), f"{own}  founder  signs here ({pool.folder / 'key.pem'})", f"{STRANGER}  curator")


def test_a_grant_and_a_revoke_are_operations(pool: Pool) -> None:
    told(pool.run("keys", "grant", STRANGER), f"{STRANGER} is a member now")
    told(pool.run("keys", "revoke", STRANGER, "--reason", "left"), f"{STRANGER} is revoked")
    assert [(op["kind"], op["key"]) for op in pool.ops[2:]] == [("grant", STRANGER), ("revoke", STRANGER)]
    assert pool.ops[-1]["reason"] == "left"
    for command in ("grant", "revoke"):
        assert document(pool.run("keys", command, STRANGER, "--json")) == {"op": pool.ops[-1]["id"]}


def test_an_imported_key_signs_from_then_on(pool: Pool, tmp_path: Path) -> None:
    key = Key.from_seed(b"7" * 32)
    key.save(tmp_path / "key.pem")
    told(pool.run("keys", "import", tmp_path / "key.pem"), f"signs as {key.public.hex()} from now on")
    assert document(pool.run("keys", "import", tmp_path / "key.pem", "--json")) == {"key": key.public.hex()}
    assert document(pool.run("keys", "show", "--json"))["rank"] == "member"
    assert pool.run("add", pool.models["c"]).code == 0
    assert pool.ops[-1]["author"] == key.public.hex()
    assert (pool.folder / "key.pem").stat().st_mode & 0o077 == 0


# Every command


def asked(pool: Pool, tmp_path: Path) -> list[Sequence[object]]:
    """One request to every command on a replica; each can be carried out after those before it."""
    if not (tmp_path / "other.pem").exists():
        Key.from_seed(b"7" * 32).save(tmp_path / "other.pem")
    return [
        *(["status"], ["log"], ["show", pool.a], ["recipe"], ["fsck"], ["gc"], ["keys", "show"]),
        *(["add", pool.models["c"]], ["remove", pool.a], ["retract", pool.b], ["retract", pool.b, "--undo"]),
        *(["resolve", "-o", tmp_path / "out"], ["recipe", "ties"], ["keys", "grant", STRANGER]),
        *(["keys", "revoke", STRANGER], ["export", "-o", tmp_path / "state"], ["import", tmp_path / "state"]),
        ["keys", "import", tmp_path / "other.pem"],
    ]


def test_every_command_answers_with_one_document_and_nothing_else(pool: Pool, tmp_path: Path) -> None:
    for request in asked(pool, tmp_path):
        assert isinstance(document(pool.run(*request, "--json")), dict | list), request


def test_every_command_works_from_within_the_folder(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = [["status"], ["log"], ["show", pool.a], ["recipe"], ["fsck"], ["gc"]]
    outside = [told(pool.run(*request)) for request in looking]
    monkeypatch.chdir(pool.folder)
    assert [told(here(*request)) for request in looking] == outside
    for request in asked(pool, tmp_path):
        assert here(*request).code == 0, request


def test_every_command_says_the_same_of_a_folder_that_is_no_replica(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    for place in ("nowhere", "foreign"):
        for request in asked(pool, tmp_path):
            refused(here(*request, "-C", tmp_path / place), str(tmp_path / place), "is not a replica", "crdtmerge init")
            assert here(*request, "-C", tmp_path / place, "--json").json["error"]["kind"] == "ReplicaError"
    assert files(tmp_path / "foreign") == set()
    assert not (tmp_path / "nowhere").exists()


# What is refused changes nothing


@pytest.fixture
def there(pool: Pool, tmp_path: Path) -> dict[str, str]:
    """Names for what requests speak of; besides the pool there is all that can be wrong."""
    c = models.state("c")
    wrong = {
        "shape": c | {"blocks.0.bias": torch.ones(65)},
        "more": c | {"more": torch.ones(2)},
        "less": {name: tensor for name, tensor in c.items() if name != "scale"},
        "dtype": c | {"blocks.0.bias": torch.ones(64, dtype=torch.bfloat16)},
        "integers": c | {models.BUFFER: c[models.BUFFER] + 1},
        "nan": c | {"scale": torch.tensor(float("nan"))},
        "lora": {"base_model.x.lora_A.weight": torch.ones(2, 3), "base_model.x.lora_B.weight": torch.ones(3, 2)},
    }
    named = {name: models.save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in wrong.items()}
    torch.save(c, tmp_path / "model.bin")
    (tmp_path / "pickles").mkdir()
    torch.save(c, tmp_path / "pickles" / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "work.txt").write_text("of days")
    (tmp_path / "garbage").write_bytes(b"\xff" * 100)
    whole = pool.models["c"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-3])
    assert here("init", tmp_path / "other", "--like", pool.models["c"]).code == 0
    assert here("export", "-C", tmp_path / "other", "-o", tmp_path / "other.state").code == 0
    assert pool.run("export", "-o", tmp_path / "own.state").code == 0
    state = (tmp_path / "own.state").read_bytes()
    (tmp_path / "cut.state").write_bytes(state[:-3])
    for name, at in (("turned", -1), ("header", 20)):
        turned = bytearray(state)
        turned[at] ^= 1
        (tmp_path / f"{name}.state").write_bytes(turned)
    foreign = document(here("status", "-C", tmp_path / "other", "--json"))["pool"]
    texts = {"tmp": tmp_path, "pool": pool.folder, "a": pool.a, "foreign": foreign, "own": pool.status["pool"]}
    return {name: str(value) for name, value in (texts | dict(pool.models.items() - {("a", 0)}) | named).items()} | {
        "a": pool.a,
        "model": str(pool.models["c"]),
    }


ID = "4 to 64 hexadecimal digits"
KEY = "64 hexadecimal digits"
ADD, RESOLVE = ["add", "{model}"], ["resolve", "-o"]
REFUSED: dict[str, tuple[list[str], str, list[str]]] = {
    **{
        f"{command}, {what}": ([command, given], "UsageError", words)
        for command in ("remove", "retract", "show")
        for what, given, words in (
            ("a short id", "{a:.3}", ["'{a:.3}'", ID]),
            ("no hexadecimal", "poison", ["'poison'", ID]),
            ("a long id", "0" * 65, [ID]),
            ("no id", "", ["''", ID]),
            ("an unknown id", "ffffffffffff", ["begins with ffffffffffff", "crdtmerge status"]),
        )
    },
    "remove, what never was": (["remove", UNSEEN], "UsageError", [UNSEEN]),
    "undo, what is not retracted": (["retract", "{a}", "--undo"], "UsageError", ["{a}", "is not retracted"]),
    "replaces, an unknown id": ([*ADD, "--replaces", "ffffffffffff"], "UsageError", ["ffffffffffff"]),
    "weight, a word": ([*ADD, "--weight", "much"], "UsageError", ["weight", "'much'", "not a number"]),
    "weight, NaN": ([*ADD, "--weight", "nan"], "UsageError", ["weight", "'nan'", "finite"]),
    "weight, infinite": ([*ADD, "--weight", "-inf"], "UsageError", ["weight", "'-inf'", "finite"]),
    "weight, beyond bounds": ([*ADD, "--weight", "1e400"], "UsageError", ["weight", "1e300"]),
    "weight, empty": ([*ADD, "--weight", ""], "UsageError", ["weight", "not a number"]),
    "role, unknown": ([*ADD, "--role", "boss"], "UsageError", ["'boss'", "task, forget, unlearned, safety"]),
    "note, too long": ([*ADD, "--note", "x" * 1025], "UsageError", ["note", "1025", "1024"]),
    "reason, too long": (["remove", "{a}", "--reason", "x" * 1025], "UsageError", ["reason", "1025", "1024"]),
    "add, nothing": (["add", "{tmp}/nowhere"], "InputError", ["{tmp}/nowhere", "No such file"]),
    "add, an empty folder": (["add", "{tmp}/empty"], "CheckpointError", ["{tmp}/empty", "model.safetensors"]),
    "add, a pickle": (["add", "{tmp}/model.bin"], "CheckpointError", ["model.bin", "pickle", "save_file"]),
    "add, a folder of pickles": (["add", "{tmp}/pickles"], "CheckpointError", ["pytorch_model.bin", "pickle"]),
    "add, an adapter": (["add", "{lora}"], "CheckpointError", ["{lora}", "adapter", "merge_and_unload"]),
    "add, another shape": (["add", "{shape}"], "MismatchError", ["'blocks.0.bias'", "[65]", "[64]"]),
    "add, another dtype": (["add", "{dtype}"], "MismatchError", ["'blocks.0.bias'", "BF16", "F32"]),
    "add, other integers": (["add", "{integers}"], "MismatchError", ["'position_ids' (I64) differs"]),
    "add, too few": (["add", "{less}"], "MismatchError", ["{less}", "lacks 'scale'"]),
    "add, too many": (["add", "{more}"], "MismatchError", ["{more}", "'more'"]),
    "add, NaN": (["add", "{nan}"], "NonFiniteError", ["{nan}", "'scale'", "NaN"]),
    "add, cut off": (["add", "{tmp}/cut.safetensors"], "HeaderError", ["cut.safetensors", "truncated"]),
    "add, garbage": (["add", "{tmp}/garbage"], "HeaderError", ["{tmp}/garbage"]),
    "import, nothing": (["import", "{tmp}/nowhere"], "InputError", ["{tmp}/nowhere"]),
    "import, a folder": (["import", "{tmp}/empty"], "CheckpointError", ["{tmp}/empty", "is a folder"]),
    "import, a model": (["import", "{model}"], "BundleError", ["{model}", "no exported state"]),
    "import, garbage": (["import", "{tmp}/garbage"], "HeaderError", ["{tmp}/garbage"]),
    "import, cut off": (["import", "{tmp}/cut.state"], "HeaderError", ["cut.state", "truncated"]),
    "import, one bit turned": (["import", "{tmp}/turned.state"], "BundleError", ["turned.state"]),
    "import, a header's bit turned": (["import", "{tmp}/header.state"], "HeaderError", ["header.state"]),
    "import, of another pool": (["import", "{tmp}/other.state"], "PoolMismatchError", ["{own}", "{foreign}"]),
    "export, onto a file": (["export", "-o", "{model}"], "OutputError", ["{model}", "exists"]),
    "export, onto a folder": (["export", "-o", "{tmp}/empty"], "OutputError", ["{tmp}/empty", "exists"]),
    "export, into nowhere": (["export", "-o", "{tmp}/no/where"], "OutputError", ["{tmp}/no/where"]),
    "export, since what is unknown": (
        ["export", "-o", "{tmp}/new", "--since", "ffffffffffff"],
        "UsageError",
        ["ffffffffffff"],
    ),
    "resolve, the replica": ([*RESOLVE, "{pool}"], "OutputError", ["{pool}", "choose another -o"]),
    "resolve, into the replica": ([*RESOLVE, "{pool}/out"], "OutputError", ["{pool}/out", "lies in the replica"]),
    "resolve, by another spelling": ([*RESOLVE, "{tmp}/empty/../pool/out"], "OutputError", ["lies in the replica"]),
    "resolve, around the replica": ([*RESOLVE, "{tmp}"], "OutputError", ["{tmp}", "around it"]),
    "resolve, onto a folder of work": ([*RESOLVE, "{tmp}/foreign"], "OutputError", ["not written by crdtmerge"]),
    "resolve, onto a model": ([*RESOLVE, "{model}"], "OutputError", ["{model}", "not written by crdtmerge"]),
    "resolve, into nowhere": ([*RESOLVE, "{tmp}/no/where"], "OutputError", ["{tmp}/no/where"]),
    "resolve, on what is no device": (
        [*RESOLVE, "{tmp}/new", "--device", "abacus"],
        "UsageError",
        ["'abacus'", "cpu or cuda"],
    ),
    "recipe, unknown": (["recipe", "tise"], "UnknownStrategyError", ["'tise'", "ties"]),
    "recipe, an unknown parameter": (
        ["recipe", "ties", "--set", "densty=1"],
        "ParameterError",
        ["'densty'", "Did you mean density?"],
    ),
    "recipe, out of range": (["recipe", "ties", "--set", "density=2"], "ParameterError", ["density", "2"]),
    "recipe, by position": (["recipe", "slerp", "--set", "t=0.3"], "UsageError", ["t weighs two models"]),
    "recipe, without a name": (["recipe", "--set", "density=1"], "UsageError", ["name the strategy too"]),
    "recipe, missing": (["recipe", "ties", "--missing", "all"], "UsageError", ["'all'", "base or skip"]),
    "grant, a short key": (["keys", "grant", "abcd"], "UsageError", ["'abcd'", KEY]),
    "grant, no hexadecimal": (["keys", "grant", "z" * 64], "UsageError", [KEY]),
    "grant, a key of small order": (["keys", "grant", "00" * 32], "UsageError", [KEY]),
    "grant, an unknown role": (
        ["keys", "grant", STRANGER, "--role", "boss"],
        "UsageError",
        ["'boss'", "member or curator"],
    ),
    "revoke, a short key": (["keys", "revoke", "{a:.10}"], "UsageError", [KEY]),
    "import a key, nothing": (["keys", "import", "{tmp}/nowhere"], "KeyFileError", ["{tmp}/nowhere"]),
    "import a key, no key": (["keys", "import", "{tmp}/garbage"], "KeyFileError", ["{tmp}/garbage", "openssl genpkey"]),
}


def test_what_is_refused_says_why_and_changes_nothing(there: dict[str, str], pool: Pool, tmp_path: Path) -> None:
    before, tree = pool.status, files(tmp_path)
    wrong = []
    for case, (request, kind, words) in REFUSED.items():
        arguments = [one.format(**there) for one in request]
        plain, ran = pool.run(*arguments), pool.run(*arguments, "--json")
        try:
            refused(plain, *(word.format(**there) for word in words))
            refused(ran)
            assert plain.out == "", plain
            assert (ran.json["error"]["kind"], ran.err) == (kind, plain.err)
            assert pool.status == before
            assert files(tmp_path) == tree, files(tmp_path) ^ tree
        except AssertionError as fault:
            wrong.append(f"{case}: {fault!s:.400}")
    assert not wrong, "\n".join(wrong)
    assert document(pool.run("fsck", "--json"))["clean"] is True


@pytest.mark.parametrize("what", ["files", "path"])
def test_a_model_with_other_integers_leaves_nothing(what: str, large: Pool, tmp_path: Path) -> None:
    c = models.state("c", shapes=models.SHAPES)
    path = models.save(tmp_path / "integers.safetensors", c | {models.BUFFER: c[models.BUFFER] + 1})
    before = files(large.folder)
    said = refused(large.run("add", path), "'position_ids' (I64) differs")
    assert str(path) in said if what == "path" else files(large.folder) == before


BASE = ["--base", "{model}"]
INIT: dict[str, tuple[list[str], str, list[str]]] = {
    "into a folder of work": (["{tmp}/foreign", *BASE], "OutputError", ["{tmp}/foreign", "not an empty folder"]),
    "into a replica": (["{pool}", *BASE], "OutputError", ["{pool}", "not an empty folder"]),
    "onto a file": (["{model}", *BASE], "OutputError", ["{model}", "not an empty folder"]),
    "into nowhere": (["{tmp}/no/where", *BASE], "OutputError", ["{tmp}/no/where"]),
    "without a model": (["{tmp}/new"], "UsageError", ["architecture", "base"]),
    "a base and a likeness": (
        ["{tmp}/new", *BASE, "--like", "{model}"],
        "UsageError",
        ["one architecture", "--base", "--like"],
    ),
    "a missing base": (["{tmp}/new", "--base", "{tmp}/nowhere"], "InputError", ["{tmp}/nowhere"]),
    "a pickle": (["{tmp}/new", "--base", "{tmp}/model.bin"], "CheckpointError", ["pickle"]),
    "a base with NaN": (["{tmp}/new", "--base", "{nan}"], "NonFiniteError", ["{nan}", "'scale'"]),
    "an unknown strategy": (["{tmp}/new", *BASE, "--strategy", "tise"], "UnknownStrategyError", ["'tise'"]),
    "a strategy that needs a base": (
        ["{tmp}/new", "--like", "{model}", "--strategy", "ties"],
        "NeedsError",
        ["'ties'", "base"],
    ),
    "a position": (["{tmp}/new", *BASE, "--strategy", "slerp", "--set", "t=0.5"], "UsageError", ["t weighs"]),
    "a setting without value": (["{tmp}/new", *BASE, "--set", "density"], "UsageError", ["density", "KEY=VALUE"]),
    "no size": (["{tmp}/new", *BASE, "--quota", "lots"], "UsageError", ["'lots'", "500GB"]),
    "a negative size": (["{tmp}/new", *BASE, "--quota", "-5GB"], "UsageError", ["'-5GB'"]),
    "no curator": (["{tmp}/new", *BASE, "--curator", "me"], "UsageError", ["'me'", KEY]),
    "a missing key": (["{tmp}/new", *BASE, "--key", "{tmp}/nowhere"], "KeyFileError", ["{tmp}/nowhere"]),
    "no key": (["{tmp}/new", *BASE, "--key", "{tmp}/garbage"], "KeyFileError", ["{tmp}/garbage", "openssl"]),
    "from a missing file": (["{tmp}/new", "--from", "{tmp}/nowhere"], "InputError", ["{tmp}/nowhere"]),
    "from a model": (["{tmp}/new", "--from", "{model}"], "BundleError", ["no exported state"]),
    "from a cut state": (["{tmp}/new", "--from", "{tmp}/cut.state"], "HeaderError", ["truncated"]),
    "from a state with a bit turned": (["{tmp}/new", "--from", "{tmp}/turned.state"], "BundleError", ["turned.state"]),
    "from a state and a base": (["{tmp}/new", "--from", "{tmp}/own.state", *BASE], "UsageError", ["leave them out"]),
}


def test_init_refuses_what_it_cannot_begin_and_leaves_nothing(there: dict[str, str], tmp_path: Path) -> None:
    tree = files(tmp_path)
    wrong = []
    for case, (request, kind, words) in INIT.items():
        arguments = ["init", *(one.format(**there) for one in request)]
        try:
            refused(here(*arguments), *(word.format(**there) for word in words))
            assert here(*arguments, "--json").json["error"]["kind"] == kind
            assert files(tmp_path) == tree, files(tmp_path) ^ tree
        except AssertionError as fault:
            wrong.append(f"{case}: {fault!s:.400}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_merged_of_an_empty_set(tmp_path: Path) -> None:
    assert here("init", tmp_path / "pool", "--base", saved(tmp_path)["base"]).code == 0
    refused(here("resolve", "-C", tmp_path / "pool", "-o", tmp_path / "out"), "nothing to merge", "crdtmerge add")
    assert not (tmp_path / "out").exists()


def test_the_first_digits_of_two_ids_name_neither(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one.safetensors", 194), save(tmp_path / "two.safetensors", 208)
    assert here("init", tmp_path / "pool", "--like", one).code == 0
    ids = [document(here("add", path, "-C", tmp_path / "pool", "--json"))["id"] for path in (one, two)]
    assert {found[:4] for found in ids} == {"7ad2"}, "these values were chosen for it"
    for command in ("remove", "retract", "show"):
        refused(here(command, "7ad2", "-C", tmp_path / "pool"), "2 begin with 7ad2", *(found[:8] for found in ids))
        told(here(command, ids[0][:8].upper(), "-C", tmp_path / "pool"), ids[0])


UNREADABLE = (
    *(
        "init",
        "add",
        "remove",
        "show",
        "resolve",
        "export",
        "import",
        "keys",
        "keys trust",
        "keys grant",
        "status more",
    ),
    *("log -n 0", "log -n few", "gc --grace -1", "gc --grace x", "add x --threads 0", "status -C", "retract --undo"),
    *("fsck --nothing", "export -o", "init x --members"),
)


@pytest.mark.parametrize("request_", UNREADABLE)
def test_a_request_that_cannot_be_read_ends_with_2_and_nothing_on_stdout(request_: str) -> None:
    ran = here(*request_.split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(("Usage: ", "Error: "))
    assert "Traceback" not in ran.err


# Names and words that would do something to a terminal

ESCAPE = "\x1b]0;evil\x07\x1b[2J\r\x9b31m\u202e"


def harmless(*texts: str) -> bool:
    return all(one.isprintable() or one == "\n" for text in texts for one in text)


def test_words_of_others_move_no_cursor(pool: Pool) -> None:
    said = f"a{ESCAPE}b"
    requests: list[Sequence[object]] = [
        ["add", pool.models["c"], "--note", said, "--task", said],
        ["remove", pool.a, "--reason", said],
        ["retract", pool.b, "--reason", said],
        ["retract", pool.b, "--undo", "--reason", said],
        ["keys", "revoke", STRANGER, "--reason", said],
        *(["status"], ["log"], ["show", pool.b], ["add", said], ["show", said], ["keys", "grant", said]),
        *(["recipe", said], ["import", said], ["export", "-o", said + "/x"], ["add", "x", "--weight", said]),
    ]
    requests += [["show", op["id"]] for op in pool.ops]
    for request in requests:
        ran, machine = pool.run(*request), pool.run(*request, "--json")
        assert harmless(ran.out, ran.err, machine.out, machine.err), request
    assert "\\u001b" in told(pool.run("log"))
    assert said in [op.get("reason") for op in pool.ops]


def test_names_of_tensors_and_folders_move_no_cursor(tmp_path: Path) -> None:
    like = models.save(tmp_path / "like.safetensors", {"w\u202eevil": torch.ones(2)})
    other = models.save(tmp_path / "other.safetensors", {"w\u202eevil": torch.ones(3)})
    folder = tmp_path / f"pool{ESCAPE}"
    for request in (
        *(["init", folder, "--like", like], ["add", like, "-C", folder], ["add", other, "-C", folder]),
        *(["status", "-C", folder], ["keys", "show", "-C", folder], ["status", "-C", tmp_path / ESCAPE]),
        *(["resolve", "-C", folder, "-o", tmp_path / f"out{ESCAPE}"], ["export", "-C", folder, "-o", folder]),
    ):
        ran = here(*request)
        assert harmless(ran.out, ran.err), request
        assert ran.code in (0, 2)


# What starts up with a command


LISTING = """
import sys
from collections.abc import Sequence
from crdtmerge.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def modules(*arguments: object) -> set[str]:
    """What was imported when a command is done."""
    command = [sys.executable, "-c", LISTING, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "request_", [["status"], ["log"], ["show"], ["keys", "show"], ["retract"], ["export"], ["fsck"]]
)
def test_what_looks_at_no_weights_starts_without_torch(request_: list[str], pool: Pool, tmp_path: Path) -> None:
    more: Sequence[object] = {"show": [pool.a], "retract": [pool.a], "export": ["-o", str(tmp_path / "state")]}.get(
        request_[0], []
    )
    assert not modules(*request_, *more, "-C", pool.folder) & {"torch", "numba", "mpmath", "sklearn", "rich"}


# What is not as it should be


def test_words_of_others_begin_no_line(pool: Pool) -> None:
    forged = "fine\n0123456789ab  2026-01-01 00:00:00  you           remove    everything"
    assert pool.run("add", pool.models["c"], "--note", forged, "--task", forged).code == 0
    assert pool.run("remove", pool.a, "--reason", forged).code == 0
    for command in (["status"], ["log"], ["show", pool.ops[2]["content"]]):
        assert "\n0123456789ab" not in told(pool.run(*command)), command


@pytest.mark.parametrize("where", ["add", "recipe"])
def test_nor_do_they_where_a_change_is_told(where: str, pool: Pool) -> None:
    forged = "fine\n0123456789ab  2026-01-01 00:00:00Z  you           remove    everything"
    assert pool.run("add", pool.models["c"], "--task", forged, "--json").code == 0
    assert pool.run("recipe", "ties", "--exclude", forged, "--json").code == 0
    assert "\n0123456789ab" not in told(pool.run(*(["add", pool.models["c"]] if where == "add" else ["recipe"])))


@pytest.mark.parametrize(
    "request_", ["init {tmp}/new --base {base} --dtype bogus", "recipe ties --dtype bogus -C {pool}"]
)
def test_an_unknown_dtype_is_refused_where_it_is_said(request_: str, pool: Pool, tmp_path: Path) -> None:
    words = request_.format(tmp=tmp_path, base=pool.models["base"], pool=pool.folder).split()
    refused(here(*words), "'bogus'", "bfloat16")


@pytest.mark.parametrize(
    "option",
    ["--strategy slerp", "--dtype float16", "--exclude x", "--missing skip", "--allow-nonfinite", "--set density=0.3"],
)
def test_init_from_a_state_refuses_what_the_pool_decides(option: str, pool: Pool, tmp_path: Path) -> None:
    assert pool.run("export", "-o", tmp_path / "state").code == 0
    refused(here("init", tmp_path / "new", "--from", tmp_path / "state", *option.split()), "--from")


def test_init_refuses_a_base_together_with_another_likeness(tmp_path: Path) -> None:
    found, other = saved(tmp_path), save(tmp_path / "other.safetensors", 1)
    refused(here("init", tmp_path / "pool", "--base", found["base"], "--like", other), "--like")


def test_init_refuses_members_where_every_key_is_a_curator(tmp_path: Path) -> None:
    base = saved(tmp_path)["base"]
    refused(here("init", tmp_path / "pool", "--base", base, "--members-only", "--curator", "any"), "--members-only")


def test_a_base_beyond_the_quota_is_told_of_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    base = saved(tmp_path)["base"]
    said = refused(here("init", tmp_path / "pool", "--base", base, "--quota", "1kB"), "quota")
    assert ".crdtmerge-" not in said


def test_an_export_does_not_lie_in_the_replica(pool: Pool) -> None:
    refused(pool.run("export", "-o", pool.folder / "blobs" / "00" / "state.safetensors"), "lies in the replica")


def test_no_more_is_new_than_there_is(tmp_path: Path) -> None:
    files = {"config.json": "{}" + " " * 5000}
    folder = models.save_folder(tmp_path / "a", models.state("a"), files)
    assert here("init", tmp_path / "pool", "--like", folder).code == 0
    added = document(here("add", folder, "-C", tmp_path / "pool", "--json"))
    assert added["new_bytes"] <= added["bytes"]


def test_what_is_no_longer_retracted_does_not_stay(pool: Pool) -> None:
    assert pool.run("retract", pool.a).code == 0
    assert "stays visible" not in told(pool.run("retract", pool.a, "--undo"))


def test_what_was_retracted_before_it_was_seen_can_be_found(pool: Pool) -> None:
    assert pool.run("retract", UNSEEN).code == 0
    told(pool.run("status"), short(UNSEEN))
    told(pool.run("show", short(UNSEEN)), UNSEEN)
    told(pool.run("retract", short(UNSEEN), "--undo"), UNSEEN)


def test_a_role_that_the_strategy_does_not_take_is_told_by_its_id(pool: Pool, tmp_path: Path) -> None:
    found = document(pool.run("add", pool.models["c"], "--role", "forget", "--json"))["id"]
    refused(pool.run("resolve", "-o", tmp_path / "out"), "'forget'", found[:12])


def test_fsck_of_a_damaged_database_is_a_check_that_failed(pool: Pool) -> None:
    path = pool.folder / "pool.sqlite"
    path.write_bytes(path.read_bytes()[:20000])
    ran = pool.run("fsck")
    assert "Run `crdtmerge fsck`" not in ran.out + ran.err
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.endswith("\nnot clean\n")
    found = document(pool.run("fsck", "--json"), code=1)
    assert (found["clean"], len(found["faults"])) == (False, 1)
    assert f"\n  {found['faults'][0]}\n" in ran.out
    assert str(path) in found["faults"][0] or "damaged" in found["faults"][0]


@pytest.mark.parametrize("request_", ["resolve", "status --nothing", "gc --grace -1", "log -n few", "nonsense"])
def test_a_request_that_cannot_be_read_is_a_document_too(request_: str) -> None:
    plain, ran = here(*request_.split()), here(*request_.split(), "--json")
    assert (ran.code, ran.err) == (2, plain.err)
    assert list(ran.json) == ["error"]
    assert sorted(ran.json["error"]) == ["kind", "message"]
    assert ran.json["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    ("request_", "option"),
    [
        ("status --nothing", "--nothing"),
        ("resolve", "--out"),
        ("gc --grace -1", "--grace"),
        ("log -n few", "--last"),
    ],
)
def test_a_document_of_what_cannot_be_read_names_the_option(request_: str, option: str) -> None:
    assert option in here(*request_.split(), "--json").json["error"]["message"]


def test_a_long_note_is_told_as_what_was_asked_for(pool: Pool) -> None:
    ran = pool.run("add", pool.models["c"], "--note", "x" * 1025, "--json")
    assert ran.json["error"]["kind"] == "UsageError"
    refused(ran, "1025", "1024")


def test_a_time_says_its_zone(pool: Pool) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ", pool.ops[0]["seen"])


def test_every_task_is_shown(pool: Pool) -> None:
    assert pool.run("add", pool.models["c"], "--task", "task").code == 0
    told(pool.run("status"), 'task "task"')


@pytest.mark.parametrize("option", ["--allow-nonfinite", "--exclude scale"])
def test_advice_on_nan_is_what_init_can_do(option: str, pool: Pool, tmp_path: Path) -> None:
    spoiled = models.save(tmp_path / "nan.safetensors", models.state("c") | {"scale": torch.tensor(float("nan"))})
    refused(pool.run("add", spoiled), "only a pool that was begun with --exclude or --allow-nonfinite takes it")
    assert here("init", tmp_path / "new", "--like", spoiled, *option.split()).code == 0
    for path in (spoiled, pool.models["a"]):
        assert here("add", path, "-C", tmp_path / "new").code == 0
    if option == "--allow-nonfinite":
        assert here("resolve", "-C", tmp_path / "new", "-o", tmp_path / "out").code == 0
        assert load_file(tmp_path / "out" / "model.safetensors")["scale"].isnan()


def test_a_pool_begun_to_take_nan_takes_it_by_another_recipe_too(tmp_path: Path) -> None:
    spoiled = models.save(tmp_path / "nan.safetensors", {"w": torch.tensor([1.0, float("nan")])})
    assert here("init", tmp_path / "pool", "--like", spoiled, "--allow-nonfinite").code == 0
    for request in (["add", spoiled], ["recipe", "linear"]):
        assert here(*request, "-C", tmp_path / "pool").code == 0
    told(here("resolve", "-C", tmp_path / "pool", "-o", tmp_path / "out"))


def test_a_replica_without_its_key_says_what_to_do(pool: Pool) -> None:
    (pool.folder / "key.pem").unlink()
    refused(pool.run("retract", pool.a), "key.pem", "keys import")
