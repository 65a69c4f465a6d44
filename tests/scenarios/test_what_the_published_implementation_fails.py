"""The sixteen scenarios in which the published implementation diverges, loses data or breaks: ours keeps each as a law.

Every scenario runs on MergeState values and on Replica folders (``worlds``), unless it is about one of them alone.
Each group of tests begins with a comment: the scenario, and what the published implementation (crdt-merge 0.9.8) does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from crdtmerge.errors import (
    BundleError,
    CrdtMergeError,
    InputError,
    MismatchError,
    NonFiniteError,
    PoolMismatchError,
    UsageError,
)
from crdtmerge.pool.replica import Replica
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture, Tensor
from crdtmerge.resolve.merge import merge
from crdtmerge.state import Delta, MergeState
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from tests.resolve.models import save
from tests.resolve.running import ROOT, environment
from tests.scenarios.worlds import SHAPE, Folder, Node, Value, World, model, output, said
from tests.strategies.models import DEEP, ROWS, Row, family

M, OTHER = model(1), model(2)


# 1. m added v1 at A, v2 at B, v2 removed at C: (A | B) | C against A | (B | C). There: [] against ['m'].


def test_01_a_removal_leaves_the_join_associative(world: World) -> None:
    a, b, c = world.nodes(3)
    m = a.add(M, weight=1)
    assert b.add(M, weight=2) == m
    c.meet(b.snapshot())
    c.remove(m)
    parts = [node.snapshot() for node in (a, b, c)]
    found = set()
    for x, y, z in itertools.permutations(parts):
        left = world.joined([world.joined([x, y]).snapshot(), z])
        right = world.joined([x, world.joined([y, z]).snapshot()])
        for node in (left, right):
            assert said(node) == [(m, "1")], "C saw the ADD of B alone, so that of A stays, with its weight"
            found.add((node.root, node.state_root, *output(node.resolve())))
    assert len(found) == 1


def test_01_values_joined_in_either_grouping_are_equal_to_the_byte() -> None:
    empty = MergeState("weight_average")
    a, b = empty.add(M, weight=1), empty.add(M, weight=2)
    c = b.remove(b.visible[0].id)
    assert (a | b) | c == a | (b | c)
    assert ((a | b) | c).to_bytes() == (a | (b | c)).to_bytes()


# 2. 1000 random histories of three replicas with removals, the same snapshots delivered in 6 orders. There: 82 diverge.

CONTENTS = [model(number) for number in range(5)]
WEIGHTS = (None, None, 1, 2, "0.5")


class Diary:
    """What a node knows, told without any of the code under test: dots, the dots that were removed, what dots say."""

    def __init__(self) -> None:
        self.dots: dict[int, bytes] = {}
        self.removed: set[int] = set()

    def meet(self, other: Diary) -> None:
        self.dots |= other.dots
        self.removed |= other.removed

    def live(self, content: bytes) -> set[int]:
        return {dot for dot, added in self.dots.items() if added == content} - self.removed

    def visible(self) -> set[bytes]:
        return {content for content in self.dots.values() if self.live(content)}


def history(world: World, seed: int) -> None:
    """Three nodes, eight operations each, now and then one meets another; then everyone's snapshot in every order."""
    random, numbers = Random(seed), itertools.count()
    nodes, diaries = world.nodes(3), [Diary() for _ in range(3)]
    turns = [0, 1, 2] * 8
    random.shuffle(turns)
    for at in turns:
        node, diary = nodes[at], diaries[at]
        if random.random() < 0.25:
            other = random.choice([one for one in range(3) if one != at])
            node.meet(nodes[other].snapshot())
            diary.meet(diaries[other])
        visible = sorted(diary.visible())
        if visible and random.random() < 0.45:
            gone = random.choice(visible)
            node.remove(gone)
            diary.removed |= diary.live(gone)
        else:
            diary.dots[next(numbers)] = node.add(random.choice(CONTENTS), random.choice(WEIGHTS))
    everything = Diary()
    for diary in diaries:
        everything.meet(diary)
    snapshots = [node.snapshot() for node in nodes]
    found = set()
    for order in itertools.permutations(snapshots):
        one = world.joined(order)
        assert {entry.id for entry in one.visible} == everything.visible(), f"history {seed}"
        found.add((one.root, one.state_root, tuple(said(one)), tuple(entry.adders for entry in one.visible)))
    assert len(found) == 1, f"history {seed} diverges"


