"""RegMean++ against RegMean by hand: the first layer on the data, the second on what the merged first gives out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn import Linear, Module, ReLU, Sequential

from crdtmerge.errors import MismatchError, NeedsError, ParameterError
from crdtmerge.programs.context import Context
from crdtmerge.programs.exported import Program, batches
from crdtmerge.programs.jobs import job
from crdtmerge.resolve.merge import merge
from crdtmerge.resolve.plan_file import decode, encode
from crdtmerge.strategies import registry
from crdtmerge.strategies.protocol import Plan
from crdtmerge.testing.case import Case
from crdtmerge.testing.laws import alone, through_the_set
from crdtmerge.testing.programs import export, write
from crdtmerge.testing.small_program import one_process, small_program
from tests.strategies.models import Model, Prepared, equal

Wide = NDArray[np.float64]
NAME = "regmean_plus_plus"
TASKS = ("a", "b", "c")
WEIGHTS = ("1", "0.5", "2")
WIDTHS = {"a": 70, "b": 5, "c": 16}
"""How many examples each task has: more than a batch of the job, and fewer."""


class Crossed(Module):
    """Layers whose names are in another order than they run in, one that runs twice, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.a, self.m, self.unused = Linear(4, 5), Linear(5, 5), Linear(5, 2), Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.m(torch.relu(self.a(torch.relu(self.a(torch.relu(self.z(x)))))))
        return out


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def made(module: Module, folder: Path, dtype: torch.dtype = torch.float64) -> tuple[list[Model], dict[str, Path]]:
    """Three models of an architecture, and its program with data of their tasks."""
    module = module.to(dtype)
    files = {
        "program": folder / "model.pt2",
        "data": folder / "data.safetensors",
        "plain": folder / "plain.safetensors",
    }
    export(module, [numbers(0, 2, 4, dtype=dtype)], files["program"])
    data = {f"{task}.inputs": numbers(9 + i, WIDTHS[task], 4, dtype=dtype) for i, task in enumerate(TASKS)}
    write(data, files["data"])
    write({"inputs": data["a.inputs"]}, files["plain"])
    models: list[Model] = [
        {name: numbers(100 * i + at, *x.shape, dtype=dtype) for at, (name, x) in enumerate(module.state_dict().items())}
        for i in range(1, 4)
    ]
    return models, files


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Model], dict[str, Path]]:
    return made(Sequential(Linear(4, 8), ReLU(), Linear(8, 3)), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Model], dict[str, Path]]:
    return made(Sequential(Linear(4, 3)), tmp_path_factory.mktemp("single"), torch.float32)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Model], dict[str, Path]]:
    return made(Crossed(), tmp_path_factory.mktemp("crossed"))


def planned(models: list[Model], files: dict[str, Path], **how: Any) -> Prepared:
    given = {"program": files["program"], "data": files["data"]}
    return Prepared(NAME, models, files=given, **({"weights": WEIGHTS, "tasks": TASKS} | how))


def of_tasks(files: dict[str, Path]) -> list[Wide]:
    data = load_file(files["data"])
    return [data[f"{task}.inputs"].double().numpy() for task in TASKS]


def mean(models: list[Model], name: str) -> Wide:
    c = np.array([float(w) for w in WEIGHTS])
    found: Wide = sum(w * m[name].double().numpy() for w, m in zip(c / c.sum(), models, strict=True))
    return found


def regressed(models: list[Model], name: str, xs: list[Wide], alpha: float) -> Wide:
    """W of min_W sum_i a_i (alpha |X_i (W - W_i)^T|^2 / n_i + (1 - alpha) the same of each feature alone).

    Of many such W the one nearest to the mean.
    """
    middle = mean(models, name)
    c = np.array([float(w) for w in WEIGHTS])
    rows, wanted = [], []
    for a, m, x in zip(c / c.sum(), models, xs, strict=True):
        w = m[name].double().numpy() - middle
        alone = np.diag(np.sqrt((1 - alpha) * (x * x).sum(axis=0)))
        stacked = np.concatenate([np.sqrt(alpha) * x, alone]) * np.sqrt(a / len(x))
        rows.append(stacked)
        wanted.append(stacked @ w.T)
    found: Wide = middle + np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0].T
    return found


