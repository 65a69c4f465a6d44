"""AdaRank's masks and coefficients: which singular components of which task vector help, and how much.

    theta = theta_0' + sum_i L_i^l U_i (B_i * S_i) V_i^T        B = [sigmoid(b / T) > 1/2]

Tensors without factors enter as L_i^l tau_i^l. B is a step: forward it is 0 or 1, backward it has the sigmoid's
gradient. What is minimised is the entropy of ``entropy``.

Groups: ``base``, ``tau.i``, and the factors ``u.i``, ``s.i``, ``v.i`` of the matrices.

Source: Lee et al., ICLR 2026, arXiv:2503.22178.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.descent import descend, on_grid
from crdtmerge.programs.jobs.entropy import clamped, entropy


def run(context: Context) -> Result:
    """``coefficients`` as in ``entropy``; ``masks``: for each matrix and model its bits as text of 0 and 1."""
    p = context.params
    k, layer = int(p["models"]), {name: int(index) for name, index in p["layer"].items()}
    context.program.known(list(layer), "the merged model")
    start = {"L": torch.full((k, max(layer.values(), default=0) + 1), float(p["init"]), dtype=torch.float64)}
    for i in range(k):
        for name, s in context.groups[f"s.{i}"].items():
            first = torch.arange(len(s)) < int(p["rank"][name])
            start[f"b/{i}/{name}"] = torch.where(first, float(p["logit"]), -float(p["logit"])).double()

    def loss(step: int, at: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return entropy(context, _merged(context, at), step)

    found, losses = descend(context, {name: x.to(context.program.device) for name, x in start.items()}, loss)
    offsets = clamped(context, found["L"]) - float(p["init"])
    masks = {
        name: ["".join(map(str, (found[f"b/{i}/{name}"] > 0).int().tolist())) for i in range(k)]
        for name in context.groups["s.0"]
    }
    return Result({"coefficients": [on_grid(row) for row in offsets], "masks": masks, "losses": losses}, {})


def _merged(context: Context, at: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    p, groups = context.params, context.groups
    bounded = clamped(context, at["L"])
    found = {}
    for name, base in groups["base"].items():
        theta = base
        for i in range(len(bounded)):
            part = groups[f"tau.{i}"][name]
            if name in groups[f"s.{i}"]:
                soft = torch.sigmoid(at[f"b/{i}/{name}"] / float(p["temperature"]))
                mask = ((soft > 0.5).double() - soft).detach() + soft
                u, s, v = (groups[f"{factor}.{i}"][name] for factor in "usv")
                part = ((u * (mask.to(s.dtype) * s)) @ v.T).reshape(part.shape)
            theta = theta + bounded[i, int(p["layer"][name])].to(base.dtype) * part
        found[name] = theta
    return found
