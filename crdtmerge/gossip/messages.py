"""What one replica asks another and what that answers, as bytes: MessagePack maps of at most ``FRAME_BYTES_MAX``.

    request   pool, heads, ranges, wants, ops, manifests, said       answer   heads, ranges, ops, manifests, lacks,
                                                                              refused, more, behind, starving, said

``ranges`` are a message of ``reconcile``. ``heads`` of an answer say that the asker lacks exactly the operations that
come with it, and more where it says so. ``lacks`` are the contents whose manifests must come before ADDs of them, and
``behind`` says that operations of the request build on others that are not there; ``starving`` that blobs are lacking
there and the asker cannot be asked for them: it may bring them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import msgpack

from crdtmerge.errors import FalsePeerError

FRAME_BYTES_MAX = 1 << 20
"""A message."""

PAYLOAD_BYTES_MAX = 640 << 10
"""Operations and manifests of one message; beside them ranges, ids and statements find room."""

SMALL_MANIFEST_BYTES = 16 << 10
"""Manifests up to this size travel beside their ADDs; larger ones apart."""

HEADS_MAX = 32
WANTS_MAX = 4096
LACKS_MAX = 4096
REFUSED_MAX = 64
SAID_MAX = 64

ID_BYTES = 32


@dataclass(frozen=True)
class Request:
    """What the side that opens a session says in one round."""

    pool: bytes
    heads: tuple[bytes, ...] | None = None
    ranges: bytes | None = None
    wants: tuple[bytes, ...] = ()
    ops: tuple[bytes, ...] = ()
    manifests: tuple[bytes, ...] = ()
    said: tuple[bytes, ...] = ()

    def to_bytes(self) -> bytes:
        """The message."""
        return _packed({**vars(self), "heads": _joined(self.heads), "wants": _joined(self.wants)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a message. Raises FalsePeerError."""
        fields = _Fields(data)
        return cls(
            fields.id("pool"),
            fields.ids("heads", HEADS_MAX),
            fields.bytes_or_none("ranges"),
            fields.ids("wants", WANTS_MAX) or (),
            fields.items("ops"),
            fields.items("manifests"),
            fields.items("said", SAID_MAX),
        )


@dataclass(frozen=True)
class Answer:
    """What the other side says."""

    heads: tuple[bytes, ...] | None = None
    ranges: bytes | None = None
    ops: tuple[bytes, ...] = ()
    manifests: tuple[bytes, ...] = ()
    lacks: tuple[bytes, ...] = ()
    refused: Mapping[bytes, str] = field(default_factory=dict)
    more: bool = False
    behind: bool = False
    starving: bool = False
    said: tuple[bytes, ...] = ()

    def to_bytes(self) -> bytes:
        """The message."""
        refused = [[one, why[:200]] for one, why in list(self.refused.items())[:REFUSED_MAX]]
        heads, lacks = _joined(self.heads), _joined(self.lacks[:LACKS_MAX])
        return _packed({**vars(self), "heads": heads, "lacks": lacks, "refused": refused})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a message. Raises FalsePeerError."""
        fields = _Fields(data)
        return cls(
            fields.ids("heads", HEADS_MAX),
            fields.bytes_or_none("ranges"),
            fields.items("ops"),
            fields.items("manifests"),
            fields.ids("lacks", LACKS_MAX) or (),
            fields.refused(),
            bool(fields.value("more")),
            bool(fields.value("behind")),
            bool(fields.value("starving")),
            fields.items("said", SAID_MAX),
        )


def _packed(fields: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb({key: value for key, value in fields.items() if value or value == b""})
    assert len(packed) <= FRAME_BYTES_MAX, "messages are filled up to their bound"
    return packed


def _joined(ids: tuple[bytes, ...] | None) -> bytes | None:
    return None if ids is None else b"".join(ids)


class _Fields:
    """The fields of a message from outside, each looked at before it is used."""

    def __init__(self, data: bytes) -> None:
        if len(data) > FRAME_BYTES_MAX:
            raise FalsePeerError(f"a message of {len(data)} bytes; at most {FRAME_BYTES_MAX} are read.")
        try:
            self._fields = msgpack.unpackb(data, strict_map_key=True)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as fault:
            raise FalsePeerError(f"a message is malformed: {type(fault).__name__} {fault!s:.80}.") from None
        if not isinstance(self._fields, dict):
            raise FalsePeerError("a message is no map.")

    def value(self, name: str) -> Any:
        """A field as it came."""
        return self._fields.get(name)

    def id(self, name: str) -> bytes:
        """An id."""
        found = self.bytes_or_none(name)
        if found is None or len(found) != ID_BYTES:
            raise FalsePeerError(f"a message has no {name}.")
        return found

    def bytes_or_none(self, name: str) -> bytes | None:
        """Bytes."""
        found = self.value(name)
        if found is not None and not isinstance(found, bytes):
            raise FalsePeerError(f"{name} in a message is {type(found).__name__}, not bytes.")
        return found

    def ids(self, name: str, count_max: int) -> tuple[bytes, ...] | None:
        """Ids, joined."""
        found = self.bytes_or_none(name)
        if found is None:
            return None
        if len(found) % ID_BYTES or len(found) > count_max * ID_BYTES:
            raise FalsePeerError(f"{name} in a message has {len(found)} bytes: no list of at most {count_max} ids.")
        return tuple(found[at : at + ID_BYTES] for at in range(0, len(found), ID_BYTES))

    def items(self, name: str, count_max: int = FRAME_BYTES_MAX) -> tuple[bytes, ...]:
        """Byte strings."""
        found = self.value(name) or []
        if not isinstance(found, list) or len(found) > count_max or not all(isinstance(one, bytes) for one in found):
            raise FalsePeerError(f"{name} in a message is no list of at most {count_max} byte strings.")
        return tuple(found)

    def refused(self) -> dict[bytes, str]:
        """Why operations were refused, by id."""
        found = self.value("refused") or []
        try:
            pairs = [(one, why) for one, why in found]
        except (ValueError, TypeError):
            pairs = [(None, None)]
        if len(pairs) > REFUSED_MAX or not all(isinstance(one, bytes) and isinstance(why, str) for one, why in pairs):
            raise FalsePeerError("what a message says of refused operations is malformed.")
        return {one: why[:200] for one, why in pairs}
