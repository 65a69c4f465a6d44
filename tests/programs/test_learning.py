"""What jobs learn: gradients against finite differences, fixed points, descent, and going on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import InputError, MismatchError, NeedsError
from crdtmerge.programs.context import Saved
from crdtmerge.programs.descent import descend
from crdtmerge.programs.jobs.entropy import entropy, merged
from tests.programs.conftest import Loaded, around, normal

State = Mapping[str, torch.Tensor]
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
LAYER = {name: at for at, name in enumerate(NAMES)}
DATA = {f"{task}.inputs": normal(20 + at, 24, 3, dtype=torch.float64) for at, task in enumerate(("a", "b"))}
ENTROPY = {"models": 2, "layer": LAYER, "init": 0.3, "clamp": [0.0, 1.0], "steps": 40, "lr": 0.01, "batch": 24}


def deltas(base: State, models: list[State]) -> dict[str, State]:
    taus = {f"tau.{i}": {name: one[name] - base[name] for name in NAMES} for i, one in enumerate(models)}
    return {"base": base, **taus}


def test_the_gradient_of_the_entropy_is_that_of_finite_differences(deep: Loaded) -> None:
    groups = deltas(deep.state, [around(deep.state, 30), around(deep.state, 40)])
    context = deep.context(DATA, groups, ENTROPY)
    at = 0.3 + 0.1 * normal(50, 2, 4, dtype=torch.float64)
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(entropy(context, merged(context, leaf), 0), leaf)

    def by_hand(coefficients: torch.Tensor) -> float:
        """In numpy: theta, forward, mean entropy of each task."""
        theta = {
            name: deep.state[name].numpy()
            + sum(float(coefficients[i, at]) * groups[f"tau.{i}"][name].numpy() for i in range(2))
            for at, name in enumerate(NAMES)
        }
        total = 0.0
        for x in DATA.values():
            hidden = np.tanh(x.numpy() @ theta["0.weight"].T + theta["0.bias"])
            e = np.exp(hidden @ theta["2.weight"].T + theta["2.bias"])
            p = e / e.sum(axis=1, keepdims=True)
            total += float(-(p * np.log(p)).sum(axis=1).mean())
        return total

    for i in range(2):
        for layer in range(4):
            up, down = at.clone(), at.clone()
            up[i, layer] += 1e-6
            down[i, layer] -= 1e-6
            assert float(found[i, layer]) == pytest.approx((by_hand(up) - by_hand(down)) / 2e-6, rel=1e-5, abs=1e-8)


def test_models_that_are_equal_get_equal_coefficients_and_the_entropy_falls(deep: Loaded) -> None:
    one = around(deep.state, 30)
    ran = deep.run("entropy", DATA, deltas(deep.state, [one, one]), ENTROPY).values
    assert ran["coefficients"][0] == ran["coefficients"][1]
    assert any(ran["coefficients"][0])
    assert all(later <= earlier for earlier, later in zip(ran["losses"], ran["losses"][1:], strict=False))
    assert ran["losses"][-1] < ran["losses"][0]


def test_without_steps_nothing_moves(deep: Loaded) -> None:
    groups = deltas(deep.state, [around(deep.state, 30), around(deep.state, 40)])
    ran = deep.run("entropy", DATA, groups, ENTROPY | {"steps": 0}).values
    assert ran["coefficients"] == [[0, 0, 0, 0]] * 2


def test_coefficients_stay_within_their_bounds(deep: Loaded) -> None:
    groups = deltas(deep.state, [around(deep.state, 30), around(deep.state, 40)])
    params = ENTROPY | {"clamp": [0.29, 0.31], "lr": 0.1}
    found = deep.run("entropy", DATA, groups, params).values["coefficients"]
    assert {abs(n) for row in found for n in row} <= set(range(42))
    assert any(abs(n) == 41 for row in found for n in row)


@pytest.mark.parametrize("job", ["entropy", "distillation", "surgery"])
def test_a_job_that_goes_on_ends_where_one_that_never_stopped_does(deep: Loaded, job: str) -> None:
    groups, params = material(deep)
    saved: list[Saved] = []
    whole = deep.run(
        job,
        DATA,
        groups,
        params,
        save=lambda step, state: saved.append(Saved(step, {n: x.clone() for n, x in state.items()})),
    )
    assert [one.step for one in saved] == [25]
    rest = deep.run(job, DATA, groups, params, resumed=saved[0])
    assert {k: v for k, v in rest.values.items() if k != "losses"} == {
        k: v for k, v in whole.values.items() if k != "losses"
    }
    assert len(rest.values["losses"]) == 15
    assert rest.values["losses"] == whole.values["losses"][25:]
    assert all(torch.equal(rest.tensors[name], x) for name, x in whole.tensors.items())


def material(deep: Loaded) -> tuple[dict[str, State], dict[str, Any]]:
    models: list[State] = [around(deep.state, 30), around(deep.state, 40)]
    groups = deltas(deep.state, models) | {f"x.{i}": one for i, one in enumerate(models)}
    mean = {name: (models[0][name] + models[1][name]) / 2 for name in NAMES}
    columns = {"0.weight": 3, "0.bias": 1, "2.weight": 5, "2.bias": 1}
    params = ENTROPY | {"shares": [0.5, 0.5], "tasks": ["a", "b"], "columns": columns, "temperature": 2.0}
    params |= {"lambda_cos": 0.01, "share": 0.3, "rank": 3, "seed": "00" * 32, "batch": 8}
    return groups | {"merged": mean}, params


def test_distillation_brings_the_merged_model_nearer_to_its_parts(deep: Loaded) -> None:
    groups, params = material(deep)
    ran = deep.run("distillation", DATA, groups, params | {"batch": 24, "share": 1.0, "lambda_cos": 0.0}).values
    assert ran["losses"][-1] < 0.9 * ran["losses"][0]
    assert {name: [len(row) for row in rows] for name, rows in ran["offsets"].items()} == {
        name: [count] * 2 for name, count in params["columns"].items()
    }


def test_identical_models_are_distilled_to_themselves(deep: Loaded) -> None:
    """The divergence is 0 and so is its gradient, up to rounding that Adam must not blow up."""
    groups, params = material(deep)
    same = groups | {"x.1": groups["x.0"]}
    ran = deep.run("distillation", DATA, same, params | {"lambda_cos": 0.0}).values
    assert max(map(abs, ran["losses"])) < 1e-15
    assert not any(n for rows in ran["offsets"].values() for row in rows for n in row)


def test_distillation_of_a_linear_model_finds_the_model_that_has_the_answers(classifier: Loaded) -> None:
    """Both models' data are answered by model 0 and 1 alike but on one column, which only one of them has right."""
    one = classifier.state
    other = {"linear.weight": one["linear.weight"].clone(), "linear.bias": one["linear.bias"]}
    other["linear.weight"][:, 2] = 0.0
    x, flat = normal(60, 64, 4), normal(61, 64, 4)
    flat[:, 2] = 0.0
    params = {"shares": [0.5, 0.5], "tasks": ["a", "b"], "columns": {"linear.weight": 4, "linear.bias": 1}}
    params |= {"temperature": 1.0, "lambda_cos": 0.0, "share": 1.0, "steps": 300, "lr": 0.02, "batch": 64}
    groups = {"x.0": one, "x.1": other}
    ran = classifier.run("distillation", {"a.inputs": x, "b.inputs": flat}, groups, params).values
    weight = 0.5 + ran["offsets"]["linear.weight"][0][2] / 4096
    assert weight == pytest.approx(1.0, abs=0.02)


