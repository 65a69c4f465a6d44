"""Where objects lie under names: a folder, or a bucket of an object store. A place moves bytes and judges none.

RULES
1. An object appears whole or not at all, also when its writer is killed.
2. An object is put where its name is free. Only a caller that found wrong bytes under it says ``over``. Two writers
   that meet put the same bytes, so it does no harm where one replaces what the other put.
3. Whatever goes wrong is a PeerError; something that cannot be an object of ours is a FalsePeerError.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

from crdtmerge import limits

FLIGHT_BYTES_MAX = 32 * limits.MIB
"""Bytes that are on their way at a time, in one direction."""

FLIGHT_MAX = 8
"""Objects that are on their way at a time."""

PART_BYTES = 5 * limits.MIB
"""Larger objects go in parts: the smallest that S3 takes."""

READ_BYTES = 1 * limits.MIB
"""Bytes of one step of a stretch."""

LISTED_TOGETHER = 1000
"""Names of one step of a listing."""


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
