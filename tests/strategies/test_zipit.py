"""ZipIt: greedy clusters against brute force, merged layers against explicit M and U, functions of merged networks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.resolve.merge import merge
from crdtmerge.resolve.plan_file import decode, encode
from crdtmerge.strategies.protocol import Plan
from crdtmerge.strategies.zipit import gathered, permuted, zipped
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from crdtmerge.testing.programs import export, write
from crdtmerge.testing.small_program import one_process
from tests.strategies.models import Model, Prepared, equal, metas

Wide = NDArray[np.float64]
INPUTS, FIRST, SECOND, OUTPUTS = 5, 8, 6, 3

HIDDEN = Symmetry(
    (
        Group(FIRST, (Axis("a.weight", 0), Axis("a.bias", 0), Axis("b.weight", 1, True))),
        Group(SECOND, (Axis("b.weight", 0), Axis("b.bias", 0), Axis("c.weight", 1, True))),
    ),
    {
        "a.bias": ((FIRST,),),
        "a.weight": ((FIRST,), (INPUTS,)),
        "b.bias": ((SECOND,),),
        "b.weight": ((SECOND,), (FIRST,)),
        "c.weight": ((OUTPUTS,), (SECOND,)),
    },
)
SHAPES = {
    "a.bias": (FIRST,),
    "a.weight": (FIRST, INPUTS),
    "b.bias": (SECOND,),
    "b.weight": (SECOND, FIRST),
    "c.bias": (OUTPUTS,),
    "c.weight": (OUTPUTS, SECOND),
}

HEADS, WIDTH = 2, 3
ATTENTION = Symmetry(
    (
        Group(HEADS, (Axis("k", 0), Axis("o", 1, True), Axis("q", 0), Axis("v", 0))),
        Group(WIDTH, (Axis("k", 1), Axis("q", 1))),
        Group(WIDTH, (Axis("o", 2, True), Axis("v", 1))),
    ),
    dict.fromkeys("kqv", ((HEADS, WIDTH), (4,))) | {"o": ((4,), (HEADS, WIDTH))},
)


def perceptron(seed: int) -> Model:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def function(model: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(x @ model["a.weight"].T + model["a.bias"])
    hidden = torch.relu(hidden @ model["b.weight"].T + model["b.bias"])
    return hidden @ model["c.weight"].T + model["c.bias"]


def reordered(model: Model, seed: int) -> Model:
    rng = np.random.default_rng(seed)
    order = [rng.permutation(group.size) for group in HIDDEN.groups]
    return {name: HIDDEN.turned(name, x, order) for name, x in model.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / "symmetry.json"
    path.write_bytes(HIDDEN.encode())
    return {"symmetry": path}


def zipit(models: Sequence[Model], files: Mapping[str, Path], **how: Any) -> Prepared:
    return Prepared("zipit", models, files=files, **({"method": "weights"} | how))


# ---------------------------------------------------------------- greedy clusters


def by_definition(similarity: Wide, k: int, alpha: float, budget: int) -> list[set[int]]:
    """Every pair of clusters is looked at for every merger."""
    n = len(similarity) // k
    clusters = [{i} for i in range(k * n)]
    like = {frozenset((i, j)): similarity[i, j] for i, j in itertools.combinations(range(k * n), 2)}
    left = [budget] * k
    while len(clusters) > n:

        def allowed(one: set[int], other: set[int]) -> bool:
            shared = {i // n for i in one} & {i // n for i in other}
            return all(left[model] > 0 for model in shared)

        pairs = list(itertools.combinations(sorted(clusters, key=min), 2))
        pairs = [pair for pair in pairs if allowed(*pair)] or pairs
        one, other = max(pairs, key=lambda pair: like[frozenset(map(min, pair))])
        for model in {i // n for i in one} & {i // n for i in other}:
            left[model] -= 1
        clusters = [c for c in clusters if c not in (one, other)]
        for third in clusters:
            least = min(like[frozenset((min(c), min(third)))] for c in (one, other))
            like[frozenset((min(one | other), min(third)))] = least * alpha if least > 0 else least
        clusters.append(one | other)
    return sorted(clusters, key=min)


@pytest.mark.parametrize(("k", "n"), [(1, 4), (2, 5), (2, 8), (3, 4), (4, 3)])
@pytest.mark.parametrize("alpha", ["0", "0.0001", "0.5", "1"])
@pytest.mark.parametrize("beta", ["0", "0.075", "0.4", "1"])
def test_clusters_are_those_of_looking_at_every_pair(k: int, n: int, alpha: str, beta: str) -> None:
    for seed in range(6):
        features = np.random.default_rng(seed).standard_normal((k * n, 3))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        similarity = features @ features.T
        similarity = (similarity + similarity.T) / 2
        found = zipped(similarity, k, Decimal(alpha), Decimal(beta))
        wanted = by_definition(similarity, k, float(alpha), int(((k - 1) * n // k) * Decimal(beta)))
        flat = found.reshape(-1)
        assert [set(np.flatnonzero(flat == c).tolist()) for c in range(n)] == wanted
        if beta == "0" and k == 2:
            assert all(sorted(own) == list(range(n)) for own in found)


def test_a_pair_of_units_of_one_model_is_merged_only_within_the_budget() -> None:
    similarity = np.array([[1, 0.9, 0, 0.1], [0.9, 1, 0.1, 0], [0, 0.1, 1, 0.2], [0.1, 0, 0.2, 1]])
    assert zipped(similarity, 2, Decimal(1), Decimal(1)).tolist() == [[0, 0], [1, 1]]
    assert zipped(similarity, 2, Decimal(1), Decimal("0.9")).tolist() == [[0, 1], [1, 0]]


def test_permuted_is_the_best_assignment_of_each_model_to_the_first() -> None:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((12, 7))
    found = permuted(features @ features.T, 3)
    block = features @ features.T
    for i in range(3):
        own = [block[found[i][u], 4 * i + u] for u in range(4)]
        best = max(sum(block[p[u], 4 * i + u] for u in range(4)) for p in itertools.permutations(range(4)))
        assert np.isclose(sum(own), best)
    assert found[0].tolist() == [0, 1, 2, 3]


def test_gathered_is_a_product_with_zeros_and_ones() -> None:
    rng = np.random.default_rng(4)
    for position in range(3):
        x = rng.standard_normal((4, 5, 6))
        n = x.shape[position]
        clusters = rng.integers(0, n, n)
        wanted = np.tensordot(np.eye(n)[clusters], x, axes=(0, position))
        assert np.allclose(gathered(x, position, clusters), np.moveaxis(wanted, 0, position), rtol=0, atol=1e-14)


# ---------------------------------------------------------------- the merged model


def test_apply_is_m_blockdiag_u(files: dict[str, Path]) -> None:
    models = [perceptron(seed) for seed in (1, 2, 3)]
    weights = np.array([1.0, 0.25, 2.0])
    prepared = zipit(models, files, weights=weights.tolist(), beta="0.5", alpha="0.5")
    found = prepared.run()
    table = prepared.plan["clusters"]
    clusters = [table[meta.id.hex()] for meta in metas([1] * 3)]
    ms, us = [], []
    for g, group in enumerate(HIDDEN.groups):
        u = np.concatenate([np.eye(group.size)[own[g]] for own in clusters])
        weighted = u * np.repeat(weights, group.size)[:, None]
        m = (weighted / weighted.sum(axis=0)).T
        assert np.allclose(m @ u, np.eye(group.size))
        ms.append(m)
        us.append(u)
    of = {name: [one[name].numpy() for one in models] for name in SHAPES}
    mean = np.concatenate([np.eye(OUTPUTS) * w for w in weights / weights.sum()], axis=1)

    def diagonal(blocks: list[Wide]) -> Wide:
        found: Wide = torch.block_diag(*map(torch.from_numpy, blocks)).numpy()
        return found

    wanted = {
        "a.weight": ms[0] @ np.concatenate(of["a.weight"]),
        "a.bias": ms[0] @ np.concatenate(of["a.bias"]),
        "b.weight": ms[1] @ diagonal(of["b.weight"]) @ us[0],
        "b.bias": ms[1] @ np.concatenate(of["b.bias"]),
        "c.weight": mean @ diagonal(of["c.weight"]) @ us[1],
        "c.bias": mean @ np.concatenate(of["c.bias"]),
    }
    for name, value in wanted.items():
        assert np.allclose(found[name].numpy(), value, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("beta", ["0", "0.075"])
def test_copies_with_other_orders_of_units_give_the_function(files: dict[str, Path], beta: str) -> None:
    one = perceptron(5)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, INPUTS)))
    for copies in ([one, one], [one, reordered(one, 1), reordered(one, 2)]):
        found = zipit(copies, files, beta=beta, weights=["1", "0.3", "2"][: len(copies)]).run()
        assert torch.allclose(function(found, x), function(one, x), rtol=0, atol=1e-9)


def test_units_that_are_copies_within_a_model_make_room_for_the_other_models(files: dict[str, Path]) -> None:
    """Each model has half as many different units as there is room for; the merged one has those of both."""
    one, other = perceptron(6), perceptron(7)
    for model in (one, other):
        for tensor in ("a.weight", "a.bias"):
            model[tensor][FIRST // 2 :] = model[tensor][: FIRST // 2]
        for tensor in ("b.weight", "b.bias"):
            model[tensor][SECOND // 2 :] = model[tensor][: SECOND // 2]
    zip_ = zipit([one, other], files, beta="1", alpha="1")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((20, INPUTS)))
    wanted = (function(one, x) + function(other, x)) / 2
    assert torch.allclose(function(zip_.run(), x), wanted, rtol=0, atol=1e-12)
    permutations = zipit([one, other], files, beta="0").run()
    assert (function(permutations, x) - wanted).abs().max() > 0.1


def test_heads_and_their_widths_are_merged_and_what_queries_and_keys_meet_by_is_only_reordered(tmp_path: Path) -> None:
    path = tmp_path / "symmetry.json"
    path.write_bytes(ATTENTION.encode())
    rng = np.random.default_rng(8)
    shapes = {"k": (6, 4), "o": (4, 6), "q": (6, 4), "v": (6, 4)}
    one: Model = {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()}
    order = [np.array([1, 0]), np.array([2, 0, 1]), np.array([1, 2, 0])]
    other: Model = {name: ATTENTION.turned(name, x, order) for name, x in one.items()}
    found = zipit([one, other], {"symmetry": path}).run()
    assert all(torch.allclose(found[name], one[name], rtol=0, atol=1e-12) for name in one)
    third: Model = {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()}
    prepared = zipit([one, third], {"symmetry": path}, beta="1")
    for own in prepared.plan["clusters"].values():
        assert sorted(own[1]) == [0, 1, 2]
    assert all(torch.isfinite(x).all() for x in prepared.run().values())


# ---------------------------------------------------------------- by activations


class Layers(torch.nn.Module):
    """The network of ``function``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(INPUTS, FIRST).double(), torch.nn.Linear(FIRST, SECOND).double()
        self.c = torch.nn.Linear(SECOND, OUTPUTS).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