def test_surgery_begins_with_nothing_and_the_representations_come_nearer(deep: Loaded) -> None:
    groups, params = material(deep)
    none = deep.run("surgery", DATA, groups, params | {"steps": 0})
    assert set(none.tensors) == {f"surgery.{task}.{part}" for task in "ab" for part in ("down", "up")}
    assert not none.tensors["surgery.a.up"].any()
    assert none.tensors["surgery.a.down"].shape == (3, 5)
    down = none.tensors["surgery.a.down"]
    assert down.abs().max() <= 5**-0.5
    assert down.unique().numel() == 15
    losses = deep.run("surgery", DATA, groups, params | {"steps": 200, "batch": 24}).values["losses"]
    assert losses[-1] < 0.8 * losses[0]


def test_surgery_on_the_model_itself_leaves_it_alone(deep: Loaded) -> None:
    groups, params = material(deep)
    same = {"x.0": groups["x.0"], "merged": groups["x.0"]}
    ran = deep.run("surgery", {"a.inputs": DATA["a.inputs"]}, same, params | {"tasks": ["a"]})
    assert max(ran.values["losses"]) == 0.0
    assert not ran.tensors["surgery.a.up"].any()


def factored(deep: Loaded, scale: float = 0.3) -> dict[str, State]:
    groups: dict[str, State] = deltas(deep.state, [around(deep.state, 30, scale), around(deep.state, 40, scale)])
    for i in range(2):
        parts = {name: np.linalg.svd(groups[f"tau.{i}"][name].numpy(), full_matrices=False) for name in NAMES[::2]}
        for at, letter in enumerate("usv"):
            factor = {name: torch.from_numpy(np.ascontiguousarray(found[at])) for name, found in parts.items()}
            groups[f"{letter}.{i}"] = {name: x.T.contiguous() if letter == "v" else x for name, x in factor.items()}
    return groups


