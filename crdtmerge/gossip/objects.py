"""What lies in a folder or bucket that replicas share: the names, and the bytes of segments. No I/O.

    v1/POOL/genesis                                     the genesis record
    v1/POOL/ops/AUTHOR-INCARNATION/FIRST-SHA256.seg     operations of one chain from the FIRST on, each after its length
    v1/POOL/manifests/CONTENT                           a manifest
    v1/POOL/trees/aa/DIGEST                             the tree of a tensor of more than one piece
    v1/POOL/blobs/aa/DIGEST                             the bytes of a tensor or a carried file

RULES
1. A name says what its bytes are, by a digest. So nothing is ever changed, all writers of a name write the same, and
   whatever else stands under it is wrong and may be replaced by whoever has the right bytes.
2. Names are in lower case and exactly these. Anything else (conflict copies, temporary files) is nobody's.
3. Operations in a segment are in the order (seq, id), the first at FIRST. A segment of which one is wrong is wrong.
4. A segment is known unread if the operations that are here, from FIRST on, come to its size and its SHA-256. That
   holds whatever a listing claims, and where a chain forks or has holes it fails: then the segment is read.
5. A new segment takes in what is before it as a Fenwick tree does: if the chain reaches a multiple of 2^k in it, the
   largest such, also has the 2^k operations before that. So however a chain of n operations grew, it can be read in
   about log2(n) segments, and each operation is written about log2(n) times.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from crdtmerge import limits
from crdtmerge.errors import BundleError, FalsePeerError, OpError
from crdtmerge.replica.op import INCARNATION_BYTES, Op
from crdtmerge.store.bundle import LENGTH, framed, unframed

SEGMENT_BYTES_MAX = 8 * limits.MIB
"""A segment that is written: some 20,000 operations, one request."""

SEGMENT_READ_BYTES_MAX = 16 * limits.MIB
"""A segment that is read: other versions may write larger ones, and it is held in memory."""

SEGMENT_OPS_MAX = SEGMENT_READ_BYTES_MAX // 64
"""Operations of a segment: each has a signature of 64 bytes."""

WIRES_MAX = 32768
"""Operations of a chain that are held while its segments, which overlap, are compared with them: some 13 MB."""

OP_BYTES_MIN = 200
"""An operation has no fewer; tells how many a segment has at most."""

LISTED_MAX = 1_000_000
"""Objects of a pool that a listing is read for: they are held in memory, some 200 bytes each."""

KINDS = ("ops", "manifests", "trees", "blobs")
"""Folders of a pool in the order in which they are listed: what an operation refers to was there before it."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"ops/([0-9a-f]{64})-([0-9a-f]{32})/([0-9]{12})-([0-9a-f]{64})\.seg")
_OTHER = re.compile(r"(manifests)/([0-9a-f]{64})|(trees|blobs)/([0-9a-f]{2})/(\4[0-9a-f]{62})")

VERSION = "v1"


class Segment(NamedTuple):
    """A name of operations of one chain, an author with an incarnation, and how many bytes it is said to have."""

    chain: bytes
    first: int
    sha256: bytes
    nbytes: int

    @property
    def name(self) -> str:
        """Its name within the pool."""
        author, incarnation = self.chain[:-INCARNATION_BYTES].hex(), self.chain[-INCARNATION_BYTES:].hex()
        return f"ops/{author}-{incarnation}/{self.first:012d}-{self.sha256.hex()}.seg"


def manifest_name(content: bytes) -> str:
    """The name of a manifest within a pool."""
    return f"manifests/{content.hex()}"


def tree_name(digest: bytes) -> str:
    """The name of a tree within a pool."""
    return f"trees/{digest.hex()[:2]}/{digest.hex()}"


def blob_name(digest: bytes) -> str:
    """The name of a blob within a pool."""
    return f"blobs/{digest.hex()[:2]}/{digest.hex()}"


def pool_prefix(pool: bytes) -> str:
    """Where the objects of a pool lie."""
    return f"{VERSION}/{pool.hex()}"


def is_pool(name: str) -> bool:
    """Whether a name is that of a pool."""
    return _DIGEST.fullmatch(name) is not None


@dataclass
class Listing:
    """The names of a pool that are there, as far as a listing says."""

    segments: dict[bytes, list[Segment]] = field(default_factory=dict)
    manifests: dict[bytes, int] = field(default_factory=dict)
    trees: dict[bytes, int] = field(default_factory=dict)
    blobs: dict[bytes, int] = field(default_factory=dict)
    count: int = 0

    def enter(self, name: str, nbytes: int) -> bool:
        """Enter a name; whether it is one of ours."""
        if found := _SEGMENT.fullmatch(name):
            author, incarnation, first, sha256 = found.groups()
            segment = Segment(bytes.fromhex(author + incarnation), int(first), bytes.fromhex(sha256), nbytes)
            self.segments.setdefault(segment.chain, []).append(segment)
        elif found := _OTHER.fullmatch(name):
            kind, digest = found[1] or found[3], bytes.fromhex(found[2] or found[5])
            {"manifests": self.manifests, "trees": self.trees, "blobs": self.blobs}[kind][digest] = nbytes
        else:
            return False
        self.count += 1
        return True


