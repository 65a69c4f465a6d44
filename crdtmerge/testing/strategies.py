"""One call that tries a strategy: for those who write one, in this package or as a plug-in.

    from crdtmerge.testing import check_strategy

    def test_midrange() -> None:
        check_strategy(Midrange)

It needs nothing but this package: no test runner, no generator of examples, no entry point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from crdtmerge.numerics.lazy import torch
from crdtmerge.strategies import registry
from crdtmerge.strategies.protocol import Strategy
from crdtmerge.testing.case import WEIGHTS, Case, FurtherModel, installed
from crdtmerge.testing.demands import DEMANDS, Demand
from crdtmerge.testing.models import Maker


class LawError(AssertionError):
    """A strategy breaks a law: which one, where, both values, and how to see it again."""


def check_strategy(
    strategy: str | type[Strategy[Any]] | Strategy[Any],
    params: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[object] | None = None,
    stats: Mapping[str, Maker] | None = None,
    models: Mapping[str, FurtherModel] | None = None,
    roles: Sequence[str] = (),
    k: int = 3,
    random: bool = False,
    seeds: Sequence[int] = (0,),
    laws: Sequence[Demand] = DEMANDS,
) -> None:
    """Try a strategy with every law of ``crdtmerge.testing.demands``, on small seeded models.

    A strategy that runs a program is tried with parameters under which it runs none.

    Args:
        strategy: a name of the registry, or a class that no package offers yet, or an instance of it.
        params: its parameters; the defaults where they are left out.
        weights: of the models, over and over; 1, 0.1, 2.5, 0.75 by default.
        stats: how a statistic is made of (name, shape, generator of numbers); by default ``gram`` is a positive
            semidefinite matrix for each weight, every other statistic positive numbers of the tensor's shape.
        models: how a further model is made of the base; by default a fine-tune of it.
        roles: of the models, over and over; by default the first role that the strategy takes.
        k: how many models, where a law does not say.
        random: whether it draws, so that another seed must give other bytes.
        seeds: each gives models of its own.
        laws: which laws; all by default.

    Raises:
        LawError: a law is broken, or something else was raised on the way; its message says how to see it again.
    """
    one = (
        registry.get(strategy) if isinstance(strategy, str) else strategy() if isinstance(strategy, type) else strategy
    )
    said = tuple(str(weight) for weight in weights or WEIGHTS)
    case = Case(one, dict(params or {}), said, tuple(roles), stats or {}, models or {}, k=k, random=random)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with installed(one):
            for seed in seeds:
                for law in laws:
                    _try(law, replace(case, number=seed))
    finally:
        torch.set_num_threads(threads)


def _try(law: Demand, case: Case) -> None:
    try:
        law(case)
    except Exception as fault:
        what = str(fault) if isinstance(fault, AssertionError) else f"{type(fault).__name__}: {fault}"
        sentence = (law.__doc__ or law.__name__).partition("\n")[0]
        raise LawError(f"{case.strategy.name}: {sentence}\nFound: {what}\nAgain: {_again(law, case)}") from fault


def _again(law: Demand, case: Case) -> str:
    """The call that shows it again."""
    said = [repr(case.strategy.name), repr(dict(case.params))]
    said += [f"weights={list(case.weights)}"] if tuple(case.weights) != WEIGHTS else []
    said += [f"roles={list(case.roles)}"] if case.roles else []
    said += [f"k={case.k}", f"random={case.random}", f"seeds=[{case.number}]", f"laws=[demands.{law.__name__}]"]
    return f"check_strategy({', '.join(said)})"
