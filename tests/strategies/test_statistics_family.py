"""fisher_merge, regression_mean and led_merge compute what their equations say, of the statistics that are given.

The oracles are fractions for what is elementwise, numpy's least squares and solvers for matrices, sets for elections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdtmerge.errors import InputError, MismatchError, NeedsError, ParameterError, UsageError
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import whole_tensors
from tests.numerics.examples import STORED
from tests.strategies import oracles
from tests.strategies.models import SHAPES, Model, constant, copied, equal, family, merged, model
from tests.strategies.oracles import DOUBLE, exact

Array = NDArray[np.float64]
DTYPES = pytest.mark.parametrize("dtype", STORED)
COUNTS = pytest.mark.parametrize("k", [1, 2, 3, 5])
WEIGHTS = ("1", "0.1", "2.5", "0.3", "7")
SIGNED = ("1", "-0.7", "2.5", "0.3", "-1.1")


def array(x: torch.Tensor) -> Array:
    found: Array = x.double().numpy()
    return found


def tensor(x: Array | Sequence[float]) -> torch.Tensor:
    return torch.tensor(np.asarray(x, np.float64))


def positive(number: int, like: Model) -> Model:
    """Statistics over many binades, a fifth of them zero."""
    rng = np.random.default_rng(number)
    made = {}
    for name in sorted(like):
        shape = tuple(like[name].shape)
        x = rng.random(shape) * np.exp2(rng.integers(-25, 4, shape)) * (rng.random(shape) > 0.2)
        made[name] = torch.tensor(np.asarray(x), dtype=torch.float32).reshape(shape)
    return made


def share(weights: Sequence[str]) -> list[float]:
    whole = math.fsum(map(float, weights))
    return [float(w) / whole for w in weights]


def close(found: torch.Tensor, wanted: Array, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape
    off = np.abs(array(found) - wanted)
    assert bool((off <= tolerance * (1.0 + np.abs(wanted))).all()), f"{off.max()} off"


# ---------------------------------------------------------------- fisher


def norm_of(f: Mapping[str, Sequence[Fraction]], name: str | None) -> Fraction:
    """The norm over a tensor or the model, as a fraction good to 1e-15 of it."""
    entries = [v for tensor_, values in f.items() if name in (None, tensor_) for v in values]
    return Fraction(math.sqrt(sum(v * v for v in entries))) or Fraction(1)


@DTYPES
@COUNTS
@pytest.mark.parametrize("normalize", ["none", "model", "tensor"])
@pytest.mark.parametrize("floor", ["1e-6", "0.01"])
def test_fisher_merge_is_the_fraction_of_its_two_sums(dtype: str, k: int, normalize: str, floor: str) -> None:
    models, _ = family(k, dtype)
    fishers = [positive(10 + i, models[0]) for i in range(k)]
    stats = [{"fisher": f} for f in fishers]
    found = merged("fisher_merge", models, weights=WEIGHTS[:k], stats=stats, normalize=normalize, floor=floor)
    floored = [{name: [max(v, Fraction(floor)) for v in exact(x)] for name, x in f.items()} for f in fishers]
    decided = 0
    for name in SHAPES:
        xs = [exact(one[name]) for one in models]
        c = [Fraction(w) for w in WEIGHTS[:k]]
        if normalize != "none":
            c = [w / norm_of(f, None if normalize == "model" else name) for w, f in zip(c, floored, strict=True)]
        wanted, bound = [], []
        for j in range(models[0][name].numel()):
            f = [w * one[name][j] for w, one in zip(c, floored, strict=True)]
            mass = sum(f, Fraction(0))
            wanted.append(sum((a * x[j] for a, x in zip(f, xs, strict=True)), Fraction(0)) / mass)
            size = sum((a * abs(x[j]) for a, x in zip(f, xs, strict=True)), Fraction(0)) / mass
            bound.append(size * DOUBLE * (4 * k + 40))
        decided += oracles.within(found[name], wanted, bound, dtype)
    assert dtype == "F64" or decided > 150


def test_on_diagonal_quadratics_fisher_merge_is_the_joint_minimiser() -> None:
    """The minimum of sum_i c_i (x - theta_i)^T diag(F_i) (x - theta_i) / 2, found by numpy's solver on the Hessian."""
    n, k = 40, 4
    rng = np.random.default_rng(1)
    theta, f = rng.standard_normal((k, n)), rng.random((k, n)) * 10.0 ** rng.integers(-4, 3, (k, n))
    c = np.array([float(w) for w in WEIGHTS[:k]])
    wanted = np.linalg.solve(np.diag(c @ f), np.einsum("k,kn,kn->n", c, f, theta))
    found = merged(
        "fisher_merge",
        [{"w": tensor(x)} for x in theta],
        weights=WEIGHTS[:k],
        stats=[{"fisher": {"w": tensor(x)}} for x in f],
        floor="1e-30",
    )
    close(found["w"], wanted)
    gradient = np.einsum("k,kn,kn->n", c, f, array(found["w"])[None] - theta)
    assert np.abs(gradient).max() < 1e-11 * np.abs(c @ f).max()


