"""A replica that comes late, with nothing, fetches all from three peers at once, and is killed again and again."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from crdtmerge import limits
from crdtmerge.pool.replica import Replica
from tests.gossip.nodes import LIMIT_SECONDS, Served, key_of, replicas, trust_each_other, wait_until
from tests.gossip.proxy import Faults, Proxies
from tests.pool.replicas import Model, broken, founded

AGAIN_BYTES_MAX = 64 * limits.MIB + limits.PIECE_BYTES
"""What a kill may cost."""

RATE = 12 * limits.MIB
"""Bytes a second from each peer, so that there is time to kill."""


def large_model(number: int) -> Model:
    """64 MiB in tensors of several sizes, none of them whole pieces."""
    source = np.random.default_rng(number)
    sizes = {"a": (6, 1 << 20), "b": (5, (1 << 20) + 1), "c": (3, 1 << 20), "d": (1, 1 << 18)}
    model = {name: source.standard_normal(shape, np.float32) for name, shape in sizes.items()}
    return {**model, "half": source.standard_normal((1 << 21) + 3, np.float32).astype(np.float16)}


def like() -> Model:
    """A model of the same architecture that is never added."""
    return {name: np.zeros_like(tensor) for name, tensor in large_model(0).items()}


@pytest.mark.parametrize(
    ("seed", "count", "kills"),
    [
        (1, 4, 5),
        pytest.param(2, 20, 5, marks=pytest.mark.soak),
        *(pytest.param(seed, 4, 9, marks=pytest.mark.soak) for seed in range(3, 9)),
    ],
)
def test_who_comes_late_and_is_killed_fetches_little_again(tmp_path: Path, seed: int, count: int, kills: int) -> None:
    source = random.Random(seed)
    with ExitStack() as opened:
        first = opened.enter_context(founded(tmp_path / "replica0", like=like(), key=key_of(0)))
        found = opened.enter_context(replicas(tmp_path, first, 4))
        trust_each_other(*found)
        late, peers = found.pop().folder, []
        for number in range(count):
            first.add(large_model(number))
        bundle = tmp_path / "all"
        first.export(bundle)
        for one in found[1:]:
            one.include(bundle)
        bundle.unlink()
        total = count * sum(tensor.nbytes for tensor in like().values())
        proxies = opened.enter_context(Proxies(seed))
        for one in found:
            node = opened.enter_context(Served(one.folder))
            proxy = proxies.open(("127.0.0.1", node.port), Faults(rate=RATE / 2))
            peers.append((proxy, f"https://127.0.0.1:{proxy.port}#{one.author.hex()}"))
        options = [word for _, url in peers for word in ("--peer", url)]
        moments = sorted(source.uniform(0.02, 0.95) for _ in range(kills))
        for moment in moments:
            with Served(late, *options, "--period", "1") as node:
                wait_until(
                    lambda moment=moment: _here(late) >= moment * total,  # type: ignore[misc]
                    f"{moment:.2f} is here",
                    seconds=5 * LIMIT_SECONDS,
                    pause=0.02,
                )
                time.sleep(source.uniform(0, 0.2))
                node.kill()
        with Served(late, *options, "--period", "1") as node:
            wait_until(
                lambda: node.report["ready_count"] == count, "all is ready", seconds=5 * LIMIT_SECONDS, pause=0.3
            )
            assert node.stop() == 0, node.log
        fetched = sum(proxy.received for proxy, _ in peers)
        print(f"{(fetched - total) / limits.MIB:.0f} of {total / limits.MIB:.0f} MiB fetched again in {kills} kills")
        assert fetched - total <= kills * AGAIN_BYTES_MAX, f"seed {seed}: {fetched} bytes for {total}, {kills} kills"
        assert all(proxy.received > total / 20 for proxy, _ in peers), "each peer gave a part"
        with Replica.open(late) as replica:
            assert len(replica.ready()) == count
            assert not broken(replica)
            assert replica.fsck().clean
            assert not list((late / "partial").iterdir())
            assert replica.root == first.root


def _here(folder: Path) -> int:
    """Bytes of the files of blobs, whole and partial, as the disk counts them."""
    files = [*(folder / "blobs").glob("*/*"), *(folder / "partial").glob("*")]
    total = 0
    for path in files:
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total
