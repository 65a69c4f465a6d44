"""The laws of joining, of deltas and of authoring: op sets against the naive oracle, step by step."""

from __future__ import annotations

from decimal import Decimal
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crdtmerge import limits
from crdtmerge.errors import MismatchError, NotAllowedError, OpError, PoolMismatchError
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import Manifest, Row, Says
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add, Op, Payload, Remove, Retract, SetRecipe, signed
from crdtmerge.replica.opset import Missing, OpSet
from crdtmerge.replica.tables import MemoryTables
from tests.replica.checks import check_oracle, check_proofs, facts
from tests.replica.histories import UNKNOWN, History
from tests.replica.naive import Naive
from tests.replica.pools import CONTENTS, KEYS, MANIFESTS, MISFIT, POOLS, copied, filled, payload, pool

randoms = st.randoms(use_true_random=False)
three = st.integers(0, 2)
INCARNATION = b"i" * 16


def joined(*sets: OpSet) -> OpSet:
    """The join of copies."""
    first = copied(sets[0])
    for other in sets[1:]:
        first.join(list(other.ops()), MANIFESTS)
    return first


class Replicas(RuleBasedStateMachine):
    """Three replicas of one pool; the model is the oracle of what each knows."""

    @initialize(genesis=st.sampled_from(POOLS))
    def begin(self, genesis) -> None:  # type: ignore[no-untyped-def]
        self.genesis = genesis
        self.replicas = [OpSet(genesis, MemoryTables()) for _ in range(3)]
        self.known: list[dict[bytes, Op]] = [{}, {}, {}]
        self.changed: set[int] = set()

    def learn(self, at: int, op: Op) -> None:
        self.known[at][op.id] = op
        self.changed.add(at)

    @rule(at=three, key=st.sampled_from(KEYS), random=randoms)
    def write(self, at: int, key, random: Random) -> None:  # type: ignore[no-untyped-def]
        said = payload(random, self.replicas[at], key)
        if said is None:
            return
        try:
            op = self.replicas[at].compose(key, bytes([at]) * 16, said)
        except NotAllowedError:
            return
        assert Naive(self.genesis, self.known[at].values()).lawful(op)
        assert self.replicas[at].accept(op, MANIFESTS.get(getattr(said, "content", b""))) is None
        self.learn(at, op)
        for other, known in zip(self.replicas, self.known, strict=True):
            if known.keys() >= set(op.parents):
                assert copied(other).join([op], MANIFESTS).refused == [], "who knows its past takes it"

    @rule(source=three, to=three, random=randoms)
    def deliver(self, source: int, to: int, random: Random) -> None:
        ops = random.sample(list(self.known[source].values()), random.randint(0, len(self.known[source])))
        done = self.replicas[to].join(ops + ops[:1], MANIFESTS)
        assert done.refused == []
        for op in done.new:
            self.learn(to, op)
        for op, missing in done.waiting:
            assert set(missing.parents) == set(op.parents) - self.known[to].keys()

    @rule(source=three, to=three)
    def sync(self, source: int, to: int) -> None:
        delta = self.replicas[source].delta((UNKNOWN, *self.replicas[to].heads()))
        expected = joined(self.replicas[to], self.replicas[source])
        done = self.replicas[to].join(delta, MANIFESTS)
        assert (done.waiting, done.refused) == ([], []), "a delta needs nothing that is not in it or known"
        assert facts(self.replicas[to]) == facts(expected), "joining the delta is joining everything"
        for op in done.new:
            self.learn(to, op)

    @precondition(lambda self: any(self.known))
    @rule(at=three, random=randoms)
    def ask(self, at: int, random: Random) -> None:
        oracle = Naive(self.genesis, self.known[at].values())
        heads = [*random.sample(sorted(oracle.ops), min(len(oracle.ops), random.randint(0, 3))), UNKNOWN]
        past = {one for head in heads[:-1] for one in (head, *oracle.past(oracle.ops[head]))}
        lacking = [oracle.ops[one] for one in oracle.ops.keys() - past]
        assert self.replicas[at].delta(heads) == sorted(lacking, key=lambda op: op.order)

    @rule()
    def laws(self) -> None:
        a, b, c = self.replicas
        before = list(map(facts, self.replicas))
        assert facts(joined(joined(a, b), c)) == facts(joined(a, joined(b, c))), "associative"
        assert facts(joined(a, b)) == facts(joined(b, a)), "commutative"
        assert facts(joined(a, a)) == before[0], "idempotent"
        assert list(map(facts, self.replicas)) == before, "a copy shares no change with what it was copied from"

    @invariant()
    def says_what_the_rules_say(self) -> None:
        for at in self.changed if hasattr(self, "changed") else ():
            check_oracle(self.replicas[at], Naive(self.genesis, self.known[at].values()))
            check_proofs(self.replicas[at])
        self.changed = set()


