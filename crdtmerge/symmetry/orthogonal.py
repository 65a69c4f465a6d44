"""Residual streams that may be turned by any orthogonal matrix: linear maps, sums and RMS norms touch nothing else.

    norm(x) = s * x / rms(x)       rms(Q x) = rms(x)       W (s * y) = (W diag(s)) y
    fold:  W <- W diag(s), s <- 1     for every W that takes in a norm's output
    turn:  x_i <- sum_j Q_ij x_j      along the residual axis of every other tensor: W_out <- Q W_out, W_in <- W_in Q^T

Once all scales are folded the network computes the same for every orthogonal Q, of which permutations are the least
part. LayerNorm takes away the mean and knows permutations only. Q brings one network onto another by Procrustes'
problem: Q = U V^T for the singular vectors of S = sum_t A_t B_t^T. (Ashkboos et al., SliceGPT, ICLR 2024,
arXiv:2401.15024, for the folding; Theus et al., Generalized linear mode connectivity for transformers, NeurIPS 2025,
arXiv:2506.22712.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import MismatchError, NeedsError
from crdtmerge.numerics.decompositions import SIDE_MAX, svd
from crdtmerge.numerics.elementary import sqrt
from crdtmerge.numerics.products import column_sums, matmul
from crdtmerge.symmetry.groups import Axis, Symmetry

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]


class Norm(NamedTuple):
    """An RMS norm of the residual stream: its scale, and the weights that take in what it gives, by axis."""

    scale: str
    consumers: tuple[tuple[str, int], ...]


class Residual(NamedTuple):
    """A group of a symmetry that may be turned: its index and its norms. As JSON: ``_asdict`` and ``residual_of``."""

    group: int
    norms: tuple[Norm, ...]


def residual_of(table: Mapping[str, Any]) -> Residual:
    """The residual that a JSON object says."""
    norms = [Norm(str(scale), tuple((str(name), int(at)) for name, at in taken)) for scale, taken in table["norms"]]
    return Residual(int(table["group"]), tuple(norms))


def residuals(exported: ExportedProgram, symmetry: Symmetry) -> list[Residual]:
    """The groups of a program's symmetry that may be turned by orthogonal matrices once their norms are folded.

    Understood are ``embedding``, ``linear``, sums of two residual values, ``rms_norm``, the same written out (square,
    mean, epsilon, rsqrt, product, scale), and changes of dtype. A group with an axis in any other place, or whose
    values meet any other operator, is left out; so is one where a weight takes in a norm's output and is used elsewhere
    too (a tied embedding), since nothing can be folded into it.
    """
    found = []
    for index, group in enumerate(symmetry.groups):
        walk = _Walk(exported, group.axes, symmetry)
        norms = walk.norms()
        if norms is not None:
            found.append(Residual(index, norms))
    return found


def folded(model: Tensors, residual: Residual, symmetry: Symmetry) -> dict[str, Array]:
    """The model with each norm's scale in the weights that take in its output, and ones in its place."""
    found = dict(model)
    for norm in residual.norms:
        scale = model[norm.scale]
        for name, at in norm.consumers:
            split = found[name].reshape(symmetry.factors(name))
            wide = scale.reshape([-1 if i == at else 1 for i in range(split.ndim)])
            found[name] = (split * wide).reshape(found[name].shape)
        found[norm.scale] = np.ones_like(scale)
    return found


def rotated(model: Tensors, residual: Residual, symmetry: Symmetry, q: Array) -> dict[str, Array]:
    """A folded model with its residual stream turned by an orthogonal q [d, d].

    Raises MismatchError for scales that are not ones, and for a q that is not orthogonal.
    """
    size = symmetry.groups[residual.group].size
    if q.shape != (size, size) or not np.abs(matmul(q, np.ascontiguousarray(q.T)) - np.eye(size)).max() < 1e-6:
        raise MismatchError(f"a residual stream of {size} is turned by an orthogonal matrix [{size}, {size}].")
    _require_folded(model, residual)
    found = dict(model)
    for name, at, _ in _turning(residual, symmetry):
        x = np.moveaxis(model[name].reshape(symmetry.factors(name)), at, 0)
        turned = matmul(q, x.reshape(size, -1)).reshape(x.shape)
        found[name] = np.moveaxis(turned, 0, at).reshape(model[name].shape)
    return found


