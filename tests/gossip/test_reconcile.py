"""Reconciliation finds exactly what two sets of operations lack of each other, in few rounds and bytes."""

from __future__ import annotations

import random

import pytest

from crdtmerge.errors import InputError
from crdtmerge.gossip.index import Index
from crdtmerge.gossip.reconcile import MESSAGE_BYTES_MAX, Session, answer, pack, unpack

Orders = list[tuple[int, bytes]]


def reconciled(ours: Index, theirs: Index) -> tuple[Session, int, int]:
    """A finished session, with its rounds and bytes; every message travels as bytes."""
    session = Session(ours)
    message, rounds, nbytes = session.opening(), 0, 0
    while message:
        asked = pack(message)
        answered = pack(answer(theirs, unpack(asked)))
        assert max(len(asked), len(answered)) <= MESSAGE_BYTES_MAX
        message, rounds, nbytes = session.take(unpack(answered)), rounds + 1, nbytes + len(asked) + len(answered)
    return session, rounds, nbytes


def operations(count: int, seed: int) -> Orders:
    source = random.Random(seed)
    return [(1 + number // 4, source.randbytes(32)) for number in range(count)]


@pytest.mark.parametrize("seed", range(200))
def test_a_session_finds_exactly_the_difference(seed: int) -> None:
    source = random.Random(seed)
    pool = operations(source.choice([0, 1, 5, 40, 300, 2000]), seed)
    ours = [one for one in pool if source.random() < source.choice([0.5, 0.9, 1])]
    theirs = [one for one in pool if source.random() < 0.9]
    session, _, _ = reconciled(Index(ours), Index(theirs))
    mine, other = ({identity for _, identity in orders} for orders in (ours, theirs))
    assert set(session.wanted()) == other - mine, f"seed {seed}"
    assert set(session.offered()) == mine - other, f"seed {seed}"


def test_equal_sets_end_at_once_and_recent_differences_cost_little() -> None:
    pool = operations(10_010, 1)
    _, rounds, nbytes = reconciled(Index(pool), Index(pool))
    assert (rounds, nbytes < 600) == (1, True)
    session, rounds, nbytes = reconciled(Index(pool[:-10] + pool[-10::2]), Index(pool[:-10] + pool[-9::2]))
    assert (len(session.wanted()), len(session.offered())) == (5, 5)
    assert rounds <= 3
    assert nbytes <= 2048


def test_a_difference_that_fills_many_messages_is_found_in_pieces() -> None:
    pool = operations(60_000, 2)
    ours, theirs = pool[::2], pool[1::2]
    session, _, _ = reconciled(Index(ours), Index(theirs))
    assert set(session.wanted()) == {identity for _, identity in theirs}


def test_an_index_that_grew_is_the_one_that_was_made_at_once() -> None:
    pool = operations(300, 3)
    grown = Index()
    for height, identity in random.Random(4).sample(pool, len(pool)) + pool[:5]:
        grown.add(height, identity)
    whole = Index(pool)
    assert [grown.order(at) for at in range(len(grown))] == [whole.order(at) for at in range(len(whole))]
    assert grown.fingerprint(7, 200) == whole.fingerprint(7, 200)


@pytest.mark.parametrize("seed", range(300))
def test_any_bytes_are_a_message_or_refused(seed: int) -> None:
    source = random.Random(seed)
    message = bytearray(pack(Session(Index(operations(100, 5))).opening()))
    for _ in range(source.randrange(1, 5)):
        message[source.randrange(len(message))] = source.randrange(256)
    try:
        answer(Index(operations(100, 6)), unpack(bytes(message[: source.choice([None, 10])])))
    except InputError:
        return
