"""What a merge reads beside models and base: statistics of each contribution, further models and files of the recipe.

A statistic is a safetensors file whose tensors have the model's names; a mapping in memory stands for the file that
this program would write of it. Its digest, the SHA-256 of that file, is part of what is claimed of the contribution. A
further model is named by its content id, any other input (a program, a batch) by the SHA-256 of the file; these are
part of the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crdtmerge.errors import InputError, MismatchError, NeedsError, UsageError
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.sources import MemorySource, Source, open_source
from crdtmerge.strategies.protocol import Needs
from crdtmerge.weights.layout import plan_output

COMMANDS = {"fisher": "fisher", "gram": "gram", "importance": "importance", "importance_base": "importance"}
"""The statistics that ``crdtmerge stats`` makes, and what it calls them."""


@dataclass(frozen=True)
class Beside:
    """As given: for each model, in the order of the models, its statistics by name; the recipe's inputs by name."""

    stats: Sequence[Mapping[str, Any]] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)


NOTHING = Beside()


@dataclass
class Opened:
    """As opened: statistics of each content, further models, files with their digests, and where each was found."""

    stats: dict[Any, dict[str, Source]] = field(default_factory=dict)
    models: dict[str, Source] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)

    def of(self, tensor: Merging, ids: Sequence[Any]) -> Merging:
        """A tensor with what there is of it here. Raises MismatchError."""
        stats: dict[str, tuple[Source, ...]] = {}
        members = [self.stats.get(ids[i], {}) for i in tensor.members]
        for name in sorted(set().union(*members)):
            having = [one[name] for one in members if name in one and tensor.name in one[name].entries]
            if having and len(having) < len(members):
                raise MismatchError(
                    f"tensor {tensor.name!a}: {len(having)} of {len(members)} contributions have it in their {name}; "
                    "all or none must."
                )
            if having:
                stats[name] = tuple(having)
        for name, source in self.models.items():
            entry = source.entries.get(tensor.name)
            if entry is None or entry.shape != tensor.shape:
                found = "lacks it" if entry is None else f"has {list(entry.shape)}"
                raise MismatchError(
                    f"{source.label}: tensor {tensor.name!a} has shape {list(tensor.shape)} in the models; the input "
                    f"'{name}' {found}. Leave it out with --exclude, or give a model of the same architecture."
                )
        return replace(tensor, stats=stats, models=self.models)


def claimed(claim: Claim, given: Mapping[str, Any], label: str, needs: Needs, strategy: str) -> Claim:
    """A claim with the digests of the statistics that are given. Raises NeedsError, MismatchError."""
    stats = dict(claim.stats)
    for name, value in given.items():
        found = digest_of(value, f"the {name} of {label}")
        if stats.setdefault(name, found) != found:
            raise MismatchError(
                f"the {name} of {label} has digest {found.hex()[:16]}; {stats[name].hex()[:16]} was claimed of it."
            )
    for name in needs.stats:
        if name not in given:
            known = name in stats
            where = f"is claimed as {stats[name].hex()[:16]} and not here" if known else "is missing"
            command = f"Compute it with `crdtmerge stats {COMMANDS[name]}`" if name in COMMANDS else "Compute it"
            raise NeedsError(
                f"strategy '{strategy}' needs the statistic '{name}' of every model; that of {label} {where}. "
                f"{command} and give it with --stats."
            )
    return replace(claim, stats=dict(sorted(stats.items())))


def digest_of(value: Any, label: str) -> bytes:
    """SHA-256 of a file, or of the safetensors file that a mapping would be written as. Raises InputError."""
    if isinstance(value, Mapping):
        source = MemorySource(value, label)
        tensors = [(entry.name, entry.dtype, entry.shape) for entry in source.entries.values()]
        (file,) = plan_output(tensors, single_file="statistics.safetensors").files
        found = hashlib.sha256(file.header)
        for name in sorted(file.entries, key=lambda name: file.entries[name].begin):
            found.update(source.raw(name).tobytes())
        return found.digest()
    if not isinstance(value, str | Path):
        raise UsageError(f"{label} is {type(value).__name__}; a path or a mapping of names to tensors is needed.")
    try:
        with open(value, "rb") as file_:  # noqa: PTH123 (a path or its text)
            return hashlib.file_digest(file_, "sha256").digest()
    except OSError as fault:
        raise InputError(f"{label}: {value} cannot be read: {fault.strerror or fault}.") from fault


def opened_inputs(
    needs: Needs, given: Mapping[str, Any], asked: Mapping[str, bytes], strategy: str, opened: ExitStack
) -> Opened:
    """The recipe's further inputs. Raises NeedsError for one that is missing, UsageError for one too many."""
    found = Opened()
    for name in (*needs.models, *needs.inputs):
        if name not in given:
            known = f" with digest {asked[name].hex()[:16]}" if name in asked else ""
            raise NeedsError(
                f"strategy '{strategy}' needs the input '{name}'{known}: give it with --input {name}=PATH."
            )
    unknown = sorted(given.keys() - {*needs.models, *needs.inputs, "plan"})
    if unknown:
        takes = ", ".join((*needs.models, *needs.inputs)) or "none"
        raise UsageError(f"strategy '{strategy}' has no input {unknown[0]!r}. It has: {takes}.")
    for name in needs.models:
        found.models[name] = open_source(given[name], f"the input '{name}'")
        opened.callback(found.models[name].close)
    for name in needs.inputs:
        found.digests[name] = digest_of(given[name], f"the input '{name}'")
        found.files[name] = Path(given[name])
    return found


def refuse_others(asked: Mapping[str, bytes], found: Mapping[str, bytes]) -> None:
    """Raise MismatchError where an input is not the one that the recipe names."""
    for name, wanted in asked.items():
        if found.get(name, wanted) != wanted:
            raise MismatchError(
                f"the input '{name}' has digest {found[name].hex()[:16]}; the recipe names {wanted.hex()[:16]}."
            )
