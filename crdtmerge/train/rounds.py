"""Peers in one process, round by round, with the figures that every table of decentralised training shows.

    begin:     contribute, exchange, align, exchange
    round k:   merge -> score;   train -> score;   contribute, exchange

So that methods are compared alike, all peers take each step together here; nothing in a ``Peer`` needs that. The
baselines are the same loop: ``rule=oneself`` is local training only, ``rule=neighbours(...)`` without alignment and
repair is plain averaging; gossip after every step is ``every_step``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from crdtmerge.train.peer import Peer, distance
from crdtmerge.train.pool import InMemory, State
from crdtmerge.train.rules import oneself
from crdtmerge.train.topology import Graph, Mixing
from crdtmerge.train.trainer import TorchTrainer

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[[State], float]
"""What a model is worth: its accuracy on data that nobody trains on."""


@dataclass(frozen=True)
class Row:
    """One round: each peer's score after the merge and after local training, and how far the peers are apart.

    ``united`` is the score of the counterfactual merge of everyone at this point, ``consensus`` the root of the mean
    squared distance of the merged models to their mean, ``sent`` the bytes that a peer sent on average to each of its
    neighbours so far (a model for each exchange).
    """

    number: int
    merged: tuple[float, ...]
    trained: tuple[float, ...]
    united: float
    consensus: float
    sent: int

    @property
    def mean_merged(self) -> float:
        """The mean score after the merge."""
        return fmean(self.merged)

    @property
    def mean_trained(self) -> float:
        """The mean score after local training."""
        return fmean(self.trained)


def together(peers: Sequence[Peer], graph: Graph, rounds: int, score: Score) -> list[Row]:
    """Begin, then so many rounds, with peers whose pools are ``InMemory``; numbers as those of the graph."""
    begin(peers, graph)
    rows = []
    for number in range(rounds):
        for peer in peers:
            peer.mix()
        merged = tuple(score(peer.model) for peer in peers)
        apart = consensus_error([peer.model for peer in peers])
        united = score({**peers[0].model, **peers[0].final_merge()})
        for peer in peers:
            peer.step()
        exchange(peers, graph)
        silent = all(peer.rule is oneself for peer in peers)
        sent = 0 if silent else (number + 1) * model_bytes(peers[0].model)
        trained = tuple(score(peer.model) for peer in peers)
        rows.append(Row(number, merged, trained, united, apart, sent))
    return rows


def begin(peers: Sequence[Peer], graph: Graph) -> None:
    """Contribute first models and bring them into one order of units, where peers are to be aligned."""
    for peer in peers:
        peer.contribute()
    spread(peers)
    aligned = [peer.align() for peer in peers]
    if any(aligned):
        spread(peers)
    exchange(peers, graph)


def exchange(peers: Sequence[Peer], graph: Graph) -> None:
    """Each hears what its neighbours had."""
    before = [_memory(peer).state for peer in peers]
    for i, peer in enumerate(peers):
        for j in graph.neighbours(i):
            _memory(peer).hear(before[j])


def spread(peers: Sequence[Peer]) -> None:
    """Everyone hears of everything."""
    for listening, peer in itertools.permutations(peers, 2):
        _memory(listening).hear(_memory(peer).state)


def every_step(
    trainers: Sequence[TorchTrainer], models: Sequence[State], mixing: Mixing, rounds: int, score: Score
) -> list[Row]:
    """Gossip averaging at every optimiser step, the baseline that sends the most.

        x_i <- sum_j W_ij x_j - eta g_i(x_i)        (the optimiser's step, with gradients at x_i before it was mixed)

    A round is as many steps as the peer with most batches has; others begin theirs again.

    Source: Jiang et al., "Collaborative Deep Learning in Fixed Topology Networks" (CDSGD), NeurIPS 2017,
    arXiv:1706.07880.
    """
    states: list[State] = list(models)
    rows, sent = list[Row](), 0
    for number in range(rounds):
        for one, state in zip(trainers, states, strict=True):
            one.begin(state)
        batches = [list(one.batches(number + 1)) for one in trainers]
        for step in range(max(map(len, batches))):
            for one, own in zip(trainers, batches, strict=True):
                one.differentiate(own[step % len(own)])
            _mix(trainers, mixing)
            for one in trainers:
                one.step()
            sent += model_bytes(states[0])
        states = [{name: x.detach().clone() for name, x in one.module.state_dict().items()} for one in trainers]
        scores = tuple(map(score, states))
        united = score({**states[0], **mean(states)})
        rows.append(Row(number, scores, scores, united, consensus_error(states), sent))
    return rows


def _mix(trainers: Sequence[TorchTrainer], mixing: Mixing) -> None:
    """x_i <- sum_j W_ij x_j over all tensors of floats, where they lie; float64 sums."""
    import torch

    weights = torch.tensor([[float(w) for w in row] for row in mixing.rows], dtype=torch.float64)
    for own in zip(*(one.module.state_dict().values() for one in trainers), strict=True):
        if own[0].is_floating_point():
            mixed = torch.tensordot(weights, torch.stack([x.double() for x in own]), dims=1)
            for x, new in zip(own, mixed, strict=True):
                x.copy_(new)


def mean(models: Sequence[State]) -> dict[str, Tensor]:
    """The mean of the tensors of floats, in their own dtype."""
    import torch

    names = [name for name, x in models[0].items() if x.is_floating_point()]
    stacked = {name: torch.stack([model[name].double() for model in models]) for name in names}
    return {name: x.mean(0).to(models[0][name].dtype) for name, x in stacked.items()}


def consensus_error(models: Sequence[State]) -> float:
    """sqrt(mean_i |x_i - mean|^2): how far peers are from agreeing.

    >>> import torch
    >>> consensus_error([{"w": torch.tensor([0.0])}, {"w": torch.tensor([2.0])}])
    1.0
    """
    middle = mean([{name: x.double() for name, x in one.items() if x.is_floating_point()} for one in models])
    return float(fmean(distance(one, middle) ** 2 for one in models) ** 0.5)


def model_bytes(model: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of floats."""
    return sum(x.nbytes for x in model.values() if x.is_floating_point())


def _memory(peer: Peer) -> InMemory:
    assert isinstance(peer.pool, InMemory), "peers in one process have pools in memory"
    return peer.pool
