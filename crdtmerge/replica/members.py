"""Who may do what: authority from an operation's own past, and what revocation takes back.

RULES
1. Rights begin with the genesis record. Its curators, in the order given, are the *founders*; where curators are
   ``any``, every key is one for good and there are no members to manage. In an open pool every key is a member.
2. Only founders GRANT and REVOKE. A founder is revoked only by one named before it, so no two revocations can
   contradict each other.
3. A right counts for an operation if it is in its causal past (genesis, or a GRANT) and stands: every REVOKE of that
   key either keeps the operation (it is in the chain of one of its heads) or is in the past of the GRANT.
4. At the door the REVOKEs and GRANTs are those in the operation's own past, so that all replicas judge alike and for
   ever. Afterwards they are all that are known: an operation that lost its right is *void* and acts no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from functools import cached_property

from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Grant, Op, Revoke


class Rank(IntEnum):
    """What a key may do; each rank may do what those below it may."""

    NOBODY = 0
    MEMBER = 1
    CURATOR = 2
    FOUNDER = 3


_GRANTED = {"member": Rank.MEMBER, "curator": Rank.CURATOR}

Past = frozenset[bytes]
"""The GRANTs and REVOKEs in the causal past of an operation."""


class Members:
    """Who has which rights, from a set of GRANTs and REVOKEs and the past of each.

    ``chain(id)`` are the ids of an operation and its predecessors in the author's own chain.
    """

    def __init__(
        self, genesis: Genesis, ops: Mapping[bytes, Op], pasts: Mapping[bytes, Past], chain: Callable[[bytes], Past]
    ) -> None:
        self._genesis, self._ops, self._pasts, self._chain = genesis, ops, pasts, chain
        self._kept: dict[bytes, Past] = {}

    def rank(self, author: bytes, identity: bytes, past: Past, *, at_the_door: bool) -> Rank:
        """What ``author`` may do by the operation ``identity`` with this past; at the door, or by all that is known."""
        known = self._in_force(past) if at_the_door else self._standing
        revokes = [one for one in known if self._acts_on(one, Revoke, author) and identity not in self._kept_by(one)]
        rights = [(self._by_genesis(author), frozenset[bytes]())]
        rights += [
            (_GRANTED[grant.role], self._pasts[one])
            for one in known & past
            if isinstance(grant := self._ops[one].payload, Grant) and grant.key == author
        ]
        return max((rank for rank, before in rights if before.issuperset(revokes)), default=Rank.NOBODY)

    def may_revoke(self, author: bytes, key: bytes) -> bool:
        """Whether a founder may revoke a key: one that is none, or one named after it."""
        founders = self._founders
        return key not in founders or founders.index(author) < founders.index(key)

    def revoked_by(self, author: bytes, identity: bytes, past: Past) -> list[bytes]:
        """The REVOKEs that take an operation's rights, to say why it is void."""
        return sorted(
            one
            for one in self._standing
            if self._acts_on(one, Revoke, author) and one not in past and identity not in self._kept_by(one)
        )

    @cached_property
    def _standing(self) -> Past:
        return self._in_force(frozenset(self._ops))

    @property
    def _founders(self) -> tuple[bytes, ...]:
        curators = self._genesis.curators
        return () if curators == "any" else curators

    def _by_genesis(self, author: bytes) -> Rank:
        if self._genesis.curators == "any":
            return Rank.CURATOR
        if author in self._founders:
            return Rank.FOUNDER
        return Rank.MEMBER if self._genesis.membership == "open" else Rank.NOBODY

    def _in_force(self, among: Iterable[bytes]) -> Past:
        """Those of some GRANTs and REVOKEs that no REVOKE among them voids; founders are judged in their order."""
        standing: set[bytes] = set()
        for founder in self._founders:
            revokes = [one for one in standing if self._acts_on(one, Revoke, founder)]
            standing.update(
                one
                for one in among
                if self._ops[one].author == founder and all(one in self._kept_by(revoke) for revoke in revokes)
            )
        return frozenset(standing)

    def _acts_on(self, one: bytes, kind: type[Revoke], key: bytes) -> bool:
        payload = self._ops[one].payload
        return isinstance(payload, kind) and payload.key == key

    def _kept_by(self, revoke: bytes) -> Past:
        if revoke not in self._kept:
            heads = self._ops[revoke].payload.targets
            self._kept[revoke] = frozenset().union(*(self._chain(head) for head in heads))
        return self._kept[revoke]
