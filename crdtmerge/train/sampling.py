"""Whose turn it is: an order of peers for each round that nobody can choose and everyone computes alike.

    order = peers sorted by H("turn", [root, peer, round])

The root is a Merkle root that all agree on, of a set in which the peers already are. So no key can be ground for a
place: whoever makes a new key changes nothing, and whoever changes the set changes everyone's place. (Only who
contributes last before the root is fixed can try several; use the root of a round that is over.)

Source: De Vos et al., "Decentralized Learning Made Practical with Client Sampling" (MoDeST), arXiv:2302.13837, which
sorts by H(peer, round) and so lets keys be chosen.
"""

from __future__ import annotations

from collections.abc import Iterable

from crdtmerge.canonical import digest
from crdtmerge.errors import UsageError


def order(root: bytes, peers: Iterable[bytes], number: int) -> list[bytes]:
    """All peers in the order of a round.

    >>> order(bytes(32), [b"a", b"b", b"c"], 0) == order(bytes(32), [b"c", b"b", b"a", b"a"], 0)
    True
    """
    return sorted(set(peers), key=lambda peer: digest("turn", [root, peer, number]))


def sample(root: bytes, peers: Iterable[bytes], number: int, size: int) -> list[bytes]:
    """The first of a round's order; all, where there are no more. Raises UsageError for a size below one."""
    if size < 1:
        raise UsageError(f"size = {size}: a sample of at least one peer is needed.")
    return order(root, peers, number)[:size]
