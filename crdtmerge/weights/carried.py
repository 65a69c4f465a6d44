"""Small files that travel with a model into the output (configuration, tokenizer, symmetry), by an allow-list.

RULES
1. Only the names below, only regular files (links as ``links`` allows), together at most
   ``limits.CARRIED_FILES_BYTES_MAX``.
2. Code never travels: no ``*.py``, and the key ``auto_map``, which names code to run, is taken out of ``*config.json``.
3. ``config.json`` states the output's dtype. Everything else is carried byte for byte.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from crdtmerge import limits, strict_json
from crdtmerge.errors import CheckpointError, some
from crdtmerge.weights.descriptors import open_file
from crdtmerge.weights.links import lead
from crdtmerge.weights.tensorfile import read_at

CARRIED_NAMES = frozenset(
    {
        # the model
        *("config.json", "generation_config.json"),
        # its tokenizer
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "vocab.bpe", "encoder.json", "tokenizer.model", "spiece.model"),
        *("sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.jinja", "chat_template.json"),
        # its images, sound and video
        *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
        *("video_preprocessor_config.json", "feature_extractor_config.json"),
        # which of its units may be reordered together (``symmetry.groups``)
        "symmetry.json",
    }
)
"""Every file name that is carried."""

_CODE_KEY = "auto_map"
_CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")


def carried_files(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a checkpoint folder to carry, by name in sorted order, and notes on what was left out.

    Raises CheckpointError: files too large, a forbidden link, a config that is not JSON.
    """
    names = names_in(folder)
    files: dict[str, bytes] = {}
    notes = [f"{name!a} is code and was not copied" for name in names if name.endswith(".py")]
    left = limits.CARRIED_FILES_BYTES_MAX
    for name in (name for name in names if name in CARRIED_NAMES):
        files[name] = read_small(folder, name, left)
        left -= len(files[name])
    stripped = [name for name in files if name.endswith("config.json") and _strip_code(files, name, folder)]
    if stripped:
        notes.append(f"{_CODE_KEY}, which names code to run, was taken out of {some(stripped)}")
    return files, notes


def carried_file(folder: Path, name: str) -> bytes | None:
    """One of these files, of those that are carried byte for byte; None where there is none. Raises CheckpointError."""
    return read_small(folder, name, limits.CARRIED_FILES_BYTES_MAX) if name in names_in(folder) else None


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises CheckpointError where it cannot be read."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError as fault:
        raise CheckpointError(f"{folder}: cannot be listed: {fault.strerror}.") from fault


def read_small(folder: Path, name: str, bytes_max: int) -> bytes:
    """The bytes of a regular file in a folder. Raises CheckpointError: too large, no regular file, a forbidden link."""
    path = folder / name
    try:
        descriptor = open_file(lead(folder, name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be opened: {fault.strerror}.") from fault
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file.")
        if status.st_size > bytes_max:
            raise CheckpointError(f"{path}: {status.st_size} bytes; at most {bytes_max} are read (limits.py).")
        data = bytearray(status.st_size)
        return bytes(data[: read_at(path, descriptor, 0, memoryview(data))])
    finally:
        os.close(descriptor)


def read_config(data: bytes, where: str) -> dict[str, Any]:
    """A configuration file's map. Raises CheckpointError."""
    return strict_json.parse(data, where, CheckpointError, depth=64, fractions=True, negatives=True)


def with_dtype(files: dict[str, bytes], out_dtype: str | None) -> dict[str, bytes]:
    """The same files, config.json stating ``out_dtype`` (torch's spelling, ``"bfloat16"``) where it states another."""
    if out_dtype is None or _CONFIG not in files:
        return files
    table = read_config(files[_CONFIG], _CONFIG)
    stale = [key for key in _DTYPE_KEYS if table.get(key, out_dtype) != out_dtype]
    table.update(dict.fromkeys(stale, out_dtype))
    return {**files, _CONFIG: _written(table)} if stale else files


def _strip_code(files: dict[str, bytes], name: str, folder: Path) -> bool:
    """Take out what names code; whether there was any."""
    table = read_config(files[name], str(folder / name))
    code = table.pop(_CODE_KEY, None) is not None
    if code:
        files[name] = _written(table)
    return code


def _written(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