def align_residual(
    residual: Residual,
    symmetry: Symmetry,
    reference: Tensors,
    model: Tensors,
    *,
    everything: bool = False,
    features: tuple[Array, Array] | None = None,
) -> Array:
    """The orthogonal q [d, d] with which ``rotated`` brings a folded model nearest to a folded reference.

        q = argmax sum_t <A_t, rotated(B_t, q)> = U V^T,   sum_t A_t B_t^T = U diag(s) V^T
        features X, Y:  q = argmax sum_n <x_n / ||x_n||, q y_n / ||y_n||>

    The first sum is over tensors that no other group reorders (embeddings, heads): they can be compared before anything
    else is matched. With ``everything`` it is over all, for models whose other groups are matched. With ``features``,
    the residual values of the reference and of the model for the same tokens, float64 [d, samples] each, it is over
    those instead, each token of length one as the norms see it. The same bits everywhere for d <= 512; beyond, numpy's
    decomposition. Raises NeedsError where what is compared does not tell all d directions, MismatchError for features
    of other shapes.
    """
    _require_folded(reference, residual)
    _require_folded(model, residual)
    size = symmetry.groups[residual.group].size
    s = np.zeros((size, size))
    if features is not None:
        x, y = features
        require_features(size, x, y)
        s = matmul(_unit_columns(x), np.ascontiguousarray(_unit_columns(y).T))
    else:
        for name, at, _ in _turning(residual, symmetry):
            if everything or len(symmetry.of_tensor[name]) == 1:
                factors = symmetry.factors(name)
                a, b = (np.moveaxis(one[name].reshape(factors), at, 0).reshape(size, -1) for one in (reference, model))
                s = s + matmul(a, np.ascontiguousarray(b.T))
    q = procrustes(s)
    if q is None:
        raise NeedsError(
            f"what is compared tells fewer than the {size} directions of the residual stream; give features of more "
            "tokens, or match the other groups first, then compare all tensors (everything=True)."
        )
    return q


def procrustes(s: Array) -> Array | None:
    """argmax <S, Q> over orthogonal Q [n, n] = U V^T,  S = U diag(s) V^T;  None where S has not full rank.

    The same bits everywhere for n <= 512; beyond, numpy's decomposition. (Schoenemann, Psychometrika 31, 1966.)

    >>> procrustes(np.array([[0.0, 2.0], [-3.0, 0.0]])).round(12) + 0.0
    array([[ 0.,  1.],
           [-1.,  0.]])
    """
    u, values, vt = svd(s) if len(s) <= SIDE_MAX else np.linalg.svd(s)
    if len(values) < len(s) or values[-1] <= 1e-12 * values[0]:
        return None
    return matmul(u, vt)


def require_features(size: int, x: Array, y: Array) -> None:
    """Raise MismatchError unless both are [size, samples]."""
    if x.ndim != 2 or x.shape != y.shape or len(x) != size:
        raise MismatchError(
            f"features of {size} units of two models are [{size}, samples] each, of the same samples, not "
            f"{list(x.shape)} and {list(y.shape)}."
        )


def _unit_columns(x: Array) -> Array:
    """Columns of length one; zeros stay zeros."""
    length = sqrt(column_sums(x * x))
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def _turning(residual: Residual, symmetry: Symmetry) -> list[Axis]:
    """The axes that are turned: all but the scales."""
    scales = {norm.scale for norm in residual.norms}
    return [axis for axis in symmetry.groups[residual.group].axes if axis.tensor not in scales]


def _require_folded(model: Tensors, residual: Residual) -> None:
    for norm in residual.norms:
        if (model[norm.scale] != 1.0).any():
            raise MismatchError(f"tensor {norm.scale!a} scales the residual stream; fold the norms first.")


RAW, SQUARE, MEAN, INVERSE, NORMED = "raw", "square", "mean", "inverse", "normed"

_SAME = ("to", "_to_copy", "dropout", "clone", "contiguous", "alias", "detach")


class _State(NamedTuple):
    """What a value is: of which residual value it was made, and the scale that it was multiplied by."""

    kind: str
    root: str = ""
    scale: str = ""


