"""The options that every command on a replica has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PoolFolder = Annotated[
    Path, typer.Option("-C", "--pool", metavar="DIR", help="The replica's folder; by default this one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why; everyone in the pool will see it.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="The bytes are the same for any number.")]
ContentId = Annotated[str, typer.Argument(metavar="ID", help="A contribution's id, or its first digits.")]

HERE = Path()
SHORT = 12
"""Digits of an id that people are shown; commands take any unambiguous number from four on."""


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
