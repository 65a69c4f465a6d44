"""The safetensors header: which bytes of a file are which tensor. No I/O: bytes in, entries out or HeaderError.

RULES, in the order they are checked
1.  The header's length fits the file and ``limits.HEADER_BYTES_MAX``; checked before anything is allocated.
2.  It is JSON as ``strict_json`` wants it: begins with ``{``, no key twice, depth <= 4, whole numbers only.
3.  ``__metadata__`` is a map from text to text. Every other key is a tensor's name: not empty, no control
    characters, at most 512 bytes.
4.  A tensor has exactly the fields dtype, shape and data_offsets; the dtype is known, the rank at most 8.
5.  end - begin is exactly what shape and dtype say.
6.  The tensors cover the rest of the file: no overlap, no alias, no hole, no byte after the last one.

Everything accepted here is accepted by the safetensors library too, with the same meaning; a test holds it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from crdtmerge import limits, strict_json
from crdtmerge.errors import HeaderError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.strict_json import Refuse

LENGTH_BYTES = 8
"""A file begins with the header's length, little-endian."""

FILE_BYTES_MIN = LENGTH_BYTES + 2
"""The shortest file: a length and ``{}``."""

METADATA = "__metadata__"
"""The one key of a header that is no tensor's name."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_MARKS_A_TENSOR = 16  # quotes: 10; commas: 12 at rank 8; brackets: 3
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_ELEMENT_BITS_MAX = 1 << 62  # bounds the product of all dimensions, counted as bits, also of tensors without elements


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a file: ``begin`` and ``end`` are absolute offsets of its bytes in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Product of the shape: 1 for a scalar, 0 for an empty tensor."""
        return math.prod(self.shape)


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """The header's length in bytes, from the first 8 bytes of a file of ``file_bytes``."""
    if file_bytes < FILE_BYTES_MIN:
        raise HeaderError(f"{where}: {file_bytes} bytes; a safetensors file has at least {FILE_BYTES_MIN}.")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > limits.HEADER_BYTES_MAX:
        limit = f"{limits.HEADER_BYTES_MAX} (limits.HEADER_BYTES_MAX)"
        raise HeaderError(f"{where}: header claims {length} bytes; the limit is {limit}. Not a safetensors file?")
    if length > file_bytes - LENGTH_BYTES:
        raise HeaderError(
            f"{where}: header claims {length} bytes, the file has {file_bytes}: truncated or still downloading?"
        )
    return length


def parse_header(header: bytes, data_bytes: int, where: str) -> dict[str, Entry]:
    """The tensors of a file in sorted name order, from its header and the count of bytes that follow the header.

    Raises HeaderError, whose message begins with ``where``.

    >>> header = b'{"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    >>> parse_header(header, 12, "a.safetensors")["w"].shape
    (2, 3)
    """
    marks_max = _MARKS_A_TENSOR * (limits.TENSORS_MAX + 1)
    table = strict_json.parse(
        header, where, HeaderError, what="header", depth=limits.HEADER_DEPTH_MAX, marks_max=marks_max
    )
    _check_padding(header, where)
    _check_metadata(table.pop(METADATA, {}), where)
    if len(table) > limits.TENSORS_MAX:
        raise HeaderError(f"{where}: {len(table)} tensors; the limit is {limits.TENSORS_MAX} (limits.TENSORS_MAX).")
    start = LENGTH_BYTES + len(header)
    entries = {name: _entry(name, table[name], start, where) for name in sorted(table)}
    _check_cover(entries.values(), start, start + data_bytes, where)
    return entries


def _check_padding(header: bytes, where: str) -> None:
    if not header.rstrip(b" ").endswith(b"}"):
        raise HeaderError(f"{where}: header must end with }} and then only spaces.")


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{where}: {METADATA} must be a map from text to text.")


def _entry(name: str, fields: Any, start: int, where: str) -> Entry:
    def refuse(fault: str) -> NoReturn:
        raise HeaderError(f"{where}: tensor {name[:200]!a} {fault}.")

    _check_name(name, refuse)
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        refuse(f"must have exactly the fields data_offsets, dtype and shape; found {ascii(found)[:200]}")
    dtype = _dtype(fields["dtype"], refuse)
    shape = _naturals(fields["shape"], "shape", refuse)
    if len(shape) > limits.RANK_MAX:
        refuse(f"has rank {len(shape)}; the limit is {limits.RANK_MAX}")
    offsets = _naturals(fields["data_offsets"], "data_offsets", refuse)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(f"has data_offsets {ascii(list(offsets))[:80]}; wanted [begin, end]")
    _check_size(dtype, shape, offsets[1] - offsets[0], refuse)
    return Entry(name, dtype, shape, start + offsets[0], start + offsets[1])


def _check_name(name: str, refuse: Refuse) -> None:
    if not name:
        refuse("has an empty name")
    if _CONTROL.search(name):
        refuse("has control characters in its name")
    if len(name.encode()) > limits.TENSOR_NAME_BYTES_MAX:
        refuse(f"has a name of {len(name.encode())} bytes; the limit is {limits.TENSOR_NAME_BYTES_MAX}")


def _dtype(value: Any, refuse: Refuse) -> DType:
    if not isinstance(value, str) or value not in DTYPES:
        refuse(f"has dtype {ascii(value)[:80]}, which is unknown")
    return DTYPES[value]


def _naturals(value: Any, field: str, refuse: Refuse) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        refuse(f"has {field} {ascii(value)[:80]}; wanted a list of whole numbers from 0")
    return tuple(value)


def _check_size(dtype: DType, shape: tuple[int, ...], nbytes: int, refuse: Refuse) -> None:
    if math.prod(max(size, 1) for size in shape) * dtype.bits > _ELEMENT_BITS_MAX:
        refuse(f"has shape {list(shape)}, which overflows")
    bits = math.prod(shape) * dtype.bits
    if bits % 8:
        refuse(f"has shape {list(shape)}, which is no whole number of bytes of {dtype.name}")
    if bits // 8 != nbytes:
        refuse(f"has shape {list(shape)} of {dtype.name}, {bits // 8} bytes; its data_offsets span {nbytes}")


def _check_cover(entries: Iterable[Entry], start: int, file_end: int, where: str) -> None:
    last, at = None, start
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < at:
            span = f"{entry.begin - start}..{min(at, entry.end) - start}"
            other = ascii(last.name) if last else "the header"
            raise HeaderError(f"{where}: bytes {span} belong to {other} and {entry.name!a}.")
        if entry.begin > at:
            span = f"{at - start}..{entry.begin - start}"
            raise HeaderError(f"{where}: bytes {span} before tensor {entry.name!a} belong to no tensor.")
        if entry.end > file_end:
            missing = f"{entry.end - max(file_end, entry.begin)} of {entry.nbytes} bytes"
            raise HeaderError(f"{where}: {missing} of {entry.name!a} are missing: truncated or still downloading?")
        last, at = entry, entry.end
    if at < file_end:
        raise HeaderError(f"{where}: {file_end - at} bytes after the last tensor.")
