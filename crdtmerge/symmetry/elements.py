"""Rules of operators that work on one element, or along a dimension in any order: activations, norms, sums, softmax.

Each gives the result's dimensions in atoms of the arguments' (``rules``).
"""

from __future__ import annotations

from crdtmerge.symmetry.table import Found, rule
from crdtmerge.symmetry.values import Call, NotUnderstoodError, Value, one, same_size


@rule(
    "relu gelu silu tanh sigmoid neg exp exp2 expm1 log log1p log2 pow leaky_relu elu celu selu hardswish hardtanh "
    "hardsigmoid relu6 rsqrt sqrt mish softplus square abs erf sin cos reciprocal sign round floor ceil trunc "
    "clamp clamp_min clamp_max log_sigmoid logical_not bitwise_not isnan isinf isfinite nan_to_num threshold "
    "hardshrink softshrink logit sgn positive add sub rsub mul div true_divide multiply divide subtract "
    "maximum minimum fmod remainder floor_divide atan2 where masked_fill le gt logical_and logical_or "
    "logical_xor bitwise_and bitwise_or bitwise_xor lerp addcmul addcdiv _prelu_kernel logaddexp copysign complex "
    "polar real imag conj _conj _conj_physical resolve_conj resolve_neg angle copy fill zero_ fill_ masked_fill_ "
    "__and__ __or__ __xor__ fmax fmin xlogy hypot _weight_norm special_erf special_expit cosh sinh tan atan acos"
)
def elementwise(c: Call) -> Value:
    """One element of the result from the elements at its place."""
    return c.broadcast(c.values(), c.shape)


@rule(
    "clone contiguous detach alias lift_fresh_copy lift_fresh to _to_copy type_as _to_cpu data",
    pointing=True,
)
def same(c: Call) -> Value:
    """A copy, perhaps in another dtype. Of two tensors the second gives a dtype or a shape, no values."""
    x = c.values()[0]
    return Value(list(x.dims), c.shape, x.points, origin=x.origin)


@rule("eq ne", pointing=True)
def equal(c: Call) -> Value:
    """Indices into one dimension agree wherever it is reordered; compared with anything else they are frozen."""
    pointers = [x.points for x in c.values()]
    if len(pointers) == 2 and pointers[0] is not None and pointers[1] is not None:
        c.unite(pointers[0], pointers[1])
    else:
        c.freeze(*(p for p in pointers if p is not None))
    return elementwise(c)


@rule("ge lt", pointing=True)
def within(c: Call) -> Value:
    """Every index into a dimension is at least 0 and below its size; other comparisons freeze the dimension."""
    x, bound = c.values()[0], c.args.get("other")
    if x.points is not None and len(c.values()) == 1 and bound == (0 if c.name == "ge" else c.atoms.total(x.points)):
        return c.new(c.shape)
    c.freeze(*(y.points for y in c.values() if y.points is not None))
    return elementwise(c)


@rule("arange", pointing=True)
def arange(c: Call) -> Value:
    """0, 1, ..., n - 1 are indices into their own dimension."""
    start, step = c.args.get("start", 0), c.args.get("step", 1)
    found = c.new(c.shape, frozen=(start, step) != (0, 1))
    found.points = found.dims[0]
    return found


@rule(
    "zeros ones full scalar_tensor new_zeros new_ones new_full zeros_like ones_like full_like new_empty empty_like "
    "empty",
    pointing=True,
)
def constant(c: Call) -> Value:
    """The same value everywhere stays so in any order; memory that is not set is frozen."""
    return c.new(c.shape, frozen="empty" in c.name)


@rule("_assert_tensor_metadata _assert_async sym_size sym_numel sym_stride size", pointing=True)
def nothing(c: Call) -> None:
    """Looks at shapes alone."""


@rule("dropout feature_dropout alpha_dropout native_dropout")
def dropout(c: Call) -> Value:
    """The identity in evaluation."""
    x = c.values()[0]
    if c.args.get("train") is not False:
        raise NotUnderstoodError
    return Value(list(x.dims), x.shape)


@rule(
    "batch_norm instance_norm _native_batch_norm_legit_no_training native_batch_norm _native_batch_norm_legit "
    "cudnn_batch_norm _native_batch_norm_legit_functional _batch_norm_no_update _batch_norm_with_update prelu"
)
def of_channels(c: Call) -> Found:
    """x [n, channels, ...] with one number for each channel; further results are statistics of channels."""
    x, *others = c.values()
    at = 1 if len(x.dims) > 1 else 0
    for other in others:
        if len(other.dims) != 1:
            raise NotUnderstoodError
        if not one(other.shape[0]):
            c.unite(x.dims[at], other.dims[0])
    found: list[Value] = []
    for shape in c.outs:
        if shape is None:
            raise NotUnderstoodError
        if len(found) == 0:
            found.append(Value(list(x.dims), shape))
        elif shape == (x.shape[at],):
            found.append(Value([x.dims[at]], shape))
        elif shape == (0,):
            found.append(c.new(shape, frozen=True))
        else:
            raise NotUnderstoodError
    return found if len(found) > 1 else found[0]


