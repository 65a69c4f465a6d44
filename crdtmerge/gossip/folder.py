"""A folder as a place of objects, also one that a tool synchronises with others.

RULES
1. An object is written under another name (``.writing/``, which nobody reads), made durable, then renamed. What a
   killed writer left there is removed when it is old.
2. A folder is not trusted: no link below it is followed, nothing but plain files is opened, no pipe is waited for.

obstore's LocalStore does none of this: it makes nothing durable, lists and reads through links, and waits for pipes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from crdtmerge.errors import FalsePeerError, PeerError
from crdtmerge.gossip.places import LISTED_TOGETHER, READ_BYTES, Listed
from crdtmerge.store.disk import Disk

DEPTH_MAX = 2
"""Folders below each other in what is listed: ours have one."""

WRITING = ".writing"
IDLE_SECONDS_MAX = 24 * 3600.0
"""After so long without a byte an unfinished file is taken for that of a killed writer."""

Result = TypeVar("Result")


class Folder:
    """A folder, also one that a tool synchronises with others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    async def level(self, under: str) -> list[str]:
        """The names directly under a folder."""

        def work() -> list[str]:
            with self._inside(under) as folder:
                return sorted(os.listdir(folder))  # noqa: PTH208 (of a descriptor)

        return await self._found(work, under) or []

    async def every(self, under: str) -> AsyncIterator[Listed]:
        """All objects under a folder."""
        found = self._walk(under, DEPTH_MAX)
        try:
            while some := await self._run(lambda: list(islice(found, LISTED_TOGETHER)), under):
                for one in some:
                    yield one
        finally:
            found.close()

    async def read(self, name: str, bytes_max: int) -> bytes | None:
        """All bytes of an object."""

        def work() -> bytes:
            with self._opened(name) as descriptor:
                size = os.fstat(descriptor).st_size
                if size > bytes_max:
                    raise FalsePeerError(f"has {size} bytes; at most {bytes_max} are read.")
                data = b"".join(_pread(descriptor, 0, bytes_max + 1))
                if len(data) > bytes_max:
                    raise FalsePeerError(f"grows while it is read; at most {bytes_max} bytes are.")
                return data

        return await self._found(work, name)

    async def stretch(self, name: str, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of an object."""

        def work(at: int) -> bytes:
            with self._opened(name) as descriptor:
                return b"".join(_pread(descriptor, at, min(at + READ_BYTES, end)))

        for at in range(begin, end, READ_BYTES):
            yield await self._found(partial(work, at), name) or b""

    async def put(self, name: str, data: bytes, *, over: bool = False) -> bool:
        """Put an object."""
        if not over and await self._run(lambda: self._exists(name), name):
            return False

        async def whole() -> AsyncIterator[bytes]:
            yield data

        await self.put_parts(name, len(data), whole())
        return True

    async def put_parts(self, name: str, nbytes: int, parts: AsyncIterator[bytes]) -> None:
        """Put a large object."""
        temporary = secrets.token_hex(16)
        descriptor = await self._run(lambda: self._create(temporary), name)
        try:
            async for data in parts:
                await self._run(partial(_write, descriptor, data), name)
            await self._run(lambda: self._name(descriptor, temporary, name), name)
        except BaseException:
            with contextlib.suppress(OSError), self._inside(WRITING) as writing:
                os.unlink(temporary, dir_fd=writing)
            raise
        finally:
            os.close(descriptor)

    async def sweep(self) -> None:
        """Remove what killed writers left unfinished long ago."""

        def work() -> None:
            with self._inside(WRITING) as writing:
                for name in os.listdir(writing):  # noqa: PTH208 (of a descriptor)
                    with contextlib.suppress(FileNotFoundError):
                        idle = time.time() - os.stat(name, dir_fd=writing, follow_symlinks=False).st_mtime
                        if idle > IDLE_SECONDS_MAX:
                            os.unlink(name, dir_fd=writing)

        with contextlib.suppress(PeerError):
            await self._run(work, WRITING)

    async def _found(self, work: Callable[[], Result], name: str) -> Result | None:
        """None for what is not there."""

        def found() -> Result | None:
            try:
                return work()
            except FileNotFoundError:
                return None

        return await self._run(found, name)

    async def _run(self, work: Callable[[], Result], name: str) -> Result:
        """Beside the event loop; errors as ours. Who cancels it waits: a descriptor is not closed while it is used."""
        running = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise
        except OSError as fault:
            kind = FalsePeerError if fault.errno in _STRANGE else PeerError
            raise kind(f"{self.path / name}: {fault.strerror or fault}.") from None

    @contextmanager
    def _inside(self, under: str, *, making: bool = False) -> Iterator[int]:
        """A descriptor of a folder; no link on the way is followed."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in filter(None, under.split("/")):
                if making:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                        os.fsync(descriptor)
                below = os.open(part, _FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A descriptor of a plain file."""
        under, _, last = name.rpartition("/")
        with self._inside(under) as folder:
            descriptor = os.open(last, _FILE, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FalsePeerError("is no plain file.")
            yield descriptor
        finally:
            os.close(descriptor)

    def _walk(self, under: str, depth: int) -> Generator[Listed, None, None]:
        try:
            with self._inside(under) as folder, os.scandir(folder) as entries:
                for entry in entries:
                    name = f"{under}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False) and depth > 1:
                        yield from self._walk(name, depth - 1)
                    else:
                        plain = entry.is_file(follow_symlinks=False)
                        yield Listed(name, entry.stat(follow_symlinks=False).st_size if plain else None)
        except FileNotFoundError:
            return

    def _exists(self, name: str) -> bool:
        try:
            with self._opened(name):
                return True
        except FileNotFoundError:
            return False

    def _create(self, temporary: str) -> int:
        with contextlib.suppress(FileExistsError):
            self.path.mkdir()
            Disk().sync_folder(self.path.parent)
        with self._inside(WRITING, making=True) as writing:
            return os.open(temporary, _NEW, 0o666, dir_fd=writing)

    def _name(self, descriptor: int, temporary: str, name: str) -> None:
        """Make a file durable, then give it its name."""
        under, _, last = name.rpartition("/")
        os.fsync(descriptor)
        with self._inside(WRITING) as writing, self._inside(under, making=True) as folder:
            os.rename(temporary, last, src_dir_fd=writing, dst_dir_fd=folder)
            os.fsync(folder)


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_STRANGE = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
"""What the system says of a link, a file where a folder belongs, a folder where a file does, a socket."""


def _pread(descriptor: int, begin: int, end: int) -> Iterator[bytes]:
    while begin < end and (data := os.pread(descriptor, min(end - begin, READ_BYTES), begin)):
        begin += len(data)
        yield data


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
