"""The registry: strategies by name. Others add theirs through the entry-point group ``crdtmerge.strategies``.

An entry point's name is the strategy's name and its object a subclass of ``Strategy``; a built-in name cannot be taken.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from crdtmerge.errors import UnknownStrategyError
from crdtmerge.strategies.consensus import Dare, DareTies, MagMax, Ties
from crdtmerge.strategies.linear import Linear, TaskArithmetic, WeightAverage
from crdtmerge.strategies.protocol import Strategy
from crdtmerge.strategies.spherical import Slerp

GROUP = "crdtmerge.strategies"

BUILT_IN: dict[str, type[Strategy[Any]]] = {
    strategy.name: strategy for strategy in (WeightAverage, Linear, Slerp, TaskArithmetic, Ties, Dare, DareTies, MagMax)
}


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}


@cache
def _loaded(name: str) -> type[Strategy[Any]]:
    """A strategy of another package. Raises UnknownStrategyError if the package does not keep its word."""
    try:
        strategy = _installed()[name].load()
    except Exception as fault:
        raise UnknownStrategyError(
            f"strategy '{name}' cannot be loaded from {_installed()[name].value} ({type(fault).__name__}: {fault}); "
            "mend or remove the package."
        ) from fault
    if not (isinstance(strategy, type) and issubclass(strategy, Strategy) and strategy.name == name):
        raise UnknownStrategyError(
            f"the entry point '{name}' of group {GROUP} is not a Strategy class of that name; mend or remove the "
            "package."
        )
    return strategy


def names() -> list[str]:
    """All names, sorted."""
    return sorted([*BUILT_IN, *_installed()])


def get(name: str) -> Strategy[Any]:
    """The strategy of a name. Raises UnknownStrategyError, with the nearest name.

    >>> get("ties").reference
    'Yadav et al., NeurIPS 2023, arXiv:2306.01708'
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name not in _installed():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownStrategyError(f"no strategy is called {name!r}.{hint} There are: {', '.join(names())}.")
    return _loaded(name)()
