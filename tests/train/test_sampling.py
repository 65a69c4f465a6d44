"""Whose turn it is: an order that is equal at equal roots, another at others, and gives nobody a better place."""

from __future__ import annotations

from collections import Counter

import pytest

from crdtmerge.canonical import digest
from crdtmerge.errors import UsageError
from crdtmerge.train.sampling import order, sample

PEERS = [bytes([i]) * 32 for i in range(8)]


def test_an_order_is_a_permutation_and_that_of_its_root_and_round() -> None:
    root = digest("test", 1)
    found = order(root, PEERS, 3)
    assert sorted(found) == PEERS
    assert found == order(root, reversed(PEERS), 3)
    assert found != order(root, PEERS, 4)
    assert found != order(digest("test", 2), PEERS, 3)
    assert sample(root, PEERS, 3, 3) == found[:3]
    assert sample(root, PEERS, 3, 99) == found


def test_who_is_absent_moves_nobody_else() -> None:
    root = digest("test", 1)
    found = order(root, PEERS, 0)
    assert order(root, PEERS[1:], 0) == [peer for peer in found if peer != PEERS[0]]


def test_all_are_sampled_alike() -> None:
    counts = Counter(peer for i in range(2000) for peer in sample(digest("test", i), PEERS, 0, 2))
    assert all(abs(counts[peer] - 500) < 100 for peer in PEERS)


def test_nobody_is_no_sample() -> None:
    with pytest.raises(UsageError):
        sample(bytes(32), PEERS, 0, 0)
