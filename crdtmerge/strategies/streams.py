"""Transformers from different starts brought together: residual streams and heads are turned, other units reordered.

    fold the norms
    residual streams       Procrustes of features, of embeddings without any
    units                  correlations of features, weights without any
    heads, their widths    circuits, Procrustes of weights

Permutations are the least part of what a transformer with RMS norms does not notice (``symmetry.orthogonal``,
``symmetry.heads``). Tensors are float64 arrays by name. Class E up to 512 of any size that is turned: exact products,
sums of a fixed order, Jacobi's rotations, assignments of integers; features come as data. (The order of the steps is
ours; Theus et al., Generalized linear mode connectivity for transformers, NeurIPS 2025, arXiv:2506.22712, learn it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crdtmerge.errors import NeedsError
from crdtmerge.numerics.assignment import best_assignment
from crdtmerge.numerics.elementary import sqrt
from crdtmerge.numerics.products import matmul, row_sums
from crdtmerge.strategies.matching import Array, Tensors, match_to
from crdtmerge.symmetry.derive import derived
from crdtmerge.symmetry.groups import Permutation, Symmetry
from crdtmerge.symmetry.heads import Width, align_width, match_heads, rotated_width, widths
from crdtmerge.symmetry.orthogonal import Residual, align_residual, folded, require_features, residuals, rotated

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Features = Mapping[int, tuple[Array, Array]]
"""By group of the symmetry: what the reference's and the model's units do on the same samples, [size, samples] each."""

CONSTANT = 1e-6
"""A spread that is this much of a unit's size, or less, is rounding."""


@dataclass(frozen=True)
class Freedom:
    """What a transformer does not notice: permutations of groups, turns of residual streams and of heads' widths."""

    symmetry: Symmetry
    residuals: tuple[Residual, ...]
    widths: tuple[Width, ...]

    def folded(self, model: Tensors) -> dict[str, Array]:
        """The model with the scales of all its norms in the weights after them: it computes the same."""
        found = dict(model)
        for residual in self.residuals:
            found = folded(found, residual, self.symmetry)
        return found


def freedom(exported: ExportedProgram) -> Freedom:
    """What an exported program does not notice.

    Raises NeedsError where no residual stream may be turned: for LayerNorm, which takes away a mean, for embeddings
    that are tied to the head, and for networks that are no transformers.
    """
    found = derived(exported)
    streams = tuple(residuals(exported, found.symmetry))
    if not streams:
        raise NeedsError(
            "no residual stream of this program may be turned: that needs RMS norms and untied embeddings. Align by "
            "permutations (strategy rebasin or dimat)."
        )
    return Freedom(found.symmetry, streams, tuple(widths(exported, found)))


def brought(reference: Tensors, model: Tensors, free: Freedom, features: Features | None = None) -> dict[str, Array]:
    """The model folded, turned and reordered towards the reference; it computes what it did.

        1. residual streams     argmax_q <X, q Y>, tokens of length one; without features, ``align_residual`` of tables
        2. groups of features   argmax_p sum_i corr(x_i, y_p[i])
        3. heads                by circuits, ``match_heads``
        4. groups that are left by weights, ``match_to``
        5. widths of each head  argmax_O <A_h, O B_h>, ``align_width``

    Mix it with ``free.folded(reference)``, not with the reference as it was.
    Features of heads and of their widths are not looked at where those are turned. Raises MismatchError for models or
    features of other shapes, NeedsError where a residual stream is not told by what is compared.
    """
    symmetry, given = free.symmetry, features or {}
    for label, one in (("the reference", reference), ("the model", model)):
        symmetry.check_fits({name: x.shape for name, x in one.items()}, label)
    ours, theirs = free.folded(reference), free.folded(model)
    for residual in free.residuals:
        q = align_residual(residual, symmetry, ours, theirs, features=given.get(residual.group))
        theirs = rotated(theirs, residual, symmetry, q)
    done = {one.group for one in free.residuals}.union(*({one.group, one.heads} for one in free.widths))
    orders = match_heads(free.widths, symmetry, ours, theirs)
    for group in sorted(set(given) - done):
        orders[group] = by_features(*given[group], symmetry.groups[group].size)
    theirs = {name: symmetry.turned(name, x, orders) for name, x in theirs.items()}
    left = Symmetry(
        tuple(group for i, group in enumerate(symmetry.groups) if i not in done and i not in given), symmetry.tensors
    )
    permutations = match_to(left, ours, theirs)
    theirs = {name: left.turned(name, x, permutations) for name, x in theirs.items()}
    for width in free.widths:
        theirs = rotated_width(theirs, width, symmetry, align_width(width, symmetry, ours, theirs))
    return theirs


def by_features(x: Array, y: Array, size: int) -> Permutation:
    """The permutation p with the greatest sum of correlations of x[i] and y[p[i]]; float64 [size, samples] each.

    A unit that is constant, its spread at most 10^-6 of its size, correlates with none.
    """
    require_features(size, x, y)
    (a, long_a), (b, long_b) = _centred(x), _centred(y)
    scale = long_a[:, None] * long_b[None, :]
    scores = matmul(a, np.ascontiguousarray(b.T))
    return best_assignment(np.divide(scores, scale, out=np.zeros_like(scores), where=scale > 0))


def _centred(x: Array) -> tuple[Array, Array]:
    """Rows less their means, and their lengths; zero where what is left is rounding."""
    rows = x - (row_sums(x) / x.shape[1])[:, None]
    length = sqrt(row_sums(rows * rows))
    return rows, np.where(length > CONSTANT * sqrt(row_sums(x * x)), length, 0.0)
