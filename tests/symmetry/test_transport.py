"""Models brought onto other widths: planted copies, permutations, what cannot be compared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, NeedsError
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from crdtmerge.symmetry.transport import squared_distances, transported

Wide = NDArray[np.float64]
Model = dict[str, Wide]


def perceptron(widths: Sequence[int]) -> Symmetry:
    """Layers 0, 1, ... between the first and the last width."""
    tensors: dict[str, tuple[tuple[int, ...], ...]] = {}
    groups = []
    for at, (n, out) in enumerate(itertools.pairwise(widths)):
        tensors |= {f"{at}.weight": ((out,), (n,))} | ({f"{at}.bias": ((out,),)} if at < len(widths) - 2 else {})
    for at, size in enumerate(widths[1:-1]):
        own = [Axis(f"{at}.bias", 0), Axis(f"{at}.weight", 0), Axis(f"{at + 1}.weight", 1, True)]
        groups.append(Group(size, tuple(own)))
    return Symmetry(tuple(groups), tensors)


def drawn(symmetry: Symmetry, seed: int) -> Model:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal([int(np.prod(d)) for d in dims]) for name, dims in symmetry.tensors.items()}


def function(model: Model, x: Wide) -> Wide:
    layers = sum(name.endswith("weight") for name in model)
    for at in range(layers):
        x = x @ model[f"{at}.weight"].T
        if at < layers - 1:
            x = np.maximum(x + model[f"{at}.bias"], 0)
    return x


def doubled(symmetry: Symmetry, model: Model, times: int, seed: int) -> Model:
    """Each unit so many times, in any order, what it gives on shared out at random among its copies."""
    rng = np.random.default_rng(seed)
    found = dict(model)
    for group in symmetry.groups:
        order = rng.permutation(np.repeat(np.arange(group.size), times))
        shares = rng.random(len(order)) + 0.5
        shares /= np.bincount(order, shares)[order]
        for name, at, consumes in group.axes:
            copied = np.take(found[name], order, axis=at)
            found[name] = np.moveaxis(np.moveaxis(copied, at, -1) * shares, -1, at) if consumes else copied
    return found


X = np.random.default_rng(0).standard_normal((30, 5))


@pytest.mark.parametrize("widths", [(5, 7, 3), (5, 7, 6, 3), (5, 4, 8, 6, 2)])
@pytest.mark.parametrize("times", [2, 3])
def test_a_wide_net_of_copies_is_carried_back_to_the_narrow_one(widths: tuple[int, ...], times: int) -> None:
    narrow = perceptron(widths)
    wide = perceptron((widths[0], *(times * n for n in widths[1:-1]), widths[-1]))
    one = drawn(narrow, 1)
    many = doubled(narrow, one, times, 2)
    assert np.allclose(function(many, X), function(one, X), rtol=0, atol=1e-9)
    found = transported(narrow, one, wide, many)
    assert {name: x.shape for name, x in found.tensors.items()} == {name: x.shape for name, x in one.items()}
    assert all(np.allclose(found.tensors[name], one[name], rtol=0, atol=1e-6) for name in one)
    assert np.allclose(function(found.tensors, X), function(one, X), rtol=0, atol=1e-5)


def test_a_narrow_net_is_carried_to_the_wide_one_of_its_copies() -> None:
    narrow, wide = perceptron((5, 7, 6, 3)), perceptron((5, 14, 12, 3))
    one = drawn(narrow, 1)
    many = doubled(narrow, one, 2, 2)
    found = transported(wide, many, narrow, one)
    assert np.allclose(function(found.tensors, X), function(one, X), rtol=0, atol=1e-5)
    assert np.allclose(found.tensors["1.bias"], many["1.bias"], rtol=0, atol=1e-6)


def test_at_equal_widths_it_is_the_permutation() -> None:
    symmetry = perceptron((5, 9, 8, 3))
    one = drawn(symmetry, 3)
    rng = np.random.default_rng(4)
    orders = [rng.permutation(group.size) for group in symmetry.groups]
    other = {name: symmetry.turned(name, x, orders) for name, x in one.items()}
    found = transported(symmetry, one, symmetry, other, epsilon=1e-4)
    for plan, order in zip(found.plans, orders, strict=True):
        wanted = np.zeros(plan.shape)
        wanted[order, np.arange(len(order))] = 1
        assert np.allclose(len(order) * plan, wanted, rtol=0, atol=1e-6)
    assert all(np.allclose(found.tensors[name], one[name], rtol=0, atol=1e-6) for name in one)


def test_sums_are_conserved_and_averages_are_averages() -> None:
    one, other = perceptron((5, 4, 3)), perceptron((5, 11, 3))
    model = drawn(other, 6)
    found = transported(one, drawn(one, 5), other, model, epsilon=0.5).tensors
    assert np.allclose(found["1.weight"].sum(axis=1), model["1.weight"].sum(axis=1), rtol=0, atol=1e-6)
    assert np.allclose(found["0.bias"].mean(), model["0.bias"].mean(), rtol=0, atol=1e-6)
    assert (found["0.bias"] <= model["0.bias"].max()).all()
    assert (found["0.bias"] >= model["0.bias"].min()).all()


def test_by_activations_it_finds_copies_whose_weights_look_different() -> None:
    """Units scaled by positive numbers, which the next layer undoes: activations that are standardised are the same."""
    narrow, wide = perceptron((5, 7, 3)), perceptron((5, 14, 3))
    one = drawn(narrow, 1)
    many = doubled(narrow, one, 2, 2)
    scale = np.random.default_rng(3).random(14) * 9 + 1
    many["0.weight"], many["0.bias"] = many["0.weight"] * scale[:, None], many["0.bias"] * scale
    many["1.weight"] = many["1.weight"] / scale

    def hidden(model: Model) -> Wide:
        x = np.maximum(X @ model["0.weight"].T + model["0.bias"], 0).T
        x = x - x.mean(axis=1, keepdims=True)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    plan = transported(narrow, one, wide, many, features=[(hidden(one), hidden(many))]).plans[0]
    alike = hidden(one) @ hidden(many).T > 1 - 1e-9
    assert np.allclose(14 * plan, alike, rtol=0, atol=1e-6)


def test_what_nothing_consumes_is_reordered_and_must_be_of_one_size() -> None:
    def attention(heads: int, width: int, value: int) -> Symmetry:
        groups = (
            Group(heads, (Axis("k", 0), Axis("o", 1, True), Axis("q", 0), Axis("v", 0))),
            Group(width, (Axis("k", 1), Axis("q", 1))),
            Group(value, (Axis("o", 2, True), Axis("v", 1))),
        )
        rows, values = (heads, width), (heads, value)
        return Symmetry(groups, {"k": (rows, (4,)), "o": ((4,), values), "q": (rows, (4,)), "v": (values, (4,))})

    one, other = attention(2, 3, 2), attention(4, 3, 2)
    model = drawn(one, 1)
    order = np.array([2, 0, 1])
    rng = np.random.default_rng(2)
    many = {name: x.copy() for name, x in model.items()}
    heads = rng.permutation([0, 0, 1, 1])
    for name in "kqv":
        split = model[name].reshape(one.factors(name))[heads]
        many[name] = (split[:, order] if name in "kq" else split).reshape(-1, 4)
    many["o"] = (model["o"].reshape(4, 2, 2)[:, heads] / 2).reshape(4, -1)
    features = [
        tuple(np.concatenate([m[n].reshape(h, -1) ** 2 for n in "v"], axis=1) for m, h in ((model, 2), (many, 4))),
        (np.arange(3.0)[:, None], order[:, None].astype(float)),
        (np.arange(2.0)[:, None], np.arange(2.0)[:, None]),
    ]
    found = transported(one, model, other, many, features=features, epsilon=1e-3)  # type: ignore[arg-type]
    assert all(np.allclose(found.tensors[name], model[name], rtol=0, atol=1e-6) for name in model)
    with pytest.raises(MismatchError, match="such widths must be equal"):
        transported(one, model, attention(2, 5, 2), drawn(attention(2, 5, 2), 1))
    with pytest.raises(NeedsError, match="Give the activations"):
        transported(one, model, other, many)


def test_what_does_not_correspond_is_refused() -> None:
    one, other = perceptron((5, 4, 3)), perceptron((5, 6, 3))
    model = drawn(one, 1)
    with pytest.raises(MismatchError, match="the same axes"):
        transported(one, model, perceptron((5, 4, 4, 3)), drawn(perceptron((5, 4, 4, 3)), 1))
    with pytest.raises(MismatchError, match="must be equal"):
        transported(one, model, perceptron((7, 6, 3)), drawn(perceptron((7, 6, 3)), 1))
    with pytest.raises(MismatchError, match="has shape"):
        transported(one, model, other, model)


def test_squared_distances_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(9)
    x, y = rng.standard_normal((3, 6)), rng.standard_normal((5, 6))
    assert np.allclose(squared_distances(x, y), ((x[:, None] - y) ** 2).sum(-1), rtol=0, atol=1e-12)
    assert (squared_distances(x, x).diagonal() < 1e-12).all()
