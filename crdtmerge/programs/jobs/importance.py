"""How much each parameter matters for a task: |theta| * sum_x |d L(x) / d theta|, example by example.

L is the cross-entropy of an example's label. The same of the base, on the same data, is the statistic
``importance_base``.

Source: LED-Merging, ACL 2025, arXiv:2502.16770; scores as in SNIP, arXiv:1810.02340.
"""

from __future__ import annotations

import torch

from crdtmerge.programs.context import Context, Result, labels_of


def run(context: Context) -> Result:
    """``importance``: float32 tensors with the names and shapes of the model's floating parameters."""
    program, data = context.program, context.one_task()
    labels = labels_of(data)
    tensors = program.fitted(context.groups["model"], "the model")
    names = [name for name in program.parameters if tensors[name].is_floating_point()]
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
    total = {name: torch.zeros_like(leaves[name], dtype=torch.float64) for name in names}
    for number in range(data.size):
        logits = program(tensors | leaves, data.part(number, number + 1).inputs).double()
        loss = torch.nn.functional.cross_entropy(logits.reshape(1, -1), labels[number : number + 1])
        found = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                total[name] += gradient.double().abs()
        context.progress(number + 1, data.size)
    held = context.groups["model"]
    scores = {name: (leaves[name].detach().double().abs() * x).float() for name, x in total.items() if name in held}
    return Result({}, scores)
