"""The loop in one process: what its figures are, and its baselines beside it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch.nn import Parameter

from crdtmerge.train.aligning import Alignment
from crdtmerge.train.peer import Peer
from crdtmerge.train.pool import State
from crdtmerge.train.repair import Repairer
from crdtmerge.train.rounds import Row, every_step, model_bytes, together
from crdtmerge.train.rules import neighbours, oneself
from crdtmerge.train.topology import full, ring
from crdtmerge.train.trainer import TorchTrainer, shuffled
from tests.train.models import SYMMETRY, memory, network, pools

ROWS = torch.randn(240, 3, generator=torch.Generator().manual_seed(0))
LABELS = (ROWS[:, 0] * ROWS[:, 1] > 0).long()


def adam(parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-2)


def score(model: State) -> float:
    module = network(0)
    module.load_state_dict(model)
    with torch.no_grad():
        return float((module(ROWS[180:]).argmax(1) == LABELS[180:]).float().mean())


def trainers(count: int) -> list[TorchTrainer]:
    own = [[ROWS[i:180:count], LABELS[i:180:count]] for i in range(count)]
    return [TorchTrainer(network(0), adam, shuffled(data, 10, seed=i)) for i, data in enumerate(own)]


def run(method: str, rounds: int = 2) -> tuple[list[Row], list[Peer]]:
    held, graph = pools(3), ring(3)
    rule = oneself if method == "local" else neighbours(graph.metropolis(), [pool.author for pool in held])
    members = [
        Peer(
            pool,
            network(i).state_dict(),
            one,
            rule=rule,
            alignment=Alignment(SYMMETRY) if method == "aligned" else None,
            repair=Repairer(network(0), ROWS[i:180:3]) if method == "aligned" else None,
        )
        for i, (pool, one) in enumerate(zip(held, trainers(3), strict=True))
    ]
    return together(members, graph, rounds, score), members


def test_local_training_hears_nobody() -> None:
    rows, members = run("local")
    assert rows[1].merged == rows[0].trained
    assert all(row.sent == 0 for row in rows)
    assert rows[0].consensus > 0
    assert [peer.facts.round for peer in members] == [2, 2, 2]


def test_a_full_ring_of_plain_averaging_agrees_and_is_united() -> None:
    rows, members = run("plain")
    assert rows[0].consensus < 1e-6
    assert set(rows[0].merged) == {rows[0].united}
    assert rows[1].sent == 2 * model_bytes(members[0].model) == 2 * 4 * (8 * 3 + 8 + 2 * 8 + 2)
    assert rows[1].mean_trained == pytest.approx(sum(rows[1].trained) / 3)
    assert memory(members[0]).received >= 2 * rows[1].sent, "from two neighbours, and the first models"


def test_aligned_and_repaired_it_runs_through() -> None:
    rows, members = run("aligned", 3)
    assert len(rows) == 3
    assert len({peer.facts.basis for peer in members} - {None}) == 1
    assert all(0 <= row.united <= 1 for row in rows)


def test_gossip_at_every_step_keeps_all_together() -> None:
    states = [network(i).state_dict() for i in range(3)]
    rows = every_step(trainers(3), states, full(3).metropolis(), 2, score)
    assert rows[1].consensus < rows[0].consensus + 0.5
    assert rows[1].sent == 12 * model_bytes(states[0]), "a model at every step"
    assert rows[1].merged == rows[1].trained


def test_gossip_at_every_step_is_the_update_of_the_paper() -> None:
    def sgd(parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.5)

    batch = [ROWS[:4], LABELS[:4]]
    both = [TorchTrainer(network(0), sgd, lambda number: [batch]) for _ in range(2)]
    states = [{name: x.clone() for name, x in network(i).state_dict().items()} for i in range(2)]
    gradients = []
    for state in states:
        module = network(0)
        module.load_state_dict(state)
        loss: torch.Tensor = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = module.get_parameter("0.weight").grad
        assert gradient is not None
        gradients.append(gradient)
    every_step(both, states, ring(2).metropolis(), 1, score)
    for one, gradient in zip(both, gradients, strict=True):
        wanted = (states[0]["0.weight"] + states[1]["0.weight"]) / 2 - 0.5 * gradient
        assert torch.allclose(one.module.state_dict()["0.weight"], wanted, atol=1e-6)