Replicas.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_three_replicas_keep_the_laws = Replicas.TestCase


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32), randoms)
def test_the_delta_to_any_heads_is_what_is_not_in_their_past(seed: int, random: Random) -> None:
    history = History(seed)
    history.run()
    one, oracle = history.replicas[0], Naive(history.genesis, history.good.values())
    for _ in range(5):
        known = random.sample(sorted(oracle.ops), min(len(oracle.ops), 3))
        past = {one for head in known for one in (head, *oracle.past(oracle.ops[head]))}
        delta = one.delta([*known, UNKNOWN])
        assert [op.id for op in delta] == [op.id for op in one.ops() if op.id not in past]
        other = filled(history.genesis, [oracle.ops[one] for one in past])
        assert other.join(delta, MANIFESTS).waiting == []
        assert facts(other) == facts(one)


# Authoring


def test_an_operation_follows_all_heads_and_its_authors_last() -> None:
    one = OpSet(pool(0), MemoryTables())
    first = [one.compose(key, INCARNATION, Add(CONTENTS[0].id)) for key in KEYS]
    assert one.join(first, MANIFESTS).refused == []
    then = one.compose(KEYS[0], INCARNATION, Retract(CONTENTS[0].id))
    assert (then.seq, then.prev, then.height) == (2, first[0].id, 2)
    assert set(then.parents) == {op.id for op in first}
    assert len(one) == len(first), "what is composed is not yet taken"


def test_more_heads_than_an_operation_can_name_are_named_in_turn() -> None:
    genesis, many = pool(0), limits.PARENTS_MAX + 3
    ops = [
        signed(KEYS[0], genesis.id, at.to_bytes(16, "big"), 1, None, (), 1, Add(CONTENTS[0].id)) for at in range(many)
    ]
    one = filled(genesis, ops)
    assert len(one.heads()) == many
    for left in (4, 1):
        op = Op.from_wire(one.compose(KEYS[1], INCARNATION, Retract(CONTENTS[1].id)).wire)
        assert one.accept(op) is None
        assert len(one.heads()) == left


