"""Replica: a pool's set of contributions in a folder on disk, shared by every process that opens it.

    pool.sqlite   operations and what follows from them        blobs/   tensors under their digest
    key.pem       who signs here                               staged/  what is being written

RULES
1. What a method returns is durable. A crash at any moment leaves everything that was acknowledged, and nothing half.
2. Blobs are durable before the operation that refers to them is committed, in one transaction with their names.
3. Many processes may work on one folder at once: SQLite makes them take turns, sequence numbers are allotted within.
4. Nothing of ours is read on trust: what comes from a file or a peer passes the rules of ``replica`` first.
5. A method imports what it alone needs, so that to look at a replica does not load what merges models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from crdtmerge import limits
from crdtmerge.errors import NotAllowedError, UsageError
from crdtmerge.keys import Key
from crdtmerge.pool.beginning import found, new_folder
from crdtmerge.pool.room import KEY_NAME, Progress, Room, Taking, silent
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest, Says
from crdtmerge.replica.entry import Entry
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.members import Rank
from crdtmerge.replica.op import Add, Grant, Op, Remove, Retract, Revoke, SetRecipe, Unretract
from crdtmerge.replica.opset import Joined, OpSet

if TYPE_CHECKING:
    from crdtmerge.pool.outputs import Resolved
    from crdtmerge.pool.peers import Peers
    from crdtmerge.pool.transfer import Giving, Receiving
    from crdtmerge.resolve.merge import Merged
    from crdtmerge.store.blobs import Staging
    from crdtmerge.store.check import Report
    from crdtmerge.store.collect import Collected
    from crdtmerge.store.disk import Disk
    from crdtmerge.store.ingest import Ingested
    from crdtmerge.store.source import BlobSource


class Added(NamedTuple):
    """What ``add`` wrote: content, operation, what now holds of it, its bytes and those that were new here.

    ``entry`` is None if the content is hidden all the same, because it is retracted.
    """

    id: bytes
    op: bytes
    entry: Entry | None
    nbytes: int
    new_bytes: int
    notes: tuple[str, ...]


class Ended(NamedTuple):
    """What ``remove`` or ``retract`` did to a content: the operations, and the keys whose ADDs of it still show."""

    id: bytes
    ops: tuple[bytes, ...]
    stays: tuple[bytes, ...]


class Replica:
    """An open replica. Safe to use from several threads.

    >>> with Replica.open("pool") as replica:  # doctest: +SKIP
    ...     replica.add("ft-a/", weight=2)
    ...     replica.resolve().save("merged/")
    """

    def __init__(self, room: Room) -> None:
        """Use ``create``, ``open`` or ``of_bundle``."""
        self._room = room

    # ---- beginning

    @classmethod
    def create(
        cls,
        folder: str | Path,
        recipe: Recipe | str,
        *,
        base: object = None,
        like: object = None,
        membership: Literal["open", "members"] = "open",
        curators: Iterable[bytes] | Literal["any"] = (),
        key: Key | None = None,
        quota: int | None = None,
        disk: Disk | None = None,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Begin a new pool in a new folder.

        Args:
            folder: where; it must not exist, or be empty.
            recipe: how the pool merges by default.
            base: the model from which all are fine-tuned (a path or a state dict); its architecture is the pool's.
            like: a model of the pool's architecture, where there is no base. Nothing of it is kept.
            membership: whether any key may contribute, or only those that were granted it.
            curators: keys besides the creator's that may remove anything and manage members; ``"any"``: every key.
            key: the creator's; by default a new one.
            quota: bytes of blobs at most.
            disk, threads, progress: how it runs.

        Raises:
            OutputError: the folder is not free. UsageError, NeedsError, InputError: what is asked for cannot be.
        """
        from crdtmerge.resolve.asking import completed
        from crdtmerge.store.disk import Disk
        from crdtmerge.store.ingest import architecture_of

        asked = Recipe(recipe) if isinstance(recipe, str) else recipe
        if (base is None) == (like is None):
            raise UsageError(
                "a pool has one architecture: give the base (--base), or where there is none any model that is like "
                "its contributions (--like)."
            )
        if curators == "any" and membership == "members":
            raise UsageError("where every key is a curator (--curator any), --members-only keeps nobody out.")
        founder = key or Key.generate()
        founders = curators if isinstance(curators, str) else tuple(dict.fromkeys([founder.public, *curators]))
        with new_folder(Path(folder)) as staged:
            room = Room.begun(staged, Genesis(asked), founder, quota, disk or Disk())
            try:
                if base is None:
                    genesis = Genesis(completed(asked, None), architecture_of(like), membership, founders)
                    found(room, genesis, None, None)
                else:
                    with Taking(room, asked, None, threads, progress) as (intake, staging):
                        taken = intake.take(base, "the base")
                        genesis = Genesis(
                            completed(asked, taken.manifest.id),
                            Architecture.of(taken.manifest.rows),
                            membership,
                            founders,
                            taken.files,
                        )
                        found(room, genesis, taken.manifest, staging)
            finally:
                room.database.close()
        return cls.open(folder, disk=disk)

    @classmethod
    def of_bundle(
        cls,
        folder: str | Path,
        bundle: str | Path,
        *,
        key: Key | None = None,
        quota: int | None = None,
        disk: Disk | None = None,
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Begin a replica of an existing pool from an exported state. Raises OutputError, BundleError, HeaderError."""
        from crdtmerge.pool import exchange

        genesis = exchange.contents_of(Path(bundle)).genesis
        return cls.of_genesis(
            folder,
            genesis,
            key=key,
            quota=quota,
            disk=disk,
            first=lambda room: exchange.include(room, Path(bundle), threads, progress),
        )

    @classmethod
    def of_genesis(
        cls,
        folder: str | Path,
        genesis: Genesis,
        *,
        key: Key | None = None,
        quota: int | None = None,
        disk: Disk | None = None,
        first: Callable[[Room], object] = lambda room: None,
    ) -> Self:
        """Begin an empty replica of an existing pool; ``first`` fills it before it appears. Raises OutputError."""
        from crdtmerge.store.disk import Disk

        with new_folder(Path(folder)) as staged:
            room = Room.begun(staged, genesis, key or Key.generate(), quota, disk or Disk())
            try:
                found(room, genesis, None, None)
                first(room)
            finally:
                room.database.close()
        return cls.open(folder, disk=disk)

    @classmethod
    def open(cls, folder: str | Path, *, disk: Disk | None = None) -> Self:
        """Open a replica. Raises ReplicaError."""
        from crdtmerge.store.disk import Disk

        return cls(Room.opened(Path(folder), disk or Disk()))

    # ---- what is in it

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

    # ---- changing it

    def add(
        self,
        model: object,
        *,
        weight: object = None,
        role: str | None = None,
        task: str | None = None,
        stats: Mapping[str, bytes] | None = None,
        note: str | None = None,
        replaces: Iterable[bytes] = (),
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Added:
        """Add a model: a path to a checkpoint, or a state dict. It is read once, hashed and copied in the same pass.

        What is left out is unsaid: adding a content again without a weight leaves its weight as it is. ``replaces``
        names contents of one's own that this one takes the place of.

        Raises:
            InputError: the model cannot be read, changes meanwhile or holds NaN. MismatchError: it does not fit.
            NotAllowedError: the pool takes nothing from this key. StorageError: no room, or a failing disk.
        """
        from crdtmerge.resolve.asking import said_role, said_stats, said_text, said_weight

        task, note = said_text("task", task, limits.NAME_BYTES_MAX), said_text("note", note, limits.NOTE_BYTES_MAX)
        says = Says(said_weight(weight), said_role(role), task, said_stats(stats), note=note)
        with Taking(self._room, self.genesis.recipe, self._room.architecture, threads, progress) as (intake, staging):
            taken = intake.take(model, "the model")
            staging.sync()
            op, new = self._room.group.run(lambda: self._write_add(taken, says, replaces, staging))
        entry = self.opset.entry(taken.manifest.id)
        return Added(taken.manifest.id, op.id, entry, taken.nbytes, new, tuple(taken.notes))

    def _write_add(self, taken: Ingested, says: Says, replaces: Iterable[bytes], staging: Staging) -> tuple[Op, int]:
        new = staging.publish(self._room.quota)
        self._room.keep_manifest(taken.manifest)
        self._room.database.run("INSERT OR IGNORE INTO ready VALUES (?)", (taken.manifest.id,))
        own: set[bytes] = set()
        for content in replaces:
            mine = {op.id for op in self.opset.live(content) if op.author == self.author}
            if not mine:
                raise UsageError(
                    f"contribution {content.hex()[:16]} was not added by this key, so nothing replaces it."
                )
            own |= mine
        payload = Add(taken.manifest.id, replace(says, files=taken.files or None), tuple(sorted(own)))
        return self._room.write(payload, taken.manifest), new

    def remove(self, content: bytes, reason: str | None = None) -> Ended:
        """End every ADD of a content that is known here: a curator anyone's, others their own.

        Raises UsageError where there is none, NotAllowedError where none is one's own.
        """
        said = _reason(reason)

        def work() -> Ended:
            live = self.opset.live(content)
            if not live:
                raise UsageError(
                    f"contribution {content.hex()} is not in this pool's set; `crdtmerge status` lists it."
                )
            mine = (
                live if self.opset.rank(self.author) >= Rank.CURATOR else [o for o in live if o.author == self.author]
            )
            if not mine:
                adders = ", ".join(sorted({op.author.hex()[:16] for op in live}))
                raise NotAllowedError(
                    f"contribution {content.hex()[:16]} was added by {adders}: only they and curators can remove it."
                )
            ops = self._in_pieces(Remove, sorted(op.id for op in mine), said)
            return Ended(content, ops, self._stays(content))

        return self._room.group.run(work)

    def retract(self, content: bytes, reason: str | None = None) -> Ended:
        """Hide a content, whatever is added concurrently or later: a curator anyone's, others their own."""
        said = _reason(reason)

        def work() -> Ended:
            op = self._room.write(Retract(content, said))
            return Ended(content, (op.id,), self._stays(content))

        return self._room.group.run(work)

    def unretract(self, content: bytes, reason: str | None = None) -> Ended:
        """End the RETRACTs of a content that are known here. Raises UsageError, NotAllowedError."""
        said = _reason(reason)

        def work() -> Ended:
            known = self.opset.retractions(content)
            curator = self.opset.rank(self.author) >= Rank.CURATOR
            mine = [op.id for op in known if curator or op.author == self.author]
            if not known:
                raise UsageError(f"contribution {content.hex()} is not retracted.")
            if not mine:
                raise NotAllowedError(f"contribution {content.hex()[:16]} was retracted by another key, a curator's.")
            ops = self._in_pieces(Unretract, sorted(mine), said)
            return Ended(content, ops, self._stays(content))

        return self._room.group.run(work)

    def grant(self, key: bytes, role: Literal["member", "curator"]) -> Op:
        """Give a key a role. Raises NotAllowedError."""
        return self._room.group.run(lambda: self._room.write(Grant(key, role)))

    def revoke(self, key: bytes, heads: Iterable[bytes] | None = None, reason: str | None = None) -> Op:
        """Void what a key does, except what is in the chain of ``heads``: by default all that is known here."""
        said = _reason(reason)

        def work() -> Op:
            last = self._room.tips(key) if heads is None else list(heads)
            return self._room.write(Revoke(key, tuple(sorted(last)), said))

        return self._room.group.run(work)

    def set_recipe(self, recipe: Recipe) -> Op:
        """Change the pool's recipe; base and allow_nonfinite stay. Raises NotAllowedError, UsageError."""
        from crdtmerge.resolve.asking import completed

        complete = completed(recipe, self.genesis.base)
        complete.allow_nonfinite = complete.allow_nonfinite or self.genesis.recipe.allow_nonfinite
        return self._room.group.run(lambda: self._room.write(SetRecipe(complete.canonical())))

    def join(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest] | None = None) -> Joined:
        """Take operations of others, durably, as far as they can be taken; waiting ones are not kept."""
        batch = list(ops)

        return self._room.group.run(lambda: self._room.take(batch, manifests or {}))

    def import_key(self, key: Key) -> None:
        """Sign with another key from now on. Raises StorageError."""
        from crdtmerge.store.disk import failing

        coming = self._room.key_path(key.public)
        with failing(self.folder):
            if not coming.exists():
                key.save(coming)
        with self._room.database.transaction():
            self._room.database.keep("author", key.public)
            self._room.database.keep("incarnation", None)
        with failing(self.folder):
            coming.replace(self.folder / KEY_NAME)

    # ---- merging it

    def resolve(self, *, threads: int | None = None, device: str = "cpu", progress: Progress = silent) -> Merged:
        """Merge the visible set into memory: the same bytes for equal sets, on any machine.

        Raises what ``crdtmerge.merge`` raises, and ReplicaError where a contribution is announced but not here.
        """
        from crdtmerge.pool import outputs

        return outputs.resolve(self._room, threads, device, progress)

    def resolve_to(
        self, out: str | Path, *, threads: int | None = None, device: str = "cpu", progress: Progress = silent
    ) -> Resolved:
        """Bring an output up to date. One that already is the merge of this set is hashed and left as it is."""
        from crdtmerge.pool import outputs

        return outputs.resolve_to(self._room, Path(out), threads, device, progress)

    # ---- exchanging it

    def export(self, path: str | Path, since: Iterable[bytes] = ()) -> int:
        """Write the state, or what one with the heads ``since`` lacks, as one safetensors file; its bytes.

        Raises OutputError where something stands at ``path``, ReplicaError or ChangedError where a blob is damaged.
        """
        from crdtmerge.pool import exchange

        return exchange.export(self._room, Path(path), list(since))

    def include(
        self, path: str | Path, *, threads: int | None = None, progress: Progress = silent
    ) -> tuple[Joined, int]:
        """Join an exported state, all of it or nothing: what became of its operations, and bytes that are new here.

        Raises BundleError, HeaderError, PoolMismatchError, StorageError.
        """
        from crdtmerge.pool import exchange

        return exchange.include(self._room, Path(path), threads, progress)

    # ---- keeping it

    def gc(self, grace_seconds: float = 24 * 3600.0) -> Collected:
        """Collect blobs that nothing needs; what becomes trash now is removed by a later collection."""
        from crdtmerge.store.collect import collect

        with self._room.database.transaction():
            collected = collect(self._room.blobs, self._room.needed(), grace_seconds)
            self._room.refresh_ready(self._room.ready() ^ set(self.opset.held()))
            return collected

    def fsck(self, *, mending: bool = False, progress: Progress = silent) -> Report:
        """Check everything; with ``mending`` rebuild what can be, and let go of damaged blobs."""
        from crdtmerge.store.check import check, mend

        if not mending:
            with self._room.database.snapshot():
                return check(self.genesis, self._room.database, self._room.blobs, progress)
        with self._room.database.transaction():
            report = check(self.genesis, self._room.database, self._room.blobs, progress)
            mend(self.genesis, self._room.database, self._room.blobs, report)
        return report

    def _in_pieces(self, kind: type[Remove], targets: list[bytes], reason: str | None) -> tuple[bytes, ...]:
        """As many operations as it takes to name all targets."""
        pieces = (targets[at : at + limits.PARENTS_MAX] for at in range(0, len(targets), limits.PARENTS_MAX))
        return tuple(self._room.write(kind(tuple(piece), reason)).id for piece in pieces)

    def _stays(self, content: bytes) -> tuple[bytes, ...]:
        entry = self.opset.entry(content)
        return entry.adders if entry else ()

    def close(self) -> None:
        """Let go of the database."""
        self._room.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reason(reason: str | None) -> str | None:
    from crdtmerge.resolve.asking import said_text

    return said_text("reason", reason, limits.NOTE_BYTES_MAX)


def _the_one(prefix: str, found: set[bytes], what: str) -> bytes:
    if not found:
        raise UsageError(f"no {what} begins with {prefix}; `crdtmerge status` and `crdtmerge log` list them.")
    if len(found) > 1:
        some = ", ".join(sorted(one.hex()[: len(prefix) + 4] for one in found)[:5])
        raise UsageError(f"{len(found)} begin with {prefix}: {some}. Give more digits.")
    return found.pop()
