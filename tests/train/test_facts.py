"""What a peer says of its contribution is read strictly: any other note is no statement, and nothing is raised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtmerge import limits
from crdtmerge.train.facts import EXAMPLES_MAX, ROUNDS_MAX, Facts

FULL = Facts(ROUNDS_MAX - 1, EXAMPLES_MAX - 1, EXAMPLES_MAX - 1, bytes(32), bytes([255] * 32))


@pytest.mark.parametrize("facts", [Facts(), Facts(3, 270, 18), FULL])
def test_there_and_back(facts: Facts) -> None:
    assert Facts.decode(facts.encode()) == facts
    assert len(facts.encode()) < limits.NOTE_BYTES_MAX


@pytest.mark.parametrize(
    "note",
    [
        None,
        "",
        "{}",
        "[]",
        "{" * 1000,
        Facts().encode() + " ",
        Facts().encode().replace("1", "1.0"),
        Facts().encode().replace('"round":0', '"round":-1'),
        Facts().encode().replace('"round":0', f'"round":{ROUNDS_MAX}'),
        Facts().encode().replace('"round":0', '"round":' + "9" * 500),
        Facts().encode().replace('"round":0', '"round":true'),
        Facts().encode().replace('"round":0', '"round":0,"round":0'),
        Facts().encode().replace('"round":0', '"round":"0"'),
        Facts().encode().replace('"examples":1', '"examples":0'),
        Facts().encode().replace('"basis":null', '"basis":"00"'),
        Facts().encode().replace('"basis":null', '"basis":[]'),
        Facts(basis=bytes([171] * 32)).encode().replace("ab", "AB"),
        Facts().encode().replace("train/1", "train/2"),
        Facts().encode()[:-1] + ',"more":1}',
        "\ud800",
    ],
)
def test_other_notes_say_nothing(note: str | None) -> None:
    assert Facts.decode(note) is None


@given(st.text())
def test_any_text_is_taken_without_a_fault(note: str) -> None:
    assert Facts.decode(note) is None
