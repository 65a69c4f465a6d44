"""Representation surgery's adapters: what to take off a merged model's representation so that it is a task's own again.

    Z' = Z - W_up ReLU(W_down Z)        minimise mean |Z' - Z_i| on task i's examples

Z is what goes into the last linear layer, or into the one that ``weight`` names. W_down is Kaiming-uniform, from a
counter-based stream; W_up begins as zeros.

Groups: ``merged``, ``x.0``, ..., ``x.k-1``.

Source: Yang et al., ICML 2024, arXiv:2402.02705.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from crdtmerge.errors import MismatchError
from crdtmerge.numerics import philox
from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.descent import descend
from crdtmerge.programs.exported import Batches


def run(context: Context) -> Result:
    """``surgery.TASK.down`` [rank, width] and ``surgery.TASK.up`` [width, rank], float32."""
    p, program = context.params, context.program
    merged = program.fitted({**context.rest, **context.groups["merged"]}, "the merged model")
    tasks = [str(task) for task in p["tasks"]]
    single = [
        program.fitted({**context.rest, **context.groups[f"x.{i}"]}, f"the model of task {task!a}")
        for i, task in enumerate(tasks)
    ]
    data = [context.of_task(task) for task in tasks]
    start: dict[str, torch.Tensor] = {}
    for task, batches in zip(tasks, data, strict=True):
        width = _features(context, merged, batches.part(0, 1)).shape[1]
        start[f"{task}.down"] = _uniform(bytes.fromhex(p["seed"]), task, int(p["rank"]), width)
        start[f"{task}.up"] = torch.zeros(width, int(p["rank"]), dtype=torch.float64)

    def loss(step: int, at: Mapping[str, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=program.device)
        for i, task in enumerate(tasks):
            batch = data[i].cycled(step, min(int(p["batch"]), data[i].size))
            z, wanted = _features(context, merged, batch), _features(context, single[i], batch)
            cut = torch.relu(z @ at[f"{task}.down"].T) @ at[f"{task}.up"].T
            total = total + (z - cut - wanted).abs().mean()
        return total

    found, losses = descend(context, {name: x.to(program.device) for name, x in start.items()}, loss)
    return Result({"losses": losses}, {f"surgery.{name}": x.float() for name, x in found.items()})


def _features(context: Context, tensors: Mapping[str, torch.Tensor], batch: Batches) -> torch.Tensor:
    """The representation of a batch as float64 rows [rows, width]."""
    with torch.no_grad():
        layers = [layer for layer in context.program.watched(tensors, batch.inputs)[1] if layer.kind == "linear"]
    wanted = context.params.get("weight")
    chosen = [layer for layer in layers if layer.weight == wanted] if wanted else layers
    if not chosen:
        has = ", ".join(ascii(layer.weight) for layer in layers[-5:]) or "none"
        raise MismatchError(
            f"the program has no linear layer{f' with the weight {wanted!a}' if wanted else ''}: {has}."
        )
    z = chosen[-1].input
    return z.reshape(-1, z.shape[-1]).double()


def _uniform(seed: bytes, task: str, rank: int, width: int) -> torch.Tensor:
    """Uniform on [-1, 1) / sqrt(width): Kaiming's bound for a linear layer with the usual slope sqrt(5)."""
    words = philox.words(philox.stream(seed, "surgery", b"", task), 0, rank * width)
    u = (words.double() + 0.5) / 2**31 - 1
    return (u / math.sqrt(width)).reshape(rank, width)
