"""Counter-based random bits: Philox4x32-10, so that element i of a tensor has the same bits wherever it is computed.

A stream is named by (seed, purpose, contribution, tensor). Its name is hashed to 128 bits: a 64-bit key and the
upper half of the counter. The flat index i of an element picks its random word of 32 bits: the upper half is half-word
i mod 8 of the block with counter i div 8 (the lower half of a word comes before its upper half), the lower half the
same half-word of the block whose counter differs in the lowest bit of its last word. So whoever compares words with a
bound needs the lower halves only where an upper half ties: once in 65,536 elements. No state, no order, no generator
to share.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from crdtmerge.canonical import digest
from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF


class Stream(NamedTuple):
    """Four 32-bit words: the key (k0, k1) and the upper half of every counter (c2, c3)."""

    k0: int
    k1: int
    c2: int
    c3: int


def stream(seed: bytes, purpose: str, contribution: bytes, tensor: str) -> Stream:
    """The stream of random bits for one purpose, contribution and tensor."""
    name = digest("random", [seed, purpose, contribution, tensor])
    return Stream(*(int.from_bytes(name[4 * i : 4 * i + 4], "little") for i in range(4)))


def words(s: Stream, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """32-bit words of the elements start..stop-1, as int64 [stop - start] with values below 2^32.

    >>> s = stream(b"seed", "drop", b"id", "w")
    >>> bool((words(s, 0, 10)[3:7] == words(s, 3, 7)).all())
    True
    """
    first, last = start // 8, -(-stop // 8)
    index = torch.arange(first, last, dtype=torch.int64, device=device)
    twice = index.expand(2, -1)
    ends = torch.tensor([[s.c3], [s.c3 ^ 1]], dtype=torch.int64, device=device)
    block = torch.stack(_rounds(twice & MASK, twice >> 32, torch.full_like(ends, s.c2), ends, s.k0, s.k1), dim=2)
    upper, lower = torch.stack([block & 0xFFFF, block >> 16], dim=3).flatten(1)
    found: Tensor = ((upper << 16) | lower)[start - 8 * first : stop - 8 * first]
    return found


def philox(low: Tensor, high: Tensor, s: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of the blocks whose counters are (low, high, c2, c3), in int64 that wraps."""
    return _rounds(low, high, torch.full_like(low, s.c2), torch.full_like(low, s.c3), s.k0, s.k1)


def _rounds(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, k0: int, k1: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over the counters (x0, x1, x2, x3), whose shapes broadcast."""
    for _ in range(ROUNDS):
        p0, p1 = x0 * M0, x2 * M1
        x0, x1, x2, x3 = ((p1 >> 32) & MASK) ^ x1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return x0, x1, x2, x3


def keep_below(density: Decimal) -> int:
    """The integer T such that an element is kept if and only if its word is below T: floor(density * 2^32).

    >>> keep_below(Decimal("0.5")), keep_below(Decimal(1))
    (2147483648, 4294967296)
    """
    top, bottom = density.as_integer_ratio()
    return (top << 32) // bottom
