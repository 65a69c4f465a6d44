"""The table of rules: how operators of torch hand permutations on, one small function for each family.

    RULES["relu"](call) -> the result as a value: its dimensions in atoms of those of the arguments

A rule keeps the claim of ``values``: arguments reordered by permutations of their atoms give the result reordered by
the same. It unites what must be reordered alike, freezes what must stay, and raises NotUnderstoodError for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from crdtmerge.symmetry.values import Call, Value

Found: TypeAlias = "Value | list[Value] | None"
Rule: TypeAlias = "Callable[[Call], Found]"

Function = TypeVar("Function", bound="Callable[[Call], Found]")

RULES: dict[str, Rule] = {}
"""By the operator's name without its overload; in-place ones under the name of the others."""

POINTING: set[str] = set()
"""Operators that know what to do with indices into a dimension; all others freeze that dimension."""


def rule(names: str, *, pointing: bool = False) -> Callable[[Function], Function]:
    """Enter a function into the table under these names."""

    def enter(function: Function) -> Function:
        RULES.update(dict.fromkeys(names.split(), function))
        POINTING.update(names.split() if pointing else ())
        return function

    return enter
