"""MergeState: a replicated set of contributions as an immutable value in memory, joined by union, resolved by a merge.

>>> import numpy as np
>>> recipe = Recipe("weight_average")
>>> a = MergeState(recipe).add({"w": np.float32([1, 3])})
>>> b = MergeState(recipe).add({"w": np.float32([3, 5])}, weight=3)
>>> (a | b) == (b | a), (a | b).root == (b | a).root
(True, True)
>>> (a | b).resolve()["w"].tolist()
[2.5, 4.5]

RULES
1. Methods that change return a new value. What a caller gave is copied, or digested if it is a path, so that nothing
   that is done to it later can enter: a file that changed meanwhile is an error when it is read.
2. Equal recipes and bases are one pool. States of different pools or architectures refuse to join, naming both.
3. Every change is signed under an incarnation of its own, so that branching a value is never a fork.
4. Tensors are kept for contents with a live ADD; the operations stay, as long as ``renewed`` does not begin anew.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import BundleError, ChangedError, InputError, MismatchError, UsageError
from crdtmerge.keys import Key
from crdtmerge.numerics.dtypes import DType
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.workers import Workers
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest, Says
from crdtmerge.replica.entry import Entry as Visible
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import INCARNATION_BYTES, Add, Op, Payload, Remove, Retract, Unretract
from crdtmerge.replica.opset import Hidden, OpSet
from crdtmerge.replica.tables import MemoryTables
from crdtmerge.resolve.asking import completed, refuse_version, said_role, said_weight
from crdtmerge.resolve.gather import known
from crdtmerge.resolve.merge import Merged, into_memory
from crdtmerge.resolve.merging import Options
from crdtmerge.resolve.sources import FileSource, MemorySource, Progress
from crdtmerge.store import bundle
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts, refuse_nonfinite
from crdtmerge.weights.header import Entry


class Held(NamedTuple):
    """A tensor that a state holds: its bytes, or the checkpoint where they were found."""

    dtype: DType
    shape: tuple[int, ...]
    facts: Facts
    raw: NDArray[np.uint8] | None
    found: tuple[Path, str] | None

    def read(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer with its bytes from an offset."""
        if self.raw is not None:
            buffer[:] = self.raw[offset : offset + buffer.nbytes]
            return
        assert self.found is not None, "a tensor is in memory or on disk"
        path, name = self.found
        with Checkpoint.open(path) as checkpoint:
            checkpoint.read_into(name, offset, buffer)


@dataclass(frozen=True)
class Holdings:
    """What a state keeps besides operations: tensors by digest, manifests by content, files by digest."""

    tensors: Mapping[bytes, Held]
    manifests: Mapping[bytes, Manifest]
    files: Mapping[bytes, bytes]

    def __or__(self, other: Holdings) -> Holdings:
        return Holdings(
            {**other.tensors, **self.tensors},
            {**other.manifests, **self.manifests},
            {**other.files, **self.files},
        )

    def only(self, contents: Iterable[bytes], files: Iterable[bytes]) -> Holdings:
        """Without the tensors of other contents and other files."""
        wanted = {
            row.digest for content in contents if content in self.manifests for row in self.manifests[content].rows
        }
        tensors = {digest: held for digest, held in self.tensors.items() if digest in wanted}
        kept = set(files)
        return Holdings(tensors, self.manifests, {d: data for d, data in self.files.items() if d in kept})


EMPTY = Holdings({}, {}, {})


