"""The laws of strategies, measured: each alone as a function of models, and through the set of layer 1.

Alone, f(a, b) merges two models in the order given, without the set:

    commutative   f(a, b) = f(b, a)
    associative   f(f(a, b), c) = f(a, f(b, c))
    idempotent    f(a, a) = a

within ``TOLERANCE``. Through the set, | joins states and a state is what it resolves to, by the byte:

    commutative   A | B = B | A
    associative   (A | B) | C = A | (B | C)
    idempotent    A | A = A
    convergent    three replicas end the same that hear of each other in orders of their own, some things twice

RULES
1. A statistic belongs to a content: it is seeded by what a model holds, for merged models too.
2. Models have the first role that a strategy takes; where it cannot do without another, the same further model has it.
3. What cannot be measured is said, never left out: ``Measured.why``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crdtmerge.errors import NeedsError
from crdtmerge.state import MergeState
from crdtmerge.strategies import registry
from crdtmerge.strategies.protocol import Needs
from crdtmerge.testing.case import SYMMETRY, Case
from crdtmerge.testing.models import Model, Shapes, content, raw, statistics, stored
from crdtmerge.testing.prepared import Prepared
from crdtmerge.testing.small_program import OF_TASKS, TASKS, one_process, small_program

if TYPE_CHECKING:
    from torch import Tensor

ALONE = ("commutative", "associative", "idempotent")
THROUGH_THE_SET = (*ALONE, "convergent")

TOLERANCE = 1e-5
"""What two results may differ by to be called equal: that of the paper's table."""

SEED = 42
SCALE = 0.3
TRIALS = 5
PROGRAM_TRIALS = 2
BUDGET = {"steps": 4, "generations": 2, "population": 4}
"""What strategies that run a program are given, where they have such parameters."""


class Law(NamedTuple):
    """Whether a law held in every trial, and the largest deviation."""

    holds: bool
    deviation: float


@dataclass(frozen=True)
class Measured:
    """The laws of one strategy; ``why`` says what was not measured and for what reason."""

    strategy: str
    exact: bool
    params: Mapping[str, Any] = field(default_factory=dict)
    alone: Mapping[str, Law] = field(default_factory=dict)
    through_the_set: Mapping[str, Law] = field(default_factory=dict)
    why: str = ""


def measured(names: Iterable[str], *, dim: int = 4, trials: int = TRIALS) -> Iterator[Measured]:
    """The laws of strategies with their defaults on seeded dim x dim float64 models, one after the other.

    Those that run a program run a linear layer, with the budget of ``BUDGET`` and in at most ``PROGRAM_TRIALS`` trials.
    Raises UnknownStrategyError.
    """
    shapes = {"weight": (dim, dim)}
    with ExitStack() as opened:
        opened.enter_context(one_process())
        files: dict[str, Path] = {}
        for name in names:
            strategy = registry.get(name)
            inputs = set(Case(strategy).needs.inputs) - {SYMMETRY}
            known = strategy.Params.model_fields
            budget = {field: value for field, value in BUDGET.items() if inputs and field in known}
            if inputs and not files:
                files = opened.enter_context(small_program(dim))
            case = Case(strategy, budget, files=files if inputs else {})
            yield _measure(case, shapes, min(trials, PROGRAM_TRIALS) if inputs else trials)


def _measure(case: Case, shapes: Shapes, trials: int) -> Measured:
    needs = case.needs
    found = Measured(case.strategy.name, needs.exact and needs.plan != "model", case.params)
    lacking = sorted(set(needs.inputs) - case.inputs_for(shapes).keys())
    if lacking:
        return replace(found, why=f"needs inputs: {', '.join(lacking)}")
    if not _binary(case):
        found = replace(found, why=f"alone: it is no function of two models: {_taken(needs)}")
    else:
        found = replace(found, alone=alone(case, shapes, trials=trials))
    return replace(found, through_the_set=through_the_set(case, shapes, trials=trials))


def _taken(needs: Needs) -> str:
    most = "" if needs.max_k is None else f", at most {needs.max_k}"
    return f"it merges at least {needs.min_k}{most}"


def _binary(case: Case) -> bool:
    return case.needs.min_k <= 2 <= (case.needs.max_k or 2)


# ---------------------------------------------------------------- models


def models_of(case: Case, shapes: Shapes, count: int, number: int) -> tuple[list[Model], Model]:
    """float64 models, base N(0, 1) and task vectors 0.3 N(0, 1), and the base."""
    rng = np.random.default_rng([SEED, number])

    def normal(scale: float, around: Model | None = None) -> dict[str, Tensor]:
        made = {name: stored(rng.standard_normal(shape) * scale, "F64") for name, shape in sorted(shapes.items())}
        return {name: x if around is None else around[name] + x for name, x in made.items()}

    base = normal(1.0)
    return [normal(SCALE, base) for _ in range(count)], base


def statistics_of(case: Case, one: Model) -> dict[str, Model]:
    """The statistics that a model has in these measurements, seeded by what it holds."""
    shapes = {name: tuple(x.shape) for name, x in one.items()}
    return statistics(case.needs.stats, int.from_bytes(content(one)[:8], "big"), shapes, case.makers)