class _Walk:
    """One pass over a graph for one group."""

    def __init__(self, exported: ExportedProgram, axes: Sequence[Axis], symmetry: Symmetry) -> None:
        signature = exported.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._nodes = list(exported.graph_module.graph.nodes)
        self._axes = {axis[:2] for axis in axes}
        self._last = {name: len(symmetry.factors(name)) - 1 for name, _ in self._axes}
        dims = {name: symmetry.tensors[name] for name, _ in self._axes}
        split = {(name, 0) for name, d in dims.items() if len(d[0]) > 1}
        self._split = split | {(name, self._last[name]) for name, d in dims.items() if len(d[-1]) > 1}
        self._shared = {name for names in symmetry.tied for name in names}
        self._states: dict[str, _State] = {}
        self._seen: set[tuple[str, int]] = set()
        self._taken: dict[str, list[tuple[str, int]]] = {}

    def norms(self) -> tuple[Norm, ...] | None:
        """The norms of the group; None if it may not be turned."""
        for node in self._nodes:
            if node.op == "placeholder" or operator_of(node) == "_assert_tensor_metadata":
                continue
            given = [self._states.get(arg.name) for arg in node.all_input_nodes]
            state = self._of(node)
            if state is None and any(given) and not self._consumed(node):
                return None
            if state is not None:
                self._states[node.name] = state
        if self._seen != self._axes or not self._foldable():
            return None
        return tuple(Norm(scale, tuple(taken)) for scale, taken in sorted(self._taken.items()) if scale)

    def _foldable(self) -> bool:
        """Whether each weight that takes in a scaled value is used for nothing else."""
        taken = [use for scale, uses in self._taken.items() if scale for use in uses]
        uses: dict[str, int] = {}
        for node in self._nodes:
            for arg in node.all_input_nodes:
                if arg.name in self._names:
                    uses[self._names[arg.name]] = uses.get(self._names[arg.name], 0) + 1
        scales = [scale for scale in self._taken if scale]
        once = all(uses.get(name) == 1 and name not in self._shared for name, _ in taken)
        return once and all(uses.get(scale) == 1 and scale not in self._shared for scale in scales)

    def _owns(self, given: Any, at: int | None = None) -> str | None:
        """The name of a parameter with an axis of the group there (at its end unless said), which counts as seen."""
        name: str | None = self._names.get(getattr(given, "name", ""))
        if name is None or name not in self._last:
            return None
        place = (name, self._last[name] if at is None else at)
        if place not in self._axes or place in self._split:
            return None
        self._seen.add(place)
        return name

    def _consumed(self, node: Node) -> bool:
        """Whether a node is a linear layer that takes in a residual or a normed value."""
        if operator_of(node) != "linear":
            return False
        state = self._states.get(getattr(node.args[0], "name", ""))
        weight = self._owns(node.args[1])
        others = [arg for arg in node.all_input_nodes[1:] if arg.name in self._states]
        if state is None or state.kind not in (RAW, NORMED) or weight is None or others:
            return False
        self._taken.setdefault(state.scale, []).append((weight, self._last[weight]))
        return True

    def _of(self, node: Node) -> _State | None:
        """What a node's value is; None if it is nothing of the group's."""
        name, args = operator_of(node), list[Any](node.args)
        states = [self._states.get(getattr(arg, "name", "")) for arg in args]
        first = states[0] if states else None
        second = states[1] if len(states) > 1 else None
        if name == "embedding" and self._owns(args[0]):
            return _State(RAW)
        if name == "linear" and first is None and self._owns(args[1], 0):
            unbiased = len(args) < 3 or args[2] is None
            return _State(RAW) if unbiased or self._owns(args[2]) else None
        if name in _SAME and first is not None:
            return first._replace(root=self._root(args[0], first))
        if name == "add" and not node.kwargs:
            return self._sum(args, states)
        if name == "rms_norm" and first is not None and first.kind == RAW:
            return self._scaled(_State(NORMED, "rms"), args[2] if len(args) > 2 else None, args[1])
        if name == "pow" and first is not None and first.kind == RAW and args[1] == 2:
            return _State(SQUARE, self._root(args[0], first))
        if (
            name == "mean"
            and first is not None
            and first.kind == SQUARE
            and list(args[1]) == [-1]
            and args[2:] == [True]
        ):
            return first._replace(kind="mean")
        if name == "rsqrt" and first is not None and first.kind == "mean":
            return first._replace(kind=INVERSE)
        if name == "mul":
            return self._product(args, first, second)
        return None

    def _root(self, given: Any, state: _State) -> str:
        return state.root or str(given.name)

    def _sum(self, args: list[Any], states: list[_State | None]) -> _State | None:
        kinds = [state.kind if state else None for state in states[:2]]
        if kinds[0] == MEAN and isinstance(args[1], float | int):
            return states[0]
        raw = [kind == RAW or (kind is None and self._owns(arg)) for kind, arg in zip(kinds, args, strict=False)]
        return _State(RAW) if len(raw) == 2 and all(raw) else None

    def _product(self, args: list[Any], first: _State | None, second: _State | None) -> _State | None:
        if first is None or second is None:
            state, other = (first, args[1]) if second is None else (second, args[0])
            if state is None or state.kind != NORMED or state.scale:
                return None
            return self._scaled(state, other, None)
        pair = sorted([(first, args[0]), (second, args[1])], key=lambda one: one[0].kind)
        (inverse, _), (raw, value) = pair
        if inverse.kind == INVERSE and raw.kind == RAW and inverse.root == self._root(value, raw):
            return _State(NORMED, inverse.root)
        return None

    def _scaled(self, state: _State, scale: Any, shape: Any) -> _State | None:
        if shape is not None and len(shape) != 1:
            return None
        if scale is None:
            return state
        name = self._owns(scale)
        if name is None or self._last[name] != 0:
            return None
        self._taken.setdefault(name, [])
        return state._replace(scale=name)


def operator_of(node: Node) -> str:
    """The name of the operator that a node of a graph calls; nothing for other nodes."""
    return str(node.target).partition(".")[2].partition(".")[0] if node.op == "call_function" else ""
