"""Strategies on whole matrices against oracles that use numpy's decompositions, and the identities that tie them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import crdtmerge.strategies.dense as dense
from crdtmerge.errors import NeedsError, NonFiniteError, ParameterError, UsageError
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from tests.strategies import spectral_oracles as oracle
from tests.strategies.models import Model, merged

Matrix = NDArray[np.float64]

ALL = ["star", "svd_truncate", "iso_c", "iso_cts", "tsv_m", "svd_knot_tying", "wudi", "dual_projection"]
SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1), (12, 30)]
WEIGHTS = ("1", "0.5", "2")
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
COUNTS = pytest.mark.parametrize("k", [1, 3])


def drawn(shape: tuple[int, ...], k: int, number: int = 0) -> list[Matrix]:
    rng = np.random.default_rng([number, k, *shape])
    return [rng.standard_normal(shape) for _ in range(k)]


def result(strategy: str, taus: Sequence[Matrix], weights: Sequence[object] | None = None, **how: Any) -> Matrix:
    """The merged task vector over a base of zeros, in float64."""
    zeros = torch.zeros(taus[0].shape, dtype=torch.float64)
    models: list[Model] = [{"w": zeros + torch.from_numpy(np.asarray(tau))} for tau in taus]
    found = merged(strategy, models, {"w": zeros}, weights=weights, **how)
    array: Matrix = found["w"].numpy()
    return array


def near(found: Matrix, wanted: Matrix, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape
    assert abs(found - wanted).max(initial=0.0) <= tolerance * max(1.0, abs(wanted).max(initial=0.0))


def floats(weights: Sequence[str]) -> list[float]:
    return [float(w) for w in weights]


# ---------------------------------------------------------------- oracles


@EACH_SHAPE
@COUNTS
@pytest.mark.parametrize("eta", ["0.1", "0.4", "0.77", "1"])
def test_star(shape: tuple[int, int], k: int, eta: str) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    near(result("star", taus, w, eta=eta), oracle.star(taus, floats(w), float(eta)))


@EACH_SHAPE
@COUNTS
def test_svd_truncate(shape: tuple[int, int], k: int) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    for energy in (0.3, 0.9):
        ranks = [
            oracle.rank_for(np.asarray(np.linalg.svd(tau, compute_uv=False) ** 2, np.float64), energy) for tau in taus
        ]
        cut = [oracle.truncated(tau, r) for tau, r in zip(taus, ranks, strict=True)]
        near(result("svd_truncate", taus, w, share=str(energy)), oracle.average(cut, floats(w)))
    r = max(1, int(0.4 * min(shape)))
    cut = [oracle.truncated(tau, r) for tau in taus]
    found = result("svd_truncate", taus, w, keep="rank", share="0.4", combine="sum")
    near(found, oracle.summed(cut, floats(w)))


@EACH_SHAPE
@COUNTS
def test_iso_c(shape: tuple[int, int], k: int) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    near(result("iso_c", taus, w, **{"lambda": "0.7"}), 0.7 * oracle.iso_c(taus, floats(w)), 1e-11)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)], ids=str)
@pytest.mark.parametrize("common", ["0.5", "0.8"])
@COUNTS
def test_iso_cts(shape: tuple[int, int], k: int, common: str) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    near(result("iso_cts", taus, w, common=common), oracle.iso_cts(taus, floats(w), float(common)), 1e-8)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 16)], ids=str)
@COUNTS
def test_tsv_m(shape: tuple[int, int], k: int) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    near(result("tsv_m", taus, w), oracle.tsv_m(taus, floats(w)), 1e-8)


@EACH_SHAPE
@COUNTS
@pytest.mark.parametrize("density", ["0.2", "0.7", "1"])
def test_svd_knot_tying(shape: tuple[int, int], k: int, density: str) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    wanted = 0.6 * oracle.knots(taus, floats(w), float(density))
    near(result("svd_knot_tying", taus, w, density=density), wanted, 1e-11)
    turned = result("svd_knot_tying", [tau.T for tau in taus], w, density=density, concat="out")
    near(turned.T, wanted, 1e-11)


def test_svd_knot_tying_of_vectors_is_ties() -> None:
    taus = drawn((23,), 3)
    found = result("svd_knot_tying", taus, WEIGHTS, density="0.4", **{"lambda": "1"})
    near(found, oracle.ties(taus, floats(WEIGHTS), 0.4), 1e-15)
    same = result("ties", taus, WEIGHTS, density="0.4", scope="tensor")
    assert np.array_equal(found, same)


@EACH_SHAPE
@COUNTS
def test_wudi_at_the_minimum_is_regmean_with_gram_matrices_of_task_vectors(shape: tuple[int, int], k: int) -> None:
    taus, w = drawn(shape, k), WEIGHTS[:k]
    wanted = oracle.regmean(taus, oracle.wudi_grams(taus, floats(w)))
    near(result("wudi", taus, w, solver="exact"), wanted, 1e-10)


@pytest.mark.parametrize("time", ["0", "0.5", "4"])
@EACH_SHAPE
def test_wudi_on_its_way_is_where_gradient_descent_in_small_steps_is(shape: tuple[int, int], time: str) -> None:
    taus, w = drawn(shape, 3), WEIGHTS
    grams = oracle.wudi_grams(taus, floats(w))
    fastest = np.linalg.norm(np.sum(grams, axis=0), 2)

    def gradient(x: Matrix) -> Matrix:
        total: Matrix = np.sum([(x - tau) @ g for tau, g in zip(taus, grams, strict=True)], axis=0)
        return total

    wanted = oracle.descended(gradient, oracle.summed(taus, floats(w)), float(time), float(fastest))
    near(result("wudi", taus, w, time=time), wanted, 1e-9)


@EACH_SHAPE
@COUNTS
def test_dual_projection_at_the_minimum_solves_its_linear_system(shape: tuple[int, int], k: int) -> None:
    taus, w = drawn(shape, k), floats(WEIGHTS[:k])
    wanted = oracle.dop_exact(taus, [x / sum(w) for x in w])
    near(result("dual_projection", taus, WEIGHTS[:k], solver="exact", energy="1"), wanted, 1e-9)


@pytest.mark.parametrize("space", ["uv", "u", "v"])
@pytest.mark.parametrize("energy", ["0.6", "1"])
@pytest.mark.parametrize("time", ["0.7", "4"])
def test_dual_projection_on_its_way_is_where_gradient_descent_is(space: str, energy: str, time: str) -> None:
    for shape in ((6, 9), (7, 5)):
        taus, w = drawn(shape, 3), floats(WEIGHTS)
        gradient, fastest = oracle.dop_gradient(taus, [x / sum(w) for x in w], float(energy), space)
        start = oracle.average(taus, w)
        wanted = oracle.descended(gradient, start, float(time), fastest)
        near(result("dual_projection", taus, WEIGHTS, space=space, energy=energy, time=time), wanted, 1e-9)


def test_dual_projection_one_by_one() -> None:
    taus, w = drawn((6, 8), 3), floats(WEIGHTS)
    d = taus[0]
    for j in (1, 2):
        before = sum(w[:j]) / j
        a = [0.8 * before, 0.2 * w[j]]
        gradient, fastest = oracle.dop_gradient([d, taus[j]], a, 1.0, "uv")
        start = oracle.average([d, taus[j]], [before, w[j]])
        d = oracle.descended(gradient, start, 3.0, fastest)
    near(result("dual_projection", taus, WEIGHTS, mode="sequential", energy="1", time="3"), d, 1e-9)


# ---------------------------------------------------------------- identities


def test_star_with_everything_kept_is_the_average() -> None:
    taus = drawn((8, 11), 3)
    near(result("star", taus, eta="1"), oracle.average(taus, [1, 1, 1]))
    near(result("svd_truncate", taus, share="1"), oracle.average(taus, [1, 1, 1]))


@pytest.mark.parametrize("eta", ["0.05", "0.4", "0.9"])
def test_star_keeps_the_nuclear_norm_and_leaves_rank_one_alone(eta: str) -> None:
    (tau,) = drawn((9, 7), 1)
    near(np.linalg.norm(result("star", [tau], eta=eta), "nuc"), np.linalg.norm(tau, "nuc"))  # type: ignore[arg-type]
    one = np.outer(*drawn((7,), 2))
    near(result("star", [one], eta=eta), one)


def test_star_of_a_diagonal_by_hand() -> None:
    found = result("star", [np.diag([5.0, -3.0, 1.0, 1.0])], eta="0.6")  # 6 of 10: the first two, times 10 / 8
    near(found, np.diag([6.25, -3.75, 0.0, 0.0]), 1e-15)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_iso_c_keeps_the_nuclear_norm_also_where_directions_are_missing(k: int) -> None:
    for taus in (drawn((8, 5), k), [np.outer(*drawn((9,), 2, i)) for i in range(k)]):
        found = result("iso_c", taus)
        near(np.linalg.norm(found, "nuc"), np.linalg.norm(np.sum(taus, axis=0), "nuc"))  # type: ignore[arg-type]
        s = np.linalg.svd(found, compute_uv=False)
        kept = s[s > 1e-9 * s[0]]
        assert kept.max() / kept.min() < 1 + 1e-12


def test_iso_cts_with_everything_in_common_is_iso_c() -> None:
    taus = drawn((9, 14), 3)
    near(result("iso_cts", taus, common="1"), result("iso_c", taus))


def orthogonal_tasks(k: int, rank: int, shape: tuple[int, int]) -> list[Matrix]:
    """Task vectors with column spaces and row spaces that are orthogonal to each other's."""
    rng = np.random.default_rng(k)
    u = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))[0]
    s = rng.uniform(0.5, 2.0, (k, rank))
    pick = [slice(i * rank, (i + 1) * rank) for i in range(k)]
    return [(u[:, p] * s[i]) @ v[:, p].T for i, p in enumerate(pick)]


