"""A node's HTTP server: who may ask for what, within which bounds. What is asked of the node itself is a ``Desk``.

RULES
1. Over TLS a client is the key that its certificate proves; a stranger reaches only ``/v1/join``. Over plain HTTP
   (loopback, or where the operator allowed it) everybody is let in.
2. Everything is bounded: connections, requests of one peer at a time, the bytes and the seconds of each body, the
   seconds without a request. Bodies are never compressed.
3. Every piece is checked against its digest before it is sent. An answer that cannot be sent whole breaks off.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from crdtmerge import limits
from crdtmerge.errors import CrdtMergeError, FalsePeerError, NotAllowedError, PoolMismatchError, StorageError
from crdtmerge.gossip import messages, tls, wire
from crdtmerge.store.blobs import Blob

CONNECTIONS_MAX = 256
"""Connections at a time; beyond, new ones are closed at once."""

STRANGERS_MAX = 32
"""Of these, by clients that showed no certificate."""

REQUESTS_MAX = 16
"""Requests of one peer at a time; more wait for ``BUSY_SECONDS`` and are then asked to come again."""

BUSY_SECONDS = 5.0

BODY_SECONDS = 30.0
"""For a body to arrive, or to be taken, and more where it is long: at least ``BODY_RATE`` bytes a second."""

BODY_RATE = 64 << 10

IDLE_SECONDS = 60.0
"""A connection without a whole request for so long is closed: also one whose headers drip."""

HANDSHAKE_SECONDS = 10.0

LINGERING_SECONDS = 1.0
"""After a refusal, what still comes of its body is read and dropped for so long."""

MANIFEST = re.compile(r"/v1/manifest/([0-9a-f]{64})")
TREE = re.compile(r"/v1/tree/([0-9a-f]{64})")
BLOB = re.compile(r"/v1/blob/([0-9a-f]{64})")


class Desk(Protocol):
    """What a node does for those who ask. Every method may raise CrdtMergeError."""

    @property
    def key(self) -> bytes:
        """The node's own key."""
        ...

    def trusts(self, key: bytes) -> bool:
        """Whether a key may talk to it."""
        ...

    async def answer(self, request: messages.Request, peer: bytes | None) -> messages.Answer:
        """One round of a session."""
        ...

    async def join(self, joining: wire.Joining) -> bytes | None:
        """The genesis record for one who was invited."""
        ...

    async def manifest(self, content: bytes) -> bytes | None:
        """A manifest."""
        ...

    async def keep_manifest(self, data: bytes) -> None:
        """Remember a manifest for the ADD that comes next."""
        ...

    async def whole(self, digests: list[bytes]) -> dict[bytes, bytes]:
        """Files and tensors of one piece."""
        ...

    async def tree(self, digest: bytes) -> bytes | None:
        """The tree of a tensor."""
        ...

    async def blob(self, digest: bytes) -> Blob | None:
        """A tensor."""
        ...

    async def piece(self, blob: Blob, number: int) -> Any:
        """The bytes of one of its pieces, checked."""
        ...

    async def lacking(self) -> wire.LackingThere:
        """What is not here."""
        ...

    async def take_whole(self, found: dict[bytes, bytes]) -> None:
        """Keep files and tensors that are lacking."""
        ...

    async def take_tree(self, digest: bytes, data: bytes) -> None:
        """Begin a tensor that is lacking."""
        ...

    async def take_piece(self, digest: bytes, number: int, data: bytes) -> None:
        """Keep a piece of it."""
        ...


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """What any stranger can send as often as he likes is not."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_LOG = logging.getLogger(__name__)
_LOG.addFilter(_is_worth_a_line)


class Connections(web.Server):
    """The server, which knows how long each connection has been without a request."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        super().__init__(
            handler,
            access_log=None,
            logger=_LOG,
            auto_decompress=False,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=LINGERING_SECONDS,
        )
        self._idle_since: dict[Any, float] = {}
        self._strangers: set[Any] = set()

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        """Count a connection, or close it where there are too many."""
        super().connection_made(handler, transport)
        connection = transport.get_extra_info("ssl_object")
        self._idle_since[handler] = time.monotonic()
        if connection is not None and tls.peer_key(connection) is None:
            self._strangers.add(handler)
        if len(self._idle_since) > CONNECTIONS_MAX or len(self._strangers) > STRANGERS_MAX:
            transport.abort()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        """Forget it."""
        super().connection_lost(handler, exc)
        self._idle_since.pop(handler, None)
        self._strangers.discard(handler)

    def begin(self, handler: Any) -> None:
        """A request is being answered."""
        self._idle_since[handler] = float("inf")

    def end(self, handler: Any) -> None:
        """It was."""
        if handler in self._idle_since:
            self._idle_since[handler] = time.monotonic()

    def sweep(self) -> None:
        """Close the connections that have been idle for too long."""
        for handler, since in list(self._idle_since.items()):
            if since < time.monotonic() - IDLE_SECONDS and handler in self._connections:
                self._connections[handler].abort()


