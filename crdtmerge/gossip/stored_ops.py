"""Taking the operations that are in a folder or bucket and not here, each after those that it refers to.

Segments are read from the first of each chain on; what waits for others waits in memory, up to a bound. Where it is
more, the last are dropped, and their segments read again when others have come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, MismatchError
from crdtmerge.gossip import objects
from crdtmerge.gossip.objects import Chain, Segment, manifest_name
from crdtmerge.gossip.places import FLIGHT_BYTES_MAX, FLIGHT_MAX
from crdtmerge.gossip.stored import Stored, groups
from crdtmerge.gossip.talk import Call
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import Add, Op
from crdtmerge.replica.opset import Joined

PENDING_BYTES_MAX = 16 * limits.MIB
"""Operations that wait for others, some 40,000."""

JOINED_MAX = 1000
"""Operations that are taken in one transaction."""


class _Waiting(NamedTuple):
    """An operation that waits for others, and where it came from."""

    op: Op
    segment: Segment


class StoredOps:
    """The operations of a pool in a place."""

    def __init__(self, replica: Replica, stored: Stored, call: Call, *, rehash: bool) -> None:
        self._replica, self._stored, self._call, self._rehash = replica, stored, call, rehash
        self._opset = replica.opset
        self._pending: dict[bytes, _Waiting] = {}
        self._read: set[bytes] = set()
        self._lacks: dict[bytes, set[bytes]] = {}
        """By chain what is not there, as far as it is known without another look."""

    async def take(self) -> None:
        """Take what is news. Raises PeerError, StorageError."""
        todo: dict[bytes, list[Segment]] = {}
        for chain, segments in self._stored.listing.segments.items():
            unknown, lacks = (segments, set()) if self._rehash else await self._call(self._examine, chain, segments)
            if unknown:
                todo[chain] = sorted(unknown, key=objects.reading_order)
            else:
                self._lacks[chain] = lacks
        while todo:
            news = self._stored.report.ops_received
            todo = await self._pass_over(todo)
            if self._stored.report.ops_received == news:
                break
        self._stored.report.waiting = len(self._pending)

    def chain(self, key: bytes) -> Chain:
        """The operations of a chain that are here."""
        rows = self._opset.tables.every("dots", key)
        return Chain(((int.from_bytes(dot[len(key) :], "big"), one) for dot, one, _ in rows), self.wire)

    def wire(self, identity: bytes) -> bytes:
        """An operation that is here or waits; nothing for one that was dropped, which proves nothing."""
        waiting = self._pending.get(identity)
        wire: bytes | None = waiting.op.wire if waiting else self._opset.tables.get("ops", identity)
        return wire or b""

    def lacking(self, key: bytes) -> tuple[Chain, set[bytes]] | None:
        """A chain and the operations of it that are not there, after ``take``; None if all are."""
        lacks = self._lacks.get(key)
        if lacks is not None and not lacks:
            return None
        chain = self.chain(key)
        if lacks is None:
            segments = self._stored.listing.segments.get(key, [])
            lacks = chain.examine(one for one in segments if one.name not in self._stored.wrong)[1]
        return (chain, lacks - self._read) if lacks - self._read else None

    def _examine(self, key: bytes, segments: list[Segment]) -> tuple[list[Segment], set[bytes]]:
        return self.chain(key).examine(segments)

    async def _pass_over(self, todo: dict[bytes, list[Segment]]) -> dict[bytes, list[Segment]]:
        """Read segments of every chain; those of which something had to be dropped."""
        chains = {key: await self._call(self.chain, key) for key in todo}
        dropped: set[Segment] = set()
        left = todo
        while left:
            turn = [one for segments in left.values() for one in objects.apart(segments, FLIGHT_MAX)]
            for group in groups(turn, lambda segment: segment.nbytes):
                for segment, ops in zip(group, await asyncio.gather(*map(self._segment, group)), strict=True):
                    chains[segment.chain].add((op.seq, op.id) for op in ops)
                    for op in await self._call(self._unknown, ops):
                        self._pending[op.id] = _Waiting(op, segment)
                await self._join()
                dropped |= self._drop()
            left = await self._call(self._unread, chains, left, set(turn))
        again: dict[bytes, list[Segment]] = {}
        for segment in sorted(dropped, key=objects.reading_order):
            again.setdefault(segment.chain, []).append(segment)
        return again

    def _unread(
        self, chains: Mapping[bytes, Chain], todo: Mapping[bytes, list[Segment]], gone: set[Segment]
    ) -> dict[bytes, list[Segment]]:
        """The segments that are still to be read: of every chain those from the first on that is news."""
        left = {}
        for key, segments in todo.items():
            rest = [one for one in segments if one not in gone]
            known = 0
            while not self._rehash and known < len(rest) and chains[key].within(rest[known]):
                known += 1
            if rest[known:]:
                left[key] = rest[known:]
        return left

    async def _segment(self, segment: Segment) -> list[Op]:
        """The operations of a segment, none if anything is wrong with it."""
        data = await self._stored.read(segment.name, min(segment.nbytes, objects.SEGMENT_READ_BYTES_MAX))
        if data is None:
            return []
        try:
            ops = await asyncio.to_thread(objects.unpack, segment, self._stored.pool, data)
        except FalsePeerError as fault:
            self._stored.found_wrong(segment.name, str(fault))
            return []
        self._read.update(op.id for op in ops)
        return ops

    def _unknown(self, ops: list[Op]) -> list[Op]:
        return [op for op in ops if op.id not in self._opset]

    async def _join(self) -> None:
        """Take what can be taken, causes first, each ADD with its manifest."""
        for ops, contents in await self._call(self._takeable):
            manifests: dict[bytes, Manifest] = {}
            for group in groups(contents, self._stored.listing.manifests.__getitem__):
                found = await asyncio.gather(*map(self._stored.manifest, group))
                manifests.update((manifest.id, manifest) for manifest in found if manifest is not None)
            joined = await self._call(self._joined, ops, manifests)
            self._stored.report.ops_received += len(joined.new)
            for op in joined.new:
                self._pending.pop(op.id, None)
            for op, why in joined.refused:
                segment = self._pending.pop(op.id).segment
                self._stored.found_wrong(segment.name, f"operation {op.id.hex()[:16]} is refused: {why}")

    def _takeable(self) -> list[tuple[list[Op], list[bytes]]]:
        """The operations whose past is here or comes before them, in groups, with the contents that they bring."""
        found: list[tuple[list[Op], list[bytes]]] = []
        coming: set[bytes] = set()
        brought: set[bytes] = set()
        room = 0
        for op, _ in sorted(self._pending.values(), key=lambda waiting: waiting.op.order):
            content = op.payload.content if isinstance(op.payload, Add) and op.payload.content not in brought else None
            size = 0 if content is None else self._size_of(content)
            if size is None or not all(parent in coming or parent in self._opset for parent in op.parents):
                continue
            room -= size
            if not found or room < 0 or len(found[-1][0]) >= JOINED_MAX:
                found.append(([], []))
                room = FLIGHT_BYTES_MAX - size
            found[-1][0].append(op)
            coming.add(op.id)
            if content is not None and size:
                found[-1][1].append(content)
                brought.add(content)
        return found

    def _size_of(self, content: bytes) -> int | None:
        """Bytes of a manifest that must be read: none if it is here, None if it is nowhere."""
        if self._opset.knows_content(content) or self._replica.manifest(content) is not None:
            return 0
        nbytes = self._stored.listing.manifests.get(content)
        return None if nbytes is None or manifest_name(content) in self._stored.wrong else max(nbytes, 1)

    def _joined(self, ops: Sequence[Op], manifests: Mapping[bytes, Manifest]) -> Joined:
        """Take operations; a manifest that does not fit the pool refuses its own ADDs alone."""
        try:
            return self._replica.join(ops, manifests)
        except MismatchError as fault:
            if len(ops) == 1:
                return Joined([], [], [(ops[0], str(fault))])
        apart = [self._joined([op], manifests) for op in ops]
        return Joined(*([one for part in parts for one in part] for parts in zip(*apart, strict=True)))

    def _drop(self) -> set[Segment]:
        """Forget the last of those that wait where they are too many; the segments that must be read again."""
        room = PENDING_BYTES_MAX
        dropped = set()
        for op, segment in sorted(self._pending.values(), key=lambda waiting: waiting.op.order):
            room -= len(op.wire)
            if room < 0:
                del self._pending[op.id]
                dropped.add(segment)
        return dropped
