"""How operations spread: a session with every peer now and then, and news pushed to all of them at once.

RULES
1. Nothing that is believed about a peer is needed: pushes may be lost, sessions find what is lacking.
2. A peer that fails is tried again after a time that doubles up to ``REDIAL_SECONDS_MAX``, for ever.
3. A peer that answers what no honest one does is left alone for ``BAN_SECONDS`` and reported.
4. With many peers each has its turn less often, so that what one node does does not grow with their number.

No sockets and no files: links and the replica are handed in, time is the event loop's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from crdtmerge.errors import CrdtMergeError, FalsePeerError, PeerError, PoolMismatchError
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import Answer, Request
from crdtmerge.gossip.session import Responded, respond
from crdtmerge.gossip.statements import Statements
from crdtmerge.gossip.talk import Call, Link, converse, push
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import Op

PERIOD_SECONDS = 10.0
"""Between two sessions of a node, about."""

TOGETHER = 3
"""Peers that have a session in each period."""

PUSHED_TO_ALL_MAX = 16
"""With more peers, news go to so many of them, chosen anew each time; they pass it on."""

MAIL_MAX = 10_000
"""Operations that wait to be pushed to a peer; beyond, a session will find them."""

REDIAL_SECONDS = 0.5
REDIAL_SECONDS_MAX = 60.0
BAN_SECONDS = 3600.0


@dataclass(eq=False)
class Contact:
    """A peer that this node talks to of its own accord, and how that went."""

    link: Link
    name: str
    key: bytes | None = None
    mail: dict[bytes, None] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    due: float = 0.0
    failures: int = 0
    banned_until: float | None = None
    reason: str | None = None
    last_session: float | None = None
    sent: int = 0
    received: int = 0
    rounds: int = 0
    overhead_bytes: int = 0
    unsaid: bool = False


class Spread:
    """Spreads the operations of a replica among its contacts."""

    def __init__(
        self,
        holding: Holding,
        call: Call,
        *,
        source: random.Random | None = None,
        period: float = PERIOD_SECONDS,
        on_news: Callable[[list[Op]], None] = lambda ops: None,
        on_starving: Callable[[Contact], Awaitable[None]] | None = None,
        on_fault: Callable[[BaseException], None] = lambda fault: None,
    ) -> None:
        self._holding, self._call, self._period = holding, call, period
        self._on_news, self._on_starving, self._on_fault = on_news, on_starving, on_fault
        self._random = source or random.Random()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.contacts: dict[str, Contact] = {}
        self.statements = Statements(holding.pool)

    def meet(self, contact: Contact) -> None:
        """Talk to a peer from now on."""
        self.forget(contact.name)
        self.contacts[contact.name] = contact
        contact.due = self._now() + self._random.uniform(0, min(self._period, 1.0) / 4)
        self._tasks[contact.name] = task = asyncio.create_task(self._keep_up(contact))
        task.add_done_callback(self._ended)

    def forget(self, name: str) -> None:
        """Talk to it no longer."""
        self.contacts.pop(name, None)
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._on_fault(fault)

    async def close(self) -> None:
        """Talk to nobody any more."""
        tasks = list(self._tasks.values())
        for name in list(self._tasks):
            self.forget(name)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Look for operations that another process wrote, and tell everybody."""
        news: list[Op] = await self._call(self._holding.refresh)
        self.tell(news)

    def tell(self, ops: Iterable[Op], *, but: str | None = None) -> None:
        """Push operations to all contacts, or to some of many."""
        news = list(ops)
        if not news:
            return
        others = [one for one in self.contacts.values() if one.name != but and one.banned_until is None]
        if len(others) > PUSHED_TO_ALL_MAX:
            others = self._random.sample(others, PUSHED_TO_ALL_MAX)
        for contact in others:
            contact.mail.update((op.id, None) for op in news)
            if len(contact.mail) > MAIL_MAX:
                contact.mail.clear()
                contact.due = min(contact.due, self._now())
            contact.wake.set()
        self._on_news(news)

    def say(self) -> None:
        """Pass this node's last statement on without waiting for the next session."""
        for contact in self.contacts.values():
            contact.unsaid = True
            contact.wake.set()

    def ban(self, contact: Contact, why: str) -> None:
        """Leave a contact alone for long: it answers what no honest one does."""
        contact.reason, contact.failures = why, contact.failures + 1
        contact.banned_until = contact.due = self._now() + BAN_SECONDS
        contact.mail.clear()

    async def answer(
        self, request: Request, peer: str | None = None, manifests: dict[bytes, Manifest] | None = None
    ) -> Answer:
        """The other side of a session that somebody opened. Raises FalsePeerError, PoolMismatchError."""
        self.statements.take(request.said)
        said = self.statements.newest() if request.heads is not None or request.said else []
        responded: Responded = await self._call(respond, self._holding, request, manifests or {}, said)
        self.tell(responded.new, but=peer)
        return responded.answer

    async def talk(self, contact: Contact) -> None:
        """One session with a contact. Raises what ``converse`` does."""
        contact.mail.clear()
        summary = await converse(self._holding, contact.link, self._call, self.statements)
        contact.sent, contact.received = contact.sent + summary.sent, contact.received + len(summary.received)
        contact.rounds += summary.rounds
        contact.overhead_bytes += summary.overhead_bytes
        contact.last_session = self._now()
        self.tell(summary.received, but=contact.name)
        if summary.starving and self._on_starving is not None:
            await self._on_starving(contact)

    async def _keep_up(self, contact: Contact) -> None:
        while True:
            await self._wait(contact)
            banned = contact.banned_until
            try:
                if talking := self._now() >= contact.due:
                    contact.unsaid = False
                    await self.talk(contact)
                else:
                    await self._push(contact)
                if contact.banned_until != banned:
                    continue  # meanwhile, for what it served
                contact.failures, contact.reason, contact.banned_until = 0, None, None
                if talking:
                    contact.due = self._now() + self._turn()
            except (FalsePeerError, PoolMismatchError) as fault:
                self.ban(contact, str(fault))
            except PeerError as fault:
                if contact.banned_until != banned:
                    continue
                contact.reason, contact.failures = str(fault), contact.failures + 1
                contact.due = self._now() + self._pause(contact.failures)
                contact.mail.clear()
            except CrdtMergeError as fault:  # our own disk: the peer has no part in it
                contact.reason = str(fault)
                contact.due = self._now() + REDIAL_SECONDS_MAX

    async def _push(self, contact: Contact) -> None:
        mail, contact.mail = list(contact.mail), {}
        said, contact.unsaid = contact.unsaid, False
        summary, behind = await push(self._holding, contact.link, self._call, mail, self.statements if said else None)
        contact.sent += summary.sent
        contact.rounds += summary.rounds
        contact.overhead_bytes += summary.overhead_bytes
        if behind and contact.banned_until is None:
            contact.due = self._now()

    async def _wait(self, contact: Contact) -> None:
        """Until it is the contact's turn, or there is something to push to one that can be reached."""
        while (left := contact.due - self._now()) > 0:
            contact.wake.clear()
            if (contact.mail or contact.unsaid) and not contact.failures:
                return
            try:
                async with asyncio.timeout(left):
                    await contact.wake.wait()
            except TimeoutError:
                return

    def _turn(self) -> float:
        """Until the next session with one contact."""
        return self._period * max(1.0, len(self.contacts) / TOGETHER) * self._random.uniform(0.5, 1.5)

    def _pause(self, failures: int) -> float:
        pause: float = min(REDIAL_SECONDS * 2.0 ** min(failures - 1, 20), REDIAL_SECONDS_MAX)
        return pause * self._random.uniform(0.5, 1.0)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
