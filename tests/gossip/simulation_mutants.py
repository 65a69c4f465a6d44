"""Faults, put into the product one at a time: every one must be caught by the simulator, or its runs prove nothing.

python -m tests.gossip.simulation_mutants [NAME...]      how many runs each fault survives
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

from crdtmerge.gossip import session, talk
from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.index import Index
from crdtmerge.gossip.messages import Answer, Request
from crdtmerge.gossip.reconcile import Session
from crdtmerge.gossip.session import Opener
from crdtmerge.gossip.spread import Contact, Spread
from crdtmerge.gossip.statements import Statements
from crdtmerge.replica.op import INCARNATION_BYTES, Op
from crdtmerge.testing.simulation import Simulation
from crdtmerge.testing.virtual_disk import Stored
from crdtmerge.testing.virtual_node import Node

SEEDS = 1000
LONG = 8
"""Operations of a range that is long, in sets of some sixty."""


class Patch(NamedTuple):
    """A name that is replaced, and what by."""

    where: Any
    name: str
    by: Any


Mutant = tuple[Patch, ...]

_wanted, _offered, _answer, _wait = Session.wanted, Session.offered, session._answer, Spread._wait
_fingerprint, _accept = Index.fingerprint, Opener._accept


async def _acknowledged_early(self: Node, work: Callable[..., Any], *arguments: Any) -> Any:
    """What was written counts, and is sent, before it is durable."""
    async with self._turn:
        await asyncio.sleep(0)
        found = work(*arguments)
    if self.disk.unflushed is not None:
        asyncio.get_running_loop().call_later(0.05 + 4 * self.flush_seconds, self.disk.flush)
    return found


async def _mailed_early(self: Node, work: Callable[..., Any], *arguments: Any) -> Any:
    """What was written is sent while it becomes durable."""
    async with self._turn:
        await asyncio.sleep(0)
        found = work(*arguments)
    if self.disk.unflushed is not None:
        self.spread.tell(self.holding.refresh())
        await asyncio.sleep(self.random.expovariate(1 / (self.flush_seconds + 0.05)))
        self.disk.flush()
    return found


def _incarnation_kept(self: Stored) -> bytes:
    """One incarnation for good, whatever became of the disk."""
    if self._incarnation is None:
        self._incarnation = self.key.public[:INCARNATION_BYTES]
    return self._incarnation


def _answer_without_wants(holding: Holding, request: Request, ranges: Any) -> Answer:
    return _answer(holding, replace(request, wants=()), ranges)


async def _waits_for_mail_only(self: Spread, contact: Contact) -> None:
    """It is never the turn of a session."""
    contact.due = float("inf")
    while not contact.mail and not contact.unsaid:
        contact.wake.clear()
        await contact.wake.wait()


def _long_ranges_are_equal(self: Index, low: int, high: int) -> bytes:
    return bytes(32) if high - low > LONG else _fingerprint(self, low, high)


def _forgets_what_waits(self: Opener, ops: Iterable[Op], manifests: Any) -> bool:
    """What waits for others is neither kept nor asked for."""
    found = _accept(self, ops, manifests)
    for one in self._pending:
        self._wanted.pop(one, None)
    self._pending, self.missing = {}, set()
    return found


def _believes_heads(holding: Holding, request: Request, ranges: Any) -> Answer:
    """As many heads are the same heads."""
    if request.heads is not None and len(request.heads) == len(holding.opset.heads()):
        return Answer(ranges=b"\x90")
    return _answer(holding, request, ranges)


def _trusts_statements(self: Statements, wires: Iterable[bytes]) -> list[Any]:
    raise KeyError("a statement of a key that is not known")


MUTANTS: dict[str, Mutant] = {
    "mail is sent before the commit, the incarnation kept": (
        Patch(Node, "call", _mailed_early),
        Patch(Stored, "incarnation_for_next", _incarnation_kept),
    ),
    "what is acknowledged is not yet durable": (Patch(Node, "call", _acknowledged_early),),
    "an old copy goes on under its incarnation": (Patch(Stored, "incarnation_for_next", _incarnation_kept),),
    "a session drops the last that it wants": (Patch(Session, "wanted", lambda self: _wanted(self)[:-1]),),
    "a session drops the last that it offers": (Patch(Session, "offered", lambda self: _offered(self)[:-1]),),
    "the other side ignores what is wanted": (Patch(session, "_answer", _answer_without_wants),),
    "there are no sessions, only mail": (Patch(Spread, "_wait", _waits_for_mail_only),),
    "long ranges count as equal": (Patch(Index, "fingerprint", _long_ranges_are_equal),),
    "what waits for others is forgotten": (Patch(Opener, "_accept", _forgets_what_waits),),
    "as many heads count as the same heads": (Patch(session, "_answer", _believes_heads),),
    "a fault that is not ours ends a session": (Patch(Statements, "take", _trusts_statements),),
    "manifests are not fetched": (Patch(talk, "_manifests", mock.AsyncMock(return_value={})),),
}

QUICK = (
    "mail is sent before the commit, the incarnation kept",
    "an old copy goes on under its incarnation",
    "a session drops the last that it wants",
    "the other side ignores what is wanted",
    "there are no sessions, only mail",
    "long ranges count as equal",
)


def survived(mutant: Mutant, seeds: int = SEEDS) -> tuple[int, str] | None:
    """How many runs a fault survives and what it is caught by, None if it is not."""
    with ExitStack() as patched:
        for where, name, by in mutant:
            assert hasattr(where, name), f"the product has no {name} any more"
            patched.enter_context(mock.patch.object(where, name, by))
        for seed in range(seeds):
            try:
                Simulation(seed).run()
            except Exception as fault:  # noqa: BLE001 - any failure of a run is a catch
                return seed, f"{type(fault).__name__} {fault}"
    return None


def main(asked: list[str]) -> None:
    """Print how long each fault survives."""
    for name in asked or MUTANTS:
        seed, what = survived(MUTANTS[name], 200) or ("-", "")
        sys.stdout.write(f"{seed!s:>5} {name}: {what:.80}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
