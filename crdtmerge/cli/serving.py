"""``crdtmerge serve`` and ``sync``: a replica among its peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crdtmerge.cli.console import emit, progress, say, tell
from crdtmerge.cli.replica_options import HERE, AsJson, Insecure, PoolFolder, counted, size

if TYPE_CHECKING:
    from crdtmerge.gossip.node import Node

STATUS = "127.0.0.1:7071"


def serve(
    pool: PoolFolder = HERE,
    listen: Annotated[
        str, typer.Option(metavar="H:P", help="Where peers reach it, over TLS; http://H:P without. Port 0: any.")
    ] = "127.0.0.1:7070",
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A peer to talk to: https://HOST:PORT#KEY, or a trusted one's URL."),
    ] = None,
    status: Annotated[
        str, typer.Option(metavar="H:P|off", help="Where its page, /metrics and /healthz are shown, over plain HTTP.")
    ] = STATUS,
    resolve: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Keep a merged checkpoint here up to date.")
    ] = None,
    key_quota: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fetch no more of one key's contributions, for example 50GB.")
    ] = None,
    insecure: Insecure = False,
    period: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.05, help="Between two sessions, about; news travel at once.")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Run a peer node: share the pool with peers until it is stopped (Ctrl-C).

    With --json the first line on stdout says where it listens.
    """
    import asyncio

    from crdtmerge.cli.beginning import bytes_of
    from crdtmerge.gossip.node import Node
    from crdtmerge.pool.replica import Replica

    quota = bytes_of(key_quota) if key_quota else None

    async def run() -> None:
        with Replica.open(pool) as replica:
            node = Node(
                replica,
                listen=listen,
                peers=peer or (),
                resolve=resolve,
                insecure=insecure,
                period=period,
                status=status,
                key_quota=quota,
            )
            async with node:
                _stop_on_signals(node)
                _announce(node, as_json)
                await node.stopped()

    asyncio.run(run())


def _announce(node: Node, as_json: bool) -> None:
    import sys

    said = {"url": node.url, "status": node.status_url, "key": node.key.hex(), "pool": node.replica.pool_id.hex()}
    if as_json:
        emit(said, compact=True)
    else:
        tell(f"peers reach it at {said['url']}")
        tell(f"its page is at {said['status']}" if said["status"] else "no status page")
    sys.stdout.flush()


def _stop_on_signals(node: Node) -> None:
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, node.stop)


def sync(
    where: Annotated[
        str, typer.Argument(metavar="WHERE", help="A peer's URL, a folder, or a bucket (s3://bucket/prefix).")
    ],
    pool: PoolFolder = HERE,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Bring this replica and another, a folder or a bucket to the same set, both ways."""
    from crdtmerge.gossip import anywhere
    from crdtmerge.pool.replica import Replica

    with Replica.open(pool) as replica, progress(quiet=as_json) as show:
        done = anywhere.sync(replica, where, insecure=insecure, progress=show)
    if as_json:
        emit(done.document)
        return
    received, sent = counted(done.ops_received, "operation"), counted(done.ops_sent, "operation")
    tell(f"received {received} and {size(done.bytes_fetched)}, sent {sent} and {size(done.bytes_sent)}")
    tell(f"  root {done.root}")
    if done.lacking:
        say(f"note: {counted(done.lacking, 'blob')} that this pool needs are not there either")
    if done.ignored:
        say(f"note: {counted(done.ignored, 'name')} there mean nothing to us and were ignored")
    for name, why in [*done.false.items(), *done.failing.items()]:
        say(f"note: {name}: {why}")
