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

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from crdtmerge import limits
from crdtmerge.errors import BundleError, InputError, MismatchError, UsageError
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest, Says
from crdtmerge.replica.entry import Entry as Visible
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import INCARNATION_BYTES, Add, Op, Payload, Remove, Retract, Unretract
from crdtmerge.replica.opset import Hidden, OpSet
from crdtmerge.replica.tables import MemoryTables
from crdtmerge.resolve.asking import completed, refuse_version, said_role, said_stats, said_text, said_weight
from crdtmerge.resolve.beside import Beside
from crdtmerge.resolve.merge import Merged, into_memory
from crdtmerge.resolve.merging import Options
from crdtmerge.state.holdings import EMPTY, HeldSource, Holdings, Taken, from_bytes, taken, to_bytes
from crdtmerge.strategies.protocol import Plan


class Delta:
    """What one state has that another lacks, to be joined by the other."""

    def __init__(self, genesis: Genesis, ops: tuple[Op, ...], holdings: Holdings) -> None:
        self.genesis, self.ops, self.holdings = genesis, ops, holdings

    def to_bytes(self) -> bytes:
        """The delta as one safetensors file."""
        return to_bytes(self.genesis, self.ops, self.holdings)

    @classmethod
    def from_bytes(cls, data: bytes) -> Delta:
        """Read a delta; every signature and tensor is checked. Raises BundleError, HeaderError."""
        contents, tensors = from_bytes(data)
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
        if not isinstance(asked, Recipe) or not isinstance(key, Key | None):
            raise UsageError(f"a recipe (or a strategy's name) and a Key are needed, not {recipe!r} and {key!r}.")
        self._key = key or Key.generate()
        one = None if base is None else taken(base, "the base", asked)
        self._begin(Genesis(completed(asked, one.manifest.id if one else None), files=one.files if one else {}), one)

    def _begin(self, genesis: Genesis, base: Taken | None) -> None:
        self._genesis = genesis
        self._set = OpSet(genesis, MemoryTables())
        self._base = base.manifest if base else None
        self._holdings = base.holdings if base else EMPTY

    def _with(self, changed: OpSet, holdings: Holdings) -> Self:
        """A value of the same pool. Holdings that nothing needs any more are left out."""
        other = object.__new__(type(self))
        other._key, other._genesis, other._base, other._set = self._key, self._genesis, self._base, changed
        needed = [*changed.held(), *([self._base.id] if self._base else [])]
        other._holdings = holdings.only(needed, changed.attached() | set(self._genesis.files.values()))
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
    def genesis(self) -> Genesis:
        """The pool as it began."""
        return self._genesis

    @property
    def author(self) -> bytes:
        """The public key that signs here."""
        return self._key.public

    @property
    def opset(self) -> OpSet:
        """The operations and what follows from them, to be read."""
        return self._set

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
        stats: Mapping[str, Any] | None = None,
        note: str | None = None,
        replaces: Iterable[bytes | str] = (),
    ) -> Self:
        """With a model: a path to a checkpoint, or a state dict of torch tensors or numpy arrays.

        What is left out is unsaid: adding a content again without a weight leaves its weight as it is. ``stats`` are
        statistics by name: files or mappings of names to arrays, which are copied, or digests of 32 bytes of files that
        are announced only. ``replaces`` names contents of one's own that this one takes the place of.

        Raises:
            InputError: the model cannot be read or holds NaN. MismatchError: it does not fit the others.
            UsageError: a weight that is no number, an unknown role, a content to replace that this key did not add.
        """
        replaced = tuple(sorted({dot for content in replaces for dot in self._own_dots(_content(content))}))
        announced, held = said_stats(stats)
        one = taken(model, "the model", self._genesis.recipe, held)
        _check_fits(one.manifest, _architectures(self._holdings.manifests.values()), self._genesis.recipe, "the model")
        task, note = said_text("task", task, limits.NAME_BYTES_MAX), said_text("note", note, limits.NOTE_BYTES_MAX)
        said = {**announced, **one.stats}
        says = Says(said_weight(weight), said_role(role), task, said, one.files or None, note)
        return self._signed(Add(one.manifest.id, says, replaced), one.holdings)

    def _own_dots(self, content: bytes) -> list[bytes]:
        """The live ADDs of a content by this key. Raises UsageError if there is none."""
        dots = [op.id for op in self._set.live(content) if op.author == self.author]
        if not dots:
            raise UsageError(f"contribution {content.hex()[:16]} was not added by this key, so nothing replaces it.")
        return dots

    def remove(self, content: bytes | str, reason: str | None = None) -> Self:
        """Without a contribution: every ADD of it that is known here ends. Raises UsageError if there is none."""
        content = _content(content)
        dots = sorted(op.id for op in self._set.live(content))
        if not dots:
            raise UsageError(f"contribution {content.hex()} is not in this state; there are {_ids(self.visible)}.")
        return self._signed_in_pieces(Remove, dots, said_text("reason", reason, limits.NOTE_BYTES_MAX))

    def retract(self, content: bytes | str, reason: str | None = None) -> Self:
        """Without a content, whatever is added concurrently or later."""
        return self._signed(Retract(_content(content), said_text("reason", reason, limits.NOTE_BYTES_MAX)))

    def unretract(self, content: bytes | str, reason: str | None = None) -> Self:
        """Ends the RETRACTs of a content that are known here. Raises UsageError if there is none."""
        content = _content(content)
        ones = sorted(op.id for op in self._set.retractions(content))
        if not ones:
            raise UsageError(f"contribution {content.hex()} is not retracted.")
        return self._signed_in_pieces(Unretract, ones, said_text("reason", reason, limits.NOTE_BYTES_MAX))

    def join(self, other: MergeState | Delta) -> Self:
        """The union with another state, or with a delta. Raises MismatchError naming both if they cannot be joined."""
        if not isinstance(other, MergeState | Delta):
            raise UsageError(f"a state joins a state or a delta, not {type(other).__name__}.")
        theirs = other._genesis if isinstance(other, MergeState) else other.genesis
        self._genesis.refuse_other(theirs)
        ops = other._set.delta(self.heads) if isinstance(other, MergeState) else other.ops
        holdings = other._holdings if isinstance(other, MergeState) else other.holdings
        together = {**holdings.manifests, **self._holdings.manifests}
        architectures = _architectures(together.values())
        for content in sorted(holdings.manifests.keys() - self._holdings.manifests.keys()):
            _check_fits(
                holdings.manifests[content],
                architectures,
                self._genesis.recipe,
                f"content {content.hex()[:16]} of the other state",
            )
        changed = self._copied()
        joined = changed.join(ops, together)
        if joined.refused:
            raise BundleError(f"the other state holds what no state of this pool takes: {joined.refused[0][1]}")
        if joined.waiting and not joined.waiting[0][1].parents:
            raise BundleError("the delta lacks the manifest of a content that it adds.")
        if joined.waiting:
            raise UsageError(
                f"the delta builds on {len(joined.waiting[0][1].parents)} operations that this state lacks: ask for "
                "one with delta_since(this.heads)."
            )
        return self._with(changed, self._holdings | holdings)

    def __or__(self, other: MergeState | Delta) -> Self:
        return self.join(other) if isinstance(other, MergeState | Delta) else NotImplemented

    def __bool__(self) -> bool:
        return True

    def delta_since(self, heads: Iterable[bytes]) -> Delta:
        """What a state with these heads lacks of this one, tensors included."""
        if isinstance(heads, str) or not isinstance(heads, Iterable):
            raise UsageError(f"heads = {heads!a:.80}: the heads of a state are needed.")
        ops = tuple(self._set.delta(heads))
        added = {op.payload.content for op in ops if isinstance(op.payload, Add)}
        manifests = {content: self._holdings.manifests[content] for content in added}
        says = [op.payload.says for op in ops if isinstance(op.payload, Add)]
        files = {digest for one in says for digest in (*(one.files or {}).values(), *one.stats.values())}
        return Delta(self._genesis, ops, replace(self._holdings.only(added, files), manifests=manifests))

    def renewed(self) -> MergeState:
        """The visible set as a new pool that goes on from this one, without its history.

        Operations are kept for ever within a pool. Where that is too long, all members go on in a new one: states
        with equal visible sets get equal new pool ids, and refuse what still comes from the old.
        """
        genesis = replace(self._genesis, recipe=self.recipe, succeeds=(self.pool_id, self.root))
        other = object.__new__(MergeState)
        other._key, other._genesis, other._base = self._key, genesis, self._base
        other._set = OpSet(genesis, MemoryTables())
        base = {self._base.id: self._base} if self._base else {}
        other._holdings = replace(self._holdings, manifests=base)
        for one in self.visible:
            claim = one.claim
            says = Says(claim.weight, claim.role, claim.task, claim.stats, one.files or None, one.note)
            other = other._signed(Add(one.id, says), self._holdings.of(one.id))
        for content in self._set.retracted():
            other = other._signed(Retract(content, "retracted in the pool that this one goes on from"))
        return other

    def _signed_in_pieces(self, kind: type[Remove], targets: list[bytes], reason: str | None) -> Self:
        """As many operations as it takes to name all targets."""
        state = self
        for at in range(0, len(targets), limits.PARENTS_MAX):
            state = state._signed(kind(tuple(targets[at : at + limits.PARENTS_MAX]), reason))
        return state

    def _signed(self, payload: Payload, holdings: Holdings = EMPTY) -> Self:
        changed = self._copied()
        op = changed.compose(self._key, secrets.token_bytes(INCARNATION_BYTES), payload)
        together = self._holdings | holdings
        manifest = together.manifests.get(payload.content) if isinstance(payload, Add) else None
        missing = changed.accept(op, manifest)
        assert missing is None, "an operation composed here lacks nothing"
        return self._with(changed, together)

    # ---- merging it

    def resolve(
        self,
        *,
        inputs: Mapping[str, Any] | None = None,
        plan: Plan | str | Path | None = None,
        threads: int | None = None,
        device: str = "cpu",
    ) -> Merged:
        """Merge the visible set by the recipe: the same bytes for equal sets, inputs and plans, on any machine.

        ``inputs`` are what else the strategy reads, by name; ``plan`` was made for this very merge. Returns a mapping
        of names to torch tensors, with ``receipt`` and ``save(path)``. Raises what ``crdtmerge.merge`` raises, and
        ChangedError where a file changed since it was added.
        """
        refuse_version(self.recipe)
        models = [(self.source(one.id, one.files), one.claim) for one in self.visible]
        base = None if self._base is None else self.source(self._base.id, self._genesis.files)
        from_files = any(held.raw is None for held in self._holdings.tensors.values())
        options = Options(threads=threads, device=device, rehash=from_files)
        stats = [self._holdings.statistics(one.claim.stats) for one in self.visible]
        return into_memory(models, self.recipe, base, options, Beside(stats, inputs or {}, plan))

    def is_ready(self, content: bytes) -> bool:
        """Whether all tensors of a content are here."""
        manifest = self._holdings.manifests.get(content)
        return manifest is not None and all(row.digest in self._holdings.tensors for row in manifest.rows)

    def source(self, content: bytes, files: Mapping[str, bytes] | None = None) -> HeldSource:
        """A content, or the base, as something to merge or compare. Raises InputError where it is not here."""
        manifest = self._holdings.manifests[content]
        self._refuse_announced(manifest)
        here = self._holdings.files
        held = {name: here.get(digest) for name, digest in (files or {}).items()}
        return HeldSource(manifest, self._holdings.tensors, held)

    def _refuse_announced(self, manifest: Manifest) -> None:
        missing = sum(row.digest not in self._holdings.tensors for row in manifest.rows)
        if missing:
            raise InputError(
                f"contribution {manifest.id.hex()} is announced, but {missing} of its tensors are not here."
            )

    # ---- as bytes

    def to_bytes(self) -> bytes:
        """The whole state, tensors included, as one safetensors file; ``from_bytes`` checks all of it.

        Raises InputError where a contribution is announced and not here, ChangedError where its file changed.
        """
        for content in self._set.held():
            self._refuse_announced(self._holdings.manifests[content])
        return to_bytes(self._genesis, tuple(self._set.ops()), self._holdings)

    @classmethod
    def from_bytes(cls, data: bytes, *, key: Key | None = None) -> Self:
        """Read a state; every signature, rule and tensor is checked. Raises BundleError, HeaderError."""
        if not isinstance(key, Key | None):
            raise UsageError(f"key = {key!r}: a Key is needed.")
        contents, tensors = from_bytes(data)
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
        """Raise BundleError unless the tensors of every live content are here, and all contents fit each other."""
        holdings, architectures = self._holdings, _architectures(self._holdings.manifests.values())
        for content in [*self._set.held(), *([self._base.id] if self._base else [])]:
            manifest = holdings.manifests[content]
            if any(row.digest not in holdings.tensors for row in manifest.rows):
                raise BundleError(f"the state: tensors of contribution {content.hex()} are not in it.")
            try:
                _check_fits(manifest, architectures, self._genesis.recipe, f"contribution {content.hex()[:16]}")
            except MismatchError as fault:
                raise BundleError(f"the state: {fault}") from None


def _architectures(manifests: Iterable[Manifest]) -> list[Architecture]:
    """The different architectures of some models; nearly always it is one."""
    found = {one.id: one for one in (Architecture.of(manifest.rows) for manifest in manifests)}
    return [found[identity] for identity in sorted(found)]


def _check_fits(manifest: Manifest, others: Iterable[Architecture], recipe: Recipe, where: str) -> None:
    """Raise MismatchError unless a model fits all others."""
    theirs = Architecture.of(manifest.rows)
    for architecture in others:
        architecture.check(theirs, recipe, where)


def _content(content: bytes | str) -> bytes:
    """A content id, also as hexadecimal text. Raises UsageError."""
    try:
        found = bytes.fromhex(content) if isinstance(content, str) else content
    except ValueError:
        found = b""
    if not isinstance(found, bytes) or len(found) != 32:
        raise UsageError(f"{content!r} is no content id: 32 bytes, or 64 hexadecimal digits.")
    return found


def _ids(entries: Iterable[Visible]) -> str:
    return ", ".join(entry.id.hex()[:16] for entry in entries) or "none"
