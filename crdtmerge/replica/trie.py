"""The Merkle root of a set of contributions: a compressed binary trie over the bits of the content ids.

    empty H(0x02)    leaf H(0x00 || content id || leaf value)    node H(0x01 || left || right)    H = SHA-256

A subtree with one leaf is that leaf, so the shape depends on the ids alone and not on the order of insertion.
``root`` computes it from nothing, ``Trie`` keeps it while leaves come and go: in pages of up to 16 subtrees, one for
each prefix of whole hexadecimal digits that two leaves share, so that a change writes one short row a digit.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
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
    """The hash over subtrees with these hashes; ``ids`` are in order, any one of each."""
    if len(ids) == 1:
        return hashes[0]
    middle = _middle(ids)[1]
    return _node(_subtree(ids[:middle], hashes[:middle]), _subtree(ids[middle:], hashes[middle:]))


def _path(ids: Sequence[bytes], hashes: Sequence[bytes], at: int) -> list[tuple[int, bytes]]:
    """(bit, hash on the other side) of the forks above one of the subtrees, the lowest first."""
    if len(ids) == 1:
        return []
    bit, middle = _middle(ids)
    if at < middle:
        return [*_path(ids[:middle], hashes[:middle], at), (bit, _subtree(ids[middle:], hashes[middle:]))]
    return [*_path(ids[middle:], hashes[middle:], at - middle), (bit, _subtree(ids[:middle], hashes[:middle]))]


def _middle(ids: Sequence[bytes]) -> tuple[int, int]:
    """The highest bit in which ordered ids differ, and where those begin that have it set: both sides are non-empty."""
    bit = (int.from_bytes(ids[0], "big") ^ int.from_bytes(ids[-1], "big")).bit_length() - 1
    split = int.from_bytes(ids[-1], "big") >> bit << bit
    return bit, bisect_left(ids, split.to_bytes(len(ids[0]), "big"))


def _leaf(identity: bytes, value: bytes) -> bytes:
    return hashlib.sha256(b"\0" + identity + value).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _side(identity: bytes, bit: int) -> int:
    return int.from_bytes(identity, "big") >> bit & 1


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


class Child(NamedTuple):
    """A subtree on a page: the digit that leads to it, whether it is a leaf, its lowest id, its hash."""

    digit: int
    leaf: bool
    id: bytes
    hash: bytes


ROW = struct.Struct(">BB32s32s")


class Trie:
    """The same trie, its pages kept in a table under their prefixes, one byte a digit.

    A page is there for each prefix that two leaves share (the first for any leaf), and only then, so that equal sets
    have equal pages.

    >>> from crdtmerge.replica.tables import MemoryTables
    >>> trie = Trie(MemoryTables(), "visible_nodes")
    >>> trie.put(bytes(32), bytes(32))
    >>> trie.root == root({bytes(32): bytes(32)}) == trie.prove(bytes(32), bytes(32)).root()
    True
    """

    def __init__(self, tables: Tables, table: str) -> None:
        self._tables, self._table = tables, table

    @property
    def root(self) -> bytes:
        """The root of the leaves that are in it."""
        return _over(self._page(b""))

    def put(self, identity: bytes, value: bytes) -> None:
        """Keep a leaf; another value of the same id is replaced."""
        self._put(b"", Child(0, True, identity, _leaf(identity, value)))

    def drop(self, identity: bytes) -> None:
        """Forget a leaf, if there is one."""
        self._drop(b"", identity)

    def prove(self, identity: bytes, value: bytes) -> Proof:
        """That a leaf is in the trie. Raises KeyError if it is not."""
        path: list[tuple[int, bytes]] = []
        prefix = b""
        while True:
            page = self._page(prefix)
            at = next((i for i, child in enumerate(page) if child.digit == _digit(identity, len(prefix))), None)
            if at is None or (page[at].leaf and page[at].hash != _leaf(identity, value)):
                raise KeyError(identity.hex())
            path = _path([child.id for child in page], [child.hash for child in page], at) + path
            if page[at].leaf:
                return Proof(identity, value, tuple(path))
            prefix += bytes([page[at].digit])

    def _put(self, prefix: bytes, leaf: Child) -> Child:
        """Keep a leaf below a prefix; the subtree of that prefix as its parent's page has it."""
        depth = len(prefix)
        digit = _digit(leaf.id, depth)
        page = {child.digit: child for child in self._page(prefix)}
        there = page.get(digit)
        if there is None or (there.id == leaf.id and there.leaf):
            page[digit] = leaf._replace(digit=digit)
        else:
            below = prefix + bytes([digit])
            if there.leaf:
                self._keep(below, {d: there._replace(digit=d) for d in [_digit(there.id, depth + 1)]})
            page[digit] = self._put(below, leaf)._replace(digit=digit)
        return self._keep(prefix, page)

    def _drop(self, prefix: bytes, identity: bytes) -> Child | None:
        """Forget a leaf below a prefix; the subtree of that prefix, None if nothing changed or nothing is left."""
        digit = _digit(identity, len(prefix))
        page = {child.digit: child for child in self._page(prefix)}
        there = page.get(digit)
        if there is None or (there.leaf and there.id != identity):
            return None
        if there.leaf:
            del page[digit]
        else:
            left = self._drop(prefix + bytes([digit]), identity)
            if left is None:
                return None
            page[digit] = left._replace(digit=digit)
        only = next(iter(page.values()), None)
        if prefix and len(page) == 1 and only is not None and only.leaf:
            self._tables.drop(self._table, prefix)
            return only
        if not page:
            self._tables.drop(self._table, prefix)
            return None
        return self._keep(prefix, page)

    def _page(self, prefix: bytes) -> list[Child]:
        rows = self._tables.get(self._table, prefix) or b""
        return [Child(digit, bool(leaf), identity, found) for digit, leaf, identity, found in ROW.iter_unpack(rows)]

    def _keep(self, prefix: bytes, page: dict[int, Child]) -> Child:
        """Write a page; the subtree that it is."""
        children = [page[digit] for digit in sorted(page)]
        self._tables.put(self._table, prefix, value=b"".join(ROW.pack(*child) for child in children))
        return Child(0, False, children[0].id, _over(children))


def _over(page: Sequence[Child]) -> bytes:
    """The hash over a page: subtrees whose digits differ only in the last bit are joined, then in the last two, ..."""
    hashes = {child.digit: child.hash for child in page}
    while len(hashes) > 1:
        joined: dict[int, bytes] = {}
        for digit, found in hashes.items():
            left = joined.get(digit >> 1)
            joined[digit >> 1] = found if left is None else _node(left, found)
        hashes = joined
    return next(iter(hashes.values()), EMPTY)


def _digit(identity: bytes, depth: int) -> int:
    """A hexadecimal digit of an id."""
    return identity[depth // 2] >> (0 if depth % 2 else 4) & 15
