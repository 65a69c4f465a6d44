"""One call from models to a merged model in memory, and from there to files.

>>> import numpy as np
>>> a, b = {"w": np.float32([1, 3])}, {"w": np.float32([3, 5])}
>>> merged = merge([a, b], strategy="weight_average")
>>> merged["w"].tolist()
[2.0, 4.0]
>>> merged.receipt.merge_id == merge([b, a], strategy="weight_average").receipt.merge_id
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crdtmerge.errors import UsageError
from crdtmerge.recipe import Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve.asking import claims, recipe_of
from crdtmerge.resolve.beside import NOTHING, Beside
from crdtmerge.resolve.memory import Memory
from crdtmerge.resolve.merging import Merge, Model, Options
from crdtmerge.resolve.receipt import Receipt
from crdtmerge.strategies.protocol import Plan
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.layout import plan_output
from crdtmerge.weights.place import RECEIPT_NAME
from crdtmerge.weights.writer import Output

if TYPE_CHECKING:
    from torch import Tensor


class Merged(Mapping[str, "Tensor"]):
    """A merged model: name to torch tensor (a copy, so that nothing changes what was merged), ``receipt``, ``save``."""

    def __init__(
        self, receipt: Receipt, memory: Memory, files: Mapping[str, bytes], inputs: bytes, notes: Sequence[str]
    ) -> None:
        self.receipt, self.notes = receipt, tuple(notes)
        self._memory, self._files, self._inputs = memory, files, inputs

    def __getitem__(self, name: str) -> Tensor:
        return self._memory.tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory.tensors)

    def __len__(self) -> int:
        return len(self._memory.tensors)

    def save(self, path: str | Path) -> None:
        """Write a folder, or one file if the path ends in .safetensors, with the receipt. Raises OutputError."""
        path = Path(path)
        folder = is_folder(path)
        receipt = self.receipt if folder else _without_files(self.receipt)
        tensors = [(name, dtype, shape) for name, (dtype, shape, _) in self._memory.tensors.items()]
        with Output(path, plan_output(tensors, single_file=None if folder else path.name), folder=folder) as output:
            for name, (_, _, data) in self._memory.tensors.items():
                output.write(name, 0, data)
            publish(output, receipt, self._inputs, self._files if folder else {})


def _without_files(receipt: Receipt) -> Receipt:
    return Receipt(receipt.recipe, receipt.contributions, receipt.tensors, {}, receipt.exact, receipt.build)


def is_folder(path: Path) -> bool:
    """Whether an output path means a checkpoint folder (everything but a name ending in .safetensors)."""
    return path.suffix != ".safetensors"


def publish(output: Output, receipt: Receipt, inputs: bytes, files: Mapping[str, bytes]) -> float:
    """Add the carried files, receipt and inputs to an output and make it appear; seconds spent in fsync."""
    for name, data in files.items():
        output.add(name, data)
    prefix = "" if output.folder else f"{output.path.name}."
    output.add(f"{prefix}inputs.json", inputs)
    output.add(f"{prefix}{RECEIPT_NAME}", receipt.to_bytes())
    return output.commit()


def into_files(one: Merge, out: Path) -> tuple[Receipt, float, int]:
    """Run a merge into a folder or file: (receipt, seconds of fsync, bytes written). Raises OutputError."""
    folder = is_folder(out)
    layout = one.layout(None if folder else out.name)
    with Output(out, layout, folder=folder) as output:
        receipt = one.run(output, folder=folder)
        fsync_seconds = publish(output, receipt, one.inputs(), one.files() if folder else {})
    return receipt, fsync_seconds, layout.nbytes


def merge(
    models: Sequence[Model],
    *,
    strategy: str | Recipe,
    base: Model | None = None,
    weights: Sequence[object] | None = None,
    roles: Sequence[str] | None = None,
    tasks: Sequence[str | None] | None = None,
    stats: Sequence[Mapping[str, Any] | None] | None = None,
    inputs: Mapping[str, Any] | None = None,
    plan: Plan | str | Path | None = None,
    dtype: str | None = None,
    missing: Any = None,
    exclude: Sequence[str] = (),
    allow_nonfinite: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    rehash: bool = False,
    **params: Any,
) -> Merged:
    """Merge models into memory.

    Args:
        models: paths of checkpoints (files or folders) or state dicts, in any order.
        strategy: a name of the registry, or a whole ``Recipe``.
        base: the model from which they were fine-tuned, for strategies that need it.
        weights: one number for each model, exact decimals; 1 by default.
        roles, tasks: what each model is for; see ``crdtmerge.replica.contribution``.
        stats: for each model its statistics by name (``fisher``, ``gram``), as a file or a mapping of names to arrays.
        inputs: what else the strategy reads, by name: further models, programs, batches.
        plan: made for this very merge by ``crdtmerge plan``, a file or a ``Plan``; it is applied and not made again.
        dtype: of the result; by default that of the inputs.
        missing: ``"base"`` or ``"skip"`` for tensors that some models lack; by default they are refused.
        exclude: globs of tensors that are copied (from the base, else the first in canonical order) instead of merged.
        allow_nonfinite: take NaN and infinity in the inputs; they propagate as IEEE 754 has it.
        threads, device, rehash: how it runs; never what comes out.
        **params: the strategy's own, ``seed``, ``t`` for two models, and ``align`` to bring units into one order first.

    Returns:
        A mapping of names to torch tensors, with ``receipt`` and ``save(path)``.

    Raises:
        CrdtMergeError: everything that is wrong with the inputs or the request, by kind; see ``crdtmerge.errors``.
    """
    asked = {"dtype": dtype, "missing": missing, "exclude": exclude, "allow_nonfinite": allow_nonfinite}
    if isinstance(strategy, Recipe):
        recipe, t = strategy, params.pop("t", None)
        twice = sorted([*params, *(name for name, value in asked.items() if value)])
        if twice:
            raise UsageError(f"{', '.join(twice)}: say it in the recipe that was given, not beside it.")
    else:
        recipe, t = recipe_of(strategy, params, **asked)
    said = claims(len(models), weights=weights, t=t, roles=roles, tasks=tasks)
    options = Options(threads=threads, device=device, rehash=rehash, cache=DigestCache())
    beside = Beside(() if stats is None else stats, {} if inputs is None else inputs, plan)
    return into_memory(list(zip(models, said, strict=True)), recipe, base, options, beside)


def into_memory(
    models: Sequence[tuple[Model, Claim]],
    recipe: Recipe,
    base: Model | None,
    options: Options,
    beside: Beside = NOTHING,
) -> Merged:
    """Merge models with their claims into memory."""
    with Merge(models, recipe, base, options, beside) as one:
        memory = Memory(one.tensors())
        receipt = one.run(memory, folder=True)
        return Merged(receipt, memory, one.files(), one.inputs(), one.notes)
