"""AdaMerging's coefficients: those that make the merged model sure of itself on unlabelled examples.

    theta(L) = theta_0 + sum_i clamp(L_i^l) tau_i^l        minimise sum_tasks mean_x H(softmax f_theta(L)(x))

Groups: ``base``, ``tau.0``, ..., ``tau.k-1``. A step sees the next ``batch`` examples of every task, in their order.

Source: Yang et al., ICLR 2024, arXiv:2310.02575.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.descent import descend, on_grid


def run(context: Context) -> Result:
    """``coefficients``: for each model the offsets from ``init`` of its layers, in units of the grid."""
    p = context.params
    k, layer = int(p["models"]), {name: int(index) for name, index in p["layer"].items()}
    context.program.known(list(layer), "the merged model")
    start = torch.full((k, max(layer.values(), default=0) + 1), float(p["init"]), dtype=torch.float64)

    def loss(step: int, at: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return entropy(context, merged(context, at["L"]), step)

    found, losses = descend(context, {"L": start.to(context.program.device)}, loss)
    offsets = clamped(context, found["L"]) - float(p["init"])
    return Result({"coefficients": [on_grid(row) for row in offsets], "losses": losses}, {})


def clamped(context: Context, coefficients: torch.Tensor) -> torch.Tensor:
    """Coefficients within their bounds."""
    lower, upper = context.params["clamp"]
    return torch.clamp(coefficients, float(lower), float(upper))


def merged(context: Context, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
    """theta(L), by name."""
    layer = context.params["layer"]
    bounded = clamped(context, coefficients)
    found = {}
    for name, base in context.groups["base"].items():
        theta = base
        for i in range(len(bounded)):
            theta = theta + bounded[i, int(layer[name])].to(base.dtype) * context.groups[f"tau.{i}"][name]
        found[name] = theta
    return found


def entropy(context: Context, theta: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
    """The mean entropy of a model's predictions on a step's examples, summed over the tasks."""
    tensors = context.program.fitted({**context.rest, **theta}, "the merged model")
    total = torch.zeros((), dtype=torch.float64, device=context.program.device)
    for task in sorted(context.data):
        data = context.data[task]
        logits = context.program(tensors, data.cycled(step, min(int(context.params["batch"]), data.size)).inputs)
        log_p = torch.log_softmax(logits.double(), dim=-1)
        total = total - (log_p.exp() * log_p).sum(-1).mean()
    return total
