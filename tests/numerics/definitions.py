"""The known answers of the fused kernels, computed by the definitions in torch and numpy.

``python -m tests.numerics.definitions`` prints the table for ``crdtmerge/numerics/answers.py``.
Nothing here calls a kernel.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crdtmerge.numerics import answers, reduction, selection
from crdtmerge.numerics.answers import Sample, sample
from crdtmerge.numerics.decompositions import defined_qr, defined_rotations
from crdtmerge.numerics.dtypes import DTYPES, FLOATS
from crdtmerge.numerics.programs import Affine, Consensus
from crdtmerge.numerics.rounding import round_to
from crdtmerge.resolve.blocks import widened
from crdtmerge.strategies import stages
from crdtmerge.strategies.linear import divided, total


def tensors(tried: Sample, dtype: str, compute: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    wide = [widened(x, DTYPES[dtype], DTYPES[compute], "cpu", False) for x in (*tried.xs, tried.base)]
    return wide[:-1], wide[-1]


def own_compute(dtype: str) -> str:
    return "F32" if dtype in ("BF16", "F16") else "F64"


def affine(program: Affine, xs: list[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    terms = [x - base for x in xs] if program.on_base else xs
    acc = total(stages.weighted(terms, program.weights))
    if program.divisor is not None:
        acc = divided(acc, program.divisor)
    return base + acc * program.scale if program.on_base else acc


def consensus(program: Consensus, xs: list[torch.Tensor], base: torch.Tensor, start: int) -> torch.Tensor:
    def scalar(x: float) -> float:
        return float(torch.tensor(x, dtype=base.dtype))

    taus = [x - base for x in xs]
    if program.cuts:
        taus = [stages.trim(tau, cut, start) for tau, cut in zip(taus, program.cuts, strict=True)]
    if program.streams:
        density = Decimal(program.keep_below) / (1 << 32)
        rescale = scalar(program.rescale)
        taus = [stages.drop(tau, s, density, start, rescale) for tau, s in zip(taus, program.streams, strict=True)]
    weights = [scalar(w) for w in program.weights]
    taus = stages.weighted(taus, weights)
    if program.elect == "none":
        selected = stages.everything(taus)
    else:
        selected = stages.agreeing(taus, stages.elect(taus, program.elect))
    return base + stages.combine(taus, weights, selected, program.combine) * scalar(program.scale)


def decompositions() -> list[NDArray[Any]]:
    q, r, order = defined_qr(answers.dense())
    return [q, r, np.array(order), *defined_rotations(answers.dense(), answers.TURNED_BY)]


def stored_bytes(result: torch.Tensor | NDArray[Any]) -> bytes:
    if isinstance(result, torch.Tensor):
        result = result.contiguous().view(torch.uint8).numpy()
    return result.tobytes()


def answer(kind: str, dtype: str, out: str) -> str:
    if kind == "decompositions":
        return hashlib.sha256(b"".join(map(stored_bytes, decompositions()))).hexdigest()[:16]
    tried = sample(dtype)
    xs, base = tensors(tried, dtype, own_compute(dtype))
    wide_xs, wide_base = tensors(tried, dtype, "F64")
    if kind == "affine":
        results: list[Any] = [round_to(affine(p, wide_xs, wide_base), DTYPES[out]) for p in tried.affine]
    elif kind == "consensus":
        results = [round_to(consensus(p, xs, base, tried.start), DTYPES[out]) for p in tried.consensus]
    elif kind == "gram":
        results = [reduction.gram_block_sums(wide_xs), reduction.gram_block_sums([x - wide_base for x in wide_xs])]
    else:
        tau = xs[0] - base
        results = []
        for search, wide in tried.searches:
            x = tau.double() if wide else tau
            results += [selection.count(x, search), *selection.collect(x, search)]
    data = b"".join(stored_bytes(result) for result in results)
    return hashlib.sha256(data).hexdigest()[:16]


def keys() -> list[tuple[str, str, str]]:
    programs = product(("affine", "consensus"), FLOATS, FLOATS)
    return [*programs, *product(("gram", "count"), FLOATS, ("",)), ("decompositions", "F64", "")]


if __name__ == "__main__":
    for key in keys():
        print(f'    "{"/".join(key)}": "{answer(*key)}",')
