"""The genesis record of a pool: what all its replicas agreed on when it began. Its digest is the pool id.

Replicas of different pools refuse to join, so two of them cannot differ over base, recipe, seed or dtype in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from crdtmerge import limits
from crdtmerge.canonical import digest, pack, unpack
from crdtmerge.errors import CrdtMergeError, InputError, PoolMismatchError
from crdtmerge.keys import is_small_order
from crdtmerge.recipe import Recipe
from crdtmerge.replica.architecture import Architecture
from crdtmerge.replica.contribution import is_id, named


@dataclass(frozen=True)
class Genesis:
    """A pool as it began.

    ``architecture`` is None for pools in memory, which take it from their first contribution. ``curators`` is
    ``"any"``, or keys in the order of their seniority: these founders grant and revoke. ``membership`` says whether any
    key may contribute. ``files`` are the base's, by digest. ``succeeds`` is (pool id, root) of a pool that this one
    goes on from.
    """

    recipe: Recipe
    architecture: Architecture | None = None
    membership: Literal["open", "members"] = "open"
    curators: tuple[bytes, ...] | Literal["any"] = "any"
    files: Mapping[str, bytes] = field(default_factory=dict)
    probe: bytes | None = None
    succeeds: tuple[bytes, bytes] | None = None

    @cached_property
    def value(self) -> dict[str, Any]:
        """The canonical value."""
        return {
            "format": 1,
            "recipe": self.recipe.canonical(),
            "architecture": self.architecture.canonical() if self.architecture else None,
            "membership": self.membership,
            "curators": self.curators if self.curators == "any" else list(self.curators),
            "files": dict(self.files),
            "probe": self.probe,
            "succeeds": list(self.succeeds) if self.succeeds else None,
        }

    @cached_property
    def id(self) -> bytes:
        """The pool id, 32 bytes."""
        return digest("pool", self.value)

    @property
    def base(self) -> bytes | None:
        """The content id of the base."""
        return self.recipe.base

    def to_bytes(self) -> bytes:
        """Its canonical bytes."""
        return pack(self.value)

    @classmethod
    def from_bytes(cls, data: bytes) -> Genesis:
        """Read a genesis record. Raises InputError for anything but the canonical bytes of one."""
        try:
            if len(data) > limits.MANIFEST_BYTES_MAX:
                raise ValueError(f"{len(data)} bytes, at most {limits.MANIFEST_BYTES_MAX} are read")
            genesis = cls._of_value(unpack(data))
            if genesis.to_bytes() != data:
                raise ValueError("not in canonical form")
        except _MALFORMED as fault:
            raise InputError(f"a genesis record is malformed: {type(fault).__name__} {fault!s:.200}.") from None
        return genesis

    @classmethod
    def _of_value(cls, value: Mapping[str, Any]) -> Genesis:
        if value["membership"] not in ("open", "members"):
            raise ValueError(f"membership {value['membership']!r}")
        curators = value["curators"]
        if curators != "any" and not (
            0 < len(curators) <= limits.CURATORS_MAX
            and len(set(curators)) == len(curators)
            and all(is_id(key) and not is_small_order(key) for key in curators)
        ):
            raise ValueError("curators")
        if value["probe"] is not None and not is_id(value["probe"]):
            raise ValueError("probe")
        succeeds = value["succeeds"]
        if succeeds is not None and not (len(succeeds) == 2 and all(map(is_id, succeeds))):
            raise ValueError("succeeds")
        rows, recipe = value["architecture"], Recipe.from_canonical(value["recipe"])
        if recipe.base is not None and not is_id(recipe.base):
            raise ValueError("base")
        return cls(
            recipe,
            None if rows is None else Architecture.of_value(rows),
            value["membership"],
            curators if curators == "any" else tuple(curators),
            named(value["files"], "files"),
            value["probe"],
            tuple(succeeds) if succeeds else None,
        )

    def refuse_other(self, other: Genesis) -> None:
        """Raise PoolMismatchError, saying what differs, unless both are the same pool."""
        if self.id == other.id:
            return
        differing = [name for name in self.value if self.value[name] != other.value[name]]
        said = []
        for name in differing:
            if name == "recipe":
                said += _recipes(self.recipe, other.recipe)
            else:
                said.append(f"their {name} differ")
        raise PoolMismatchError(
            f"pool {self.id.hex()} and pool {other.id.hex()} are different pools: {'; '.join(said)}. "
            "Replicas join only within one pool: begin both from one genesis (init --from, or one recipe and base)."
        )


def _recipes(one: Recipe, other: Recipe) -> list[str]:
    said = []
    if one.base != other.base:
        said.append(f"base {_hex(one.base)} against {_hex(other.base)}")
    mine, theirs = one.canonical(), other.canonical()
    if any(mine[name] != theirs[name] for name in mine if name != "base"):
        said.append(f"recipe {one.id.hex()} ({one}) against {other.id.hex()} ({other})")
    return said


def _hex(identity: bytes | None) -> str:
    return identity.hex() if identity else "none"


_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, CrdtMergeError)
