"""The diagonal of the Fisher information of each parameter, example by example.

    F = (1/n) sum_x sum_y p(y|x) (d log p(y|x) / d theta)^2

The expectation over labels is exact where the model has at most 64 classes; with more, ``samples`` labels are drawn
from p(y|x) for each example. Gradients are squared one example at a time: that of a batch is another thing.

Source: Matena and Raffel, NeurIPS 2022, arXiv:2111.09832.
"""

from __future__ import annotations

import torch

from crdtmerge.numerics import philox
from crdtmerge.programs.context import Context, Result

CLASSES_EXACT = 64


def run(context: Context) -> Result:
    """``fisher``: float32 tensors with the names and shapes of the model's floating parameters."""
    program, data = context.program, context.one_task()
    tensors = program.fitted(context.groups["model"], "the model")
    names = [name for name in program.parameters if tensors[name].is_floating_point()]
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    total = {name: torch.zeros_like(leaves[name], dtype=torch.float64) for name in names}
    samples = int(context.params.get("samples", 1))
    draws = philox.stream(b"fisher", "label", b"", "")
    for number in range(data.size):
        example = data.part(number, number + 1)
        logits = program(tensors | leaves, example.inputs).double()
        log_p = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), dim=1)
        for row in range(len(log_p)):
            at = (number * len(log_p) + row) * samples
            for label, weight in _labels(log_p[row].detach().exp(), samples, draws, at):
                found = torch.autograd.grad(
                    log_p[row, label], [leaves[name] for name in names], retain_graph=True, allow_unused=True
                )
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        total[name] += weight * gradient.double() ** 2
        context.progress(number + 1, data.size)
    held = context.groups["model"]
    return Result({}, {name: (x / data.size).float() for name, x in total.items() if name in held})


def _labels(p: torch.Tensor, samples: int, draws: philox.Stream, at: int) -> list[tuple[int, float]]:
    """(label, weight): all labels with their probabilities, or drawn ones by inverting the distribution function."""
    if len(p) <= CLASSES_EXACT:
        return list(enumerate(p.tolist()))
    u = philox.words(draws, at, at + samples).double() / 2**32
    drawn = torch.searchsorted(torch.cumsum(p, 0).cpu(), u).clamp(max=len(p) - 1)
    return [(label, 1 / samples) for label in drawn.tolist()]
