"""Models that differ by the order of their units alone are one model once they are aligned, however they came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.train.aligning import Alignment
from crdtmerge.train.peer import Peer, distance
from crdtmerge.train.pool import State, seen
from crdtmerge.train.rounds import begin, spread
from crdtmerge.train.topology import full
from crdtmerge.train.trainer import Trainer
from tests.train.models import HIDDEN, SYMMETRY, memory, network, pools

INPUTS = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))


def reordered(model: State, seed: int) -> dict[str, torch.Tensor]:
    p = np.random.default_rng(seed).permutation(HIDDEN)
    return {name: SYMMETRY.turned(name, x, [p]) for name, x in model.items()}


def watch(model: State) -> list[NDArray[np.float64]]:
    hidden = torch.relu(INPUTS @ model["0.weight"].T + model["0.bias"])
    return [hidden.double().numpy().T]


class Forgetting(Trainer):
    forgot = 0

    def __call__(self, model: State, number: int) -> State:
        return model

    def forget(self) -> None:
        self.forgot += 1


def family(count: int, **options: object) -> list[Peer]:
    """Peers with one model, whose units each has in an order of its own."""
    model = network(0).state_dict()
    alignment = Alignment(SYMMETRY, **options)  # type: ignore[arg-type]
    return [Peer(pool, reordered(model, i), Forgetting(), alignment=alignment) for i, pool in enumerate(pools(count))]


@pytest.mark.parametrize("watching", [None, watch])
def test_once_brings_all_into_one_order(watching: object) -> None:
    members = family(4, watch=watching)
    begin(members, full(4))
    assert len({peer.facts.basis for peer in members}) == 1
    assert all(torch.equal(peer.model["0.weight"], members[0].model["0.weight"]) for peer in members)
    assert all(isinstance(peer.trainer, Forgetting) and peer.trainer.forgot == 1 for peer in members)
    assert members[0].mix() is None, "all of them are one content now"
    assert not any(peer.align() for peer in members)


def test_aligning_is_a_function_of_the_set() -> None:
    bases = set()
    for turn in (1, -1):
        members = family(3)
        for peer in members[::turn]:
            peer.contribute()
        spread(members[::turn])
        for peer in members[::turn]:
            peer.align()
        bases |= {peer.facts.basis for peer in members}
    assert len(bases) == 1


@pytest.mark.parametrize("watching", [None, watch])
def test_who_comes_late_follows_the_others(watching: object) -> None:
    members = family(3, watch=watching)
    begin(members[:2], full(2))
    late = members[2]
    late.contribute()
    spread(members)
    assert set(late.there()) == {late.pool.author}, "nobody else is in its order of units"
    assert set(members[0].there()) == {peer.pool.author for peer in members[:2]}
    assert late.align()
    assert late.facts.basis == members[0].facts.basis
    assert torch.equal(late.model["2.weight"], members[0].model["2.weight"])


def test_two_that_were_aligned_apart_come_together() -> None:
    members = family(5)
    begin(members[:2], full(2))
    begin(members[2:], full(3))
    assert members[0].facts.basis != members[2].facts.basis
    spread(members)
    assert [peer.align() for peer in members] == [True, True, False, False, False], "most are in the second order"
    spread(members)
    assert len({one.content for one in seen(members[0].pool).values()}) == 1


def test_every_merge_matches_into_the_own_order() -> None:
    members = family(3, when="every")
    for peer in members:
        peer.contribute()
    spread(members)
    for peer in members:
        before = dict(peer.model)
        assert not peer.align()
        peer.mix()
        assert distance(before, peer.model) < 1e-6
    finals = [peer.final_merge() for peer in members]
    assert len({one.receipt.output_digest for one in finals}) == 1
    outputs = torch.relu(INPUTS @ finals[0]["0.weight"].T + finals[0]["0.bias"]) @ finals[0]["2.weight"].T
    wanted = network(0)(INPUTS) - network(0).state_dict()["2.bias"]
    assert torch.allclose(outputs, wanted, atol=1e-6)


def test_a_recipe_that_matches_by_itself_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "symmetry.json").write_bytes(SYMMETRY.encode())
    models = []
    for literal in (True, False):
        members = [
            Peer(
                pool,
                network(i).state_dict(),
                Forgetting(),
                alignment=Alignment(SYMMETRY, "every") if literal else None,
                recipe=None if literal else lambda mine: Recipe("dimat", method="weights", reference=mine.hex()),
                inputs={} if literal else {"symmetry": tmp_path / "symmetry.json"},
            )
            for i, pool in enumerate(pools(3))
        ]
        for peer in members:
            peer.contribute()
        spread(members)
        members[1].mix()
        models.append(members[1].model)
    assert distance(*models) < 1e-6


def test_nobody_is_aligned_alone() -> None:
    (peer,) = family(1)
    peer.contribute()
    assert not peer.align()
    assert memory(peer).received == 0


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UsageError):
        Alignment(SYMMETRY, when="never")  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"2\.weight"):
        Alignment(SYMMETRY).onto({"0.weight": torch.zeros(8, 3), "0.bias": torch.zeros(8)}, network(0).state_dict())
