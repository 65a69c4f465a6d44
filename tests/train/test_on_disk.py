"""The same peers with replicas on disk, gossiped through a folder or by nodes on loopback."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import torch

import crdtmerge as cm
from crdtmerge.train.facts import Facts
from crdtmerge.train.peer import Peer
from crdtmerge.train.pool import own, seen
from tests.train.models import constant, towards


def replicas(folder: Path, meeting: Path) -> list[cm.Replica]:
    """Two replicas of one pool."""
    from crdtmerge.gossip.anywhere import begin

    first = cm.Replica.create(folder / "a", "weight_average", like=constant(0.0))
    meeting.mkdir()
    cm.sync(first, meeting)
    return [first, begin(folder / "b", meeting)]


def test_two_replicas_through_a_folder_give_the_same_bytes(tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    pools = replicas(tmp_path, meeting)
    first, second = (
        Peer(pool, constant(0.0), towards(target), gossip=partial(cm.sync, pool, meeting))
        for pool, target in zip(pools, (0.0, 8.0), strict=True)
    )
    for _ in range(3):
        first.round()
        second.round()
    for pool in (*pools, pools[0]):
        cm.sync(pool, meeting)
    assert [len(pool.visible) for pool in pools] == [2, 2]
    assert len({peer.final_merge().receipt.output_digest for peer in (first, second)}) == 1
    assert pools[0].resolve()["w"].tolist() == first.final_merge()["w"].tolist()
    resumed = Peer(pools[1], None, towards(8.0))
    assert resumed.facts.round == 3
    assert own(pools[1]) == (seen(pools[1])[pools[1].author].content,)
    for pool in pools:
        pool.close()


def test_a_folder_and_a_memory_merge_to_the_same_bytes(tmp_path: Path) -> None:
    (one, two) = replicas(tmp_path, tmp_path / "meeting")
    for pool, start in ((one, 1.0), (two, 4.0)):
        Peer(pool, constant(start), towards(0.0)).contribute()
    cm.sync(two, tmp_path / "meeting")
    cm.sync(one, tmp_path / "meeting")
    on_disk = Peer(one, None, towards(0.0)).final_merge()
    direct = cm.merge([constant(1.0), constant(4.0)], strategy="weight_average", weights=["0.5", "0.5"])
    assert on_disk.receipt.output_digest == direct.receipt.output_digest
    one.close()
    two.close()


def test_who_takes_its_own_word_back_leaves_the_other_authors(tmp_path: Path) -> None:
    first, second = replicas(tmp_path, tmp_path / "meeting")
    for pool in (first, second):
        pool.add(constant(1.0), note=Facts().encode())
    second.retract(own(second)[0])
    for pool in (second, first):
        cm.sync(pool, tmp_path / "meeting")
    assert len(first.visible) == 1
    assert set(seen(first)) == {first.author}
    first.close()
    second.close()


def test_nodes_on_loopback_bring_contributions_while_peers_train(tmp_path: Path) -> None:
    pools = replicas(tmp_path, tmp_path / "meeting")

    async def scene() -> list[Peer]:
        async with cm.Node(pools[0], listen="http://127.0.0.1:0", period=0.2) as node:
            assert node.url is not None
            async with cm.Node(pools[1], listen=None, peers=[node.url], period=0.2):
                members = [
                    Peer(pool, constant(start), towards(4.0)) for pool, start in zip(pools, (0.0, 16.0), strict=True)
                ]
                for peer in members:
                    await asyncio.to_thread(peer.step)
                async with asyncio.timeout(20):
                    while any(len(seen(pool)) < 2 for pool in pools):
                        await asyncio.sleep(0.05)
                for peer in members:
                    await asyncio.to_thread(peer.mix)
                return members

    members = asyncio.run(scene())
    assert torch.equal(members[0].model["w"], members[1].model["w"])
    assert members[0].model["w"].tolist() == [6.0] * 3
    for pool in pools:
        pool.close()