@rule("layer_norm rms_norm native_layer_norm _fused_rms_norm")
def of_trailing(c: Call) -> Found:
    """x [..., shape] over its last dimensions, with weights of that shape; further results are statistics."""
    x, *others = c.values()
    count = len(c.args["normalized_shape"])
    for other in others:
        for back in range(1, count + 1):
            c.unite(x.last(back), other.last(back))
    found = [Value(list(x.dims), x.shape)]
    for shape in c.outs[1:]:
        if shape is None or len(shape) != len(x.dims):
            raise NotUnderstoodError
        found.append(Value([*x.dims[:-count], *([()] * count)], shape))
    return found if len(found) > 1 else found[0]


@rule("group_norm native_group_norm")
def group_norm(c: Call) -> Found:
    """Groups of channels may be reordered as wholes, and channels alike within each."""
    x, *others = c.values()
    groups = int(c.args.get("num_groups") or c.args.get("group") or 0)
    which, _ = c.atoms.divided(x.dims[1], groups)
    for other in others:
        c.unite(x.dims[1], other.dims[0])
    found = [Value(list(x.dims), x.shape)]
    found += [Value([x.dims[0], which], (x.shape[0], groups)) for _ in c.outs[1:]]
    return found if len(found) > 1 else found[0]


@rule(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "max_pool2d_with_indices max_pool1d_with_indices max_pool3d_with_indices upsample_nearest2d upsample_bilinear2d "
    "upsample_nearest1d upsample_linear1d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_nearest_exact2d "
    "reflection_pad2d replication_pad2d"
)
def pooling(c: Call) -> Found:
    """Each channel apart; places are frozen."""
    x = c.values()[0]
    whole = 1 + (3 if "3d" in c.name else 2 if "2d" in c.name else 1)
    kept = len(x.dims) - whole + 1
    if kept < 1:
        raise NotUnderstoodError
    c.freeze(*x.dims[kept:])
    found = []
    for shape in c.outs:
        if shape is None:
            raise NotUnderstoodError
        found.append(Value([*x.dims[:kept], *c.new(shape[kept:], frozen=True).dims], shape))
    return found if len(found) > 1 else found[0]


@rule(
    "mean sum amax amin var std prod any all logsumexp linalg_vector_norm norm count_nonzero var_mean std_mean nansum "
    "aminmax"
)
def reduction(c: Call) -> Found:
    """Over dimensions in any order: what is left of them has size one."""
    x = c.values()[0]
    axes = set(c.axes(x))
    dims = [() if i in axes else dim for i, dim in enumerate(x.dims)]
    kept = [dim for i, dim in enumerate(x.dims) if i not in axes]
    found = [Value(dims if shape and len(shape) == len(dims) else kept, shape or ()) for shape in c.outs]
    return found if len(found) > 1 else found[0]


@rule("max min argmax argmin median mode")
def extremum(c: Call) -> Found:
    """The greatest along a dimension, and where it is: an index into that dimension. Of two tensors, elementwise."""
    x = c.values()[0]
    if len(c.values()) > 1:
        return elementwise(c)
    if c.args.get("dim") is None:
        if c.name in ("max", "min"):
            return Value([], ())
        raise NotUnderstoodError
    at = c.axis(x)
    found = []
    for shape in c.outs:
        kept = shape is not None and len(shape) == len(x.dims)
        dims = [() if i == at else dim for i, dim in enumerate(x.dims) if kept or i != at]
        found.append(Value(dims, shape or ()))
    found[-1].points = x.dims[at]
    return found if len(found) > 1 else found[0]


@rule("topk sort argsort")
def topk(c: Call) -> Found:
    """Values in the order of their sizes, which no permutation changes, and indices into the dimension."""
    x = c.values()[0]
    at = c.axis(x)
    found = []
    for shape in c.outs:
        assert shape is not None, "topk and sort give tensors"
        dims = [c.atoms.dim(shape[i], frozen=True) if i == at else dim for i, dim in enumerate(x.dims)]
        found.append(Value(dims, shape))
    found[-1].points = x.dims[at]
    return found if len(found) > 1 else found[0]


@rule("softmax _softmax log_softmax _log_softmax _safe_softmax")
def softmax(c: Call) -> Value:
    """Over a dimension in any order."""
    x = c.values()[0]
    return Value(list(x.dims), x.shape)


@rule("cumsum cumprod flip roll tril triu constant_pad_nd pad")
def ordered(c: Call) -> Value:
    """Where the order along a dimension matters it is frozen."""
    x = c.values()[0]
    if c.name in ("tril", "triu"):
        at = [len(x.dims) - 2, len(x.dims) - 1]
    elif c.name in ("constant_pad_nd", "pad"):
        at = [i for i, (old, new) in enumerate(zip(x.shape, c.shape, strict=True)) if not same_size(old, new)]
        at += [len(x.dims) - 1 - i // 2 for i, n in enumerate(c.args["pad"]) if n]
    else:
        at = c.axes(x, "dim" if c.name.startswith("cum") else "dims")
    c.freeze(*(x.dims[i] for i in at))
    dims = [c.atoms.dim(c.shape[i], frozen=True) if i in at else dim for i, dim in enumerate(x.dims)]
    return Value(dims, c.shape)
