"""A bucket of an object store as a place of objects: S3, Google, Azure and others through obstore.

An object of one request is put with ``mode="create"``. A larger one goes in parts, whose last step makes it appear
whole, and which cannot be told to create only: by then its name was free, or held what is wrong. Parts that a killed
writer left cost money until a lifecycle rule of the bucket removes them.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from crdtmerge.errors import FalsePeerError, PeerError, UsageError
from crdtmerge.gossip.places import FLIGHT_BYTES_MAX, LISTED_TOGETHER, PART_BYTES, READ_BYTES, Listed

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PARTS_MAX = 10_000
"""Parts of one object: S3's own bound. Larger objects have larger parts."""

REQUEST_SECONDS = 300
"""The deadline of one request: 16 MiB at 60 KB a second."""

Result = TypeVar("Result")


class Bucket:
    """A bucket of an object store, or a part of one."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store, self._name = store, name

    @classmethod
    def of_url(cls, url: str) -> Bucket:
        """The bucket of a URL such as s3://bucket/prefix; credentials come from the environment. Raises UsageError."""
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise UsageError(f"{url}: buckets need obstore: pip install obstore.") from None
        opened: Callable[..., ObjectStore] = from_url  # which of its overloads, the URL says
        try:
            return cls(opened(url, client_options={"timeout": f"{REQUEST_SECONDS}s", **_plain_http()}), url)
        except (BaseError, ValueError) as fault:
            raise UsageError(f"{url}: cannot be used as a bucket: {_line(fault)}") from None

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


def _plain_http() -> dict[str, Any]:
    """What obstore would read from AWS_ALLOW_HTTP itself if no other option were given."""
    return {"allow_http": True} if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true") else {}


def _line(fault: BaseException) -> str:
    """The first line of a message that others wrote."""
    first = str(fault).strip().splitlines()[:1]
    return (first[0] if first else type(fault).__name__).encode("unicode_escape").decode()[:300]
