"""karcher, nuslerp, multislerp, model_stock, weight_scope_alignment, arcee_fusion compute what their equations say.

The oracles are numpy on whole vectors in float64, written from the equations, those of mergekit among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import MismatchError, NonFiniteError, ParameterError, UsageError
from crdtmerge.numerics.scalars import acos
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import spherical
from tests.numerics.examples import STORED
from tests.strategies import oracles
from tests.strategies.models import Model, Prepared, constant, copied, equal, family, merged, model
from tests.strategies.oracles import Vector, angle, unit

DTYPES = pytest.mark.parametrize("dtype", STORED)
COUNTS = pytest.mark.parametrize("k", [1, 2, 3, 5])
WEIGHTS = ("1", "0.1", "2.5", "0.3", "7")
EPSILON = {"F64": 1e-11, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
SHAPE = {"w": (9, 11)}


def array(x: torch.Tensor) -> Vector:
    found: Vector = x.double().numpy()
    return found


def close(found: torch.Tensor, wanted: Vector, dtype: str = "F64", size: float = 1.0) -> None:
    """Within a rounding of the dtype of numbers of a size."""
    off = np.abs(array(found) - wanted)
    allowed = EPSILON[dtype] * (np.abs(wanted) + size)
    assert found.shape == wanted.shape
    assert bool((off <= allowed).all()), f"{off.max()} off"


def vectors(*values: Sequence[float]) -> list[Model]:
    return [{"w": torch.tensor(v, dtype=torch.float64)} for v in values]


def share(weights: Sequence[str]) -> list[float]:
    whole = math.fsum(map(float, weights))
    return [float(w) / whole for w in weights]


def summed(terms: Sequence[Vector]) -> Vector:
    found: Vector = np.add.reduce(list(terms))
    return found


# ---------------------------------------------------------------- karcher


@DTYPES
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("space", ["weights", "task_vectors"])
def test_karcher_is_the_point_whose_tangents_sum_to_zero(dtype: str, k: int, space: str) -> None:
    models, base = family(k, dtype)
    found = merged("karcher", models, base, weights=WEIGHTS[:k], space=space)
    for name in base:
        origin = array(base[name]).reshape(-1) if space == "task_vectors" else np.zeros(base[name].numel())
        xs = [array(one[name]).reshape(-1) - origin for one in models]
        wanted = oracles.karcher(xs, [float(w) for w in WEIGHTS[:k]]) if base[name].numel() else origin
        close(found[name].reshape(-1), origin + wanted, dtype)


def mergekit_karcher(xs: Sequence[Vector], max_iter: int, tol: float) -> Vector:
    norms = [float(np.linalg.norm(x)) for x in xs]
    units = [x / n for x, n in zip(xs, norms, strict=True)]
    u = unit(summed(units) / len(xs))
    for _ in range(max_iter):
        step = np.zeros_like(u)
        for one in units:
            theta = math.acos(max(-1.0, min(1.0, float(u @ one))))
            if theta >= tol:
                step = step + theta / math.sin(theta) * (one - float(u @ one) * u) / len(xs)
        length = float(np.linalg.norm(step))
        if length < tol:
            break
        u = unit(math.cos(length) * u + math.sin(length) * step / length)
    return u * math.fsum(norms) / len(xs)


@pytest.mark.parametrize("max_iter", [0, 1, 2, 10])
@pytest.mark.parametrize("scale", [0.02, 0.5, 2.0])
def test_karcher_of_few_steps_is_mergekits(max_iter: int, scale: float) -> None:
    base = model(3, "F64")
    models = [model(4 + i, "F64", around=base, scale=scale) for i in range(4)]
    found = merged("karcher", models, max_iter=max_iter, tolerance="1e-5")
    for name in ("bias", "weight"):
        xs = [array(one[name]).reshape(-1) for one in models]
        close(found[name].reshape(-1), mergekit_karcher(xs, max_iter, 1e-5), size=100.0)


def test_more_steps_of_karcher_come_nearer_until_the_tolerance() -> None:
    models = [model(i, "F64", shapes={"w": (60,)}) for i in range(3)]
    xs = [array(one["w"]) for one in models]
    exact = oracles.karcher(xs, [1.0, 1.0, 1.0])
    off = [np.abs(array(merged("karcher", models, max_iter=n)["w"]) - exact).max() for n in (0, 3, 10, 100)]
    assert off[0] > 10 * off[1] > 100 * off[2]
    assert off[3] < 1e-11


def test_karcher_of_a_tight_cluster_keeps_the_mean_norm_and_lies_in_the_middle() -> None:
    """Cosines nearer to one than the root of a rounding: steps cannot be measured by dot products any more."""
    base = model(1, "F64", shapes={"w": (500,)})
    for scale in (1e-3, 1e-6, 1e-9):
        models = [model(2 + i, "F64", around=base, scale=scale, shapes={"w": (500,)}) for i in range(3)]
        found = array(merged("karcher", models)["w"])
        xs = [array(one["w"]) for one in models]
        assert abs(np.linalg.norm(found) - np.mean([np.linalg.norm(x) for x in xs])) < 1e-12 * 25
        close(merged("karcher", models)["w"], np.mean(xs, axis=0), size=10 * scale**2 / 1e-11 + 1)


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9])
def test_karcher_of_a_tight_cluster_takes_few_steps(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    angles: list[float] = []

    def counted(x: float) -> float:
        angles.append(acos(x))
        return angles[-1]

    monkeypatch.setattr(spherical, "acos", counted)
    base = model(1, "F64", shapes=SHAPE)
    merged("karcher", [model(2 + i, "F64", around=base, scale=scale, shapes=SHAPE) for i in range(3)])
    assert len(angles) <= 3 * 5


@pytest.mark.parametrize("weights", [("1", "1"), ("0.7", "0.3"), ("1", "5")])
def test_karcher_of_two_models_of_equal_norms_is_slerp(weights: tuple[str, str]) -> None:
    models = [{n: x / x.norm() for n, x in one.items()} for one in family(2, "F64", scale=0.5, shapes=SHAPE)[0]]
    found, other = merged("karcher", models, weights=weights), merged("slerp", models, weights=weights)
    assert torch.allclose(found["w"], other["w"], rtol=0, atol=1e-14)


def test_a_zero_model_has_no_direction_and_counts_for_the_length() -> None:
    a, b, zero = vectors([3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0])
    found = merged("karcher", [a, b, zero])["w"]
    close(found, np.array([1.0, 1.0, 0.0]) * 2.0 / math.sqrt(2.0))
    assert merged("karcher", [zero, zero])["w"].tolist() == [0.0, 0.0, 0.0]


def test_a_model_of_weight_zero_does_not_turn_the_mean() -> None:
    a, b = vectors([3.0, 0.0], [-3.0, 1e-9])
    close(merged("karcher", [a, b], weights=["1", "0"])["w"], np.array([3.0, 0.0]))


def test_directions_that_balance_have_no_karcher_mean() -> None:
    models = vectors([1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)])
    with pytest.raises(MismatchError, match=r"'w'.*opposite directions"):
        merged("karcher", models)


# ---------------------------------------------------------------- nuslerp


def mergekit_nuslerp(v: Vector, w: Vector, t: float) -> Vector:
    """Rows of [r, n] interpolated one by one."""
    found = []
    for a, b in zip(v, w, strict=True):
        sizes = max(float(np.linalg.norm(a)), 1e-7), max(float(np.linalg.norm(b)), 1e-7)
        theta = math.acos(max(-1.0, min(1.0, float(a @ b) / sizes[0] / sizes[1])))
        if abs(math.sin(theta)) < 1e-8:
            found.append((1 - t) * a + t * b)
        else:
            found.append((math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta))
    return np.array(found).reshape(v.shape)


SHAPES3: dict[str, tuple[int, ...]] = {
    "m": (5, 7),
    "cube": (3, 4, 2),
    "v": (9,),
    "one": (1,),
    "column": (4, 1),
    "s": (),
}


def pieces(x: Vector, granularity: str) -> Vector:
    if granularity == "tensor" or x.ndim < 2:
        return x.reshape(1, -1)
    return x.reshape(-1, x.shape[-1]) if granularity == "row" else np.moveaxis(x, 0, -1).reshape(-1, x.shape[0])


def joined(x: Vector, shape: tuple[int, ...], granularity: str) -> Vector:
    if granularity == "column" and len(shape) > 1:
        return np.moveaxis(x.reshape(*shape[1:], shape[0]), -1, 0)
    return x.reshape(shape)


@DTYPES
@pytest.mark.parametrize("weights", [("1", "1"), ("0.7", "0.3"), ("3", "0.5"), ("0", "1")])
@pytest.mark.parametrize("space", ["weights", "task_vectors"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_nuslerp_is_mergekits_formula(dtype: str, weights: tuple[str, str], space: str, granularity: str) -> None:
    models, base = family(2, dtype, shapes=SHAPES3)
    found = merged("nuslerp", models, base, weights=weights, space=space, granularity=granularity)
    for name, shape in SHAPES3.items():
        origin = array(base[name]) if space == "task_vectors" else np.zeros(shape)
        v, w = (pieces(array(one[name]) - origin, granularity) for one in models)
        wanted = origin + joined(mergekit_nuslerp(v, w, share(weights)[1]), shape, granularity)
        close(found[name], wanted, dtype)


def test_rows_and_columns_turn_each_by_its_own_angle() -> None:
    """Rows: a right angle; one line. Columns: beside nothing, which counts as a right angle; (0, 2) and (1, 4)."""
    a: Model = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)}
    b: Model = {"w": torch.tensor([[0.0, 1.0], [0.0, 4.0]], dtype=torch.float64)}
    half = math.sqrt(0.5)
    close(merged("nuslerp", [a, b], granularity="row")["w"], np.array([[half, half], [0.0, 3.0]]))
    theta = math.atan2(1.0, 4.0)
    right = np.array([1.0, 6.0]) * math.sin(theta / 2) / math.sin(theta)
    close(merged("nuslerp", [a, b], granularity="column")["w"], np.array([[half, right[0]], [0.0, right[1]]]))


@pytest.mark.parametrize("degrees", [0.001, 0.3, 90, 179.5])
def test_small_and_large_angles_are_turned_by_their_share(degrees: float) -> None:
    third, whole = math.radians(degrees) / 3, math.radians(degrees)
    a, b = vectors([1.0, 0.0], [math.cos(whole), math.sin(whole)])
    wanted = np.array([math.cos(third), math.sin(third)])
    close(merged("nuslerp", [a, b], weights=["2", "1"])["w"], wanted, size=10.0)


@pytest.mark.parametrize("granularity", ["tensor", "row", "column"])
def test_on_a_line_nuslerp_is_straight(granularity: str) -> None:
    a = model(5, "F64", shapes=SHAPE)
    twice = {"w": a["w"] * 2.0}
    close(merged("nuslerp", [a, twice], weights=["1", "3"], granularity=granularity)["w"], array(a["w"]) * 1.75)
    opposite = {"w": -a["w"]}
    close(merged("nuslerp", [a, opposite], weights=["1", "3"], granularity=granularity)["w"], array(a["w"]) * -0.5)
    zero = constant(a)
    close(merged("nuslerp", [zero, zero], granularity=granularity)["w"], np.zeros((9, 11)))


def test_nuslerp_merges_two_models_and_no_more() -> None:
    models, _ = family(3)
    assert equal(merged("nuslerp", models[:1], granularity="row"), models[0])
    with pytest.raises(UsageError, match="merges 1 to 2 models; 3 given"):
        merge(models, strategy="nuslerp")


def test_the_weights_of_nuslerp_must_not_sum_to_zero() -> None:
    models, _ = family(2)
    for granularity in ("tensor", "row"):
        with pytest.raises(UsageError, match="sum to"):
            merged("nuslerp", models, weights=["0", "0"], granularity=granularity)


# ---------------------------------------------------------------- multislerp


def mergekit_multislerp(xs: Sequence[Vector], w: Sequence[float], eps: float = 1e-8) -> Vector:
    """Tangent vectors at the normalised mean, their weighted mean, and back to the sphere."""
    norms = [float(np.linalg.norm(x)) for x in xs]
    units = [x / (n + eps) for x, n in zip(xs, norms, strict=True)]
    mean = unit(summed([c * u for c, u in zip(w, units, strict=True)]))
    tangent = summed([c * (u - float(u @ mean) * mean) for c, u in zip(w, units, strict=True)])
    length = float(np.linalg.norm(tangent)) + eps
    on_sphere = mean * math.cos(length) + tangent * (math.sin(length) / length)
    return on_sphere * math.fsum(c * n for c, n in zip(w, norms, strict=True))


@DTYPES
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("space", ["weights", "task_vectors"])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_is_mergekits_formula(dtype: str, k: int, space: str, normalize: bool) -> None:
    models, base = family(k, dtype, scale=0.7)
    found = merged("multislerp", models, base, weights=WEIGHTS[:k], space=space, normalize=normalize)
    w = share(WEIGHTS[:k]) if normalize else [float(one) for one in WEIGHTS[:k]]
    for name in ("bias", "weight"):
        origin = array(base[name]) if space == "task_vectors" else np.zeros(base[name].shape)
        xs = [(array(one[name]) - origin).reshape(-1) for one in models]
        wanted = origin + mergekit_multislerp(xs, w).reshape(origin.shape)
        close(found[name], wanted, dtype, size=10.0 if normalize else 100.0)


@pytest.mark.parametrize("k", [2, 3])
def test_what_no_model_has_changed_stays_as_it_is(k: int) -> None:
    """mergekit refuses three models here."""
    base = model(1)
    assert equal(merged("multislerp", [base] * k, base, space="task_vectors"), base)


def test_where_the_directions_balance_multislerp_is_the_weighted_mean() -> None:
    models = vectors([2.0, 0.0], [-1.0, 0.75**0.5 * 2], [-1.0, -(0.75**0.5) * 2])
    close(merged("multislerp", models)["w"], np.zeros(2))
    a, opposite = vectors([1.0, 2.0], [-3.0, -6.0])
    close(merged("multislerp", [a, opposite])["w"], np.array([-1.0, -2.0]))
    close(merged("multislerp", [a, opposite], weights=["3", "1"])["w"], np.array([1.0, 2.0]) * 1.5)


def test_multislerp_has_the_mean_length_and_the_mean_direction() -> None:
    models, _ = family(4, "F64")
    xs = [array(one["weight"]).reshape(-1) for one in models]
    found = array(merged("multislerp", models)["weight"]).reshape(-1)
    assert np.linalg.norm(found) == pytest.approx(np.mean([np.linalg.norm(x) for x in xs]), rel=1e-12)
    assert angle(unit(found), unit(summed([unit(x) for x in xs]))) < 1e-7


# ---------------------------------------------------------------- model_stock


def stock(xs: Sequence[Vector], base: Vector, w: Sequence[str], floor: float = 0.0) -> Vector:
    """One vector each: the paper's t, with pairs and the number of models weighted."""
    a = share(w)
    taus = [x - base for x in xs]
    mean = summed([c * tau for c, tau in zip(a, taus, strict=True)])
    pairs = [(i, j) for i in range(len(xs)) for j in range(i)]
    mass = math.fsum(a[i] * a[j] for i, j in pairs)
    if not mass:
        return base + mean
    total = 0.0
    for i, j in pairs:
        size = max(float(np.linalg.norm(taus[i]) * np.linalg.norm(taus[j])), floor)
        total += a[i] * a[j] / mass * (float(taus[i] @ taus[j]) / size if size else 0.0)
    c, k = max(0.0, min(1.0, total)), 1.0 / math.fsum(v * v for v in a)
    return base + k * c / (1.0 + (k - 1.0) * c) * mean


