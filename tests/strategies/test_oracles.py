"""Every strategy computes what its equations say: compared with exact fractions, for every storage dtype."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.examples import STORED, stored
from tests.numerics.formats import nearest
from tests.strategies import oracles
from tests.strategies.models import SEED, SHAPES, Model, constant, family, identity, merged
from tests.strategies.oracles import DOUBLE, SINGLE, exact

WEIGHTS = ("1", "0.1", "2.5", "0.3", "7", "0.75", "1.3333333333333333333333")
SIGNED = ("1", "-0.7", "2.5", "0.3", "-1.1", "0.75", "4")
DTYPES = pytest.mark.parametrize("dtype", STORED)
COUNTS = pytest.mark.parametrize("k", [1, 2, 3, 7])


ELEMENTS = sum(int(np.prod(shape, dtype=np.int64)) for shape in SHAPES.values())


def fractions(weights: Sequence[str]) -> list[Fraction]:
    return [Fraction(w) for w in weights]


def require_linear(found: Model, models: Sequence[Model], c: Sequence[Fraction], divisor: Fraction, dtype: str) -> None:
    """In float64 each of the k products and sums, the division and the weights are rounded once."""
    decided = 0
    for name in SHAPES:
        xs = [exact(model[name]) for model in models]
        wanted = oracles.scaled(oracles.combination(xs, c), 1 / divisor)
        bound = oracles.scaled(oracles.absolute(xs, c), DOUBLE * (len(c) + 4) / abs(divisor))
        decided += oracles.within(found[name], wanted, bound, dtype)
    assert dtype == "F64" or decided >= 0.9 * ELEMENTS, "the others lie half-way between two numbers"


@DTYPES
@COUNTS
@pytest.mark.parametrize("strategy", ["weight_average", "linear"])
def test_weighted_means_are_correctly_rounded(strategy: str, dtype: str, k: int) -> None:
    models, _ = family(k, dtype)
    w = fractions(WEIGHTS[:k])
    found = merged(strategy, models, weights=WEIGHTS[:k])
    require_linear(found, models, w, sum(w, Fraction(0)), dtype)


@DTYPES
@COUNTS
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_combinations_are_correctly_rounded(dtype: str, k: int, normalize: bool) -> None:
    models, _ = family(k, dtype)
    w = fractions(SIGNED[:k])
    found = merged("linear", models, weights=SIGNED[:k], normalize=normalize)
    require_linear(found, models, w, sum(w, Fraction(0)) if normalize else Fraction(1), dtype)


@DTYPES
@COUNTS
@pytest.mark.parametrize("scale", ["1", "0.3", "-1", "0", "12.5"])
def test_task_arithmetic_is_correctly_rounded(dtype: str, k: int, scale: str) -> None:
    models, base = family(k, dtype)
    w = fractions(SIGNED[:k])
    found = merged("task_arithmetic", models, base, weights=SIGNED[:k], lambda_=scale)
    decided = 0
    for name in SHAPES:
        origin = exact(base[name])
        xs = [exact(model[name]) for model in models]
        taus = oracles.task_vectors(xs, origin)
        wanted = oracles.added(origin, oracles.scaled(oracles.combination(taus, w), Fraction(scale)))
        size = oracles.added(oracles.absolute(xs, w), oracles.absolute([origin] * k, w))
        size = oracles.added(oracles.magnitudes(origin), oracles.scaled(size, abs(Fraction(scale))))
        decided += oracles.within(found[name], wanted, oracles.scaled(size, DOUBLE * (k + 6)), dtype)
    assert dtype == "F64" or decided >= 0.6 * ELEMENTS, "the others lie half-way between two numbers"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@COUNTS
@pytest.mark.parametrize("strategy", ["linear", "task_arithmetic"])
def test_half_way_cases_go_to_the_even_number(dtype: str, k: int, strategy: str) -> None:
    """With weights of few bits all is exact in float64 but the one rounding at the end."""
    models, base = family(k, dtype)
    weights = ("1", "0.5", "-2", "0.25", "3", "0.5", "-1")[:k]
    how = {"normalize": False} if strategy == "linear" else {"lambda_": "0.5"}
    found = merged(strategy, models, base, weights=weights, **how)
    for name in SHAPES:
        xs, origin, w = [exact(model[name]) for model in models], exact(base[name]), fractions(weights)
        wanted = oracles.combination(xs, w)
        if strategy == "task_arithmetic":
            tau = oracles.combination(oracles.task_vectors(xs, origin), w)
            wanted = oracles.added(origin, oracles.scaled(tau, Fraction(1, 2)))
        assert found[name].double().reshape(-1).tolist() == [nearest(v, dtype) for v in wanted]


# ---------------------------------------------------------------- slerp


def vector(x: torch.Tensor) -> oracles.Vector:
    found: oracles.Vector = x.double().reshape(-1).numpy()
    return found


def require_vector(found: torch.Tensor, wanted: oracles.Vector, dtype: str, space: Sequence[oracles.Vector]) -> None:
    """Both are good to 1e-11 of the sizes of all that they add."""
    size = sum((np.abs(x) for x in space), np.zeros_like(wanted))
    rows = [Fraction(v) for v in wanted.tolist()], [Fraction(v) * Fraction(1, 10**11) for v in size.tolist()]
    decided = oracles.within(found, *rows, dtype)
    assert dtype == "F64" or len(wanted) < 30 or decided >= 0.97 * len(wanted)


@DTYPES
@pytest.mark.parametrize("weights", [("1", "1"), ("0.7", "0.3"), ("1", "0.1"), ("0", "1")])
@pytest.mark.parametrize("space", ["weights", "task_vectors"])
def test_slerp_of_two_is_shoemakes_formula(dtype: str, weights: tuple[str, str], space: str) -> None:
    models, base = family(2, dtype, scale=0.5)
    found = merged("slerp", models, base, weights=weights, space=space)
    t = float(Fraction(weights[1]) / (Fraction(weights[0]) + Fraction(weights[1])))
    for name in SHAPES:
        a, b = (vector(model[name]) for model in models)
        origin = vector(base[name])
        if space == "weights":
            require_vector(found[name], oracles.slerp(a, b, t), dtype, [a, b])
        else:
            wanted = origin + oracles.slerp(a - origin, b - origin, t)
            require_vector(found[name], wanted, dtype, [a, b, origin, origin, origin])


@DTYPES
@pytest.mark.parametrize("k", [3, 4, 7])
@pytest.mark.parametrize("equal_weights", [True, False])
def test_slerp_of_more_is_their_karcher_mean(dtype: str, k: int, equal_weights: bool) -> None:
    models, _ = family(k, dtype)
    weights = ["1"] * k if equal_weights else WEIGHTS[:k]
    found = merged("slerp", models, weights=weights)
    for name in SHAPES:
        xs = [vector(model[name]) for model in models]
        require_vector(found[name], oracles.karcher(xs, [float(w) for w in weights]), dtype, xs)


@DTYPES
@pytest.mark.parametrize(
    ("k", "weights"),
    [
        (3, ["1", "1", "1"]),
        (3, WEIGHTS[:3]),
        (7, ["1"] * 7),
        (7, WEIGHTS),
    ],
)
def test_folding_interpolates_one_by_one_with_the_mean_weight_so_far(
    dtype: str, k: int, weights: Sequence[str]
) -> None:
    models, _ = family(k, dtype)
    found = merged("slerp", models, weights=weights, reduce="fold")
    for name in ("bias", "weight"):
        xs = [vector(model[name]) for model in models]
        require_vector(found[name], oracles.fold(xs, [float(w) for w in weights]), dtype, xs)


def test_the_karcher_mean_of_orthogonal_unit_vectors_lies_in_their_middle() -> None:
    models: list[Model] = [{"w": torch.eye(5, dtype=torch.float64)[i]} for i in range(5)]
    found = merged("slerp", models)["w"]
    assert torch.allclose(found, torch.full((5,), 5**-0.5, dtype=torch.float64), rtol=0, atol=1e-14)


def test_slerp_turns_by_the_share_of_the_angle() -> None:
    """In the plane: from 10 degrees to 100, a third of the way, is 40 degrees; lengths stay one."""
    a, b, wanted = (torch.tensor([np.cos(d), np.sin(d)]) for d in np.radians([10.0, 100.0, 40.0]))
    found = merged("slerp", [{"w": a}, {"w": b}], weights=["2", "1"])["w"]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-15)


# ---------------------------------------------------------------- consensus


def rounding_of(dtype: str) -> Fraction:
    return SINGLE if dtype in ("BF16", "F16") else DOUBLE


def require_consensus(found: torch.Tensor, wanted: oracles.Consensus, dtype: str) -> None:
    """Wherever rounding cannot have turned an election, the result is one rounding of something within the bound."""
    sure = [i for i, clear in enumerate(wanted.sure) if clear]
    assert len(sure) >= 0.97 * len(wanted.sure)
    values = found.reshape(-1)[sure] if sure else found.reshape(-1)[:0]
    decided = oracles.within(values, [wanted.theta[i] for i in sure], [wanted.bound[i] for i in sure], dtype)
    assert dtype in ("F32", "F64") or len(sure) < 30 or decided >= 0.35 * len(sure), "the others lie half-way"


TIES = [
    {},
    {"density": "0.5", "lambda_": "0.7"},
    {"density": "0.5", "scope": "tensor", "elect": "count"},
    {"density": "0.37", "combine": "sum", "lambda_": "0.3"},
    {"density": "0.9", "combine": "max", "elect": "sum", "scope": "tensor"},
    {"density": "1", "elect": "count", "combine": "sum", "lambda_": "-0.5"},
]


@DTYPES
@COUNTS
@pytest.mark.parametrize("params", TIES, ids=lambda p: "-".join(p.values()) or "default")
def test_ties_trims_elects_and_merges_what_agrees(dtype: str, k: int, params: dict[str, str]) -> None:
    models, base = family(k, dtype)
    found = merged("ties", models, base, weights=WEIGHTS[:k], **params)
    said = {"density": "0.2", "scope": "model", "elect": "sum", "combine": "mean", "lambda_": "1"} | params
    masks = oracles.trim_masks(
        [dict(m) for m in models], dict(base), Fraction(said["density"]), said["scope"] == "model"
    )
    for name in SHAPES:
        wanted = oracles.consensus(
            [exact(model[name]) for model in models],
            exact(base[name]),
            fractions(WEIGHTS[:k]),
            masks=masks[name],
            elect=said["elect"],
            combine=said["combine"],
            scale=Fraction(said["lambda_"]),
            rounding=rounding_of(dtype),
        )
        require_consensus(found[name], wanted, dtype)


DARE = [
    ("dare", {}),
    ("dare", {"density": "0.5", "combine": "mean", "lambda_": "0.7"}),
    ("dare", {"drop": "0.25", "rescale": False, "lambda_": "-1"}),
    ("dare_ties", {}),
    ("dare_ties", {"density": "0.5", "elect": "count", "combine": "sum", "lambda_": "0.3"}),
    ("dare_ties", {"density": "0.7", "combine": "max", "rescale": False}),
]


@DTYPES
@COUNTS
@pytest.mark.parametrize(("strategy", "params"), DARE)
def test_dare_drops_by_philox_rescales_and_combines(strategy: str, params: dict[str, Any], dtype: str, k: int) -> None:
    models, base = family(k, dtype)
    found = merged(strategy, models, base, weights=WEIGHTS[:k], **params)
    density = 1 - Fraction(params["drop"]) if "drop" in params else Fraction(params.get("density", "0.1"))
    ids = [identity(i) for i in range(k)]
    for name in SHAPES:
        wanted = oracles.consensus(
            [exact(model[name]) for model in models],
            exact(base[name]),
            fractions(WEIGHTS[:k]),
            masks=oracles.drop_masks(SEED, ids, name, density, base[name].numel()),
            factor=1 / density if params.get("rescale", True) else Fraction(1),
            elect=params.get("elect", "sum") if strategy == "dare_ties" else "none",
            combine=params.get("combine", "mean" if strategy == "dare_ties" else "sum"),
            scale=Fraction(params.get("lambda_", "1")),
            rounding=rounding_of(dtype),
        )
        require_consensus(found[name], wanted, dtype)


@DTYPES
@COUNTS
@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED])
@pytest.mark.parametrize("scale", ["1", "0.5"])
def test_magmax_takes_the_largest_weighted_task_vector(dtype: str, k: int, weights: Sequence[str], scale: str) -> None:
    models, base = family(k, dtype)
    found = merged("magmax", models, base, weights=weights[:k], lambda_=scale)
    for name in SHAPES:
        wanted = oracles.consensus(
            [exact(model[name]) for model in models],
            exact(base[name]),
            fractions(weights[:k]),
            elect="none",
            combine="max",
            scale=Fraction(scale),
            rounding=rounding_of(dtype),
        )
        require_consensus(found[name], wanted, dtype)


# ---------------------------------------------------------------- supports: over a base of zeros all is visible


@DTYPES
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", ["0.2", "0.5", "0.013", "0.001", "0.99"])
def test_ties_of_one_model_keeps_exactly_the_largest(dtype: str, scope: str, density: str) -> None:
    (model,), _ = family(1, dtype)
    zeros = constant(model)
    found = merged("ties", [model], zeros, density=density, scope=scope)
    masks = oracles.trim_masks([dict(model)], zeros, Fraction(density), scope == "model")
    for name in SHAPES:
        mask = torch.tensor(masks[name][0], dtype=torch.bool).reshape(model[name].shape)
        assert torch.equal(found[name], torch.where(mask, model[name], 0.0))
    total = sum(int((found[name] != 0).sum()) for name in SHAPES)
    elements = sum(x.numel() for x in model.values())
    if scope == "model":
        assert total == max(1, int(Fraction(density) * elements))


@DTYPES
@pytest.mark.parametrize("strategy", ["dare", "dare_ties"])
@pytest.mark.parametrize("density", ["0.1", "0.5", "0.99"])
def test_dare_of_one_model_keeps_exactly_what_the_masks_say(dtype: str, strategy: str, density: str) -> None:
    (model,), _ = family(1, dtype)
    found = merged(strategy, [model], constant(model), density=density, rescale=False)
    for name in SHAPES:
        (row,) = oracles.drop_masks(SEED, [identity(0)], name, Fraction(density), model[name].numel())
        mask = torch.tensor(row, dtype=torch.bool).reshape(model[name].shape)
        assert torch.equal(found[name], torch.where(mask, model[name], 0.0))


@DTYPES
@pytest.mark.parametrize("strategy", ["ties", "dare", "dare_ties"])
def test_an_element_that_nobody_keeps_stays_that_of_the_base(dtype: str, strategy: str) -> None:
    models, base = family(3, dtype)
    found = merged(strategy, models, base, density="0.2")
    by_size = oracles.trim_masks([dict(m) for m in models], dict(base), Fraction("0.2"), True)
    ids = [identity(i) for i in range(3)]
    for name in SHAPES:
        by_chance = oracles.drop_masks(SEED, ids, name, Fraction("0.2"), base[name].numel())
        masks = by_size[name] if strategy == "ties" else by_chance
        nobody = [i for i in range(base[name].numel()) if not any(mask[i] for mask in masks)]
        assert torch.equal(found[name].reshape(-1)[nobody], base[name].reshape(-1)[nobody])
        assert name != "weight" or 0 < len(nobody) < base[name].numel()


GRID = [
    # three task vectors, weights one: what sum and count elect, and what mean, sum and max make of it
    ((3.0, -2.0, -2.0), {"mean": -2.0, "sum": -4.0, "max": -2.0}, {"mean": -2.0, "sum": -4.0, "max": -2.0}),
    ((5.0, -2.0, -2.0), {"mean": 5.0, "sum": 5.0, "max": 5.0}, {"mean": -2.0, "sum": -4.0, "max": -2.0}),
    ((4.0, -2.0, -2.0), {"mean": 4.0, "sum": 4.0, "max": 4.0}, {"mean": -2.0, "sum": -4.0, "max": -2.0}),
    ((2.0, 0.0, -2.0), {"mean": 2.0, "sum": 2.0, "max": 2.0}, {"mean": 2.0, "sum": 2.0, "max": 2.0}),
    ((0.0, 0.0, -2.0), {"mean": -2.0, "sum": -2.0, "max": -2.0}, {"mean": -2.0, "sum": -2.0, "max": -2.0}),
    ((0.0, 0.0, 0.0), {"mean": 0.0, "sum": 0.0, "max": 0.0}, {"mean": 0.0, "sum": 0.0, "max": 0.0}),
    ((1.0, 2.0, 6.0), {"mean": 3.0, "sum": 9.0, "max": 6.0}, {"mean": 3.0, "sum": 9.0, "max": 6.0}),
    ((-1.0, -5.0, 0.0), {"mean": -3.0, "sum": -6.0, "max": -5.0}, {"mean": -3.0, "sum": -6.0, "max": -5.0}),
]


@DTYPES
@pytest.mark.parametrize(("taus", "by_sum", "by_count"), GRID)
@pytest.mark.parametrize("strategy", ["ties", "dare_ties"])
def test_zero_counts_as_plus_and_zeros_neither_vote_nor_count(
    strategy: str, dtype: str, taus: tuple[float, ...], by_sum: dict[str, float], by_count: dict[str, float]
) -> None:
    base: Model = {"w": stored(np.array([8.0]), dtype)}
    models: list[Model] = [{"w": stored(np.array([8.0 + tau]), dtype)} for tau in taus]
    for elect, wanted in (("sum", by_sum), ("count", by_count)):
        for combine, m in wanted.items():
            found = merged(strategy, models, base, density=1, elect=elect, combine=combine)
            assert found["w"].tolist() == [8.0 + m]


@DTYPES
def test_of_two_equal_magnitudes_the_positive_one_is_the_largest(dtype: str) -> None:
    zero: Model = {"w": stored(np.zeros(3), dtype)}
    a: Model = {"w": stored(np.array([1.0, -2.0, 3.0]), dtype)}
    b: Model = {"w": stored(np.array([-1.0, 2.0, -4.0]), dtype)}
    for order in ([a, b], [b, a]):
        assert merged("magmax", order, zero)["w"].tolist() == [1.0, 2.0, -4.0]
