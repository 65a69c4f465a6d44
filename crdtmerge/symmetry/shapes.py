"""Rules of operators that move elements: views, transpositions, copies, slices, concatenation.

Each gives the result's dimensions in atoms of the arguments' (``rules``).
"""

from __future__ import annotations

import math

from crdtmerge.symmetry.atoms import Dim
from crdtmerge.symmetry.table import Found, rule
from crdtmerge.symmetry.values import Call, NotUnderstoodError, Value, one, regrouped, same_size


@rule("view reshape flatten _unsafe_view unflatten unsqueeze squeeze _reshape_alias view_as reshape_as", pointing=True)
def view(c: Call) -> Value:
    """The same elements in the same row-major order."""
    x = c.values()[0]
    return regrouped(c.atoms, x, c.shape)


@rule("permute transpose t movedim swapaxes numpy_T mT moveaxis swapdims adjoint matrix_H mH", pointing=True)
def permute(c: Call) -> Value:
    """Dimensions in another order."""
    x = c.values()[0]
    order = list(range(len(x.dims)))
    if c.name == "permute":
        order = c.axes(x, "dims")
    elif c.name in ("transpose", "swapaxes", "swapdims"):
        first, second = ("dim0", "dim1") if "dim0" in c.args else ("axis0", "axis1")
        i, j = c.axis(x, first), c.axis(x, second)
        order[i], order[j] = order[j], order[i]
    elif c.name in ("t", "numpy_T"):
        order.reverse()
    elif c.name == "mT":
        order[-2:] = [order[-1], order[-2]]
    else:
        raise NotUnderstoodError
    origin = tuple((name, tuple(of[i] for i in order)) for name, of in x.origin)
    return Value([x.dims[i] for i in order], c.shape, x.points, origin=origin)


