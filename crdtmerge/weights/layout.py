"""Where each output tensor lies: canonical safetensors headers, shards and their index. No I/O.

RULES
1. Equal tensors give equal files: the header holds only ``{"format": "pt"}`` and the tensors, and its order is that
   of the safetensors library (dtype by alignment, then name), so the library's own save gives the same bytes.
2. Shards are filled in sorted name order up to ``shard_bytes``; a larger tensor has its own, as huggingface_hub does.

>>> from crdtmerge.numerics.dtypes import DTYPES
>>> layout = plan_output([("w", DTYPES["BF16"], (2, 3))])
>>> layout.files[0].name, layout.files[0].size, layout.place("w")[1].nbytes
('model.safetensors', 116, 12)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from crdtmerge import limits
from crdtmerge.errors import HeaderError, OutputError, some
from crdtmerge.numerics.dtypes import DType
from crdtmerge.weights.header import LENGTH_BYTES, METADATA, Entry, parse_header

Tensor = tuple[str, DType, tuple[int, ...]]
"""Name, dtype and shape of an output tensor."""

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_FILE_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8"),
    *("F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)
_RANK = {name: rank for rank, name in enumerate(_FILE_ORDER)}


@dataclass(frozen=True)
class OutputFile:
    """One file to be: its header with the length before it, its whole size in bytes, and its tensors by name."""

    name: str
    header: bytes
    size: int
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Layout:
    """All weight files of an output, and the bytes of the index if there are several."""

    files: tuple[OutputFile, ...]
    index: bytes | None

    def place(self, name: str) -> tuple[OutputFile, Entry]:
        """The file of a tensor and its entry there."""
        return self._places[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files and the index."""
        return sum(file.size for file in self.files) + len(self.index or b"")

    @cached_property
    def _places(self) -> dict[str, tuple[OutputFile, Entry]]:
        return {name: (file, entry) for file in self.files for name, entry in file.entries.items()}


def header_bytes(tensors: Sequence[Tensor]) -> bytes:
    """The canonical beginning of a file: 8 bytes of length, compact JSON, spaces up to a multiple of 8.

    Tensors may be given in any order. Names are sorted as the library sorts them, by their code points.
    Raises OutputError for a name that comes twice or is ``__metadata__``.
    """
    _check_names([METADATA, *(name for name, _, _ in tensors)])
    table: dict[str, object] = {METADATA: {"format": "pt"}}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (_RANK[tensor[1].name], tensor[0])):
        end = at + dtype.nbytes(shape)
        table[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def plan_output(
    tensors: Sequence[Tensor], *, single_file: str | None = None, shard_bytes: int = limits.SHARD_BYTES
) -> Layout:
    """Lay tensors out in one file of the name ``single_file``, or in the files of a Hugging Face folder.

    Raises OutputError for tensors that no reader would take back.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor[0])
    _check_names([name for name, _, _ in ordered])
    if single_file is not None:
        return Layout((_file(single_file, ordered),), None)
    shards = _shards(ordered, shard_bytes)
    if len(shards) == 1:
        return Layout((_file(SINGLE_NAME, ordered),), None)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = tuple(_file(name, shard) for name, shard in zip(names, shards, strict=True))
    return Layout(files, _index(files))


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise OutputError(f"tensors {some(twice)} cannot be written: the name is taken.")


def _shards(ordered: Sequence[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = []
    current: list[Tensor] = []
    filled = 0
    for tensor in ordered:
        nbytes = tensor[1].nbytes(tensor[2])
        if nbytes > shard_bytes:
            shards.append([tensor])
            continue
        if filled + nbytes > shard_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(tensor)
        filled += nbytes
    return [*shards, current] if current or not shards else shards


def _file(name: str, tensors: Sequence[Tensor]) -> OutputFile:
    header = header_bytes(tensors)
    if len(header) > limits.HEADER_BYTES_MAX:
        raise OutputError(f"{name}: a header of {len(header)} bytes; readers stop at 100 MB. Use more shards.")
    data_bytes = sum(dtype.nbytes(shape) for _, dtype, shape in tensors)
    try:
        entries = parse_header(header[LENGTH_BYTES:], data_bytes, name)
    except HeaderError as fault:
        raise OutputError(f"cannot be written so that it can be read back: {fault}") from fault
    return OutputFile(name, header, len(header) + data_bytes, entries)


def _index(files: Sequence[OutputFile]) -> bytes:
    entries = [(entry, file.name) for file in files for entry in file.entries.values()]
    table = {
        "metadata": {"total_size": sum(entry.nbytes for entry, _ in entries)},
        "weight_map": {entry.name: file_name for entry, file_name in entries},
    }
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()
