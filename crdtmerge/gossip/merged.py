"""A merged checkpoint that follows the set: merged again when it changes, and what peers say that it came to."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crdtmerge.errors import CrdtMergeError
from crdtmerge.gossip.statements import Statement
from crdtmerge.resolve.receipt import merge_id

if TYPE_CHECKING:
    from crdtmerge.gossip.node import Node
    from crdtmerge.pool.outputs import Resolved

SETTLE_SECONDS = 0.5
"""After a change: more of them often follow."""

AGAIN_SECONDS = 30.0
"""After a merge that failed, if the set stays the same."""


class KeptMerged:
    """Keeps ``out`` merged."""

    def __init__(self, node: Node, out: Path) -> None:
        self._node, self.out = node, out
        self._changed = asyncio.Event()
        self.state: Literal["current", "merging", "waiting", "failed"] = "waiting"
        self.message: str | None = None
        self.merge: bytes | None = None
        self.output: bytes | None = None

    def look(self) -> None:
        """Something may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Merge whenever the set is another, and all of it is here."""
        done = failed = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                wanted, lacks = await self._node.call(self._wanted)
                if lacks is not None or wanted == done:
                    self.state, self.message = "current" if lacks is None else "waiting", lacks
                    continue
                if failed is not None and failed[0] == wanted and time.monotonic() < failed[1]:
                    continue
                await asyncio.sleep(SETTLE_SECONDS)
                self.state, self.message = "merging", None
                resolved: Resolved = await asyncio.to_thread(self._node.replica.resolve_to, self.out)
                done = resolved.receipt.merge_id
                await self._say(resolved)
            except CrdtMergeError as fault:
                self.state, self.message = "failed", str(fault)
                failed = wanted, time.monotonic() + AGAIN_SECONDS
                continue
            self.state = "current"
            self.look()

    def _wanted(self) -> tuple[bytes, str | None]:
        """The merge id of the set as it is, and what is not here of it."""
        replica = self._node.replica
        with replica.snapshot():
            visible, ready = replica.visible, replica.ready()
            base = replica.genesis.base
            lacking = [entry.id for entry in visible if entry.id not in ready]
            if base is not None and not replica.is_ready(base):
                lacking.append(base)
            identity = merge_id(replica.root, replica.recipe)
        lacks = f"{len(lacking)} of its contributions are not here yet." if lacking else None
        return identity, lacks if visible else "the visible set is empty."

    async def _say(self, resolved: Resolved) -> None:
        """Tell the peers what this merge came to."""
        receipt = resolved.receipt
        self.merge, self.output = receipt.merge_id, receipt.output_digest
        said = Statement.signed(
            self._node.replica.key, self._node.replica.pool_id, time.time_ns() // 1_000_000, self.merge, self.output
        )
        self._node.spread.statements.take([said.wire])
        self._node.spread.say()
