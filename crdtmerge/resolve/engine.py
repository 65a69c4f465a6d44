"""Pass 2: apply a strategy to every tensor, stretch by stretch, from sources into a sink, and digest what comes out.

Rules: memory is a few stretches a thread, whatever the size or number of models; a span of the output is whole pieces
of its digest, computed, hashed and written by one thread while it is in the cache; nothing depends on which thread.
With ``rehash`` the very bytes that are merged are hashed too and compared with the digests that name the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import ChangedError, NonFiniteError
from crdtmerge.numerics.dtypes import DTYPES, DType
from crdtmerge.numerics.finite import nonfinite
from crdtmerge.numerics.fused import UNSIGNED, Kernel, Kernels, Raw
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.rounding import canonical_nan, round_to
from crdtmerge.numerics.workers import Workers
from crdtmerge.resolve.blocks import Reader, Rows, Span, compute_dtype, quiet_torch, spans, unit, widened, within
from crdtmerge.resolve.fit import Copying, Merging
from crdtmerge.resolve.sources import Source
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import Needs, Plan, Rng, Strategy
from crdtmerge.weights.digests import piece_digests, tensor_digest

SPAN = limits.PIECE_BYTES
"""Elements of one piece of work: whole pieces of the digest for every dtype."""

WHOLE = 1 << 62
"""Elements of one piece of work of a strategy that takes whole tensors."""


class Sink(Protocol):
    """Where merged bytes go."""

    def write(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Take a stretch of a tensor's bytes; called from any thread."""
        ...


@dataclass(frozen=True)
class Work:
    """A strategy ready to run: plan made, parameters filled in."""

    strategy: Strategy[Any]
    needs: Needs
    params: Filled[Any]
    plan: Plan
    rng: Rng
    kernels: Kernels | None
    device: str = "cpu"
    allow_nonfinite: bool = False


