"""Parameters are exact, bounded, spelled in one canonical way, and may differ between tensors."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge.errors import NeedsError, ParameterError, UnknownStrategyError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from tests.numerics.examples import examples
from tests.strategies.models import DEEP, copied, equal, family, model

MODELS, BASE = family(2, "BF16")


def one_of(name: str, value: Any) -> dict[str, Any]:
    """A parameter by a name that Python's syntax or a variable keeps us from writing down."""
    return {name: value}


def filled(strategy: str, **params: Any) -> Filled[Any]:
    return Filled(strategy, registry.get(strategy).Params, params)


def recipe_id(strategy: str, **params: Any) -> bytes:
    return merge(MODELS, strategy=strategy, base=BASE, **params).receipt.recipe.id


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("strategy", "name", "near"),
    [
        ("ties", "densty", "Did you mean density?"),
        ("ties", "lamda", "Did you mean lambda?"),
        ("dare", "rescal", "Did you mean rescale?"),
        ("slerp", "dot_treshold", "Did you mean dot_threshold?"),
        ("linear", "normalise", "Did you mean normalize?"),
        ("weight_average", "density", "It has: none."),
        ("ties", "zzz", "It has: lambda, density, scope, elect, combine."),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(strategy: str, name: str, near: str) -> None:
    with pytest.raises(ParameterError) as refused:
        merge(MODELS, strategy=strategy, base=BASE, **one_of(name, 1))
    assert f"strategy '{strategy}' has no parameter '{name}'." in str(refused.value)
    assert near in str(refused.value)


WRONG = [
    ("ties", "density", 0),
    ("ties", "density", "-0.1"),
    ("ties", "density", "1.0000000001"),
    ("ties", "density", 20),
    ("ties", "density", "a fifth"),
    ("ties", "density", float("nan")),
    ("ties", "density", True),
    ("ties", "density", None),
    ("ties", "density", []),
    ("ties", "density", {"a": 1}),
    ("ties", "lambda_", float("inf")),
    ("ties", "lambda_", "1" * 41),
    ("ties", "lambda_", "0." + "1" * 41),
    ("ties", "lambda_", "1e301"),
    ("ties", "lambda_", "1e-301"),
    ("ties", "scope", "row"),
    ("ties", "elect", "max"),
    ("ties", "combine", "median"),
    ("dare", "combine", "max"),
    ("dare", "drop", 1),
    ("dare", "drop", "-0.5"),
    ("dare", "drop", "1.5"),
    ("dare", "rescale", 2),
    ("dare", "rescale", "perhaps"),
    ("slerp", "dot_threshold", 0),
    ("slerp", "dot_threshold", "1.1"),
    ("slerp", "epsilon", "-1e-9"),
    ("slerp", "reduce", "mean"),
    ("slerp", "space", "rows"),
    ("linear", "normalize", "2"),
]


@pytest.mark.parametrize(("strategy", "name", "value"), WRONG)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused_by_name(strategy: str, name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as refused:
        merge(MODELS, strategy=strategy, base=BASE, **one_of(name, value))
    said = {"lambda_": "lambda", "drop": "d"}.get(name, name)  # drop is read as 1 - density, and may be called so
    assert f"strategy '{strategy}': {said}" in str(refused.value)


@pytest.mark.parametrize("value", [1, "0.7", "1e-8", "9.9e300", "-1e300", "1e-300", "0." + "1" * 40, "1" * 40])
def test_numbers_of_up_to_40_digits_are_taken_exactly(value: Any) -> None:
    assert filled("ties", lambda_=value).general.lambda_ == Decimal(str(value))


def test_density_and_drop_are_two_names_of_one_thing() -> None:
    for asked in ({"density": "0.1", "drop": "0.9"}, {"drop": "0.9", "density": "0.1"}):
        with pytest.raises(ParameterError, match=r"density is said twice, also as .*; give one of them"):
            filled("dare", **asked)


@pytest.mark.parametrize("strategy", ["linear", "slerp", "magmax", "task_arithmetic"])
def test_drop_is_unknown_where_there_is_no_density(strategy: str) -> None:
    with pytest.raises(ParameterError, match="has no parameter 'drop'"):
        filled(strategy, drop="0.1")


@pytest.mark.parametrize(
    "rules",
    [
        [{"filter": "w"}],
        [{"filter": "w", "value": "0.5", "other": 1}],
        [{"filter": "w", "value": "2"}],
        [{"filter": "w", "value": "0.5"}, {"value": "high"}],
    ],
)
def test_rules_that_are_malformed_are_refused(rules: list[dict[str, Any]]) -> None:
    with pytest.raises(ParameterError, match="strategy 'ties': density"):
        filled("ties", density=rules)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("drop", [1, 2], id="drop-numbers"),
        pytest.param("drop", [{"filter": "w"}], id="drop-without-value"),
        pytest.param("drop", [{"filter": "w", "value": 0.5}, 3], id="drop-mixed"),
        pytest.param("density", {"value": "0.5", "where": 3}, id="where-number"),
        pytest.param("density", {"value": "0.5", "where": [["a"]]}, id="where-short"),
    ],
)
def test_malformed_rules_raise_our_errors(name: str, value: Any) -> None:
    with pytest.raises(ParameterError):
        filled("dare", **{name: value})


