"""What agents train apart from each other: shares of the handwritten digits, and networks with starts of their own.

1,797 images of 8 x 8 pixels, ten classes, bundled with scikit-learn; 450 of them, as many of each class as there are in
all, are kept for testing. Pixels are shifted and scaled to mean 0 and standard deviation 1 over the training set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import UsageError
from crdtmerge.testing.digits import CLASSES, PIXELS, Digits

TESTED = 450
SMALLEST = 20
"""Images that an agent has at least, where shares are drawn."""


def load(seed: int) -> Digits:
    """The digits, split by a seed. Raises UsageError if scikit-learn is not installed."""
    import torch

    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UsageError("the digits need scikit-learn: pip install 'crdtmerge[demo]'.") from None
    found = load_digits()
    x, tx, y, ty = train_test_split(
        found.data / 16.0, found.target, test_size=TESTED, stratify=found.target, random_state=1234 + seed
    )
    mean, deviation = x.mean(), x.std()

    def pixels(images: NDArray[np.float64]) -> Any:
        return torch.from_numpy(((images - mean) / deviation).astype(np.float32))

    return Digits(pixels(x), torch.from_numpy(y).long(), pixels(tx), torch.from_numpy(ty).long())


def alike(labels: NDArray[np.int64], agents: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Shares in which classes are as frequent as in all: the indices of each agent's images."""
    return _dealt(labels, agents, rng, lambda images: np.array_split(images, agents))


def unlike(
    labels: NDArray[np.int64], agents: int, rng: np.random.Generator, alpha: float = 0.5
) -> list[NDArray[np.int64]]:
    """Shares of each class drawn from a Dirichlet distribution; drawn again until nobody has fewer than 20 images."""

    def cut(images: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        ends = (np.cumsum(rng.dirichlet([alpha] * agents))[:-1] * len(images)).astype(int)
        return np.split(images, ends)

    while True:
        found = _dealt(labels, agents, rng, cut)
        if min(map(len, found)) >= SMALLEST:
            return found


def apart(labels: NDArray[np.int64], agents: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Shares without a class in common: class c is agent c mod n's."""
    return [np.flatnonzero(labels % agents == agent) for agent in range(agents)]


def _dealt(
    labels: NDArray[np.int64],
    agents: int,
    rng: np.random.Generator,
    cut: Callable[[NDArray[np.int64]], list[NDArray[np.int64]]],
) -> list[NDArray[np.int64]]:
    hands: list[list[NDArray[np.int64]]] = [[] for _ in range(agents)]
    for label in range(CLASSES):
        for hand, part in zip(hands, cut(rng.permutation(np.flatnonzero(labels == label))), strict=True):
            hand.append(part)
    return [np.sort(np.concatenate(hand)) for hand in hands]


def perceptron(width: int, seed: int) -> Any:
    """64 - width - width - 10 units with ReLU, from a start of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(wide, narrow) for wide, narrow in pairwise((PIXELS, width, width, CLASSES))]
    for layer in layers:
        bound = math.sqrt(3 / layer.in_features)
        torch.nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])


def convolutions(seed: int, channels: int = 16) -> Any:
    """Two 3 x 3 convolutions with batch normalisation and ReLU, pooling, a linear layer; images come as 64 pixels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    first = torch.nn.Conv2d(1, channels, 3, padding=1, bias=False)
    second = torch.nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
    last = torch.nn.Linear(2 * channels * 4, CLASSES)
    for layer in (first, second, last):
        torch.nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        first,
        torch.nn.BatchNorm2d(channels),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        second,
        torch.nn.BatchNorm2d(2 * channels),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        last,
    )
