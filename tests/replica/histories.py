"""Random histories of a pool: replicas that write, lose touch and join, one key that lies, and what must hold.

    python -m tests.replica.histories --seed N [--count M]      replays M histories from N on; a failure shows its log

A history goes on from its seed alone. Honest keys write with ``compose``, under an incarnation for each replica. One
key may be a liar's, which forks its chain, writes from old states and signs operations that no replica may take: the
naive oracle says which. In the end everything is delivered to everyone and all must agree, with each other and with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

from crdtmerge.errors import NotAllowedError, OpError
from crdtmerge.keys import Key
from crdtmerge.replica.op import Add, Op, Payload, Remove, SetRecipe, Unretract, signed
from crdtmerge.replica.opset import Missing, OpSet
from crdtmerge.replica.tables import MemoryTables
from tests.replica.checks import check_oracle, check_proofs, facts, told, verdict
from tests.replica.naive import Naive
from tests.replica.pools import CONTENTS, KEYS, MANIFESTS, MISFIT, POOLS, copied, filled, payload

STEPS, MANY_STEPS = (20, 80), (200, 400)
OTHER_POOL = b"\x77" * 32
UNKNOWN = b"\x99" * 32


class History:
    """One history; ``said`` is its log."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.unrest = random.random() < 0.25
        self.genesis = random.choice([genesis for genesis in POOLS if not self.unrest or genesis.curators != "any"])
        self.replicas = [OpSet(self.genesis, MemoryTables()) for _ in range(random.randint(3, 7))]
        self.inbox: list[list[Op]] = [[] for _ in self.replicas]
        self.sides = [0] * len(self.replicas)
        self.liar = random.choice((*KEYS, None))
        self.honest = [key for key in KEYS if key is not self.liar]
        self.old = [OpSet(self.genesis, MemoryTables())]
        self.good: dict[bytes, Op] = {}
        self.bad: dict[bytes, Op] = {}
        self.orphans: dict[bytes, Op] = {}
        self.dead: list[dict[bytes, frozenset[bytes]]] = [{} for _ in self.replicas]
        founders = "any" if self.genesis.curators == "any" else len(self.genesis.curators)
        self.said = [f"{len(self.replicas)} replicas, {self.genesis.membership}, founders: {founders}"]

    def run(self) -> None:
        """All of it, with every check."""
        steps: dict[Callable[[], None], int] = {
            self.write: 45,
            self.deliver: 25,
            self.lie: 14 if self.liar else 0,
            self.sync: 6,
            self.part: 3,
            self.remember: 4,
            self.look: 2,
        }
        names, weights = list(steps), list(steps.values())
        many = self.random.randint(*(MANY_STEPS if self.random.random() < 0.01 else STEPS))
        for step in self.random.choices(names, weights, k=many):
            step()
        self.heal()
        self.agree()

    # Writing

    def write(self) -> None:
        """An honest key says something at some replica; what it may not say does not happen."""
        at = self.random.randrange(len(self.replicas))
        replica, key = self.replicas[at], self.random.choice(self.honest[: self.random.randint(1, len(self.honest))])
        said = payload(self.random, replica, key, unrest=self.unrest)
        if said is None:
            return
        try:
            op = replica.compose(key, bytes([at]) * 16, said)
        except NotAllowedError:
            return
        read = Op.from_wire(op.wire)
        assert read == op, "an operation reads back"
        assert verdict(replica, read, MANIFESTS) is None, "a replica takes what it composed"
        self.good[op.id] = read
        self.said.append(f"replica {at}: {told(read)}")
        self.send(read)

    def send(self, op: Op) -> None:
        """Put an operation on its way to everyone, sometimes more than once."""
        for inbox in self.inbox:
            inbox.extend([op] * self.random.choice((1, 1, 1, 2)))

    # The liar

    def remember(self) -> None:
        """The liar keeps a copy of what a replica knows now."""
        self.old = [*self.old[-3:], copied(self.random.choice(self.replicas))]

    def lie(self) -> None:
        """The liar signs something after an old or a present state, rightly or not."""
        view = self.random.choice((*self.old, *self.replicas))
        assert self.liar, "there is one"
        said = payload(self.random, view, self.liar, unrest=self.unrest)
        if said is None:
            return
        op, orphan = self.forged(view, self.liar, said)
        if orphan:
            self.orphans[op.id] = op
        elif Naive(self.genesis, view.ops()).lawful(op):
            self.good[op.id] = op
        else:
            self.bad[op.id] = op
        self.said.append(f"liar: {told(op)}{' refused' if op.id in self.bad else ''}")
        self.send(op)

    def forged(self, view: OpSet, key: Key, said: Payload) -> tuple[Op, bool]:
        """An operation after part of a view, at any place of the key's chain; and whether its parents are nowhere."""
        random, ops = self.random, list(view.ops())
        incarnation = b"\xee" * 16
        own = [op for op in ops if (op.author, op.incarnation) == (key.public, incarnation)]
        prev = random.choice((*own, *own[-3:], None))
        deps = {op.id for op in random.sample(ops, min(len(ops), random.randint(0, 3)))} | set(view.heads()[:2])
        seq, wrong, target_pool = prev.seq + 1 if prev else 1, random.random(), self.genesis.id
        before = prev.id if prev else None
        height = 0
        if wrong < 0.1:
            height = random.choice((-1, 1))
        elif wrong < 0.15 and before:
            seq += random.choice((1, 7))
        elif wrong < 0.2 and ops:
            before, seq = random.choice(ops).id, max(seq, 2)
        elif wrong < 0.25:
            target_pool = OTHER_POOL
        elif wrong < 0.35 and ops:
            said = self.mistaken(ops)
        elif wrong < 0.4:
            deps.add(UNKNOWN)
        parents = {*deps, *said.targets, *([before] if before else [])}
        height += 1 + max((view.op(one).height for one in parents if one in view), default=0)
        op = signed(key, target_pool, incarnation, seq, before, tuple(sorted(deps)), max(1, height), said)
        broken = bytearray(op.wire)
        broken[random.randrange(64)] ^= 1 << random.randrange(8)
        refused = False
        try:
            Op.from_wire(bytes(broken))
        except OpError:
            refused = True
        assert refused, "a signature with a flipped bit fits nothing"
        return Op.from_wire(op.wire), UNKNOWN in deps

    def mistaken(self, ops: list[Op]) -> Payload:
        """A payload with targets or a recipe that none may have."""
        target = (self.random.choice(ops).id,)
        recipe = self.genesis.recipe.canonical()
        other_base = SetRecipe(recipe | {"base": "11" * 32})
        no_base = SetRecipe({name: value for name, value in recipe.items() if name != "base"})
        return self.random.choice(
            (Remove(target), Unretract(target), Add(CONTENTS[0].id, replaces=target), other_base, no_base)
        )

    # Delivery

    def deliver(self) -> None:
        """Some of what is on its way to a replica arrives, in any order; manifests may come later."""
        at = self.random.randrange(len(self.replicas))
        if self.sides[at] != self.sides[0]:
            return
        inbox = self.inbox[at]
        self.random.shuffle(inbox)
        many = self.random.randint(0, len(inbox))
        arrived, self.inbox[at] = inbox[:many], inbox[many:]
        self.take(at, arrived, MANIFESTS if self.random.random() < 0.9 else {})

    def take(self, at: int, ops: list[Op], manifests: dict[bytes, Any]) -> None:
        """A replica joins operations; what waits comes again."""
        replica = self.replicas[at]
        before, ids = facts(replica) if self.random.random() < 0.1 else None, len(replica)
        joined = replica.join(ops, manifests)
        assert len(replica) == ids + len(joined.new), "the set grows by what is new and never shrinks"
        assert all(op.id in self.good for op in joined.new), "what is taken is lawful"
        assert all(op.id in self.bad for op, _ in joined.refused), "what is refused is not"
        self.inbox[at] += [op for op, _ in joined.waiting]
        if before is not None and not joined.new:
            assert facts(replica) == before, "nothing new changes nothing"

    def sync(self) -> None:
        """A replica fetches what another knows more, by its heads."""
        one, other = self.random.sample(range(len(self.replicas)), 2)
        if self.sides[one] == self.sides[other]:
            heads = (*self.replicas[one].heads(), UNKNOWN)
            delta, oracle = self.replicas[other].delta(heads), Naive(self.genesis, self.replicas[other].ops())
            here = [oracle.ops[head] for head in heads if head in oracle.ops]
            known = {op.id for op in here}.union(*map(oracle.past, here))
            lacking = sorted((oracle.ops[op] for op in oracle.ops.keys() - known), key=lambda op: op.order)
            assert delta == lacking, "a delta is all that is not in the past of the heads, in order"
            self.take(one, delta, MANIFESTS)
            assert all(op.id in self.replicas[one] for op in self.replicas[other].ops()), "and all of that"

    def part(self) -> None:
        """The network falls apart, or is whole again."""
        self.sides = [self.random.choice((0, 0, 1)) if self.random.random() < 0.6 else 0 for _ in self.replicas]

    # Checks

    def look(self) -> None:
        """In the middle of it all a replica says what the rules say, and dead dots stay dead."""
        at = self.random.randrange(len(self.replicas))
        replica = self.replicas[at]
        oracle = Naive(self.genesis, replica.ops())
        check_oracle(replica, oracle)
        self.check_dead(at, oracle)
        other = self.random.choice(self.replicas)
        one, two = copied(replica), copied(other)
        one.join(list(other.ops()), MANIFESTS)
        two.join(list(replica.ops()), MANIFESTS)
        assert facts(one) == facts(two), "a joined with b is b joined with a"

    def check_dead(self, at: int, oracle: Naive) -> None:
        """A dot that was ended is never live again, unless all that ended it became void."""
        for dot, killers in self.dead[at].items():
            assert dot not in oracle.live or killers <= oracle.void, "a dead dot came back"
        for op in oracle.ops.values():
            if isinstance(op.payload, Add | Remove) and op.id not in oracle.void:
                for dot in op.payload.targets:
                    self.dead[at][dot] = self.dead[at].get(dot, frozenset()) | {op.id}

    def heal(self) -> None:
        """Everything reaches everyone, in batches and in any order."""
        for at, inbox in enumerate(self.inbox):
            for _ in range(3):
                self.random.shuffle(inbox)
                middle = len(inbox) // 2
                arrived, self.inbox[at] = inbox[:middle], inbox[middle:]
                self.take(at, arrived, MANIFESTS)
                inbox = self.inbox[at]
            self.take(at, inbox, MANIFESTS)

    def agree(self) -> None:
        """All replicas agree: with each other, with a replica that began anew, with the oracle."""
        oracle = Naive(self.genesis, self.good.values())
        first = self.replicas[0]
        found = facts(first)
        check_oracle(first, oracle)
        check_proofs(first)
        ordered = filled(self.genesis, sorted(self.good.values(), key=lambda op: op.order))
        everyone = [*self.replicas, ordered, self.one_by_one()]
        for at, replica in enumerate(everyone):
            for name, value in facts(replica).items():
                assert value == found[name], f"{name} of replica {at} is not that of replica 0"
        for at in range(len(self.replicas)):
            self.check_dead(at, oracle)
        for op in [*self.bad.values(), *self.orphans.values()]:
            verdicts = {repr(verdict(replica, op, MANIFESTS)) for replica in everyone}
            assert len(verdicts) == 1, f"all judge {op.kind} {op.id.hex()[:8]} alike: {verdicts}"
            missing = verdicts.pop().startswith("Missing")
            assert missing == (op.id in self.orphans), "what waits has unknown parents, what is refused has not"
        assert facts(first) == found, "what is refused leaves no trace"
        liars = {op.author for fork in first.forks() for op in fork}
        assert liars <= {self.liar.public if self.liar else b""}, "no honest key is accused"
        self.check_retracted(first, oracle)
        self.check_manifests(first)

    def one_by_one(self) -> OpSet:
        """A new replica that is given one operation at a time, in any order, what waits again and again."""
        replica = OpSet(self.genesis, MemoryTables())
        left = list(self.good.values())
        while left:
            self.random.shuffle(left)
            waiting = [op for op in left if replica.join([op], MANIFESTS).waiting]
            assert len(waiting) < len(left), "something can always be taken"
            left = waiting
        return replica

    def check_retracted(self, one: OpSet, oracle: Naive) -> None:
        """No content is visible against a curator's RETRACT, nor by a key that retracts it."""
        for entry in one.visible():
            for retract in one.retractions(entry.id):
                assert not oracle.hides_all(retract), "a curator's retraction wins"
                assert retract.author not in entry.adders, "whose retraction stands is not heard"

    def check_manifests(self, one: OpSet) -> None:
        """An ADD waits for the manifest of its content; another content's, or one that does not fit, is refused."""
        new = OpSet(self.genesis, MemoryTables())
        key = KEYS[0]
        op = new.compose(key, b"\xdd" * 16, Add(CONTENTS[0].id)) if self.genesis.curators != "any" else None
        misfit = new.compose(key, b"\xdd" * 16, Add(MISFIT.id)) if self.genesis.architecture else None
        for replica in (one, new):
            before = facts(replica)
            if op:
                assert verdict(replica, op, {CONTENTS[0].id: CONTENTS[1]}) is not None, (
                    "the manifest of another content"
                )
            if misfit:
                assert verdict(replica, misfit, {MISFIT.id: MISFIT}) is not None, "a content of another architecture"
            assert facts(replica) == before, "what is refused leaves no trace"
        assert new.accept(op) == Missing((), CONTENTS[0].id) if op else True, "an ADD waits for its manifest"


def check(seed: int) -> History:
    """Run a history; what is raised tells how to replay it."""
    history = History(seed)
    try:
        history.run()
    except Exception as fault:
        fault.add_note(f"replay with: python -m tests.replica.histories --seed {seed}")
        fault.add_note("\n".join(history.said))
        raise
    return history


def main() -> None:
    """Replay histories."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=1)
    asked = parser.parse_args()
    begun = time.perf_counter()
    ops = [len(check(seed).good) for seed in range(asked.seed, asked.seed + asked.count)]
    took = time.perf_counter() - begun
    sys.stdout.write(
        f"{asked.count} histories, {sum(ops)} operations, {took:.1f} s, {60 * len(ops) / took:.0f} a minute\n"
    )


if __name__ == "__main__":
    main()
