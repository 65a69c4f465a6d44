"""Aligned merges: copies of one network in other orders merge into that network; every rule sees like units.

Networks are perceptrons, reordered by numpy's indexing alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crdtmerge.errors import InputError, MismatchError, NeedsError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve import plan_file
from crdtmerge.resolve.asking import completed, recipe_of
from crdtmerge.resolve.beside import Beside
from crdtmerge.resolve.merge import Merged, merge
from crdtmerge.resolve.merging import Merge, Options
from crdtmerge.strategies.protocol import Plan
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from tests.strategies.models import Model, Prepared, copied, equal

HIDDEN = (12, 9)
WIDTHS = (5, *HIDDEN, 4)
ORDER = np.ndarray[Any, np.dtype[np.int64]]


def perceptron(widths: Sequence[int] = WIDTHS) -> Symmetry:
    tensors, groups = {}, []
    for at in range(1, len(widths)):
        tensors |= {f"{at}.weight": ((widths[at],), (widths[at - 1],)), f"{at}.bias": ((widths[at],),)}
    for at in range(1, len(widths) - 1):
        axes = (Axis(f"{at}.weight", 0), Axis(f"{at}.bias", 0), Axis(f"{at + 1}.weight", 1, True))
        groups.append(Group(widths[at], axes))
    return Symmetry(tuple(groups), tensors)


@pytest.fixture(scope="module")
def symmetry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("symmetry") / "s.json"
    path.write_bytes(perceptron().encode())
    return path


def network(number: int, around: Model | None = None, scale: float = 1.0) -> Model:
    rng = np.random.default_rng(number)
    made = {}
    for at in (1, 2, 3):
        for name, shape in ((f"{at}.weight", (WIDTHS[at], WIDTHS[at - 1])), (f"{at}.bias", (WIDTHS[at],))):
            x = rng.standard_normal(shape) * scale
            made[name] = torch.from_numpy(x if around is None else around[name].double().numpy() + x).float()
    made["steps"] = torch.tensor(7)
    return made


def orders(number: int) -> list[ORDER]:
    rng = np.random.default_rng([3, number])
    return [rng.permutation(size) for size in HIDDEN]


def reordered(one: Model, p: ORDER, q: ORDER) -> dict[str, torch.Tensor]:
    """The two hidden layers of a perceptron in other orders, tensor by tensor."""
    return {
        "1.weight": one["1.weight"][p].contiguous(),
        "1.bias": one["1.bias"][p].contiguous(),
        "2.weight": one["2.weight"][q][:, p].contiguous(),
        "2.bias": one["2.bias"][q].contiguous(),
        "3.weight": one["3.weight"][:, q].contiguous(),
        "3.bias": one["3.bias"],
        "steps": one["steps"],
    }


def output(one: Model, x: torch.Tensor) -> torch.Tensor:
    for at in (1, 2):
        x = torch.relu(x @ one[f"{at}.weight"].double().T + one[f"{at}.bias"].double())
    return x @ one["3.weight"].double().T + one["3.bias"].double()


def merged(models: Sequence[Model], symmetry: Path | None, strategy: str = "aligned", **how: Any) -> Merged:
    return merge(list(models), strategy=strategy, inputs={"symmetry": symmetry} if symmetry else None, **how)


def tuned(count: int, base: Model, number: int = 50) -> list[Model]:
    """Fine-tunes, near enough to the base that their units are told."""
    return [network(number + i, base, 0.1) for i in range(count)]


def scattered(models: Sequence[Model]) -> list[Model]:
    return [reordered(one, *orders(i)) for i, one in enumerate(models)]


# ---------------------------------------------------------------- copies of one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{"onto": "mean"}, {"onto": "reference"}, {"strategy": "rebasin"}], ids=str)
def test_copies_of_a_network_in_other_orders_merge_into_it(
    how: dict[str, Any], dtype: torch.dtype, symmetry: Path
) -> None:
    one = {name: x.to(dtype) if x.is_floating_point() else x for name, x in network(1).items()}
    models = [one, *(reordered(one, *orders(i)) for i in range(4))]
    plain = merge(models[:2], strategy="linear")
    assert not any(equal(copied(plain), model) for model in models)
    found = merged(models, symmetry, **how)
    first = found.receipt.contributions[0][0]
    kept = merged(models, symmetry, **how, reference=_id(models[2]).hex())
    assert equal(copied(kept), models[2])
    assert [_id(model) == first for model in models] == [equal(copied(found), model) for model in models]


def test_onto_the_base_the_base_keeps_its_order(symmetry: Path) -> None:
    one = network(1)
    models = [reordered(one, *orders(i)) for i in range(4)]
    for strategy in ("aligned", "rebasin"):
        assert equal(copied(merged(models, symmetry, strategy, base=network(2, one, 0.1), onto="base")), one)


def test_the_merge_computes_what_its_parts_do(symmetry: Path) -> None:
    """At weight one of a model and next to nothing of the others, the merge is that model in another order."""
    models = [network(i) for i in (1, 2, 3)]
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((50, 5)))
    for at, one in enumerate(models):
        weights = ["1" if i == at else "0" for i in range(3)]
        found = merged(models, symmetry, weights=weights)
        assert torch.allclose(output(found, x), output(one, x), rtol=0, atol=1e-4)


# ---------------------------------------------------------------- other rules see like units


@pytest.mark.parametrize("inner", ["ties", "task_arithmetic", "dare_linear", "magmax", "breadcrumbs", "emr"])
def test_task_vectors_are_those_of_the_same_units(inner: str, symmetry: Path) -> None:
    """The merge of scattered fine-tunes, seeds aside, is the merge of the fine-tunes themselves."""
    base = network(1)
    models = tuned(3, base)
    how: dict[str, Any] = {"base": base, "seed": 5}
    settings = {"density": 1} if inner == "dare_linear" else {}
    direct = merge(models, strategy=inner, **how, **settings)
    found = merged(scattered(models), symmetry, inner=inner, settings=settings, **how)
    for name in base:
        assert torch.allclose(found[name].double(), direct[name].double(), rtol=0, atol=1e-6), name


@pytest.mark.parametrize("inner", ["median", "trimmed_mean", "krum", "multi_krum", "nna", "geometric_median"])
def test_robust_rules_see_through_other_orders_and_leave_out_who_lies(inner: str, symmetry: Path) -> None:
    base = network(1)
    models = [*tuned(5, base), {name: -20 * x if x.is_floating_point() else x for name, x in base.items()}]
    settings = {} if inner == "median" else {"byzantine": 1}
    found = merged(scattered(models), symmetry, inner=inner, settings=settings, onto="base", base=base)
    far = max(float((found[name] - base[name]).abs().max()) for name in base)
    assert far < 1


def test_statistics_come_in_the_same_order(symmetry: Path) -> None:
    base = network(1)
    models = tuned(3, base)
    rng = np.random.default_rng(4)
    fisher = [{n: torch.from_numpy(rng.random(x.shape)).float() for n, x in m.items() if x.dim()} for m in models]
    grams = []
    for _ in models:
        x = {at: rng.standard_normal((40, WIDTHS[at - 1])) for at in (1, 2, 3)}
        grams.append({f"{at}.weight": torch.from_numpy(one.T @ one / 40).float() for at, one in x.items()})
    moved_fisher = [reordered({**one, "steps": base["steps"]}, *orders(i)) for i, one in enumerate(fisher)]
    turned_grams = []
    for i, one in enumerate(grams):
        p, q = orders(i)
        turned_grams.append(
            {
                "1.weight": one["1.weight"],
                "2.weight": one["2.weight"][p][:, p].contiguous(),
                "3.weight": one["3.weight"][q][:, q].contiguous(),
            }
        )
    pairs = (("fisher_merge", "fisher", fisher, moved_fisher), ("regression_mean", "gram", grams, turned_grams))
    for inner, name, own, moved in pairs:
        direct = merge(models, strategy=inner, stats=[{name: one} for one in own])
        found = merged(
            scattered(models), symmetry, inner=inner, stats=[{name: one} for one in moved], onto="base", base=base
        )
        for tensor in base:
            assert torch.allclose(found[tensor].double(), direct[tensor].double(), rtol=0, atol=2e-6), (inner, tensor)


# ---------------------------------------------------------------- the same bytes


def test_any_order_of_arrival_any_threads_and_any_block_give_one_receipt(
    symmetry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [network(i) for i in range(4)]
    base = network(9)
    for how in ({}, {"inner": "ties", "base": base}, {"strategy": "rebasin"}):
        found = set()
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
            for threads, block in ((1, "65536"), (4, "262144")):
                monkeypatch.setenv("CRDTMERGE_BLOCK", block)
                made = merged([models[i] for i in order], symmetry, threads=threads, **how)
                assert made.receipt.exact
                found.add(made.receipt.to_bytes())
        assert len(found) == 1


def test_the_plan_needs_no_symmetry_and_gives_the_same_bytes(symmetry: Path, tmp_path: Path) -> None:
    models, base = [network(i) for i in range(3)], network(9)
    ready = Prepared("aligned", models, base, files={"symmetry": symmetry}, inner="ties")
    assert set(ready.plan.data) == {"symmetry", "permutations", "strategy", "inner"}
    path = tmp_path / "a.plan"
    made = merged(models, symmetry, inner="ties", base=base)
    recipe = Recipe("aligned", inner="ties")
    with Merge([(m, Claim()) for m in models], recipe, base, Options(), Beside((), {"symmetry": symmetry})) as one:
        plan_file.write(path, one.plan, one.unplanned_id, one.recipe.inputs)
    again = merge(models, strategy="aligned", inner="ties", base=base, plan=path)
    assert equal(copied(again), copied(made))


def test_a_plan_of_other_permutations_is_refused(symmetry: Path) -> None:
    models = [network(i) for i in range(2)]
    ready = Prepared("rebasin", models, files={"symmetry": symmetry})
    content = min(ready.plan["permutations"])
    own = ready.plan["permutations"]
    for wrong in ([own[content][0]], [[0] * 12, own[content][1]], None, [own[content][0], [0]]):
        ready.plan = Plan({**ready.plan.data, "permutations": {**own, content: wrong}})
        with pytest.raises(MismatchError, match="no permutation"):
            ready.applied()


# ---------------------------------------------------------------- what is said


def test_align_says_aligned_with_the_strategy_inside(symmetry: Path) -> None:
    long = Recipe("aligned", inner="ties", settings={"density": "0.3"}, method="weights")
    for short in (
        Recipe("ties", density="0.3", align="weights"),
        Recipe.of("ties", {"density": "0.3"}, align="weights"),
        recipe_of("ties", {"density": 0.3, "align": "weights"})[0],
        recipe_of("ties", {"density": "0.3"}, align="weights")[0],
    ):
        assert completed(short, bytes(32)).id == completed(long, bytes(32)).id
    models, base = [network(i) for i in range(3)], network(9)
    short = merged(models, symmetry, "ties", align="weights", base=base, density=0.3)
    assert (
        short.receipt.to_bytes()
        == merged(models, symmetry, inner="ties", settings="density=0.3", base=base).receipt.to_bytes()
    )


def test_what_is_missing_is_said(symmetry: Path, tmp_path: Path) -> None:
    models = [network(i) for i in range(2)]
    with pytest.raises(NeedsError, match="crdtmerge symmetry"):
        merged(models, None)
    with pytest.raises(NeedsError, match="input"):
        merged(models, symmetry, "dimat")
    other = tmp_path / "other.json"
    other.write_bytes(perceptron((5, 12, 10, 4)).encode())
    with pytest.raises(MismatchError, match="same architecture"):
        merged(models, other)
    other.write_bytes(Symmetry((), {"elsewhere": ((3,),)}).encode())
    with pytest.raises(MismatchError, match="elsewhere"):
        merged(models, other)
    other.write_bytes(b"{}")
    with pytest.raises(InputError, match="symmetry"):
        merged(models, other)
    with pytest.raises(MismatchError, match="lacks"):
        merged(models, symmetry, exclude=["2.bias"])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"inner": "ties", "onto": "mean"}, "onto = base"),
        ({"inner": "task_arithmetic", "onto": "reference", "with_base": True}, "onto = base"),
        ({"inner": "ada_merging"}, "runs a model"),
        ({"inner": "safe_merge"}, "further files"),
        ({"inner": "rebasin"}, "further files"),
        ({"inner": "aligned"}, "holds a strategy itself"),
        ({"reference": "ab"}, "reference"),
        ({"onto": "base", "reference": "ab" * 32, "with_base": True}, "leave reference out"),
        ({"sweeps": -1}, "sweeps"),
        ({"method": "names"}, "method"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(how: dict[str, Any], said: str, symmetry: Path) -> None:
    models = [network(i) for i in range(2)]
    base = network(9) if how.pop("with_base", False) or how.get("inner") == "ties" else None
    with pytest.raises(UsageError, match=said):
        merged(models, symmetry, base=base, **how)


def test_a_reference_that_is_not_there_is_refused(symmetry: Path) -> None:
    with pytest.raises(MismatchError, match="none of the contributions"):
        merged([network(1), network(2)], symmetry, reference="ab" * 32)


def test_no_sweeps_align_nothing(symmetry: Path) -> None:
    models = [network(i) for i in range(3)]
    assert equal(copied(merged(models, symmetry, sweeps=0)), copied(merge(models, strategy="linear")))


def _id(one: Model) -> bytes:
    return merge([one], strategy="linear").receipt.contributions[0][0]


def test_a_tied_tensor_may_be_missing(tmp_path: Path) -> None:
    symmetry = perceptron()
    axes = (*symmetry.groups[0].axes, Axis("copy", 0))
    tensors = {**symmetry.tensors, "copy": symmetry.tensors["1.weight"]}
    tied = Symmetry((Group(12, axes), symmetry.groups[1]), tensors, (("1.weight", "copy"),))
    path = tmp_path / "tied.json"
    path.write_bytes(tied.encode())
    one = network(1)
    found = merged(scattered([one] * 3), path, onto="base", base=one)
    assert equal(copied(found), one)
