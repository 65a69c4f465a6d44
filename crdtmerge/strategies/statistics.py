"""Strategies that weigh by statistics which each contribution brings: fisher_merge, regression_mean, led_merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from crdtmerge.errors import InputError, MismatchError, NeedsError
from crdtmerge.numerics import reduction
from crdtmerge.numerics.decompositions import cholesky, cholesky_solve
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.products import Matrix, matmul
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies.linear import divided, divisor_of, shares, total
from crdtmerge.strategies.parameters import Number, Parameters, Share, WithLambda
from crdtmerge.strategies.protocol import EMPTY, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.stages import weighted
from crdtmerge.strategies.whole_tensors import largest

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1.0 / (1 << 27)
"""What is added to the diagonal of a sum of Gram matrices that cannot be solved with, relative to its mean diagonal."""

SMALLEST_PIVOT = 1.0 / (1 << 33)
"""The share of a feature that must not be explained by the features before it."""

WELL_CONDITIONED = Decimal("0.999")
"""Up to this ``alpha`` the shrunken off-diagonals leave no pivot that is too small."""


def statistic(u: Unit, name: str) -> tuple[Tensor, ...]:
    """A statistic that is non-negative and has the tensor's elements.

    Raises NeedsError where it lacks the tensor, MismatchError for another size, InputError for a negative or
    non-finite value.
    """
    found = u.stats.get(name)
    if found is None:
        raise NeedsError(
            f"tensor {u.name!a}: no contribution has it in its statistic '{name}'. Compute that for every float tensor "
            "of the models, or leave the tensor out with --exclude."
        )
    for one, meta, x in zip(found, u.meta, u.xs, strict=True):
        if one.numel() != x.numel():
            raise MismatchError(
                f"tensor {u.name!a}: the {name} of contribution {meta.id.hex()[:16]} has another shape than the "
                f"tensor, {list(u.shape)}. Compute it again for these models."
            )
        wrong = ~((one >= 0) & (one < math.inf))
        if bool(wrong.any()):
            at = int(torch.nonzero(wrong)[0])
            raise InputError(
                f"tensor {u.name!a}: the {name} of contribution {meta.id.hex()[:16]} holds {float(one[at])!r} at index "
                f"{u.start + at}; its values must be finite and not negative. Compute it again."
            )
    return found


class FisherParameters(Parameters):
    """Parameters of fisher_merge."""

    floor: Number = Field(Decimal("1e-6"), gt=0, description="least value of every entry of a Fisher information")
    normalize: Literal["none", "model", "tensor"] = Field(
        "none", description="divide each Fisher information by its norm over the model or over each tensor"
    )


class FisherMerge(Strategy[FisherParameters]):
    """Fisher-weighted mean: theta = sum_i c_i F_i theta_i / sum_i c_i F_i, elementwise.

        F_i <- max(F_i, floor),  then F_i / |F_i| over the model or the tensor, if asked for

    F_i is the diagonal of the Fisher information, E_x E_y [grad log p(y | x)]^2 by single examples, that contribution i
    brings as its statistic ``fisher``; the coefficients c_i are the claimed weights. The floor holds for all models
    (the authors' code sets it for the first alone) and comes before the norm, so that no norm is zero. Every merged
    tensor must be in every Fisher file.

    Where each loss is quadratic with diagonal Hessian F_i and minimum theta_i, the result minimises the sum of losses.

    Properties: commutative; idempotent; not associative (numerator and denominator apart are).
    """

    name, version, family = "fisher_merge", 1, "elementwise"
    reference = "Matena and Raffel, NeurIPS 2022, arXiv:2111.09832"
    Params = FisherParameters

    def needs(self, p: FisherParameters) -> Needs:
        plan: Literal["none", "scan"] = "none" if p.normalize == "none" else "scan"
        return Needs(base="unused", stats=("fisher",), plan=plan, compute="double")

    def plan(self, view: View, p: Callable[[str], FisherParameters], rng: Rng) -> Plan:
        for name in view.names:
            divisor_of(view.meta(name))
        if all(p(name).normalize == "none" for name in view.names):
            return EMPTY
        parts: dict[str, list[NDArray[np.float64]]] = {}

        def squares(u: Unit) -> NDArray[np.float64]:
            found = self.floored(u, p(u.name))
            return torch.stack([reduction.block_sums(f * f) for f in found]).cpu().numpy()

        for name, part in view.scan(squares):
            parts.setdefault(name, []).append(part)
        sums = {name: [reduction.fold(row) for row in np.concatenate(found, axis=1)] for name, found in parts.items()}
        whole: dict[bytes, float] = {}
        for name, values in sums.items():
            own = {m.id: value for m, value in zip(view.meta(name), values, strict=True)}
            whole |= {one: whole.get(one, 0.0) + value for one, value in own.items()}
        norms = {
            name: [
                math.sqrt((whole[m.id] if p(name).normalize == "model" else value) or 1.0)
                for m, value in zip(view.meta(name), values, strict=True)
            ]
            for name, values in sums.items()
            if p(name).normalize != "none"
        }
        return Plan({"norms": norms})

    def apply(self, u: Unit, plan: Plan, p: FisherParameters, rng: Rng) -> Tensor:
        c = u.weights()
        if p.normalize != "none":
            c = tuple(w / norm for w, norm in zip(c, plan["norms"][u.name], strict=True))
        f = weighted(self.floored(u, p), c)
        return total([one * x for one, x in zip(f, u.xs, strict=True)]) / total(f)

    @staticmethod
    def floored(u: Unit, p: FisherParameters) -> list[Tensor]:
        """max(F_i, floor)."""
        found = statistic(u, "fisher")
        floor = torch.full((1,), nearest(p.floor), dtype=found[0].dtype, device=found[0].device)
        return [torch.where(f < floor, floor, f) for f in found]


class RegressionParameters(Parameters):
    """Parameters of regression_mean."""

    alpha: Number = Field(Decimal("0.9"), ge=0, le=1, description="what off-diagonal entries are multiplied by")
    ridge: Number = Field(Decimal(0), ge=0, description="pull towards the mean, relative to the mean diagonal")
    layout: Literal["out_in", "in_out"] = Field(
        "out_in", description="whether a weight is [out, in], as in Linear, or [in, out], as in GPT-2's Conv1D"
    )


class RegressionMean(Strategy[RegressionParameters]):
    """RegMean: the linear layer that is nearest to all models' outputs on their own inputs.

        G_i  <- alpha G_i + (1 - alpha) diag(G_i),  G_i = X_i^T X_i / n_i
        W^T   = (sum_i a_i G_i)^-1 sum_i a_i G_i W_i^T,  a_i = w_i / sum_j w_j

    G_i is the Gram matrix [in, in] of the layer's inputs, which contribution i brings under the weight's own name in
    its statistic ``gram``; a weight [out, in, ...] is flattened to [out, in ...], as for convolutions. A tensor without
    a Gram matrix (bias, norm, embedding) is the weighted mean.

    It is solved as W^T = M^T + (sum_i a_i G_i + r I)^-1 sum_i a_i G_i (W_i - M)^T, M the weighted mean, which is the
    same for r = 0. ``ridge`` is r relative to the mean diagonal of the sum: it pulls towards the mean, not to zero.
    Inputs that no model has ever seen active (zero rows and columns) have the mean's weights. Where the sum is not
    positive definite (for alpha near 1: a feature of which others explain all but 2^-33), r is 2^-27 of the mean
    diagonal if ``ridge`` is less. Gram matrices are symmetrised by (G + G^T) / 2.

    Properties: commutative; idempotent; not associative (the two sums apart are).
    """

    name, version, family = "regression_mean", 1, "matrix"
    reference = "Jin et al., ICLR 2023, arXiv:2212.09849"
    Params = RegressionParameters

    def needs(self, p: RegressionParameters) -> Needs:
        return Needs(base="unused", stats=("gram",), unit="tensor", compute="double")

    def plan(self, view: View, p: Callable[[str], RegressionParameters], rng: Rng) -> Plan:
        for name in view.names:
            divisor_of(view.meta(name))
        return EMPTY

    def apply(self, u: Unit, plan: Plan, p: RegressionParameters, rng: Rng) -> Tensor:
        mean = divided(total(weighted(u.xs, u.weights())), divisor_of(u.meta))
        if "gram" not in u.stats or not mean.numel():
            return mean
        middle = self.matrix(u, mean, p)
        inputs, a = middle.shape[1], shares(u.meta)
        left, right = np.zeros((inputs, inputs)), np.zeros(middle.T.shape)
        for i, (x, w) in enumerate(zip(u.xs, a, strict=True)):
            g = self.gram(u, i, inputs, p) * w
            left = left + g
            right = right + matmul(g, (self.matrix(u, x, p) - middle).T)
        found = middle + self.solved(left, right, u, p).T
        return torch.from_numpy(np.ascontiguousarray(found.T if p.layout == "in_out" else found)).reshape(-1)

    @staticmethod
    def matrix(u: Unit, x: Tensor, p: RegressionParameters) -> Matrix:
        """A flat weight as [out, in]."""
        if len(u.shape) < 2:
            raise MismatchError(
                f"tensor {u.name!a}: it has shape {list(u.shape)} and a Gram matrix; only weights of two dimensions "
                "or more have inputs. Compute the statistic 'gram' again for these models."
            )
        flat: Matrix = x.cpu().numpy()
        return flat.reshape(-1, u.shape[-1]).T if p.layout == "in_out" else flat.reshape(u.shape[0], -1)

    @staticmethod
    def gram(u: Unit, i: int, inputs: int, p: RegressionParameters) -> Matrix:
        """G_i, symmetric and with its off-diagonal entries shrunk. Raises MismatchError, InputError."""
        flat: Matrix = u.stats["gram"][i].cpu().numpy()
        who = u.meta[i].id.hex()[:16]
        if flat.size != inputs * inputs:
            raise MismatchError(
                f"tensor {u.name!a}: the Gram matrix of contribution {who} has {flat.size} entries; the tensor, "
                f"{list(u.shape)}, has {inputs} inputs, so {inputs} x {inputs} are needed. Compute it again, or say "
                "--param layout=in_out if the weight is transposed."
            )
        square = flat.reshape(inputs, inputs)
        square = (square + square.T) * 0.5
        diagonal = square.diagonal().copy()
        if not np.isfinite(square).all() or bool((diagonal < 0).any()):
            raise InputError(
                f"tensor {u.name!a}: the Gram matrix of contribution {who} holds numbers that are not finite or a "
                "negative square on its diagonal. Compute it again."
            )
        square = square * nearest(p.alpha)
        np.fill_diagonal(square, diagonal)
        return square

    @staticmethod
    def solved(left: Matrix, right: Matrix, u: Unit, p: RegressionParameters) -> Matrix:
        """(left + r I)^-1 right, zero where an input was never active. Raises InputError."""
        n = len(left)
        size = reduction.fold(left.diagonal()) / n
        dead = ~left.any(axis=0)
        least = nearest(p.ridge)
        for ridge in (least, RIDGE) if least < RIDGE else (least,):
            g = left.copy()
            np.fill_diagonal(g, np.where(dead, 1.0, left.diagonal() + ridge * size))
            if ridge < RIDGE and p.alpha > WELL_CONDITIONED and not _definite(g):
                continue
            x = cholesky_solve(g, right)
            if x is not None:
                return x
        raise InputError(
            f"tensor {u.name!a}: the sum of its Gram matrices is not positive semidefinite, as X^T X always is. "
            "Compute the statistic 'gram' again."
        )


def _definite(g: Matrix) -> bool:
    """Whether every feature has a part of its own that is well above rounding."""
    factor = cholesky(g)
    if factor is None:
        return False
    pivots = factor.diagonal() * factor.diagonal()
    return bool((pivots > g.diagonal() * SMALLEST_PIVOT).all())


class LedParameters(WithLambda):
    """Parameters of led_merge."""

    density: Share = Field(Decimal("0.5"), description="share of each tensor that is elected, by importance")


class LedMerge(Strategy[LedParameters]):
    """LED-Merging: of each model what matters to it and to its base, and to no other model.

        M_i   = top(S_i) and top(S0_i):  the max(1, floor(density n)) most important elements of the tensor, by both
        M^_i  = M_i minus the union of all other M_j
        theta = theta_0 + lambda sum_i w_i M^_i tau_i

    S_i is the importance |theta| sum_x |grad L(x)| of each element of the fine-tuned model for its task (statistic
    ``importance``), S0_i that of each element of the base for the same task (``importance_base``). Exactly so many are
    elected; of equal importances those at lower indices, zeros too. No element is taken from two models.

    Properties: commutative; neither associative nor idempotent (of two equal models everything conflicts, and the
    base is left).
    """

    name, version, family = "led_merge", 1, "statistics"
    reference = "Ma et al., ACL 2025, arXiv:2502.16770"
    Params = LedParameters

    def needs(self, p: LedParameters) -> Needs:
        stats = ("importance", "importance_base")
        return Needs(base="required", stats=stats, unit="tensor", compute="double", weights="any")

    def apply(self, u: Unit, plan: Plan, p: LedParameters, rng: Rng) -> Tensor:
        assert u.base is not None
        own, origin = statistic(u, "importance"), statistic(u, "importance_base")
        n = u.base.numel()
        top, bottom = p.density.as_integer_ratio()
        count = min(n, max(1, top * n // bottom))
        elected = [largest(s, count) & largest(s0, count) for s, s0 in zip(own, origin, strict=True)]
        claims: Any = torch.zeros(n, dtype=torch.int64, device=u.base.device)
        for m in elected:
            claims = claims + m.to(torch.int64)
        taus = weighted(u.task_vectors(), u.weights())
        kept = [torch.where(m & (claims == 1), t, torch.zeros_like(t)) for m, t in zip(elected, taus, strict=True)]
        return u.base + total(kept) * u.scalar(p.lambda_)


STRATEGIES = (FisherMerge, RegressionMean, LedMerge)
