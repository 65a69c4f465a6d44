"""A contribution: an immutable manifest of tensors, named by the digest of its canonical bytes, and what is said of it.

File header order, padding, shard boundaries and file names do not enter: equal tensors are one content. What is
said about it (weight, role, task) is a claim of whoever adds it and enters the root of the set, not the content id.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

from crdtmerge import limits
from crdtmerge.canonical import decimal, decimal_text, digest, pack, unpack
from crdtmerge.errors import InputError, OpError

ROLES = ("task", "forget", "unlearned", "safety")
KINDS = ("full", "delta", "adapter", "partial")


class Row(NamedTuple):
    """One tensor of a content: its name, dtype (safetensors' name), shape and digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes


def content_id(rows: Iterable[Row], *, kind: str = "full", base: bytes | None = None) -> bytes:
    """SHA-256 of a manifest: its kind, its base unless it is full, and its rows in the order of their names."""
    return Manifest(tuple(sorted(rows)), kind, base).id


@dataclass(frozen=True)
class Manifest:
    """The table of a content's tensors, rows sorted by name."""

    rows: tuple[Row, ...]
    kind: str = "full"
    base: bytes | None = None

    @cached_property
    def value(self) -> dict[str, Any]:
        """The canonical value."""
        table = [[row.name, row.dtype, list(row.shape), row.digest] for row in self.rows]
        return {"kind": self.kind, "base": self.base, "rows": table}

    @cached_property
    def id(self) -> bytes:
        """The content id, 32 bytes."""
        return digest("content", self.value)

    def to_bytes(self) -> bytes:
        """Its canonical bytes."""
        return pack(self.value)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest. Raises InputError for anything but the canonical bytes of one."""
        try:
            if len(data) > limits.MANIFEST_BYTES_MAX:
                raise ValueError(f"{len(data)} bytes, at most {limits.MANIFEST_BYTES_MAX} are read")
            table = unpack(data)
            rows = tuple(
                Row(tensor_name(name), tensor_name(dtype), tuple(map(natural, shape)), _hash(found))
                for name, dtype, shape, found in table["rows"]
            )
            manifest = cls(rows, table["kind"], table["base"])
            if manifest.base is not None and not is_id(manifest.base):
                raise ValueError(f"base {manifest.base!a:.80} is no digest of 32 bytes")
            if manifest.kind not in KINDS or (manifest.kind == "full") != (manifest.base is None):
                raise ValueError(f"kind {manifest.kind!r} with base {manifest.base!r}")
            if len(rows) > limits.TENSORS_MAX or any(a.name >= b.name for a, b in itertools.pairwise(rows)):
                raise ValueError("its rows are too many, or not in the order of their names")
            if manifest.to_bytes() != data:
                raise ValueError("not in canonical form")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as fault:
            raise InputError(f"a manifest is malformed: {fault}.") from None
        return manifest


def tensor_name(value: object) -> str:
    """A name in a manifest. Raises ValueError."""
    if not isinstance(value, str) or not value or len(value.encode()) > limits.TENSOR_NAME_BYTES_MAX:
        raise ValueError(f"{value!a:.80} is no name")
    return value


def natural(value: object) -> int:
    """A size in a manifest. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!a:.80} is no size")
    return value


def _hash(value: object) -> bytes:
    if not is_id(value):
        raise ValueError(f"{value!a:.80} is no digest of 32 bytes")
    return value


def is_id(value: object) -> TypeGuard[bytes]:
    """Whether a value is 32 bytes."""
    return isinstance(value, bytes) and len(value) == 32


@dataclass(frozen=True, slots=True)
class Claim:
    """What holds of a content: an exact weight, a role, a task, statistics by digest."""

    weight: Decimal = Decimal(1)
    role: str = "task"
    task: str | None = None
    stats: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Says:
    """What one ADD says of a content; a field that is None (or a name that is absent) is unsaid.

    >>> Says(weight=Decimal(2)).value
    {'weight': '2'}
    """

    weight: Decimal | None = None
    role: str | None = None
    task: str | None = None
    stats: Mapping[str, bytes] = field(default_factory=dict)
    files: Mapping[str, bytes] | None = None
    note: str | None = None

    @property
    def value(self) -> dict[str, Any]:
        """The canonical value: what is said and nothing else."""
        said: dict[str, Any] = {
            "weight": None if self.weight is None else decimal_text(self.weight),
            "role": self.role,
            "task": self.task,
            "stats": dict(self.stats) or None,
            "files": None if self.files is None else dict(self.files),
            "note": self.note,
        }
        return {name: value for name, value in said.items() if value is not None}

    @classmethod
    def of_value(cls, value: object) -> Says:
        """Read what an ADD says. Raises OpError, ValueError or TypeError for anything else."""
        if not isinstance(value, Mapping) or not value.keys() <= {"weight", "role", "task", "stats", "files", "note"}:
            raise OpError("it says something unknown of its content")
        weight = value.get("weight")
        if weight is not None and decimal_text(decimal(weight)) != weight:
            raise OpError(f"weight {weight!a:.80} is not in its one spelling")
        if value.get("role", "task") not in ROLES:
            raise OpError(f"role {value['role']!a:.80} is none of {', '.join(ROLES)}")
        return cls(
            None if weight is None else decimal(weight),
            value.get("role"),
            text(value.get("task"), limits.NAME_BYTES_MAX, "task"),
            named(value.get("stats", {}), "stats"),
            named(value["files"], "files") if "files" in value else None,
            text(value.get("note"), limits.NOTE_BYTES_MAX, "note"),
        )


def text(value: object, bytes_max: int, what: str) -> str | None:
    """A short text or None. Raises OpError."""
    if value is None:
        return None
    if not isinstance(value, str) or len(value.encode()) > bytes_max:
        raise OpError(f"{what} is no text of at most {bytes_max} bytes")
    return value


_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def named(value: object, what: str) -> dict[str, bytes]:
    """A table of plain names and digests. Raises OpError."""
    if not isinstance(value, dict) or len(value) > limits.NAMED_MAX:
        raise OpError(f"{what} is no table of at most {limits.NAMED_MAX} names")
    for name, found in value.items():
        if not _PLAIN_NAME.fullmatch(name) or len(name) > limits.NAME_BYTES_MAX or not is_id(found):
            raise OpError(f"{what}: {name!a:.80} is no plain name with a digest")
    return value


def leaf(content: bytes, claim: Claim) -> bytes:
    """The leaf of a content in the Merkle trie: what a merge depends on besides the recipe."""
    return digest(
        "leaf",
        {
            "content": content,
            "weight": decimal_text(claim.weight),
            "role": claim.role,
            "task": claim.task,
            "stats": dict(claim.stats),
        },
    )