@pytest.mark.parametrize(
    ("strategy", "how"),
    [
        ("ties", {"lambda_": "1e320"}),
        ("dare", {"density": "1e-320"}),
        ("weight_average", {"weights": ["1e320", 1]}),
        ("task_arithmetic", {"lambda_": "1e309"}),
    ],
)
def test_numbers_beyond_float64_raise_our_errors(strategy: str, how: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        merge(MODELS, strategy=strategy, base=BASE, **how)


@pytest.mark.parametrize(("name", "value"), [("dot_threshold", 1), ("epsilon", 0)])
def test_bounds_of_slerp_that_are_allowed_can_be_used(name: str, value: int) -> None:
    """Of parallel tensors (a cosine of 1 is not above 1) and of a tensor of zeros (no norm is below 0)."""
    one = {"w": torch.tensor([1.0, 2.0, 2.0])}
    other = {"w": one["w"] * (2.0 if name == "dot_threshold" else 0.0)}
    merge([one, other], strategy="slerp", **one_of(name, value))


def test_a_low_dot_threshold_does_not_make_tensors_opposite() -> None:
    one, other = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-0.6, 0.8])}
    merge([one, other], strategy="slerp", dot_threshold="0.5")


def test_lambda_is_said_once() -> None:
    with pytest.raises(UsageError):
        merge(MODELS, strategy="ties", base=BASE, lambda_="2", **one_of("lambda", "3"))


@pytest.mark.parametrize("strategy", ["task_arithmetic", "ties", "dare", "dare_ties", "magmax"])
def test_a_strategy_on_task_vectors_needs_a_base(strategy: str) -> None:
    with pytest.raises(NeedsError, match=f"strategy '{strategy}' needs a base"):
        merge(MODELS, strategy=strategy)


def test_slerp_needs_a_base_for_task_vectors_alone_and_for_one_rule_too() -> None:
    merge(MODELS, strategy="slerp")
    for space in ("task_vectors", [{"filter": "weight", "value": "task_vectors"}]):
        with pytest.raises(NeedsError, match="strategy 'slerp' needs a base"):
            merge(MODELS, strategy="slerp", space=space)


NEGATIVE: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "magmax": {},
    "dare": {"combine": "sum"},
}


@pytest.mark.parametrize("strategy", DEEP)
def test_negative_weights_are_for_sums(strategy: str) -> None:
    if strategy in NEGATIVE:
        merge(MODELS, strategy=strategy, base=BASE, weights=["2", "-1"], **NEGATIVE[strategy])
    else:
        with pytest.raises(ParameterError, match=r"weight -1; strategy .* takes none below 0"):
            merge(MODELS, strategy=strategy, base=BASE, weights=["2", "-1"])


