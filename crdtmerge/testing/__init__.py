"""What the tests of this package and of others use: simulated replicas, payloads, small datasets, laws of strategies.

``check_strategy`` tries a merge strategy with every law; it is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crdtmerge.testing.strategies import LawError, check_strategy

__all__ = ["LawError", "check_strategy"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'crdtmerge.testing' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("crdtmerge.testing.strategies"), name)
