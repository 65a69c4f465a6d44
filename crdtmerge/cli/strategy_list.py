"""``crdtmerge strategies``: the registry, and what one strategy computes and takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit

if TYPE_CHECKING:
    from crdtmerge.strategies.protocol import Strategy


def strategies(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Tell all about one of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """List the strategies, or tell about one.

    Class E gives the same bytes on every machine, class P on the same build.
    """
    from crdtmerge.strategies import registry

    listed = [describe(registry.get(one)) for one in ([name] if name else registry.names())]
    if as_json:
        emit(listed)
    elif name:
        _print_one(listed[0], inspect.getdoc(type(registry.get(name))) or "")
    else:
        for row in listed:
            print(f"{row['name']:<16} {row['class']}  {row['family']:<11} base {row['needs']['base']:<9} {row['summary']}")


def describe(strategy: Strategy[Any]) -> dict[str, Any]:
    """A strategy as a JSON value."""
    needs = strategy.needs(strategy.Params())
    return {
        "name": strategy.name,
        "version": strategy.version,
        "family": strategy.family,
        "class": "E" if needs.exact else "P",
        "summary": (inspect.getdoc(type(strategy)) or "").splitlines()[0],
        "needs": {
            "base": needs.base,
            "stats": list(needs.stats),
            "inputs": list(needs.inputs),
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
    schema = strategy.Params.model_json_schema()["properties"]
    return {
        name: {
            "default": default,
            "type": _type(schema[name], strategy.Params.model_fields, name),
            "description": schema[name].get("description", ""),
        }
        for name, default in defaults.items()
    }


def _type(schema: dict[str, Any], fields: dict[str, Any], name: str) -> str:
    if "enum" in schema:
        return " | ".join(schema["enum"])
    bounds = [part for part in schema.get("anyOf", [schema]) if part.get("type") == "number"]
    if not bounds:
        return str(schema.get("type", "number"))
    words = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return " ".join(["number", *(f"{sign} {bounds[0][key]:g}" for key, sign in words.items() if key in bounds[0])])


def _print_one(row: dict[str, Any], text: str) -> None:
    print(f"{row['name']}, version {row['version']}, class {row['class']}, family {row['family']}\n")
    print(text)
    print(f"\nReference: {row['reference']}")
    print(f"Base: {row['needs']['base']}. Roles: {', '.join(row['needs']['roles'])}.")
    for name, parameter in row["parameters"].items():
        print(f"  {name} = {parameter['default']}  ({parameter['type']})  {parameter['description']}")
