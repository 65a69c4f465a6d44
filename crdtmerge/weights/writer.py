"""Transactional output: a checkpoint appears whole under its name, or not at all.

RULES
1. Everything is decided and refused before any work (``place``).
2. Files are written under a temporary name beside the place, fsynced, then renamed; until then the place is untouched.
3. An earlier output is renamed aside first and deleted last, so that at every moment a whole one exists.
4. A single file is renamed between the removal of the old receipt and the arrival of the new one, so that no crash
   leaves a receipt beside weights it does not speak of.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crdtmerge.errors import OutputError
from crdtmerge.weights.descriptors import open_file
from crdtmerge.weights.layout import INDEX_NAME, Layout, OutputFile, header_bytes, plan_output
from crdtmerge.weights.place import OUR_NAMES, RECEIPT_NAME, check_space, is_our_name, receipt_path, replaces_ours
from crdtmerge.weights.tensorfile import bytes_of

__all__ = ["OUR_NAMES", "RECEIPT_NAME", "Layout", "Output", "OutputFile", "header_bytes", "plan_output"]


class Output:
    """An output under construction: ``commit`` makes it appear; leaving the context without it removes every trace.

    >>> with Output(Path("merged"), layout, folder=True) as output:  # doctest: +SKIP
    ...     output.write("w", 0, stretch)
    ...     output.add("receipt.json", receipt)
    ...     fsync_seconds = output.commit()
    """

    def __init__(self, path: Path, layout: Layout, *, folder: bool) -> None:
        """Reserve the place. Raises OutputError: no such parent, something foreign there, no space, no permission."""
        assert folder or len(layout.files) == 1, "a single file has a layout of one file"
        self.path, self.layout, self.folder = Path(os.path.abspath(path)), layout, folder  # noqa: PTH100
        self._staging = self.path.with_name(f".{self.path.name}.crdtmerge-{secrets.token_hex(4)}")
        self._descriptors: dict[str, int] = {}
        self._done = False
        with self._refusing():
            self._replaces = replaces_ours(self.path, folder)
            check_space(self.path, layout.nbytes)
            self._staging.mkdir()
        try:
            self._stage()
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write a stretch of a tensor's bytes, ``offset`` bytes into it. Safe to call from any thread."""
        file, entry = self.layout.place(name)
        view = bytes_of(data)
        assert 0 <= offset <= offset + len(view) <= entry.nbytes, "a stretch lies within its tensor"
        self._write_at(file.name, entry.begin + offset, view)

    def add(self, name: str, data: bytes) -> None:
        """Add a small file: inside the folder, or beside the single file, whose name its own must begin with.

        Raises OutputError where such a file stands already, or differs only in case from another of this output.
        """
        assert Path(name).name == name, "an added file is named by one plain name"
        if self.folder:
            assert is_our_name(name), f"name {name!r} in place.OUR_NAMES, or no later merge replaces this output"
        else:
            self._check_sibling(name)
        if name.casefold() in (other.casefold() for other in self._descriptors):
            raise OutputError(f"{self.path}: {name!a} is written twice, or differs from another only in case.")
        self._create(name)
        self._write_at(name, 0, memoryview(data))

    def commit(self) -> float:
        """Make the output durable and visible. Returns the seconds spent in fsync. Raises OutputError."""
        assert not self._done, "an output is committed once"
        with self._refusing():
            begin = time.perf_counter()
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            _sync_folder(self._staging)
            seconds = time.perf_counter() - begin
            if self.folder:
                self._publish_folder()
            else:
                self._publish_file()
            begin = time.perf_counter()
            _sync_folder(self.path.parent)
        self._done = True
        self._close()
        return seconds + time.perf_counter() - begin

    def abort(self) -> None:
        """Remove everything that was staged; the place is as before. Harmless after commit."""
        self._close()
        if not self._done:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._done = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _stage(self) -> None:
        for file in self.layout.files:
            self._create(file.name)
            self._write_at(file.name, 0, memoryview(file.header))
            with self._refusing():
                os.ftruncate(self._descriptors[file.name], file.size)
        if self.layout.index is not None:
            self.add(INDEX_NAME, self.layout.index)

    def _create(self, name: str) -> None:
        with self._refusing():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._descriptors[name] = open_file(self._staging / name, flags)

    def _write_at(self, name: str, offset: int, view: memoryview) -> None:
        done = 0
        with self._refusing():
            while done < len(view):
                done += os.pwrite(self._descriptors[name], view[done:], offset + done)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            raise OutputError(f"{self.path}: cannot be written: {fault.strerror or fault}.") from fault

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _publish_folder(self) -> None:
        """Put the folder in place. Where something came to stand there meanwhile, the system refuses the rename."""
        if not self._replaces:
            self._staging.rename(self.path)
            return
        replaces_ours(self.path, folder=True)
        aside = self._staging.with_name(f"{self._staging.name}-old")
        self.path.rename(aside)
        try:
            self._staging.rename(self.path)
        except BaseException:
            aside.rename(self.path)
            raise
        _sync_folder(self.path.parent)
        shutil.rmtree(aside, ignore_errors=True)

    def _publish_file(self) -> None:
        receipt, weights = receipt_path(self.path, folder=False), self.layout.files[0].name
        if not self._replaces and replaces_ours(self.path, folder=False):
            raise OutputError(f"{self.path}: another output of crdtmerge came to stand there; run again.")
        receipt.unlink(missing_ok=True)
        _sync_folder(self.path.parent)
        (self._staging / weights).rename(self.path)
        beside = [name for name in self._descriptors if name != weights]
        for name in sorted(beside, key=lambda name: (name == receipt.name, name)):
            (self._staging / name).rename(self.path.with_name(name))
        self._staging.rmdir()

    def _check_sibling(self, name: str) -> None:
        assert name.startswith(self.path.name + "."), "files beside a single file bear its name and more"
        if not self._replaces and os.path.lexists(self.path.with_name(name)):
            raise OutputError(f"{self.path}: {name!a} exists beside it; choose another -o or remove that file.")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
