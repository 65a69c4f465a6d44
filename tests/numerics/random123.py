"""Philox4x32-10 in Python integers, written from the paper of 2011, and the names of streams: the oracle of masks."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import msgpack

Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """The four output words of one block, ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def name(seed: bytes, purpose: str, contribution: bytes, tensor: str) -> Words:
    """The four words that name a stream: a digest of what it is for."""
    packed = msgpack.packb([seed, purpose, contribution, tensor], use_bin_type=True)
    found = hashlib.sha256(b"crdtmerge/random/1\0" + packed).digest()
    k0, k1, c2, c3 = (int.from_bytes(found[at : at + 4], "little") for at in (0, 4, 8, 12))
    return k0, k1, c2, c3


def word(stream: Words, element: int) -> int:
    """The random word of one element."""
    k0, k1, c2, c3 = stream
    block, half = divmod(element, 8)
    upper, lower = (
        philox((block % 2**32, block // 2**32, c2, last), (k0, k1))[half // 2] >> 16 * (half % 2) & 0xFFFF
        for last in (c3, c3 ^ 1)
    )
    return upper << 16 | lower


def kept(stream: Words, density: Fraction, start: int, stop: int) -> list[bool]:
    """Which elements start..stop-1 are kept at a density."""
    bound = math.floor(density * 2**32)
    return [word(stream, element) < bound for element in range(start, stop)]
