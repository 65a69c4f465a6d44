"""One session between two replicas, without sockets: ``Opener`` on the side that asks, ``respond`` on the other.

A session brings both to the union of what they have. Nothing is remembered beyond it: one that breaks off has lost
nothing, since what came in was taken, and the next begins with what both then have.

1. The opener says its heads and a fingerprint of each of some ranges. Where all is equal, that is the end.
2. Where the other knows all those heads, it answers with the operations that the opener lacks.
3. Else it answers with ranges that differ, and ids; the opener asks on, for operations by id, and sends what the other
   lacks, each message up to its bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from crdtmerge.errors import FalsePeerError, InputError, MismatchError, PoolMismatchError
from crdtmerge.gossip import reconcile
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import HEADS_MAX, WANTS_MAX, Answer, Request
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import Op
from crdtmerge.replica.opset import Joined

PENDING_MAX = 500
"""Operations that wait for others within a session; what is dropped is asked for again."""

PENDING_BYTES_MAX = 8 << 20
"""Their bytes."""

WANTED_MAX = 1 << 16
"""Ids that are remembered of what the other has; beyond, these are fetched first and the ranges opened anew."""

ROUNDS_MAX = 100_000
"""Rounds of one session: one that never ends is no honest peer's."""


@dataclass
class Summary:
    """What a session did."""

    rounds: int = 0
    sent: int = 0
    received: list[Op] = field(default_factory=list)
    overhead_bytes: int = 0
    refused: dict[bytes, str] = field(default_factory=dict)
    equal: bool = False
    starving: bool = False


class Opener:
    """The side that asks: ``request``, and ``take`` of the answer, until there is nothing more to ask."""

    def __init__(self, holding: Holding, said: Iterable[bytes] = ()) -> None:
        self._holding, self._said = holding, tuple(said)
        self._heads = holding.opset.heads()
        self._wanted: dict[bytes, None] = {}
        self._asked: set[bytes] = set()
        self._offered: dict[bytes, None] = {}
        self._pending: dict[bytes, Op] = {}
        self._beside: dict[bytes, Manifest] = {}
        self._sending: list[bytes] = []
        self._given: set[bytes] = set()
        self._first = True
        self.summary = Summary()
        self.missing: set[bytes] = set()
        """Contents whose manifests must be fetched: hand them to ``supply``."""
        self.unknown_there: set[bytes] = set()
        """Contents whose manifests the other side must be given before it takes what is offered."""
        self._compare()

    def _compare(self) -> None:
        """Open the ranges."""
        self._session = reconcile.Session(self._holding.index)
        self._ranges: reconcile.Ranges | None = self._session.opening()
        self._cut_short, self._before = False, len(self.summary.received)

    def request(self) -> Request | None:
        """What to say next, None when all is said."""
        if self.summary.rounds >= ROUNDS_MAX:
            raise FalsePeerError("a session that does not end.")
        ops, manifests = self._holding.payload(self._offered)
        wants = tuple(one for one in self._wanted if one not in self._pending)[:WANTS_MAX]
        if self._cut_short and not (wants or ops) and len(self.summary.received) > self._before:
            self._compare()
        ranges = reconcile.pack(self._ranges) if self._ranges else None
        if not (self._first or ranges or wants or ops):
            return None
        heads = self._heads if self._first and len(self._heads) <= HEADS_MAX else None
        said, self._said = self._said, ()
        self._first, self._asked = False, set(wants)
        for op in ops:
            del self._offered[op.id]
        self._sending = [op.id for op in ops]
        return Request(self._holding.pool, heads, ranges, wants, tuple(op.wire for op in ops), tuple(manifests), said)

    def take(self, answer: Answer) -> None:
        """Learn from an answer. Raises FalsePeerError."""
        self.summary.starving = answer.starving
        self._after_sending(answer)
        got = self._receive(answer)  # whether any was news: what a peer repeats must not keep a session going
        if answer.heads is not None:  # these operations are what was lacking here
            self._ranges = None
            if answer.more and got:
                self._ranges, self._first = None, True
                self._heads = self._holding.opset.heads()
            elif not answer.more and all(head in self._holding.opset for head in answer.heads):
                self._offered.update((op.id, None) for op in self._holding.opset.delta(answer.heads))
        else:
            self._learn(answer)
        for one in self._asked:  # what was asked for and did not come is not there, or comes with the next
            if one in self._holding.opset or not got:
                self._wanted.pop(one, None)

    def supply(self, manifests: Mapping[bytes, Manifest]) -> None:
        """Take what waited for these manifests."""
        self.missing.clear()
        self._accept([], manifests)

    def delivered(self) -> None:
        """The manifests that the other side lacked are there now."""
        self._given |= self.unknown_there
        self.unknown_there.clear()

    def _learn(self, answer: Answer) -> None:
        asked, self._ranges = self._ranges, None
        if asked is None:
            return
        try:
            ranges = reconcile.unpack(answer.ranges) if answer.ranges is not None else []
        except InputError as fault:
            raise FalsePeerError(str(fault)) from None
        if not ranges and self.summary.rounds <= 1:
            self.summary.equal = True
        self._ranges = self._session.take(ranges) or None
        if len(self._session) > WANTED_MAX:
            self._ranges, self._cut_short = None, True
        known = self._holding.opset
        if self._ranges is None:  # now their order is known: causes first, so that nothing has to wait
            self._wanted.update((one, None) for one in self._session.wanted() if one not in known)
            self._offered.update((one, None) for one in self._session.offered())

    def _receive(self, answer: Answer) -> bool:
        """Take the operations of an answer; whether any came."""
        try:
            ops = self._holding.read(answer.ops)
            found = [Manifest.from_bytes(data) for data in answer.manifests]
        except InputError as fault:
            raise FalsePeerError(f"a peer sent what is no operation: {fault}") from None
        self._beside |= {manifest.id: manifest for manifest in found}
        return self._accept(ops, {})

    def _accept(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest]) -> bool:
        waited = self._pending.keys()
        batch = {**self._pending, **{op.id: op for op in ops}}
        joined = taken(self._holding, batch.values(), {**manifests, **self._beside})
        self.summary.received += joined.new
        self.summary.refused.update((op.id, why) for op, why in joined.refused)
        self._pending = {}
        room = PENDING_BYTES_MAX
        for op, missing in joined.waiting[:PENDING_MAX]:
            room -= len(op.wire)
            if room >= 0:
                self._pending[op.id] = op
                self.missing |= {missing.content} if missing.content else set()
        waiting = {getattr(op.payload, "content", None) for op in self._pending.values()}
        self._beside = {content: one for content, one in self._beside.items() if content in waiting}
        for op in (*joined.new, *(op for op, _ in joined.refused)):
            self._wanted.pop(op.id, None)
        return bool(joined.new) or bool(self._pending.keys() - waited)

    def _after_sending(self, answer: Answer) -> None:
        """Count what was sent; what waits there for a manifest, and what came after it, is sent again, once."""
        lacks = set(answer.lacks) - self._given
        waits = [self._content(one) in lacks for one in self._sending]
        first = waits.index(True) if True in waits else len(waits)
        again = self._sending[first:]
        self.unknown_there |= {content for one in again if (content := self._content(one)) in lacks and content}
        self._offered = {**dict.fromkeys(again), **self._offered}
        self.summary.sent += first
        self._sending = []

    def _content(self, identity: bytes) -> bytes | None:
        return getattr(self._holding.opset.op(identity).payload, "content", None)


