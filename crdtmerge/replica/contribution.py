"""A contribution: an immutable manifest of tensors, named by the digest of its canonical bytes.

File header order, padding, shard boundaries and file names do not enter: equal tensors are one content. What is
said about it (weight, role, task) is a claim of whoever adds it and enters the root of the set, not the content id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from crdtmerge.canonical import decimal_text, digest


class Row(NamedTuple):
    """One tensor of a content: its name, dtype (safetensors' name), shape and digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes


def content_id(rows: Iterable[Row], *, kind: str = "full", base: bytes | None = None) -> bytes:
    """SHA-256 of a manifest: its kind, its base unless it is full, and its rows in the order of their names."""
    table = [[row.name, row.dtype, list(row.shape), row.digest] for row in sorted(rows)]
    return digest("content", {"kind": kind, "base": base, "rows": table})


@dataclass(frozen=True, slots=True)
class Claim:
    """What is said of a content: an exact weight, a role, a task, statistics by digest."""

    weight: Decimal = Decimal(1)
    role: str = "task"
    task: str | None = None
    stats: Mapping[str, bytes] | None = None


ROLES = ("task", "forget", "unlearned", "safety")


def leaf(content: bytes, claim: Claim) -> bytes:
    """The leaf of a content in the Merkle trie: what a merge depends on besides the recipe."""
    return digest(
        "leaf",
        {
            "content": content,
            "weight": decimal_text(claim.weight),
            "role": claim.role,
            "task": claim.task,
            "stats": dict(claim.stats or {}),
        },
    )