@pytest.mark.parametrize(
    "seeds",
    [range(100), range(100, 200), pytest.param(range(200, 1000), marks=pytest.mark.soak)],
    ids=["first", "second", "rest"],
)
def test_02_no_random_history_of_a_thousand_diverges(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        history(World("MergeState", tmp_path), seed)


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 150), marks=pytest.mark.soak)], ids=["few", "many"])
def test_02_no_random_history_on_disk_diverges(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        world = World("Replica", tmp_path / str(seed))
        (tmp_path / str(seed)).mkdir()
        history(world, seed)
        world.close()


# 3. B removes m while A removes and adds it again. There: m is lost in both orders.


def test_03_an_add_that_a_removal_did_not_see_wins(world: World) -> None:
    a, b = world.nodes(2)
    m = a.add(M)
    b.meet(a.snapshot())
    b.remove(m)
    a.remove(m)
    a.add(M)
    for order in itertools.permutations([a.snapshot(), b.snapshot()]):
        assert said(world.joined(order)) == [(m, "1")]


# 4. The same content is added again after a removal, then meets the old tombstone. There: gone again, for ever.


def test_04_what_is_added_again_survives_meeting_the_old_removal(world: World) -> None:
    a, b = world.nodes(2)
    m = a.add(M)
    b.meet(a.snapshot())
    b.remove(m)
    tombstone = b.snapshot()
    a.meet(tombstone)
    assert said(a) == []
    assert a.add(M) == m
    for _ in range(3):
        a.meet(tombstone)
        assert said(a) == [(m, "1")]
    b.meet(a.snapshot())
    assert said(b) == [(m, "1")]
    assert output(a.resolve()) == output(b.resolve())


# 5. Two replicas with different bases, recipes or seeds. There: equal, with equal hashes, and different merged models.

SEVERAL: dict[str, tuple[tuple[Recipe, Any], tuple[Recipe, Any]]] = {
    "bases": ((Recipe("ties"), model(0)), (Recipe("ties"), model(9))),
    "a base or none": ((Recipe("slerp"), model(0)), (Recipe("slerp"), None)),
    "strategies": ((Recipe("ties"), model(0)), (Recipe("magmax"), model(0))),
    "parameters": ((Recipe("ties", density=0.2), model(0)), (Recipe("ties", density=0.21), model(0))),
    "seeds": ((Recipe("dare", seed=1), model(0)), (Recipe("dare", seed=2), model(0))),
    "a seed or the root": ((Recipe("dare", seed=1), model(0)), (Recipe("dare"), model(0))),
    "dtypes": ((Recipe("linear", dtype="F16"), None), (Recipe("linear", dtype="BF16"), None)),
    "exclusions": ((Recipe("linear", exclude=["v*"]), None), (Recipe("linear"), None)),
    "what is missing": ((Recipe("linear", missing="skip"), None), (Recipe("linear"), None)),
    "what is taken": ((Recipe("linear", allow_nonfinite=True), None), (Recipe("linear"), None)),
}


@pytest.mark.parametrize("what", SEVERAL)
def test_05_different_bases_recipes_or_seeds_are_different_pools_that_refuse_to_join(what: str, world: World) -> None:
    one, other = (world.node(recipe, base=base) for recipe, base in SEVERAL[what])
    assert one.add(M) == other.add(M)
    one.add(OTHER), other.add(OTHER)
    assert one.root == other.root, "the visible sets are equal"
    assert one.pool_id != other.pool_id
    assert one.resolve().receipt.merge_id != other.resolve().receipt.merge_id
    for mine, theirs in ((one, other), (other, one)):
        before = mine.to_bytes()
        with pytest.raises(PoolMismatchError) as refused:
            mine.meet(theirs.snapshot())
        assert mine.pool_id.hex() in str(refused.value)
        assert theirs.pool_id.hex() in str(refused.value)
        assert mine.to_bytes() == before
    if isinstance(one, Value) and isinstance(other, Value):
        assert one.state != other.state


def test_05_equal_recipes_and_bases_are_one_pool_however_they_are_written(world: World) -> None:
    one = world.node(Recipe.of("ties", {"lambda": 1.0, "density": "0.20"}), base=model(0))
    other = world.node("ties", base={"w": torch.from_numpy(model(0)["w"])})
    assert one.pool_id == other.pool_id
    one.add(M)
    other.meet(one.snapshot())
    assert said(other) == said(one)


# 6. Its tag holds 32 bits of a hash: two contents collide after 108,803 tries, and removing one removes the other.

TWINS = [{"w": np.array([number], "<f4")} for number in (28953, 32779)]
"""Found by trying: the ids of these two begin with the same 32 bits."""


def test_06_two_contents_whose_ids_share_32_bits_are_two(world: World) -> None:
    node = world.node(like=TWINS[0])
    one, other = (node.add(twin) for twin in TWINS)
    assert one[:4] == other[:4]
    assert one != other
    assert len(node.visible) == 2
    node.remove(one)
    assert said(node) == [(other, "1")]
    assert node.resolve()["w"].tolist() == [32779]
    other_node = world.node(like=TWINS[0])
    other_node.add(TWINS[0])
    other_node.meet(node.snapshot())
    assert {entry.id for entry in other_node.visible} == {one, other}


def test_06_ids_are_named_in_full_or_by_a_prefix_that_fits_one_alone(tmp_path: Path) -> None:
    with Replica.create(tmp_path / "pool", "weight_average", like=TWINS[0]) as replica:
        one, other = (replica.add(twin).id for twin in TWINS)
        assert replica.find_content(one.hex()) == one
        assert replica.find_content(other.hex()[:16]) == other
        with pytest.raises(UsageError, match="2 begin with"):
            replica.find_content(one.hex()[:8])
    state = MergeState("weight_average").add(TWINS[0]).add(TWINS[1])
    with pytest.raises(UsageError, match="is no content id"):
        state.remove(one[:4])


def test_06_every_id_and_root_has_256_bits(world: World) -> None:
    node = world.node()
    contents = [node.add(model(number)) for number in range(3)]
    node.remove(contents[0])
    merged = node.resolve().receipt
    ids = [*contents, node.pool_id, node.root, node.state_root, merged.merge_id, merged.recipe.id, merged.output_digest]
    ops = node.state.delta_since(()).ops if isinstance(node, Value) else node.replica.last_ops()  # type: ignore[attr-defined]
    assert {len(one) for one in [*ids, *(op.id for op in ops)]} == {32}
    assert len({*ids}) == len(ids)


def test_06_removing_one_content_removes_no_other(world: World) -> None:
    node = world.node()
    contents = [node.add(model(number)) for number in range(24)]
    assert len({*contents}) == 24
    for gone in contents[::3]:
        node.remove(gone)
    assert {entry.id for entry in node.visible} == {*contents} - {*contents[::3]}


# 7. Weight 1.0 version 11 against weight 1.01 version 1; a 2x8 against a 4x4 tensor of the same bytes. There: equal.


def test_07_every_weight_has_a_root_of_its_own(world: World) -> None:
    weights = ("1", "1.01", "1.1", "11", "0.11", "1.011", "101", "0")
    roots = {}
    for weight in weights:
        node = world.node()
        node.add(M, weight=weight)
        for _ in range(2):
            node.add(OTHER)
        roots[weight] = node.root
    assert len({*roots.values()}) == len(weights)


def test_07_shape_dtype_and_name_enter_the_content_id() -> None:
    x = np.arange(16, dtype="<i4")
    alike: list[dict[str, Any]] = [
        {"w": x.reshape(2, 8)},
        {"w": x.reshape(4, 4)},
        {"w": x.reshape(8, 2)},
        {"w": x},
        {"w": x.reshape(1, 16)},
        {"w": x.view("<u4")},
        {"w": x.view("<f4")},
        {"w": x.view("<i8")},
        {"v": x},
        {"w": x[:8], "x": x[8:]},
        {"w": x[:4], "x": x[4:]},
    ]
    ids = [MergeState("linear").add(one).visible[0].id for one in alike]
    assert len({*ids}) == len(ids)


# 8. A serialised state with an edited tensor. There: accepted; the claimed hash is ignored.


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    """An exported state in which some bytes stand in the place of others, once."""
    assert data.count(old) == 1
    assert len(old) == len(new)
    return data.replace(old, new)


_ROW = b"\x94\xa1w\xa3F32\x92\x02\x04\xc4\x20"
"""How a manifest writes the tensor of M, up to its digest. (The architecture in a genesis has no digest of floats.)"""


@pytest.mark.parametrize("what", ["a tensor", "its name", "its shape", "an operation", "a manifest", "the pool"])
def test_08_an_edited_state_is_refused_and_changes_nothing(what: str, world: World) -> None:
    node, reader = world.nodes(2)
    m = node.add(M, weight="2.5")
    data = node.to_bytes()
    raw = M["w"].tobytes()
    (name,) = (name for name in _header(data) if name.startswith("tensor."))
    changes: dict[str, Callable[[], bytes]] = {
        "a tensor": lambda: edited(data, raw, (M["w"] * 2).tobytes()),
        "its name": lambda: edited(data, name.encode(), b"tensor." + bytes(32).hex().encode()),
        "its shape": lambda: edited(data, b'"shape":[2,4]', b'"shape":[4,2]'),
        "an operation": lambda: edited(data, b"\xa32.5", b"\xa39.5"),
        "a manifest": lambda: edited(data, _ROW, _ROW.replace(b"w", b"v")),
        "the pool": lambda: data.replace(b"weight_average", b"weight_averagf", 1),
    }
    before = reader.to_bytes()
    with pytest.raises(BundleError if what != "the pool" else CrdtMergeError):
        reader.meet_bytes(changes[what]())
    assert reader.to_bytes() == before
    reader.meet_bytes(data)
    assert said(reader) == [(m, "2.5")]


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


# 9. The caller's array is changed after ``add``; a returned array is changed. There: the state changes with it.


@pytest.mark.parametrize("kind", ["numpy", "torch", "a view", "a file"])
def test_09_what_a_caller_does_to_a_model_later_does_not_enter(kind: str, world: World, tmp_path: Path) -> None:
    array = M["w"].copy()
    given: Any = {"w": array}
    if kind == "torch":
        given = {"w": torch.from_numpy(array)}
    elif kind == "a view":
        wide = np.zeros((2, 8), np.float32)
        wide[:, ::2] = array
        array = wide[:, ::2]
        given = {"w": array}
    elif kind == "a file":
        given = save(tmp_path / "m.safetensors", {"w": torch.from_numpy(array)})
    node = world.node()
    m = node.add(given)
    before = said(node), node.root, node.to_bytes(), output(node.resolve())
    if kind == "a file":
        save(given, {"w": torch.zeros(SHAPE)})
        if isinstance(node, Value):  # which keeps no copy of a file: it refuses what it was not given
            with pytest.raises(InputError, match="changed"):
                node.resolve()
            with pytest.raises(InputError, match="no longer those that were added"):
                node.to_bytes()
            return
    else:
        array += 100
        given["w"] = given["w"] * 0
        given["more"] = np.zeros(3, np.float32)
    assert (said(node), node.root, node.to_bytes(), output(node.resolve())) == before
    assert said(node) == [(m, "1")]


def test_09_what_a_caller_does_to_a_merged_tensor_does_not_enter(world: World) -> None:
    node = world.node()
    node.add(M), node.add(OTHER)
    before = said(node), node.root, node.to_bytes(), output(node.resolve())
    merged = node.resolve()
    merged["w"].zero_()
    merged["w"].numpy()[:] = 7
    assert (said(node), node.root, node.to_bytes(), output(node.resolve())) == before


def test_09_what_a_caller_does_to_a_merged_tensor_is_not_saved_under_its_receipt(tmp_path: Path) -> None:
    node = Value(MergeState("weight_average"))
    node.add(M), node.add(OTHER)
    merged, whole = node.resolve(), node.resolve()
    merged["w"].zero_()
    merged["w"].numpy()[:] = 7
    next(iter(merged.values())).zero_()
    assert torch.equal(merged["w"], whole["w"])
    merged.save(tmp_path / "changed")
    whole.save(tmp_path / "whole")
    files = [tmp_path / name / "model.safetensors" for name in ("changed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_09_bytes_that_were_read_may_be_changed_afterwards() -> None:
    data = bytearray(MergeState("weight_average").add(M).to_bytes())
    state = MergeState.from_bytes(data)
    before = output(state.resolve())
    data[:] = bytes(len(data))
    assert output(state.resolve()) == before
    assert MergeState.from_bytes(state.to_bytes()) == state


# 10. bf16, int64 above 2^53, a dict of tensors, a NaN. There: TypeError, a lost bit, TypeError, accepted.

TORCH_DTYPES = sorted(
    {str(one).removeprefix("torch."): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
)
MERGED = ("bfloat16", "float16", "float32", "float64")
COPIED = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:torch.quantize")
@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_10_every_torch_dtype_comes_back_to_the_bit_or_is_refused_by_name(name: str, world: World) -> None:
    dtype = getattr(torch, name)
    try:
        tensor = torch.ones(4, dtype=torch.uint8).repeat(torch.empty(1, dtype=dtype).element_size()).view(dtype)
    except (RuntimeError, NotImplementedError):
        pytest.skip(f"this torch makes no tensors of {name}")
    given = {"w": tensor}
    if name not in MERGED + COPIED:
        with pytest.raises(InputError, match=f"tensor 'w' has dtype torch.{name}, which cannot be merged"):
            world.node().add(given)
        return
    node = world.node(like=given)
    node.add(given)
    reader = world.node(like=given)
    reader.meet_bytes(node.to_bytes())
    for one in (node, reader):
        found = one.resolve()["w"]
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_10_every_dtype_that_is_merged_or_copied_is_among_those_of_torch() -> None:
    assert {*MERGED, *COPIED} <= {*TORCH_DTYPES}


def test_10_a_mean_of_bfloat16_is_rounded_once(world: World) -> None:
    models = [
        {"w": torch.tensor([1.0, 256.0, -3.0], dtype=torch.bfloat16)},
        {"w": torch.tensor([1.0078125, 258.0, 4.0]).bfloat16()},
    ]
    node = world.node(like=models[0])
    for one in models:
        node.add(one)
    exact = (models[0]["w"].double() + models[1]["w"].double()) / 2
    assert torch.equal(node.resolve()["w"], exact.bfloat16())


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, -(2**63), -(2**53) - 1])
def test_10_integers_beyond_2_to_the_53_keep_every_bit(number: int, world: World) -> None:
    given = {"steps": torch.tensor([number, 0]), "w": torch.ones(2)}
    node = world.node(like=given)
    node.add(given)
    node.add({"steps": given["steps"], "w": torch.zeros(2)})
    found = node.resolve()
    assert found["steps"].tolist() == [number, 0]
    assert found["w"].tolist() == [0.5, 0.5]


def test_10_a_model_is_a_dict_of_tensors_and_anything_else_is_refused_in_words(world: World) -> None:
    nested = {"layer": {"w": torch.ones(2)}}
    wrong: dict[str, Any] = {
        "is dict; a torch tensor or numpy array is needed": nested,
        "the model is Tensor; a path or a mapping of names to tensors is needed": torch.ones(2),
        "the model is ndarray; a path or a mapping": np.ones(2),
        "is list; a torch tensor or numpy array is needed": {"w": [1.0, 2.0]},
        "is float; a torch tensor or numpy array is needed": {"w": 1.0},
        "maps non-empty strings to tensors, not 3": {3: torch.ones(2)},
        "maps non-empty strings to tensors, not ''": {"": torch.ones(2)},
    }
    many = {f"layer.{number}": np.full((2,), number, np.float32) for number in range(20)}
    node = world.node(like=many)
    for words, given in wrong.items():
        with pytest.raises(CrdtMergeError) as refused:
            node.add(given)
        assert words in str(refused.value)
    node.add(many)
    found = node.resolve()
    assert {name: found[name].tolist() for name in found} == {name: one.tolist() for name, one in many.items()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", MERGED)
def test_10_nan_and_infinity_are_refused_with_tensor_and_place(
    bad: float, name: str, world: World, tmp_path: Path
) -> None:
    given = {"w": torch.zeros(8, dtype=getattr(torch, name)), "v": torch.zeros(1)}
    node = world.node(like=given)
    broken = {**given, "w": given["w"].clone()}
    broken["w"][5] = bad
    before = node.to_bytes()
    for model_given in (broken, save(tmp_path / "m.safetensors", broken)):
        with pytest.raises(NonFiniteError, match=r"tensor 'w' holds 1 values that are NaN .* first at index 5"):
            node.add(model_given)
    assert node.to_bytes() == before


def test_10_a_nan_from_someone_who_does_not_look_is_named_so_that_it_can_be_removed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = MergeState("weight_average").add(M)
    with monkeypatch.context() as careless:
        careless.setattr("crdtmerge.state.holdings.refuse_nonfinite", lambda *facts: None)
        careless_state = state.add({"w": np.full(SHAPE, np.nan, np.float32)})
    (bad,) = (entry.id for entry in careless_state.visible if entry.id != state.visible[0].id)
    node = _reader(world, tmp_path)
    node.meet_bytes(careless_state.to_bytes())
    with pytest.raises(NonFiniteError, match=f"contribution {bad.hex()[:16]}: tensor 'w' holds 8 values"):
        node.resolve()
    node.remove(bad)
    assert node.resolve()["w"].tolist() == M["w"].tolist()


def test_10_a_numpy_array_is_refused_where_the_torch_tensor_would_be(world: World) -> None:
    given = np.zeros(SHAPE, np.complex64)
    for one in (given, torch.from_numpy(given)):
        with pytest.raises(InputError, match="complex64"):
            world.node().add({"w": one})


@pytest.mark.parametrize("dtype", [">f4", "O", "M8[s]", "U3", "S3", "g", "c16", "f4,i4"])
def test_10_numpy_types_that_torch_lacks_are_refused_in_words(dtype: str) -> None:
    with pytest.raises(InputError, match="tensor 'w' is a numpy array of"):
        MergeState("linear").add({"w": np.zeros(3, dtype)})


# 11. The same content from two nodes under two names. There: counted twice in the merge.


def test_11_one_content_counts_once_whoever_adds_it_and_from_wherever(world: World, tmp_path: Path) -> None:
    tensors = {"w": torch.from_numpy(M["w"])}
    (tmp_path / "folder").mkdir()
    forms = [
        M,
        tensors,
        save(tmp_path / "first name.safetensors", tensors),
        save(tmp_path / "folder" / "model.safetensors", tensors).parent,
    ]
    nodes = world.nodes(len(forms))
    ids = {node.add(form) for node, form in zip(nodes, forms, strict=True)}
    (m,) = ids
    nodes[0].add(OTHER)
    everyone = world.joined([node.snapshot() for node in nodes])
    assert len(everyone.visible) == 2
    (entry,) = (entry for entry in everyone.visible if entry.id == m)
    assert len(entry.adders) == len(forms)
    assert everyone.resolve()["w"].numpy().tolist() == ((M["w"] + OTHER["w"]) / 2).tolist()
    assert output(everyone.resolve()) == output(nodes[0].resolve())


@pytest.mark.parametrize("count", [256, 257])
def test_11_what_many_added_can_be_removed(count: int) -> None:
    empty, everyone = MergeState("weight_average"), MergeState("weight_average")
    for _ in range(count):
        everyone |= empty.add(M)
    (entry,) = everyone.visible
    gone = everyone.remove(entry.id)
    assert len(gone) == 0
    assert len(gone.delta_since(everyone.heads).ops) == (1 if count == 256 else 2), "256 dots in each REMOVE"
    assert everyone | gone == gone | everyone == MergeState.from_bytes(gone.to_bytes()) == gone


def test_11_what_many_retracted_can_be_brought_back() -> None:
    everyone = MergeState("weight_average").add(M)
    (entry,) = everyone.visible
    for _ in range(257):
        everyone |= MergeState("weight_average").retract(entry.id)
    assert len(everyone.unretract(entry.id)) == 1


# 12. A shape mismatch joined from another replica. There: accepted; every later resolve raises.


def _architecture(model: dict[str, Any]) -> str:
    return Architecture({name: Tensor("F32", x.shape, None) for name, x in sorted(model.items())}).id.hex()[:16]


@pytest.mark.parametrize(
    "other",
    [{"w": np.zeros((4, 2), np.float32)}, {"v": np.zeros(SHAPE, np.float32)}, {**M, "v": M["w"]}],
    ids=["shape", "name", "more"],
)
def test_12_models_that_do_not_fit_are_refused_at_the_join_and_both_are_named(other: dict[str, Any]) -> None:
    a, b = MergeState("weight_average").add(M), MergeState("weight_average").add(other)
    for one, another in ((a, b), (b, a), (a.remove(a.visible[0].id), b)):
        for theirs in (another, another.delta_since(())):
            with pytest.raises(MismatchError) as refused:
                one.join(theirs)
            assert _architecture(M) in str(refused.value)
            assert _architecture(other) in str(refused.value)
            assert another.visible[0].id.hex()[:16] in str(refused.value)
    assert a.resolve()["w"].tolist() == M["w"].tolist()
    assert len(b.resolve()) == len(other)


def test_12_a_replica_refuses_what_does_not_fit_when_it_comes(world: World) -> None:
    node = world.node()
    node.add(M)
    before = node.to_bytes()
    with pytest.raises(MismatchError, match=r"tensor 'w' has shape \[4, 2\]; the pool's has \[2, 4\]"):
        node.add({"w": np.zeros((4, 2), np.float32)})
    assert node.to_bytes() == before
    assert node.resolve()["w"].tolist() == M["w"].tolist()


def test_12_pools_on_disk_of_other_architectures_are_other_pools(tmp_path: Path) -> None:
    world = World("Replica", tmp_path)
    wide = {"w": np.zeros((4, 2), np.float32)}
    one, other = world.node(), world.node(like=wide)
    other.add(wide)
    with pytest.raises(PoolMismatchError, match=f"{one.pool_id.hex()}.*{other.pool_id.hex()}.*architecture"):
        one.meet(other.snapshot())
    world.close()


def misfits() -> Delta:
    """A delta of two contents that do not fit each other, as no state of ours makes it."""
    one = MergeState("weight_average").add(M).delta_since(())
    other = MergeState("weight_average").add({"w": np.zeros((4, 2), np.float32)}).delta_since(())
    return Delta(one.genesis, (*one.ops, *other.ops), one.holdings | other.holdings)


def test_12_a_state_whose_contents_do_not_fit_each_other_is_refused() -> None:
    with pytest.raises(BundleError, match="has shape"):
        MergeState.from_bytes(misfits().to_bytes())
    with pytest.raises(MismatchError):
        MergeState("weight_average").add(M).join(Delta.from_bytes(misfits().to_bytes()))


def test_12_a_delta_whose_contents_do_not_fit_each_other_is_refused_by_an_empty_state_too() -> None:
    with pytest.raises((MismatchError, BundleError)):
        MergeState("weight_average").join(misfits())


BUFFERS: dict[str, tuple[Any, Any]] = {
    "int64": (np.array([1, 2]), np.array([1, 3])),
    "uint8": (np.array([1, 2], np.uint8), np.array([1, 3], np.uint8)),
    "bool": (np.array([True, False]), np.array([True, True])),
}
"""Integers and bools are never averaged, so they are part of an architecture."""


@pytest.mark.parametrize("kind", BUFFERS)
def test_12_a_model_with_another_buffer_is_refused_when_it_is_added(kind: str, world: World, tmp_path: Path) -> None:
    here, there = BUFFERS[kind]
    good, other = {**M, "ids": here}, {**OTHER, "ids": there}
    file = save(tmp_path / "m.safetensors", {name: torch.from_numpy(one) for name, one in other.items()})
    node = world.node(like=good)
    m = node.add(good)
    before = node.to_bytes()
    for given in (other, file):
        with pytest.raises(MismatchError, match=r"tensor 'ids' .* differs from the pool's"):
            node.add(given)
    assert node.to_bytes() == before
    node.add({**OTHER, "ids": here})
    assert node.resolve()["w"].tolist() == ((M["w"] + OTHER["w"]) / 2).tolist()
    assert node.resolve()["ids"].tolist() == here.tolist()
    assert m in {entry.id for entry in node.visible}


@pytest.mark.parametrize("kind", BUFFERS)
def test_12_states_with_other_buffers_refuse_to_join_and_leaving_them_out_makes_room(kind: str) -> None:
    here, there = BUFFERS[kind]
    empty = MergeState("weight_average")
    a, b = empty.add({**M, "ids": here}), empty.add({**OTHER, "ids": there})
    for one, another in ((a, b), (b, a), (a.remove(a.visible[0].id), b)):
        for theirs in (another, another.delta_since(())):
            words = f"content {another.visible[0].id.hex()[:16]} of the other state: tensor 'ids' .* differs"
            with pytest.raises(MismatchError, match=words):
                one.join(theirs)
    free = MergeState(Recipe("weight_average", exclude=["ids"]))
    joined = free.add({**M, "ids": here}) | free.add({**OTHER, "ids": there})
    assert joined.resolve()["w"].tolist() == ((M["w"] + OTHER["w"]) / 2).tolist()


@pytest.mark.parametrize("how", ["add", "include"])
@pytest.mark.parametrize("what", ["shape", "another buffer"])
def test_12_a_replica_of_a_pool_in_memory_refuses_what_does_not_fit_too(what: str, how: str, tmp_path: Path) -> None:
    here, there = BUFFERS["int64"]
    other = {**OTHER, "ids": there} if what == "another buffer" else {"w": OTHER["w"].T, "ids": here}
    empty = MergeState("weight_average")
    (tmp_path / "empty").write_bytes(empty.to_bytes())
    (tmp_path / "other").write_bytes(empty.add(other).to_bytes())
    with Replica.of_bundle(tmp_path / "pool", tmp_path / "empty") as replica:
        replica.add({**M, "ids": here})
        before = said(Folder(replica))
        if how == "add":
            with pytest.raises(MismatchError):
                replica.add(other)
        else:
            with contextlib.suppress(CrdtMergeError):
                replica.include(tmp_path / "other")
        assert said(Folder(replica)) == before
        replica.export(tmp_path / "state")
        assert len(MergeState.from_bytes((tmp_path / "state").read_bytes())) == 1
        assert replica.resolve()["ids"].tolist() == here.tolist()


SPOILING: dict[str, tuple[dict[str, Any], str]] = {
    "a negative weight": ({"weight": -1}, "has weight -1"),
    "a role": ({"role": "forget"}, "has role 'forget'"),
}


@pytest.mark.parametrize("what", SPOILING)
def test_12_what_only_a_merge_can_find_is_named_so_that_it_can_be_removed(what: str, world: World) -> None:
    claim, words = SPOILING[what]
    node = world.node()
    node.add(M)
    before = output(node.resolve())
    bad = MergeState("weight_average").add(OTHER).visible[0].id
    if isinstance(node, Value):
        node.state = node.state.add(OTHER, **claim)
    else:
        node.replica.add(OTHER, **claim)  # type: ignore[attr-defined]
    with pytest.raises(CrdtMergeError, match=f"contribution {bad.hex()[:16]} {words}"):
        node.resolve()
    node.remove(bad)
    assert output(node.resolve()) == before


# 13. 10,000 cycles of add and remove. There: 10,000 tombstones and no way to shed them.

BYTES_A_CYCLE_MAX = 600


class Cycled(NamedTuple):
    state: MergeState
    other: MergeState
    seconds: list[float]


def cycled(count: int) -> Cycled:
    """A state that adds and removes, now and then another content, and a member that follows; seconds of each tenth."""
    state, seconds = MergeState("weight_average"), []
    other = MergeState("weight_average")
    for at in range(count):
        if at % (count // 10) == 0:
            seconds.append(time.process_time())
        state = state.add(model(at % 3))
        state = state.remove(state.visible[0].id)
    seconds.append(time.process_time())
    return Cycled(state, other | state, [end - begin for begin, end in itertools.pairwise(seconds)])


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_13_cycles_of_add_and_remove_keep_no_tensor_and_are_shed_by_a_renewal(count: int) -> None:
    state, other, seconds = cycled(count)
    print(
        f"{count} cycles: {[round(10_000 * one / count, 2) for one in seconds]} ms a cycle, {len(state.to_bytes())} B"
    )
    assert len(state) == 0
    data = state.to_bytes()
    assert not [name for name in _header(data) if name.startswith("tensor.")]
    assert len(data) <= BYTES_A_CYCLE_MAX * count + 4096
    assert other == state
    renewed, again = state.renewed(), other.renewed()
    assert renewed.pool_id == again.pool_id != state.pool_id
    assert renewed.root == again.root == state.root
    assert len(renewed.to_bytes()) < 4096, "nothing of the history is left"
    for old in (state, other.add(M), MergeState("weight_average")):
        for new in (renewed, again.add(M)):
            with pytest.raises(PoolMismatchError, match=f"{new.pool_id.hex()}.*{old.pool_id.hex()}"):
                new.join(old)
            with pytest.raises(PoolMismatchError):
                old.join(new)


def test_13_a_renewal_goes_on_with_what_is_visible_and_all_that_is_said_of_it() -> None:
    a = MergeState("weight_average").add(M, weight=3, task="math", note="a note").add(OTHER)
    b = MergeState("weight_average") | a
    one, other = a.renewed(), b.renewed()
    assert one.pool_id == other.pool_id
    assert one.root == other.root == (one | other).root == a.root
    assert [(e.id, e.claim, e.note) for e in one.visible] == [(e.id, e.claim, e.note) for e in a.visible]
    assert (one | other) == (other | one)
    receipts = [state.resolve().receipt for state in (a, one, other, one | other)]
    assert len({receipt.to_bytes() for receipt in receipts}) == 1
    later = one.add(model(5)) | other.remove(other.visible[0].id)
    assert len(later) == 3, "each of the two added what it went on with, so one removal ends one's ADD alone"


def test_13_a_renewal_goes_on_with_what_is_retracted() -> None:
    a = MergeState("weight_average").add(M).add(OTHER)
    (kept, gone) = (MergeState("weight_average").add(one).visible[0].id for one in (M, OTHER))
    renewed = a.retract(gone, "poisoned").renewed()
    assert [entry.id for entry in renewed.visible] == [kept]
    assert [entry.id for entry in renewed.add(OTHER).visible] == [kept], "it stays hidden in the new pool"
    assert len(renewed.unretract(gone).add(OTHER)) == 2
    assert [entry.id for entry in a.retract(gone).unretract(gone).remove(gone).renewed().add(OTHER).visible] == sorted(
        [kept, gone]
    )


def test_13_renewed_states_that_are_equal_are_equal_to_the_byte() -> None:
    empty = MergeState("weight_average")
    gone = empty.add(OTHER)
    one, other = (gone.remove(gone.visible[0].id).add(M)).renewed(), empty.add(M).renewed()
    joined = one | other.delta_since(one.heads), other | one.delta_since(other.heads)
    assert joined[0] == joined[1]
    assert joined[0].to_bytes() == joined[1].to_bytes()


def test_13_cycles_on_disk_leave_operations_alone_and_the_tensors_are_collected(tmp_path: Path) -> None:
    with Replica.create(tmp_path / "pool", "weight_average", like=M) as replica:
        for at in range(40):
            replica.remove(replica.add(model(at)).id)
        for _ in range(2):
            replica.gc(0)
        size = replica.export(tmp_path / "state")
        assert size <= (BYTES_A_CYCLE_MAX + 200) * 40 + 4096, "operations, and a manifest for each content"
        assert not [name for name in _header((tmp_path / "state").read_bytes()) if name.startswith("tensor.")]
        assert sum(path.stat().st_size for path in (tmp_path / "pool" / "blobs").rglob("*") if path.is_file()) == 0


# 14. Malformed bytes: 100 KB of nested brackets, a zlib bomb, trailing bytes. There: RecursionError, +200 MB, ignored.

MEMORY_MAX = 24 * 1024 * 1024


def _framed(*items: bytes) -> bytes:
    return b"".join(len(item).to_bytes(4, "big") + item for item in items)


def _bundle(**parts: bytes) -> bytes:
    """A safetensors file of lists of bytes."""
    header, at = {}, 0
    for name, data in parts.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts.values())


def _parts(data: bytes) -> dict[str, bytes]:
    length = 8 + int.from_bytes(data[:8], "little")
    header = _header(data)
    ends = {name: entry["data_offsets"] for name, entry in header.items() if name in ("genesis", "ops", "manifests")}
    return {name: data[length + begin : length + end] for name, (begin, end) in ends.items()}


def _nested(kind: bytes) -> bytes:
    return kind * 100_000


def malformed(whole: bytes) -> dict[str, bytes]:
    """Files that are no exported state, told by what is wrong with them."""
    parts = _parts(whole)
    bomb = zlib.compress(bytes(200 * 1024 * 1024), 9)
    brackets = b"[" * 100_000
    return {
        "nothing": b"",
        "brackets": brackets,
        "a header of brackets": len(brackets).to_bytes(8, "little") + brackets,
        "a header of braces": (500_000).to_bytes(8, "little") + b'{"a":' * 100_000,
        "a genesis of nested lists": _bundle(**parts | {"genesis": _nested(b"\x91")}),
        "a genesis of nested maps": _bundle(**parts | {"genesis": _nested(b"\x81\xa1a")}),
        "an operation of nested lists": _bundle(**parts | {"ops": _framed(bytes(64) + _nested(b"\x91")[:60_000])}),
        "a manifest of nested lists": _bundle(**parts | {"manifests": _framed(_nested(b"\x91"))}),
        "a manifest that claims 4 billion rows": _bundle(**parts | {"manifests": _framed(b"\xdd\xff\xff\xff\xff")}),
        "a genesis that claims 4 billion bytes": _bundle(**parts | {"genesis": b"\xc6\xff\xff\xff\xff"}),
        "a zlib bomb": bomb,
        "a zlib bomb as genesis": _bundle(**parts | {"genesis": bomb}),
        "a zlib bomb as operations": _bundle(**parts | {"ops": bomb}),
        "a bundle in zlib": zlib.compress(whole),
        "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
        "a header of 99 MB that is not there": (99_000_000).to_bytes(8, "little") + b"{}",
        "a tensor of 2^62 elements": _huge(whole),
        "a list that ends early": _bundle(**parts | {"ops": parts["ops"][:-1]}),
        "a list with a length of 4 GB": _bundle(**parts | {"ops": b"\xff\xff\xff\xff" + parts["ops"]}),
        "100,000 empty operations": _bundle(**parts | {"ops": bytes(400_000)}),
        "trailing bytes": whole + b"x",
        "trailing zeros": whole + bytes(8),
        "a bundle twice": whole + whole,
        "trailing bytes in the genesis": _bundle(**parts | {"genesis": parts["genesis"] + b"\xc0"}),
        "trailing bytes in an operation": _bundle(**parts | {"ops": _trailing(parts["ops"])}),
        "trailing bytes in a manifest": _bundle(**parts | {"manifests": _trailing(parts["manifests"])}),
        "bytes between": whole[:-4] + b"\0" + whole[-4:],
        "no operations": _bundle(genesis=parts["genesis"], manifests=parts["manifests"]),
        "something more": _bundle(**parts, more=b"x"),
    }


def _trailing(framed: bytes) -> bytes:
    size = int.from_bytes(framed[:4], "big")
    return _framed(framed[4 : 4 + size] + b"\xc0") + framed[4 + size :]


def _huge(whole: bytes) -> bytes:
    old, new = b'"shape":[2,4]', b'"shape":[4611686018427387904]'
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].replace(old, new)
    return len(header).to_bytes(8, "little") + header + whole[8 + length :]


def refused(node: Node, data: bytes, *, measured: bool = False) -> CrdtMergeError | None:
    """The error of ours with which a node refuses some bytes; None if it takes them. Anything else is raised."""
    if measured:
        tracemalloc.start()
    try:
        node.meet_bytes(data)
    except CrdtMergeError as fault:
        return fault
    finally:
        if measured:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < MEMORY_MAX + 3 * len(data), f"{peak} bytes for {len(data)}"
    return None


@pytest.fixture
def whole() -> bytes:
    """A state with something of everything."""
    state = MergeState("weight_average").add(M, weight=2, note="a note").add(OTHER)
    return state.remove(state.visible[0].id).to_bytes()


def _reader(world: World, tmp_path: Path) -> Node:
    """A node of the pool of MergeStates, which has no architecture, so that it can read their bytes."""
    if world.kind == "MergeState":
        return world.node()
    (tmp_path / "empty").write_bytes(MergeState("weight_average").to_bytes())
    return Folder(Replica.of_bundle(tmp_path / "reader", tmp_path / "empty"))


def test_14_malformed_bytes_are_refused_by_our_errors_in_little_memory(
    world: World, whole: bytes, tmp_path: Path
) -> None:
    node = _reader(world, tmp_path)
    before = node.to_bytes()
    for what, data in malformed(whole).items():
        fault = refused(node, data, measured=True)
        assert isinstance(fault, InputError), what
        assert len(str(fault)) < 2000, what
    assert node.to_bytes() == before
    node.meet_bytes(whole)
    assert len(node.visible) == 1


def test_14_no_truncation_is_taken(world: World, whole: bytes, tmp_path: Path) -> None:
    node = _reader(world, tmp_path)
    step = 1 if world.kind == "MergeState" else 41
    before = node.to_bytes()
    for size in range(0, len(whole), step):
        assert isinstance(refused(node, whole[:size]), InputError), size
    assert node.to_bytes() == before


def test_14_a_flipped_bit_is_refused_or_changes_nothing(world: World, whole: bytes, tmp_path: Path) -> None:
    random = Random(14)
    many = 500 if world.kind == "MergeState" else 60
    for _ in range(many):
        at, bit = random.randrange(len(whole)), random.randrange(8)
        data = bytearray(whole)
        data[at] ^= 1 << bit
        if world.kind == "Replica":
            (tmp_path / "flipped").write_bytes(data)
            try:
                Replica.of_bundle(tmp_path / "new", tmp_path / "flipped").close()
            except CrdtMergeError:
                assert not (tmp_path / "new").exists()
                continue
            pytest.fail(f"bit {bit} of byte {at} is taken")
        try:
            state = MergeState.from_bytes(bytes(data))
        except CrdtMergeError:
            continue
        assert state.to_bytes() == whole, f"bit {bit} of byte {at} is taken and means something"


# 15. One against two BLAS threads, and two kernel sets. There: slerp, SVD, STAR and AdaRank change.


def test_15_neither_threads_nor_kernels_change_a_byte(tmp_path: Path) -> None:
    found = []
    for kernels, threads, blas in (("torch", 1, 1), ("numba", 2, 1), ("torch", 2, 2)):
        settings = {"CRDTMERGE_KERNELS": kernels, "OMP_NUM_THREADS": str(blas), "MKL_NUM_THREADS": str(blas)}
        done = subprocess.run(
            [sys.executable, "-m", "tests.scenarios.one_process", str(threads)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(**settings),
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == found[2]
    assert {case.split()[0] for case in found[0]} == {*DEEP}
    assert all(value == folder for value, folder in found[0].values()), "a value and a folder give the same"
    assert len({value for value, _ in found[0].values()}) == len(found[0])


# 16. The weight of a contribution. There: ignored by 10 of 26 strategies.


def _row(name: str) -> Row:
    return next(row for row in ROWS if row.strategy == name)


@pytest.mark.parametrize("name", DEEP)
def test_16_every_strategy_honours_the_weight_of_a_contribution(name: str, world: World) -> None:
    models, origin = family(3, "F32", number=1600)
    row, strategy = _row(name), registry.get(name)
    needs = strategy.needs(Filled(name, strategy.Params, row.params).general)
    base = None if needs.base == "unused" else origin
    recipe = Recipe.of(name, row.params, seed=7)
    found = []
    for weight in ("1", "1.5", "6"):
        node = world.node(recipe, base=base, like=models[0])
        node.add(models[0], weight=weight)
        node.add(models[1])
        node.add(models[2])
        receipt = node.resolve().receipt
        found.append((node.root, receipt.merge_id, receipt.output_digest))
    assert [len({*column}) for column in zip(*found, strict=True)] == [3, 3, 3]


def test_16_the_weighted_mean_is_the_weighted_mean(world: World) -> None:
    node = world.node()
    node.add(M, weight=3)
    node.add(OTHER, weight=1)
    assert node.resolve()["w"].tolist() == ((3 * M["w"] + OTHER["w"]) / 4).tolist()
    assert output(node.resolve()) == output(merge([OTHER, M], strategy="weight_average", weights=[1, 3]))