@pytest.mark.parametrize("rank", [1, 2])
def test_orthogonal_tasks_are_summed_by_tsv_m_dual_projection_and_wudi(rank: int) -> None:
    taus = orthogonal_tasks(3, rank, (9, 11))
    wanted = np.sum(taus, axis=0)
    near(result("tsv_m", taus), wanted)
    near(result("dual_projection", taus, WEIGHTS, solver="exact"), wanted, 1e-10)
    near(result("wudi", taus, solver="exact"), wanted)


@pytest.mark.parametrize("params", [{"solver": "exact"}, {}, {"mode": "sequential"}, {"energy": "0.7", "space": "u"}])
def test_dual_projection_of_one_model_or_of_equal_ones_is_that_model(params: dict[str, str]) -> None:
    (tau,) = drawn((7, 10), 1)
    near(result("dual_projection", [tau], **params), tau, 1e-10)
    if params.get("mode") != "sequential":
        near(result("dual_projection", [tau] * 3, WEIGHTS, **params), tau, 1e-10)


def test_knots_by_sums_is_task_arithmetic() -> None:
    for shape in SHAPES:
        taus = drawn(shape, 3)
        found = result("svd_knot_tying", taus, WEIGHTS, inner="task_arithmetic", **{"lambda": "1"})
        near(found, oracle.summed(taus, floats(WEIGHTS)))


