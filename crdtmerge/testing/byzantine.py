"""A node that lies: forks its chain, back-dates, replays, serves wrong answers and states wrong digests.

Between its lies it behaves as others do, so that what it signs spreads and what it says is believed where it can be.
"""

from __future__ import annotations

import contextlib
from typing import Any

from crdtmerge.canonical import digest
from crdtmerge.errors import CrdtMergeError
from crdtmerge.gossip import reconcile
from crdtmerge.gossip.messages import LACKS_MAX, Answer, Request
from crdtmerge.gossip.statements import Statement
from crdtmerge.replica.op import Add, Ids, Op, Payload, signed
from crdtmerge.testing.payloads import payload
from crdtmerge.testing.virtual_network import DEADLINE_SECONDS, MANIFEST, SYNC
from crdtmerge.testing.virtual_node import Node

HEARD_MAX = 64
"""Messages that it remembers, to say them again."""

INCARNATION = b"\xee" * 16
"""The one of its chain that it forks."""


class Liar(Node):
    """The node; ``lies`` is how often it lies when it is asked."""

    honest = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lies = self.random.choice((0.1, 0.4, 0.8))
        self._heard: list[bytes] = []

    # ---- when it is asked

    async def serve(self, asker: str, what: str, data: bytes) -> bytes | None:
        """Answer, rightly or not."""
        if what == SYNC:
            self._heard = [*self._heard[-HEARD_MAX:], data]
        if self.random.random() >= self.lies:
            return await super().serve(asker, what, data)
        self.counts["lies"] += 1
        if what == SYNC:
            return await self._answer(asker, data)
        if what == MANIFEST:
            return self.random.choice((None, b"", self.random.choice(list(self.contents.values())).to_bytes()))
        return b""

    async def _answer(self, asker: str, data: bytes) -> bytes:
        random, request = self.random, Request.from_bytes(data)
        true = await super().serve(asker, SYNC, data) or b""
        return random.choice(
            (
                lambda: random.randbytes(random.choice((0, 1, 40, 3000))),
                lambda: true[: random.randrange(len(true))],
                lambda: Answer(heads=self._ids(3), more=random.random() < 0.5).to_bytes(),
                lambda: Answer(heads=(), ranges=b"\x90").to_bytes(),
                lambda: Answer(ranges=b"\x90").to_bytes(),
                lambda: Answer(ranges=self._ranges()).to_bytes(),
                lambda: Answer(ranges=random.randbytes(30)).to_bytes(),
                lambda: Answer(ops=tuple(self._broken(op) for op in self._recent())).to_bytes(),
                lambda: Answer(ops=tuple(op.wire for op in self._recent()), more=True).to_bytes(),
                lambda: Answer(lacks=(*self._ids(LACKS_MAX - 10), *self.contents)).to_bytes(),
                lambda: Answer(refused=dict.fromkeys(request.wants[:9], "no"), behind=True).to_bytes(),
                lambda: Answer(said=(self._statement(),), behind=True, starving=True).to_bytes(),
                lambda: random.choice(self._heard),
            )
        )()

    def _ids(self, count: int) -> tuple[bytes, ...]:
        return tuple(self.random.randbytes(32) for _ in range(count))

    def _recent(self) -> list[Op]:
        ops = list(self.opset.ops())
        return self.random.sample(ops, min(3, len(ops)))

    def _broken(self, op: Op) -> bytes:
        wire = bytearray(op.wire)
        wire[self.random.randrange(len(wire))] ^= 1 << self.random.randrange(8)
        return bytes(wire)

    def _ranges(self) -> bytes:
        """Fingerprints of nothing, ids of nothing, over any bounds."""
        heights = sorted(self.random.sample(range(1, 60), self.random.randint(0, 4)))
        said = [self._range((height, self.random.randbytes(self.random.choice((0, 1, 32))))) for height in heights]
        return reconcile.pack([*said, self._range(None)])

    def _range(self, upper: tuple[int, bytes] | None) -> reconcile.Range:
        kind = self.random.choice((reconcile.SAME, reconcile.PRINT, reconcile.IDS, reconcile.ASK))
        ids = list(self._ids(self.random.choice((0, 1, 40))))
        value = {reconcile.PRINT: self.random.randbytes(32), reconcile.IDS: ids}.get(kind)
        return reconcile.Range(upper, kind, value)

    # ---- of its own accord

    def lie(self) -> None:
        """Do something to somebody that no honest node does."""
        acts = (
            *(self._fork, self._fork, self._back_date, self._replay),
            *(self._break, self._say_wrong, self._ask_nonsense, self._slow_down),
        )
        self.spawn(self.random.choice(acts)())

    async def _fork(self) -> None:
        """Two operations in one place, each sent to another peer."""
        one, other = self._signed(), self._signed()
        await self._send(self.random.choice(self.peers), one)
        await self._send(self.random.choice(self.peers), other)

    async def _back_date(self) -> None:
        """An operation as if it had been made long ago, kept among its own."""
        op = self._signed(long_ago=True)
        if op is not None:
            await self.call(self.holding.take, [op], self.contents)

    async def _replay(self) -> None:
        if self._heard:
            await self._exchange(self.random.choice(self.peers), self.random.choice(self._heard))

    async def _break(self) -> None:
        """Operations that nobody may take."""
        op = self._signed()
        if op is None:
            return
        unknown = tuple(sorted((*op.deps, *self._ids(1))))
        for one in (
            self._resigned(op, pool=digest("other", 1)),
            self._resigned(op, height=op.height + 3),
            self._resigned(op, deps=unknown, height=99),
        ):
            await self._send(self.random.choice(self.peers), one)
        broken = Request(self._genesis.id, ops=(self._broken(op),)).to_bytes()
        await self._exchange(self.random.choice(self.peers), broken)

    async def _say_wrong(self) -> None:
        said = Request(self._genesis.id, said=(self._statement(), self._statement())).to_bytes()
        await self._exchange(self.random.choice(self.peers), said)

    async def _ask_nonsense(self) -> None:
        random, pool = self.random, self._genesis.id
        request = random.choice(
            (
                Request(pool, heads=self._ids(5), wants=self._ids(9)),
                Request(pool, ranges=self._ranges(), wants=tuple(self.opset.heads())),
                Request(pool, ranges=random.randbytes(20)),
                Request(digest("other", 1), heads=()),
                Request(pool, heads=(), manifests=(random.randbytes(30),)),
                Request(pool, said=(random.randbytes(90),)),
            )
        )
        await self._exchange(random.choice(self.peers), request.to_bytes())

    async def _slow_down(self) -> None:
        """Be so slow for a while that nobody waits for it."""
        self.network.seconds[self.name] = self.random.choice((0.0, 1.0, DEADLINE_SECONDS))

    def _statement(self) -> bytes:
        """That some merge came to something else than it does."""
        merge, number = digest("merge", self.opset.root), self.random.randrange(100)
        return Statement.signed(self.key, self._genesis.id, number, merge, self.random.randbytes(32)).wire

    def _signed(self, *, long_ago: bool = False) -> Op | None:
        """An operation at any place of its chain."""
        random, view = self.random, self.opset
        ops = list(view.ops())
        said: Payload | None = payload(random, view, self.key, self.contents)
        if said is None:
            return None
        own = [op for op in ops if (op.author, op.incarnation) == (self.key.public, INCARNATION)]
        prev = random.choice((*own[-3:], None)) if own else None
        deps = {op.id for op in random.sample(ops, min(len(ops), 2))} if long_ago else {*view.heads()[:3]}
        parents = {*deps, *said.targets, *([prev.id] if prev else [])}
        height = 1 + max((view.op(one).height for one in parents), default=0)
        seq, before = (prev.seq + 1, prev.id) if prev else (1, None)
        return signed(self.key, self._genesis.id, INCARNATION, seq, before, tuple(sorted(deps)), height, said)

    def _resigned(self, op: Op, *, pool: bytes = b"", deps: Ids | None = None, height: int | None = None) -> Op:
        """An operation with something else in it."""
        deps, height = op.deps if deps is None else deps, height or op.height
        return signed(self.key, pool or op.pool, op.incarnation, op.seq, op.prev, deps, height, op.payload)

    async def _send(self, peer: str, op: Op | None) -> None:
        if op is None:
            return
        self.counts["forged"] += 1
        beside = [self.contents[op.payload.content].to_bytes()] if isinstance(op.payload, Add) else []
        beside = [one for one in beside if len(one) < 1000]
        await self._exchange(peer, Request(self._genesis.id, ops=(op.wire,), manifests=tuple(beside)).to_bytes())

    async def _exchange(self, peer: str, message: bytes) -> None:
        with contextlib.suppress(CrdtMergeError):
            await self.network.ask(self.name, peer, SYNC, message)
