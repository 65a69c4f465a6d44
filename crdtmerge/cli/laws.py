"""``crdtmerge laws``: which laws each strategy has alone, and through the set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdtmerge.cli.console import emit, tell

if TYPE_CHECKING:
    from crdtmerge.testing.laws import Law, Measured


def laws(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Strategies.")] = None,
    all_of_them: Annotated[bool, typer.Option("--all", help="All strategies.")] = False,
    dim: Annotated[int, typer.Option("--dim", min=1, max=4096, metavar="N", help="Merge N x N matrices.")] = 4,
    trials: Annotated[int, typer.Option("--trials", min=1, max=1000, metavar="T", help="How many seeded trials.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure the laws of strategies on seeded float64 models.

    Alone, f(a, b) merges two models in the order given; laws hold within 1e-5, and the largest deviation is shown where
    one fails. Through the set of a replica they hold by the byte. Exit 1 if a law of the set fails.
    """
    from crdtmerge.testing.laws import measured

    chosen = _chosen(names or [], all_of_them)
    rows: list[Measured] = []
    if not as_json:
        tell(f"{'':<24}alone{'':<25}through the set")
        tell(f"{'strategy':<24}{'C':<9}{'A':<9}{'I':<12}{'C':<5}{'A':<5}{'I':<5}convergent")
    for row in measured(chosen, dim=dim, trials=trials):
        rows.append(row)
        if not as_json:
            _print(row)
    if as_json:
        emit({"dim": dim, "trials": trials, "strategies": [document(row) for row in rows]})
    if not all(law.holds for row in rows for law in row.through_the_set.values()):
        raise typer.Exit(1)


def _chosen(names: list[str], all_of_them: bool) -> list[str]:
    """The strategies that were asked for. Raises UsageError, UnknownStrategyError."""
    from crdtmerge.errors import UsageError
    from crdtmerge.strategies import registry

    if bool(names) == all_of_them:
        raise UsageError("name strategies, or say --all; not both.")
    for name in names:
        registry.get(name)
    return names or registry.names()


def document(row: Measured) -> dict[str, Any]:
    """What was measured as a JSON value; ``why`` says what was not, and is null where all was."""

    def values(laws: dict[str, Law]) -> dict[str, Any] | None:
        return {name: {"holds": law.holds, "deviation": law.deviation} for name, law in laws.items()} or None

    return {
        "name": row.strategy,
        "class": "E" if row.exact else "P",
        "params": dict(row.params),
        "alone": values(dict(row.alone)),
        "through_the_set": values(dict(row.through_the_set)),
        "why": row.why or None,
    }


def _print(row: Measured) -> None:
    cells = [f"{alone(law):<{width}}" for law, width in zip(row.alone.values(), (9, 9, 12), strict=False)] or [" " * 30]
    cells += [f"{'yes' if law.holds else 'NO':<5}" for law in row.through_the_set.values()]
    tell(f"{row.strategy:<24}{''.join(cells)}{row.why}".rstrip())


def alone(law: Law) -> str:
    """``yes``, or ``no`` and by how much at worst."""
    return "yes" if law.holds else f"no {law.deviation:.1g}"