UNREADABLE: dict[str, Payload] = {
    "a role that is none": Add(CONTENTS[0].id, Says(role="x")),
    "a note that is too long": Add(CONTENTS[0].id, Says(note="n" * (limits.NOTE_BYTES_MAX + 1))),
    "a content that is no id": Retract(b"short"),
    "a reason that is too long": Retract(CONTENTS[0].id, "n" * (limits.NOTE_BYTES_MAX + 1)),
    "targets in no order": Remove((b"b" * 32, b"a" * 32)),
    "an unknown target": Remove((UNKNOWN,)),
    "no target": Remove(()),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_no_replica_could_read_is_not_composed(what: str) -> None:
    one = OpSet(pool(0), MemoryTables())
    with pytest.raises(OpError):
        one.compose(KEYS[0], INCARNATION, UNREADABLE[what])


def test_an_operation_too_large_for_others_is_not_composed() -> None:
    one = OpSet(pool(0), MemoryTables())
    files = {f"f{n:0120}": bytes(32) for n in range(limits.NAMED_MAX)}
    big: Payload = Add(CONTENTS[0].id, Says(files=files, stats=files))
    op = one.compose(KEYS[0], INCARNATION, big)
    assert Op.from_wire(op.wire) == op
    recipe = one.genesis.recipe.canonical() | {"exclude": ["x" * limits.OP_BYTES_MAX]}
    with pytest.raises(OpError, match="at most 65536"):
        one.compose(KEYS[0], INCARNATION, SetRecipe(recipe))


# The door


def test_what_waits_changes_nothing_and_says_what_it_waits_for() -> None:
    one = OpSet(pool(0), MemoryTables())
    first = one.compose(KEYS[0], INCARNATION, Add(CONTENTS[0].id))
    assert one.accept(first) == Missing((), CONTENTS[0].id)
    assert (len(one), one.visible(), first.id in one) == (0, [], False)
    assert one.accept(first, CONTENTS[0]) is None
    then = one.compose(KEYS[0], INCARNATION, Add(CONTENTS[1].id))
    assert OpSet(pool(0), MemoryTables()).accept(then) == Missing((first.id,), CONTENTS[1].id)


def test_a_content_that_is_known_needs_no_second_manifest() -> None:
    one = filled(pool(0), [OpSet(pool(0), MemoryTables()).compose(KEYS[0], INCARNATION, Add(CONTENTS[0].id))])
    assert one.accept(one.compose(KEYS[1], INCARNATION, Add(CONTENTS[0].id))) is None


def test_an_operation_of_another_pool_is_refused() -> None:
    op = OpSet(pool(1), MemoryTables()).compose(KEYS[0], INCARNATION, Retract(CONTENTS[0].id))
    other = OpSet(pool(2), MemoryTables())
    with pytest.raises(PoolMismatchError):
        other.accept(op)
    assert [one for one, _ in other.join([op]).refused] == [op]


def test_a_content_of_another_architecture_or_kind_is_refused() -> None:
    one = OpSet(pool(1, fixed=True), MemoryTables())
    joined = one.join([one.compose(KEYS[0], INCARNATION, Add(MISFIT.id))], {MISFIT.id: MISFIT})
    assert len(joined.refused) == 1
    assert len(one) == 0


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
def test_a_content_whose_integers_differ_is_refused_though_its_floats_may(dtype: str) -> None:
    def content(floats: bytes, integers: bytes) -> Manifest:
        return Manifest((Row("at", dtype, (4,), integers * 32), Row("w", "F32", (2, 3), floats * 32)))

    def door(recipe: Recipe) -> OpSet:
        architecture = Architecture.of(content(b"a", b"a").rows)
        return OpSet(Genesis(recipe, architecture, curators=(KEYS[0].public,)), MemoryTables())

    other, misfit = content(b"b", b"a"), content(b"b", b"b")
    one = door(Recipe.of("linear", {}, version=1))
    assert one.accept(one.compose(KEYS[0], INCARNATION, Add(other.id)), other) is None
    with pytest.raises(MismatchError, match=rf"'at' \({dtype}\) differs"):
        one.accept(one.compose(KEYS[0], INCARNATION, Add(misfit.id)), misfit)
    assert [entry.id for entry in one.visible()] == [other.id]
    lenient = door(Recipe("linear", version=1, exclude=["at"]))
    assert lenient.accept(lenient.compose(KEYS[0], INCARNATION, Add(misfit.id)), misfit) is None


def test_two_adds_of_one_content_are_one_element_of_its_own_weight() -> None:
    one = OpSet(pool(0), MemoryTables())
    for key in KEYS[:3]:
        one.accept(one.compose(key, INCARNATION, Add(CONTENTS[0].id, Says(weight=Decimal(2)))), CONTENTS[0])
    (entry,) = one.visible()
    assert (entry.weight, len(entry.adders)) == (Decimal(2), 3)


def test_the_retraction_that_hides_a_content_hides_a_dot_of_it() -> None:
    one = OpSet(pool(1), MemoryTables())
    contributor, bystander = KEYS[1], KEYS[2]
    one.accept(one.compose(contributor, INCARNATION, Add(CONTENTS[0].id)), CONTENTS[0])
    own = one.compose(contributor, INCARNATION, Retract(CONTENTS[0].id))
    one.accept(own)
    one.accept(one.compose(bystander, INCARNATION, Retract(CONTENTS[0].id)))
    assert [(entry.why, entry.by) for entry in one.hidden()] == [("retracted", own.id)]


def test_a_retraction_that_hides_nothing_is_no_reason() -> None:
    one = OpSet(pool(1), MemoryTables())
    contributor, bystander = KEYS[1], KEYS[2]
    dot = one.compose(contributor, INCARNATION, Add(CONTENTS[0].id))
    one.accept(dot, CONTENTS[0])
    removal = one.compose(contributor, INCARNATION, Remove((dot.id,)))
    one.accept(removal)
    one.accept(one.compose(bystander, INCARNATION, Retract(CONTENTS[0].id)))
    assert [(entry.why, entry.by) for entry in one.hidden()] == [("removed", removal.id)]


@pytest.mark.parametrize("other", [{"seed": "5"}, {"seed": "٣"}, {"exclude": ["b", "a"]}])
def test_a_recipe_in_another_than_its_canonical_form_is_refused(other: dict[str, object]) -> None:
    one = OpSet(pool(0), MemoryTables())
    with pytest.raises(OpError):
        one.compose(KEYS[0], INCARNATION, SetRecipe(one.genesis.recipe.canonical() | other))
