"""What must hold in a simulated network, and of the set to which its honest nodes come.

1. They have one set of operations, one root and one state root, those of a fresh set that takes all of them in another
   order and grouping.
2. Every operation whose writing was acknowledged is among them, unless an old copy was put back before anybody saw it.
3. No honest key has a fork against it, and of no honest key is a wrong statement known.
4. At any time: nothing but errors of ours was raised, and nothing waits without bound.
5. A session between honest nodes leaves both with what either had before, one between equals takes one round, and no
   honest node bans another for what it said (``virtual_node.Watched``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from random import Random

from crdtmerge.canonical import digest
from crdtmerge.gossip.spread import MAIL_MAX
from crdtmerge.gossip.statements import KEPT_MAX
from crdtmerge.gossip.talk import converse
from crdtmerge.replica.op import Op
from crdtmerge.replica.opset import OpSet
from crdtmerge.replica.tables import MemoryTables
from crdtmerge.testing.virtual_node import Node
from crdtmerge.testing.virtual_time import VirtualLoop

TASKS_MAX = 5_000
"""Tasks of all nodes together: some two for each link, and one for each message that is being answered."""


def check_running(honest: Iterable[Node]) -> None:
    """Rule 4. Raises AssertionError, or what a task raised."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop), "simulations run in virtual time"
    for fault in loop.faults:
        raise fault
    assert loop.running < TASKS_MAX, f"{loop.running} tasks"
    for node in honest:
        if node.up:
            assert all(len(one.mail) <= MAIL_MAX for one in node.spread.contacts.values()), "mail piles up"
            assert len(node.spread.statements._last) <= KEPT_MAX, "statements pile up"


def check_agreement(honest: Sequence[Node], random: Random) -> None:
    """Rules 1 to 4, in the instant in which all have the same heads. Raises AssertionError."""
    check_running(honest)
    first = honest[0].opset
    ops = list(first.ops())
    fresh = _fresh(honest[0], ops, random)
    for node in honest:
        assert [op.id for op in node.opset.ops()] == [op.id for op in ops], f"the operations of {node.name}"
        assert node.opset.root == fresh.root, f"the root of {node.name}"
        assert node.opset.state_root == fresh.state_root, f"the state root of {node.name}"
        for op in node.acknowledged.values():
            assert op.id in first, f"{op.kind} {op.id.hex()[:8]} of {node.name} was acknowledged and is gone"
    keys = {node.key.public for node in honest}
    accused = keys & {op.author for fork in first.forks() for op in fork}
    assert not accused, f"honest keys have forks against them: {sorted(key.hex()[:8] for key in accused)}"
    for node in honest:
        for said in node.spread.statements._last.values():
            assert said.key not in keys or said.output == digest("output", said.merge), "a wrong statement"


def _fresh(node: Node, ops: Sequence[Op], random: Random) -> OpSet:
    """A new set that takes operations in some order and grouping."""
    fresh, waiting = OpSet(node.opset.genesis, MemoryTables()), list(ops)
    random.shuffle(waiting)
    while waiting:
        many = random.randint(1, len(waiting))
        joined = fresh.join(waiting[:many], node.contents)
        assert not joined.refused, f"what some took others refuse: {joined.refused[0][1]}"
        waiting = waiting[many:] + [op for op, _ in joined.waiting]
    return fresh


async def check_one_round(one: Node, other: Node) -> None:
    """A session between two equals takes one round. Raises AssertionError."""
    heads = one.opset.heads()
    summary = await converse(one.holding, one.network.link(one.name, other.name), one.call)
    if heads == one.opset.heads() == other.opset.heads():
        assert (summary.rounds, summary.equal) == (1, True), f"a session of equals takes {summary.rounds} rounds"
