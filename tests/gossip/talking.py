"""A node in this process, and raw HTTP to it: what no client of ours would send.

async with node_of(replica) as node:
    status, body = await ask(node, "GET", "/v1/lacking", as_key=key_file_of(other))
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from crdtmerge.gossip import tls
from crdtmerge.gossip.node import Node
from crdtmerge.pool.replica import Replica

ANSWER_SECONDS = 60.0


@asynccontextmanager
async def node_of(replica: Replica, **options: Any) -> AsyncIterator[Node]:
    """A running node."""
    said = {"listen": "127.0.0.1:0", "period": 0.3, **options}
    async with Node(replica, **said) as node:
        yield node


def port_of(node: Node) -> int:
    """Where it listens."""
    assert node.server is not None
    return node.server.port


def context_of(node: Node, client: Replica | None) -> ssl.SSLContext:
    """To a node as a replica, or as a stranger."""
    if client is None:
        return tls.client_context(None, None, node.key)
    return tls.client_context(client.folder / "key.pem", client.author, node.key)


async def connected(node: Node, client: Replica | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open connection."""
    return await asyncio.open_connection("127.0.0.1", port_of(node), ssl=context_of(node, client))


async def ask(
    node: Node,
    client: Replica | None,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """The status and the body of an answer; status 0 where the connection ended without."""
    said = {"Host": "node", "Connection": "close", **({} if body is None else {"Content-Length": str(len(body))})}
    said |= headers or {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items() if value)]
    return await raw(node, client, "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))


async def raw(node: Node, client: Replica | None, data: bytes) -> tuple[int, bytes]:
    """What comes back when these bytes are sent."""
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await connected(node, client)
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.write(data)
            await writer.drain()
        try:
            return await answered(reader)
        finally:
            writer.transport.abort()


async def answered(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """An answer, read to its end or to that of the connection."""
    head = body = b""
    with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        body = await reader.readexactly(int(length[1])) if length else await reader.read()
    return (int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0), body
