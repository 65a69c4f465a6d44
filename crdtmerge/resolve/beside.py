"""What a merge reads beside models and base: statistics of the contributions; further models, files, a plan.

RULES
1. A statistic is one safetensors file whose tensors have the model's names (``statistic``). Its digest is claimed of
   the contribution and enters the root. What is claimed and not needed is not read.
2. Further inputs are part of the recipe: a model by its content id, another file by its SHA-256, a plan by its digest.
   Some travel with the models and need not be given (``travelling``).
3. Nothing is read on trust: a digest that was claimed or asked for is compared, a missing input is NeedsError, and what
   changes while it is read is ChangedError.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crdtmerge.errors import ChangedError, InputError, MismatchError, NeedsError, OpError, UsageError
from crdtmerge.numerics.workers import Workers
from crdtmerge.recipe import PLAN, Recipe
from crdtmerge.replica.contribution import Claim, named
from crdtmerge.resolve.asking import refuse_other_inputs
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.gather import Known, known
from crdtmerge.resolve.plan_file import inputs_of
from crdtmerge.resolve.plan_file import read as read_plan
from crdtmerge.resolve.sources import Source, open_source
from crdtmerge.resolve.statistic import Statistic
from crdtmerge.resolve.travelling import TRAVELLING, carried_input
from crdtmerge.strategies.protocol import InputFile, Needs, Plan
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.descriptors import open_file
from crdtmerge.weights.facts import MERGE_ANYWAY, refuse_nonfinite

COMMANDS = {"fisher": "fisher", "gram": "gram", "importance": "importance", "importance_base": "importance"}
"""The statistics that ``crdtmerge stats`` makes, and what it calls them."""


MADE_BY = {
    "program": ", the model as torch.export.export and torch.export.save write it",
    "data": ", a safetensors file with the tensor 'inputs' [examples, ...]",
    "symmetry": ", what `crdtmerge symmetry --program P.pt2 -o F.json` writes for a program of the architecture",
}
"""What makes the files that strategies take."""


@dataclass(frozen=True)
class Beside:
    """As given: the statistics of each model by name, in the order of the models; inputs by name; a plan."""

    stats: Sequence[Mapping[str, Any] | None] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | str | Path | None = None

    def tables(self, count: int) -> list[Mapping[str, Any]]:
        """The statistics of each of so many models. Raises UsageError for another number of tables."""
        if isinstance(self.stats, Mapping | str) or not isinstance(self.stats, Sequence):
            raise UsageError(
                f"stats is {type(self.stats).__name__}; a list with the statistics of each model by name is needed."
            )
        if self.stats and len(self.stats) != count:
            raise UsageError(f"statistics of {len(self.stats)} models for {count}: give a table for each, or none.")
        tables: list[Mapping[str, Any]] = [one if one is not None else {} for one in self.stats] or [{}] * count
        for table in tables:
            if not isinstance(table, Mapping):
                raise UsageError(f"stats holds {type(table).__name__}; a table of names and files is needed.")
            check_stat_names(table)
        return tables


NOTHING = Beside()


def check_stat_names(names: Iterable[object]) -> None:
    """Raise UsageError for what is no name of a statistic."""
    try:
        named(dict.fromkeys(names, bytes(32)), "stats")
    except (OpError, TypeError):
        listed = ", ".join(f"{name!a:.40}" for name in names)
        raise UsageError(f"stats: {listed} cannot name statistics; give a few plain names such as fisher.") from None


@dataclass
class Opened:
    """As opened: needed statistics of each content, further models, files given or carried, with their digests.

    ``statistics`` are those of each model in the order of the models, also such that are only claimed.
    """

    stats: dict[Any, dict[str, Source]] = field(default_factory=dict)
    models: dict[str, Source] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    carried: dict[str, InputFile] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    statistics: list[dict[str, Statistic]] = field(default_factory=list)

    @property
    def sources(self) -> list[Source]:
        """All that has tensors."""
        return [*(one for held in self.statistics for one in held.values()), *self.models.values()]

    def read(
        self, recipe: Recipe, workers: Workers, cache: DigestCache | None, progress: Callable[[int], None]
    ) -> None:
        """Read everything once, for the digests; compare those of the inputs with what the recipe names.

        Raises MismatchError, NonFiniteError, ChangedError.
        """
        statistics = [one for held in self.statistics for one in held.values()]
        workers.each(lambda one: one.facts(workers, None, progress), statistics)
        if not recipe.allow_nonfinite:
            for statistic in statistics:
                statistic.refuse_nonfinite()
        for name, source in self.models.items():
            one = known(source, workers, cache, progress)
            if not recipe.allow_nonfinite:
                refuse_nonfinite(one.facts, recipe.excludes, source.where, MERGE_ANYWAY)
            self.digests[name] = one.id
        for name, digest in self.digests.items():
            asked = recipe.inputs.get(name, digest)
            if asked != digest:
                raise MismatchError(
                    f"the input '{name}' has digest {digest.hex()[:16]}; the recipe names {asked.hex()[:16]}."
                )

    def claims(self, claims: Sequence[Claim]) -> list[Claim]:
        """Claims with the digests of the statistics. Raises MismatchError where another one was claimed."""
        return [_claimed(claim, held) for claim, held in zip(claims, self.statistics, strict=True)]

    def place(self, found: Sequence[Known], needs: Needs) -> None:
        """Say which content each model holds. Raises MismatchError where a statistic is not of such a model."""
        for one, held in zip(found, self.statistics, strict=True):
            for statistic in held.values():
                statistic.check_names(one.source.entries)
            self.stats[one.id] = {name: held[name] for name in needs.stats}

    def of(self, tensor: Merging, ids: Sequence[Any]) -> Merging:
        """A tensor with what there is of it here. Raises MismatchError."""
        members = [self.stats.get(ids[i], {}) for i in tensor.members]
        stats = {}
        for name in sorted(set().union(*members)):
            having = tuple(one[name] for one in members if name in one and tensor.name in one[name].entries)
            if having:
                _check_fit(tensor, name, having, len(members))
                stats[name] = having
        for name, source in self.models.items():
            entry = source.entries.get(tensor.name)
            if entry is None or entry.shape != tensor.shape:
                found = "lacks it" if entry is None else f"has {list(entry.shape)}"
                raise MismatchError(
                    f"{source.label}: tensor {tensor.name!a} has shape {list(tensor.shape)} in the models; the input "
                    f"'{name}' {found}. Leave it out with --exclude, or give a model of the same architecture."
                )
        return replace(tensor, stats=stats, models=self.models)

    def check_read(self) -> None:
        """Raise ChangedError where a statistic or a file, read once more, is not what it was."""
        for held in self.statistics:
            for one in held.values():
                one.check_again()
        for name, path in self.files.items():
            if file_digest(path, f"the input '{name}'") != self.digests[name]:
                raise ChangedError(f"{path}: the input '{name}' changed while it was read. Run again when it is still.")


def _check_fit(tensor: Merging, name: str, having: Sequence[Source], members: int) -> None:
    """Raise MismatchError unless all contributions have a tensor in their statistics, as floats of one shape."""
    if len(having) < members:
        raise MismatchError(
            f"tensor {tensor.name!a}: {len(having)} of {members} contributions have it in their {name}; all or none "
            "must."
        )
    entries = [source.entries[tensor.name] for source in having]
    for source, entry in zip(having, entries, strict=True):
        if not entry.dtype.floating:
            raise MismatchError(
                f"{source.where(tensor.name)}: tensor {tensor.name!a} is {entry.dtype.name}; statistics are floats."
            )
        if entry.shape != entries[0].shape:
            raise MismatchError(
                f"{source.where(tensor.name)}: tensor {tensor.name!a} has shape {list(entry.shape)}; "
                f"{having[0].where(tensor.name)} has {list(entries[0].shape)}."
            )


def check_shapes(tensors: Sequence[Merging]) -> None:
    """Raise MismatchError where a statistic, read element by element, has another shape than its tensor."""
    for tensor in tensors:
        for name, (first, *_) in tensor.stats.items():
            found = first.entries[tensor.name].shape
            if found != tensor.shape:
                raise MismatchError(
                    f"{first.where(tensor.name)}: tensor {tensor.name!a} has shape {list(tensor.shape)} in the models "
                    f"and {list(found)} in their {name}. Compute it of these very models."
                )


def open_beside(
    beside: Beside,
    models: Sequence[tuple[Source, Claim]],
    base: Source | None,
    needs: Needs,
    recipe: Recipe,
    opened: ExitStack,
) -> Opened:
    """Open what is given for models and base, or comes with them.

    Raises NeedsError, UsageError, InputError, MismatchError.
    """
    if not isinstance(beside.inputs, Mapping):
        raise UsageError(f"inputs is {type(beside.inputs).__name__}; a table of names and paths is needed.")
    refuse_other_inputs([*beside.inputs, *(recipe.inputs.keys() - {PLAN})], [needs], recipe.strategy)
    planned = _planned_with(beside.plan, recipe)
    found = Opened()
    for name in TRAVELLING.keys() & {*needs.inputs} - {*beside.inputs, *planned}:
        carried = carried_input(name, recipe.inputs.get(name), [source for source, _ in models], base)
        if carried is not None:
            found.carried[name] = carried
    for name in (*needs.models, *needs.inputs):
        here = {*beside.inputs, *found.carried}
        if name not in here and not (name in needs.inputs and name in planned):
            known = f" with digest {recipe.inputs[name].hex()[:16]}" if name in recipe.inputs else ""
            raise NeedsError(
                f"strategy '{recipe.strategy}' needs the input '{name}'{known}{MADE_BY.get(name, '')}: give it with "
                f"--input {name}=PATH{_travels(name)}"
                f"{', or a plan of `crdtmerge plan` with --plan' if name in needs.inputs else ''}."
            )
    for (source, claim), given in zip(models, beside.tables(len(models)), strict=True):
        label = source.label
        _refuse_missing(claim, given, label, needs, recipe.strategy)
        wanted = sorted(name for name in given if name in needs.stats or name not in claim.stats)
        found.statistics.append({name: Statistic.of(given[name], f"the {name} of {label}") for name in wanted})
        for one in found.statistics[-1].values():
            opened.callback(one.close)
    for name in needs.models:
        found.models[name] = open_source(beside.inputs[name], f"the input '{name}'")
        opened.callback(found.models[name].close)
    for name in needs.inputs:
        if name in found.carried:
            found.digests[name] = hashlib.sha256(found.carried[name].data).digest()
        elif name not in beside.inputs:
            found.digests[name] = planned[name]
        else:
            found.digests[name] = file_digest(beside.inputs[name], f"the input '{name}'")
            found.files[name] = Path(beside.inputs[name])
    return found


def _travels(name: str) -> str:
    if name not in TRAVELLING:
        return ""
    return f", or as {TRAVELLING[name]} in the folder of the base or of a model, with which it travels"


def _planned_with(plan: Plan | str | Path | None, recipe: Recipe) -> dict[str, bytes]:
    """The digests of inputs that only planning reads, which a merge with a plan can do without."""
    if plan is None:
        return {}
    if not isinstance(plan, Plan | str | Path):
        raise UsageError(f"the plan is {type(plan).__name__}; a path or a Plan is needed.")
    return recipe.inputs if isinstance(plan, Plan) else inputs_of(plan) | recipe.inputs


def _refuse_missing(claim: Claim, given: Mapping[str, Any], label: str, needs: Needs, strategy: str) -> None:
    for name in needs.stats:
        if name not in given:
            known = name in claim.stats
            where = f"is claimed as {claim.stats[name].hex()[:16]} and not here" if known else "is missing"
            way_out = f"compute it with `crdtmerge stats {COMMANDS[name]}` and " if name in COMMANDS else ""
            raise NeedsError(
                f"strategy '{strategy}' needs the statistic '{name}' of every model; that of {label} {where}: "
                f"{way_out}give it with --stats, or fetch it from a peer that has it."
            )


def _claimed(claim: Claim, statistics: Mapping[str, Statistic]) -> Claim:
    stats = dict(claim.stats)
    for name, one in statistics.items():
        if stats.setdefault(name, one.digest) != one.digest:
            raise MismatchError(
                f"{one.where('')} has digest {one.digest.hex()[:16]}; {stats[name].hex()[:16]} was claimed."
            )
    return replace(claim, stats=dict(sorted(stats.items())))


def file_digest(path: Any, label: str) -> bytes:
    """The SHA-256 of a regular file. Raises InputError, UsageError."""
    if not isinstance(path, str | Path):
        raise UsageError(f"{label} is {type(path).__name__}; the path of a file is needed.")
    try:
        descriptor = open_file(Path(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{label}: {path} is no regular file.")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return hashlib.file_digest(file, "sha256").digest()
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as fault:
        raise InputError(f"{label}: {path} cannot be read: {getattr(fault, 'strerror', None) or fault}.") from fault


def given_plan(
    plan: Plan | str | Path | None, asked: bytes | None, needs: Needs, strategy: str, unplanned: bytes
) -> Plan | None:
    """The plan that is to be applied, if one is given, for the merge with the id ``unplanned`` when it has no plan.

    Raises NeedsError where the recipe names one that is not given, MismatchError for the plan of another merge.
    """
    if plan is None:
        if asked is not None:
            raise NeedsError(f"the recipe names the plan {asked.hex()[:16]}: give it with --plan.")
        return None
    if needs.plan == "none":
        raise UsageError(f"strategy '{strategy}' makes no plan: leave --plan out.")
    if not isinstance(plan, Plan):
        where = str(plan)
        plan, made_for = read_plan(plan)
        if made_for != unplanned:
            raise MismatchError(
                f"{where}: is the plan of merge {made_for.hex()}; this is merge {unplanned.hex()}: another set, recipe "
                "or base. Make its own with `crdtmerge plan`."
            )
    if asked is not None and plan.digest != asked:
        raise MismatchError(f"the plan has digest {plan.digest.hex()[:16]}; the recipe names {asked.hex()[:16]}.")
    return plan