class HttpServer:
    """Listens for a desk while in the context."""

    def __init__(self, desk: Desk, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self._desk, self._host, self._port, self._context = desk, host, port, context
        self._running: dict[str, asyncio.Semaphore] = {}
        self.bytes_sent = self.bytes_received = 0
        self.port = port

    async def __aenter__(self) -> HttpServer:
        self._connections = Connections(self._serve)
        self._runner = web.ServerRunner(self._connections)
        await self._runner.setup()
        self._listening = await asyncio.get_running_loop().create_server(
            self._connections,
            self._host,
            self._port,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS if self._context else None,
        )
        self.port = self._listening.sockets[0].getsockname()[1]
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sweeping.cancel()
        self._listening.close()
        self._connections.pre_shutdown()
        await self._connections.shutdown(1.0)
        await self._runner.cleanup()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE_SECONDS / 4)
            self._connections.sweep()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request; errors of ours become statuses with a sentence."""
        self._connections.begin(request.protocol)
        try:
            peer = tls.peer_key(request.transport.get_extra_info("ssl_object")) if request.transport else None
            if self._context is not None and (peer is None or not self._desk.trusts(peer)):
                if request.path != "/v1/join":
                    return _said(403, "this peer does not know you: be invited, or have your key trusted.")
                peer = None
            return await self._in_turn(request, peer)
        except PoolMismatchError as fault:
            return _said(409, str(fault))
        except (FalsePeerError, NotAllowedError) as fault:
            return _said(400, str(fault))
        except TimeoutError:
            return _said(408, "the request took too long.")
        except ConnectionError:
            return _said(400, "the connection was lost.")  # nobody is there to read it
        except StorageError as fault:
            return _said(507, str(fault))
        except CrdtMergeError as fault:
            return _said(500, str(fault))
        finally:
            self._connections.end(request.protocol)

    async def _in_turn(self, request: web.BaseRequest, peer: bytes | None) -> web.StreamResponse:
        """As many requests of one peer at a time as are allowed."""
        who = peer.hex() if peer else request.remote or "?"
        if len(self._running) > 4 * CONNECTIONS_MAX:
            self._running = {one: turns for one, turns in self._running.items() if turns.locked()}
        turns = self._running.setdefault(who, asyncio.Semaphore(REQUESTS_MAX))
        try:
            await asyncio.wait_for(turns.acquire(), BUSY_SECONDS)
        except TimeoutError:
            return _said(429, "too many requests at a time.", {"Retry-After": "5"})
        try:
            return await self._route(request, peer)
        finally:
            turns.release()

    async def _route(self, request: web.BaseRequest, peer: bytes | None) -> web.StreamResponse:
        desk, asked = self._desk, (request.method, request.path)
        if asked == ("POST", "/v1/sync"):
            said = messages.Request.from_bytes(await self._body(request, messages.FRAME_BYTES_MAX))
            return self._sent((await desk.answer(said, peer)).to_bytes())
        if asked == ("POST", "/v1/join"):
            joining = wire.Joining.read(await self._body(request, wire.JOIN_BYTES_MAX), desk.key)
            return self._sent(await desk.join(joining), 403, "this invitation does not stand: it was used, or expired.")
        if asked == ("POST", "/v1/whole"):
            digests = wire.read_ids(await self._body(request, messages.FRAME_BYTES_MAX))
            return await self._send(request, wire.pack_whole(await desk.whole(digests)))
        if asked == ("PUT", "/v1/whole"):
            await desk.take_whole(wire.read_whole(await self._body(request, wire.WHOLE_BYTES_MAX + limits.MIB)))
            return self._sent(b"")
        if asked == ("GET", "/v1/lacking"):
            return self._sent((await desk.lacking()).to_bytes())
        return await self._route_one(request)

    async def _route_one(self, request: web.BaseRequest) -> web.StreamResponse:
        """Paths that end in an id."""
        desk = self._desk
        manifest, tree, blob = (one.fullmatch(request.path) for one in (MANIFEST, TREE, BLOB))
        if request.method == "GET" and manifest:
            return await self._send(request, await desk.manifest(bytes.fromhex(manifest[1])))
        if request.method == "PUT" and manifest:
            await desk.keep_manifest(await self._body(request, limits.MANIFEST_BYTES_MAX))
            return self._sent(b"")
        if request.method == "GET" and tree:
            return await self._send(request, await desk.tree(bytes.fromhex(tree[1])))
        if request.method == "PUT" and tree:
            await desk.take_tree(bytes.fromhex(tree[1]), await self._body(request, limits.TREE_BYTES_MAX + limits.KIB))
            return self._sent(b"")
        if request.method == "GET" and blob:
            return await self._send_blob(request, bytes.fromhex(blob[1]))
        if request.method == "PUT" and blob:
            number = _piece_of(request.headers.get("Content-Range", ""))
            await desk.take_piece(bytes.fromhex(blob[1]), number, await self._body(request, limits.PIECE_BYTES))
            return self._sent(b"")
        return _said(404, "there is no such path.")

    async def _body(self, request: web.BaseRequest, bytes_max: int) -> bytes:
        """A body within its bounds. Raises FalsePeerError, TimeoutError."""
        length = request.content_length
        if length is None or length > bytes_max or request.headers.get("Content-Encoding"):
            raise FalsePeerError(f"a body of {length} bytes; its length must be said, at most {bytes_max}, as it is.")
        data = bytearray()
        async with asyncio.timeout(BODY_SECONDS + length / BODY_RATE):
            async for chunk in request.content.iter_any():
                data += chunk
        self.bytes_received += len(data)
        return bytes(data)

    def _sent(self, data: bytes | None, status: int = 404, why: str = "not here.") -> web.Response:
        if data is None:
            return _said(status, why)
        self.bytes_sent += len(data)
        return web.Response(body=data, content_type=wire.CONTENT_TYPE)

    async def _send(self, request: web.BaseRequest, data: bytes | None) -> web.StreamResponse:
        """An answer that may be long."""
        if data is None or len(data) <= limits.PIECE_BYTES:
            return self._sent(data)
        response = web.StreamResponse()
        response.content_type, response.content_length = wire.CONTENT_TYPE, len(data)
        view = memoryview(data)
        pieces = (view[at : at + limits.PIECE_BYTES] for at in range(0, len(data), limits.PIECE_BYTES))
        return await self._stream(request, response, map(_value, pieces))

    async def _stream(
        self, request: web.BaseRequest, response: web.StreamResponse, pieces: Iterable[Awaitable[memoryview]]
    ) -> web.StreamResponse:
        """Send one piece after another while the next is read. Nothing can be said any more: what fails breaks off."""
        await response.prepare(request)
        coming: asyncio.Future[memoryview] | None = None
        try:
            for piece in itertools.chain(pieces, [None]):
                data = await coming if coming is not None else None
                coming = None if piece is None else asyncio.ensure_future(piece)
                if data is not None:
                    async with asyncio.timeout(BODY_SECONDS + len(data) / BODY_RATE):
                        await response.write(data)
                    self.bytes_sent += len(data)
            async with asyncio.timeout(BODY_SECONDS):
                await response.write_eof()
        except (CrdtMergeError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            if coming is not None:
                coming.cancel()
        return response

    async def _send_blob(self, request: web.BaseRequest, digest: bytes) -> web.StreamResponse:
        """A range of a tensor that begins with a piece; the next piece is read while one is sent."""
        blob = await self._desk.blob(digest)
        if blob is None or blob.dtype is None:
            return _said(404, "not here.")
        begin, end = _range_of(request.headers.get("Range"), blob.nbytes)
        if begin % limits.PIECE_BYTES or not begin < end <= blob.nbytes:
            return _said(416, "a range begins with a piece.", {"Content-Range": f"bytes */{blob.nbytes}"})
        response = web.StreamResponse(status=206)
        response.content_type = "application/octet-stream"
        response.content_length = end - begin
        response.headers["Content-Range"] = f"bytes {begin}-{end - 1}/{blob.nbytes}"
        numbers = range(begin // limits.PIECE_BYTES, -(-end // limits.PIECE_BYTES))
        first = await self._desk.piece(blob, numbers[0])  # a damaged one is said before anything is sent

        async def piece(number: int) -> memoryview:
            found = first if number == numbers[0] else await self._desk.piece(blob, number)
            return memoryview(found)[: end - number * limits.PIECE_BYTES]

        return await self._stream(request, response, map(piece, numbers))


async def _value(found: memoryview) -> memoryview:
    return found


def _said(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=text + "\n", headers=headers)


def _range_of(header: str | None, nbytes: int) -> tuple[int, int]:
    """(begin, end) of a Range header of one range; (0, 0) for any other."""
    if header is None:
        return 0, nbytes
    found = re.fullmatch(r"bytes=(\d{1,18})-(\d{1,18})?", header)
    if not found:
        return 0, 0
    return int(found[1]), min(int(found[2]) + 1, nbytes) if found[2] else nbytes


def _piece_of(header: str) -> int:
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", header)
    if not found or int(found[1]) % limits.PIECE_BYTES:
        raise FalsePeerError(f"Content-Range {header!a:.80} is not that of a piece.")
    return int(found[1]) // limits.PIECE_BYTES
