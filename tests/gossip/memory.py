"""Replicas in memory, for sessions without files or sockets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from crdtmerge.gossip.holding import Holding
from crdtmerge.gossip.messages import FRAME_BYTES_MAX, Answer, Request
from crdtmerge.gossip.session import Opener, Summary, respond
from crdtmerge.keys import Key
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Manifest, Row, Says
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add, Op, Payload
from crdtmerge.replica.opset import Joined, OpSet
from crdtmerge.replica.tables import MemoryTables

GENESIS = Genesis(Recipe.of("weight_average", {}, version=1))


class MemoryStore:
    """A replica without a disk."""

    def __init__(self, seed: int, genesis: Genesis = GENESIS) -> None:
        self.key = Key.from_seed(seed.to_bytes(32, "big"))
        self.incarnation = bytes(16)
        self.opset = OpSet(genesis, MemoryTables())
        self.manifests: dict[bytes, Manifest] = {}

    def manifest(self, content: bytes) -> Manifest | None:
        return self.manifests.get(content)

    def version(self) -> int:
        return len(self.opset)

    def join(self, ops: Iterable[Op], manifests: Mapping[bytes, Manifest] | None = None) -> Joined:
        found = {**(manifests or {}), **self.manifests}
        joined = self.opset.join(ops, found)
        contents = [op.payload.content for op in joined.new if isinstance(op.payload, Add)]
        self.manifests.update((one, found[one]) for one in contents)
        return joined

    def write(self, payload: Payload, manifest: Manifest | None = None) -> Op:
        op = self.opset.compose(self.key, self.incarnation, payload)
        self.join([op], {manifest.id: manifest} if manifest else {})
        return op

    def add(self, name: bytes, tensors: int = 1, note: str | None = None) -> Op:
        rows = (Row(f"w{number:06d}", "F32", (2,), name.ljust(32, b"\0")) for number in range(tensors))
        manifest = Manifest(tuple(rows))
        return self.write(Add(manifest.id, Says(note=note)), manifest)


def converse(ours: Holding, theirs: Holding) -> Summary:
    """A whole session, every message as bytes."""
    opener = Opener(ours)
    ahead: dict[bytes, Manifest] = {}
    while (request := opener.request()) is not None:
        asked = request.to_bytes()
        answered = respond(theirs, Request.from_bytes(asked), ahead).answer.to_bytes()
        assert max(len(asked), len(answered)) <= FRAME_BYTES_MAX
        payload = sum(map(len, (*request.ops, *request.manifests)))
        answer = Answer.from_bytes(answered)
        opener.summary.rounds += 1
        payload += sum(map(len, (*answer.ops, *answer.manifests)))
        opener.summary.overhead_bytes += len(asked) + len(answered) - payload
        opener.take(answer)
        if opener.missing:
            opener.supply({one: found for one in opener.missing if (found := theirs.manifest(one))})
        for content in opener.unknown_there:
            found = ours.manifest(content)
            assert found is not None
            ahead[content] = found
        opener.delivered()
    return opener.summary
