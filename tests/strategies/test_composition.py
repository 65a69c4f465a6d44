"""Chains of stages: della, breadcrumbs, lines and ``stages`` compute what their equations say, and are one another.

The oracles are loops over elements in Python's floats and fractions; they share no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import ParameterError, UsageError
from crdtmerge.resolve.merge import merge
from tests.numerics.examples import STORED, stored
from tests.numerics.random123 import name as named
from tests.numerics.random123 import word
from tests.strategies.models import SEED, Model, Prepared, constant, equal, family, identity, merged

DTYPE = pytest.mark.parametrize("dtype", STORED)
SHAPES = {
    "bias": (29,),
    "conv": (3, 2, 5),
    "empty": (0, 3),
    "one": (1,),
    "scalar": (),
    "thin": (6, 1),
    "weight": (7, 9),
}
WEIGHTS = ("1", "0.5", "2.5")
Rows = list[list[float]]


def task_vectors(models: Sequence[Model], base: Model, name: str) -> Rows:
    """tau_i of one tensor; exact for the models that are compared here, or rounded as float64 rounds."""
    return [(model[name].double() - base[name].double()).reshape(-1).tolist() for model in models]


def composed(taus: Rows, weights: Sequence[float], elect: str, combine: str) -> list[float]:
    """combine(elect(...)) element by element."""
    found = []
    for column in zip(*taus, strict=True):
        own = [w * t for w, t in zip(weights, column, strict=True)]
        votes = [math.copysign(1.0, v) if v and elect == "count" else v for v in own]
        plus = math.fsum(votes) >= 0
        agree = [i for i, v in enumerate(own) if elect == "none" or (v > 0 if plus else v < 0)]
        if combine == "max":
            found.append(max((own[i] for i in agree), key=lambda v: (abs(v), v), default=0.0))
        else:
            divisor = math.fsum(weights[i] for i in agree) if combine == "mean" and agree else 1.0
            found.append(math.fsum(own[i] for i in agree) / divisor)
    return found


def by_size(tau: Sequence[float]) -> list[int]:
    """Positions from the largest magnitude to the smallest; of equal ones the lower position first."""
    return sorted(range(len(tau)), key=lambda j: (-abs(tau[j]), j))


def middle(tau: Sequence[float], low: str, high: str) -> list[float]:
    """Without the floor(low n) smallest and the floor(high n) largest."""
    n = len(tau)
    order = by_size(tau)[math.floor(Fraction(high) * n) : n - math.floor(Fraction(low) * n)]
    return [t if j in set(order) else 0.0 for j, t in enumerate(tau)]


def probabilities(tau: Sequence[float], shape: tuple[int, ...], density: str, epsilon: str) -> list[Fraction]:
    """What each element is kept with, by its rank in its row."""
    p, eps, n = Fraction(density), Fraction(epsilon), len(tau)
    width = n if len(shape) < 2 or not n else n // shape[0]
    q = [p] * n
    for start in range(0, n, width) if width > 1 else ():
        ascending = sorted(range(start, start + width), key=lambda j: (abs(tau[j]), j))
        for rank, j in enumerate(ascending):
            q[j] = p - eps + 2 * eps * Fraction(rank, width - 1)
    return q


def pruned(
    tau: Sequence[float], q: Sequence[Fraction], one: bytes, tensor: str, rescale: bool, seed: bytes = SEED
) -> list[float]:
    """Each element kept where its random word lies below its probability, and divided by that."""
    stream = named(seed, "drop", one, tensor)
    return [
        (t / float(p) if rescale else t) if word(stream, j) < p * 2**32 else 0.0
        for j, (t, p) in enumerate(zip(tau, q, strict=True))
    ]


def require(
    found: Mapping[str, torch.Tensor],
    base: Model,
    wanted: Mapping[str, Sequence[float]],
    dtype: str,
    scale: float = 1.0,
) -> None:
    """found = base + scale * wanted, as near as the compute dtype comes (float32 for 16-bit models)."""
    near = 1e-5 if dtype in ("BF16", "F16") else 1e-12
    for name, m in wanted.items():
        expected = base[name].double().reshape(-1) + scale * torch.tensor(m, dtype=torch.float64)
        assert torch.allclose(found[name].double().reshape(-1), expected, rtol=near, atol=near), name


# ---------------------------------------------------------------- della


@DTYPE
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("strategy", "params"),
    [
        ("della", {}),
        ("della", {"density": "0.5", "epsilon": "0.4", "elect": "count", "combine": "sum", "lambda_": "0.3"}),
        ("della", {"drop": "0.6", "epsilon": "0.2", "combine": "max", "rescale": False}),
        ("della_linear", {"density": "0.5", "epsilon": "0.5e-1"}),
        ("della_linear", {"density": "0.25", "epsilon": "0.2", "combine": "mean", "lambda_": "-0.7"}),
    ],
)
def test_della_keeps_by_rank_in_the_row(strategy: str, params: dict[str, Any], dtype: str, k: int) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    wide = "F64" if dtype in ("F32", "F64") else "F32"
    found = merged(strategy, models, base, weights=WEIGHTS[:k], out=wide, **params)
    density = params.get("density", str(1 - Fraction(params["drop"])) if "drop" in params else "0.7")
    elect, combine = ("none", "sum") if strategy == "della_linear" else (params.get("elect", "sum"), "mean")
    wanted = {}
    for name, shape in SHAPES.items():
        sparse = [
            pruned(
                tau,
                probabilities(tau, shape, density, params.get("epsilon", "0.07")),
                identity(i),
                name,
                params.get("rescale", True),
            )
            for i, tau in enumerate(task_vectors(models, base, name))
        ]
        wanted[name] = composed(sparse, [float(w) for w in WEIGHTS[:k]], elect, params.get("combine", combine))
    require(found, base, wanted, dtype, float(params.get("lambda_", 1)))


def test_equal_magnitudes_are_ranked_by_position() -> None:
    """With probabilities from almost 0 to 1 the first of equal elements go and the last stay."""
    ones: Model = {"w": torch.tensor([[1.0, -1.0] * 50] * 40)}
    found = merged("della_linear", [ones], constant(ones), density="0.5", epsilon="0.4999999", rescale=False)["w"]
    share = (found != 0).double().sum(dim=0) / 40
    assert share[0] == 0
    assert share[-1] == 1
    assert float(share[:33].mean()) < 0.25 < 0.42 < float(share[33:66].mean()) < 0.58 < 0.75 < float(share[66:].mean())


@DTYPE
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("density", ["0.7", "0.3333333333333333333333", "1"])
@pytest.mark.parametrize(("one", "other"), [("della", "dare_ties"), ("della_linear", "dare_linear")])
def test_without_a_window_della_is_dare(one: str, other: str, density: str, dtype: str, k: int) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    first = merged(one, models, constant(base), density=density, epsilon=0)
    second = merged(other, models, constant(base), density=density)
    ulp = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-50}[dtype]
    for name in base:
        assert torch.equal(first[name] == 0, second[name] == 0), "the masks are one"
        assert torch.allclose(first[name].double(), second[name].double(), rtol=ulp, atol=0)


SEEDS = 400


@pytest.mark.parametrize(
    ("strategy", "params"),
    [
        ("dare_linear", {"density": "0.3"}),
        ("della_linear", {"density": "0.5", "epsilon": "0.4"}),
        ("della", {"density": "0.4", "epsilon": "0.1"}),
        ("stages", {"sparsify": "magprune", "density": "0.6", "epsilon": "0.25"}),
        ("stages", {"sparsify": "bernoulli", "density": "0.8"}),
    ],
)
def test_the_mean_over_seeds_is_the_task_vector(strategy: str, params: dict[str, str]) -> None:
    """Each z within 4.5, their squares as chi-square; ``della`` of one model, where the election changes nothing."""
    shape = (6, 10)
    (one,), base = family(1, "F64", shapes={"w": shape})
    tau = (one["w"] - base["w"]).reshape(-1)
    if "epsilon" in params:
        q = [float(p) for p in probabilities(tau.tolist(), shape, params["density"], params["epsilon"])]
    else:
        q = [float(params["density"])] * len(tau)
    keep = torch.tensor(q, dtype=torch.float64)
    total = torch.zeros_like(tau)
    for seed in range(SEEDS):
        found = merged(strategy, [one], base, seed=seed.to_bytes(32, "big"), **params)["w"]
        total += (found - base["w"]).reshape(-1)
    z = (total / SEEDS - tau) / (tau.abs() * torch.sqrt((1 - keep) / keep / SEEDS))
    assert float(z.abs().max()) < 4.5
    assert abs(float((z * z).sum()) - len(z)) < 5 * math.sqrt(2 * len(z))


def test_without_rescaling_large_elements_shrink_less() -> None:
    shape = (500, 20)
    (one,), _ = family(1, "F64", shapes={"w": shape})
    found = merged("della_linear", [one], constant(one), density="0.5", epsilon="0.3", rescale=False)["w"]
    rank = one["w"].abs().argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    for r in range(20):
        share = float((found[rank == r] != 0).double().mean())
        q = 0.2 + 0.6 * r / 19
        assert abs(share - q) < 5 * math.sqrt(q * (1 - q) / 500)


@DTYPE
def test_dare_linear_is_dare(dtype: str) -> None:
    models, base = family(3, dtype)
    how: dict[str, Any] = {"weights": WEIGHTS, "density": "0.4", "lambda_": "0.3"}
    assert equal(merged("dare_linear", models, base, **how), merged("dare", models, base, **how))


@pytest.mark.parametrize("strategy", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("density", "epsilon"), [("0.05", "0.07"), ("0.95", "0.07"), ("1", "1e-9"), ("0.5", "0.5"), ("0.5", "-0.1")]
)
def test_probabilities_outside_of_0_to_1_are_refused(strategy: str, density: str, epsilon: str) -> None:
    models, base = family(1)
    with pytest.raises(ParameterError, match=f"strategy '{strategy}': epsilon"):
        merge(models, strategy=strategy, base=base, density=density, epsilon=epsilon)


# ---------------------------------------------------------------- breadcrumbs


BANDS = [("0.85", "0.007"), ("0.3", "0.2"), ("0", "0.5"), ("0.5", "0"), ("0", "0"), ("0.4999", "0.5")]


@DTYPE
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("low", "high"), BANDS)
def test_breadcrumbs_drop_both_ends_of_each_tensor(dtype: str, k: int, low: str, high: str) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    wide = "F64" if dtype in ("F32", "F64") else "F32"
    for strategy, elect, combine in (("model_breadcrumbs", "none", "sum"), ("breadcrumbs_ties", "sum", "mean")):
        how: dict[str, Any] = {"drop_low": low, "drop_high": high, "lambda_": "0.4"}
        found = merged(strategy, models, base, weights=WEIGHTS[:k], out=wide, **how)
        wanted = {
            name: composed(
                [middle(tau, low, high) for tau in task_vectors(models, base, name)],
                [float(w) for w in WEIGHTS[:k]],
                elect,
                combine,
            )
            for name in SHAPES
        }
        require(found, base, wanted, dtype, 0.4)


@pytest.mark.parametrize(("low", "high"), [("0.25", "0.125"), ("0.7", "0.29"), ("0", "0.9"), ("0.99", "0")])
def test_the_counts_are_exact_where_all_magnitudes_are_equal(low: str, high: str) -> None:
    n = 97
    ones: Model = {"w": torch.tensor([1.0, -1.0] * n)[:n]}
    found = merged("model_breadcrumbs", [ones], constant(ones), drop_low=low, drop_high=high)["w"]
    first, last = math.floor(Fraction(high) * n), n - math.floor(Fraction(low) * n)
    assert torch.nonzero(found).reshape(-1).tolist() == list(range(first, last))


def test_a_tensor_too_small_to_lose_one_element_is_kept_as_it_is() -> None:
    """Where mergekit sets it back to the base: floor(0.01 * 99) is 0."""
    models, base = family(1, "F64", shapes={"w": (99,)})
    found = merged("model_breadcrumbs", models, base, drop_low=0, drop_high="0.01")
    assert torch.allclose(found["w"], models[0]["w"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_breadcrumbs_that_drop_nothing_are_task_arithmetic(dtype: str) -> None:
    models, base = family(3, dtype)
    how: dict[str, Any] = {"weights": WEIGHTS, "lambda_": "0.3"}
    one = merged("model_breadcrumbs", models, base, drop_low=0, drop_high=0, **how)
    assert equal(one, merged("task_arithmetic", models, base, **how))


@DTYPE
@pytest.mark.parametrize(("low", "density"), [("0.5", "0.5"), ("0.25", "0.75")])
def test_breadcrumbs_that_drop_nothing_large_are_ties_that_elects_nothing(dtype: str, low: str, density: str) -> None:
    """Where the share is a whole number of elements: one rounds down what goes, the other what stays."""
    models, base = family(3, dtype, shapes={"a": (64,), "b": (4, 32)})
    one = merged("model_breadcrumbs", models, base, drop_low=low, drop_high=0)
    how: dict[str, Any] = {"sparsify": "magnitude", "scope": "tensor", "density": density}
    assert equal(one, merged("stages", models, base, **how))
    alone = merged("breadcrumbs_ties", models[:1], base, drop_low=low, drop_high=0)
    assert equal(alone, merged("ties", models[:1], base, scope="tensor", density=density))


def test_shares_that_leave_nothing_are_refused() -> None:
    models, base = family(1)
    for strategy in ("model_breadcrumbs", "breadcrumbs_ties"):
        with pytest.raises(ParameterError, match=rf"'{strategy}': drop_high: drop_low \+ drop_high = 1.0; must be bel"):
            merge(models, strategy=strategy, base=base, drop_low="0.6", drop_high="0.4")
        with pytest.raises(ParameterError, match="drop_low"):
            merge(models, strategy=strategy, base=base, drop_low="-0.1")


# ---------------------------------------------------------------- lines


DEEP = {"embed.w": (5,), "h.0.w": (4,), "h.1.b": (3,), "h.1.w": (2, 3), "h.3.w": (4,), "head": (2,), "scalar": ()}
DEPTHS = {"h.0.w": 0, "h.1.b": 1, "h.1.w": 1, "h.3.w": 3}


@DTYPE
@pytest.mark.parametrize(("alpha", "beta"), [("auto", "0.5"), ("0.3", "1.7"), ("-1", "0"), ("0", "-0.25")])
def test_lines_scales_layers_from_alpha_to_alpha_and_beta(dtype: str, alpha: str, beta: str) -> None:
    models, base = family(3, dtype, shapes=DEEP)
    found = merged("lines", models, base, weights=WEIGHTS, alpha=alpha, beta=beta, out="F64")
    for name in DEEP:
        scale = (Fraction(1, 3) if alpha == "auto" else Fraction(alpha)) + Fraction(beta) * DEPTHS.get(name, 0) / 3
        tau = composed(task_vectors(models, base, name), [float(w) for w in WEIGHTS], "none", "sum")
        require({name: found[name]}, base, {name: tau}, "F64", float(scale))


@DTYPE
def test_lines_of_no_rise_is_task_arithmetic(dtype: str) -> None:
    models, base = family(3, dtype, shapes=DEEP)
    one = merged("lines", models, base, alpha="0.3", beta=0)
    assert equal(one, merged("task_arithmetic", models, base, lambda_="0.3"))
    flat = {name: shape for name, shape in DEEP.items() if name in ("embed.w", "h.0.w", "head")}
    models, base = family(3, dtype, shapes=flat)
    one = merged("lines", models, base, alpha="0.3", beta=7)
    assert equal(one, merged("task_arithmetic", models, base, lambda_="0.3")), "one layer has no slope"


@pytest.mark.parametrize(
    ("layer", "numbers"),
    [
        (".#.", {"block.2.attn.7.w": 2, "7.w": 7, "x.11": 11, "x7.w": None, "norm": None, "a.b.w": None}),
        ("attn.#.", {"block.2.attn.7.w": 7, "7.w": None, "x.11": None}),
        ("x#.", {"x7.w": 7, "x.11": None, "block.2.attn.7.w": None}),
        (".(#)", {"a.(3)b": 3, "a.3": None, "a.(3": None}),
    ],
)
def test_the_number_of_a_layer_is_read_from_the_name(layer: str, numbers: dict[str, int | None]) -> None:
    names = dict.fromkeys(numbers, (1,))
    models, base = family(1, "F64", shapes=names)
    plan = Prepared("lines", models, base, layer=layer, alpha=0, beta=1).plan
    last = max(number or 0 for number in numbers.values())
    assert plan["scales"] == {name: (number or 0) / (last or 1) for name, number in numbers.items()}


@pytest.mark.parametrize("layer", ["", "layers", "#.#", "##"])
def test_a_layer_without_one_number_is_refused(layer: str) -> None:
    models, base = family(1)
    with pytest.raises(ParameterError, match=r"layer: .* must hold one # where the number of a layer stands"):
        merge(models, strategy="lines", base=base, layer=layer)


def test_alpha_is_auto_or_a_number_and_spelled_in_one_way() -> None:
    models, base = family(2, shapes=DEEP)
    ids = {merge(models, strategy="lines", base=base, alpha=alpha).receipt.recipe.id for alpha in (0.5, "0.50", "5e-1")}
    assert len(ids) == 1
    assert merge(models, strategy="lines", base=base).receipt.recipe.params["alpha"] == "auto"
    with pytest.raises(ParameterError, match="alpha: 'car' is not a number"):
        merge(models, strategy="lines", base=base, alpha="car")


@pytest.mark.parametrize(
    "params",
    [
        {"sparsify": "magnitude", "density": "0.4", "elect": "sum", "combine": "mean"},
        {"sparsify": "magprune", "density": "0.5", "epsilon": "0.2", "elect": "sum", "combine": "mean"},
        {"sparsify": "band", "drop_low": "0.3", "drop_high": "0.1"},
        {"elect": "count", "combine": "max"},
        {},
    ],
)
def test_auto_makes_up_for_what_a_merge_loses_of_the_sum(params: dict[str, Any]) -> None:
    """alpha = (|sum tau|_1 / |merged|_1) / k; the merged vector is read off a merge with scale 1."""
    models, base = family(3, "F64", shapes=DEEP)
    plain = merged("stages", models, base, **params)
    above = below = 0.0
    for name in DEEP:
        taus = task_vectors(models, base, name)
        above += math.fsum(abs(math.fsum(column)) for column in zip(*taus, strict=True))
        below += float((plain[name] - base[name]).abs().sum())
    found = Prepared("stages", models, base, scale="lines", beta=1, **params)
    for name in DEEP:
        expected = above / below / 3 + DEPTHS.get(name, 0) / 3
        assert found.plan["scales"][name] == pytest.approx(expected, rel=1e-12)
        m = (plain[name] - base[name]) * expected
        assert torch.allclose(found.run()[name], base[name] + m, rtol=0, atol=1e-12)


def test_auto_of_no_change_at_all_is_one_kth() -> None:
    _, base = family(1, "F64", shapes=DEEP)
    found = Prepared("stages", [base, base], base, scale="lines", sparsify="magnitude")
    assert found.plan["scales"]["head"] == 0.5
    assert all(torch.equal(x, base[name]) for name, x in found.run().items())


# ---------------------------------------------------------------- stages


PRESETS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ties", {"density": "0.3"}, {"sparsify": "magnitude", "elect": "sum", "combine": "mean"}),
    (
        "ties",
        {"density": "0.6", "scope": "tensor", "elect": "count", "combine": "max"},
        {"sparsify": "magnitude"},
    ),
    ("dare", {"density": "0.4"}, {"sparsify": "bernoulli"}),
    ("dare", {"density": "0.4", "combine": "mean", "rescale": False}, {"sparsify": "bernoulli"}),
    ("dare_ties", {"density": "0.4"}, {"sparsify": "bernoulli", "elect": "sum", "combine": "mean"}),
    ("della", {"density": "0.4", "epsilon": "0.3"}, {"sparsify": "magprune", "elect": "sum", "combine": "mean"}),
    ("della_linear", {"density": "0.4", "epsilon": "0.1"}, {"sparsify": "magprune"}),
    ("model_breadcrumbs", {"drop_low": "0.4", "drop_high": "0.1"}, {"sparsify": "band"}),
    ("breadcrumbs_ties", {"drop_low": "0.4", "elect": "count", "combine": "sum"}, {"sparsify": "band"}),
    ("magmax", {}, {"combine": "max"}),
]


@DTYPE
@pytest.mark.parametrize(("strategy", "params", "stages"), PRESETS)
@pytest.mark.parametrize("kernels", [False, True])
def test_named_strategies_are_compositions(
    strategy: str, params: dict[str, Any], stages: dict[str, Any], dtype: str, kernels: bool
) -> None:
    models, base = family(3, dtype)
    how: dict[str, Any] = {"weights": WEIGHTS, "lambda_": "0.7", "use_kernels": kernels}
    one = Prepared(strategy, models, base, **how, **params)
    other = Prepared("stages", models, base, **how, **{**stages, **params})
    assert equal(one.run(), other.run())
    assert one.plan.digest == other.plan.digest


@pytest.mark.parametrize("sparsify", ["none", "magnitude", "band", "bernoulli", "magprune"])
@pytest.mark.parametrize("elect", ["none", "sum", "count"])
@pytest.mark.parametrize("combine", ["sum", "mean", "max"])
def test_any_stages_compose(sparsify: str, elect: str, combine: str) -> None:
    models, base = family(3, "F64", shapes=SHAPES)
    params: dict[str, Any] = {
        "magnitude": {"scope": "tensor", "density": "0.4"},
        "band": {"drop_low": "0.4", "drop_high": "0.2"},
        "bernoulli": {"density": "0.6"},
        "magprune": {"density": "0.6", "epsilon": "0.3"},
    }.get(sparsify, {})
    found = merged("stages", models, base, weights=WEIGHTS, sparsify=sparsify, elect=elect, combine=combine, **params)
    wanted = {}
    for name, shape in SHAPES.items():
        taus = task_vectors(models, base, name)
        if sparsify == "magnitude":
            kept = [set(by_size(tau)[: max(1, math.floor(Fraction("0.4") * len(tau)))]) for tau in taus]
            taus = [[t if j in own else 0.0 for j, t in enumerate(tau)] for tau, own in zip(taus, kept, strict=True)]
        if sparsify == "band":
            taus = [middle(tau, "0.4", "0.2") for tau in taus]
        if sparsify in ("bernoulli", "magprune"):
            window = params.get("epsilon", "0")
            taus = [
                pruned(tau, probabilities(tau, shape, "0.6", window), identity(i), name, True)
                for i, tau in enumerate(taus)
            ]
        wanted[name] = composed(taus, [float(w) for w in WEIGHTS], elect, combine)
    require(found, base, wanted, "F64")


REFUSED = [
    (
        {"density": "0.5"},
        "density: sparsify=none does not use it; it belongs to sparsify=magnitude|bernoulli|magprune.",
    ),
    ({"sparsify": "band", "density": "0.5"}, "density: sparsify=band does not use it"),
    ({"sparsify": "bernoulli", "scope": "tensor"}, "scope: sparsify=bernoulli does not use it"),
    ({"sparsify": "magnitude", "rescale": False}, "rescale: sparsify=magnitude does not use it"),
    ({"sparsify": "bernoulli", "epsilon": "0.1"}, "epsilon: sparsify=bernoulli does not use it"),
    ({"sparsify": "magprune", "drop_low": "0.1"}, "drop_low: sparsify=magprune does not use it"),
    ({"drop_high": "0.1"}, "drop_high: sparsify=none does not use it; it belongs to sparsify=band. Leave it out."),
    ({"scale": "lines", "lambda_": "0.5"}, "lambda: scale=lines does not use it"),
    ({"alpha": "0.5"}, "alpha: scale=const does not use it; it belongs to scale=lines. Leave it out."),
    ({"beta": "0.1"}, "beta: scale=const does not use it"),
    ({"layer": "h.#."}, "layer: scale=const does not use it"),
    ({"sparsify": "magprune", "density": "0.05"}, "epsilon: keeps with probabilities from -0.02 to 0.12"),
    ({"sparsify": "band", "drop_high": "0.5"}, "drop_high: drop_low + drop_high = 1.35; must be below 1"),
    ({"sparsify": "topk"}, "sparsify"),
    ({"sparsify": "magnitude", "density": 0}, "density"),
]


@pytest.mark.parametrize(("params", "why"), REFUSED)
def test_parameters_that_the_stages_do_not_use_are_refused(params: dict[str, Any], why: str) -> None:
    models, base = family(1)
    with pytest.raises(ParameterError) as refused:
        merge(models, strategy="stages", base=base, **params)
    assert str(refused.value).startswith(f"strategy 'stages': {why}")


def test_defaults_may_be_said_though_nothing_uses_them() -> None:
    models, base = family(2)
    said = merge(models, strategy="stages", base=base, density="0.2", layer=".#.", epsilon="0.070", rescale=True)
    assert said.receipt.recipe.id == merge(models, strategy="stages", base=base).receipt.recipe.id


def test_the_stages_of_some_tensors_may_be_others() -> None:
    models, base = family(2, shapes=DEEP)
    rules = [{"filter": "h.*", "value": "max"}, {"value": "mean"}]
    found = merged("stages", models, base, combine=rules)
    for name in DEEP:
        wanted = merged("stages", models, base, combine="max" if name.startswith("h.") else "mean")
        assert torch.equal(found[name], wanted[name])
    rules = [{"filter": "h.*", "value": "none"}, {"value": "band"}]
    found = merged("stages", models, base, sparsify=rules)
    for name in DEEP:
        wanted = merged("stages", models, base, sparsify="none" if name.startswith("h.") else "band")
        assert torch.equal(found[name], wanted[name])


def test_one_share_of_the_model_or_many_of_its_tensors() -> None:
    models, base = family(2, shapes=DEEP)
    rules = [{"filter": "h.*", "value": "0.3"}, {"value": "0.5"}]
    with pytest.raises(ParameterError, match="'stages': scope=model takes one share of the whole model"):
        merge(models, strategy="stages", base=base, sparsify="magnitude", density=rules)
    found = merge(models, strategy="stages", base=base, sparsify="magnitude", density=rules, scope="tensor")
    assert set(found) == set(DEEP)


@pytest.mark.parametrize("strategy", ["della", "della_linear", "model_breadcrumbs", "breadcrumbs_ties", "lines"])
def test_a_base_is_needed_and_negative_weights_only_where_they_make_sense(strategy: str) -> None:
    models, base = family(2, shapes=DEEP)
    if strategy in ("della", "breadcrumbs_ties"):
        with pytest.raises(UsageError, match=f"strategy '{strategy}' takes none below 0"):
            merge(models, strategy=strategy, base=base, weights=[1, -1])
    else:
        merge(models, strategy=strategy, base=base, weights=[1, -1])


def test_rows_of_one_element_have_no_rank() -> None:
    """mergekit divides by zero here: with n = 1 the probability is the density."""
    n = 4000
    ones: Model = {"w": stored(np.ones(n), "F32").reshape(n, 1)}
    found = merged("della_linear", [ones], constant(ones), density="0.3", epsilon="0.25")["w"]
    assert set(found.reshape(-1).tolist()) == {0.0, float(torch.tensor(1.0 / 0.3))}
    assert abs(int((found != 0).sum()) - 0.3 * n) < 5 * math.sqrt(n * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("name", "other", "params"),
    [
        ("breadcrumbs", "model_breadcrumbs", {"drop_low": "0.3", "drop_high": "0.1", "lambda": "0.5"}),
        ("ramplus_tl", "ram", {"r": "0.1", "scope": "tensor"}),
    ],
)
def test_another_name_is_the_same_strategy_to_the_bit(name: str, other: str, params: dict[str, Any]) -> None:
    models, base = family(3)
    said = {} if name == "ramplus_tl" else params
    assert equal(merged(name, models, base, **said), merged(other, models, base, **params))
