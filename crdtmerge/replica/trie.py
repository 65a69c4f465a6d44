"""The Merkle root of a set of contributions: a compressed binary trie over the bits of the content ids.

    empty H(0x02)    leaf H(0x00 || content id || leaf value)    node H(0x01 || left || right)    H = SHA-256

A subtree with one leaf is that leaf, so the shape depends on the ids alone and not on the order of insertion.
``root`` computes it from nothing, ``Trie`` keeps it while leaves come and go, at one path of nodes a change.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crdtmerge.replica.tables import Tables

EMPTY = hashlib.sha256(b"\2").digest()
ID_BITS = 256


def root(leaves: Mapping[bytes, bytes]) -> bytes:
    """The root of {content id of 32 bytes: leaf value}, 32 bytes.

    >>> root({}).hex()[:8]
    'dbc1b4c9'
    """
    if not leaves:
        return EMPTY
    ids = sorted(leaves)
    return _subtree(ids, [_leaf(i, leaves[i]) for i in ids])


def _subtree(ids: Sequence[bytes], hashes: Sequence[bytes]) -> bytes:
    if len(ids) == 1:
        return hashes[0]
    bit = _differing_bit(ids[0], ids[-1])
    split = int.from_bytes(ids[-1], "big") >> bit << bit
    middle = bisect_left(ids, split.to_bytes(len(ids[0]), "big"))
    left, right = _subtree(ids[:middle], hashes[:middle]), _subtree(ids[middle:], hashes[middle:])
    return _node(left, right)


def _leaf(identity: bytes, value: bytes) -> bytes:
    return hashlib.sha256(b"\0" + identity + value).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _differing_bit(one: bytes, other: bytes) -> int:
    """The highest bit in which two ids differ, -1 for equal ones."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_length() - 1


def _side(identity: bytes, bit: int) -> int:
    return int.from_bytes(identity, "big") >> bit & 1


Fork = tuple[int, bytes, bytes]
"""The bit at which ids differ, and the hashes of the subtrees where it is 0 and where it is 1."""


Kept = tuple[bytes, tuple[object, ...]]
"""A node to be kept, under its hash."""


class Proof(NamedTuple):
    """That a leaf is under a root: where its path forks, lowest bit first, and the hash on the other side."""

    identity: bytes
    value: bytes
    path: tuple[tuple[int, bytes], ...]

    def root(self) -> bytes:
        """The root that it proves the leaf to be under.

        Raises ValueError for a path that no trie has.
        """
        if len(self.identity) != ID_BITS // 8 or len(self.value) != len(EMPTY):
            raise ValueError("a leaf is an id and a value of 32 bytes each")
        bits = [bit for bit, _ in self.path]
        if any(a >= b for a, b in itertools.pairwise(bits)) or not all(0 <= bit < ID_BITS for bit in bits):
            raise ValueError("the forks of a path rise from bit 0 to bit 255")
        found = _leaf(self.identity, self.value)
        for bit, other in self.path:
            found = _node(other, found) if _side(self.identity, bit) else _node(found, other)
        return found


class Trie:
    """The same trie, its nodes kept in a table under their hashes: a leaf is (id, value), a fork (bit, left, right).

    >>> from crdtmerge.replica.tables import MemoryTables
    >>> trie = Trie(MemoryTables(), "visible_nodes", EMPTY)
    >>> trie.put(bytes(32), bytes(32))
    >>> trie.root == root({bytes(32): bytes(32)}) == trie.prove(bytes(32)).root()
    True
    """

    def __init__(self, tables: Tables, table: str, root: bytes) -> None:
        self._tables, self._table, self.root = tables, table, root

    def put(self, identity: bytes, value: bytes) -> None:
        """Keep a leaf; another value of the same id is replaced."""
        leaf = _leaf(identity, value)
        come: list[Kept] = [(leaf, (identity, value))]
        if self.root == EMPTY:
            self._tables.change(self._table, [], come)
            self.root = leaf
            return
        forks, found, (nearest, _) = self._way(identity)
        bit = _differing_bit(identity, nearest)
        if bit < 0:
            self._climb(identity, forks, leaf, [found], come)
            return
        while forks and forks[-1][1][0] < bit:
            found, _ = forks.pop()
        self._climb(identity, forks, _fork(bit, identity, leaf, found, come), [], come)

    def drop(self, identity: bytes) -> None:
        """Forget a leaf, if there is one."""
        if self.root == EMPTY:
            return
        forks, found, (nearest, _) = self._way(identity)
        if nearest != identity:
            return
        if forks:
            parent, fork = forks.pop()
            self._climb(identity, forks, _across(identity, fork), [found, parent], [])
        else:
            self._tables.change(self._table, [found], [])
            self.root = EMPTY

    def prove(self, identity: bytes) -> Proof:
        """That a leaf is in the trie. Raises KeyError if it is not."""
        if self.root == EMPTY:
            raise KeyError(identity.hex())
        forks, _, (nearest, value) = self._way(identity)
        if nearest != identity:
            raise KeyError(identity.hex())
        return Proof(identity, value, tuple((fork[0], _across(identity, fork)) for _, fork in reversed(forks)))

    def _way(self, identity: bytes) -> tuple[list[tuple[bytes, Fork]], bytes, tuple[bytes, bytes]]:
        """The forks (hash, node) from the root down, as an id's bits lead, and the leaf (hash, node) at the end."""
        forks = []
        at = self.root
        while len(node := self._tables.get(self._table, at)) == 3:
            forks.append((at, node))
            at = node[1 + _side(identity, node[0])]
        return forks, at, node

    def _climb(
        self, identity: bytes, forks: list[tuple[bytes, Fork]], below: bytes, gone: list[bytes], come: list[Kept]
    ) -> None:
        """Replace the forks above a change, from the lowest to the root, and write all that changed."""
        for found, fork in reversed(forks):
            gone.append(found)
            below = _fork(fork[0], identity, below, _across(identity, fork), come)
        self._tables.change(self._table, gone, come)
        self.root = below


def _fork(bit: int, identity: bytes, own: bytes, other: bytes, come: list[Kept]) -> bytes:
    """The hash of a fork between the subtree on an id's side and the other; it joins what is to be kept."""
    left, right = (other, own) if _side(identity, bit) else (own, other)
    found = _node(left, right)
    come.append((found, (bit, left, right)))
    return found


def _across(identity: bytes, fork: Fork) -> bytes:
    """The subtree of a fork on the side where an id is not."""
    return fork[1] if _side(identity, fork[0]) else fork[2]
