"""The receipt: what a merge was made of and what came out, byte-equal on every machine.

It holds no time, host, path or library version (those of class P excepted, which are their point). Beside it lies
``inputs.json``, a hint where the inputs were found, which is not part of it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crdtmerge.canonical import decimal, decimal_text, digest
from crdtmerge.errors import ReceiptError, UsageError
from crdtmerge.numerics.lazy import torch
from crdtmerge.recipe import Recipe
from crdtmerge.replica import trie
from crdtmerge.replica.contribution import Claim, leaf

FORMAT = "crdtmerge/receipt/1"


@dataclass(frozen=True)
class TensorRow:
    """An output tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class Receipt:
    """What a merge was made of and what came out."""

    recipe: Recipe
    contributions: tuple[tuple[bytes, Claim], ...]
    tensors: tuple[TensorRow, ...]
    files: Mapping[str, str]
    exact: bool = True
    build: str | None = None

    @property
    def root(self) -> bytes:
        """The Merkle root of the contributions."""
        return trie.root({content: leaf(content, claim) for content, claim in self.contributions})

    @property
    def merge_id(self) -> bytes:
        """Names the merge: the set and the recipe."""
        return merge_id(self.root, self.recipe)

    @property
    def output_digest(self) -> bytes:
        """Over all output tensors in the order of their names."""
        return digest("output", [[t.name, t.dtype, list(t.shape), t.digest] for t in self.tensors])

    def to_json(self) -> dict[str, Any]:
        """The receipt as a JSON value; ids and digests in hexadecimal."""
        return {
            "format": FORMAT,
            "merge_id": self.merge_id.hex(),
            "root": self.root.hex(),
            "recipe_id": self.recipe.id.hex(),
            "recipe": self.recipe.canonical(),
            "seed": self.recipe.seed_for(self.root).hex(),
            "class": "E" if self.exact else "P",
            "build": self.build,
            "contributions": [
                {
                    "id": content.hex(),
                    "weight": decimal_text(claim.weight),
                    "role": claim.role,
                    "task": claim.task,
                    "stats": {name: found.hex() for name, found in claim.stats.items()},
                }
                for content, claim in self.contributions
            ],
            "output_digest": self.output_digest.hex(),
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "digest": t.digest.hex()}
                for t in self.tensors
            ],
            "files": dict(self.files),
        }

    def to_bytes(self) -> bytes:
        """The one text form: ASCII, sorted keys, a newline at the end."""
        return json_bytes(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Receipt:
        """Read a receipt. Raises ReceiptError for anything that is not one, to the byte."""
        try:
            receipt = cls._from_json(json.loads(data))
            same = receipt.to_bytes() == data
        except (*_MALFORMED, RecursionError, UsageError) as fault:
            raise ReceiptError(f"{where}: not a receipt of this program ({type(fault).__name__}: {fault}).") from None
        if not same:
            raise ReceiptError(f"{where}: its parts contradict each other: it was changed after the merge.")
        return receipt

    @classmethod
    def _from_json(cls, value: Mapping[str, Any]) -> Receipt:
        tensors = tuple(
            TensorRow(_text(t["name"]), _text(t["dtype"]), tuple(map(_natural, t["shape"])), _digest(t["digest"]))
            for t in value["tensors"]
        )
        files = {_text(name): _text(found) for name, found in value["files"].items()}
        contributions = tuple((_digest(c["id"]), _claim(c)) for c in value["contributions"])
        build = value["build"] if value["build"] is None else _text(value["build"])
        if (value["class"] == "E") != (build is None):
            raise ValueError("only what is of class P names a build")
        return cls(Recipe.from_canonical(value["recipe"]), contributions, tensors, files, value["class"] == "E", build)


_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no size")
    return value


def _digest(value: object) -> bytes:
    found = bytes.fromhex(_text(value))
    if len(found) != 32:
        raise ValueError(f"{value!r} is no digest of 32 bytes")
    return found


def merge_id(root: bytes, recipe: Recipe) -> bytes:
    """Names the merge of a set by a recipe."""
    return digest("merge", [root, recipe.id])


def _claim(value: Mapping[str, Any]) -> Claim:
    task = value["task"] if value["task"] is None else _text(value["task"])
    stats = {_text(name): _digest(found) for name, found in value["stats"].items()}
    return Claim(decimal(_text(value["weight"])), _text(value["role"]), task, stats)


def json_bytes(value: object) -> bytes:
    """A JSON document with sorted keys, two spaces a level, ASCII, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


Paths = Mapping[str, str | None]


def inputs_bytes(
    contributions: Sequence[tuple[bytes, str | None]],
    base: tuple[bytes, str | None] | None,
    stats: Mapping[bytes, Paths],
    inputs: Paths,
) -> bytes:
    """``inputs.json``: where contents, statistics and inputs were found, null for what was in memory."""
    table: dict[str, Any] = {
        "base": {"id": base[0].hex(), "path": base[1]} if base else None,
        "contributions": [{"id": content.hex(), "path": path} for content, path in contributions],
    }
    held = {content.hex(): dict(paths) for content, paths in stats.items() if paths}
    return json_bytes(table | ({"stats": held} if held else {}) | ({"inputs": dict(inputs)} if inputs else {}))


def build_here(device: str) -> str:
    """What the values of a merge of class P depend on besides its inputs: torch, and where it computes."""
    if device == "cpu":
        return f"torch {torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__} cuda {torch.version.cuda} {torch.cuda.get_device_name(torch.device(device))}"
