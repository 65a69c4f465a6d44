"""A checkpoint on disk: one safetensors file, or a folder of shards with their index, seen as one set of tensors.

RULES
1. Which files make up a folder is never guessed: ``model.safetensors``, or an index and exactly its shards, or the
   only safetensors file there. Two answers are refused.
2. Index and shards agree (``index``); links lead nowhere else (``links``); nothing is quantised (``quantised``).
3. What is odd but harmless is said in ``notes``.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from crdtmerge import limits
from crdtmerge.errors import CheckpointError, some
from crdtmerge.weights.carried import names_in, read_config, read_small
from crdtmerge.weights.header import Entry
from crdtmerge.weights.index import Index, shards_among
from crdtmerge.weights.layout import INDEX_NAME, SINGLE_NAME
from crdtmerge.weights.links import lead
from crdtmerge.weights.tensorfile import TensorFile, bytes_of, refuse_format
from crdtmerge.weights.unmergeable import refuse_config, refuse_tensor


class Checkpoint:
    """An open checkpoint: ``path``, ``folder`` (None for a file), ``files``, ``entries`` in sorted order, ``notes``.

    >>> with Checkpoint.open("model/") as checkpoint:  # doctest: +SKIP
    ...     entry = checkpoint.entries["lm_head.weight"]
    ...     checkpoint.read_into("lm_head.weight", 0, buffer[: entry.nbytes])
    """

    def __init__(self, path: Path, folder: Path | None, files: tuple[TensorFile, ...], notes: list[str]) -> None:
        """Use ``open``: this takes files that are open and agree with their index."""
        self.path, self.folder, self.files, self.notes = path, folder, files, notes
        self._file_of = {name: file for file in files for name in file.entries}
        self.entries: dict[str, Entry] = {name: self._file_of[name].entries[name] for name in sorted(self._file_of)}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open and check a file or folder. Raises CheckpointError, HeaderError or InputError."""
        path = Path(path)
        with ExitStack() as opened:
            if os.path.isdir(path):  # noqa: PTH112 (never raises)
                files, notes = _open_folder(path, opened)
                checkpoint = cls(path, path, files, notes)
            else:
                checkpoint = cls(path, None, (opened.enter_context(_open_file(path)),), [])
            _check_tensors(checkpoint)
            opened.pop_all()
        return checkpoint

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def where(self, name: str) -> str:
        """The path of the file that holds a tensor, for messages."""
        return str(self._file_of[name].path)

    def read_into(self, name: str, offset: int, buffer: memoryview | bytearray | NDArray[Any]) -> None:
        """Fill a buffer with a tensor's bytes from ``offset`` within it. Safe to call from any thread."""
        entry = self.entries[name]
        assert 0 <= offset <= offset + len(bytes_of(buffer)) <= entry.nbytes, "a stretch lies within its tensor"
        self._file_of[name].read_into(entry.begin + offset, buffer)

    def check_unchanged(self) -> None:
        """Raises ChangedError when any file is no longer as it was when opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Close all files; closing twice is harmless."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_file(path: Path) -> TensorFile:
    if path.name.endswith(".index.json"):
        raise CheckpointError(f"{path}: is the index of a folder of shards; give the folder {path.parent} instead.")
    return TensorFile.open(path)


def _open_folder(folder: Path, opened: ExitStack) -> tuple[tuple[TensorFile, ...], list[str]]:
    names = names_in(folder)
    if "config.json" in names:
        data = read_small(folder, "config.json", limits.CARRIED_FILES_BYTES_MAX)
        refuse_config(read_config(data, str(folder / "config.json")), str(folder / "config.json"))
    if INDEX_NAME in names:
        return _open_shards(folder, names, opened)
    name = _only_file(folder, names)
    return (opened.enter_context(TensorFile.open(folder / name, lead(folder, name))),), _unread(folder, names, {name})


def _open_shards(folder: Path, names: list[str], opened: ExitStack) -> tuple[tuple[TensorFile, ...], list[str]]:
    if SINGLE_NAME in names:
        raise CheckpointError(f"{folder}: holds both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is not meant.")
    index = Index(read_small(folder, INDEX_NAME, limits.INDEX_BYTES_MAX), str(folder / INDEX_NAME))
    index.check_present(names)
    files = tuple(opened.enter_context(TensorFile.open(folder / name, lead(folder, name))) for name in index.shards)
    index.check_tensors({file.path.name: file.entries for file in files})
    held = sum(entry.nbytes for file in files for entry in file.entries.values())
    notes = _unread(folder, names, set(index.shards))
    if index.total_size not in (None, held):
        said = ascii(index.total_size)[:80]
        notes.append(f"{index.where}: total_size says {said}; the tensors have {held} bytes")
    return files, notes


def _only_file(folder: Path, names: list[str]) -> str:
    """The name of the one file of a folder without an index."""
    present = _safetensors(names)
    shards = sorted(shards_among(present))
    if shards:
        raise CheckpointError(f"{folder}: holds shards but no {INDEX_NAME}: {some(shards)}. Download the index too.")
    if SINGLE_NAME in present:
        return SINGLE_NAME
    if len(present) > 1:
        raise CheckpointError(f"{folder}: holds several safetensors files and no index: {some(present)}. Give one.")
    if not present:
        _refuse_empty(folder, names)
    return present[0]


def _refuse_empty(folder: Path, names: list[str]) -> None:
    for name in names:
        refuse_format(folder / name)
    raise CheckpointError(f"{folder}: holds no safetensors file; wanted {SINGLE_NAME} or {INDEX_NAME}.")


def _safetensors(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]


def _unread(folder: Path, names: list[str], read: set[str]) -> list[str]:
    rest = [name for name in _safetensors(names) if name not in read]
    return [f"{folder}: {some(rest)} not read: not part of the model that is"] if rest else []


def _check_tensors(checkpoint: Checkpoint) -> None:
    count = len(checkpoint.entries)
    if not 0 < count <= limits.TENSORS_MAX:
        raise CheckpointError(f"{checkpoint.path}: holds {count} tensors; wanted 1 to {limits.TENSORS_MAX}.")
    for name, entry in checkpoint.entries.items():
        refuse_tensor(entry, checkpoint.where(name))