@rule("expand expand_as broadcast_to repeat repeat_interleave tile", pointing=True)
def expand(c: Call) -> Value:
    """Copies along a dimension may be reordered freely: [n] repeated is (copies, n), interleaved (n, copies)."""
    x = c.values()[0]
    if len(c.values()) > 1 and c.name != "expand_as":
        raise NotUnderstoodError
    lacking = len(c.shape) - len(x.dims)
    dims = [c.atoms.dim(size) for size in c.shape[:lacking]]
    for size, old, dim in zip(c.shape[lacking:], x.shape, x.dims, strict=True):
        if one(old):
            dims.append(c.atoms.dim(size))
        elif type(size) is int and type(old) is int and size % old == 0:
            copies = c.atoms.dim(size // old)
            dims.append((*dim, *copies) if c.name == "repeat_interleave" else (*copies, *dim))
        elif type(size) is not int and type(old) is not int and c.name.startswith(("expand", "broadcast")):
            dims.append(dim)
        else:
            raise NotUnderstoodError
    new: tuple[frozenset[int], ...] = (frozenset(),) * lacking
    origin = tuple((name, new + of) for name, of in x.origin)
    return Value(dims, c.shape, x.points, origin=origin)


def stretch(c: Call, dim: Dim, size: object, start: int, length: int) -> Dim:
    """Elements start, ..., start + length - 1 of a dimension: equal parts of it, whose order is frozen.

    Raises NotUnderstoodError where the parts would be single elements.
    """
    if same_size(length, size):
        return dim
    unit = math.gcd(size, start, length) if type(size) is int else 1
    if unit < 2 or type(size) is not int:
        c.freeze(dim)
        return c.atoms.dim(length, frozen=True)
    parts, inner = c.atoms.divided(dim, size // unit)
    c.freeze(parts)
    return (*c.atoms.dim(length // unit, frozen=True), *inner)


@rule("slice narrow", pointing=True)
def slice_(c: Call) -> Value:
    """Equal parts of a dimension, or one of each of its equal parts."""
    x = c.values()[0]
    at = c.axis(x)
    size, length = x.shape[at], c.shape[at]
    start, step = c.args.get("start") or 0, c.args.get("step") or 1
    if step == 1 and same_size(size, length):
        return x.replaced(at, x.dims[at], c.shape)
    if not all(type(n) is int for n in (size, length, start, step)):
        c.freeze(x.dims[at])
        return x.replaced(at, c.atoms.dim(length, frozen=True), c.shape)
    start = start + size if start < 0 else start
    if step == 1:
        return x.replaced(at, stretch(c, x.dims[at], size, start, length), c.shape)
    if size % step or length != size // step:
        raise NotUnderstoodError
    outer, inner = c.atoms.divided(x.dims[at], length)
    c.freeze(inner)
    return x.replaced(at, outer, c.shape)


@rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes", pointing=True)
def split(c: Call) -> list[Value]:
    """Slices one after the other."""
    x = c.values()[0]
    at = c.axis(x)
    found, start = [], 0
    for shape in c.outs:
        if shape is None or type(shape[at]) is not int:
            raise NotUnderstoodError
        found.append(x.replaced(at, stretch(c, x.dims[at], x.shape[at], start, shape[at]), shape))
        start += shape[at]
    return found


@rule("glu")
def glu(c: Call) -> Value:
    """The first half of a dimension, times a function of the second."""
    x = c.values()[0]
    at = c.axis(x)
    half = c.shape[at]
    return x.replaced(at, stretch(c, x.dims[at], x.shape[at], half, half), c.shape)


@rule("select unbind", pointing=True)
def select(c: Call) -> Found:
    """One place of a dimension, or each: it is frozen."""
    x = c.values()[0]
    at = c.axis(x)
    c.freeze(x.dims[at])
    origin = tuple((name, (*of[:at], *of[at + 1 :])) for name, of in x.origin)
    found = [Value([*x.dims[:at], *x.dims[at + 1 :]], shape or (), x.points, origin=origin) for shape in c.outs]
    return found if c.name == "unbind" else found[0]


@rule("cat concat concatenate stack")
def cat(c: Call) -> Value:
    """Equal parts of the dimension are reordered alike; which part stands where is frozen."""
    parts = c.values()
    if c.name == "stack":
        parts = [Value([*x.dims, ()], (*x.shape, 1)) for x in parts]
        at = int(c.args.get("dim") or 0) % len(c.shape)
        parts = [_moved(x, at) for x in parts]
    else:
        at = c.axis(parts[0])
    if any(len(x.dims) != len(c.shape) for x in parts):
        raise NotUnderstoodError
    for x in parts[1:]:
        for i, dim in enumerate(x.dims):
            if i != at:
                c.unite(parts[0].dims[i], dim)
    sizes = [x.shape[at] for x in parts]
    unit = math.gcd(*sizes) if all(type(size) is int for size in sizes) else 1
    if unit < 2:
        c.freeze(*(x.dims[at] for x in parts))
        return parts[0].replaced(at, c.atoms.dim(c.shape[at], frozen=True), c.shape)
    inner: Dim | None = None
    for x, size in zip(parts, sizes, strict=True):
        order, within = c.atoms.divided(x.dims[at], size // unit)
        c.freeze(order)
        if inner is not None:
            c.unite(inner, within)
        inner = within
    assert inner is not None, "something is put together"
    found = parts[0].replaced(at, (*c.atoms.dim(c.shape[at] // unit, frozen=True), *inner), c.shape)
    found.origin = ()
    return found


def _moved(x: Value, at: int) -> Value:
    """A value whose last dimension comes to ``at``."""
    dims, shape = list(x.dims), list(x.shape)
    dims.insert(at, dims.pop())
    shape.insert(at, shape.pop())
    return Value(dims, tuple(shape))


@rule("select_scatter slice_scatter")
def put_back(c: Call) -> Value:
    """x with one place of a dimension, or a run of places, set to those of another tensor."""
    x, source = c.value("self"), c.value("src")
    at = c.axis(x)
    if c.name == "select_scatter":
        c.freeze(x.dims[at])
        source = Value([*source.dims[:at], (), *source.dims[at:]], (*source.shape[:at], 1, *source.shape[at:]))
    else:
        if (c.args.get("step") or 1) != 1:
            raise NotUnderstoodError
        length, start = source.shape[at], c.args.get("start") or 0
        if not same_size(length, x.shape[at]) and start < 0:
            start += x.shape[at]
        c.unite(stretch(c, x.dims[at], x.shape[at], start, length), source.dims[at])
    for i, dim in enumerate(x.dims):
        if i != at:
            c.unite(dim, source.dims[i])
    return Value(list(x.dims), c.shape)


@rule("view_as_real view_as_complex")
def as_complex(c: Call) -> Value:
    """A last dimension of two for the two parts of a number, which is frozen."""
    x = c.values()[0]
    if c.name == "view_as_real":
        return Value([*x.dims, c.atoms.dim(2, frozen=True)], c.shape)
    c.freeze(x.dims[-1])
    return Value(x.dims[:-1], c.shape)
