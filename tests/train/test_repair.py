"""A repaired module's channels have the weighted statistics of those that it was merged of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crdtmerge.errors import UsageError
from crdtmerge.train.pool import State
from crdtmerge.train.repair import Repairer, statistics
from crdtmerge.train.rounds import mean

SHARES = [0.25, 0.75]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


def convolutions() -> nn.Sequential:
    normal = nn.BatchNorm2d(7)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, bias=False), normal, nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)
    )


CASES = {
    "perceptron": (perceptron, (50, 6), {"0": 1, "2": 1}),
    "sequences": (perceptron, (10, 5, 6), {"0": 2, "2": 2}),
    "convolutions": (convolutions, (20, 2, 6, 6), {"0": 1}),
}


def outputs(module: nn.Module, state: State, inputs: Tensor) -> dict[str, Tensor]:
    """What each layer gives."""
    module.load_state_dict(state)
    found: dict[str, Tensor] = {}
    for name, layer in module.named_children():
        layer.register_forward_hook(lambda _, __, z, name=name: found.__setitem__(name, z.detach()))
    with torch.no_grad():
        module(inputs)
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_has_the_statistics_that_it_should(case: str) -> None:
    make, shape, mended = CASES[case]
    torch.manual_seed(3)
    inputs = torch.randn(*shape)
    ends = [make().state_dict() for _ in SHARES]
    merged = {**ends[0], **mean(ends)}
    repaired = Repairer(make(), inputs)(merged, ends, SHARES)
    sides = [outputs(make().train(), end, inputs) for end in ends]
    result, before = outputs(make().eval(), repaired, inputs), outputs(make().eval(), merged, inputs)
    for name, channel in mended.items():
        for which in (0, 1):
            goal = sum(w * statistics(side[name], channel)[which] for w, side in zip(SHARES, sides, strict=True))
            assert torch.allclose(statistics(result[name], channel)[which], torch.as_tensor(goal), atol=1e-5)
            assert not torch.allclose(statistics(before[name], channel)[which], torch.as_tensor(goal), atol=1e-2)
    last = max(k for k in merged if k.endswith("weight"))
    assert torch.equal(repaired[last], merged[last]), "the output layer is left alone"
    if case == "convolutions":
        batch_mean, batch_std = statistics(result["2"], 1)
        assert torch.allclose(repaired["3.running_mean"].double(), batch_mean, atol=1e-6)
        assert torch.allclose(repaired["3.running_var"].double(), batch_std**2, atol=1e-5)
        assert repaired["3.num_batches_tracked"] == merged["3.num_batches_tracked"]


def test_one_endpoint_is_left_as_it_is() -> None:
    torch.manual_seed(1)
    module, inputs = perceptron(), torch.randn(40, 6)
    state = {name: x.clone() for name, x in module.state_dict().items()}
    repaired = Repairer(module, inputs)(state, [state], [1.0])
    assert all(torch.allclose(repaired[name], x, atol=1e-6) for name, x in state.items())


def test_dead_units_stay_finite_and_the_module_as_it_was() -> None:
    torch.manual_seed(1)
    module, inputs = perceptron().train(), torch.randn(40, 6)
    state = {name: x.clone() for name, x in module.state_dict().items()}
    dead = {**state, "0.weight": torch.zeros(12, 6), "0.bias": torch.ones(12)}
    repaired = Repairer(module, inputs)(dead, [state, dead], [0.5, 0.5])
    assert all(x.isfinite().all() for x in repaired.values())
    assert module.training
    assert not any(layer._forward_hooks for layer in module)


def test_a_layer_that_runs_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(torch.relu(self.one(torch.relu(self.one(x)))))
            return found

    torch.manual_seed(1)
    ends = [Twice().state_dict() for _ in SHARES]
    merged = mean(ends)
    repaired = Repairer(Twice(), torch.randn(30, 4))(merged, ends, SHARES)
    assert all(torch.equal(repaired[name], x) for name, x in merged.items())


def test_one_input_has_no_deviation() -> None:
    with pytest.raises(UsageError):
        Repairer(perceptron(), torch.zeros(1, 6))
