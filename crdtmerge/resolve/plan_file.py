"""A plan as a file: what was computed of the whole input, so that a merge can apply it anywhere with the same bytes.

    {"data": ..., "format": "crdtmerge/plan/1", "inputs": {"program": "<digest>"}, "merge_id": "<hexadecimal>"}

The merge id is that of the recipe without the plan; the inputs are those that the plan was made with, which that id
covers: who has the plan can merge without them.

RULES
1. A plan has one text: ASCII, sorted keys, no spaces, a newline at the end. A file that differs from it is refused.
2. Floats are exact: ``{"$float": "0x1.8p+0"}``. Bytes are ``{"$bytes": "<hexadecimal>"}``. A map's own keys that begin
   with ``$`` get another one before it.
3. Reading is bounded (``PLAN_BYTES_MAX``, ``DEPTH_MAX``) and raises InputError for everything else.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crdtmerge import strict_json
from crdtmerge.errors import InputError, OutputError
from crdtmerge.strategies.protocol import Plan

FORMAT = "crdtmerge/plan/1"

PLAN_BYTES_MAX = 512 << 20
"""A plan: a coefficient of every column of every matrix of a large model takes some 50 MB."""

DEPTH_MAX = 16
"""Levels of a plan's lists and maps: a search's plan, which holds that of another strategy, has seven."""

_FLOAT, _BYTES = "$float", "$bytes"


def plan_digest(plan: Plan) -> bytes:
    """The digest by which a recipe names a plan among its inputs: of the plan's values, not of the file."""
    return plan.digest


def encode(plan: Plan, merge_id: bytes, inputs: Mapping[str, bytes] | None = None) -> bytes:
    """The one text of a plan. Raises TypeError for values that a plan does not hold.

    >>> encode(Plan({"t": 0.5, "n": [1, None]}), bytes(32)).decode()[:59]
    '{"data":{"n":[1,null],"t":{"$float":"0x1.0000000000000p-1"}'
    """
    digests = {name: digest.hex() for name, digest in (inputs or {}).items()}
    table = {"data": _written(plan.data), "format": FORMAT, "inputs": digests, "merge_id": merge_id.hex()}
    return (json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n").encode()


def decode(data: bytes, where: str) -> tuple[Plan, bytes, dict[str, bytes]]:
    """(plan, merge id, inputs' digests) of a plan's text. Raises InputError.

    >>> decode(encode(Plan({"t": 0.1}), bytes(32)), "x.plan")[0].data
    {'t': 0.1}
    """
    if len(data) > PLAN_BYTES_MAX:
        raise InputError(f"{where}: a plan of {len(data)} bytes; at most {PLAN_BYTES_MAX} are read.")
    table = strict_json.parse(data, where, InputError, what="plan", depth=DEPTH_MAX, negatives=True)
    if table.get("format") != FORMAT:
        raise InputError(f"{where}: is no plan of this program: format is {table.get('format')!a:.80}, not {FORMAT}.")
    try:
        if set(table) != {"data", "format", "inputs", "merge_id"} or not isinstance(table["data"], dict):
            raise ValueError("other fields than format, inputs, merge_id and data")
        plan, merge_id = Plan(_read(table["data"])), bytes.fromhex(table["merge_id"])
        inputs = {name: bytes.fromhex(digest) for name, digest in dict(table["inputs"]).items()}
        if any(len(digest) != 32 for digest in (merge_id, *inputs.values())):
            raise ValueError("a digest that has not 32 bytes")
        if encode(plan, merge_id, inputs) != data:
            raise ValueError("not the one text of what it says")
    except (ValueError, TypeError, OverflowError) as fault:
        raise InputError(f"{where}: a malformed plan ({fault}); make it again with `crdtmerge plan`.") from None
    return plan, merge_id, inputs


def write(path: str | Path, plan: Plan, merge_id: bytes, inputs: Mapping[str, bytes] | None = None) -> None:
    """Write a plan durably under its name, in the place of an earlier plan. Raises OutputError."""
    path = Path(path)
    check_place(path)
    data = encode(plan, merge_id, inputs)
    if len(data) > PLAN_BYTES_MAX:
        raise OutputError(f"{path}: the plan has {len(data)} bytes; at most {PLAN_BYTES_MAX} can be read back.")
    put(path, data)


def check_place(path: Path) -> None:
    """Raise OutputError unless a plan may be written there: nothing stands there, or a plan."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it first.")
    if os.path.lexists(path) and not _is_plan(path):
        raise OutputError(f"{path}: exists and is no plan; choose another -o or remove it.")


def read(path: str | Path) -> tuple[Plan, bytes]:
    """(plan, merge id of the recipe without it) of a file. Raises InputError."""
    return decode(_bytes(path), str(path))[:2]


def inputs_of(path: str | Path) -> dict[str, bytes]:
    """The digests of the inputs that the plan of a file was made with. Raises InputError."""
    return decode(_bytes(path), str(path))[2]


def _bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (a path or its text)
            return file.read(PLAN_BYTES_MAX + 1)
    except OSError as fault:
        raise InputError(f"{path}: the plan cannot be read: {fault.strerror or fault}.") from fault


def put(path: Path, data: bytes) -> None:
    """Replace a file's bytes so that after a crash it has the old ones or the new. Raises OutputError."""
    staged = path.with_name(f".{path.name}.crdtmerge-{secrets.token_hex(4)}")
    try:
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as fault:
        raise OutputError(f"{path}: cannot be written: {fault.strerror or fault}.") from fault


def _is_plan(path: Path) -> bool:
    head = b'{"data":'
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(head)) == head
    except OSError:
        return False


def _written(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return {_FLOAT: float(value).hex()}
    if isinstance(value, bytes):
        return {_BYTES: value.hex()}
    if isinstance(value, Mapping):
        return {f"${key}" if key.startswith("$") else key: _written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_written(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be part of a plan")


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_FLOAT}:
        return float.fromhex(value[_FLOAT])
    if set(value) == {_BYTES}:
        return bytes.fromhex(value[_BYTES])
    if any(key.startswith("$") and not key.startswith("$$") for key in value):
        raise ValueError("a key that no plan has")
    return {key[1:] if key.startswith("$$") else key: _read(item) for key, item in value.items()}
