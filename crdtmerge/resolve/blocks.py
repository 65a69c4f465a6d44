"""Stretches of tensors: raw rows read from all sources, and the same as torch tensors of the compute dtype.

A stretch begins at a multiple of 65,536 elements, so that reductions and random words fit together however a tensor is
cut. ``CRDTMERGE_BLOCK`` sets its length in elements; results do not depend on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge.errors import UsageError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.numerics.fused import UNSIGNED, Raw
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.reduction import BLOCK
from crdtmerge.numerics.rounding import canonical_nan, torch_dtype
from crdtmerge.resolve.fit import Merging
from crdtmerge.resolve.sources import Source
from crdtmerge.strategies.protocol import Unit

if TYPE_CHECKING:
    from torch import Tensor

STRETCH = 4 * BLOCK
"""Elements read and computed at a time: some rows of them fit the second cache level, and torch is not slowed down."""

VARIABLE = "CRDTMERGE_BLOCK"


def stretch_elements() -> int:
    """Elements of a stretch. Raises UsageError unless the variable is a multiple of 65,536."""
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return STRETCH
    if not asked.isdecimal() or int(asked) == 0 or int(asked) % BLOCK:
        raise UsageError(f"{VARIABLE} = {asked!r}: must be a multiple of {BLOCK}.")
    return int(asked)


class Span(NamedTuple):
    """Elements start..stop-1 of a tensor."""

    tensor: Merging
    start: int
    stop: int


def spans(tensor: Merging, length: int) -> Iterator[Span]:
    """A tensor in spans of a length; one empty span for an empty tensor."""
    for start in range(0, max(tensor.elements, 1), length):
        yield Span(tensor, start, min(start + length, tensor.elements))


def within(span: Span, length: int) -> Iterator[Span]:
    """A span in stretches of a length."""
    for start in range(span.start, max(span.stop, span.start + 1), length):
        yield Span(span.tensor, start, min(start + length, span.stop))


class Stored(NamedTuple):
    """Raw values and their dtype."""

    raw: Raw
    dtype: DType


@dataclass(frozen=True)
class Rows:
    """The raw values of a span: an array [n] for each source, and the base's; ``stack`` is the sources as [k, n].

    There is a stack if all have one storage dtype; it shares memory with ``xs``.
    """

    span: Span
    xs: tuple[Raw, ...]
    base: Raw | None
    stack: Raw | None
    stats: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)
    models: Mapping[str, Stored] = field(default_factory=dict)


class Reader:
    """Reads spans into a buffer that each thread reuses: rows are valid until the thread's next read."""

    def __init__(self) -> None:
        self._local = threading.local()

    def read(self, span: Span) -> Rows:
        """The raw rows of a span."""
        tensor, count = span.tensor, span.stop - span.start
        sources = [*tensor.sources, *([tensor.base] if tensor.base else [])]
        pitch = count * max(dtype.itemsize for dtype in tensor.dtypes)
        buffer = self._buffer(len(sources) * pitch)
        rows = []
        for r, (source, dtype) in enumerate(zip(sources, tensor.dtypes, strict=True)):
            row = buffer[r * pitch : r * pitch + count * dtype.itemsize]
            source.read_into(tensor.name, span.start * dtype.itemsize, row)
            rows.append(row.view(UNSIGNED[dtype.itemsize]))
        k = len(tensor.sources)
        stack = None
        if tensor.dtype:
            stack = buffer[: k * pitch].view(UNSIGNED[tensor.dtype.itemsize]).reshape(k, count)
        stats = {name: tuple(_beside(one, span) for one in having) for name, having in tensor.stats.items()}
        models = {name: _beside(one, span) for name, one in tensor.models.items()}
        return Rows(span, tuple(rows[:k]), rows[k] if tensor.base else None, stack, stats, models)

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < size:
            buffer = self._local.buffer = np.empty(size, np.uint8)
        return buffer


def _beside(source: Source, span: Span) -> Stored:
    """The same elements of what is read beside the models; all of a tensor that has another shape."""
    entry = source.entries[span.tensor.name]
    start, stop = (span.start, span.stop) if entry.shape == span.tensor.shape else (0, entry.elements)
    read = np.empty((stop - start) * entry.dtype.itemsize, np.uint8)
    source.read_into(span.tensor.name, start * entry.dtype.itemsize, read)
    return Stored(read.view(UNSIGNED[entry.dtype.itemsize]), entry.dtype)


def widened(raw: Raw, dtype: DType, compute: DType, device: str, canonical: bool) -> Tensor:
    """Raw values as a torch tensor of the compute dtype, on a device: exact, and a copy of its own."""
    if not raw.size:
        return torch.empty(0, dtype=torch_dtype(compute), device=device)
    stored: Tensor = torch.from_numpy(raw.view(np.uint8)).view(torch_dtype(dtype))
    wide = stored.to(device=device, dtype=torch_dtype(compute), copy=True)
    return canonical_nan(wide) if canonical else wide


def unit(rows: Rows, compute: DType, device: str = "cpu", canonical: bool = False) -> Unit:
    """What a strategy's ``apply`` sees of a span."""
    span, tensor = rows.span, rows.span.tensor
    xs = tuple(widened(x, dtype, compute, device, canonical) for x, dtype in zip(rows.xs, tensor.dtypes, strict=False))
    base = None if rows.base is None else widened(rows.base, tensor.dtypes[-1], compute, device, canonical)

    def wide(one: Stored) -> Tensor:
        return widened(one.raw, one.dtype, compute, device, canonical)

    stats = {name: tuple(map(wide, having)) for name, having in rows.stats.items()}
    models = {name: wide(one) for name, one in rows.models.items()}
    return Unit(tensor.name, span.start, span.stop, tensor.shape, base, xs, tensor.meta, stats, models)


def compute_dtype(tensor: Merging, compute: str) -> DType:
    """float32 for tensors of 16-bit floats, else float64; always float64 for ``double``."""
    return DTYPES["F32" if compute == "storage" and tensor.half else "F64"]


def quiet_torch() -> None:
    """One thread inside each torch operation of this thread: the blocks are what runs in parallel."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