def test_a_mean_of_dare_takes_no_negative_weights_even_by_one_rule() -> None:
    for combine in ("mean", [{"filter": "weight", "value": "mean"}, {"value": "sum"}]):
        with pytest.raises(ParameterError, match="takes none below 0"):
            merge(MODELS, strategy="dare", base=BASE, weights=["2", "-1"], combine=combine)


@pytest.mark.parametrize("strategy", ["weight_average", "linear", "slerp"])
@pytest.mark.parametrize("weights", [["0", "0"], ["1e-9", "0"]])
def test_a_mean_of_weights_that_sum_to_nothing_is_refused(strategy: str, weights: list[str]) -> None:
    with pytest.raises(UsageError, match="the weights sum to"):
        merge(MODELS, strategy=strategy, weights=weights)


def test_weights_that_cancel_are_refused_unless_not_normalised() -> None:
    with pytest.raises(UsageError, match="the weights sum to 0"):
        merge(MODELS, strategy="linear", weights=["1.1", "-1.1"])
    found = merge(MODELS, strategy="linear", weights=["1", "-1"], normalize=False)
    a, b = (m["weight"].double() for m in MODELS)
    assert torch.equal(found["weight"].double().abs(), (a - b).to(torch.bfloat16).double().abs())


# ---------------------------------------------------------------- one spelling


ONE = [1, 1.0, "1", "1.0", "1.000", "+1", "1e0", "0.1e1", Decimal("1.00")]


@pytest.mark.parametrize("spelling", ONE)
def test_one_in_any_spelling_and_the_default_are_one_recipe(spelling: Any) -> None:
    assert recipe_id("ties", lambda_=spelling) == recipe_id("ties")
    assert recipe_id("ties", **{"lambda": spelling}) == recipe_id("ties")


@pytest.mark.parametrize("spelling", [0.1, "0.1", "1e-1", "0.10", ".1", Decimal("0.1")])
def test_a_tenth_is_a_tenth(spelling: Any) -> None:
    assert filled("ties", density=spelling).general.density == Decimal("0.1")
    assert filled("ties", density=spelling).canonical["density"] == "0.1"
    assert recipe_id("dare", density=spelling) == recipe_id("dare")


@pytest.mark.parametrize("spelling", [0.9, "0.9", "9e-1", Decimal("0.90")])
def test_drop_is_one_minus_density_exactly(spelling: Any) -> None:
    assert recipe_id("dare", drop=spelling) == recipe_id("dare", density="0.1") == recipe_id("dare")


@examples(200)
@given(st.decimals(min_value=0, max_value="0.9999999999", places=10, allow_nan=False))
def test_any_drop_is_one_minus_density_exactly(drop: Decimal) -> None:
    assert filled("dare", drop=str(drop)).general.density == 1 - drop


@pytest.mark.parametrize("spelling", [True, 1, "true", "True", "yes", "on"])
def test_true_in_any_spelling_is_one_recipe(spelling: Any) -> None:
    assert recipe_id("linear", normalize=spelling) == recipe_id("linear")
    assert recipe_id("linear", normalize=spelling) != recipe_id("linear", normalize=False)


def test_every_parameter_enters_the_recipe() -> None:
    changed: list[tuple[str, dict[str, Any]]] = [
        ("ties", {"density": "0.3"}),
        ("ties", {"lambda_": "0.3"}),
        ("ties", {"scope": "tensor"}),
        ("ties", {"elect": "count"}),
        ("ties", {"combine": "sum"}),
        ("dare", {"density": "0.3"}),
        ("dare", {"rescale": False}),
        ("dare", {"combine": "mean"}),
        ("dare", {"seed": 3}),
        ("slerp", {"reduce": "fold"}),
        ("slerp", {"dot_threshold": "0.9"}),
        ("slerp", {"epsilon": "1e-9"}),
    ]
    ids = [recipe_id(strategy, **params) for strategy, params in changed]
    ids += [recipe_id(strategy) for strategy in DEEP]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("strategy", DEEP)
