"""Stages that strategies on task vectors are composed of: sparsify, elect, combine, scale.

Each works elementwise on 1-D tensors of the compute dtype, one IEEE operation a call, contributions folded from left to
right; only ``magprune`` needs whole rows. A ``Composition`` is a strategy that is nothing but a ``Chain`` of stages:

    theta = theta_0 + scale * combine(elect(sparsify(tau_1), ..., sparsify(tau_k))),    tau_i = theta_i - theta_0
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from crdtmerge.errors import ParameterError
from crdtmerge.numerics import philox, selection
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.programs import Consensus, Program
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies.parameters import Parameters
from crdtmerge.strategies.protocol import EMPTY, Meta, Needs, Plan, Rng, Strategy, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P", bound=Parameters)

Sparsify = Literal["none", "magnitude", "band", "bernoulli", "magprune"]
Elect = Literal["none", "sum", "count"]
Combine = Literal["sum", "mean", "max"]


# ---------------------------------------------------------------- sparsify


def trim(tau: Tensor, cut: tuple[int, int], start: int) -> Tensor:
    """Sparsify by magnitude: what lies above the cut is kept, the rest is zero."""
    return torch.where(selection.largest(tau, *cut, start), tau, torch.zeros_like(tau))


def drop(tau: Tensor, stream: philox.Stream, density: Decimal, start: int, rescale: float) -> Tensor:
    """Sparsify at random: an element is kept with probability ``density`` and multiplied by ``rescale``, else zero."""
    words = philox.words(stream, start, start + tau.numel(), tau.device)
    return torch.where(words < philox.keep_below(density), tau * rescale, torch.zeros_like(tau))


def band(tau: Tensor, low: tuple[int, int] | None, high: tuple[int, int] | None, start: int) -> Tensor:
    """Sparsify to the middle: what lies above the cut ``low`` and not above the cut ``high`` is kept."""
    tau = trim(tau, low, start) if low else tau
    return torch.where(selection.largest(tau, *high, start), torch.zeros_like(tau), tau) if high else tau


def ranks(tau: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Rank of each magnitude within its row, ascending from 0, equal ones by position; and the length of a row.

    A tensor of two dimensions or more has rows [out, rest], any other is one row.
    """
    rows = tau.reshape(shape[0] if len(shape) > 1 else 1, -1)
    n = rows.shape[1]
    order = torch.sort(selection.patterns(rows), dim=1, stable=True).indices
    own = torch.arange(n, dtype=torch.int64, device=tau.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, own).reshape(-1), n


def magprune(
    tau: Tensor, stream: philox.Stream, density: Decimal, epsilon: Decimal, shape: tuple[int, ...], *, rescale: bool
) -> Tensor:
    """Sparsify at random, small elements more often: q = density - epsilon + 2 epsilon rank / (n - 1) in a row of n.

    An element is kept with probability q and divided by its q. Where n = 1, q is the density. The bounds that words
    are compared with are linear in the rank between those of the ends, rounded down to integers.
    """
    if not tau.numel():
        return tau
    rank, n = ranks(tau, shape)
    low, high = (density - epsilon, density + epsilon) if n > 1 else (density, density)
    bottom, steps = philox.keep_below(low), max(n - 1, 1)
    bound = (rank * (philox.keep_below(high) - bottom)) // steps + bottom
    kept = philox.words(stream, 0, tau.numel(), tau.device) < bound
    if rescale:
        q = rank.to(torch.float64) * nearest(Fraction(high - low) / steps) + nearest(low)
        tau = tau / q.to(tau.dtype)
    return torch.where(kept, tau, torch.zeros_like(tau))


def streams(tensor: str, meta: Sequence[Meta], rng: Rng) -> tuple[philox.Stream, ...]:
    """The random stream of each contribution for dropping elements of one tensor."""
    return tuple(rng.stream("drop", m.id, tensor) for m in meta)


# ---------------------------------------------------------------- elect, combine