@DTYPES
@COUNTS
@pytest.mark.parametrize("equal_weights", [True, False])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_goes_as_far_as_the_angle_says(dtype: str, k: int, equal_weights: bool, filter_wise: bool) -> None:
    common = model(9, "F64", scale=0.3)
    base = model(8, dtype)
    models = [
        {n: (base[n].double() + common[n] + x).to(base[n].dtype) for n, x in model(i, "F64", scale=0.3).items()}
        for i in range(k)
    ]
    w = ["1"] * k if equal_weights else list(WEIGHTS[:k])
    found = merged("model_stock", models, base, weights=w, filter_wise=filter_wise)
    for name in base:
        shape = base[name].shape
        cut = "row" if filter_wise else "tensor"
        if not base[name].numel():
            continue
        rows = [pieces(array(one[name]), cut) for one in (*models, base)]
        wanted = [stock([x[r] for x in rows[:-1]], rows[-1][r], w) for r in range(len(rows[0]))]
        close(found[name], np.array(wanted).reshape(tuple(shape)), dtype)


@pytest.mark.parametrize("epsilon", ["0", "1e-6", "100"])
def test_the_least_product_of_norms_is_mergekits_clamp(epsilon: str) -> None:
    models, base = family(3, "F64")
    found = merged("model_stock", models, base, epsilon=epsilon)
    for name in ("bias", "weight"):
        xs = [array(one[name]).reshape(-1) for one in models]
        close(found[name].reshape(-1), stock(xs, array(base[name]).reshape(-1), ["1"] * 3, float(epsilon)))