@dataclass
class Digests:
    """Digests of output tensors by name; of what was read, by (source, tensor), if asked to rehash."""

    outputs: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[tuple[int, str], bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    pieces: bytes
    read: dict[int, bytes]


def run(
    work: Work,
    merging: Sequence[Merging],
    copying: Sequence[Copying],
    sink: Sink,
    workers: Workers,
    *,
    stretch: int,
    rehash: bool = False,
    progress: Callable[[int], None] = lambda written: None,
) -> Digests:
    """Write every tensor into the sink. Raises NonFiniteError, ChangedError and what sources and sink raise."""
    digests = Digests()
    whole = work.needs.unit == "tensor"
    length = WHOLE if whole else SPAN
    step = length if rehash or whole else stretch
    engine = _Engine(work, sink, step, rehash)
    merged = workers.map(engine.merge, _merge_spans(merging, length))
    _collect(digests, merged, {t.name: t for t in merging}, progress)
    _collect(digests, workers.map(engine.copy, _copy_spans(copying)), {t.name: t for t in copying}, progress)
    return digests


def _merge_spans(merging: Sequence[Merging], length: int) -> Iterator[Span]:
    for tensor in merging:
        yield from spans(tensor, length)


def _copy_spans(copying: Sequence[Copying]) -> Iterator[tuple[Copying, int, int]]:
    for tensor in copying:
        for start in range(0, max(tensor.elements, 1), SPAN):
            yield tensor, start, min(tensor.elements, start + SPAN)


def _collect(
    digests: Digests,
    parts: Iterator[tuple[str, int, _Part]],
    tensors: dict[str, Merging] | dict[str, Copying],
    progress: Callable[[int], None],
) -> None:
    """Join the pieces of each tensor, whose parts come in order, into its digests."""
    pieces: dict[str, list[_Part]] = {name: [] for name in tensors}
    for name, written, part in parts:
        pieces[name].append(part)
        progress(written)
    for name, found in pieces.items():
        tensor = tensors[name]
        digests.outputs[name] = tensor_digest(tensor.out, tensor.shape, b"".join(part.pieces for part in found))
        for source in found[0].read:
            entry = _entry(tensor, source)
            joined = b"".join(part.read[source] for part in found)
            digests.inputs[source, name] = tensor_digest(entry, tensor.shape, joined)


def _entry(tensor: Merging | Copying, source: int) -> DType:
    sources = (
        [tensor.source] if isinstance(tensor, Copying) else [*tensor.sources, *([tensor.base] if tensor.base else [])]
    )
    return next(one.entries[tensor.name].dtype for one in sources if id(one) == source)


class _Engine:
    def __init__(self, work: Work, sink: Sink, stretch: int, rehash: bool) -> None:
        self._work, self._sink, self._stretch, self._rehash = work, sink, stretch, rehash
        self._reader = Reader()
        self._ready: dict[str, Kernel | None] = {}

    def copy(self, span: tuple[Copying, int, int]) -> tuple[str, int, _Part]:
        """Carry a span over, rounded if the output dtype is another."""
        tensor, start, stop = span
        read = np.empty((stop - start) * tensor.dtype.itemsize, np.uint8)
        tensor.source.read_into(tensor.name, start * tensor.dtype.itemsize, read)
        data = read if tensor.out == tensor.dtype else _rounded(read, tensor.dtype, tensor.out)
        self._sink.write(tensor.name, start * tensor.out.itemsize, data)
        own = {id(tensor.source): piece_digests(read)} if self._rehash else {}
        return tensor.name, data.nbytes, _Part(piece_digests(data), own)

    def merge(self, span: Span) -> tuple[str, int, _Part]:
        """Merge, check, hash and write a span."""
        tensor = span.tensor
        out = np.empty(span.stop - span.start, UNSIGNED[tensor.out.itemsize])
        read: dict[int, bytes] = {}
        for stretch in within(span, self._stretch):
            rows = self._reader.read(stretch)
            if self._rehash:
                read |= _hashed(rows)
            if stretch.stop > stretch.start:
                self._fill(rows, out[stretch.start - span.start : stretch.stop - span.start])
        data = out.view(np.uint8)
        if not self._work.allow_nonfinite:
            _require_finite(data, span)
        self._sink.write(tensor.name, span.start * tensor.out.itemsize, data)
        return tensor.name, data.nbytes, _Part(piece_digests(data), read)

    def _fill(self, rows: Rows, out: Raw) -> None:
        kernel = self._kernel(rows.span.tensor)
        if kernel and rows.stack is not None:
            kernel(rows.stack, rows.base, out, rows.span.start)
        else:
            self._define(rows, out)

    def _kernel(self, tensor: Merging) -> Kernel | None:
        work = self._work
        if not work.kernels or tensor.dtype is None:
            return None
        if tensor.name not in self._ready:
            program = work.strategy.program(tensor.name, tensor.meta, work.plan, work.params.at(tensor.name), work.rng)
            self._ready[tensor.name] = work.kernels.program(program, tensor.dtype, tensor.out) if program else None
        return self._ready[tensor.name]

    def _define(self, rows: Rows, out: Raw) -> None:
        """The definition: the strategy's own ``apply``, in torch, rounded once."""
        quiet_torch()
        work, tensor = self._work, rows.span.tensor
        compute = compute_dtype(tensor, work.needs.compute)
        u = unit(rows, compute, work.device, work.allow_nonfinite)
        merged = work.strategy.apply(u, work.plan, work.params.at(tensor.name), work.rng)
        rounded = round_to(merged, tensor.out)
        rounded = canonical_nan(rounded) if work.allow_nonfinite else rounded
        out.view(np.uint8)[:] = rounded.cpu().contiguous().view(torch.uint8).numpy()


def _rounded(read: NDArray[np.uint8], dtype: DType, out: DType) -> NDArray[np.uint8]:
    """Stored values in another dtype."""
    wide = widened(read, dtype, DTYPES["F64"], "cpu", canonical=False)
    rounded: NDArray[np.uint8] = round_to(wide, out).view(torch.uint8).numpy() if read.size else read
    return rounded


def _hashed(rows: Rows) -> dict[int, bytes]:
    """Pieces of what was read, by source: a span of whole pieces is read at once when hashing again."""
    tensor = rows.span.tensor
    hashed = {id(source): piece_digests(x) for source, x in zip(tensor.sources, rows.xs, strict=True)}
    return hashed | ({id(tensor.base): piece_digests(rows.base)} if rows.base is not None else {})


def _require_finite(data: NDArray[np.uint8], span: Span) -> None:
    found = nonfinite(data, span.tensor.out)
    if found:
        raise NonFiniteError(
            f"tensor {span.tensor.name!a}: {found[0]} merged values, the first at index {span.start + found[1]}, are "
            f"too large for {span.tensor.out.name}. Lower the weights or lambda, or choose a wider --dtype."
        )


def check_inputs(digests: Digests, facts: dict[int, dict[str, bytes]], sources: Sequence[Source]) -> None:
    """Raise ChangedError if the bytes that were merged are not those that named the inputs."""
    for (source, name), found in digests.inputs.items():
        expected = facts[source][name]
        if found != expected:
            label = next(one.where(name) for one in sources if id(one) == source)
            raise ChangedError(
                f"{label}: tensor {name!a} changed while it was merged (digest {expected.hex()[:16]} expected, "
                f"{found.hex()[:16]} read). Merge again when nothing writes to it."
            )
