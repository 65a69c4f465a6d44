"""Robust rules compute what their equations say, compared with brute force in numpy, and keep the laws they state.

The oracles hold whole models as rows of a matrix and move points about in that space; they know neither coefficients
nor sorting networks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, NonFiniteError, ParameterError
from crdtmerge.numerics.reduction import dot, fold
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies.distances import block_sums, squared_distances
from crdtmerge.strategies.networks import ascending, exchanges
from crdtmerge.strategies.protocol import Rng
from crdtmerge.strategies.robust import SUBSETS_MAX, buckets, least_diameter
from tests.numerics import random123
from tests.numerics.examples import STORED, stored
from tests.strategies import oracles
from tests.strategies.models import (
    SEED,
    Model,
    Prepared,
    copied,
    equal,
    family,
    identity,
    merged,
    metas,
    model,
    tensors,
    viewed,
)

Rows = NDArray[np.float64]
Rule = Callable[[Rows, Sequence[bytes], int], Rows]

RULES = ("median", "trimmed_mean", "meamed", "krum", "multi_krum", "mda", "nna", "geometric_median", "centered_clip")
WHOLE = ("krum", "multi_krum", "mda", "nna", "geometric_median", "centered_clip")
WEIGHTED = ("multi_krum", "mda", "nna")
BEYOND = {"krum": 3, "multi_krum": 3}
EACH_RULE = pytest.mark.parametrize("rule", RULES)
BEFORE = pytest.mark.parametrize("before", ["none", "nnm", "bucketing"])

# ---------------------------------------------------------------- oracles: points of a space


def distance(x: Rows, y: Rows) -> float:
    return float(np.linalg.norm(x - y))


def closest(rows: Rows, to: int, count: int, ids: Sequence[bytes]) -> list[int]:
    return sorted(range(len(rows)), key=lambda j: (distance(rows[to], rows[j]), ids[j]))[:count]


def krum_order(rows: Rows, ids: Sequence[bytes], f: int) -> list[int]:
    def score(i: int) -> float:
        others = sorted(distance(rows[i], rows[j]) ** 2 for j in range(len(rows)) if j != i)
        return math.fsum(others[: max(0, len(rows) - f - 2)])

    return sorted(range(len(rows)), key=lambda i: (score(i), ids[i]))


def smallest_diameter(rows: Rows, ids: Sequence[bytes], f: int) -> Rows:
    def key(subset: tuple[int, ...]) -> tuple[float, list[bytes]]:
        wide = max((distance(rows[i], rows[j]) for i, j in itertools.combinations(subset, 2)), default=0.0)
        return wide, sorted(ids[i] for i in subset)

    best = min(itertools.combinations(range(len(rows)), len(rows) - f), key=key)
    return rows[list(best)].mean(axis=0)


def by_pivot(rows: Rows, ids: Sequence[bytes], f: int) -> Rows:
    spread = [math.fsum(distance(x, y) for y in rows) for x in rows]
    pivot = min(range(len(rows)), key=lambda i: (spread[i], ids[i]))
    return rows[closest(rows, pivot, len(rows) - f, ids)].mean(axis=0)


def trimmed(rows: Rows, ids: Sequence[bytes], f: int) -> Rows:
    return np.sort(rows, axis=0)[f : len(rows) - f].mean(axis=0)


def around_median(rows: Rows, ids: Sequence[bytes], f: int) -> Rows:
    found = []
    for column in rows.T:
        middle = float(np.median(column))
        found.append(np.mean(sorted(column, key=lambda v: (abs(v - middle), v))[: len(rows) - f]))
    return np.array(found)


def weiszfeld(rows: Rows, ids: Sequence[bytes], f: int, *, steps: int = 100, smoothing: float = 1e-6) -> Rows:
    half = len(rows) // 2
    radius, centre = min((sorted(distance(x, y) for y in rows)[half], i) for i, x in enumerate(rows))
    if not radius:  # most of the points are one: no other point has a smaller sum of distances
        return rows[centre]
    z = rows.mean(axis=0)
    for _ in range(steps):
        pull = np.array([1.0 / max(smoothing * radius, distance(z, x)) for x in rows])
        z = (pull[:, None] * rows).sum(axis=0) / pull.sum()
    return z


def clipping(
    rows: Rows, ids: Sequence[bytes], f: int, *, start: int | None = None, radius: float | None = None, steps: int = 10
) -> Rows:
    v = np.median(rows, axis=0) if start is None else rows[start]
    for _ in range(steps):
        away = [distance(v, x) for x in rows]
        tau = sorted(away)[len(rows) // 2] if radius is None else radius
        v = v + np.mean([(x - v) * min(1.0, tau / d if d else 1.0) for x, d in zip(rows, away, strict=True)], axis=0)
    return v


ORACLES: dict[str, Rule] = {
    "median": lambda rows, ids, f: np.median(rows, axis=0),
    "trimmed_mean": trimmed,
    "meamed": around_median,
    "krum": lambda rows, ids, f: rows[krum_order(rows, ids, f)[0]],
    "multi_krum": lambda rows, ids, f: rows[krum_order(rows, ids, f)[: len(rows) - f]].mean(axis=0),
    "mda": smallest_diameter,
    "nna": by_pivot,
    "geometric_median": weiszfeld,
    "centered_clip": clipping,
}


def staged(rows: Rows, ids: Sequence[bytes], f: int, before: str, size: int) -> tuple[Rows, list[bytes]]:
    """The points after the stage before a rule, with ids."""
    if before == "nnm":
        return np.array([rows[closest(rows, i, len(rows) - f, ids)].mean(axis=0) for i in range(len(rows))]), list(ids)
    if before == "bucketing":
        streams = {one: random123.name(SEED, "bucket", one, "") for one in ids}
        drawn = sorted(range(len(ids)), key=lambda i: [random123.word(streams[ids[i]], element) for element in (0, 1)])
        buckets = [drawn[at : at + size] for at in range(0, len(drawn), size)]
        return np.array([rows[one].mean(axis=0) for one in buckets]), [min(ids[i] for i in one) for one in buckets]
    return rows, list(ids)


def flat(one: Model) -> Rows:
    return np.concatenate([one[name].double().reshape(-1).numpy() for name in sorted(one)])


def default_f(rule: str, points: int) -> int:
    return max(0, (points - BEYOND.get(rule, 1)) // 2)


def ids_of(k: int) -> list[bytes]:
    return [identity(i) for i in range(k)]


def require(found: Model, wanted: Rows, models: Sequence[Model], dtype: str) -> None:
    """Both are good to 1e-11 of the sizes of what they add."""
    size = np.sum([np.abs(flat(one)) for one in models], axis=0)
    at = 0
    for name in sorted(found):
        n = found[name].numel()
        middle = [Fraction(v) for v in wanted[at : at + n].tolist()]
        off = [Fraction(v) * Fraction(1, 10**11) for v in size[at : at + n].tolist()]
        oracles.within(found[name], middle, off, dtype)
        at += n


@EACH_RULE
@BEFORE
@pytest.mark.parametrize(("k", "dtype"), [(1, "F32"), (2, "F16"), (3, "BF16"), (7, "F64"), (8, "F32")])
def test_every_rule_is_its_equation(rule: str, before: str, k: int, dtype: str) -> None:
    models, _ = family(k, dtype)
    points = -(-k // 2) if before == "bucketing" else k
    f = default_f(rule, points)
    ys, ids = staged(np.array([flat(one) for one in models]), ids_of(k), f, before, 2)
    require(merged(rule, models, before=before), ORACLES[rule](ys, ids, f), models, dtype)


@EACH_RULE
@pytest.mark.parametrize("byzantine", [0, 1, 2])
def test_every_rule_takes_a_number_of_liars(rule: str, byzantine: int) -> None:
    models, _ = family(8, "F64", number=300)
    wanted = ORACLES[rule](np.array([flat(one) for one in models]), ids_of(8), byzantine)
    require(merged(rule, models, byzantine=byzantine), wanted, models, "F64")


@pytest.mark.parametrize("size", [1, 3, 8])
def test_buckets_have_the_size_that_is_asked(size: int) -> None:
    models, _ = family(8, "F64", number=300)
    ys, _ = staged(np.array([flat(one) for one in models]), ids_of(8), 0, "bucketing", size)
    found = merged("median", models, before="bucketing", bucket=size)
    require(found, np.median(ys, axis=0), models, "F64")


def test_clipping_and_smoothing_are_what_is_asked() -> None:
    models, _ = family(7, "F64", number=500)
    rows = np.array([flat(one) for one in models])
    wanted = clipping(rows, ids_of(7), 3, start=4, radius=2.5, steps=3)
    found = merged("centered_clip", models, start=identity(4).hex()[:12], radius="2.5", iterations=3)
    require(found, wanted, models, "F64")
    require(
        merged("geometric_median", models, iterations=5, smoothing="0.5"),
        weiszfeld(rows, ids_of(7), 3, steps=5, smoothing=0.5),
        models,
        "F64",
    )


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    models, _ = family(6, "F64", number=700)
    rows = np.array([flat(one) for one in models])
    at = flat(merged("geometric_median", models))
    least = math.fsum(distance(at, x) for x in rows)
    generator = np.random.default_rng(1)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            step = generator.standard_normal(rows.shape[1]) * size / math.sqrt(rows.shape[1])
            assert math.fsum(distance(at + step, x) for x in rows) > least
    for x in rows:
        assert math.fsum(distance(x, y) for y in rows) > least


def test_a_named_pivot_draws_its_neighbours() -> None:
    models, _ = family(7, "F64", number=900)
    rows = np.array([flat(one) for one in models])
    for i in range(7):
        wanted = rows[closest(rows, i, 5, ids_of(7))].mean(axis=0)
        found = merged("nna", models, byzantine=2, pivot=identity(i).hex())
        require(found, wanted, models, "F64")


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("rule", WEIGHTED)
@pytest.mark.parametrize("dtype", STORED)
def test_a_selection_of_all_is_the_weighted_average_to_the_bit(rule: str, dtype: str) -> None:
    models, _ = family(5, dtype)
    weights = ("1", "0.1", "2.5", "0.3", "7")
    average = copied(merge(models, strategy="weight_average", weights=weights))
    assert equal(copied(merge(models, strategy=rule, byzantine=0, weights=weights)), average)


@pytest.mark.parametrize("rule", WEIGHTED)
def test_weights_count_among_the_selected_and_nowhere_else(rule: str) -> None:
    models, _ = family(7, "F64", number=900)
    plain = Prepared(rule, models, byzantine=2).plan["numerators"]
    weights = ["1", "2", "3", "4", "5", "6", "7"]
    told = Prepared(rule, models, byzantine=2, weights=weights).plan["numerators"]
    assert told == [float(w) if n else 0.0 for w, n in zip(weights, plain, strict=True)]
    assert sum(n != 0 for n in told) == 5


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_the_mean_that_is_trimmed_most_is_the_median(k: int) -> None:
    models, _ = family(k, "F64")
    assert equal(merged("trimmed_mean", models), merged("median", models))


@EACH_RULE
@BEFORE
def test_equal_contributions_come_out_as_they_are(rule: str, before: str) -> None:
    one = model(5)
    assert equal(merged(rule, [one] * 7, before=before), one)
    zeros: Model = {name: torch.zeros_like(x) for name, x in one.items()}
    assert equal(merged(rule, [zeros] * 3, before=before), zeros)


@pytest.mark.parametrize("before", ["none", "nnm"])
def test_with_no_liars_nnm_before_anything_is_the_mean(before: str) -> None:
    models, _ = family(6, "F64")
    mean = np.array([flat(one) for one in models]).mean(axis=0)
    for rule in RULES if before == "nnm" else ("trimmed_mean", "mda"):
        require(merged(rule, models, before=before, byzantine=0), mean, models, "F64")


def test_krum_returns_a_contribution_to_the_bit_minus_zero_too() -> None:
    models, _ = family(6)
    for one in models:
        one["bias"][:5] = -0.0
    found = merged("krum", models, byzantine=1)
    assert any(equal(found, one) for one in models)


def grid(k: int, shift: float = 0.0, factor: float = 1.0) -> list[Model]:
    """Models of few bits, so that shifts and powers of two are exact."""
    made = np.random.default_rng(3).integers(-64, 65, (k, 40)).astype(np.float64) / 64
    return [{"w": stored((row + shift) * factor, "F64")} for row in made]


@EACH_RULE
@BEFORE
def test_every_rule_commutes_with_shifts_and_scaling(rule: str, before: str) -> None:
    plain = merged(rule, grid(9), before=before)["w"]
    shifted = merged(rule, grid(9, shift=1024.0), before=before)["w"]
    assert torch.allclose(shifted - 1024.0, plain, rtol=0, atol=1e-11)
    assert torch.equal(merged(rule, grid(9, factor=2.0**-30), before=before)["w"], plain * 2.0**-30)
    if rule != "meamed":  # its ties, of which there are many here, go to the smaller value
        assert torch.allclose(merged(rule, grid(9, factor=-1.0), before=before)["w"], -plain, rtol=0, atol=1e-12)


@EACH_RULE
@pytest.mark.parametrize("before", ["none", "nnm"])
def test_the_order_of_arrival_and_the_cut_change_nothing(rule: str, before: str) -> None:
    shapes = {"a": (150_001,), "b": (300, 7), "empty": (0, 2), "scalar": ()}
    models, _ = family(5, "BF16", shapes=shapes)
    one = Prepared(rule, models, before=before)
    whole = one.applied()
    assert equal(one.applied([1, 777, 65_536, 70_000, 150_000]), whole)
    for stretch, threads in ((131_072, 2), (1 << 20, 1)):
        other = Prepared(rule, models, before=before, stretch=stretch, threads=threads)
        assert other.plan.digest == one.plan.digest
        assert equal(other.run(), whole)
    order = [3, 0, 4, 1, 2]
    small, _ = family(5, "F64")
    again = merge([small[i] for i in order], strategy=rule, before=before, seed=9)
    assert equal(copied(again), copied(merge(small, strategy=rule, before=before, seed=9)))


# ---------------------------------------------------------------- ties, and liars of any size


def corners(k: int) -> list[Model]:
    """Points that are all equally far from each other."""
    return [{"w": row.clone()} for row in torch.eye(k, dtype=torch.float64)]


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "mda", "nna"])
def test_of_equally_near_contributions_the_lowest_content_ids_are_taken(rule: str) -> None:
    ids = [bytes([n]) * 32 for n in (7, 1, 5, 2, 6, 3, 4)]
    numerators = Prepared(rule, corners(7), ids=ids, byzantine=2).plan["numerators"]
    count = 1 if rule == "krum" else 5
    assert {ids[i][0] for i, n in enumerate(numerators) if n} == set(range(1, count + 1))


def test_meamed_keeps_the_smaller_of_two_values_equally_far_from_the_median() -> None:
    models: list[Model] = [{"w": torch.tensor([v], dtype=torch.float64)} for v in (0.0, 2.0, -2.0, 1.0, -1.0)]
    for order in itertools.permutations(models):
        assert float(merged("meamed", list(order), byzantine=1)["w"]) == (0.0 + 1.0 - 1.0 - 2.0) / 4


@EACH_RULE
@BEFORE
@pytest.mark.parametrize("size", [1e3, 1e9])
def test_liars_of_any_size_leave_the_result_among_the_honest(rule: str, before: str, size: float) -> None:
    k, f = (11, 1) if before == "bucketing" else (9, 3)
    honest = grid(k - f)
    liars = [{"w": stored(np.linspace(size, 2 * size, 40) * (i + 1), "F64")} for i in range(f)]
    rows = np.array([flat(one) for one in honest])
    centre = rows.mean(axis=0)
    furthest = max(distance(x, centre) for x in rows)
    found = flat(merged(rule, [*honest, *liars], byzantine=f, before=before))
    assert distance(found, centre) < 1.2 * furthest
    assert distance(flat(merged("weight_average", [*honest, *liars])), centre) > 10 * furthest


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "mda", "nna"])
def test_what_is_not_selected_does_not_enter_at_all(rule: str) -> None:
    honest = grid(6)
    results = [
        merged(rule, [*honest, {"w": stored(np.full(40, size), "F64")}], byzantine=1) for size in (1e6, -1e30, 1e150)
    ]
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_coordinates_stay_between_the_honest_ones(rule: str) -> None:
    generator = np.random.default_rng(5)
    for _ in range(50):
        honest = generator.standard_normal((4, 30))
        liars = generator.choice([-1e30, -3.0, 0.0, 0.5, 1e30], (3, 30))
        found = flat(merged(rule, [{"w": stored(x, "F64")} for x in np.vstack([honest, liars])], byzantine=3))
        assert (found >= honest.min(axis=0)).all()
        assert (found <= honest.max(axis=0)).all()


# ---------------------------------------------------------------- distances


def test_distances_are_exact_where_dot_products_would_cancel() -> None:
    """Weights of 2^26 that differ by 2^-10: a Gram matrix in float64 knows nothing of the difference."""
    steps = np.random.default_rng(1).integers(-1000, 1001, (4, 3000))
    models: list[Model] = [{"w": stored(2.0**26 + row * 2.0**-20, "F64")} for row in steps]
    with viewed(tensors(models, None, metas([1] * 4)), compute="double") as view:
        found = squared_distances(view, 4)
        gram = view.gram(["w"])["w"]
    wanted = [[int(((a - b) ** 2).sum()) * 2.0**-40 for b in steps] for a in steps]
    assert found.tolist() == wanted
    assert abs(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1] - wanted[0][1]) > wanted[0][1]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 37, 2048, 4095, 4096, 4097])
def test_sums_of_small_tensors_have_the_bits_of_the_reduction(n: int) -> None:
    xs = [torch.from_numpy(x) for x in np.random.default_rng(n).standard_normal((4, n))]
    pairs = [(1, 0), (2, 0), (3, 2)]
    for row, (i, j) in zip(block_sums(xs, pairs), pairs, strict=True):
        assert fold(row.numpy()) == dot(xs[i] - xs[j], xs[i] - xs[j])


@pytest.mark.parametrize("k", range(1, 10))
def test_the_network_sorts_every_row_of_zeros_and_ones(k: int) -> None:
    """By the zero-one principle it then sorts everything; every range of ranks gets the same values."""
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=k))).T
    wanted = torch.sort(bits, dim=0, stable=True).values
    assert torch.equal(torch.stack(ascending(list(bits))), wanted)
    for start in range(k):
        for stop in range(start + 1, k + 1):
            assert torch.equal(torch.stack(ascending(list(bits), start, stop)), wanted[start:stop])
    assert all(i < j for i, j in exchanges(k))


# ---------------------------------------------------------------- bucketing draws


def test_buckets_belong_to_contents_and_the_seed() -> None:
    models, _ = family(9, "F64")

    def drawn(seed: int, **how: Any) -> Model:
        return merged("median", models, before="bucketing", seed=bytes([seed]) * 32, **how)

    assert equal(drawn(1), drawn(1))
    assert len({drawn(seed)["weight"].numpy().tobytes() for seed in range(12)}) > 8
    alone = merged("median", [{"bias": one["bias"]} for one in models], before="bucketing", seed=bytes([1]) * 32)
    assert torch.equal(alone["bias"], drawn(1)["bias"])


def test_each_pair_shares_a_bucket_as_often_as_any_other() -> None:
    together = np.zeros((6, 6))
    for seed in range(300):
        for a, b in buckets(ids_of(6), 2, Rng(seed.to_bytes(32, "big"))).members:
            together[a, b] += 1
    counts = together[np.triu_indices(6, 1)]
    assert counts.sum() == 900
    assert (np.abs(counts - 60) < 5 * math.sqrt(60 * 0.8)).all()


# ---------------------------------------------------------------- what is refused

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("krum", {"byzantine": 2}, "needs at least 7 contributions; there are 6"),
    ("median", {"byzantine": 3}, "needs at least 7 contributions; there are 6"),
    ("median", {"byzantine": 2, "before": "bucketing"}, "6 make 3 buckets of 2"),
    ("median", {"byzantine": -1}, "greater than or equal to 0"),
    ("nna", {"byzantine": "1.5"}, "integer"),
    ("nna", {"before": "clipping"}, "'none', 'nnm' or 'bucketing'"),
    ("mda", {"bucket": 0}, "greater than or equal to 1"),
    ("nna", {"pivot": "abc"}, "4 to 64 hexadecimal digits"),
    ("nna", {"pivot": "0" * 64}, "0 contributions have a content id"),
    ("centered_clip", {"start": "zero"}, "median, medoid or the first"),
    ("centered_clip", {"start": "00000000", "before": "bucketing"}, "after bucketing no contribution stands alone"),
    ("centered_clip", {"radius": 0}, "greater than 0"),
    ("geometric_median", {"smoothing": "1.5"}, "less than or equal to 1"),
    ("geometric_median", {"weights": ["1", "2", "1", "1", "1", "1"]}, "counts every contribution once"),
    ("nna", {"weights": ["1", "2", "1", "1", "1", "1"], "before": "nnm"}, "before=nnm counts every contribution once"),
    ("krum", {"byzantine": [{"filter": "bias", "value": 1}, {"value": 0}]}, "no parameters for single tensors"),
    ("median", {"before": [{"filter": "bias", "value": "nnm"}]}, "no parameters for single tensors"),
]


@pytest.mark.parametrize(("rule", "how", "said"), BAD)
def test_what_cannot_be_done_is_refused_with_a_sentence(rule: str, how: dict[str, Any], said: str) -> None:
    models, _ = family(6)
    with pytest.raises(ParameterError, match=said):
        merge(models, strategy=rule, **how)


def test_elementwise_rules_take_parameters_for_single_tensors() -> None:
    models, _ = family(6, "F64")
    found = merged("trimmed_mean", models, byzantine=[{"filter": "bias", "value": 1}, {"value": 0}])
    rows = np.array([one["bias"].numpy() for one in models])
    assert np.allclose(found["bias"].numpy(), trimmed(rows, [], 1), rtol=0, atol=1e-13)
    rows = np.array([one["weight"].reshape(-1).numpy() for one in models])
    assert np.allclose(found["weight"].reshape(-1).numpy(), trimmed(rows, [], 0), rtol=0, atol=1e-13)


def test_mda_finds_the_least_diameter_among_ties() -> None:
    """Points of a small grid: many subsets have one diameter, and the first of them counts."""
    for seed in range(30):
        generator = np.random.default_rng(seed)
        k = int(generator.integers(1, 11))
        f = int(generator.integers(0, (k - 1) // 2 + 1))
        points = generator.integers(0, 5, (k, 2)).astype(np.float64)
        squared = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
        order = generator.permutation(k).tolist()
        places = itertools.combinations(range(k), k - f)
        best = min(places, key=lambda at: (max(squared[order[i], order[j]] for i in at for j in at), at))
        assert least_diameter(squared, order, k - f) == [order[i] for i in best]


def test_mda_looks_through_a_million_subsets_and_refuses_more() -> None:
    generator = np.random.default_rng(2)
    many: list[Model] = [{"w": stored(x, "F64")} for x in generator.standard_normal((24, 3))]
    assert math.comb(22, 10) <= SUBSETS_MAX < math.comb(24, 11)
    with pytest.raises(ParameterError, match="2496144 subsets of 24 points"):
        merged("mda", many, byzantine=11)
    rows = np.array([flat(one) for one in many[:12]])
    require(merged("mda", many[:12], byzantine=5), smallest_diameter(rows, ids_of(12), 5), many[:12], "F64")


@pytest.mark.parametrize("rule", RULES)
def test_tensors_that_some_lack_have_no_distances(rule: str) -> None:
    models, _ = family(5)
    short = [{name: x for name, x in one.items() if name != "bias" or i < 3} for i, one in enumerate(models)]
    for before in ("none", "nnm"):
        if rule in WHOLE or before != "none":
            with pytest.raises(MismatchError, match="compares whole models"):
                merge(short, strategy=rule, missing="skip", before=before)
    if rule not in WHOLE:
        found = copied(merge(short, strategy=rule, missing="skip"))
        three = copied(merge([{"bias": one["bias"]} for one in models[:3]], strategy=rule))
        assert torch.equal(found["bias"], three["bias"])
        with pytest.raises(ParameterError, match="there are 3"):
            merge(short, strategy=rule, missing="skip", byzantine=2)


def test_numbers_that_are_none_have_no_distances_and_spoil_their_element_alone() -> None:
    models, _ = family(5)
    models[1]["bias"][3] = math.nan
    models[2]["bias"][4] = math.inf
    for rule in RULES:
        with pytest.raises(NonFiniteError):
            merge(models, strategy=rule)
    for rule in WHOLE:
        with pytest.raises(NonFiniteError, match="exceeds float64"):
            merge(models, strategy=rule, allow_nonfinite=True)
    for rule in ("median", "trimmed_mean", "meamed"):
        found = merge(models, strategy=rule, allow_nonfinite=True)["bias"]
        assert torch.isnan(found).tolist() == [i == 3 for i in range(37)]
        assert math.isfinite(float(found[4]))


def test_huge_weights_have_no_distances() -> None:
    models: list[Model] = [{"w": stored(np.array([v]), "F64")} for v in (1e200, -1e200, 0.0)]
    with pytest.raises(NonFiniteError, match="exceeds float64"):
        merge(models, strategy="nna")
