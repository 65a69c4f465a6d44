"""An element of the visible set: a content and what holds of it, from all the live ADDs that speak of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from crdtmerge.canonical import decimal_text
from crdtmerge.errors import DatabaseError
from crdtmerge.replica.contribution import Claim, leaf
from crdtmerge.replica.op import Add, Op

_ONE = Decimal(1)


@dataclass(frozen=True, slots=True)
class Entry:
    """A visible content: its id, claim, kind, carried files and note, and the keys of those who added it."""

    id: bytes
    claim: Claim = field(default_factory=Claim)
    kind: str = "full"
    adders: tuple[bytes, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    note: str | None = None

    @property
    def weight(self) -> Decimal:
        """Its exact weight."""
        return self.claim.weight

    @property
    def role(self) -> str:
        """What it is for: task, forget, unlearned or safety."""
        return self.claim.role

    @property
    def leaf(self) -> bytes:
        """Its leaf in the Merkle trie."""
        return leaf(self.id, self.claim)

    @property
    def value(self) -> tuple[Any, ...]:
        """The entry as a value of a table."""
        claim = self.claim
        return (
            *(decimal_text(claim.weight), claim.role, claim.task, tuple(sorted(claim.stats.items()))),
            *(self.kind, self.adders, tuple(sorted(self.files.items())), self.note),
        )

    @classmethod
    def of_value(cls, identity: bytes, value: tuple[Any, ...]) -> Entry:
        """The entry of a table's value. Raises DatabaseError for one that is damaged."""
        try:
            weight, role, task, stats, kind, adders, files, note = value
            exact = _ONE if weight == "1" else Decimal(weight)
            return cls(identity, Claim(exact, role, task, dict(stats)), kind, adders, dict(files), note)
        except (ValueError, TypeError, ArithmeticError) as fault:
            raise DatabaseError("a row of the table visible is damaged. Run `crdtmerge fsck --mend`.") from fault


def spoken_of(content: bytes, kind: str, adds: Iterable[Op]) -> Entry:
    """What holds of a content: of each field, what the greatest ADD by (height, id) says that says it at all."""
    fields: dict[str, Any] = {}
    stats: dict[str, bytes] = {}
    ordered = sorted(adds, key=lambda op: op.order)
    for op in ordered:
        assert isinstance(op.payload, Add), "only ADDs speak of a content"
        said = op.payload.says
        fields.update({name: value for name, value in vars(said).items() if value is not None and name != "stats"})
        stats.update(said.stats)
    claim = Claim(
        fields.get("weight", Decimal(1)), fields.get("role", "task"), fields.get("task"), dict(sorted(stats.items()))
    )
    adders = tuple(sorted({op.author for op in ordered}))
    return Entry(content, claim, kind, adders, fields.get("files", {}), fields.get("note"))
