"""What sce, emr, consensus_ta, ram, nearswap, passthrough and the strategies that forget compute, and how they agree.

The oracles are loops over elements in Python's floats, written from the equations; they share no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import NeedsError, ParameterError, UsageError
from crdtmerge.resolve.merge import merge
from tests.numerics.examples import STORED, stored
from tests.strategies.models import Model, Prepared, constant, copied, equal, family, merged, model
from tests.strategies.test_composition import SHAPES, WEIGHTS, by_size, composed, require, task_vectors

DTYPE = pytest.mark.parametrize("dtype", STORED)
COUNTS = pytest.mark.parametrize("k", [1, 2, 3])
W = [float(w) for w in WEIGHTS]
Columns = list[tuple[float, ...]]


def wide(dtype: str) -> str:
    """An output dtype that shows all that was computed in float64."""
    return "F64" if dtype in ("F32", "F64") else "F32"


def columns(models: Sequence[Model], base: Model, name: str) -> Columns:
    """The task vectors of one tensor, element by element."""
    return list(zip(*task_vectors(models, base, name), strict=True))


# ---------------------------------------------------------------- sce


@DTYPE
@COUNTS
@pytest.mark.parametrize("density", ["0.1", "0.5", "1", "0.0001"])
def test_sce_selects_by_variance_and_weighs_by_energy(dtype: str, k: int, density: str) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    found = merged("sce", models, base, weights=WEIGHTS[:k], density=density, lambda_="0.7", out=wide(dtype))
    wanted = {}
    for name in SHAPES:
        taus = task_vectors(models, base, name)
        variance = [float(np.var(column)) if k > 1 else 0.0 for column in zip(*taus, strict=True)]
        chosen = set(by_size(variance)[: max(1, math.floor(Fraction(density) * len(variance)))])
        taus = [[t if j in chosen else 0.0 for j, t in enumerate(tau)] for tau in taus]
        energy = [w * math.fsum(t * t for t in tau) for w, tau in zip(W, taus, strict=False)]
        m = []
        for column in zip(*taus, strict=True):
            plus = math.fsum(column) >= 0
            agree = [i for i, t in enumerate(column) if (t > 0 if plus else t < 0)]
            mass = math.fsum(energy[i] for i in agree)
            m.append(math.fsum(energy[i] * column[i] for i in agree) / mass if mass else 0.0)
        wanted[name] = m
    require(found, base, wanted, dtype, 0.7)


def test_sce_of_equal_variances_takes_the_lowest_positions() -> None:
    zeros: Model = {"w": torch.zeros(10)}
    a: Model = {"w": torch.tensor([1.0, -1.0] * 5)}
    b: Model = {"w": torch.tensor([3.0, -3.0] * 5)}
    assert merged("sce", [a, b], zeros, density="0.35")["w"].tolist() == pytest.approx([2.8, -2.8, 2.8] + [0.0] * 7)
    assert merged("sce", [a], zeros, density="0.35")["w"].tolist() == [1.0, -1.0, 1.0] + [0.0] * 7


def test_sce_of_tiny_task_vectors_still_weighs_by_energy() -> None:
    """mergekit makes the weights equal here."""
    zeros: Model = {"w": torch.zeros(1)}
    models: list[Model] = [{"w": torch.tensor([1e-6])}, {"w": torch.tensor([3e-6])}]
    assert merged("sce", models, zeros)["w"].item() == pytest.approx(2.8e-6, rel=1e-6)


# ---------------------------------------------------------------- emr


@DTYPE
@COUNTS
def test_the_unified_vector_is_the_largest_of_the_elected_sign(dtype: str, k: int) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    found = merged("emr", models, base, weights=WEIGHTS[:k], out=wide(dtype))
    wanted = {name: composed(task_vectors(models, base, name), W[:k], "sum", "max") for name in SHAPES}
    require(found, base, wanted, dtype)


@DTYPE
@pytest.mark.parametrize("weights", [("1", "1"), ("2.5", "0.3")])
def test_the_unified_vector_of_two_is_magmax_to_the_bit(dtype: str, weights: tuple[str, str]) -> None:
    for number in range(5):
        models, base = family(2, dtype, number=50 * number)
        mirrored: Model = {name: base[name] - (x - base[name]) for name, x in models[0].items()}
        for pair in (models, [models[0], mirrored]):
            assert equal(merged("emr", pair, base, weights=weights), merged("magmax", pair, base, weights=weights))


def test_the_unified_vector_of_three_is_not_the_fold_of_two() -> None:
    (a, b, c), base = family(3, "F64")
    folded = merged("emr", [merged("emr", [a, b], base), c], base)
    assert not torch.allclose(folded["weight"], merged("emr", [a, b, c], base)["weight"], rtol=0, atol=1e-6)


def emr_oracle(models: Sequence[Model], base: Model, t: int, norm: str) -> tuple[dict[str, list[float]], float]:
    """M_t tau_uni of each tensor, and lambda_t."""
    masked, above, below = {}, 0.0, 0.0
    for name in base:
        m, own = [], []
        for column in columns(models, base, name):
            agree = [v for v in column if (v > 0 if math.fsum(column) >= 0 else v < 0)]
            uni = max(agree, key=abs, default=0.0)
            m.append(uni if uni * column[t] > 0 else 0.0)
            own.append(abs(column[t]))
        size = max(len(m), 1) if norm == "tensor_mean" else 1
        masked[name] = m
        above, below = above + math.fsum(own) / size, below + math.fsum(map(abs, m)) / size
    return masked, above / below


@pytest.mark.parametrize("dtype", ["BF16", "F64"])
@COUNTS
@pytest.mark.parametrize("norm", ["global", "tensor_mean"])
def test_the_modulated_vector_is_masked_and_rescaled_for_one_task(dtype: str, k: int, norm: str) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    tasks = [f"task {i}" for i in range(k)]
    for t in range(k):
        how: dict[str, Any] = {"emit": "modulated", "task": tasks[t], "rescale_norm": norm, "dtype": wide(dtype)}
        found = copied(merge(models, strategy="emr", base=base, tasks=tasks, **how))
        masked, scale = emr_oracle(models, base, t, norm)
        require(found, base, masked, dtype, scale)


def test_the_rescaler_keeps_the_l1_norm_of_the_task() -> None:
    models, base = family(3, "F64", shapes=SHAPES)
    how: dict[str, Any] = {"strategy": "emr", "base": base, "tasks": ["a", "b", "c"], "emit": "modulated"}
    for task, one in zip("abc", models, strict=True):
        found = merge(models, task=task, **how)
        size = math.fsum(float((found[name] - base[name]).abs().sum()) for name in SHAPES)
        assert size == pytest.approx(math.fsum(float((one[name] - base[name]).abs().sum()) for name in SHAPES), 1e-14)
    alone = merge(models[:1], strategy="emr", base=base, tasks=["a"], emit="modulated", task="a")
    assert equal(copied(alone), merged("emr", models[:1], base)), "of one model lambda is 1 and the mask whole"
    same = merge([base], strategy="emr", base=base, tasks=["a"], emit="modulated", task="a")
    assert all(torch.equal(same[name], x) for name, x in base.items()), "0 / 0 is 1"


def test_the_rescaler_does_not_depend_on_blocks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = family(2, "F32", shapes={"a": (200_003,), "b": (70_000,)})
    how: dict[str, Any] = {"base": base, "tasks": ["x", "y"], "emit": "modulated", "task": "y"}
    one = merge(models, strategy="emr", threads=1, **how)
    monkeypatch.setenv("CRDTMERGE_BLOCK", str(65_536))
    other = merge(models, strategy="emr", threads=2, **how)
    assert one.receipt.to_bytes() == other.receipt.to_bytes()
    assert equal(copied(one), copied(other))


def test_a_task_must_be_claimed_by_exactly_one_contribution() -> None:
    models, base = family(2)
    how: dict[str, Any] = {"strategy": "emr", "base": base, "emit": "modulated"}
    with pytest.raises(
        ParameterError, match=r"task = 'z': 0 contributions have this task, one must. Tasks claimed: 'x'"
    ):
        merge(models, tasks=["x", "y"], task="z", **how)
    with pytest.raises(ParameterError, match="task = 'x': 2 contributions have this task"):
        merge(models, tasks=["x", "x"], task="x", **how)
    with pytest.raises(ParameterError, match="Tasks claimed: none"):
        merge(models, task="x", **how)
    with pytest.raises(ParameterError, match="task: emit=modulated emits the vector of one task; name it"):
        merge(models, **how)
    with pytest.raises(ParameterError, match="task: emit=unified is one vector for all tasks and does not use it"):
        merge(models, strategy="emr", base=base, task="x")
    with pytest.raises(ParameterError, match="rescale_norm: emit=unified is not rescaled and does not use it"):
        merge(models, strategy="emr", base=base, rescale_norm="tensor_mean")
    rules = [{"filter": "bias", "value": "global"}, {"value": "tensor_mean"}]
    with pytest.raises(ParameterError, match="'emr': its parameters hold for the whole model"):
        merge(models, tasks=["x", "y"], task="x", rescale_norm=rules, **how)


def test_a_tensor_that_the_task_lacks_stays_that_of_the_base() -> None:
    models, base = family(2)
    part: Model = {name: x for name, x in models[0].items() if name != "weight"}
    how: dict[str, Any] = {"base": base, "tasks": ["x", "y"], "emit": "modulated", "task": "x", "missing": "skip"}
    found = merge([part, models[1]], strategy="emr", **how)
    assert torch.equal(found["weight"], base["weight"])
    assert not torch.equal(found["bias"], base["bias"])


# ---------------------------------------------------------------- consensus_ta


@DTYPE
@COUNTS
@pytest.mark.parametrize(("mask", "least"), [("0.4", 2), ("0.2", 1), ("1", 3), ("0", 2)])
def test_consensus_keeps_what_enough_tasks_need(dtype: str, k: int, mask: str, least: int) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    found = merged(
        "consensus_ta",
        models,
        base,
        weights=WEIGHTS[:k],
        lambda_mask=mask,
        k_thr=least,
        lambda_="0.5",
        out=wide(dtype),
    )
    wanted = {}
    for name in SHAPES:
        m = []
        for column in columns(models, base, name):
            own = [w * t for w, t in zip(W, column, strict=False)]
            tau = math.fsum(own)
            m.append(tau if sum(abs(t) > float(mask) * abs(tau - t) for t in own) >= least else 0.0)
        wanted[name] = m
    require(found, base, wanted, dtype, 0.5)


@DTYPE
def test_consensus_of_nobody_is_task_arithmetic_and_of_more_than_all_the_base(dtype: str) -> None:
    models, base = family(3, dtype)
    how: dict[str, Any] = {"weights": WEIGHTS, "lambda_": "0.3"}
    assert equal(merged("consensus_ta", models, base, k_thr=0, **how), merged("task_arithmetic", models, base, **how))
    assert all(torch.equal(x, base[n]) for n, x in merged("consensus_ta", models, base, k_thr=4, **how).items())


# ---------------------------------------------------------------- ram


@DTYPE
@COUNTS
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"epsilon": "0.2"},
        {"epsilon": "0.2", "r": "0.1"},
        {"epsilon": "0.25", "r": "3", "alpha": "1.5"},
        {"epsilon": "0.25", "r": "3", "alpha": "1.5", "scope": "tensor"},
    ],
)
def test_ram_adds_what_is_unique_and_averages_what_is_shared(dtype: str, k: int, params: dict[str, str]) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    found = merged("ram", models, base, weights=WEIGHTS[:k], out=wide(dtype), **params)
    epsilon, r, alpha = (float(params.get(one, said)) for one, said in (("epsilon", "1e-5"), ("r", 0), ("alpha", 0.2)))
    changed = {
        name: [[i for i, t in enumerate(column) if abs(t) > epsilon] for column in columns(models, base, name)]
        for name in SHAPES
    }
    wanted = {}
    for name in SHAPES:
        counted = [one for at in ([name] if params.get("scope") == "tensor" else SHAPES) for one in changed[at]]
        shared = [sum(i in one and len(one) > 1 for one in counted) for i in range(k)]
        unique = [sum(one == [i] for one in counted) for i in range(k)]
        scales = [1 + r * min(s / u, alpha) if u else 1.0 for s, u in zip(shared, unique, strict=True)]
        m = []
        for column, who in zip(columns(models, base, name), changed[name], strict=True):
            mean = math.fsum(W[i] * column[i] for i in who) / (math.fsum(W[i] for i in who) or 1.0)
            m.append(mean * (scales[who[0]] if len(who) == 1 else 1.0))
        wanted[name] = m
    require(found, base, wanted, dtype)


def test_ram_of_disjoint_changes_is_their_sum() -> None:
    zeros: Model = {"w": torch.zeros(4)}
    a: Model = {"w": torch.tensor([1.0, 0.0, 3.0, 1e-6])}
    b: Model = {"w": torch.tensor([0.0, 2.0, 5.0, 1e-6])}
    assert merged("ram", [a, b], zeros)["w"].tolist() == [1.0, 2.0, 4.0, 0.0]
    found = merged("ram", [a, b], zeros, r="0.5", alpha=1)["w"].tolist()
    assert found == [1.5, 3.0, 4.0, 0.0], "each has one shared and one unique: 1 + 0.5 * min(1, 1)"


# ---------------------------------------------------------------- passthrough, nearswap


@DTYPE
@pytest.mark.parametrize("scale", ["1", "-0.3", "0", "1.7"])
def test_passthrough_is_one_model_times_a_number(dtype: str, scale: str) -> None:
    one = model(3, dtype)
    found = copied(merge([one], strategy="passthrough", scale=scale, weights=["0.5"]))
    for name, x in one.items():
        product = x.double() * float(scale)
        assert torch.equal(found[name], product.to(x.dtype))
    if scale == "1":
        assert equal(found, one)


def test_passthrough_takes_one_model() -> None:
    models, _ = family(2)
    with pytest.raises(UsageError, match="strategy 'passthrough' merges 1 to 1 models; 2 given"):
        merge(models, strategy="passthrough")


@DTYPE
@COUNTS
@pytest.mark.parametrize("threshold", ["0.1", "0.3", "100", "0"])
def test_nearswap_moves_no_element_further_than_the_threshold(dtype: str, k: int, threshold: str) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    found = merged("nearswap", models, base, weights=WEIGHTS[:k], threshold=threshold, out=wide(dtype))
    t = float(threshold)
    wanted = {}
    for name in SHAPES:
        moved = [[math.copysign(min(abs(v), t), v) for v in tau] for tau in task_vectors(models, base, name)]
        wanted[name] = composed(moved, W[:k], "none", "mean")
    require(found, base, wanted, dtype)


def test_nearswap_of_one_model_is_mergekits_formula() -> None:
    (one,), base = family(1, "F64")
    found = merged("nearswap", [one], base, threshold="0.2")
    for name, x in one.items():
        share = np.clip(0.2 / np.maximum(np.abs((x - base[name]).numpy()), 1e-6), 0.0, 1.0)
        wanted = share * x.numpy() + (1 - share) * base[name].numpy()
        assert np.allclose(found[name].numpy(), wanted, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- forgetting


@DTYPE
@COUNTS
@pytest.mark.parametrize("consensus", ["1", "0.5", "0.3", "0"])
def test_negative_merge_subtracts_what_all_agree_on(dtype: str, k: int, consensus: str) -> None:
    models, base = family(k, dtype, shapes=SHAPES)
    found = merged(
        "negative_merge", models, base, weights=WEIGHTS[:k], consensus=consensus, lambda_="0.6", out=wide(dtype)
    )
    wanted = {}
    for name in SHAPES:
        m = []
        for column in columns(models, base, name):
            lead = abs(sum((t > 0) - (t < 0) for t in column))
            mean = math.fsum(w * t for w, t in zip(W, column, strict=False)) / math.fsum(W[:k])
            m.append(mean if lead >= Fraction(consensus) * k else 0.0)
        wanted[name] = m
    require(found, base, wanted, dtype, -0.6)


@DTYPE
def test_negative_merge_of_one_model_is_task_negation(dtype: str) -> None:
    (one,), base = family(1, dtype)
    found = merged("negative_merge", [one], base, lambda_="0.3")
    assert equal(found, merged("task_arithmetic", [one], base, lambda_="-0.3"))
    assert equal(found, merged("negative_merge", [one], base, lambda_="0.3", roles=["forget"]))


def test_forgetting_needs_agreement_and_more_models_only_forget_less() -> None:
    models, base = family(4, "F64")
    mirrored: Model = {name: base[name] - (x - base[name]) for name, x in models[0].items()}
    assert all(torch.equal(x, base[n]) for n, x in merged("negative_merge", [models[0], mirrored], base).items())
    assert all(torch.equal(x, base[n]) for n, x in merged("negative_merge", models, base, lambda_=0).items())
    before = None
    for k in range(1, 5):
        support = merged("negative_merge", models[:k], base)["weight"] != base["weight"]
        assert before is None or bool((support <= before).all())
        before = support
    assert before is not None
    assert 0 < int(before.sum()) < before.numel() / 2


@DTYPE
def test_tasks_are_added_and_what_is_to_be_forgotten_subtracted(dtype: str) -> None:
    models, base = family(4, dtype, shapes=SHAPES)
    roles = ["task", "forget", "task", "forget"]
    weights = ["1", "0.5", "2.5", "2"]
    how: dict[str, Any] = {"lambda_": "0.6", "lambda_task": "0.3", "out": wide(dtype)}
    found = merged("negative_merge", models, base, roles=roles, weights=weights, **how)
    wanted = {}
    for name in SHAPES:
        m = []
        for a, b, c, d in columns(models, base, name):
            agreed = b * d > 0
            m.append(0.3 * (a + 2.5 * c) - (0.6 * (0.5 * b + 2 * d) / 2.5 if agreed else 0.0))
        wanted[name] = m
    require(found, base, wanted, dtype)


def test_roles_are_read_off_the_whole_model_not_off_each_tensor() -> None:
    """A tensor that only a task has is added, though there all roles are the default."""
    models, base = family(2, "F64")
    part: Model = {name: x for name, x in models[1].items() if name != "weight"}
    how: dict[str, Any] = {"base": base, "missing": "skip", "roles": ["task", "forget"]}
    found = merge([models[0], part], strategy="negative_merge", **how)
    assert torch.equal(found["weight"], merge([models[0]], strategy="task_arithmetic", base=base)["weight"])


@pytest.mark.parametrize(
    ("strategy", "role", "known"),
    [
        ("negative_merge", "unlearned", "task, forget"),
        ("negative_merge", "safety", "task, forget"),
        ("split_unlearn_merge", "safety", "task, unlearned, forget"),
    ],
)
def test_other_roles_are_refused(strategy: str, role: str, known: str) -> None:
    models, base = family(2)
    with pytest.raises(UsageError, match=f"has role '{role}'; strategy '{strategy}' merges {known} "):
        merge(models, strategy=strategy, base=base, roles=[role, "task"])


TIES: list[dict[str, Any]] = [
    {},
    {"density": "0.5", "lambda_": "0.7", "scope": "tensor"},
    {"density": 1, "elect": "count", "combine": "sum"},
]


@DTYPE
@pytest.mark.parametrize("params", TIES)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("roles", [(), ("unlearned",) * 3, ("unlearned", "task", "unlearned")])
def test_unlearned_models_are_merged_by_ties_to_the_bit(
    dtype: str, params: dict[str, Any], kernels: bool, roles: tuple[str, ...]
) -> None:
    models, base = family(3, dtype)
    one = Prepared("split_unlearn_merge", models, base, weights=WEIGHTS, roles=roles, use_kernels=kernels, **params)
    other = Prepared("ties", models, base, weights=WEIGHTS, **params)
    assert one.plan.digest == other.plan.digest
    assert equal(one.run(), other.run())


@DTYPE
def test_a_model_of_what_is_to_be_forgotten_is_negated_first(dtype: str) -> None:
    """theta_0 - lambda (theta - theta_0) is exact for a base of zeros and lambda a power of two."""
    models, base = family(3, dtype)
    zeros = constant(base)
    unlearned = [{name: x * -0.5 for name, x in models[0].items()}, *models[1:]]
    if dtype == "F16":
        unlearned = [{name: (x * 64).round() / 64 for name, x in one.items()} for one in unlearned]
        models = [{name: x * -2.0 for name, x in unlearned[0].items()}, *unlearned[1:]]
    for params in TIES:
        one = merged("split_unlearn_merge", models, zeros, roles=("forget", "task", "task"), tvn_lambda="0.5", **params)
        assert equal(one, merged("ties", unlearned, zeros, **params)), "one factor leaves the order as it is"


@DTYPE
def test_split_unlearning_by_task_arithmetic_is_task_arithmetic(dtype: str) -> None:
    models, base = family(3, dtype)
    how: dict[str, Any] = {"weights": WEIGHTS, "lambda_": "0.3"}
    plain = merged("task_arithmetic", models, base, **how)
    assert equal(merged("split_unlearn_merge", models, base, inner="task_arithmetic", **how), plain)
    negated = merged("split_unlearn_merge", models, base, inner="task_arithmetic", roles=("forget",) * 3, **how)
    assert equal(negated, merged("task_arithmetic", models, base, weights=WEIGHTS, lambda_="-0.3"))


def test_parameters_of_ties_are_refused_beside_task_arithmetic() -> None:
    models, base = family(1)
    with pytest.raises(ParameterError, match="inner: task_arithmetic does not use density; it belongs to ties"):
        merge(models, strategy="split_unlearn_merge", base=base, inner="task_arithmetic", density="0.5")
    rules = [{"filter": "bias", "value": "0.3"}, {"value": "0.5"}]
    with pytest.raises(ParameterError, match="'split_unlearn_merge': scope=model takes one share"):
        merge(models, strategy="split_unlearn_merge", base=base, density=rules)


# ---------------------------------------------------------------- all of them

ALL = ["sce", "emr", "consensus_ta", "ram", "nearswap", "negative_merge", "split_unlearn_merge"]


@pytest.mark.parametrize("strategy", ALL)
def test_a_base_is_needed(strategy: str) -> None:
    models, base = family(2)
    with pytest.raises(NeedsError, match=f"strategy '{strategy}' needs a base"):
        merge(models, strategy=strategy)
    if strategy != "consensus_ta":
        with pytest.raises(ParameterError, match="takes none below 0"):
            merge(models, strategy=strategy, base=base, weights=[1, -1])


@DTYPE
@pytest.mark.parametrize("strategy", ALL)
def test_models_equal_to_the_base_change_nothing(strategy: str, dtype: str) -> None:
    base = model(2, dtype)
    for k in (1, 3):
        assert all(torch.equal(x, base[n]) for n, x in merged(strategy, [base] * k, base).items())
    zeros = constant(base)
    assert all(torch.equal(x, zeros[n]) for n, x in merged(strategy, [zeros] * 2, zeros).items())


BAD = [
    ("sce", {"density": 0}, "density"),
    ("sce", {"density": "1.1"}, "density"),
    ("consensus_ta", {"k_thr": -1}, "k_thr"),
    ("consensus_ta", {"lambda_mask": "-0.1"}, "lambda_mask"),
    ("ram", {"epsilon": "-1"}, "epsilon"),
    ("ram", {"r": "-1"}, "r"),
    ("nearswap", {"threshold": "-1"}, "threshold"),
    ("negative_merge", {"consensus": "1.5"}, "consensus"),
    ("emr", {"emit": "bundle"}, "emit"),
    ("split_unlearn_merge", {"inner": "slerp"}, "inner"),
]


@pytest.mark.parametrize(("strategy", "params", "name"), BAD)
def test_parameters_out_of_bounds_are_refused(strategy: str, params: dict[str, Any], name: str) -> None:
    models, base = family(1)
    with pytest.raises(ParameterError, match=f"strategy '{strategy}': {name} = .*: must be "):
        merge(models, strategy=strategy, base=base, **params)


def test_magnitudes_at_the_edges_of_float32_are_no_trouble() -> None:
    """Squares that vanish, differences of subnormals, and products of signs that underflow."""
    tiny = stored(np.array([1e-38, -1e-40, 1e-45, 0.0]), "F32")
    one, zeros = {"w": tiny}, {"w": torch.zeros(4)}
    for strategy in ALL:
        for k in (1, 2):
            params = {"density": 1} if strategy in ("sce", "split_unlearn_merge") else {}
            found = merged(strategy, [one] * k, zeros, **params)["w"]
            assert bool(torch.isfinite(found).all())
    assert torch.equal(merged("emr", [one, one], zeros)["w"], tiny)
    assert torch.equal(merged("sce", [one, one], zeros, density=1)["w"], tiny)
