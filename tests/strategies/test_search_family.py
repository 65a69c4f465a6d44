"""Searches: functions whose best point is known, elitism, the same seed the same genome, what a genome means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import InputError, MismatchError, NeedsError, ParameterError
from crdtmerge.numerics.philox import stream
from crdtmerge.resolve import plan_file
from crdtmerge.resolve.merge import merge
from crdtmerge.resolve.view import TensorView
from crdtmerge.strategies.evolution import GRID, Breeding, Draws, Found, Genome, cma_es, genetic, point, ranked
from crdtmerge.strategies.protocol import Inner, Plan, Rng
from crdtmerge.strategies.search import factor
from tests.strategies.models import SEED, Model, Prepared, equal, family, merged

HALF = GRID // 2
Score = Callable[[Model], float]


def draws(number: int = 0) -> Draws:
    return Draws(stream(SEED, f"search {number}", b"", ""))


def evolved(evaluate: Callable[[Genome], float], genes: int, generations: int, number: int = 0, **how: Any) -> Found:
    how = {"population": None, "sigma": 1 / 6} | how
    return cma_es((HALF,) * genes, evaluate, draws(number), generations=generations, **how)


# ---------------------------------------------------------------- random numbers


def test_normal_numbers_are_normal() -> None:
    x = draws().normals(4000)
    assert abs(x.mean()) < 5 / math.sqrt(4000)
    assert abs(x.std() - 1) < 0.05
    below = np.sort(x)
    theory = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in below])
    assert np.abs(theory - np.arange(1, 4001) / 4000).max() < 1.95 / math.sqrt(4000)  # Kolmogorov, one in a thousand


def test_numbers_are_drawn_in_one_order() -> None:
    one, other = draws(), draws()
    assert one.uniforms(3) + one.uniforms(4) == other.uniforms(7)
    assert all(0 < u < 1 for u in other.uniforms(1000))
    assert draws(1).uniforms(3) != draws(2).uniforms(3)


def test_nan_is_worst_and_of_equal_values_the_first_is_better() -> None:
    nan = float("nan")
    assert ranked([nan, 1.0, 2.0, 2.0, -math.inf, nan]) == [2, 3, 1, 4, 0, 5]


# ---------------------------------------------------------------- CMA-ES


@pytest.mark.parametrize("genes", [1, 2, 6])
def test_cma_es_finds_the_top_of_a_bowl(genes: int) -> None:
    goal = np.linspace(0.2, 0.7, genes)
    found = evolved(lambda genome: -float(((point(genome) - goal) ** 2).sum()), genes, 80)
    assert np.abs(point(found.genome) - goal).max() < 1e-3
    assert found.value == pytest.approx(0, abs=1e-6)


def test_cma_es_learns_a_covariance() -> None:
    """A rotated ridge a thousand times longer than wide: without the covariance, progress is that of its width."""
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0]
    scale = np.array([1.0, 10.0, 100.0, 1000.0])
    goal = np.array([0.35, 0.6, 0.45, 0.55])

    def ridge(genome: Genome) -> float:
        return -float((scale * (turn @ (point(genome) - goal)) ** 2).sum())

    found = evolved(ridge, 4, 150)
    assert np.abs(point(found.genome) - goal).max() < 5e-3


def test_cma_es_goes_to_the_edge_where_the_best_lies_beyond() -> None:
    found = evolved(lambda genome: float(point(genome)[0] - point(genome)[1]), 2, 60)
    assert found.genome == (GRID, 0)


def test_the_same_seed_gives_the_same_calls_and_another_others() -> None:
    def calls(number: int) -> list[Genome]:
        log: list[Genome] = []

        def evaluate(genome: Genome) -> float:
            log.append(genome)
            return -sum((g - 20000) ** 2 for g in genome)

        evolved(evaluate, 3, 10, number)
        return log

    assert calls(1) == calls(1)
    assert calls(1)[1:] != calls(2)[1:]
    assert len(calls(1)) == 1 + 10 * 7


def test_cma_es_survives_nan_and_plateaus() -> None:
    """Half of the space is NaN, the rest is flat but for one step."""

    def evaluate(genome: Genome) -> float:
        x = point(genome)
        return float("nan") if x[0] > 0.5 else float(x[1] > 0.6)

    found = evolved(evaluate, 2, 30)
    assert found.value == 1.0
    assert evolved(lambda genome: float("nan"), 2, 5).genome == (HALF, HALF)
    assert evolved(lambda genome: 1.0, 2, 5).genome == (HALF, HALF)


def test_the_best_never_gets_worse_and_no_generations_are_the_beginning() -> None:
    rng = np.random.default_rng(1)
    found = evolved(lambda genome: float(rng.standard_normal()), 3, 20)
    assert all(later >= earlier for earlier, later in itertools.pairwise(found.history))
    assert evolved(lambda genome: 5.0, 3, 0) == Found((HALF,) * 3, 5.0, [5.0])
    assert evolved(lambda genome: 5.0, 0, 9) == Found((), 5.0, [5.0])


# ---------------------------------------------------------------- genetic algorithm


def bred(evaluate: Callable[[Genome], float], genes: int, generations: int, number: int = 0, **how: Any) -> Found:
    breeding = Breeding(**({"population": 12} | how))
    return genetic((HALF,) * genes, evaluate, draws(number), breeding, generations=generations)


@pytest.mark.parametrize("number", range(4))
def test_a_genetic_algorithm_finds_the_best_of_a_small_grid(number: int) -> None:
    """Of all 11 x 11 points, by exhaustion."""
    rng = np.random.default_rng(number)
    bumps = rng.uniform(0, 1, (3, 2))

    def evaluate(genome: Genome) -> float:
        x = point(genome)
        return float(sum(h * math.exp(-20 * ((x - b) ** 2).sum()) for h, b in zip((1, 1.5, 2), bumps, strict=True)))

    levels = [math.floor(level / 10 * GRID + 0.5) for level in range(11)]
    best = max(evaluate((a, b)) for a in levels for b in levels)
    assert bred(evaluate, 2, 40, number, levels=10).value == best


def test_genes_stay_on_their_levels() -> None:
    seen: list[Genome] = []

    def evaluate(genome: Genome) -> float:
        seen.append(genome)
        return -float(genome[0])

    bred(evaluate, 3, 10, levels=4)
    assert {gene for genome in seen for gene in genome} <= {0, GRID // 4, GRID // 2, 3 * GRID // 4, GRID}
    assert len(set(seen)) == len(seen), "nothing is evaluated twice"


def test_one_max_is_solved() -> None:
    found = bred(lambda genome: float(sum(genome)), 8, 60, population=20)
    assert sum(found.genome) > 0.97 * 8 * GRID


def test_the_best_of_a_genetic_algorithm_never_gets_worse() -> None:
    table: dict[Genome, float] = {}
    rng = np.random.default_rng(1)
    found = bred(lambda genome: table.setdefault(genome, float(rng.standard_normal())), 3, 20)
    assert all(later >= earlier for earlier, later in itertools.pairwise(found.history))
    assert found.value == max(table.values())


def test_without_crossover_and_mutation_the_best_of_the_first_population_wins() -> None:
    first: list[float] = []

    def evaluate(genome: Genome) -> float:
        first.append(-float(sum((g - 11111) ** 2 for g in genome)))
        return first[-1]

    found = bred(evaluate, 3, 10, crossover=0.0, mutation=0.0)
    assert len(first) == 12
    assert found.value == max(first)


# ---------------------------------------------------------------- as strategies


class Scored(TensorView):
    """A view whose merges are scored by a function here."""

    by: Score

    def score(self, metric: str, inner: Inner, rng: Rng, done: tuple[int, int]) -> float:
        assert done[0] <= done[1]
        return self.by(self.merged(self._programs.inside(inner, rng)))


def searched(
    strategy: str, models: list[Model], base: Model, by: Score, monkeypatch: pytest.MonkeyPatch, **params: Any
) -> Prepared:
    """A search whose fitness is a function of the merged model."""
    Scored.by = staticmethod(by)  # type: ignore[assignment,method-assign]
    monkeypatch.setattr("crdtmerge.testing.prepared.TensorView", Scored)
    return Prepared(strategy, models, base, **params)


def distance(goal: Model) -> Score:
    return lambda model: -float(sum(((model[name].double() - goal[name].double()) ** 2).sum() for name in goal))


@pytest.mark.parametrize(
    ("strategy", "generations"), [("evolutionary_merge", 40), ("genetic_merge", 40)], ids=["cma-es", "genetic"]
)
def test_known_weights_are_recovered(strategy: str, generations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The goal is base + 0.4 tau_1 + 1.6 tau_2, which task arithmetic reaches with the genes 0.2 and 0.8."""
    models, base = family(2, "F64", shapes={"a": (7,), "b": (3, 4)})
    goal = {n: base[n] + 0.4 * (models[0][n] - base[n]) + 1.6 * (models[1][n] - base[n]) for n in base}
    how = {"inner": "task_arithmetic", "generations": generations}
    prepared = searched(strategy, models, base, distance(goal), monkeypatch, **how)
    genes = [gene / GRID for gene in prepared.plan["genes"]["a"]]
    assert genes == pytest.approx([0.2, 0.8], abs=6e-2 if strategy == "genetic_merge" else 2e-3)
    found = prepared.run()
    assert equal(found, prepared.applied([2, 3]))
    assert all(torch.allclose(found[name], goal[name], atol=0.1) for name in goal)


