"""What a plan does with whole models: merge them inside itself, run a program on them, score merges of them.

RULES
1. A merge inside a plan is a strategy's own plan and the engine, over the same tensors in the same order, rounded to
   the output dtype: what is scored is what would be published.
2. A program is run in a process of its own (``programs``), only if its digest is the one that the recipe names.
3. A long plan is taken up where it stopped, if ``Running.state`` says where its state is kept: the steps of a job, and
   every score that was computed. State of another merge, job or program is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crdtmerge.canonical import decimal_text, digest
from crdtmerge.errors import InputError, MismatchError, NeedsError, UsageError
from crdtmerge.numerics.fused import Kernels
from crdtmerge.numerics.lazy import torch
from crdtmerge.numerics.workers import Workers
from crdtmerge.programs.messages import receive, send, unpacked
from crdtmerge.programs.runner import Runner, dataless
from crdtmerge.resolve.beside import MADE_BY, file_digest
from crdtmerge.resolve.engine import Work, run
from crdtmerge.resolve.fit import Copying, Merging
from crdtmerge.resolve.memory import Memory, viewed
from crdtmerge.resolve.plan_file import put
from crdtmerge.resolve.sources import Source
from crdtmerge.strategies import registry
from crdtmerge.strategies.parameters import Filled
from crdtmerge.strategies.protocol import Inner, Plan, Ran, Rng, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from crdtmerge.resolve.view import TensorView

DATA_BYTES_MAX = 64 << 30
"""A file of batches; it is read into memory."""


@dataclass(frozen=True)
class Running:
    """How programs run: in which merge, tensors that are not merged, the inputs' digests, who asks how far it is."""

    merge: bytes = b""
    copying: Sequence[Copying] = ()
    digests: Mapping[str, bytes] = field(default_factory=dict)
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    state: Path | None = None


NOTHING_RUNS = Running()


class Inside:
    """A merge inside a plan, ready to run."""

    def __init__(self, inner: Inner, tensors: Sequence[Merging], view: TensorView, rng: Rng) -> None:
        """Raises what the strategy's parameters raise."""
        self._strategy = registry.get(inner.strategy)
        self._params: Filled[Any] = Filled(inner.strategy, self._strategy.Params, inner.params)
        self._needs = self._strategy.needs(self._params.general)
        if any(p.plan == "model" for p in map(self._strategy.needs, self._params.variants())):
            raise UsageError(f"inner = {inner.strategy}: runs a model itself; give a strategy that does not.")
        self._tensors = [_weighted(tensor, inner) for tensor in tensors]
        self._view, self._rng = view, rng

    @cached_property
    def plan(self) -> Plan:
        """The inner strategy's own plan."""
        view = self._view.over(self._tensors, self._needs.compute)
        return self._strategy.plan(view, self._params.at, self._rng)

    def merged(self, workers: Workers, kernels: Kernels | None, stretch: int) -> dict[str, Tensor]:
        """The merged tensors, in the output dtype."""
        memory = Memory([(tensor.name, tensor.out, tensor.shape) for tensor in self._tensors])
        work = Work(self._strategy, self._needs, self._params, self.plan, self._rng, kernels)
        run(work, self._tensors, [], memory, workers, stretch=stretch)
        return {name: memory.tensor(name) for name in memory.tensors}


def _weighted(tensor: Merging, inner: Inner) -> Merging:
    """A tensor whose contributions have the weights of an inner merge."""
    if inner.weights is None:
        return tensor
    weights = inner.weights[tensor.name]
    return replace(tensor, meta=tuple(m._replace(weight=w) for m, w in zip(tensor.meta, weights, strict=True)))


