"""What holds of the set whatever the strategy, and what each strategy is by itself, the set put aside.

*Raw* laws are those of the bare function: models in the order given, a model twice if it comes twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.resolve.merge import merge
from tests.numerics.examples import STORED, examples, raw, stored
from tests.strategies.models import EACH, ROWS, Model, Row, copied, equal, family, identity, merged, model

DTYPE = pytest.mark.parametrize("dtype", STORED)


def content(one: Model) -> bytes:
    """An id that is made of what a model holds."""
    return hashlib.sha256(b"".join(raw(one[name]).tobytes() for name in sorted(one))).digest()


def close(one: Model, other: Model, tolerance: float) -> bool:
    return all(torch.allclose(one[name].double(), other[name].double(), rtol=0, atol=tolerance) for name in one)


# ---------------------------------------------------------------- through the set


@EACH
@examples(8)
@given(order=st.permutations(range(4)), dtype=st.sampled_from(list(STORED)))
def test_the_order_of_arrival_changes_nothing(row: Row, order: list[int], dtype: str) -> None:
    models, base = family(4, dtype)
    one = merge(models, strategy=row.strategy, base=base, weights=row.weights, **row.params)
    other = merge(
        [models[i] for i in order],
        strategy=row.strategy,
        base=base,
        weights=[row.weights[i] for i in order],
        **row.params,
    )
    assert equal(copied(one), copied(other))
    assert one.receipt.to_bytes() == other.receipt.to_bytes()


@EACH
def test_a_model_that_arrives_twice_counts_once(row: Row) -> None:
    models, base = family(3)
    weights = list(row.weights[:3])
    one = merge(models, strategy=row.strategy, base=base, weights=weights, **row.params)
    again = {name: x.clone() for name, x in models[1].items()}
    other = merge([*models, again], strategy=row.strategy, base=base, weights=[*weights, weights[1]], **row.params)
    assert equal(copied(one), copied(other))
    assert one.receipt.merge_id == other.receipt.merge_id
    assert any("counts once" in note for note in other.notes)


@EACH
def test_weights_belong_to_contents_not_to_positions(row: Row) -> None:
    """Two weights change places: the result does too, or nothing was weighted."""
    models, base = family(2)
    one = merge(models, strategy=row.strategy, base=base, weights=["1", "0.1"], **row.params)
    other = merge(models, strategy=row.strategy, base=base, weights=["0.1", "1"], **row.params)
    assert not equal(copied(one), copied(other))
    assert one.receipt.merge_id != other.receipt.merge_id


# ---------------------------------------------------------------- raw laws: a table

RAW: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    # strategy: (parameters, commutative, associative, idempotent), up to rounding
    "weight_average": ({}, True, False, True),
    "linear": ({}, True, False, True),
    "slerp": ({}, True, False, True),
    "task_arithmetic": ({}, True, True, False),
    "task_arithmetic at one half": ({"lambda": "0.5"}, True, False, True),  # the average of two
    "task_arithmetic at 0.3": ({"lambda": "0.3"}, True, False, False),
    "ties": ({"density": "0.5"}, True, False, False),
    "dare": ({"density": "0.5"}, True, False, False),
    "dare_ties": ({"density": "0.5"}, True, False, False),
    "magmax": ({}, True, True, True),
    "magmax at one half": ({"lambda": "0.5"}, True, False, False),
}

Binary = Callable[[Model, Model], Model]


def binary(case: str, base: Model) -> Binary:
    """A strategy as a function of two models."""
    params = RAW[case][0]
    strategy = case.partition(" ")[0]
    return lambda a, b: merged(strategy, [a, b], base, ids=[content(a), content(b)], **params)


def test_there_is_a_row_of_raw_laws_for_every_strategy() -> None:
    assert {case.partition(" ")[0] for case in RAW} == {row.strategy for row in ROWS}


@pytest.mark.parametrize("case", RAW)
@pytest.mark.parametrize("number", range(3))
def test_each_strategy_has_the_raw_laws_of_the_table_and_no_others(case: str, number: int) -> None:
    _, commutative, associative, idempotent = RAW[case]
    (a, b, c), base = family(3, "F64", number=1000 * number)
    f = binary(case, base)
    assert close(f(a, b), f(b, a), 1e-12) == commutative
    assert close(f(f(a, b), c), f(a, f(b, c)), 1e-12) == associative
    assert close(f(a, a), a, 1e-12) == idempotent


@pytest.mark.parametrize("case", RAW)
@DTYPE
def test_every_strategy_is_commutative_to_the_bit_for_two_models(case: str, dtype: str) -> None:
    (a, b), base = family(2, dtype)
    f = binary(case, base)
    assert equal(f(a, b), f(b, a))


any_numbers = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20)


@pytest.mark.parametrize("strategy", ["weight_average", "linear", "slerp"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("k", [2, 3, 7])
@examples(12)
@given(numbers=any_numbers)
def test_means_are_idempotent_to_the_bit(strategy: str, dtype: str, k: int, numbers: list[float]) -> None:
    top = torch.finfo(STORED[dtype]).max
    one: Model = {"w": stored(np.clip(np.array(numbers), -top, top), dtype)}
    assert equal(merged(strategy, [one] * k), one)


# ---------------------------------------------------------------- magmax is a join


@st.composite
def joined(draw: st.DrawFn) -> tuple[list[Model], Model]:
    """Models of few bits around a base, so that every task vector is exact."""
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    n = draw(st.integers(1, 12))
    steps = st.lists(st.integers(-127, 127), min_size=n, max_size=n)
    made: list[Model] = [{"w": stored(np.array(draw(steps)) / 64.0, dtype)} for _ in range(4)]
    return made[:3], made[3]


@examples(100)
@given(joined())
def test_magmax_is_commutative_associative_and_idempotent_to_the_bit(inputs: tuple[list[Model], Model]) -> None:
    (a, b, c), base = inputs
    f = binary("magmax", base)
    assert equal(f(a, b), f(b, a))
    assert equal(f(f(a, b), c), f(a, f(b, c)))
    assert torch.equal(f(a, a)["w"], a["w"])


@examples(60)
@given(joined(), st.permutations(range(3)))
def test_magmax_of_many_is_the_fold_of_magmax_of_two_in_any_order(
    inputs: tuple[list[Model], Model], order: list[int]
) -> None:
    models, base = inputs
    f = binary("magmax", base)
    x, y, z = (models[i] for i in order)
    assert torch.equal(f(f(x, y), z)["w"], merged("magmax", models, base)["w"])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_magmax_is_a_join_of_models_that_lie_near_their_base(dtype: str) -> None:
    (a, b, c), base = family(3, dtype)
    f = binary("magmax", base)
    assert equal(f(f(a, b), c), f(a, f(b, c)))
    assert equal(f(a, a), a)


@pytest.mark.parametrize(
    ("dtype", "small", "large"), [("BF16", 2.0**-30, 1.0), ("F16", 2.0**-24, 2.0), ("F32", 2.0**-60, 1.0)]
)
def test_magmax_is_no_join_where_the_difference_from_the_base_is_rounded(
    dtype: str, small: float, large: float
) -> None:
    """Its docstring says so: base + (x - base) is not x where they lie many binades apart."""
    one: Model = {"w": stored(np.array([small]), dtype)}
    base: Model = {"w": stored(np.array([large]), dtype)}
    assert not equal(merged("magmax", [one, one], base), one)


# ---------------------------------------------------------------- seeds and masks


@EACH
def test_the_seed_matters_to_strategies_that_draw_and_to_no_others(row: Row) -> None:
    models, base = family(3)
    how: dict[str, Any] = {"strategy": row.strategy, "base": base, "weights": row.weights[:3], **row.params}
    results = [copied(merge(models, seed=seed, **how)) for seed in (1, 1, 2, "root", 2**64 - 1)]
    assert equal(results[0], results[1])
    for other in results[2:]:
        assert equal(results[0], other) != row.random


DRAWS = pytest.mark.parametrize("strategy", ["dare", "dare_ties"])


def kept(strategy: str, models: list[Model], base: Model, **how: Any) -> dict[str, torch.Tensor]:
    """Which elements of a merge over zeros are not zero."""
    found = merge(models, strategy=strategy, base=base, **how)
    return {name: x != 0 for name, x in copied(found).items()}


def same_masks(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@DRAWS
def test_with_a_number_as_seed_masks_do_not_know_of_other_contributions(strategy: str) -> None:
    """The other one equals the base, so that the mask of the first can be seen; its own would fall on zeros."""
    a = model(5)
    zeros: Model = {name: torch.zeros_like(x) for name, x in a.items()}
    alone = kept(strategy, [a], zeros, density="0.4", seed=11)
    assert same_masks(alone, kept(strategy, [a, zeros], zeros, density="0.4", seed=11))
    assert not same_masks(alone, kept(strategy, [a], zeros, density="0.4", seed=12))


@DRAWS
def test_with_the_root_as_seed_another_contribution_draws_all_masks_anew(strategy: str) -> None:
    a = model(5)
    zeros: Model = {name: torch.zeros_like(x) for name, x in a.items()}
    alone = kept(strategy, [a], zeros, density="0.4")
    assert not same_masks(alone, kept(strategy, [a, zeros], zeros, density="0.4"))


@DRAWS
def test_masks_do_not_know_of_other_tensors(strategy: str) -> None:
    (a, b), base = family(2)
    ids = [identity(0), identity(1)]
    whole = merged(strategy, [a, b], base, ids=ids, density="0.4")
    for name in base:
        alone = merged(strategy, [{name: a[name]}, {name: b[name]}], {name: base[name]}, ids=ids, density="0.4")
        assert equal(alone, {name: whole[name]})
    left_out = merge([a, b], strategy=strategy, base=base, seed=3, density="0.4", exclude=["bias", "empty"])
    everything = merge([a, b], strategy=strategy, base=base, seed=3, density="0.4")
    assert torch.equal(left_out["weight"], everything["weight"])


@DRAWS
def test_tensors_and_contributions_have_masks_of_their_own(strategy: str) -> None:
    a = model(5, shapes={"x": (2000,), "y": (2000,)})
    ones: Model = {name: torch.ones_like(x) for name, x in a.items()}
    zeros: Model = {name: torch.zeros_like(x) for name, x in a.items()}
    first, second = (merged(strategy, [ones], zeros, ids=[identity(i)], density="0.5") for i in range(2))
    agreeing = [
        int((one == other).sum())
        for one, other in [(first["x"], first["y"]), (first["x"], second["x"]), (first["y"], second["y"])]
    ]
    for count in agreeing:
        assert abs(count - 1000) < 5 * math.sqrt(500)


def test_dare_and_dare_ties_share_their_masks() -> None:
    a = model(5)
    zeros: Model = {name: torch.zeros_like(x) for name, x in a.items()}
    assert equal(merged("dare", [a], zeros), merged("dare_ties", [a], zeros))


@pytest.mark.parametrize("density", ["0.1", "0.5", "0.9", "0.003"])
@pytest.mark.parametrize("seed", range(3))
def test_the_share_that_is_kept_lies_within_binomial_bounds(density: str, seed: int) -> None:
    n, p = 40_000, float(density)
    ones: Model = {"w": torch.ones(n)}
    found = merged("dare", [ones], {"w": torch.zeros(n)}, density=density, seed=bytes([seed]) * 32, rescale=False)
    assert abs(int(found["w"].sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("density", ["0.3", "0.8"])
def test_dare_is_unbiased_over_400_seeds(density: str) -> None:
    """The mean of the rescaled task vector is the task vector: each z within 4.5, their squares as chi-square."""
    seeds, p, n = 400, float(density), 60
    (one,), base = family(1, "F64", shapes={"w": (n,)})
    tau = one["w"] - base["w"]
    total = torch.zeros(n, dtype=torch.float64)
    for seed in range(seeds):
        total += merged("dare", [one], base, density=density, seed=seed.to_bytes(32, "big"))["w"] - base["w"]
    spread = tau.abs() * math.sqrt((1 - p) / p / seeds)
    z = (total / seeds - tau) / spread
    assert float(z.abs().max()) < 4.5
    assert abs(float((z * z).sum()) - n) < 5 * math.sqrt(2 * n)


def test_without_rescaling_dare_shrinks_to_the_density() -> None:
    n = 40_000
    ones: Model = {"w": torch.ones(n)}
    zeros: Model = {"w": torch.zeros(n)}
    plain = float(merged("dare", [ones], zeros, density="0.25", rescale=False)["w"].mean())
    rescaled = float(merged("dare", [ones], zeros, density="0.25")["w"].mean())
    assert plain == pytest.approx(0.25, abs=0.02)
    assert rescaled == pytest.approx(4 * plain, rel=1e-6)
