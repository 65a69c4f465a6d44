"""MergeState as a value: what changes it and what does not, what it says of itself, deltas, bytes, paths, refusals."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

import crdtmerge as cm
from crdtmerge.errors import (
    BundleError,
    ChangedError,
    CrdtMergeError,
    InputError,
    MismatchError,
    NeedsError,
    ParameterError,
    PoolMismatchError,
    UnknownStrategyError,
    UsageError,
)
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.state import Delta, MergeState
from tests.resolve.models import save, save_folder, save_shards, state
from tests.scenarios.worlds import output

EMPTY = MergeState("weight_average")


def model(number: float) -> dict[str, Any]:
    """A model that is told by a number."""
    return {"w": np.float32([[number, 1], [2, 3]]), "b": np.float32([number])}


def content(one: MergeState) -> bytes:
    """The id of the one content that is visible."""
    (entry,) = one.visible
    return entry.id


IDS = [content(EMPTY.add(model(number))) for number in range(4)]
UNKNOWN = bytes(32)


def seen(one: MergeState) -> tuple[object, ...]:
    """Everything that can be seen of a state."""
    return (
        *(one.pool_id, one.recipe, one.root, one.state_root, one.heads, repr(one.visible), one.hidden, len(one)),
        *(hash(one), one.to_bytes()),
        *(output(one.resolve()) if one.visible else ()),
    )


# A value


CHANGES: dict[str, Callable[[MergeState], MergeState]] = {
    "add": lambda one: one.add(model(2)),
    "add again": lambda one: one.add(model(0), weight=9),
    "remove": lambda one: one.remove(IDS[0]),
    "retract": lambda one: one.retract(IDS[1]),
    "unretract": lambda one: one.unretract(IDS[3]),
    "join": lambda one: one | EMPTY.add(model(2)),
    "join a delta": lambda one: one | EMPTY.add(model(2)).delta_since(()),
    "renew": lambda one: one.renewed(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_a_value_gives_a_new_one_and_leaves_the_old(what: str) -> None:
    old = EMPTY.add(model(0), weight=2).add(model(1)).retract(IDS[3])
    before = seen(old)
    new = CHANGES[what](old)
    assert new != old
    assert seen(new) != before
    assert seen(old) == before
    old.resolve(), old.to_bytes(), old.delta_since(())
    assert seen(old) == before


def test_a_state_that_is_joined_is_left_as_it_was() -> None:
    one, other = EMPTY.add(model(0)), EMPTY.add(model(1)).remove(IDS[1])
    before = seen(one), seen(other)
    for joined in (one | other, other | one, one.join(other.delta_since(()))):
        assert [entry.id for entry in joined.visible] == [IDS[0]]
    assert (seen(one), seen(other)) == before


def test_what_properties_return_is_the_callers_own() -> None:
    one = EMPTY.add(model(0)).add(model(1)).remove(IDS[1])
    before = seen(one)
    one.visible.clear()
    one.hidden.clear()
    one.resolve()["w"].zero_()
    assert seen(one) == before


def test_branches_of_one_value_are_no_forks_and_join_to_all_of_it() -> None:
    trunk = EMPTY.add(model(0))
    branches = [trunk.add(model(1)), trunk.add(model(2)), trunk.remove(IDS[0]), trunk.add(model(0), weight=5)]
    joined = set()
    for order in itertools.permutations(branches):
        found = order[0]
        for branch in order[1:]:
            found |= branch
        assert {entry.id for entry in found.visible} == {*IDS[:3]}
        joined.add(found)
    assert len(joined) == 1


# Equality


def test_equal_is_same_pool_and_same_operations() -> None:
    one = EMPTY.add(model(0))
    same = MergeState.from_bytes(one.to_bytes())
    assert same == one
    assert hash(same) == hash(one)
    assert len({one, same, one | same, same | one}) == 1
    assert MergeState("weight_average") == EMPTY
    assert hash(MergeState("weight_average")) == hash(EMPTY)
    assert one != EMPTY
    assert one != EMPTY.add(model(0)), "the same content said twice is two operations; only the roots are equal"
    assert one.root == EMPTY.add(model(0)).root
    assert one != "a state"
    assert (one == None) is False  # noqa: E711


def test_states_of_two_pools_are_never_equal_even_when_empty() -> None:
    states = [
        MergeState("weight_average"),
        MergeState("linear"),
        MergeState("weight_average", base=model(0)),
        MergeState("weight_average", base=model(1)),
        MergeState(Recipe("weight_average", seed=1)),
        EMPTY.renewed(),
    ]
    for one, other in itertools.combinations(states, 2):
        assert one != other
        assert one.pool_id != other.pool_id
        assert one.root == other.root, "the root speaks of the visible set alone"


def test_the_root_of_equal_visible_sets_is_equal_whatever_happened_before() -> None:
    plain = EMPTY.add(model(0)).add(model(1), weight=2)
    long = EMPTY.add(model(1), weight=9).add(model(2)).retract(IDS[3]).remove(IDS[2]).add(model(1), weight="2.0")
    long = long.add(model(0)).remove(IDS[0]).add(model(0))
    assert plain.root == long.root
    assert plain.state_root != long.state_root
    assert plain != long
    assert output(plain.resolve()) == output(long.resolve())


def test_the_same_content_added_once_by_everyone_has_one_state_root_in_every_order() -> None:
    states = [EMPTY.add(model(0), weight=weight) for weight in (1, 2, 3)]
    roots = set()
    for x, y, z in itertools.permutations(states):
        roots.add(((x | y | z).state_root, (x | (y | z)).root))
    assert len(roots) == 1


# What is said of a content


def test_an_entry_says_id_weight_role_kind_adders_files_and_note() -> None:
    key, other = Key.generate(), Key.generate()
    one = MergeState("weight_average", key=key).add(
        model(0), weight="2.50", role="forget", task="math", stats={"fisher": bytes(32)}, note="from the lab"
    )
    one |= MergeState("weight_average", key=other).add(model(0))
    (entry,) = one.visible
    assert entry.id == IDS[0]
    assert entry.weight == entry.claim.weight == Decimal("2.5")
    assert entry.role == entry.claim.role == "forget"
    assert entry.claim.task == "math"
    assert entry.claim.stats == {"fisher": bytes(32)}
    assert entry.kind == "full"
    assert entry.adders == tuple(sorted([key.public, other.public]))
    assert entry.files == {}
    assert entry.note == "from the lab"


def test_what_is_left_out_is_unsaid_and_changes_nothing() -> None:
    one = EMPTY.add(model(0), weight=3, role="safety", task="math", stats={"gram": bytes(32)}, note="a note")
    again = one.add(model(0))
    assert repr(again.visible) == repr(one.visible)
    assert again.root == one.root
    assert again != one


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [("weight", 3, 1), ("role", "forget", "task"), ("task", "math", "code"), ("note", "one", "two")],
)
def test_what_is_said_later_holds_even_where_it_is_the_default(name: str, first: object, then: object) -> None:
    one = EMPTY.add(model(0), **{name: first})
    (entry,) = one.add(model(0), **{name: then}).add(model(0)).visible
    found = getattr(entry, name) if name != "task" else entry.claim.task
    assert found == then


def test_an_empty_task_or_note_is_unsaid() -> None:
    one = EMPTY.add(model(0), task="math", note="a note")
    again = one.add(model(0), task="", note="")
    assert repr(again.visible) == repr(one.visible)
    assert again.root == one.root
    (entry,) = EMPTY.add(model(0), task="", note="").visible
    assert (entry.claim.task, entry.note) == (None, None)
    assert EMPTY.add(model(0), task="").root == EMPTY.add(model(0)).root


def test_without_a_weight_it_is_1_and_after_a_removal_nothing_that_was_said_is_left() -> None:
    one = EMPTY.add(model(0), weight=3, note="gone").remove(IDS[0]).add(model(0))
    (entry,) = one.visible
    assert (entry.weight, entry.note) == (1, None)


def test_of_two_weights_said_at_the_same_time_every_state_holds_the_same() -> None:
    a, b = EMPTY.add(model(0), weight=2), EMPTY.add(model(0), weight=3)
    assert repr((a | b).visible) == repr((b | a).visible)
    assert (a | b).root == (b | a).root
    (winner,) = (a | b).visible
    loser = b if winner.weight == 2 else a
    after = (a | b) | (loser.add(model(0), weight=4))
    assert after.visible[0].weight == 4, "what was said after what it saw stands higher"


def test_whoever_adds_is_named_until_what_it_added_is_removed() -> None:
    keys = [Key.generate() for _ in range(3)]
    states = [MergeState("weight_average", key=key).add(model(0)) for key in keys]
    joined = states[0] | states[1] | states[2]
    assert joined.visible[0].adders == tuple(sorted(key.public for key in keys))
    joined = joined | states[0].remove(IDS[0])
    assert joined.visible[0].adders == tuple(sorted(key.public for key in keys[1:]))


def test_a_given_key_signs_everything_that_is_said_with_it() -> None:
    key = Key.generate()
    one = MergeState("weight_average", key=key).add(model(0)).remove(IDS[0]).add(model(1)).retract(IDS[0])
    assert {op.author for op in one.delta_since(()).ops} == {key.public}
    read = MergeState.from_bytes(one.to_bytes(), key=Key.generate()).add(model(2))
    assert read.visible[0].adders != read.visible[1].adders
    assert len({op.author for op in (one | read).add(model(3)).delta_since(()).ops}) == 2
    assert len({op.author for op in (read | one).add(model(3)).delta_since(()).ops}) == 2


def test_every_state_without_a_key_has_one_of_its_own() -> None:
    adders = {MergeState("weight_average").add(model(0)).visible[0].adders for _ in range(5)}
    assert len(adders) == 5


@pytest.mark.parametrize("spelled", [2, 2.0, "2", "2.0", "2.000", "2e0", "+2", Decimal("2"), Decimal("2.00"), "0.2E1"])
def test_a_weight_is_one_number_however_it_is_written(spelled: object) -> None:
    one, plain = EMPTY.add(model(0), weight=spelled), EMPTY.add(model(0), weight=2)
    assert one.visible[0].weight == 2
    assert one.root == plain.root
    assert output(one.resolve()) == output(plain.resolve())


@pytest.mark.parametrize(
    ("spelled", "exact"), [(0.1, "0.1"), (1e-3, "0.001"), (1 / 3, "0.3333333333333333"), (1e20, "1e20")]
)
def test_a_float_is_the_decimal_that_its_writer_sees(spelled: float, exact: str) -> None:
    assert EMPTY.add(model(0), weight=spelled).root == EMPTY.add(model(0), weight=Decimal(exact)).root


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(2), torch.tensor(0.5)], ids=repr)
def test_a_number_of_numpy_or_torch_is_a_number(number: Any) -> None:
    assert EMPTY.add(model(0), weight=number).visible[0].weight == Decimal(str(number.item()))


@pytest.mark.parametrize("truth", [np.True_, torch.tensor(True)], ids=["numpy", "torch"])
def test_a_truth_of_numpy_or_torch_is_no_number_either(truth: object) -> None:
    with pytest.raises(UsageError, match="not a number"):
        EMPTY.add(model(0), weight=truth)


# Removing, retracting


def test_what_is_removed_is_gone_until_it_is_added_again() -> None:
    one = EMPTY.add(model(0)).add(model(1))
    gone = one.remove(IDS[0], "stale")
    assert [entry.id for entry in gone.visible] == [IDS[1]]
    assert output(gone.resolve()) == output(EMPTY.add(model(1)).resolve())
    assert [entry.id for entry in gone.add(model(0)).visible] == sorted(IDS[:2])
    assert [entry.id for entry in one.remove(IDS[0].hex()).visible] == [IDS[1]], "ids in hexadecimal too"
    assert [entry.id for entry in one.remove(IDS[0].hex().upper()).visible] == [IDS[1]]


def test_what_is_not_there_cannot_be_removed_and_the_message_lists_what_is() -> None:
    one = EMPTY.add(model(0))
    for wrong in (UNKNOWN, IDS[1]):
        with pytest.raises(
            UsageError, match=f"contribution {wrong.hex()} is not in this state; there are {IDS[0].hex()[:16]}"
        ):
            one.remove(wrong)
    with pytest.raises(UsageError, match="there are none"):
        one.remove(IDS[0]).remove(IDS[0])
    with pytest.raises(UsageError, match="is not retracted"):
        one.unretract(IDS[0])


def test_a_retraction_hides_what_is_added_at_the_same_time_and_later_until_it_is_ended() -> None:
    one = EMPTY.add(model(0)).add(model(1))
    hiding = one.retract(IDS[0], "poisoned")
    joined = hiding | one.add(model(0), weight=5) | EMPTY.add(model(0))
    assert [entry.id for entry in joined.visible] == [IDS[1]]
    assert [entry.id for entry in joined.add(model(0)).visible] == [IDS[1]]
    back = joined.unretract(IDS[0])
    assert [entry.id for entry in back.visible] == sorted(IDS[:2])
    assert next(entry for entry in back.visible if entry.id == IDS[0]).weight == 5
    assert output(back.resolve()) == output(EMPTY.add(model(0), weight=5).add(model(1)).resolve())


def test_an_unretraction_ends_only_the_retractions_that_it_saw() -> None:
    one = EMPTY.add(model(0))
    twice = one.retract(IDS[0]) | one.retract(IDS[0])
    assert len(twice.unretract(IDS[0])) == 1
    assert len(one.retract(IDS[0]).unretract(IDS[0]) | one.retract(IDS[0])) == 0


def test_a_content_can_be_retracted_before_it_is_seen() -> None:
    one = EMPTY.retract(IDS[0])
    assert (len(one), one.hidden) == (0, [])
    assert len(one.add(model(0))) == 0
    assert len(one | EMPTY.add(model(0))) == 0
    assert [hidden.id for hidden in (one | EMPTY.add(model(0))).hidden] == [IDS[0]]


def test_hidden_says_what_is_hidden_why_and_by_which_operation() -> None:
    one = EMPTY.add(model(0)).add(model(1)).add(model(2))
    removed = one.remove(IDS[0])
    both = removed.retract(IDS[1])
    last = {op.id: type(op.payload).__name__ for op in both.delta_since(one.heads).ops}
    found = {hidden.id: (hidden.why, last[hidden.by]) for hidden in both.hidden}
    assert found == {IDS[0]: ("removed", "Remove"), IDS[1]: ("retracted", "Retract")}
    assert [hidden.id for hidden in both.hidden] == sorted(IDS[:2])
    assert both.add(model(0)).unretract(IDS[1]).hidden == []


# Refusals


WRONG: dict[str, tuple[Callable[[MergeState], object], type[Exception], str]] = {
    "a weight in words": (lambda s: s.add(model(0), weight="heavy"), UsageError, "weight: 'heavy' is not a number"),
    "a weight that is NaN": (lambda s: s.add(model(0), weight=float("nan")), UsageError, "not a finite number"),
    "an infinite weight": (lambda s: s.add(model(0), weight="inf"), UsageError, "not a finite number"),
    "a weight that is a truth": (lambda s: s.add(model(0), weight=True), UsageError, "not a number"),
    "a weight of many digits": (lambda s: s.add(model(0), weight="1" * 50), UsageError, "more than 40 digits"),
    "a huge weight": (lambda s: s.add(model(0), weight="1e301"), UsageError, "beyond 1e300"),
    "a list as weight": (lambda s: s.add(model(0), weight=[1]), UsageError, "not a number"),
    "an unknown role": (lambda s: s.add(model(0), role="boss"), UsageError, "must be one of task, forget"),
    "a role that is no text": (lambda s: s.add(model(0), role=7), UsageError, "must be one of"),  # type: ignore[arg-type]
    "a long task": (lambda s: s.add(model(0), task="x" * 129), UsageError, "task: 129 bytes; at most 128 are taken"),
    "a task long in bytes": (lambda s: s.add(model(0), task="é" * 65), UsageError, "task: 130 bytes"),
    "a long note": (lambda s: s.add(model(0), note="x" * 1025), UsageError, "note: 1025 bytes; at most 1024 are taken"),
    "a long reason": (lambda s: s.add(model(0)).remove(IDS[0], "x" * 2000), UsageError, "2000"),
    "a statistic without digest": (lambda s: s.add(model(0), stats={"fisher": b"x"}), UsageError, "fisher"),
    "a statistic's name": (lambda s: s.add(model(0), stats={"../x": bytes(32)}), UsageError, "no plain name"),
    "a short id": (lambda s: s.remove(b"abc"), UsageError, "is no content id: 32 bytes, or 64 hexadecimal digits"),
    "an id that is no text": (lambda s: s.remove("contribution"), UsageError, "is no content id"),
    "an id in a half": (lambda s: s.retract(IDS[0].hex()[:32]), UsageError, "is no content id"),
    "a list": (lambda s: s.add([model(0)]), UsageError, "the model is list"),
    "nothing": (lambda s: s.add(None), UsageError, "the model is NoneType"),
    "a path to nothing": (lambda s: s.add("/nowhere/at/all"), InputError, "/nowhere/at/all"),
    "an unknown strategy": (lambda s: MergeState("tie"), UnknownStrategyError, "Did you mean ties"),
    "a parameter": (lambda s: MergeState(Recipe("ties", densty=1), base=model(0)), ParameterError, "densty"),
    "a value": (lambda s: MergeState(Recipe("ties", density=5), base=model(0)), ParameterError, "density = 5"),
    "a dtype": (lambda s: MergeState(Recipe("linear", dtype="I8")), UsageError, "dtype = 'I8'"),
    "no base": (lambda s: MergeState("ties"), NeedsError, "needs a base"),
    "a base that is a list": (lambda s: MergeState("ties", base=[1]), UsageError, "the base is list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_in_words_and_changes_nothing(what: str) -> None:
    act, error, words = WRONG[what]
    one = EMPTY.add(model(1))
    before = seen(one)
    with pytest.raises(error, match=re.escape(words)):
        act(one)
    assert seen(one) == before


OTHER_KINDS: dict[str, Callable[[Any], object]] = {
    "remove nothing": lambda s: s.remove(None),
    "remove an entry": lambda s: s.remove(s.visible[0]),
    "retract a number": lambda s: s.retract(7),
    "unretract a list": lambda s: s.unretract([IDS[0]]),
    "join a text": lambda s: s.join("a state"),
    "no recipe": lambda s: MergeState(None),  # type: ignore[arg-type]
    "a text as key": lambda s: MergeState("linear", key="secret"),  # type: ignore[arg-type]
    "read a text": lambda s: MergeState.from_bytes("text"),  # type: ignore[arg-type]
    "read a delta of text": lambda s: Delta.from_bytes("text"),  # type: ignore[arg-type]
    "a number as task": lambda s: s.add(model(0), task=5),
    "bytes as note": lambda s: s.add(model(0), note=b"x"),
    "half a surrogate as note": lambda s: s.add(model(0), note="\ud800"),
    "half a surrogate as reason": lambda s: s.retract(IDS[0], "\ud800"),
    "a list as stats": lambda s: s.add(model(0), stats=[1]),
    "a text as stats": lambda s: s.add(model(0), stats="x"),
    "a number as a statistic's name": lambda s: s.add(model(0), stats={5: bytes(32)}),
    "heads of nothing": lambda s: s.delta_since(None),
    "no threads": lambda s: s.resolve(threads=0),
    "a text as threads": lambda s: s.resolve(threads="x"),
    "a text as key of what is read": lambda s: MergeState.from_bytes(s.to_bytes(), key="x"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("act", [pytest.param(act, id=what) for what, act in OTHER_KINDS.items()])
def test_an_argument_of_another_kind_is_a_usage_error(act: Callable[[MergeState], object]) -> None:
    one = EMPTY.add(model(0))
    before = seen(one)
    with pytest.raises(UsageError):
        act(one)
    assert seen(one) == before


def test_what_a_merge_finds_wrong_is_refused_when_it_merges() -> None:
    first = IDS[0].hex()[:16]
    cases: list[tuple[MergeState, type[Exception], str]] = [
        (EMPTY, UsageError, "0 given"),
        (EMPTY.add(model(0)).remove(IDS[0]), UsageError, "0 given"),
        (EMPTY.add(model(0)).retract(IDS[0]), UsageError, "0 given"),
        (EMPTY.add({}), MismatchError, "no tensor to merge"),
        (EMPTY.add(model(0), weight=0), UsageError, "weights sum to 0"),
        (EMPTY.add(model(0), weight=-1), ParameterError, f"contribution {first} has weight -1; .* takes none below 0"),
        (EMPTY.add(model(0), role="forget"), UsageError, f"contribution {first} has role 'forget'"),
        (MergeState(Recipe("linear", missing="base")).add(model(0)), NeedsError, "--base"),
    ]
    for one, error, words in cases:
        with pytest.raises(error, match=words):
            one.resolve()


# Pools


def test_states_of_different_pools_refuse_to_join_naming_both() -> None:
    one, other = EMPTY.add(model(0)), MergeState("linear").add(model(1))
    for mine, theirs in ((one, other), (other, one)):
        for joined in (theirs, theirs.delta_since(()), Delta.from_bytes(theirs.delta_since(()).to_bytes())):
            with pytest.raises(PoolMismatchError) as refused:
                mine.join(joined)
            for said in (mine.pool_id.hex(), theirs.pool_id.hex(), mine.recipe.id.hex(), theirs.recipe.id.hex()):
                assert said in str(refused.value)


def test_models_of_another_architecture_are_refused_with_the_first_difference() -> None:
    one = EMPTY.add(model(0))
    wrong: dict[str, Mapping[str, Any]] = {
        r"tensor 'w' has shape \[4\]; the pool's has \[2, 2\]": {"w": np.zeros(4, "f4"), "b": np.zeros(1, "f4")},
        "tensor 'b' is F64; the pool's is F32": {"w": np.zeros((2, 2), "f4"), "b": np.zeros(1)},
        "lacks 'b'": {"w": np.zeros((2, 2), "f4")},
        "has 'c', which": {**model(0), "c": np.zeros(1, "f4")},
    }
    for words, other in wrong.items():
        with pytest.raises(MismatchError, match=words):
            one.add(other)
        with pytest.raises(MismatchError, match=words):
            one.remove(IDS[0]).add(other)
        with pytest.raises(MismatchError, match="architecture"):
            one.join(EMPTY.add(other))
        with pytest.raises(MismatchError):
            MergeState("slerp", base=model(0)).add(other)


def test_the_recipe_says_what_may_differ_between_models() -> None:
    half = {"w": np.zeros((2, 2), "f2"), "b": np.zeros(1, "f4")}
    assert len(MergeState(Recipe("linear", dtype="F32")).add(model(0)).add(half)) == 2
    part = {"w": np.zeros((2, 2), "f4")}
    assert len(MergeState(Recipe("linear", missing="skip")).add(model(0)).add(part)) == 2
    longer = {"w": np.zeros((2, 2), "f4"), "b": np.zeros(9, "f4")}
    assert len(MergeState(Recipe("linear", exclude=["b"])).add(model(0)).add(longer)) == 2


def test_a_base_is_the_same_as_a_path_a_folder_or_a_state_dict(tmp_path: Path) -> None:
    base = state("base")
    forms = [
        base,
        {name: x.numpy() for name, x in base.items()},
        save(tmp_path / "base.safetensors", base),
        str(tmp_path / "base.safetensors"),
        save_folder(tmp_path / "folder", base),
        save_shards(tmp_path / "shards", base, 3),
    ]
    pools = [MergeState("ties", base=form).add(state("a")) for form in forms]
    assert len({pool.pool_id for pool in pools}) == 1
    assert len({output(pool.resolve()) for pool in pools}) == 1
    joined = pools[0]
    for pool in pools[1:]:
        joined |= pool
    assert output(joined.resolve()) == output(pools[0].resolve())
    assert len(joined.visible[0].adders) == len(pools)


def test_files_of_the_base_are_part_of_the_pool(tmp_path: Path) -> None:
    folders = [save_folder(tmp_path / n, state("base"), {"config.json": json.dumps({"n": n})}) for n in "12"]
    one, other = (MergeState("ties", base=folder).add(state("a")) for folder in folders)
    assert one.root == other.root
    with pytest.raises(PoolMismatchError, match="their files differ"):
        one.join(other)


# Deltas


def test_a_delta_is_what_the_other_lacks_and_no_more() -> None:
    a = EMPTY.add(model(0)).add(model(1))
    b = (a | EMPTY.add(model(2), weight=7)).remove(IDS[1])
    delta = b.delta_since(a.heads)
    assert len(delta.ops) == 2
    assert {*delta.holdings.manifests} == {IDS[2]}
    assert len(delta.to_bytes()) < len(b.to_bytes())
    assert a | delta == b
    assert (a | Delta.from_bytes(delta.to_bytes())).to_bytes() == b.to_bytes()
    assert b | delta == b
    assert a | delta | delta == b
    nothing = b.delta_since(b.heads)
    assert (nothing.ops, dict(nothing.holdings.tensors)) == ((), {})
    assert a | nothing == a
    assert EMPTY | b.delta_since(()) == b
    assert EMPTY | b.delta_since(EMPTY.heads) == b


def test_heads_that_are_unknown_ask_for_everything() -> None:
    one, other = EMPTY.add(model(0)), EMPTY.add(model(1))
    assert one.delta_since(other.heads).ops == one.delta_since(()).ops
    assert other | one.delta_since(other.heads) == one | other


def test_a_delta_for_someone_who_knows_more_is_refused_with_what_to_do() -> None:
    first = EMPTY.add(model(0))
    second = first.add(model(1))
    third = second.add(model(2)).remove(IDS[0])
    late = third.delta_since(second.heads)
    for delta in (late, Delta.from_bytes(late.to_bytes())):
        for stranger in (EMPTY, first, EMPTY.add(model(3))):
            before = seen(stranger)
            with pytest.raises(UsageError, match=r"builds on 1 operations that this state lacks: .*delta_since"):
                stranger.join(delta)
            assert seen(stranger) == before
        assert second | delta == third
        assert (first | third.delta_since(first.heads)) == third


def test_deltas_in_any_order_make_the_state_where_each_builds_on_what_is_there() -> None:
    parts = [EMPTY.add(model(number), weight=number + 1) for number in range(3)]
    whole = parts[0] | parts[1] | parts[2]
    for order in itertools.permutations(parts):
        found = EMPTY
        for part in order:
            found |= Delta.from_bytes(part.delta_since(()).to_bytes())
        assert found == whole
        assert found.to_bytes() == whole.to_bytes()


def test_a_delta_carries_the_tensors_of_what_it_adds_alone(tmp_path: Path) -> None:
    a = EMPTY.add(model(0))
    b = a.add(save(tmp_path / "m.safetensors", {name: torch.from_numpy(x) for name, x in model(1).items()}))
    delta = Delta.from_bytes(b.delta_since(a.heads).to_bytes())
    (tmp_path / "m.safetensors").unlink()
    assert output((a | delta).resolve()) == output((a | EMPTY.add(model(1))).resolve())
    with pytest.raises(InputError):
        b.resolve()


def test_a_delta_in_which_a_byte_is_changed_is_refused_when_it_is_read_or_joined() -> None:
    whole = EMPTY.add(model(5), weight=3)
    data = whole.delta_since(()).to_bytes()
    for at in range(8, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 0x10
        try:
            joined = EMPTY | Delta.from_bytes(bytes(changed))
        except CrdtMergeError:
            continue
        assert seen(joined) == seen(whole), at


def test_a_delta_without_tensors_announces_what_it_adds_and_another_brings_them() -> None:
    whole = EMPTY.add(model(1)) | EMPTY.add(model(2))
    delta = whole.delta_since(())
    announced = EMPTY | Delta(delta.genesis, delta.ops, replace(delta.holdings, tensors={}))
    assert announced == whole
    assert announced.root == whole.root
    with pytest.raises(InputError, match="is announced, but 2 of its tensors are not here"):
        announced.resolve()
    for complete in (announced | whole, announced | delta, whole | announced):
        assert seen(complete) == seen(whole)


def test_a_state_in_which_tensors_are_only_announced_writes_no_bytes_that_none_could_read() -> None:
    whole = EMPTY.add(model(1))
    delta = whole.delta_since(())
    announced = EMPTY | Delta(delta.genesis, delta.ops, replace(delta.holdings, tensors={}))
    with pytest.raises(InputError, match=f"contribution {IDS[1].hex()} is announced, but 2 of its tensors are not"):
        announced.to_bytes()
    removed = announced.remove(IDS[1])
    assert MergeState.from_bytes(removed.to_bytes()) == removed
    assert MergeState.from_bytes((announced | whole).to_bytes()) == whole


def test_a_delta_without_manifests_is_refused_with_what_it_lacks() -> None:
    whole = EMPTY.add(model(1))
    delta = whole.delta_since(())
    bare = Delta(delta.genesis, delta.ops, replace(delta.holdings, manifests={}))
    with pytest.raises(BundleError, match="lacks the manifest of a content that it adds"):
        EMPTY.join(bare)
    assert whole | bare == whole, "whoever has the manifest needs none"
    gone = whole.remove(IDS[1])
    assert gone | bare == gone


# Bytes


def test_equal_states_have_equal_bytes_whatever_the_order_of_joins() -> None:
    parts = [
        EMPTY.add(model(0), weight=2),
        EMPTY.add(model(1)).remove(IDS[1]),
        EMPTY.add(model(2)).retract(IDS[2]),
        EMPTY.add(model(1), note="again"),
    ]
    found = set()
    for order in itertools.permutations(parts):
        joined = order[0]
        for part in order[1:]:
            joined |= part
        found.add(joined.to_bytes())
    assert len(found) == 1


def test_a_state_read_from_its_bytes_is_the_state() -> None:
    one = MergeState("ties", base=model(0)).add(model(1), weight="0.1", task="math").add(model(2)).add(model(3))
    one = one.remove(IDS[2]).retract(IDS[3], "poison")
    read = MergeState.from_bytes(one.to_bytes())
    assert seen(read) == seen(one)
    assert seen(read.unretract(IDS[3]))[2] == seen(one.unretract(IDS[3]))[2]
    for kind in (bytearray, memoryview):
        assert MergeState.from_bytes(kind(one.to_bytes())) == one


def test_an_empty_state_has_bytes_too() -> None:
    for one in (EMPTY, MergeState("ties", base=model(0)), EMPTY.add(model(0)).remove(IDS[0])):
        assert MergeState.from_bytes(one.to_bytes()) == one


def test_bytes_hold_each_tensor_once_and_none_of_what_is_removed() -> None:
    shared = {"w": np.zeros((256, 256), "f4")}
    states = [EMPTY.add({**shared, "b": np.float32([number])}) for number in range(3)]
    joined = states[0] | states[1] | states[2]
    size = shared["w"].nbytes
    assert size < len(joined.to_bytes()) < 1.1 * size
    for one in [entry.id for entry in joined.visible]:
        joined = joined.remove(one)
    assert len(joined.to_bytes()) < 0.1 * size
    retracted = states[0].retract(states[0].visible[0].id)
    assert len(retracted.to_bytes()) > size, "what is retracted may come back, so it is kept"


def test_the_library_reads_the_bytes_of_a_state(tmp_path: Path) -> None:
    from safetensors.torch import load

    one = EMPTY.add(model(0)).add(model(1))
    found = load(one.to_bytes())
    tensors = [x for name, x in found.items() if name.startswith("tensor.")]
    assert sorted(tuple(x.shape) for x in tensors) == [(1,), (1,), (2, 2), (2, 2)]


# Paths


def write(path: Path, number: float) -> Path:
    """A model as a file."""
    return save(path, {name: torch.from_numpy(x) for name, x in model(number).items()})


def test_a_path_is_digested_when_it_is_added_and_the_same_content_as_its_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", 0)
    forms = [EMPTY.add(path), EMPTY.add(str(path)), EMPTY.add(model(0))]
    forms.append(EMPTY.add({name: torch.from_numpy(x) for name, x in model(0).items()}))
    assert {content(one) for one in forms} == {IDS[0]}
    assert len({output(one.resolve()) for one in forms}) == 1
    assert MergeState.from_bytes(forms[0].to_bytes()) == forms[0]


def test_a_path_is_taken_as_it_was_meant_even_if_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.safetensors", 0)
    monkeypatch.chdir(tmp_path)
    one = EMPTY.add("m.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert one.resolve()["b"].tolist() == [0]


READS: dict[str, Callable[[MergeState], object]] = {"resolve": MergeState.resolve, "to_bytes": MergeState.to_bytes}


@pytest.mark.parametrize("read", READS)
def test_a_file_that_holds_other_values_since_it_was_added_is_refused(read: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", 0)
    one = EMPTY.add(path) | EMPTY.add(model(1))
    write(path, 2)
    with pytest.raises(ChangedError, match=re.escape(str(path))):
        READS[read](one)
    write(path, 0)
    assert READS[read](one)


_SHORTER: dict[str, dict[str, torch.Tensor]] = {
    "smaller": {"w": torch.zeros(1, 2), "b": torch.zeros(1)},
    "another dtype": {"w": torch.zeros(2, 2).half(), "b": torch.zeros(1)},
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("what", _SHORTER)
def test_a_file_whose_tensors_shrank_since_it_was_added_is_refused(what: str, read: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", 0)
    one = EMPTY.add(path)
    save(path, _SHORTER[what])
    with pytest.raises(ChangedError, match=re.escape(str(path))):
        READS[read](one)


@pytest.mark.parametrize("read", READS)
def test_a_file_that_lost_a_tensor_since_it_was_added_is_refused(read: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", 0)
    one = EMPTY.add(path)
    save(path, {"w": torch.tensor([[0.0, 1], [2, 3]])})
    with pytest.raises(ChangedError, match=f"{re.escape(str(path))}: tensor 'b' is gone"):
        READS[read](one)


@pytest.mark.parametrize("read", READS)
def test_a_file_that_is_gone_or_no_checkpoint_any_more_is_an_input_error(read: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", 0)
    one = EMPTY.add(path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match=re.escape(str(path))):
        READS[read](one)
    path.unlink()
    with pytest.raises(InputError, match=re.escape(str(path))):
        READS[read](one)
    assert READS[read](one.remove(IDS[0]).add(model(1)))


@pytest.mark.parametrize("read", READS)
def test_a_base_that_is_gone_is_an_input_error(read: str, tmp_path: Path) -> None:
    path = write(tmp_path / "base.safetensors", 0)
    one = MergeState("ties", base=path).add(model(1))
    path.unlink()
    with pytest.raises(InputError, match=re.escape(str(path))):
        READS[read](one)


def test_a_state_that_was_read_needs_no_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.safetensors", number) for number in range(3)]
    one = MergeState("ties", base=paths[0]).add(paths[1]).add(paths[2])
    read, before = MergeState.from_bytes(one.to_bytes()), output(one.resolve())
    for path in paths:
        path.unlink()
    assert output(read.resolve()) == before


# Files that travel with a model


def folder(path: Path, number: float, *, said: str) -> Path:
    """A model as a folder with files."""
    tensors = {name: torch.from_numpy(x) for name, x in model(number).items()}
    return save_folder(path, tensors, {"config.json": json.dumps({"said": said}), "vocab.txt": said, "code.py": said})


def test_files_of_a_folder_are_carried_into_what_is_saved(tmp_path: Path) -> None:
    one = EMPTY.add(folder(tmp_path / "m", 0, said="here"))
    (tmp_path / "m" / "config.json").write_text(json.dumps({"said": "later"}))
    (tmp_path / "m" / "vocab.txt").write_text("later")
    for at, each in enumerate((one, MergeState.from_bytes(one.to_bytes()), EMPTY | one, EMPTY | one.delta_since(()))):
        each.resolve().save(tmp_path / f"out-{at}")
        names = {path.name for path in (tmp_path / f"out-{at}").iterdir()}
        assert names == {"model.safetensors", "config.json", "vocab.txt", "receipt.json", "inputs.json"}
        assert (tmp_path / f"out-{at}" / "vocab.txt").read_text() == "here"
        assert json.loads((tmp_path / f"out-{at}" / "config.json").read_text())["said"] == "here"
    assert {*one.visible[0].files} == {"config.json", "vocab.txt"}


def test_files_are_those_that_were_said_last_and_a_state_dict_says_nothing_of_them(tmp_path: Path) -> None:
    one = EMPTY.add(folder(tmp_path / "1", 0, said="one")).add(folder(tmp_path / "2", 0, said="two")).add(model(0))
    one.resolve().save(tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "two"


def test_files_come_back_with_a_content_that_is_retracted_no_more(tmp_path: Path) -> None:
    one = EMPTY.add(folder(tmp_path / "m", 0, said="here"))
    again = one.retract(IDS[0]).unretract(IDS[0])
    assert again == one | again
    assert output(again.resolve()) == output((one | again).resolve())


def test_equal_states_have_equal_receipts_when_files_were_said_at_the_same_time(tmp_path: Path) -> None:
    one, other = (EMPTY.add(folder(tmp_path / said, 0, said=said)) for said in ("one", "other"))
    for a, b in ((one, other), (other, one)):
        gone = b.remove(IDS[0])
        late, early = (a | b) | gone, a | gone
        assert late == early
        assert output(late.resolve()) == output(early.resolve())
        assert late.to_bytes() == early.to_bytes()


def test_a_delta_carries_the_files_of_what_it_adds_even_if_that_is_retracted(tmp_path: Path) -> None:
    one = EMPTY.add(folder(tmp_path / "m", 0, said="here")).retract(IDS[0])
    back = (EMPTY | one.delta_since(())).unretract(IDS[0])
    assert back.resolve().receipt.files


# Another door to the same arithmetic


def test_a_state_merges_as_merge_does() -> None:
    models = [model(number) for number in range(3)]
    joined = EMPTY.add(models[0], weight=2) | EMPTY.add(models[1]) | EMPTY.add(models[2], weight="0.5")
    asked = cm.merge(models, strategy="weight_average", weights=[2, 1, "0.5"])
    assert output(joined.resolve()) == output(asked)
    for threads in (1, 2, 5):
        assert output(joined.resolve(threads=threads)) == output(asked)


def test_a_merged_model_is_a_mapping_of_torch_tensors_with_a_receipt_and_save(tmp_path: Path) -> None:
    merged = (EMPTY.add(model(1)) | EMPTY.add(model(3))).resolve()
    assert [*merged] == ["b", "w"]
    assert merged["b"].tolist() == [2]
    assert all(isinstance(x, torch.Tensor) for x in merged.values())
    merged.save(tmp_path / "out.safetensors")
    assert cm.verify(tmp_path / "out.safetensors").answer == "unknown", "inputs were in memory"
    paths = [write(tmp_path / f"{number}.safetensors", number) for number in (1, 3)]
    assert cm.verify(tmp_path / "out.safetensors", paths).answer == "same"


def test_what_a_state_prints_says_what_it_is() -> None:
    one = EMPTY.add(model(0)).add(model(1))
    assert repr(one) == f"MergeState(Recipe('weight_average'), 2 contributions, root {one.root.hex()[:16]})"


# Anything at all, against a model of it in plain Python

Known = frozenset[bytes]


class Values(RuleBasedStateMachine):
    """Several values of a pool; what each must show follows from the operations that it knows, told in plain Python."""

    states = Bundle("states")

    def __init__(self) -> None:
        super().__init__()
        self.heights: dict[bytes, int] = {}
        self.adds: dict[bytes, tuple[bytes, object, bytes]] = {}
        self.retracts: dict[bytes, bytes] = {}
        self.ended: dict[bytes, set[bytes]] = {}
        self.keys: dict[MergeState, bytes] = {}
        self.values: list[tuple[MergeState, Known, tuple[object, ...]]] = []

    @initialize(target=states)
    def begin(self) -> Any:
        made = []
        for number in range(3):
            key = Key.from_seed(bytes([number + 1]) * 32)
            made.append((MergeState("weight_average", key=key), frozenset[bytes](), key.public))
        return multiple(*made)

    def _new(self, old: tuple[MergeState, Known, bytes], new: MergeState) -> tuple[bytes, Any]:
        """The operation that a change wrote, and the new value with what it knows."""
        _, known, key = old
        (op,) = new.heads
        assert op not in self.heights
        self.heights[op] = 1 + max((self.heights[one] for one in known), default=0)
        return op, self._kept(new, known | {op}, key)

    def _kept(self, state: MergeState, known: Known, key: bytes) -> Any:
        self.values.append((state, known, (state.root, state.state_root, state.heads, repr(state.visible))))
        return state, known, key

    def _live(self, known: Known, content: bytes) -> set[bytes]:
        ended = set().union(*(self.ended.get(op, set()) for op in known))
        return {op for op in known if op in self.adds and self.adds[op][0] == content} - ended

    def _hiding(self, known: Known, content: bytes) -> set[bytes]:
        ended = set().union(*(self.ended.get(op, set()) for op in known))
        return {op for op in known if self.retracts.get(op) == content} - ended

    @rule(target=states, old=states, number=st.integers(0, 3), weight=st.sampled_from([None, None, 2, "0.5"]))
    def add(self, old: Any, number: int, weight: object) -> Any:
        op, new = self._new(old, old[0].add(model(number), weight=weight))
        self.adds[op] = IDS[number], weight, old[2]
        return new

    @rule(target=states, old=states, number=st.integers(0, 3))
    def remove(self, old: Any, number: int) -> Any:
        live = self._live(old[1], IDS[number])
        if not live:
            with pytest.raises(UsageError):
                old[0].remove(IDS[number])
            return old
        op, new = self._new(old, old[0].remove(IDS[number]))
        self.ended[op] = live
        return new

    @rule(target=states, old=states, number=st.integers(0, 3))
    def retract(self, old: Any, number: int) -> Any:
        op, new = self._new(old, old[0].retract(IDS[number]))
        self.retracts[op] = IDS[number]
        return new

    @rule(target=states, old=states, number=st.integers(0, 3))
    def unretract(self, old: Any, number: int) -> Any:
        hiding = self._hiding(old[1], IDS[number])
        if not hiding:
            with pytest.raises(UsageError):
                old[0].unretract(IDS[number])
            return old
        op, new = self._new(old, old[0].unretract(IDS[number]))
        self.ended[op] = hiding
        return new

    @rule(target=states, one=states, other=states, how=st.sampled_from(["join", "delta", "bytes"]))
    def join(self, one: Any, other: Any, how: str) -> Any:
        joined = one[0] | other[0]
        assert joined == other[0] | one[0]
        if how == "delta":
            assert joined == one[0] | other[0].delta_since(one[0].heads)
        elif how == "bytes":
            read = MergeState.from_bytes(joined.to_bytes())
            assert read == joined
            assert read.to_bytes() == joined.to_bytes() == (other[0] | one[0]).to_bytes()
        return self._kept(joined, one[1] | other[1], one[2])

    @invariant()
    def every_value_shows_what_it_knows(self) -> None:
        for value, known, shown in self.values[-2:]:
            expected = {}
            for wanted in IDS:
                live = self._live(known, wanted)
                if live and not self._hiding(known, wanted):
                    spoken = [(self.heights[op], op, self.adds[op][1]) for op in live if self.adds[op][1] is not None]
                    adders = tuple(sorted({self.adds[op][2] for op in live}))
                    expected[wanted] = Decimal(str(max(spoken)[2]) if spoken else 1), adders
            assert {entry.id: (entry.weight, entry.adders) for entry in value.visible} == expected
            assert [entry.id for entry in value.visible] == sorted(expected)
            added = {self.adds[op][0] for op in known if op in self.adds}
            why = {hidden.id: hidden.why for hidden in value.hidden}
            assert why.keys() == added - expected.keys()
            for hidden, reason in why.items():
                assert reason == (
                    "retracted" if self._live(known, hidden) or self._hiding(known, hidden) else "removed"
                )
            assert shown == (value.root, value.state_root, value.heads, repr(value.visible))

    def teardown(self) -> None:
        """Old values are as they were; values are equal by what they know, roots by what is visible."""
        by_known: dict[Known, MergeState] = {}
        by_root: dict[bytes, str] = {}
        for value, known, shown in self.values:
            assert shown == (value.root, value.state_root, value.heads, repr(value.visible))
            assert by_known.setdefault(known, value) == value
            said = repr([(entry.id, entry.claim) for entry in value.visible])
            assert by_root.setdefault(value.root, said) == said
        for one, other in itertools.combinations(itertools.islice(by_known.values(), 40), 2):
            assert one != other
        assert len({*by_root.values()}) == len(by_root)


TestValues = Values.TestCase
TestValues.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
