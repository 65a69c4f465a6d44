"""The root of a set and the id of a content: what enters them, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.numerics.workers import Workers
from crdtmerge.replica.contribution import Claim, Row, content_id, leaf
from crdtmerge.replica.trie import root
from crdtmerge.resolve.gather import known
from crdtmerge.resolve.sources import FileSource, MemorySource, Source
from tests.resolve import models

ids = st.binary(min_size=32, max_size=32)
near_ids = st.tuples(st.sampled_from([bytes(31), b"\xff" * 31, b"\xaa" * 31]), st.binary(min_size=1, max_size=1)).map(
    lambda parts: parts[0] + parts[1]
)
sets = st.dictionaries(st.one_of(ids, near_ids), st.binary(min_size=32, max_size=32), max_size=24)


def naive(leaves: Mapping[bytes, bytes]) -> bytes:
    """The root by the words of the definition: split by the next bit of the id, written out as text."""

    def subtree(prefix: str, members: dict[str, bytes]) -> bytes:
        if len(members) == 1:
            return next(iter(members.values()))
        sides = [{bits: h for bits, h in members.items() if bits.startswith(prefix + bit)} for bit in "01"]
        if not (sides[0] and sides[1]):
            return subtree(prefix + ("0" if sides[0] else "1"), members)
        return hashlib.sha256(b"\1" + subtree(prefix + "0", sides[0]) + subtree(prefix + "1", sides[1])).digest()

    hashed = {
        "".join(f"{byte:08b}" for byte in content): hashlib.sha256(b"\0" + content + value).digest()
        for content, value in leaves.items()
    }
    return subtree("", hashed) if hashed else hashlib.sha256(b"\2").digest()


@given(sets)
def test_the_root_is_that_of_the_definition(leaves: dict[bytes, bytes]) -> None:
    assert root(leaves) == naive(leaves)


@given(sets, st.randoms(use_true_random=False))
def test_the_order_of_insertion_does_not_enter(leaves: dict[bytes, bytes], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(leaves.items())
    random.shuffle(shuffled)
    assert root(dict(shuffled)) == root(leaves)


@given(sets.filter(bool), st.data())
def test_every_member_and_every_bit_of_it_enters(leaves: dict[bytes, bytes], data: st.DataObject) -> None:
    content = data.draw(st.sampled_from(sorted(leaves)))
    bit = data.draw(st.integers(0, 255))
    flipped = (int.from_bytes(leaves[content], "big") ^ (1 << bit)).to_bytes(32, "big")
    other = (int.from_bytes(content, "big") ^ (1 << bit)).to_bytes(32, "big")
    without = {one: value for one, value in leaves.items() if one != content}
    assert root(without) != root(leaves)
    assert root(leaves | {content: flipped}) != root(leaves)
    if other not in leaves:
        assert root(without | {other: leaves[content]}) != root(leaves)


def test_the_empty_set_one_leaf_and_two_that_share_a_prefix() -> None:
    value = bytes(32)
    near, far = bytes(31) + b"\2", bytes(31) + b"\3"
    hashes = [hashlib.sha256(b"\0" + content + value).digest() for content in (near, far)]
    assert root({}) == hashlib.sha256(b"\2").digest()
    assert root({near: value}) == hashes[0]
    assert root({far: value, near: value}) == hashlib.sha256(b"\1" + hashes[0] + hashes[1]).digest()


def test_a_node_can_not_be_passed_off_as_a_leaf_nor_a_set_as_a_smaller_one() -> None:
    value = bytes(32)
    members = {bytes([first]) + bytes(31): value for first in (0x00, 0x40, 0x80, 0xC0)}
    half = {content: value for content in members if content[0] >= 0x80}
    left = root({content: value for content in members if content[0] < 0x80})
    assert len({root(members), root(half), left, root({left: root(half)})}) == 4


CLAIMS = {
    "weight": Claim(weight=Decimal("1.5")),
    "a negative weight": Claim(weight=Decimal("-1")),
    "role": Claim(role="safety"),
    "task": Claim(task="math"),
    "an empty task": Claim(task=""),
    "a task called None": Claim(task="None"),
    "stats": Claim(stats={"fisher": bytes(32)}),
    "other stats": Claim(stats={"fisher": b"\1" * 32}),
    "stats of another name": Claim(stats={"gram": bytes(32)}),
}


def test_every_field_of_a_claim_enters_the_leaf_and_so_the_root() -> None:
    content, other = bytes(32), b"\xf0" * 32
    leaves = [leaf(content, claim) for claim in (Claim(), *CLAIMS.values())]
    roots = {root({content: one, other: leaf(other, Claim())}) for one in leaves}
    assert len(set(leaves)) == len(roots) == len(CLAIMS) + 1
    assert leaf(content, Claim()) != leaf(other, Claim())


@pytest.mark.parametrize("weight", ["1", "1.0", "1.000", "1E+0", "10E-1"])
def test_the_spelling_of_a_weight_does_not_enter(weight: str) -> None:
    assert leaf(bytes(32), Claim(weight=Decimal(weight))) == leaf(bytes(32), Claim())


def test_no_statistics_and_an_empty_map_of_them_are_the_same_claim() -> None:
    assert leaf(bytes(32), Claim()) == leaf(bytes(32), Claim(stats={}))


# Content ids

ROWS = [Row("a", "F32", (2, 3), bytes(32)), Row("b", "BF16", (), b"\1" * 32)]


def test_every_field_of_a_row_and_the_kind_and_base_enter_the_content_id() -> None:
    changed = [
        [ROWS[0]],
        [ROWS[0], ROWS[1]._replace(name="c")],
        [ROWS[0], ROWS[1]._replace(dtype="F16")],
        [ROWS[0], ROWS[1]._replace(shape=(1,))],
        [ROWS[0], ROWS[1]._replace(digest=b"\2" * 32)],
        [ROWS[0]._replace(shape=(3, 2)), ROWS[1]],
        [ROWS[0]._replace(digest=b"\1" * 32), ROWS[1]._replace(digest=bytes(32))],
    ]
    found = [content_id(ROWS), *map(content_id, changed)]
    found += [content_id(ROWS, kind="delta"), content_id(ROWS, kind="delta", base=bytes(32)), content_id([])]
    assert len(set(found)) == len(found)
    assert content_id(reversed(ROWS)) == content_id(ROWS)


def id_of(source: Source) -> bytes:
    with Workers(1) as workers:
        found = known(source, workers, None, lambda read: None).id
    source.close()
    return found


def test_the_files_of_a_content_do_not_enter_its_id(tmp_path: Path) -> None:
    tensors = models.state("a", "BF16")
    found = {
        id_of(FileSource(models.save(tmp_path / "a.safetensors", tensors))),
        id_of(FileSource(models.save_reordered(tmp_path / "b.safetensors", tensors))),
        id_of(FileSource(models.save_folder(tmp_path / "folder", tensors, {"config.json": "{}"}))),
        *(id_of(FileSource(models.save_shards(tmp_path / str(count), tensors, count))) for count in (2, 3, 5)),
        id_of(MemorySource(tensors, "memory")),
        id_of(MemorySource(dict(reversed(tensors.items())), "memory")),
    }
    assert len(found) == 1


def changed_states() -> dict[str, models.State]:
    tensors = models.state("a")
    weight = tensors["blocks.0.weight"]
    flipped = weight.clone().view(torch.int32)
    flipped[7, 3] ^= 1
    minus_zero = tensors | {"scale": torch.tensor(-0.0)}
    return {
        "one bit": tensors | {"blocks.0.weight": flipped.view(torch.float32)},
        "shape": tensors | {"blocks.0.weight": weight.reshape(17, 30)},
        "dtype": tensors | {"blocks.0.weight": weight.double()},
        "name": {("w" if name == "scale" else name): tensor for name, tensor in tensors.items()},
        "one less": {name: tensor for name, tensor in tensors.items() if name != "empty"},
        "shape of an empty one": tensors | {"empty": torch.empty(4, 0)},
        "zero": tensors | {"scale": torch.tensor(0.0)},
        "minus zero": minus_zero,
        "transposed": tensors | {"blocks.0.weight": weight.T.contiguous()},
        "a buffer": tensors | {models.BUFFER: torch.arange(1, 17).reshape(1, 16)},
    }


def test_every_bit_of_content_enters_its_id() -> None:
    states = {"as it was": models.state("a")} | changed_states()
    found = {what: id_of(MemorySource(tensors, what)) for what, tensors in states.items()}
    assert len(set(found.values())) == len(found)


def test_a_tensor_that_lies_strided_in_memory_has_the_id_of_its_values() -> None:
    weight = models.state("a")["blocks.0.weight"]
    assert id_of(MemorySource({"w": weight.T}, "x")) == id_of(MemorySource({"w": weight.T.contiguous()}, "x"))
    assert id_of(MemorySource({"w": weight.numpy()[::2]}, "x")) == id_of(MemorySource({"w": weight[::2]}, "x"))
