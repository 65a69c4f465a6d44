"""Local training is a function of the model and the round; optimisers are made anew, or kept until units move."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch.nn import Parameter

from crdtmerge.errors import UsageError
from crdtmerge.train.pool import State
from crdtmerge.train.trainer import TorchTrainer, shuffled
from tests.train.models import network

DATA = [torch.randn(50, 3, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 2]


def adam(parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def trained(keep: bool, rounds: int, forget: bool = False) -> torch.Tensor:
    one = TorchTrainer(network(0), adam, shuffled(DATA, 16, epochs=2), keep=keep)
    state: State = network(1).state_dict()
    for number in range(rounds):
        state = one(state, number)
        if forget:
            one.forget()
    assert one.steps == 8
    return state["0.weight"]


def test_it_is_a_function_of_model_and_round() -> None:
    assert torch.equal(trained(False, 2), trained(False, 2))
    assert torch.equal(trained(False, 1), trained(True, 1))


def test_a_kept_optimiser_goes_on_until_it_is_forgotten() -> None:
    assert not torch.equal(trained(False, 2), trained(True, 2))
    assert torch.equal(trained(False, 2), trained(True, 2, forget=True))


def test_the_model_that_was_given_stays() -> None:
    state = {name: x.clone() for name, x in network(1).state_dict().items()}
    before = {name: x.clone() for name, x in state.items()}
    TorchTrainer(network(0), adam, shuffled(DATA, 16))(state, 0)
    assert all(torch.equal(x, before[name]) for name, x in state.items())


def test_batches_are_those_of_seed_round_and_epoch() -> None:
    def rows(seed: int, number: int) -> list[list[int]]:
        return [batch[0].tolist() for batch in shuffled([torch.arange(7)], 3, epochs=2, seed=seed)(number)]

    assert rows(1, 2) == rows(1, 2)
    assert len({str(rows(seed, number)) for seed in range(3) for number in range(3)}) == 9
    first, second = ([i for batch in half for i in batch] for half in (rows(0, 0)[:3], rows(0, 0)[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_what_is_no_data_is_refused() -> None:
    for data, size in (([torch.zeros(2), torch.zeros(3)], 1), ([], 1), ([torch.zeros(2)], 0)):
        with pytest.raises(UsageError):
            shuffled(data, size)
