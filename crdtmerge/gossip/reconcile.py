"""Which operations two replicas lack of each other, by comparing fingerprints of ranges. No I/O, no memory of peers.

The operations lie in the order (height, id), so what is new lies at the end. One side opens with a fingerprint of each
of some ranges that together cover everything, short at the end and twice as long with every step back; the other
answers for each that differs with its ids there, or with fingerprints of 16 parts of it; and so on. Where a message
would grow too long, what is left is answered with one fingerprint a range and parted in a later round. Only the side
that opens remembers anything, and only for one session: whatever a peer believes, a session compares what both have.

A message is a list of ranges, each [rise of the height, beginning of an id, kind, value] for the upper end, ascending:

    SAME  nothing to say here        PRINT  fingerprint, 32 bytes        IDS  all ids here        ASK  send the ids here

The last range of a message has no end; what comes after the last that is named is SAME.

>>> ours, theirs = Index([(1, b"a" * 32), (2, b"b" * 32)]), Index([(1, b"a" * 32), (2, b"c" * 32)])
>>> session = Session(ours)
>>> session.take(answer(theirs, session.opening()))
[]
>>> session.wanted() == [b"c" * 32], session.offered() == [b"b" * 32]
(True, True)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

from crdtmerge.errors import InputError
from crdtmerge.gossip.index import ID_BYTES, Bound, Index

NEWEST = 8
"""Operations in the last range of an opening."""

PARTS = 16
"""Into how many a range is parted that differs."""

LISTED_MAX = 32
"""Up to so many ids are listed rather than parted further."""

RANGES_MAX = 4096
"""Ranges of one message: openings have at most 40."""

MESSAGE_BYTES_MAX = 192 << 10
"""A message: ids take 32 bytes, a fingerprint with its bound some 40. It shares a frame with operations."""

SAME, PRINT, IDS, ASK = range(4)


class Range(NamedTuple):
    """What is said of the operations up to a bound: one of the kinds with its value."""

    upper: Bound | None
    kind: int
    value: Any = None


Ranges = list[Range]


class Session:
    """The side that opens: what it learns the other has (``wanted``) and lacks (``offered``), causes first."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._wanted: dict[bytes, tuple[bool, Bound, int]] = {}
        self._offered: dict[bytes, Bound] = {}

    def __len__(self) -> int:
        return len(self._wanted)

    def wanted(self) -> list[bytes]:
        """Ids that the other has, in its order: that of their ranges, and within these as they were listed."""
        return sorted(self._wanted, key=self._wanted.__getitem__)

    def offered(self) -> list[bytes]:
        """Ids that the other lacks, in order."""
        return sorted(self._offered, key=self._offered.__getitem__)

    def opening(self) -> Ranges:
        """Fingerprints of ranges that double in length from the newest on."""
        ends, length = [len(self._index)], NEWEST
        while ends[-1] > 2 * NEWEST and len(ends) < 60:
            ends.append(max(ends[-1] - length, 0))
            length *= 2
        ends = sorted({*ends, 0})
        last = len(self._index)
        ranges = [
            Range(None if high == last else self._index.between(high), PRINT, self._index.fingerprint(low, high))
            for low, high in itertools.pairwise(ends)
        ]
        return ranges or [Range(None, PRINT, self._index.fingerprint(0, 0))]

    def take(self, answered: Ranges) -> Ranges:
        """Learn from an answer; what to say next, nothing if all is known."""
        said = _Message(len(answered))
        for low, high, one in spans(self._index, answered):
            if one.kind == IDS:
                mine = {self._index.id(at): self._index.order(at) for at in range(low, high)}
                range_key = (one.upper is None, one.upper or (0, b""))
                theirs = {identity: (*range_key, number) for number, identity in enumerate(one.value)}
                self._wanted |= {identity: theirs[identity] for identity in theirs.keys() - mine.keys()}
                self._offered |= {identity: mine[identity] for identity in mine.keys() - theirs.keys()}
                said.one(Range(one.upper, SAME))
            elif one.kind == PRINT and (here := self._index.fingerprint(low, high)) != one.value:
                if high - low <= LISTED_MAX:
                    said.one(Range(one.upper, ASK))
                else:
                    said.parts(self._index, low, high, Range(one.upper, PRINT, here))
            else:
                said.one(Range(one.upper, SAME))
        return said.ranges()


def answer(index: Index, asked: Ranges) -> Ranges:
    """The other side: what differs here, from the message alone."""
    said = _Message(len(asked))
    for low, high, one in spans(index, asked):
        here = index.fingerprint(low, high) if one.kind in (PRINT, ASK) else b""
        if one.kind not in (PRINT, ASK) or (one.kind == PRINT and here == one.value):
            said.one(Range(one.upper, SAME))
        elif high - low <= LISTED_MAX:
            said.ids(index, low, high, Range(one.upper, PRINT, here))
        else:
            said.parts(index, low, high, Range(one.upper, PRINT, here))
    return said.ranges()


