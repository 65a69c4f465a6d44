"""What peers say that a merge came to: signed output digests. Two that differ for one merge show that one is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from crdtmerge.canonical import pack, unpack
from crdtmerge.errors import FalsePeerError
from crdtmerge.gossip.messages import SAID_MAX
from crdtmerge.keys import Key, verify
from crdtmerge.replica.contribution import is_id

KEPT_MAX = 1024
"""Keys whose last statement is remembered."""

SIGNATURE_BYTES = 64
STATEMENT_BYTES_MAX = 512
_DOMAIN = b"crdtmerge/statement/1\0"


class Statement(NamedTuple):
    """That a key merged ``merge`` and came to ``output``; the last of a key's has the greatest number."""

    pool: bytes
    key: bytes
    number: int
    merge: bytes
    output: bytes
    wire: bytes

    @classmethod
    def signed(cls, key: Key, pool: bytes, number: int, merge: bytes, output: bytes) -> Statement:
        """A new statement."""
        body = pack([pool, key.public, number, merge, output])
        return cls(pool, key.public, number, merge, output, key.sign(_DOMAIN + body) + body)

    @classmethod
    def from_wire(cls, wire: bytes) -> Statement:
        """Read one. Raises FalsePeerError for one that its key did not sign."""
        body = wire[SIGNATURE_BYTES:]
        try:
            if len(wire) > STATEMENT_BYTES_MAX:
                raise ValueError("too long")
            pool, key, number, merge, output = unpack(body)
            if not all(map(is_id, (pool, key, merge, output))) or type(number) is not int:
                raise ValueError("no statement")
        except (ValueError, TypeError) as fault:
            raise FalsePeerError(f"a statement is malformed: {fault!s:.80}.") from None
        if not verify(key, wire[:SIGNATURE_BYTES], _DOMAIN + body):
            raise FalsePeerError(f"a statement is not signed by {key.hex()[:16]}.")
        return cls(pool, key, number, merge, output, wire)


class Statements:
    """The last statement of each key, as many as are remembered."""

    def __init__(self, pool: bytes) -> None:
        self._pool = pool
        self._last: dict[bytes, Statement] = {}

    def take(self, wires: Iterable[bytes]) -> list[Statement]:
        """Learn; those that are news. Raises FalsePeerError."""
        news = []
        for wire in wires:
            if any(wire == known.wire for known in self._last.values()):
                continue
            one = Statement.from_wire(wire)
            known = self._last.get(one.key)
            if one.pool == self._pool and (known is None or one.number > known.number):
                self._last.pop(one.key, None)
                self._last[one.key] = one
                news.append(one)
        while len(self._last) > KEPT_MAX:
            del self._last[next(iter(self._last))]
        return news

    def newest(self) -> list[bytes]:
        """The statements that came last, as many as a message takes."""
        return [one.wire for one in list(self._last.values())[-SAID_MAX:]]

    def disagreeing(self, merge: bytes, output: bytes) -> list[Statement]:
        """Those that say of one merge that it came to something else."""
        return [one for one in self._last.values() if one.merge == merge and one.output != output]