def test_layers_have_weights_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = family(2, "F64", shapes={"l.0.w": (9,), "l.1.w": (9,)})
    goal = {"l.0.w": models[0]["l.0.w"], "l.1.w": models[1]["l.1.w"]}
    how: dict[str, Any] = {"inner": "task_arithmetic", "granularity": "layer", "generations": 60}
    prepared = searched("evolutionary_merge", models, base, distance(goal), monkeypatch, **how)
    genes = {name: [gene / GRID for gene in found] for name, found in prepared.plan["genes"].items()}
    assert genes["l.0.w"] == pytest.approx([0.5, 0.0], abs=1e-2)
    assert genes["l.1.w"] == pytest.approx([0.0, 0.5], abs=1e-2)


def test_the_density_of_ties_is_searched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The goal is the merge with another density; with the right weights it is found."""
    models, base = family(2, "F64", shapes={"a": (40,), "b": (5, 8)})
    goal = merged("ties", models, base, density="0.6", scope="tensor")
    settings = {"density": "0.3", "scope": "tensor"}
    prepared = searched(
        "evolutionary_merge", models, base, distance(goal), monkeypatch, settings=settings, generations=30
    )
    start = distance(goal)(merged("ties", models, base, **settings))
    assert prepared.plan["score"] > start / 10
    density = Decimal(prepared.plan["settings"]["a"]["density"])
    assert abs(density - Decimal("0.6")) < Decimal("0.1")
    again = merged("ties", models, base, density=str(density), scope="tensor", weights=_weights(prepared.plan))
    assert equal(prepared.run(), again)


def test_densities_of_layers_are_searched_tensor_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = family(2, "F32", shapes={"l.0.w": (9,), "l.1.w": (9,)})
    how: dict[str, Any] = {"granularity": "layer", "generations": 3}
    prepared = searched("evolutionary_merge", models, base, distance(models[0]), monkeypatch, **how)
    assert prepared.plan["scope"] == "tensor"
    found = prepared.run()
    assert equal(found, prepared.applied([4]))
    assert equal(found, prepared.run(use_kernels=True))
    data = plan_file.encode(prepared.plan, bytes(32))
    prepared.plan = plan_file.decode(data, "it")[0]
    assert equal(found, prepared.run())
    assert equal(found, prepared.run(use_kernels=True))


def _weights(plan: Plan) -> list[str]:
    return [str(factor(Decimal(1), gene)) for gene in plan["genes"]["a"]]


@pytest.mark.parametrize("strategy", ["evolutionary_merge", "genetic_merge"])
@pytest.mark.parametrize("inner", ["ties", "slerp", "linear", "dare_ties"])
def test_without_generations_it_is_the_inner_strategy(strategy: str, inner: str) -> None:
    models, base = family(3, "BF16")
    weights = ["1", "0.5", "2"]
    found = merged(strategy, models, base, weights=weights, inner=inner, generations=0)
    assert equal(found, merged(inner, models, base, weights=weights))


def test_where_nothing_is_better_the_beginning_is_the_inner_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores are equal: the first candidate, what is claimed, stays, to the bit."""
    models, base = family(3, "F32")
    weights = ["1", "0.1", "2.5"]
    prepared = searched(
        "evolutionary_merge", models, base, lambda model: 1.0, monkeypatch, weights=weights, generations=2
    )
    assert prepared.plan["settings"]["bias"] == {"density": "0.2"}
    assert equal(prepared.run(), merged("ties", models, base, weights=weights))


