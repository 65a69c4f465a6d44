"""The Merkle root of a set of contributions: a compressed binary trie over the bits of the content ids.

    empty H(0x02)    leaf H(0x00 || content id || leaf value)    node H(0x01 || left || right)    H = SHA-256

A subtree with one leaf is that leaf, so the shape depends on the ids alone and not on the order of insertion.
``root`` computes it from nothing, ``Tries`` keeps two while leaves come and go: in pages of up to eight subtrees, one
for each prefix of whole octal digits that two leaves share, so that a change writes one short row a digit. (A page of
sixteen would overflow what SQLite keeps of a row in one of its own pages.)
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from crdtmerge.errors import DatabaseError
from crdtmerge.replica.tables import Tables

LAST = 7
"""The greatest octal digit."""

DAMAGED = "a row of a trie is damaged. Run `crdtmerge fsck --mend`."

TABLE = "nodes"
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


@lru_cache(maxsize=16384)
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
    """A subtree on a page: the digit that leads to it, 1 for a leaf, its lowest id, its hash in each of the tries."""

    digit: int
    leaf: int
    id: bytes
    visible: bytes
    state: bytes


ROW = struct.Struct(">BB32s32s32s")
ABSENT = bytes(32)
"""In place of a hash: no leaf of the subtree is in this trie."""

Pages = list[tuple[bytes, dict[int, Child]]]


class Tries:
    """Two such tries over ids, of what is visible and of all that counts, kept side by side in one table of pages.

    A page is there for each prefix that two leaves share (the first for any leaf), and only then, so that equal sets
    have equal pages. Keys are the prefixes, one byte a digit.

    >>> from crdtmerge.replica.tables import MemoryTables
    >>> tries = Tries(MemoryTables())
    >>> tries.put(bytes(32), visible=bytes(32), state=None)
    >>> tries.visible == root({bytes(32): bytes(32)}) == tries.prove(bytes(32), bytes(32)).root()
    True
    >>> tries.state == EMPTY
    True
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    @property
    def visible(self) -> bytes:
        """The root of the leaves with a visible value."""
        page = self._page(b"")
        return _present(_standing_for(page).visible) if page else EMPTY

    @property
    def state(self) -> bytes:
        """The root of the leaves with a state value."""
        page = self._page(b"")
        return _present(_standing_for(page).state) if page else EMPTY

    def put(self, identity: bytes, visible: bytes | None, state: bytes | None) -> None:
        """Keep the values of an id instead of those that it had; None: it is not in that trie."""
        if visible is None and state is None:
            self._drop(identity)
            return
        hashes = (ABSENT if value is None else _leaf(identity, value) for value in (visible, state))
        leaf = Child(0, 1, identity, *hashes)
        pages = self._down(identity)
        prefix, page = pages[-1]
        digit = _digit(identity, len(prefix))
        there = page.get(digit)
        if there == leaf._replace(digit=digit):
            return
        while there is not None and there.id != identity:  # pages down to where the two part
            prefix += bytes([digit])
            page = {}
            pages.append((prefix, page))
            digit = _digit(identity, len(prefix))
            other = _digit(there.id, len(prefix))
            if other != digit:
                page[other] = there._replace(digit=other)
                there = None
        self._up(pages, identity, leaf)

    def prove(self, identity: bytes, value: bytes) -> Proof:
        """That an id is visible with a value. Raises KeyError if it is not."""
        path: list[tuple[int, bytes]] = []
        found = None
        for prefix, page in self._down(identity):
            found = page.get(_digit(identity, len(prefix)))
            shown = sorted(child for child in page.values() if child.visible != ABSENT)
            if found not in shown:
                raise KeyError(identity.hex())
            path = _path([child.id for child in shown], [child.visible for child in shown], shown.index(found)) + path
        if found is None or found.visible != _leaf(identity, value):
            raise KeyError(identity.hex())
        return Proof(identity, value, tuple(path))

    def _drop(self, identity: bytes) -> None:
        pages = self._down(identity)
        prefix, page = pages[-1]
        there = page.get(_digit(identity, len(prefix)))
        if there is not None and there.id == identity:
            self._up(pages, identity, None)

    def _down(self, identity: bytes) -> Pages:
        """The pages from the first to the one where the way to an id ends: at a leaf or at nothing."""
        pages: Pages = []
        prefix = b""
        while True:
            page = {child.digit: child for child in self._page(prefix)}
            pages.append((prefix, page))
            digit = _digit(identity, len(prefix))
            if digit not in page or page[digit].leaf:
                return pages
            prefix += bytes([digit])

    def _up(self, pages: Pages, identity: bytes, child: Child | None) -> None:
        """Write pages from the last to the first, with a child on the last where it was, or without it."""
        for prefix, page in reversed(pages):
            digit = _digit(identity, len(prefix))
            if child is None:
                del page[digit]
            else:
                page[digit] = child._replace(digit=digit)
            child = self._keep(prefix, [page[digit] for digit in sorted(page)])

    def _keep(self, prefix: bytes, page: list[Child]) -> Child | None:
        """Write a page, or remove it where it need not be; what stands for it on the page above."""
        if not page or (prefix and len(page) == 1 and page[0].leaf):
            self._tables.drop(TABLE, prefix)
            return page[0] if page else None
        self._tables.put(TABLE, prefix, value=b"".join([ROW.pack(*child) for child in page]))
        return _standing_for(page)

    def _page(self, prefix: bytes) -> list[Child]:
        """The children on a page. Raises DatabaseError for a page that is damaged."""
        try:
            page = list(map(Child._make, ROW.iter_unpack(self._tables.get(TABLE, prefix) or b"")))
        except (struct.error, TypeError) as fault:
            raise DatabaseError(DAMAGED) from fault
        if any(child.digit > LAST for child in page):
            raise DatabaseError(DAMAGED)
        return page


def _standing_for(page: Sequence[Child]) -> Child:
    """What stands on the page above for a page that is kept."""
    digits, _, ids, visible, state = zip(*page, strict=True)
    return Child(0, 0, ids[0], _over(digits, visible), _over(digits, state))


def _over(digits: Iterable[int], hashes: Iterable[bytes]) -> bytes:
    """The hash over a page: neighbours are joined, then the results, until one is left; one without another stays."""
    level = [b""] * 8
    for digit, found in zip(digits, hashes, strict=True):
        if found != ABSENT:
            level[digit] = found
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [_node(left, right) if left and right else left or right for left, right in pairs]
    return level[0] or ABSENT


def _present(found: bytes) -> bytes:
    return EMPTY if found == ABSENT else found


def _digit(identity: bytes, depth: int) -> int:
    """An octal digit of an id from the left; the last one is what is left, a single bit."""
    return (int.from_bytes(identity, "big") << 2) >> (ID_BITS - 1 - 3 * depth) & 7
