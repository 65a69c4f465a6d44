"""Rules of operators that look places up by indices: embeddings, gathering, scattering, one-hot vectors.

Each gives the result's dimensions in atoms of the arguments' (``rules``).
"""

from __future__ import annotations

from crdtmerge.symmetry.atoms import Dim
from crdtmerge.symmetry.table import rule
from crdtmerge.symmetry.values import Call, NotUnderstoodError, Value, one, same_size


@rule("embedding", pointing=True)
def embedding(c: Call) -> Value:
    """Rows of a weight: frozen, unless the indices follow a dimension's permutation."""
    w, index = c.value("weight"), c.value("indices")
    _looked_up(c, w.dims[0], index)
    return Value([*index.dims, *w.dims[1:]], c.shape, w.points)


def _looked_up(c: Call, dim: Dim, index: Value) -> None:
    if index.points is None:
        c.freeze(dim)
    else:
        c.unite(dim, index.points)


@rule("index_select", pointing=True)
def index_select(c: Call) -> Value:
    """Places of a dimension by a list of indices."""
    x, index = c.value("self"), c.value("index")
    at = c.axis(x)
    _looked_up(c, x.dims[at], index)
    return x.replaced(at, index.dims[0] if index.dims else (), c.shape)


@rule("index", pointing=True)
def index_(c: Call) -> Value:
    """Places by tensors of indices, which stand for dimensions beside each other."""
    x = c.value("self")
    first, after, together = _places(c, x, len(c.shape))
    return Value([*x.dims[:first], *together, *x.dims[after:]], c.shape, x.points)


@rule("index_put _index_put_impl")
def index_put(c: Call) -> Value:
    """x with places, by tensors of indices, set to values or added to."""
    x, values = c.value("self"), c.value("values")
    held = [index for index in c.args["indices"] if index is not None]
    count = max(len(index.dims) for index in held)
    first, after, together = _places(c, x, len(x.dims) - len(held) + count)
    dims = [*x.dims[:first], *together, *x.dims[after:]]
    for back in range(1, len(values.dims) + 1):
        if not one(values.shape[-back]):
            c.unite(dims[-back], values.last(back))
    return Value(list(x.dims), c.shape)


def _places(c: Call, x: Value, rank: int) -> tuple[int, int, list[Dim]]:
    """The first dimension that indices look up, the one after the last, and the indices' own dimensions."""
    held = [(i, index) for i, index in enumerate(c.args["indices"]) if index is not None]
    first, after = held[0][0], held[-1][0] + 1
    if after - first != len(held) or any(index.mask for _, index in held):
        raise NotUnderstoodError
    for i, index in held:
        _looked_up(c, x.dims[i], index)
    count = rank - (len(x.dims) - len(held))
    shape = [1] * count
    for _, index in held:
        for back, size in enumerate(reversed(index.shape), 1):
            shape[-back] = shape[-back] if one(size) else size
    return first, after, c.broadcast([Value(index.dims, index.shape) for _, index in held], tuple(shape)).dims


@rule("index_add index_copy")
def index_add(c: Call) -> Value:
    """x with places of a dimension, by a list of indices, added to or set."""
    x, index, source = c.value("self"), c.value("index"), c.value("source")
    at = c.axis(x)
    _looked_up(c, x.dims[at], Value(index.dims, index.shape))
    for i, dim in enumerate(source.dims):
        c.unite(dim, index.dims[0] if i == at else x.dims[i])
    return Value(list(x.dims), c.shape)


@rule("gather take_along_dim", pointing=True)
def gather(c: Call) -> Value:
    """result[.., i, ..] = x[.., index[.., i, ..], ..]"""
    x, index = c.value("self"), c.args.get("index", c.args.get("indices"))
    if not isinstance(index, Value) or len(index.dims) != len(x.dims):
        raise NotUnderstoodError
    _beside(c, x, index, c.axis(x))
    return Value(list(index.dims), c.shape, x.points)


def _beside(c: Call, x: Value, index: Value, at: int) -> None:
    """Unite the dimensions of x and of indices into one of them; where indices stop early x is frozen."""
    for i, dim in enumerate(x.dims):
        if i == at:
            _looked_up(c, dim, index)
        elif same_size(index.shape[i], x.shape[i]):
            c.unite(dim, index.dims[i])
        else:
            c.freeze(dim, index.dims[i])


@rule("scatter scatter_add scatter_reduce", pointing=True)
def scatter(c: Call) -> Value:
    """x with x[.., index[.., i, ..], ..] set to source[.., i, ..], or added to."""
    x, index, source = c.value("self"), c.value("index"), c.args.get("src")
    c.freeze(*(v.points for v in (x, source) if isinstance(v, Value) and v.points is not None))
    _beside(c, x, index, c.axis(x))
    if isinstance(source, Value):
        for i, dim in enumerate(source.dims):
            if same_size(source.shape[i], index.shape[i]):
                c.unite(dim, index.dims[i])
            else:
                c.freeze(dim, index.dims[i])
    return Value(list(x.dims), c.shape)


@rule("one_hot", pointing=True)
def one_hot(c: Call) -> Value:
    """One at an index, zero elsewhere: [...] -> [..., classes]."""
    x = c.values()[0]
    size = c.shape[-1]
    if x.points is None or c.atoms.total(x.points) != size:
        c.freeze(x.points or ())
        return Value([*x.dims, c.atoms.dim(size, frozen=True)], c.shape)
    return Value([*x.dims, x.points], c.shape)
