"""Small networks trained on scikit-learn's bundled handwritten digits: real images, seconds to train, no download.

1,797 images of 8 x 8 pixels, ten classes. A third is kept for testing. Each fine-tune sees all images of some classes
and few of the others, so that each knows something the others do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

PIXELS, HIDDEN, CLASSES = 64, 64, 10
StateDict = dict[str, Any]


@dataclass(frozen=True)
class Digits:
    """Images as float32 [n, 64] in 0..1 and labels as int64 [n], to train and to test on."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """The data, always split the same way. Raises UsageError if scikit-learn is not installed."""
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the digits need scikit-learn: pip install 'crdtmerge[demo]'.") from None
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = torch.from_numpy((found.data[order] / 16.0).astype(np.float32))
    y = torch.from_numpy(found.target[order].astype(np.int64))
    test = len(y) // 3
    return Digits(x[test:], y[test:], x[:test], y[:test])


def network() -> Any:
    """A perceptron with two hidden layers of 64 units, with the same start every time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    widths = (PIXELS, HIDDEN, HIDDEN, CLASSES)
    layers = [torch.nn.Linear(wide, narrow) for wide, narrow in pairwise(widths)]
    for layer in layers:
        torch.nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])


def mix(digits: Digits, favoured: range, share_of_others: float, seed: int) -> NDArray[np.int64]:
    """Indices of the training images that a fine-tune sees: all of the favoured classes, a share of the others."""
    labels = digits.train_y.numpy()
    lucky = np.random.default_rng(seed).random(len(labels)) < share_of_others
    return np.flatnonzero(np.isin(labels, list(favoured)) | lucky)


def train(start: StateDict | None, x: Tensor, y: Tensor, *, epochs: int, seed: int, rate: float = 0.05) -> StateDict:
    """Train from a start (or from scratch) by gradient descent with momentum, 64 images a step; the state dict."""
    import torch

    model = network()
    if start is not None:
        model.load_state_dict(start)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=shuffle)
        for at in range(0, len(y), 64):
            batch = order[at : at + 64]
            optimiser.zero_grad()
            loss: Any = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimiser.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def accuracy(state: StateDict, x: Tensor, y: Tensor) -> float:
    """The share of images that a network names rightly."""
    import torch

    model = network()
    model.load_state_dict(state)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


FAVOURED = (range(4), range(3, 7), range(6, 10))
"""The classes of each of the three fine-tunes."""


def family(digits: Digits) -> tuple[StateDict, list[StateDict]]:
    """A base trained on 200 images, and three fine-tunes of it on different mixes of classes."""
    base = train(None, digits.train_x[:200], digits.train_y[:200], epochs=8, seed=1)
    tuned = []
    for seed, favoured in enumerate(FAVOURED):
        seen = mix(digits, favoured, 0.1, seed)
        tuned.append(train(base, digits.train_x[seen], digits.train_y[seen], epochs=10, seed=seed, rate=0.02))
    return base, tuned
