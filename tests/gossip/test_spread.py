"""How a node keeps up with its peers: backoff, bans, news, mail; over links without sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from crdtmerge.errors import FalsePeerError, PeerError, PoolMismatchError, StorageError, UsageError
from crdtmerge.gossip import address, spread
from crdtmerge.gossip.client import FIRST_SECONDS, SECONDS_MAX, SECONDS_MIN, RoundTrips
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import Answer, Request
from crdtmerge.gossip.session import respond
from crdtmerge.gossip.spread import Contact, Spread
from crdtmerge.keys import Key
from tests.gossip.memory import MemoryStore

KEY = Key.from_seed(bytes([9]) * 32).public


async def call(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


class Link:
    """To a replica in memory; ``fault`` is raised instead of an answer."""

    def __init__(self, store: MemoryStore) -> None:
        self.store, self.holding = store, Holding(store)
        self.fault: BaseException | None = None
        self.asked: list[Request] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def exchange(self, message: bytes) -> bytes:
        request = Request.from_bytes(message)
        self.asked.append(request)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return respond(self.holding, request).answer.to_bytes()

    async def manifest(self, content: bytes) -> bytes | None:
        found = self.store.manifest(content)
        return found.to_bytes() if found else None

    async def give_manifest(self, content: bytes, data: bytes) -> None:
        raise AssertionError("small manifests travel beside their ADDs")


class Rig:
    """A spread over one link; all its times are short."""

    def __init__(self, **options: Any) -> None:
        self.here, self.there = MemoryStore(1), MemoryStore(2)
        self.link = Link(self.there)
        self.faults: list[BaseException] = []
        said = {"period": 0.05, "source": random.Random(1), "on_fault": self.faults.append, **options}
        self.spread = Spread(Holding(self.here), call, **said)
        self.contact = Contact(self.link, "there", KEY)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


def run(work: Callable[[Rig], Any], **options: Any) -> None:
    async def main() -> None:
        rig = Rig(**options)
        try:
            await work(rig)
        finally:
            await rig.spread.close()

    asyncio.run(main())


def test_news_of_either_side_come_to_the_other() -> None:
    async def work(rig: Rig) -> None:
        rig.here.add(b"one")
        rig.there.add(b"two")
        rig.spread.meet(rig.contact)
        await rig.until(lambda: rig.here.opset.root == rig.there.opset.root)
        rig.there.add(b"three")
        await rig.until(lambda: rig.here.opset.root == rig.there.opset.root)
        assert rig.contact.received == 2
        assert rig.contact.last_session is not None

    run(work)


def test_what_is_written_here_is_pushed_at_once() -> None:
    async def work(rig: Rig) -> None:
        rig.spread.meet(rig.contact)
        await rig.until(lambda: rig.contact.last_session is not None)
        op = rig.here.add(b"new")
        await rig.spread.look()
        await rig.until(lambda: op.id in rig.there.opset)

    run(work, period=3600.0)


def test_a_peer_that_fails_is_tried_again_ever_later_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "REDIAL_SECONDS", 0.001)

    async def work(rig: Rig) -> None:
        pauses = [rig.spread._pause(failures) for failures in range(1, 80)]
        for number, pause in enumerate(pauses):
            most = min(0.001 * 2**number, spread.REDIAL_SECONDS_MAX)
            assert most / 2 <= pause <= most
        rig.link.fault = PeerError("gone")
        rig.spread.meet(rig.contact)
        await rig.until(lambda: rig.contact.failures >= 4)
        assert rig.contact.reason == "gone"
        assert rig.contact.banned_until is None
        rig.link.fault = None
        await rig.until(lambda: rig.contact.last_session is not None)
        await rig.until(lambda: (rig.contact.failures, rig.contact.reason) == (0, None))

    run(work)


@pytest.mark.parametrize("fault", [FalsePeerError("it lies"), PoolMismatchError("another pool")])
def test_a_peer_that_no_honest_one_is_like_is_left_alone_and_then_tried_again(
    fault: PeerError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "BAN_SECONDS", 0.5)

    async def work(rig: Rig) -> None:
        rig.link.fault = fault
        rig.spread.meet(rig.contact)
        await rig.until(lambda: rig.contact.banned_until is not None)
        assert rig.contact.reason == str(fault)
        count = len(rig.link.asked)
        rig.spread.tell([rig.here.add(b"news")])
        rig.spread.say()
        await asyncio.sleep(0.1)
        assert len(rig.link.asked) == count
        assert not rig.contact.mail
        rig.link.fault = None
        await rig.until(lambda: rig.contact.banned_until is None)
        assert rig.here.opset.root == rig.there.opset.root

    run(work)


@pytest.mark.parametrize("end", [None, PeerError("gone")])
def test_a_ban_outlasts_the_session_during_which_it_came(end: PeerError | None) -> None:
    async def work(rig: Rig) -> None:
        rig.link.gate.clear()
        rig.spread.meet(rig.contact)
        await rig.until(lambda: bool(rig.link.asked))
        rig.spread.ban(rig.contact, "wrong bytes")
        until = rig.contact.banned_until
        rig.link.fault = end
        rig.link.gate.set()
        await asyncio.sleep(0.3)
        assert (rig.contact.banned_until, rig.contact.reason) == (until, "wrong bytes")
        assert len(rig.link.asked) == 1

    run(work)


def test_a_fault_of_our_own_disk_is_no_fault_of_the_peer() -> None:
    async def work(rig: Rig) -> None:
        rig.link.fault = StorageError("full")
        rig.spread.meet(rig.contact)
        await rig.until(lambda: rig.contact.reason == "full")
        assert (rig.contact.failures, rig.contact.banned_until) == (0, None)
        await asyncio.sleep(0.1)
        assert len(rig.link.asked) == 1

    run(work)


def test_any_other_fault_is_handed_on_and_not_swallowed() -> None:
    async def work(rig: Rig) -> None:
        rig.link.fault = ZeroDivisionError("a bug")
        rig.spread.meet(rig.contact)
        await rig.until(lambda: bool(rig.faults))
        assert rig.faults == [rig.link.fault]

    run(work)


def test_mail_that_grows_too_long_becomes_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "MAIL_MAX", 10)

    async def work(rig: Rig) -> None:
        rig.spread.meet(rig.contact)
        await rig.until(lambda: rig.contact.last_session is not None)
        rig.link.asked.clear()
        rig.spread.tell([rig.here.add(b"%d" % number) for number in range(12)])
        assert not rig.contact.mail
        await rig.until(lambda: rig.here.opset.root == rig.there.opset.root)
        assert rig.link.asked[0].heads is not None, "a session, no push"

    run(work, period=3600.0)


def test_news_go_to_some_of_many_and_not_back_where_they_came_from() -> None:
    async def main() -> None:
        here = Spread(Holding(MemoryStore(1)), call, source=random.Random(1))
        contacts = [Contact(Link(MemoryStore(2)), f"{number}") for number in range(40)]
        here.contacts = {one.name: one for one in contacts}
        here.tell([MemoryStore(3).add(b"x")], but="7")
        assert sum(bool(one.mail) for one in contacts) == spread.PUSHED_TO_ALL_MAX
        assert not contacts[7].mail

    asyncio.run(main())


def test_who_brings_blobs_that_are_lacking_there_is_asked_to() -> None:
    fed = []

    async def feed(contact: Contact) -> None:
        fed.append(contact)

    async def work(rig: Rig) -> None:
        answered = rig.link.exchange

        async def starving(message: bytes) -> bytes:
            found = Answer.from_bytes(await answered(message))
            return Answer(found.heads, found.ranges, found.ops, starving=True).to_bytes()

        rig.link.exchange = starving  # type: ignore[method-assign]
        rig.spread.meet(rig.contact)
        await rig.until(lambda: bool(fed))
        assert fed[0] is rig.contact

    run(work, on_starving=feed)


# ---- deadlines and addresses


def test_deadlines_follow_what_was_measured_within_bounds() -> None:
    trips = RoundTrips()
    assert trips.deadline == FIRST_SECONDS
    for _ in range(100):
        trips.measured(0.001)
    assert trips.deadline == SECONDS_MIN
    for _ in range(200):
        trips.measured(1.0)
    assert 8 <= trips.deadline < 12
    trips.measured(1000.0)
    assert trips.deadline == SECONDS_MAX


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (f"https://host#{KEY.hex()}", "https://host:7070"),
        (f"https://host:1/#{KEY.hex().upper()}", "https://host:1"),
        (f"https://[::1]:5#{KEY.hex()}", "https://[::1]:5"),
        ("http://127.0.0.1:5", "http://127.0.0.1:5"),
        ("http://localhost", "http://localhost:7070"),
        ("http://[::1]:5", "http://[::1]:5"),
    ],
)
def test_addresses_of_peers(text: str, url: str) -> None:
    where = address.peer(text)
    assert where.url == url
    assert where.key == (None if url.startswith("http:") else KEY)


@pytest.mark.parametrize(
    "text",
    [
        "https://host:7070",
        "https://host#12",
        f"https://host#{'0' * 64}",
        f"https://host#{KEY.hex()}00",
        f"https://host/path#{KEY.hex()}",
        f"https://host?x#{KEY.hex()}",
        f"https://:70#{KEY.hex()}",
        f"https://host:x#{KEY.hex()}",
        f"https://host:70000#{KEY.hex()}",
        f"https://[::1#{KEY.hex()}",
        "ftp://host",
        "host:7070",
        "",
        "http://192.0.2.1:5",
        "http://host:5",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        address.peer(text)


def test_plain_http_beyond_loopback_must_be_allowed() -> None:
    assert address.peer("http://192.0.2.1:5", insecure=True) == ("http://192.0.2.1:5", None)
    assert address.listening("http://0.0.0.0:0", insecure=True) == ("http", "0.0.0.0", 0)
    for text in ("http://0.0.0.0:0", "http://host:1", "https://h:1/x", "h:99999", ":5"):
        with pytest.raises(UsageError):
            address.listening(text)


def test_an_invitation_comes_back_from_its_text() -> None:
    invitation = address.Invitation(address.Where("https://[::1]:5", KEY), bytes(range(16)))
    assert address.invitation(invitation.text) == invitation
    assert address.invitation("https://host:5") is None
