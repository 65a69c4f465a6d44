"""Which arithmetic runs: the torch definition, or fused kernels that give the same bytes.

``CRDTMERGE_KERNELS=torch|numba`` chooses. Left unsaid, merges that read at least ``limits.KERNEL_BYTES_MIN`` use the
kernels; smaller ones use those that were compiled before and never wait for a compiler. Each kernel proves itself on a
stored answer before its first use in a process; one that fails, or cannot be loaded, is left out with one warning and
torch does the work.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import UsageError
from crdtmerge.numerics import answers, compiled
from crdtmerge.numerics.answers import ANSWERS, sample
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.numerics.programs import Affine, Consensus, Program
from crdtmerge.numerics.selection import Search

Raw = NDArray[Any]
"""Stored values as unsigned integers of the storage size."""

Kernel = Callable[[Raw, Raw | None, Raw, int], None]
"""A program made ready: raw xs [k, n], base [n], out [n] to be filled, and the flat index at which they begin."""

VARIABLE = "CRDTMERGE_KERNELS"
COMPILED_SIDE = 400
"""The smaller side of a matrix from which on its decomposition waits for a compiler."""

UNSIGNED: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


def choose(bytes_in: int) -> Kernels | None:
    """The kernels for a merge of so many input bytes; None for the definition. Raises UsageError for a wrong choice."""
    return _chosen(bytes_in >= limits.KERNEL_BYTES_MIN)


def rotations(side: int) -> Any | None:
    """The kernels for decompositions of a smaller side; None for the definition. Raises UsageError as ``choose``.

    They are compiled where the definition takes longer than a compiler.
    """
    kernels = _chosen(side >= COMPILED_SIDE)
    return _rotations() if kernels and kernels.decompositions() else None


def _chosen(large: bool) -> Kernels | None:
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "torch", "numba"):
        raise UsageError(f"{VARIABLE} = {asked!r}: must be torch or numba.")
    return None if asked == "torch" else Kernels(may_compile=asked == "numba" or large)


@dataclass(frozen=True)
class Kernels:
    """The fused kernels that may be used: all, or only those that need no compiler any more.

    Every method says None (or False) where the definition is to be used instead.
    """

    may_compile: bool = True

    def program(self, program: Program, dtype: DType, out: DType) -> Kernel | None:
        """A program for inputs of one dtype."""
        kind = "affine" if isinstance(program, Affine) else "consensus"
        return _ready(program, dtype, out) if self._proven(kind, dtype.name, out.name) else None

    def gram(self, xs: Raw, base: Raw | None, dtype: DType) -> NDArray[np.float64] | None:
        """Block sums of all pairs [pairs, blocks] of rows (of rows - base, if given)."""
        return _gram(xs, base, dtype) if self._proven("gram", dtype.name, "") else None

    def count(self, x: Raw, base: Raw, search: Search, dtype: DType, wide: bool, counts: NDArray[np.int64]) -> bool:
        """Add ``selection.count`` of |x - base|, as float64 patterns if ``wide``."""
        if not self._proven("count", dtype.name, ""):
            return False
        _count(x, base, search, dtype, wide, counts)
        return True

    def collect(
        self, x: Raw, base: Raw, search: Search, dtype: DType, wide: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """``selection.collect`` of |x - base|."""
        return _collect(x, base, search, dtype, wide) if self._proven("count", dtype.name, "") else None

    def decompositions(self) -> bool:
        """Whether the kernels of ``rotations`` may be used."""
        return self._proven("decompositions", "F64", "")

    def _proven(self, kind: str, dtype: str, out: str) -> bool:
        return (self.may_compile or compiled.known(f"{kind}/{dtype}/{out}")) and proven(kind, dtype, out)


@cache
def _module() -> ModuleType | None:
    try:
        from crdtmerge.numerics import kernels
    except (ImportError, OSError, RuntimeError) as fault:
        _warn(f"the fused kernels cannot be loaded ({fault})")
        return None
    return kernels


def _warn(why: str) -> None:
    warnings.warn(f"{why}; merging with torch, which gives the same bytes more slowly", RuntimeWarning, stacklevel=2)


def _ready(program: Program, dtype: DType, out: DType) -> Kernel:
    make: Callable[..., Kernel] = _affine if isinstance(program, Affine) else _consensus
    return make(program, dtype, out)


def _affine(program: Affine, dtype: DType, out: DType) -> Kernel:
    module = _loaded()
    weights = np.array(program.weights, np.float64)
    divides, divisor = program.divisor is not None, program.divisor or 1.0
    kinds = module.KINDS[dtype.name], module.KINDS[out.name]
    nothing = np.empty(0, UNSIGNED[dtype.itemsize])

    def run(xs: Raw, base: Raw | None, y: Raw, start: int) -> None:
        b = base if program.on_base and base is not None else nothing
        module.affine(xs, b, y, weights, divisor, divides, program.on_base, program.scale, *kinds)

    return run


def _consensus(program: Consensus, dtype: DType, out: DType) -> Kernel:
    module = _loaded()
    real: Any = np.float32 if dtype.itemsize == 2 else np.float64
    weights = np.array(program.weights, real)
    cuts = np.array(program.cuts, np.int64).reshape(-1, 2)
    streams = np.array(program.streams, np.uint32).reshape(-1, 4)
    modes = module.ELECT[program.elect], module.COMBINE[program.combine]
    kinds = module.KINDS[dtype.name], module.KINDS[out.name]
    rescale, scale, below = real(program.rescale), real(program.scale), np.uint64(program.keep_below)

    def run(xs: Raw, base: Raw | None, y: Raw, start: int) -> None:
        module.consensus(xs, base, y, start, weights, cuts, streams, below, rescale, *modes, scale, *kinds)

    return run


def _gram(xs: Raw, base: Raw | None, dtype: DType) -> NDArray[np.float64]:
    module = _loaded()
    k, n = xs.shape
    out = np.empty((k * (k + 1) // 2, -(-n // module.BLOCK)))
    module.gram(xs, xs[0] if base is None else base, base is not None, out, module.KINDS[dtype.name])
    return out


def _count(x: Raw, base: Raw, search: Search, dtype: DType, wide: bool, counts: NDArray[np.int64]) -> None:
    module = _loaded()
    wide = wide or dtype.itemsize > 2
    module.count(x, base, search.lo, search.hi, search.shift, counts, module.KINDS[dtype.name], wide)


def _collect(
    x: Raw, base: Raw, search: Search, dtype: DType, wide: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    module = _loaded()
    capacity = x.size if search.inside is None else min(x.size, search.inside)
    found: tuple[NDArray[np.int64], NDArray[np.int64]] = module.collect(
        x, base, search.lo, search.hi, capacity, module.KINDS[dtype.name], wide
    )
    return found


def _rotations() -> Any:
    from crdtmerge.numerics import rotations as module

    return module


def _loaded() -> Any:
    module = _module()
    assert module is not None, "a kernel runs only after it was proven"
    return module


# ---------------------------------------------------------------- known answers


_proving = threading.Lock()


def proven(kind: str, dtype: str, out: str) -> bool:
    """Whether a kernel gives its stored answer in this process; says so once if it does not."""
    with _proving:
        return _proven(kind, dtype, out)


@cache
def _proven(kind: str, dtype: str, out: str) -> bool:
    if _module() is None:
        return False
    if answer(kind, dtype, out) == ANSWERS.get(f"{kind}/{dtype}/{out}"):
        compiled.note(f"{kind}/{dtype}/{out}")
        return True
    _warn(f"the fused kernel {kind}/{dtype}/{out} does not give its known answer on this machine")
    return False


def answer(kind: str, dtype: str, out: str) -> str:
    """What a kernel computes from the sample inputs, as 16 hexadecimal digits."""
    results: list[NDArray[Any]] = []
    if kind == "decompositions":
        return _digest(_decompositions())
    tried = sample(dtype)
    xs, base = tried.xs, tried.base
    if kind in ("affine", "consensus"):
        for program in tried.affine if kind == "affine" else tried.consensus:
            y = np.empty(base.shape, UNSIGNED[DTYPES[out].itemsize])
            _ready(program, DTYPES[dtype], DTYPES[out])(xs, base, y, tried.start)
            results.append(y)
    elif kind == "gram":
        results = [_gram(xs, None, DTYPES[dtype]), _gram(xs, base, DTYPES[dtype])]
    else:
        for search, wide in tried.searches:
            counts = np.zeros(search.steps + 1, np.int64)
            _count(xs[0], base, search, DTYPES[dtype], wide, counts)
            results += [counts, *_collect(xs[0], base, search, DTYPES[dtype], wide)]
    return _digest(results)


def _decompositions() -> list[NDArray[Any]]:
    module, matrix = _rotations(), answers.dense()
    columns, order = matrix.T.copy(), np.arange(matrix.shape[1])
    q = module.pivoted_qr(columns, order, answers.EPSILON)
    by_size, squares = module.orthogonalised(matrix, answers.TURNED_BY, answers.SWEEPS, answers.ORTHOGONAL)
    return [q.T, columns.T[: len(q)], order, matrix[by_size], squares[by_size]]


def _digest(results: list[NDArray[Any]]) -> str:
    return hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()[:16]
