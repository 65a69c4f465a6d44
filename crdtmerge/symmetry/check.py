"""Try a symmetry: reorder the parameters at random, and see that the program computes the same.

    change = max |f(turned(theta), x) - f(theta, x)| / max(1, max |f(theta, x)|)

Parameters are made different from each other first, from a seed: of a bias of zeros or a scale of ones any order is the
same, and a group that forgot it would pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch.export.graph_signature import InputKind, OutputKind

from crdtmerge.errors import MismatchError, some
from crdtmerge.symmetry.groups import Permutation, Symmetry

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

Run: TypeAlias = "Callable[[Mapping[str, Tensor], Sequence[Tensor]], Sequence[Tensor]]"
"""A program: parameters by name and inputs give results."""

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""What rounding in another order may come to, by the dtype of the least precise result or parameter."""


def lifted(exported: ExportedProgram) -> Run:
    """An exported program as a function of its parameters; what it is not given it has itself."""
    held = {**exported.constants, **exported.state_dict}
    inputs, outputs = exported.graph_signature.input_specs, exported.graph_signature.output_specs

    def run(tensors: Mapping[str, Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        rest = iter(given)
        flat = []
        for spec in inputs:
            if spec.kind == InputKind.USER_INPUT:
                flat.append(next(rest))
            else:
                name = str(spec.target)
                x = tensors[name] if name in tensors else held[name]
                flat.append(x.clone() if spec.kind == InputKind.BUFFER else x)
        with torch.no_grad():
            found = exported.graph_module(*flat)
        kept = [x for x, spec in zip(found, outputs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]
        return [x for x in kept if isinstance(x, torch.Tensor)]

    return run


def largest_change(
    run: Run,
    tensors: Mapping[str, Tensor],
    symmetry: Symmetry,
    inputs: Sequence[Tensor],
    seed: int,
    only: int | None = None,
) -> float:
    """The largest change of a result when every group is reordered at random, or one alone.

    It is infinite where a result is not finite in one order and finite in the other, or nowhere finite.
    """
    drawn = np.random.default_rng([seed, 1])
    permutations = [_moving(drawn, group.size) for group in symmetry.groups]
    if only is not None:
        permutations = [p if i == only else np.arange(len(p)) for i, p in enumerate(permutations)]
    ours = varied(tensors, symmetry, seed)
    turned = {name: symmetry.turned(name, x, permutations).contiguous() for name, x in ours.items()}
    before, after = run(ours, inputs), run(turned, inputs)
    return max((_change(x.double(), y.double()) for x, y in zip(before, after, strict=True)), default=math.inf)


def varied(tensors: Mapping[str, Tensor], symmetry: Symmetry, seed: int) -> dict[str, Tensor]:
    """The symmetry's tensors with noise: what is nowhere negative is scaled, all else is added to.

    A tensor that is equal to another, as tied parameters are, gets the same noise.
    """
    found: dict[str, Tensor] = {}
    same: dict[tuple[object, ...], Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    for name in symmetry.tensors:
        x = tensors[name]
        key = (x.data_ptr(), tuple(x.shape), tuple(x.stride()))
        if key not in same:
            noise = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            own = x.detach().double()
            if x.numel() and not x.is_complex() and bool((own >= 0).all()) and bool(own.any()):
                same[key] = (own * torch.exp(0.3 * noise)).to(x.dtype)
            else:
                size = float(own.square().mean().sqrt()) or 0.1
                same[key] = (own + 0.3 * size * noise).to(x.dtype)
        found[name] = same[key]
    return found


def failing(
    run: Run, tensors: Mapping[str, Tensor], symmetry: Symmetry, inputs: Sequence[Tensor], seed: int
) -> tuple[float, list[int]]:
    """(the largest change, the groups that change a result when they alone are reordered, or all if none alone)."""
    change = largest_change(run, tensors, symmetry, inputs, seed)
    limit = tolerance(tensors, symmetry)
    if change < limit or not symmetry.groups:
        return change, []
    every = range(len(symmetry.groups))
    alone = [i for i in every if largest_change(run, tensors, symmetry, inputs, seed, only=i) >= limit]
    return change, alone or list(every)


def tolerance(tensors: Mapping[str, Tensor], symmetry: Symmetry) -> float:
    """The change from which on a symmetry is wrong, by the least precise of its tensors."""
    return max((TOLERANCES.get(tensors[name].dtype, 1e-5) for name in symmetry.tensors), default=1e-5)


def verify(
    run: Run, tensors: Mapping[str, Tensor], symmetry: Symmetry, inputs: Sequence[Tensor], seed: int = 0
) -> float:
    """The largest change. Raises MismatchError, which names the groups, where the program computes something else."""
    change, wrong = failing(run, tensors, symmetry, inputs, seed)
    if wrong:
        raise MismatchError(complaint(symmetry, change, wrong))
    return change


def complaint(symmetry: Symmetry, change: float, wrong: Sequence[int]) -> str:
    """What is said of groups that change what the program computes."""
    named = "; ".join(
        f"group {i} of {symmetry.groups[i].size}, {some([axis.tensor for axis in symmetry.groups[i].axes], 3)}"
        for i in wrong[:3]
    )
    more = f" and {len(wrong) - 3} more groups" if len(wrong) > 3 else ""
    return (
        f"reordering changes what the program computes, by {change:.1e} ({named}{more}): the symmetry is not this "
        "program's, or one of its operators is understood wrongly. Do not align with it."
    )


def _moving(drawn: np.random.Generator, size: int) -> Permutation:
    """A random permutation that is not the identity."""
    p = drawn.permutation(size)
    return p if (p != np.arange(size)).any() else np.roll(p, 1)


def _change(x: Tensor, y: Tensor) -> float:
    alike = (x == y) | (x.isnan() & y.isnan())
    if not x.numel():
        return 0.0
    finite = x[x.isfinite()]
    if not finite.numel() or not (alike | (x.isfinite() & y.isfinite())).all():
        return math.inf
    return float(torch.where(alike, 0.0, (x - y).abs()).max() / max(1.0, float(finite.abs().max())))
