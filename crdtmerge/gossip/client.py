"""A peer over HTTP, from the side that asks: sessions, and a ``Source`` of blobs. One place for its deadlines.

A deadline is what a round trip to this peer takes, as measured, with room for how much that varies (RFC 6298), and for
the bytes that are to come.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from crdtmerge import limits
from crdtmerge.errors import FalsePeerError, PeerError, PoolMismatchError
from crdtmerge.gossip import messages, wire
from crdtmerge.keys import Key

FIRST_SECONDS = 10.0
"""The deadline before anything was measured."""

SECONDS_MIN, SECONDS_MAX = 2.0, 60.0
SLOWEST_RATE = 64 << 10
"""Bytes a second below which a transfer is given up."""

READ_BYTES = 1 << 20
CONNECT_SECONDS = 10.0


class RoundTrips:
    """How long a peer takes: smoothed mean and deviation.

    >>> trips = RoundTrips()
    >>> trips.measured(0.1)
    >>> round(trips.mean, 2), round(trips.deadline, 2)
    (0.1, 2.4)
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self._deviation = 0.0

    def measured(self, seconds: float) -> None:
        """Learn from one."""
        if self.mean is None:
            self.mean, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self.mean) - self._deviation) / 4
            self.mean += (seconds - self.mean) / 8

    @property
    def deadline(self) -> float:
        """Seconds after which an answer is no longer waited for."""
        if self.mean is None:
            return FIRST_SECONDS
        return min(max(8 * (self.mean + 4 * self._deviation), SECONDS_MIN), SECONDS_MAX)


