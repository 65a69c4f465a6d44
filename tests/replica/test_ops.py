"""Operations as bytes: what is written reads back, and everything else is refused, by name and with OpError alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtmerge import limits
from crdtmerge.canonical import decimal, decimal_text, pack
from crdtmerge.errors import OpError
from crdtmerge.replica.op import Add, Op, op_id
from tests.replica.wires import INCARNATION, KEY, POOL, fields, ids, mutated, nested, ops, texts, wire, wire_of

A, B = b"a" * 32, b"b" * 32
ORDER = 2**252 + 27742317777372353535851937790883648493


@settings(max_examples=400, deadline=None)
@given(ops())
def test_an_operation_reads_back_from_its_bytes(op: Op) -> None:
    for again in (Op.from_wire(op.wire), Op.stored(op.wire)):
        assert all(getattr(again, each.name) == getattr(op, each.name) for each in dataclasses.fields(Op))
        assert (again.id, again.order, again.parents, again.kind) == (op.id, op.order, op.parents, op.kind)
    named = {op.prev, *op.deps, *op.payload.targets} - {None}
    assert op.parents == tuple(sorted(one for one in named if one))


def test_the_bytes_of_an_operation_never_change() -> None:
    op = Op.from_wire(wire())
    assert op.body == msgpack.packb(fields(), use_bin_type=True)
    assert op.id == op_id(op.body)
    assert len(op.wire) == 64 + len(op.body)
    assert op.id.hex() == "d15a0f80bf5ec93a452859200604c10dc08a2795308a8dc555b5a5fcf45c2841"


def test_the_signature_does_not_enter_the_id() -> None:
    one = Op.from_wire(wire())
    other = Op.stored(bytes(64) + one.body)
    assert one == other
    assert (one.id, hash(one)) == (other.id, hash(other))


def test_every_field_enters_the_id() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"pool": A},
        {"incarnation": b"j" * 16},
        {"seq": 2, "prev": A},
        {"seq": 2, "prev": B},
        {"seq": 3, "prev": B},
        {"deps": [A]},
        {"deps": [A, B]},
        {"height": 2},
        {"payload": {"content": A, "reason": None}},
        {"payload": {"content": bytes(32), "reason": ""}},
        {"kind": "add", "payload": {"content": bytes(32), "says": {}, "replaces": []}},
        {"kind": "remove", "payload": {"targets": [A], "reason": None}},
        {"kind": "unretract", "payload": {"targets": [A], "reason": None}},
    ]
    found = {Op.from_wire(wire(**change)).id for change in changes}
    assert len(found) == len(changes)


# Refusals

CANON = pack(fields())
ADD = {"content": A, "says": {}, "replaces": []}


def add(says: Any) -> bytes:
    """An ADD that says something."""
    return wire(kind="add", payload=ADD | {"says": says})


def raw(replaced: bytes, by: bytes) -> bytes:
    """The plain body with some bytes replaced, signed again."""
    assert CANON.count(replaced) >= 1
    return wire_of(CANON.replace(replaced, by, 1))


NO_REASON = b"\xa6reason\xc0"
LONG = limits.PARENTS_MAX + 1

REFUSED: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a signature alone": lambda: bytes(64),
    "trailing bytes": lambda: wire_of(CANON + b"\0"),
    "a byte too few": lambda: wire_of(CANON[:-1]),
    "no array": lambda: wire_of(pack({"a": 1})),
    "a number": lambda: wire_of(pack(1)),
    "nine fields": lambda: wire_of(pack(fields()[:-1])),
    "eleven fields": lambda: wire_of(pack([*fields(), None])),
    "a duplicate key": lambda: raw(b"\x82\xa7content", b"\x83" + NO_REASON + b"\xa7content"),
    "keys in another order": lambda: wire_of(
        msgpack.packb(fields(payload={"reason": None, "content": bytes(32)}), use_bin_type=True)
    ),
    "a number in more bytes than it takes": lambda: wire_of(b"\x9a\xcc\x01" + CANON[2:]),
    "an array in more bytes than it takes": lambda: wire_of(b"\xdc\x00\x0a" + CANON[1:]),
    "a text in more bytes than it takes": lambda: raw(b"\xa7retract", b"\xd9\x07retract"),
    "bytes as a text": lambda: raw(b"\xc4\x10" + INCARNATION, b"\xb0" + INCARNATION),
    "a text that is no UTF-8": lambda: raw(b"\xa7retract", b"\xa7retr\xff\xfet"),
    "a float": lambda: wire_of(msgpack.packb(fields(seq=1.0), use_bin_type=True)),
    "an extension": lambda: wire_of(msgpack.packb(fields(prev=msgpack.ExtType(1, b"x")), use_bin_type=True)),
    "a timestamp": lambda: wire_of(msgpack.packb(fields(prev=msgpack.Timestamp(1)), use_bin_type=True)),
    "a key that is no text": lambda: wire_of(msgpack.packb(fields(payload={b"content": A}), use_bin_type=True)),
    "nested arrays of 100 KB": lambda: wire_of(b"\x91" * 100_000),
    "nested arrays of 60 KB": lambda: wire_of(b"\x91" * 60_000 + b"\xc0"),
    "nested maps of 60 KB": lambda: wire_of(b"\x81\xa1a" * 20_000 + b"\xc0"),
    "nested arrays in a recipe": lambda: wire_of(
        msgpack.packb(fields(kind="recipe", payload={"recipe": {"params": nested(505)}}), use_bin_type=True)
    ),
    "a forged length of an array": lambda: wire_of(b"\xdd\xff\xff\xff\xff"),
    "a forged length of a map": lambda: wire_of(b"\xdf\xff\xff\xff\xff"),
    "a forged length of bytes": lambda: wire_of(b"\x9a\x01\xc6\xff\xff\xff\xff"),
    "a forged length of a text": lambda: wire_of(b"\x9a\x01\xdb\xff\xff\xff\xff"),
    "more than 64 KiB": lambda: add({"note": "n" * limits.OP_BYTES_MAX}),
    "version 2": lambda: wire(version=2),
    "version 0": lambda: wire(version=0),
    "version as a text": lambda: wire(version="1"),
    "a pool of 31 bytes": lambda: wire(pool=A[:31]),
    "a pool that is a text": lambda: wire(pool="a" * 32),
    "an author of 33 bytes": lambda: wire(author=KEY.public + b"x"),
    "no author": lambda: wire(author=None),
    "an incarnation of 15 bytes": lambda: wire(incarnation=INCARNATION[1:]),
    "seq 0": lambda: wire(seq=0),
    "seq below zero": lambda: wire(seq=-1, prev=A),
    "seq true": lambda: wire(seq=True),
    "seq of 2^63": lambda: wire(seq=1 << 63, prev=A),
    "the first with a predecessor": lambda: wire(seq=1, prev=A),
    "the second without": lambda: wire(seq=2),
    "a predecessor of 31 bytes": lambda: wire(seq=2, prev=A[:31]),
    "height 0": lambda: wire(height=0),
    "height true": lambda: wire(height=True),
    "height of 2^63": lambda: wire(height=1 << 63),
    "deps in another order": lambda: wire(deps=[B, A]),
    "deps twice": lambda: wire(deps=[A, A]),
    "deps of other lengths": lambda: wire(deps=[A[:31]]),
    "deps that are no list": lambda: wire(deps={"a": A}),
    "no deps": lambda: wire(deps=None),
    "too many deps": lambda: wire(deps=[at.to_bytes(32, "big") for at in range(LONG)]),
    "an unknown kind": lambda: wire(kind="merge"),
    "a kind that is no text": lambda: wire(kind=1),
    "a kind that is a list": lambda: wire(kind=["retract"]),
    "the payload of another kind": lambda: wire(kind="grant"),
    "a payload that is no table": lambda: wire(payload=[]),
    "no payload": lambda: wire(payload=None),
    "an unknown field": lambda: wire(payload={"content": A, "reason": None, "more": 1}),
    "a missing field": lambda: wire(payload={"content": A}),
    "a content of 31 bytes": lambda: wire(payload={"content": A[:31], "reason": None}),
    "a reason that is no text": lambda: wire(payload={"content": A, "reason": 5}),
    "a reason that is too long": lambda: wire(payload={"content": A, "reason": "é" * 513}),
    "a REMOVE of nothing": lambda: wire(kind="remove", payload={"targets": [], "reason": None}),
    "an UNRETRACT of nothing": lambda: wire(kind="unretract", payload={"targets": [], "reason": None}),
    "targets in another order": lambda: wire(kind="remove", payload={"targets": [B, A], "reason": None}),
    "targets twice": lambda: wire(kind="remove", payload={"targets": [A, A], "reason": None}),
    "replaced ones in another order": lambda: wire(kind="add", payload=ADD | {"replaces": [B, A]}),
    "heads twice": lambda: wire(kind="revoke", payload={"key": A, "heads": [A, A], "reason": None}),
    "an unknown role of a key": lambda: wire(kind="grant", payload={"key": A, "role": "founder"}),
    "a role of a key that is a list": lambda: wire(kind="grant", payload={"key": A, "role": ["member"]}),
    "a recipe that is a list": lambda: wire(kind="recipe", payload={"recipe": []}),
    "something unknown said": lambda: add({"licence": "x"}),
    "what is said as a list": lambda: add([]),
    "a weight that is a number": lambda: add({"weight": 1}),
    "a weight in another spelling": lambda: add({"weight": "1.0"}),
    "a weight with an exponent": lambda: add({"weight": "1e3"}),
    "a weight of minus zero": lambda: add({"weight": "-0"}),
    "a weight in other digits": lambda: add({"weight": "١"}),
    "a weight that is no number": lambda: add({"weight": "NaN"}),
    "an infinite weight": lambda: add({"weight": "Infinity"}),
    "a weight of 41 digits": lambda: add({"weight": "1" * 41}),
    "a weight of a million": lambda: add({"weight": "1" + "0" * 400}),
    "an unknown role": lambda: add({"role": "spam"}),
    "a role that is none": lambda: add({"role": None}),
    "a task that is none": lambda: add({"task": None}),
    "a task that is too long": lambda: add({"task": "t" * (limits.NAME_BYTES_MAX + 1)}),
    "a note that is too long": lambda: add({"note": "n" * (limits.NOTE_BYTES_MAX + 1)}),
    "no statistics, but said": lambda: add({"stats": {}}),
    "statistics of 31 bytes": lambda: add({"stats": {"fisher": A[:31]}}),
    "a file that leaves its folder": lambda: add({"files": {"../x": A}}),
    "a file whose name ends a line": lambda: add({"files": {"x\n": A}}),
    "a hidden file": lambda: add({"files": {".x": A}}),
    "too many files": lambda: add({"files": {f"f{at}": A for at in range(limits.NAMED_MAX + 1)}}),
    "a file name that is too long": lambda: add({"files": {"f" * (limits.NAME_BYTES_MAX + 1): A}}),
    "a signature of another body": lambda: wire(height=2)[:64] + CANON,
    "a signature of nothing": lambda: bytes(64) + CANON,
    "a signature of the bare id": lambda: KEY.sign(op_id(CANON)) + CANON,
    "another author's signature": lambda: wire(author=bytes([1]) * 32),
}


@pytest.mark.parametrize("what", REFUSED)
def test_no_operation_with(what: str) -> None:
    with pytest.raises(OpError):
        Op.from_wire(REFUSED[what]())


def test_the_plain_one_is_taken_so_that_the_others_are_refused_for_what_they_say() -> None:
    assert Op.from_wire(wire()).kind == "retract"
    assert Op.from_wire(add({"weight": "0.5", "files": {"x": A}})).kind == "add"
    assert isinstance(Op.from_wire(wire(kind="add", payload=ADD)).payload, Add)
    most = [at.to_bytes(32, "big") for at in range(LONG - 1)]
    assert len(Op.from_wire(wire(deps=most)).deps) == limits.PARENTS_MAX


@pytest.mark.parametrize(
    "author",
    [
        *("00" * 32, "01" + "00" * 31, "01" + "00" * 30 + "80", "ec" + "ff" * 30 + "7f", "ed" + "ff" * 31),
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    ],
)
def test_no_operation_of_a_key_of_small_order(author: str) -> None:
    body = pack(fields(author=bytes.fromhex(author)))
    for signature in (bytes(64), b"\1" + bytes(63), bytes.fromhex(author) + bytes(32)):
        with pytest.raises(OpError, match="signature"):
            Op.from_wire(signature + body)


def test_no_operation_with_the_group_order_added_to_its_signature() -> None:
    scalar = int.from_bytes(wire()[32:64], "little")
    more = (scalar + ORDER).to_bytes(32, "little")
    with pytest.raises(OpError, match="signature"):
        Op.from_wire(wire()[:32] + more + CANON)


def test_no_operation_with_a_version_that_is_true() -> None:
    with pytest.raises(OpError):
        Op.from_wire(wire(version=True))


@pytest.mark.parametrize("number", ["1e40", "-1e50", "1e300"])
def test_a_number_that_is_taken_once_is_taken_again_in_its_one_spelling(number: str) -> None:
    assert decimal(decimal_text(decimal(number))) == decimal(number)
    assert Op.from_wire(add({"weight": decimal_text(decimal(number))})).kind == "add"


def deeper(frames: int, read: Callable[[], bool]) -> bool:
    """Call from some frames further down."""
    return deeper(frames - 1, read) if frames else read()


def taken(data: bytes) -> bool:
    """Whether bytes are an operation."""
    try:
        Op.from_wire(data)
    except OpError:
        return False
    return True


@pytest.mark.parametrize("depth", [200, 300, 400])
def test_an_operation_is_taken_or_refused_wherever_it_is_read(depth: int) -> None:
    data = wire_of(
        msgpack.packb(fields(kind="recipe", payload={"recipe": {"params": nested(depth)}}), use_bin_type=True)
    )
    assert len({deeper(frames, lambda: taken(data)) for frames in range(0, 700, 50)}) == 1


@settings(max_examples=150, deadline=None)
@given(ops(), st.integers(0, 1 << 32))
def test_any_change_of_an_operation_is_refused_with_our_error_alone(op: Op, seed: int) -> None:
    random = Random(seed)
    for _ in range(30):
        other = mutated(op.wire, random)
        try:
            assert Op.from_wire(other).wire == op.wire == other
        except OpError:
            assert other != op.wire


@settings(max_examples=150, deadline=None)
@given(ops(), st.integers(0, 1 << 32))
def test_any_body_that_someone_signs_reads_back_or_is_refused(op: Op, seed: int) -> None:
    random = Random(seed)
    for _ in range(30):
        other = bytes(64) + mutated(op.body, random)
        try:
            read = Op.stored(other)
        except OpError:
            continue
        own = [read.pool, read.author, read.incarnation, read.seq, read.prev, list(read.deps), read.height, read.kind]
        assert pack([1, *own, read.payload.value]) == read.body


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_with_our_error_alone(data: bytes) -> None:
    for attempt in (data, bytes(64) + data, wire_of(data)):
        with pytest.raises(OpError):
            Op.from_wire(attempt)


@given(ids, texts)
def test_equal_operations_are_one_in_a_set(content: bytes, reason: str | None) -> None:
    data = wire(payload={"content": content, "reason": reason})
    assert len({Op.from_wire(data), Op.stored(data)}) == 1
    assert Op.from_wire(data) != data
    assert Op.from_wire(data).pool == POOL
