"""Elementwise merges as data: what a fused kernel computes in one pass over the inputs.

A strategy's ``apply`` in torch is the definition. Where its arithmetic is one of these programs the engine may run
a fused kernel in its place, which gives the same bytes; a test holds each strategy to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from crdtmerge.numerics.philox import Stream


@dataclass(frozen=True, slots=True)
class Affine:
    """In float64: sum of weights[i] * x_i, or base + scale * (sum of weights[i] * (x_i - base)), sums divided first."""

    weights: tuple[float, ...]
    divisor: float | None = None
    on_base: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Consensus:
    """In the compute dtype: base + scale * combine(elect(sparsify(x_i - base))).

    ``cuts`` keeps (pattern, last index) of each task vector; ``streams`` keeps an element whose random word is below
    ``keep_below`` and multiplies it by ``rescale``; then tau_i is multiplied by ``weights[i]``. ``elect`` is
    none | sum | count, ``combine`` is sum | mean | max.
    """

    weights: tuple[float, ...]
    cuts: tuple[tuple[int, int], ...] = ()
    streams: tuple[Stream, ...] = ()
    keep_below: int = 1 << 32
    rescale: float = 1.0
    elect: str = "sum"
    combine: str = "mean"
    scale: float = 1.0


Program = Affine | Consensus
