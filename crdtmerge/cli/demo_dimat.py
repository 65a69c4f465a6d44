"""``crdtmerge demo dimat``: five peers that train apart and merge over the network as they go, in under a minute.

Five networks from five starts, each trained on a fifth of the handwritten digits, are put into five pools, whose nodes
form a ring and talk over TLS on this machine. Each peer turns its network into the order of units that follows from the
set of all first contributions, and then merges with its two neighbours and trains on, round after round, at its own
pace. Beside them, without a network: plain averages of the same networks, and training alone.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crdtmerge.cli.console import emit, say, tell

if TYPE_CHECKING:
    from crdtmerge.pool.replica import Replica
    from crdtmerge.symmetry.groups import Symmetry
    from crdtmerge.testing.digits import Digits, StateDict
    from crdtmerge.testing.plots import Panel
    from crdtmerge.train import Peer

PEERS, WIDTH, ROUNDS = 5, 64, 6
BEFORE, EPOCHS = 50, 2
"""Epochs before the first merge, and between two."""

WAIT_SECONDS = 120.0
"""How long the first contributions, and at the end all, may take to be everywhere."""

PATIENCE_SECONDS = 2.0
"""How long a peer waits for its neighbours' next contributions before it goes on with what is there."""


def dimat(out: Path | None, as_json: bool) -> None:
    """Run it, print the curves, write them as a PNG. Raises typer.Exit(1) if the peers' final merges differ."""
    import numpy as np
    import torch

    from crdtmerge.symmetry import permutation_groups
    from crdtmerge.testing import agents, plots

    torch.set_num_threads(1)
    if out is not None:
        _refuse(out)
    data = agents.load(0)
    shares = agents.alike(data.train_y.numpy(), PEERS, np.random.default_rng(0))
    say(f"training {PEERS} networks apart, on {len(shares[0])} images each ...")
    local = [_trainer(data, share, i, BEFORE) for i, share in enumerate(shares)]
    starts = [dict(one(agents.perceptron(WIDTH, i).state_dict(), 0)) for i, one in enumerate(local)]
    symmetry = permutation_groups(agents.perceptron(WIDTH, 0), (data.train_x[:2],))
    local = [_trainer(data, share, i, EPOCHS) for i, share in enumerate(shares)]
    score = partial(_accuracy, data)
    say("plain averages and training alone, in this process ...")
    curves = {name: _inside(starts, local, score, alone=alone) for name, alone in (("plain", False), ("alone", True))}
    say(f"{PEERS} nodes on a ring over TLS, aligned, {ROUNDS} rounds ...")
    with tempfile.TemporaryDirectory(prefix="crdtmerge-demo-") as folder:
        aligned, finals = asyncio.run(_over_gossip(Path(folder), starts, local, shares, data, symmetry))
    panels = [
        plots.Panel(
            "test accuracy after each merge, percent",
            "round",
            list(range(1, ROUNDS + 1)),
            {"aligned, over gossip": aligned, **curves},
        ),
        _barrier(data, symmetry, *starts[:2]),
    ]
    digests = sorted({one.receipt.output_digest.hex() for one in finals})
    final = score(finals[0])
    if out is not None:
        plots.png(out, panels)
    if as_json:
        series = {name: [round(value, 2) for value in values] for name, values in panels[0].series.items()}
        emit({"rounds": series, "final": round(final, 2), "digests": digests, "same": len(digests) == 1})
    else:
        for panel in panels:
            tell("\n" + plots.text(panel))
        tell(f"\none merge of all at the end: {final:.1f} percent")
        tell(f"  {digests[0][:16]}  on {'every' if len(digests) == 1 else 'NOT EVERY'} peer")
        if out is not None:
            tell(f"plots: {out}")
    if len(digests) > 1:
        raise typer.Exit(1)


def _refuse(out: Path) -> None:
    from crdtmerge.errors import OutputError

    if out.exists() or not out.parent.is_dir():
        raise OutputError(f"{out}: exists, or its folder does not; choose the name of a new PNG file.")


def _trainer(data: Digits, share: Any, number: int, epochs: int) -> Any:
    import torch

    from crdtmerge import train
    from crdtmerge.testing import agents

    batches = train.shuffled([data.train_x[share], data.train_y[share]], 32, epochs=epochs, seed=number)
    adam = partial(torch.optim.Adam, lr=1e-3)
    return train.TorchTrainer(agents.perceptron(WIDTH, number), adam, batches, examples=len(share))


def _accuracy(data: Digits, state: Any) -> float:
    import torch

    from crdtmerge.testing import agents

    module = agents.perceptron(WIDTH, 0)
    module.load_state_dict(dict(state))
    with torch.no_grad():
        return 100 * float((module(data.test_x).argmax(1) == data.test_y).float().mean())


def _inside(starts: list[StateDict], local: list[Any], score: Callable[[Any], float], *, alone: bool) -> list[float]:
    """Accuracy by round of peers in this process, not aligned: plain averages of neighbours, or none."""
    from crdtmerge import train
    from crdtmerge.state import MergeState

    graph = train.ring(PEERS)
    pools = [train.InMemory(MergeState("weight_average")) for _ in starts]
    rule = train.oneself if alone else train.neighbours(graph.metropolis(), [pool.author for pool in pools])
    peers = [train.Peer(*one, rule=rule) for one in zip(pools, starts, local, strict=True)]
    return [row.mean_merged for row in train.together(peers, graph, ROUNDS, score)]