def weighted(taus: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """tau_i multiplied by w_i."""
    return [tau * w for tau, w in zip(taus, weights, strict=True)]


def elect(taus: Sequence[Tensor], how: str) -> Tensor:
    """The elected sign of each element as bool, True for plus: of the sum, or of the count of signs. Zero is plus."""
    votes = [torch.sign(tau) for tau in taus] if how == "count" else taus
    total = votes[0]
    for vote in votes[1:]:
        total = total + vote
    return total >= 0


def agreeing(taus: Sequence[Tensor], positive: Tensor) -> list[Tensor]:
    """Which elements of each task vector have the elected sign; zeros have none."""
    return [torch.where(positive, tau > 0, tau < 0) for tau in taus]


def everything(taus: Sequence[Tensor]) -> list[Tensor]:
    """Every element of each task vector, where nothing is elected."""
    return [torch.ones_like(tau, dtype=torch.bool) for tau in taus]


def combine(taus: Sequence[Tensor], weights: Sequence[float], selected: Sequence[Tensor], how: str) -> Tensor:
    """The selected elements of weighted task vectors as one: their sum, their weighted mean, or the largest.

    The mean divides by the sum of the weights of what was selected (1 where nothing was). The largest is by
    magnitude; of two equal magnitudes the positive wins, so that the order of contributions cannot matter.
    """
    zero = torch.zeros_like(taus[0])
    chosen = [torch.where(s, tau, zero) for tau, s in zip(taus, selected, strict=True)]
    if how == "max":
        best = chosen[0]
        for tau in chosen[1:]:
            best = larger(best, tau)
        return best
    total = chosen[0]
    for tau in chosen[1:]:
        total = total + tau
    if how == "sum":
        return total
    mass = torch.where(selected[0], zero + weights[0], zero)
    for s, w in zip(selected[1:], weights[1:], strict=True):
        mass = mass + torch.where(s, zero + w, zero)
    return total / torch.where(mass == 0, zero + 1.0, mass)


def larger(x: Tensor, y: Tensor) -> Tensor:
    """The element of larger magnitude; of two equal magnitudes the positive one. Commutative and associative."""
    ax, ay = x.abs(), y.abs()
    return torch.where((ay > ax) | ((ay == ax) & (y > x)), y, x)


def merge(taus: Sequence[Tensor], weights: Sequence[float], elect_by: str, combine_by: str) -> Tensor:
    """Sparse task vectors weighted, their signs elected (``none``: all agree), and what agrees as one."""
    own = weighted(taus, weights)
    selected = everything(own) if elect_by == "none" else agreeing(own, elect(own, elect_by))
    return combine(own, weights, selected, combine_by)


# ---------------------------------------------------------------- composed


class Chain(NamedTuple):
    """Which stages, and what each needs to know; what a stage does not use is not looked at.

    magnitude: ``density``, of the whole model or of each tensor. band: ``drop_low`` and ``drop_high``. bernoulli:
    ``density``, ``rescale``. magprune: ``density``, ``epsilon``, ``rescale``. ``scale`` is None where the plan has one
    for each tensor.
    """

    sparsify: Sparsify = "none"
    elect: Elect = "none"
    combine: Combine = "sum"
    scale: Decimal | None = Decimal(1)
    density: Decimal = Decimal(1)
    whole_model: bool = False
    drop_low: Decimal = Decimal(0)
    drop_high: Decimal = Decimal(0)
    epsilon: Decimal = Decimal(0)
    rescale: bool = True

    @property
    def factor(self) -> float:
        """What kept elements are multiplied by: the float nearest to 1 / density."""
        top, bottom = self.density.as_integer_ratio()
        return bottom / top if self.rescale else 1.0

    @property
    def weights(self) -> Literal["any", "nonnegative"]:
        """Negative weights make sense unless signs are elected or a mean divides by the weights."""
        return "any" if self.elect == "none" and self.combine != "mean" else "nonnegative"

    def above(self, elements: int) -> Decimal | None:
        """The share of a tensor that lies above the upper cut, None for no cut."""
        if self.sparsify != "band":
            return None
        return _share_of(_floor(self.drop_high, elements), elements)

    def kept(self, elements: int) -> Decimal | None:
        """The share of a tensor that lies above the lower cut, None for no cut."""
        if self.sparsify == "magnitude":
            return self.density if self.density < 1 else None
        if self.sparsify != "band":
            return None
        dropped = _floor(self.drop_low, elements)
        return _share_of(elements - dropped, elements) if dropped else None


def _elements(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _floor(share: Decimal, elements: int) -> int:
    top, bottom = share.as_integer_ratio()
    return top * elements // bottom


def _share_of(count: int, elements: int) -> Decimal | None:
    """A share whose product with ``elements``, rounded down, is ``count``; None for none of them."""
    return Decimal(2 * count + 1) / Decimal(2 * elements) if 0 < count < elements else None


def require_one_share(strategy: str, asked: Sequence[object]) -> None:
    """Refuse more than one way to take a share of the whole model. Raises ParameterError."""
    if any(one != asked[0] for one in asked[1:]):
        raise ParameterError(
            f"strategy '{strategy}': scope=model takes one share of the whole model; a density for some tensors needs "
            "scope=tensor."
        )


class Composition(Strategy[P]):
    """A strategy that is a chain of stages: subclasses say which."""

    @abstractmethod
    def chain(self, p: P) -> Chain:
        """The stages for some parameters."""

    def needs(self, p: P) -> Needs:
        c = self.chain(p)
        scans = c.sparsify == "band" or (c.sparsify == "magnitude" and c.density < 1) or c.scale is None
        return Needs(
            base="required",
            plan="scan" if scans else "none",
            unit="tensor" if c.sparsify == "magprune" else "element",
            weights=c.weights,
        )

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        """The cuts of each tensor that has any: ``cuts`` keeps what lies above, ``above`` drops it."""
        chains = {name: self.chain(p(name)) for name in view.names}
        if any(c.whole_model for c in chains.values()):
            require_one_share(self.name, [(c.sparsify, c.whole_model, c.density) for c in chains.values()])
        data = {
            "cuts": _cuts(view, {name: c.kept(view.elements(name)) for name, c in chains.items()}, chains),
            "above": _cuts(view, {name: c.above(view.elements(name)) for name, c in chains.items()}, chains),
        }
        found = {which: cuts for which, cuts in data.items() if cuts}
        return Plan(found) if found else EMPTY

    def sparse(self, u: Unit, plan: Plan, c: Chain, rng: Rng) -> list[Tensor]:
        """The sparse task vectors of a unit."""
        taus = u.task_vectors()
        if c.sparsify == "none":
            return taus
        if c.sparsify in ("magnitude", "band"):
            n = _elements(u.shape)
            low, high = (
                plan[which][u.name] if share else [None] * len(taus)
                for which, share in (("cuts", c.kept(n)), ("above", c.above(n)))
            )
            return [band(tau, one, other, u.start) for tau, one, other in zip(taus, low, high, strict=True)]
        own = zip(taus, streams(u.name, u.meta, rng), strict=True)
        if c.sparsify == "bernoulli":
            factor = u.scalar(c.factor)
            return [drop(tau, stream, c.density, u.start, factor) for tau, stream in own]
        return [magprune(tau, stream, c.density, c.epsilon, u.shape, rescale=c.rescale) for tau, stream in own]

    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        c = self.chain(p)
        m = merge(self.sparse(u, plan, c, rng), u.weights(), c.elect, c.combine)
        assert u.base is not None
        return u.base + m * u.scalar(plan["scales"][u.name] if c.scale is None else c.scale)

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: P, rng: Rng) -> Program | None:
        c = self.chain(p)
        if c.sparsify in ("band", "magprune"):
            return None
        random = c.sparsify == "bernoulli"
        return Consensus(
            tuple(nearest(m.weight) for m in meta),
            tuple(plan["cuts"][name]) if c.sparsify == "magnitude" and c.density < 1 else (),
            streams(name, meta, rng) if random else (),
            philox.keep_below(c.density) if random else 1 << 32,
            c.factor if random else 1.0,
            c.elect,
            c.combine,
            plan["scales"][name] if c.scale is None else nearest(c.scale),
        )


Cuts = Mapping[str, list[tuple[int, int]]]


def _cuts(view: View, shares: Mapping[str, Decimal | None], chains: Mapping[str, Chain]) -> Cuts:
    """The cuts of the tensors that a share is taken of."""
    if all(share is None for share in shares.values()):
        return {}
    found = view.cuts(lambda name: shares[name] or Decimal(1), whole_model=any(c.whole_model for c in chains.values()))
    return {name: cuts for name, cuts in found.items() if shares[name] is not None}