def test_knots_of_one_model_with_everything_kept_is_that_model() -> None:
    (tau,) = drawn((7, 10), 1)
    near(result("svd_knot_tying", [tau], density="1", **{"lambda": "1"}), tau)


@pytest.mark.parametrize("strategy", ALL)
def test_the_order_of_contributions_matters_to_rounding_at_most(strategy: str) -> None:
    taus = drawn((8, 12), 3)
    one = result(strategy, taus, WEIGHTS)
    other = result(strategy, [taus[2], taus[0], taus[1]], ("2", "1", "0.5"))
    near(one, other, 1e-9)


@pytest.mark.parametrize("strategy", ["star", "svd_truncate", "iso_c", "iso_cts", "tsv_m", "wudi", "dual_projection"])
def test_orthogonal_matrices_on_either_side_go_through(strategy: str) -> None:
    taus = drawn((8, 12), 3)
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (8, 12))
    near(result(strategy, [u @ tau @ v for tau in taus], WEIGHTS), u @ result(strategy, taus, WEIGHTS) @ v, 1e-8)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("scale", [0.25, 3.0, 2.0**-70])
def test_scale_goes_through(strategy: str, scale: float) -> None:
    params: dict[str, Any] = {"smallest": 0} if strategy == "svd_knot_tying" else {}
    taus = drawn((8, 12), 3)
    found = result(strategy, [tau * scale for tau in taus], WEIGHTS, **params)
    near(found / scale, result(strategy, taus, WEIGHTS, **params), 1e-8)


