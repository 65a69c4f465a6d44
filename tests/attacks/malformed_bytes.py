"""Safetensors files built byte by byte, so that they may be wrong in any way."""

from __future__ import annotations

import json
from typing import Any


def packed(header: object, body: bytes = b"", claims: int | None = None) -> bytes:
    """A file of a header (JSON text, or a value to be written as JSON) and data; ``claims`` is the length it states."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text + body


def tensor(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def valid_file() -> bytes:
    """A small valid file with several dtypes, an empty tensor, a scalar, metadata and padding."""
    header = {
        "__metadata__": {"format": "pt"},
        "layers.0.weight": tensor("BF16", [2, 3], 0, 12),
        "layers.0.bias": tensor("F32", [2], 12, 20),
        "scale": tensor("F64", [], 20, 28),
        "empty": tensor("F16", [0, 4], 28, 28),
        "mask": tensor("BOOL", [3], 28, 31),
        "größe": tensor("I8", [1], 31, 32),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return packed(text + b" " * (-len(text) % 8), bytes(range(28)) + b"\0\1\0\7")
