"""Adam on a few coefficients, in float64, step by step, with a state that can be saved and taken up again.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    x <- x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8)

With ``share`` below 1 only that share of each tensor's elements moves in a step, those of the largest |m| (ties by
lowest position): MoFO, Chen et al. 2024, arXiv:2407.20999.

Source: Kingma and Ba, ICLR 2015, arXiv:1412.6980.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from crdtmerge.errors import InputError
from crdtmerge.programs.context import Context

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 25
"""Steps between two saved states."""

GRID = 4096
"""Learnt coefficients are whole multiples of 1 / GRID, so that the last bits of a machine's arithmetic do not show."""

FLOOR = 1e-12
"""Gradients below are the rounding of a fixed point, which Adam, blind to size, would blow up."""

B1, B2, EPSILON = 0.9, 0.999, 1e-8


def descend(
    context: Context, start: Mapping[str, Tensor], loss: Callable[[int, Mapping[str, Tensor]], Tensor]
) -> tuple[dict[str, Tensor], list[float]]:
    """(the coefficients after ``steps`` steps, the loss at each step of this run). Raises InputError for a NaN."""
    p = context.params
    steps, lr, share = int(p["steps"]), float(p["lr"]), float(p.get("share", 1.0))
    x = {name: one.detach().double().clone() for name, one in start.items()}
    m = {name: torch.zeros_like(one) for name, one in x.items()}
    v = {name: torch.zeros_like(one) for name, one in x.items()}
    begin = 0
    if context.resumed is not None:
        begin, state = context.resumed.step, context.resumed.tensors
        for kind, held in (("x", x), ("m", m), ("v", v)):
            held.update({name: state[f"{kind}/{name}"].to(one.device) for name, one in held.items()})
    losses: list[float] = []
    for step in range(begin, steps):
        leaves = {name: one.clone().requires_grad_() for name, one in x.items()}
        value = loss(step, leaves)
        losses.append(float(value.detach()))
        if losses[-1] != losses[-1]:
            raise InputError(f"the loss is not a number at step {step + 1}: the models or the data give NaN.")
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, g in zip(leaves, gradients, strict=True):
            if g is None:
                continue
            g = torch.where(g.abs() < FLOOR, torch.zeros_like(g), g)
            m[name] = B1 * m[name] + (1 - B1) * g
            v[name] = B2 * v[name] + (1 - B2) * g * g
            rooted = torch.sqrt(v[name] / (1 - B2 ** (step + 1))) + EPSILON
            move = lr * (m[name] / (1 - B1 ** (step + 1))) / rooted
            x[name] = x[name] - (move if share >= 1 else move * _largest(m[name], share))
        context.progress(step + 1, steps)
        if (step + 1) % EVERY == 0 and step + 1 < steps:
            state = {f"{kind}/{name}": t for kind, held in (("x", x), ("m", m), ("v", v)) for name, t in held.items()}
            context.save(step + 1, state)
    return x, losses


def on_grid(x: Tensor) -> list[int]:
    """Numbers as the nearest multiples of 1 / GRID, half to even."""
    found: list[int] = torch.round(x.detach().double() * GRID).to(torch.int64).reshape(-1).tolist()
    return found


def _largest(m: Tensor, share: float) -> Tensor:
    """1 for the largest share of magnitudes, at least one; 0 for the rest."""
    flat = m.abs().reshape(-1)
    order = torch.sort(flat, descending=True, stable=True).indices[: max(1, int(share * flat.numel()))]
    kept = torch.zeros_like(flat)
    kept[order] = 1.0
    return kept.reshape(m.shape)