class HeldSource:
    """A content of a state as the source of a merge."""

    def __init__(self, manifest: Manifest, tensors: Mapping[bytes, Held], files: Mapping[str, bytes]) -> None:
        self.label = f"contribution {manifest.id.hex()[:16]}"
        self._held = {row.name: tensors[row.digest] for row in manifest.rows}
        self.entries: Mapping[str, Entry] = {
            row.name: Entry(row.name, held.dtype, held.shape, 0, _nbytes(held))
            for row, held in zip(manifest.rows, self._held.values(), strict=True)
        }
        self.path: Path | None = None
        self.bytes_read = 0
        self._files = dict(files)
        paths = {held.found[0] for held in self._held.values() if held.raw is None and held.found is not None}
        self._open = {path: FileSource(path) for path in sorted(paths)}

    def carried(self) -> tuple[dict[str, bytes], list[str]]:
        """The files that came with it."""
        return self._files, []

    def where(self, name: str) -> str:
        """The file of a tensor, or the contribution."""
        held = self._held.get(name)
        if held is None or held.raw is not None or held.found is None:
            return self.label
        return self._open[held.found[0]].where(held.found[1])

    def read_into(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill a buffer."""
        held = self._held[name]
        if held.raw is not None:
            buffer[:] = held.raw[offset : offset + buffer.nbytes]
        else:
            assert held.found is not None, "a tensor is in memory or on disk"
            self._open[held.found[0]].read_into(held.found[1], offset, buffer)

    def facts(self, workers: Workers, cache: DigestCache | None, progress: Progress) -> dict[str, Facts]:
        """As they were found when it was added; of files, whose bytes are hashed again when they are merged."""
        for source in self._open.values():
            for name in (held.found[1] for held in self._held.values() if held.found and held.found[0] == source.path):
                if name not in source.entries:
                    raise ChangedError(f"{source.label}: tensor {name!a} is gone since it was added. Add it again.")
        return {name: held.facts for name, held in self._held.items()}

    def check_unchanged(self) -> None:
        """That the files are as they were when they were opened."""
        for source in self._open.values():
            source.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        for source in self._open.values():
            source.close()


def _nbytes(held: Held) -> int:
    bits = held.dtype.bits
    for size in held.shape:
        bits *= size
    return bits // 8


class Delta:
    """What one state has that another lacks, to be joined by the other."""

    def __init__(self, genesis: Genesis, ops: tuple[Op, ...], holdings: Holdings) -> None:
        self.genesis, self.ops, self.holdings = genesis, ops, holdings

    def to_bytes(self) -> bytes:
        """The delta as one safetensors file."""
        return _to_bytes(self.genesis, self.ops, self.holdings)

    @classmethod
    def from_bytes(cls, data: bytes) -> Delta:
        """Read a delta; every signature and tensor is checked. Raises BundleError, HeaderError."""
        contents, tensors = _from_bytes(data)
        return cls(contents.genesis, tuple(contents.ops), Holdings(tensors, contents.manifests, contents.files))


class MergeState:
    """A pool in memory, as a value.

    Args:
        recipe: how to merge; a strategy's name will do.
        base: the model from which all were fine-tuned, for strategies that need one: a state dict or a path.
        key: who signs; by default a new key.
    """

    def __init__(self, recipe: Recipe | str, base: object = None, *, key: Key | None = None) -> None:
        asked = Recipe(recipe) if isinstance(recipe, str) else recipe
        self._key = key or Key.generate()
        one = None if base is None else _taken(base, "the base", asked)
        self._begin(Genesis(completed(asked, one.manifest.id if one else None), files=one.files if one else {}), one)

    def _begin(self, genesis: Genesis, base: _Taken | None) -> None:
        self._genesis = genesis
        self._set = OpSet(genesis, MemoryTables())
        self._base = base.manifest if base else None
        self._holdings = base.holdings if base else EMPTY

    def _with(self, changed: OpSet, holdings: Holdings, key: Key | None = None) -> Self:
        """A value of the same pool. Holdings that nothing needs any more are left out."""
        other = object.__new__(type(self))
        other._key, other._genesis, other._base, other._set = key or self._key, self._genesis, self._base, changed
        files = {digest for entry in changed.visible() for digest in entry.files.values()}
        needed = [*changed.held(), *([self._base.id] if self._base else [])]
        other._holdings = holdings.only(needed, files | set(self._genesis.files.values()))
        return other

    def _copied(self) -> OpSet:
        tables = self._set.tables
        assert isinstance(tables, MemoryTables), "a state lives in memory"
        return OpSet(self._genesis, tables.copy())

    # ---- what is in it

    @property
    def pool_id(self) -> bytes:
        """Names recipe and base: states with equal ids can be joined."""
        return self._genesis.id

    @property
    def recipe(self) -> Recipe:
        """The complete recipe in force."""
        return self._set.recipe

    @property
    def root(self) -> bytes:
        """The Merkle root of the visible set."""
        return self._set.root

    @property
    def state_root(self) -> bytes:
        """The digest of all that counts, hidden things too."""
        return self._set.state_root

    @property
    def heads(self) -> tuple[bytes, ...]:
        """The last operations: what ``delta_since`` of another state asks for."""
        return self._set.heads()

    @property
    def visible(self) -> list[Visible]:
        """What a merge takes, in canonical order: entries with ``id``, ``weight``, ``role``, ``kind``, ``adders``."""
        return self._set.visible()

    @property
    def hidden(self) -> list[Hidden]:
        """The contributions that were added and are not visible, and why."""
        return self._set.hidden()

    def __len__(self) -> int:
        return len(self.visible)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MergeState):
            return NotImplemented
        return self.pool_id == other.pool_id and self.heads == other.heads

    def __hash__(self) -> int:
        return hash((self.pool_id, self.heads))

    def __repr__(self) -> str:
        return f"MergeState({self.recipe}, {len(self)} contributions, root {self.root.hex()[:16]})"

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
    ) -> Self:
        """With a model: a path to a checkpoint, or a state dict of torch tensors or numpy arrays.

        What is left out is unsaid: adding a content again without a weight leaves its weight as it is.

        Raises:
            InputError: the model cannot be read or holds NaN. MismatchError: it does not fit the others.
            UsageError: a weight that is no number, an unknown role.
        """
        taken = _taken(model, "the model", self._genesis.recipe)
        self._check_fits(taken.manifest, "the model")
        says = Says(said_weight(weight), said_role(role), task, stats or {}, taken.files or None, note)
        return self._signed(Add(taken.manifest.id, says), taken.holdings)

    def remove(self, content: bytes | str, reason: str | None = None) -> Self:
        """Without a contribution: every ADD of it that is known here ends. Raises UsageError if there is none."""
        content = _content(content)
        dots = sorted(op.id for op in self._set.live(content))
        if not dots:
            raise UsageError(f"contribution {content.hex()} is not in this state; there are {_ids(self.visible)}.")
        return self._signed(Remove(tuple(dots), reason))

    def retract(self, content: bytes | str, reason: str | None = None) -> Self:
        """Without a content, whatever is added concurrently or later."""
        return self._signed(Retract(_content(content), reason))

    def unretract(self, content: bytes | str, reason: str | None = None) -> Self:
        """Ends the RETRACTs of a content that are known here. Raises UsageError if there is none."""
        content = _content(content)
        ones = sorted(op.id for op in self._set.retractions(content))
        if not ones:
            raise UsageError(f"contribution {content.hex()} is not retracted.")
        return self._signed(Unretract(tuple(ones), reason))

    def join(self, other: MergeState | Delta) -> Self:
        """The union with another state, or with a delta. Raises MismatchError naming both if they cannot be joined."""
        theirs = other._genesis if isinstance(other, MergeState) else other.genesis
        self._genesis.refuse_other(theirs)
        ops = other._set.delta(self.heads) if isinstance(other, MergeState) else other.ops
        holdings = other._holdings if isinstance(other, MergeState) else other.holdings
        for content in holdings.manifests.keys() - self._holdings.manifests.keys():
            self._check_fits(holdings.manifests[content], f"content {content.hex()[:16]} of the other state")
        changed = self._copied()
        joined = changed.join(ops, {**holdings.manifests, **self._holdings.manifests})
        if joined.refused:
            raise BundleError(f"the other state holds what no state of this pool takes: {joined.refused[0][1]}")
        if joined.waiting:
            raise UsageError(
                f"the delta builds on {len(joined.waiting[0][1].parents)} operations that this state lacks: ask for "
                "one with delta_since(this.heads)."
            )
        return self._with(changed, self._holdings | holdings)

    def __or__(self, other: MergeState | Delta) -> Self:
        return self.join(other)

    def delta_since(self, heads: Iterable[bytes]) -> Delta:
        """What a state with these heads lacks of this one, tensors included."""
        ops = tuple(self._set.delta(heads))
        added = {op.payload.content for op in ops if isinstance(op.payload, Add)}
        files = {digest for content in added if (e := self._set.entry(content)) for digest in e.files.values()}
        manifests = {content: self._holdings.manifests[content] for content in added}
        return Delta(self._genesis, ops, replace(self._holdings.only(added, files), manifests=manifests))

    def renewed(self) -> MergeState:
        """The visible set as a new pool that goes on from this one, without its history.

        Operations are kept for ever within a pool. Where that is too long, all members go on in a new one: states
        with equal visible sets get equal new pool ids, and refuse what still comes from the old.
        """
        other = object.__new__(MergeState)
        other._key = self._key
        other._genesis = replace(self._genesis, recipe=self.recipe, succeeds=(self.pool_id, self.root))
        other._base, other._holdings, other._set = self._base, self._holdings, OpSet(other._genesis, MemoryTables())
        for one in self.visible:
            claim = one.claim
            says = Says(claim.weight, claim.role, claim.task, claim.stats, one.files or None, one.note)
            other = other._signed(Add(one.id, says), self._holdings)
        return other

    def _signed(self, payload: Payload, holdings: Holdings = EMPTY) -> Self:
        changed = self._copied()
        op = changed.compose(self._key, secrets.token_bytes(INCARNATION_BYTES), payload)
        together = self._holdings | holdings
        manifest = together.manifests.get(payload.content) if isinstance(payload, Add) else None
        missing = changed.accept(op, manifest)
        assert missing is None, "an operation composed here lacks nothing"
        return self._with(changed, together)

    def _check_fits(self, manifest: Manifest, where: str) -> None:
        """Raise MismatchError unless a model fits those that are here."""
        theirs = Architecture.of(manifest.rows)
        mine = {}
        for one in self._holdings.manifests.values():
            architecture = Architecture.of(one.rows)
            mine[architecture.id] = architecture
        for _, architecture in sorted(mine.items()):
            architecture.check(theirs, self._genesis.recipe, where)

    # ---- merging it

    def resolve(self, *, threads: int | None = None, device: str = "cpu") -> Merged:
        """Merge the visible set by the recipe: the same bytes for equal sets, on any machine.

        Returns a mapping of names to torch tensors, with ``receipt`` and ``save(path)``. Raises what
        ``crdtmerge.merge`` raises, and ChangedError where a file changed since it was added.
        """
        refuse_version(self.recipe)
        models = [(self._source(one.id, one.files), one.claim) for one in self.visible]
        base = None if self._base is None else self._source(self._base.id, self._genesis.files)
        from_files = any(held.raw is None for held in self._holdings.tensors.values())
        return into_memory(models, self.recipe, base, Options(threads=threads, device=device, rehash=from_files))

    def _source(self, content: bytes, files: Mapping[str, bytes]) -> HeldSource:
        manifest = self._holdings.manifests[content]
        missing = [row.name for row in manifest.rows if row.digest not in self._holdings.tensors]
        if missing:
            raise InputError(
                f"contribution {content.hex()} is announced, but {len(missing)} of its tensors are not here."
            )
        held = {name: self._holdings.files[digest] for name, digest in files.items() if digest in self._holdings.files}
        return HeldSource(manifest, self._holdings.tensors, held)

    # ---- as bytes

    def to_bytes(self) -> bytes:
        """The whole state, tensors included, as one safetensors file; ``from_bytes`` checks all of it."""
        return _to_bytes(self._genesis, tuple(self._set.ops()), self._holdings)

    @classmethod
    def from_bytes(cls, data: bytes, *, key: Key | None = None) -> Self:
        """Read a state; every signature, rule and tensor is checked. Raises BundleError, HeaderError."""
        contents, tensors = _from_bytes(data)
        state = object.__new__(cls)
        state._key, state._genesis = key or Key.generate(), contents.genesis
        base = contents.genesis.base
        if base is not None and base not in contents.manifests:
            raise BundleError("the state: its base is not in it.")
        state._base = contents.manifests[base] if base is not None else None
        changed = OpSet(contents.genesis, MemoryTables())
        joined = changed.join(contents.ops, contents.manifests)
        if joined.refused or joined.waiting:
            why = joined.refused[0][1] if joined.refused else "it lacks operations that others in it build on."
            raise BundleError(f"the state: {why}")
        state._set, state._holdings = changed, Holdings(tensors, contents.manifests, contents.files)
        state._check_whole()
        return state._with(changed, state._holdings)

    def _check_whole(self) -> None:
        """Raise BundleError unless every live content and file is here, and all contents fit each other."""
        holdings = self._holdings
        for content in [*self._set.held(), *([self._base.id] if self._base else [])]:
            manifest = holdings.manifests[content]
            if any(row.digest not in holdings.tensors for row in manifest.rows):
                raise BundleError(f"the state: tensors of contribution {content.hex()} are not in it.")
            try:
                self._check_fits(manifest, f"contribution {content.hex()[:16]}")
            except MismatchError as fault:
                raise BundleError(f"the state: {fault}") from None


class _Taken(NamedTuple):
    manifest: Manifest
    holdings: Holdings
    files: dict[str, bytes]


def _taken(model: object, label: str, recipe: Recipe) -> _Taken:
    """A model that nobody can change any more: copied, or a path with digests. Raises InputError, UsageError."""
    source: FileSource | MemorySource
    if isinstance(model, str | Path):
        source = FileSource(model)
    elif isinstance(model, Mapping):
        source = MemorySource(model, label, copied=True)
    else:
        raise UsageError(f"{label} is {type(model).__name__}; a path or a mapping of names to tensors is needed.")
    try:
        with Workers() as workers:
            one = known(source, workers, DigestCache(), lambda read: None)
        carried, _ = source.carried()
    finally:
        source.close()
    if not recipe.allow_nonfinite:
        refuse_nonfinite(one.facts, recipe.excludes, source.where)
    tensors = {
        one.facts[name].digest: Held(
            entry.dtype,
            entry.shape,
            one.facts[name],
            source.raw(name) if isinstance(source, MemorySource) else None,
            (source.path.resolve(), name) if source.path else None,
        )
        for name, entry in source.entries.items()
    }
    digests = {name: hashlib.sha256(data).digest() for name, data in carried.items()}
    files = {digests[name]: data for name, data in carried.items()}
    return _Taken(one.manifest, Holdings(tensors, {one.id: one.manifest}, files), digests)


def _to_bytes(genesis: Genesis, ops: tuple[Op, ...], holdings: Holdings) -> bytes:
    parts = (
        bundle.Part(digest, held.dtype, held.shape, held.read, str(held.found[0]) if held.found else "a tensor")
        for digest, held in sorted(holdings.tensors.items())
    )
    return bundle.to_bytes(bundle.Contents(genesis, ops, holdings.manifests, holdings.files), parts)


def _from_bytes(data: bytes) -> tuple[bundle.Contents, dict[bytes, Held]]:
    """A bundle's contents and its tensors, each hashed. Raises BundleError, HeaderError."""
    data = bytes(data)
    entries = bundle.entries_of(data, "the state")
    contents = bundle.read(entries, lambda entry: data[entry.begin : entry.end], "the state")
    tensors = {}
    for name, entry in entries.items():
        digest = bundle.tensor_digest_of(name)
        if digest is None:
            continue
        raw = np.frombuffer(data, np.uint8, entry.nbytes, entry.begin)
        if tensor_digest(entry.dtype, entry.shape, piece_digests(raw)) != digest:
            raise BundleError(f"the state: tensor {digest.hex()[:16]} holds other bytes than its name says.")
        bad = nonfinite(raw, entry.dtype) if entry.dtype.floating else None
        tensors[digest] = Held(entry.dtype, entry.shape, Facts(digest, bad), raw, None)
    return contents, tensors


def _content(content: bytes | str) -> bytes:
    """A content id, also as hexadecimal text. Raises UsageError."""
    try:
        found = bytes.fromhex(content) if isinstance(content, str) else bytes(content)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise UsageError(f"{content!r} is no content id: 32 bytes, or 64 hexadecimal digits.")
    return found


def _ids(entries: Iterable[Visible]) -> str:
    return ", ".join(entry.id.hex()[:16] for entry in entries) or "none"
