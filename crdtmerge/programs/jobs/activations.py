"""What each linear layer gives out for every row of the data, under the name of its weight: [rows, units]."""

from __future__ import annotations

import torch

from crdtmerge.programs.context import Context, Result

BATCH = 64


def run(context: Context) -> Result:
    """``activations``: float32, outputs of linear layers before whatever follows them; convolutions by position."""
    program, data = context.program, context.one_task()
    tensors = program.fitted(context.groups["model"], "the model")
    found: dict[str, list[torch.Tensor]] = {}
    done = 0
    with torch.no_grad():
        for batch in data.parts(BATCH):
            for layer in program.watched(tensors, batch.inputs)[1]:
                out = layer.output if layer.kind == "linear" else layer.output.movedim(1, -1)
                found.setdefault(layer.weight, []).append(out.reshape(-1, out.shape[-1]).float())
            done += batch.size
            context.progress(done, data.size)
    return Result({}, {name: torch.cat(parts) for name, parts in found.items() if name in context.groups["model"]})
