"""What a session needs of a replica: its operations in order, their manifests, and a way to take those of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from crdtmerge.gossip.index import Index
from crdtmerge.gossip.messages import PAYLOAD_BYTES_MAX, SMALL_MANIFEST_BYTES
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import SIGNATURE_BYTES, Add, Op, op_id
from crdtmerge.replica.opset import Joined, OpSet


class Store(Protocol):
    """A replica: ``pool.Replica``, or one in the memory of a test."""

    @property
    def opset(self) -> OpSet:
        """The operations, to be read."""
        ...

    def manifest(self, content: bytes) -> Manifest | None:
        """The manifest of a content that was added."""
        ...

    def join(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest] | None = None) -> Joined:
        """Take operations, durably."""
        ...

    def version(self) -> int:
        """A number that changes when another process commits."""
        ...


KEY_OPS_MAX = 1_000_000
"""Operations of one key that are taken from peers: 300 MB of them."""


class Holding:
    """A replica in the eyes of gossip. Used by one thread at a time."""

    def __init__(self, store: Store, key_ops_max: int = KEY_OPS_MAX) -> None:
        self._store, self._key_ops_max = store, key_ops_max
        self._version: int | None = None
        self._index = Index()
        self._news: list[Op] = []
        self._of_key: Counter[bytes] = Counter()
        self.refresh()

    @property
    def opset(self) -> OpSet:
        """The operations."""
        return self._store.opset

    @property
    def pool(self) -> bytes:
        """The pool id."""
        return self.opset.pool

    @property
    def index(self) -> Index:
        """The operations in their order, as they are now."""
        self._look()
        return self._index

    def refresh(self) -> list[Op]:
        """Look whether another process wrote; the operations that came that way since this was last asked."""
        self._look()
        news, self._news = self._news, []
        return news

    def _look(self) -> None:
        version = self._store.version()
        if version == self._version:
            return
        self._version = version
        if len(self.opset) == len(self._index):  # operations never go: as many are the same
            return
        before = self._index
        orders = [(int.from_bytes(height, "big"), one) for height, one, _ in self.opset.tables.every("order")]
        self._index = Index(orders)
        self._of_key = Counter(dot[:32] for dot, _, _ in self.opset.tables.every("dots"))
        self._news += [self.opset.op(order[1]) for order in orders if not before.has(order)]

    def read(self, wires: Iterable[bytes]) -> list[Op]:
        """Operations of others; those that are here are left out before their signatures cost anything.

        Raises OpError for what is no operation.
        """
        return [Op.from_wire(wire) for wire in wires if op_id(wire[SIGNATURE_BYTES:]) not in self.opset]

    def take(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest]) -> Joined:
        """Take operations of others, as far as they can be taken, and no more of one key than is allowed."""
        batch = list(ops)
        over = [op for op in batch if self._of_key[op.author] >= self._key_ops_max and op.id not in self.opset]
        joined = self._store.join([op for op in batch if op not in over] if over else batch, manifests)
        for op in joined.new:
            self._index.add(op.height, op.id)
            self._of_key[op.author] += 1
        why = f"its key has {self._key_ops_max} operations here: no more are taken from peers."
        joined.refused.extend((op, why) for op in over)
        return joined

    def manifest(self, content: bytes) -> Manifest | None:
        """The manifest of a content."""
        return self._store.manifest(content)

    def payload(self, ids: Iterable[bytes]) -> tuple[list[Op], list[bytes]]:
        """Of the operations with these ids as many as one message holds, and their small manifests."""
        ops: list[Op] = []
        manifests: dict[bytes, bytes] = {}
        room = PAYLOAD_BYTES_MAX
        for op in (self.opset.op(one) for one in ids if one in self.opset):
            content = op.payload.content if isinstance(op.payload, Add) else None
            beside = b""
            if content is not None and content not in manifests:
                manifest = self.manifest(content)
                beside = manifest.to_bytes() if manifest else b""
                beside = beside if len(beside) <= SMALL_MANIFEST_BYTES else b""
            room -= len(op.wire) + len(beside) + 16
            if room < 0:
                break
            ops.append(op)
            if content is not None and beside:
                manifests[content] = beside
        return ops, list(manifests.values())
