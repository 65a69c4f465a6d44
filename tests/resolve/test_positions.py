"""Positions become ids: what is said of the second path belongs to its content, wherever that is written."""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from crdtmerge.errors import CrdtMergeError, ParameterError, UsageError
from crdtmerge.resolve.merge import Merged, merge
from crdtmerge.strategies import registry
from tests.resolve import models
from tests.resolve.running import here
from tests.strategies.models import DEEP

STATES = {who: models.state(who, far=0.5) for who in ("base", "a", "b", "c")}
A, B, C, BASE = (STATES[who] for who in ("a", "b", "c", "base"))
FILLED = [name for name in BASE if name != "empty"]
NEED_A_BASE = ("task_arithmetic", "ties", "dare", "dare_ties", "magmax")
SIGNED = ("linear", "task_arithmetic", "dare", "magmax")
UNSIGNED = ("weight_average", "slerp", "ties", "dare_ties")


def run(given: list[models.State], strategy: str, **options: object) -> Merged:
    return merge(given, strategy=strategy, base=BASE if strategy in NEED_A_BASE else None, **options)  # type: ignore[arg-type]


def receipt(given: list[models.State], strategy: str, **options: object) -> bytes:
    return run(given, strategy, **options).receipt.to_bytes()


# t


@pytest.mark.parametrize("strategy", ["slerp", "linear", "weight_average", "task_arithmetic"])
def test_t_follows_the_order_in_which_the_two_are_written(strategy: str) -> None:
    assert receipt([A, B], strategy, t=0.3) == receipt([B, A], strategy, t="0.7")
    assert receipt([A, B], strategy, t=0.3) == receipt([A, B], strategy, weights=["0.7", "0.3"])
    digests = {run(given, strategy, t=0.3).receipt.output_digest for given in ([A, B], [B, A])}
    assert len(digests) == 2


def test_t_is_the_share_of_the_second() -> None:
    mean = run([A, B], "linear", t="0.25")["blocks.0.bias"]
    a, b = A["blocks.0.bias"].double(), B["blocks.0.bias"].double()
    assert torch.equal(mean, (0.75 * a + 0.25 * b).float()) or torch.equal(mean, (0.25 * b + 0.75 * a).float())
    assert (run([A, B], "linear", t=0)["scale"], run([A, B], "linear", t=1)["scale"]) == (A["scale"], B["scale"])


