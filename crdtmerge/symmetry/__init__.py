"""Permutation symmetries of networks: what may be reordered without changing what a network computes.

``groups`` is what a symmetry is, as values and as a file; ``derive`` finds it in a program by ``rules`` on ``atoms``;
``check`` tries it; ``programs`` does both for a module or an exported program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crdtmerge.symmetry.derive import Carrier, Derived, derived
    from crdtmerge.symmetry.groups import Axis, Group, Symmetry
    from crdtmerge.symmetry.programs import permutation_groups

_HOMES = {
    "Axis": "groups",
    "Carrier": "derive",
    "Derived": "derive",
    "Group": "groups",
    "Symmetry": "groups",
    "derived": "derive",
    "permutation_groups": "programs",
}

__all__ = ["Axis", "Carrier", "Derived", "Group", "Symmetry", "derived", "permutation_groups"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crdtmerge.symmetry' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"crdtmerge.symmetry.{_HOMES[name]}"), name)