def test_equal_fishers_are_the_weighted_average() -> None:
    models, _ = family(3, "F64")
    f = positive(1, models[0])
    for normalize in ("none", "model", "tensor"):
        found = merged("fisher_merge", models, weights=WEIGHTS[:3], stats=[{"fisher": f}] * 3, normalize=normalize)
        average = merged("weight_average", models, weights=WEIGHTS[:3])
        for name in average:
            close(found[name], array(average[name]))


def test_a_model_that_alone_is_informed_is_the_result() -> None:
    models, _ = family(3, "F64")
    stats = [{"fisher": constant(models[0], value)} for value in (0.0, 1e20, 0.0)]
    found = merged("fisher_merge", models, stats=stats)
    for name in found:
        close(found[name], array(models[1][name]), 1e-15)


def test_without_any_information_fisher_merge_is_the_average() -> None:
    models, _ = family(3, "F64")
    found = merged("fisher_merge", models, stats=[{"fisher": constant(models[0])}] * 3)
    average = merged("weight_average", models)
    for name in average:
        close(found[name], array(average[name]))


def test_normalised_fishers_may_have_any_scale() -> None:
    models, _ = family(2, "F64", shapes={"a": (30,), "b": (5, 6)})
    f = [{name: x + 0.01 for name, x in positive(i, models[0]).items()} for i in range(2)]
    larger = [f[0], {name: x * 1024.0 for name, x in f[1].items()}]
    for normalize, same in (("none", False), ("model", True), ("tensor", True)):
        one, other = (
            merged("fisher_merge", models, stats=[{"fisher": x} for x in some], normalize=normalize)
            for some in (f, larger)
        )
        assert all(torch.allclose(one[n], other[n], rtol=0, atol=1e-12) for n in one) == same


@pytest.mark.parametrize("wrong", [-1e-9, math.nan, math.inf])
def test_what_is_no_fisher_information_is_refused(wrong: float) -> None:
    models, _ = family(2)
    f = positive(3, models[0])
    broken = {name: x.clone() for name, x in f.items()}
    broken["bias"][5] = wrong
    for normalize in ("none", "model"):
        with pytest.raises(InputError, match=r"tensor 'bias': the fisher of contribution [0-9a-f]{16} .* at index 5"):
            merged("fisher_merge", models, stats=[{"fisher": f}, {"fisher": broken}], normalize=normalize)


def test_a_tensor_that_no_fisher_has_is_never_replaced_by_a_guess() -> None:
    models, _ = family(2)
    partial = {name: x for name, x in positive(3, models[0]).items() if name != "weight"}
    for normalize in ("none", "tensor"):
        with pytest.raises(NeedsError, match=r"tensor 'weight': .*statistic 'fisher'"):
            merged("fisher_merge", models, stats=[{"fisher": partial}] * 2, normalize=normalize)


def test_a_fisher_of_other_models_is_refused() -> None:
    models, _ = family(2, shapes={"w": (4, 6)})
    other = {"w": torch.ones(4, 5)}
    with pytest.raises(MismatchError, match=r"tensor 'w'.*shape"):
        merge(models, strategy="fisher_merge", stats=[{"fisher": other}] * 2)
    with pytest.raises(MismatchError, match=r"tensor 'w'.*another shape"):
        merged("fisher_merge", models, stats=[{"fisher": other}] * 2)


