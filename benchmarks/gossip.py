"""Benchmarks of gossip: a blob over TLS beside the bare sockets, and reconciliation beside the full exchange.

RULES
- The blob travels between two processes over loopback, by the client and the server that nodes use, and is checked,
  written and made durable where it arrives. The floor is what a pair of blocking sockets moves in the same run: TLS 1.3
  with the same cipher, two processes, reads of 1 MiB that are thrown away. Both alternate.
- Reconciliation counts whole messages of sessions without operations in them, and the CPU seconds of both sides. Beside
  it: all ids of one side sent to the other, and version vectors of 16 actors, computed on the same sets.

Example: python -m benchmarks.gossip --gib 1 --ids 1000000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from crdtmerge import limits
from crdtmerge.gossip import reconcile
from crdtmerge.gossip.index import Bound, Index
from crdtmerge.keys import Key

KEYS = [Key.from_seed(bytes([number]) * 32) for number in (1, 2)]
ACTORS = 16
READ_BYTES = 1 << 20


# ---- a blob


def rates(scratch: Path, gib: float, runs: int) -> dict[str, Any]:
    """Bytes a second of a fetch and of the bare sockets, alternating."""
    import numpy as np

    from crdtmerge.pool.replica import Replica
    from crdtmerge.recipe import Recipe

    nbytes = int(gib * limits.GIB)
    like = {"w": np.zeros(nbytes // 4, np.float32)}
    folder = scratch / "one"
    with Replica.create(folder, Recipe("weight_average"), like=like, key=KEYS[0]) as one:
        one.peers.trust(KEYS[1].public)
        one.export(scratch / "empty")
        one.add({"w": np.random.default_rng(0).standard_normal(nbytes // 4, np.float32)})
    del like
    command = [sys.executable, "-m", "crdtmerge", "serve", "-C", str(folder), "--listen", "127.0.0.1:0"]
    fetches, floors = [], []
    with subprocess.Popen([*command, "--status", "off", "--json"], stdout=subprocess.PIPE, text=True) as node:
        try:
            assert node.stdout is not None
            url = json.loads(node.stdout.readline())["url"]
            for run in range(runs):
                floors.append(floor_rate(scratch, nbytes))
                fetches.append(fetch_rate(scratch, url, run))
        finally:
            node.terminate()
    ratios = [fetch / floor for fetch, floor in zip(fetches, floors, strict=True)]
    return {
        "bytes": nbytes,
        "fetch_mb_per_second": [round(rate / 1e6) for rate in fetches],
        "bare_tls_mb_per_second": [round(rate / 1e6) for rate in floors],
        "ratio": round(statistics.median(ratios), 3),
    }


def fetch_rate(scratch: Path, url: str, run: int) -> float:
    """Bytes a second of one fetch into a new replica, from the first question until all is durable and named."""
    from crdtmerge.gossip import address, tls
    from crdtmerge.gossip.client import HttpPeer, connections
    from crdtmerge.gossip.fetch import Fetch
    from crdtmerge.gossip.holding import Holding
    from crdtmerge.gossip.talk import converse
    from crdtmerge.pool.replica import Replica

    async def fetched(replica: Replica) -> float:
        where = address.peer(url)
        assert where.key is not None
        context = tls.client_context(replica.folder / "key.pem", replica.author, where.key)
        async with connections() as session:
            peer = HttpPeer(session, where.url, context)
            await converse(Holding(replica), peer, asyncio.to_thread)
            begin = time.perf_counter()
            with replica.receiving() as receiving:
                done = await Fetch(receiving, [peer]).run()
            seconds = time.perf_counter() - begin
            assert done.lacking == 0
            return done.nbytes / seconds

    with Replica.of_bundle(scratch / f"two{run}", scratch / "empty", key=KEYS[1]) as replica:
        rate = asyncio.run(fetched(replica))
    shutil.rmtree(scratch / f"two{run}")
    return rate


SENDER = """
import socket, ssl, sys
from pathlib import Path
from crdtmerge.gossip import tls
from crdtmerge.keys import Key
key, nbytes = Path(sys.argv[1]), int(sys.argv[2])
public = Key.load(key).public
context = tls.server_context(key, public, [])
data = memoryview(bytes(1 << 20))
with socket.create_server(("127.0.0.1", 0)) as listening:
    print(listening.getsockname()[1], public.hex(), flush=True)
    with context.wrap_socket(listening.accept()[0], server_side=True) as connection:
        for _ in range(nbytes >> 20):
            connection.sendall(data)
