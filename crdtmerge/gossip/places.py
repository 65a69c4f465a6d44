"""Where objects lie under names: a folder, or a bucket of an object store. A place moves bytes and judges none.

RULES
1. An object appears whole or not at all, also when its writer is killed: in a folder under another name first
   (``.writing/``, which nobody reads), made durable, then renamed; in a bucket by its own promise.
2. An object is put where its name is free. Only a caller that found wrong bytes under it says ``over``. Two writers
   that meet put the same bytes, so it does no harm that a rename, and S3's upload in parts, replace what came in
   between.
3. A folder is not trusted: no link below it is followed, nothing but plain files is opened, no pipe is waited for.
   (obstore's LocalStore does all three and syncs nothing, so folders are not read or written through it.)
4. Whatever goes wrong is a PeerError; something that cannot be an object of ours is a FalsePeerError.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, PeerError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 5 * limits.MIB
"""Larger objects go in parts: the smallest that S3 takes."""

PARTS_MAX = 10_000
"""Parts of one object: S3's own bound. Larger objects have larger parts."""

FLIGHT_BYTES_MAX = 32 * limits.MIB
"""Bytes that are on their way at a time, in one direction."""

FLIGHT_MAX = 8
"""Objects that are on their way at a time."""

READ_BYTES = 1 * limits.MIB
LISTED_TOGETHER = 1000
DEPTH_MAX = 2
"""Folders below each other in what is listed: ours have one."""

WRITING = ".writing"
IDLE_SECONDS_MAX = 24 * 3600.0
"""After so long without a byte an unfinished file of a killed writer is removed."""

REQUEST_SECONDS = 300
"""The deadline of one request: 16 MiB at 60 KB a second."""

Result = TypeVar("Result")


class Listed(NamedTuple):
    """A name and its bytes; None for something that is no plain file."""

    name: str
    nbytes: int | None


class Place(Protocol):
    """Where objects lie."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    async def level(self, under: str) -> list[str]:
        """The names directly under a folder, of objects and folders."""
        ...

    def every(self, under: str) -> AsyncIterator[Listed]:
        """All objects under a folder. Raises FalsePeerError where a name makes listing impossible."""
        ...

    async def read(self, name: str, bytes_max: int) -> bytes | None:
        """All bytes of an object, None if it is not there. Raises FalsePeerError if it is longer, or no object."""
        ...

    def stretch(self, name: str, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of an object, as far as it has them."""
        ...

    async def put(self, name: str, data: bytes, *, over: bool = False) -> bool:
        """Put an object; False if there is one already."""
        ...

    async def put_parts(self, name: str, nbytes: int, parts: AsyncIterator[bytes]) -> None:
        """Put a large object."""
        ...

    async def sweep(self) -> None:
        """Remove what killed writers left unfinished long ago."""
        ...


def place_of(where: str | Path | Place) -> Place:
    """A folder's path, or a URL such as s3://bucket/prefix, as a place. Raises UsageError."""
    if not isinstance(where, str | Path):
        return where
    url = str(where)
    if isinstance(where, Path) or "://" not in url:
        return Folder(Path(where))
    if url.startswith("file://"):
        return Folder(Path(unquote(urlsplit(url).path)))
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise UsageError(f"{url}: buckets need obstore: pip install obstore.") from None
    opened: Callable[..., ObjectStore] = from_url  # which of its overloads, the URL says
    try:
        store = opened(url, client_options={"timeout": f"{REQUEST_SECONDS}s", **_plain_http()})
    except (BaseError, ValueError) as fault:
        raise UsageError(f"{url}: cannot be used as a bucket: {_line(fault)}") from None
    return Bucket(store, url)


