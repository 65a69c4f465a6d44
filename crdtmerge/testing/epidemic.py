"""How many rounds it takes until all know: in each, every node holds one session with one other, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import Request
from crdtmerge.gossip.session import respond
from crdtmerge.gossip.talk import converse
from crdtmerge.replica.op import Add
from crdtmerge.testing import virtual_time
from crdtmerge.testing.payloads import contents, keys, pool
from crdtmerge.testing.virtual_disk import Disk, Stored

ROUNDS_MAX = 100


class DirectLink:
    """A link to a replica in this process: messages are bytes, and arrive."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding

    async def exchange(self, message: bytes) -> bytes:
        """The answer to a request."""
        return respond(self._holding, Request.from_bytes(message)).answer.to_bytes()

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest that is there."""
        found = self._holding.manifest(content)
        return found.to_bytes() if found else None

    async def give_manifest(self, content: bytes, data: bytes) -> None:
        """Small manifests travel with their ADDs."""


async def _call(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


def epidemic(nodes: int = 1000, seed: int = 0) -> int:
    """The rounds until one new operation is everywhere. All sessions of a round begin with what was known before it."""
    random, genesis, key = Random(seed), pool(0), keys(1)[0]
    stores = [Stored(genesis, Disk(), key, random) for _ in range(nodes)]
    op = stores[0].write(Add(next(iter(contents()))), contents())
    holdings = [Holding(store) for store in stores]
    return virtual_time.run(_rounds(holdings, op.id, random))


async def _rounds(holdings: list[Holding], op: bytes, random: Random) -> int:
    nodes = range(len(holdings))
    for number in range(1, ROUNDS_MAX):
        knew = {at for at in nodes if op in holdings[at].opset}
        if len(knew) == len(holdings):
            return number - 1
        pairs = [(at, (at + random.randrange(1, len(holdings))) % len(holdings)) for at in nodes]
        for one, other in sorted(pairs, key=lambda pair: bool(knew & {*pair})):  # who learns now tells nobody yet
            await converse(holdings[one], DirectLink(holdings[other]), _call)
    raise AssertionError(f"after {ROUNDS_MAX} rounds some still do not know")