def test_two_models_at_sixty_degrees_go_two_thirds_of_the_way() -> None:
    """t = 2c / (1 + c)."""
    base, a, b = vectors([1.0, 1.0], [3.0, 1.0], [2.0, 1.0 + math.sqrt(3.0)])
    close(merged("model_stock", [a, b], base)["w"], np.array([1.0, 1.0]) + 2 / 3 * np.array([1.5, math.sqrt(0.75)]))


def test_nothing_in_common_is_the_base_and_everything_is_the_model() -> None:
    base, a, b, c = vectors([0.5, 0.5], [1.5, 0.5], [0.5, 1.5], [-0.5, 0.5])
    assert equal(merged("model_stock", [a, b], base), base)
    assert equal(merged("model_stock", [a, c], base), base), "not beyond the base"
    close(merged("model_stock", [a, a, a], base)["w"], array(a["w"]))
    assert equal(merged("model_stock", [a], base), a)
    assert equal(merged("model_stock", [base, base], base), base)
    close(merged("model_stock", [a, b], base, weights=["1", "0"])["w"], array(a["w"]))


@pytest.mark.parametrize("weights", [("1", "1", "1", "1"), ("4", "2", "1", "1"), ("10", "1", "1", "1")])
def test_t_is_the_step_along_the_mean_that_comes_nearest_to_the_centre(weights: tuple[str, ...]) -> None:
    """Models scattered about a centre: no other point between base and weighted mean lies nearer to it (1/sqrt(n))."""
    n = 40_000
    rng = np.random.default_rng(7)
    centre = rng.standard_normal(n)
    taus = [centre + 1.5 * rng.standard_normal(n) for _ in range(4)]
    mean = summed([a * tau for a, tau in zip(share(weights), taus, strict=True)])
    base: Model = {"w": torch.zeros(n, dtype=torch.float64)}
    found = array(merged("model_stock", [{"w": torch.tensor(tau)} for tau in taus], base, weights=weights)["w"])
    best = float(centre @ mean) / float(mean @ mean)
    assert float(found @ mean) / float(mean @ mean) == pytest.approx(best, abs=0.02)


