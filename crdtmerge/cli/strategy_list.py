"""``crdtmerge strategies``: the registry, and what one strategy computes and takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from crdtmerge.cli.console import emit, say, tell

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from crdtmerge.strategies.protocol import Strategy


def strategies(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Tell all about one of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the strategies, or tell about one.

    Class E gives the same bytes on every machine, class P on the same build.
    """
    from crdtmerge.strategies import registry

    listed = [describe(registry.get(name))] if name else list(_listed())
    if as_json:
        emit(listed)
    elif name:
        _print_one(listed[0], inspect.getdoc(type(registry.get(name))) or "")
    else:
        for row in listed:
            tell(
                f"{row['name']:<22} {row['class']}  {row['family']:<11} base {row['needs']['base']:<9} {row['summary']}"
            )


def _listed() -> Iterator[dict[str, Any]]:
    """All that can be loaded; a note for a package that does not keep its word."""
    from crdtmerge.errors import UnknownStrategyError
    from crdtmerge.strategies import registry

    for name in registry.names():
        try:
            yield describe(registry.get(name))
        except UnknownStrategyError as fault:
            say(f"note: {fault}")


def describe(strategy: Strategy[Any]) -> dict[str, Any]:
    """A strategy as a JSON value."""
    needs = strategy.needs(strategy.Params())
    return {
        "name": strategy.name,
        "version": strategy.version,
        "family": strategy.family,
        "class": "E" if needs.exact and needs.plan != "model" else "P",
        "summary": (inspect.getdoc(type(strategy)) or "").splitlines()[0],
        "needs": {
            "base": needs.base,
            "stats": list(needs.stats),
            "inputs": [*needs.models, *needs.inputs],
            "roles": list(needs.roles),
            "models": [needs.min_k, needs.max_k],
            "plan": needs.plan,
        },
        "parameters": parameters(strategy),
        "reference": strategy.reference,
    }


def parameters(strategy: Strategy[Any]) -> dict[str, Any]:
    """Each parameter with its default, what it may be, and what it means."""
    defaults = strategy.Params().canonical()
    return {
        field.alias or name: {
            "default": defaults[field.alias or name],
            "type": _type(field),
            "description": field.description or "",
        }
        for name, field in strategy.Params.model_fields.items()
    }


def _type(field: FieldInfo) -> str:
    """``mean | sum`` for a choice, ``boolean``, ``number > 0 <= 1``, ``text``."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [(sign, getattr(one, key)) for one in field.metadata for key, sign in signs.items() if hasattr(one, key)]
    return " ".join([_kind(field.annotation), *(f"{sign} {bound}" for sign, bound in bounds)])


def _kind(annotation: Any) -> str:
    """What a value may be, without its bounds."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_kind, get_args(annotation))))
    if origin is not None or annotation is Any:
        return "table"
    names = {bool: "boolean", str: "text", type(None): "none", int: "whole number"}
    return names.get(annotation, "number")


def _print_one(row: dict[str, Any], text: str) -> None:
    tell(f"{row['name']}, version {row['version']}, class {row['class']}, family {row['family']}\n")
    tell(text)
    tell(f"\nReference: {row['reference']}")
    tell(f"Base: {row['needs']['base']}. Roles: {', '.join(row['needs']['roles'])}.")
    for what in ("stats", "inputs"):
        if row["needs"][what]:
            tell(f"{what.capitalize()}: {', '.join(row['needs'][what])}.")
    for name, parameter in row["parameters"].items():
        tell(f"  {name} = {parameter['default']}  ({parameter['type']})  {parameter['description']}")
