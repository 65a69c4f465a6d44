"""DAM's coefficients: a number for every input column of every model's matrices, learnt so that the merged model gives
out on each model's data what that model does.

    theta = sum_i theta_i diag(c_i)
    loss  = sum_i T^2 KL(softmax(z_i(x_i) / T) || softmax(z(x_i) / T)) + lambda_cos * mean cos(c_i, c_j)

Groups: ``x.0``, ..., ``x.k-1``. The cosine is of each tensor's coefficients, its mean over tensors and pairs.

Source: Gauthier-Caron et al., arXiv:2410.08371.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.descent import descend, on_grid
from crdtmerge.programs.exported import Batches


def run(context: Context) -> Result:
    """``offsets``: for each tensor and model the offsets of its columns from the model's share, in grid units."""
    p, program = context.params, context.program
    shares = [float(share) for share in p["shares"]]
    k, columns = len(shares), {name: int(count) for name, count in p["columns"].items()}
    program.known(list(columns), "the merged model")
    data = [context.of_task(task) if task is not None else context.one_task() for task in p["tasks"]]
    start = {f"{i}/{name}": torch.zeros(n, dtype=torch.float64) for name, n in columns.items() for i in range(k)}
    teachers = [program.fitted({**context.rest, **context.groups[f"x.{i}"]}, "a model") for i in range(k)]

    def loss(step: int, d: Mapping[str, torch.Tensor]) -> torch.Tensor:
        c = {name: [d[f"{i}/{name}"] + shares[i] for i in range(k)] for name in columns}
        tensors = program.fitted({**context.rest, **_merged(context, c)}, "the merged model")
        total = float(p["lambda_cos"]) * _likeness(c, k)
        for i in range(k):
            batch = data[i].cycled(step, min(int(p["batch"]), data[i].size))
            total = total + _distance(context, teachers[i], tensors, batch)
        return total

    found, losses = descend(context, {name: x.to(program.device) for name, x in start.items()}, loss)
    offsets = {name: [on_grid(found[f"{i}/{name}"]) for i in range(k)] for name in columns}
    return Result({"offsets": offsets, "losses": losses}, {})


def _merged(context: Context, c: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = {}
    for name, each in c.items():
        models = [context.groups[f"x.{i}"][name] for i in range(len(each))]
        found[name] = sum(
            (x * spread(one, x).to(x.dtype) for x, one in zip(models[1:], each[1:], strict=True)),
            models[0] * spread(each[0], models[0]).to(models[0].dtype),
        )
    return found


def spread(c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Coefficients in a shape that multiplies a tensor: along dimension 1 of matrices, else elementwise or one."""
    if x.dim() < 2:
        return c.reshape(()) if x.dim() == 0 else c
    return c.reshape(1, -1, *[1] * (x.dim() - 2))


def _distance(
    context: Context, teacher: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], batch: Batches
) -> torch.Tensor:
    """T^2 KL of the teacher's and the merged model's predictions, mean over the examples."""
    t = float(context.params["temperature"])
    with torch.no_grad():
        wanted = torch.log_softmax(context.program(teacher, batch.inputs).double() / t, dim=-1)
    log_p = torch.log_softmax(context.program(tensors, batch.inputs).double() / t, dim=-1)
    return t * t * (wanted.exp() * (wanted - log_p)).sum(-1).mean()


def _likeness(c: Mapping[str, list[torch.Tensor]], k: int) -> torch.Tensor:
    """The mean cosine of pairs of models' coefficients; zero vectors have none."""
    pairs = [(i, j) for i in range(k) for j in range(i)]
    cosines = [
        (each[i] * each[j]).sum() / torch.sqrt((each[i] ** 2).sum() * (each[j] ** 2).sum() + 1e-30)
        for each in c.values()
        for i, j in pairs
        if each[i].numel()
    ]
    return torch.stack(cosines).mean() if cosines else torch.zeros((), dtype=torch.float64)
