"""Who mixes with whom: graphs of peers, and mixing matrices of exact decimals that are doubly stochastic.

Peers are numbered 0..n-1; an edge is a pair (i, j) with i < j.

    W_ij = 1 / (1 + max(d_i, d_j))  for an edge,   W_ii = 1 - sum_j W_ij         (Metropolis-Hastings)

Entries beside the diagonal are cut to 18 decimals, alike in W_ij and W_ji, and the diagonal takes what is left: so the
decimals themselves are symmetric, and every row and column sums to exactly one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cached_property
from itertools import combinations

import numpy as np

from crdtmerge.errors import UsageError
from crdtmerge.numerics.philox import keep_below, stream, words

Edge = tuple[int, int]

DIGITS = 18
"""Decimals of a weight: finer than a float64's resolution at one."""

ATTEMPTS_MAX = 200


@dataclass(frozen=True)
class Graph:
    """Peers 0..n-1 and the edges between them, undirected, without loops."""

    n: int
    edges: frozenset[Edge]

    def neighbours(self, i: int) -> tuple[int, ...]:
        """Those that a peer shares an edge with, in order."""
        return tuple(j for j in range(self.n) if (min(i, j), max(i, j)) in self.edges)

    @property
    def connected(self) -> bool:
        """Whether there is a path between any two."""
        reached, new = {0}, [0]
        while new:
            found = {j for i in new for j in self.neighbours(i)} - reached
            reached, new = reached | found, sorted(found)
        return len(reached) == self.n

    def metropolis(self) -> Mixing:
        """The Metropolis-Hastings matrix."""
        degrees = [len(self.neighbours(i)) for i in range(self.n)]
        shares = {(i, j): Fraction(1, 1 + max(degrees[i], degrees[j])) for i, j in self.edges}
        return _completed(self.n, shares)


def explicit(n: int, edges: Iterable[Sequence[int]]) -> Graph:
    """A graph of given edges. Raises UsageError for one that is none."""
    found = set()
    for edge in edges:
        i, j = sorted(edge) if len(edge) == 2 else (0, 0)
        if not 0 <= i < j < n:
            raise UsageError(f"edge {edge!r}: two different peers from 0 to {n - 1} are needed.")
        found.add((i, j))
    if n < 1:
        raise UsageError(f"n = {n}: at least one peer is needed.")
    return Graph(n, frozenset(found))


def ring(n: int) -> Graph:
    """Each peer has the one before and the one after.

    >>> ring(4).neighbours(0)
    (1, 3)
    """
    return explicit(n, ((i, (i + 1) % n) for i in range(n) if n > 1))


def full(n: int) -> Graph:
    """Everyone has everyone."""
    return explicit(n, combinations(range(n), 2))


def erdos_renyi(n: int, p: object, seed: bytes) -> Graph:
    """Each edge with probability p, drawn again until the graph is connected: the same for a seed on every machine.

    Raises UsageError for p outside (0, 1], or so small that no draw is connected.

    Source: Erdos and Renyi, "On random graphs", 1959.
    """
    share = Decimal(str(p))
    if not 0 < share <= 1:
        raise UsageError(f"p = {p!r}: must be above 0 and at most 1.")
    pairs = list(combinations(range(n), 2))
    for attempt in range(ATTEMPTS_MAX):
        drawn = words(stream(seed, "topology", b"", str(attempt)), 0, len(pairs)).tolist()
        graph = explicit(n, (pair for pair, word in zip(pairs, drawn, strict=True) if word < keep_below(share)))
        if graph.connected:
            return graph
    raise UsageError(f"p = {p!r}: {ATTEMPTS_MAX} graphs of {n} peers were drawn and none is connected. Choose more.")


@dataclass(frozen=True)
class Mixing:
    """A symmetric doubly stochastic matrix of exact decimals: x_i <- sum_j W_ij x_j.

    >>> ring(3).metropolis().rows[0]
    (Fraction(166666666666666667, 500000000000000000), Fraction(333333333333333333, 1000000000000000000), \
Fraction(333333333333333333, 1000000000000000000))
    """

    rows: tuple[tuple[Fraction, ...], ...]

    @property
    def n(self) -> int:
        """How many peers."""
        return len(self.rows)

    def power(self, q: int) -> Mixing:
        """W^Q, cut to the same decimals: Q sweeps of gossip in one.

        Source: Li et al., "DFedSAM", ICML 2023, arXiv:2302.04083, section 4 (MGS).
        """
        if q < 1:
            raise UsageError(f"q = {q}: at least one sweep is needed.")
        found = self
        for _ in range(q - 1):
            columns = list(zip(*self.rows, strict=True))
            pairs = combinations(range(self.n), 2)
            found = _completed(self.n, {(i, j): _dot(found.rows[i], columns[j]) for i, j in pairs})
        return found

    @cached_property
    def lambda_2(self) -> float:
        """The second largest size of an eigenvalue: what is left of a disagreement after one sweep, at most.

        >>> round(ring(5).metropolis().lambda_2, 2), round(ring(10).metropolis().lambda_2, 2)
        (0.54, 0.87)
        """
        if self.n == 1:
            return 0.0
        sizes = np.abs(np.linalg.eigvalsh(np.array([[float(w) for w in row] for row in self.rows])))
        return float(np.sort(sizes)[-2])


def _dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def _completed(n: int, shares: dict[Edge, Fraction]) -> Mixing:
    """The symmetric matrix with these entries, cut, and a diagonal that makes rows sum to one."""
    rows = [[Fraction(0)] * n for _ in range(n)]
    for (i, j), share in shares.items():
        rows[i][j] = rows[j][i] = Fraction(share.numerator * 10**DIGITS // share.denominator, 10**DIGITS)
    for i, row in enumerate(rows):
        row[i] = 1 - sum(row, Fraction(0))
    return Mixing(tuple(map(tuple, rows)))


def decimals(shares: Sequence[Fraction]) -> list[Decimal]:
    """Shares of a whole, divided by their sum, as decimals of 18 digits that sum to exactly one.

    Each is cut; the largest (of equal ones the first) takes what is left. Raises UsageError where all are zero.

    >>> decimals([Fraction(1), Fraction(3)])
    [Decimal('0.25'), Decimal('0.75')]
    """
    whole = sum(shares, Fraction(0))
    if not shares or whole <= 0 or min(shares) < 0:
        raise UsageError("the weights of a merge must be at least 0, and some of them above.")
    parts = [share / whole for share in shares]
    units = [part.numerator * 10**DIGITS // part.denominator for part in parts]
    units[parts.index(max(parts))] += 10**DIGITS - sum(units)
    with localcontext(prec=2 * DIGITS):
        return [Decimal(unit).scaleb(-DIGITS).normalize() for unit in units]