# ---------------------------------------------------------------- regression mean


def shrunk(g: Array, alpha: float) -> Array:
    return np.asarray(alpha * g + (1 - alpha) * np.diag(np.diag(g)))


def layers(k: int, rows: int, inputs: int, samples: int, number: int = 0) -> tuple[list[Array], list[Array]]:
    """Linear layers, and inputs on which each was made."""
    rng = np.random.default_rng(number)
    mix = rng.standard_normal((inputs, inputs))
    return (
        [rng.standard_normal((rows, inputs)) for _ in range(k)],
        [
            rng.standard_normal((samples, inputs)) @ (mix + 0.5 * rng.standard_normal((inputs, inputs)))
            for _ in range(k)
        ],
    )


def regression(w: Sequence[Array], grams: Sequence[Array], weights: Sequence[str], **how: Any) -> torch.Tensor:
    return merged(
        "regression_mean",
        [{"w": tensor(x)} for x in w],
        weights=weights,
        stats=[{"gram": {"w": tensor(g)}} for g in grams],
        **how,
    )["w"]


@COUNTS
@pytest.mark.parametrize("inputs", [1, 7, 70])
@pytest.mark.parametrize("alpha", ["0", "0.1", "0.9", "1"])
def test_regression_mean_solves_the_normal_equations(k: int, inputs: int, alpha: str) -> None:
    w, xs = layers(k, 5, inputs, 4 * inputs)
    grams = [x.T @ x / len(x) for x in xs]
    found = regression(w, grams, WEIGHTS[:k], alpha=alpha)
    used = [a * shrunk(g, float(alpha)) for a, g in zip(share(WEIGHTS[:k]), grams, strict=True)]
    left = np.add.reduce(used)
    wanted = np.linalg.solve(left, np.add.reduce([g @ x.T for g, x in zip(used, w, strict=True)])).T
    close(found, wanted, 1e-13 * float(np.linalg.cond(left)) + 1e-13)
    off = np.add.reduce([(array(found) - x) @ g for g, x in zip(used, w, strict=True)])
    assert np.abs(off).max() < 1e-12 * np.abs(left).max()


def test_regression_mean_is_least_squares_on_all_data_at_once() -> None:
    """min_W sum_i |X_i W^T - X_i W_i^T|^2 by numpy.linalg.lstsq on the stacked problem."""
    w, xs = layers(3, 6, 10, 50, number=4)
    wanted = np.linalg.lstsq(np.vstack(xs), np.vstack([x @ one.T for x, one in zip(xs, w, strict=True)]), rcond=None)[0]
    close(regression(w, [x.T @ x for x in xs], ["1"] * 3, alpha=1), wanted.T, 1e-11)


@DTYPES
def test_regression_mean_is_rounded_once(dtype: str) -> None:
    w, xs = layers(3, 11, 13, 100)
    models: list[Model] = [{"weight": tensor(x).to(STORED[dtype])} for x in w]
    grams = [x.T @ x / len(x) for x in xs]
    found = merged("regression_mean", models, stats=[{"gram": {"weight": tensor(g)}} for g in grams])["weight"]
    fine = regression([array(one["weight"]) for one in models], grams, ["1"] * 3)
    assert found.dtype == STORED[dtype]
    assert torch.equal(found, fine.to(STORED[dtype])) or dtype == "F64"


def test_equal_grams_are_the_weighted_average() -> None:
    w, xs = layers(3, 5, 8, 40)
    gram = xs[0].T @ xs[0]
    close(regression(w, [gram] * 3, WEIGHTS[:3]), np.einsum("k,kij->ij", share(WEIGHTS[:3]), np.array(w)), 1e-13)


def test_without_off_diagonals_it_is_fisher_merge_with_the_diagonal_for_every_row() -> None:
    w, xs = layers(3, 5, 8, 40)
    grams = [x.T @ x / len(x) for x in xs]
    fishers = [{"fisher": {"w": tensor(np.tile(np.diag(g), (5, 1)))}} for g in grams]
    other = merged("fisher_merge", [{"w": tensor(x)} for x in w], weights=WEIGHTS[:3], stats=fishers)["w"]
    close(regression(w, grams, WEIGHTS[:3], alpha=0), array(other))