def _plain_http() -> dict[str, Any]:
    """What obstore would read from AWS_ALLOW_HTTP itself if no other option were given."""
    return {"allow_http": True} if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true") else {}


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

        try:
            return await self._run(work, under)
        except FileNotFoundError:
            return []

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

        try:
            return await self._run(work, name)
        except FileNotFoundError:
            return None

    async def stretch(self, name: str, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of an object."""

        def work(at: int) -> bytes:
            with self._opened(name) as descriptor:
                return b"".join(_pread(descriptor, at, min(at + READ_BYTES, end)))

        for at in range(begin, end, READ_BYTES):
            try:
                yield await self._run(lambda at=at: work(at), name)  # type: ignore[misc]
            except FileNotFoundError:
                return

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
                await self._run(lambda data=data: _write(descriptor, data), name)  # type: ignore[misc]
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

        with contextlib.suppress(FileNotFoundError, PeerError):
            await self._run(work, WRITING)

    async def _run(self, work: Callable[[], Result], name: str) -> Result:
        """Beside the event loop; raises FileNotFoundError as it is, all other errors as ours."""
        try:
            return await asyncio.to_thread(work)
        except FileNotFoundError:
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


class Bucket:
    """A bucket of an object store, or a part of one."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    async def level(self, under: str) -> list[str]:
        """The names directly under a folder."""
        import obstore

        found = await self._tried(obstore.list_with_delimiter_async(self._store, under))
        names = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return [name.rpartition("/")[2] for name in names]

    async def every(self, under: str) -> AsyncIterator[Listed]:
        """All objects under a folder."""
        import obstore

        stream = aiter(obstore.list(self._store, under, chunk_size=LISTED_TOGETHER))
        while some := await self._tried(anext(stream, None)):
            for one in some:
                yield Listed(one["path"], one["size"])

    async def read(self, name: str, bytes_max: int) -> bytes | None:
        """All bytes of an object."""
        import obstore

        found = await self._found(obstore.get_async(self._store, name))
        if found is None:
            return None
        if found.meta["size"] > bytes_max:
            raise FalsePeerError(f"has {found.meta['size']} bytes; at most {bytes_max} are read.")
        return bytes(await self._tried(found.bytes_async()))

    async def stretch(self, name: str, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of an object."""
        import obstore

        found = await self._found(obstore.get_async(self._store, name, options={"range": (begin, end)}))
        if found is None:
            return
        stream = aiter(found.stream(READ_BYTES))
        while data := await self._tried(anext(stream, None)):
            yield bytes(data)

    async def put(self, name: str, data: bytes, *, over: bool = False) -> bool:
        """Put an object."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            put = obstore.put_async(
                self._store, name, data, mode="overwrite" if over else "create", use_multipart=False
            )
            await self._tried(put)
        except AlreadyExistsError:
            return False
        return True

    async def put_parts(self, name: str, nbytes: int, parts: AsyncIterator[bytes]) -> None:
        """Put a large object: with ``mode="create"`` obstore would hold all of it in memory."""
        import obstore

        size = max(PART_BYTES, -(-nbytes // PARTS_MAX))
        at_once = max(1, FLIGHT_BYTES_MAX // size)
        await self._tried(
            obstore.put_async(self._store, name, parts, use_multipart=True, chunk_size=size, max_concurrency=at_once)
        )

    async def sweep(self) -> None:
        """Parts of uploads that were killed are the bucket's own to remove, by its lifecycle rules."""

    async def _found(self, work: Awaitable[Result]) -> Result | None:
        """None for what is not there."""

        async def found() -> Result | None:
            try:
                return await work
            except FileNotFoundError:
                return None

        return await self._tried(found())

    async def _tried(self, work: Awaitable[Result]) -> Result:
        """Errors as ours, but the one that says that something is there already."""
        from obstore.exceptions import AlreadyExistsError, BaseError, InvalidPathError

        try:
            return await work
        except AlreadyExistsError:
            raise
        except InvalidPathError as fault:
            raise FalsePeerError(
                f"{self._name}: has a name that hides others: {_line(fault)} Remove that object."
            ) from None
        except (BaseError, OSError, NotImplementedError) as fault:
            raise PeerError(f"{self._name}: {_line(fault)}") from None


def _line(fault: BaseException) -> str:
    """The first line of a message that others wrote."""
    first = str(fault).strip().splitlines()[:1]
    return (first[0] if first else type(fault).__name__).encode("ascii", "backslashreplace").decode()[:300]
