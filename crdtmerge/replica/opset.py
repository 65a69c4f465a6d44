"""The op set: the operations a replica knows, and the set of contributions that follows from them. No I/O.

    state = a function of the set of operations alone            join = union of the sets

so that replicas which know the same operations agree, in whatever order, number and grouping they came.

RULES for taking an operation (``Op`` has passed the rules that need no other operation)
1. It is of this pool. Its parents are here: ``accept`` answers with what is missing, and changes nothing.
2. Its height is one more than its greatest parent's; its predecessor is the one before it in the same chain.
3. Its targets are of the kind that it acts on. An ADD comes with the manifest of its content, which fits the pool.
4. Its author may do that, by its own causal past (``members``).
5. All of this depends on its past and on the content alone, so what one replica refuses, all refuse.

RULES for what is visible
6. An ADD is a dot. A dot is *live* unless it is void, or an operation that is not void REMOVEs or replaces it.
7. A RETRACT hides a content: a curator's hides every dot of it, anyone else's the author's own. UNRETRACT ends those
   that it names.
8. A content is visible with a live dot that no live RETRACT hides. However many dots: it is one element.

``log`` reads the tables, ``door`` is rules 2 to 4, ``effects`` rules 6 to 8.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from crdtmerge import limits
from crdtmerge.canonical import digest
from crdtmerge.errors import MismatchError, NotAllowedError, OpError, PoolMismatchError
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.door import check, check_manifest
from crdtmerge.replica.effects import Effects
from crdtmerge.replica.entry import Entry
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.log import Log
from crdtmerge.replica.members import Rank
from crdtmerge.replica.op import Add, Op, Payload, Retract, SetRecipe, signed
from crdtmerge.replica.tables import Tables
from crdtmerge.replica.trie import Proof


@dataclass(frozen=True)
class Missing:
    """What must come before an operation can be taken: parents by id, the content whose manifest is not here."""

    parents: tuple[bytes, ...]
    content: bytes | None = None


class Joined(NamedTuple):
    """What became of operations: taken for the first time, waiting for others, refused and why."""

    new: list[Op]
    waiting: list[tuple[Op, Missing]]
    refused: list[tuple[Op, str]]


class Hidden(NamedTuple):
    """A content that was added and is not visible: why (removed, replaced, retracted, revoked), by which operation."""

    id: bytes
    why: str
    by: bytes


class Fork(NamedTuple):
    """Two different operations in one place of a chain: their signatures prove that their author is faulty."""

    one: Op
    other: Op


class OpSet:
    """The operations of a pool over tables that hold them. It alone writes to the tables; they are its whole state.

    >>> from crdtmerge.recipe import Recipe
    >>> from crdtmerge.replica.tables import MemoryTables
    >>> OpSet(Genesis(Recipe.of("ties", {}, version=1)), MemoryTables()).visible()
    []
    """

    def __init__(self, genesis: Genesis, tables: Tables) -> None:
        self.genesis, self.tables = genesis, tables
        self._log = Log(genesis, tables)

    # ---- what is here

    @property
    def pool(self) -> bytes:
        """The pool id."""
        return self.genesis.id

    def __len__(self) -> int:
        return self.tables.count("order")  # the shortest rows of those with one for each operation

    def __contains__(self, identity: bytes) -> bool:
        return self.tables.has("ops", identity)

    def op(self, identity: bytes) -> Op:
        """An operation that is here. Raises UnknownOpError, which is a KeyError."""
        return self._log.op(identity)

    def ops(self) -> Iterator[Op]:
        """All operations in the order (height, id): causes before effects."""
        for _, identity, _ in self.tables.every("order"):
            yield self.op(identity)

    def heads(self) -> tuple[bytes, ...]:
        """The operations that no other refers to: equal heads are equal sets."""
        return tuple(key for key, _, _ in self.tables.every("heads"))

    def delta(self, heads: Iterable[bytes], most: int | None = None) -> list[Op]:
        """What one lacks who knows these heads and their past, by (height, id); unknown heads do not count.

        Where it is more than ``most``, some operations more than that, but not all of them.
        """
        knows: dict[bytes, bool] = {}
        queue: list[tuple[int, bytes]] = []
        lacking: list[Op] = []
        left = 0  # operations in the queue that are not known

        def meet(one: bytes, known: bool) -> None:
            nonlocal left
            if one not in knows:
                heapq.heappush(queue, (-self.op(one).height, one))
                left += not known
            elif known and not knows[one]:
                left -= 1
            knows[one] = known or knows.get(one, False)

        for head in (one for one in heads if one in self):
            meet(head, known=True)
        for head in self.heads():
            meet(head, known=False)
        # children are met before parents, whose height is less: what is known of one is settled by then
        while left and (most is None or len(lacking) <= most):
            op = self.op(heapq.heappop(queue)[1])
            if not knows[op.id]:
                lacking.append(op)
                left -= 1
            for parent in op.parents:
                meet(parent, knows[op.id])
        return sorted(lacking, key=lambda op: op.order)

    def visible(self) -> list[Entry]:
        """The visible set in canonical order, by content id."""
        return [Entry.of_value(key, value) for key, _, value in self.tables.every("visible")]

    def entry(self, content: bytes) -> Entry | None:
        """The entry of a visible content."""
        value = self.tables.get("visible", content)
        return None if value is None else Entry.of_value(content, value)

    def hidden(self) -> list[Hidden]:
        """The contents that were added and are not visible, by content id."""
        return [Hidden(key, *value) for key, _, value in self.tables.every("hidden")]

    def retracted(self) -> list[bytes]:
        """Contents under a live RETRACT."""
        return sorted({key for key, _, _ in self.tables.every("retracts")})

    def why_hidden(self, content: bytes) -> Hidden | None:
        """Why a content that was added is not visible; None if it is."""
        value = self.tables.get("hidden", content)
        return None if value is None else Hidden(content, *value)

    def history(self, content: bytes) -> list[Op]:
        """Every operation that speaks of a content, in the order (height, id)."""
        adds = [one for one, _ in self.tables.members("adds", content)]
        retracts = [op.id for op in self.ops() if isinstance(op.payload, Retract) and op.payload.content == content]
        ends = {end for one in [*adds, *retracts] for end, _ in self.tables.members("killers", one)}
        return sorted(map(self.op, {*adds, *retracts, *ends}), key=lambda op: op.order)

    def knows_content(self, content: bytes) -> bool:
        """Whether a content was ever added: its manifest has been seen."""
        return self._log.kind(content) is not None

    def contents(self) -> list[bytes]:
        """Every content that was ever added, by id."""
        return sorted({key for key, _, _ in self.tables.every("adds")})

    def held(self) -> list[bytes]:
        """The contents with a live dot, visible or retracted: those whose tensors must be kept."""
        return sorted({key for key, _, _ in self.tables.every("live")})

    def attached(self) -> set[bytes]:
        """The files and statistics that live ADDs speak of, also of retracted contents: they may show again."""
        live = (op.payload for content in self.held() for op in self.live(content))
        says = [add.says for add in live if isinstance(add, Add)]
        return {digest for one in says for digest in (*(one.files or {}).values(), *one.stats.values())}

    def live(self, content: bytes) -> list[Op]:
        """The live ADDs of a content."""
        return [self.op(dot) for dot, _ in self.tables.members("live", content)]

    def retractions(self, content: bytes) -> list[Op]:
        """The live RETRACTs of a content."""
        return [self.op(one) for one, _ in self.tables.members("retracts", content)]

    def is_void(self, identity: bytes) -> bool:
        """Whether an operation lost its right to a REVOKE."""
        return self._log.is_void(identity)

    def revoked_by(self, op: Op) -> list[Op]:
        """The REVOKEs that made an operation void."""
        return [self.op(one) for one in self._log.authority().revoked_by(op.author, op.id, self._log.past(op.id))]

    def forks(self) -> list[Fork]:
        """Evidence against keys, one pair for each place of a chain that is taken twice: the two smallest by id."""
        pairs = []
        for dot, _, _ in self.tables.every("forks"):
            (one, _), (other, _), *_ = self.tables.members("dots", dot)
            pairs.append(Fork(self.op(one), self.op(other)))
        return pairs

    @property
    def root(self) -> bytes:
        """The Merkle root of the visible set, which a merge depends on: 32 bytes."""
        return self._log.tries.visible

    @property
    def state_root(self) -> bytes:
        """The digest of all that counts: live dots and RETRACTs of every content, members, recipe, evidence."""
        members = [key for key, _, _ in self.tables.every("members")]
        forks = [
            [dot, *(one for one, _ in self.tables.members("dots", dot)[:2])] for dot, _, _ in self.tables.every("forks")
        ]
        return digest("state", [self.pool, self._log.tries.state, members, self._recipe_op(), forks])

    def prove(self, content: bytes) -> Proof:
        """That a content is under ``root`` with its leaf. Raises KeyError for one that is not visible."""
        entry = self.entry(content)
        if entry is None:
            raise KeyError(content.hex())
        return self._log.tries.prove(content, entry.leaf)

    @property
    def recipe(self) -> Recipe:
        """The recipe in force: the greatest RECIPE by (height, id) that is not void, else that of the genesis."""
        chosen = self._recipe_op()
        if chosen is None:
            return self.genesis.recipe
        payload = self.op(chosen).payload
        assert isinstance(payload, SetRecipe), "the table of recipes holds RECIPEs"
        return Recipe.from_canonical(payload.recipe)

    def rank(self, key: bytes) -> Rank:
        """What a key may do now, by all that is known."""
        past = frozenset(one for one, _, _ in self.tables.every("members"))
        return self._log.authority().rank(key, b"", past, at_the_door=False)

    # ---- authoring

    def compose(self, key: Key, incarnation: bytes, payload: Payload) -> Op:
        """The next operation of an actor, after all that is known here. Raises NotAllowedError, OpError, MismatchError.

        It is not part of the set before it is accepted.
        """
        tip = self.tables.get("tips", key.public + incarnation)
        seq, prev = (tip[0] + 1, tip[1]) if tip else (1, None)
        heads = sorted((self.op(one).order for one in self.heads() if one != prev), reverse=True)
        deps = tuple(sorted(one for _, one in heads[: limits.PARENTS_MAX]))
        parents = {*deps, *payload.targets, *([prev] if prev else [])}
        unknown = [one.hex()[:16] for one in payload.targets if one not in self]
        if unknown:
            raise OpError(f"a {payload.kind} of operations that are not here: {', '.join(unknown)}.")
        height = 1 + max((self.op(one).height for one in parents), default=0)
        op = signed(key, self.pool, incarnation, seq, prev, deps, height, payload)
        check(self._log, op)
        return op

    # ---- taking operations

    def join(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest] | None = None) -> Joined:
        """Take operations in any order, as far as they can be taken. ``manifests`` are by content id."""
        joined = Joined([], [], [])
        for op in sorted(ops, key=lambda op: op.order):
            manifest = (manifests or {}).get(op.payload.content) if isinstance(op.payload, Add) else None
            try:
                known = op.id in self
                missing = self.accept(op, manifest)
            except (OpError, NotAllowedError, MismatchError) as fault:
                joined.refused.append((op, str(fault)))
                continue
            if missing:
                joined.waiting.append((op, missing))
            elif not known:
                joined.new.append(op)
        return joined

    def accept(self, op: Op, manifest: Manifest | None = None) -> Missing | None:
        """Take one operation; taking it again changes nothing. Answers with what is missing before it can be taken.

        Raises OpError, NotAllowedError or MismatchError for one that no replica of this pool takes.
        """
        if op.pool != self.pool:
            raise PoolMismatchError(
                f"operation {op.id.hex()[:16]} is of pool {op.pool.hex()}; this is pool {self.pool.hex()}."
            )
        if op.id in self:
            return None
        missing = tuple(one for one in op.parents if one not in self)
        content = self._wanted(op, manifest)
        if missing or content:
            return Missing(missing, content)
        check(self._log, op)
        if manifest is not None and isinstance(op.payload, Add):
            check_manifest(self._log, op.payload, manifest)
        Effects(self._log).record(op, manifest.kind if manifest else None)
        return None

    def _wanted(self, op: Op, manifest: Manifest | None) -> bytes | None:
        """The content of an ADD whose manifest nobody has shown here."""
        if not isinstance(op.payload, Add) or manifest is not None or self.knows_content(op.payload.content):
            return None
        return op.payload.content

    def _recipe_op(self) -> bytes | None:
        orders = [self.op(one).order for one, _, _ in self.tables.every("recipes") if not self.is_void(one)]
        return max(orders)[1] if orders else None
