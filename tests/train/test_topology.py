"""Graphs and mixing matrices: exactly doubly stochastic in decimals, powers too; what is known of their eigenvalues."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtmerge.errors import UsageError
from crdtmerge.train.topology import DIGITS, Graph, Mixing, decimals, erdos_renyi, explicit, full, ring

GRAPHS = {
    "one": full(1),
    "pair": ring(2),
    "ring 5": ring(5),
    "ring 10": ring(10),
    "full 7": full(7),
    "er 9": erdos_renyi(9, 0.5, b"seed"),
    "star": explicit(5, [(0, i) for i in range(1, 5)]),
    "lonely": explicit(3, [(0, 1)]),
}


def check_doubly_stochastic(mixing: Mixing) -> None:
    for i, row in enumerate(mixing.rows):
        assert sum(row) == 1
        assert min(row) >= 0
        assert all((weight * 10**DIGITS).denominator == 1 for weight in row), "a decimal"
        assert all(row[j] == mixing.rows[j][i] for j in range(mixing.n))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_rows_and_columns_sum_to_exactly_one(graph: Graph) -> None:
    mixing = graph.metropolis()
    check_doubly_stochastic(mixing)
    for q in (2, 3, 8):
        check_doubly_stochastic(mixing.power(q))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_off_the_diagonal_it_is_metropolis_to_the_last_decimal(graph: Graph) -> None:
    mixing = graph.metropolis()
    for i in range(graph.n):
        for j in set(range(graph.n)) - {i}:
            share = Fraction(1, 1 + max(len(graph.neighbours(i)), len(graph.neighbours(j))))
            wanted = share if j in graph.neighbours(i) else 0
            assert 0 <= wanted - mixing.rows[i][j] < Fraction(1, 10**DIGITS)


def test_what_is_left_of_a_disagreement() -> None:
    assert round(ring(5).metropolis().lambda_2, 2) == 0.54
    assert round(ring(10).metropolis().lambda_2, 2) == 0.87
    assert full(5).metropolis().lambda_2 == pytest.approx(0, abs=1e-9)
    assert explicit(3, [(0, 1)]).metropolis().lambda_2 == pytest.approx(1)
    assert ring(5).metropolis().power(4).lambda_2 == pytest.approx(ring(5).metropolis().lambda_2 ** 4)


def test_a_drawn_graph_is_that_of_its_seed_and_connected() -> None:
    graphs = [erdos_renyi(8, "0.3", bytes([seed])) for seed in range(20)]
    assert all(graph.connected for graph in graphs)
    assert graphs == [erdos_renyi(8, "0.3", bytes([seed])) for seed in range(20)]
    assert len({graph.edges for graph in graphs}) > 10
    assert sorted(graphs[0].edges)[:4] == [(0, 1), (0, 2), (0, 3), (0, 5)]


def test_the_share_of_edges_is_that_asked_for() -> None:
    drawn = sum(len(erdos_renyi(20, 0.5, bytes([seed])).edges) for seed in range(20))
    assert abs(drawn / (20 * 190) - 0.5) < 0.03


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: explicit(3, [(0, 3)]),
        lambda: explicit(3, [(1, 1)]),
        lambda: explicit(0, []),
        lambda: explicit(3, [(0, 1, 2)]),
        lambda: erdos_renyi(5, 0, b""),
        lambda: erdos_renyi(40, "0.001", b""),
        lambda: ring(3).metropolis().power(0),
        lambda: decimals([Fraction(0)]),
        lambda: decimals([]),
        lambda: decimals([Fraction(2), Fraction(-1)]),
    ],
)
def test_what_is_no_graph_is_refused(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(UsageError):
        wrong()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.fractions(min_value=0, max_value=1000), min_size=1, max_size=20).filter(any))
def test_shares_as_decimals_sum_to_exactly_one(shares: list[Fraction]) -> None:
    found = decimals(shares)
    whole = sum(shares)
    assert sum(map(Fraction, found)) == 1
    assert all(isinstance(one, Decimal) for one in found)
    for share, one in zip(shares, found, strict=True):
        assert abs(share / whole - Fraction(one)) <= Fraction(len(shares), 10**DIGITS)
