"""Genesis records and manifests as bytes: what is written reads back, all else is refused with InputError alone."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtmerge import limits
from crdtmerge.canonical import pack
from crdtmerge.errors import InputError, PoolMismatchError
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture, Tensor
from crdtmerge.replica.contribution import Manifest, Row
from crdtmerge.replica.genesis import Genesis
from tests.replica.pools import KEYS, POOLS, pool
from tests.replica.wires import digests, ids, mutated, nested

A, B = b"a" * 32, b"b" * 32
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, (1 << 63) - 1), max_size=4).map(tuple)
rows = st.lists(st.builds(Row, names, names, shapes, ids), max_size=5, unique_by=lambda row: row.name)
sorted_rows = rows.map(lambda found: tuple(sorted(found)))
manifests = st.one_of(
    st.builds(Manifest, sorted_rows),
    st.builds(Manifest, sorted_rows, st.sampled_from(["delta", "adapter", "partial"]), ids),
)
floats = st.builds(Tensor, st.sampled_from(["F32", "BF16", "F8_E4M3"]), shapes, st.none())
others = st.builds(Tensor, st.sampled_from(["I64", "U8", "BOOL"]), shapes, ids)
tensors = st.dictionaries(names, floats | others, max_size=4)
architectures = st.none() | tensors.map(lambda found: Architecture(dict(sorted(found.items()))))
recipes = st.builds(
    lambda base, seed, exclude, dtype: Recipe(
        "ties", version=1, base=base, seed=seed, exclude=exclude, dtype=dtype, density="0.2"
    ),
    st.none() | ids,
    st.just("root") | st.integers(0, (1 << 64) - 1),
    st.lists(names, max_size=3),
    st.sampled_from([None, "F32"]),
)
keys = st.lists(st.sampled_from([key.public for key in KEYS]), min_size=1, max_size=4, unique=True).map(tuple)
records = st.builds(
    Genesis,
    recipes,
    architectures,
    st.sampled_from(["open", "members"]),
    st.just("any") | keys,
    digests,
    st.none() | ids,
    st.none() | st.tuples(ids, ids),
)


@settings(max_examples=200, deadline=None)
@given(records)
def test_a_genesis_record_reads_back_from_its_bytes(genesis: Genesis) -> None:
    again = Genesis.from_bytes(genesis.to_bytes())
    assert again == genesis
    assert again.id == genesis.id


@settings(max_examples=200, deadline=None)
@given(manifests)
def test_a_manifest_reads_back_from_its_bytes(manifest: Manifest) -> None:
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.id == manifest.id


def test_pools_of_different_kinds_have_different_ids_and_say_how_they_differ() -> None:
    assert len({genesis.id for genesis in POOLS}) == len(POOLS)
    pool(1).refuse_other(pool(1))
    with pytest.raises(PoolMismatchError, match="curators"):
        pool(1).refuse_other(pool(2))


@settings(max_examples=150, deadline=None)
@given(st.one_of(records.map(Genesis.to_bytes), manifests.map(Manifest.to_bytes)), st.integers(0, 1 << 32))
def test_any_bytes_are_canonical_or_refused_with_our_error_alone(data: bytes, seed: int) -> None:
    random = Random(seed)
    for _ in range(30):
        other = mutated(data, random)
        for read in (Genesis.from_bytes, Manifest.from_bytes):
            try:
                assert read(other).to_bytes() == other
            except InputError:
                continue


def genesis(**changed: Any) -> bytes:
    """A genesis record with other fields."""
    return pack(pool(1).value | changed)


def recipe(**changed: Any) -> bytes:
    """One with another recipe."""
    return genesis(recipe=pool(1).recipe.canonical() | changed)


def architecture(*rows: list[Any]) -> bytes:
    """One with another architecture."""
    return genesis(architecture=list(rows))


def manifest(*rows: list[Any], **changed: Any) -> bytes:
    """A manifest with other fields."""
    return pack({"kind": "full", "base": None, "rows": list(rows)} | changed)


SMALL = bytes(32)
ROW = ["w", "F32", [2], A]
TENSOR = ["w", "F32", [2], None]
REFUSED_RECORDS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "trailing bytes": lambda: genesis() + b"\0",
    "no table": lambda: pack([]),
    "nested arrays": lambda: b"\x91" * 100_000,
    "a forged length": lambda: b"\xdf\xff\xff\xff\xff",
    "too many bytes": lambda: bytes(limits.MANIFEST_BYTES_MAX + 1),
    "another format": lambda: genesis(format=2),
    "a format that is true": lambda: genesis(format=True),
    "an unknown field": lambda: genesis(more=1),
    "an unknown membership": lambda: genesis(membership="closed"),
    "no curators": lambda: genesis(curators=[]),
    "some curators": lambda: genesis(curators="some"),
    "a curator twice": lambda: genesis(curators=[KEYS[0].public] * 2),
    "a curator of small order": lambda: genesis(curators=[SMALL]),
    "a curator that is a text": lambda: genesis(curators=["a" * 32]),
    "too many curators": lambda: genesis(curators=[at.to_bytes(32, "big") for at in range(2, limits.CURATORS_MAX + 3)]),
    "a probe of 31 bytes": lambda: genesis(probe=A[:31]),
    "one it succeeds": lambda: genesis(succeeds=[A]),
    "none it succeeds": lambda: genesis(succeeds=[]),
    "files that are a list": lambda: genesis(files=[]),
    "a file that leaves its folder": lambda: genesis(files={"../x": A}),
    "a recipe that is a list": lambda: genesis(recipe=[]),
    "a recipe with more in it": lambda: recipe(more=1),
    "a seed in another spelling": lambda: recipe(seed="5"),
    "a seed that is too large": lambda: recipe(seed="18446744073709551616"),
    "a base that is no hexadecimal": lambda: recipe(base="xy"),
    "globs in another order": lambda: recipe(exclude=["b", "a"]),
    "an architecture of pairs": lambda: architecture(["w", "F32"]),
    "an architecture without digests": lambda: architecture(["w", "F32", [1]]),
    "floats with a digest": lambda: architecture(["w", "F32", [1], A]),
    "integers without a digest": lambda: architecture(["w", "I64", [1], None]),
    "integers with a digest of 31 bytes": lambda: architecture(["w", "I64", [1], A[:31]]),
    "integers with a digest of no bytes": lambda: architecture(["w", "I64", [1], b""]),
    "bools with a digest in hexadecimal": lambda: architecture(["w", "BOOL", [1], "a" * 32]),
    "a tensor twice": lambda: architecture(TENSOR, TENSOR),
}
UNCHECKED: dict[str, Callable[[], bytes]] = {
    "tensors whose names are numbers": lambda: architecture([5, *TENSOR[1:]]),
    "tensors of no dtype": lambda: architecture(["w", None, [1], None]),
    "shapes of texts": lambda: architecture(["w", "F32", ["x"], None]),
    "shapes below zero": lambda: architecture(["w", "F32", [-1], None]),
    "tensors in another order": lambda: architecture(["b", *TENSOR[1:]], ["a", *TENSOR[1:]]),
    "a base of two bytes": lambda: recipe(base="abcd"),
    "nested parameters": lambda: recipe(params={"x": nested(300)}),
}
TAKEN: dict[str, Callable[[], bytes]] = {
    "floats with a digest of no bytes": lambda: architecture(["w", "F32", [1], b""]),
    "floats with a digest that is false": lambda: architecture(["w", "F32", [1], False]),
}
REFUSED_MANIFESTS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "trailing bytes": lambda: manifest() + b"\0",
    "no table": lambda: pack([]),
    "nested arrays": lambda: b"\x91" * 100_000,
    "a forged length": lambda: b"\xdd\xff\xff\xff\xff",
    "a forged number of rows": lambda: b"\x83\xa4base\xc0\xa4kind\xa4full\xa4rows\xdd\xff\xff\xff\xff",
    "an unknown kind": lambda: manifest(kind="half"),
    "a full one with a base": lambda: manifest(base=A),
    "a delta without base": lambda: manifest(kind="delta"),
    "an unknown field": lambda: manifest(more=1),
    "rows in another order": lambda: manifest(["b", *ROW[1:]], ["a", *ROW[1:]]),
    "a row twice": lambda: manifest(ROW, ROW),
    "a row of three": lambda: manifest(ROW[:3]),
    "a name that is empty": lambda: manifest(["", *ROW[1:]]),
    "a name that is too long": lambda: manifest(["n" * (limits.TENSOR_NAME_BYTES_MAX + 1), *ROW[1:]]),
    "a name in bytes": lambda: manifest([b"w", *ROW[1:]]),
    "a size below zero": lambda: manifest(["w", "F32", [-1], A]),
    "a size that is true": lambda: manifest(["w", "F32", [True], A]),
    "a size of 2^63": lambda: manifest(["w", "F32", [1 << 63], A]),
    "a shape in bytes": lambda: manifest(["w", "F32", b"\1\2", A]),
    "a digest of 31 bytes": lambda: manifest(["w", "F32", [1], A[:31]]),
    "keys in another order": lambda: msgpack.packb({"rows": [], "kind": "full", "base": None}),
}
UNCHECKED_MANIFESTS: dict[str, Callable[[], bytes]] = {
    "a base that is a number": lambda: manifest(kind="delta", base=5),
    "a base of 31 bytes": lambda: manifest(kind="delta", base=A[:31]),
    "a base of nested lists": lambda: b"\x83\xa4base" + b"\x91" * 700 + b"\1\xa4kind\xa5delta\xa4rows\x90",
    "a base that is a table with bytes as keys": lambda: b"\x83\xa4base\x81\xc4\1a\1\xa4kind\xa5delta\xa4rows\x90",
}


def test_the_records_that_others_differ_from_are_taken() -> None:
    assert Genesis.from_bytes(genesis()) == pool(1)
    found = Genesis.from_bytes(architecture(["i", "I64", [2], A], TENSOR)).architecture
    assert found == Architecture({"i": Tensor("I64", (2,), A), "w": Tensor("F32", (2,), None)})
    assert Manifest.from_bytes(manifest(ROW)).rows == (Row("w", "F32", (2,), A),)


@pytest.mark.parametrize("what", REFUSED_RECORDS)
def test_no_genesis_record_with(what: str) -> None:
    with pytest.raises(InputError):
        Genesis.from_bytes(REFUSED_RECORDS[what]())


@pytest.mark.parametrize("what", REFUSED_MANIFESTS)
def test_no_manifest_with(what: str) -> None:
    with pytest.raises(InputError):
        Manifest.from_bytes(REFUSED_MANIFESTS[what]())


@pytest.mark.parametrize("what", UNCHECKED)
def test_no_genesis_record_either_with(what: str) -> None:
    with pytest.raises(InputError):
        Genesis.from_bytes(UNCHECKED[what]())


@pytest.mark.parametrize("what", TAKEN)
def test_nor_with(what: str) -> None:
    with pytest.raises(InputError):
        Genesis.from_bytes(TAKEN[what]())


@pytest.mark.parametrize("what", UNCHECKED_MANIFESTS)
def test_no_manifest_either_with(what: str) -> None:
    with pytest.raises(InputError):
        Manifest.from_bytes(UNCHECKED_MANIFESTS[what]())
