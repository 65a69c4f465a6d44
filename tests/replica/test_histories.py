"""Histories of random pools end in agreement, with each other and with the naive oracle. Soak: 20,000 of them.

CRDTMERGE_SOAK_SEEDS=FIRST-LAST names the seeds of the soak.
"""

from __future__ import annotations

import os

import pytest

from tests.replica.histories import History, check

CHUNK, SAMPLE = 25, 300
SOAK_FIRST, SOAK_LAST = map(int, os.environ.get("CRDTMERGE_SOAK_SEEDS", "1000-20999").split("-"))
SOAK_CHUNK = 250


@pytest.mark.parametrize("first", range(0, SAMPLE, CHUNK))
def test_replicas_that_know_the_same_operations_agree(first: int) -> None:
    for seed in range(first, first + CHUNK):
        check(seed)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(SOAK_FIRST, SOAK_LAST + 1, SOAK_CHUNK))
def test_replicas_that_know_the_same_operations_agree_in_thousands_of_histories(first: int) -> None:
    for seed in range(first, min(first + SOAK_CHUNK, SOAK_LAST + 1)):
        check(seed)


WANTED = {
    *("add", "remove", "retract", "unretract", "grant", "revoke", "recipe"),
    *("void add", "void retract", "void grant", "void revoke", "replaces", "two adders", "retracted in part"),
    *("removed", "replaced", "retracted", "revoked", "fork", "refused", "orphan", "another recipe"),
}


def test_histories_hold_all_that_can_happen() -> None:
    held: set[str] = set()
    for seed in range(SAMPLE):
        held |= held_by(check(seed))
        if held >= WANTED:
            return
    assert held >= WANTED


def held_by(history: History) -> set[str]:
    """What happened in a history."""
    one = history.replicas[0]
    held = {op.kind for op in one.ops()} | {f"void {op.kind}" for op in one.ops() if one.is_void(op.id)}
    held |= {entry.why for entry in one.hidden()}
    happened = {
        "fork": bool(one.forks()),
        "refused": bool(history.bad),
        "orphan": bool(history.orphans),
        "replaces": any(op.kind == "add" and op.payload.targets for op in one.ops()),
        "two adders": any(len(entry.adders) > 1 for entry in one.visible()),
        "retracted in part": any(one.retractions(entry.id) for entry in one.visible()),
        "another recipe": one.recipe != one.genesis.recipe,
    }
    return held | {what for what, did in happened.items() if did}