def test_where_singular_values_are_equal_knots_takes_the_mean_whatever_the_rotation() -> None:
    rng = np.random.default_rng(5)
    u = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    v = np.linalg.qr(rng.standard_normal((10, 10)))[0][:4]
    joined = u @ np.diag([3.0, 2.0, 2.0, 1.0]) @ v
    taus = [joined[:, :5], joined[:, 5:]]
    s = np.diag([3.0, 2.0, 2.0, 1.0])
    parts = np.split(np.sign(u[abs(u).argmax(axis=0), range(4)])[:, None] * (s @ v), 2, axis=1)
    turned = u * np.sign(u[abs(u).argmax(axis=0), range(4)])
    inner = oracle.ties(parts, [1.0, 1.0], 1.0)
    inner[1:3] = (parts[0][1:3] + parts[1][1:3]) / 2
    near(result("svd_knot_tying", taus, density="1", **{"lambda": "1"}), turned @ inner, 1e-10)


def test_singular_values_up_to_the_smallest_are_left_out_by_knots() -> None:
    tau = np.diag([1.0, 1e-3])
    found = result("svd_knot_tying", [tau], density="1", smallest="1e-2", **{"lambda": "1"})
    near(found, np.diag([1.0, 0.0]), 1e-15)


# ---------------------------------------------------------------- shapes, and what is refused


@pytest.mark.parametrize("strategy", ALL)
def test_convolutions_are_matrices_of_their_flattened_rest(strategy: str) -> None:
    taus = drawn((5, 3, 2, 2), 2)
    flat = result(strategy, [tau.reshape(5, 12) for tau in taus])
    assert np.array_equal(result(strategy, taus).reshape(5, 12), flat)


@pytest.mark.parametrize("strategy", [name for name in ALL if name != "svd_knot_tying"])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (0,), (0, 4), (3, 0)], ids=str)
def test_what_is_no_matrix_is_averaged(strategy: str, shape: tuple[int, ...]) -> None:
    taus = drawn(shape, 3)
    found = result(strategy, [np.asarray(tau) for tau in taus], WEIGHTS)
    near(found, oracle.average([np.asarray(tau) for tau in taus], floats(WEIGHTS)), 1e-15)


@pytest.mark.parametrize("strategy", ALL)
def test_of_nothing_comes_nothing(strategy: str) -> None:
    zero = np.zeros((4, 6))
    assert np.array_equal(result(strategy, [zero, zero]), zero)
    (tau,) = drawn((4, 6), 1)
    assert np.isfinite(result(strategy, [zero, tau])).all()


@pytest.mark.parametrize("strategy", ALL)
def test_a_contribution_that_is_the_base_and_one_of_weight_zero(strategy: str) -> None:
    a, b = drawn((4, 6), 2)
    assert np.isfinite(result(strategy, [a, b], ("1", "0"))).all()


@pytest.mark.parametrize("strategy", ALL)
def test_the_library_finds_the_same_and_is_not_promised(strategy: str) -> None:
    taus = drawn((10, 14), 3)
    near(result(strategy, taus, WEIGHTS, dense="lapack"), result(strategy, taus, WEIGHTS), 1e-9)
    chosen = registry.get(strategy)
    for said, exact in (("exact", True), ("lapack", False)):
        needs = chosen.needs(Filled(strategy, chosen.Params, {"dense": said}).general)
        assert (needs.exact, needs.unit, needs.compute) == (exact, "tensor", "double")


@pytest.mark.parametrize("strategy", ALL)
def test_a_matrix_above_the_size_is_refused_in_a_sentence_and_not_above_it(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "SIDE_MAX", 12)
    models = [{"w": torch.from_numpy(tau)} for tau in drawn((13, 40), 2)]
    base = {"w": torch.zeros(13, 40, dtype=torch.float64)}
    with pytest.raises(
        UsageError, match=r"tensor 'w' of shape \[13, 40\].* side is (13|26|40);.*up to 12.*dense=lapack"
    ):
        merge(models, strategy=strategy, base=base)
    merge(models, strategy=strategy, base=base, dense="lapack")
    inside = [{"w": torch.from_numpy(tau)} for tau in drawn((6, 12), 2)]
    merge(inside, strategy=strategy, base={"w": torch.zeros(6, 12, dtype=torch.float64)})


@pytest.mark.parametrize("dense_", ["exact", "lapack"])
def test_infinity_has_no_singular_values(dense_: str) -> None:
    (tau,) = drawn((3, 4), 1)
    tau[1, 2] = np.inf
    with pytest.raises(NonFiniteError, match="tensor 'w'"):
        result("star", [tau], dense=dense_)


