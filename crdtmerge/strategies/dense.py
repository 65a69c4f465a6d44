"""What strategies on whole matrices share: task vectors as matrices, two linear algebras, the size that is promised.

A tensor [out, ...] is the matrix [out, product of the rest]; one of fewer than two dimensions, or without elements, is
none, and its task vectors are averaged. Arithmetic is float64.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
from pydantic import Field

from crdtmerge.errors import NonFiniteError, UsageError
from crdtmerge.numerics.decompositions import EPSILON, SIDE_MAX, right_vectors, signs_of, svd
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.products import Matrix, matmul
from crdtmerge.strategies.linear import divisor_of
from crdtmerge.strategies.parameters import WithLambda
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View

if TYPE_CHECKING:
    from torch import Tensor


class DenseParameters(WithLambda):
    """Parameters of strategies on whole matrices."""

    dense: Literal["exact", "lapack"] = Field(
        "exact", description="linear algebra with the same bits everywhere, or the library's: fast, of any size"
    )


class Algebra(Protocol):
    """Products and singular value decompositions of one tensor's matrices."""

    def product(self, a: Matrix, b: Matrix) -> Matrix:
        """a b."""
        ...

    def triplets(self, a: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """u, s > 0 descending, vt of a = u diag(s) vt to the numerical rank; signs as in ``decompositions.svd``."""
        ...

    def space(self, a: Matrix) -> tuple[Matrix, Matrix]:
        """s and vt alone; signs as in ``decompositions.right_vectors``."""
        ...


class Exact:
    """The same bits on every machine: ``numerics.products`` and ``numerics.decompositions``."""

    def __init__(self, tensor: str) -> None:
        self._tensor = tensor

    def product(self, a: Matrix, b: Matrix) -> Matrix:
        """a b."""
        return matmul(a, b)

    def triplets(self, a: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """The decomposition by Jacobi rotations. Raises NonFiniteError."""
        require_finite(a, self._tensor)
        return svd(a)

    def space(self, a: Matrix) -> tuple[Matrix, Matrix]:
        """s and vt by Jacobi rotations. Raises NonFiniteError."""
        require_finite(a, self._tensor)
        return right_vectors(a)


class Lapack:
    """numpy's BLAS and LAPACK: the bits depend on the build, the processor and the number of threads."""

    def __init__(self, tensor: str) -> None:
        self._tensor = tensor

    def product(self, a: Matrix, b: Matrix) -> Matrix:
        """a b."""
        found: Matrix = np.matmul(a, b)
        return found

    def triplets(self, a: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """LAPACK's gesdd, cut to the numerical rank. Raises NonFiniteError."""
        require_finite(a, self._tensor)
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        rank = int(np.count_nonzero(s > (s[0] if len(s) else 0.0) * max(a.shape) * EPSILON))
        signs = signs_of(u[:, :rank])
        return u[:, :rank] * signs, s[:rank], vt[:rank] * signs[:, None]

    def space(self, a: Matrix) -> tuple[Matrix, Matrix]:
        """s and vt by LAPACK's gesdd. Raises NonFiniteError."""
        _, s, vt = self.triplets(a)
        return s, vt * signs_of(vt.T)[:, None]


def algebra_of(dense: str, tensor: str) -> Algebra:
    """The linear algebra that the parameter ``dense`` asks for."""
    return Exact(tensor) if dense == "exact" else Lapack(tensor)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has two dimensions or more, and elements."""
    return len(shape) > 1 and _product(shape) > 0


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def require_finite(a: Matrix, tensor: str) -> None:
    """Raise NonFiniteError unless all elements are finite."""
    if not np.isfinite(a).all():
        raise NonFiniteError(
            f"tensor {tensor!a}: a matrix made of its task vectors holds NaN or infinity, and has no singular values. "
            "Leave the tensor out with --exclude, or mend the weights."
        )


P = TypeVar("P", bound=DenseParameters)


class DenseStrategy(Strategy[P]):
    """theta = theta_0 + lambda * m, where m is made of the task vectors as matrices; their weighted mean elsewhere."""

    def needs(self, p: P) -> Needs:
        return Needs(base="required", unit="tensor", compute="double", exact=p.dense == "exact")

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        for name in view.names:
            meta = view.meta(name)
            divisor_of(meta)
            large = view.elements(name) * len(meta) > SIDE_MAX * SIDE_MAX
            if large and p(name).dense == "exact":
                self.require_size(name, view.whole(name).shape, len(meta), p(name))
        return EMPTY

    def require_size(self, name: str, shape: tuple[int, ...], k: int, p: P) -> None:
        """Raise UsageError where a tensor is too large for the exact decomposition."""
        if not is_matrix(shape):
            return
        side = self.side(shape[0], _product(shape[1:]), k, p)
        if side > SIDE_MAX:
            raise UsageError(
                f"strategy '{self.name}': tensor {name!a} of shape {list(shape)} needs the singular values of a matrix "
                f"whose smaller side is {side}; with the same bits everywhere that is done up to {SIDE_MAX}. Set "
                "dense=lapack (--set dense=lapack) for results that depend on the machine's library, or leave the "
                "tensor out with --exclude."
            )

    def side(self, out: int, rest: int, k: int, p: P) -> int:
        """The smaller side of the largest matrix that is decomposed for a matrix [out, rest] of k contributions."""
        return min(out, rest)

    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        assert u.base is not None, "task vectors need a base; Needs.base says so"
        taus = [as_matrix(tau, u.shape) for tau in u.task_vectors()]
        if p.dense == "exact":
            self.require_size(u.name, u.shape, len(taus), p)
        if is_matrix(u.shape):
            m = self.matrices(taus, u, p, algebra_of(p.dense, u.name))
        else:
            m = self.vectors(taus, u, p)
        return u.base + as_tensor(m, u.base) * u.scalar(p.lambda_)

    def vectors(self, taus: Sequence[Matrix], u: Unit, p: P) -> Matrix:
        """The merged task vector of a tensor that is no matrix."""
        return mean(taus, u)

    @abstractmethod
    def matrices(self, taus: Sequence[Matrix], u: Unit, p: P, algebra: Algebra) -> Matrix:
        """The merged task vector of a matrix."""


def as_matrix(x: Tensor, shape: tuple[int, ...]) -> Matrix:
    """A flat tensor as float64 [out, rest]."""
    found: Matrix = x.to(torch.float64).cpu().numpy().reshape((shape[0], -1) if x.numel() and shape else (-1, 1))
    return found


def as_tensor(m: Matrix, like: Tensor) -> Tensor:
    """A matrix as a flat tensor beside another one."""
    flat = torch.from_numpy(np.ascontiguousarray(m).reshape(-1))
    return flat.to(device=like.device, dtype=like.dtype)


def largest(x: Matrix) -> float:
    """The largest magnitude in a matrix; 0 of none."""
    return float(np.abs(x).max(initial=0.0))


def weighted(taus: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """sum_i w_i tau_i, from left to right."""
    acc = taus[0] * weights[0]
    for tau, w in zip(taus[1:], weights[1:], strict=True):
        acc = acc + tau * w
    return acc


def mean(taus: Sequence[Matrix], u: Unit) -> Matrix:
    """sum_i w_i tau_i / sum_i w_i with the claimed weights."""
    return weighted(taus, u.weights()) / divisor_of(u.meta)
