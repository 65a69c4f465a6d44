"""What an op set knows, as the other files of Layer 1 read it: operations, their pasts, and the rights they give.

The tables, by (key, member) -> value:

    ops        id -> wire                    order    height (8 bytes), id
    heads      id                            tips     author incarnation -> (seq, id) of the last
    dots       author incarnation seq, id
    forks      author incarnation seq        where a chain has two operations in one place
    members    id                            of every GRANT and REVOKE
    contexts   digest -> ids                 sets of them that are the past of an operation
    context    id -> digest                  which set is the past of an operation, if any
    void       id                            operations that lost their right
    recipes    id                            of every RECIPE
    adds       content, id -> kind           all ADDs of a content
    live       content, id -> (author, False)        its live ones
    retracts   content, id -> (author, everyone's)   its live RETRACTs
    killers    id, id                        which operations end an ADD or RETRACT
    removed    content -> (height, id)       the greatest operation that ended a dot of it
    visible    content -> entry              hidden   content -> (why, id)
    nodes      prefix -> page                of the two tries
"""

from __future__ import annotations

from crdtmerge.canonical import digest
from crdtmerge.errors import DatabaseError, OpError, UnknownOpError
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.members import Members, Past, Rank
from crdtmerge.replica.op import Grant, Op, Remove, Retract, Revoke, SetRecipe
from crdtmerge.replica.tables import Tables
from crdtmerge.replica.trie import Tries

MET_MAX = 16384
"""Operations and pasts that are remembered besides the tables; they never change."""


class Log:
    """The operations of a pool in their tables."""

    def __init__(self, genesis: Genesis, tables: Tables) -> None:
        self.genesis, self.tables = genesis, tables
        self.tries = Tries(tables)
        self._authority: tuple[list[bytes], Members] | None = None
        self._met: dict[bytes, Op] = {}
        self._pasts: dict[bytes, Past] = {}

    def __contains__(self, identity: bytes) -> bool:
        return self.tables.has("ops", identity)

    def op(self, identity: bytes) -> Op:
        """An operation that is here. Raises UnknownOpError; DatabaseError for one that is not as it was."""
        op = self._met.get(identity)
        if op is None:
            wire = self.tables.get("ops", identity)
            if wire is None:
                raise UnknownOpError(f"operation {identity.hex()} is not here.")
            try:
                op = Op.stored(wire)
            except OpError as fault:
                raise DatabaseError(f"{fault} It was kept here and is damaged: run `crdtmerge fsck --mend`.") from fault
            self.meet(op)
        return op

    def meet(self, op: Op) -> None:
        """Remember an operation that is here."""
        if len(self._met) >= MET_MAX:
            self._met.clear()
        self._met[op.id] = op

    def is_void(self, identity: bytes) -> bool:
        """Whether an operation lost its right to a REVOKE."""
        return self.tables.has("void", identity)

    def kind(self, content: bytes) -> str | None:
        """The kind of a content, None if it was never added."""
        adds = self.tables.members("adds", content)
        return adds[0][1] if adds else None

    def past_of(self, op: Op) -> Past:
        """The GRANTs and REVOKEs in the causal past of an operation whose parents are here."""
        own = {one for one in op.parents if isinstance(self.op(one).payload, Grant | Revoke)}
        return frozenset(own).union(*map(self.past, op.parents))

    def past(self, identity: bytes) -> Past:
        """The same of an operation that is here."""
        past = self._pasts.get(identity)
        if past is None:
            key = self.tables.get("context", identity)
            past = self._pasts[identity] = frozenset(self.tables.get("contexts", key) if key else ())
            if len(self._pasts) > MET_MAX:
                self._pasts.clear()
        return past

    def keep_past(self, op: Op, past: Past) -> None:
        """Pasts are few and shared by most operations: each is kept once, under its digest."""
        if past:
            ordered = sorted(past)
            key = digest("past", ordered)
            self.tables.put("contexts", key, value=tuple(ordered))
            self.tables.put("context", op.id, value=key)

    def authority(self) -> Members:
        """Who has which rights, by all that is known."""
        known = [one for one, _, _ in self.tables.every("members")]
        if self._authority is None or self._authority[0] != known:
            pasts = {one: self.past(one) for one in known}
            self._authority = (known, Members(self.genesis, {one: self.op(one) for one in known}, pasts, self._chain))
        return self._authority[1]

    def _chain(self, identity: bytes) -> Past:
        chain = set()
        at: bytes | None = identity
        while at is not None:
            chain.add(at)
            at = self.op(at).prev
        return frozenset(chain)

    def needed(self, op: Op) -> Rank:
        """The rank without which an operation does not count."""
        if isinstance(op.payload, Grant | Revoke):
            return Rank.FOUNDER
        if isinstance(op.payload, SetRecipe):
            return Rank.CURATOR
        if isinstance(op.payload, Remove) and any(self.op(one).author != op.author for one in op.payload.targets):
            return Rank.CURATOR
        if isinstance(op.payload, Retract) and self.retracts_all(op):
            return Rank.CURATOR
        return Rank.MEMBER

    def retracts_all(self, op: Op) -> bool:
        """Whether a RETRACT was made by a curator, by its own past; then it hides every dot."""
        return self.authority().rank(op.author, op.id, self.past_of(op), at_the_door=True) >= Rank.CURATOR

    def loses(self, op: Op) -> bool:
        """Whether by all that is known an operation has not the right that it had at the door."""
        past = self.past(op.id)
        return self.authority().rank(op.author, op.id, past, at_the_door=False) < self.needed(op)