# ---------------------------------------------------------------- weight scope alignment


def aligned(xs: Sequence[Vector], base: Vector, w: Sequence[str], target: str, restore: bool) -> Vector:
    a = share(w)
    mu, sigma = [float(x.mean()) for x in xs], [float(x.std()) for x in xs]
    goal = {
        "mean": (np.dot(a, mu), np.dot(a, sigma)),
        "rms": (np.dot(a, mu), math.sqrt(np.dot(a, np.square(sigma)))),
        "median": (np.median(mu), np.median(sigma)),
        "base": (base.mean(), base.std()),
    }[target]
    made = summed([c * ((x - m) / s * goal[1] + goal[0]) for c, x, m, s in zip(a, xs, mu, sigma, strict=True)])
    return (made - made.mean()) / made.std() * goal[1] + goal[0] if restore else made


@DTYPES
@COUNTS
@pytest.mark.parametrize("target", ["mean", "rms", "median", "base"])
@pytest.mark.parametrize("restore", [False, True])
def test_scopes_are_aligned_and_averaged(dtype: str, k: int, target: str, restore: bool) -> None:
    base = model(1, dtype, shapes=SHAPE)
    models = [{"w": (model(5 + i, "F64", shapes=SHAPE)["w"] * (1 + i) + 0.1 * i).to(STORED[dtype])} for i in range(k)]
    found = merged("weight_scope_alignment", models, base, weights=WEIGHTS[:k], target=target, restore_scope=restore)[
        "w"
    ]
    xs = [array(one["w"]) for one in models]
    close(found, aligned(xs, array(base["w"]), WEIGHTS[:k], target, restore), dtype, size=4.0)


