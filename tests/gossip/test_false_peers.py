"""A peer that serves wrong bytes is dropped and reported, the pieces come from others, and nothing wrong enters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdtmerge import limits
from crdtmerge.gossip.messages import Answer, Request
from crdtmerge.gossip.node import Node
from crdtmerge.pool.replica import Replica
from crdtmerge.store.blobs import Blob
from tests.gossip.nodes import LIMIT_SECONDS, Served, key_of, replicas, trust_each_other, wait_until
from tests.pool.replicas import Model, blob_files, broken, flip, founded


def tall(number: int) -> Model:
    """A model with a tensor of eight pieces and one of three."""
    source = np.random.default_rng(number)
    return {
        "tall": source.standard_normal((8, limits.PIECE_BYTES // 4), np.float32),
        "wide": source.standard_normal(700_000, np.float32),
        "small": np.float32([number]),
    }


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Replica]]:
    """Two replicas with two contributions, and one that knows of nothing; all trust each other."""
    with (
        founded(tmp_path / "replica0", like=tall(0), key=key_of(0)) as first,
        replicas(tmp_path, first, 3) as found,
    ):
        trust_each_other(*found)
        for number in (1, 2):
            first.add(tall(number))
        first.export(tmp_path / "all")
        found[1].include(tmp_path / "all")
        yield found


class LyingNode(Node):
    """A node that lies in one respect."""

    lies: str

    async def piece(self, blob: Blob, number: int) -> Any:
        found = await super().piece(blob, number)
        if self.lies == "pieces" and number == 2:
            found = found.copy()
            found[5] ^= 1
        return found

    async def tree(self, digest: bytes) -> bytes | None:
        found = await super().tree(digest)
        return found[:-1] + bytes([found[-1] ^ 1]) if found and self.lies == "trees" else found

    async def whole(self, digests: list[bytes]) -> dict[bytes, bytes]:
        found = await super().whole(digests)
        if self.lies == "whole":
            return {digest: bytes(len(data)) for digest, data in found.items()}
        return {**found, bytes(32): b"unasked"} if self.lies == "unasked" else found

    async def answer(self, request: Request, peer: bytes | None) -> Answer:
        found = await super().answer(request, peer)
        return Answer(heads=(), ops=(b"nonsense",)) if self.lies == "operations" else found


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("lies", ["pieces", "trees", "whole", "unasked", "operations"])
def test_a_peer_that_lies_is_banned_and_another_gives_what_is_right(three: list[Replica], lies: str) -> None:
    async def main() -> None:
        good, bad, late = three
        async with AsyncExitStack() as opened:
            liar = LyingNode(bad, listen="127.0.0.1:0", period=0.3)
            liar.lies = lies
            await opened.enter_async_context(liar)
            assert liar.url is not None
            node = Node(late, listen=None, peers=[liar.url], period=0.3)
            await opened.enter_async_context(node)
            (contact,) = node.spread.contacts.values()
            await until(lambda: contact.banned_until is not None, f"who lies about {lies} is banned")
            assert contact.reason
            assert len(late.ready()) < 2 or lies == "operations"
            honest = await opened.enter_async_context(Node(good, listen="127.0.0.1:0", period=0.3))
            assert honest.url is not None
            node.meet(_where(honest))
            await until(lambda: late.ready() == good.ready(), "all comes from the other")
            await asyncio.sleep(0.5)
            assert contact.banned_until is not None
            assert contact.name not in {one.name for one in node.spread.contacts.values() if one.banned_until is None}
        assert not broken(late)
        assert late.fsck().clean

    asyncio.run(main())


def _where(node: Node) -> Any:
    from crdtmerge.gossip import address

    assert node.url is not None
    return address.peer(node.url)


@pytest.mark.parametrize("at", [10, 2 * limits.PIECE_BYTES + 10], ids=["first piece", "later piece"])
def test_a_damaged_disk_serves_nothing_wrong_and_is_no_reason_for_a_ban(three: list[Replica], at: int) -> None:
    good, damaged, late = (one.folder for one in three)
    for path in blob_files(damaged):
        if path.stat().st_size > at:
            path.chmod(0o600)
            flip(path, at)
    with Served(damaged) as bad:
        with Served(late, "--peer", bad.url, "--period", "0.3") as node:
            wait_until(
                lambda: any("500" in one or "range" in one or "reached" in one for one in node.report["warnings"]),
                "the node says what fails",
            )
            wait_until(lambda: any("is damaged" in one for one in bad.report["warnings"]), "so does the damaged one")
            wait_until(lambda: node.report["ops"] == 2, "the operations are here")
            assert node.report["ready_count"] == 0
            assert node.report["peers"][0]["state"] != "banned", node.report["peers"]
            assert node.stop() == 0
        with Served(good) as other, Served(late, "--peer", bad.url, "--peer", other.url, "--period", "0.3") as node:
            wait_until(lambda: node.report["ready_count"] == 2, "all comes from the other")
            assert "banned" not in {peer["state"] for peer in node.report["peers"]}
            assert node.stop() == 0
        assert "Traceback" not in bad.log, bad.log
    with Replica.open(late) as replica:
        assert not broken(replica)
        assert replica.fsck().clean


def test_a_ban_is_shown_with_its_reason(three: list[Replica], tmp_path: Path) -> None:
    _, bad, late = three

    async def main() -> None:
        liar = LyingNode(bad, listen="127.0.0.1:0", period=0.3)
        liar.lies = "pieces"
        async with liar:
            assert liar.url is not None
            with Served(late.folder, "--peer", liar.url, "--period", "0.3") as node:

                def is_banned() -> bool:
                    return [peer["state"] for peer in node.report["peers"]] == ["banned"]

                await asyncio.to_thread(wait_until, is_banned, "the page says that it is banned")
                (peer,) = (await asyncio.to_thread(lambda: node.report))["peers"]
                assert "other bytes than its name says" in peer["reason"]
                assert await asyncio.to_thread(node.stop) == 0

    asyncio.run(main())
