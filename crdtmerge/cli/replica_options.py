"""The options that every command on a replica has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from crdtmerge.recipe import Recipe

PoolFolder = Annotated[
    Path, typer.Option("-C", "--pool", metavar="DIR", help="The replica's folder; by default this one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why; everyone in the pool will see it.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="The bytes are the same for any number.")]
ContentId = Annotated[str, typer.Argument(metavar="ID", help="A contribution's id, or its first digits.")]

Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the strategy.")]
MergedDtype = Annotated[str | None, typer.Option(metavar="D", help="Of merged models.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Tensors that are copied and not merged.")]
Missing = Annotated[str | None, typer.Option(metavar="base|skip", help="For tensors that some models lack.")]
Statistics = Annotated[
    list[str] | None,
    typer.Option("--stats", metavar="NAME=FILE", help="A statistic of the model, such as fisher; kept and passed on."),
]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weight", metavar="W", help="Once for each model, in their order; 1 by default."),
]
Roles = Annotated[
    list[str] | None,
    typer.Option("--role", metavar="R", help="Once for each model: task, forget, unlearned or safety."),
]
Tasks = Annotated[list[str] | None, typer.Option("--task", metavar="T", help="Once for each model: its task's name.")]
StatisticsOfEach = Annotated[
    list[str] | None,
    typer.Option("--stats", metavar="NAME=FILE", help="A statistic of each model, in their order; or MODEL:NAME=FILE."),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=PATH", help="What else the strategy reads: a further model, a file."),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Apply this plan of `crdtmerge plan`, and make none.")
]
Align = Annotated[
    str | None,
    typer.Option(metavar="weights|activations", help="Bring the units of all models into one order first."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plain HTTP beyond this machine.")]

HERE = Path()
SHORT = 12
"""Digits of an id that people are shown; commands take any unambiguous number from four on."""


def asked_recipe(
    strategy: str,
    settings: list[str] | None,
    dtype: str | None,
    exclude: list[str] | None,
    missing: str | None,
    *,
    align: str | None = None,
    allow_nonfinite: bool = False,
) -> Recipe:
    """A pool's recipe, as it was asked for. Raises UsageError."""
    from crdtmerge.cli.merging import parsed
    from crdtmerge.errors import UsageError
    from crdtmerge.resolve.asking import recipe_of

    recipe, t = recipe_of(
        strategy,
        parsed(settings or []),
        dtype=dtype,
        exclude=exclude or (),
        missing=missing,
        allow_nonfinite=allow_nonfinite,
        align=align,
    )
    if t is not None:
        raise UsageError("t weighs two models by position; a pool's contributions have weights of their own.")
    return recipe


def named_paths(option: str, said: list[str] | None) -> dict[str, Path]:
    """``NAME=PATH``, each name once. Raises UsageError."""
    from crdtmerge.errors import UsageError

    found: dict[str, Path] = {}
    for one in said or []:
        name, equals, path = one.partition("=")
        if not (equals and name and path):
            raise UsageError(f"{option} {one}: write it as NAME=PATH.")
        if name in found:
            raise UsageError(f"{option} {name} is given twice, as {found[name]} and {path}.")
        found[name] = Path(path)
    return found


def short(identity: bytes) -> str:
    """The first digits of an id."""
    return identity.hex()[:SHORT]


def counted(count: int, what: str) -> str:
    """A number of things for people.

    >>> counted(1, "chain"), counted(2, "chain")
    ('1 chain', '2 chains')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def size(nbytes: int) -> str:
    """Bytes for people.

    >>> size(1_203_366_912)
    '1.2 GB'
    """
    amount = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{nbytes} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
