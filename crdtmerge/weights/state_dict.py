"""A state dict in memory: named torch tensors or numpy arrays as raw bytes, with their digests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import InputError, UsageError
from crdtmerge.numerics.dtypes import BY_TORCH_NAME, DType
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.workers import Workers
from crdtmerge.weights.digests import Copy, piece_digests, tensor_digest
from crdtmerge.weights.facts import Facts
from crdtmerge.weights.header import Entry


class StateDict:
    """``entries`` and ``raw`` bytes by name, in sorted order. Nothing is copied where the bytes are contiguous.

    Raises UsageError or InputError for what is no state dict.
    """

    def __init__(self, tensors: Mapping[str, Any], label: str) -> None:
        self.label = label
        self.raw: dict[str, NDArray[np.uint8]] = {}
        self.entries: dict[str, Entry] = {
            name: self._entry(name, tensors[name]) for name in sorted(map(_name, tensors))
        }

    def _entry(self, name: str, tensor: Any) -> Entry:
        raw, dtype = _raw(f"{self.label}: tensor {name!a}", tensor)
        self.raw[name] = raw
        return Entry(name, dtype, tuple(int(size) for size in tensor.shape), 0, raw.nbytes)

    def copied(self) -> StateDict:
        """The same in memory of its own, which nobody can write to."""
        for name, raw in self.raw.items():
            own = raw.copy()
            own.setflags(write=False)
            self.raw[name] = own
        return self

    def digest(self, workers: Workers, copy: Copy | None = None) -> dict[str, Facts]:
        """The facts of every tensor; ``copy`` gets the bytes."""

        def one(entry: Entry) -> Facts:
            raw = self.raw[entry.name]
            bad = nonfinite(raw, entry.dtype) if entry.dtype.floating else None
            pieces = piece_digests(raw)
            facts = Facts(tensor_digest(entry.dtype, entry.shape, pieces), bad)
            if copy is not None:
                copy.piece(entry, 0, raw)
                copy.tensor(entry, pieces, facts)
            return facts

        return dict(zip(self.entries, workers.map(one, self.entries.values()), strict=True))


def _name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise UsageError(f"a state dict maps non-empty strings to tensors, not {name!r}.")
    return name


def _raw(where: str, tensor: Any) -> tuple[NDArray[np.uint8], DType]:
    """A tensor's bytes in row-major order, and its dtype."""
    if isinstance(tensor, np.ndarray):
        dtype = BY_TORCH_NAME.get(tensor.dtype.name)
        if dtype is None or dtype.kind == "packed" or tensor.dtype.byteorder == ">":
            raise InputError(
                f"{where} is a numpy array of {tensor.dtype}; use a little-endian type that torch has too."
            )
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), dtype
    if type(tensor).__module__.partition(".")[0] != "torch" or not hasattr(tensor, "detach"):
        raise InputError(f"{where} is {type(tensor).__name__}; a torch tensor or numpy array is needed.")
    import torch

    dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or dtype.kind == "packed":
        raise InputError(f"{where} has dtype {tensor.dtype}, which cannot be merged.")
    if not tensor.numel():
        return np.empty(0, np.uint8), dtype
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return raw, dtype