# ---- segments


def pack(ops: Iterable[bytes]) -> bytes:
    """The bytes of a segment."""
    return framed(ops)


def segment_of(chain: bytes, first: int, data: bytes) -> Segment:
    """The segment that has these bytes."""
    return Segment(chain, first, hashlib.sha256(data).digest(), len(data))


def unpack(segment: Segment, pool: bytes, data: bytes) -> list[Op]:
    """The operations of a segment, checked. Raises FalsePeerError."""
    if hashlib.sha256(data).digest() != segment.sha256:
        raise FalsePeerError("holds other bytes than its name says.")
    try:
        ops = [Op.from_wire(wire) for wire in unframed(data, SEGMENT_OPS_MAX)]
    except (OpError, BundleError) as fault:
        raise FalsePeerError(f"is no list of operations: {fault}") from None
    places = [(op.seq, op.id) for op in ops]
    if not ops or places[0][0] != segment.first or any(a >= b for a, b in itertools.pairwise(places)):
        raise FalsePeerError("its operations are not in order from the first that its name says.")
    if any(op.pool != pool or op.author + op.incarnation != segment.chain for op in ops):
        raise FalsePeerError("holds operations of another pool or chain.")
    return ops


class Chain:
    """The operations of one chain that are here, by (seq, id), and what of it lies in which segments."""

    def __init__(self, places: Iterable[tuple[int, bytes]], wire: Callable[[bytes], bytes]) -> None:
        self._places = sorted(places)
        self._wire = lru_cache(WIRES_MAX)(wire)

    def add(self, places: Iterable[tuple[int, bytes]]) -> None:
        """Operations that came."""
        for place in places:
            at = bisect_left(self._places, place)
            if self._places[at : at + 1] != [place]:
                self._places.insert(at, place)

    def within(self, segment: Segment) -> range | None:
        """Which of the operations here a segment has, if it has none but these."""
        begin = at = bisect_left(self._places, (segment.first, b""))
        left, seen = segment.nbytes, hashlib.sha256()
        while left > 0 and at < len(self._places):
            item = pack([self._wire(self._places[at][1])])
            seen.update(item)
            left, at = left - len(item), at + 1
        return range(begin, at) if left == 0 and at > begin and seen.digest() == segment.sha256 else None

    def examine(self, segments: Iterable[Segment]) -> tuple[list[Segment], set[bytes]]:
        """The segments that hold, or may hold, what is not here; and the operations that no other segment has."""
        unknown: list[Segment] = []
        there = bytearray(len(self._places))
        for segment in segments:
            found = self.within(segment)
            if found is None:
                unknown.append(segment)
            else:
                there[found.start : found.stop] = b"\1" * len(found)
        return unknown, {one for (_, one), known in zip(self._places, there, strict=True) if not known}

    def cut(self, lacking: Collection[bytes]) -> Iterator[tuple[int, list[bytes]]]:
        """New segments for operations that are not there, as the first seq and the ids."""
        for begin, end in _runs([at for at, (_, one) in enumerate(self._places) if one in lacking]):
            longer = _begin(begin, end)
            if longer < begin and self._nbytes(longer, end) <= SEGMENT_BYTES_MAX:
                begin = longer
            while begin < end:
                stop, room = begin, SEGMENT_BYTES_MAX
                while stop < end and (room := room - self._nbytes(stop, stop + 1)) >= 0:
                    stop += 1
                yield self._places[begin][0], [one for _, one in self._places[begin:stop]]
                begin = stop

    def _nbytes(self, begin: int, end: int) -> int:
        """Bytes of a stretch, or more than a segment takes."""
        total = 0
        for _, one in self._places[begin:end]:
            total += LENGTH + len(self._wire(one))
            if total > SEGMENT_BYTES_MAX:
                break
        return total


def _begin(begin: int, end: int) -> int:
    """Where a segment begins that brings a chain from ``begin`` operations to ``end``.

    >>> _begin(10, 20), _begin(20, 30), _begin(44, 45)
    (0, 16, 44)
    """
    step = 1 << ((begin ^ end).bit_length() - 1)
    reached = end & -step
    return min(begin, reached & (reached - 1))


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, one past the last).

    >>> _runs([0, 1, 2, 5])
    [(0, 3), (5, 6)]
    """
    ends = [at for at, number in enumerate(numbers) if at + 1 == len(numbers) or numbers[at + 1] != number + 1]
    begins = [0, *(at + 1 for at in ends)]
    return [(numbers[begin], numbers[end] + 1) for begin, end in zip(begins, ends, strict=False)]


def apart(segments: Iterable[Segment], most: int) -> list[Segment]:
    """Of segments in the order of reading as many as surely have no operation in common: they can be read at once."""
    chosen: list[Segment] = []
    end = 0
    for segment in segments:
        if segment.first >= end and len(chosen) < most:
            chosen.append(segment)
            end = segment.first + max(1, segment.nbytes // OP_BYTES_MIN)
    return chosen


def reading_order(segment: Segment) -> tuple[int, int, bytes]:
    """From the first operation on, the longest first: what others have in part then needs no reading."""
    return segment.first, -segment.nbytes, segment.sha256
