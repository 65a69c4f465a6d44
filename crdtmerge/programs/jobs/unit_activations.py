"""What the units of each group of a program's symmetry give out, as rows that correlate by a product.

    a_u = (x_u - mean x_u) / ||x_u - mean x_u||      A_i A_j^T = correlations of model i's units with model j's

x_u holds the values of unit u wherever a layer consumes the group's values, after the nonlinearity (or, of a group that
none consumes, wherever they are computed): at every example, position and other factor of the same value (a unit that
is a head has the head's width of them). Of each place about ``COLUMNS`` / places values are taken, spread evenly by
multiples of the golden ratio, the same for all models. Each place is standardised by itself and they are put side by
side over the square root of their number: correlations are means over the places where a unit is alive. A unit that is
constant (its spread at most 10^-6 of its size: rounding) is all zeros.

Groups: ``0``, ``1``, ..., the models. Parameters: those of ``probes``.

Source: Li et al., ICLR 2016, arXiv:1511.07543; Ainsworth et al., ICLR 2023, arXiv:2209.04836.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from crdtmerge.errors import MismatchError
from crdtmerge.programs.context import Context, Result
from crdtmerge.programs.exported import Batches, kind_of
from crdtmerge.programs.probes import MOVING, probe
from crdtmerge.symmetry.derive import Carrier, derived

COLUMNS = 4096
"""Values of a unit, over all places."""

CONSTANT = 1e-6
"""A spread that is this much of a unit's size, or less, is rounding."""

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 0xFFFFFFFFFFFFFFFF
"""(sqrt(5) - 1) / 2 in units of 2^-64."""


def run(context: Context) -> Result:
    """``unit_activations``: ``MODEL.GROUP`` float64 [size, samples]; {"groups": the symmetry's one text}."""
    found = derived(context.program.exported)
    moving = {node.name for node in context.program.graph.graph.nodes if kind_of(node) in MOVING}
    groups = [_places(group, moving) for group in found.carriers]
    parts = probe(context)
    examples = sum(part.size for part in parts)
    rows = {}
    done = 0
    for model, held in sorted(context.groups.items()):
        tensors = context.program.fitted({**context.rest, **held}, f"model {model}")
        shown: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        for part in parts:
            _look(context, tensors, part, part.size / examples, groups, shown)
            done += part.size
            context.progress(done, len(context.groups) * examples)
        for index, group in enumerate(found.symmetry.groups):
            places = [torch.cat(shown[index, at], dim=1) for at in range(len(groups[index]))]
            rows[f"{model}.{index}"] = standardised(places, group.size)
    broken = next((name for name, x in rows.items() if not bool(torch.isfinite(x).all())), None)
    if broken is not None:
        raise MismatchError(
            f"model {broken.partition('.')[0]} gives values on the probe that are not finite; give examples like those "
            "that it was trained with."
        )
    return Result({"groups": found.symmetry.encode().decode()}, rows)


def _places(group: Sequence[Carrier], moving: Collection[str]) -> list[Carrier]:
    """Where a group's units are looked at: where they are consumed; else where they are not moved only."""
    consumed = [place for place in group if place.consumed]
    return consumed or [place for place in group if place.node not in moving] or list(group)


def _look(
    context: Context,
    tensors: Mapping[str, torch.Tensor],
    part: Batches,
    share: float,
    groups: Sequence[Sequence[Carrier]],
    shown: Mapping[tuple[int, int], list[torch.Tensor]],
) -> None:
    """Add what a batch, this share of all examples, shows at each place of each group."""
    wanted = defaultdict(list)
    for index, places in enumerate(groups):
        for at, place in enumerate(places):
            wanted[place.node].append((index, at, place))

    def visit(node: Any, value: Any, arguments: tuple[Any, ...]) -> Any:
        for index, at, place in wanted.get(node.name, ()):
            taken = math.ceil(COLUMNS * share / len(groups[index]))
            shown[index, at].append(_spread(_columns(value, place), taken).double())
        return value

    with torch.no_grad():
        context.program.visited(tensors, part.inputs, visit)


def _columns(value: torch.Tensor, place: Carrier) -> torch.Tensor:
    """The group's units in front, everything else behind: [size, all other factors]."""
    before, behind = value.shape[: place.dimension], value.shape[place.dimension + 1 :]
    split = value.reshape(*before, *place.factors, *behind).movedim(place.dimension + place.at, 0)
    return split.reshape(split.shape[0], -1)


def _spread(columns: torch.Tensor, count: int) -> torch.Tensor:
    """So many columns, at the fractional parts of multiples of the golden ratio; all of them if there are no more."""
    total = columns.shape[1]
    if total <= count:
        return columns
    chosen = [((i * _GOLDEN & _WORD) * total) >> 64 for i in range(count)]
    return columns[:, torch.tensor(chosen, device=columns.device)]


def standardised(places: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Rows [size, samples] of mean 0 and norm 1 made of the places' rows; of zeros where a unit is constant.

    >>> standardised([torch.tensor([[1.0, 3.0], [2.0, 2.0]]).double()], 2).tolist()
    [[-0.7071067811865475, 0.7071067811865475], [0.0, 0.0]]
    """
    found = []
    alive = torch.zeros(size, 1, dtype=torch.float64, device=places[0].device if places else None)
    for x in places:
        centred = x - x.mean(dim=1, keepdim=True)
        norm = centred.norm(dim=1, keepdim=True)
        lives = ~(norm <= CONSTANT * x.norm(dim=1, keepdim=True))
        found.append(torch.where(lives, centred / norm, 0.0))
        alive += lives
    return torch.cat([*found, torch.zeros_like(alive)[:, :0]], dim=1) / alive.clamp_min(1).sqrt()
