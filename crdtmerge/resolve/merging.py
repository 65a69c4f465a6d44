"""A merge from beginning to end: open, digest, order, fit, plan, apply, receipt; its bytes go into a sink."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crdtmerge import limits
from crdtmerge.errors import NeedsError, ParameterError, UsageError, some
from crdtmerge.numerics import fused
from crdtmerge.numerics.dtypes import DType, float_named
from crdtmerge.numerics.guard import require_ieee
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.reduction import BLOCK
from crdtmerge.numerics.workers import Workers
from crdtmerge.recipe import PLAN, Recipe
from crdtmerge.replica.contribution import ROLES, Claim
from crdtmerge.resolve.asking import with_dtype_named
from crdtmerge.resolve.beside import NOTHING, Beside, check_shapes, given_plan, open_beside
from crdtmerge.resolve.blocks import stretch_elements
from crdtmerge.resolve.engine import Digests, Sink, Work, check_inputs, run
from crdtmerge.resolve.fit import Copying, fit
from crdtmerge.resolve.gather import Gathered, Known, gather, known
from crdtmerge.resolve.inner import Running
from crdtmerge.resolve.receipt import Receipt, TensorRow, build_here, inputs_bytes, merge_id
from crdtmerge.resolve.sources import MemorySource, Source, open_source
from crdtmerge.resolve.view import TensorView
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import Needs, Plan, Rng, Strategy
from crdtmerge.weights.cache import DigestCache
from crdtmerge.weights.carried import with_dtype
from crdtmerge.weights.facts import MERGE_ANYWAY, refuse_nonfinite
from crdtmerge.weights.layout import Layout, plan_output

Model = Any
"""A path to a checkpoint, a mapping of names to torch tensors or numpy arrays, or a ``Source``."""

ROWS_BYTES = 64 * limits.MIB
"""Above this many bytes of input rows a thread, stretches get shorter."""


@dataclass(frozen=True)
class Options:
    """How a merge runs; nothing here can change its result."""

    threads: int | None = None
    device: str = "cpu"
    rehash: bool = False
    cache: DigestCache | None = None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    state: Path | None = None
    """Beside which file a long plan keeps its state, to be taken up again."""


class Merge:
    """A merge that is ready to run: inputs read once, ordered, found to fit. Holds files and threads until closed."""

    def __init__(
        self,
        models: Sequence[tuple[Model, Claim]],
        recipe: Recipe,
        base: Model | None,
        options: Options,
        beside: Beside = NOTHING,
    ) -> None:
        """Raises UsageError, NeedsError, InputError and MismatchError, each before anything is written."""
        require_ieee()
        if options.threads is not None and (type(options.threads) is not int or options.threads < 1):
            raise UsageError(f"threads = {options.threads!r}: must be a number from 1 on.")
        recipe = with_dtype_named(recipe)
        self.strategy, self.params, self.needs = needs_of(recipe)
        self.options = options
        _check(recipe, models, base, self.needs)
        self._made: Plan | None = None
        self._extra: list[Copying] | None = None
        self._open = ExitStack()
        try:
            self._prepare(models, recipe, base, beside)
        except BaseException:
            self._open.close()
            raise

    def _prepare(
        self, models: Sequence[tuple[Model, Claim]], recipe: Recipe, base: Model | None, beside: Beside
    ) -> None:
        self.workers = self._open.enter_context(Workers(self.options.threads))
        self.sources = [self._opened(model, f"model {i + 1}") for i, (model, _) in enumerate(models)]
        self.base_source = self._opened(base, "the base") if base is not None else None
        said = [claim for _, claim in models]
        claimed = list(zip(self.sources, said, strict=True))
        self._beside = open_beside(beside, claimed, self.base_source, self.needs, recipe, self._open)
        sizes = [entry.nbytes for source in [*self._inputs, *self._beside.sources] for entry in source.entries.values()]
        read = self._progress("reading", sum(sizes))
        found = [known(source, self.workers, self.options.cache, read) for source in self._inputs]
        if not recipe.allow_nonfinite:
            for one in found:
                refuse_nonfinite(one.facts, recipe.excludes, one.source.where, MERGE_ANYWAY)
        self._beside.read(recipe, self.workers, None if self.options.rehash else self.options.cache, read)
        self._beside.place(found[: len(models)], self.needs)
        base_known = found[-1] if self.base_source else None
        self.gathered: Gathered = gather(list(zip(found, self._beside.claims(said), strict=False)), base_known)
        self.recipe = recipe.completed(
            self.strategy.version, self.params.canonical, base_known.id if base_known else None, self._beside.digests
        )
        self._take_plan(beside.plan, recipe)
        uses_base = self.needs.base == "required" or (self.needs.base == "optional" and base_known is not None)
        merging, self.copying = fit(self.gathered, self.recipe, uses_base)
        ids = [one.id for one in self.gathered.contributions]
        self.merging = [self._beside.of(tensor, ids) for tensor in merging]
        if self.needs.unit == "element":
            check_shapes(self.merging)
        self._known: list[Known] = found
        self.notes = list(self.gathered.notes)
        left_out = set().union(*(source.entries for source in self._inputs)) - {name for name, _, _ in self.tensors()}
        if left_out:
            self.notes.append(f"not in the output, since only some models have it: {some(sorted(left_out))}")
        if base_known and not uses_base:
            self.notes.append(f"{recipe.strategy} does not use a base; only its files are carried over")
        self._files: dict[str, bytes] | None = None

    def _take_plan(self, plan: Plan | str | Path | None, asked: Recipe) -> None:
        """Take the plan that is given, bound to this very merge, and name it in the recipe."""
        unplanned = self.recipe.planned(None)
        self.unplanned_id = merge_id(self.gathered.root, unplanned)
        self._made = given_plan(plan, asked.inputs.get(PLAN), self.needs, asked.strategy, self.unplanned_id)
        self._plan_path = str(Path(plan).resolve()) if self._made and not isinstance(plan, Plan | None) else None
        self.recipe = unplanned.planned(self._made.digest if self._made else None)

    def _opened(self, model: Model, label: str) -> Source:
        source = open_source(model, label)
        self._open.callback(source.close)
        return source

    def _progress(self, stage: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(step: int) -> None:
            nonlocal done
            done += step
            self.options.progress(stage, done, total)

        return advance

    @property
    def bytes_read(self) -> int:
        """Bytes read from all sources so far."""
        return sum(source.bytes_read for source in [*self._inputs, *self._beside.sources])

    @property
    def _inputs(self) -> list[Source]:
        return [*self.sources, *([self.base_source] if self.base_source else [])]

    def tensors(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """The output's tensors in the order of their names."""
        merged = [(t.name, t.out, t.shape) for t in self.merging]
        beside = [(t.name, t.out, t.shape) for t in [*self.copying, *self._extras()]]
        return sorted([*merged, *beside], key=lambda tensor: tensor[0])

    def _extras(self) -> list[Copying]:
        """The plan's own tensors."""
        if type(self.strategy).extras is Strategy.extras:
            return []
        if self._extra is None:
            found = {name: x.contiguous() for name, x in self.strategy.extras(self.plan).items()}
            source = MemorySource(found, f"the plan of {self.recipe.strategy}")
            self._extra = [
                Copying(entry.name, entry.shape, entry.elements, source, entry.dtype, entry.dtype)
                for entry in source.entries.values()
            ]
        return self._extra

    def layout(self, single_file: str | None) -> Layout:
        """The output's files."""
        return plan_output(self.tensors(), single_file=single_file)

    def files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files for a folder: the base's, else the first that are in canonical order."""
        if self._files is None:
            ordered = [self.base_source, *(one.source for one in self.gathered.contributions)]
            found = (source.carried() for source in ordered if source)
            files, notes = next(((files, notes) for files, notes in found if files), ({}, []))
            dtype = float_named(self.recipe.dtype or "")
            self._files = with_dtype(files, dtype.torch_name if dtype else None)
            self.notes += notes
        return self._files

    @property
    def plan(self) -> Plan:
        """What the strategy must know of the whole input: made at the first use. Raises what the strategy raises."""
        if self._made is None:
            with self._one_thread(), closing(self._view()) as view:
                self._made = self.strategy.plan(view, self.params.at, self._rng)
        return self._made

    @cached_property
    def _kernels(self) -> fused.Kernels | None:
        definition_only = self.options.device != "cpu" or self.recipe.allow_nonfinite
        total = sum(entry.nbytes for source in self._inputs for entry in source.entries.values())
        return None if definition_only else fused.choose(total)

    @property
    def _rng(self) -> Rng:
        return Rng(self.recipe.seed_for(self.gathered.root))

    def _view(self) -> TensorView:
        return TensorView(
            self.merging,
            self.workers,
            stretch=self._stretch(),
            kernels=self._kernels,
            compute=self.needs.compute,
            device=self.options.device,
            canonical_nan=self.recipe.allow_nonfinite,
            files=self._beside.files,
            carried=self._beside.carried,
            models=Running(
                self.unplanned_id, self.copying, self._beside.digests, self.options.progress, self.options.state
            ),
        )

    def recall(self, plan: Plan | None) -> None:
        """Use a plan that was made for this very merge before, and is not part of what was asked for."""
        self._made = self._made or plan

    def run(self, sink: Sink, *, folder: bool) -> Receipt:
        """Plan, then write every merged tensor into the sink. Raises what the strategy, sources and sink raise."""
        with self._one_thread():
            digests = self._run(sink)
        for source in [*self._inputs, *self._beside.sources]:
            source.check_unchanged()
        if self.options.rehash:
            self._beside.check_read()
        return self._receipt(digests, folder)

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """One thread inside operations of torch, and of BLAS in exact products: tensors are what runs in parallel.

        Afterwards they have the threads that they had, torch if it was loaded.
        """
        threads = torch.get_num_threads() if "torch" in sys.modules else None
        with ExitStack() as limited:
            if threads is not None:
                limited.callback(torch.set_num_threads, threads)
            if self.needs.unit == "tensor" and self.needs.exact:
                limited.enter_context(_blas().limit(limits=1))
            yield

    def _run(self, sink: Sink) -> Digests:
        work = Work(
            self.strategy,
            self.needs,
            self.params,
            self.plan,
            self._rng,
            self._kernels,
            self.options.device,
            self.recipe.allow_nonfinite,
        )
        total = sum(t.elements * t.out.itemsize for t in self.merging)
        written = self._progress("merging", total)
        digests = run(
            work,
            self.merging,
            [*self.copying, *self._extras()],
            sink,
            self.workers,
            stretch=self._stretch(),
            rehash=self.options.rehash,
            progress=written,
        )
        expected = {id(one.source): {name: fact.digest for name, fact in one.facts.items()} for one in self._known}
        check_inputs(digests, expected, [one.source for one in self._known])
        return digests

    def _stretch(self) -> int:
        """Elements of a stretch, shorter where many models would make the rows of one too large."""
        fitting = ROWS_BYTES // (8 * (len(self.gathered.contributions) + 1)) // BLOCK * BLOCK
        return min(stretch_elements(), max(fitting, BLOCK))

    @property
    def build(self) -> str | None:
        """What the bytes depend on besides inputs and recipe: nothing for class E, this build for class P."""
        exact = self.needs.exact and (self.needs.plan != "model" or PLAN in self.recipe.inputs)
        return None if exact else build_here(self.options.device)

    def _receipt(self, digests: Digests, folder: bool) -> Receipt:
        return Receipt(
            self.recipe,
            tuple((one.id, one.claim) for one in self.gathered.contributions),
            tuple(TensorRow(name, dtype.name, shape, digests.outputs[name]) for name, dtype, shape in self.tensors()),
            {name: hashlib.sha256(data).hexdigest() for name, data in self.files().items()} if folder else {},
            self.build is None,
            self.build,
        )

    def inputs(self) -> bytes:
        """``inputs.json``: where the contents were found, as absolute paths; null for those that were in memory."""
        base = (self.gathered.base.id, _path(self.gathered.base.source)) if self.gathered.base else None
        beside = self._beside
        stats = {
            content: {name: _path(source) for name, source in held.items()} for content, held in beside.stats.items()
        }
        inputs = {name: _path(source) for name, source in beside.models.items()}
        inputs |= {name: str(path.resolve()) for name, path in beside.files.items()}
        inputs |= {PLAN: self._plan_path} if PLAN in self.recipe.inputs else {}
        return inputs_bytes([(one.id, _path(one.source)) for one in self.gathered.contributions], base, stats, inputs)

    def close(self) -> None:
        """Let go of files and threads."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _path(source: Source) -> str | None:
    return str(source.path.resolve()) if source.path else None


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def needs_of(recipe: Recipe) -> tuple[Strategy[Any], Filled[Any], Needs]:
    """A recipe's strategy, its parameters filled in, and what it needs. Raises UsageError."""
    strategy = registry.get(recipe.strategy)
    params: Filled[Any] = Filled(recipe.strategy, strategy.Params, recipe.params)
    return strategy, params, combined([strategy.needs(p) for p in params.variants()])


