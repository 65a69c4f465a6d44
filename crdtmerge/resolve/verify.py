"""Verification: merge again from the inputs and compare every byte with what lies there.

Three answers: the same bytes; different; cannot tell (an input is missing or has changed, the strategy has another
version here, or the merge was of class P and this is another build).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import CrdtMergeError, InputError, ReceiptError
from crdtmerge.numerics.workers import Workers
from crdtmerge.recipe import PLAN, Recipe
from crdtmerge.replica.contribution import Claim
from crdtmerge.resolve import plan_file
from crdtmerge.resolve.beside import Beside, file_digest
from crdtmerge.resolve.gather import known
from crdtmerge.resolve.merge import is_folder
from crdtmerge.resolve.merging import Merge, Options, needs_of
from crdtmerge.resolve.receipt import Receipt, build_here
from crdtmerge.resolve.sources import Source, open_source
from crdtmerge.resolve.statistic import Kept
from crdtmerge.resolve.travelling import TRAVELLING, carried_input
from crdtmerge.strategies import registry
from crdtmerge.strategies.protocol import Plan
from crdtmerge.weights.carried import CARRIED_NAMES, read_small
from crdtmerge.weights.layout import INDEX_NAME, Layout
from crdtmerge.weights.place import RECEIPT_NAME


@dataclass(frozen=True)
class Verdict:
    """The answer, with the reason, and the receipt if there is one."""

    answer: Literal["same", "different", "unknown"]
    reason: str
    receipt: Receipt | None = None


class DifferentError(Exception):
    """The first difference found."""


class UnknownError(Exception):
    """Why there is no telling."""


Opener = Callable[[Path, Set[bytes]], Sequence[Source]]
"""Opens what lies at a path and may hold the contents that are wanted. Raises CrdtMergeError."""


def open_checkpoint(path: Path, wanted: Set[bytes]) -> Sequence[Source]:
    """A checkpoint, whatever its content."""
    return [open_source(path, str(path))]


Finder = Callable[[Path, Set[bytes]], Mapping[bytes, Path | Kept]]
"""The files, of those that are wanted by SHA-256, that a path is or holds. Raises CrdtMergeError."""


def find_file(path: Path, wanted: Set[bytes]) -> Mapping[bytes, Path | Kept]:
    """The file itself, if it is wanted."""
    found = file_digest(path, "the input") if path.is_file() else b""
    return {found: path} if found in wanted else {}


class Places(NamedTuple):
    """Where contents, other files and the plan may be."""

    contents: Sequence[Path]
    files: Sequence[Path]
    plans: Sequence[Path]


@dataclass(frozen=True)
class _Found:
    """What a merge was made of, found again, under the ids and digests of the receipt."""

    contents: Mapping[bytes, Source]
    statistics: Mapping[bytes, Path | Kept]
    inputs: Mapping[str, Any]
    plan: Plan | None


def verify(
    out: Path,
    against: Sequence[Path] = (),
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    opener: Opener = open_checkpoint,
    finder: Finder = find_file,
) -> Verdict:
    """Merge again and compare. ``against`` names where the inputs are, in any order, instead of ``inputs.json``."""
    receipt: Receipt | None = None
    try:
        receipt = _receipt(out)
        _check_version(receipt, device)
        with ExitStack() as opened:
            places = Places(against, against, against) if against else _hinted(out)
            found = _find(receipt, places, threads, opener, finder, opened)
            _merge_again(out, receipt, found, Options(threads, device, rehash=True, progress=progress))
    except DifferentError as found:
        return Verdict("different", str(found), receipt)
    except UnknownError as found:
        return Verdict("unknown", str(found), receipt)
    return Verdict("same", "the same bytes came out again", receipt)


def intact(out: Path, receipt: Receipt, threads: int | None = None) -> bool:
    """Whether an output still is, to the bit, what its receipt says: hashed, not merged again."""
    try:
        data = _bounded(_beside(out, RECEIPT_NAME))
        if data != receipt.to_bytes():
            return False
        with Workers(threads) as workers:
            source = open_source(out, str(out))
            try:
                facts = source.facts(workers, None, lambda read: None)
            finally:
                source.close()
        tensors = {(name, entry.dtype.name, entry.shape): facts[name].digest for name, entry in source.entries.items()}
        if tensors != {(t.name, t.dtype, t.shape): t.digest for t in receipt.tensors}:
            return False
        files = {name for name in os.listdir(out) if name in CARRIED_NAMES} if is_folder(out) else set()  # noqa: PTH208
        small = {name: read_small(out, name, limits.CARRIED_FILES_BYTES_MAX) for name in files}
        return {name: hashlib.sha256(data).hexdigest() for name, data in small.items()} == dict(receipt.files)
    except (CrdtMergeError, OSError):
        return False


def _beside(out: Path, name: str) -> Path:
    return out / name if is_folder(out) else out.with_name(f"{out.name}.{name}")


def _receipt(out: Path) -> Receipt:
    path = _beside(out, RECEIPT_NAME)
    if not out.exists():
        raise InputError(f"{out}: there is no such output.")
    data = _bounded(path)
    if data is None:
        raise UnknownError(f"{path} is missing: nothing says what this was merged from")
    try:
        return Receipt.from_bytes(data, str(path))
    except ReceiptError as fault:
        raise DifferentError(str(fault)) from None


def _bounded(path: Path) -> bytes | None:
    """The bytes of a small file, None if there is none. Raises CheckpointError: no regular file, too large."""
    return read_small(path.parent, path.name, limits.RECEIPT_BYTES_MAX) if os.path.lexists(path) else None


def _check_version(receipt: Receipt, device: str) -> None:
    recipe = receipt.recipe
    strategy = registry.get(recipe.strategy)
    if strategy.version != recipe.version:
        raise UnknownError(
            f"it was made by version {recipe.version} of {recipe.strategy}; this is version {strategy.version}"
        )
    if not receipt.exact and receipt.build != build_here(device):
        raise UnknownError(
            f"it is of class P, which only the build that made it can repeat: {receipt.build}. This is "
            f"{build_here(device)}"
        )


def _hinted(out: Path) -> Places:
    path = _beside(out, "inputs.json")
    data = _bounded(path)
    if data is None:
        raise UnknownError(f"{path} is missing: say with --against where the inputs are")
    try:
        hints: Mapping[str, Any] = json.loads(data)
        rows = [*hints["contributions"], *([hints["base"]] if hints["base"] else [])]
        inputs = dict(hints.get("inputs", {}))
        plans = _paths([inputs.pop(PLAN, None)])
        files = [path for held in hints.get("stats", {}).values() for path in held.values()]
        return Places(
            _paths([*(row["path"] for row in rows), *inputs.values()]), _paths([*files, *inputs.values()]), plans
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise DifferentError(f"{path}: not a list of inputs ({type(fault).__name__}: {fault})") from None


def _paths(said: Sequence[Any]) -> list[Path]:
    return [Path(path) for path in said if path is not None]


def _find(
    receipt: Receipt,
    places: Places,
    threads: int | None,
    opener: Opener,
    finder: Finder,
    opened: ExitStack,
) -> _Found:
    """Everything that was read, hashed anew when it is merged. Raises UnknownError for what is not there."""
    recipe = receipt.recipe
    _, _, needs = needs_of(recipe)
    models = {name: recipe.inputs[name] for name in needs.models if name in recipe.inputs}
    ids = {content for content, _ in receipt.contributions} | ({recipe.base} if recipe.base else set())
    contents = _find_contents(ids | {*models.values()}, places.contents, threads, opener, opened)
    named = {
        claim.stats[name]: f"the {name} of {content.hex()[:16]}"
        for content, claim in receipt.contributions
        for name in needs.stats
        if name in claim.stats
    }
    unplanned = needs.inputs if PLAN not in recipe.inputs else ()  # a plan does without what it was made from
    files = {name: recipe.inputs[name] for name in unplanned if name in recipe.inputs}
    merged = [contents[content] for content in ids]
    files = {name: digest for name, digest in files.items() if not _travels(name, digest, merged)}
    found = _find_files({digest: f"the input '{name}'" for name, digest in files.items()}, places.files, find_file)
    inputs = {name: contents[content] for name, content in models.items()}
    return _Found(
        contents,
        _find_files(named, places.files, finder),
        inputs | {name: found[digest] for name, digest in files.items()},
        _find_plan(recipe.inputs.get(PLAN), places.plans),
    )


def _travels(name: str, digest: bytes, sources: Sequence[Source]) -> bool:
    """Whether an input of this digest comes with the contents that are merged."""
    try:
        return name in TRAVELLING and carried_input(name, digest, sources, None) is not None
    except CrdtMergeError as fault:
        raise UnknownError(str(fault)) from None


def _find_files(wanted: Mapping[bytes, str], paths: Sequence[Path], finder: Finder) -> dict[bytes, Path | Kept]:
    found: dict[bytes, Path | Kept] = {}
    faults = []
    for path in dict.fromkeys(paths):
        if found.keys() >= wanted.keys():
            break
        try:
            found.update(finder(path, wanted.keys() - found.keys()))
        except CrdtMergeError as fault:
            faults.append(str(fault))
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise UnknownError(f"{wanted[missing[0]]}, {missing[0].hex()[:16]}, is missing: {_sought(paths, faults)}")
    return found


def _find_plan(wanted: bytes | None, paths: Sequence[Path]) -> Plan | None:
    if wanted is None:
        return None
    faults = []
    for path in dict.fromkeys(paths):
        try:
            plan, _ = plan_file.read(path) if path.is_file() else (None, b"")
            if plan is not None and plan.digest == wanted:
                return plan
        except CrdtMergeError as fault:
            faults.append(str(fault))
    raise UnknownError(f"the plan {wanted.hex()[:16]} is missing: {_sought(paths, faults)}")


def _sought(paths: Sequence[Path], faults: Sequence[str]) -> str:
    where = f"none of {', '.join(map(str, paths))} holds it any more" if paths else "no path of it is known"
    return "; ".join(faults) or where


def _find_contents(
    wanted: Set[bytes], paths: Sequence[Path], threads: int | None, opener: Opener, opened: ExitStack
) -> dict[bytes, Source]:
    found: dict[bytes, Source] = {}
    faults = []
    with Workers(threads) as workers:
        for path in dict.fromkeys(paths):
            try:
                for source in opener(path, wanted):
                    opened.callback(source.close)
                    found[known(source, workers, None, lambda read: None).id] = source
            except CrdtMergeError as fault:
                faults.append(str(fault))
    missing = sorted(wanted - found.keys())
    if missing:
        raise UnknownError(f"the input {missing[0].hex()[:16]} is missing: {_sought(paths, faults)}")
    return {content: found[content] for content in wanted}


def _merge_again(out: Path, receipt: Receipt, found: _Found, options: Options) -> None:
    recipe, sources = receipt.recipe, found.contents
    models: list[tuple[Source, Claim]] = [(sources[content], claim) for content, claim in receipt.contributions]
    base = sources[recipe.base] if recipe.base else None
    stats = [
        {name: found.statistics[digest] for name, digest in claim.stats.items() if digest in found.statistics}
        for _, claim in receipt.contributions
    ]
    given = Beside(stats, found.inputs, found.plan)
    with Merge(models, _as_asked(recipe), base, options, given) as one:
        layout = one.layout(None if is_folder(out) else out.name)
        with _comparing(out, layout) as sink:
            again = one.run(sink, folder=is_folder(out))
        if again.to_bytes() != receipt.to_bytes():
            raise DifferentError("the receipt is not the one that this merge gives")
        if is_folder(out):
            beside = {**one.files(), **({INDEX_NAME: layout.index} if layout.index else {})}
            _compare_files(out, beside)
            _refuse_extra(out, {file.name for file in layout.files} | beside.keys())


def _as_asked(recipe: Recipe) -> Recipe:
    return recipe.completed(recipe.version or 0, recipe.params, None)


class _Compared:
    """A sink that reads what lies there and compares."""

    def __init__(self, layout: Layout, descriptors: Mapping[str, int]) -> None:
        self._layout, self._descriptors = layout, descriptors

    def write(self, name: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Raise DifferentError unless the same bytes stand there."""
        file, entry = self._layout.place(name)
        there = os.pread(self._descriptors[file.name], data.nbytes, entry.begin + offset)
        if there != data.tobytes():
            raise DifferentError(f"tensor {name!a} in {file.name} differs")