def test_candidates_that_the_inner_strategy_refuses_are_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 0 and 0 there is no mean; the best lies near."""
    models, base = family(2, "F64", shapes={"a": (7,)})
    how: dict[str, Any] = {"inner": "weight_average", "generations": 15, "levels": 2, "population": 9}
    prepared = searched("genetic_merge", models, base, distance(models[0]), monkeypatch, **how)
    assert prepared.plan["genes"]["a"][1] == 0
    assert torch.equal(prepared.run()["a"], models[0]["a"])


def test_only_nan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = family(2, "F64", shapes={"a": (7,)})
    with pytest.raises(MismatchError, match="every candidate's accuracy is NaN"):
        searched("evolutionary_merge", models, base, lambda model: float("nan"), monkeypatch, generations=1)


def test_a_factor_is_exact() -> None:
    assert factor(Decimal("0.1"), HALF) == Decimal("0.1")
    assert factor(Decimal("0.1"), 1) * HALF == Decimal("0.1")


def test_without_a_fitness_there_is_no_search() -> None:
    models, base = family(2)
    for strategy in ("evolutionary_merge", "genetic_merge"):
        with pytest.raises(NeedsError, match="needs the input 'data'"):
            merge(models, strategy=strategy, base=base)


def test_a_search_inside_a_search_is_refused() -> None:
    models, base = family(2)
    with pytest.raises(ParameterError, match="holds a strategy itself"):
        merge(models, strategy="evolutionary_merge", base=base, inner="genetic_merge", generations=0)


# ---------------------------------------------------------------- plans as files

PLANS: list[dict[str, Any]] = [
    {},
    {"a": [1, -2, None, True, "x", b"\x00\xff", 0.1, -0.0, 1e-320, float("inf")]},
    {"$float": {"$bytes": 1, "$$x": [{"$float": 2}]}, "deep": {"a": {"b": [[(1, 2)]]}}},
    {"big": 1 << 62, "text": '\u2028\x00"\\'},
]


@pytest.mark.parametrize("data", PLANS)
def test_a_plan_comes_back_as_it_was_written(data: dict[str, Any], tmp_path: Any) -> None:
    path = tmp_path / "x.plan"
    plan_file.write(path, Plan(data), b"\x07" * 32, {"program": b"\x01" * 32})
    plan, merge_id = plan_file.read(path)
    assert plan.digest == Plan(data).digest == plan_file.plan_digest(plan)
    assert merge_id == b"\x07" * 32
    assert plan_file.inputs_of(path) == {"program": b"\x01" * 32}
    assert plan_file.encode(plan, merge_id, {"program": b"\x01" * 32}) == path.read_bytes()
    plan_file.write(path, Plan({"another": 1}), bytes(32))
    assert plan_file.read(path)[0].data == {"another": 1}


def test_a_plan_that_is_another_text_or_cut_off_is_refused(tmp_path: Any) -> None:
    good = plan_file.encode(Plan({"a": [0.5, {"b": b"x"}]}), bytes(32))
    bad = [good[:n] for n in range(len(good))]
    bad += [good.replace(b"0x1.0", b"0x1.00"), good.replace(b'"a"', b' "a"'), good.replace(b"plan/1", b"plan/2")]
    bad += [good.replace(b"$bytes", b"$more"), good.replace(b"00" * 32, b"00" * 31), b"[" * 100000]
    bad += [good.replace(b'"b"', b'"$b"'), good.replace(b'{"data"', b'{"also":1,"data"')]
    for number, data in enumerate(bad):
        path = tmp_path / str(number)
        path.write_bytes(data)
        with pytest.raises(InputError):
            plan_file.read(path)
