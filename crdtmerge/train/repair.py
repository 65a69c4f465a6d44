"""A merged module whose activations have the statistics of those that it was merged of, on the peer's own data.

Averaging shrinks the variance of what units give, layer by layer (variance collapse). REPAIR rescales each channel of a
layer's output z so that

    mean(z) = sum_i w_i mean_i(z_i),   std(z) = sum_i w_i std_i(z_i)

with z_i the endpoints' on the same data; batch normalisation, which does that by itself, has its statistics reset.

Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023,
arXiv:2211.08403.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from crdtmerge.errors import UsageError
from crdtmerge.train.pool import State

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Hook = Callable[[str, "Module", "Tensor"], "Tensor | None"]


class Repairer:
    """What mends merged models of a module's architecture: give it to a ``Peer`` as ``repair``.

    All linear and convolution layers with a bias are mended, but the last to run (its output is the model's) and those
    that run more than once. Batch normalisation keeps the exact mean and variance of the inputs given.

    Args:
        module: whose parameters and buffers the models are; its own values are overwritten.
        inputs: all at once; the peer's own, without labels.
    """

    def __init__(self, module: Module, inputs: Tensor) -> None:
        if len(inputs) < 2:
            raise UsageError("a standard deviation is of at least two inputs.")
        self.module, self.inputs = module, inputs

    def __call__(self, model: State, endpoints: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
        """The merged model with the weighted statistics of its endpoints (with the same units in the same places)."""
        import torch

        with torch.no_grad():
            goals = self._goals(endpoints, shares)
            self.module.load_state_dict(model)
            self._run(lambda name, layer, z: self._mended(layer, z, goals[name]) if name in goals else None)
            return {name: x.detach().clone() for name, x in self.module.state_dict().items()}

    def _goals(self, endpoints: Sequence[State], shares: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
        """The weighted mean and standard deviation of each channel, of the layers that are to be mended."""
        import torch

        goals: dict[str, tuple[Tensor, Tensor]] = {}
        for endpoint, share in zip(endpoints, shares, strict=True):
            self.module.load_state_dict(endpoint)
            ran: list[tuple[str, Tensor, Tensor]] = []
            self._run(partial(_recorded, ran))
            names = [name for name, _, _ in ran]
            for name, mean, std in ran[:-1]:
                if names.count(name) == 1:
                    means, stds = goals.get(name, (torch.zeros_like(mean), torch.zeros_like(std)))
                    goals[name] = means + share * mean, stds + share * std
        return goals

    def _mended(self, layer: Module, z: Tensor, goal: tuple[Tensor, Tensor]) -> Tensor:
        """Rescale a layer so that this output has the goal's statistics; the output that it now gives."""
        import torch

        channel = _channel(layer, z)
        mean, std = statistics(z, channel)
        scale = torch.where(std > 0, goal[1] / std, torch.ones_like(std))
        where = [1] * z.dim()
        where[channel] = -1
        weight: Any = layer.weight
        bias: Any = layer.bias
        weight.copy_((weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype))
        bias.copy_(((bias.double() - mean) * scale + goal[0]).to(bias.dtype))
        return (z.double() - mean.reshape(where)).mul(scale.reshape(where)).add(goal[0].reshape(where)).to(z.dtype)

    def _run(self, hook: Hook) -> None:
        with _watched(self.module, hook), _resetting(self.module):
            self.module(self.inputs)


def _recorded(ran: list[tuple[str, Tensor, Tensor]], name: str, layer: Module, z: Tensor) -> None:
    ran.append((name, *statistics(z, _channel(layer, z))))


def statistics(z: Tensor, channel: int) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (over n - 1) of each channel of an output, float64 [channels]."""
    flat = z.double().movedim(channel, 0).flatten(1)
    return flat.mean(1), flat.std(1)


def _channel(layer: Module, z: Tensor) -> int:
    """Which dimension of a layer's output its units are."""
    from torch.nn import Linear

    return z.dim() - 1 if isinstance(layer, Linear) else 1


@contextmanager
def _watched(module: Module, hook: Hook) -> Iterator[None]:
    """A context in which a hook sees the outputs of all linear and convolution layers with a bias."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    removing = [
        layer.register_forward_hook(lambda layer, _, z, name=name: hook(name, layer, z))
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and layer.bias is not None
    ]
    try:
        yield
    finally:
        for one in removing:
            one.remove()


@contextmanager
def _resetting(module: Module) -> Iterator[None]:
    """A context in which the module is in evaluation mode, but batch normalisation takes its statistics anew."""
    from torch.nn.modules.batchnorm import _BatchNorm

    was_training = module.training
    module.eval()
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked for layer in layers]
    kept = [None if count is None else count.clone() for count in counts]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        module.train(was_training)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for count, before in zip(counts, kept, strict=True):
            if count is not None and before is not None:
                count.copy_(before)
