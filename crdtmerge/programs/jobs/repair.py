"""Repairing what averaging does to a network: its units' means and spreads, or its BatchNorm statistics.

rescale: for each unit of a layer, over every example and position of the probe, z being the layer's output,

    mu = sum_i w_i mean_i(z)    sigma = sum_i w_i std_i(z)          of the aligned endpoint models
    W' = W sigma / std(z)       b' = (b - mean(z)) sigma / std(z) + mu      of the merged model

Layers are repaired in the order in which the program runs them, each on what the repaired ones before it give out; one
run over the probe a layer. These are the linear and convolution layers with a weight and a bias of their own. Left as
they are: layers from which no later layer takes anything (the logits), those that BatchNorm follows, and those whose
weight or bias is used more than once. Where std(z) is at most 10^-6 of |mean(z)| or of sigma, so that a factor would
only raise noise, W stays and the bias alone moves the mean.

reset: BatchNorm's running mean and variance (unbiased) become the mean over the probe's batches, weighted by their
sizes, of what a run in training mode sees, each BatchNorm dividing by its batch's own statistics.

Tensors that are not of the group ``merged`` are left as they are.

Groups: ``merged``; for rescale ``0``, ``1``, ..., the endpoints in the merged model's basis. Parameters: those of
``probes``, kind, and for rescale weights, which sum to 1.

Source: Jordan et al., REPAIR, ICLR 2023, arXiv:2211.08403.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import batch_norm

from crdtmerge.errors import MismatchError, NeedsError, UsageError
from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.exported import Batches, Program, kind_of
from crdtmerge.programs.probes import probe

LAYERS = ("linear", "conv1d", "conv2d", "conv3d")

NOISE = 1e-6
"""A spread that is this much of a unit's mean, or of the spread that it should have, or less, is rounding."""

Tensors = Mapping[str, torch.Tensor]


def run(context: Context) -> Result:
    """``repair``: the changed tensors, float64, by name; {"layers": the names of the weights, or of the means}.

    For rescale {"scales": the factor of each unit's row of a weight} too. Raises UsageError for another kind,
    NeedsError where the program has no such layer.
    """
    kind = context.params["kind"]
    if kind not in ("rescale", "reset"):
        raise UsageError(f"kind = {kind!a}: must be rescale or reset.")
    held = {**context.rest, **context.groups["merged"]}
    merged = context.program.fitted(held, "the merged model")
    return _reset(context, merged) if kind == "reset" else _rescale(context, merged)


class _Layer(NamedTuple):
    """A layer to be repaired: its node, which dimension of its output holds the units, its weight and bias."""

    node: str
    dimension: int
    weight: str
    bias: str


def _rescale(context: Context, merged: Tensors) -> Result:
    program, weights = context.program, [float(w) for w in context.params["weights"]]
    ends = [program.fitted({**context.rest, **context.groups[str(i)]}, f"model {i}") for i in range(len(weights))]
    layers = [x for x in _layers(program) if {x.weight, x.bias} <= set(context.groups["merged"])]
    if not layers:
        raise NeedsError(
            "no merged layer can be rescaled: a linear layer or convolution with a bias, before another layer and not "
            "before BatchNorm. Reset its BatchNorm with kind = reset, or merge without repair."
        )
    parts = probe(context)
    runs = len(ends) + len(layers)
    seen = [_moments(context, end, parts, layers, (i, runs)) for i, end in enumerate(ends)]
    state = {name: x.double() if x.is_floating_point() else x for name, x in merged.items()}
    scales = {}
    for i, layer in enumerate(layers):
        wanted = [[w * x for x in moments[layer.node]] for w, moments in zip(weights, seen, strict=True)]
        mean, spread = (torch.stack(terms).sum(dim=0) for terms in zip(*wanted, strict=True))
        own_mean, own_spread = _moments(context, state, parts, [layer], (len(ends) + i, runs))[layer.node]
        dead = own_spread <= NOISE * torch.maximum(own_mean.abs(), spread)
        scale = torch.where(dead, 1.0, spread / own_spread)
        w = state[layer.weight]
        state[layer.weight] = w * scale.reshape(-1, *[1] * (w.dim() - 1))
        state[layer.bias] = (state[layer.bias] - own_mean) * scale + mean
        scales[layer.weight] = scale.tolist()
    names = [name for layer in layers for name in (layer.weight, layer.bias)]
    return Result({"layers": list(scales), "scales": scales}, {name: state[name] for name in names})


