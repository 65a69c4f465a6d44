"""Robust aggregation: rules whose result stays near the honest contributions though some of them lie.

Of k contributions up to f = ``byzantine`` may be anything at all. Each rule is ``before`` (none, or a stage that mixes
contributions with their like) and then one of two kinds:

    an elementwise statistic    median, trimmed_mean, meamed
    sum_i c_i x_i, with c from the distances between whole models
                                krum, multi_krum, mda, nna, geometric_median, centered_clip

Contributions are weights, not gradients: every rule here commutes with a shift of all of them, and nothing starts from
zero. All are commutative, and decide between equally near contributions by the lowest content id. They defend
against contents; several contributions of one party are several contributions, and who may contribute is decided
elsewhere. Unequal claimed weights are taken by multi_krum, mda and nna alone, in the mean of what was selected: a false
claim moves the result among the selected and no further. The other rules count every contribution once and refuse
them, since a claim of weight would be a claim of votes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import AfterValidator, Field

from crdtmerge.errors import ParameterError
from crdtmerge.numerics import philox
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.scalars import left_sum, nearest
from crdtmerge.strategies import distances
from crdtmerge.strategies.distances import Matrix
from crdtmerge.strategies.linear import divided, divisor_of, total
from crdtmerge.strategies.networks import ascending, nan_of
from crdtmerge.strategies.parameters import Number, Parameters
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit, View
from crdtmerge.strategies.stages import weighted

if TYPE_CHECKING:
    from torch import Tensor

SUBSETS_MAX = 1_000_000
"""Subsets that mda looks through at most."""


class RobustParameters(Parameters):
    """Parameters of every robust rule."""

    byzantine: int | None = Field(None, ge=0, description="contributions that may lie; the most the rule withstands")
    before: Literal["none", "nnm", "bucketing"] = Field("none", description="how contributions are mixed at first")
    bucket: int = Field(2, ge=1, description="contributions that bucketing averages")


P = TypeVar("P", bound=RobustParameters)


class Mixtures(NamedTuple):
    """The points that a rule looks at: each the mean of some contributions, with an id of its own."""

    members: list[list[int]]
    ids: list[bytes]

    def matrix(self, k: int) -> Matrix:
        """The means as rows of coefficients of k contributions."""
        a = np.zeros((len(self.members), k))
        for i, members in enumerate(self.members):
            a[i, members] = 1.0 / len(members)
        return a

    def of(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each mixture's members."""
        return [
            divided(total([xs[j] for j in members]), float(len(members))) if len(members) > 1 else xs[members[0]]
            for members in self.members
        ]


