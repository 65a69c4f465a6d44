"""What a node says of itself on its status page."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import crdtmerge
from crdtmerge.errors import CrdtMergeError
from crdtmerge.gossip.client import HttpPeer
from crdtmerge.gossip.spread import Contact
from crdtmerge.gossip.status import VISIBLE_MAX, Disagreement, Merged, Peer, PeerState, Report, Transfer, Visible
from crdtmerge.replica.entry import Entry

if TYPE_CHECKING:
    from crdtmerge.gossip.node import Node

LOOK_SECONDS = 0.5


class Reporter:
    """Keeps a report; what comes from the database is read again only when that changed."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._seen: object = None
        self._set: Report | None = None
        self._sizes: dict[bytes, int] = {}

    async def run(self) -> None:
        """Keep it up to date."""
        while True:
            try:
                self._set = await self._node.call(self._read)
                self._node.warnings.pop("report", None)
            except CrdtMergeError as fault:
                self._node.warnings["report"] = str(fault)
            await asyncio.sleep(LOOK_SECONDS)

    def report(self) -> Report:
        """As it is now. Raises LookupError before there is one."""
        if self._set is None:
            raise LookupError("the node is starting.")
        node = self._node
        peers = [self._peer(contact) for contact in node.spread.contacts.values()]
        served = node.server
        return {
            **self._set,
            "address": node.url,
            "uptime_seconds": time.monotonic() - node.started,
            "peers": peers,
            "transfers": self._transfers(),
            "merged": self._merged(),
            "disagreements": self._disagreements(),
            "warnings": list(node.warnings.values()),
            "totals": {
                "ops_sent": sum(one["ops_sent"] for one in peers),
                "ops_received": sum(one["ops_received"] for one in peers),
                "bytes_sent": sum(one["bytes_sent"] for one in peers) + (served.bytes_sent if served else 0),
                "bytes_received": sum(one["bytes_received"] for one in peers)
                + (served.bytes_received if served else 0),
                "blobs_fetched": node.fetched.blobs,
            },
        }

    def _read(self) -> Report:
        """What the database says."""
        replica = self._node.replica
        seen = replica.version(), len(self._node.holding.index), self._node.receiving.arrived
        if self._set is not None and seen == self._seen:
            return self._set
        self._seen = seen
        with replica.snapshot():
            visible, ready, recipe = replica.visible, replica.ready(), replica.recipe
            params = recipe.canonical()["params"]
            return {
                "pool": replica.pool_id.hex(),
                "actor": replica.author.hex(),
                "address": None,
                "version": crdtmerge.__version__,
                "uptime_seconds": 0.0,
                "root": replica.root.hex(),
                "state_root": replica.state_root.hex(),
                "recipe": " ".join([recipe.strategy, *(f"{name}={value}" for name, value in params.items())]),
                "ops": len(replica.opset),
                "visible_count": len(visible),
                "ready_count": sum(entry.id in ready for entry in visible),
                "visible": [self._visible(entry, entry.id in ready) for entry in visible[:VISIBLE_MAX]],
                "hidden_count": replica.opset.tables.count("hidden"),
                "peers": [],
                "transfers": [],
                "merged": None,
                "disagreements": [],
                "forks": [
                    {"key": fork.one.author.hex(), "ops": [fork.one.id.hex(), fork.other.id.hex()]}
                    for fork in replica.opset.forks()
                ],
                "warnings": [],
                "totals": {"ops_sent": 0, "ops_received": 0, "bytes_sent": 0, "bytes_received": 0, "blobs_fetched": 0},
            }

    def _visible(self, entry: Entry, ready: bool) -> Visible:
        replica = self._node.replica
        whole = self._sizes.get(entry.id) or replica.whole_bytes_of(entry.id)
        if whole is not None:
            self._sizes[entry.id] = whole
        return {
            "id": entry.id.hex(),
            "weight": str(entry.weight),
            "role": entry.role,
            "task": entry.claim.task,
            "adders": [key.hex() for key in entry.adders],
            "note": entry.note,
            "ready": ready,
            "bytes": whole,
            "missing_bytes": 0 if ready else (whole or 0) - (replica.bytes_of(entry.id) or 0),
        }

    def _peer(self, contact: Contact) -> Peer:
        now = asyncio.get_running_loop().time()
        http = contact.link if isinstance(contact.link, HttpPeer) else None
        state: PeerState = "connected" if contact.last_session is not None else "waiting"
        if contact.banned_until is not None:
            state = "banned"
        elif contact.failures:
            state = "failing"
        return {
            "url": contact.name,
            "key": contact.key.hex() if contact.key else None,
            "state": state,
            "last_sync_seconds_ago": None if contact.last_session is None else now - contact.last_session,
            "rtt_seconds": http.trips.mean if http else None,
            "failures": contact.failures,
            "next_try_seconds": max(contact.due - now, 0.0),
            "ops_sent": contact.sent,
            "ops_received": contact.received,
            "bytes_sent": http.bytes_sent if http else 0,
            "bytes_received": http.bytes_received if http else 0,
            "reason": contact.reason,
        }

    def _transfers(self) -> list[Transfer]:
        underway = self._node.fetching.underway if self._node.fetching else []
        return [
            {
                "digest": one.want.digest.hex(),
                "content": found.hex() if (found := self._node.receiving.needed_by(one.want.digest)) else None,
                "bytes": one.want.nbytes,
                "done_bytes": one.done_bytes,
                "sources": len(one.sources),
            }
            for one in underway
        ]

    def _merged(self) -> Merged | None:
        merged = self._node.merged
        if merged is None:
            return None
        return {
            "state": merged.state,
            "out": str(merged.out),
            "merge_id": merged.merge.hex() if merged.merge else None,
            "output_digest": merged.output.hex() if merged.output else None,
            "message": merged.message,
        }

    def _disagreements(self) -> list[Disagreement]:
        merged = self._node.merged
        if merged is None or merged.merge is None or merged.output is None:
            return []
        return [
            {
                "merge_id": one.merge.hex(),
                "ours": merged.output.hex(),
                "theirs": one.output.hex(),
                "key": one.key.hex(),
            }
            for one in self._node.spread.statements.disagreeing(merged.merge, merged.output)
        ]
