"""A state in memory as a peer's pool: replacing one's own alone, hearing of others, what came from them."""

from __future__ import annotations

import pytest

from crdtmerge.errors import MismatchError, UsageError
from crdtmerge.train.facts import Facts
from crdtmerge.train.pool import content_of, history, own, seen
from tests.train.models import constant, pools


def test_nothing_replaces_what_another_added() -> None:
    first, second = pools(2)
    first.add(constant(1.0), note=Facts().encode())
    second.hear(first.state)
    (content,) = own(first)
    assert content == content_of(constant(1.0))
    with pytest.raises(UsageError, match="not added by this key"):
        second.add(constant(2.0), replaces=(content,))
    with pytest.raises(UsageError, match="no content id"):
        first.state.add(constant(2.0), replaces=["00"])


def test_what_was_replaced_is_let_go_and_remembered_as_taking_part() -> None:
    first, second = pools(2)
    for number in (0, 2, 7):
        first.add(constant(float(number)), note=Facts(number).encode(), replaces=own(first))
    second.hear(first.state)
    assert history(second) == {first.author: {0, 2, 7}}
    assert [one.facts.round for one in seen(second).values()] == [7]
    assert not second.is_ready(content_of(constant(0.0)))
    assert second.received == 24
    second.hear(first.state)
    assert second.received == 24


def test_of_two_that_stand_the_later_round_counts() -> None:
    (pool,) = pools(1)
    for number in (5, 3):
        pool.add(constant(float(number)), note=Facts(number).encode())
    assert len(own(pool)) == 2
    assert seen(pool)[pool.author].facts.round == 5
    pool.add(constant(9.0), note=Facts(6).encode(), replaces=own(pool))
    assert len(own(pool)) == len(pool.state.visible) == 1


def test_what_is_retracted_has_no_part() -> None:
    (pool,) = pools(1)
    pool.add(constant(1.0), note=Facts().encode())
    pool.state = pool.state.retract(own(pool)[0])
    assert not seen(pool)


def test_another_pool_is_refused() -> None:
    (first,), (second,) = pools(1), pools(1, "linear")
    with pytest.raises(MismatchError):
        first.hear(second.state)