@pytest.mark.parametrize("alpha", ["0.9", "1"])
def test_inputs_that_no_model_saw_active_have_the_mean_of_the_weights(alpha: str) -> None:
    w, xs = layers(2, 5, 6, 40)
    for x in xs:
        x[:, [1, 4]] = 0.0
    alive = [0, 2, 3, 5]
    grams = [x.T @ x for x in xs]
    found = array(regression(w, grams, ["1", "3"], alpha=alpha))
    mean = 0.25 * w[0] + 0.75 * w[1]
    assert np.abs(found[:, [1, 4]] - mean[:, [1, 4]]).max() < 1e-15
    used = [a * shrunk(g[np.ix_(alive, alive)], float(alpha)) for a, g in zip((0.25, 0.75), grams, strict=True)]
    wanted = np.linalg.solve(
        np.add.reduce(used), np.add.reduce([g @ x[:, alive].T for g, x in zip(used, w, strict=True)])
    )
    assert np.abs(found[:, alive] - wanted.T).max() < 1e-12


def test_an_input_that_only_one_model_saw_active_has_the_weights_of_that_model() -> None:
    w, xs = layers(2, 5, 6, 40)
    xs[1][:, 2] = 0.0
    found = array(regression(w, [x.T @ x for x in xs], ["1", "1"], alpha=0))
    assert np.abs(found[:, 2] - w[0][:, 2]).max() < 1e-14


@pytest.mark.parametrize("number", range(8))
def test_too_few_samples_fit_the_data_and_stay_near_the_mean(number: int) -> None:
    """Four samples of ten inputs each: of all solutions nearly the one nearest to the mean, as lstsq has it."""
    w, xs = layers(2, 3, 10, 4, number=number)
    mean = (w[0] + w[1]) / 2
    stacked = np.vstack(xs)
    wanted = (
        mean
        + np.linalg.lstsq(stacked, np.vstack([x @ (one - mean).T for x, one in zip(xs, w, strict=True)]), rcond=None)[
            0
        ].T
    )
    close(regression(w, [x.T @ x for x in xs], ["1", "1"], alpha=1), wanted, 1e-5)
    copies = [np.hstack([x, x]) for x in xs]
    twice = [np.hstack([one, one]) for one in w]
    doubled = array(regression(twice, [x.T @ x for x in copies], ["1", "1"], alpha=1))
    assert np.isfinite(doubled).all()
    assert np.abs(doubled - np.hstack([wanted, wanted])).max() < 1e-4


@pytest.mark.parametrize("number", range(8))
def test_one_combination_of_inputs_that_nobody_saw_does_not_blow_up(number: int) -> None:
    """The last pivot is rounding alone, of either sign: where it is positive, it must not be divided by."""
    rng = np.random.default_rng(number)
    w, seen = [rng.standard_normal((3, 6)) for _ in range(2)], rng.standard_normal((5, 6))
    xs, mean = [seen, rng.standard_normal((5, 5)) @ seen], (w[0] + w[1]) / 2
    right = np.vstack([x @ (one - mean).T for x, one in zip(xs, w, strict=True)])
    wanted = mean + np.linalg.lstsq(np.vstack(xs), right, rcond=None)[0].T
    close(regression(w, [x.T @ x for x in xs], ["1", "1"], alpha=1), wanted, 1e-4)


def test_a_ridge_pulls_towards_the_mean() -> None:
    w, xs = layers(3, 5, 8, 40)
    grams = [x.T @ x / len(x) for x in xs]
    mean = np.mean(w, axis=0)
    left = np.mean([shrunk(g, 0.9) for g in grams], axis=0)
    for ridge in ("0.01", "1"):
        pull = float(ridge) * np.trace(left) / 8 * np.eye(8)
        right = np.mean([shrunk(g, 0.9) @ (x - mean).T for g, x in zip(grams, w, strict=True)], axis=0)
        close(regression(w, grams, ["1"] * 3, ridge=ridge), mean + np.linalg.solve(left + pull, right).T)
    close(regression(w, grams, ["1"] * 3, ridge="1e9"), mean, 1e-6)


