"""The index of a folder of shards: which file holds which tensor, and whether the shards agree. No I/O.

RULES
1. Every value of ``weight_map`` is one plain file name ending ``.safetensors``, by POSIX and Windows rules alike:
   no folder, drive, share, stream or control character.
2. Every shard named is there, and no shard is there unnamed.
3. Index and shards name the same tensors in the same files, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from crdtmerge import limits, strict_json
from crdtmerge.errors import CheckpointError, some

_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_FILE_NAME_BYTES_MAX = 255


class Index:
    """A parsed index: ``weight_map`` from tensor to file, and ``total_size`` as it stands there, right or wrong."""

    def __init__(self, data: bytes, where: str) -> None:
        """Parse an index file's bytes. Raises CheckpointError, whose message begins with ``where``."""
        table = strict_json.parse(data, where, CheckpointError, fractions=True, negatives=True)
        metadata = table.get("metadata")
        self.where = where
        self.total_size: Any = metadata.get("total_size") if isinstance(metadata, dict) else None
        self.weight_map = _weight_map(table.get("weight_map"), where)
        self.shards = sorted(set(self.weight_map.values()))
        if len(self.shards) > limits.SHARDS_MAX:
            raise CheckpointError(f"{where}: {len(self.shards)} shards; the limit is {limits.SHARDS_MAX}.")

    def check_present(self, present: Iterable[str]) -> None:
        """Raises CheckpointError unless the shards among the files ``present`` are those of the index."""
        found = set(present)
        missing = [name for name in self.shards if name not in found]
        if missing:
            raise CheckpointError(f"{self.where}: shards missing from the folder: {some(missing)}. Download them.")
        extra = sorted(shards_among(found) - set(self.shards))
        if extra:
            raise CheckpointError(f"{self.where}: shards absent from the index: {some(extra)}. Remove them.")

    def check_tensors(self, held: Mapping[str, Iterable[str]]) -> None:
        """Raises CheckpointError unless the tensor names ``held`` by each file are those of the index."""
        holders = self._holders(held)
        both = holders.keys() & self.weight_map.keys()
        for names, fault in (
            (self.weight_map.keys() - holders.keys(), "in the index but in no shard"),
            (holders.keys() - self.weight_map.keys(), "in a shard but not in the index"),
            ({name for name in both if holders[name] != self.weight_map[name]}, "in another shard than the index says"),
        ):
            if names:
                listed = some(sorted(names))
                raise CheckpointError(f"{self.where}: {len(names)} tensors {fault}: {listed}. Download it again.")

    def _holders(self, held: Mapping[str, Iterable[str]]) -> dict[str, str]:
        holders: dict[str, str] = {}
        for file, names in held.items():
            for name in names:
                other = holders.setdefault(name, file)
                if other != file:
                    raise CheckpointError(f"{self.where}: tensor {name!a} is in two shards: {other} and {file}.")
        return holders


def shards_among(names: Iterable[str]) -> set[str]:
    """The names that are numbered shards, like ``model-00001-of-00002.safetensors``."""
    return {name for name in names if _SHARD.fullmatch(name)}


def _weight_map(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{where}: has no weight_map from tensor names to files.")
    for tensor, file in value.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise CheckpointError(
                f"{where}: tensor {tensor[:200]!a} is said to be in {ascii(file)[:200]}; "
                "wanted one plain file name ending .safetensors, in the same folder."
            )
    return value


def _is_plain(name: str) -> bool:
    """Whether a name is one file in its own folder, by the rules of every system."""
    harmless = name.isprintable() and not set(name) & set('<>:"/\\|?*') and not name.startswith((".", " "))
    alone = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return harmless and alone and name.endswith(".safetensors") and len(name.encode()) <= _FILE_NAME_BYTES_MAX
