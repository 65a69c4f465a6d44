"""Small checkpoints for tests: tensors as raw bytes, written with our own writer or by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.weights.writer import Output, plan_output

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""Name to (dtype name, shape, bytes)."""

RECEIPT = b'{"format": "crdtmerge/receipt/1"}'


def random_tensors(seed: int = 0, scale: int = 7) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """One tensor of every dtype that is merged or carried, one empty and one scalar; floats are finite."""
    rng = np.random.default_rng(seed)
    made = {
        f"layer.{number}.{name.lower()}": (name, (scale, 3), _random(rng, DTYPES[name], scale * 3))
        for number, name in enumerate(name for name, dtype in DTYPES.items() if dtype.kind != "packed")
    }
    return made | {"empty": ("F32", (0, 4), b""), "scalar": ("BF16", (), b"\x80\x3f"), "größe": ("I8", (1,), b"\5")}


def _random(rng: np.random.Generator, dtype: DType, count: int) -> bytes:
    if dtype.kind == "bool":
        return rng.integers(0, 2, count, np.uint8).tobytes()
    raw = rng.bytes(count * dtype.itemsize)
    if not dtype.floating:
        return raw
    quiet = np.frombuffer(raw, dtype.raw.str.replace("f", "u")).copy()
    quiet &= ~np.array(1 << (dtype.bits - 2), quiet.dtype)  # the exponent's first bit off: never all ones
    return quiet.tobytes()


def specs(tensors: Tensors) -> list[tuple[str, DType, tuple[int, ...]]]:
    """What ``plan_output`` takes."""
    return [(name, DTYPES[dtype], shape) for name, (dtype, shape, _) in tensors.items()]


def save(path: Path, tensors: Tensors, *, folder: bool = False, shard_bytes: int = 5_000_000_000) -> Path:
    """Write tensors as a file or folder, with a receipt of ours."""
    layout = plan_output(specs(tensors), single_file=None if folder else path.name, shard_bytes=shard_bytes)
    with Output(path, layout, folder=folder) as output:
        for name, (_, _, data) in tensors.items():
            output.write(name, 0, data)
        output.add("receipt.json" if folder else f"{path.name}.receipt.json", RECEIPT)
        output.commit()
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def header_of(path: Path) -> dict[str, object]:
    """A file's header as JSON."""
    data = path.read_bytes()
    table: dict[str, object] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return table
