"""The registry: strategies by name. Others add theirs through the entry-point group ``crdtmerge.strategies``.

An entry point's name is the strategy's name and its object a subclass of ``Strategy``; a built-in name cannot be taken.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from crdtmerge.errors import UnknownStrategyError
from crdtmerge.strategies.protocol import Strategy

GROUP = "crdtmerge.strategies"

FAMILIES = {
    "linear": ("weight_average", "linear", "task_arithmetic"),
    "consensus": ("ties", "dare", "dare_ties", "magmax"),
    "spherical": ("slerp",),
    "adaptive": ("ada_merging", "dam", "adarank", "representation_surgery"),
    "search": ("evolutionary_merge", "genetic_merge"),
    "composition": (
        "dare_linear",
        "della",
        "della_linear",
        "model_breadcrumbs",
        "breadcrumbs",
        "breadcrumbs_ties",
        "lines",
        "stages",
    ),
    "masking": ("sce", "emr", "consensus_ta", "ram", "ramplus_tl"),
    "elementwise": ("passthrough", "nearswap"),
    "unlearning": ("negative_merge", "split_unlearn_merge"),
    "spectral": ("star", "svd_truncate", "iso_c", "iso_cts", "tsv_m", "svd_knot_tying"),
    "projections": ("wudi", "dual_projection", "safe_merge"),
    "spherical_means": ("karcher", "nuslerp", "multislerp"),
    "geometry": ("model_stock", "weight_scope_alignment", "arcee_fusion"),
    "statistics": ("fisher_merge", "regression_mean", "led_merge"),
    "layerwise": ("regmean_plus_plus",),
    "aligned": ("aligned", "dimat", "rebasin"),
    "zipit": ("zipit",),
    "robust": (
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "geometric_median",
        "centered_clip",
        "mda",
        "meamed",
        "nna",
    ),
}
"""The module of each family, and the strategies in its ``STRATEGIES``."""

BUILT_IN = {name: family for family, members in FAMILIES.items() for name in members}


@cache
def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}


@cache
def _built_in(name: str) -> type[Strategy[Any]]:
    """A strategy of ours; only its family's module is imported."""
    module = import_module(f"crdtmerge.strategies.{BUILT_IN[name]}")
    found: type[Strategy[Any]] = next(strategy for strategy in module.STRATEGIES if strategy.name == name)
    return found


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
        return _built_in(name)()
    if name not in _installed():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownStrategyError(f"no strategy is called {name!r}.{hint} There are: {', '.join(names())}.")
    return _loaded(name)()
