"""The op set by the words of its rules, from a list of operations and nothing else: slow, short and independent."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, cached_property
from itertools import groupby
from typing import Any

from crdtmerge.recipe import Recipe
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add, Grant, Op, Remove, Retract, Revoke, SetRecipe, Unretract

NOBODY, MEMBER, CURATOR, FOUNDER = range(4)
TARGETS = {Add: Add, Remove: Add, Unretract: Retract}
SAID = {"weight": 1, "role": "task", "task": None, "files": {}, "note": None}


class Naive:
    """What holds of a set of operations that has every parent of its members."""

    def __init__(self, genesis: Genesis, ops: Iterable[Op]) -> None:
        self.genesis, self.ops = genesis, {op.id: op for op in ops}
        self.founders: tuple[bytes, ...] = () if genesis.curators == "any" else genesis.curators
        self.rulings = frozenset(one for one, op in self.ops.items() if isinstance(op.payload, Grant | Revoke))
        self.past, self.kept, self.stands = cache(self._past), cache(self._kept), cache(self._stands)
        self.door = cache(lambda op: self.rank(op.author, op.id, self.past(op), self.past(op)))

    def _past(self, op: Op) -> frozenset[bytes]:
        """All that an operation refers to, and what that refers to."""
        return frozenset(op.parents).union(*(self.past(self.ops[one]) for one in op.parents))

    # Rights

    def rank(self, author: bytes, one: bytes, past: frozenset[bytes], known: frozenset[bytes]) -> int:
        """The best right in the past that stands by the GRANTs and REVOKEs known."""
        known = known & self.rulings
        taken = {ruling for ruling in known if self._takes(ruling, author, one, known)}
        rights: list[tuple[int, frozenset[bytes]]] = [(self._from_the_start(author), frozenset())]
        for grant in known & past:
            payload = self.ops[grant].payload
            if isinstance(payload, Grant) and payload.key == author and self.stands(grant, known):
                rights.append(({"member": MEMBER, "curator": CURATOR}[payload.role], self.past(self.ops[grant])))
        return max((rank for rank, before in rights if taken <= before), default=NOBODY)

    def _from_the_start(self, author: bytes) -> int:
        if author in self.founders:
            return FOUNDER
        if self.genesis.curators == "any":
            return CURATOR
        return MEMBER if self.genesis.membership == "open" else NOBODY

    def _stands(self, ruling: bytes, known: frozenset[bytes]) -> bool:
        author = self.ops[ruling].author
        return not any(self._takes(revoke, author, ruling, known) for revoke in known)

    def _takes(self, revoke: bytes, author: bytes, one: bytes, known: frozenset[bytes]) -> bool:
        """Whether a standing REVOKE of a key does not keep one of its operations."""
        payload = self.ops[revoke].payload
        if not isinstance(payload, Revoke) or payload.key != author:
            return False
        return one not in self.kept(revoke) and self.stands(revoke, known)

    def _kept(self, revoke: bytes) -> frozenset[bytes]:
        chain: set[bytes] = set()
        for head in self.ops[revoke].payload.targets:
            at: bytes | None = head
            while at is not None:
                chain.add(at)
                at = self.ops[at].prev
        return frozenset(chain)

    def needed(self, op: Op) -> int:
        """The rank that an operation takes."""
        payload = op.payload
        others = any(self.ops[target].author != op.author for target in payload.targets)
        if isinstance(payload, Grant | Revoke):
            return FOUNDER
        if isinstance(payload, SetRecipe) or (isinstance(payload, Remove) and others):
            return CURATOR
        return CURATOR if self.hides_all(op) else MEMBER

    def hides_all(self, op: Op) -> bool:
        """Whether a RETRACT was a curator's when it was made."""
        return isinstance(op.payload, Retract) and self.door(op) >= CURATOR

    # The door

    def lawful(self, op: Op) -> bool:
        """Whether replicas take an operation whose parents they have."""
        parents, targets = [self.ops[one] for one in op.parents], [self.ops[one] for one in op.payload.targets]
        before, kind, payload = self.ops.get(op.prev or b""), type(op.payload), op.payload
        laws = [
            op.pool == self.genesis.id,
            op.height == 1 + max((one.height for one in parents), default=0),
            before is None
            or (before.author, before.incarnation, before.seq + 1) == (op.author, op.incarnation, op.seq),
            all(isinstance(one.payload, TARGETS[kind]) for one in targets) if kind in TARGETS else True,
            not isinstance(payload, Add) or all(one.author == op.author for one in targets),
            not isinstance(payload, SetRecipe)
            or payload.recipe.get("base", "?") == self.genesis.recipe.canonical()["base"],
        ]
        if isinstance(payload, Revoke):
            order = [*self.founders, payload.key]
            laws.append(all(one.author == payload.key for one in targets))
            laws.append(op.author in order and order.index(op.author) < order.index(payload.key))
        return all(laws) and self.door(op) >= self.needed(op)

    # What counts

    @cached_property
    def void(self) -> set[bytes]:
        """The operations whose right does not stand by all that is known."""
        ranks = {op: self.rank(op.author, op.id, self.past(op), self.rulings) for op in self.ops.values()}
        return {op.id for op, rank in ranks.items() if rank < self.needed(op)}

    @cached_property
    def acting(self) -> list[Op]:
        """The others, the greatest last."""
        return sorted((op for op in self.ops.values() if op.id not in self.void), key=lambda op: op.order)

    @cached_property
    def standing(self) -> list[Op]:
        """Those that no other ended."""
        ended = {target for op in self.acting if isinstance(op.payload, Add | Remove) for target in op.payload.targets}
        return [op for op in self.acting if op.id not in ended]

    @cached_property
    def live(self) -> set[bytes]:
        """The live dots."""
        return {op.id for op in self.standing if isinstance(op.payload, Add)}

    @cached_property
    def retracts(self) -> set[bytes]:
        """The live RETRACTs."""
        return {op.id for op in self.standing if isinstance(op.payload, Retract)}

    @cached_property
    def recipe(self) -> Recipe:
        """The greatest that acts."""
        recipes = [op.payload.recipe for op in self.acting if isinstance(op.payload, SetRecipe)]
        return Recipe.from_canonical(recipes[-1]) if recipes else self.genesis.recipe

    @cached_property
    def heads(self) -> set[bytes]:
        """The operations that no other refers to."""
        return set(self.ops).difference(*(op.parents for op in self.ops.values()))

    @cached_property
    def forks(self) -> set[tuple[bytes, bytes]]:
        """The two smallest of those that share a place in a chain."""
        places = sorted((op.author, op.incarnation, op.seq, op.id) for op in self.ops.values())
        shared = [[one for *_, one in group] for _, group in groupby(places, key=lambda place: place[:3])]
        return {(one[0], one[1]) for one in shared if len(one) > 1}

    @cached_property
    def contents(self) -> set[bytes]:
        """All that was ever added."""
        return {op.payload.content for op in self.ops.values() if isinstance(op.payload, Add)}

    @cached_property
    def visible(self) -> dict[bytes, dict[str, Any]]:
        """The visible contents and what is said of them."""
        return {one: said for one in self.contents if (said := self._spoken(one))}

    def _shown(self, content: bytes) -> list[Op]:
        """The live dots of a content that no live RETRACT hides, the greatest last."""
        against = [op for op in self.standing if isinstance(op.payload, Retract) and op.payload.content == content]
        hidden = {op.author for op in against}
        if any(map(self.hides_all, against)):
            return []
        dots = [op for op in self.standing if isinstance(op.payload, Add) and op.payload.content == content]
        return [op for op in dots if op.author not in hidden]

    def _spoken(self, content: bytes) -> dict[str, Any] | None:
        """Each field as the greatest shown ADD says it that says it; statistics name by name."""
        shown = self._shown(content)
        says = [op.payload.says for op in shown if isinstance(op.payload, Add)]
        found = {
            name: next((said for one in reversed(says) if (said := getattr(one, name)) is not None), default)
            for name, default in SAID.items()
        }
        stats = {name: one.stats[name] for one in says for name in one.stats}
        return found | {"stats": stats, "adders": tuple(sorted({op.author for op in shown}))} if shown else None
