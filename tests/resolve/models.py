"""Small models with the same bits on every machine, as the safetensors library writes them.

Values come from SHAKE-256 and are turned into floats by exact steps only, so that digests of merges can be pinned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.weight": (300, 517),  # more than two blocks of 65,536
    "blocks.0.bias": (64,),
    "scale": (),
    "empty": (0, 4),
}
SMALL: dict[str, tuple[int, ...]] = {"blocks.0.weight": (30, 17), "blocks.0.bias": (64,), "scale": (), "empty": (0, 4)}

BUFFER = "position_ids"


def numbers(seed: str, count: int) -> torch.Tensor:
    """``count`` values in [-1, 1) as float64."""
    raw = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * count), "<i8")
    return torch.from_numpy(raw.astype(np.float64) / 2.0**63)


def state(who: str, dtype: str = "F32", shapes: Mapping[str, tuple[int, ...]] = SMALL, *, far: float = 0.125) -> State:
    """The model ``base``, or one fine-tuned from it, at a distance of ``far``."""
    made: State = {}
    for name, shape in shapes.items():
        values = numbers(f"base/{name}", math.prod(shape))
        if who != "base":
            values = values + far * numbers(f"{who}/{name}", math.prod(shape))
        made[name] = values.to(TYPES[dtype]).reshape(shape)
    return made | {BUFFER: torch.arange(16).reshape(1, 16)}


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """One file."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def save_folder(folder: Path, tensors: Mapping[str, torch.Tensor], files: Mapping[str, str] | None = None) -> Path:
    """A checkpoint folder of one file, with other files beside it."""
    folder.mkdir()
    save(folder / "model.safetensors", tensors)
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder


def save_shards(folder: Path, tensors: Mapping[str, torch.Tensor], count: int) -> Path:
    """A checkpoint folder of ``count`` shards, filled neither in the order of names nor evenly."""
    folder.mkdir()
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        held = names[number::count]
        save(folder / file, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_reordered(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """One file of the library whose header then names its tensors in the opposite order, with other metadata."""
    data = save(path, tensors).read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    del table["__metadata__"]
    header = json.dumps(dict(reversed(table.items())) | {"__metadata__": {"a": "b", "c": "d"}}, indent=1).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return path


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder, hidden ones too: bytes and modification time by relative path; folders as empty."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }
