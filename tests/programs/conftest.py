"""Exported programs, made once: exporting one takes a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.exported import Program, batches
from crdtmerge.programs.jobs import job
from crdtmerge.testing.programs import export

torch.set_num_threads(1)

Job = Callable[..., Result]


class Loaded:
    """A program in this very process, and jobs run on it."""

    def __init__(self, module: torch.nn.Module, example: Sequence[torch.Tensor], path: Path) -> None:
        self.path, self.digest = path, export(module, example, path)
        self.program = Program(str(path), self.digest.hex())
        self.state = {name: x.detach().clone() for name, x in module.state_dict().items()}
        self.module = module

    def context(
        self,
        data: Mapping[str, torch.Tensor],
        groups: Mapping[str, Mapping[str, torch.Tensor]],
        params: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> Context:
        """What a job is given."""
        return Context(self.program, batches(data, self.program), groups, params or {}, **how)

    def run(self, name: str, data: Mapping[str, torch.Tensor], *rest: Any, **how: Any) -> Result:
        """Run a job here."""
        return job(name)(self.context(data, *rest, **how))


class Classifier(torch.nn.Module):
    """Logistic regression: the parameters ``linear.weight`` and ``linear.bias``."""

    def __init__(self, inputs: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x)
        return logits


class Network(torch.nn.Module):
    """A convolution, normalisation, two layers with one weight, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(3)
        self.one = torch.nn.Linear(3, 3)
        self.two = torch.nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.head = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        logits: torch.Tensor = self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return logits


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.manual_seed(1)
    return Loaded(Classifier(), [torch.zeros(2, 4)], tmp_path_factory.mktemp("classifier") / "model.pt2")


@pytest.fixture(scope="session")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.manual_seed(2)
    return Loaded(Classifier(2, 70), [torch.zeros(2, 2)], tmp_path_factory.mktemp("classes") / "model.pt2")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.manual_seed(3)
    return Loaded(Network(), [torch.zeros(2, 2, 5, 5)], tmp_path_factory.mktemp("network") / "model.pt2")


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A two-layer network in double precision, for finite differences."""
    torch.manual_seed(4)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    example = [torch.zeros(2, 3, dtype=torch.float64)]
    return Loaded(module, example, tmp_path_factory.mktemp("deep") / "model.pt2")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def around(state: Mapping[str, torch.Tensor], seed: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """A model fine-tuned, so to say, from another."""
    return {
        name: x + scale * normal(seed + at, *x.shape, dtype=x.dtype) if x.is_floating_point() else x.clone()
        for at, (name, x) in enumerate(sorted(state.items()))
    }