class _Message:
    """A message under construction, with room kept for a line on each range that is still to come."""

    def __init__(self, coming: int) -> None:
        self._said: Ranges = []
        self._coming, self._bytes = coming, 0

    def one(self, said: Range) -> None:
        """Say something of the next range."""
        self._coming -= 1
        self._bytes += _LINE_BYTES
        self._said.append(said)

    def ids(self, index: Index, low: int, high: int, otherwise: Range) -> None:
        """List its ids, if there is room."""
        nbytes = (high - low) * ID_BYTES
        if self._has_room(1, nbytes):
            self.one(Range(otherwise.upper, IDS, index.ids(low, high)))
            self._bytes += nbytes
        else:
            self.one(otherwise)

    def parts(self, index: Index, low: int, high: int, otherwise: Range) -> None:
        """Part it, if there is room."""
        if self._has_room(PARTS, 0):
            said = parted(index, low, high, otherwise.upper)
            self._coming -= 1
            self._bytes += len(said) * _LINE_BYTES
            self._said += said
        else:
            self.one(otherwise)

    def ranges(self) -> Ranges:
        """The message without what goes without saying."""
        return trimmed(self._said)

    def _has_room(self, lines: int, nbytes: int) -> bool:
        enough = self._bytes + nbytes + (lines + self._coming) * _LINE_BYTES <= MESSAGE_BYTES_MAX
        return enough and len(self._said) + lines + self._coming <= RANGES_MAX


_LINE_BYTES = 96
"""At most what a range takes besides its ids: a bound of 42 bytes, a fingerprint, their marks."""


def parted(index: Index, low: int, high: int, upper: Bound | None) -> Ranges:
    """Fingerprints of equal parts of a range of positions."""
    ends = [low + (high - low) * part // PARTS for part in range(PARTS + 1)]
    return [
        Range(upper if b == high else index.between(b), PRINT, index.fingerprint(a, b))
        for a, b in itertools.pairwise(ends)
        if b > a or b == high
    ]


def trimmed(said: Ranges) -> Ranges:
    """Without what goes without saying: neighbours with nothing to say are one, and the last of them none."""
    kept: Ranges = []
    for one in said:
        if kept and one.kind == SAME and kept[-1].kind == SAME:
            kept.pop()
        kept.append(one)
    return kept[:-1] if kept and kept[-1].kind == SAME else kept


def spans(index: Index, ranges: Ranges) -> Iterator[tuple[int, int, Range]]:
    """The positions that each range of a message covers here."""
    low = 0
    for one in ranges:
        high = max(index.find(one.upper), low)
        yield low, high, one
        low = high


def pack(ranges: Ranges) -> bytes:
    """A message's bytes."""
    rows, height = [], 0
    for one in ranges:
        rise, beginning = (None, b"") if one.upper is None else (one.upper[0] - height, one.upper[1])
        height = height if one.upper is None else one.upper[0]
        value = b"".join(one.value) if one.kind == IDS else one.value
        rows.append([rise, beginning, one.kind] if value is None else [rise, beginning, one.kind, value])
    packed: bytes = msgpack.packb(rows)
    return packed


def unpack(data: bytes) -> Ranges:
    """Read a message. Raises InputError for anything that is none."""
    try:
        if len(data) > MESSAGE_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes, at most {MESSAGE_BYTES_MAX} are read")
        rows = msgpack.unpackb(data)
        if not isinstance(rows, list) or len(rows) > RANGES_MAX:
            raise ValueError(f"no list of at most {RANGES_MAX} ranges")
        return list(_read(rows))
    except (ValueError, TypeError, IndexError, msgpack.exceptions.UnpackException) as fault:
        raise InputError(f"a message of reconciliation is malformed: {type(fault).__name__} {fault!s:.80}.") from None


def _read(rows: list[Any]) -> Iterator[Range]:
    below: Bound = (0, b"")
    for at, row in enumerate(rows):
        rise, beginning, kind, *more = row
        upper = None
        if rise is not None:
            if type(rise) is not int or not isinstance(beginning, bytes) or len(beginning) > ID_BYTES:
                raise ValueError("a bound is no height and beginning of an id")
            upper = (below[0] + rise, beginning)
            if upper <= below or upper[0] >= 1 << 63:
                raise ValueError("bounds do not rise")
            below = upper
        elif at != len(rows) - 1:
            raise ValueError("only the last range has no end")
        value = more[0] if more else None
        if kind == PRINT and (not isinstance(value, bytes) or len(value) != 32):
            raise ValueError("a fingerprint is not 32 bytes")
        if kind == IDS:
            if not isinstance(value, bytes) or len(value) % ID_BYTES:
                raise ValueError("ids are not 32 bytes each")
            value = [value[i : i + ID_BYTES] for i in range(0, len(value), ID_BYTES)]
        elif kind in (SAME, ASK) and value is not None:
            raise ValueError("a value where none belongs")
        elif kind not in (SAME, PRINT, ASK):
            raise ValueError(f"{kind!r} is no kind of range")
        yield Range(upper, kind, value)
