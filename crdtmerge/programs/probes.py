"""Inputs to look at models with: examples of the data, or made-up ones that are the same on every machine.

    data     so many examples of the data, evenly from the first to the last
    noise    floats are standard normal (Box and Muller's transform of counter-based random words, by IEEE operations
             alone); whole numbers are uniform over the rows of the embedding that they index, or 0 and 1

A program that was exported for a fixed number of examples gets that many at a time, and the last examples that do not
fill it are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crdtmerge.errors import NeedsError, UsageError
from crdtmerge.numerics import elementary, philox
from crdtmerge.programs.context import Context
from crdtmerge.programs.exported import Batches, Program, kind_of

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64

NOISE = 512
"""Made-up examples where their number is not given."""

LENGTH = 16
"""What a made-up input measures along a dimension other than the first that the program leaves open, if it may."""

_CLASSES = 2

MOVING = ("view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "transpose", "permute", "to", "clone")
"""Operators that move values and change none."""

_TERMS = tuple(1.0 / math.factorial(n) for n in range(18))
"""1/n!: for |x| <= pi/4 what is left out of sin x and cos x is below 2^-57."""


def probe(context: Context) -> list[Batches]:
    """The examples of a job with the parameters probe, seed and examples, in batches of at most 64.

    Batches are of nearly equal lengths. Raises UsageError for another probe or fewer than one example, NeedsError where
    the data is missing or too little, or where nothing can be made up.
    """
    kind, count = context.params["probe"], context.params.get("examples")
    if count is not None and count < 1:
        raise UsageError(f"examples = {count}: must be at least one.")
    if kind == "noise":
        examples = _noise(context.program, bytes.fromhex(context.params["seed"]), NOISE if count is None else count)
    elif kind == "data":
        examples = _evenly(context.one_task(), count)
    else:
        raise UsageError(f"probe = {kind!a}: must be data or noise.")
    fixed, size = _fixed(context.program), examples.size
    if fixed is not None:
        if size < fixed:
            raise NeedsError(f"the program runs {fixed} examples at a time; {size} are given.")
        return [examples.part(start, start + fixed) for start in range(0, size - fixed + 1, fixed)]
    parts = -(-size // BATCH)
    cuts = [size * i // parts for i in range(parts + 1)]
    return [examples.part(start, stop) for start, stop in itertools.pairwise(cuts)]


def _evenly(data: Batches, count: int | None) -> Batches:
    if count is None or count >= data.size:
        return data
    index = torch.arange(count, device=data.inputs[0].device) * data.size // count
    return Batches(data.task, tuple(x[index] for x in data.inputs), None)


def normals(s: philox.Stream, count: int) -> Tensor:
    """So many standard normal numbers, float32: each depends on the stream and its place alone.

    >>> s = philox.stream(b"seed", "noise", b"", "x")
    >>> x = normals(s, 10_000).double()
    >>> bool(x.mean().abs() < 0.03), bool((x.std() - 1).abs() < 0.03)
    (True, True)
    """
    pairs = -(-count // 2)
    u = (philox.words(s, 0, 2 * pairs).numpy().astype(np.float64) * 2 + 1) / 2.0**33
    radius = elementary.sqrt(-2.0 * elementary.log(u[0::2]))
    quarter = np.rint(4 * u[1::2])
    angle = (u[1::2] - quarter / 4) * math.tau
    square = -(angle * angle)
    sine, cosine = np.zeros(pairs), np.zeros(pairs)
    for n in range(len(_TERMS) - 2, -1, -2):
        sine, cosine = sine * square + _TERMS[n + 1], cosine * square + _TERMS[n]
    sine = sine * angle
    turns = quarter.astype(np.int64) % 4
    x = np.choose(turns, [cosine, -sine, -cosine, sine])
    y = np.choose(turns, [sine, cosine, -sine, -cosine])
    return torch.from_numpy(np.stack([radius * x, radius * y], axis=1).reshape(-1)[:count].astype(np.float32))


def _noise(program: Program, seed: bytes, count: int) -> Batches:
    """Made-up examples, at least ``count`` where a number is fixed."""
    fixed = _fixed(program)
    batch = count if fixed is None else -(-count // fixed) * fixed
    made = []
    for at, node in enumerate(_inputs(program)):
        value = node.meta["val"]
        shape = [batch, *(_length(program, size) for size in value.shape[1:])]
        s = philox.stream(seed, "noise", b"", str(at))
        if value.dtype.is_floating_point:
            x = normals(s, math.prod(shape))
        else:
            rows = 2 if value.dtype == torch.bool else _rows(program, node)
            x = (philox.words(s, 0, math.prod(shape)) * rows) >> 32
        made.append(x.reshape(shape).to(device=program.device, dtype=value.dtype))
    return Batches("", tuple(made), None)


def _inputs(program: Program) -> list[Any]:
    """The graph's nodes of the user's inputs. Raises NeedsError for one that is no tensor of examples."""
    names = program.exported.graph_signature.user_inputs
    nodes = [node for node in program.graph.graph.nodes if node.op == "placeholder" and node.name in names]
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.shape or value.dtype.is_complex:
            raise NeedsError(
                f"the program's input {node.name!a} is no tensor with a dimension of examples; export one that has."
            )
    return nodes


def _fixed(program: Program) -> int | None:
    """The number of examples that a program was exported for; None where any number will do."""
    sizes = [node.meta["val"].shape[0] for node in _inputs(program)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _length(program: Program, size: Any) -> int:
    """A size of a dimension: itself, or of one that the program leaves open, near 16 within its bounds."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    chosen = {}
    for symbol in expression.free_symbols:
        bounds = program.exported.range_constraints.get(symbol)
        low, high = (LENGTH, LENGTH) if bounds is None else (bounds.lower, bounds.upper)
        chosen[symbol] = low if low > LENGTH else high if high < LENGTH else LENGTH
    return int(expression.subs(chosen))


def _rows(program: Program, node: Any) -> int:
    """The least number of rows of the embeddings that an input indexes; 2 if none is known."""
    found = [int(user.args[0].meta["val"].shape[0]) for user in _indexing(node)]
    return min(found, default=_CLASSES)


def _indexing(node: Any) -> Iterator[Any]:
    for user in node.users:
        if kind_of(user) == "embedding" and user.args[1] is node:
            yield user
        elif kind_of(user) in MOVING and user.args[0] is node:
            yield from _indexing(user)
