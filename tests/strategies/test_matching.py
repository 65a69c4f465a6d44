"""Matching: hidden permutations are found again, what networks compute stays, and no single step could gain more."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from crdtmerge.numerics.assignment import best_assignment
from crdtmerge.numerics.philox import stream
from crdtmerge.numerics.products import matmul
from crdtmerge.strategies import matching
from crdtmerge.strategies.evolution import Draws
from crdtmerge.strategies.matching import match_many, match_to, shuffled, standing_for
from crdtmerge.symmetry.groups import Axis, Group, Permutation, Symmetry, inverse

Array = NDArray[np.float64]
Network = dict[str, Array]


def perceptron(*widths: int) -> Symmetry:
    """A multilayer perceptron: a group for each hidden layer."""
    tensors, groups = {}, []
    for at in range(1, len(widths)):
        tensors[f"{at}.weight"] = ((widths[at],), (widths[at - 1],))
        tensors[f"{at}.bias"] = ((widths[at],),)
    for at in range(1, len(widths) - 1):
        axes = (Axis(f"{at}.weight", 0), Axis(f"{at}.bias", 0), Axis(f"{at + 1}.weight", 1, True))
        groups.append(Group(widths[at], axes))
    return Symmetry(tuple(groups), tensors)


RESIDUAL = Symmetry(
    (
        Group(7, (Axis("in", 0), Axis("mix", 0), Axis("mix", 1, True), Axis("read", 1, True))),
        Group(5, (Axis("heads", 0), Axis("out", 1, True))),
    ),
    {
        "in": ((7,), (4,)),
        "mix": ((7,), (7,)),
        "read": ((3,), (7,)),
        "heads": ((5, 3), (4,)),
        "out": ((2,), (5, 3)),
    },
)
"""A residual stream, which a square weight has on both axes, and heads, which are a factor of a dimension."""

BOTH = pytest.mark.parametrize("symmetry", [perceptron(6, 20, 12, 5), RESIDUAL], ids=["perceptron", "residual"])


def network(symmetry: Symmetry, number: int, scale: float = 1.0) -> Network:
    rng = np.random.default_rng(number)
    return {
        name: rng.standard_normal([int(np.prod(factors)) for factors in dims]) * scale
        for name, dims in symmetry.tensors.items()
    }


def drawn(symmetry: Symmetry, number: int) -> list[Permutation]:
    rng = np.random.default_rng([7, number])
    return [rng.permutation(group.size) for group in symmetry.groups]


def turned(symmetry: Symmetry, one: Mapping[str, Array], permutations: Sequence[Permutation]) -> Network:
    return {name: symmetry.turned(name, x, permutations) for name, x in one.items()}


def noisy(one: Mapping[str, Array], number: int, scale: float) -> Network:
    rng = np.random.default_rng([9, number])
    return {name: x + scale * rng.standard_normal(x.shape) for name, x in one.items()}


def distance(models: Sequence[Mapping[str, Array]]) -> float:
    """The sum of squared distances to the mean."""
    return float(sum(((x := np.stack([m[n] for m in models])) - x.mean(0)).__pow__(2).sum() for n in models[0]))


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return all((one[name] == other[name]).all() for name in one)


def output(one: Mapping[str, Array], x: Array) -> Array:
    """What the perceptron 6-20-12-5 computes, by hand."""
    for at in (1, 2):
        x = np.maximum(one[f"{at}.weight"] @ x + one[f"{at}.bias"][:, None], 0)
    found: Array = one["3.weight"] @ x + one["3.bias"][:, None]
    return found


# ---------------------------------------------------------------- two models


@BOTH
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_hidden_permutation_is_found(symmetry: Symmetry, noise: float) -> None:
    for number in range(5):
        one, hidden = network(symmetry, number), drawn(symmetry, number)
        other = turned(symmetry, noisy(one, number, noise), [inverse(p) for p in hidden])
        found = match_to(symmetry, one, other)
        assert all((p == q).all() for p, q in zip(found, hidden, strict=True))


def test_what_a_network_computes_stays() -> None:
    symmetry = perceptron(6, 20, 12, 5)
    one, other = network(symmetry, 1), network(symmetry, 2)
    x = np.random.default_rng(0).standard_normal((6, 50))
    moved = turned(symmetry, other, match_to(symmetry, one, other))
    assert not same(moved, other)
    assert np.allclose(output(moved, x), output(other, x), rtol=0, atol=1e-10)


@BOTH
def test_a_model_is_matched_to_itself_by_the_identity(symmetry: Symmetry) -> None:
    one = network(symmetry, 3)
    one = {name: np.where(np.arange(x.size).reshape(x.shape) % 2 == 0, x, 0.0) for name, x in one.items()}
    zeros = {name: np.zeros_like(x) for name, x in one.items()}
    for model in (one, zeros):
        assert all((p == np.arange(len(p))).all() for p in match_to(symmetry, model, model))


@BOTH
def test_models_come_nearer_and_no_single_group_could_do_better(symmetry: Symmetry) -> None:
    small = Symmetry(tuple(g for g in symmetry.groups if g.size <= 5), symmetry.tensors)
    for s in (symmetry, small) if small.groups else (symmetry,):
        one, other = network(s, 4), network(s, 5)
        found = match_to(s, one, other)
        reached = distance([one, turned(s, other, found)])
        assert reached < distance([one, other])
        for g, group in enumerate(s.groups):
            exchanges = itertools.combinations(range(group.size), 2)
            every = itertools.permutations(range(group.size)) if group.size <= 5 else ()
            for p in [*_swapped(found[g], exchanges), *map(np.array, every)]:
                tried = [p if at == g else q for at, q in enumerate(found)]
                twice = any(sum(axis.tensor == x.tensor for x in group.axes) > 1 for axis in group.axes)
                if not twice:
                    assert distance([one, turned(s, other, tried)]) >= reached - 1e-9


def _swapped(p: Permutation, pairs: itertools.combinations[tuple[int, int]]) -> list[Permutation]:
    found = []
    for i, j in pairs:
        q = p.copy()
        q[[i, j]] = q[[j, i]]
        found.append(q)
    return found


def test_of_two_small_groups_the_best_of_all_is_near() -> None:
    """Descent may end in a local optimum; from all its beginnings it does not miss by much what all 576 pairs reach."""
    symmetry = perceptron(3, 4, 4, 2)
    missed = 0
    for number in range(8):
        one, other = network(symmetry, 2 * number), network(symmetry, 2 * number + 1)
        pairs = itertools.product(itertools.permutations(range(4)), repeat=2)
        best = min(distance([one, turned(symmetry, other, [np.array(p), np.array(q)])]) for p, q in pairs)
        reached = distance([one, turned(symmetry, other, match_to(symmetry, one, other))])
        assert reached >= best - 1e-9
        assert reached < distance([one, other]) + 1e-9
        missed += reached > best + 1e-9
    assert missed <= 5


def test_descent_goes_on_from_where_it_starts() -> None:
    symmetry = perceptron(6, 20, 12, 5)
    one, other = network(symmetry, 1), network(symmetry, 2)
    found = match_to(symmetry, one, other)
    again = match_to(symmetry, one, other, start=found)
    assert all((p == q).all() for p, q in zip(found, again, strict=True))
    assert all((p == np.arange(len(p))).all() for p in match_to(symmetry, one, other, sweeps=0))


# ---------------------------------------------------------------- many models


@BOTH
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_five_copies_come_together(symmetry: Symmetry, noise: float) -> None:
    one = network(symmetry, 6)
    models = [turned(symmetry, noisy(one, i, noise), drawn(symmetry, i)) for i in range(5)]
    for kept in (0, 3):
        found = match_many(symmetry, models, kept)
        assert all((p == np.arange(len(p))).all() for p in found[kept])
        wanted = [[inverse(p)[drawn(symmetry, kept)[g]] for g, p in enumerate(drawn(symmetry, i))] for i in range(5)]
        for own, hidden in zip(found, wanted, strict=True):
            assert all((p == q).all() for p, q in zip(own, hidden, strict=True))


@BOTH
def test_strangers_come_nearer_to_their_mean_than_to_one_of_them(symmetry: Symmetry) -> None:
    nearer = 0
    for number in range(4):
        models = [network(symmetry, 10 * number + i) for i in range(4)]
        many = [turned(symmetry, m, p) for m, p in zip(models, match_many(symmetry, models), strict=True)]
        onto = [turned(symmetry, m, match_to(symmetry, models[0], m)) for m in models]
        assert distance(many) < distance(models)
        nearer += distance(many) < distance(onto)
    assert nearer >= 3


def test_which_model_is_kept_changes_the_order_alone() -> None:
    symmetry = perceptron(6, 20, 12, 5)
    models = [network(symmetry, i) for i in range(3)]
    one, other = match_many(symmetry, models, 0), match_many(symmetry, models, 2)
    assert distance([turned(symmetry, m, p) for m, p in zip(models, one, strict=True)]) == pytest.approx(
        distance([turned(symmetry, m, p) for m, p in zip(models, other, strict=True)]), rel=1e-12
    )
    back = [inverse(p) for p in one[2]]
    for p, q in zip(one, other, strict=True):
        assert all((a[b] == c).all() for a, b, c in zip(p, back, q, strict=True))


def test_one_model_or_none_stays() -> None:
    symmetry = perceptron(6, 20, 12, 5)
    assert match_many(symmetry, []) == []
    assert all((p == np.arange(len(p))).all() for p in match_many(symmetry, [network(symmetry, 1)])[0])


def test_two_models_come_together_as_near_as_by_matching_one_to_the_other() -> None:
    symmetry = perceptron(6, 20, 12, 5)
    models = [network(symmetry, i) for i in (1, 2)]
    one = distance([turned(symmetry, m, p) for m, p in zip(models, match_many(symmetry, models), strict=True)])
    other = distance([models[0], turned(symmetry, models[1], match_to(symmetry, *models))])
    assert one <= other * 1.05


def test_the_order_of_visits_is_that_of_the_symmetry() -> None:
    draws = Draws(stream(b"x", "y", b"", ""))
    assert sorted(shuffled(9, draws)) == list(range(9))
    assert len({tuple(shuffled(9, draws)) for _ in range(20)}) > 15


def observed(count: int) -> tuple[Symmetry, list[Network]]:
    """Activations of a few networks that resemble each other, with their units in different orders."""
    rng = np.random.default_rng(3)
    symmetry = perceptron(4, 16, 9, 2)
    true = [rng.standard_normal((group.size, 30)) for group in symmetry.groups]
    models = [[(x + rng.standard_normal(x.shape))[rng.permutation(len(x))] for x in true] for _ in range(count)]
    return standing_for(symmetry, models)


def test_activations_are_matched_by_one_product_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetry, (one, other) = observed(2)
    wanted = [best_assignment(matmul(one[name], other[name].T)) for name in symmetry.tensors]
    products: list[int] = []

    def counted(a: Array, b: Array) -> Array:
        products.append(len(a))
        return matmul(a, b)

    monkeypatch.setattr(matching, "matmul", counted)
    for start in (None, drawn(symmetry, 0)):
        products.clear()
        found = match_to(symmetry, one, other, start)
        assert all((p == q).all() for p, q in zip(found, wanted, strict=True))
        assert sorted(products) == [9, 16]


def test_many_are_matched_as_by_visiting_everyone_until_nobody_moves() -> None:
    symmetry, models = observed(5)
    found = match_many(symmetry, models)
    orders = Draws(stream(symmetry.digest, "matching models", b"", ""))
    at: dict[int, list[Permutation]] = {}

    def told() -> list[object]:
        return [[p.tolist() for p in at[i]] for i in sorted(at)]

    before: list[object] | None = None
    while before != told():
        before = told()
        for i in shuffled(5, orders):
            others = [turned(symmetry, models[j], at[j]) for j in sorted(at) if j != i]
            at.setdefault(i, symmetry.identities())
            for group, name in enumerate(symmetry.tensors) if others else ():
                total = others[0][name]
                for other in others[1:]:
                    total = total + other[name]
                at[i][group] = best_assignment(matmul(total, models[i][name].T), at[i][group])
    wanted = [[p[inverse(q)] for p, q in zip(at[i], at[0], strict=True)] for i in range(5)]
    assert [[p.tolist() for p in own] for own in found] == [[p.tolist() for p in own] for own in wanted]