"""


def floor_rate(scratch: Path, nbytes: int) -> float:
    """Bytes a second between two blocking TLS sockets of two processes."""
    from crdtmerge.gossip import tls

    key = scratch / "key.pem"
    if not key.exists():
        KEYS[0].save(key)
    command = [sys.executable, "-c", SENDER, str(key), str(nbytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        port, public = sender.stdout.readline().split()
        context = tls.client_context(None, None, bytes.fromhex(public))
        buffer, got = bytearray(READ_BYTES), 0
        with context.wrap_socket(socket.create_connection(("127.0.0.1", int(port)))) as connection:
            assert connection.version() == "TLSv1.3"
            begin = time.perf_counter()
            while count := _received(connection, buffer):
                got += count
            seconds = time.perf_counter() - begin
    assert got == nbytes >> 20 << 20
    return got / seconds


def _received(connection: ssl.SSLSocket, buffer: bytearray) -> int:
    try:
        return connection.recv_into(buffer)
    except (ssl.SSLEOFError, ConnectionResetError):
        return 0


# ---- reconciliation


def sets(count: int, ours: int, theirs: int, *, recent: bool = True) -> tuple[Index, Index]:
    """Two sets of about so many operations, some of which only one side has: the newest, or any."""
    source = random.Random(count)
    shared: list[Bound] = [(height // 4, source.randbytes(32)) for height in range(count)]

    def more(number: int) -> list[Bound]:
        height = count // 4
        return [(height + n if recent else source.randrange(height), source.randbytes(32)) for n in range(number)]

    return Index([*shared, *more(ours)]), Index([*shared, *more(theirs)])


def reconciled(ours: Index, theirs: Index) -> dict[str, Any]:
    """One session: rounds, bytes of all messages, CPU seconds of both sides together."""
    begin = time.process_time()
    session = reconcile.Session(ours)
    asked, rounds, nbytes = session.opening(), 0, 0
    while asked:
        message = reconcile.pack(asked)
        answered = reconcile.pack(reconcile.answer(theirs, reconcile.unpack(message)))
        asked = session.take(reconcile.unpack(answered))
        rounds, nbytes = rounds + 1, nbytes + len(message) + len(answered)
    seconds = time.process_time() - begin
    return {
        "wanted": len(session.wanted()),
        "offered": len(session.offered()),
        "rounds": rounds,
        "bytes": nbytes,
        "cpu_seconds": round(seconds, 4),
        "full_exchange_bytes": 32 * (len(ours) + len(theirs)),
        "version_vector_bytes": 2 * ACTORS * (32 + 16 + 8),
    }


def reconciliations(count: int) -> dict[str, Any]:
    """Sessions over sets of several sizes."""
    found = {}
    for n in sorted({10_000, count}):
        found[f"{n} equal"] = reconciled(*sets(n, 0, 0))
        found[f"{n}, 10 recent differences"] = reconciled(*sets(n, 5, 5))
        found[f"{n}, 1000 scattered differences"] = reconciled(*sets(n, 500, 500, recent=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure gossip.")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--ids", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(".bench"))
    arguments = parser.parse_args()
    arguments.scratch.mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        os.environ["XDG_STATE_HOME"] = os.environ["CRDTMERGE_CACHE"] = str(Path(name) / "state")
        if arguments.gib:
            figures["blob"] = rates(Path(name), arguments.gib, arguments.runs)
        if arguments.ids:
            figures["reconciliation"] = reconciliations(arguments.ids)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