RANKS = ENTROPY | {"rank": {"0.weight": 3, "2.weight": 4}, "logit": 0.1, "temperature": 10.0}


def test_with_all_masks_on_adarank_begins_as_task_arithmetic(deep: Loaded) -> None:
    groups = factored(deep)
    with_masks = deep.run("rank_masks", DATA, groups, RANKS | {"steps": 1}).values
    plain = deep.run("entropy", DATA, groups, ENTROPY | {"steps": 1}).values
    assert with_masks["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-12)
    assert with_masks["masks"] == {"0.weight": ["111", "111"], "2.weight": ["1111", "1111"]}


def test_masks_are_learnt_and_not_worse_than_the_beginning(deep: Loaded) -> None:
    """Of all 2^7 masks of one model, by exhaustion, none is better by more than a little than those learnt."""
    groups = factored(deep)
    only = {name: x for name, x in groups.items() if not name.endswith(".1")}
    params = RANKS | {"models": 1, "clamp": [1.0, 1.0], "init": 1.0, "steps": 300, "lr": 0.05}
    ran = deep.run("rank_masks", DATA, only, params).values
    values = {}
    for number in range(1 << 7):
        bits = [float(bit) for bit in f"{number:07b}"]
        kept = {"0.weight": torch.tensor(bits[:3]).double(), "2.weight": torch.tensor(bits[3:]).double()}
        theta = {
            name: base
            + (
                (only["u.0"][name] * (kept[name] * only["s.0"][name])) @ only["v.0"][name].T
                if name in kept
                else only["tau.0"][name]
            )
            for name, base in deep.state.items()
        }
        values[f"{number:07b}"] = float(entropy(deep.context(DATA, only, params), theta, 0))
    learnt = values[ran["masks"]["0.weight"][0] + ran["masks"]["2.weight"][0]]
    assert learnt < values["1111111"]
    assert learnt - min(values.values()) < 0.25 * (values["1111111"] - min(values.values()))


def test_only_the_share_with_the_largest_momentum_moves(deep: Loaded) -> None:
    context = deep.context(DATA, {}, {"steps": 1, "lr": 0.5, "share": 0.4})
    slopes = torch.tensor([1.0, -3.0, 2.0, -3.0, 0.5])
    found, _ = descend(context, {"c": torch.zeros(5)}, lambda step, at: (at["c"] * slopes).sum())
    assert torch.allclose(found["c"], torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64))


def test_adam_is_adam(deep: Loaded) -> None:
    start, goal = normal(70, 6, dtype=torch.float64), normal(71, 6, dtype=torch.float64)
    context = deep.context(DATA, {}, {"steps": 50, "lr": 0.03})
    found, _ = descend(context, {"c": start}, lambda step, at: ((at["c"] - goal) ** 4).sum())
    theirs = start.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.03)
    for _ in range(50):
        adam.zero_grad()
        ((theirs - goal) ** 4).sum().backward()
        adam.step()
    assert torch.allclose(found["c"], theirs.detach(), rtol=0, atol=1e-12)


def test_what_cannot_be_learnt_is_refused(deep: Loaded) -> None:
    groups, params = material(deep)
    with pytest.raises(NeedsError, match=r"lacks 'c\.inputs'.*tasks 'a', 'b'"):
        deep.run("distillation", DATA, groups, params | {"tasks": ["a", "c"]})
    with pytest.raises(MismatchError, match="no linear layer with the weight 'x'"):
        deep.run("surgery", DATA, groups, params | {"weight": "x"})
    with pytest.raises(InputError, match="not a number at step 1"):
        deep.run("entropy", {"inputs": torch.full((2, 3), float("nan")).double()}, groups, params)
    strange = groups | {name: {**groups[name], "more": torch.zeros(1)} for name in ("base", "tau.0", "tau.1")}
    with pytest.raises(MismatchError, match="tensors that the program does not use: 'more'"):
        deep.run("entropy", DATA, strange, params | {"layer": LAYER | {"more": 4}})
