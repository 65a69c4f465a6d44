"""Pools, contents, and random things that a key might say of them after what it sees, allowed or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from decimal import Decimal
from functools import cache
from random import Random

from crdtmerge import limits
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Manifest, Row, Says
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add, Grant, Op, Payload, Remove, Retract, Revoke, SetRecipe, Unretract
from crdtmerge.replica.opset import OpSet

CONTENTS = 6
LARGE_ROWS = 40
"""Rows of a manifest that is too large to travel beside its ADD: their names are long."""

NOTES = (None, "a note", "another")


@cache
def keys(count: int) -> tuple[Key, ...]:
    """The same keys every time."""
    return tuple(Key.from_seed(number.to_bytes(32, "big")) for number in range(1, count + 1))


@cache
def pool(founders: int, *, members_only: bool = False) -> Genesis:
    """A pool whose founders are the first keys; none means that every key is a curator."""
    curators = tuple(key.public for key in keys(founders))
    return Genesis(_recipe("0"), None, "members" if members_only else "open", curators or "any")


@cache
def contents(*, large: bool = False) -> dict[bytes, Manifest]:
    """Manifests by content id, one of them large or none."""
    found = [Manifest(_rows(number, LARGE_ROWS if large and number == 0 else 1)) for number in range(CONTENTS)]
    return {manifest.id: manifest for manifest in found}


def _rows(number: int, count: int) -> tuple[Row, ...]:
    name = "w" if count == 1 else "w" * (limits.TENSOR_NAME_BYTES_MAX - 4)
    return tuple(Row(f"{name}{row:04d}", "F32", (2,), bytes([number]) * 32) for row in range(count))


@cache
def _recipe(density: str) -> Recipe:
    return Recipe.of("ties", {"density": density}, version=1)


def payload(random: Random, view: OpSet, key: Key, about: Collection[bytes]) -> Payload | None:
    """Something of the kind drawn, about one of some contents; None if there is nothing to say of it."""
    founders = view.genesis.curators != "any"
    kinds = (_add, _remove, _retract, _unretract, _set_recipe, _grant, _revoke)
    (make,) = random.choices(kinds, (60, 14, 8, 6, 3, 6 * founders, 5 * founders))
    return make(random, view, key, random.choice(list(about)))


def grants(newcomers: Sequence[Key]) -> Sequence[Grant]:
    """Membership for each."""
    return [Grant(key.public, "member") for key in newcomers]


def _some(random: Random, ops: Sequence[Op]) -> tuple[bytes, ...]:
    return tuple(sorted(op.id for op in random.sample(ops, random.randint(1, len(ops)))))


def _add(random: Random, view: OpSet, key: Key, content: bytes) -> Payload:
    own = [op for op in view.live(content) if op.author == key.public] if random.random() < 0.3 else []
    weight = random.choice((None, None, Decimal(2), Decimal("0.5")))
    return Add(content, Says(weight=weight, note=random.choice(NOTES)), _some(random, own) if own else ())


def _remove(random: Random, view: OpSet, key: Key, content: bytes) -> Payload | None:
    dots = view.live(content)
    if random.random() < 0.4:
        dots = [op for op in dots if op.author == key.public]
    return Remove(_some(random, dots)) if dots else None


def _retract(random: Random, view: OpSet, key: Key, content: bytes) -> Payload:
    return Retract(content)


def _unretract(random: Random, view: OpSet, key: Key, content: bytes) -> Payload | None:
    found = [op for content in view.retracted() for op in view.retractions(content)]
    return Unretract(_some(random, found)) if found else None


def _set_recipe(random: Random, view: OpSet, key: Key, content: bytes) -> Payload:
    return SetRecipe(_recipe(random.choice(("0.1", "0.2", "0.3"))).canonical())


def _grant(random: Random, view: OpSet, key: Key, content: bytes) -> Payload:
    return Grant(random.choice(keys(8)).public, random.choice(("member", "curator")))


def _revoke(random: Random, view: OpSet, key: Key, content: bytes) -> Payload:
    revoked = random.choice(keys(8)).public
    tips = [view.op(tip[1]) for _, _, tip in view.tables.every("tips", revoked)]
    return Revoke(revoked, _some(random, tips) if tips else ())
