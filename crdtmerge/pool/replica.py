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
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from crdtmerge import limits
from crdtmerge.errors import NotAllowedError, UsageError
from crdtmerge.keys import Key
from crdtmerge.pool.beginning import found, new_folder
from crdtmerge.pool.room import KEY_NAME, Progress, Room, Taking, silent
from crdtmerge.pool.shown import Shown
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest, Says
from crdtmerge.replica.entry import Entry
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.members import Rank
from crdtmerge.replica.op import Add, Grant, Op, Remove, Retract, Revoke, SetRecipe, Unretract
from crdtmerge.replica.opset import Joined

if TYPE_CHECKING:
    from crdtmerge.pool.outputs import Resolved
    from crdtmerge.resolve.merge import Merged
    from crdtmerge.resolve.merging import Options
    from crdtmerge.store.blobs import Staging
    from crdtmerge.store.check import Report
    from crdtmerge.store.collect import Collected
    from crdtmerge.store.disk import Disk
    from crdtmerge.store.ingest import Ingested
    from crdtmerge.strategies.protocol import Plan


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


class Replica(Shown):
    """An open replica. Safe to use from several threads.

    >>> with Replica.open("pool") as replica:  # doctest: +SKIP
    ...     replica.add("ft-a/", weight=2)
    ...     replica.resolve().save("merged/")
    """

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

    # ---- changing it

    def add(
        self,
        model: object,
        *,
        weight: object = None,
        role: str | None = None,
        task: str | None = None,
        stats: Mapping[str, Any] | None = None,
        note: str | None = None,
        replaces: Iterable[bytes] = (),
        threads: int | None = None,
        progress: Progress = silent,
    ) -> Added:
        """Add a model: a path to a checkpoint, or a state dict. It is read once, hashed and copied in the same pass.

        What is left out is unsaid: adding a content again without a weight leaves its weight as it is. ``stats`` are
        statistics by name: files or mappings of names to arrays, which are kept here and travel with the model, or
        digests of 32 bytes of files that are announced only. ``replaces`` names contents of one's own that this one
        takes the place of.

        Raises:
            InputError: the model cannot be read, changes meanwhile or holds NaN. MismatchError: it does not fit.
            NotAllowedError: the pool takes nothing from this key. StorageError: no room, or a failing disk.
        """
        from crdtmerge.resolve.asking import said_role, said_stats, said_text, said_weight

        task, note = said_text("task", task, limits.NAME_BYTES_MAX), said_text("note", note, limits.NOTE_BYTES_MAX)
        announced, held = said_stats(stats)
        says = Says(said_weight(weight), said_role(role), task, announced, note=note)
        with Taking(self._room, self.genesis.recipe, self._room.architecture, threads, progress) as (intake, staging):
            taken = intake.take(model, "the model")
            if held:
                found, nbytes = self._stage(held, taken, staging)
                says, taken = replace(says, stats={**announced, **found}), taken._replace(nbytes=taken.nbytes + nbytes)
            staging.sync()
            op, new = self._room.group.run(lambda: self._write_add(taken, says, replaces, staging))
        entry = self.opset.entry(taken.manifest.id)
        return Added(taken.manifest.id, op.id, entry, taken.nbytes, new, tuple(taken.notes))

    def _stage(self, held: Mapping[str, Any], taken: Ingested, staging: Staging) -> tuple[dict[str, bytes], int]:
        """Statistics that come with a model, as blobs on their way: their digests by name, and their bytes."""
        from crdtmerge.resolve.statistic import kept_bytes

        names, allowed = [row.name for row in taken.manifest.rows], self.genesis.recipe.allow_nonfinite
        digests, nbytes = dict[str, bytes](), 0
        for name, value in sorted(held.items()):
            data = kept_bytes(value, f"the {name} of the model", names, allow_nonfinite=allowed)
            digests[name], nbytes = staging.file(data), nbytes + len(data)
        return digests, nbytes

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

    def resolve(
        self,
        *,
        inputs: Mapping[str, Any] | None = None,
        plan: Plan | str | Path | None = None,
        threads: int | None = None,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> Merged:
        """Merge the visible set into memory: the same bytes for equal sets, inputs and plans, on any machine.

        ``inputs`` are what else the strategy reads, by name; ``plan`` was made for this very merge. Raises what
        ``crdtmerge.merge`` raises, and ReplicaError where a contribution is announced but not here.
        """
        from crdtmerge.pool import outputs

        return outputs.resolve(self._room, _options(threads, device, progress), inputs or {}, plan)

    def resolve_to(
        self,
        out: str | Path,
        *,
        inputs: Mapping[str, Any] | None = None,
        plan: Plan | str | Path | None = None,
        threads: int | None = None,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> Resolved:
        """Bring an output up to date. One that already is the merge of this set is hashed and left as it is."""
        from crdtmerge.pool import outputs

        options = _options(threads, device, progress)
        return outputs.resolve_to(self._room, Path(out), options, inputs or {}, plan)

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


def _options(threads: int | None, device: str, progress: Progress) -> Options:
    from crdtmerge.resolve.merging import Options

    return Options(threads=threads, device=device, progress=progress)


def _reason(reason: str | None) -> str | None:
    from crdtmerge.resolve.asking import said_text

    return said_text("reason", reason, limits.NOTE_BYTES_MAX)