@pytest.mark.parametrize(
    ("strategy", "params"),
    [
        ("star", {"eta": "40"}),
        ("star", {"eta": "0"}),
        ("star", {"dense": "cuda"}),
        ("svd_truncate", {"keep": "nuclear"}),
        ("iso_cts", {"common": "0"}),
        ("svd_knot_tying", {"inner": "slerp"}),
        ("svd_knot_tying", {"smallest": "-1"}),
        ("wudi", {"time": "-1"}),
        ("wudi", {"solver": "adam"}),
        ("dual_projection", {"old": "1"}),
        ("dual_projection", {"space": "w"}),
        ("safe_merge", {"alpha": "1.2"}),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(strategy: str, params: dict[str, str]) -> None:
    with pytest.raises(ParameterError, match=f"strategy '{strategy}': {next(iter(params))}"):
        Filled(strategy, registry.get(strategy).Params, params)


# ---------------------------------------------------------------- safe_merge


def safe(
    tasks: Sequence[Matrix], safety: Sequence[Matrix], v: Matrix, weights: Sequence[object] | None = None, **params: Any
) -> Matrix:
    roles = ["task"] * len(tasks) + ["safety"] * len(safety)
    beside: Mapping[str, Model] = {
        "aligned": {"w": torch.from_numpy(v)},
        "unaligned": {"w": torch.zeros(v.shape, dtype=torch.float64)},
    }
    return result("safe_merge", [*tasks, *safety], weights, roles=roles, beside=beside, **params)


def test_layers_below_the_threshold_are_mixed_each_by_its_own_cosine() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 12))
    near_v = v + 0.2 * rng.standard_normal(v.shape)
    far = rng.standard_normal(v.shape)
    d_safe = rng.standard_normal(v.shape)
    low, high = sorted([oracle.cosine(v, near_v), oracle.cosine(v, far)])
    assert low < 0.6 < high
    wanted = (2 * near_v + 0.8 * far + 0.2 * d_safe) / 3
    near(safe([near_v, far], [d_safe], v, ("2", "1", "5"), threshold="0.6"), wanted, 1e-15)
    summed = 2 * near_v + 0.8 * far + 0.2 * d_safe
    near(safe([near_v, far], [d_safe], v, ("2", "1", "5"), threshold="0.6", combine="sum"), summed, 1e-15)
    for edge, gated in ((1e-9, True), (-1e-9, False)):
        found = safe([far], [d_safe], v, threshold=repr(oracle.cosine(v, far) + edge))
        near(found, 0.8 * far + 0.2 * d_safe if gated else far, 1e-15)


def test_no_gate_opens_at_minus_one_and_every_gate_above_one() -> None:
    a, b, s, v = drawn((5, 6), 4)
    near(safe([a, b], [s], v, threshold="-1"), (a + b) / 2, 1e-15)
    near(safe([a, b], [s], v, threshold="1.1", alpha="0.3"), 0.3 * (a + b) / 2 + 0.7 * s, 1e-15)
    p, q = drawn((5, 6), 2, 9)
    near(safe([a], [p, q], v, ("1", "1", "3"), threshold="1.1"), 0.8 * a + 0.2 * (p + 3 * q) / 4, 1e-15)


def test_an_update_inside_the_alignment_has_cosine_one() -> None:
    rng = np.random.default_rng(2)
    v = np.linalg.qr(rng.standard_normal((8, 3)))[0]
    d = v @ rng.standard_normal((3, 3))
    s = rng.standard_normal((8, 3))
    near(safe([d], [s], v, threshold="0.999999999999"), d, 1e-15)


def test_without_a_safety_signal_layers_are_mixed_or_kept_on_request() -> None:
    a, s = drawn((5, 6), 2)
    near(safe([a], [s], np.zeros((5, 6))), 0.8 * a + 0.2 * s, 1e-15)
    near(safe([a], [s], np.zeros((5, 6)), no_signal="keep"), a, 1e-15)


def test_vectors_are_never_mixed() -> None:
    a, s, v = drawn((9,), 3)
    near(safe([a], [s], v, threshold="2"), a, 1e-15)


def test_safe_merge_needs_both_roles() -> None:
    a, b, v = drawn((3, 4), 3)
    with pytest.raises(NeedsError, match="role 'safety'"):
        safe([a, b], [], v)
    with pytest.raises(NeedsError, match="role 'task'"):
        safe([], [a, b], v)
