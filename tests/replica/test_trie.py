"""The trie that is kept is the trie that is computed: its root, its nodes, its proofs."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtmerge.replica.tables import MemoryTables
from crdtmerge.replica.trie import EMPTY, ID_BITS, Proof, Trie, root

values = st.binary(min_size=32, max_size=32)


def near(parts: tuple[bytes, int, int]) -> bytes:
    """An id that shares the first bits of another."""
    prefix, bit, tail = parts
    return (int.from_bytes(prefix, "big") ^ tail << bit & (1 << ID_BITS) - 1).to_bytes(32, "big")


ids = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.tuples(st.sampled_from([bytes(32), b"\xff" * 32, b"\xaa" * 32]), st.integers(0, 255), st.integers(0, 3)).map(
        near
    ),
)


class Put(NamedTuple):
    """Keep a leaf."""

    value: bytes


class Kept(NamedTuple):
    """A trie and what must be in it."""

    trie: Trie
    tables: MemoryTables
    leaves: dict[bytes, bytes]


def prefixes(leaves: dict[bytes, bytes]) -> set[bytes]:
    """The prefixes, one byte a digit, that two ids share; the empty one if there is any id."""
    digits = [bytes(int(digit, 16) for digit in identity.hex()) for identity in sorted(leaves)]
    pairs = itertools.pairwise(digits)
    shared = {one[:depth] for one, other in pairs for depth in range(65) if one[:depth] == other[:depth]}
    return shared | ({b""} if leaves else set())


changes = st.lists(st.tuples(ids, st.one_of(values.map(Put), st.none())), max_size=60)


def changed(steps: list[tuple[bytes, Put | None]]) -> Kept:
    """A trie after some changes, half of the drops of ids that are there."""
    tables, leaves = MemoryTables(), dict[bytes, bytes]()
    trie = Trie(tables, "visible_nodes")
    for at, (identity, put) in enumerate(steps):
        if put:
            trie.put(identity, put.value)
            leaves[identity] = put.value
        else:
            gone = sorted(leaves)[at % len(leaves)] if leaves and at % 2 else identity
            trie.drop(gone)
            leaves.pop(gone, None)
        assert trie.root == root(leaves)
        assert {key for key, _, _ in tables.every("visible_nodes")} == prefixes(leaves), (
            "no page more than those shared"
        )
    return Kept(trie, tables, leaves)


@settings(max_examples=300, deadline=None)
@given(changes)
def test_after_any_changes_root_and_nodes_are_those_of_the_leaves(steps: list[tuple[bytes, Put | None]]) -> None:
    kept = changed(steps)
    fresh = MemoryTables()
    again = Trie(fresh, "visible_nodes")
    for identity in reversed(kept.leaves):
        again.put(identity, kept.leaves[identity])
    assert list(fresh.every("visible_nodes")) == list(kept.tables.every("visible_nodes"))
    resumed = Trie(kept.tables, "visible_nodes")
    for identity in sorted(kept.leaves):
        resumed.drop(identity)
    assert resumed.root == EMPTY
    assert kept.tables.count("visible_nodes") == 0


@settings(max_examples=200, deadline=None)
@given(changes.filter(bool), st.data())
def test_a_proof_leads_to_the_root_and_no_other_does(
    steps: list[tuple[bytes, Put | None]], data: st.DataObject
) -> None:
    trie, _, leaves = changed(steps)
    if not leaves:
        return
    identity = data.draw(st.sampled_from(sorted(leaves)))
    proof = trie.prove(identity, leaves[identity])
    assert (proof.identity, proof.value) == (identity, leaves[identity])
    assert proof.root() == trie.root
    bit = data.draw(st.integers(0, ID_BITS - 1))

    def flipped(found: bytes) -> bytes:
        return (int.from_bytes(found, "big") ^ 1 << bit).to_bytes(32, "big")

    others = [proof._replace(identity=flipped(identity)), proof._replace(value=flipped(proof.value))]
    path = proof.path
    for at, (fork, hashed) in enumerate(path):
        others.append(proof._replace(path=(*path[:at], (fork, flipped(hashed)), *path[at + 1 :])))
        others.append(proof._replace(path=(*path[:at], *path[at + 1 :])))
    for other in others:
        assert other.root() != trie.root


def test_a_leaf_that_is_not_there_is_not_proved() -> None:
    trie = Trie(MemoryTables(), "visible_nodes")
    with pytest.raises(KeyError):
        trie.prove(bytes(32), bytes(32))
    trie.put(bytes(32), bytes(32))
    with pytest.raises(KeyError):
        trie.prove(bytes(31) + b"\1", bytes(32))
    with pytest.raises(KeyError):
        trie.prove(bytes(32), b"v" * 32)


@pytest.mark.parametrize("bits", [(1, 1), (2, 1), (-1,), (ID_BITS,)])
def test_a_path_that_no_trie_has_proves_nothing(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="forks"):
        Proof(bytes(32), bytes(32), tuple((bit, bytes(32)) for bit in bits)).root()


def test_a_proof_of_an_id_of_another_length_proves_nothing() -> None:
    identity, value = bytes(range(32)), b"v" * 32
    moved = Proof(identity[:31], identity[31:] + value, ())
    with pytest.raises(ValueError, match="id"):
        assert moved.root() == root({identity: value})


def test_two_tries_over_one_set_of_tables_do_not_touch() -> None:
    tables = MemoryTables()
    one, other = Trie(tables, "visible_nodes"), Trie(tables, "state_nodes")
    one.put(bytes(32), b"v" * 32)
    other.put(bytes(32), b"v" * 32)
    one.drop(bytes(32))
    assert (one.root, other.root) == (EMPTY, root({bytes(32): b"v" * 32}))
    assert other.prove(bytes(32), b"v" * 32).root() == other.root