@dataclass(frozen=True)
class Responded:
    """An answer, and the operations that the request brought."""

    answer: Answer
    new: list[Op]


def respond(
    holding: Holding, request: Request, manifests: Mapping[bytes, Manifest] | None = None, said: Iterable[bytes] = ()
) -> Responded:
    """The other side of a session; ``manifests`` were sent ahead. Raises FalsePeerError, PoolMismatchError."""
    if request.pool != holding.pool:
        raise PoolMismatchError(f"this is pool {holding.pool.hex()}; the request is for pool {request.pool.hex()}.")
    try:
        ops = holding.read(request.ops)
        beside = {(found := Manifest.from_bytes(data)).id: found for data in request.manifests}
        ranges = None if request.ranges is None else reconcile.unpack(request.ranges)
    except InputError as fault:
        raise FalsePeerError(str(fault)) from None
    joined = taken(holding, ops, {**(manifests or {}), **beside})
    lacks = {missing.content: None for _, missing in joined.waiting if missing.content}
    refused = {op.id: why for op, why in joined.refused}
    answer = replace(
        _answer(holding, request, ranges),
        lacks=tuple(one for one in lacks if one),
        refused=refused,
        behind=any(missing.parents for _, missing in joined.waiting),
        said=tuple(said),
    )
    return Responded(answer, joined.new)


def _answer(holding: Holding, request: Request, ranges: reconcile.Ranges | None) -> Answer:
    """Operations that were asked for, or all that is lacking by its heads, or ranges that differ."""
    opset = holding.opset
    if request.heads is not None and all(head in opset for head in request.heads):
        here = opset.heads()
        if set(here) == set(request.heads):
            return Answer(ranges=b"\x90")
        lacking = [op.id for op in opset.delta(request.heads, most=WANTS_MAX)] if len(here) <= HEADS_MAX else []
        if 0 < len(lacking) <= WANTS_MAX:
            ops, manifests = holding.payload(lacking)
            wires = tuple(op.wire for op in ops)
            return Answer(here, None, wires, tuple(manifests), more=len(ops) < len(lacking))
    ops, manifests = holding.payload(request.wants)
    differ = None if ranges is None else reconcile.pack(reconcile.answer(holding.index, ranges))
    return Answer(None, differ, tuple(op.wire for op in ops), tuple(manifests))


def taken(holding: Holding, ops: Iterable[Op], manifests: Mapping[bytes, Manifest]) -> Joined:
    """Take operations; a manifest that does not fit the pool refuses its own ADDs alone."""
    batch = list(ops)
    try:
        return holding.take(batch, manifests) if batch else Joined([], [], [])
    except MismatchError as fault:
        if len(batch) == 1:
            return Joined([], [], [(batch[0], str(fault))])
        apart = [taken(holding, [op], manifests) for op in sorted(batch, key=lambda op: op.order)]
        return Joined(*([one for part in parts for one in part] for parts in zip(*apart, strict=True)))
