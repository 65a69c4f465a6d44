"""May an output be written here? Decided before any work, from what stands at the place.

RULES
1. An empty place, or an empty folder, is free.
2. Only an earlier output of ours is replaced: a receipt of ours is in the folder, or beside the single file.
3. A folder that holds anything crdtmerge does not write is not replaced, for replacing deletes it.
4. Links are not replaced: what they lead to is not here.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from crdtmerge import limits, strict_json
from crdtmerge.errors import InputError, OutputError, some
from crdtmerge.weights.carried import CARRIED_NAMES
from crdtmerge.weights.layout import INDEX_NAME

RECEIPT_NAME = "receipt.json"

OUR_NAMES = frozenset({RECEIPT_NAME, "inputs.json", "README.md", "merge.intoto.json", "recipe.yml", INDEX_NAME})
"""Files that an output folder may hold besides weights and carried files; a folder with others is not replaced."""

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_FREE_BYTES_MIN = 64 << 20


def replaces_ours(path: Path, folder: bool) -> bool:
    """Whether an earlier output of ours stands at ``path``. Raises OutputError when anything else does, or OSError."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first.")
    receipt = receipt_path(path, folder)
    if not os.path.lexists(path):
        return not folder and _is_receipt(receipt)
    kind = path.lstat().st_mode
    if folder and stat.S_ISDIR(kind) and not os.listdir(path):  # noqa: PTH208
        return False
    if (stat.S_ISDIR(kind) if folder else stat.S_ISREG(kind)) and _is_receipt(receipt):
        _check_contents(path) if folder else None
        return True
    raise OutputError(f"{path}: exists and was not written by crdtmerge; choose another -o or remove it.")


def check_space(path: Path, nbytes: int) -> None:
    """Raises OutputError when the disk of ``path`` has no room for ``nbytes`` and the small files beside them."""
    wanted, free = nbytes + _FREE_BYTES_MIN, shutil.disk_usage(path.parent).free
    if wanted > free:
        raise OutputError(f"{path}: needs {wanted} bytes; its disk has {free} free. Make room or choose another -o.")


def receipt_path(path: Path, folder: bool) -> Path:
    """Where the receipt of an output lies."""
    return path / RECEIPT_NAME if folder else path.with_name(f"{path.name}.{RECEIPT_NAME}")


def is_our_name(name: str) -> bool:
    """Whether crdtmerge writes files of this name into an output folder."""
    return name in OUR_NAMES or name in CARRIED_NAMES or _WEIGHTS.fullmatch(name) is not None


def _check_contents(folder: Path) -> None:
    names = sorted(os.listdir(folder))  # noqa: PTH208
    foreign = tuple(name for name in names if not is_our_name(name) or not _is_regular(folder / name))
    if foreign:
        raise OutputError(
            f"{folder}: is an earlier output that now holds what crdtmerge did not write: {some(foreign)}; "
            "choose another -o or move that away."
        )


def _is_regular(path: Path) -> bool:
    return os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)


def _is_receipt(path: Path) -> bool:
    if not _is_regular(path) or path.stat().st_size > limits.RECEIPT_BYTES_MAX:
        return False
    try:
        table = strict_json.parse(path.read_bytes(), str(path), InputError, depth=64, fractions=True, negatives=True)
    except InputError:
        return False
    return str(table.get("format", "")).startswith("crdtmerge")
