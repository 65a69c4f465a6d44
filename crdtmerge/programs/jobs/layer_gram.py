"""Gram matrices of what goes into one layer of a model that is merged layer by layer, a matrix for each task.

    G_t = X_t^T X_t / n_t     X_t: [n_t, in], what the layer sees on the data of task t

Without ``weight`` it answers which layers there are, in the order in which the program first runs them. A layer that
runs more than once sees all that goes into it. The group ``model`` is the model merged so far.

Source: Nguyen et al., TMLR 2026, arXiv:2508.03121.
"""

from __future__ import annotations

import torch

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.jobs.gram import BATCH, grams, rows


def run(context: Context) -> Result:
    """``order``: names of weights; or float32 matrices called "0", "1", ..., one for each of ``tasks``."""
    p, program, held = context.params, context.program, context.groups["model"]
    tensors = program.fitted({**context.rest, **held}, "the merged model")
    data = [context.of_task(task) if task is not None else context.one_task() for task in p["tasks"]]
    if p["weight"] is None:
        with torch.no_grad():
            _, layers = program.watched(tensors, data[0].part(0, BATCH).inputs)
        order = dict.fromkeys(layer.weight for layer in layers if rows(layer, tensors[layer.weight]) is not None)
        return Result({"order": [name for name in order if name in held]}, {})
    before, total = (int(count) for count in p["done"])
    size = sum(one.size for one in data)
    found: dict[str, torch.Tensor] = {}
    done = before * size
    for at, one in enumerate(data):

        def progress(now: int, _: int, start: int = done) -> None:
            context.progress(start + now, total * size)

        found[str(at)] = grams(context, tensors, one, progress, p["weight"])[0][p["weight"]]
        done += one.size
    return Result({}, found)
