"""One interface to both public faces of a pool, so that a scenario is written once: MergeState values, Replica folders.

A node can be changed and keeps one key. A snapshot of it never changes: of a MergeState it is the value, of a Replica
an exported file. Whatever is not here (deltas, leases, processes) has tests of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from crdtmerge.keys import Key
from crdtmerge.pool.replica import Replica
from crdtmerge.recipe import Recipe
from crdtmerge.replica.entry import Entry
from crdtmerge.resolve.merge import Merged
from crdtmerge.state import MergeState

Model = Mapping[str, Any]

SHAPE = (2, 4)
"""Of the one tensor that models of these scenarios have."""


def model(number: float) -> dict[str, Any]:
    """A model that is told by a number."""
    return {"w": (np.arange(8, dtype=np.float32).reshape(SHAPE) + np.float32(number))}


class Node(Protocol):
    """A member of a pool."""

    def add(self, model: object, weight: object = None) -> bytes:
        """Add a model; its content id."""
        ...

    def remove(self, content: bytes) -> None:
        """Remove what is visible here."""
        ...

    def snapshot(self) -> Any:
        """The node as it is now, for others to meet."""
        ...

    def meet(self, snapshot: Any) -> None:
        """Join what another node was."""
        ...

    def to_bytes(self) -> bytes:
        """The node as an exported state."""
        ...

    def meet_bytes(self, data: bytes) -> None:
        """Join an exported state."""
        ...

    def resolve(self, threads: int | None = None) -> Merged:
        """Merge what is visible."""
        ...

    @property
    def visible(self) -> list[Entry]:
        """What a merge takes."""
        ...

    @property
    def root(self) -> bytes:
        """The root of that."""
        ...

    @property
    def state_root(self) -> bytes:
        """The digest of all that counts."""
        ...

    @property
    def pool_id(self) -> bytes:
        """Names the pool."""
        ...

    @property
    def recipe(self) -> Recipe:
        """How it merges."""
        ...


class Value:
    """A node whose state is a MergeState."""

    def __init__(self, state: MergeState) -> None:
        self.state = state

    def add(self, model: object, weight: object = None) -> bytes:
        before, self.state = self.state, self.state.add(model, weight=weight)
        (new,) = self.state.delta_since(before.heads).holdings.manifests
        return new

    def remove(self, content: bytes) -> None:
        self.state = self.state.remove(content)

    def snapshot(self) -> MergeState:
        return self.state

    def meet(self, snapshot: MergeState) -> None:
        self.state |= snapshot

    def to_bytes(self) -> bytes:
        return self.state.to_bytes()

    def meet_bytes(self, data: bytes) -> None:
        self.state |= MergeState.from_bytes(data)

    def resolve(self, threads: int | None = None) -> Merged:
        return self.state.resolve(threads=threads)

    @property
    def visible(self) -> list[Entry]:
        return self.state.visible

    @property
    def root(self) -> bytes:
        return self.state.root

    @property
    def state_root(self) -> bytes:
        return self.state.state_root

    @property
    def pool_id(self) -> bytes:
        return self.state.pool_id

    @property
    def recipe(self) -> Recipe:
        return self.state.recipe


class Folder:
    """A node whose state is a Replica; its snapshots are files beside it."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._numbers = itertools.count()

    def add(self, model: object, weight: object = None) -> bytes:
        return self.replica.add(model, weight=weight).id

    def remove(self, content: bytes) -> None:
        self.replica.remove(content)

    def snapshot(self) -> Path:
        path = self._beside("out")
        self.replica.export(path)
        return path

    def meet(self, snapshot: Path) -> None:
        self.replica.include(snapshot)

    def to_bytes(self) -> bytes:
        return self.snapshot().read_bytes()

    def meet_bytes(self, data: bytes) -> None:
        path = self._beside("in")
        path.write_bytes(data)
        self.replica.include(path)

    def _beside(self, what: str) -> Path:
        return self.replica.folder.with_name(f"{self.replica.folder.name}-{what}-{next(self._numbers)}")

    def resolve(self, threads: int | None = None) -> Merged:
        return self.replica.resolve(threads=threads)

    @property
    def visible(self) -> list[Entry]:
        return self.replica.visible

    @property
    def root(self) -> bytes:
        return self.replica.root

    @property
    def state_root(self) -> bytes:
        return self.replica.state_root

    @property
    def pool_id(self) -> bytes:
        return self.replica.pool_id

    @property
    def recipe(self) -> Recipe:
        return self.replica.recipe


class World:
    """Makes nodes of one kind: equal recipes and bases (and architectures, on disk) are one pool."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder
        self._numbers = itertools.count()
        self._open: list[Replica] = []

    def node(self, recipe: Recipe | str = "weight_average", *, base: object = None, like: object = None) -> Node:
        """A new node, with a key of its own."""
        if self.kind == "MergeState":
            return Value(MergeState(recipe, base, key=Key.generate()))
        shown = None if base is not None else like if like is not None else model(0)
        where = self._folder / f"replica-{next(self._numbers)}"
        replica = Replica.create(where, recipe, base=base, like=shown, curators="any")
        self._open.append(replica)
        return Folder(replica)

    def nodes(self, count: int, recipe: Recipe | str = "weight_average", **how: Any) -> list[Node]:
        """Some nodes of one pool."""
        return [self.node(recipe, **how) for _ in range(count)]

    def joined(self, snapshots: Sequence[Any], recipe: Recipe | str = "weight_average", **how: Any) -> Node:
        """A node that goes on from the first of some snapshots and meets the others in this order."""
        if self.kind == "MergeState":
            first, *snapshots = snapshots
            node: Node = Value(first)
        else:
            node = self.node(recipe, **how)
        for snapshot in snapshots:
            node.meet(snapshot)
        return node

    def close(self) -> None:
        """Let go of the replicas."""
        for replica in self._open:
            replica.close()


KINDS = ("MergeState", "Replica")


def worlds(kind: str, folder: Path) -> Iterator[World]:
    """A world, for a fixture."""
    world = World(kind, folder)
    yield world
    world.close()


def said(node: Node) -> list[tuple[bytes, str]]:
    """What is visible, with weights."""
    return [(entry.id, str(entry.weight)) for entry in node.visible]


def output(merged: Merged) -> tuple[bytes, bytes]:
    """Everything that a merge says of itself and of every byte of its tensors."""
    import torch

    raw = b"".join(merged[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in sorted(merged))
    return merged.receipt.to_bytes(), raw