@contextmanager
def _comparing(out: Path, layout: Layout) -> Iterator[_Compared]:
    """A sink over the files of an output, whose sizes and headers are compared at once."""
    descriptors: dict[str, int] = {}
    try:
        for file in layout.files:
            path = out / file.name if is_folder(out) else out
            try:
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
                descriptors[file.name] = os.open(path, flags)
            except OSError as fault:
                raise DifferentError(f"{path}: {fault.strerror}") from None
            status = os.fstat(descriptors[file.name])
            if not stat.S_ISREG(status.st_mode):
                raise DifferentError(f"{path} is not a regular file")
            if status.st_size != file.size:
                raise DifferentError(f"{path} has {status.st_size} bytes; the merge gives {file.size}")
            if os.pread(descriptors[file.name], len(file.header), 0) != file.header:
                raise DifferentError(f"the header of {path} differs")
        yield _Compared(layout, descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _compare_files(out: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
            raise DifferentError(f"{path} is not the file that the merge carries over")


def _refuse_extra(out: Path, expected: Set[str]) -> None:
    """Other weights or configurations in the folder could be loaded in place of those of the merge."""
    for path in sorted(out.iterdir()):
        loadable = path.suffix == ".safetensors" or path.name in CARRIED_NAMES or path.name == INDEX_NAME
        if loadable and path.name not in expected:
            raise DifferentError(f"{path} does not belong to the merge")
