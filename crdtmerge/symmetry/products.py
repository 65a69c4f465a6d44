"""Rules of operators that sum over a dimension of two tensors at once: layers, products, attention.

Each gives the result's dimensions in atoms of the arguments' (``rules``).
"""

from __future__ import annotations

from crdtmerge.symmetry.table import Found, rule
from crdtmerge.symmetry.values import Call, NotUnderstoodError, Value, one


@rule("linear")
def linear(c: Call) -> Value:
    """x [..., in], weight [out, in], bias [out]."""
    x, w = c.value("input"), c.value("weight")
    c.contract(x, -1, w, -1)
    if isinstance(bias := c.args.get("bias"), Value):
        c.unite(w.dims[0], bias.dims[0])
    return Value([*x.dims[:-1], *w.dims[:-1]], c.shape)


@rule("mm bmm matmul mv dot addmm baddbmm addmv")
def product(c: Call) -> Value:
    """x [..., n, k] times y [..., k, m], and something added to it."""
    *added, x, y = c.values()
    c.contract(x, -1, y, -2 if len(y.dims) > 1 else -1)
    left = [*x.dims[:-1]][-1:] if len(x.dims) > 1 else []
    right = [y.dims[-1]] if len(y.dims) > 1 else []
    batch = c.shape[: len(c.shape) - len(left) - len(right)]
    parts = [Value(v.dims[:-2], v.shape[:-2]) for v in (x, y)]
    found = Value([*c.broadcast(parts, batch).dims, *left, *right], c.shape)
    return c.broadcast([found, *added], c.shape) if added else found


@rule("outer ger")
def outer(c: Call) -> Value:
    """x [n], y [m] -> [n, m]."""
    x, y = c.values()
    return Value([x.dims[0], y.dims[0]], c.shape)


@rule("einsum")
def einsum(c: Call) -> Value:
    """Letters are dimensions; those that the result lacks are summed over."""
    operands = c.values()
    inputs, arrow, output = str(c.args["equation"]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(operands):
        raise NotUnderstoodError
    spelled = [_spelled(term, len(x.dims)) for term, x in zip(terms, operands, strict=True)]
    rest = max((len(s) - len(t.replace("...", "")) for s, t in zip(spelled, terms, strict=True)), default=0)
    result = _spelled(output, len(output.replace("...", "")) + (rest if "..." in output else 0))
    places: dict[str, list[tuple[Value, int]]] = {}
    for letters, x in zip(spelled, operands, strict=True):
        for i, letter in enumerate(letters):
            if not one(x.shape[i]):
                places.setdefault(letter, []).append((x, i))
    for letter, held in places.items():
        for x, i in held[1:]:
            c.unite(held[0][0].dims[held[0][1]], x.dims[i])
            if len(held) == 2 and letter not in result:
                c.contract(*held[0], x, i)
    dims = [places[s][0][0].dims[places[s][0][1]] if s in places else () for s in result]
    return Value(dims, c.shape)


def _spelled(term: str, rank: int) -> list[str]:
    """A term's dimensions: its letters, and numbers counted from the right for those of an ellipsis."""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after)
    if count < 0 or (count and not dots):
        raise NotUnderstoodError
    return [*before, *(str(n) for n in range(count - 1, -1, -1)), *after]


@rule("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d _convolution")
def convolution(c: Call) -> Value:
    """x [n, in, ...], weight [out, in / groups, ...], transposed [in, out / groups, ...]; places are frozen.

    In groups, whole groups may be reordered, and channels alike within each.
    """
    x, w = c.value("input"), c.value("weight")
    if len(x.dims) != len(w.dims):
        raise NotUnderstoodError
    c.freeze(*x.dims[2:], *w.dims[2:])
    groups = int(c.args.get("groups", 1))
    turned = bool(c.args.get("transposed")) or "transpose" in c.name
    of_input, of_output = (0, 1) if turned else (1, 0)
    if groups == 1:
        c.contract(x, 1, w, of_input)
        out = w.dims[of_output]
    else:
        which, within = c.atoms.divided(w.dims[0], groups)
        theirs, channel = c.atoms.divided(x.dims[1], groups)
        c.unite(which, theirs)
        if turned:
            c.unite(within, channel)
            out = (*which, *w.dims[1])
        else:
            part = Value([x.dims[0], channel], (), live=x.live, node=x.node)
            c.contract(part, 1, w, 1)
            out = w.dims[0]
    if isinstance(bias := c.args.get("bias"), Value):
        c.unite(out, bias.dims[0])
    places = c.new(c.shape[2:], frozen=True)
    return Value([x.dims[0], out, *places.dims], c.shape)


@rule("scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math")
def attention(c: Call) -> Found:
    """q [..., l, e], k [..., s, e], v [..., s, f] -> [..., l, f]; fewer heads of k and v serve equal runs of q's."""
    q, k, v = c.values()[:3]
    if c.args.get("dropout_p"):
        raise NotUnderstoodError
    c.unite(q.last(1), k.last(1))
    c.unite(k.last(2), v.last(2))
    if c.args.get("is_causal"):
        c.freeze(q.last(2), k.last(2))
    heads = q.dims[:-2]
    if c.args.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        for x in (k, v):
            outer, _ = c.atoms.divided(q.last(3), x.shape[-3])
            c.unite(outer, x.last(3))
        k, v = (Value([*x.dims[:-3], *x.dims[-2:]], (*x.shape[:-3], *x.shape[-2:])) for x in (k, v))
        q = Value([*q.dims[:-3], *q.dims[-2:]], (*q.shape[:-3], *q.shape[-2:]))
        c.broadcast([Value(x.dims[:-2], x.shape[:-2]) for x in (q, k, v)], q.shape[:-2])
    else:
        heads = c.broadcast([Value(x.dims[:-2], x.shape[:-2]) for x in (q, k, v)], (c.outs[0] or ())[: len(heads)]).dims
    if isinstance(mask := c.args.get("attn_mask"), Value):
        scores = Value([*heads, q.last(2), k.last(2)], (*(c.outs[0] or ())[:-2], q.shape[-2], k.shape[-2]))
        c.broadcast([scores, mask], scores.shape)
    found = [Value([*heads, q.last(2), v.last(1)], c.outs[0] or ())]
    if len(c.outs) == 1:
        return found[0]
    if c.outs[1] is None or len(c.outs[1]) != len(heads) + 1 or len(c.outs) > 2:
        raise NotUnderstoodError
    return [*found, Value([*heads, q.last(2)], c.outs[1])]
