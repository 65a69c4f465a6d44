"""The Merkle root of a set of contributions: a compressed binary trie over the bits of the content ids.

    empty H(0x02)    leaf H(0x00 || content id || leaf value)    node H(0x01 || left || right)    H = SHA-256

A subtree with one leaf is that leaf, so the shape depends on the ids alone and not on the order of insertion.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence


def root(leaves: Mapping[bytes, bytes]) -> bytes:
    """The root of {content id of 32 bytes: leaf value}, 32 bytes.

    >>> root({}).hex()[:8]
    'dbc1b4c9'
    """
    if not leaves:
        return hashlib.sha256(b"\2").digest()
    ids = sorted(leaves)
    return _subtree(ids, [hashlib.sha256(b"\0" + i + leaves[i]).digest() for i in ids])


def _subtree(ids: Sequence[bytes], hashes: Sequence[bytes]) -> bytes:
    if len(ids) == 1:
        return hashes[0]
    differing = int.from_bytes(ids[0], "big") ^ int.from_bytes(ids[-1], "big")
    bit = differing.bit_length() - 1  # the highest bit in which they differ, so both sides are non-empty
    split = int.from_bytes(ids[-1], "big") >> bit << bit
    middle = bisect_left(ids, split.to_bytes(len(ids[0]), "big"))
    left, right = _subtree(ids[:middle], hashes[:middle]), _subtree(ids[middle:], hashes[middle:])
    return hashlib.sha256(b"\1" + left + right).digest()
