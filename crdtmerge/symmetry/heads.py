"""The widths of attention heads, which may be turned by orthogonal matrices of each head's own.

    scores of head h:  (W_q x)^T (W_k y) = x^T (W_q^T W_k) y       W_q, W_k <- O_h W_q, O_h W_k      O_h^T O_h = 1
    output of head h:  W_o (sum_t p_t W_v x_t)                     W_v, W_o <- P_h W_v, W_o P_h^T    P_h^T P_h = 1

Queries and keys meet in inner products alone, values only in the projection of the output; a bias of q, k or v is one
more column of its weight. The circuits W_q^T W_k and W_o W_v know nothing of what is inside a head: heads are matched
by them first, then each is turned in closed form. (Elhage et al., A mathematical framework for transformer circuits,
2021, for circuits; Theus et al., Generalized linear mode connectivity for transformers, NeurIPS 2025, arXiv:2506.22712,
for the symmetry.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crdtmerge.errors import MismatchError
from crdtmerge.numerics.assignment import best_assignment
from crdtmerge.numerics.elementary import sqrt
from crdtmerge.numerics.products import matmul, row_sums
from crdtmerge.symmetry.groups import Permutation, Symmetry
from crdtmerge.symmetry.orthogonal import Array, Tensors, operator_of, procrustes

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

    from crdtmerge.symmetry.derive import Derived

ATTENTION = "scaled_dot_product_attention"

MOVING = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute"),
    *("contiguous", "clone", "to", "alias"),
)
"""Operators between a layer and attention that put values elsewhere and do nothing else."""


class Width(NamedTuple):
    """A group of the units inside heads that may be turned, and what meets in it.

    ``group`` is its index in the symmetry, ``heads`` that of the group of heads beside it (None for a single head).
    ``left`` and ``right`` are the tensors on either side: of queries and of keys, or of values and of the output.
    """

    group: int
    heads: int | None
    left: tuple[str, ...]
    right: tuple[str, ...]


def widths(exported: ExportedProgram, found: Derived) -> list[Width]:
    """The widths of a program's attention that may be turned; ``found`` is what ``derived`` says of it.

    Understood is ``scaled_dot_product_attention`` whose operands come out of ``linear`` layers, and goes into one, by
    nothing but changes of shape, all used once. Where anything else touches a width it is left out: queries and keys
    that are turned by positions (RoPE) or normed; a fused projection that is cut; heads of keys and values that serve
    several of queries; parameters that are shared.
    """
    walk = _Walk(exported, found)
    pairs = []
    for node in exported.graph_module.graph.nodes:
        if operator_of(node) == ATTENTION and len(node.args) > 2:
            q, k, v = (walk.layer_before(node, at) for at in range(3))
            pairs.append((node.args[0], q, k))
            pairs.append((node, v, walk.layer_after(node)))
    return [one for value, left, right in pairs if (one := walk.width(value, left, right)) is not None]


def match_heads(turned: Sequence[Width], symmetry: Symmetry, reference: Tensors, model: Tensors) -> list[Permutation]:
    """Permutations that bring heads into the order of the reference's, by circuits; identities for other groups.

        p = argmax_p sum_h sum_w cos(C_w(A, h), C_w(B, p[h])),   C_w(A, h) = L_h^T R_h

    L and R are the two sides of width w, [width, in] each with biases as columns. <L^T R, L'^T R'> = <L L'^T, R R'^T>,
    so that no circuit is written out. The same bits everywhere.
    """
    found = symmetry.identities()
    for group in sorted({one.heads for one in turned if one.heads is not None}):
        size = symmetry.groups[group].size
        scores = np.zeros((size, size))
        for width in turned:
            if width.heads == group:
                scores = scores + _likeness(_sides(width, symmetry, reference), _sides(width, symmetry, model))
        found[group] = best_assignment(scores, found[group])
    return found


def align_width(width: Width, symmetry: Symmetry, reference: Tensors, model: Tensors) -> Array:
    """One orthogonal matrix a head, [heads, width, width], that brings a model's heads nearest to the reference's.

        O_h = argmax <L_h(A), O L_h(B)> + <R_h(A), O R_h(B)> = U V^T
        L_h(A) L_h(B)^T + R_h(A) R_h(B)^T = U diag(s) V^T

    For models whose heads and residual streams are matched. A head that tells fewer directions than it has, such as one
    of zeros, gets the identity. The same bits everywhere for widths of at most 512.
    """
    ours, theirs = _sides(width, symmetry, reference), _sides(width, symmetry, model)
    size = symmetry.groups[width.group].size
    found = []
    for h in range(len(ours[0])):
        left, right = (matmul(a[h], np.ascontiguousarray(b[h].T)) for a, b in zip(ours, theirs, strict=True))
        best = procrustes(left + right)
        found.append(np.eye(size) if best is None else best)
    return np.stack(found)


def rotated_width(model: Tensors, width: Width, symmetry: Symmetry, o: Array) -> dict[str, Array]:
    """A model with the width of each head h turned by an orthogonal o[h]; o is [heads, width, width].

    Raises MismatchError for matrices of other shapes, or that are not orthogonal.
    """
    size, count = symmetry.groups[width.group].size, _count(width, symmetry)
    if o.shape != (count, size, size) or any(np.abs(matmul(x, x.T) - np.eye(size)).max() > 1e-6 for x in o):
        raise MismatchError(f"{count} heads are turned by orthogonal matrices [{count}, {size}, {size}].")
    found = dict(model)
    for name in (*width.left, *width.right):
        heads, moved, places = _by_head(width, symmetry, name, model[name])
        turned = np.stack([matmul(q, x) for q, x in zip(o, heads, strict=True)]).reshape(moved)
        found[name] = np.moveaxis(turned, range(len(places)), places).reshape(model[name].shape)
    return found


def _count(width: Width, symmetry: Symmetry) -> int:
    return 1 if width.heads is None else symmetry.groups[width.heads].size


def _by_head(width: Width, symmetry: Symmetry, name: str, x: Array) -> tuple[Array, tuple[int, ...], list[int]]:
    """A tensor as [heads, width, columns]; its factors with heads and width in front, and where those were."""
    at = {group: position for position, group in symmetry.of_tensor[name]}
    places = [at[group] for group in (width.heads, width.group) if group is not None]
    moved = np.moveaxis(x.reshape(symmetry.factors(name)), places, range(len(places)))
    heads = moved.reshape(_count(width, symmetry), symmetry.groups[width.group].size, -1)
    return heads, moved.shape, places


def _sides(width: Width, symmetry: Symmetry, model: Tensors) -> tuple[Array, Array]:
    """The tensors of either side, side by side: [heads, width, columns] each."""
    left, right = (
        np.concatenate([_by_head(width, symmetry, name, model[name])[0] for name in names], axis=2)
        for names in (width.left, width.right)
    )
    return left, right


def _likeness(ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> Array:
    """The cosines of circuits, [heads, heads]; those of zeros are 0."""

    def product(one: tuple[Array, Array], i: int, other: tuple[Array, Array], j: int) -> float:
        left, right = (matmul(x[i], np.ascontiguousarray(y[j].T)) for x, y in zip(one, other, strict=True))
        return float(row_sums((left * right).reshape(1, -1))[0])

    heads = range(len(ours[0]))
    found = np.array([[product(ours, i, theirs, j) for j in heads] for i in heads])
    lengths = [sqrt(np.maximum([product(one, i, one, i) for i in heads], 0.0)) for one in (ours, theirs)]
    scale = lengths[0][:, None] * lengths[1][None, :]
    cosines: Array = np.divide(found, scale, out=np.zeros_like(found), where=scale > 0)
    return cosines


class _Walk:
    """What stands before and after attention in a graph."""

    def __init__(self, exported: ExportedProgram, found: Derived) -> None:
        signature = exported.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._found = found
        self._shared = {name for names in found.symmetry.tied for name in names}
        self._uses = Counter(
            self._names[arg.name]
            for node in exported.graph_module.graph.nodes
            for arg in node.all_input_nodes
            if arg.name in self._names
        )

    def layer_before(self, node: Node, at: int) -> tuple[str, ...] | None:
        """Weight and bias of the layer whose output is an operand; None if something else is."""
        value: Any = node.args[at]
        while operator_of(value) in MOVING and len(value.users) == 1:
            value = value.args[0]
        if operator_of(value) != "linear" or len(value.users) != 1:
            return None
        return self._owned(value.args[1:])

    def layer_after(self, node: Node) -> tuple[str, ...] | None:
        """Weight of the layer that takes in the result; None if something else does."""
        value = node
        while len(value.users) == 1:
            (user,) = value.users
            if operator_of(user) == "linear" and user.args[0] is value and value not in user.args[1:]:
                return self._owned(user.args[1:2])
            if operator_of(user) not in MOVING:
                return None
            value = user
        return None

    def width(self, value: Node, left: tuple[str, ...] | None, right: tuple[str, ...] | None) -> Width | None:
        """The width that lies along the last dimension of a value, if its tensors are these and no others."""
        if left is None or right is None:
            return None
        symmetry = self._found.symmetry
        last = value.meta["val"].dim() - 1
        size = value.meta["val"].shape[-1]
        for group, carriers in enumerate(self._found.carriers):
            if not any((one.node, one.dimension, one.factors) == (value.name, last, (size,)) for one in carriers):
                continue
            axes = symmetry.groups[group].axes
            if sorted(axis.tensor for axis in axes) != sorted((*left, *right)):
                return None
            return self._whole(group, left, right)
        return None

    def _whole(self, group: int, left: tuple[str, ...], right: tuple[str, ...]) -> Width | None:
        """The width, if in each tensor it stands beside the same heads, or none, and both are a whole dimension."""
        symmetry = self._found.symmetry
        beside: set[int | None] = set()
        for name in (*left, *right):
            start = 0
            for factors in symmetry.tensors[name]:
                inside = {at: other for at, other in symmetry.of_tensor[name] if start <= at < start + len(factors)}
                start += len(factors)
                if group not in inside.values():
                    continue
                others = [other for other in inside.values() if other != group]
                if len(inside) != len(factors) or len(others) > 1:
                    return None
                beside.add(others[0] if others else None)
        return Width(group, beside.pop(), left, right) if len(beside) == 1 else None

    def _owned(self, given: Sequence[Any]) -> tuple[str, ...] | None:
        """The names of a layer's parameters, if each is used once."""
        names = [self._names.get(arg.name) for arg in given if arg is not None]
        if any(name is None or self._uses[name] != 1 or name in self._shared for name in names):
            return None
        return tuple(name for name in names if name is not None)
