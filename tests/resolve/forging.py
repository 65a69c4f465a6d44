"""Receipts that are consistent in themselves but not with the output: what someone writes who changes an output."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crdtmerge.canonical import digest
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.replica import trie
from crdtmerge.resolve.receipt import json_bytes
from crdtmerge.weights.checkpoint import Checkpoint
from crdtmerge.weights.digests import piece_digests, tensor_digest


def consistent(receipt: dict[str, Any]) -> dict[str, Any]:
    """A receipt with every id and digest that follows from its other parts computed anew."""
    made = copy.deepcopy(receipt)
    leaves = {}
    for one in made["contributions"]:
        content = bytes.fromhex(one["id"])
        said = {"content": content, "weight": one["weight"], "role": one["role"], "task": one["task"], "stats": {}}
        leaves[content] = digest("leaf", said)
    root, recipe = trie.root(leaves), digest("recipe", made["recipe"])
    seed = made["recipe"]["seed"]
    rows = [[row["name"], row["dtype"], row["shape"], bytes.fromhex(row["digest"])] for row in made["tensors"]]
    made |= {"root": root.hex(), "recipe_id": recipe.hex(), "merge_id": digest("merge", [root, recipe]).hex()}
    return made | {
        "seed": digest("seed", root if seed == "root" else seed).hex(),
        "output_digest": digest("output", rows).hex(),
    }


def put(receipt: dict[str, Any], where: Sequence[str | int], value: object) -> None:
    """Set one part of a receipt, found by a path of keys, to another value."""
    at: Any = receipt
    for key in where[:-1]:
        at = at[key]
    assert at[where[-1]] != value, "a change changes something"
    at[where[-1]] = value


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a receipt, and all else in it with that."""
    receipt = json.loads(path.read_bytes())
    change(receipt)
    path.write_bytes(json_bytes(consistent(receipt)))


def state_digests(receipt: Path, weights: Path) -> None:
    """Make a receipt state the digests that the weights have now."""
    with Checkpoint.open(weights) as checkpoint:

        def restate(found: dict[str, Any]) -> None:
            for row in found["tensors"]:
                data = bytearray(checkpoint.entries[row["name"]].nbytes)
                checkpoint.read_into(row["name"], 0, data)
                row["digest"] = tensor_digest(DTYPES[row["dtype"]], tuple(row["shape"]), piece_digests(data)).hex()

        rewrite(receipt, restate)
