"""The kit for authors of strategies finds what it says it finds: each law, with a strategy that breaks it."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ConfigDict, Field

from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Number, Parameters
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.testing import LawError, check_strategy, demands
from crdtmerge.testing.demands import DEMANDS, Demand

ROOT = Path(__file__).parents[2]


class Fair(Strategy[Any]):
    """The mean, as an honest strategy: what the others spoil."""

    name, version, family, reference = "fair", 1, "elementwise", "none"

    def needs(self, p: Parameters) -> Needs:
        return Needs()

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        acc = torch.zeros_like(u.xs[0])
        for x in u.xs:
            acc = acc + x
        return acc / len(u.xs)


count = itertools.count()


def test_an_honest_strategy_passes() -> None:
    check_strategy(Fair, seeds=(0, 1))
    check_strategy(Fair(), {}, weights=[1, 2], k=4)


# ---------------------------------------------------------------- what each law finds


class Bare(Fair):
    version = 0


class Undescribed(Fair):
    class Params(Parameters):
        share: Number = Decimal(1)


class Taken(Fair):
    name = "ties"


class Narrowing(Fair):
    class Params(Parameters):
        share: Number = Field(Decimal("0.25"), description="is written with another value than it had")

        def canonical(self) -> dict[str, Any]:
            return {"share": str(self.share / 2)}


class Roleless(Fair):
    def needs(self, p: Parameters) -> Needs:
        return Needs(roles=("critic",))


class Counting(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return super().apply(u, plan, p, rng) + next(count)


class Writing(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return u.xs[0].mul_(0.5)


class Planning(Fair):
    def plan(self, view: View, p: Callable[[str], Any], rng: Rng) -> Plan:
        return Plan({"count": next(count)})


class Tupled(Fair):
    def plan(self, view: View, p: Callable[[str], Any], rng: Rng) -> Plan:
        return Plan({"pair": (1, 2)})

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return super().apply(u, plan, p, rng) + (plan["pair"] == (1, 2))


class Local(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        x = super().apply(u, plan, p, rng)
        return x - x.mean() if x.numel() else x


class Stretched(Fair):
    def plan(self, view: View, p: Callable[[str], Any], rng: Rng) -> Plan:
        return Plan({"units": len(list(view.scan(lambda u: u.start)))})


class Summing(Fair):
    def needs(self, p: Parameters) -> Needs:
        return Needs(unit="tensor")

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return super().apply(u, plan, p, rng) + torch.sum(u.xs[0])


class Unsorted(Fair):
    seen: tuple[bytes, ...] = ()

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        type(self).seen = (*type(self).seen, u.meta[0].id)
        return super().apply(u, plan, p, rng) + len(type(self).seen)


class Drawing(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return super().apply(u, plan, p, rng) + rng.seed[0]


class Overflowing(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return super().apply(u, plan, p, rng) + 1e6


class Narrow(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return super().apply(u, plan, p, rng).to(torch.float32)


class Three(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return u.xs[2]


class Rows(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        assert u.shape[0] >= 0
        return super().apply(u, plan, p, rng)


class Standardised(Fair):
    def needs(self, p: Parameters) -> Needs:
        return Needs(unit="tensor")

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        x = super().apply(u, plan, p, rng)
        return x / (u.xs[0] - u.xs[-1]).abs().max() if x.numel() > 1 else x


class EqualCounts(Fair):
    def plan(self, view: View, p: Callable[[str], Any], rng: Rng) -> Plan:
        return Plan({"k": len(view.meta(view.names[min(1, len(view.names) - 1)]))}) if view.names else EMPTY

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        return u.xs[0] if len(u.xs) == plan["k"] else u.xs[plan["k"]]


class Anchored(Fair):
    def needs(self, p: Parameters) -> Needs:
        return Needs(base="optional")

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        assert u.base is not None
        return u.base


class Weighting(Fair):
    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> torch.Tensor:
        total = torch.tensor(sum(u.weights()), dtype=u.xs[0].dtype)
        return u.xs[0] * u.weights()[0] / total


class Swallowing(Fair):
    class Params(Parameters):
        model_config = ConfigDict(extra="allow")


FAULTS: list[tuple[type[Strategy[Any]], Demand, str]] = [
    (Bare, demands.it_says_what_it_is, "its version is 0"),
    (Undescribed, demands.it_says_what_it_is, "without a description: share"),
    (Taken, demands.it_says_what_it_is, "the name ties is taken"),
    (Narrowing, demands.its_parameters_are_canonical, "when read again"),
    (Roleless, demands.its_needs_make_sense, "critic"),
    (Counting, demands.apply_is_pure, "when applied again"),
    (Writing, demands.apply_is_pure, "in an input after apply"),
    (Planning, demands.apply_is_pure, "another digest"),
    (Tupled, demands.a_plan_may_be_kept_in_a_file, "by the plan read again"),
    (Local, demands.units_may_end_anywhere, "in units of one element (BF16)"),
    (Local, demands.stretches_and_threads_change_nothing, "in stretches of 65536 elements by 2 threads"),
    (Stretched, demands.stretches_and_threads_change_nothing, "another plan in stretches of 131072"),
    (Summing, demands.threads_of_torch_change_nothing, "with two threads of torch"),
    (Unsorted, demands.the_order_of_arrival_changes_nothing, "when they arrive as"),
    (Drawing, demands.the_seed_matters_where_it_draws, "it is not said to be random"),
    (Overflowing, demands.every_dtype_comes_back, "F16"),
    (Narrow, demands.apply_is_pure, "returned torch.float32"),
    (Narrow, demands.dtypes_may_differ, "its units are torch.float64"),
    (Three, demands.any_number_of_models_will_do, "IndexError"),
    (Rows, demands.tensors_of_any_shape_will_do, "IndexError"),
    (Standardised, demands.degenerate_models_will_do, "-inf where all models equal the base"),
    (EqualCounts, demands.a_tensor_may_be_missing, "IndexError"),
    (Anchored, demands.an_optional_base_may_be_left_out, "assert"),
    (Weighting, demands.wrong_weights_are_refused, "nan where all weights are zero"),
    (Swallowing, demands.what_it_lacks_is_said, "an unknown parameter is taken"),
]


@pytest.mark.parametrize(
    ("fault", "law", "words"), FAULTS, ids=[f"{fault.__name__}-{law.__name__}" for fault, law, _ in FAULTS]
)
def test_a_planted_fault_is_found_and_named(fault: type[Strategy[Any]], law: Demand, words: str) -> None:
    with pytest.raises(LawError) as found:
        check_strategy(fault, laws=[law])
    sentence, told, again = str(found.value).split("\n", 2)
    assert sentence == f"{fault.name}: {(law.__doc__ or '').partition(chr(10))[0]}"
    assert words in told
    assert "seeds=[0]" in again


@pytest.mark.parametrize("fault", dict.fromkeys(fault for fault, _, _ in FAULTS), ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found_by_the_whole_call_too(fault: type[Strategy[Any]]) -> None:
    with pytest.raises(LawError):
        check_strategy(fault)


def test_every_law_is_broken_by_some_fault_but_those_that_the_framework_keeps() -> None:
    kept = {demands.what_is_no_number_is_refused}
    assert {law for _, law, _ in FAULTS} == set(DEMANDS) - kept


def test_a_strategy_that_is_said_to_draw_must() -> None:
    with pytest.raises(LawError, match="another seed gives the same bytes"):
        check_strategy(Fair, random=True)
    check_strategy("dare", random=True, laws=[demands.the_seed_matters_where_it_draws])


# ---------------------------------------------------------------- what it is told


class Trusting(Strategy[Parameters]):
    """theta = sum_i w_i G_i theta_i / sum_i w_i G_i, with a statistic and a further model that it only looks at."""

    name, version, family, reference = "trusting", 1, "elementwise", "none"

    def needs(self, p: Parameters) -> Needs:
        return Needs(base="required", stats=("trust",), models=("guide",), roles=("safety",))

    def apply(self, u: Unit, plan: Plan, p: Parameters, rng: Rng) -> torch.Tensor:
        assert u.base is not None
        for trust in u.stats["trust"]:
            assert bool((trust == 3).all())
        assert torch.equal(u.models["guide"], u.base)
        return u.xs[0]


def three(name: str, shape: tuple[int, ...], rng: Any) -> Any:
    return rng.standard_normal(shape) * 0 + 3


def test_statistics_and_further_models_are_made_as_the_author_says() -> None:
    laws = [law for law in DEMANDS if law is not demands.degenerate_models_will_do]  # there the base is another one
    check_strategy(Trusting, stats={"trust": three}, models={"guide": dict}, laws=laws)
    with pytest.raises(LawError):
        check_strategy(Trusting, laws=laws)


def test_the_call_that_a_message_gives_shows_the_fault_again() -> None:
    with pytest.raises(LawError) as first:
        check_strategy(Local, weights=["2", "1"], k=2, seeds=[7])
    again = str(first.value).partition("Again: ")[2]
    with pytest.raises(LawError) as second:
        eval(again.replace("'fair'", "Local"), {"check_strategy": check_strategy, "Local": Local, "demands": demands})
    assert str(first.value) == str(second.value)


class Running(Fair):
    def needs(self, p: Parameters) -> Needs:
        return Needs(plan="model", inputs=("program",))


def test_a_strategy_that_runs_a_program_is_not_tried_in_silence_without_it() -> None:
    with pytest.raises(LawError, match="runs a program"):
        check_strategy(Running)


def test_the_registry_and_torch_are_left_as_they_were() -> None:
    known, threads = registry.get, torch.get_num_threads()
    with pytest.raises(LawError):
        check_strategy(Local)
    assert registry.get is known
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------- where it is used


def example() -> Any:
    spec = importlib.util.spec_from_file_location("midrange_strategy", ROOT / "examples" / "midrange_strategy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Midrange


def test_the_example_keeps_every_law_and_is_as_short_as_it_says() -> None:
    found = example()
    check_strategy(found, seeds=(0, 1))
    text = (ROOT / "examples" / "midrange_strategy.py").read_text()
    body = [line for line in text[text.index("class ") :].splitlines() if line.strip() and '"""' not in line]
    assert len(body) <= 10


def test_the_example_computes_the_midrange() -> None:
    x = torch.tensor([1.0, -4.0, 2.0])
    y, z = torch.tensor([3.0, 0.0, 2.0]), torch.tensor([2.0, 10.0, 2.0])
    u = Unit("w", 0, 3, (3,), None, (x, y, z), ())
    assert example()().apply(u, EMPTY, Parameters(), Rng(b"")).tolist() == [2.0, 3.0, 2.0]


def test_the_block_in_the_examples_page_runs_without_a_test_runner_or_a_generator_of_examples() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "examples" / "README.md").read_text(), re.DOTALL)
    absent = "import sys\nsys.modules['pytest'] = sys.modules['hypothesis'] = None  # importing them fails\n"
    subprocess.run([sys.executable, "-c", absent + block], check=True, cwd=ROOT / "examples")


def test_the_kit_is_loaded_when_it_is_first_used() -> None:
    code = "import sys, crdtmerge.testing; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
