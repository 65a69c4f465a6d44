"""Small replicas for tests: models that lie in files and in the database, and what must hold of every folder.

A model has a tensor of its own and one that all models share, both too large to lie in the database, and a small one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.keys import Key
from crdtmerge.pool.replica import Replica
from crdtmerge.replica.contribution import Manifest
from crdtmerge.replica.op import Op
from crdtmerge.store.blobs import fault_in
from crdtmerge.store.database import NAME

Model = dict[str, NDArray[Any]]

ELEMENTS = 4200
"""Of a large tensor of float32: 16,800 bytes, just above what lies in the database."""

KEYS = [Key.from_seed(bytes([n]) * 32) for n in range(1, 5)]


def model(number: float, *, shared: float = 7) -> Model:
    """A model; models of different numbers differ in all but the shared tensor."""
    return {
        "own": np.full(ELEMENTS, number, np.float32),
        "shared": np.full(ELEMENTS, shared, np.float32),
        "small": np.array([number, 1], np.float32),
    }


def founded(folder: Path, **options: Any) -> Replica:
    """A new pool for such models."""
    said = {"recipe": "weight_average", "like": model(0), "key": KEYS[0], **options}
    return Replica.create(folder, said.pop("recipe"), **said)


def second(one: Replica, folder: Path, key: Key = KEYS[1], **options: Any) -> Replica:
    """Another replica of the same pool, which knows what the first one knows."""
    bundle = folder.with_name(f"{folder.name}.bundle")
    one.export(bundle)
    return Replica.of_bundle(folder, bundle, key=key, **options)


def said_by(one: Replica) -> tuple[list[Op], Mapping[bytes, Manifest]]:
    """All operations of a replica with the manifests, as its peers get them."""
    manifests = {content: one.manifest(content) for content in one.opset.contents()}
    return list(one.opset.ops()), {content: found for content, found in manifests.items() if found is not None}


def exchange(*replicas: Replica) -> None:
    """Everyone learns what anyone knows."""
    for one in replicas:
        for other in replicas:
            joined = other.join(*said_by(one))
            assert not joined.waiting, "all of it was given"
            assert not joined.refused, joined.refused


def contents(replica: Replica) -> set[bytes]:
    """The visible contents."""
    return {entry.id for entry in replica.visible}


def broken(replica: Replica) -> list[str]:
    """What of the contents that the replica says it has is not there to the bit."""
    faults = []
    for content in sorted(replica.ready()):
        manifest = replica.manifest(content)
        assert manifest is not None, "what is ready has a manifest"
        for row in manifest.rows:
            blob = replica._room.blobs.get(row.digest)
            fault = "is not here" if blob is None else fault_in(replica._room.blobs, blob)
            if fault:
                faults.append(f"{content.hex()[:16]} {row.name} {fault}")
    return faults


def check_whole(folder: Path, acknowledged: Iterable[bytes], ready: Iterable[bytes] = ()) -> None:
    """Opened anew, a replica has what it acknowledged: operations, and the tensors of contents; fsck finds nothing."""
    with Replica.open(folder) as replica:
        missing = [one.hex()[:16] for one in acknowledged if one not in replica.opset]
        assert not missing, f"acknowledged operations are gone: {missing}"
        assert set(ready) <= replica.ready(), "contents that were added are no longer here"
        assert not broken(replica), broken(replica)
        report = replica.fsck()
        assert report.clean, (report.faults, report.lost)


def blob_files(folder: Path) -> list[Path]:
    """The files of all blobs, in order."""
    return sorted(path for path in (folder / "blobs").glob("*/*"))


def sql(folder: Path, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Carry out a statement in a replica's database, behind its back."""
    connection = sqlite3.connect(folder / NAME, isolation_level=None)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """The same bytes with one bit turned."""
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Turn one bit of a file, whatever its mode."""
    path.write_bytes(flipped(path.read_bytes(), at, bit))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
