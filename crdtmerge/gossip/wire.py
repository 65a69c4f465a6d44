"""The paths of a peer's HTTP interface and the bytes that travel on them besides ``messages``.

POST /v1/join               an invitation's secret and a key -> the genesis record      the one for strangers
POST /v1/sync               a request of ``messages`` -> an answer
GET  /v1/manifest/CONTENT   a manifest           PUT   one that an ADD needs that is about to be sent
POST /v1/whole              ids -> those files and tensors of one piece that are here     PUT   some of them
GET  /v1/tree/DIGEST        the tree of a tensor                PUT   the tree of one that is lacking
GET  /v1/blob/DIGEST        bytes of a tensor, by Range         PUT   a piece of one, by Content-Range
GET  /v1/lacking            what this replica lacks
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgpack

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError
from crdtmerge.keys import Key, is_small_order, verify

CONTENT_TYPE = "application/vnd.crdtmerge"

WHOLE_BYTES_MAX = limits.CARRIED_FILES_BYTES_MAX
"""A message of whole tensors and files: one file at most of the largest size."""

LACKING_MAX = 4096
"""Blobs in one answer about what is lacking."""

JOIN_BYTES_MAX = 1024
_JOIN_DOMAIN = b"crdtmerge/join/1\0"


class Joining(NamedTuple):
    """What a stranger says who was invited: the secret, its key, and a signature over both and the server's key."""

    secret: bytes
    key: bytes

    def signed(self, key: Key, server: bytes) -> bytes:
        """The message."""
        body = [self.secret, self.key]
        packed: bytes = msgpack.packb([*body, key.sign(_JOIN_DOMAIN + server + msgpack.packb(body))])
        return packed

    @classmethod
    def read(cls, data: bytes, server: bytes) -> Joining:
        """Read and check the message. Raises FalsePeerError."""
        try:
            secret, key, signature = msgpack.unpackb(data)
            message = _JOIN_DOMAIN + server + msgpack.packb([secret, key])
            sound = isinstance(secret, bytes) and len(key) == 32
            if not sound or is_small_order(key) or not verify(key, signature, message):
                raise ValueError("its signature is not that of its key")
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as fault:
            raise FalsePeerError(f"a message to join is malformed: {fault!s:.80}.") from None
        return cls(secret, key)


class LackingThere(NamedTuple):
    """What a peer lacks: blobs that travel whole, and large ones with the bits of the pieces that it has."""

    whole: list[bytes]
    large: dict[bytes, bytes]

    def to_bytes(self) -> bytes:
        """The message."""
        packed: bytes = msgpack.packb([b"".join(self.whole), list(self.large.items())])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> LackingThere:
        """Read the message. Raises FalsePeerError."""
        try:
            whole, large = msgpack.unpackb(data)
            found = cls(_ids(whole), {_id(one): _bytes(have) for one, have in large})
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as fault:
            raise FalsePeerError(f"what a peer says that it lacks is malformed: {fault!s:.80}.") from None
        return found


def pack_ids(ids: Iterable[bytes]) -> bytes:
    """Ids, joined."""
    return b"".join(ids)


def read_ids(data: bytes) -> list[bytes]:
    """Ids. Raises FalsePeerError."""
    try:
        return _ids(data)
    except ValueError as fault:
        raise FalsePeerError(str(fault)) from None


def pack_whole(found: Mapping[bytes, bytes]) -> bytes:
    """Blobs with their digests."""
    packed: bytes = msgpack.packb(list(found.items()))
    return packed


def read_whole(data: bytes) -> dict[bytes, bytes]:
    """Blobs with their digests; whoever keeps them checks them. Raises FalsePeerError."""
    try:
        pairs: list[Any] = msgpack.unpackb(data, max_bin_len=WHOLE_BYTES_MAX)
        return {_id(one): _bytes(content) for one, content in pairs}
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as fault:
        raise FalsePeerError(f"a message of blobs is malformed: {fault!s:.80}.") from None


def _ids(data: bytes) -> list[bytes]:
    if not isinstance(data, bytes) or len(data) % 32:
        raise ValueError("no list of ids")
    return [data[at : at + 32] for at in range(0, len(data), 32)]


def _id(value: object) -> bytes:
    if len(_bytes(value)) != 32:
        raise ValueError("no id")
    return _bytes(value)


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):  # of a number ``bytes`` would make as many zeros
        raise ValueError(f"{type(value).__name__} in the place of bytes")
    return value
