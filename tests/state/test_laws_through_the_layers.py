"""Through the two layers every registered strategy is commutative, associative and idempotent, to the bit.

    (a | b) | c == a | (b | c)        a | b == b | a        a | a == a        resolve(equal states) = equal bytes

for three states in every order and grouping; rows of ``tests.strategies.models`` say the parameters. No strategy of the
field keeps these laws by itself but magmax (``tests.strategies.test_laws``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch

from crdtmerge.recipe import Recipe
from crdtmerge.state import MergeState
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from tests.scenarios.worlds import output
from tests.strategies.models import DEEP, EACH, ROWS, SHAPES, Row, family

Model = Mapping[str, torch.Tensor]


def recipe_of(row: Row, **options: object) -> Recipe:
    """The recipe of a row."""
    return Recipe.of(row.strategy, row.params, **options)


def uses_base(row: Row) -> bool:
    """Whether the strategy takes a base, with the row's parameters."""
    strategy = registry.get(row.strategy)
    return strategy.needs(Filled(row.strategy, strategy.Params, row.params).general).base != "unused"


def three(row: Row, dtype: str = "F32") -> tuple[MergeState, MergeState, MergeState]:
    """Three states of one pool that overlap, with removals: of what was seen, of what others add again."""
    models, origin = family(5, dtype, shapes=SHAPES, number=300)
    empty = MergeState(recipe_of(row), base=origin if uses_base(row) else None)
    added = [empty.add(one, weight=weight) for one, weight in zip(models, (*row.weights, "2"), strict=True)]
    ids = [state.visible[0].id for state in added]
    a = added[0] | added[1] | added[4]
    b = (added[1] | added[2]).remove(ids[1])
    c = (added[3] | added[4]).remove(ids[4]).add(models[2])
    return a, b, c


def same(states: list[MergeState]) -> MergeState:
    """The one value that all of these are: equal in every respect that can be seen."""
    assert len({*states}) == 1
    assert all(one == states[0] for one in states)
    assert len({(one.root, one.state_root, one.heads) for one in states}) == 1
    assert len({repr(one.visible) for one in states}) == 1
    assert len({output(one.resolve()) for one in states}) == 1
    return states[0]


@EACH
def test_every_order_and_grouping_of_three_joins_is_one_state_with_one_output(row: Row) -> None:
    found = []
    for x, y, z in itertools.permutations(three(row)):
        found += [(x | y) | z, x | (y | z)]
    joined = same(found)
    assert len(joined) == 3, "of five contents, two were removed by someone who had seen their one ADD"
    merged = joined.resolve()
    assert {*merged} == {*SHAPES}
    assert merged.receipt.root == joined.root
    assert len({one.to_bytes() for one in found}) == 1


@EACH
def test_a_join_with_what_is_known_already_changes_nothing(row: Row) -> None:
    a, b, c = three(row)
    same([a, a | a, a | a | a, a | MergeState.from_bytes(a.to_bytes())])
    joined = a | b | c
    same([joined, joined | joined, joined | a, b | joined, (a | b) | (b | c), (a | c) | joined | (c | b)])


@EACH
def test_two_states_joined_either_way_round_are_one(row: Row) -> None:
    for x, y in itertools.combinations(three(row), 2):
        same([x | y, y | x, x.join(y), x | y.delta_since(x.heads), y | x.delta_since(y.heads)])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
@pytest.mark.parametrize("name", DEEP)
def test_the_laws_hold_in_every_dtype(name: str, dtype: str) -> None:
    row = next(row for row in ROWS if row.strategy == name)
    a, b, c = three(row, dtype)
    joined = same([(a | b) | c, a | (b | c), c | b | a, a | a | b | c])
    found = joined.resolve()
    assert {str(found[tensor].dtype) for tensor in found} == {str(family(1, dtype)[1]["one"].dtype)}
