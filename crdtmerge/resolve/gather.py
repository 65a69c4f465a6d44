"""Pass 1: from sources to a set. Digests, content ids, claims, canonical order and the root.

Positions end here: a weight given for the second path belongs from here on to a content id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from crdtmerge.errors import UsageError
from crdtmerge.numerics.workers import Workers
from crdtmerge.replica import trie
from crdtmerge.replica.contribution import Claim, Manifest, Row, leaf
from crdtmerge.resolve.sources import Progress, Source
from crdtmerge.strategies.protocol import Meta
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.facts import Facts


@dataclass(frozen=True)
class Known:
    """A source with its facts and manifest."""

    source: Source
    facts: dict[str, Facts]
    manifest: Manifest

    @property
    def id(self) -> bytes:
        """The content id."""
        return self.manifest.id


@dataclass(frozen=True)
class Contribution:
    """An element of the set: a content and what is claimed of it."""

    known: Known
    claim: Claim

    @property
    def id(self) -> bytes:
        """The content id."""
        return self.known.id

    @property
    def source(self) -> Source:
        """Where its tensors are read."""
        return self.known.source

    @property
    def meta(self) -> Meta:
        """What a strategy sees of it."""
        return Meta(self.id, self.claim.weight, self.claim.role, self.claim.task)


@dataclass(frozen=True)
class Gathered:
    """The set in canonical order, with its root, and what should be said about it."""

    contributions: tuple[Contribution, ...]
    base: Known | None
    root: bytes
    notes: list[str] = field(default_factory=list)


def known(source: Source, workers: Workers, cache: DigestCache | None, progress: Progress) -> Known:
    """Read a source once (or ask the cache): its facts and manifest."""
    facts = source.facts(workers, cache, progress)
    rows = [Row(name, entry.dtype.name, entry.shape, facts[name].digest) for name, entry in source.entries.items()]
    return Known(source, facts, Manifest(tuple(rows)))


def gather(models: Sequence[tuple[Known, Claim]], base: Known | None) -> Gathered:
    """The set of the models in canonical order. Raises UsageError where one content comes with two claims."""
    if not models:
        raise UsageError("nothing to merge: give at least one model.")
    found: dict[bytes, Contribution] = {}
    notes = []
    for one, claim in models:
        first = found.setdefault(one.id, Contribution(one, claim))
        if first.known is one:
            continue
        if first.claim != claim:
            raise UsageError(
                f"{one.source.label} and {first.source.label} hold the same content, {_claim(claim)} and "
                f"{_claim(first.claim)}. A set holds it once: give it once, with one weight, role, task and statistics."
            )
        notes.append(f"{one.source.label} holds the same content as {first.source.label} and counts once")
    ordered = tuple(found[content] for content in sorted(found))
    root = trie.root({one.id: leaf(one.id, one.claim) for one in ordered})
    return Gathered(ordered, base, root, notes)


def _claim(claim: Claim) -> str:
    stats = "".join(f", {name} {found.hex()[:16]}" for name, found in claim.stats.items())
    return f"weight {claim.weight}, role {claim.role}" + (f", task {claim.task}" if claim.task else "") + stats
