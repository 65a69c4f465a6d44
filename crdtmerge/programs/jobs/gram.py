"""Gram matrices of what goes into each linear and convolution layer.

    G = X^T X / n     X: [n, in], all rows (examples, positions) that the layer saw

They are written under the name of the layer's weight: [in, in] for a linear weight [out, in], and for a convolution's,
whose input is unfolded first, [in * kernel, in * kernel]. Convolutions in groups have no such matrix and are left out.

Source: Jin et al., ICLR 2023, arXiv:2212.09849.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.exported import Batches, Layer

BATCH = 64


def run(context: Context) -> Result:
    """``gram``: float32 matrices, symmetric to the bit."""
    held = context.groups["model"]
    found, counts = grams(context, context.program.fitted(held, "the model"), context.one_task(), context.progress)
    return Result({"rows": counts}, {name: g for name, g in found.items() if name in held})


def grams(
    context: Context,
    tensors: Mapping[str, torch.Tensor],
    data: Batches,
    progress: Callable[[int, int], None],
    only: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The matrices of a model's layers on the data of a task, or of one layer alone, and how many rows each saw."""
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    done = 0
    with torch.no_grad():
        for batch in data.parts(BATCH):
            _, layers = context.program.watched(tensors, batch.inputs)
            for layer in layers:
                x = rows(layer, tensors[layer.weight]) if only in (None, layer.weight) else None
                if x is not None:
                    g = x.T @ x
                    totals[layer.weight] = totals[layer.weight] + g if layer.weight in totals else g
                    counts[layer.weight] = counts.get(layer.weight, 0) + len(x)
            done += batch.size
            progress(done, data.size)
    return {name: ((g + g.T) / (2 * counts[name])).float() for name, g in totals.items()}, counts


def rows(layer: Layer, weight: torch.Tensor) -> torch.Tensor | None:
    """What goes into a layer as float64 rows [n, in], in the order of the flattened weight's columns."""
    x = layer.input.detach().double()
    if layer.kind == "linear":
        return x.reshape(-1, x.shape[-1])
    rank = int(layer.kind[4])
    said = dict(zip(("bias", "stride", "padding", "dilation", "groups"), layer.arguments[1:-1], strict=False))
    said |= layer.arguments[-1]
    if said.get("groups", 1) != 1 or rank == 3:
        return None
    dilation = _each(said.get("dilation", 1), rank)
    kernel = list(weight.shape[2:])
    padding = said.get("padding", 0)
    if padding == "same":
        wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        edges = [side for w in reversed(wide) for side in (w // 2, w - w // 2)]
        x, padding = torch.nn.functional.pad(x, edges), 0
    padding = _each(0 if padding == "valid" else padding, rank)
    stride = _each(said.get("stride", 1), rank)
    if rank == 1:
        x = x.unsqueeze(2)
        kernel, dilation, padding, stride = [1, *kernel], [1, *dilation], [0, *padding], [1, *stride]
    unfolded = torch.nn.functional.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def _each(value: Any, rank: int) -> list[int]:
    """A number for each dimension, where one may stand for all."""
    given = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return given * rank if len(given) == 1 else given
