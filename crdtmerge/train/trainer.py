"""Local training: any function of a state dict, or a torch module with an optimiser and batches.

Batches are a function of the round's number, so that a round that is repeated, or taken up after a stop, sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crdtmerge.canonical import digest
from crdtmerge.errors import UsageError
from crdtmerge.train.pool import State

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

Batch = Sequence["Tensor"]
Batches = Callable[[int], Iterable[Batch]]
"""The number of a round -> its batches, in order."""


class Trainer:
    """What a peer trains with: called with a model and the round's number, it gives the trained model.

    ``examples`` is what it trains on, ``steps`` what the last round took.
    """

    examples: int = 1
    steps: int = 0

    def __call__(self, model: State, number: int) -> Mapping[str, Tensor]:
        """The trained model."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what is remembered of a model whose units are in another order now."""


class Function(Trainer):
    """Any function of a state dict."""

    def __init__(self, function: Callable[[State], Mapping[str, Tensor]], examples: int = 1) -> None:
        self.function, self.examples = function, examples

    def __call__(self, model: State, number: int) -> Mapping[str, Tensor]:
        """What the function gives."""
        return self.function(model)


Training = Trainer | Callable[[State], Mapping[str, "Tensor"]]


def trainer(train: Training) -> Trainer:
    """A trainer of what is one, or of a function."""
    return train if isinstance(train, Trainer) else Function(train)


class TorchTrainer(Trainer):
    """A torch module, the loss of a batch, an optimiser made anew for each round, and batches.

    Args:
        module: whose parameters and buffers the model is; it is in training mode while it is trained.
        optimiser: makes one of the module's parameters.
        batches: those of a round; ``shuffled`` makes them.
        loss: of the module and a batch; cross entropy of inputs and labels by default.
        examples: how many the peer has, for weights by examples.
        keep: whether the optimiser's state is kept from round to round instead (it is dropped after units were
            reordered all the same).
    """

    def __init__(
        self,
        module: Module,
        optimiser: Callable[[Iterable[Parameter]], Optimizer],
        batches: Batches,
        *,
        loss: Callable[[Module, Batch], Tensor] | None = None,
        examples: int = 1,
        keep: bool = False,
    ) -> None:
        self.module, self.batches, self.loss = module, batches, loss or cross_entropy
        self.examples, self.keep = examples, keep
        self._make = optimiser
        self._optimiser: Optimizer | None = None

    def forget(self) -> None:
        """Begin with a new optimiser."""
        self._optimiser = None

    def __call__(self, model: State, number: int) -> dict[str, Tensor]:
        """Train from a model on the batches of a round; a copy of what came out."""
        self.begin(model)
        for batch in self.batches(number):
            self.differentiate(batch)
            self.step()
        return {name: x.detach().clone() for name, x in self.module.state_dict().items()}

    def begin(self, model: State) -> None:
        """Start a round from a model."""
        self.module.load_state_dict(model)
        self.module.train()
        if self._optimiser is None or not self.keep:
            self._optimiser = self._make(self.module.parameters())
        self.steps = 0

    def differentiate(self, batch: Batch) -> None:
        """Compute the gradients of a batch."""
        self.module.zero_grad(set_to_none=True)
        found: Any = self.loss(self.module, batch)
        found.backward()

    def step(self) -> None:
        """Move against the gradients."""
        assert self._optimiser is not None, "a round was begun"
        self._optimiser.step()
        self.steps += 1


def cross_entropy(module: Module, batch: Batch) -> Tensor:
    """The mean cross entropy of a batch of inputs and labels."""
    from torch.nn.functional import cross_entropy

    inputs, labels = batch
    return cross_entropy(module(inputs), labels)


def shuffled(data: Sequence[Tensor], size: int, *, epochs: int = 1, seed: int = 0) -> Batches:
    """Batches of ``size`` rows of tensors of equal length, in an order drawn from (seed, round, epoch).

    Raises UsageError for tensors of other lengths or none.

    >>> import torch
    >>> rows = shuffled([torch.arange(5)], 2, seed=1)
    >>> [len(batch[0]) for batch in rows(0)], sorted(torch.cat([batch[0] for batch in rows(0)]).tolist())
    ([2, 2, 1], [0, 1, 2, 3, 4])
    """
    lengths = {len(x) for x in data}
    if len(lengths) != 1 or size < 1 or epochs < 0:
        raise UsageError("batches are made of tensors of one length, of at least one row each.")
    count = lengths.pop()

    def batches(number: int) -> Iterator[Batch]:
        import torch

        for epoch in range(epochs):
            name = digest("batches", [seed, number, epoch])
            order = torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(name[:7], "little")))
            for at in range(0, count, size):
                yield [x[order[at : at + size]] for x in data]

    return batches