# ---------------------------------------------------------------- alone


class Function:
    """A strategy as a function of models in the order given, for a fixed base."""

    def __init__(
        self, case: Case, base: Model, others: Sequence[tuple[str, Model]] = (), *, tasks: bool = False
    ) -> None:
        self._case, self._needs, self.others, self.tasks = case, case.needs, others, tasks
        self.files = case.inputs_for({name: tuple(x.shape) for name, x in base.items()})
        if tasks and OF_TASKS in case.files:
            self.files["data"] = case.files[OF_TASKS]
        self._base = base if self._needs.base == "required" else None
        self._beside = case.beside(base, "F64", {name: tuple(x.shape) for name, x in base.items()})

    def __call__(self, *models: Model) -> Model:
        """f(a, b, ...)."""
        everyone = [*models, *(one for _, one in self.others)]
        return Prepared(
            self._case.strategy,
            everyone,
            self._base,
            ids=[content(one) for one in everyone],
            stats=[statistics_of(self._case, one) for one in everyone],
            beside=self._beside,
            files=self.files,
            roles=[*[self._needs.roles[0]] * len(models), *(role for role, _ in self.others)],
            tasks=TASKS[: len(everyone)] if self.tasks else (),
            **self._case.params,
        ).run()


def function_of(case: Case, models: Sequence[Model], base: Model, spare: Model) -> Function:
    """The strategy as a function of these and like models.

    Where it refuses them as they are, the spare model has its other roles, or models claim tasks by their positions.
    """
    others = [(role, spare) for role in case.needs.roles[1:]]
    tried = [Function(case, base), Function(case, base, others), Function(case, base, tasks=True)]
    for one in tried:
        try:
            one(*models)
        except NeedsError:
            continue
        return one
    return tried[0]


def alone(case: Case, shapes: Shapes, *, trials: int = TRIALS) -> dict[str, Law]:
    """The laws of the bare function of two models."""
    worst = dict.fromkeys(ALONE, 0.0)
    for trial in range(trials):
        (a, b, c, spare), base = models_of(case, shapes, 4, trial)
        f = function_of(case, [a, b], base, spare)
        together = f(a, b)
        found = {
            "commutative": deviation(together, f(b, a)),
            "associative": deviation(f(together, c), f(a, f(b, c))),
            "idempotent": deviation(f(a, a), a),
        }
        worst = {law: max(worst[law], found[law]) for law in ALONE}
    return {law: Law(largest <= TOLERANCE, largest) for law, largest in worst.items()}


def deviation(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest |x - y| of two models of the same tensors."""
    return max((float((one[name] - other[name]).abs().max()) for name in one if one[name].numel()), default=0.0)


# ---------------------------------------------------------------- through the set


def through_the_set(case: Case, shapes: Shapes, *, trials: int = TRIALS) -> dict[str, Law]:
    """The laws of states that are joined and resolved."""
    worst = dict.fromkeys(THROUGH_THE_SET, Law(True, 0.0))
    for trial in range(trials):
        (a, b, c), inputs = states(case, shapes, trial)
        ab, bc = a | b, b | c
        alike = {
            "commutative": (ab, b | a),
            "associative": (ab | c, a | bc),
            "idempotent": (a | a, a),
            "convergent": ((a | b) | c, (b | c.join(b)) | a, c | (a | (b | a)) | b),
        }
        for law, found in alike.items():
            one = _equal(found, inputs)
            worst[law] = Law(worst[law].holds and one.holds, max(worst[law].deviation, one.deviation))
    return worst


def states(case: Case, shapes: Shapes, number: int) -> tuple[list[MergeState], dict[str, Any]]:
    """Three states of one pool, each with as many models as the strategy needs, together no more than it takes.

    And the inputs that their resolve takes.
    """
    needs = case.needs
    count = min(max(3, needs.min_k), needs.max_k or 3)
    (*models, spare), base = models_of(case, shapes, count + 1, number)
    like = function_of(case, models[: needs.min_k], base, spare)
    empty = MergeState(case.recipe(), base if needs.base == "required" else None)
    made = []
    for replica in range(3):
        state = empty
        for j in range(needs.min_k):
            at = (replica + j) % count
            state = _added(case, state, models[at], needs.roles[0], TASKS[at] if like.tasks else None)
        for role, one in like.others:
            state = _added(case, state, one, role)
        made.append(state)
    return made, {**case.beside(base, "F64", shapes), **like.files}


def _added(case: Case, state: MergeState, one: Model, role: str, task: str | None = None) -> MergeState:
    return state.add(one, role=role, task=task, stats=statistics_of(case, one) or None)


def _equal(alike: Sequence[MergeState], inputs: Mapping[str, Any]) -> Law:
    """Whether states are one and resolve to the same bytes."""
    first, *others = alike
    x = dict(first.resolve(inputs=inputs))
    law = Law(True, 0.0)
    for other in others:
        y = dict(other.resolve(inputs=inputs))
        same = other == first and other.root == first.root and all((raw(x[name]) == raw(y[name])).all() for name in x)
        law = Law(law.holds and bool(same), max(law.deviation, deviation(x, y)))
    return law