def test_a_convolution_is_flattened_and_a_transposed_weight_is_turned() -> None:
    w, xs = layers(2, 4, 18, 80)
    grams = [x.T @ x for x in xs]
    plain = array(regression(w, grams, ["1", "2"]))
    close(regression([x.reshape(4, 2, 3, 3) for x in w], grams, ["1", "2"]), plain.reshape(4, 2, 3, 3))
    close(regression([x.T for x in w], grams, ["1", "2"], layout="in_out"), plain.T)


def test_a_gram_that_is_not_quite_symmetric_is_symmetrised() -> None:
    w, xs = layers(2, 4, 6, 30)
    grams = [x.T @ x for x in xs]
    skew = np.triu(np.ones((6, 6)), 1)
    close(regression(w, [g + skew - skew.T for g in grams], ["1", "2"]), array(regression(w, grams, ["1", "2"])))


def test_tensors_without_a_gram_are_the_weighted_average_to_the_bit() -> None:
    models, _ = family(3)
    stats = [{"gram": {"weight": torch.eye(13) * (i + 1)}} for i in range(3)]
    found = merged("regression_mean", models, weights=WEIGHTS[:3], stats=stats)
    average = merged("weight_average", models, weights=WEIGHTS[:3])
    rest = set(SHAPES) - {"weight"}
    assert equal({name: found[name] for name in rest}, {name: average[name] for name in rest})
    assert not torch.equal(found["weight"], average["weight"])


def test_equal_models_are_unchanged_by_any_grams() -> None:
    w, xs = layers(3, 5, 8, 40)
    for alpha in ("0.9", "1"):
        close(regression([w[0]] * 3, [x.T @ x for x in xs], ["1"] * 3, alpha=alpha), w[0], 1e-15)


@pytest.mark.parametrize(
    ("gram", "error", "said"),
    [
        (np.eye(5), MismatchError, r"25 entries.*6 inputs.*layout=in_out"),
        (np.diag([1.0, 1, 1, -1, 1, 1]), InputError, r"negative square"),
        (np.diag([1.0, 1, 1, math.inf, 1, 1]), InputError, r"not finite"),
        (np.eye(6) - 2 * (np.ones((6, 6)) - np.eye(6)), InputError, r"not positive semidefinite"),
    ],
    ids=["size", "negative", "infinite", "indefinite"],
)
def test_what_is_no_gram_matrix_is_refused(gram: Array, error: type[Exception], said: str) -> None:
    w, _ = layers(2, 4, 6, 30)
    for alpha in ("1", "0.95"):
        with pytest.raises(error, match=rf"tensor 'w'.*{said}"):
            regression(w, [gram, gram], ["1", "1"], alpha=alpha)


def test_a_tensor_of_one_dimension_has_no_gram() -> None:
    with pytest.raises(MismatchError, match="two dimensions"):
        regression([np.ones(6)], [np.eye(6)], ["1"])


def test_without_statistics_nothing_is_merged() -> None:
    models, base = family(2)
    for strategy in ("regression_mean", "fisher_merge", "led_merge"):
        with pytest.raises(NeedsError, match="statistic"):
            merge(models, strategy=strategy, base=base)


# ---------------------------------------------------------------- led


def top(scores: Sequence[float], density: str) -> set[int]:
    count = max(1, math.floor(Fraction(density) * len(scores)))
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]) if scores else set()


def located(stats: Sequence[Mapping[str, Model]], name: str, density: str) -> list[set[int]]:
    """What each contribution keeps of a tensor."""
    masks = [
        top(one["importance"][name].reshape(-1).tolist(), density)
        & top(one["importance_base"][name].reshape(-1).tolist(), density)
        for one in stats
    ]
    return [m - set().union(*(other for j, other in enumerate(masks) if j != i)) for i, m in enumerate(masks)]


def importances(k: int, like: Model, levels: int | None = None) -> list[dict[str, Model]]:
    """Two statistics a model; of few levels, so that many are equal, if asked for."""
    made = []
    for i in range(k):
        own, origin = positive(20 + i, like), positive(40 + i, like)
        if levels:
            rng = np.random.default_rng(i)
            own, origin = (
                {
                    n: torch.tensor(rng.integers(0, levels, tuple(x.shape))).float().reshape(x.shape)
                    for n, x in one.items()
                }
                for one in (own, origin)
            )
        made.append({"importance": own, "importance_base": origin})
    return made


