"""Strategies on the singular values of task vectors: star, svd_truncate, iso_c, iso_cts, tsv_m, svd_knot_tying.

With tau_i = U_i diag(s_i) V_i^T, singular values descending and signs fixed (of each left vector the entry of largest
magnitude is positive), each decides which triplets stay and with which singular values:

    theta = theta_0 + lambda * m(tau_1, ..., tau_k)

Singular values below the numerical rank (max(out, in) 2^-52 of the largest) are zero and have no vectors. Tensors that
are no matrices are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.products import Matrix
from crdtmerge.numerics.scalars import left_sum, nearest
from crdtmerge.numerics.selection import patterns
from crdtmerge.strategies import stages
from crdtmerge.strategies.dense import Algebra, DenseParameters, DenseStrategy, as_matrix, largest, mean, weighted
from crdtmerge.strategies.parameters import Number, Share
from crdtmerge.strategies.protocol import Unit

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = math.ldexp(1.0, -48)
"""Share of a matrix's largest element, times its larger side, that only rounding may have left."""

GAP = 1e-10
"""Relative distance below which neighbouring singular values count as equal: their vectors are not determined."""


def covering(values: Sequence[float], share: Decimal) -> int:
    """The smallest r with values_1 + ... + values_r >= share * (the sum of all), added from left to right.

    >>> covering([4.0, 3.0, 2.0, 1.0], Decimal("0.5"))
    2
    """
    wanted = nearest(share) * left_sum(values)
    so_far = 0.0
    for r, value in enumerate(values):
        so_far = so_far + value
        if so_far >= wanted:
            return r + 1
    return len(values)


def composed(u: Matrix, s: Matrix, vt: Matrix, algebra: Algebra) -> Matrix:
    """u diag(s) vt."""
    return algebra.product(u * s, vt)


def polar(a: Matrix, algebra: Algebra) -> Matrix:
    """The orthonormal factor of a = (orthonormal) (positive): u vt of its decomposition."""
    u, _, vt = algebra.triplets(a)
    return algebra.product(u, vt)


class StarParameters(DenseParameters):
    """Parameters of star."""

    eta: Share = Field(Decimal("0.4"), description="share of the nuclear norm whose triplets are kept")


class Star(DenseStrategy[StarParameters]):
    """STAR: truncate each task vector's spectrum, rescale what is kept to the nuclear norm that it had, average.

        r_i   =  the smallest r with s_i1 + ... + s_ir >= eta sum_j s_ij
        tau_i <- (sum_j s_ij / sum_(j <= r_i) s_ij) U_i[:, :r_i] diag(s_i[:r_i]) V_i[:, :r_i]^T
        theta =  theta_0 + lambda sum_i w_i tau_i / sum_i w_i

    eta is a fraction (the paper writes 40 for 0.4); lambda is 1 in the paper.

    Properties: commutative; neither associative nor idempotent. Equivariant under orthogonal matrices on either side.
    """

    name, version, family = "star", 1, "spectral"
    reference = "Lee et al., NAACL 2025, arXiv:2502.10339"
    Params = StarParameters

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: StarParameters, algebra: Algebra) -> Matrix:
        return mean([self._cut(tau, p.eta, algebra) for tau in taus], u)

    def _cut(self, tau: Matrix, eta: Decimal, algebra: Algebra) -> Matrix:
        left, s, right = algebra.triplets(tau)
        if not len(s):
            return np.zeros_like(tau)
        values = s.tolist()
        r = covering(values, eta)
        scale = left_sum(values) / left_sum(values[:r])
        return composed(left[:, :r], s[:r] * scale, right[:r], algebra)


class TruncateParameters(DenseParameters):
    """Parameters of svd_truncate."""

    keep: Literal["energy", "rank"] = Field("energy", description="what the share is of: sum of s^2, or number of s")
    share: Share = Field(Decimal("0.9"), description="share that is kept, at least one triplet")
    combine: Literal["mean", "sum"] = Field("mean", description="the weighted mean of what is kept, or the sum")


