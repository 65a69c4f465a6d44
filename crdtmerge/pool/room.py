"""The parts of an open replica, and what is done with them within one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from crdtmerge.errors import DatabaseError, InputError, KeyFileError, OutputError, ReplicaError
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest, is_id
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add, Op, Payload
from crdtmerge.replica.opset import Joined, OpSet
from crdtmerge.store.database import Database, SqliteTables
from crdtmerge.store.group_commit import GroupCommit

if TYPE_CHECKING:
    from crdtmerge.resolve.statistic import Kept
    from crdtmerge.store.blobs import Blobs, Staging
    from crdtmerge.store.disk import Disk
    from crdtmerge.store.ingest import Intake
    from crdtmerge.store.source import BlobSource

KEY_NAME = "key.pem"

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


class Room:
    """A replica's folder: database, blobs, operations, key."""

    def __init__(self, folder: Path, database: Database, genesis: Genesis, disk: Disk) -> None:
        self.folder, self.genesis, self.database = folder, genesis, database
        self._disk = disk
        self.group = GroupCommit(database)
        self.opset = OpSet(genesis, SqliteTables(database))
        self._key: Key | None = None

    @classmethod
    def opened(cls, folder: Path, disk: Disk) -> Room:
        """An existing one. Raises ReplicaError."""
        database = Database.open(folder)
        data = database.meta("genesis")
        if data is None:
            raise ReplicaError(f"{folder}: was never finished; remove it and begin again.")
        try:
            genesis = Genesis.from_bytes(data)
        except InputError as fault:
            raise ReplicaError(f"{folder}: {fault}") from None
        return cls(folder, database, genesis, disk)

    @classmethod
    def begun(cls, folder: Path, genesis: Genesis, key: Key, quota: int | None, disk: Disk) -> Room:
        """An empty one, in a folder under construction. Raises StorageError, ReplicaError."""
        room = cls(folder, Database.create(folder), genesis, disk)
        from crdtmerge.store.disk import failing

        room.blobs.make()
        with failing(folder):
            key.save(folder / KEY_NAME)
        with room.database.transaction():
            room.database.keep("author", key.public)
            room.database.keep("quota", quota)
        return room

    # ---- what is here

    @cached_property
    def blobs(self) -> Blobs:
        """The blobs; loaded when they are first looked at, for they bring numpy."""
        from crdtmerge.store.blobs import Blobs

        return Blobs(self.folder, self.database, self._disk)

    @property
    def author(self) -> bytes:
        """The public key that signs here. Raises DatabaseError."""
        author = self.database.meta("author")
        if not is_id(author):
            raise DatabaseError(
                f"{self.folder}: which key signs here is lost; name it again by `crdtmerge keys import`."
            )
        return author

    @property
    def quota(self) -> int | None:
        """Bytes of blobs at most."""
        quota: int | None = self.database.meta("quota")
        return quota

    def manifest(self, content: bytes) -> Manifest | None:
        """The manifest of a content that was added, or of the base. Raises DatabaseError for one that is damaged."""
        row = self.database.one("SELECT manifest FROM manifests WHERE content = ?", (content,))
        return None if row is None else self._manifest(row[0])

    def _manifest(self, kept: bytes) -> Manifest:
        try:
            return Manifest.from_bytes(kept)
        except InputError as fault:
            raise self.database.damaged(f"a manifest: {fault}") from fault

    @property
    def architecture(self) -> Architecture | None:
        """The pool's; of one that began in memory, that of what is here."""
        if self.genesis.architecture is not None:
            return self.genesis.architecture
        row = self.database.one("SELECT manifest FROM manifests ORDER BY content LIMIT 1")
        return Architecture.of(self._manifest(row[0]).rows) if row else None

    def is_ready(self, content: bytes) -> bool:
        """Whether all tensors of a content are here."""
        return self.database.one("SELECT 1 FROM ready WHERE content = ?", (content,)) is not None

    def ready(self) -> set[bytes]:
        """The contents whose tensors are all here."""
        return {row[0] for row in self.database.rows("SELECT content FROM ready")}

    def source(self, content: bytes, files: Mapping[str, bytes]) -> BlobSource:
        """A content as something to merge. Raises ReplicaError where it is not here."""
        from crdtmerge.store.source import BlobSource

        manifest = self.manifest(content)
        if manifest is None:
            raise ReplicaError(f"contribution {content.hex()} is not in this replica.")
        return BlobSource(self.blobs, manifest, files)

    def statistics(self, stats: Mapping[str, bytes]) -> dict[str, Kept]:
        """The statistics of a contribution that are here."""
        from crdtmerge.resolve.statistic import Kept

        here = {name: blob for name, digest in stats.items() if (blob := self.blobs.get(digest)) is not None}
        return {
            name: Kept(blob.digest, blob.nbytes, partial(self.blobs.read_into, blob), self.folder)
            for name, blob in here.items()
        }

    def refuse_inside(self, out: Path) -> None:
        """Raise OutputError for an output that would lie in the replica, or around it."""
        target, own = out.resolve(), self.folder.resolve()
        if target == own or own in target.parents or target in own.parents:
            raise OutputError(f"{out}: lies in the replica {self.folder}, or around it; choose another -o.")

    def tips(self, key: bytes) -> list[bytes]:
        """The last operation of each chain of a key."""
        return [last for _, _, (_, last) in self.opset.tables.every("tips", key)]

    def needed(self) -> set[bytes]:
        """The blobs that may not be collected."""
        held = self.opset.held()
        contents = [*held, *([self.genesis.base] if self.genesis.base else [])]
        manifests = [manifest for content in contents if (manifest := self.manifest(content)) is not None]
        tensors = {row.digest for manifest in manifests for row in manifest.rows}
        return tensors | set(self.genesis.files.values()) | self.opset.attached()

    # ---- within a transaction

    def write(self, payload: Payload, manifest: Manifest | None = None) -> Op:
        """Sign and take an operation of this replica's own. Raises NotAllowedError, OpError, MismatchError."""
        from crdtmerge.store.incarnation import Incarnation

        op = self.opset.compose(self.own_key(), Incarnation(self.database, self.author).for_next(), payload)
        missing = self.opset.accept(op, manifest)
        if missing is not None:
            raise DatabaseError("the set names an operation that it lacks: it is damaged. Run `crdtmerge fsck --mend`.")
        self._took([op], {})
        return op

    def take(self, ops: list[Op], manifests: Mapping[bytes, Manifest]) -> Joined:
        """Take operations of others, and those that waited for them since a damage was mended."""
        waited = [Op.stored(wire) for (wire,) in self.database.rows("SELECT wire FROM waiting")]
        added = {op.payload.content for op in [*ops, *waited] if isinstance(op.payload, Add)}
        silent = (one for one in added if one not in manifests and not self.opset.knows_content(one))
        known = {content: found for content in silent if (found := self.manifest(content)) is not None}
        self._check_fit(added, manifests)
        joined = self.opset.join([*ops, *waited], {**manifests, **known})
        if waited:
            self.database.run_all("DELETE FROM waiting WHERE op = ?", [(op.id,) for op in joined.new])
        self._took(joined.new, manifests)
        return joined

    def _check_fit(self, added: Iterable[bytes], manifests: Mapping[bytes, Manifest]) -> None:
        """Raise MismatchError where contents do not fit, in a pool whose record does not say what they must fit."""
        if self.genesis.architecture is not None:
            return
        known = self.architecture
        for content in sorted(one for one in added if one in manifests):
            theirs = Architecture.of(manifests[content].rows)
            known = known or theirs
            known.check(theirs, self.genesis.recipe, f"content {content.hex()[:16]}")

    def keep_manifest(self, manifest: Manifest) -> None:
        """Keep a manifest."""
        row = (manifest.id, manifest.to_bytes())
        self.database.run("INSERT OR REPLACE INTO manifests VALUES (?, ?)", row)

    def refresh_ready(self, contents: Iterable[bytes]) -> None:
        """Look again whether all tensors of some contents are here."""
        for content in contents:
            self._mark(content, self.manifest(content))

    def _mark(self, content: bytes, manifest: Manifest | None) -> None:
        whole = manifest is not None and all(self.blobs.get(row.digest) for row in manifest.rows)
        statement = "INSERT OR IGNORE INTO ready VALUES (?)" if whole else "DELETE FROM ready WHERE content = ?"
        self.database.run(statement, (content,))

    def _took(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest]) -> None:
        """Keep what belongs to operations that were taken."""
        now = time.time()
        for op in ops:
            self.database.run("INSERT OR IGNORE INTO seen VALUES (?, ?)", (op.id, now))
            manifest = manifests.get(op.payload.content) if isinstance(op.payload, Add) else None
            if manifest is not None:
                self.keep_manifest(manifest)
                self._mark(manifest.id, manifest)

    def key_path(self, public: bytes) -> Path:
        """Where a key lies that is about to become this replica's."""
        return self.folder / f"key-{public.hex()[:16]}.pem"

    def own_key(self) -> Key:
        """The key that signs here. Raises KeyFileError."""
        author = self.author
        if self._key is None or self._key.public != author:
            coming = self.key_path(author)  # a crash may have come between its arrival and its new name
            path = coming if coming.exists() else self.folder / KEY_NAME
            try:
                key = Key.load(path)
            except KeyFileError as fault:
                raise KeyFileError(
                    f"{fault} Without its key nothing can be signed here: put the file back, or sign with another key "
                    "by `crdtmerge keys import`."
                ) from None
            if key.public != author:
                raise ReplicaError(f"{path}: is not this replica's key {author.hex()[:16]}.")
            self._key = key
        return self._key


class Taking:
    """New blobs on their way in: a lease, a staging area and an intake, while in the context."""

    def __init__(
        self, room: Room, recipe: Recipe, architecture: Architecture | None, threads: int | None, progress: Progress
    ) -> None:
        self._room, self._recipe, self._architecture = room, recipe, architecture
        self._threads, self._progress = threads, progress
        self._open = ExitStack()

    def __enter__(self) -> tuple[Intake, Staging]:
        from crdtmerge.store.ingest import Intake
        from crdtmerge.store.leases import Lease

        with ExitStack() as opened:
            lease = opened.enter_context(Lease(self._room.database))
            staging = opened.enter_context(self._room.blobs.staging())
            intake = Intake(
                staging, lease, self._recipe, self._architecture, threads=self._threads, progress=self._progress
            )
            self._open = opened.pop_all()
        return intake, staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
