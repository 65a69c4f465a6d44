"""crdtmerge: the same set of models and the same recipe give the same merged bytes, on any machine.

    import crdtmerge as cm

    merged = cm.merge(["ft-a/", "ft-b/"], strategy="slerp", weights=[1, 2])
    merged.save("merged/")

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from crdtmerge import train
    from crdtmerge.errors import CrdtMergeError
    from crdtmerge.gossip.anywhere import sync
    from crdtmerge.gossip.node import Node
    from crdtmerge.keys import Key
    from crdtmerge.pool.replica import Replica
    from crdtmerge.pool.verifying import verify
    from crdtmerge.recipe import Recipe
    from crdtmerge.resolve.merge import Merged, merge
    from crdtmerge.resolve.receipt import Receipt
    from crdtmerge.resolve.verify import Verdict
    from crdtmerge.state import Delta, MergeState
    from crdtmerge.strategies.protocol import Strategy
    from crdtmerge.symmetry.programs import permutation_groups

_HOMES = {
    "CrdtMergeError": "crdtmerge.errors",
    "Delta": "crdtmerge.state",
    "Key": "crdtmerge.keys",
    "MergeState": "crdtmerge.state",
    "Merged": "crdtmerge.resolve.merge",
    "Node": "crdtmerge.gossip.node",
    "Receipt": "crdtmerge.resolve.receipt",
    "Recipe": "crdtmerge.recipe",
    "Replica": "crdtmerge.pool.replica",
    "Strategy": "crdtmerge.strategies.protocol",
    "Verdict": "crdtmerge.resolve.verify",
    "merge": "crdtmerge.resolve.merge",
    "permutation_groups": "crdtmerge.symmetry.programs",
    "sync": "crdtmerge.gossip.anywhere",
    "verify": "crdtmerge.pool.verifying",
}

__all__ = [
    "CrdtMergeError",
    "Delta",
    "Key",
    "MergeState",
    "Merged",
    "Node",
    "Receipt",
    "Recipe",
    "Replica",
    "Strategy",
    "Verdict",
    "__version__",
    "merge",
    "permutation_groups",
    "sync",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "train":
        return import_module("crdtmerge.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'crdtmerge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
