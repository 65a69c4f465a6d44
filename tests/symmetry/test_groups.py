"""A symmetry's one text: what it says comes back, and everything else is refused with an error of ours."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crdtmerge.errors import InputError, MismatchError
from crdtmerge.symmetry import groups
from crdtmerge.symmetry.groups import Axis, Group, Symmetry, decode, inverse

SYMMETRY = Symmetry(
    (Group(3, (Axis("a", 0), Axis("b", 1, True))), Group(2, (Axis("c", 1), Axis("d", 1)))),
    {"a": ((3,), (1,)), "b": ((5,), (3,)), "c": ((4, 2), (7,)), "d": ((4, 2), (7,))},
    (("c", "d"),),
)
TEXT = SYMMETRY.encode()


def test_what_is_written_comes_back() -> None:
    assert decode(TEXT, "x") == SYMMETRY
    assert decode(TEXT, "x").digest == SYMMETRY.digest
    plain = Symmetry(SYMMETRY.groups, SYMMETRY.tensors)
    assert b"tied" not in plain.encode()
    assert decode(plain.encode(), "x") == plain


def changed(change: Callable[[Any], Any]) -> bytes:
    table = json.loads(TEXT)
    change(table)
    return (json.dumps(table, sort_keys=True, separators=(",", ":")) + "\n").encode()


BAD: dict[str, Callable[[Any], Any]] = {
    "another format": lambda t: t.update(format="crdtmerge/plan/1"),
    "a field more": lambda t: t.update(more=1),
    "a field less": lambda t: t.pop("groups"),
    "groups are no list": lambda t: t.update(groups=3),
    "a group is a list": lambda t: t.update(groups=[["axes", "size"]]),
    "a size of one": lambda t: t["groups"][0].update(size=1),
    "a size that is true": lambda t: t["groups"][0].update(size=True),
    "a size that is not that of the axis": lambda t: t["groups"][0].update(size=2),
    "no axes": lambda t: t["groups"][0].update(axes=[]),
    "an axis of two": lambda t: t["groups"][0]["axes"].append(["a", 1]),
    "an axis twice": lambda t: t["groups"][0]["axes"].append(["a", 0, 0]),
    "an axis in two groups": lambda t: t["groups"].append({"axes": [["a", 0, 0]], "size": 3}),
    "an axis of no tensor": lambda t: t["groups"][0]["axes"].append(["z", 0, 0]),
    "an axis beyond the tensor": lambda t: t["groups"][0]["axes"].append(["a", 2, 0]),
    "an axis before the tensor": lambda t: t["groups"][0]["axes"].append(["b", -1, 0]),
    "an axis at true": lambda t: t["groups"][1]["axes"][0].__setitem__(1, True),
    "an axis at 0.0": lambda t: t["groups"][0]["axes"][0].__setitem__(1, 0.0),
    "consuming twice": lambda t: t["groups"][0]["axes"][0].__setitem__(2, 2),
    "consuming as true": lambda t: t["groups"][0]["axes"][1].__setitem__(2, True),
    "a name that is a list": lambda t: t["groups"][0]["axes"][0].__setitem__(0, ["a"]),
    "tensors as a list": lambda t: t.update(tensors=[["a", [[3]]]]),
    "a size of zero": lambda t: t["tensors"].update(z=[[0]]),
    "no factors": lambda t: t["tensors"].update(z=[[]]),
    "factors as text": lambda t: t["tensors"].update(z=[""]),
    "dimensions as a map": lambda t: t["tensors"].update(z={}),
    "dimensions as null": lambda t: t["tensors"].update(z=None),
    "tied to itself": lambda t: t.update(tied=[["c", "c"]]),
    "tied alone": lambda t: t.update(tied=[["c"]]),
    "tied to nothing": lambda t: t.update(tied=[["c", "z"]]),
    "tied twice": lambda t: t.update(tied=[["c", "d"], ["c", "a"]]),
    "tied to none": lambda t: t.update(tied=[]),
    "tied to a number": lambda t: t.update(tied=[[1, 2]]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"x\.json"):
        decode(changed(BAD[name]), "x.json")


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null\n", TEXT[:-1], TEXT + b"\n", TEXT.replace(b",", b", ", 1)])
def test_another_text_is_refused(text: bytes) -> None:
    with pytest.raises(InputError):
        decode(text, "x")


def test_random_bytes_give_a_symmetry_or_an_error_of_ours() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        data = bytearray(TEXT)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            action = draw.random()
            if action < 0.5:
                data[at] = draw.choice(b'0123456789{}[]",:abtrue-.e ' + bytes([draw.randrange(256)]))
            elif action < 0.75:
                del data[at : at + draw.randint(1, 8)]
            else:
                data[at:at] = data[draw.randrange(len(data)) :][: draw.randint(1, 12)]
        try:
            found = decode(bytes(data), "x")
        except InputError:
            continue
        assert found.encode() == bytes(data)


def test_a_text_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "SYMMETRY_BYTES_MAX", 10)
    with pytest.raises(InputError, match="at most 10"):
        decode(TEXT, "x")


def test_a_model_fits_or_the_error_says_what_does_not() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 1), "b": (5, 3), "c": (8, 7), "d": (8, 7)}
    assert SYMMETRY.fitted(shapes, "m") is SYMMETRY
    one = SYMMETRY.fitted({name: shape for name, shape in shapes.items() if name != "c"}, "m")
    assert [axis.tensor for axis in one.groups[1].axes] == ["d"]
    with pytest.raises(MismatchError, match="'a', which m lacks"):
        SYMMETRY.check_fits({name: shape for name, shape in shapes.items() if name != "a"}, "m")
    with pytest.raises(MismatchError, match="lacks"):
        SYMMETRY.check_fits({"a": (3, 1), "b": (5, 3)}, "m")
    with pytest.raises(MismatchError, match=r"\[4, 2\]"):
        SYMMETRY.check_fits({**shapes, "c": (4, 2)}, "m")


def test_turning_and_turning_back_is_nothing() -> None:
    draw = np.random.default_rng(0)
    permutations = [draw.permutation(group.size) for group in SYMMETRY.groups]
    for name, dims in SYMMETRY.tensors.items():
        x = draw.standard_normal([int(np.prod(d)) for d in dims])
        turned = SYMMETRY.turned(name, x, permutations)
        assert turned.shape == x.shape
        assert (SYMMETRY.turned(name, turned, [inverse(p) for p in permutations]) == x).all()
        assert (SYMMETRY.turned(name, x, SYMMETRY.identities()) == x).all()
    assert (SYMMETRY.turned("other", np.arange(3), permutations) == np.arange(3)).all()
