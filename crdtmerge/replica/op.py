"""A signed operation: canonical body, id over the body, Ed25519 signature outside the id.

    body  = [1, pool, author, incarnation, seq, prev, deps, height, kind, payload]      canonical MessagePack
    id    = SHA-256("crdtmerge/op/1" 0x00 body)          signature = Ed25519(author, "crdtmerge/sig/1" 0x00 id)
    wire  = signature (64 bytes) body

RULES, in the order in which they are checked
1. At most ``limits.OP_BYTES_MAX`` bytes, which decode to exactly these ten fields and encode again to the same bytes.
2. ``deps`` and the targets in a payload are ids in ascending order without repetition.
3. The signature fits the author, whose key is not of small order. It does not enter the id: a signer can make many
   valid signatures of one statement, and equal statements must be one operation.

An ``Op`` in memory has passed all of them. What depends on other operations is checked by the op set.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

from crdtmerge import limits
from crdtmerge.canonical import pack, unpack
from crdtmerge.errors import OpError
from crdtmerge.keys import Key, verify
from crdtmerge.replica.contribution import Says, is_id, text

VERSION = 1
SIGNATURE_BYTES = 64
INCARNATION_BYTES = 16
NUMBER_MAX = (1 << 63) - 1

Ids = tuple[bytes, ...]


@dataclass(frozen=True)
class Add:
    """A content and what is said of it; ``replaces`` are the author's own ADDs that this one takes the place of."""

    kind: ClassVar[str] = "add"
    content: bytes
    says: Says = field(default_factory=Says)
    replaces: Ids = ()

    @property
    def targets(self) -> Ids:
        """The operations that it acts on."""
        return self.replaces

    @property
    def value(self) -> dict[str, Any]:
        """The canonical payload."""
        return {"content": self.content, "says": self.says.value, "replaces": list(self.replaces)}

    @classmethod
    def of_value(cls, value: Mapping[str, Any]) -> Add:
        """Read a payload."""
        return cls(_id(value["content"]), Says.of_value(value["says"]), _ids(value["replaces"]))


@dataclass(frozen=True)
class Remove:
    """Ends exactly the ADDs that it names."""

    kind: ClassVar[str] = "remove"
    targets: Ids
    reason: str | None = None

    @property
    def value(self) -> dict[str, Any]:
        """The canonical payload."""
        return {"targets": list(self.targets), "reason": self.reason}

    @classmethod
    def of_value(cls, value: Mapping[str, Any]) -> Remove:
        """Read a payload."""
        return cls(_some(value["targets"]), text(value["reason"], limits.NOTE_BYTES_MAX, "reason"))


@dataclass(frozen=True)
class Retract:
    """Hides a content, also against ADDs that are concurrent or come later."""

    kind: ClassVar[str] = "retract"
    targets: ClassVar[Ids] = ()
    content: bytes
    reason: str | None = None

    @property
    def value(self) -> dict[str, Any]:
        """The canonical payload."""
        return {"content": self.content, "reason": self.reason}

    @classmethod
    def of_value(cls, value: Mapping[str, Any]) -> Retract:
        """Read a payload."""
        return cls(_id(value["content"]), text(value["reason"], limits.NOTE_BYTES_MAX, "reason"))


@dataclass(frozen=True)
class Unretract(Remove):
    """Ends exactly the RETRACTs that it names; a concurrent one stands."""

    kind: ClassVar[str] = "unretract"


@dataclass(frozen=True)
class Grant:
    """Gives a key a role: to contribute (member), or to remove and retract anything (curator)."""

    kind: ClassVar[str] = "grant"
    targets: ClassVar[Ids] = ()
    key: bytes
    role: Literal["member", "curator"]

    @property
    def value(self) -> dict[str, Any]:
        """The canonical payload."""
        return {"key": self.key, "role": self.role}

    @classmethod
    def of_value(cls, value: Mapping[str, Any]) -> Grant:
        """Read a payload."""
        if value["role"] not in ("member", "curator"):
            raise OpError(f"role {value['role']!a:.80} is neither member nor curator")
        return cls(_id(value["key"]), value["role"])


@dataclass(frozen=True)
class Revoke:
    """Voids every operation of a key that is not in the chain of one of ``heads``, the last that count."""

    kind: ClassVar[str] = "revoke"
    key: bytes
    heads: Ids
    reason: str | None = None

    @property
    def targets(self) -> Ids:
        """The operations that it acts on."""
        return self.heads

    @property
    def value(self) -> dict[str, Any]:
        """The canonical payload."""
        return {"key": self.key, "heads": list(self.heads), "reason": self.reason}

    @classmethod
    def of_value(cls, value: Mapping[str, Any]) -> Revoke:
        """Read a payload."""
        return cls(_id(value["key"]), _ids(value["heads"]), text(value["reason"], limits.NOTE_BYTES_MAX, "reason"))


@dataclass(frozen=True)
class SetRecipe:
    """Changes the pool's default recipe to another complete one, in its canonical form."""

    kind: ClassVar[str] = "recipe"
    targets: ClassVar[Ids] = ()
    recipe: Mapping[str, Any]

    @property
    def value(self) -> dict[str, Any]:
        """The canonical payload."""
        return {"recipe": dict(self.recipe)}

    @classmethod
    def of_value(cls, value: Mapping[str, Any]) -> SetRecipe:
        """Read a payload."""
        if not isinstance(value["recipe"], dict):
            raise OpError("its recipe is no table")
        return cls(value["recipe"])


