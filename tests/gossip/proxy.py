"""TCP proxies that make a network bad: delay, broken and blackholed connections, truncation, flipped bytes, partition.

    with Proxies(seed=1) as proxies:
        proxy = proxies.open(("127.0.0.1", port), FLAKY)
        ... connect to proxy.port instead ...
        proxies.cut([proxy])          # nothing gets through until proxies.heal([proxy])

What happens to the n-th connection of a proxy follows from the seed; how many there are does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

CHUNK_BYTES = 64 << 10


class Faults(NamedTuple):
    """Seconds that every chunk is late, and what share of connections meets which end; bytes a second at most."""

    delay: float = 0.0
    broken: float = 0.0
    truncated: float = 0.0
    flipped: float = 0.0
    blackholed: float = 0.0
    rate: float | None = None


NONE = Faults()
FLAKY = Faults(delay=0.002, broken=0.12, truncated=0.06, flipped=0.12, blackholed=0.02)


@dataclass(eq=False)
class Proxy:
    """One listening port in front of a target."""

    faults: Faults
    random: random.Random
    target: tuple[str, int] | None = None
    port: int = 0
    closed: bool = False
    received: int = 0
    """Bytes that the target's side sent and whoever connected has taken."""
    connections: int = 0
    broken: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)


class Proxies:
    """Runs proxies in a thread of its own while in the context."""

    def __init__(self, seed: int) -> None:
        self._seed, self._count = seed, 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def open(self, target: tuple[str, int] | None = None, faults: Faults = NONE) -> Proxy:
        """A new proxy; its target may be said later."""
        self._count += 1
        proxy = Proxy(faults, random.Random(f"{self._seed} {self._count}"), target)
        proxy.port = self._run(self._listen(proxy))
        return proxy

    def cut(self, proxies: Iterable[Proxy]) -> None:
        """Let nothing through; what is connected breaks."""
        self._run(self._cut(list(proxies)))

    def heal(self, proxies: Iterable[Proxy]) -> None:
        """Let everything through again."""
        for proxy in proxies:
            proxy.closed = False

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self, proxy: Proxy) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _connected(proxy, reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=CHUNK_BYTES)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _cut(self, proxies: list[Proxy]) -> None:
        for proxy in proxies:
            proxy.closed = True
            for writer in list(proxy.open):
                writer.transport.abort()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connected(proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one connection to whatever end it meets."""
    proxy.connections += 1
    end, at = _fate(proxy)
    if proxy.closed or proxy.target is None:
        writer.transport.abort()
        return
    try:
        there, back = await asyncio.open_connection(*proxy.target, limit=CHUNK_BYTES)
    except OSError:
        writer.transport.abort()
        return
    proxy.open |= {writer, back}
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_carry(proxy, reader, back, None, 0))
            group.create_task(_carry(proxy, there, writer, end, at, counted=True))
    except* (OSError, BrokenOffError):
        proxy.broken += 1
    finally:
        for one in (writer, back):
            one.transport.abort()
        proxy.open -= {writer, back}


class BrokenOffError(Exception):
    pass


def _fate(proxy: Proxy) -> tuple[str | None, int]:
    """How a connection ends, and after how many bytes."""
    at, chance = int(2 ** proxy.random.uniform(0, 21)), proxy.random.random()
    for end in ("broken", "truncated", "flipped", "blackholed"):
        chance -= getattr(proxy.faults, end)
        if chance < 0:
            return end, at
    return None, 0


async def _carry(
    proxy: Proxy,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    end: str | None,
    at: int,
    *,
    counted: bool = False,
) -> None:
    """One direction."""
    done, faults = 0, proxy.faults
    while data := await reader.read(CHUNK_BYTES):
        late = faults.delay + (len(data) / faults.rate if faults.rate else 0)
        if late:
            await asyncio.sleep(late)
        if end is not None and done + len(data) > at:
            if end == "blackholed":
                await asyncio.sleep(3600)
            if end == "broken":
                raise BrokenOffError
            if end == "truncated":
                writer.write(data[: at - done])
                await writer.drain()
                raise BrokenOffError
            broken = bytearray(data)
            broken[at - done] ^= 1
            data, end = bytes(broken), None
        writer.write(data)
        await writer.drain()
        done += len(data)
        if counted:
            proxy.received += len(data)
    with contextlib.suppress(OSError):
        writer.write_eof()