class HttpPeer:
    """A peer at a URL. Every method raises PeerError, or FalsePeerError for an answer that no honest one gives."""

    def __init__(self, session: aiohttp.ClientSession, url: str, context: ssl.SSLContext | None) -> None:
        self._session, self.url = session, url.rstrip("/")
        self._ssl: ssl.SSLContext | bool = context or True
        self.trips = RoundTrips()
        self.bytes_sent = self.bytes_received = 0

    @property
    def name(self) -> str:
        """Its URL."""
        return self.url

    # ---- sessions

    async def exchange(self, message: bytes) -> bytes:
        """One round of a session. Raises PoolMismatchError too."""
        return await self._call("POST", "/v1/sync", message, bytes_max=messages.FRAME_BYTES_MAX) or b""

    async def join(self, key: Key, server: bytes, secret: bytes) -> bytes:
        """The genesis record, for an invitation."""
        said = wire.Joining(secret, key.public).signed(key, server)
        data = await self._call("POST", "/v1/join", said, bytes_max=limits.MANIFEST_BYTES_MAX)
        assert data is not None, "only a path that may be absent answers nothing"
        return data

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest."""
        return await self._call(
            "GET", f"/v1/manifest/{content.hex()}", bytes_max=limits.MANIFEST_BYTES_MAX, absent=True
        )

    async def give_manifest(self, content: bytes, data: bytes) -> None:
        """A manifest that an ADD needs that is about to be sent."""
        await self._call("PUT", f"/v1/manifest/{content.hex()}", data)

    # ---- blobs from there

    async def whole(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of some files and tensors of one piece that it has."""
        data = await self._call(
            "POST", "/v1/whole", wire.pack_ids(digests), bytes_max=wire.WHOLE_BYTES_MAX + limits.MIB
        )
        found = wire.read_whole(data or b"")
        if not found.keys() <= set(digests):
            raise FalsePeerError(f"{self.url} sends blobs that were not asked for.")
        return found

    async def tree(self, digest: bytes) -> bytes | None:
        """The tree of a tensor, None if it is not there."""
        bytes_max = limits.TREE_BYTES_MAX + limits.KIB
        return await self._call("GET", f"/v1/tree/{digest.hex()}", bytes_max=bytes_max, absent=True)

    async def stretch(self, digest: bytes, begin: int, end: int) -> AsyncIterator[bytes]:
        """Bytes of a tensor, none where it is not there."""
        headers = {"Range": f"bytes={begin}-{end - 1}"}
        async with self._asking("GET", f"/v1/blob/{digest.hex()}", None, headers, None) as response:
            if response.status == 404:
                return
            if response.status != 206:
                raise PeerError(f"{self.url} answers {response.status} to a range of {digest.hex()[:16]}.")
            left = end - begin
            async for data in self._arriving(response):
                left -= len(data)
                if left < 0:
                    raise FalsePeerError(f"{self.url} sends more than was asked for.")
                self.bytes_received += len(data)
                yield data

    # ---- blobs to there

    async def lacking(self) -> wire.LackingThere:
        """What it lacks."""
        return wire.LackingThere.from_bytes(await self._call("GET", "/v1/lacking", bytes_max=8 * limits.MIB) or b"")

    async def give_whole(self, found: Mapping[bytes, bytes]) -> None:
        """Files and tensors of one piece."""
        await self._call("PUT", "/v1/whole", wire.pack_whole(found))

    async def give_tree(self, digest: bytes, data: bytes) -> None:
        """The tree of a tensor whose pieces follow."""
        await self._call("PUT", f"/v1/tree/{digest.hex()}", data)

    async def give_piece(self, digest: bytes, number: int, data: bytes, nbytes: int) -> None:
        """A piece of it."""
        begin = number * limits.PIECE_BYTES
        headers = {"Content-Range": f"bytes {begin}-{begin + len(data) - 1}/{nbytes}"}
        await self._call("PUT", f"/v1/blob/{digest.hex()}", data, headers=headers)

    # ---- HTTP

    async def _call(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        *,
        bytes_max: int = limits.KIB,
        absent: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> bytes | None:
        """Ask and read the whole answer; None for one that may be absent and is."""
        began = time.monotonic()
        async with self._asking(method, path, data, headers or {}, bytes_max) as response:
            if response.status == 404 and absent:
                return None
            if response.status != 200:
                await self._refused(response, path)
            if (response.content_length or 0) > bytes_max:
                raise FalsePeerError(f"{self.url} answers {path} with {response.content_length} bytes.")
            body = bytearray()
            async for chunk in self._arriving(response):
                body += chunk
                if len(body) > bytes_max:
                    raise FalsePeerError(f"{self.url} answers {path} with more than {bytes_max} bytes.")
        self.bytes_received += len(body)
        if len(body) + len(data or b"") <= 64 * limits.KIB:
            self.trips.measured(time.monotonic() - began)
        return bytes(body)

    async def _refused(self, response: aiohttp.ClientResponse, path: str) -> None:
        text = (await response.content.read(limits.KIB)).decode(errors="replace").strip()
        if response.status == 409:
            raise PoolMismatchError(f"{self.url}: {text}")
        raise PeerError(f"{self.url} answers {response.status} to {path}: {text[:300]}")

    async def _arriving(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """What comes of an answer, as long as it does not come too slowly; the time between two asks does not count."""
        waited, came, began = 0.0, 0, time.monotonic()
        while data := await response.content.readany():
            waited, came = waited + time.monotonic() - began, came + len(data)
            if waited > self.trips.deadline + came / SLOWEST_RATE:
                raise PeerError(f"{self.url} sends less than {SLOWEST_RATE} bytes a second.")
            yield data
            began = time.monotonic()

    @asynccontextmanager
    async def _asking(
        self, method: str, path: str, data: bytes | None, headers: Mapping[str, str], bytes_max: int | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request under its deadline; ``bytes_max`` None: the answer may take as long as it comes fast enough."""
        deadline = self.trips.deadline
        total = None if bytes_max is None else deadline + (len(data or b"") + bytes_max + limits.MIB) / SLOWEST_RATE
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=CONNECT_SECONDS, sock_read=deadline + FIRST_SECONDS)
        self.bytes_sent += len(data or b"")
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=data,
                headers={"Content-Type": wire.CONTENT_TYPE, **headers} if data is not None else dict(headers),
                timeout=timeout,
                ssl=self._ssl,
                allow_redirects=False,
            ) as response:
                yield response
        except aiohttp.ClientConnectorCertificateError as fault:
            raise PeerError(
                f"{self.url} does not hold the key that was expected of it: {fault.certificate_error}."
            ) from None
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ssl.SSLError, OSError) as fault:
            raise PeerError(f"{self.url} cannot be reached: {_words(fault)}.") from None


def connections() -> aiohttp.ClientSession:
    """What peers of one node share: a pool of connections, without proxies, cookies or compression."""
    connector = aiohttp.TCPConnector(limit=64, limit_per_host=8, keepalive_timeout=30.0, force_close=False)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity", "User-Agent": "crdtmerge"},
        read_bufsize=READ_BYTES,
    )


def _words(fault: BaseException) -> Any:
    return str(fault)[:200] or type(fault).__name__