def test_a_complete_recipe_says_all_parameters_and_survives_its_canonical_form(strategy: str) -> None:
    recipe = merge(MODELS, strategy=strategy, base=BASE).receipt.recipe
    fields = registry.get(strategy).Params.model_fields
    assert set(recipe.params) == {field.alias or name for name, field in fields.items()}
    again = Recipe.from_canonical(recipe.canonical())
    assert again.id == recipe.id
    assert merge(MODELS, strategy=again, base=BASE).receipt.recipe.id == recipe.id


@pytest.mark.parametrize("seed", ["root", 0, "0", 2**64 - 1, str(2**64 - 1)])
def test_seeds_are_root_or_64_bits(seed: Any) -> None:
    assert merge(MODELS, strategy="linear", seed=seed).receipt.recipe.seed == ("root" if seed == "root" else int(seed))


@pytest.mark.parametrize("seed", [-1, 2**64, "1.5", 1.5, True, "roots", "", None])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(UsageError, match="must be 'root' or an integer from 0 to"):
        merge(MODELS, strategy="linear", seed=seed)


# ---------------------------------------------------------------- rules for some tensors


SHAPES = {"layers.0.w": (20,), "layers.1.w": (20,), "layers.1.norm": (20,), "head": (20,)}
WIDE, ORIGIN = family(3, "F32", shapes=SHAPES)
RULES = [
    ("task_arithmetic", "lambda_", "0.3", "1"),
    ("ties", "lambda_", "0.3", "1"),
    ("ties", "elect", "count", "sum"),
    ("ties", "combine", "sum", "mean"),
    ("dare", "density", "0.7", "0.1"),
    ("dare", "combine", "mean", "sum"),
    ("dare", "rescale", False, True),
    ("dare_ties", "density", "0.7", "0.1"),
    ("linear", "normalize", False, True),
    ("slerp", "space", "task_vectors", "weights"),
    ("slerp", "dot_threshold", "0.01", "0.9995"),
    ("magmax", "lambda_", "0.5", "1"),
]


@pytest.mark.parametrize(("strategy", "name", "special", "default"), RULES)
@pytest.mark.parametrize("said", [True, False])
def test_a_rule_changes_the_tensors_that_match_and_no_others(
    strategy: str, name: str, special: Any, default: Any, said: bool
) -> None:
    how: dict[str, Any] = {"strategy": strategy, "base": ORIGIN, "seed": 5, "weights": ["1", "0.7", "3"]}
    how |= {"density": 1} if strategy == "ties" else {}
    rules = [{"filter": "layers.1.*", "value": special}, *([{"value": default}] if said else [])]
    mixed = copied(merge(WIDE, **how, **one_of(name, rules)))
    everywhere, nowhere = copied(merge(WIDE, **how, **one_of(name, special))), copied(merge(WIDE, **how))
    for tensor, x in mixed.items():
        wanted = everywhere if tensor.startswith("layers.1.") else nowhere
        assert torch.equal(x, wanted[tensor]), tensor
    assert not equal(mixed, nowhere)
    assert not equal(mixed, everywhere)


def test_the_densities_of_ties_may_differ_between_tensors_where_the_scope_is_the_tensor() -> None:
    rules = [{"filter": "head", "value": "0.5"}, {"value": "0.1"}]
    zeros = {name: torch.zeros_like(x) for name, x in ORIGIN.items()}
    found = merge([WIDE[0]], strategy="ties", base=zeros, density=rules, scope="tensor")
    assert {name: int((found[name] != 0).sum()) for name in found} == {
        "head": 10,
        "layers.0.w": 2,
        "layers.1.norm": 2,
        "layers.1.w": 2,
    }
    with pytest.raises(ParameterError, match="scope=model takes one share of the whole model"):
        merge([WIDE[0]], strategy="ties", base=zeros, density=rules)


def test_the_first_rule_that_matches_counts() -> None:
    rules = [
        {"filter": "layers.1.w", "value": "0.1"},
        {"filter": "layers.*", "value": "0.2"},
        {"filter": "layers.1.*", "value": "0.3"},
        {"filter": "*", "value": "0.4"},
    ]
    at = filled("task_arithmetic", lambda_=rules).at
    found = {name: at(name).lambda_ for name in (*SHAPES, "other")}
    assert found == {
        "layers.1.w": Decimal("0.1"),
        "layers.0.w": Decimal("0.2"),
        "layers.1.norm": Decimal("0.2"),
        "head": Decimal("0.4"),
        "other": Decimal("0.4"),
    }


