"""What a peer needs of a pool, in memory or on disk; who has contributed what to its training, and when.

An author's contribution is that of its live ADDs with a statement of training (``facts``) whose round is the greatest;
a peer replaces its own in one operation, so that nearly always there is one. Others in the pool have no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from crdtmerge.errors import UsageError
from crdtmerge.numerics.workers import Workers
from crdtmerge.replica.contribution import Claim
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Add
from crdtmerge.replica.opset import OpSet
from crdtmerge.resolve.gather import known
from crdtmerge.resolve.memory import viewed
from crdtmerge.resolve.sources import MemorySource, Source
from crdtmerge.state import MergeState
from crdtmerge.train.facts import Facts

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]
"""A model: torch tensors by name."""


class Pool(Protocol):
    """The part of ``Replica`` that training uses; ``InMemory`` has it too."""

    @property
    def author(self) -> bytes:
        """The public key that signs here."""
        ...

    @property
    def genesis(self) -> Genesis:
        """The pool as it began."""
        ...

    @property
    def opset(self) -> OpSet:
        """The operations and what follows from them."""
        ...

    @property
    def root(self) -> bytes:
        """The Merkle root of the visible set."""
        ...

    def is_ready(self, content: bytes) -> bool:
        """Whether all tensors of a content are here."""
        ...

    def source(self, content: bytes, files: Mapping[str, bytes] | None = None) -> Source:
        """A content, or the base, to be read."""
        ...

    def add(self, model: object, *, note: str | None = None, replaces: tuple[bytes, ...] = ()) -> Any:
        """Add a model in the place of one's own."""
        ...


class InMemory:
    """A ``MergeState`` as one peer's pool, which changes as the peer contributes and hears of others.

    ``received`` counts the bytes of tensors that came from others.
    """

    def __init__(self, state: MergeState) -> None:
        self.state, self.received = state, 0

    @property
    def author(self) -> bytes:
        """The public key that signs here."""
        return self.state.author

    @property
    def genesis(self) -> Genesis:
        """The pool as it began."""
        return self.state.genesis

    @property
    def opset(self) -> OpSet:
        """The operations and what follows from them."""
        return self.state.opset

    @property
    def root(self) -> bytes:
        """The Merkle root of the visible set."""
        return self.state.root

    def is_ready(self, content: bytes) -> bool:
        """Whether all tensors of a content are here."""
        return self.state.is_ready(content)

    def source(self, content: bytes, files: Mapping[str, bytes] | None = None) -> Source:
        """A content, or the base, to be read."""
        return self.state.source(content, files)

    def add(self, model: object, *, note: str | None = None, replaces: tuple[bytes, ...] = ()) -> None:
        """Add a model in the place of one's own."""
        self.state = self.state.add(model, note=note, replaces=replaces)

    def hear(self, other: MergeState) -> None:
        """Join what another has and this one lacks. Raises MismatchError for another pool."""
        delta = other.delta_since(self.state.heads)
        here = {entry.id for entry in self.state.visible}
        self.state = self.state | delta
        new = [entry.id for entry in self.state.visible if entry.id not in here]
        self.received += sum(row.nbytes for content in new for row in self.source(content).entries.values())


class Contribution(NamedTuple):
    """What an author has contributed last: content id, facts, claim, files that came with it."""

    author: bytes
    content: bytes
    facts: Facts
    claim: Claim
    files: Mapping[str, bytes]


def seen(pool: Pool, *, announced: bool = False) -> dict[bytes, Contribution]:
    """The contribution of each author, in the order of keys: those whose tensors are all here, or all announced."""
    found: dict[bytes, tuple[tuple[int, Any], Contribution]] = {}
    for entry in pool.opset.visible():
        for op in pool.opset.live(entry.id):
            assert isinstance(op.payload, Add), "live operations are ADDs"
            facts = Facts.decode(op.payload.says.note)
            if facts is None or op.author not in entry.adders or not (announced or pool.is_ready(entry.id)):
                continue
            rank = (facts.round, op.order)
            if op.author not in found or rank > found[op.author][0]:
                found[op.author] = rank, Contribution(op.author, entry.id, facts, entry.claim, entry.files)
    return {author: found[author][1] for author in sorted(found)}


def history(pool: Pool) -> dict[bytes, set[int]]:
    """The rounds in which each author has contributed, also with what was replaced since; void ADDs do not count."""
    rounds: dict[bytes, set[int]] = {}
    for op in pool.opset.ops():
        facts = Facts.decode(op.payload.says.note) if isinstance(op.payload, Add) else None
        if facts is not None and not pool.opset.is_void(op.id):
            rounds.setdefault(op.author, set()).add(facts.round)
    return rounds


def own(pool: Pool) -> tuple[bytes, ...]:
    """The contents that this key has contributed to training and not replaced yet."""
    found = set()
    for content in pool.opset.held():
        for op in pool.opset.live(content):
            statement = isinstance(op.payload, Add) and Facts.decode(op.payload.says.note)
            if op.author == pool.author and statement:
                found.add(content)
    return tuple(sorted(found))


def load(pool: Pool, content: bytes) -> dict[str, Tensor]:
    """The tensors of a content that is here."""
    source = pool.source(content)
    try:
        found = {}
        for name, entry in source.entries.items():
            buffer = np.empty(entry.nbytes, np.uint8)
            source.read_into(name, 0, buffer)
            found[name] = viewed(buffer, entry.dtype, entry.shape)
        return found
    finally:
        source.close()


def content_of(model: State) -> bytes:
    """The content id of a model in memory."""
    with Workers() as workers:
        return known(MemorySource(model, "a model"), workers, None, lambda read: None).id


def shared(model: State, covers: tuple[str, ...] = ("*",)) -> dict[str, Tensor]:
    """The tensors of floats with a name that one of the globs takes: counters are never averaged, so not shared.

    Raises UsageError where there is none.
    """
    found = {
        name: x.detach()
        for name, x in model.items()
        if x.is_floating_point() and any(fnmatchcase(name, glob) for glob in covers)
    }
    if not found:
        raise UsageError(f"no tensor of floats has a name like {' or '.join(covers)}: there is nothing to contribute.")
    return found