class SvdTruncate(DenseStrategy[TruncateParameters]):
    """Truncated task vectors: the best approximation of each of low rank, averaged or summed.

        r_i   =  the smallest r with s_i1^2 + ... + s_ir^2 >= share sum_j s_ij^2     (keep=energy)
              or max(1, floor(share min(out, in)))                                    (keep=rank)
        theta =  theta_0 + lambda sum_i w_i U_i[:, :r_i] diag(s_i[:r_i]) V_i[:, :r_i]^T / sum_i w_i

    With combine=sum it is task arithmetic on truncated task vectors: what AdaRank starts from, before any of its masks
    is learnt.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "svd_truncate", 1, "spectral"
    reference = "Eckart, Young, Psychometrika 1, 1936; the start of Lee et al., ICLR 2026, arXiv:2503.22178"
    Params = TruncateParameters

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: TruncateParameters, algebra: Algebra) -> Matrix:
        return self._combined([self._cut(tau, p, algebra) for tau in taus], u, p)

    def vectors(self, taus: Sequence[Matrix], u: Unit, p: TruncateParameters) -> Matrix:
        return self._combined(taus, u, p)

    def _combined(self, taus: Sequence[Matrix], u: Unit, p: TruncateParameters) -> Matrix:
        return weighted(taus, u.weights()) if p.combine == "sum" else mean(taus, u)

    def _cut(self, tau: Matrix, p: TruncateParameters, algebra: Algebra) -> Matrix:
        left, s, right = algebra.triplets(tau)
        if p.keep == "rank":
            r = max(1, int(Fraction(p.share) * min(tau.shape)))
        else:
            r = covering((s * s).tolist(), p.share)
        return composed(left[:, :r], s[:r], right[:r], algebra)


class IsoC(DenseStrategy[DenseParameters]):
    """Iso-C: the sum of the task vectors with its singular values made equal.

        sum_i w_i tau_i = U diag(s) V^T,      theta = theta_0 + lambda * mean(s) * U V^T

    The mean is over the numerical rank, so that the nuclear norm is kept where directions are missing too. Tensors that
    are no matrices get the mean of the task vectors.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "iso_c", 1, "spectral"
    reference = "Marczak et al., ICML 2025, arXiv:2502.04959"
    Params = DenseParameters

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: DenseParameters, algebra: Algebra) -> Matrix:
        left, s, right = algebra.triplets(weighted(taus, u.weights()))
        return composed(left, np.full_like(s, average(s)), right, algebra)


def average(s: Matrix) -> float:
    """The mean of singular values, added from left to right; 0 of none."""
    return left_sum(s.tolist()) / len(s) if len(s) else 0.0


class IsoCtsParameters(DenseParameters):
    """Parameters of iso_cts."""

    common: Share = Field(Decimal("0.8"), description="share of directions that come from the sum of the task vectors")