def test_moments_of_many_blocks_are_those_of_the_whole_tensor() -> None:
    shape: dict[str, tuple[int, ...]] = {"w": (3, 50_001)}
    models = [{"w": x["w"] * (1.0 + i) + i} for i, x in enumerate(model(i, "F64", shapes=shape) for i in range(3))]
    wanted = aligned([array(one["w"]) for one in models], np.zeros(1), ["1"] * 3, "mean", True)
    for stretch in (65_536, 131_072):
        found = Prepared("weight_scope_alignment", models, restore_scope=True, stretch=stretch).run()["w"]
        close(found, wanted)


def test_equal_scopes_are_the_average() -> None:
    models = [{"w": (x["w"] - x["w"].mean()) / x["w"].std(unbiased=False)} for x in family(4, "F64", shapes=SHAPE)[0]]
    found, other = (merged(name, models, weights=WEIGHTS[:4])["w"] for name in ("weight_scope_alignment", "linear"))
    assert torch.allclose(found, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_the_mean_of_independent_models_is_narrower_and_is_widened_again(k: int) -> None:
    models = [model(i, "F64", shapes={"w": (200, 300)}) for i in range(k)]
    narrow = merged("weight_scope_alignment", models)["w"]
    wide = merged("weight_scope_alignment", models, restore_scope=True)["w"]
    deviation = float(np.mean([array(one["w"]).std() for one in models]))
    assert float(narrow.std(unbiased=False)) == pytest.approx(deviation / math.sqrt(k), rel=0.01)
    assert float(wide.std(unbiased=False)) == pytest.approx(deviation, rel=1e-12)
    assert float(wide.mean()) == pytest.approx(float(narrow.mean()), abs=1e-12)


def test_scale_and_shift_of_a_model_do_not_enter_where_the_scope_is_the_bases() -> None:
    models, base = family(3, "F64", shapes=SHAPE)
    other = [
        {"w": one["w"] * factor + shift} for one, factor, shift in zip(models, (1, 7, 0.1), (0, 3, -2), strict=True)
    ]
    found = [merged("weight_scope_alignment", some, base, target="base")["w"] for some in (models, other)]
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-12)
    assert not torch.allclose(merged("linear", models)["w"], merged("linear", other)["w"], rtol=0, atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.1, 123456789.123, 1e30 / 3])
