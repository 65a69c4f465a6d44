"""Tensors in pieces for tests: their trees, and a disk that loses power at any effect.

tensor = Pieces.of(1, pieces=3)
partial = partials.begin(tensor.tree)
partials.write(partial, 0, tensor.piece(0))
"""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from crdtmerge import limits
from crdtmerge.numerics.dtypes import DTYPES
from crdtmerge.pool.transfer import Want
from crdtmerge.store.disk import Disk
from crdtmerge.store.partials import Tree
from crdtmerge.weights.digests import piece_digests, tensor_digest


class Pieces(NamedTuple):
    """The bytes of a tensor of float32, and its tree."""

    data: bytes
    tree: Tree

    @classmethod
    def of(cls, seed: int, pieces: float = 3.3) -> Pieces:
        """A random tensor of about so many pieces."""
        count = int(pieces * limits.PIECE_BYTES) // 4
        return cls.made_of(np.random.default_rng(seed).standard_normal(count, np.float32))

    @classmethod
    def made_of(cls, tensor: Any) -> Pieces:
        """A tensor of float32 in one dimension, or of bool."""
        data, dtype = tensor.tobytes(), DTYPES["BOOL" if tensor.dtype == np.uint8 else "F32"]
        digests = piece_digests(data)
        return cls(data, Tree(tensor_digest(dtype, tensor.shape, digests), dtype, tensor.shape, digests))

    def piece(self, number: int) -> bytes:
        """The bytes of a piece."""
        return self.data[number * limits.PIECE_BYTES :][: limits.PIECE_BYTES]

    @property
    def want(self) -> Want:
        """The tensor as one that is lacking."""
        return Want(self.tree.digest, self.tree.dtype, self.tree.shape)

    @property
    def packed(self) -> bytes:
        """The tree as it travels."""
        packed: bytes = msgpack.packb([self.tree.dtype.name, list(self.tree.shape), self.tree.pieces])
        return packed


class PowerLossError(BaseException):
    """The machine is gone."""


class VolatileDisk(Disk):
    """A disk that keeps what was written in memory until it is synced, and loses power before the k-th effect."""

    def __init__(self, seed: int = 0) -> None:
        self.count, self.at = 0, -1
        self.off = False
        self.names: list[str] = []
        self._random = random.Random(seed)
        self._unsynced: dict[tuple[int, int], list[tuple[Path, int, bytes]]] = {}

    def begin(self, at: int = -1) -> None:
        """Count anew; power goes before the ``at``-th effect."""
        self.count, self.at, self.off, self.names = 0, at, False, []

    def lose_power(self) -> None:
        """Some of what was not synced is gone."""
        for writes in self._unsynced.values():
            for path, offset, before in reversed(writes):
                if path.exists() and self._random.random() < 0.7:
                    path.chmod(0o600)
                    with path.open("r+b") as file:
                        file.seek(offset)
                        file.write(before)
        self._unsynced.clear()

    def _effect(self, name: str) -> None:
        if self.off:
            raise OSError(errno.EIO, "the power is gone")
        if self.count == self.at:
            self.off = True
            raise PowerLossError
        self.count += 1
        self.names.append(name)

    def write(self, descriptor: int, offset: int, data: Any) -> None:
        self._effect("write")
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        before = os.pread(descriptor, memoryview(data).nbytes, offset).ljust(memoryview(data).nbytes, b"\0")
        self._unsynced.setdefault(_inode(descriptor), []).append((path, offset, before))
        super().write(descriptor, offset, data)

    def sync(self, descriptor: int) -> None:
        self._effect("sync")
        self._unsynced.pop(_inode(descriptor), None)

    def sync_folder(self, folder: Path) -> None:
        self._effect("sync_folder")

    def create(self, path: Path) -> int:
        self._effect("create")
        return super().create(path)

    def rename(self, path: Path, new: Path) -> None:
        self._effect("rename")
        super().rename(path, new)

    def remove(self, path: Path) -> None:
        self._effect("remove")
        super().remove(path)


def _inode(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino
