"""Strategies that search for the weights of another one: evolutionary_merge, genetic_merge.

    genome -> weights (and a density) for each layer group -> the inner strategy's merge -> fitness, a program's score

The plan is the best genome found and the inner strategy's plan for it; ``apply`` is the inner strategy's. All but the
fitness is deterministic (``evolution``), so a log of scores replays a search.
"""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Callable, Mapping
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from crdtmerge.canonical import decimal_text
from crdtmerge.errors import MismatchError, ParameterError, UsageError
from crdtmerge.numerics.programs import Program
from crdtmerge.numerics.scalars import nearest
from crdtmerge.strategies.evolution import GRID, Breeding, Draws, Found, Genome, cma_es, genetic, population_of
from crdtmerge.strategies.inside import INPUTS, Granularity, WithInner, layers, parameters_of, the_same
from crdtmerge.strategies.parameters import Number, Share
from crdtmerge.strategies.protocol import EMPTY, Inner, Meta, Needs, Plan, Rng, Strategy, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

Metric = Literal["accuracy", "loss", "squared_error", "output"]


class SearchParameters(WithInner):
    """Parameters of searches."""

    generations: int = Field(20, ge=0, le=1_000_000, description="generations; 0 runs no model: the inner strategy")
    granularity: Granularity = Field("model", description="what has weights of its own: model, layer or tensor")
    metric: Metric = Field("accuracy", description="what is maximised: accuracy, loss, squared_error, output")
    search_density: bool = Field(True, description="search the inner strategy's density too, where it has one")


class Genes:
    """What a genome means: for each group a factor of each contribution's claimed weight, and a density.

    A gene x in [0, 1] is the factor 2 x: one half, where the search begins, leaves the claimed weight. A density moves
    by its gene's distance from where it began.
    """

    def __init__(self, p: SearchParameters, view: View) -> None:
        filled = p.filled()
        self._inner, self._settings = p.inner, dict(p.settings)
        self._meta = {name: view.meta(name) for name in view.names}
        self._group = layers(view.names, p.granularity)
        self._groups = max(self._group.values(), default=-1) + 1
        self._ids = sorted({m.id for meta in self._meta.values() for m in meta})
        density = getattr(filled.general, "density", None) if p.search_density else None
        self._density: Decimal | None = density if isinstance(density, Decimal) else None
        if self._density is not None and filled.varies("density"):
            raise ParameterError("settings: density has rules for some tensors; set search_density=false to keep them.")
        if self._groups > 1 and self._density is not None and "scope" in type(filled.general).model_fields:
            self._settings.setdefault("scope", "tensor")
        self._width = len(self._ids) + (self._density is not None)

    @property
    def start(self) -> Genome:
        """The genome that is the inner strategy as claimed."""
        last = () if self._density is None else (_nearest_gene(self._density),)
        return ((GRID // 2,) * len(self._ids) + last) * self._groups

    def merge(self, genome: Genome) -> Inner:
        """The merge that a genome means."""
        weights = {name: self.weights(genome, name) for name in self._meta}
        settings = dict(self._settings)
        if self._density is not None:
            rules: list[dict[str, str]] = []
            if self._groups > 1:
                rules = [{"filter": glob.escape(name), "value": self._dense(genome, name)} for name in self._meta]
            settings.pop("drop", None)
            first = next(iter(self._meta), None)
            settings["density"] = rules or (self._dense(genome, first) if first else decimal_text(self._density))
        return Inner(self._inner, settings, weights)

    def weights(self, genome: Genome, name: str) -> tuple[Decimal, ...]:
        """The weights of a tensor's contributions."""
        own = self._own(genome, name)
        return tuple(factor(m.weight, own[self._ids.index(m.id)]) for m in self._meta[name])

    def table(self, genome: Genome) -> dict[str, Any]:
        """A genome as a value of a plan: for each tensor its contributions' genes, and its settings."""
        settings = {} if self._density is None else {n: {"density": self._dense(genome, n)} for n in self._meta}
        genes = {
            name: [self._own(genome, name)[self._ids.index(m.id)] for m in meta] for name, meta in self._meta.items()
        }
        return {"genes": genes, "settings": settings, "scope": self._settings.get("scope")}

    def _own(self, genome: Genome, name: str) -> Genome:
        at = self._group[name] * self._width
        return genome[at : at + self._width]

    def _dense(self, genome: Genome, name: str) -> str:
        assert self._density is not None, "asked only where there is one"
        moved = self._own(genome, name)[-1] - _nearest_gene(self._density)
        with localcontext(prec=120):
            found = self._density + Decimal(moved) / GRID
            return decimal_text(min(max(found, Decimal(1) / GRID), Decimal(1)))


def _nearest_gene(density: Decimal) -> int:
    top, bottom = density.as_integer_ratio()
    return min(max((2 * top * GRID + bottom) // (2 * bottom), 0), GRID)


def factor(weight: Decimal, gene: int) -> Decimal:
    """A claimed weight times 2 gene / GRID, exactly.

    >>> factor(Decimal("0.1"), 65536 // 2), factor(Decimal(3), 65536)
    (Decimal('0.1'), Decimal('6'))
    """
    with localcontext(prec=120):
        return Decimal(decimal_text(weight * gene / (GRID // 2)))


class Search(Strategy[Any]):
    """What the two searches share."""

    @abstractmethod
    def search(self, start: Genome, evaluate: Callable[[Genome], float], draws: Draws, p: Any) -> Found:
        """The best genome."""

    @abstractmethod
    def evaluations(self, genes: int, p: Any) -> int:
        """How many candidates there are at most."""

    def needs(self, p: Any) -> Needs:
        inner: Needs = p.inner_needs()
        if not p.generations:
            return inner
        return inner._replace(inputs=(*inner.inputs, *INPUTS), plan="model")

    def plan(self, view: View, p: Callable[[str], Any], rng: Rng) -> Plan:
        if not view.names:
            return EMPTY
        one = the_same(view, p, self.name)
        genes = Genes(one, view)
        if not one.generations:
            inner = Inner(one.inner, one.settings)
            return Plan({"inner": dict(view.planned(inner, rng).data)})
        done, most = 0, self.evaluations(len(genes.start), one)

        def evaluate(genome: Genome) -> float:
            nonlocal done
            done += 1
            try:
                return view.score(one.metric, genes.merge(genome), rng, (done, most))
            except (UsageError, OverflowError):
                if genome == genes.start:
                    raise
                return float("nan")  # weights that the inner strategy refuses: the worst candidate

        found = self.search(genes.start, evaluate, Draws(rng.stream("search", b"", "")), one)
        if found.value != found.value:
            raise MismatchError(
                f"strategy '{self.name}': every candidate's {one.metric} is NaN; nothing can be chosen."
            )
        plan = view.planned(genes.merge(found.genome), rng)
        return Plan({"inner": dict(plan.data), "score": found.value} | genes.table(found.genome))

    def apply(self, u: Unit, plan: Plan, p: Any, rng: Rng) -> Tensor:
        meta = weighted(u.meta, u.name, plan)
        unit = Unit(u.name, u.start, u.stop, u.shape, u.base, u.xs, meta, u.stats, u.models)
        tensor: Tensor = p.strategy().apply(unit, Plan(plan["inner"]), inner_parameters(p, u.name, plan), rng)
        return tensor

    def extras(self, plan: Plan) -> Mapping[str, Tensor]:
        return {}

    def program(self, name: str, meta: tuple[Meta, ...], plan: Plan, p: Any, rng: Rng) -> Program | None:
        own = inner_parameters(p, name, plan)
        program: Program | None = p.strategy().program(name, weighted(meta, name, plan), Plan(plan["inner"]), own, rng)
        return program


def weighted(meta: tuple[Meta, ...], name: str, plan: Plan) -> tuple[Meta, ...]:
    """The contributions of a tensor with the weights of a plan's genome."""
    if "genes" not in plan.data:
        return meta
    genes = plan["genes"][name]
    return tuple(m._replace(weight=factor(m.weight, gene)) for m, gene in zip(meta, genes, strict=True))


def inner_parameters(p: Any, name: str, plan: Plan) -> Any:
    """The inner strategy's parameters for a tensor, with what a plan's genome says of it."""
    own = plan.data.get("settings", {}).get(name)
    if own is None:
        return p.filled().at(name)
    settings = {key: value for key, value in p.settings.items() if key != "drop"}
    scope = plan.data.get("scope")
    return parameters_of(p.inner, settings | ({"scope": scope} if scope else {}) | dict(own))


class EvolutionaryParameters(SearchParameters):
    """Parameters of evolutionary_merge."""

    inner: str = Field("ties", description="the strategy inside")
    population: int = Field(0, ge=0, le=10_000, description="candidates of a generation; 0 for 4 + floor(3 ln genes)")
    sigma: Number = Field(Decimal("0.1666667"), gt=0, le=10, description="the spread of candidates at the beginning")


class EvolutionaryMerge(Search):
    """Evolutionary merging: CMA-ES over the weights, and the density, of a merge strategy.

        genome*  =  argmax fitness(inner(weights(genome), density(genome)))

    A genome has a gene for each contribution and, where the inner strategy has a density, one for it, in each layer
    group; the density is the strategy's, the same for all contributions. Genes begin at what is claimed, and the
    beginning is a candidate. Searching the order of layers is not part of it.

    Needs the inputs ``program`` and ``data``, and what the inner strategy needs; with generations=0 only the latter.
    """

    name, version, family = "evolutionary_merge", 1, "search"
    reference = "Akiba et al., Nature Machine Intelligence 2025, arXiv:2403.13187; Hansen, arXiv:1604.00772"
    Params = EvolutionaryParameters

    def search(
        self, start: Genome, evaluate: Callable[[Genome], float], draws: Draws, p: EvolutionaryParameters
    ) -> Found:
        sigma, population = nearest(p.sigma), p.population or None
        return cma_es(start, evaluate, draws, generations=p.generations, population=population, sigma=sigma)

    def evaluations(self, genes: int, p: EvolutionaryParameters) -> int:
        return 1 + p.generations * (p.population or population_of(genes))


class GeneticParameters(SearchParameters):
    """Parameters of genetic_merge."""

    inner: str = Field("slerp", description="the strategy inside")
    population: int = Field(20, ge=2, le=10_000, description="candidates that survive a generation")
    levels: int = Field(10, ge=0, le=GRID, description="steps that a gene can take; 0 for all of its 65,536")
    crossover: Number = Field(Decimal("0.9"), ge=0, le=1, description="probability that two parents are crossed")
    crossover_eta: Number = Field(Decimal(15), ge=0, description="the larger, the nearer are children to parents")
    mutation: Share | None = Field(None, description="probability that a gene mutates; 1 / genes by default")
    mutation_eta: Number = Field(Decimal(20), ge=0, description="the larger, the smaller are mutations")


class GeneticMerge(Search):
    """Genetic merging: tournaments, crossover and mutation over the weights, and the density, of a merge strategy.

        genome*  =  argmax fitness(inner(weights(genome), density(genome)))

    Genomes as in ``evolutionary_merge``, on ``levels`` steps. The best of parents and children survive: the best never
    gets worse. One fitness; of several the mean is taken (tasks of the data).

    Needs the inputs ``program`` and ``data``, and what the inner strategy needs; with generations=0 only the latter.
    """

    name, version, family = "genetic_merge", 1, "search"
    reference = "Minut et al., ACL 2025, arXiv:2505.11427; Deb and Agrawal, Complex Systems 9, 1995"
    Params = GeneticParameters

    def search(self, start: Genome, evaluate: Callable[[Genome], float], draws: Draws, p: GeneticParameters) -> Found:
        breeding = Breeding(
            p.population,
            nearest(p.crossover),
            nearest(p.crossover_eta),
            None if p.mutation is None else nearest(p.mutation),
            nearest(p.mutation_eta),
            p.levels or None,
        )
        return genetic(start, evaluate, draws, breeding, generations=p.generations)

    def evaluations(self, genes: int, p: GeneticParameters) -> int:
        return p.population * (p.generations + 1)


STRATEGIES = (EvolutionaryMerge, GeneticMerge)