def test_a_tensor_that_is_constant_somewhere_is_averaged_as_it_is(value: float) -> None:
    varied = model(1, "F64", shapes=SHAPE)
    models = [constant(varied, value), varied]
    for restore in (False, True):
        found = merged("weight_scope_alignment", models, restore_scope=restore)
        assert equal(found, merged("weight_average", models))


def test_tensors_of_one_dimension_are_aligned_on_request() -> None:
    models = [{"v": x["v"] * (1.0 + i)} for i, x in enumerate(family(3, "F64", shapes={"v": (50,)})[0])]
    assert equal(merged("weight_scope_alignment", models), merged("weight_average", models))
    found = merged("weight_scope_alignment", models, vectors=True)["v"]
    close(found, aligned([array(one["v"]) for one in models], np.zeros(1), ["1"] * 3, "mean", False))


def test_a_variance_beyond_float64_is_refused() -> None:
    wide: Model = {"w": torch.tensor([[1e200, -1e200]], dtype=torch.float64)}
    with pytest.raises(NonFiniteError, match=r"'w'.*variance exceeds"):
        merged("weight_scope_alignment", [wide, wide])
    for strategy in ("karcher", "nuslerp", "multislerp", "model_stock"):
        with pytest.raises(NonFiniteError, match=f"{strategy} knows no angle"):
            merged(strategy, [wide, wide], constant(wide))


# ---------------------------------------------------------------- arcee fusion


def fused(x: Vector, base: Vector, spread: float = 1.5, eps: float = 1e-8) -> tuple[Vector, Vector]:
    """The kept task vector of one model, and how far each importance is from the threshold."""
    x, base = (v.reshape(1, -1) if v.ndim < 2 else v for v in (x, base))

    def softmax(v: Vector) -> Vector:
        e = np.exp(v - v.max(axis=-1, keepdims=True))
        probability: Vector = e / e.sum(axis=-1, keepdims=True) + eps
        return probability

    p, q = softmax(x), softmax(base)
    divergence = np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0.0)
    importance = np.abs(x - base) * divergence
    flat = np.sort(importance.reshape(-1))
    last = len(flat) - 1
    low, middle, high = (flat[math.floor(q * last)] for q in (0.25, 0.5, 0.75))
    threshold = middle + spread * (high - low)
    return np.where(importance >= threshold, x - base, 0.0), importance / threshold - 1.0


