"""Fused kernels in numba: the programs, dot products and counts in one pass over raw blocks, same bytes as torch.

Inputs are raw blocks as unsigned integers of the storage size, k contributions as rows of one array; a tile of
elements stays in the first cache level from widening to the one rounding. No fast-math flag is set, so every
operation is one IEEE operation; ``fused`` checks the results against stored answers before it trusts them.

Nothing here has type annotations: numba infers the types, and compares signatures to the letter.
Importing this module imports numba. Compiled code is cached on disk beside this file, or in the user's cache folder.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

TILE = 1024
ROWS, LANES, BLOCK = 16, 4096, 65536
LANE_TILE = 512

BF16, F16, F32, F64 = 1, 2, 3, 4
KINDS = {"BF16": BF16, "F16": F16, "F32": F32, "F64": F64}

compiled = njit(nogil=True, cache=True, error_model="numpy")


def _bitcast(result, source, llvm):
    @intrinsic
    def cast(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], llvm)

        return result(source), codegen

    return cast


_f32 = _bitcast(types.float32, types.uint32, ir.FloatType())
_u32 = _bitcast(types.uint32, types.float32, ir.IntType(32))
_f64 = _bitcast(types.float64, types.uint64, ir.DoubleType())
_u64 = _bitcast(types.uint64, types.float64, ir.IntType(64))


# ---------------------------------------------------------------- widening and the one rounding


def widen(raw, kind):
    """A stored value in the compute dtype: float32 for 16-bit types, float64 for the others."""


@overload(widen)
def _widen(raw, kind):
    if raw == types.uint16:

        def widen16(raw, kind):
            bits = np.uint32(raw)
            if kind == 1:
                return _f32(np.uint32(bits << np.uint32(16)))
            sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
            magnitude = _f32(np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
            return _f32(np.uint32(_u32(magnitude) | sign))

        return widen16
    if raw == types.uint32:
        return lambda raw, kind: np.float64(_f32(raw))
    return lambda raw, kind: _f64(raw)


@compiled
def _to_odd(v):
    """float64 to float32, towards zero, the last bit set if anything was cut off."""
    near = np.float32(v)
    back = np.float64(near)
    bits = _u32(near)
    if abs(back) > abs(v):
        bits = np.uint32(bits - np.uint32(1))
    if back != v:
        bits = np.uint32(bits | np.uint32(1))
    if abs(v) > 1.7976931348623157e308:
        return near
    return _f32(bits)


@compiled
def _bf16(v):
    bits = _u32(v)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def _f16(v):
    bits = _u32(v)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    a = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((a >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32((a + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13))
    subnormal = np.uint32(_u32(np.float32(_f32(a) + np.float32(0.5))) - np.uint32(126 << 23))
    rounded = subnormal if a < np.uint32(0x38800000) else normal
    infinite = np.uint32(0x7C00)
    rounded = infinite if a >= np.uint32(0x47800000) else rounded
    return np.uint16(rounded | sign)


def narrow(like, v, kind):
    """A compute value rounded once to the storage type of ``like``, as an unsigned integer."""


@overload(narrow)
def _narrow(like, v, kind):
    if like == types.uint16 and v == types.float64:

        def narrow64(like, v, kind):
            odd = _to_odd(v)
            return _bf16(odd) if kind == 1 else _f16(odd)

        return narrow64
    if like == types.uint16:
        return lambda like, v, kind: _bf16(v) if kind == 1 else _f16(v)
    if like == types.uint32:
        return lambda like, v, kind: _u32(np.float32(v))
    return lambda like, v, kind: _u64(np.float64(v))


def computed(raw, n):
    """An uninitialised array of the compute dtype of raw values."""


@overload(computed)
def _computed(raw, n):
    if raw.dtype == types.uint16:
        return lambda raw, n: np.empty(n, np.float32)
    return lambda raw, n: np.empty(n, np.float64)


def scalar(raw, value):
    """A number in the compute dtype of raw values."""


@overload(scalar)
def _scalar(raw, value):
    if raw.dtype == types.uint16:
        return lambda raw, value: np.float32(value)
    return lambda raw, value: np.float64(value)


def magnitude(v):
    """The pattern of |v| as an int64."""


@overload(magnitude)
def _magnitude(v):
    if v == types.float32:
        return lambda v: np.int64(_u32(v) & np.uint32(0x7FFFFFFF))
    return lambda v: np.int64(_u64(v) & np.uint64(0x7FFFFFFFFFFFFFFF))


# ---------------------------------------------------------------- programs


@compiled
def affine(xs, base, out, weights, divisor, divides, on_base, scale, kin, kout):
    """``programs.Affine`` on a block: xs [k, n] and base [n] raw -> out [n] raw."""
    k, n = xs.shape
    acc = np.empty(TILE, np.float64)
    b = np.empty(TILE, np.float64)
    for t in range(0, n, TILE):
        m = min(TILE, n - t)
        for i in range(k):
            x, w = xs[i, t : t + m], weights[i]
            if on_base:
                if i == 0:
                    o = base[t : t + m]
                    for j in range(m):
                        b[j] = np.float64(widen(o[j], kin))
                        acc[j] = (np.float64(widen(x[j], kin)) - b[j]) * w
                else:
                    for j in range(m):
                        acc[j] = acc[j] + (np.float64(widen(x[j], kin)) - b[j]) * w
            elif i == 0:
                for j in range(m):
                    acc[j] = np.float64(widen(x[j], kin)) * w
            else:
                for j in range(m):
                    acc[j] = acc[j] + np.float64(widen(x[j], kin)) * w
        if divides:
            for j in range(m):
                acc[j] = acc[j] / divisor
        y = out[t : t + m]
        if on_base:
            for j in range(m):
                y[j] = narrow(y[j], b[j] + acc[j] * scale, kout)
        else:
            for j in range(m):
                y[j] = narrow(y[j], acc[j], kout)


@compiled
def _philox_words(first, stream, out):
    """The words of the blocks first, first + 1, ... of a stream, four a block."""
    mask, s32 = np.uint64(0xFFFFFFFF), np.uint64(32)
    m0, m1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    w0, w1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
    for q in range(out.shape[0] // 4):
        counter = np.uint64(first + q)
        x0, x1 = counter & mask, counter >> s32
        x2, x3 = np.uint64(stream[2]), np.uint64(stream[3])
        k0, k1 = np.uint64(stream[0]), np.uint64(stream[1])
        for _ in range(10):  # the upper halves of x are left dirty: only the lower ones are multiplied and stored
            p0, p1 = (x0 & mask) * m0, (x2 & mask) * m1
            x0, x1 = (p1 >> s32) ^ x1 ^ k0, p1
            x2, x3 = (p0 >> s32) ^ x3 ^ k1, p0
            k0, k1 = (k0 + w0) & mask, (k1 + w1) & mask
        out[4 * q], out[4 * q + 1] = np.uint32(x0), np.uint32(x1)
        out[4 * q + 2], out[4 * q + 3] = np.uint32(x2), np.uint32(x3)


@compiled
def _drop(tau, stream, start, m, keep_below, rescale, zero, high, low):
    """Keep the elements of a tile whose random word is below a bound; lower halves are drawn only for a tie."""
    used = (m + 7) // 8 * 4
    _philox_words(start // 8, stream, high[:used])
    upper = high.view(np.uint16)
    bound = np.uint32(keep_below >> np.uint64(16))
    rest = np.uint32(keep_below & np.uint64(0xFFFF))
    tied = np.uint32(0)
    if rest > 0:
        for j in range(m):
            tied = np.uint32(tied | np.uint32(np.uint32(upper[j]) == bound))
    if tied:
        other = stream.copy()
        other[3] = other[3] ^ np.uint32(1)
        _philox_words(start // 8, other, low[:used])
        lower = low.view(np.uint16)
        for j in range(m):
            own = np.uint32(upper[j])
            kept = (own < bound) | ((own == bound) & (np.uint32(lower[j]) < rest))
            tau[j] = tau[j] * rescale if kept else zero
    else:
        for j in range(m):
            tau[j] = tau[j] * rescale if np.uint32(upper[j]) < bound else zero


NO_ELECTION, BY_SUM, BY_COUNT = 0, 1, 2
SUM, MEAN, MAX = 0, 1, 2
ELECT = {"none": NO_ELECTION, "sum": BY_SUM, "count": BY_COUNT}
COMBINE = {"sum": SUM, "mean": MEAN, "max": MAX}


@compiled
def consensus(xs, base, out, start, weights, cuts, streams, keep_below, rescale, elect, combine, scale, kin, kout):
    """``programs.Consensus`` on a block that begins at flat index ``start`` (a multiple of four)."""
    k, n = xs.shape
    b, total, mass = computed(xs, TILE), computed(xs, TILE), computed(xs, TILE)
    taus = computed(xs, k * TILE).reshape(k, TILE)
    high, low = np.empty(TILE // 2, np.uint32), np.empty(TILE // 2, np.uint32)
    zero, one = scalar(xs, 0), scalar(xs, 1)
    for t in range(0, n, TILE):
        m = min(TILE, n - t)
        o = base[t : t + m]
        for j in range(m):
            b[j] = widen(o[j], kin)
            total[j] = zero
            mass[j] = zero
        for i in range(k):
            x, tau, w = xs[i, t : t + m], taus[i], weights[i]
            for j in range(m):
                tau[j] = widen(x[j], kin) - b[j]
            if cuts.shape[0] > 0:
                bits, last = cuts[i, 0], cuts[i, 1] - (start + t)
                for j in range(m):
                    own = magnitude(tau[j])
                    kept = (own > bits) | ((own == bits) & (j <= last))
                    tau[j] = tau[j] if kept else zero
            if streams.shape[0] > 0:
                _drop(tau, streams[i], start + t, m, keep_below, rescale, zero, high, low)
            if w != one:
                for j in range(m):
                    tau[j] = tau[j] * w
            if elect == 1:
                if i == 0:
                    for j in range(m):
                        total[j] = tau[j]
                else:
                    for j in range(m):
                        total[j] = total[j] + tau[j]
            elif elect == 2:
                for j in range(m):
                    vote = one if tau[j] > zero else zero
                    vote = -one if tau[j] < zero else vote
                    total[j] = total[j] + vote
        _combine(taus, weights, total, mass, b, out[t : t + m], m, elect, combine, scale, zero, one, kout)


@compiled
def _agree(taus, weights, total, mass, m, combine, zero):
    """Combine what has the sign that ``mass`` holds into ``total``; ``mass`` becomes the sum of its weights."""
    votes = mass.copy()
    for i in range(taus.shape[0]):
        tau, w = taus[i], weights[i]
        if i == 0:
            for j in range(m):
                agrees = tau[j] * votes[j] > zero
                total[j] = tau[j] if agrees else zero
                mass[j] = w if agrees else zero
        elif combine == 2:
            for j in range(m):
                own, best = abs(tau[j]), abs(total[j])
                better = (tau[j] * votes[j] > zero) & ((own > best) | ((own == best) & (tau[j] > total[j])))
                total[j] = tau[j] if better else total[j]
        else:
            for j in range(m):
                agrees = tau[j] * votes[j] > zero
                total[j] = total[j] + (tau[j] if agrees else zero)
                mass[j] = mass[j] + (w if agrees else zero)


@compiled
def _fold(taus, total, m, combine):
    """Sum, or the largest, of all task vectors into ``total``."""
    first = taus[0]
    for j in range(m):
        total[j] = first[j]
    for i in range(1, taus.shape[0]):
        tau = taus[i]
        if combine == 2:
            for j in range(m):
                own, best = abs(tau[j]), abs(total[j])
                better = (own > best) | ((own == best) & (tau[j] > total[j]))
                total[j] = tau[j] if better else total[j]
        else:
            for j in range(m):
                total[j] = total[j] + tau[j]


@compiled
def _combine(taus, weights, total, mass, b, y, m, elect, combine, scale, zero, one, kout):
    """Elect and combine one tile of task vectors; ``total`` holds the votes and becomes the merged task vector."""
    if elect != 0:
        for j in range(m):
            mass[j] = one if total[j] >= zero else -one
        _agree(taus, weights, total, mass, m, combine, zero)
    else:
        _fold(taus, total, m, combine)
        whole = zero
        for i in range(taus.shape[0]):
            whole = whole + weights[i]
        for j in range(m):
            mass[j] = whole
    if combine == 1:
        for j in range(m):
            total[j] = total[j] / (one if mass[j] == zero else mass[j])
    for j in range(m):
        y[j] = narrow(y[j], b[j] + total[j] * scale, kout)


# ---------------------------------------------------------------- reductions and counts


@compiled
def gram(xs, base, on_base, out, kin):
    """Block sums of the products of all pairs of rows: xs [k, n] raw -> out [pairs, ceil(n / 65536)]."""
    k, n = xs.shape
    pairs = k * (k + 1) // 2
    rows = np.empty((k, LANE_TILE), np.float64)
    lanes = np.empty((pairs, LANES), np.float64)
    for block in range(out.shape[1]):
        for lane in range(0, LANES, LANE_TILE):
            for row in range(ROWS):
                at = block * BLOCK + row * LANES + lane
                m = max(0, min(LANE_TILE, n - at))
                for i in range(k):
                    wide, x = rows[i], xs[i, at : at + m]
                    if on_base:
                        o = base[at : at + m]
                        for j in range(m):
                            wide[j] = np.float64(widen(x[j], kin)) - np.float64(widen(o[j], kin))
                    else:
                        for j in range(m):
                            wide[j] = np.float64(widen(x[j], kin))
                    for j in range(m, LANE_TILE):
                        wide[j] = 0.0
                p = 0
                for i in range(k):
                    for h in range(i, k):
                        left, right, acc = rows[i], rows[h], lanes[p, lane : lane + LANE_TILE]
                        if row == 0:
                            for j in range(LANE_TILE):
                                acc[j] = left[j] * right[j]
                        else:
                            for j in range(LANE_TILE):
                                acc[j] = acc[j] + left[j] * right[j]
                        p += 1
        for p in range(pairs):
            acc = lanes[p]
            half = LANES // 2
            while half >= 1:
                for j in range(half):
                    acc[j] = acc[j] + acc[j + half]
                half //= 2
            out[p, block] = acc[0]


@compiled
def _pattern(x, base, kin, wide):
    """The pattern of |x - base|: of its float64 value if ``wide``, else of the compute dtype."""
    tau = widen(x, kin) - widen(base, kin)
    return magnitude(np.float64(tau)) if wide else magnitude(tau)


GROUP = 16


@compiled
def _tally(above_lo, width, shift, counts):
    """Count one tile of unsigned distances from the low end of a range; most groups of 16 hold none inside it."""
    for g in range(0, above_lo.shape[0], GROUP):
        own = above_lo[g : g + GROUP]
        inside = np.uint32(0)
        for j in range(GROUP):
            inside = np.uint32(inside | np.uint32(own[j] < width))
        if inside:
            for j in range(GROUP):
                if own[j] < width:
                    counts[own[j] >> shift] += 1


@compiled
def _count32(x, base, lo, hi, shift, counts, kin):
    n = x.shape[0]
    from_lo = np.empty(TILE, np.uint32)
    low, high, width, step = np.int32(lo), np.int32(hi), np.uint32(hi - lo), np.uint32(shift)
    above = 0
    for t in range(0, n, TILE):
        m = min(TILE, n - t)
        own, o = x[t : t + m], base[t : t + m]
        over = np.int32(0)  # 32 bits, so that sixteen comparisons are added at once
        for j in range(m):
            tau = np.float32(widen(own[j], kin) - widen(o[j], kin))
            pattern = np.int32(_u32(tau) & np.uint32(0x7FFFFFFF))
            from_lo[j] = np.uint32(pattern - low)
            over = np.int32(over + np.int32(pattern >= high))
        for j in range(m, TILE):
            from_lo[j] = width
        above += int(over)
        _tally(from_lo, width, step, counts)
    return above


@compiled
def _count64(x, base, lo, hi, shift, counts, kin):
    n = x.shape[0]
    from_lo = np.empty(TILE, np.uint64)
    width, step = np.uint64(hi - lo), np.uint64(shift)
    above = 0
    for t in range(0, n, TILE):
        m = min(TILE, n - t)
        own, o = x[t : t + m], base[t : t + m]
        for j in range(m):
            pattern = _pattern(own[j], o[j], kin, True)
            from_lo[j] = np.uint64(pattern - lo)
            above += pattern >= hi
        for j in range(m, TILE):
            from_lo[j] = width
        _tally(from_lo, width, step, counts)
    return above


@compiled
def count(x, base, lo, hi, shift, counts, kin, wide):
    """Add to ``counts`` the patterns of |x - base| in each step of [lo, hi), and in the last slot those above."""
    if wide:
        counts[counts.shape[0] - 1] += _count64(x, base, lo, hi, shift, counts, kin)
    else:
        counts[counts.shape[0] - 1] += _count32(x, base, lo, hi, shift, counts, kin)


@compiled
def collect(x, base, lo, hi, capacity, kin, wide):
    """Patterns of |x - base| in [lo, hi) and their indices in x, as two int64 arrays; at most ``capacity`` of them."""
    n = x.shape[0]
    found, at = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    from_lo = np.empty(TILE, np.uint64)
    width = np.uint64(hi - lo)
    total = 0
    for t in range(0, n, TILE):
        m = min(TILE, n - t)
        own, o = x[t : t + m], base[t : t + m]
        if wide:
            for j in range(m):
                from_lo[j] = np.uint64(_pattern(own[j], o[j], kin, True) - lo)
        else:
            for j in range(m):
                from_lo[j] = np.uint64(_pattern(own[j], o[j], kin, False) - lo)
        for j in range(m, TILE):
            from_lo[j] = width
        for g in range(0, TILE, GROUP):
            inside = np.uint32(0)
            for j in range(g, g + GROUP):
                inside = np.uint32(inside | np.uint32(from_lo[j] < width))
            if inside:
                for j in range(g, g + GROUP):
                    if from_lo[j] < width:
                        found[total] = np.int64(from_lo[j]) + lo
                        at[total] = t + j
                        total += 1
    return found[:total].copy(), at[:total].copy()