def test_by_activations_copies_give_the_function_and_copies_within_make_room(
    files: dict[str, Path], tmp_path: Path
) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((200, INPUTS)))
    export(Layers(), [x[:2]], tmp_path / "model.pt2")
    write({"inputs": x}, tmp_path / "data.safetensors")
    given = files | {"program": tmp_path / "model.pt2", "data": tmp_path / "data.safetensors"}
    one, other = perceptron(6), perceptron(7)
    for model in (one, other):
        for tensor in ("a.bias", "b.bias"):
            model[tensor] = model[tensor].abs()
    with one_process():
        found = zipit([one, reordered(one, 1)], given, method="activations")
        assert torch.allclose(function(found.run(), x), function(one, x), rtol=0, atol=1e-9)
        for model in (one, other):
            for tensor in ("a.weight", "a.bias"):
                model[tensor][FIRST // 2 :] = model[tensor][: FIRST // 2]
            for tensor in ("b.weight", "b.bias"):
                model[tensor][SECOND // 2 :] = model[tensor][: SECOND // 2]
        for probe in ("data", "noise"):
            zip_ = zipit([one, other], given, method="activations", probe=probe, beta="1", alpha="1")
            wanted = (function(one, x) + function(other, x)) / 2
            assert torch.allclose(function(zip_.run(), x), wanted, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- as a strategy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_order_threads_and_plans_change_nothing(files: dict[str, Path], dtype: torch.dtype) -> None:
    models: list[Model] = [{n: x.to(dtype) for n, x in perceptron(seed).items()} for seed in (1, 2, 3)]
    inputs = {"symmetry": files["symmetry"]}
    recipe = Recipe.of("zipit", {"method": "weights", "beta": "0.5"})
    one = merge(models, strategy=recipe, weights=["1", "2", "3"], inputs=inputs)
    turned = merge(models[::-1], strategy=recipe, weights=["3", "2", "1"], inputs=inputs)
    assert equal({n: one[n] for n in SHAPES}, {n: turned[n] for n in SHAPES})
    prepared = zipit(models, files, beta="0.5", threads=1)
    wide = zipit(models, files, beta="0.5", threads=2)
    assert prepared.plan.digest == wide.plan.digest
    found = prepared.run()
    assert equal(found, wide.run())
    assert equal(found, prepared.applied())
    prepared.plan = decode(encode(prepared.plan, bytes(32)), "a plan")[0]
    assert equal(found, prepared.run())


def test_of_equal_models_it_is_that_model(files: dict[str, Path]) -> None:
    one = perceptron(9)
    assert equal(zipit([one], files).run(), one)
    found = zipit([one, one, one, one], files).run()
    assert all(torch.allclose(found[name], one[name], rtol=0, atol=1e-14) for name in one)


def test_what_cannot_be_done_is_a_sentence(files: dict[str, Path]) -> None:
    models = [perceptron(1), perceptron(2)]
    prepared = zipit(models, files)
    for held in ({}, {i: [[0] * FIRST] for i in prepared.plan["clusters"]}):
        prepared.plan = Plan({**prepared.plan.data, "clusters": held})
        with pytest.raises(MismatchError, match="no clusters of"):
            prepared.run()
    with pytest.raises(UsageError, match="the weights sum to 0"):
        zipit(models, files, weights=[0, 0]).run()
    smaller = [{**one, "c.weight": one["c.weight"][:, :4]} for one in models]
    with pytest.raises(MismatchError, match=r"'c\.weight' has shape"):
        zipit(smaller, files)
    lacking = {name: x for name, x in models[1].items() if name != "b.bias"}
    with pytest.raises(MismatchError, match="lacks it"):
        zipit([models[0], lacking], files)
