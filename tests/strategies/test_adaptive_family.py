"""Adaptive strategies: what they are without steps, what a plan makes of models, what they refuse.

Plans are written by hand here; that programs make them is tried in tests/programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import CrdtMergeError, MismatchError, NeedsError, ParameterError
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies.adaptive import columns
from crdtmerge.strategies.inside import layers
from crdtmerge.strategies.protocol import Plan
from tests.strategies import oracles
from tests.strategies.models import Model, Prepared, equal, family, merged

SHAPES = {"bias": (5,), "conv.weight": (3, 4, 2, 2), "norm": (5,), "scalar": (), "weight": (4, 6), "empty": (0, 3)}
WEIGHTS = ("1", "0.5", "2")


def applied(strategy: str, models: list[Model], base: Model | None, plan: Mapping[str, Any], **how: Any) -> Model:
    """A strategy with a plan that was made elsewhere, by the engine and in odd stretches: the same."""
    prepared = Prepared(strategy, models, base, **({"steps": 0} | how))
    prepared.plan = Plan(dict(prepared.plan.data) | dict(plan))
    found = prepared.run()
    if prepared.needs.unit == "element":
        assert equal(found, prepared.applied([1, 7, 8]))
    return found


def wide(x: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    found: np.ndarray[Any, np.dtype[np.float64]] = x.double().numpy()
    return found


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_ada_merging_without_steps_is_task_arithmetic(dtype: str) -> None:
    """With weights of 0.3 it is the same bits; task arithmetic with lambda 0.3 rounds after the sum."""
    models, base = family(3, dtype, shapes=SHAPES)
    weights = ["0.3", "0.15", "0.6"]
    found = merged("ada_merging", models, base, weights=WEIGHTS, steps=0)
    assert equal(found, merged("task_arithmetic", models, base, weights=weights))


def test_ada_merging_applies_its_coefficients() -> None:
    models, base = family(2, "F64", shapes=SHAPES)
    offsets = {name: [100 * at - 200, 50] for at, name in enumerate(SHAPES)}
    found = applied("ada_merging", models, base, {"coefficients": offsets})
    for name, (first, second) in offsets.items():
        l1, l2 = 0.3 + first / 4096, 0.3 + second / 4096
        t1, t2 = (wide(model[name]) - wide(base[name]) for model in models)
        assert np.allclose(wide(found[name]), wide(base[name]) + l1 * t1 + l2 * t2, rtol=1e-14, atol=1e-15)


def test_ada_merging_with_ties_trims_and_elects_first() -> None:
    models, base = family(3, "F64", shapes=SHAPES)
    found = merged("ada_merging", models, base, steps=0, tau_preprocess="ties", density="0.4", init="0.5")
    masks = oracles.trim_masks([dict(m) for m in models], dict(base), oracles.Fraction("0.4"), True)
    for name in SHAPES:
        taus = [
            np.where(np.array(mask, bool).reshape(-1), wide(m[name] - base[name]).reshape(-1), 0.0)
            for m, mask in zip(models, masks[name], strict=True)
        ]
        elected = sum(taus) >= 0
        kept = [np.where(elected == (tau > 0), tau, 0.0) for tau in taus]
        wanted = wide(base[name]).reshape(-1) + 0.5 * sum(kept)
        assert np.allclose(wide(found[name]).reshape(-1), wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_dam_without_steps_is_the_average(dtype: str) -> None:
    models, _ = family(3, dtype, shapes=SHAPES)
    found = merged("dam", models, weights=WEIGHTS, steps=0)
    assert equal(found, merged("weight_average", models, weights=WEIGHTS))


def test_dam_scales_columns() -> None:
    """Along dimension 1 of matrices and convolutions; elementwise for vectors; by one number for biases, scalars."""
    models, _ = family(2, "F64", shapes=SHAPES)
    rng = np.random.default_rng(3)
    counts = {name: columns(name, shape)[0] for name, shape in SHAPES.items()}
    assert counts == {"bias": 1, "conv.weight": 4, "norm": 5, "scalar": 1, "weight": 6, "empty": 3}
    offsets = {name: rng.integers(-2048, 2048, (2, count)).tolist() for name, count in counts.items()}
    found = applied("dam", models, None, {"offsets": offsets})
    for name, shape in SHAPES.items():
        along = (1, -1) + (1,) * (len(shape) - 2) if len(shape) > 1 else (-1,)
        c = [(0.5 + np.array(row) / 4096).reshape(along if shape else ()) for row in offsets[name]]
        wanted = sum(one * wide(model[name]) for one, model in zip(c, models, strict=True))
        assert np.allclose(wide(found[name]), wanted, rtol=0, atol=1e-14)


def test_dam_with_all_of_one_model_is_that_model() -> None:
    models, _ = family(2, "F32", shapes=SHAPES)
    counts = {name: columns(name, shape)[0] for name, shape in SHAPES.items()}
    plan = {"offsets": {name: [[2048] * count, [-2048] * count] for name, count in counts.items()}}
    assert equal(applied("dam", models, None, plan), models[0])


def truncated(tau: np.ndarray[Any, Any], keep: list[int]) -> np.ndarray[Any, Any]:
    """The components of a matrix that are kept, by LAPACK."""
    if tau.ndim < 2 or not tau.size:
        return tau
    u, s, vt = np.linalg.svd(tau.reshape(tau.shape[0], -1), full_matrices=False)
    mask = np.zeros(len(s))
    mask[[j for j in keep if j < len(s)]] = 1
    found: np.ndarray[Any, Any] = ((u * (s * mask)) @ vt).reshape(tau.shape)
    return found


def test_adarank_without_steps_is_task_arithmetic_of_truncated_rank() -> None:
    models, base = family(2, "F64", shapes=SHAPES)
    full = merged("adarank", models, base, steps=0)
    plain = merged("task_arithmetic", models, base, weights=["0.3", "0.3"])
    half = merged("adarank", models, base, steps=0, rank_ratio="0.5", init="1")
    for name, shape in SHAPES.items():
        assert torch.allclose(full[name], plain[name], rtol=0, atol=1e-13)
        rank = max(1, min(shape[0], int(np.prod(shape[1:]))) // 2) if len(shape) > 1 and np.prod(shape) else 0
        taus = [truncated(wide(m[name] - base[name]), list(range(rank))) for m in models]
        assert np.allclose(wide(half[name]), wide(base[name]) + sum(taus), rtol=0, atol=1e-13)


def test_adarank_cart_is_around_the_average() -> None:
    models, base = family(3, "F64", shapes=SHAPES)
    found = merged("adarank", models, base, steps=0, variant="cart", rank_ratio="1", init="1")
    for name in SHAPES:
        mean = sum(wide(m[name]) for m in models) / 3
        wanted = mean + sum(wide(m[name]) - mean for m in models)
        assert np.allclose(wide(found[name]), wanted, rtol=0, atol=1e-13)


def test_adarank_applies_its_masks_and_knows_other_spectra() -> None:
    from crdtmerge.strategies.adaptive import AdaRankParameters, _factors, _spectrum

    models, base = family(2, "F64", shapes={"weight": (4, 6)})
    prepared = Prepared("adarank", models, base, steps=0, init="1")
    (tensor,) = prepared.tensors
    u = prepared.unit(tensor, 0, 24)
    spectrum = _spectrum([_factors(u, tau, AdaRankParameters(steps=0)) for tau in u.task_vectors()])
    masks = {"weight": ["1010", "0001"]}
    plan = {"coefficients": {"weight": [0, 2048]}, "masks": masks, "spectra": {"weight": spectrum}}
    found = applied("adarank", models, base, plan, init="1")["weight"]
    first, second = (wide(m["weight"] - base["weight"]) for m in models)
    wanted = wide(base["weight"]) + truncated(first, [0, 2]) + 1.5 * truncated(second, [3])
    assert np.allclose(wide(found), wanted, rtol=0, atol=1e-13)
    with pytest.raises(MismatchError, match="not those that the plan's masks were made for"):
        applied("adarank", models[::-1], base, plan, init="1")


@pytest.mark.parametrize(
    ("inner", "settings"), [("task_arithmetic", {}), ("ties", {"density": "0.5"}), ("slerp", {}), ("dare", {})]
)
def test_surgery_leaves_the_inner_merge_as_it_is(inner: str, settings: dict[str, str]) -> None:
    models, base = family(2, "F32", shapes=SHAPES)
    found = merged("representation_surgery", models, base, steps=0, inner=inner, settings=settings)
    assert equal(found, merged(inner, models, base, **settings))


def test_surgery_writes_its_adapters_beside_the_merged_tensors() -> None:
    from crdtmerge.strategies.adaptive import RepresentationSurgery, _frozen

    down = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7
    found = RepresentationSurgery().extras(Plan({"adapters": {"surgery.a.down": _frozen(down)}}))
    assert torch.equal(found["surgery.a.down"], down)
    broken = _frozen(down) | {"shape": [9, 9]}
    with pytest.raises(MismatchError, match="another size"):
        RepresentationSurgery().extras(Plan({"adapters": {"x": broken}}))


@pytest.mark.parametrize("strategy", ["ada_merging", "dam", "adarank", "representation_surgery"])
def test_a_missing_input_is_a_sentence_that_says_what_makes_it(strategy: str, tmp_path: Path) -> None:
    models, base = family(2)
    with pytest.raises(NeedsError, match=r"needs the input 'data'.*'inputs'.*`crdtmerge plan`"):
        merge(models, strategy=strategy, base=base)
    (tmp_path / "d").write_bytes(b"x")
    with pytest.raises(NeedsError, match=r"needs the input 'program', the model as torch\.export"):
        merge(models, strategy=strategy, base=base, inputs={"data": tmp_path / "d"})


@pytest.mark.parametrize(
    ("strategy", "params", "said"),
    [
        ("ada_merging", {"steps": -1}, "steps"),
        ("ada_merging", {"lr": 0}, "lr"),
        ("ada_merging", {"density": 0}, "density"),
        ("dam", {"temperature": 0}, "temperature"),
        ("dam", {"share": "1.5"}, "share"),
        ("adarank", {"variant": "x"}, "variant"),
        ("representation_surgery", {"rank": 0}, "rank"),
        ("representation_surgery", {"inner": "ties", "settings": "density=3", "steps": 0}, "density"),
        ("representation_surgery", {"settings": "density", "steps": 0}, "NAME=VALUE"),
        ("representation_surgery", {"inner": "genetic_merge", "steps": 0}, "holds a strategy itself"),
        ("representation_surgery", {"inner": "nonsense", "steps": 0}, "nonsense"),
        ("ada_merging", {"steps": 0, "lower": "1", "upper": "0"}, "lies above"),
        ("ada_merging", {"steps": 0, "init": [{"filter": "w*", "value": 1}, {"value": 0}]}, "for some tensors"),
    ],
)
def test_bad_parameters_are_refused_with_a_sentence(strategy: str, params: dict[str, Any], said: str) -> None:
    models, base = family(2)
    with pytest.raises(CrdtMergeError, match=said):
        merge(models, strategy=strategy, base=base, **params)


def test_settings_are_the_same_recipe_however_they_are_written() -> None:
    models, base = family(2)
    how = {"strategy": "representation_surgery", "base": base, "steps": 0, "inner": "ties"}
    ids = {
        merge(models, settings=said, **how).receipt.merge_id
        for said in ("density=0.50, scope=model", {"density": 0.5}, {"drop": "0.5"}, "density=.5")
    }
    assert len(ids) == 1


def test_layers_are_told_by_the_first_number_of_a_name() -> None:
    names = ["embed.weight", "model.layers.10.a.weight", "model.layers.10.b.0.weight", "model.layers.2.a.weight"]
    assert list(layers(names, "layer").values()) == [0, 1, 1, 2]
    assert list(layers(names, "model").values()) == [0, 0, 0, 0]
    assert list(layers(names, "tensor").values()) == [0, 1, 2, 3]


def test_a_model_run_for_a_plan_must_be_whole() -> None:
    from crdtmerge.strategies.adaptive import _contributions
    from tests.strategies.models import metas, tensors, viewed

    models, base = family(2, shapes={"a": (2,), "b": (3,)})
    lacking: list[Model] = [{"a": models[0]["a"]}, models[1]]
    with viewed(tensors(lacking, base, metas([1, 1]))) as view, pytest.raises(MismatchError, match="missing in some"):
        _contributions(view, "ada_merging")


def test_parameters_of_a_plan_are_those_of_all_tensors() -> None:
    models, base = family(2)
    with pytest.raises(ParameterError, match="for some tensors have no meaning"):
        merged(
            "dam",
            models,
            base,
            steps=[{"filter": "w*", "value": 0}, {"value": 0}],
            batch=[{"filter": "w*", "value": 2}],
        )