async def _over_gossip(
    folder: Path, starts: list[StateDict], local: list[Any], shares: list[Any], data: Digits, symmetry: Symmetry
) -> tuple[list[float], list[Any]]:
    """Mean accuracy by round of peers whose nodes gossip, and every peer's final merge."""
    from crdtmerge import train
    from crdtmerge.gossip import address
    from crdtmerge.gossip.node import Node
    from crdtmerge.testing import agents

    async with AsyncExitStack() as opened:
        pools = _pools(folder, starts[0])
        for pool in pools:
            opened.callback(pool.close)
        graph = train.ring(PEERS)
        for i, pool in enumerate(pools):
            for j in graph.neighbours(i):
                pool.peers.trust(pools[j].author)
        nodes = [Node(pool, listen="127.0.0.1:0", period=0.2) for pool in pools]
        for node in nodes:
            await opened.enter_async_context(node)
        for i, node in enumerate(nodes):
            for j in graph.neighbours(i):
                node.meet(address.peer(str(nodes[j].url)))
        rule = train.neighbours(graph.metropolis(), [pool.author for pool in pools])
        alignment = train.Alignment(symmetry)
        peers = [
            train.Peer(
                pool,
                start,
                one,
                rule=rule,
                alignment=alignment,
                repair=train.Repairer(agents.perceptron(WIDTH, 0), data.train_x[share]),
            )
            for pool, start, one, share in zip(pools, starts, local, shares, strict=True)
        ]
        for peer in peers:
            await asyncio.to_thread(peer.contribute)
        await _until(lambda: all(len(_seen(peer)) == PEERS for peer in peers), WAIT_SECONDS)
        for peer in peers:
            await asyncio.to_thread(peer.align)
        await _until(lambda: all(len(_seen(peer, basis=peer.facts.basis)) == PEERS for peer in peers), WAIT_SECONDS)
        score = partial(_accuracy, data)
        curves = await asyncio.gather(
            *(_rounds(peer, [pools[j].author for j in graph.neighbours(i)], score) for i, peer in enumerate(peers))
        )
        await _until(lambda: len({pool.root for pool in pools}) == 1, WAIT_SECONDS)
        await _until(lambda: all(len(_seen(peer)) == PEERS for peer in peers), WAIT_SECONDS)
        finals = [await asyncio.to_thread(peer.final_merge) for peer in peers]
        return [statistics.fmean(values) for values in zip(*curves, strict=True)], finals


def _pools(folder: Path, like: StateDict) -> list[Replica]:
    from crdtmerge.pool.replica import Replica

    first = Replica.create(folder / "peer-0", "weight_average", like=like)
    return [first, *(Replica.of_genesis(folder / f"peer-{i}", first.genesis) for i in range(1, PEERS))]


async def _rounds(peer: Peer, neighbours: list[bytes], score: Callable[[Any], float]) -> list[float]:
    """One peer's own pace: merge what is there, train, contribute; wait a little for its neighbours, not for all."""
    found = []
    for _ in range(ROUNDS):
        await asyncio.to_thread(peer.mix)
        found.append(score(peer.model))
        await asyncio.to_thread(peer.step)
        await _until(
            lambda: set(neighbours) <= _seen(peer, since=peer.facts.round), PATIENCE_SECONDS, or_else=lambda: None
        )
    return found


def _seen(peer: Peer, *, basis: bytes | None = None, since: int = 0) -> set[bytes]:
    """Whose contributions are here: of one order of units, of a round or later."""
    from crdtmerge.train.pool import seen

    there = seen(peer.pool)
    return {key for key, one in there.items() if one.facts.round >= since and basis in (None, one.facts.basis)}


def _late() -> None:
    from crdtmerge.errors import PeerError

    raise PeerError(f"the nodes did not bring all contributions together within {WAIT_SECONDS:.0f} s; try again.")


async def _until(holds: Callable[[], bool], seconds: float, or_else: Callable[[], None] = _late) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not await asyncio.to_thread(holds):
                await asyncio.sleep(0.05)
    except TimeoutError:
        or_else()


def _barrier(data: Digits, symmetry: Symmetry, a: StateDict, b: StateDict) -> Panel:
    """The loss on the training images between two of the networks, as they are and aligned."""
    import torch
    from torch.nn.functional import cross_entropy

    from crdtmerge import train
    from crdtmerge.testing import agents
    from crdtmerge.testing.plots import Panel

    alignment = train.Alignment(symmetry)
    turned = alignment.turned(b, alignment.onto(a, b))
    module = agents.perceptron(WIDTH, 0)

    def loss(other: Any, t: float) -> float:
        module.load_state_dict({name: (1 - t) * a[name] + t * other[name] for name in a})
        with torch.no_grad():
            return float(cross_entropy(module(data.train_x), data.train_y))

    along = [i / 10 for i in range(11)]
    series = {name: [loss(other, t) for t in along] for name, other in (("aligned", turned), ("plain", b))}
    return Panel("training loss between two networks", "share of the second", along, series)
