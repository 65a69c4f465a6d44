"""A replica: begin, open, add, remove, retract, resolve; what is refused changes nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdtmerge.errors import (
    InputError,
    MismatchError,
    NeedsError,
    NonFiniteError,
    NotAllowedError,
    OutputError,
    ReplicaError,
    StorageError,
    UsageError,
)
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.contribution import content_id
from tests.pool.replicas import (
    ELEMENTS,
    KEYS,
    Model,
    blob_files,
    broken,
    contents,
    exchange,
    founded,
    model,
    said_by,
    second,
    tree,
)


def _checkpoint(folder: Path, tensors: Model, files: dict[str, str] | None = None) -> Path:
    """A checkpoint folder of one file, written by hand."""
    folder.mkdir()
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        kind = {"float32": "F32", "int64": "I64", "bool": "BOOL"}[tensor.dtype.name]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    for name, said in (files or {}).items():
        (folder / name).write_text(said)
    return folder


# ---- beginning and opening


def test_a_pool_begins_empty_with_a_recipe_that_is_complete(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        assert replica.visible == []
        assert replica.heads == ()
        assert replica.author == KEYS[0].public
        assert replica.recipe.version is not None
        assert replica.fsck().clean


def test_a_pool_takes_its_architecture_from_its_base(tmp_path: Path) -> None:
    with founded(tmp_path / "pool", recipe="task_arithmetic", like=None, base=model(0)) as replica:
        assert replica.genesis.base is not None
        assert replica.is_ready(replica.genesis.base)
        assert not replica.visible, "the base is no contribution"
        assert replica.fsck().clean
        with pytest.raises(MismatchError, match="shape"):
            replica.add({**model(1), "small": np.float32([1])})


def test_a_pool_like_a_model_keeps_nothing_of_it(tmp_path: Path) -> None:
    with founded(tmp_path / "pool"):
        assert not blob_files(tmp_path / "pool")


def test_a_pool_without_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="architecture"):
        Replica.create(tmp_path / "pool", "weight_average")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a file in it", "a file", "a link"])
def test_a_folder_that_is_not_free_is_refused_and_stays_as_it_was(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "pool"
    if kind == "a file in it":
        place.mkdir()
        (place / "letter").write_text("dear")
    elif kind == "a file":
        place.write_text("dear")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to("elsewhere")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="choose another place"):
        founded(place)
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    with founded(tmp_path / "pool") as replica:
        assert replica.fsck().clean


def test_the_current_folder_can_become_a_replica_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pool").mkdir()
    monkeypatch.chdir(tmp_path / "pool")
    try:
        founded(Path()).close()
    except OutputError:
        assert not list((tmp_path / "pool").iterdir())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"recipe": "task_arithmetic"}, NeedsError),
        ({"recipe": "no-such-strategy"}, UsageError),
        ({"like": {"w": "no tensor"}}, InputError),
        ({"like": Path("/nonexistent")}, InputError),
        ({"like": None, "base": {"w": np.float32([np.nan])}}, NonFiniteError),
        ({"like": None, "base": model(0), "quota": 100}, StorageError),
    ],
)
def test_a_creation_that_fails_leaves_nothing(tmp_path: Path, options: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        founded(tmp_path / "pool", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "another database", "no database", "a folder"])
def test_what_is_no_replica_does_not_open(tmp_path: Path, kind: str) -> None:
    import sqlite3

    place = tmp_path / "pool"
    if kind != "nothing":
        place.mkdir()
    if kind == "another database":
        with sqlite3.connect(place / "pool.sqlite") as other:
            other.execute("CREATE TABLE letters (body TEXT)")
        other.close()
    if kind == "no database":
        (place / "pool.sqlite").write_bytes(b"dear " * 1000)
    if kind == "a folder":
        (place / "pool.sqlite").mkdir()
    with pytest.raises(ReplicaError):
        Replica.open(place)


# ---- adding


def test_what_was_added_is_visible_whole_and_still_there_when_opened_anew(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        added = replica.add(model(1), weight="0.25", role="task", task="math", note="mine")
        assert added.entry is not None
        assert (str(added.entry.weight), added.entry.claim.task, added.entry.note) == ("0.25", "math", "mine")
        assert added.nbytes == 2 * 4 * ELEMENTS + 8
    with Replica.open(tmp_path / "pool") as replica:
        assert [entry.id for entry in replica.visible] == [added.id]
        assert replica.is_ready(added.id)
        assert not broken(replica)
        assert replica.seen(added.op) is not None


def test_a_path_and_a_state_dict_of_equal_tensors_are_one_content(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        from_path = replica.add(_checkpoint(tmp_path / "ft", model(1)))
        from_memory = replica.add(dict(reversed(model(1).items())))
        assert from_path.id == from_memory.id
        assert from_memory.new_bytes == 0
        assert len(replica.visible) == 1


TORCH = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
TORCH += ["uint16", "uint32", "uint64"]


def test_every_dtype_that_torch_has_comes_back_to_the_bit(tmp_path: Path) -> None:
    import torch

    random = torch.Generator().manual_seed(1)
    state = {}
    for name in TORCH:
        kind = getattr(torch, name)
        made = torch.randint(0, 2, (9000,), generator=random)
        state[name] = made.to(kind).reshape(3, 3000)
    state["int64"] = torch.tensor([2**53 + 1, -(2**63), 2**63 - 1])
    state["uint64"] = torch.tensor([2**64 - 1], dtype=torch.uint64)
    state["scalar"], state["empty"] = torch.tensor(1.5), torch.zeros(0, 3)
    with founded(tmp_path / "pool", like=state) as replica:
        replica.add(state, weight=1)
        state["float32"] = state["float32"] + 1
        replica.add(state, weight=0)
        merged = replica.resolve()
        for name in (name for name in state if name != "float32"):
            assert merged[name].dtype == state[name].dtype
            assert merged[name].shape == state[name].shape
            assert (
                torch.equal(merged[name].view(torch.uint8), state[name].view(torch.uint8))
                if name
                not in (
                    "scalar",
                    "empty",
                )
                else torch.equal(merged[name], state[name])
            )
        assert torch.equal(merged["float32"], state["float32"] - 1)
        assert replica.fsck().clean


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64"])
def test_what_no_strategy_merges_is_refused_by_name_before_anything_is_kept(tmp_path: Path, dtype: str) -> None:
    import torch

    state = {"w": torch.ones(20000), "q": torch.ones(20000).to(getattr(torch, dtype))}
    with founded(tmp_path / "pool", like={"w": torch.ones(20000)}) as replica:
        with pytest.raises(InputError, match=dtype):
            replica.add(state)
        assert not blob_files(tmp_path / "pool")


def test_numpy_arrays_of_a_type_that_is_not_merged_are_refused_like_those_of_torch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="complex64"):
        founded(tmp_path / "pool", like={"w": np.ones(3, np.complex64)}).close()


def test_what_is_left_unsaid_on_adding_again_stays_as_it_was(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        replica.add(model(1), weight=3, task="math", note="first")
        again = replica.add(model(1), note="second")
        assert again.entry is not None
        assert (again.entry.weight, again.entry.claim.task, again.entry.note) == (3, "math", "second")
        assert replica.add(model(1), weight=0).entry.weight == 0  # type: ignore[union-attr]


def test_a_content_takes_the_place_of_one_s_own(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        old = replica.add(model(1))
        new = replica.add(model(2), replaces=[old.id])
        assert contents(replica) == {new.id}
        hidden = replica.opset.why_hidden(old.id)
        assert hidden is not None
        assert (hidden.why, hidden.by) == ("replaced", new.op)


def test_a_content_takes_no_place_of_another_key_s(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one:
        old = one.add(model(1))
        with second(one, tmp_path / "two") as two:
            with pytest.raises((UsageError, NotAllowedError), match=r"was not added by this key"):
                two.add(model(2), replaces=[old.id])
            assert contents(two) == {old.id}


def test_not_a_number_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    bad = {**model(1), "small": np.float32([1, np.nan])}
    with founded(tmp_path / "pool") as replica:
        with pytest.raises(NonFiniteError, match="small"):
            replica.add(bad)
        with pytest.raises(NonFiniteError, match="small"):
            replica.add(_checkpoint(tmp_path / "ft", bad))
        _assert_nothing_was_kept(replica)


@pytest.mark.parametrize(
    "change",
    [
        {"small": np.float32([1])},
        {"small": np.float64([1, 2])},
        {"extra": np.float32([1])},
    ],
)
def test_what_does_not_fit_the_pool_is_refused_before_anything_is_copied(tmp_path: Path, change: Model) -> None:
    with founded(tmp_path / "pool") as replica:
        with pytest.raises(MismatchError):
            replica.add({**model(1), **change})
        with pytest.raises(MismatchError):
            replica.add({"own": model(1)["own"]})
        _assert_nothing_was_kept(replica)


@pytest.mark.parametrize("nonsense", [7, None, ["a"], {1: np.float32([1])}, {"w": [1.0]}, "", "\0", "no/such/place"])
def test_what_is_no_model_is_refused_with_our_errors(tmp_path: Path, nonsense: object) -> None:
    with founded(tmp_path / "pool") as replica:
        with pytest.raises((UsageError, InputError)):
            replica.add(nonsense)
        _assert_nothing_was_kept(replica)


@pytest.mark.parametrize(
    "said", [{"weight": "much"}, {"weight": float("nan")}, {"role": "king"}, {"task": "x" * 200}, {"note": "x" * 2000}]
)
def test_a_claim_that_means_nothing_is_refused_and_nothing_is_kept(tmp_path: Path, said: dict[str, Any]) -> None:
    with founded(tmp_path / "pool") as replica:
        with pytest.raises((UsageError, InputError)):
            replica.add(model(1), **said)
        assert not list(replica.opset.ops())
        assert replica.gc(0).strays >= 0
        _assert_nothing_was_kept(replica)


def _assert_nothing_was_kept(replica: Replica) -> None:
    assert not list(replica.opset.ops())
    assert not blob_files(replica.folder)
    assert not list((replica.folder / "staged").iterdir())
    assert replica._room.blobs.used() == 0
    assert replica.fsck().clean


def test_the_quota_refuses_and_nothing_that_was_there_is_lost(tmp_path: Path) -> None:
    with founded(tmp_path / "pool", quota=5 * 4 * ELEMENTS) as replica:
        kept = [replica.add(model(n)) for n in range(3)]
        with pytest.raises(StorageError, match="quota"):
            [replica.add(model(n)) for n in range(3, 9)]
        number = len(replica.visible)
        assert number >= 3
        assert {one.id for one in kept} <= contents(replica)
        assert not broken(replica)
        assert replica.fsck().clean
        assert replica.add(model(0), weight=2).new_bytes == 0, "what is here already always fits"
        replica.remove(kept[0].id)
        replica.gc(0)
        replica.gc(0)
        replica.add(model(50))
        assert replica.fsck().clean


def test_tensors_that_contributions_share_are_kept_once(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        large, small = 4 * ELEMENTS, 8
        assert replica.add(model(1)).new_bytes == 2 * large + small
        assert replica.add(model(2)).new_bytes == large + small
        assert replica.add(model(2, shared=8)).new_bytes == large
        assert len(blob_files(tmp_path / "pool")) == 4
        assert replica.add(model(1)).new_bytes == 0
        assert len(blob_files(tmp_path / "pool")) == 4


def test_a_file_that_is_known_already_is_not_copied_again(tmp_path: Path) -> None:
    import os

    path = _checkpoint(tmp_path / "ft", model(1))
    os.utime(path / "model.safetensors", (1e9, 1e9))
    with founded(tmp_path / "pool") as replica:
        first, again = replica.add(path), replica.add(path)
        assert (again.id, again.new_bytes) == (first.id, 0)
        assert replica.fsck().clean


# ---- removing and retracting


def test_a_founder_removes_what_anyone_added(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = two.add(model(1))
        exchange(one, two)
        ended = one.remove(added.id, "stale")
        assert ended.stays == ()
        exchange(one, two)
        assert not two.visible
        assert two.root == one.root
        hidden = two.opset.why_hidden(added.id)
        assert hidden is not None
        assert hidden.why == "removed"


def test_others_remove_their_own_and_learn_what_stays(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        one.add(model(1))
        two.add(model(1))
        exchange(one, two)
        ended = two.remove(contents(two).pop())
        assert ended.stays == (one.author,)
        assert len(two.visible) == 1
        with pytest.raises(NotAllowedError, match=one.author.hex()[:16]):
            two.remove(ended.id)


def test_what_is_not_in_the_set_cannot_be_removed(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        with pytest.raises(UsageError, match="is not in this pool's set"):
            replica.remove(bytes(32))
        added = replica.add(model(1))
        replica.remove(added.id)
        with pytest.raises(UsageError, match="is not in this pool's set"):
            replica.remove(added.id)


def test_what_was_removed_comes_back_when_it_is_added_again(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        added = replica.add(model(1), weight=2)
        replica.remove(added.id)
        again = replica.add(model(1))
        assert again.entry is not None
        assert again.entry.weight == 1, "a removed ADD says nothing any more"


def test_what_a_founder_retracts_stays_hidden_whoever_adds_it(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = one.add(model(1))
        assert one.retract(added.id, "poison").stays == ()
        assert two.add(model(1)).entry is not None, "the RETRACT is not known here yet"
        exchange(one, two)
        assert not two.visible
        assert two.add(model(1)).entry is None
        with pytest.raises(NotAllowedError, match="curator"):
            two.unretract(added.id)
        one.unretract(added.id)
        exchange(one, two)
        assert contents(one) == contents(two) == {added.id}


def test_others_retract_only_what_they_added_themselves(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = one.add(model(1))
        two.add(model(1))
        two.add(model(2))
        exchange(one, two)
        assert two.retract(added.id).stays == (one.author,)
        mine = two.find_content(content_id(_rows(two, model(2))).hex())
        assert two.retract(mine).stays == ()
        assert contents(two) == {added.id}
        two.unretract(mine)
        assert contents(two) == {added.id, mine}


def _rows(replica: Replica, tensors: Model) -> Any:
    """The rows of a model that this replica holds."""
    for content in replica.opset.contents():
        manifest = replica.manifest(content)
        assert manifest is not None
        source = replica.source(content)
        buffer = np.empty(tensors["small"].nbytes, np.uint8)
        source.read_into("small", 0, buffer)
        if buffer.tobytes() == tensors["small"].tobytes():
            return manifest.rows
    raise AssertionError("no such model here")


def test_what_is_not_retracted_cannot_be_unretracted(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        added = replica.add(model(1))
        with pytest.raises(UsageError, match="is not retracted"):
            replica.unretract(added.id)


def test_a_content_can_be_retracted_before_anyone_has_seen_it(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = two.add(model(1))
        one.retract(added.id)
        exchange(one, two)
        assert not one.visible
        assert not two.visible
        assert one.state_root == two.state_root


# ---- announced, found, merged


def test_an_announced_content_is_visible_and_merging_it_says_what_to_do(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = one.add(model(1))
        two.join(*said_by(one))
        assert contents(two) == {added.id}
        assert not two.is_ready(added.id)
        with pytest.raises(ReplicaError, match=r"announced, but not all of it is here.*Import it"):
            two.resolve()
        with pytest.raises(ReplicaError, match="announced"):
            two.resolve_to(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert two.fsck().clean
        assert two.add(model(1)).id == added.id
        assert two.is_ready(added.id)
        two.resolve()


def test_adding_completes_what_others_announced_with_the_same_tensors(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one, second(one, tmp_path / "two") as two:
        added = one.add(model(1))
        bundle = tmp_path / "delta"
        two.join(*said_by(one))
        one.export(bundle)
        two.include(bundle)
        assert two.is_ready(added.id)
        assert not broken(two)


def test_nothing_to_merge_is_said_so(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica, pytest.raises(UsageError, match="nothing to merge"):
        replica.resolve()


def test_an_id_is_found_by_as_few_digits_as_name_it(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        added = [replica.add({**model(n)}) for n in range(3)]
        for one in added:
            assert replica.find_content(one.id.hex()[:12].upper()) == one.id
            assert replica.find(one.op.hex()[:12]) == one.op
            assert replica.find(one.id.hex()) == one.id
            with pytest.raises(UsageError, match="no contribution begins with"):
                replica.find_content(one.op.hex())


@pytest.mark.parametrize("prefix", ["", "abc", "xyzw", "abcd ", "a" * 65, "äbcd", "٣٣٣٣", "abcd\0"])
def test_what_is_no_id_is_said_so(tmp_path: Path, prefix: str) -> None:
    with founded(tmp_path / "pool") as replica, pytest.raises(UsageError, match="4 to 64 hexadecimal digits"):
        replica.find(prefix)


def test_an_id_that_nothing_has_is_said_so(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica, pytest.raises(UsageError, match="no content or operation begins with"):
        replica.find("0000")


def test_digits_that_name_several_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crdtmerge.pool import shown as module

    one, other = bytes.fromhex("ab" * 32), bytes.fromhex("abab" + "cd" * 30)
    with pytest.raises(UsageError, match=r"2 begin with abab: abababab, ababcdcd\. Give more digits"):
        module._the_one("abab", {one, other}, "contribution")


def test_digits_that_many_contents_share_are_ambiguous(tmp_path: Path) -> None:
    small = {"w": np.float32([0])}
    with founded(tmp_path / "pool", like=small) as replica:
        from tests.pool.replicas import sql

        added = replica.add({"w": np.float32([1])})
        twin = added.id[:3] + bytes(29)
        sql(tmp_path / "pool", "INSERT INTO set_adds SELECT ?, member, value FROM set_adds", (twin,))
        with pytest.raises(UsageError, match="Give more digits"):
            replica.find_content(added.id.hex()[:6])
        assert replica.find_content(added.id.hex()) == added.id


# ---- files beside the tensors


CONFIG = '{"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}'


def test_an_output_is_a_folder_as_transformers_reads_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    with founded(tmp_path / "pool") as replica:
        files = {"config.json": CONFIG, "tokenizer.json": "{}", "train.py": "import os", "notes.txt": "mine"}
        added = replica.add(_checkpoint(tmp_path / "ft", model(1), files))
        assert any("train.py" in note for note in added.notes)
        resolved = replica.resolve_to(tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"model.safetensors", "config.json", "tokenizer.json", "receipt.json", "inputs.json"}
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(CONFIG)
        assert resolved.merged
        loaded = load_file(tmp_path / "out" / "model.safetensors")
        assert {name: tensor.numpy().tobytes() for name, tensor in loaded.items()} == {
            name: tensor.tobytes() for name, tensor in model(1).items()
        }
        assert loaded["own"].dtype == torch.float32
        replica.resolve_to(tmp_path / "one.safetensors")
        assert set(load_file(tmp_path / "one.safetensors")) == set(model(1))


def test_the_files_are_the_base_s_else_those_of_the_first_in_canonical_order(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        added = [
            replica.add(_checkpoint(tmp_path / f"ft{n}", model(n), {"config.json": json.dumps({"who": n})}))
            for n in range(3)
        ]
        replica.resolve_to(tmp_path / "out")
        first = min(range(3), key=lambda n: added[n].id)
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"who": first}
    base = _checkpoint(tmp_path / "base", model(0), {"config.json": '{"who": "base"}'})
    with founded(tmp_path / "based", recipe="task_arithmetic", like=None, base=base) as replica:
        replica.add(tmp_path / "ft1")
        replica.resolve_to(tmp_path / "out2")
        assert json.loads((tmp_path / "out2" / "config.json").read_text()) == {"who": "base"}


def test_files_larger_than_the_database_takes_come_along(tmp_path: Path) -> None:
    vocabulary = json.dumps({f"token{n}": n for n in range(5000)})
    with founded(tmp_path / "one") as one, founded(tmp_path / "lone"):
        one.add(_checkpoint(tmp_path / "ft", model(1), {"vocab.json": vocabulary, "config.json": CONFIG}))
        with second(one, tmp_path / "two") as two:
            two.resolve_to(tmp_path / "out")
            assert (tmp_path / "out" / "vocab.json").read_text() == vocabulary
            assert two.fsck().clean


def test_replicas_that_know_the_same_write_the_same_output(tmp_path: Path) -> None:
    with founded(tmp_path / "one") as one:
        for n in range(4):
            one.add(_checkpoint(tmp_path / f"ft{n}", model(n), {"config.json": json.dumps({"who": n})}), weight=n)
        with second(one, tmp_path / "two") as two:
            one.resolve_to(tmp_path / "out1")
            two.resolve_to(tmp_path / "out2")
            here, there = tree(tmp_path / "out1"), tree(tmp_path / "out2")
            assert here.pop("inputs.json") != there.pop("inputs.json"), "it says where the inputs were"
            assert here == there


def test_a_key_that_comes_in_signs_from_then_on(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        first = replica.add(model(1))
        replica.import_key(KEYS[3])
        then = replica.add(model(2))
        assert replica.opset.op(first.op).author == KEYS[0].public
        assert replica.opset.op(then.op).author == KEYS[3].public
        assert replica.known_keys() == {KEYS[0].public, KEYS[3].public}
        assert replica.fsck().clean
    with Replica.open(tmp_path / "pool") as replica:
        replica.add(model(3))
        assert not replica.opset.forks()


def test_the_key_of_a_replica_is_for_its_owner_alone(tmp_path: Path) -> None:
    with founded(tmp_path / "pool"):
        assert (tmp_path / "pool" / "key.pem").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "pool").stat().st_mode & 0o777 == 0o700


def test_a_lost_key_is_said_so_and_the_set_can_still_be_merged(tmp_path: Path) -> None:
    with founded(tmp_path / "pool") as replica:
        replica.add(model(1))
    (tmp_path / "pool" / "key.pem").unlink()
    with Replica.open(tmp_path / "pool") as replica:
        with pytest.raises(InputError, match=r"key\.pem"):
            replica.add(model(2))
        assert len(replica.resolve()) == 3
        assert replica.fsck().clean