def relu(x: Wide) -> Wide:
    return np.maximum(x, 0)


@pytest.mark.parametrize("alpha", [0.9, 0.3])
def test_two_layers_are_regmean_on_the_data_and_on_what_the_merged_first_gives_out(
    two: tuple[list[Model], dict[str, Path]], alpha: float
) -> None:
    models, files = two
    found = planned(models, files, alpha=str(alpha)).run()
    xs = of_tasks(files)
    first, bias = regressed(models, "0.weight", xs, alpha), mean(models, "0.bias")
    second = regressed(models, "2.weight", [relu(x @ first.T + bias) for x in xs], alpha)
    wanted = {"0.weight": first, "0.bias": bias, "2.weight": second, "2.bias": mean(models, "2.bias")}
    for name, value in wanted.items():
        assert np.allclose(found[name].numpy(), value, rtol=0, atol=1e-5), name
    own = [
        relu(x @ m["0.weight"].double().numpy().T + m["0.bias"].double().numpy())
        for x, m in zip(xs, models, strict=True)
    ]
    regmean = regressed(models, "2.weight", own, alpha)
    assert np.abs(regmean - second).max() > 0.01, "RegMean itself is another model here"


def test_layers_are_merged_in_the_order_in_which_they_run_and_a_weight_used_twice_sees_both(
    crossed: tuple[list[Model], dict[str, Path]],
) -> None:
    models, files = crossed
    prepared = planned(models, files)
    found = prepared.run()
    assert list(prepared.plan["gram"]) == ["z.weight", "a.weight", "m.weight"]
    xs = of_tasks(files)
    z = regressed(models, "z.weight", xs, 0.9)
    into = [relu(x @ z.T + mean(models, "z.bias")) for x in xs]
    before = [relu(x @ mean(models, "a.weight").T + mean(models, "a.bias")) for x in into]
    a = regressed(models, "a.weight", [np.concatenate(both) for both in zip(into, before, strict=True)], 0.9)
    for _ in range(2):
        into = [relu(x @ a.T + mean(models, "a.bias")) for x in into]
    wanted = {"z.weight": z, "a.weight": a, "m.weight": regressed(models, "m.weight", into, 0.9)}
    wanted |= {name: mean(models, name) for name in models[0] if name not in wanted}
    for name, value in wanted.items():
        assert np.allclose(found[name].numpy(), value, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("params", [{}, {"alpha": "0.3", "ridge": "0.01"}, {"alpha": "1"}], ids=str)
def test_applied_it_is_regression_mean_with_the_matrices_of_the_plan_to_the_bit(
    two: tuple[list[Model], dict[str, Path]], params: dict[str, Any]
) -> None:
    models, files = two
    prepared = planned(models, files, **params)
    stats: list[dict[str, dict[str, torch.Tensor]]] = [{"gram": {}} for _ in models]
    for name, held in prepared.plan["gram"].items():
        inputs = models[0][name].shape[1]
        for i, data in enumerate(held):
            assert len(data) == 4 * inputs * inputs
            stats[i]["gram"][name] = torch.from_numpy(np.frombuffer(data, "<f4").reshape(inputs, inputs).copy())
    wanted = Prepared("regression_mean", models, weights=WEIGHTS, stats=stats, **params).run()
    assert equal(prepared.run(), wanted)
    assert equal(prepared.applied(), wanted)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
def test_of_one_layer_it_is_regression_mean_with_the_statistic(
    single: tuple[list[Model], dict[str, Path]], stored: torch.dtype
) -> None:
    """To the bit: what goes into the first layer does not depend on a model."""
    made_as, files = single
    models: list[Model] = [{name: x.to(stored) for name, x in one.items()} for one in made_as]
    program = Program(str(files["program"]), hashlib.sha256(files["program"].read_bytes()).hexdigest())
    data = load_file(files["data"])
    stats = []
    for task, one in zip(TASKS, models, strict=True):
        fed = batches({"inputs": data[f"{task}.inputs"]}, program)
        stats.append({"gram": dict(job("gram")(Context(program, fed, {"model": one}, {})).tensors)})
    wanted = Prepared("regression_mean", models, weights=WEIGHTS, stats=stats).run()
    assert equal(planned(models, files).run(), wanted)


def test_without_tasks_each_sees_all_data(two: tuple[list[Model], dict[str, Path]]) -> None:
    models, files = two
    plain = files | {"data": files["plain"]}
    found = planned(models, plain, tasks=()).run()
    x = of_tasks(files)[0]
    first = regressed(models, "0.weight", [x, x, x], 0.9)
    assert np.allclose(found["0.weight"].numpy(), first, rtol=0, atol=1e-5)
    with pytest.raises(NeedsError, match="the data holds the tasks a, b, c"):
        planned(models, files, tasks=())
    with pytest.raises(NeedsError, match=r"the data lacks 'a\.inputs'"):
        planned(models, plain)


def test_of_one_model_it_is_that_model(two: tuple[list[Model], dict[str, Path]]) -> None:
    models, files = two
    assert equal(planned(models[:1], files, weights=["1"], tasks=["b"]).run(), models[0])


def test_the_order_of_arrival_does_not_matter_and_a_plan_stands_for_the_program(
    two: tuple[list[Model], dict[str, Path]],
) -> None:
    models, files = two
    inputs = {"program": files["program"], "data": files["data"]}
    found = merge(models, strategy=NAME, tasks=TASKS, weights=WEIGHTS, inputs=inputs)
    turned = merge(models[::-1], strategy=NAME, tasks=TASKS[::-1], weights=WEIGHTS[::-1], inputs=inputs)
    assert equal({name: found[name] for name in models[0]}, {name: turned[name] for name in models[0]})
    expected = planned(models, files)
    again = planned(models, files)
    assert again.plan.digest == expected.plan.digest
    again.plan = decode(encode(expected.plan, bytes(32)), "a plan")[0]
    assert equal(again.run(), expected.run())
    again.plan = Plan({"gram": {"0.weight": expected.plan["gram"]["0.weight"]}})
    kept, whole = again.run(), expected.run()
    assert torch.equal(kept["0.weight"], whole["0.weight"]), "apply reads the plan alone"
    assert np.allclose(kept["2.weight"].numpy(), mean(models, "2.weight"), rtol=0, atol=1e-12)


def test_it_is_commutative_and_idempotent_and_through_the_set_keeps_all_laws() -> None:
    with small_program(4) as files:
        case = Case(registry.get(NAME), files=files)
        found = alone(case, {"weight": (4, 4)}, trials=1)
        assert {law: one.holds for law, one in found.items()} == {
            "commutative": True,
            "associative": False,
            "idempotent": True,
        }
        assert all(law.holds for law in through_the_set(case, {"weight": (4, 4)}, trials=1).values())


def test_what_cannot_be_done_is_a_sentence(two: tuple[list[Model], dict[str, Path]], tmp_path: Path) -> None:
    models, files = two
    with pytest.raises(ParameterError, match=r"'0\.weight': it is a layer of the program, whose weights are \[out"):
        planned(models, files, layout="in_out")
    with pytest.raises(ParameterError, match="alpha"):
        planned(models, files, alpha="1.5")
    with pytest.raises(NeedsError, match="needs the input 'data'"):
        merge(models, strategy=NAME)
    prepared = planned(models, files)
    for held in ([b"\0" * 64] * 2, [b"\0" * 63] * 3):
        prepared.plan = Plan({"gram": {"0.weight": held}})
        with pytest.raises(MismatchError, match="not one for each of 3 models"):
            prepared.run()
    prepared.plan = Plan({"gram": {"0.weight": [b"\0" * 16] * 3}})
    with pytest.raises(MismatchError, match="has 4 entries"):
        prepared.run()


class Scaled(Module):
    """No layer that has a Gram matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_a_program_without_layers_is_refused(tmp_path: Path) -> None:
    models, files = made(Scaled(), tmp_path)
    with pytest.raises(NeedsError, match="the program has none whose weight is merged"):
        planned(models, files)