SHAPES_FUSED: dict[str, tuple[int, ...]] = {"m": (13, 17), "cube": (3, 4, 5), "v": (41,)}


@DTYPES
@COUNTS
@pytest.mark.parametrize("spread", ["1.5", "0", "-0.3"])
def test_arcee_fusion_keeps_what_lies_above_the_quartiles(dtype: str, k: int, spread: str) -> None:
    models, base = family(k, dtype, shapes=SHAPES_FUSED)
    found = merged("arcee_fusion", models, base, weights=WEIGHTS[:k], spread=spread)
    for name, shape in SHAPES_FUSED.items():
        made = [fused(array(one[name]), array(base[name]), float(spread)) for one in models]
        sure = np.logical_and.reduce([(np.abs(off) > 1e-9) | (off == 0) for _, off in made]).reshape(shape)
        assert sure.mean() > 0.95
        kept = summed([a * tau for a, (tau, _) in zip(share(WEIGHTS[:k]), made, strict=True)]).reshape(shape)
        close(found[name][torch.tensor(sure)], (array(base[name]) + kept)[sure], dtype)
        if k == 1 and spread == "1.5":
            assert 0.0 < (kept != 0).mean() < 0.3


def test_a_row_that_does_not_diverge_is_not_kept() -> None:
    """The first row moves by a constant, which softmax does not see: its many changes weigh nothing."""
    base: Model = {"w": torch.zeros(2, 4, dtype=torch.float64)}
    one: Model = {"w": torch.tensor([[9.0, 9.0, 9.0, 9.0], [0.2, 0.0, -0.1, 1.0]], dtype=torch.float64)}
    assert merged("arcee_fusion", [one], base)["w"].tolist() == [[0.0] * 4, [0.2, 0.0, 0.0, 1.0]]


def test_unchanged_and_lone_elements_are_those_of_the_model() -> None:
    models, base = family(2)
    assert equal(merged("arcee_fusion", [base], base), base)
    found = merged("arcee_fusion", models, base)
    for name in ("one", "scalar"):
        assert torch.allclose(found[name], (models[0][name] + models[1][name]) / 2, rtol=1e-6)


# ---------------------------------------------------------------- all


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("karcher", {"max_iter": -1}, "max_iter"),
    ("karcher", {"tolerance": 0}, "tolerance"),
    ("nuslerp", {"granularity": "layer"}, "granularity"),
    ("nuslerp", {"epsilon": 0}, "epsilon"),
    ("multislerp", {"epsilon": "-1"}, "epsilon"),
    ("model_stock", {"epsilon": "-1"}, "epsilon"),
    ("model_stock", {"t": "0.5"}, "no parameter 't'"),
    ("weight_scope_alignment", {"target": "unit"}, "target"),
    ("weight_scope_alignment", {"epsilon": "-0.1"}, "epsilon"),
    ("arcee_fusion", {"epsilon": 0}, "epsilon"),
    ("arcee_fusion", {"spread": "wide"}, "spread"),
]


@pytest.mark.parametrize(("strategy", "params", "said"), BAD, ids=str)
def test_bad_parameters_are_refused_with_a_sentence(strategy: str, params: dict[str, Any], said: str) -> None:
    models, base = family(2)
    with pytest.raises(ParameterError, match=rf"strategy '{strategy}'.*{said}.*\."):
        merged(strategy, models, base, **params)


PER_TENSOR: list[tuple[str, str, Any]] = [
    ("karcher", "space", "task_vectors"),
    ("nuslerp", "granularity", "row"),
    ("multislerp", "space", "task_vectors"),
    ("model_stock", "filter_wise", True),
    ("weight_scope_alignment", "restore_scope", True),
    ("arcee_fusion", "spread", "0.1"),
]


@pytest.mark.parametrize(("strategy", "name", "value"), PER_TENSOR)
def test_a_parameter_for_one_tensor_changes_that_tensor_alone(strategy: str, name: str, value: Any) -> None:
    models, base = family(2)
    run: Callable[..., Model] = lambda **how: copied(merge(models, strategy=strategy, base=base, **how))  # noqa: E731
    plain, special = run(), run(**{name: value})
    mixed = run(**{name: [{"filter": "weight", "value": value}]})
    assert equal(mixed, {tensor: (special if tensor == "weight" else plain)[tensor] for tensor in plain})
    assert not equal(plain, special)
