"""What a strategy is: needs, plan, apply. Pure functions of tensors; no files, no replica, no clock.

    needs(params)                    what it requires before anything is read
    plan(view, params, rng)  -> Plan what must be known of the whole input first (thresholds, norms, coefficients)
    apply(unit, plan, params, rng)   the merged values of one stretch of one tensor

Rules: ``apply`` depends on its arguments alone and is block-invariant (any partition of a tensor into units gives
the same bytes); contributions come in canonical order; arithmetic follows ``numerics``; a strategy whose inputs are
missing raises ``NeedsError`` and never substitutes a proxy; ``version`` grows with ANY change of output bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from crdtmerge.canonical import digest
from crdtmerge.numerics import scalars
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.philox import Stream, stream
from crdtmerge.numerics.programs import Program
from crdtmerge.strategies.parameters import Parameters
from crdtmerge.symmetry.groups import Permutation, Symmetry

if TYPE_CHECKING:
    from torch import Tensor

Scanned = TypeVar("Scanned")
P = TypeVar("P", bound=Parameters)


class Needs(NamedTuple):
    """What a strategy requires, for given parameters.

    ``stats`` are statistics that each contribution brings (files of tensors with the model's names), ``models`` further
    models and ``inputs`` further files that the recipe names (programs, batches). ``unit`` is the smallest piece that
    ``apply`` takes: any stretch of elements, or a whole tensor. With ``plan="model"`` a model is run: what comes out
    depends on the build, unless the recipe names the plan. ``compute`` is the arithmetic's type: ``double`` is float64
    for every storage type; ``storage`` is float32 for bfloat16 and float16, float64 for float32 and float64.
    ``weights`` says which claimed weights make sense. ``exact`` is class E (the same bytes on every machine);
    otherwise class P.
    """

    base: Literal["required", "optional", "unused"] = "unused"
    stats: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("task",)
    unit: Literal["element", "tensor"] = "element"
    plan: Literal["none", "scan", "model"] = "none"
    exact: bool = True
    min_k: int = 1
    max_k: int | None = None
    compute: Literal["double", "storage"] = "storage"
    weights: Literal["any", "nonnegative"] = "nonnegative"


class Meta(NamedTuple):
    """What is said of a contribution: content id, weight (exact), role, task."""

    id: bytes
    weight: Decimal = Decimal(1)
    role: str = "task"
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """One stretch of one tensor: what ``apply`` sees. All tensors are 1-D, of one length and of the compute dtype.

    ``stats`` holds, for each statistic that has this tensor, one tensor a contribution; one of another shape than the
    model's own (a Gram matrix) is there as a whole, and only where ``apply`` takes whole tensors. ``models`` holds
    this stretch of further models.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    base: Tensor | None
    xs: tuple[Tensor, ...]
    meta: tuple[Meta, ...]
    stats: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    models: Mapping[str, Tensor] = field(default_factory=dict)

    def weights(self) -> tuple[float, ...]:
        """The claimed weights, rounded to the compute dtype, in the order of ``xs``."""
        return tuple(self.scalar(meta.weight) for meta in self.meta)

    def scalar(self, number: Decimal | float) -> float:
        """A number rounded to the compute dtype, fit to multiply tensors with."""
        wide = scalars.nearest(number) if isinstance(number, Decimal) else number
        return wide if self.xs[0].dtype == torch.float64 else scalars.nearest_f32(wide)

    def task_vectors(self) -> list[Tensor]:
        """tau_i = x_i - base, in canonical order."""
        assert self.base is not None, "task vectors need a base; Needs.base says so"
        return [x - self.base for x in self.xs]


class Rng(NamedTuple):
    """A pure source of random streams: a seed, no state."""

    seed: bytes

    def stream(self, purpose: str, contribution: bytes, tensor: str) -> Stream:
        """The stream for one purpose, contribution and tensor; keyed by purpose so that strategies share masks."""
        return stream(self.seed, purpose, contribution, tensor)


@dataclass(frozen=True)
class Plan:
    """A small artefact computed from the whole input, content-addressed so that replicas can check it.

    ``data`` maps strings to None, bool, int, float, str, bytes, lists and maps of these.
    """

    data: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical bytes; floats enter by their exact hexadecimal form."""
        return digest("plan", _without_floats(self.data))


def _without_floats(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _without_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(item) for item in value]
    return value


EMPTY = Plan()


class Inner(NamedTuple):
    """A merge inside a plan: a strategy with its parameters, and weights of its own for the contributions.

    ``weights`` maps tensors to one weight for each of their contributions; None leaves those that are claimed.
    """

    strategy: str
    params: Mapping[str, Any]
    weights: Mapping[str, tuple[Decimal, ...]] | None = None


class Ran(NamedTuple):
    """What a job found that ran a program: JSON values, and tensors by name."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class InputFile(NamedTuple):
    """The bytes of a file that a merge reads beside models, and what messages call it."""

    data: bytes
    where: str


class View(Protocol):
    """The whole input of a merge, read-only and lazy: names of float tensors in canonical (sorted) order."""

    @property
    def names(self) -> Sequence[str]:
        """The tensors to be merged."""
        ...

    def meta(self, name: str) -> tuple[Meta, ...]:
        """The contributions that have a tensor, in canonical order."""
        ...

    def elements(self, name: str) -> int:
        """How many elements a tensor has."""
        ...

    def gram(self, names: Sequence[str], *, task_vectors: bool = False) -> Mapping[str, NDArray[np.float64]]:
        """For each named tensor, the k x k matrix of dot products of its contributions (or of their task vectors)."""
        ...

    def cuts(self, density: Callable[[str], Decimal], *, whole_model: bool) -> Mapping[str, list[tuple[int, int]]]:
        """For each tensor and contribution, (pattern, last index) such that the largest |x - base| are kept.

        max(1, floor(density * n)) elements, ties by lowest position, of each tensor or of the whole model.
        """
        ...

    def scan(self, work: Callable[[Unit], Scanned]) -> Iterator[tuple[str, Scanned]]:
        """``work`` of every unit, in canonical order, with its tensor's name. Units start at multiples of 65,536."""
        ...

    def whole(self, name: str) -> Unit:
        """A tensor as one unit."""
        ...

    def input(self, name: str, bytes_max: int) -> InputFile:
        """A file that the recipe names, by a digest that was checked; of a longer one ``bytes_max`` + 1 bytes."""
        ...

    def run(
        self,
        job: str,
        params: Mapping[str, Any],
        groups: Callable[[Unit], Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
        rng: Rng,
        models: Mapping[str, Inner] | None = None,
    ) -> Ran:
        """Run a job of ``programs`` on the inputs ``program`` and ``data`` (unless it makes its own), in a process.

        ``groups`` makes of each whole tensor what each group of the job's tensors holds under its name; or it holds
        what is new in groups that an earlier run was given, and such a run is not taken up where it stopped.
        ``models`` are groups that are merged models.
        """
        ...

    def planned(self, inner: Inner, rng: Rng) -> Plan:
        """The plan of a merge inside this one, over the same tensors."""
        ...

    def turned(self, symmetry: Symmetry, permutations: Mapping[bytes, Sequence[Permutation]]) -> View:
        """The same view with the units of each contribution reordered, by content id; its statistics too, not the base.

        Without programs: nothing can be run on it.
        """
        ...

    def score(self, metric: str, inner: Inner, rng: Rng, done: tuple[int, int]) -> float:
        """How good an inner merge is on the inputs ``program`` and ``data``; NaN where the model gives NaN.

        ``done`` is how many of how many are scored, for those who wait.
        """
        ...


class Strategy(ABC, Generic[P]):
    """A merge strategy. Subclasses set the class variables and define ``apply``."""

    name: ClassVar[str]
    version: ClassVar[int]
    family: ClassVar[str]
    reference: ClassVar[str]
    Params: ClassVar[type[Parameters]] = Parameters

    @abstractmethod
    def needs(self, p: P) -> Needs:
        """What the strategy requires for these parameters."""

    def plan(self, view: View, p: Callable[[str], P], rng: Rng) -> Plan:
        """What ``apply`` must know of the whole input; ``p(name)`` are the parameters for a tensor."""
        return EMPTY

    @abstractmethod
    def apply(self, u: Unit, plan: Plan, p: P, rng: Rng) -> Tensor:
        """The merged values of a unit, in its compute dtype."""

    def extras(self, plan: Plan) -> Mapping[str, Tensor]:
        """Tensors of the plan that are written beside the merged ones, by name."""
        return {}

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: P, rng: Rng) -> Program | None:
        """The same arithmetic as ``apply`` for one tensor as a program for a fused kernel, or None if it is none."""
        return None
