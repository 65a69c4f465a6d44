"""A model becomes blobs: read once, hashed, checked and copied in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import UsageError
from crdtmerge.numerics.workers import Workers
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture, Tensor
from crdtmerge.replica.contribution import Manifest, Row
from crdtmerge.store.blobs import Staging
from crdtmerge.store.leases import Lease
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.carried import carried_files
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import digest_file, piece_digests, tensor_digest
from crdtmerge.weights.facts import POOL_ANYWAY, Facts, refuse_nonfinite
from crdtmerge.weights.header import Entry
from crdtmerge.weights.state_dict import StateDict

Progress = Callable[[str, int, int], None]


class Ingested(NamedTuple):
    """A model among the blobs: its manifest, its files by name, its bytes, and what should be said about it."""

    manifest: Manifest
    files: dict[str, bytes]
    nbytes: int
    notes: list[str]


class Intake:
    """Takes models into a staging area, under a lease, for a pool with this recipe and architecture."""

    def __init__(
        self,
        staging: Staging,
        lease: Lease,
        recipe: Recipe,
        architecture: Architecture | None,
        *,
        threads: int | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self._staging, self._lease, self._recipe, self._architecture = staging, lease, recipe, architecture
        self._threads, self._progress = threads, progress

    def take(self, model: object, label: str) -> Ingested:
        """A path to a checkpoint, or a state dict. Raises InputError, MismatchError, StorageError, UsageError."""
        with Workers(self._threads) as workers:
            if isinstance(model, str | Path):
                return self._take_files(Path(model), workers)
            if isinstance(model, Mapping):
                state = StateDict(model, label)
                self._check(state.entries, label)
                return self._taken(
                    state.entries, state.digest(workers, self._staging), {}, [], lambda name: label, label
                )
        raise UsageError(f"{label} is {type(model).__name__}; a path or a mapping of names to tensors is needed.")

    def _take_files(self, path: Path, workers: Workers) -> Ingested:
        with Checkpoint.open(path) as checkpoint:
            self._check(checkpoint.entries, str(path))
            carried, notes = carried_files(checkpoint.folder) if checkpoint.folder else ({}, [])
            files = {name: self._staging.file(data) for name, data in carried.items()}
            facts = self._read(checkpoint, workers)
            taken = self._taken(
                checkpoint.entries, facts, files, [*checkpoint.notes, *notes], checkpoint.where, str(path)
            )
            return taken._replace(nbytes=taken.nbytes + sum(map(len, carried.values())))

    def _read(self, checkpoint: Checkpoint, workers: Workers) -> dict[str, Facts]:
        """The facts of all tensors, copying those that are not here already."""
        cache, facts, done = DigestCache(), dict[str, Facts](), 0
        total = checkpoint.nbytes
        self._staging.blobs.check_space(total)

        def advance(step: int) -> None:
            nonlocal done
            done += step
            self._progress("adding", done, total)

        for file in checkpoint.files:
            known = cache.get(file.stamp)
            if known is not None and known.keys() == file.entries.keys() and self._are_here(known):
                file.check_unchanged()
            else:
                known = digest_file(file, workers, advance, self._staging)
                cache.put(file.stamp, known)
            facts.update(known)
        return facts

    def _are_here(self, facts: Mapping[str, Facts]) -> bool:
        """Whether all tensors of a file are blobs already, and will stay so."""
        digests = {fact.digest for fact in facts.values()}
        self._lease.hold(digests)
        return all(self._staging.reuse(digest) for digest in digests)

    def _check(self, entries: Mapping[str, Entry], where: str) -> None:
        """Raise MismatchError before anything is copied."""
        if self._architecture is not None:
            known = self._architecture.tensors
            rows = {
                name: Tensor(entry.dtype.name, entry.shape, known[name].fixed if name in known else None)
                for name, entry in sorted(entries.items())
            }
            self._architecture.check(Architecture(rows), self._recipe, where)

    def _taken(
        self,
        entries: Mapping[str, Entry],
        facts: Mapping[str, Facts],
        files: dict[str, bytes],
        notes: list[str],
        where: Callable[[str], str],
        label: str,
    ) -> Ingested:
        if not self._recipe.allow_nonfinite:
            refuse_nonfinite(facts, self._recipe.excludes, where, POOL_ANYWAY)
        rows = sorted(Row(name, entry.dtype.name, entry.shape, facts[name].digest) for name, entry in entries.items())
        if self._architecture is not None:
            self._architecture.check(Architecture.of(rows), self._recipe, label)
        return Ingested(Manifest(tuple(rows)), files, sum(entry.nbytes for entry in entries.values()), notes)


def architecture_of(model: object) -> Architecture:
    """The architecture of a path or a state dict: headers and integers. Raises InputError, UsageError."""
    if isinstance(model, str | Path):
        with Checkpoint.open(model) as checkpoint:
            return _architecture(checkpoint.entries, lambda entry: _read(checkpoint, entry))
    if isinstance(model, Mapping):
        state = StateDict(model, "the model")
        return _architecture(state.entries, lambda entry: state.raw[entry.name])
    raise UsageError(f"the model is {type(model).__name__}; a path or a mapping of names to tensors is needed.")


def _architecture(entries: Mapping[str, Entry], read: Callable[[Entry], NDArray[np.uint8]]) -> Architecture:
    def digest(entry: Entry) -> bytes:
        unread = bytes(32)  # of floats, whose digests are no part of an architecture
        return unread if entry.dtype.floating else tensor_digest(entry.dtype, entry.shape, piece_digests(read(entry)))

    return Architecture.of(Row(name, entry.dtype.name, entry.shape, digest(entry)) for name, entry in entries.items())


def _read(checkpoint: Checkpoint, entry: Entry) -> NDArray[np.uint8]:
    buffer = np.empty(entry.nbytes, np.uint8)
    checkpoint.read_into(entry.name, 0, buffer)
    return buffer