def test_globs_tell_upper_from_lower_case() -> None:
    at = filled("task_arithmetic", lambda_=[{"filter": "Head*", "value": "0.5"}]).at
    assert (at("Head.w").lambda_, at("head.w").lambda_) == (Decimal("0.5"), Decimal(1))


def test_rules_of_several_parameters_hold_each_for_itself() -> None:
    at = filled(
        "ties",
        lambda_=[{"filter": "a*", "value": "0.5"}],
        elect=[{"filter": "*b", "value": "count"}],
    ).at
    found = {name: (at(name).lambda_, at(name).elect) for name in ("ab", "ac", "cb", "cc")}
    half, one = Decimal("0.5"), Decimal(1)
    assert found == {"ab": (half, "count"), "ac": (half, "sum"), "cb": (one, "count"), "cc": (one, "sum")}


def test_drop_may_be_said_by_rules() -> None:
    one = filled("dare", drop=[{"filter": "a", "value": "0.4"}, {"value": 0.9}])
    assert (one.at("a").density, one.at("b").density) == (Decimal("0.6"), Decimal("0.1"))


def test_rules_have_one_spelling_and_an_order() -> None:
    def rules(first: Any, second: Any, rest: Any) -> list[dict[str, Any]]:
        return [{"filter": "a*", "value": first}, {"filter": "*b", "value": second}, {"value": rest}]

    one = recipe_id("ties", lambda_=rules(0.1, 1, 2))
    assert one == recipe_id("ties", lambda_=rules("0.10", "1.0", Decimal(2)))
    assert one == recipe_id("ties", lambda_=[*rules(0.1, 1, 2), {"filter": "c", "value": 7}]), "nothing comes after all"
    assert one != recipe_id("ties", lambda_=[*reversed(rules(0.1, 1, 2)[:2]), {"value": 2}])
    assert one != recipe_id("ties", lambda_=2)


def test_a_recipe_with_rules_survives_its_canonical_form() -> None:
    rules = [{"filter": "layers.1.*", "value": "0.3"}, {"value": "0.5"}]
    one = merge(WIDE, strategy="task_arithmetic", base=ORIGIN, lambda_=rules)
    again = merge(WIDE, strategy=Recipe.from_canonical(one.receipt.recipe.canonical()), base=ORIGIN)
    assert again.receipt.to_bytes() == one.receipt.to_bytes()
    assert equal(copied(again), copied(one))


# ---------------------------------------------------------------- t


@pytest.mark.parametrize("strategy", ["slerp", "linear", "weight_average"])
def test_t_is_a_pair_of_weights_in_the_order_given(strategy: str) -> None:
    a, b = MODELS
    one = merge([a, b], strategy=strategy, t="0.3")
    assert equal(copied(one), copied(merge([a, b], strategy=strategy, weights=["0.7", "0.3"])))
    assert one.receipt.merge_id == merge([b, a], strategy=strategy, t="0.7").receipt.merge_id


def test_t_is_for_two_models_from_0_to_1_and_without_weights() -> None:
    for wrong in ("-0.1", "1.1"):
        with pytest.raises(UsageError, match="must be from 0 to 1"):
            merge(MODELS, strategy="slerp", t=wrong)
    with pytest.raises(UsageError, match="t is for two models, not 3"):
        merge([*MODELS, model(9, "BF16")], strategy="slerp", t="0.5")
    with pytest.raises(UsageError, match="say the same thing twice"):
        merge(MODELS, strategy="slerp", t="0.5", weights=[1, 1])


def test_an_unknown_strategy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UnknownStrategyError, match=r"no strategy is called 'tie'. Did you mean ties\? There are: ada_merging,"
    ):
        merge(MODELS, strategy="tie", base=BASE)