class Robust(Strategy[P]):
    """What all robust rules share: how many liars they withstand, and the stage before them.

    ``beyond`` is the number of contributions that a rule needs beyond 2f, from f = 1 on; with f = 0 any number will do.
    ``takes_weights`` says whether unequal claimed weights enter the result.
    """

    version = 1
    beyond: ClassVar[int] = 1
    takes_weights: ClassVar[bool] = False

    def withstood(self, k: int, p: P) -> int:
        """f: as asked, or the most that k contributions allow. Raises ParameterError where k is too small for it."""
        points = -(-k // p.bucket) if p.before == "bucketing" else k
        if p.byzantine is None:
            return max(0, (points - self.beyond) // 2)
        least = 2 * p.byzantine + self.beyond
        if p.byzantine and points < least:
            there = f"{k} make {points} buckets of {p.bucket}" if p.before == "bucketing" else f"there are {k}"
            what = "buckets" if p.before == "bucketing" else "contributions"
            raise ParameterError(
                f"strategy '{self.name}': byzantine = {p.byzantine} needs at least {least} {what}; {there}. Lower "
                "byzantine, or wait for more contributions."
            )
        return p.byzantine

    def check_weights(self, meta: Sequence[Meta], p: P) -> None:
        """Raise ParameterError if weights were claimed that the rule would have to ignore."""
        if any(one.weight != meta[0].weight for one in meta) and (not self.takes_weights or p.before != "none"):
            why = f" with before={p.before}" if self.takes_weights else ""
            raise ParameterError(
                f"strategy '{self.name}'{why} counts every contribution once, and unequal weights were claimed. "
                "Leave the weights out, or use multi_krum, mda or nna with before=none."
            )

    def one_for_all(self, view: View, p: Callable[[str], P]) -> P:
        """The parameters, which must be the same for all tensors. Raises ParameterError if they are not."""
        first = p(view.names[0])
        if any(p(name) != first for name in view.names):
            raise ParameterError(
                f"strategy '{self.name}' compares whole models here; it takes no parameters for single tensors."
            )
        return first

    def mixtures(self, view: View, p: P, f: int, rng: Rng) -> tuple[Mixtures, Matrix | None]:
        """The points that the rule looks at, and the distances between contributions if they had to be known."""
        meta = distances.everyone(view, self.name)
        ids = [one.id for one in meta]
        if p.before == "nnm":
            d = distances.squared_distances(view, len(ids))
            return Mixtures([distances.nearest(d, i, len(ids) - f, ids) for i in range(len(ids))], ids), d
        if p.before == "bucketing":
            return buckets(ids, p.bucket, rng), None
        return Mixtures([[i] for i in range(len(ids))], ids), None

    def points(self, view: View, p: P, rng: Rng) -> tuple[int, Mixtures, Matrix]:
        """f, the points that the rule looks at, and the squared distances between them."""
        meta = distances.everyone(view, self.name)
        self.check_weights(meta, p)
        f = self.withstood(len(meta), p)
        mixtures, d = self.mixtures(view, p, f, rng)
        if d is None:
            d = distances.squared_distances(view, len(meta))
        return f, mixtures, d if p.before == "none" else distances.of_mixtures(d, mixtures.matrix(len(meta)))


def buckets(ids: Sequence[bytes], size: int, rng: Rng) -> Mixtures:
    """The contents in an order drawn from the seed, cut into buckets; a bucket's id is the lowest in it."""

    def drawn(i: int) -> tuple[int, int, bytes]:
        upper, lower = philox.words(rng.stream("bucket", ids[i], ""), 0, 2).tolist()
        return upper, lower, ids[i]

    order = sorted(range(len(ids)), key=drawn)
    members = [sorted(order[at : at + size]) for at in range(0, len(order), size)]
    return Mixtures(members, [min(ids[j] for j in one) for one in members])


# ---------------------------------------------------------------- elementwise


class Elementwise(Robust[P]):
    """A rule that looks at every element by itself."""

    family = "elementwise"

    def needs(self, p: P) -> Needs:
        return Needs(plan="none" if p.before == "none" else "scan", compute="double")

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        for name in view.names:
            self.check_weights(view.meta(name), p(name))
            self.withstood(len(view.meta(name)), p(name))
        if all(p(name).before == "none" for name in view.names):
            return EMPTY
        common = self.one_for_all(view, p)
        f = self.withstood(len(view.meta(view.names[0])), common)
        return Plan({"members": self.mixtures(view, common, f, rng)[0].members})

    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        ys = u.xs if p.before == "none" else Mixtures(plan["members"], []).of(u.xs)
        return nan_of(u.xs, self.statistic(ys, self.withstood(len(u.xs), p)))

    def statistic(self, ys: Sequence[Tensor], f: int) -> Tensor:
        """The merged value of each element."""
        raise NotImplementedError


class Median(Elementwise[RobustParameters]):
    """Coordinate median: theta_j = the median of x_1j, ..., x_kj; for even k the mean of the two in the middle.

    Withstands f < k / 2 (the default, floor((k - 1) / 2)); f matters for k and for ``before=nnm`` alone.

    Properties: commutative; idempotent; not associative. Commutes with shifts, monotone maps of an element (k odd).
    """

    name = "median"
    reference = "Yin et al., ICML 2018, arXiv:1803.01498"
    Params = RobustParameters

    def statistic(self, ys: Sequence[Tensor], f: int) -> Tensor:
        return median(ys)


def median(ys: Sequence[Tensor]) -> Tensor:
    """The middle value of each element, or the mean of the two in the middle."""
    low = (len(ys) - 1) // 2
    middle = ascending(ys, low, len(ys) // 2 + 1)
    return middle[0] if len(middle) == 1 else (middle[0] + middle[1]) * 0.5


class TrimmedMean(Elementwise[RobustParameters]):
    """Coordinate trimmed mean: the mean of each element without its f largest and its f smallest values.

    Withstands f < k / 2. By default f = floor((k - 1) / 2), the most, and then this is the median; say ``byzantine`` to
    keep more. With f = 0 it is the average.

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "trimmed_mean"
    reference = "Yin et al., ICML 2018, arXiv:1803.01498"
    Params = RobustParameters

    def statistic(self, ys: Sequence[Tensor], f: int) -> Tensor:
        kept = ascending(ys, f, len(ys) - f)
        return divided(total(kept), float(len(kept)))


class Meamed(Elementwise[RobustParameters]):
    """Mean around the median: the mean of the k - f values of each element that are nearest to its median.

    They are neighbours in sorted order; of two values equally far on both sides the smaller is kept. Withstands
    f < k / 2; by default floor((k - 1) / 2).

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "meamed"
    reference = "Xie, Koyejo, Gupta 2018, arXiv:1802.10116"
    Params = RobustParameters

    def statistic(self, ys: Sequence[Tensor], f: int) -> Tensor:
        rows = ascending(ys)
        middle = median(rows)
        count = len(rows) - f
        first = torch.zeros_like(middle)
        for j in range(f):
            onward = (first == j) & (middle - rows[j] > rows[j + count] - middle)
            first = torch.where(onward, first + 1.0, first)
        zero = torch.zeros_like(middle)
        inside = [torch.where((first <= j) & (first > j - count), row, zero) for j, row in enumerate(rows)]
        return divided(total(inside), float(count))


# ---------------------------------------------------------------- affine combinations, by distances of whole models


class Affine(Robust[P]):
    """A rule whose result is sum_j c_j x_j, where the c_j follow from the distances between whole models."""

    family = "statistics"

    def needs(self, p: P) -> Needs:
        return Needs(plan="scan", compute="double")

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        return Plan(self.coefficients(view, self.one_for_all(view, p), rng)) if view.names else EMPTY

    def coefficients(self, view: View, p: P, rng: Rng) -> dict[str, Any]:
        """``numerators`` of the contributions, and the ``divisor`` of their sum."""
        raise NotImplementedError

    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        return divided(combined(u.xs, plan["numerators"]), plan["divisor"])


def combined(xs: Sequence[Tensor], numerators: Sequence[float]) -> Tensor:
    """sum_j n_j x_j over the n_j that are not zero: what was not selected does not enter."""
    used = [(x, n) for x, n in zip(xs, numerators, strict=True) if n != 0.0]
    return total(weighted([x for x, _ in used], [n for _, n in used]))


class Selection(Affine[P]):
    """A rule that selects some points and takes their mean."""

    def coefficients(self, view: View, p: P, rng: Rng) -> dict[str, Any]:
        f, mixtures, d = self.points(view, p, rng)
        meta = view.meta(view.names[0])
        selected = self.selected(d, mixtures.ids, f, p)
        if p.before == "none" and len(selected) > 1:
            chosen = set(selected)
            divisor = divisor_of(tuple(one for j, one in enumerate(meta) if j in chosen))
            numerators = [nearest(one.weight) if j in chosen else 0.0 for j, one in enumerate(meta)]
            return {"numerators": numerators, "divisor": divisor}
        whole = math.lcm(*(len(mixtures.members[i]) for i in selected))
        counts = [0] * len(meta)
        for i in selected:
            for j in mixtures.members[i]:
                counts[j] += whole // len(mixtures.members[i])
        return {"numerators": [float(count) for count in counts], "divisor": float(whole * len(selected))}

    def selected(self, d: Matrix, ids: Sequence[bytes], f: int, p: P) -> list[int]:
        """Which points are averaged, of those with the squared distances ``d``."""
        raise NotImplementedError


class Krum(Selection[RobustParameters]):
    """Krum: the contribution with the least sum of squared distances to the k - f - 2 others nearest to it.

    As published; some libraries sum over k - f - 1 others instead. Needs k >= 2f + 3; by default
    f = max(0, floor((k - 3) / 2)). With ``before=none`` the result is one of the contributions, to the bit.

    Properties: commutative; idempotent; not associative. Under heterogeneous data it throws most of them away.
    """

    name = "krum"
    reference = "Blanchard et al., NeurIPS 2017, arXiv:1703.02757"
    Params = RobustParameters
    beyond = 3

    def selected(self, d: Matrix, ids: Sequence[bytes], f: int, p: RobustParameters) -> list[int]:
        return by_krum(d, ids, f)[:1]


class MultiKrum(Selection[RobustParameters]):
    """Multi-Krum: the weighted mean of the k - f contributions with the least Krum scores.

    Needs k >= 2f + 3; by default f = max(0, floor((k - 3) / 2)).

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "multi_krum"
    reference = "Blanchard et al., NeurIPS 2017, arXiv:1703.02757"
    Params = RobustParameters
    beyond = 3
    takes_weights = True

    def selected(self, d: Matrix, ids: Sequence[bytes], f: int, p: RobustParameters) -> list[int]:
        return by_krum(d, ids, f)[: len(ids) - f]


def by_krum(d: Matrix, ids: Sequence[bytes], f: int) -> list[int]:
    """The points by their Krum scores, the least first; of equal scores the lowest id."""
    count = max(len(ids) - f - 2, 0)
    scores = [left_sum(sorted(float(d[i, j]) for j in range(len(ids)) if j != i)[:count]) for i in range(len(ids))]
    return sorted(range(len(ids)), key=lambda i: (scores[i], ids[i]))


class MinimumDiameter(Selection[RobustParameters]):
    """Minimum diameter averaging: the weighted mean of the k - f contributions whose largest distance is least.

    Of subsets of one diameter the first in the order of content ids. All subsets are looked through, up to a million of
    them; beyond that it is refused. Withstands f < k / 2; by default floor((k - 1) / 2).

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "mda"
    reference = "Rousseeuw 1985; El Mhamdi et al., ICML 2018, arXiv:1802.07927"
    Params = RobustParameters
    takes_weights = True

    def selected(self, d: Matrix, ids: Sequence[bytes], f: int, p: RobustParameters) -> list[int]:
        subsets = math.comb(len(ids), f)
        if subsets > SUBSETS_MAX:
            raise ParameterError(
                f"strategy 'mda' would look through {subsets} subsets of {len(ids)} points without {f}; at most "
                f"{SUBSETS_MAX} are looked through. Lower byzantine, or use multi_krum or nna."
            )
        return least_diameter(d, sorted(range(len(ids)), key=lambda i: ids[i]), len(ids) - f)


def least_diameter(d: Matrix, order: Sequence[int], count: int) -> list[int]:
    """The first subset of ``count`` points, in lexicographic order, of those with the least diameter."""
    rows = [[float(v) for v in row] for row in d]
    best: list[int] = []
    least = math.inf
    open_: list[tuple[list[int], int, float]] = [([], 0, 0.0)]
    while open_:
        chosen, at, diameter = open_.pop()
        if diameter >= least:
            continue
        if len(chosen) == count:
            best, least = chosen, diameter
            continue
        for following in range(len(order) - count + len(chosen), at - 1, -1):
            row = rows[order[following]]
            wider = max([diameter, *(row[j] for j in chosen)])
            if wider < least:
                open_.append(([*chosen, order[following]], following + 1, wider))
    return best


def _content_or(*words: str) -> AfterValidator:
    def check(said: str) -> str:
        hexadecimal = 4 <= len(said) <= 64 and all(letter in "0123456789abcdef" for letter in said)
        if said not in words and not hexadecimal:
            raise ValueError(f"must be {', '.join(words)} or the first 4 to 64 hexadecimal digits of a content id")
        return said

    return AfterValidator(check)


def pivot_of(said: str, strategy: str, d: Matrix, ids: Sequence[bytes], p: RobustParameters) -> int:
    """The point that is named, or the medoid. Raises ParameterError unless one contribution has the name."""
    if said == "medoid":
        return distances.medoid(d, ids)
    if p.before == "bucketing":
        raise ParameterError(
            f"strategy '{strategy}': after bucketing no contribution stands alone, so none can be named ({said})."
        )
    found = [i for i, one in enumerate(ids) if one.hex().startswith(said)]
    if len(found) != 1:
        raise ParameterError(
            f"strategy '{strategy}': {len(found)} contributions have a content id that begins with {said}; name one."
        )
    return found[0]


class NearestParameters(RobustParameters):
    """Parameters of nna."""

    pivot: Annotated[str, _content_or("medoid")] = Field(
        "medoid", description="medoid, or the content id of a trusted contribution"
    )


class NearestNeighbours(Selection[NearestParameters]):
    """Nearest-neighbour averaging, of MoNNA: the weighted mean of the k - f contributions nearest to the pivot.

    The pivot itself is among them. It is a contribution that is named by its content id (each node its own, say), or
    the medoid: the one with the least sum of distances to all others. Withstands f < k / 2; by default
    floor((k - 1) / 2). A false pivot that is named is not withstood.

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "nna"
    reference = "Farhadkhani et al., ICML 2023, arXiv:2210.01371 (MoNNA)"
    Params = NearestParameters
    takes_weights = True

    def selected(self, d: Matrix, ids: Sequence[bytes], f: int, p: NearestParameters) -> list[int]:
        pivot = pivot_of(p.pivot, self.name, d, ids, p)
        return distances.nearest(d, pivot, len(ids) - f, ids)


class GeometricParameters(RobustParameters):
    """Parameters of geometric_median."""

    iterations: int = Field(100, ge=0, le=100_000, description="steps of Weiszfeld's algorithm")
    smoothing: Number = Field(
        Decimal("1e-6"), ge=0, le=1, description="least distance that counts, as a share of the majority's radius"
    )


class GeometricMedian(Affine[GeometricParameters]):
    """Geometric median: the point with the least sum of distances to all, by Weiszfeld's algorithm from the mean.

        z_0 = mean of x_i;   z <- sum_i v_i x_i / sum_i v_i,   v_i = 1 / max(nu, |z - x_i|)

    for a fixed number of ``iterations``, which cost nothing beside the one pass for the distances. nu is ``smoothing``
    times the least radius about a contribution within which a majority of them lies, so that the rule commutes
    with scaling too. Liars at R times the distance of the honest need about ln R / ln((k - f) / f) iterations.
    Withstands f < k / 2; f matters for k and for ``before=nnm`` alone.

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "geometric_median"
    reference = "Weiszfeld 1937; Pillutla, Kakade, Harchaoui 2022, arXiv:1912.13445 (RFA)"
    Params = GeometricParameters

    def coefficients(self, view: View, p: GeometricParameters, rng: Rng) -> dict[str, Any]:
        _, mixtures, d = self.points(view, p, rng)
        c = weiszfeld(d, p.iterations, nearest(p.smoothing))
        numerators = spread(c, mixtures, len(view.meta(view.names[0])))
        return {"numerators": numerators, "divisor": left_sum(numerators)}


def weiszfeld(d: Matrix, iterations: int, smoothing: float) -> list[float]:
    """The coefficients of the geometric median of points with squared distances ``d``."""
    radius, centre = distances.majority_radius(d)
    if radius == 0.0:
        together = [1.0 if v == 0.0 else 0.0 for v in d[centre]]
        return [v / left_sum(together) for v in together]
    c = [1.0 / len(d)] * len(d)
    nu = max(smoothing * radius, 1.0 / 2.0**1000)
    for _ in range(iterations):
        pull = [1.0 / max(nu, away) for away in distances.from_point(d, c)]
        whole = left_sum(pull)
        c = [v / whole for v in pull]
    return c


def spread(c: Sequence[float], mixtures: Mixtures, k: int) -> list[float]:
    """Coefficients of mixtures as coefficients of the k contributions."""
    found = [0.0] * k
    for share, members in zip(c, mixtures.members, strict=True):
        for j in members:
            found[j] = found[j] + share / len(members)
    return found


class ClipParameters(RobustParameters):
    """Parameters of centered_clip."""

    iterations: int = Field(10, ge=1, le=100_000, description="steps of clipping")
    radius: Number | None = Field(None, gt=0, description="distance up to which a contribution counts in full")
    start: Annotated[str, _content_or("median", "medoid")] = Field(
        "median", description="coordinate median, medoid, or the content id of a trusted contribution"
    )


class CenteredClip(Affine[ClipParameters]):
    """Centred clipping: v <- v + 1/k sum_i (x_i - v) min(1, tau / |x_i - v|), from a start among the contributions.

    tau is ``radius``, a Euclidean distance between whole models; unless it is given, at each step the distance from v
    within which a majority of contributions lies, so that liars cannot widen it. The start is the coordinate median,
    the medoid or a named contribution; never zero, which means nothing for weights. No state is carried from merge to
    merge. Withstands f < k / 2; f matters for k and for ``before=nnm`` alone.

    Properties: commutative; idempotent up to rounding; not associative.
    """

    name = "centered_clip"
    reference = "Karimireddy, He, Jaggi, ICML 2021, arXiv:2012.10333"
    Params = ClipParameters

    def coefficients(self, view: View, p: ClipParameters, rng: Rng) -> dict[str, Any]:
        meta = distances.everyone(view, self.name)
        if p.start == "median":
            self.check_weights(meta, p)
            mixtures, _ = self.mixtures(view, p, self.withstood(len(meta), p), rng)
            at = len(mixtures.ids)
            d = distances.squared_distances(view, at + 1, lambda u: _with_median(mixtures.of(u.xs)))
        else:
            _, mixtures, d = self.points(view, p, rng)
            at = pivot_of(p.start, self.name, d, mixtures.ids, p)
        c = clipped(d, len(mixtures.ids), at, p.iterations, None if p.radius is None else nearest(p.radius))
        numerators = spread(c[: len(mixtures.ids)], mixtures, len(meta))
        middle = c[-1] if p.start == "median" else 0.0
        return {
            "numerators": numerators,
            "divisor": left_sum([*numerators, middle]),
            "middle": middle,
            "members": mixtures.members,
        }

    def apply(self, u: Unit, plan: Plan, p: ClipParameters, rng: Rng) -> Tensor:
        xs, numerators = list(u.xs), list(plan["numerators"])
        if plan["middle"] != 0.0:
            xs.append(median(Mixtures(plan["members"], []).of(u.xs)))
            numerators.append(plan["middle"])
        return divided(combined(xs, numerators), plan["divisor"])


def _with_median(ys: list[Tensor]) -> list[Tensor]:
    return [*ys, median(ys)]


def clipped(d: Matrix, k: int, start: int, iterations: int, radius: float | None) -> list[float]:
    """Coefficients of centred clipping of the first k points from one of the points with squared distances ``d``."""
    c = [1.0 if i == start else 0.0 for i in range(len(d))]
    for _ in range(iterations):
        away = distances.from_point(d, c)[:k]
        tau = sorted(away)[distances.majority(k) - 1] if radius is None else radius
        steps = [(1.0 if v <= tau else tau / v) / k for v in away]
        rest = 1.0 - left_sum(steps)
        c = [rest * v + (steps[i] if i < k else 0.0) for i, v in enumerate(c)]
    return c


STRATEGIES = (
    Median,
    TrimmedMean,
    Krum,
    MultiKrum,
    GeometricMedian,
    CenteredClip,
    MinimumDiameter,
    Meamed,
    NearestNeighbours,
)
