"""Operations as bytes: strategies for valid ones, and any fields signed as if they were valid."""

from __future__ import annotations

import hashlib
from decimal import Decimal
from random import Random
from typing import Any

from hypothesis import strategies as st

from crdtmerge.canonical import decimal, pack
from crdtmerge.replica.contribution import ROLES, Says
from crdtmerge.replica.op import Add, Grant, Op, Remove, Retract, Revoke, SetRecipe, Unretract, signed
from tests.replica.pools import KEYS, pool

KEY, POOL, INCARNATION = KEYS[0], pool(1).id, b"i" * 16
FIELDS = ("version", "pool", "author", "incarnation", "seq", "prev", "deps", "height", "kind", "payload")


def wire_of(body: bytes) -> bytes:
    """A body, whatever it is, with a signature that fits it."""
    identity = hashlib.sha256(b"crdtmerge/op/1\0" + body).digest()
    return KEY.sign(b"crdtmerge/sig/1\0" + identity) + body


def fields(**changed: Any) -> list[Any]:
    """The fields of a RETRACT, some of them others."""
    plain = {
        "version": 1,
        "pool": POOL,
        "author": KEY.public,
        "incarnation": INCARNATION,
        "seq": 1,
        "prev": None,
        "deps": [],
        "height": 1,
        "kind": "retract",
        "payload": {"content": bytes(32), "reason": None},
    }
    assert tuple(plain) == FIELDS
    return list((plain | changed).values())


def wire(**changed: Any) -> bytes:
    """The same, packed and signed."""
    return wire_of(pack(fields(**changed)))


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def mutated(data: bytes, random: Random) -> bytes:
    """A byte or some bytes flipped, cut, put in, doubled or exchanged."""
    for _ in range(random.randint(1, 3)):
        at, some = random.randrange(len(data) + 1), random.randbytes(random.randint(1, 6))
        data = random.choice(
            (
                data[:at] + some[:1] + data[at + 1 :],
                data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :] if at < len(data) else data,
                data[:at] + some + data[at:],
                data[:at] + data[at + len(some) :],
                data[:at] + data[max(0, at - 40) :],
                data[:at] if random.random() < 0.2 else data,
            )
        )
    return data


ids = st.binary(min_size=32, max_size=32)
id_lists = st.lists(ids, max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
texts = st.none() | st.text(st.characters(codec="utf-8"), max_size=30)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,9}", fullmatch=True)
digests = st.dictionaries(names, ids, max_size=3)
numbers = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=6)
weights = st.none() | numbers.map(decimal) | st.sampled_from([Decimal(0), Decimal("1e-300"), Decimal(10**39)])
said = st.builds(Says, weights, st.none() | st.sampled_from(ROLES), texts, digests, st.none() | digests, texts)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
payloads = st.one_of(
    st.builds(Add, ids, said, id_lists),
    st.builds(Remove, id_lists.filter(bool), texts),
    st.builds(Retract, ids, texts),
    st.builds(Unretract, id_lists.filter(bool), texts),
    st.builds(Grant, ids, st.sampled_from(["member", "curator"])),
    st.builds(Revoke, ids, id_lists, texts),
    st.builds(SetRecipe, st.dictionaries(st.text(max_size=5), plain, max_size=3)),
)
counts = st.integers(1, (1 << 63) - 1)
chains = st.one_of(st.just((1, None)), st.tuples(st.integers(2, (1 << 63) - 1), ids))


@st.composite
def ops(draw: st.DrawFn) -> Op:
    """Any operation that is valid by itself."""
    seq, prev = draw(chains)
    key, incarnation = draw(st.sampled_from(KEYS)), draw(st.binary(min_size=16, max_size=16))
    return signed(key, draw(ids), incarnation, seq, prev, draw(id_lists), draw(counts), draw(payloads))
