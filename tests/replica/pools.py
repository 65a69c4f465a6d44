"""Pools of every kind, keys, contents and random payloads to fill them with; the same for each history and law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from random import Random
from typing import Any

from crdtmerge.canonical import digest
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import ROLES, Manifest, Row, Says
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add, Grant, Op, Payload, Remove, Retract, Revoke, SetRecipe, Unretract
from crdtmerge.replica.opset import OpSet
from crdtmerge.replica.tables import MemoryTables

KEYS = [Key.from_seed(bytes([n]) * 32) for n in range(1, 8)]
CONTENTS = [Manifest((Row("w", "F32", (2, 3), bytes([n]) * 32),)) for n in range(6)]
MISFIT = Manifest((Row("w", "F32", (3, 2), bytes(32)),))
MANIFESTS = {manifest.id: manifest for manifest in CONTENTS}
RECIPES = [Recipe.of("ties", {"density": density}, version=1).canonical() for density in ("0.1", "0.2", "0.3")]
WEIGHTS = [Decimal(weight) for weight in ("1", "2", "-0.5", "0", "0.125")]
STATS = [digest("statistics", n) for n in range(3)]


@cache
def pool(founders: int, *, members_only: bool = False, fixed: bool = False) -> Genesis:
    """A pool whose founders are the first keys; none means that every key is a curator."""
    return Genesis(
        Recipe.of("linear", {}, version=1),
        Architecture.of(CONTENTS[0].rows) if fixed else None,
        "members" if members_only else "open",
        tuple(key.public for key in KEYS[:founders]) or "any",
    )


POOLS = [
    pool(founders, members_only=members_only, fixed=fixed)
    for founders in (0, 1, 2, 3)
    for members_only in (False, True)
    for fixed in (False, True)
]


def filled(genesis: Genesis, ops: Sequence[Op]) -> OpSet:
    """A new op set that takes some operations."""
    found = OpSet(genesis, MemoryTables())
    found.join(ops, MANIFESTS)
    return found


def copied(one: OpSet) -> OpSet:
    """An independent copy of an op set over tables in memory."""
    assert isinstance(one.tables, MemoryTables)
    return OpSet(one.genesis, one.tables.copy())


def says(random: Random) -> Says:
    """Some of the fields, most of them unsaid."""

    def maybe(choices: Sequence[Any]) -> Any:
        return random.choice(choices) if random.random() < 0.3 else None

    return Says(
        maybe(WEIGHTS),
        maybe(ROLES),
        maybe(("math", "code", "")),
        {name: random.choice(STATS) for name in ("fisher", "gram") if random.random() < 0.2},
        maybe(({}, {"config.json": STATS[0]})),
        maybe(("a note", "")),
    )


def payload(random: Random, view: OpSet, key: Key, *, unrest: bool = False) -> Payload | None:
    """Something that a key might say after what it sees, allowed or not; None if there is nothing of the kind drawn."""
    (make,) = random.choices(list(KINDS), UNREST if unrest else list(KINDS.values()))
    return make(random, view, key)


def _content(random: Random) -> bytes:
    return random.choice(CONTENTS).id


def _some(random: Random, ops: Sequence[Op]) -> tuple[bytes, ...]:
    """All of them, one, or any number."""
    many = random.choice((len(ops), 1, random.randint(1, len(ops))))
    return tuple(sorted(op.id for op in random.sample(ops, many)))


def _add(random: Random, view: OpSet, key: Key) -> Payload:
    own = [op for op in view.live(_content(random)) if op.author == key.public]
    return Add(_content(random), says(random), _some(random, own) if own and random.random() < 0.4 else ())


def _remove(random: Random, view: OpSet, key: Key) -> Payload | None:
    dots = view.live(_content(random))
    if random.random() < 0.3:
        dots = [op for op in dots if op.author == key.public]
    if random.random() < 0.1:
        dots = [op for op in view.ops() if isinstance(op.payload, Add)]
    return Remove(_some(random, dots), random.choice((None, "stale"))) if dots else None


def _retract(random: Random, view: OpSet, key: Key) -> Payload:
    return Retract(_content(random), random.choice((None, "poison")))


def _unretract(random: Random, view: OpSet, key: Key) -> Payload | None:
    found = [op for content in CONTENTS for op in view.retractions(content.id)]
    return Unretract(_some(random, found)) if found else None


def _grant(random: Random, view: OpSet, key: Key) -> Payload:
    return Grant(random.choice(KEYS).public, random.choice(("member", "curator")))


def _revoke(random: Random, view: OpSet, key: Key) -> Payload:
    revoked = random.choice(KEYS).public
    ops = [op for op in view.ops() if op.author == revoked]
    inner = {op.prev for op in ops}
    tips = [op for op in ops if op.id not in inner]
    kept = random.choice((tips, tips, ops, []))
    return Revoke(revoked, _some(random, kept) if kept else ())


def _recipe(random: Random, view: OpSet, key: Key) -> Payload:
    return SetRecipe(random.choice(RECIPES))


KINDS: dict[Callable[[Random, OpSet, Key], Payload | None], int] = {
    _add: 40,
    _remove: 14,
    _retract: 10,
    _unretract: 8,
    _grant: 12,
    _revoke: 8,
    _recipe: 4,
}
UNREST = (25, 10, 12, 6, 20, 24, 5)
"""The same where members are fought over."""