def test_t_is_no_part_of_the_recipe() -> None:
    recipes = [
        run([A, B], "slerp", **said).receipt.recipe for said in ({"t": 0.3}, {"t": 0.6}, {}, {"weights": [2, 1]})
    ]
    assert len({recipe.id for recipe in recipes}) == 1
    assert "t" not in recipes[0].canonical()["params"]
    roots = {run([A, B], "slerp", t=t).receipt.root for t in (0.3, 0.6)}
    assert len(roots) == 2


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ([A, B], {"t": 0.3, "weights": [1, 1]}, "t and weights say the same thing twice"),
        ([A, B, C], {"t": 0.3}, "t is for two models, not 3"),
        ([A], {"t": 0.3}, "t is for two models, not 1"),
        ([A, B], {"t": "1.01"}, "t = 1.01: must be from 0 to 1"),
        ([A, B], {"t": -0.1}, "t = -0.1: must be from 0 to 1"),
        ([A, B], {"t": "half"}, "'half' is not a number"),
        ([A, B], {"t": float("nan")}, "not a finite number"),
    ],
)
def test_any_other_t_is_refused(given: list[models.State], options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(given, "slerp", **options)


def test_t_on_the_command_line(tmp_path: Path) -> None:
    a, b = (models.save(tmp_path / f"{who}.safetensors", STATES[who]) for who in ("a", "b"))
    slerp = ("--strategy", "slerp", "--json")
    one = here("merge", a, b, *slerp, "--set", "t=0.3").json
    other = here("merge", b, a, *slerp, "--set", "t=0.7").json
    weighted = here("merge", b, a, *slerp, "--weight", "0.3", "--weight", "0.7").json
    same = ("merge_id", "root", "recipe_id", "seed", "contributions", "output_digest")
    assert {key: one[key] for key in same} == {key: other[key] for key in same} == {key: weighted[key] for key in same}
    refused = here("merge", a, b, *slerp, "--set", "t=0.3", "--weight", 1, "--weight", 1)
    assert (refused.code, refused.json["error"]["kind"]) == (2, "UsageError")


# Weights


@pytest.mark.parametrize("strategy", DEEP)
def test_weights_belong_to_contents_not_to_positions(strategy: str) -> None:
    weight = {"a": "1", "b": "0.5", "c": "2"}
    found = {
        receipt([STATES[who] for who in order], strategy, weights=[weight[who] for who in order])
        for order in itertools.permutations("abc")
    }
    exchanged = receipt([A, B, C], strategy, weights=["0.5", "1", "2"])
    assert len(found) == 1
    assert exchanged not in found


def test_roles_and_tasks_belong_to_contents_too() -> None:
    one = run([A, B], "ties", tasks=["math", "code"], roles=["task", "task"]).receipt
    other = run([B, A], "ties", tasks=["code", "math"]).receipt
    assert one.to_bytes() == other.to_bytes()
    assert run([A, B], "ties", tasks=["code", "math"]).receipt.root != one.root
    assert run([A, B], "ties").receipt.root != one.root


def test_weights_are_exact_decimals() -> None:
    assert receipt([A, B], "linear", weights=[1, 0.1]) == receipt([A, B], "linear", weights=["1.0", Decimal("0.10")])
    assert json.loads(receipt([A, B], "linear", weights=[1e-3, 3]))["contributions"][0]["weight"] in ("0.001", "3")


@pytest.mark.parametrize("said", ["weights", "roles", "tasks"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_is_said_for_each_model_or_none(said: str, count: int) -> None:
    value = {"weights": "1", "roles": "task", "tasks": "x"}[said]
    with pytest.raises(UsageError, match=f"{count} {said} for 3 models: give one for each model, or none"):
        run([A, B, C], "linear", **{said: [value] * count})


@pytest.mark.parametrize("weight", ["x", "", "1,5", "nan", "inf", True, None, "1" * 60, "1e999"])
def test_a_weight_that_is_no_number_a_person_writes_is_refused(weight: object) -> None:
    with pytest.raises(UsageError, match="weight: "):
        run([A, B], "linear", weights=[1, weight])


def test_the_two_lists_of_strategies_are_all_there_are() -> None:
    assert sorted(SIGNED + UNSIGNED) == sorted(DEEP)


@pytest.mark.parametrize("strategy", SIGNED)
def test_negative_weights_are_taken_where_they_mean_something(strategy: str) -> None:
    assert run([A, B], strategy, weights=[2, "-0.5"]).receipt.output_digest
    assert receipt([A, B], strategy, weights=[2, "-0.5"]) != receipt([A, B], strategy, weights=[2, "0.5"])


@pytest.mark.parametrize("strategy", UNSIGNED)
def test_negative_weights_are_refused_elsewhere(strategy: str) -> None:
    with pytest.raises(ParameterError, match=f"model 2 has weight -0.5; strategy '{strategy}' takes none below 0"):
        run([A, B], strategy, weights=[2, "-0.5"])


def test_a_mean_of_signs_takes_no_negative_weights_but_a_sum_does() -> None:
    with pytest.raises(ParameterError, match="none below 0"):
        run([A, B], "dare", combine="mean", weights=[2, -1])
    run([A, B], "dare", combine="sum", weights=[2, -1])


@pytest.mark.parametrize(
    ("strategy", "weights"),
    [("weight_average", [0, 0]), ("linear", [1, -1]), ("linear", ["0.1", "-0.1"]), ("slerp", [0, 0])],
)
def test_weights_that_sum_to_zero_are_refused_where_they_divide(strategy: str, weights: list[object]) -> None:
    with pytest.raises(UsageError, match=r"the weights sum to 0\.0"):
        run([A, B], strategy, weights=weights)


def test_weights_that_sum_to_zero_are_taken_where_nothing_divides() -> None:
    found = run([A, B], "linear", weights=[1, -1], normalize=False)["blocks.0.bias"]
    assert torch.equal(found, (A["blocks.0.bias"].double() - B["blocks.0.bias"].double()).float())


@pytest.mark.parametrize("strategy", ["ties", "dare", "dare_ties", "magmax", "task_arithmetic"])
def test_weights_of_zero_give_the_base(strategy: str) -> None:
    merged = run([A, B], strategy, weights=[0, 0])
    assert all(torch.equal(merged[name], BASE[name]) for name in FILLED)


# Roles


@pytest.mark.parametrize("role", ["forget", "unlearned", "safety", "teacher", ""])
def test_roles_that_a_strategy_does_not_take_are_refused(role: str) -> None:
    with pytest.raises(UsageError, match=f"model 1 has role '{role}'; strategy 'ties' merges task"):
        run([A, B], "ties", roles=[role, "task"])


# Twice the same


@pytest.mark.parametrize("strategy", DEEP)
def test_the_same_content_twice_counts_once(strategy: str) -> None:
    copy = {name: tensor.clone() for name, tensor in reversed(A.items())}
    merged = run([A, B, copy], strategy)
    assert merged.receipt.to_bytes() == receipt([B, A], strategy)
    assert merged.notes[0] == "model 3 holds the same content as model 1 and counts once"
    assert run([A, B], strategy).notes == ()


def test_the_command_says_what_counts_once_and_on_stderr(tmp_path: Path) -> None:
    a = models.save(tmp_path / "a.safetensors", A)
    copy = models.save_shards(tmp_path / "copy", A, 3)
    b = models.save(tmp_path / "b.safetensors", B)
    ran = here("merge", a, copy, b, a, "--json")
    assert ran.json["root"] == here("merge", b, a, "--json").json["root"]
    assert len(ran.json["contributions"]) == 2
    assert ran.err.splitlines() == [
        f"note: {copy} holds the same content as {a} and counts once",
        f"note: {a} holds the same content as {a} and counts once",
    ]


@pytest.mark.parametrize("said", [{"weights": [1, 1, 2]}, {"tasks": ["x", "x", "y"]}])
def test_the_same_content_with_two_claims_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"model 3 and model 1 hold the same content, weight .* and weight 1"):
        run([A, B, dict(A)], "weight_average", **said)


def test_t_over_the_same_content_twice_is_two_claims() -> None:
    with pytest.raises(UsageError, match="hold the same content"):
        run([A, dict(A)], "slerp", t=0.3)
    assert receipt([A, dict(A)], "slerp", t=0.5) == receipt([A], "slerp", weights=["0.5"])


@pytest.mark.parametrize("strategy", DEEP)
def test_one_model_is_merged_as_any_number_is(strategy: str) -> None:
    merged = run([A], strategy, **({"density": 1} if "density" in registry.get(strategy).Params.model_fields else {}))
    assert all(torch.allclose(merged[name].double(), A[name].double(), atol=1e-6) for name in FILLED)


def test_a_tensor_without_elements_is_read_from_a_merged_model() -> None:
    assert run([A, B], "linear")["empty"].shape == (0, 4)


def test_the_base_among_the_models_is_a_contribution_like_any_other() -> None:
    merged = run([A, BASE], "task_arithmetic")
    assert len(merged.receipt.contributions) == 2
    assert torch.equal(merged["blocks.0.bias"], run([A], "task_arithmetic")["blocks.0.bias"])


def test_no_models_at_all_are_refused() -> None:
    with pytest.raises(CrdtMergeError, match=r"merges 1 to \d+ models; 0 given"):
        merge([], strategy="linear")
    assert here("merge").code == 2


def test_a_base_that_is_not_used_is_said_and_does_not_change_the_values() -> None:
    without, merged = merge([A, B], strategy="linear"), merge([A, B], strategy="linear", base=BASE)
    assert merged.notes == ("linear does not use a base; only its files are carried over",)
    assert merged.receipt.output_digest == without.receipt.output_digest
    assert merged.receipt.root == without.receipt.root
