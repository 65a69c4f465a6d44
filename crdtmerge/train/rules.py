"""Whose contributions a peer mixes and in what shares: a rule for each, of those who are there.

A rule takes the peer's own key, the contributions that are there (its own among them) and its round, and gives shares
by key, of which only the proportions count. Who is not there has none: no rule waits for anyone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from crdtmerge.errors import UsageError
from crdtmerge.train.pool import Contribution
from crdtmerge.train.sampling import sample
from crdtmerge.train.topology import Mixing

Rule = Callable[[bytes, Mapping[bytes, Contribution], int], Mapping[bytes, Fraction]]


def everyone(me: bytes, there: Mapping[bytes, Contribution], number: int) -> Mapping[bytes, Fraction]:
    """Equal shares of all that are there."""
    return {author: Fraction(1) for author in there}


def oneself(me: bytes, there: Mapping[bytes, Contribution], number: int) -> Mapping[bytes, Fraction]:
    """No part of anyone else: local training only."""
    return {me: Fraction(1)}


def neighbours(mixing: Mixing, peers: Sequence[bytes]) -> Rule:
    """Row i of a mixing matrix for peer i; the share of one who is not there stays with oneself.

    So the matrix stays doubly stochastic as long as absence is mutual. Raises UsageError for another number of keys.
    """
    if len(set(peers)) != mixing.n:
        raise UsageError(f"{len(set(peers))} keys for a mixing matrix of {mixing.n} peers: give each peer's, once.")

    def rule(me: bytes, there: Mapping[bytes, Contribution], number: int) -> Mapping[bytes, Fraction]:
        row = dict(zip(peers, mixing.rows[peers.index(me)], strict=True))
        others = {author: share for author, share in row.items() if author != me and author in there and share}
        return others | {me: 1 - sum(others.values(), Fraction(0))}

    return rule


def sampled(root: bytes, size: int) -> Rule:
    """Equal shares of those of the round's sample that are there; of oneself alone where none is.

    Who is absent is passed over: the sample is the first ``size`` of the order that are there (MoDeST).
    """

    def rule(me: bytes, there: Mapping[bytes, Contribution], number: int) -> Mapping[bytes, Fraction]:
        return {author: Fraction(1) for author in sample(root, there, number, size)} or {me: Fraction(1)}

    return rule