@DTYPES
@COUNTS
@pytest.mark.parametrize(("density", "levels"), [("0.5", None), ("0.3", 3), ("0.9", 1), ("1", None), ("0.000001", 2)])
def test_led_merge_locates_elects_and_disjoins(dtype: str, k: int, density: str, levels: int | None) -> None:
    models, base = family(k, dtype)
    stats = importances(k, base, levels)
    found = merged("led_merge", models, base, weights=SIGNED[:k], stats=stats, density=density, lambda_="0.7")
    for name in SHAPES:
        kept = located(stats, name, density)
        origin = exact(base[name])
        wanted, bound = list(origin), [abs(v) * DOUBLE for v in origin]
        for one, w, mine in zip(models, SIGNED, kept, strict=False):
            x = exact(one[name])
            for j in mine:
                wanted[j] += Fraction("0.7") * Fraction(w) * (x[j] - origin[j])
                bound[j] = (abs(x[j]) + abs(origin[j])) * DOUBLE * 12
        oracles.within(found[name], wanted, bound, dtype)


@pytest.mark.parametrize("density", ["0.2", "0.6", "0.95"])
def test_what_changes_is_the_union_of_the_disjoint_masks_and_no_element_mixes_two_models(density: str) -> None:
    models, base = family(4, "F64")
    stats = importances(4, base)
    found = merged("led_merge", models, base, stats=stats, density=density)
    for name in SHAPES:
        kept = located(stats, name, density)
        assert sum(map(len, kept)) == len(set().union(*kept))
        off = (array(found[name]) - array(base[name])).reshape(-1)
        assert set(np.flatnonzero(off).tolist()) == set().union(*kept)
        for one, mine in zip(models, kept, strict=True):
            taus = (array(one[name]) - array(base[name])).reshape(-1)
            assert all(abs(off[j] - taus[j]) < 1e-14 for j in mine)


def test_one_model_elected_whole_is_that_model_and_two_of_them_conflict_everywhere() -> None:
    models, base = family(3, "BF16")
    stats = importances(3, base)
    assert equal(merged("led_merge", models[:1], base, stats=stats[:1], density=1), models[0])
    for k in (2, 3):
        assert equal(merged("led_merge", models[:k], base, stats=stats[:k], density=1), base)
    same = merged("led_merge", [models[0]] * 2, base, stats=[stats[0]] * 2, density="0.4")
    assert equal(same, base), "two equal models conflict in all that they elect"


def test_of_equal_importances_the_first_are_elected_zeros_too() -> None:
    base: Model = {"w": torch.zeros(10, dtype=torch.float64)}
    one: Model = {"w": torch.arange(1.0, 11.0, dtype=torch.float64)}
    flat = [{"importance": constant(base), "importance_base": constant(base, 5.0)}]
    assert merged("led_merge", [one], base, stats=flat, density="0.39")["w"].tolist() == [1.0, 2.0, 3.0] + [0.0] * 7
    negative = {"w": torch.tensor([0.0, -0.0] * 5, dtype=torch.float64)}
    signs = [{"importance": negative, "importance_base": negative}]
    assert merged("led_merge", [one], base, stats=signs, density="0.39")["w"].tolist() == [1.0, 2.0, 3.0] + [0.0] * 7


def test_importances_that_are_none_are_refused() -> None:
    models, base = family(2)
    stats = importances(2, base)
    stats[1]["importance_base"] = {n: x.clone() for n, x in stats[1]["importance_base"].items()}
    stats[1]["importance_base"]["weight"][1, 2] = -0.5
    with pytest.raises(InputError, match=r"tensor 'weight': the importance_base of contribution .* at index 15"):
        merged("led_merge", models, base, stats=stats)
    del stats[0]["importance"]["bias"], stats[1]["importance"]["bias"]
    with pytest.raises(NeedsError, match=r"tensor 'bias': .*'importance'"):
        merged("led_merge", models, base, stats=stats)