Payload = Add | Remove | Retract | Unretract | Grant | Revoke | SetRecipe

KINDS: dict[str, type[Payload]] = {
    payload.kind: payload for payload in (Add, Remove, Retract, Unretract, Grant, Revoke, SetRecipe)
}


def _id(value: object) -> bytes:
    if not is_id(value):
        raise OpError("an id is not 32 bytes")
    return value


def _ids(value: object) -> Ids:
    if not isinstance(value, list) or len(value) > limits.PARENTS_MAX:
        raise OpError(f"a list of ids is no list of at most {limits.PARENTS_MAX}")
    ids = tuple(map(_id, value))
    if any(a >= b for a, b in itertools.pairwise(ids)):
        raise OpError("a list of ids is not in ascending order")
    return ids


def _some(value: object) -> Ids:
    ids = _ids(value)
    if not ids:
        raise OpError("it names no target")
    return ids


@dataclass(frozen=True, eq=False)
class Op:
    """A statement by an actor (``author``, ``incarnation``), the ``seq``-th of its chain."""

    pool: bytes
    author: bytes
    incarnation: bytes
    seq: int
    prev: bytes | None
    deps: Ids
    height: int
    payload: Payload
    body: bytes
    signature: bytes

    @cached_property
    def id(self) -> bytes:
        """SHA-256 of the body in its domain, 32 bytes."""
        return op_id(self.body)

    @property
    def kind(self) -> str:
        """add, remove, retract, unretract, grant, revoke or recipe."""
        return self.payload.kind

    @cached_property
    def parents(self) -> Ids:
        """Every operation that it refers to: its causal past is theirs and themselves."""
        own = () if self.prev is None else (self.prev,)
        return tuple(sorted({*own, *self.deps, *self.payload.targets}))

    @property
    def order(self) -> tuple[int, bytes]:
        """What all replicas order by: causes come first, ties fall by id."""
        return self.height, self.id

    @property
    def wire(self) -> bytes:
        """The bytes that travel."""
        return self.signature + self.body

    @classmethod
    def from_wire(cls, wire: bytes) -> Op:
        """Read an operation and check all that can be checked of it alone. Raises OpError."""
        op = _parsed(wire)
        if not verify(op.author, op.signature, _signed(op.id)):
            raise OpError(f"operation {op.id.hex()[:16]}: its signature is not that of key {op.author.hex()[:16]}.")
        return op

    @classmethod
    def stored(cls, wire: bytes) -> Op:
        """Read an operation that was checked before it was stored: its signature is not looked at again."""
        return _stored(wire)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Op) and self.body == other.body

    def __hash__(self) -> int:
        return hash(self.body)


def op_id(body: bytes) -> bytes:
    """The id of a body."""
    return hashlib.sha256(b"crdtmerge/op/1\0" + body).digest()


def _signed(identity: bytes) -> bytes:
    return b"crdtmerge/sig/1\0" + identity


def signed(
    key: Key, pool: bytes, incarnation: bytes, seq: int, prev: bytes | None, deps: Ids, height: int, payload: Payload
) -> Op:
    """A new operation by ``key``. Raises OpError for one that no replica could read."""
    author = key.public
    body = pack([VERSION, pool, author, incarnation, seq, prev, list(deps), height, payload.kind, payload.value])
    return _parsed(key.sign(_signed(op_id(body))) + body)


def _parsed(wire: bytes) -> Op:
    if len(wire) > limits.OP_BYTES_MAX:
        raise OpError(f"an operation has {len(wire)} bytes; at most {limits.OP_BYTES_MAX} are taken.")
    body = wire[SIGNATURE_BYTES:]
    try:
        version, pool, author, incarnation, seq, prev, deps, height, kind, value = unpack(body)
        if type(version) is not int or version != VERSION:
            raise OpError(f"its version is {version!a:.80}, not {VERSION}")
        payload = KINDS[kind].of_value(value)
        if payload.value != value:
            raise OpError(f"a payload of kind {kind} has other fields")
        op = Op(
            _id(pool),
            _id(author),
            _incarnation(incarnation),
            _count(seq),
            None if prev is None else _id(prev),
            _ids(deps),
            _count(height),
            payload,
            body,
            wire[:SIGNATURE_BYTES],
        )
        if (op.seq == 1) != (op.prev is None):
            raise OpError("the first of a chain has no predecessor, every other has one")
    except _MALFORMED as fault:
        raise OpError(f"an operation is malformed: {_words(fault)}.") from None
    return op


_MALFORMED = (OpError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def _words(fault: BaseException) -> str:
    return str(fault) if isinstance(fault, OpError | ValueError) else f"{type(fault).__name__} {fault!s:.80}"


def _incarnation(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) != INCARNATION_BYTES:
        raise OpError(f"an incarnation is not {INCARNATION_BYTES} bytes")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 1 <= value <= NUMBER_MAX:
        raise OpError(f"{value!a:.80} is no count from 1")
    return value


@lru_cache(maxsize=16384)
def _stored(wire: bytes) -> Op:
    return _parsed(wire)