class IsoCts(DenseStrategy[IsoCtsParameters]):
    """Iso-CTS: common directions, then directions of each task outside of them, all with one singular value.

        U diag(s) V^T = sum_i w_i tau_i,   r = min(out, in),   q = round((r - floor(common r)) / k),   c = r - k q
        tau_i'        = (1 - U_c U_c^T) w_i tau_i = U_i diag(s_i) V_i^T,   U_c = U[:, :c]
        A = [U_1[:, :q] | ... | U_k[:, :q] | U_c],   B, z likewise of V and s
        theta = theta_0 + lambda * mean(z) * polar(A) polar(B)^T

    q is rounded half to even; where it is 0 (more tasks than directions are left) the result is that of iso_c. Where
    tau_i' has fewer than q singular values, only those enter.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "iso_cts", 1, "spectral"
    reference = "Marczak et al., ICML 2025, arXiv:2502.04959"
    Params = IsoCtsParameters

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: IsoCtsParameters, algebra: Algebra) -> Matrix:
        left, s, right = algebra.triplets(weighted(taus, u.weights()))
        r, k = min(taus[0].shape), len(taus)
        own = round(Fraction(r - int(Fraction(p.common) * r), k))
        shared = max(0, r - k * own)
        common = left[:, :shared]
        lefts, values, rights = [], [], []
        for tau, w in zip(taus, u.weights(), strict=True):
            scaled = tau * w
            outside = scaled - algebra.product(common, algebra.product(common.T, scaled))
            a, z, b = self._outside(outside, scaled, algebra)
            lefts.append(a[:, :own])
            values.append(z[:own])
            rights.append(b[:own])
        a = np.concatenate([*lefts, common], axis=1)
        b = np.concatenate([*rights, right[:shared]], axis=0)
        z = np.concatenate([*values, s[:shared]])
        return average(z) * algebra.product(polar(a, algebra), polar(b, algebra))

    def _outside(self, a: Matrix, of: Matrix, algebra: Algebra) -> tuple[Matrix, Matrix, Matrix]:
        """The decomposition of what is left of a matrix, without what only rounding left of it."""
        left, s, right = algebra.triplets(a)
        noise = largest(of) * max(a.shape) * ROUNDING
        kept = int(np.count_nonzero(s > noise))
        return left[:, :kept], s[:kept], right[:kept]


class TsvM(DenseStrategy[DenseParameters]):
    """Task singular vectors, merged: the leading triplets of each task, decorrelated.

        q = max(1, floor(min(out, in) / k)),   w_i tau_i = U_i diag(s_i) V_i^T
        A = [U_1[:, :q] | ... | U_k[:, :q]],   s = (s_1[:q], ..., s_k[:q]),   B = [V_1[:, :q] | ... | V_k[:, :q]]
        theta = theta_0 + lambda * polar(A) diag(s) polar(B)^T

    polar(A), the orthonormal matrix nearest to A, takes away the interference of tasks whose vectors overlap; tasks
    that are orthogonal are summed. Tensors that are no matrices get the mean of the task vectors.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "tsv_m", 1, "spectral"
    reference = "Gargiulo et al., CVPR 2025, arXiv:2412.00081"
    Params = DenseParameters

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: DenseParameters, algebra: Algebra) -> Matrix:
        q = max(1, min(taus[0].shape) // len(taus))
        parts = [algebra.triplets(tau * w) for tau, w in zip(taus, u.weights(), strict=True)]
        a = np.concatenate([left[:, :q] for left, _, _ in parts], axis=1)
        s = np.concatenate([values[:q] for _, values, _ in parts])
        b = np.concatenate([right[:q] for _, _, right in parts], axis=0)
        return composed(polar(a, algebra), s, polar(b, algebra), algebra)


class KnotParameters(DenseParameters):
    """Parameters of svd_knot_tying."""

    lambda_: Number = Field(Decimal("0.6"), alias="lambda", description="scale of the merged task vector")
    inner: Literal["ties", "task_arithmetic"] = Field("ties", description="how the aligned parts are merged")
    density: Share = Field(Decimal("0.2"), description="inner=ties: share of each tensor's part kept, by magnitude")
    concat: Literal["in", "out"] = Field("in", description="the dimension along which task vectors are put together")
    smallest: Number = Field(Decimal("1e-5"), ge=0, description="singular values up to this are left out")


class SvdKnotTying(DenseStrategy[KnotParameters]):
    """KnOTS: task vectors in one common basis, merged there by an inner strategy.

        [tau_1 | ... | tau_k] = U diag(s) [V_1^T | ... | V_k^T],   s > smallest,   C_i = diag(s) V_i^T
        theta = theta_0 + lambda * U inner(C_1, ..., C_k)

    ``concat=out`` puts them one upon the other and shares V instead. inner=task_arithmetic is sum_i w_i C_i, and so
    task arithmetic itself; inner=ties trims each C_i to its share ``density``, elects signs by the sum (zero counts as
    plus) and takes the weighted mean of those that agree. The share is of each tensor; the paper takes it of all layers
    together.

    The signs of U's columns are fixed as everywhere here. Singular values closer than 1e-10 of the larger have no
    vectors of their own: ties, which is not invariant to turning them, gives way to the weighted mean in the rows of
    such a block. Tensors that are no matrices are merged by the inner strategy directly.

    Properties: commutative; neither associative nor idempotent.
    """

    name, version, family = "svd_knot_tying", 1, "spectral"
    reference = "Stoica et al., ICLR 2025, arXiv:2410.19735"
    Params = KnotParameters

    def side(self, out: int, rest: int, k: int, p: KnotParameters) -> int:
        return min(out, k * rest) if p.concat == "in" else min(k * out, rest)

    def matrices(self, taus: Sequence[Matrix], u: Unit, p: KnotParameters, algebra: Algebra) -> Matrix:
        if p.concat == "out":
            return self._tied([tau.T for tau in taus], u, p, algebra).T
        return self._tied(taus, u, p, algebra)

    def vectors(self, taus: Sequence[Matrix], u: Unit, p: KnotParameters) -> Matrix:
        return self._inner(taus, u, p)

    def _tied(self, taus: Sequence[Matrix], u: Unit, p: KnotParameters, algebra: Algebra) -> Matrix:
        left, s, right = algebra.triplets(np.concatenate(taus, axis=1))
        rank = int(np.count_nonzero(s > nearest(p.smallest)))
        columns = taus[0].shape[1]
        rows = s[:rank, None] * right[:rank]
        parts = [rows[:, i * columns : (i + 1) * columns] for i in range(len(taus))]
        merged = self._inner(parts, u, p)
        if p.inner == "ties":
            for start, stop in degenerate(s[:rank].tolist()):
                merged[start:stop] = mean([part[start:stop] for part in parts], u)
        return algebra.product(left[:, :rank], merged)

    def _inner(self, parts: Sequence[Matrix], u: Unit, p: KnotParameters) -> Matrix:
        if p.inner == "task_arithmetic" or not parts[0].size:
            return weighted(parts, u.weights())
        taus = [trimmed(torch.from_numpy(np.ascontiguousarray(part).reshape(-1)), p.density) for part in parts]
        taus = stages.weighted(taus, u.weights())
        chosen = stages.agreeing(taus, stages.elect(taus, "sum"))
        found = stages.combine(taus, u.weights(), chosen, "mean")
        return as_matrix(found, parts[0].shape)


def trimmed(tau: Tensor, density: Decimal) -> Tensor:
    """The max(1, floor(density n)) elements of largest magnitude, ties by lowest position; the rest is zero."""
    count = max(1, int(Fraction(density) * tau.numel()))
    kept = torch.argsort(patterns(tau), descending=True, stable=True)[:count]
    result = torch.zeros_like(tau)
    result[kept] = tau[kept]
    return result


def degenerate(s: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Stretches of two or more descending values, each closer to the next than ``GAP`` of itself.

    >>> list(degenerate([3.0, 2.0, 2.0, 1.0]))
    [(1, 3)]
    """
    start = 0
    for stop in range(1, len(s) + 1):
        if stop == len(s) or s[stop - 1] - s[stop] >= GAP * s[stop - 1]:
            if stop - start > 1:
                yield start, stop
            start = stop


STRATEGIES = (Star, SvdTruncate, IsoC, IsoCts, TsvM, SvdKnotTying)
