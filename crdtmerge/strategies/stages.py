"""Stages that strategies on task vectors are composed of: sparsify, elect, combine.

Each works elementwise on 1-D tensors of the compute dtype, one IEEE operation a call, contributions folded from
left to right.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

from crdtmerge.numerics import philox, selection
from crdtmerge.numerics.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def trim(tau: Tensor, cut: tuple[int, int], start: int) -> Tensor:
    """Sparsify by magnitude: what lies above the cut is kept, the rest is zero."""
    bits, last_index = cut
    return torch.where(selection.largest(tau, bits, last_index, start), tau, torch.zeros_like(tau))


def drop(tau: Tensor, stream: philox.Stream, density: Decimal, start: int, rescale: float) -> Tensor:
    """Sparsify at random: an element is kept with probability ``density`` and multiplied by ``rescale``, else zero."""
    words = philox.words(stream, start, start + tau.numel(), tau.device)
    return torch.where(words < philox.keep_below(density), tau * rescale, torch.zeros_like(tau))


def weighted(taus: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """tau_i multiplied by w_i."""
    return [tau * w for tau, w in zip(taus, weights, strict=True)]


def elect(taus: Sequence[Tensor], how: str) -> Tensor:
    """The elected sign of each element as bool, True for plus: of the sum, or of the count of signs. Zero is plus."""
    votes = [torch.sign(tau) for tau in taus] if how == "count" else taus
    total = votes[0]
    for vote in votes[1:]:
        total = total + vote
    return total >= 0


def agreeing(taus: Sequence[Tensor], positive: Tensor) -> list[Tensor]:
    """Which elements of each task vector have the elected sign; zeros have none."""
    return [torch.where(positive, tau > 0, tau < 0) for tau in taus]


def everything(taus: Sequence[Tensor]) -> list[Tensor]:
    """Every element of each task vector, where nothing is elected."""
    return [torch.ones_like(tau, dtype=torch.bool) for tau in taus]


def combine(taus: Sequence[Tensor], weights: Sequence[float], selected: Sequence[Tensor], how: str) -> Tensor:
    """The selected elements of weighted task vectors as one: their sum, their weighted mean, or the largest.

    The mean divides by the sum of the weights of what was selected (1 where nothing was). The largest is by
    magnitude; of two equal magnitudes the positive wins, so that the order of contributions cannot matter.
    """
    zero = torch.zeros_like(taus[0])
    chosen = [torch.where(s, tau, zero) for tau, s in zip(taus, selected, strict=True)]
    if how == "max":
        best = chosen[0]
        for tau in chosen[1:]:
            best = larger(best, tau)
        return best
    total = chosen[0]
    for tau in chosen[1:]:
        total = total + tau
    if how == "sum":
        return total
    mass = torch.where(selected[0], zero + weights[0], zero)
    for s, w in zip(selected[1:], weights[1:], strict=True):
        mass = mass + torch.where(s, zero + w, zero)
    return total / torch.where(mass == 0, zero + 1.0, mass)


def larger(x: Tensor, y: Tensor) -> Tensor:
    """The element of larger magnitude; of two equal magnitudes the positive one. Commutative and associative."""
    ax, ay = x.abs(), y.abs()
    return torch.where((ay > ax) | ((ay == ax) & (y > x)), y, x)
