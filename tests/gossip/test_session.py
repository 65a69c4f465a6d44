"""Two replicas that talk end with the union of what they had, whatever it was, in few rounds."""

from __future__ import annotations

import random

import pytest

from crdtmerge.errors import FalsePeerError
from crdtmerge.gossip import reconcile, session
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import Answer
from crdtmerge.replica.op import Remove, Retract
from tests.gossip.memory import MemoryStore, converse


def grown(seed: int, steps: int, count: int = 3) -> list[MemoryStore]:
    """Replicas that wrote, removed, retracted and met at random."""
    source = random.Random(seed)
    stores = [MemoryStore(seed * 10 + number) for number in range(count)]
    for step in range(steps):
        store = source.choice(stores)
        live = [
            op for content in store.opset.held() for op in store.opset.live(content) if op.author == store.key.public
        ]
        match source.random():
            case x if x < 0.15 and live:
                store.write(Remove((source.choice(live).id,)))
            case x if x < 0.2 and live:
                store.write(Retract(source.choice(live).payload.content, "why"))  # type: ignore[union-attr]
            case x if x < 0.35:
                other = source.choice(stores)
                if other is not store:
                    converse(Holding(store), Holding(other))
            case _:
                store.add(f"{source.randrange(steps)}".encode(), note=f"{step}")
    return stores


@pytest.mark.parametrize("seed", range(60))
def test_a_session_ends_with_the_union_on_both_sides(seed: int) -> None:
    stores = grown(seed, steps=random.Random(seed).choice([0, 3, 20, 80]))
    one, other = stores[0], stores[1]
    union = {op.id for store in (one, other) for op in store.opset.ops()}
    summary = converse(Holding(one), Holding(other))
    assert {op.id for op in one.opset.ops()} == {op.id for op in other.opset.ops()} == union, f"seed {seed}"
    assert one.opset.state_root == other.opset.state_root
    assert summary.rounds <= 4
    again = converse(Holding(one), Holding(other))
    assert (again.equal, again.rounds, again.sent, again.received) == (True, 1, 0, [])


def test_one_who_is_behind_is_brought_up_in_one_round() -> None:
    one, other = MemoryStore(1), MemoryStore(2)
    one.add(b"first")
    converse(Holding(other), Holding(one))
    for number in range(10):
        one.add(b"%d" % number)
    summary = converse(Holding(other), Holding(one))
    assert (summary.rounds, len(summary.received)) == (1, 10)
    assert other.opset.root == one.opset.root


def test_large_manifests_travel_apart_both_ways() -> None:
    one, other = MemoryStore(1), MemoryStore(2)
    one.add(b"one", tensors=3000)
    other.add(b"other", tensors=3000)
    converse(Holding(one), Holding(other))
    assert one.opset.root == other.opset.root
    assert len(one.manifests) == len(other.manifests) == 2


def test_more_than_a_message_holds_takes_more_messages() -> None:
    one, other = MemoryStore(1), MemoryStore(2)
    for number in range(3000):
        one.add(b"%d" % number, note="n" * 200)
    for number in range(2000):
        other.add(b"other %d" % number, note="n" * 200)
    summary = converse(Holding(other), Holding(one))
    assert (len(summary.received), summary.sent) == (3000, 2000)
    assert one.opset.state_root == other.opset.state_root
    fresh = MemoryStore(3)
    assert len(converse(Holding(fresh), Holding(one)).received) == 5000
    assert fresh.opset.state_root == one.opset.state_root


def test_what_builds_on_a_large_manifest_travels_with_it() -> None:
    one, other = MemoryStore(1), MemoryStore(2)
    for number in range(3):
        added = one.add(b"%d" % number, tensors=3000)
        one.write(Remove((added.id,)))
    summary = converse(Holding(one), Holding(other))
    assert one.opset.state_root == other.opset.state_root
    assert summary.sent == 6


def test_a_manifest_that_came_beside_an_operation_is_kept_while_that_waits() -> None:
    one, other = MemoryStore(1), MemoryStore(2)
    one.add(b"large", tensors=3000)
    one.add(b"small")
    converse(Holding(other), Holding(one))
    assert other.opset.root == one.opset.root


def test_news_of_another_process_are_told_though_a_session_met_them_first() -> None:
    one, other = MemoryStore(1), MemoryStore(2)
    holding = Holding(one)
    written = one.add(b"by another process")
    other.add(b"so that ranges are compared")
    converse(Holding(other), holding)
    assert holding.refresh() == [written]
    assert holding.refresh() == []


def test_a_session_that_does_not_end_is_no_honest_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ROUNDS_MAX", 100)
    opener, source = session.Opener(Holding(MemoryStore(1))), random.Random(1)
    for _ in range(session.ROUNDS_MAX):
        assert opener.request() is not None
        opener.summary.rounds += 1
        opener.take(Answer(ranges=reconcile.pack([reconcile.Range(None, reconcile.PRINT, source.randbytes(32))])))
    with pytest.raises(FalsePeerError, match="does not end"):
        opener.request()


def test_what_a_liar_says_it_has_is_remembered_within_bounds() -> None:
    opener, source = session.Opener(Holding(MemoryStore(1))), random.Random(1)
    while opener.request() is not None and opener.summary.rounds < 40:
        opener.summary.rounds += 1
        said = [
            reconcile.Range((height, b""), reconcile.IDS, [source.randbytes(32) for _ in range(190)])
            for height in range(1, 31)
        ]
        said.append(reconcile.Range(None, reconcile.PRINT, source.randbytes(32)))
        opener.take(Answer(ranges=reconcile.pack(said)))
    assert len(opener._session.wanted()) <= 100_000


def test_more_than_is_remembered_of_a_peer_is_fetched_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WANTED_MAX", 500)
    one, other = MemoryStore(1), MemoryStore(2)
    for number in range(3000):
        one.add(b"%d" % number)
    for number in range(700):
        other.add(b"other %d" % number)
    assert len(converse(Holding(other), Holding(one)).received) == 3000
    assert one.opset.state_root == other.opset.state_root
