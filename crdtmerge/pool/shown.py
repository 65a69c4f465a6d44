"""What an open replica says of itself and of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from crdtmerge.errors import UsageError
from crdtmerge.keys import Key
from crdtmerge.pool.room import Room
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.entry import Entry
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Grant, Op, Revoke
from crdtmerge.replica.opset import OpSet

if TYPE_CHECKING:
    from crdtmerge.pool.peers import Peers
    from crdtmerge.pool.transfer import Giving, Receiving
    from crdtmerge.store.source import BlobSource


class Shown:
    """An open replica, to be looked at."""

    def __init__(self, room: Room) -> None:
        """Use ``Replica.create``, ``Replica.open`` or ``Replica.of_bundle``."""
        self._room = room

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._room.folder

    @property
    def genesis(self) -> Genesis:
        """The pool as it began."""
        return self._room.genesis

    @property
    def opset(self) -> OpSet:
        """The operations and what follows from them, to be read."""
        return self._room.opset

    @property
    def pool_id(self) -> bytes:
        """Names the pool: replicas with equal ids hold one set."""
        return self.genesis.id

    @property
    def author(self) -> bytes:
        """The public key that signs here."""
        return self._room.author

    @property
    def key(self) -> Key:
        """The key that signs here. Raises KeyFileError."""
        return self._room.own_key()

    @property
    def peers(self) -> Peers:
        """The peers that it trusts."""
        from crdtmerge.pool.peers import Peers

        return Peers(self._room)

    def refuse_inside(self, out: Path) -> None:
        """Raise OutputError for an output that would lie in the replica's folder, or around it."""
        self._room.refuse_inside(out)

    def giving(self) -> Giving:
        """The blobs that it gives to others."""
        from crdtmerge.pool.transfer import Giving

        return Giving(self._room)

    def receiving(self, key_quota: int | None = None) -> Receiving:
        """A context in which it takes blobs from others, of each key's contents at most so many bytes."""
        from crdtmerge.pool.transfer import Receiving

        return Receiving(self._room, key_quota)

    @property
    def recipe(self) -> Recipe:
        """The complete recipe in force."""
        return self.opset.recipe

    @property
    def root(self) -> bytes:
        """The Merkle root of the visible set."""
        return self.opset.root

    @property
    def state_root(self) -> bytes:
        """The digest of all that counts, hidden things too."""
        return self.opset.state_root

    @property
    def heads(self) -> tuple[bytes, ...]:
        """The last operations."""
        return self.opset.heads()

    @property
    def visible(self) -> list[Entry]:
        """The visible set in canonical order."""
        return self.opset.visible()

    def is_ready(self, content: bytes) -> bool:
        """Whether all tensors of a content are here."""
        return self._room.is_ready(content)

    def ready(self) -> set[bytes]:
        """The contents whose tensors are all here."""
        return self._room.ready()

    def manifest(self, content: bytes) -> Manifest | None:
        """The manifest of a content that was added, or of the base."""
        return self._room.manifest(content)

    def source(self, content: bytes, files: Mapping[str, bytes] | None = None) -> BlobSource:
        """A content, or the base, as something to merge or compare. Raises ReplicaError where it is not here."""
        return self._room.source(content, files or {})

    def seen(self, op: bytes) -> float | None:
        """When an operation came here, in seconds since 1970 by this machine's clock: to be shown, never to be used."""
        row = self._room.database.one("SELECT at FROM seen WHERE op = ?", (op,))
        return None if row is None else float(row[0])

    def last_ops(self, count: int | None = None) -> list[Op]:
        """The last operations, or all, in the order (height, id)."""
        if count is None:
            return list(self.opset.ops())
        rows = self._room.database.rows("SELECT member FROM set_order ORDER BY key DESC, member DESC LIMIT ?", (count,))
        return [self.opset.op(row[0]) for row in reversed(rows)]

    def known_keys(self) -> set[bytes]:
        """Every key that signed something here, or was granted or revoked."""
        actors = {row[0][:32] for row in self._room.database.rows("SELECT key FROM set_tips")}
        named = (self.opset.op(row[0]).payload for row in self._room.database.rows("SELECT key FROM set_members"))
        return actors | {payload.key for payload in named if isinstance(payload, Grant | Revoke)}

    def bytes_of(self, content: bytes) -> int | None:
        """Bytes of a content's tensors that are here; None if its manifest is not."""
        manifest = self.manifest(content)
        if manifest is None:
            return None
        blobs = [self._room.blobs.get(row.digest) for row in manifest.rows]
        return sum(blob.nbytes for blob in blobs if blob)

    def whole_bytes_of(self, content: bytes) -> int | None:
        """Bytes of a content's tensors, here or not; None if its manifest is not."""
        from crdtmerge.numerics.dtypes import DTYPES

        manifest = self.manifest(content)
        rows = manifest.rows if manifest else ()
        return sum(DTYPES[row.dtype].nbytes(row.shape) for row in rows if row.dtype in DTYPES) if manifest else None

    def version(self) -> int:
        """A number that changes when another process or thread commits: how a running node notices."""
        return self._room.database.version()

    def snapshot(self) -> AbstractContextManager[None]:
        """A context in which all reads see one state."""
        return self._room.database.snapshot()

    def find(self, prefix: str) -> bytes:
        """The one content or operation whose id begins so. Raises UsageError."""
        found = {*self.contents_like(prefix), *self._like("set_ops", prefix)}
        return _the_one(prefix, found, "content or operation")

    def find_content(self, prefix: str) -> bytes:
        """The one content whose id begins so. Raises UsageError."""
        return _the_one(prefix, self.contents_like(prefix), "contribution")

    def contents_like(self, prefix: str) -> set[bytes]:
        """The contents whose id begins so, also those that were retracted before they were seen."""
        return self._like("set_adds", prefix) | self._like("set_retracts", prefix)

    def _like(self, table: str, prefix: str) -> set[bytes]:
        text = prefix.lower()
        if len(text) < 4 or len(text) > 64 or set(text) - set("0123456789abcdef"):
            raise UsageError(f"{prefix!r} is no id: 4 to 64 hexadecimal digits.")
        low, high = bytes.fromhex(text.ljust(64, "0")), bytes.fromhex(text.ljust(64, "f"))
        rows = self._room.database.rows(f"SELECT DISTINCT key FROM {table} WHERE key BETWEEN ? AND ?", (low, high))
        return {row[0] for row in rows}


def _the_one(prefix: str, found: set[bytes], what: str) -> bytes:
    if not found:
        raise UsageError(f"no {what} begins with {prefix}; `crdtmerge status` and `crdtmerge log` list them.")
    if len(found) > 1:
        some = ", ".join(sorted(one.hex()[: len(prefix) + 4] for one in found)[:5])
        raise UsageError(f"{len(found)} begin with {prefix}: {some}. Give more digits.")
    return found.pop()
