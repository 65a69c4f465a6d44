"""Strategies of others come in through an entry point; the built-in names stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crdtmerge.errors import UnknownStrategyError, UsageError
from crdtmerge.resolve.merge import merge
from crdtmerge.strategies import registry
from crdtmerge.strategies.consensus import Ties
from crdtmerge.strategies.protocol import Strategy
from tests.strategies.models import Prepared, equal, family

MIDRANGE = '''
"""The middle between the least and the largest of each element."""
from crdtmerge.strategies.parameters import WithLambda
from crdtmerge.strategies.protocol import Needs, Strategy
import torch

class Midrange(Strategy):
    name, version, family = "midrange", 3, "elementwise"
    reference = "a test"
    Params = WithLambda
    def needs(self, p):
        return Needs(compute="double")
    def apply(self, u, plan, p, rng):
        low = high = u.xs[0]
        for x in u.xs[1:]:
            low, high = torch.where(x < low, x, low), torch.where(x > high, x, high)
        return (low + high) * (0.5 * u.scalar(p.lambda_))

class Imposter(Midrange):
    name = "ties"

class Misnamed(Midrange):
    name = "another"

nothing = 7
'''


@pytest.fixture
def fresh() -> Iterator[None]:
    caches = registry._installed, registry._loaded
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Path:
    """An installed package of others, with a module and no entry points yet."""
    (tmp_path / "others_strategies.py").write_text(MIDRANGE)
    folder = tmp_path / "others-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def offer(package: Path, *points: str) -> None:
    lines = [f"[{registry.GROUP}]", *(f"{point}\n" for point in points)]
    (package / "entry_points.txt").write_text("\n".join(lines))


def test_the_built_in_strategies_say_what_they_are() -> None:
    for name, home in registry.BUILT_IN.items():
        made = registry.get(name)
        assert isinstance(made, Strategy)
        assert type(made).__module__ == f"crdtmerge.strategies.{home}"
        assert made.name == name
        assert made.version >= 1
        assert made.family
        assert made.reference
        assert made.__doc__


def test_a_strategy_of_others_merges_like_one_of_ours(package: Path) -> None:
    offer(package, "midrange = others_strategies:Midrange")
    assert "midrange" in registry.names()
    models = [{"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([9.0, -5.0])}]
    merged = merge(models, strategy="midrange")
    assert merged["w"].tolist() == [5.0, 0.0]
    assert merge(models, strategy="midrange", lambda_=2)["w"].tolist() == [10.0, 0.0]
    assert merged.receipt.recipe.version == 3
    assert merged.receipt.merge_id == merge(models[::-1], strategy="midrange").receipt.merge_id


def test_a_strategy_without_a_program_is_done_by_torch_where_kernels_are_asked_for(package: Path) -> None:
    offer(package, "midrange = others_strategies:Midrange")
    models, _ = family(3, "BF16")
    ready = Prepared("midrange", models, use_kernels=True)
    assert equal(ready.run(), ready.applied())
    assert equal(ready.run(), ready.applied([1, 7, 100]))


def test_a_built_in_name_cannot_be_taken(package: Path) -> None:
    offer(package, "ties = others_strategies:Imposter", "midrange = others_strategies:Midrange")
    assert type(registry.get("ties")) is Ties
    assert registry.names().count("ties") == 1
    assert "midrange" in registry.names()


@pytest.mark.parametrize("target", ["others_strategies:Misnamed", "others_strategies:nothing"])
def test_what_is_no_strategy_of_that_name_is_refused(package: Path, target: str) -> None:
    offer(package, f"midrange = {target}")
    with pytest.raises(
        UnknownStrategyError, match=r"the entry point 'midrange' of group crdtmerge\.strategies is not a"
    ):
        registry.get("midrange")


def test_built_in_strategies_do_not_wait_for_the_packages_of_others(package: Path) -> None:
    offer(package, "broken = others_missing:Nothing", "midrange = others_strategies:Misnamed")
    models, _ = family(2)
    merge(models, strategy="linear")
    assert registry.get("ties").name == "ties"


def test_a_broken_package_hides_no_other(package: Path) -> None:
    offer(package, "broken = others_missing:Nothing", "midrange = others_strategies:Midrange")
    assert registry.get("midrange").name == "midrange"
    assert {"broken", "midrange"} <= set(registry.names())
    with pytest.raises(UnknownStrategyError, match=r"strategy 'broken' cannot be loaded from others_missing:Nothing"):
        registry.get("broken")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("tie", "ties"),
        ("TIES", None),
        ("dare-ties", "dare_ties"),
        ("weighted_average", "weight_average"),
        ("task_aritmetic", "task_arithmetic"),
        ("slurp", "slerp"),
        ("qqq", None),
        ("", None),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(asked: str, near: str | None) -> None:
    with pytest.raises(UnknownStrategyError) as refused:
        registry.get(asked)
    said = str(refused.value)
    assert said.startswith(f"no strategy is called {asked!r}.")
    assert (f"Did you mean {near}?" in said) if near else ("Did you mean" not in said)
    assert said.endswith(f"There are: {', '.join(registry.names())}.")
    assert isinstance(refused.value, UsageError)
