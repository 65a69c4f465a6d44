"""Small models, peers and pools to try training with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crdtmerge.recipe import Recipe
from crdtmerge.state import MergeState
from crdtmerge.symmetry.groups import Axis, Group, Symmetry
from crdtmerge.train.peer import Peer
from crdtmerge.train.pool import InMemory

State = Mapping[str, Tensor]
HIDDEN = 8
SYMMETRY = Symmetry(
    (Group(HIDDEN, (Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1, True))),),
    {"0.weight": ((HIDDEN,), (3,)), "0.bias": ((HIDDEN,),), "2.weight": ((2,), (HIDDEN,))},
)


def pools(count: int, recipe: Recipe | str = "weight_average") -> list[InMemory]:
    """Pools of different keys, in the order of their keys."""
    found = [InMemory(MergeState(recipe)) for _ in range(count)]
    return sorted(found, key=lambda pool: pool.author)


def constant(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((3,), value, dtype=torch.float64)}


def towards(target: float, rate: float = 0.5) -> Callable[[State], dict[str, Tensor]]:
    """Gradient steps on |w - target|^2 / 2."""
    return lambda model: {name: x - rate * (x - target) for name, x in model.items()}


def still(model: State) -> State:
    return model


def peers(count: int, recipe: Recipe | str = "weight_average", **options: Any) -> list[Peer]:
    """Peers whose models are constants 0, 1, 2, ... and that have contributed them; training changes nothing."""
    found = [Peer(pool, constant(float(i)), still, **options) for i, pool in enumerate(pools(count, recipe))]
    for peer in found:
        peer.contribute()
    return found


def hear_all(members: Sequence[Peer]) -> None:
    """Everyone hears of everything."""
    for listening in members:
        for peer in members:
            if peer is not listening:
                memory(listening).hear(memory(peer).state)


def memory(peer: Peer) -> InMemory:
    assert isinstance(peer.pool, InMemory)
    return peer.pool


def network(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 2))