def _layers(program: Program) -> list[_Layer]:
    """The layers that are rescaled, in the order of the calls."""
    nodes = list(program.graph.graph.nodes)
    leads: dict[Any, bool] = {}
    for node in reversed(nodes):
        leads[node] = any(leads[user] or kind_of(user) in LAYERS for user in node.users)
    found = []
    for node in nodes:
        kind = kind_of(node)
        if kind not in LAYERS or not leads[node] or any(kind_of(user) == "batch_norm" for user in node.users):
            continue
        bias_of = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        weight, bias = program.target(node.args[1]), program.target(bias_of)
        if weight and bias and program.alone(weight) and program.alone(bias):
            found.append(_Layer(node.name, -1 if kind == "linear" else -1 - int(kind[4]), weight, bias))
    return found


def _moments(
    context: Context, tensors: Tensors, parts: Sequence[Batches], layers: Sequence[_Layer], done: tuple[int, int]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By node, each unit's mean and standard deviation over the probe. Raises MismatchError where one is not finite.

    ``done``: how many of how many runs over the probe are done.
    """
    at = {layer.node: layer.dimension for layer in layers}
    sums: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def visit(node: Any, value: Any, arguments: tuple[Any, ...]) -> Any:
        if node.name in at:
            z = value.double().movedim(at[node.name], 0).reshape(value.shape[at[node.name]], -1)
            mean = z.mean(dim=1)
            spread = ((z - mean[:, None]) ** 2).sum(dim=1)
            sums[node.name] = _joined(sums.get(node.name), (z.shape[1], mean, spread))
        return value

    with torch.no_grad():
        for i, part in enumerate(parts):
            context.program.visited(tensors, part.inputs, visit, layers[-1].node)
            context.progress(done[0] * len(parts) + i + 1, done[1] * len(parts))
    found = {node: (mean, (spread / count).sqrt()) for node, (count, mean, spread) in sums.items()}
    if not all(bool(torch.isfinite(x).all()) for moments in found.values() for x in moments):
        raise MismatchError(
            "a model gives values on the probe that are not finite; give examples like those that it was trained with."
        )
    return found


def _joined(
    a: tuple[int, torch.Tensor, torch.Tensor] | None, b: tuple[int, torch.Tensor, torch.Tensor]
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Count, mean and sum of squared deviations of two samples together (Chan, Golub and LeVeque)."""
    if a is None:
        return b
    count, step = a[0] + b[0], b[1] - a[1]
    return count, a[1] + step * (b[0] / count), a[2] + b[2] + step * step * (a[0] * b[0] / count)


def _reset(context: Context, merged: Tensors) -> Result:
    program = context.program
    norms = {
        node.name: (mean, variance)
        for node in program.graph.graph.nodes
        if kind_of(node) == "batch_norm"
        and (mean := program.target(node.args[3])) is not None
        and (variance := program.target(node.args[4])) is not None
    }
    if not norms:
        raise NeedsError("the program has no BatchNorm with running statistics to reset; give kind = rescale.")
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    few: list[str] = []

    def visit(node: Any, value: Any, arguments: tuple[Any, ...]) -> Any:
        if node.name not in norms:
            return value
        x, weight, bias, _, _, _, _, epsilon = arguments[:8]
        n = x.numel() // x.shape[1]
        if n < 2:
            few.append(node.name)
            return value
        seen = [torch.zeros_like(x[0]).reshape(x.shape[1], -1)[:, 0].clone() for _ in range(2)]
        out = batch_norm(x, seen[0], seen[1], weight, bias, True, 1.0, epsilon)
        for name, one in zip(norms[node.name], seen, strict=True):
            totals[name] = totals.get(name, 0.0) + n * one.double()
            counts[name] = counts.get(name, 0) + n
        return out

    parts = probe(context)
    with torch.no_grad():
        for i, part in enumerate(parts):
            program.visited(merged, part.inputs, visit)
            context.progress(i + 1, len(parts))
    if few:
        raise NeedsError("a BatchNorm sees one value of each channel in a batch; give two examples or more.")
    changed = {name: x / counts[name] for name, x in totals.items() if name in context.groups["merged"]}
    return Result({"layers": sorted({mean for mean, _ in norms.values()})}, changed)
