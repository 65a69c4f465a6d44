"""What a peer says of a contribution that it trained: round, examples, steps; read strictly, believed by nobody else.

    {"basis":null,"examples":270,"format":"crdtmerge/train/1","round":3,"start":"9f..","steps":18}

It travels as the note of the ADD. A note in any other spelling, or beyond the bounds, is no such statement: the
contribution then has no part in training, and nothing is raised, since anyone may write a note.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from crdtmerge import strict_json
from crdtmerge.errors import InputError

FORMAT = "crdtmerge/train/1"

ROUNDS_MAX = 1 << 32
"""Rounds of training: one a second for a century."""

EXAMPLES_MAX = 1 << 40
"""Examples or steps of one peer: a trillion."""


@dataclass(frozen=True)
class Facts:
    """Round (from 0), examples trained on, steps since the last merge; ``start`` and ``basis`` are digests or None.

    ``start`` names the merge that training started from (its output digest), ``basis`` the order of units that the
    peers share since they were aligned.

    >>> Facts.decode(Facts(3, 270, 18).encode())
    Facts(round=3, examples=270, steps=18, start=None, basis=None)
    >>> Facts.decode("trained with love") is None
    True
    """

    round: int = 0
    examples: int = 1
    steps: int = 0
    start: bytes | None = None
    basis: bytes | None = None

    def encode(self) -> str:
        """The one text of the facts."""
        table = {
            "format": FORMAT,
            "round": self.round,
            "examples": self.examples,
            "steps": self.steps,
            "start": self.start.hex() if self.start else None,
            "basis": self.basis.hex() if self.basis else None,
        }
        return json.dumps(table, sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, note: str | None) -> Facts | None:
        """The facts of a note; None where it is anything but the one text of some."""
        try:
            table = strict_json.parse((note or "").encode(), "a note", InputError, what="note", depth=1)
            found = cls(
                _number(table["round"], 0, ROUNDS_MAX),
                _number(table["examples"], 1, EXAMPLES_MAX),
                _number(table["steps"], 0, EXAMPLES_MAX),
                _digest(table["start"]),
                _digest(table["basis"]),
            )
        except (InputError, KeyError, ValueError, TypeError):
            return None
        return found if found.encode() == note else None


def _number(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value < high:
        raise ValueError("out of bounds")
    return value


def _digest(value: object) -> bytes | None:
    found = None if value is None else bytes.fromhex(str(value))
    if found is not None and len(found) != 32:
        raise ValueError("no digest")
    return found
