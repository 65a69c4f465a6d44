"""Strategies that merge a model layer by layer, each on what the merged layers before it give out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from crdtmerge.errors import MismatchError, NeedsError, ParameterError
from crdtmerge.numerics.lazy import torch
from crdtmerge.strategies.inside import INPUTS
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.statistics import RegressionMean, RegressionParameters

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_BYTES = 4
"""An entry of a Gram matrix in a plan."""

_REGRESSION = RegressionMean()


class RegMeanPlusPlus(Strategy[RegressionParameters]):
    """RegMean++: RegMean whose Gram matrices are of what the merged layers before a layer give out.

        G_i  = X_i^T X_i / n_i,  X_i what goes into layer l on the data of task i, the layers before l being merged
        G_i <- alpha G_i + (1 - alpha) diag(G_i)
        W^T  = (sum_i a_i G_i)^-1 sum_i a_i G_i W_i^T,  a_i = w_i / sum_j w_j

    Layers are merged in the order in which the program first runs them; all other tensors (bias, norm, embedding), and
    layers that are not merged yet, are the weighted mean. A weight that the program uses more than once has one Gram
    matrix of all that goes into it, its own later inputs made with its mean. Layers are those that the statistic
    ``gram`` has: linear ones, and convolutions without groups. The data of model i is that of the task claimed for it,
    or all data where no task is claimed. In the paper a layer is a transformer's block, run inside with the weights of
    model i; an exported program does not say what a block is, and each weight is a layer here.

    The solution, its ridge and its inputs that are never active are those of regression_mean: with Gram matrices that
    are equal the bytes are. The plan holds them, float32, little-endian: 4 k in^2 bytes for a layer of ``in`` inputs
    and k models, ``in`` being channels times the kernel's size for a convolution; with the plan the same bytes are made
    on every machine. As a file a plan holds at most 256 MiB of them. The program is run once a layer on all data; its
    parameters are the merged ones before they are rounded to the output's dtype.

    Needs the inputs ``program`` and ``data`` (TASK.inputs). Raises NeedsError where the program runs no such layer,
    ParameterError for layout=in_out and a tensor that has a Gram matrix: the program's layers are [out, in].

    Properties: commutative; idempotent; not associative.
    """

    name, version, family = "regmean_plus_plus", 1, "layerwise"
    reference = "Nguyen et al., TMLR 2026, arXiv:2508.03121"
    Params = RegressionParameters

    def needs(self, p: RegressionParameters) -> Needs:
        return Needs(base="unused", inputs=INPUTS, unit="tensor", plan="model", compute="double")

    def plan(self, view: View, p: Callable[[str], RegressionParameters], rng: Rng) -> Plan:
        _REGRESSION.plan(view, p, rng)
        if not view.names:
            return EMPTY

        def mean(u: Unit) -> dict[str, Tensor]:
            return {"model": _merged(u, None, p(u.name), rng).reshape(u.shape).cpu()}

        first = {"weight": None, "tasks": _tasks(view, view.names[0])[:1]}
        order = view.run("layer_gram", first, mean, rng).values["order"]
        if not order or not set(order) <= set(view.names):
            raise NeedsError(
                f"strategy '{self.name}' merges linear and convolution layers by what goes into them; the program has "
                "none whose weight is merged. Export one from a module of such layers, with the checkpoint's names."
            )
        grams: dict[str, list[bytes]] = {}
        since: dict[str, Tensor] = {}
        for at, name in enumerate(order):
            tasks = _tasks(view, name)
            distinct = list(dict.fromkeys(tasks))
            params = {"weight": name, "tasks": distinct, "done": [at, len(order)]}
            found = view.run("layer_gram", params, {"model": since}, rng).tensors
            frozen = [found[str(i)].numpy().astype("<f4").tobytes() for i in range(len(distinct))]
            grams[name] = [frozen[distinct.index(task)] for task in tasks]
            u = view.whole(name)
            since = {name: _merged(u, grams[name], p(name), rng).reshape(u.shape).cpu()}
        return Plan({"gram": grams})

    def apply(self, u: Unit, plan: Plan, p: RegressionParameters, rng: Rng) -> Tensor:
        return _merged(u, plan["gram"].get(u.name), p, rng)


def _tasks(view: View, name: str) -> list[str | None]:
    """The tasks claimed for those that have a tensor."""
    return [m.task for m in view.meta(name)]


def _merged(u: Unit, grams: Sequence[bytes] | None, p: RegressionParameters, rng: Rng) -> Tensor:
    """regression_mean with these Gram matrices; without them, the weighted mean. Raises MismatchError."""
    if grams is None:
        return _REGRESSION.apply(u, EMPTY, p, rng)
    if p.layout == "in_out":
        raise ParameterError(
            f"tensor {u.name!a}: it is a layer of the program, whose weights are [out, in]; leave layout as it is, or "
            "let a filter give in_out to other tensors alone."
        )
    if len(grams) != len(u.xs) or any(len(g) % FLOAT_BYTES for g in grams):
        raise MismatchError(f"tensor {u.name!a}: the plan's Gram matrices are not one for each of {len(u.xs)} models.")
    stats = tuple(torch.from_numpy(np.frombuffer(g, "<f4").astype(np.float64)) for g in grams)
    return _REGRESSION.apply(replace(u, stats={"gram": stats}), EMPTY, p, rng)


STRATEGIES = (RegMeanPlusPlus,)