class Programs:
    """Runs programs for a view, over the view's tensors. Holds a process from the first use until closed."""

    def __init__(
        self, tensors: Sequence[Merging], view: TensorView, running: Running, files: Mapping[str, Path]
    ) -> None:
        self._tensors, self._view, self._running, self._files = tensors, view, running, files
        self._runner: Runner | None = None
        self._scores: _Scores | None = None

    def inside(self, inner: Inner, rng: Rng) -> Inside:
        """A merge inside the plan."""
        return Inside(inner, self._tensors, self._view, rng)

    def run(
        self,
        job: str,
        params: Mapping[str, Any],
        groups: Callable[[Unit], Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
        rng: Rng,
        models: Mapping[str, Inner],
    ) -> Ran:
        """Run a job. Raises NeedsError for a missing input, and what the job raises."""
        runner = self._started(fed=not dataless(params))
        names = list(models)
        for group, inner in models.items():
            runner.keep(group, self._view.merged(self.inside(inner, rng)))
        if callable(groups):
            for tensor in self._tensors:
                for group, x in groups(self._view.whole(tensor.name)).items():
                    runner.keep(group, {tensor.name: x}, anew=group not in names)
                    names += [group] if group not in names else []
        else:
            for group, new in groups.items():
                runner.keep(group, new, anew=False)
                names.append(group)
        state = self._running.state if callable(groups) else None
        steps = _Steps(state, self._key("run", [job, _plain(params), _plain(models), rng.seed]))
        found = runner.run(
            job,
            params,
            names,
            progress=lambda done, total: self._running.progress("planning", done, total),
            save=steps.save,
            resumed=steps.resumed(),
        )
        return Ran(found.values, found.tensors)

    def score(self, metric: str, inner: Inner, rng: Rng, done: tuple[int, int]) -> float:
        """The fitness of an inner merge; one that was computed before, for this very merge, is remembered."""
        if self._scores is None:
            self._scores = _Scores(self._running.state, self._key("score", []))
        key = digest("score", [metric, _plain(inner)]).hex()
        found = self._scores.get(key)
        if found is None:
            runner = self._started()
            runner.keep("model", self._view.merged(self.inside(inner, rng)))
            found = float.fromhex(str(runner.run("fitness", {"metric": metric}, ["model"]).values["score"]))
            self._scores.add(key, found)
        self._running.progress("planning", *done)
        return found

    def close(self) -> None:
        """End the process."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        if self._scores is not None:
            self._scores.close()
            self._scores = None

    def _started(self, *, fed: bool = True) -> Runner:
        """The process; given the data, which must be there if it is to be fed."""
        program = self._named("program")
        if fed:
            self._named("data")
        if self._runner is None:
            data = batches_of(self._files["data"], self._running.digests.get("data")) if "data" in self._files else None
            known = self._running.digests.get("program") or file_digest(program, "the program")
            self._runner = Runner(program, known, device=self._view.device)
            if data is not None:
                self._runner.keep("data", data)
            self._runner.keep(
                "rest", {tensor.name: whole(tensor.source, tensor.name) for tensor in self._running.copying}
            )
        return self._runner

    def _named(self, name: str) -> Path:
        if name not in self._files:
            raise NeedsError(f"this plan needs the input '{name}'{MADE_BY[name]}: give it with --input {name}=PATH.")
        return self._files[name]

    def _key(self, kind: str, what: list[Any]) -> str:
        """Names all that a state depends on; the merge's id covers contributions, base, inputs and parameters."""
        build = f"torch {torch.__version__} {self._view.device}"
        return digest("state", [kind, build, self._running.merge, *what]).hex()


def _plain(value: Any) -> str:
    """Parameters as one text."""
    if isinstance(value, Inner):
        weights = {n: [decimal_text(w) for w in ws] for n, ws in (value.weights or {}).items()}
        return json.dumps([value.strategy, dict(value.params), weights], sort_keys=True, default=str)
    if isinstance(value, Mapping):
        return json.dumps({k: _plain(v) if isinstance(v, Inner) else v for k, v in value.items()}, sort_keys=True)
    raise AssertionError("parameters are maps or inner merges")


def whole(source: Source, name: str) -> Tensor:
    """A tensor of a source, in its own dtype and shape."""
    entry = source.entries[name]
    data = np.empty(entry.nbytes, np.uint8)
    source.read_into(name, 0, data)
    return viewed(data, entry.dtype, entry.shape)


def batches_of(path: Path, named: bytes | None) -> dict[str, Tensor]:
    """The data, if its digest is the one that is named. Raises InputError, MismatchError."""
    try:
        if path.stat().st_size > DATA_BYTES_MAX:
            raise InputError(f"{path}: data of more than {DATA_BYTES_MAX} bytes is not read.")
        data = path.read_bytes()
    except OSError as fault:
        raise InputError(f"{path}: the data cannot be read: {fault.strerror or fault}.") from fault
    found = hashlib.sha256(data).digest()
    if named is not None and found != named:
        raise MismatchError(f"{path}: the data has digest {found.hex()[:16]}; {named.hex()[:16]} is named.")
    try:
        return unpacked(data)
    except InputError as fault:
        raise InputError(f"{path}: {fault}") from None


class _Steps:
    """The state of a job between its steps, as a file."""

    def __init__(self, state: Path | None, key: str) -> None:
        self._path = state.with_name(f"{state.name}.steps") if state else None
        self._key = key

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the saved state."""
        if self._path is not None:
            written = io.BytesIO()
            send(written, {"key": self._key, "step": step}, tensors)
            put(self._path, written.getvalue())

    def resumed(self) -> tuple[int, Mapping[str, Tensor]] | None:
        """The saved state of this very job, if there is one."""
        try:
            read = receive(io.BytesIO(self._path.read_bytes())) if self._path else None
        except (OSError, InputError):
            return None
        if read is None or read[0].get("key") != self._key:
            return None
        return int(read[0]["step"]), read[1]


class _Scores:
    """Scores by candidate, as lines of a file: what was computed before a search stopped is not computed again."""

    def __init__(self, state: Path | None, key: str) -> None:
        self._path = state.with_name(f"{state.name}.scores") if state else None
        self._found = self._read(key)
        self._file = None
        if self._path is not None:
            put(self._path, "".join(map(_line, [(key,), *self._known()])).encode())
            self._file = self._path.open("a")

    def get(self, candidate: str) -> float | None:
        """The score of a candidate, if it is known."""
        return self._found.get(candidate)

    def add(self, candidate: str, score: float) -> None:
        """Remember a score."""
        self._found[candidate] = score
        if self._file is not None:
            self._file.write(_line((candidate, score.hex())))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _known(self) -> Iterator[tuple[str, str]]:
        return ((candidate, score.hex()) for candidate, score in self._found.items())

    def _read(self, key: str) -> dict[str, float]:
        """The scores of this very merge; a last line that was cut off is not one of them."""
        try:
            first, *lines = self._path.read_text().split("\n")[:-1] if self._path else [""]
        except (OSError, ValueError):
            return {}
        found = {}
        for line in lines if first == key else ():
            candidate, _, score = line.partition(" ")
            try:
                found[candidate] = float.fromhex(score)
            except ValueError:
                continue
        return found


def _line(words: Sequence[str]) -> str:
    return " ".join(words) + "\n"


def forget(state: Path) -> None:
    """Remove the state of a plan that is done."""
    for kind in ("steps", "scores"):
        state.with_name(f"{state.name}.{kind}").unlink(missing_ok=True)