def combined(needs: Sequence[Needs]) -> Needs:
    """What all variants of a recipe's parameters need together."""
    first = needs[0]
    bases, plans = ("unused", "optional", "required"), ("none", "scan", "model")
    return first._replace(
        base=max((one.base for one in needs), key=bases.index),
        plan=max((one.plan for one in needs), key=plans.index),
        roles=tuple(role for role in first.roles if all(role in one.roles for one in needs)),
        exact=all(one.exact for one in needs),
        unit="tensor" if any(one.unit == "tensor" for one in needs) else "element",
        stats=tuple(sorted(set().union(*(one.stats for one in needs)))),
        models=tuple(sorted(set().union(*(one.models for one in needs)))),
        inputs=tuple(sorted(set().union(*(one.inputs for one in needs)))),
        weights="nonnegative" if any(one.weights == "nonnegative" for one in needs) else "any",
    )


def _check(recipe: Recipe, models: Sequence[tuple[Model, Claim]], base: Model | None, needs: Needs) -> None:
    """What can be refused before a file is opened."""
    name = recipe.strategy
    if needs.base == "required" and base is None:
        raise NeedsError(
            f"strategy '{name}' needs a base: the model from which all were fine-tuned. Give it with --base."
        )
    if recipe.missing == "base" and base is None:
        raise NeedsError("--missing base takes what is missing from the base: give it with --base.")
    if not needs.min_k <= len(models) <= (needs.max_k or limits.CONTRIBUTIONS_MAX):
        most = needs.max_k or limits.CONTRIBUTIONS_MAX
        raise UsageError(f"strategy '{name}' merges {needs.min_k} to {most} models; {len(models)} given.")
    for position, (model, claim) in enumerate(models, 1):
        label = model.label if isinstance(model, Source) else f"model {position}"
        if claim.role not in needs.roles:
            raise UsageError(
                f"{label} has role {claim.role!r}; strategy '{name}' merges {', '.join(needs.roles)} "
                f"(roles are {', '.join(ROLES)})."
            )
        if needs.weights == "nonnegative" and claim.weight < 0:
            raise ParameterError(f"{label} has weight {claim.weight}; strategy '{name}' takes none below 0.")
