"""A bundle: a state, or what one lacks of it, as one safetensors file that any tool can list and we verify whole.

    genesis     U8    the genesis record                ops          U8    operations, each after its length
    manifests   U8    manifests, each after its length  file.HEX     U8    a carried file, by its SHA-256
    tensor.HEX  as it is, by its tensor digest

Equal states give equal bundles to the byte.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import BundleError, ChangedError, CrdtMergeError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.genesis import Genesis
from crdtmerge.replica.op import Op
from crdtmerge.weights.descriptors import bytes_of
from crdtmerge.weights.digests import piece_digests, tensor_digest
from crdtmerge.weights.header import LENGTH_BYTES, Entry, header_length, parse_header
from crdtmerge.weights.layout import Layout, Tensor, plan_output

LENGTH = 4
TENSOR, FILE = "tensor.", "file."
STRETCH_BYTES = 8 * limits.PIECE_BYTES

Read = Callable[[int, NDArray[np.uint8]], None]
"""Fills a buffer with a tensor's bytes from an offset on."""


class Part(NamedTuple):
    """A tensor to be written: its digest, dtype, shape, how to read it, and what messages call it."""

    digest: bytes
    dtype: DType
    shape: tuple[int, ...]
    read: Read
    where: str


@dataclass(frozen=True)
class Contents:
    """What a bundle says besides tensors: pool, operations in order, manifests and files by id."""

    genesis: Genesis
    ops: Sequence[Op]
    manifests: Mapping[bytes, Manifest]
    files: Mapping[bytes, bytes]


def write(contents: Contents, tensors: Iterable[Part], name: str = "bundle") -> tuple[int, Iterator[tuple[int, Any]]]:
    """A bundle's size, and its bytes as (offset, data) in no particular order."""
    small = {
        "genesis": contents.genesis.to_bytes(),
        "ops": framed(op.wire for op in sorted(contents.ops, key=lambda op: op.order)),
        "manifests": framed(contents.manifests[content].to_bytes() for content in sorted(contents.manifests)),
        **{FILE + digest.hex(): data for digest, data in contents.files.items()},
    }
    parts = {part.digest: part for part in tensors}
    rows: list[Tensor] = [(key, DTYPES["U8"], (len(data),)) for key, data in small.items()]
    rows += [(TENSOR + part.digest.hex(), part.dtype, part.shape) for part in parts.values()]
    layout = plan_output(rows, single_file=name)
    return layout.nbytes, _bytes(layout, small, parts)


def _bytes(layout: Layout, small: Mapping[str, bytes], parts: Mapping[bytes, Part]) -> Iterator[tuple[int, Any]]:
    yield 0, layout.files[0].header
    for key, data in small.items():
        yield layout.place(key)[1].begin, data
    buffer = np.empty(STRETCH_BYTES, np.uint8)
    for digest, part in parts.items():
        entry = layout.place(TENSOR + digest.hex())[1]
        pieces = []
        for at in range(0, entry.nbytes, STRETCH_BYTES):
            stretch = buffer[: min(STRETCH_BYTES, entry.nbytes - at)]
            part.read(at, stretch)
            pieces.append(piece_digests(stretch))
            yield entry.begin + at, stretch
        if tensor_digest(part.dtype, part.shape, b"".join(pieces)) != digest:
            raise ChangedError(f"{part.where}: its bytes are no longer those that were added.")


def to_bytes(contents: Contents, tensors: Iterable[Part]) -> bytes:
    """A bundle in memory."""
    _, stretches = write(contents, tensors)
    data = io.BytesIO()
    for offset, stretch in stretches:
        data.seek(offset)
        data.write(bytes_of(stretch))
    return data.getvalue()  # shares its memory


def entries_of(data: bytes, where: str) -> dict[str, Entry]:
    """The tensors of a bundle in memory, their offsets within ``data``. Raises HeaderError."""
    length = header_length(data[:LENGTH_BYTES], len(data), where)
    header = data[LENGTH_BYTES : LENGTH_BYTES + length]
    return parse_header(header, len(data) - LENGTH_BYTES - length, where)


def read(entries: Mapping[str, Entry], get: Callable[[Entry], bytes], where: str) -> Contents:
    """Everything but the tensors, each operation and manifest checked by its own rules. Raises BundleError."""
    for name in ("genesis", "ops", "manifests"):
        entry = entries.get(name)
        if entry is None or entry.dtype.name != "U8" or len(entry.shape) != 1:
            raise BundleError(f"{where}: is no exported state: it has no list of bytes called {name}.")
    strange = [name for name in entries if not _is_ours(name)]
    if strange:
        raise BundleError(f"{where}: holds {strange[0]!a:.80}, which belongs in no exported state.")
    try:
        genesis = Genesis.from_bytes(get(entries["genesis"]))
        ops = [Op.from_wire(wire) for wire in unframed(get(entries["ops"]), limits.BUNDLE_OPS_MAX)]
        manifests = [Manifest.from_bytes(data) for data in unframed(get(entries["manifests"]), limits.BUNDLE_OPS_MAX)]
    except CrdtMergeError as fault:
        raise BundleError(f"{where}: {fault}") from None
    files = {name: get(entries[name]) for name in entries if name.startswith(FILE)}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != name.removeprefix(FILE):
            raise BundleError(f"{where}: {name} holds other bytes than its name says.")
    by_digest = {bytes.fromhex(name.removeprefix(FILE)): data for name, data in files.items()}
    return Contents(genesis, ops, {manifest.id: manifest for manifest in manifests}, by_digest)


def tensor_digest_of(name: str) -> bytes | None:
    """The digest in a tensor's name, None for what is no tensor of a model."""
    return bytes.fromhex(name.removeprefix(TENSOR)) if name.startswith(TENSOR) else None


def _is_ours(name: str) -> bool:
    kind, dot, digest = name.partition(".")
    if not dot:
        return name in ("genesis", "ops", "manifests")
    return kind + dot in (TENSOR, FILE) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def framed(items: Iterable[bytes]) -> bytes:
    """Byte strings, each after its length in four bytes."""
    return b"".join(len(item).to_bytes(LENGTH, "big") + item for item in items)


def unframed(data: bytes, count_max: int) -> list[bytes]:
    """The byte strings again. Raises BundleError."""
    items: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + LENGTH], "big")
        at += LENGTH
        if at + size > len(data) or len(items) >= count_max:
            raise BundleError(f"a list ends before its {len(items) + 1}th item does, or has more than {count_max}")
        items.append(data[at : at + size])
        at += size
    return items
