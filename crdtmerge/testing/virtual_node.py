"""A node in virtual time: the production ``Spread`` over a virtual disk and network. It starts, writes and crashes.

A session that ended well between honest nodes must leave both with what either had when it began: ``Watched`` looks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from random import Random
from typing import Any

from crdtmerge.canonical import digest
from crdtmerge.errors import FalsePeerError, InputError, NotAllowedError
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import Request
from crdtmerge.gossip.spread import Contact, Spread
from crdtmerge.gossip.statements import Statement
from crdtmerge.keys import Key
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Op, Payload
from crdtmerge.replica.opset import OpSet
from crdtmerge.testing.virtual_disk import Disk, Stored
from crdtmerge.testing.virtual_network import GIVEN, SYNC, Network

AHEAD_MAX = 16
"""Manifests that are kept for ADDs to come."""

Draw = Callable[[Random, OpSet, Key], Payload | None]
"""Something to write after what is there, None for nothing."""


class Node:
    """One replica and its gossip. ``acknowledged``: what it wrote and was told is written."""

    honest = True

    def __init__(
        self,
        name: str,
        key: Key,
        genesis: Genesis,
        network: Network,
        source: Random,
        peers: Sequence[str],
        contents: Mapping[bytes, Manifest],
    ) -> None:
        self.name, self.key, self.peers = name, key, tuple(peers)
        self._genesis, self.network, self.random, self.contents = genesis, network, source, contents
        self.disk = Disk()
        self.flush_seconds = 0.0
        self.acknowledged: dict[bytes, Op] = {}
        self.counts: Counter[str] = Counter()
        self.up, self.starts, self._said = False, 0, 0
        self._works: dict[asyncio.Task[None], None] = {}
        network.peers[name] = self

    # ---- life and death

    def start(self) -> None:
        """Open what is on the disk and talk to the peers."""
        self.stored = Stored(self._genesis, self.disk, self.key, self.random)
        self.holding = Holding(self.stored)
        self._turn = asyncio.Lock()
        self._ahead: dict[bytes, Manifest] = {}
        self.spread = Watched(self)
        for peer in self.peers:
            self.spread.meet(Contact(self.network.link(self.name, peer), peer))
        self.up, self.starts = True, self.starts + 1

    def crash(self) -> bool:
        """Lose everything but the disk; whether that lost a write that was under way."""
        for name in list(self.spread.contacts):
            self.spread.forget(name)
        for task in list(self._works):
            task.cancel()
        self.up = False
        self.counts["crashes"] += 1
        return self.disk.crash(flushed=self.random.random() < 0.5)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something until it ends, or the node crashes."""
        task = asyncio.get_running_loop().create_task(work)
        self._works[task] = None
        task.add_done_callback(lambda done: self._works.pop(done, None))

    async def call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run something on the replica, after what is running; what it wrote is durable when this returns."""
        async with self._turn:
            await asyncio.sleep(0)
            found = work(*arguments)
            if self.disk.unflushed is not None:
                if self.flush_seconds:
                    await asyncio.sleep(self.random.expovariate(1 / self.flush_seconds))
                self.disk.flush()
            return found

    # ---- what it does

    @property
    def opset(self) -> OpSet:
        """The operations."""
        return self.stored.opset

    async def write(self, draw: Draw, count: int) -> None:
        """Write some operations, as another process on the same folder would, then notice them."""
        for _ in range(count):
            op: Op | None = await self.call(self._written, draw)
            if op is not None:
                self.acknowledged[op.id] = op
        await self.spread.look()

    def _written(self, draw: Draw) -> Op | None:
        payload = draw(self.random, self.opset, self.key)
        try:
            return None if payload is None else self.stored.write(payload, self.contents)
        except NotAllowedError:
            return None

    def state(self) -> None:
        """Say what a merge of this set comes to."""
        self._said += 1
        merge, pool = digest("merge", self.opset.root), self._genesis.id
        said = Statement.signed(self.key, pool, self._said, merge, digest("output", merge))
        self.spread.statements.take([said.wire])
        self.spread.say()

    async def serve(self, asker: str, what: str, data: bytes) -> bytes | None:
        """The other side of a link, as ``node.Node`` and its server answer."""
        if what == SYNC:
            request = Request.from_bytes(data)
            name = asker if asker in self.spread.contacts else None
            return (await self.spread.answer(request, name, dict(self._ahead))).to_bytes()
        if what == GIVEN:
            return self._keep(data)
        found: Manifest | None = await self.call(self.stored.manifest, data)
        return found.to_bytes() if found else None

    def _keep(self, data: bytes) -> bytes:
        try:
            manifest = Manifest.from_bytes(data)
        except InputError as fault:
            raise FalsePeerError(str(fault)) from None
        self._ahead[manifest.id] = manifest
        while len(self._ahead) > AHEAD_MAX:
            del self._ahead[next(iter(self._ahead))]
        return b""


class Watched(Spread):
    """The production code, with a look at what each session left."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.holding, node.call, source=node.random)
        self._node = node

    async def talk(self, contact: Contact) -> None:
        """One session, and what must hold when it ends between two honest nodes that lived on undisturbed."""
        one, other = self._node, self._node.network.peers[contact.name]
        assert isinstance(other, Node), "all peers of a simulation are nodes"
        pair = _pair(one, other)
        undisturbed = other.starts, one.network.harmed[pair]
        had = {*one.opset.heads(), *other.opset.heads()} if other.up else set()
        await super().talk(contact)
        one.counts["sessions"] += 1
        if other.honest and one.honest and other.up and undisturbed == (other.starts, one.network.harmed[pair]):
            assert all(head in one.opset for head in had), f"{one.name} lacks what {other.name} had before a session"
            assert all(head in other.opset for head in had), f"{other.name} lacks what {one.name} had before a session"

    def ban(self, contact: Contact, why: str) -> None:
        """Count it; an honest node says nothing for which another may ban it, whatever liars told it."""
        self._node.counts["bans"] += 1
        one, other = self._node, self._node.network.peers[contact.name]
        super().ban(contact, why)
        assert isinstance(other, Node), "all peers of a simulation are nodes"
        harmed = one.network.harmed[_pair(one, other)]
        assert harmed or not (one.honest and other.honest), f"{one.name} bans {other.name}, which is honest: {why}"


def _pair(one: Node, other: Node) -> tuple[str, str]:
    return min(one.name, other.name), max(one.name, other.name)
