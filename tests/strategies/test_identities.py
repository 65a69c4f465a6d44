"""Strategies that must agree do: each identity compares two implementations, at the tolerance that it can have."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import NonFiniteError
from crdtmerge.resolve.merge import merge
from tests.numerics.examples import STORED, stored
from tests.numerics.formats import FORMATS, exponent
from tests.strategies import oracles
from tests.strategies.models import EACH, ROWS, Model, Row, constant, copied, equal, family, identity, merged, model

DTYPE = pytest.mark.parametrize("dtype", STORED)
NEEDS_BASE = ("task_arithmetic", "ties", "dare", "dare_ties", "magmax")


def times(one: Model, factor: float) -> Model:
    return {name: x * factor for name, x in one.items()}


def same_values(one: Model, other: Model) -> bool:
    """Equal, where plus and minus zero are."""
    return all(torch.equal(one[name], other[name]) for name in one)


def require_close(one: Model, other: Model, ulps: int, dtype: str, *scales: Model) -> None:
    """Within some units in the last place of the largest number that enters an element."""
    precision, smallest = FORMATS[dtype]
    for name, x in one.items():
        entering = torch.stack([scale[name].double().abs() for scale in (one, other, *scales)])
        largest = entering.amax(dim=0).reshape(-1).tolist()
        off = (x.double() - other[name].double()).abs().reshape(-1).tolist()
        for at, (difference, size) in enumerate(zip(off, largest, strict=True)):
            power = max(exponent(Fraction(size)), smallest) if size else smallest
            unit = Fraction(2) ** (power - precision + 1)
            assert Fraction(difference) <= ulps * unit, f"{name}[{at}] is {difference} off"


# ---------------------------------------------------------------- the linear family


@DTYPE
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_linear_of_equal_weights_is_the_average(dtype: str, k: int) -> None:
    models, _ = family(k, dtype)
    assert equal(copied(merge(models, strategy="linear")), copied(merge(models, strategy="weight_average")))


@DTYPE
@pytest.mark.parametrize(
    ("k", "share"), [(2, "0.5"), (3, "0." + "3" * 40), (4, "0.25"), (7, "0.142857142857142857142857")]
)
def test_task_arithmetic_with_lambda_one_kth_is_the_average(dtype: str, k: int, share: str) -> None:
    models, base = family(k, dtype)
    one = copied(merge(models, strategy="task_arithmetic", base=base, lambda_=share))
    require_close(one, copied(merge(models, strategy="weight_average")), 2, dtype, base, *models)


@DTYPE
def test_task_arithmetic_goes_forth_and_back(dtype: str) -> None:
    """lambda = 0 is the base, 1 the model, and -1 as far on the other side."""
    (one,), base = family(1, dtype)
    assert same_values(merged("task_arithmetic", [one], base, lambda_=0), base)
    require_close(merged("task_arithmetic", [one], base), one, 1, dtype, base)
    there, back = (merged("task_arithmetic", [one], base, lambda_=way) for way in (1, -1))
    middle: Model = {name: ((there[name].double() + back[name].double()) / 2).to(STORED[dtype]) for name in base}
    require_close(middle, base, 1, dtype, there, back)


@DTYPE
@pytest.mark.parametrize("strategy", ["weight_average", "linear", "task_arithmetic"])
def test_a_model_that_comes_twice_is_one_of_twice_the_weight(dtype: str, strategy: str) -> None:
    (a, b), base = family(2, dtype)
    once = merged(strategy, [a, b], base, weights=["2", "0.3"])
    assert equal(merged(strategy, [a, a, b], base, weights=["1", "1", "0.3"]), once)


@DTYPE
@pytest.mark.parametrize("strategy", ["weight_average", "linear", "slerp"])
def test_weights_of_a_mean_matter_by_their_ratios(dtype: str, strategy: str) -> None:
    models, _ = family(3, dtype)
    assert equal(merged(strategy, models, weights=[1, 3, 5]), merged(strategy, models, weights=[4, 12, 20]))


@DTYPE
def test_a_weight_of_one_and_zeros_is_the_first_model(dtype: str) -> None:
    models, _ = family(3, dtype)
    for strategy in ("weight_average", "linear", "slerp"):
        assert same_values(merged(strategy, models, weights=[1, 0, 0]), models[0])


# ---------------------------------------------------------------- slerp


@DTYPE
def test_slerp_ends_at_its_ends(dtype: str) -> None:
    a, b = family(2, dtype)[0]
    assert same_values(copied(merge([a, b], strategy="slerp", t=0)), a)
    assert same_values(copied(merge([a, b], strategy="slerp", t=1)), b)


@DTYPE
def test_slerp_of_parallel_tensors_is_the_straight_line(dtype: str) -> None:
    a = model(1, dtype)
    doubled = times(a, 2.0)
    weights = ["0.75", "0.25"]
    assert equal(merged("slerp", [a, doubled], weights=weights), merged("linear", [a, doubled], weights=weights))


def test_slerp_keeps_equal_norms_and_halves_the_angle() -> None:
    rng = np.random.default_rng(4)
    a, b = (x / np.linalg.norm(x) for x in rng.standard_normal((2, 5000)))
    s = copied(merge([{"w": torch.from_numpy(a)}, {"w": torch.from_numpy(b)}], strategy="slerp"))["w"].numpy()
    assert np.linalg.norm(s) == pytest.approx(1.0, abs=1e-14)
    assert float(s @ a) == pytest.approx(float(s @ b), abs=1e-14)


@DTYPE
def test_folding_two_is_slerp_of_two(dtype: str) -> None:
    models, _ = family(2, dtype)
    weights = ["0.3", "1"]
    one = merged("slerp", models, weights=weights, reduce="fold")
    assert equal(one, merged("slerp", models, weights=weights, reduce="karcher"))


@DTYPE
def test_slerp_of_task_vectors_over_zero_is_slerp_of_weights(dtype: str) -> None:
    models, base = family(3, dtype)
    one = merged("slerp", models, constant(base), space="task_vectors")
    assert same_values(one, merged("slerp", models))


@DTYPE
def test_the_karcher_mean_of_two_halves_is_slerp_in_the_middle(dtype: str) -> None:
    """Two models, each twice: the same direction; norms are averaged, so those are made equal."""
    rng = np.random.default_rng(6)
    a, b = (stored(x / np.linalg.norm(x), dtype) for x in rng.standard_normal((2, 512)))
    b = b * (a.double().norm() / b.double().norm()).item() if dtype == "F64" else b
    two = merged("slerp", [{"w": a}, {"w": b}])
    four = merged("slerp", [{"w": a}, {"w": b}, {"w": a}, {"w": b}])
    scale: Model = {"w": torch.full_like(a, 0.1)}
    require_close(two, four, 64 if dtype == "F64" else 2, dtype, scale)


# ---------------------------------------------------------------- ties, dare, magmax


@DTYPE
@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_ties_of_whole_task_vectors_of_one_sign_is_the_average(dtype: str, elect: str, k: int) -> None:
    base = model(1, dtype)
    towards = model(2, dtype)
    models = [{name: x + towards[name].sign() * (i + 1) * 0.125 for name, x in base.items()} for i in range(k)]
    one = copied(merge(models, strategy="ties", base=base, density=1, elect=elect))
    require_close(one, copied(merge(models, strategy="weight_average")), 1, dtype, base, *models)


@DTYPE
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_of_one_model_is_task_arithmetic_of_what_was_kept(dtype: str, scope: str) -> None:
    (one,), base = family(1, dtype)
    masks = oracles.trim_masks([dict(one)], dict(base), Fraction(3, 10), scope == "model")
    trimmed: Model = {
        name: torch.where(torch.tensor(masks[name][0], dtype=torch.bool).reshape(x.shape), x, base[name])
        for name, x in one.items()
    }
    found = copied(merge([one], strategy="ties", base=base, density="0.3", scope=scope))
    assert same_values(found, copied(merge([trimmed], strategy="task_arithmetic", base=base)))


@DTYPE
@pytest.mark.parametrize("k", [1, 3])
def test_dare_that_drops_nothing_is_task_arithmetic(dtype: str, k: int) -> None:
    models, base = family(k, dtype)
    one = copied(merge(models, strategy="dare", base=base, drop=0, lambda_="0.3"))
    other = copied(merge(models, strategy="task_arithmetic", base=base, lambda_="0.3"))
    require_close(one, other, 1, dtype, base, *models)


@DTYPE
@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("elect", ["sum", "count"])
def test_dare_ties_that_drops_nothing_is_ties_that_trims_nothing(dtype: str, combine: str, elect: str) -> None:
    models, base = family(3, dtype)
    how: dict[str, Any] = {"base": base, "combine": combine, "elect": elect, "lambda_": "0.7"}
    one = copied(merge(models, strategy="dare_ties", drop=0, **how))
    assert equal(one, copied(merge(models, strategy="ties", density=1, **how)))


@DTYPE
def test_dare_ties_of_one_model_is_dare(dtype: str) -> None:
    (one,), base = family(1, dtype)
    how: dict[str, Any] = {"base": base, "density": "0.4", "seed": 7}
    assert equal(copied(merge([one], strategy="dare_ties", **how)), copied(merge([one], strategy="dare", **how)))


@DTYPE
def test_magmax_of_two_is_ties_that_takes_the_largest_of_what_agrees(dtype: str) -> None:
    """The sign of a sum of two is that of the larger one: the unified vector of EMR for two models."""
    models, base = family(2, dtype)
    one = copied(merge(models, strategy="magmax", base=base, lambda_="0.5"))
    other = copied(merge(models, strategy="ties", base=base, density=1, combine="max", lambda_="0.5"))
    assert same_values(one, other)


@DTYPE
def test_magmax_of_one_model_is_the_model(dtype: str) -> None:
    (one,), base = family(1, dtype)
    require_close(copied(merge([one], strategy="magmax", base=base)), one, 0 if dtype != "F64" else 1, dtype, base)


@DTYPE
@pytest.mark.parametrize("strategy", NEEDS_BASE)
@pytest.mark.parametrize("elect", ["sum", "count"])
def test_a_model_equal_to_the_base_changes_nothing(dtype: str, strategy: str, elect: str) -> None:
    """Its zeros neither vote nor count; the masks of the others belong to them alone."""
    models, base = family(2, dtype)
    params: dict[str, Any] = {"elect": elect} if strategy in ("ties", "dare_ties") else {}
    without = merged(strategy, models, base, ids=[identity(0), identity(1)], **params)
    with_it = merged(strategy, [*models, base], base, ids=[identity(0), identity(1), identity(2)], **params)
    assert same_values(with_it, without)


# ---------------------------------------------------------------- all of them


@EACH
@DTYPE
def test_zeros_are_merged_to_zeros_and_equal_models_to_the_base_they_equal(row: Row, dtype: str) -> None:
    zeros = constant(model(1, dtype))
    assert same_values(merged(row.strategy, [zeros] * 3, zeros, weights=row.weights[:3], **row.params), zeros)
    base = model(2, dtype)
    if row.strategy in NEEDS_BASE:
        assert same_values(merged(row.strategy, [base] * 3, base, weights=row.weights[:3], **row.params), base)


@EACH
@DTYPE
@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_scaling_all_task_vectors_by_a_power_of_two_scales_the_result(row: Row, dtype: str, factor: float) -> None:
    models, base = family(3, dtype)
    if dtype == "F16":  # keep clear of subnormals
        models = [{name: torch.where(x.abs() < 0.01, 0.0, x) for name, x in m.items()} for m in models]
    zeros = constant(base)
    plain = merged(row.strategy, models, zeros, weights=row.weights[:3], out="F64", **row.params)
    scaled = merged(
        row.strategy, [times(m, factor) for m in models], zeros, weights=row.weights[:3], out="F64", **row.params
    )
    assert same_values(scaled, times(plain, factor))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.random], ids=str)
def test_elements_that_change_places_do_so_in_the_result(row: Row) -> None:
    """But for masks, which belong to places; slerp sums in another order then."""
    models, base = family(3, "F32", shapes={"w": (500,)})
    order = torch.from_numpy(np.random.default_rng(1).permutation(500))
    moved = [{"w": m["w"][order]} for m in models]
    one = merged(row.strategy, moved, {"w": base["w"][order]}, weights=row.weights[:3], **row.params)
    other = merged(row.strategy, models, base, weights=row.weights[:3], **row.params)
    require_close(one, {"w": other["w"][order]}, 1 if row.strategy == "slerp" else 0, "F32", base)


@DTYPE
@pytest.mark.parametrize("strategy", ["weight_average", "linear", "slerp"])
def test_one_model_comes_out_as_it_went_in(dtype: str, strategy: str) -> None:
    """Subnormals, the largest numbers and minus zero too."""
    tiny, top = torch.finfo(STORED[dtype]).smallest_normal, torch.finfo(STORED[dtype]).max
    odd = torch.tensor([0.0, -0.0, tiny / 2, -tiny / 4, top, -top, 0.1], dtype=torch.float64).to(STORED[dtype])
    one = {**model(3, dtype), "odd": odd}
    assert equal(copied(merge([one], strategy=strategy)), copied(one))


@EACH
def test_an_empty_tensor_comes_out_empty(row: Row) -> None:
    models, base = family(2, "BF16")
    found = merge(models, strategy=row.strategy, base=base, weights=row.weights[:2], **row.params)["empty"]
    assert found.shape == (0, 3)
    assert found.dtype == torch.bfloat16


@EACH
@DTYPE
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["model", "base"])
def test_what_is_not_finite_is_refused(row: Row, dtype: str, bad: float, where: str) -> None:
    models, base = family(2, dtype)
    spoilt = {name: x.clone() for name, x in (models[1] if where == "model" else base).items()}
    spoilt["weight"][3, 4] = bad
    inputs, origin = ([models[0], spoilt], base) if where == "model" else (models, spoilt)
    with pytest.raises(NonFiniteError, match=r"tensor 'weight' holds 1 values that are NaN or infinite.*index 43"):
        merge(inputs, strategy=row.strategy, base=origin, weights=row.weights[:2], **row.params)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_a_result_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: str, kernels: str) -> None:
    monkeypatch.setenv("CRDTMERGE_KERNELS", kernels)
    top = torch.finfo(STORED[dtype]).max
    one: Model = {"w": torch.tensor([1.0, top, 2.0], dtype=STORED[dtype])}
    two: Model = {"w": torch.tensor([1.0, top, 3.0], dtype=STORED[dtype])}
    how: dict[str, Any] = {"base": constant(one), "lambda_": 3}
    cases: list[tuple[str, dict[str, Any]]] = [("task_arithmetic", {}), ("ties", {"density": 1})]
    for strategy, params in cases:
        with pytest.raises(NonFiniteError, match="tensor 'w': 1 merged values, the first at index 1, are too large"):
            merge([one, two], strategy=strategy, **how, **params)


def test_slerp_refuses_inputs_whose_squares_are_beyond_float64() -> None:
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="tensor 'w': its dot products exceed float64"):
        merged("slerp", [{"w": a * 2.0**600}, {"w": b * 2.0**600}])