@pytest.mark.parametrize("n", [1, 2, 5, 1000, 70_000])
@pytest.mark.parametrize("single", [False, True])
def test_the_cut_of_a_whole_tensor_is_that_of_a_stable_sort(n: int, single: bool) -> None:
    rng = np.random.default_rng(n)
    for x in (rng.standard_normal(n), rng.integers(0, 4, n).astype(np.float64), np.zeros(n), rng.random(n) * 1e-310):
        x = x.astype(np.float32).astype(np.float64) if single else x
        held = torch.tensor(x, dtype=torch.float32 if single else torch.float64)
        order = np.argsort(-np.abs(x), kind="stable")
        for k in sorted({1, 2, n // 3 + 1, n} & set(range(n + 1))):
            wanted = np.zeros(n, bool)
            wanted[order[:k]] = True
            assert whole_tensors.largest(held, k).numpy().tolist() == wanted.tolist()
            assert whole_tensors.ascending(held.abs(), n - k) == abs(x[order[k - 1]])
    assert not whole_tensors.largest(torch.ones(n), 0).any()


# ---------------------------------------------------------------- all


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("fisher_merge", {"floor": 0}, "floor"),
    ("fisher_merge", {"normalize": "param"}, "normalize"),
    ("regression_mean", {"alpha": "1.1"}, "alpha"),
    ("regression_mean", {"alpha": "-0.1"}, "alpha"),
    ("regression_mean", {"ridge": "-1"}, "ridge"),
    ("regression_mean", {"layout": "conv"}, "layout"),
    ("led_merge", {"density": 0}, "density"),
    ("led_merge", {"density": "1.5"}, "density"),
    ("led_merge", {"mask": 1}, "no parameter 'mask'"),
]


@pytest.mark.parametrize(("strategy", "params", "said"), BAD, ids=str)
def test_bad_parameters_are_refused_with_a_sentence(strategy: str, params: dict[str, Any], said: str) -> None:
    models, base = family(2)
    with pytest.raises(ParameterError, match=rf"strategy '{strategy}'.*{said}.*\."):
        merged(strategy, models, base, stats=importances(2, base), **params)


@pytest.mark.parametrize("strategy", ["fisher_merge", "regression_mean"])
def test_weights_that_sum_to_zero_are_refused(strategy: str) -> None:
    models, _ = family(2)
    with pytest.raises(UsageError, match="sum to 0"):
        merged(strategy, models, weights=["0", "0"], stats=[{"fisher": positive(1, models[0])}] * 2)


def test_a_parameter_for_one_tensor_changes_that_tensor_alone() -> None:
    models, base = family(2)
    grams = [{"weight": torch.tensor(x.T @ x / 40)} for x in layers(2, 1, 13, 40)[1]]
    stats = [s | {"gram": g, "fisher": positive(4, base)} for s, g in zip(importances(2, base), grams, strict=True)]
    stats[1]["fisher"] = positive(5, base)
    for strategy, name, value in (
        ("fisher_merge", "normalize", "tensor"),
        ("fisher_merge", "floor", "0.5"),
        ("regression_mean", "alpha", "0.1"),
        ("led_merge", "density", "0.1"),
    ):
        plain = merged(strategy, models, base, stats=stats)
        special = merged(strategy, models, base, stats=stats, **{name: value})
        mixed = merged(strategy, models, base, stats=stats, **{name: [{"filter": "weight", "value": value}]})
        assert equal(mixed, {t: (special if t == "weight" else plain)[t] for t in plain})
        assert not torch.equal(plain["weight"], special["weight"])


def test_statistics_go_with_their_models_through_the_set() -> None:
    models, base = family(3)
    stats = importances(3, base)
    order = [2, 0, 1]
    one = merge(models, strategy="led_merge", base=base, stats=stats, weights=WEIGHTS[:3])
    other = merge(
        [models[i] for i in order],
        strategy="led_merge",
        base=base,
        stats=[stats[i] for i in order],
        weights=[WEIGHTS[i] for i in order],
    )
    assert equal(copied(one), copied(other))
    crossed = merge(models, strategy="led_merge", base=base, stats=[stats[1], stats[0], stats[2]], weights=WEIGHTS[:3])
    assert not equal(copied(one), copied(crossed))


def test_zero_task_vectors_leave_the_base() -> None:
    base = model(1)
    assert equal(merged("led_merge", [base] * 3, base, stats=importances(3, base)), base)
