"""The trie that is kept is the trie that is computed: its root, its nodes, its proofs."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtmerge.replica.tables import MemoryTables
from crdtmerge.replica.trie import EMPTY, ID_BITS, Proof, Tries, root

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
    """The values that an id has from now on, None for not being there."""

    visible: bytes | None
    state: bytes | None


class Kept(NamedTuple):
    """The two tries and what must be in them."""

    tries: Tries
    tables: MemoryTables
    leaves: dict[bytes, Put]

    def of(self, which: str) -> dict[bytes, bytes]:
        """The leaves of one trie."""
        return {one: value for one, put in self.leaves.items() if (value := getattr(put, which)) is not None}


def prefixes(leaves: dict[bytes, Put]) -> set[bytes]:
    """The prefixes, one byte a digit, that two ids share; the empty one if there is any id."""
    octal = [f"{int.from_bytes(identity, 'big') << 2:086o}" for identity in sorted(leaves)]
    digits = [bytes(map(int, one)) for one in octal]
    pairs = itertools.pairwise(digits)
    shared = {one[:depth] for one, other in pairs for depth in range(86) if one[:depth] == other[:depth]}
    return shared | ({b""} if leaves else set())


puts = st.builds(Put, st.one_of(values, st.none()), st.one_of(values, st.none()))
changes = st.lists(st.tuples(ids, puts), max_size=60)


def changed(steps: list[tuple[bytes, Put]]) -> Kept:
    """The tries after some changes, half of the drops of ids that are there."""
    tables, leaves = MemoryTables(), dict[bytes, Put]()
    kept = Kept(Tries(tables), tables, leaves)
    for at, (identity, put) in enumerate(steps):
        gone = put == Put(None, None)
        on = sorted(leaves)[at % len(leaves)] if gone and leaves and at % 2 else identity
        kept.tries.put(on, *put)
        if gone:
            leaves.pop(on, None)
        else:
            leaves[on] = put
        assert kept.tries.visible == root(kept.of("visible"))
        assert kept.tries.state == root(kept.of("state"))
        assert {key for key, _, _ in tables.every("nodes")} == prefixes(leaves), "no page more than those shared"
    return kept


@settings(max_examples=300, deadline=None)
@given(changes)
def test_after_any_changes_roots_and_pages_are_those_of_the_leaves(steps: list[tuple[bytes, Put]]) -> None:
    kept = changed(steps)
    fresh = MemoryTables()
    again = Tries(fresh)
    for identity in reversed(kept.leaves):
        again.put(identity, *kept.leaves[identity])
    assert list(fresh.every("nodes")) == list(kept.tables.every("nodes"))
    resumed = Tries(kept.tables)
    for identity in sorted(kept.leaves):
        resumed.put(identity, None, None)
    assert resumed.visible == resumed.state == EMPTY
    assert kept.tables.count("nodes") == 0


@settings(max_examples=200, deadline=None)
@given(changes.filter(bool), st.data())
def test_a_proof_leads_to_the_root_and_no_other_does(steps: list[tuple[bytes, Put]], data: st.DataObject) -> None:
    kept = changed(steps)
    tries, leaves = kept.tries, kept.of("visible")
    for hidden in kept.leaves.keys() - leaves.keys():
        with pytest.raises(KeyError):
            tries.prove(hidden, kept.leaves[hidden].state or b"")
    if not leaves:
        return
    identity = data.draw(st.sampled_from(sorted(leaves)))
    proof = tries.prove(identity, leaves[identity])
    assert (proof.identity, proof.value) == (identity, leaves[identity])
    assert proof.root() == tries.visible
    bit = data.draw(st.integers(0, ID_BITS - 1))

    def flipped(found: bytes) -> bytes:
        return (int.from_bytes(found, "big") ^ 1 << bit).to_bytes(32, "big")

    others = [proof._replace(identity=flipped(identity)), proof._replace(value=flipped(proof.value))]
    path = proof.path
    for at, (fork, hashed) in enumerate(path):
        others.append(proof._replace(path=(*path[:at], (fork, flipped(hashed)), *path[at + 1 :])))
        others.append(proof._replace(path=(*path[:at], *path[at + 1 :])))
    for other in others:
        assert other.root() != tries.visible


def test_a_leaf_that_is_not_there_is_not_proved() -> None:
    tries = Tries(MemoryTables())
    with pytest.raises(KeyError):
        tries.prove(bytes(32), bytes(32))
    tries.put(bytes(32), bytes(32), None)
    with pytest.raises(KeyError):
        tries.prove(bytes(31) + b"\1", bytes(32))
    with pytest.raises(KeyError):
        tries.prove(bytes(32), b"v" * 32)


@pytest.mark.parametrize("bits", [(1, 1), (2, 1), (-1,), (ID_BITS,)])
def test_a_path_that_no_trie_has_proves_nothing(bits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="forks"):
        Proof(bytes(32), bytes(32), tuple((bit, bytes(32)) for bit in bits)).root()


def test_a_proof_of_an_id_of_another_length_proves_nothing() -> None:
    identity, value = bytes(range(32)), b"v" * 32
    moved = Proof(identity[:31], identity[31:] + value, ())
    with pytest.raises(ValueError, match="id"):
        assert moved.root() == root({identity: value})
