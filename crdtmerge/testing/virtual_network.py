"""A network of virtual links: messages are bytes, which are late, lost, doubled, damaged, or kept from passing one way.

An answer that does not come in time is a PeerError for the one who asked, though the other may have acted. What the
other refuses comes back as it does over HTTP: another pool as PoolMismatchError, all else as PeerError.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Protocol

from crdtmerge.errors import CrdtMergeError, PeerError, PoolMismatchError

DEADLINE_SECONDS = 4.0
"""How long an answer is waited for."""

SYNC, MANIFEST, GIVEN = "sync", "manifest", "given"
"""What is asked: a round of a session, a manifest, to keep one."""


class Peer(Protocol):
    """What can be asked."""

    name: str
    up: bool

    async def serve(self, asker: str, what: str, data: bytes) -> bytes | None:
        """Answer. Raises CrdtMergeError."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something until it ends, or the peer crashes."""
        ...


@dataclass
class Weather:
    """What happens to messages: how often they are lost, doubled or damaged, and how late they are on average."""

    lost: float = 0.0
    doubled: float = 0.0
    damaged: float = 0.0
    late_seconds: float = 0.0


class Network:
    """All peers by name, and what passes between them. ``note`` is told of every message."""

    def __init__(self, source: Random, note: Callable[..., None]) -> None:
        self._random, self._note = source, note
        self.weather = Weather()
        self.peers: dict[str, Peer] = {}
        self.blocked: set[tuple[str, str]] = set()
        self.seconds: dict[str, float] = {}
        """How long messages from and to a peer take at least."""
        self.harmed: Counter[tuple[str, str]] = Counter()
        """Damaged messages between two, by the names in order."""
        self.counts: Counter[str] = Counter()

    def link(self, asker: str, asked: str) -> VirtualLink:
        """A link from one to another."""
        return VirtualLink(self, asker, asked)

    async def ask(self, asker: str, asked: str, what: str, data: bytes) -> bytes | None:
        """Ask and wait for the answer. Raises PeerError, PoolMismatchError."""
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        doubled = self._random.random() < self.weather.doubled
        self.counts.update({what: 1, "doubled": doubled})
        for _ in range(1 + doubled):
            self._send(asker, asked, what, data, partial(self._arrived, asker, asked, what, answer))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await answer
        except TimeoutError:
            raise PeerError(f"{asked} does not answer.") from None

    def _arrived(self, asker: str, asked: str, what: str, answer: Answered, data: bytes | None) -> None:
        peer = self.peers[asked]
        if peer.up:
            peer.spawn(self._serve(peer, asker, what, answer, data or b""))
        else:
            self._send(asked, asker, "refused", None, partial(_settle, answer, PeerError(f"{asked} is not there.")))

    async def _serve(self, peer: Peer, asker: str, what: str, answer: Answered, data: bytes) -> None:
        found: bytes | None = None
        fault: CrdtMergeError | None = None
        try:
            found = await peer.serve(asker, what, data)
        except PoolMismatchError as refused:
            fault = PoolMismatchError(str(refused))
        except CrdtMergeError as refused:
            fault = PeerError(f"{peer.name} refuses: {refused}")
        said = type(fault).__name__ if fault else "answer"
        self._send(peer.name, asker, said, found, partial(_settle, answer, fault))

    def _send(
        self, source: str, target: str, what: str, data: bytes | None, then: Callable[[bytes | None], None]
    ) -> None:
        random, fate = self._random, "sent"
        self.counts["messages"] += 1
        self.counts["bytes"] += len(data or b"")
        if (source, target) in self.blocked or random.random() < self.weather.lost:
            fate = "lost"
        else:
            if data and random.random() < self.weather.damaged:
                data, fate = self._damaged(data), "damaged"
                self.harmed[min(source, target), max(source, target)] += 1
            seconds = self.seconds.get(source, 0.0) + self.seconds.get(target, 0.0)
            if self.weather.late_seconds:
                seconds += random.expovariate(1 / self.weather.late_seconds)
            asyncio.get_running_loop().call_later(seconds, then, data)
        self.counts[fate] += 1
        self._note(source, f"{what} to {target}: {len(data or b'')} bytes {zlib.crc32(data or b''):08x} {fate}")

    def _damaged(self, data: bytes) -> bytes:
        """Cut off, or with some flipped bits."""
        if self._random.random() < 0.3:
            return data[: self._random.randrange(len(data))]
        flipped = bytearray(data)
        for _ in range(self._random.choice((1, 1, 1, 3))):
            flipped[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return bytes(flipped)


Answered = asyncio.Future[bytes | None]


def _settle(answer: Answered, fault: CrdtMergeError | None, data: bytes | None) -> None:
    if answer.done():
        return
    if fault is not None:
        answer.set_exception(fault)
    else:
        answer.set_result(data)


class VirtualLink:
    """A link (``gossip.talk.Link``)."""

    def __init__(self, network: Network, asker: str, asked: str) -> None:
        self._network, self._asker, self._asked = network, asker, asked

    async def exchange(self, message: bytes) -> bytes:
        """The answer to a request."""
        return await self._network.ask(self._asker, self._asked, SYNC, message) or b""

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest that is there."""
        return await self._network.ask(self._asker, self._asked, MANIFEST, content)

    async def give_manifest(self, content: bytes, data: bytes) -> None:
        """A manifest for an ADD that is about to be sent."""
        await self._network.ask(self._asker, self._asked, GIVEN, data)
